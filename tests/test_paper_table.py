"""tools/paper_table.py: every run once, again after a failure only what is missing, and the table beside the paper."""
import json
import subprocess
from pathlib import Path

import pytest

from tools import paper_table


def options_of(words):
    return dict(zip(words, words[1:]))


@pytest.fixture
def ran(monkeypatch):
    """The commands that would have run; the command number `fail_at` fails."""
    commands = []

    def run(words, **_):
        commands.append(words)
        done = subprocess.CompletedProcess(words, returncode=int(len(commands) == run.fail_at))
        if done.returncode == 0 and "merge.py" in str(words):
            Path(words[-1]).mkdir()
        elif done.returncode == 0:
            write_results(words)
        return done
    run.fail_at = None
    monkeypatch.setattr(paper_table.subprocess, "run", run)
    return commands, run


def write_results(words):
    """What a training or an evaluation leaves behind."""
    options, names = options_of(words), [Path(word).name for word in words]
    out = Path(options["--out"])
    out.mkdir(exist_ok=True)
    (out / "summary.json").write_text("{}")
    if "train_sft.py" in names or "train_grpo.py" in names:
        (out / "step_000010").mkdir()
        return
    row = {"prompt": "Answer in a \\boxed{}.", "question": "1 + 1?", "answer": "2",
           "completion": "<answer>\\boxed{2}</answer>", "ended": True, "effective_tokens": 5}
    (out / f"{options['--task']}_{options['--gen_length']}.jsonl").write_text(json.dumps(row) + "\n")


def test_the_whole_table_is_9_trainings_and_48_evaluations(capsys, tmp_path):
    paper_table.main(["--dry_run", "--out", str(tmp_path), "--gpus", "8", "--puzzles", "d1/dataset"])
    lines = capsys.readouterr().out.splitlines()
    assert len(set(lines)) == len(lines) == 66 and not list(tmp_path.iterdir())
    for name, count in (("train_sft", 1), ("train_grpo", 8), ("merge", 9), ("regrade", 48)):
        assert sum(f"/{name}.py " in line for line in lines) == count
    assert sum("--data d1/dataset" in line for line in lines) == 24  # of the puzzles
    from_sft = [line for line in lines if "/train_grpo.py " in line and f"--model {tmp_path}/sft/merged" in line]
    assert len(from_sft) == 4 and all("--nproc_per_node=8" in line and "--resume" in line for line in from_sft)


def test_a_failed_command_ends_it_and_the_next_call_goes_on(ran, tmp_path, capsys):
    commands, run = ran
    words = ["--out", str(tmp_path), "--tasks", "gsm8k", "--lengths", "256", "--model", "data/tiny"]
    run.fail_at = 5  # the RL after the base's evaluation, SFT, its merge and its evaluation
    with pytest.raises(SystemExit, match=r"^error: exit code 1, see [^\n]*rl-gsm8k.log[^\n]*$"):
        paper_table.main(words)
    assert len(commands) == 5
    shares = paper_table.main(words)
    assert len(commands) == 5 + 6 and commands[5] == commands[4]  # RL, merge, evaluation; and the same after SFT
    assert shares == {(row, "gsm8k", 256): 1.0 for row in paper_table.PAPER}
    assert paper_table.main([*words, "--show"]) == shares and len(commands) == 11
    assert "100.0 (76.7)" in capsys.readouterr().out
