"""Programs of tools/ that measure: the 8B script in small, and what the soak reads."""
import json
import subprocess
import sys

import pytest
from helpers import ROOT

from tools import gpu_8b, soak


@pytest.mark.slow
def test_the_8b_script_runs_in_small_and_agrees_with_the_plan(capsys):
    rows = gpu_8b.main(["--tiny", "--device", "cpu", "profile", "rollout", "sft", "step"])
    text = capsys.readouterr().out
    assert "largest log ratio of its first update: 0\n" in text and text.count(" x aten::mm\n") == 2
    assert rows.keys() == {"rollout", "sft", "step"}
    for measured, planned in rows.values():
        assert planned == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plot", "soak", "gpu_8b"])
def test_a_tool_runs_by_itself_from_any_folder(name, tmp_path):
    command = [sys.executable, ROOT / "tools" / f"{name}.py", "--help"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("usage:"), run.stderr


def test_the_soak_counts_steps_and_leaves_out_evaluations_and_a_torn_line(tmp_path):
    assert soak.logged_steps(tmp_path) == []
    rows = [{"step": 0, "held_out_loss": 2.0}, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.9},
            {"step": 2, "held_out_loss": 1.5}, {"step": 3, "loss": 0.8}]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    assert soak.logged_steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("steps, is_broken", [([], False), ([1, 2, 3], False), ([1, 3], True), ([1, 2, 2], True)])
def test_the_soak_sees_gaps_and_doubles(steps, is_broken):
    assert soak.has_gaps_or_doubles(steps) == is_broken


def test_the_soak_reads_where_a_life_began(tmp_path):
    log = tmp_path / "life.log"
    log.write_text("a warning\n")
    assert soak.resumed_at(log) == 0
    log.write_text("a warning\nresumed from /some/run/step_000120\nstep 121/200\n")
    assert soak.resumed_at(log) == 120


@pytest.mark.slow
def test_the_soak_kills_a_run_and_notices_a_run_that_ended_by_itself(tmp_path):
    sleeper = [sys.executable, "-c", "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"]
    assert soak.live(sleeper, tmp_path / "log", 1.0, "SIGKILL to all", rng=None) is False
    with pytest.raises(SystemExit, match="^error: the run ended by itself"):
        soak.live([sys.executable, "-c", ""], tmp_path / "log", 0.5, "SIGKILL to all", rng=None)
