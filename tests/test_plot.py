"""tools/plot.py: runs grouped by what differs, seeds and their mean, evaluations from step 0; what is missing."""
import json
import sys

import pytest
from helpers import ROOT

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


def test_runs_that_differ_in_the_seed_alone_are_a_group(runs):
    groups = plot.group_runs([plot.read_run(run) for run in runs])
    assert list(groups) == ["num_iterations 4", "num_iterations 12"]
    assert all(len(seeds) == 2 for seeds in groups.values())
    assert list(plot.group_runs([plot.read_run(run) for run in runs[:2]])) == ["countdown"]


def test_a_curve_is_the_mean_of_the_seeds_at_the_steps_that_all_have(runs, tmp_path):
    seeds = [plot.read_run(run)[1] for run in runs[2:]]
    assert plot.curve(seeds, "reward", "step", smooth=1) == (
        [1, 2, 3, 4], [406, 407, 408, 409], [[401, 402, 403, 404], [411, 412, 413, 414]])
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
    assert all(1.04 * max(line.get_ydata()) < panel.get_ylim()[1] for panel in panels for line in panel.lines)
    assert panels[3].lines[0].get_marker() == "o"  # a line of one point shows nothing
    assert [panel.get_title(loc="left") for panel in panels] == [
        "countdown: held-out problems solved (more is better)",
        "countdown: mean reward of the rollouts (more is better)",
        "sudoku countdown: loss on held-out rows (less is better)", "sudoku countdown: training loss (less is better)"]
    evaluations = [line for line in panels[0].lines if line.get_label() != "_seed"]
    assert [line.get_label() for line in evaluations] == ["num_iterations 4", "num_iterations 12"]
    assert list(evaluations[0].get_xdata()) == [0, 2, 4] and evaluations[0].get_marker() == "o"
    assert len(panels[1].lines) == 6  # of two groups the mean and two seeds
    assert list(panels[1].lines[0].get_xdata()) == [1, 2, 3, 4] and panels[1].lines[0].get_marker() == "None"
    assert "mean of 2 seeds" in panels[1].get_xlabel()
    assert [text.get_text() for text in panels[1].texts] == ["num_iterations 4", "num_iterations 12"]
    ticks = [float(tick) for panel in panels for tick in panel.get_xticks()]
    assert all(tick == int(tick) for tick in ticks)
    assert panels[0].yaxis.get_major_formatter()(0.2) == "20%"
    assert (tmp_path / f"picture.{suffix}").read_bytes().startswith(head)


def test_labels_that_would_overlap_move_apart_and_others_stay():
    heights = plot.spread([(0, 10.0, 50), (0, 12.0, 50), (0, 12.0, 50), (0, 60.0, 50), (80, 11.0, 50)], gap=11)
    near = sorted(heights[:3])
    assert min(b - a for a, b in zip(near, near[1:])) > 10.9 and heights[3:] == [60.0, 11.0]
    assert sum(near) / 3 == pytest.approx(34 / 3, abs=0.1)  # the crowd stays where it was


def test_runs_of_other_kinds_and_runs_without_a_step_are_skipped_and_named(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    evaluation, begun = tmp_path / "sample-1", tmp_path / "begun"
    for folder in (evaluation, begun):
        folder.mkdir()
        (folder / "config.json").write_text('{"options": {}}')
    (begun / "metrics.jsonl").write_text('{"step"')  # its first line is being written
    figure = plot.main([str(evaluation), str(begun), *runs, "--out", str(tmp_path / "plot.png")])
    said = capsys.readouterr().out
    assert f"skipped {evaluation}: no training run" in said and f"skipped {begun}: it holds no step yet" in said
    assert "4 runs, 2 panels" in said and len([panel for panel in figure.axes if panel.get_visible()]) == 2
    with pytest.raises(SystemExit, match="^error: nothing to draw[^\n]*$"):
        plot.main([str(evaluation)])


def test_what_is_missing_is_named_in_one_line(runs, tmp_path, monkeypatch):
    def fails(words, message):
        with pytest.raises(SystemExit, match=rf"^error: [^\n]*{message}[^\n]*$"):
            plot.main(list(map(str, words)))
    fails([tmp_path / "nowhere"], "nothing to draw")
    for name in ("plot.xyz", "plot", "nowhere/plot.png"):
        fails([*runs, "--out", tmp_path / name], f"--out {tmp_path / name}: must end in .png")
    fails([*runs, "--metrics", "beauty"], "--metrics beauty: .*reward")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    fails(runs, "pip install matplotlib")
    (tmp_path / "mu4-0" / "metrics.jsonl").write_text('{"step"\n{}\n')
    fails(runs, "row 1: not JSON")


def test_a_picture_is_drawn_again_until_the_run_has_ended(runs, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            (tmp_path / "mu12-0" / "summary.json").write_text("{}")

    monkeypatch.setattr(plot.time, "sleep", sleep)
    plot.main([runs[0], "--every", "30", "--out", str(tmp_path / "plot.png")])
    assert waits == [30, 30] and capsys.readouterr().out.count("1 run, 2 panels") == 3


@pytest.mark.parametrize("name", plot.FIGURES)
def test_the_results_of_docs_are_read_row_by_row(name):
    path = ROOT / "docs" / "results" / f"{name}.json"
    runs, rows = plot.read_results(path), json.loads(path.read_text())["rows"]
    assert len(runs) == sum(len(row["values"]["curve"]) for row in rows)
    options, steps = runs[0]
    assert (options["task"], options["seed"]) == (rows[0]["task"], 0)
    assert [row["accuracy"] for row in steps.values()] == rows[0]["values"]["curve"][0]
    assert steps[20]["update"] == 80 and steps[20]["minutes"] == rows[0]["values"]["seconds"][0] / 3
    of_task = [run for run in runs if run[0]["task"] == rows[0]["task"]]
    assert list(plot.group_runs(of_task)) == [row["row"] for row in rows if row["task"] == rows[0]["task"]]
