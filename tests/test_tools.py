"""Programs of tools/ that measure: the 8B script in small, and what the soak reads."""
import json
import random
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


def test_the_soak_reads_losses_and_leaves_out_evaluations_and_a_torn_line(tmp_path):
    assert soak.logged_losses(tmp_path) == []
    rows = [{"step": 0, "held_out_loss": 2.0}, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.9},
            {"step": 2, "held_out_loss": 1.5}, {"step": 3, "loss": 0.8}]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    assert soak.logged_losses(tmp_path) == [(1, 1.0), (2, 0.9), (3, 0.8)]


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
def test_the_soak_ends_a_life(tmp_path):
    sleeper = [sys.executable, "-c", "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"]
    job = soak.start(sleeper, tmp_path / "log")
    soak.wait_for("at random", tmp_path, job, 1.0)
    assert soak.end_life(job, "SIGKILL to all", rng=None) is False and job.poll() is not None


def test_the_soak_copies_and_damages_the_newest_checkpoint_alone(tmp_path):
    for step in (1, 2):
        (tmp_path / f"step_{step:06d}").mkdir()
        (tmp_path / f"step_{step:06d}" / "a.safetensors").write_bytes(b"12345")
    (tmp_path / "metrics.jsonl").write_text("")
    before = soak.contents(tmp_path / "step_000001")
    deeds = {soak.meddle(tmp_path, random.Random(seed))[0] for seed in range(5)}
    assert len(deeds) > 1 and soak.contents(tmp_path / "step_000001") == before
