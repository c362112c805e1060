"""tools/plot.py: runs grouped by what differs, seeds as a band, evaluations from step 0; what is missing is named."""
import json
import sys

import pytest

from tools import plot


def make_run(folder, seed=0, steps=4, **options):
    """A run's folder with an evaluation every second step, from step 0 on."""
    folder.mkdir()
    options = {"task": "countdown", "num_iterations": 4, "seed": seed, "out": str(folder), **options}
    (folder / "config.json").write_text(json.dumps({"options": options}))
    rows = []
    for step in range(steps + 1):
        if step > 0:
            reward = step + 10 * seed + 100 * options["num_iterations"]
            rows.append({"step": step, "reward": reward, "loss": 0.5, "minutes": 2 * step})
        if step % 2 == 0:
            rows.append({"step": step, "held_out_accuracy": step / 10, "minutes": 2 * step + 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    return [make_run(tmp_path / f"mu{mu}-{seed}", seed, num_iterations=mu) for mu in (12, 4) for seed in (0, 1)]


def test_runs_that_differ_in_the_seed_alone_are_a_line(runs):
    groups = plot.group_runs([plot.read_run(run) for run in runs])
    assert list(groups) == ["num_iterations 4", "num_iterations 12"]
    assert all(len(seeds) == 2 for seeds in groups.values())
    assert list(plot.group_runs([plot.read_run(run) for run in runs[:2]])) == ["countdown"]


def test_a_curve_is_the_mean_and_range_at_the_steps_that_all_seeds_have(runs, tmp_path):
    seeds = [plot.read_run(run)[1] for run in runs[2:]]
    assert plot.curve(seeds, "reward", "step", smooth=1) == (
        [1, 2, 3, 4], [406, 407, 408, 409], [401, 402, 403, 404], [411, 412, 413, 414])
    assert plot.curve(seeds[:1], "reward", "minutes", smooth=2)[:2] == ([2, 4.5, 6, 8.5], [401, 401.5, 402.5, 403.5])
    assert plot.curve(seeds[:1], "reward", "update", smooth=1)[0] == [4, 8, 12, 16]
    assert plot.curve(seeds, "held_out_accuracy", "step", smooth=3)[:2] == ([0, 2, 4], [0, 0.2, 0.4])
    shorter = plot.read_run(make_run(tmp_path / "shorter", steps=3))[1]
    assert plot.curve([*seeds, shorter], "reward", "step", smooth=1)[0] == [1, 2, 3]


@pytest.mark.parametrize("suffix, head", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_picture_has_a_panel_for_each_metric_that_a_task_has(runs, tmp_path, suffix, head):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    sft = make_run(tmp_path / "sft", task=["sudoku", "countdown"])
    log = tmp_path / "sft" / "metrics.jsonl"
    log.write_text('{"step": 0, "held_out_loss": 1.0, "minutes": 0}\n{"step": 1, "loss": 2.0, "minutes": 1}\n')
    figure = plot.main([*runs, sft, "--out", str(tmp_path / f"picture.{suffix}")])
    panels = [panel for panel in figure.axes if panel.get_visible()]
    assert [panel.get_title(loc="left") for panel in panels] == [
        "countdown: held out accuracy", "countdown: reward", "countdown: loss",
        "sudoku countdown: held out loss", "sudoku countdown: loss"]
    evaluations, rewards = panels[0].lines, panels[1].lines
    assert [line.get_label() for line in evaluations] == ["num_iterations 4", "num_iterations 12"]
    assert list(evaluations[0].get_xdata()) == [0, 2, 4] and evaluations[0].get_marker() == "o"
    assert list(rewards[0].get_xdata()) == [1, 2, 3, 4] and rewards[0].get_marker() == "None"
    assert "2 seeds" in panels[1].get_xlabel()
    assert (tmp_path / f"picture.{suffix}").read_bytes().startswith(head)


def test_what_is_missing_is_named_in_one_line(runs, tmp_path, monkeypatch):
    def fails(words, message):
        with pytest.raises(SystemExit, match=rf"^error: [^\n]*{message}[^\n]*$"):
            plot.main(list(map(str, words)))
    fails([tmp_path / "nowhere"], "nowhere: no config.json")
    fails([*runs, "--metrics", "beauty"], "--metrics beauty: .*reward")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    fails(runs, "pip install matplotlib")
    log = tmp_path / "mu4-0" / "metrics.jsonl"
    log.write_text('{"step"')
    fails(runs, "row 1: not JSON")
    log.write_text("")
    fails(runs, "holds no step yet")
