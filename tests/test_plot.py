"""plot.py: runs grouped by what differs, seeds as a band, and a clear word where matplotlib or a file is missing."""
import json
import sys

import pytest

import plot


def make_run(folder, seed, mu, steps=4):
    folder.mkdir()
    options = {"task": "countdown", "num_iterations": mu, "seed": seed, "out": str(folder), "resume": False}
    (folder / "config.json").write_text(json.dumps({"options": options}))
    rows = [{"step": s, "reward": s + 10 * seed + 100 * mu, "accuracy": 0.5, "seconds": {"rollout": 30, "update": 90},
             **({"held_out_sampled_accuracy": 0.25} if s % 2 == 0 else {})} for s in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    return [make_run(tmp_path / f"mu{mu}-{seed}", seed, mu) for mu in (12, 4) for seed in (0, 1)]


def test_runs_that_differ_in_the_seed_alone_are_one_line(runs):
    groups = plot.group_runs([plot.read_run(run) for run in runs])
    assert list(groups) == ["num_iterations 4", "num_iterations 12"]
    assert all(len(seeds) == 2 for seeds in groups.values())
    assert list(plot.group_runs([plot.read_run(run) for run in runs[:2]])) == ["countdown"]


def test_curve(runs, tmp_path):
    short = make_run(tmp_path / "short", 0, 4, steps=3)
    seeds = [plot.read_run(run)[1] for run in (*runs[2:], short)]
    assert plot.curve(seeds[:2], "reward", "step", 1) == ([1, 2, 3, 4], [406, 407, 408, 409], [401, 402, 403, 404],
                                                          [411, 412, 413, 414])
    assert plot.curve(seeds[:1], "reward", "minutes", 2)[:2] == ([2, 4, 6, 8], [401, 401.5, 402.5, 403.5])
    assert plot.curve(seeds[:1], "reward", "update", 1)[0] == [4, 8, 12, 16]
    assert plot.curve(seeds[:1], "held_out_sampled_accuracy", "step", 3)[:2] == ([2, 4], [0.25, 0.25])
    assert plot.curve(seeds, "reward", "step", 1)[0] == [1, 2, 3]  # the steps that all have


@pytest.mark.parametrize("suffix, head", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_picture_has_a_panel_for_each_metric_and_labels_at_the_lines(runs, tmp_path, suffix, head):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    figure = plot.main(plot.parse_args([*runs, "--out", str(tmp_path / f"p.{suffix}")]))
    shown = [panel for panel in figure.axes if panel.get_visible()]
    assert [panel.get_title(loc="left") for panel in shown] == ["reward", "accuracy", "held out sampled accuracy"]
    assert {text.get_text().strip() for text in shown[0].texts} == {"num_iterations 4", "num_iterations 12"}
    assert "2 seeds" in shown[0].get_xlabel() and (tmp_path / f"p.{suffix}").read_bytes().startswith(head)


def test_what_is_missing_is_named_in_one_line(runs, tmp_path, monkeypatch):
    def fails(words, *messages):
        with pytest.raises(SystemExit) as stopped:
            plot.main(plot.parse_args(list(map(str, words))))
        assert all(m in str(stopped.value) for m in messages) and "\n" not in str(stopped.value)
    fails([tmp_path / "nowhere"], "no config.json")
    fails([*runs, "--metrics", "beauty"], "--metrics beauty", "reward")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    fails(runs, "pip install matplotlib")
    (tmp_path / "mu4-0" / "metrics.jsonl").write_text('{"step"')
    fails(runs, "row 1: not JSON")
    (tmp_path / "mu4-0" / "metrics.jsonl").write_text("")
    fails(runs, "holds no step yet")
