"""What a run says at its end, and tools/report.py: its commands work, and the page has what it promises."""
import re
import shlex

import pytest
import train_grpo
import train_sft
from helpers import PROBLEMS, read_rows, train

import sample
from tools import plot, report

PROGRAMS = {"sample.py": sample.parse_args, "tools/plot.py": plot.parse_args, "tools/report.py": report.main}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tmp_path_factory.mktemp("report") / "run"


def test_a_run_shows_samples_and_says_what_to_type_next(run, capsys):
    train(train_grpo, run, f"--data {PROBLEMS} --steps 2 --eval_count 4 --eval_every 1")
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith(("  right: ", "  wrong: "))]) >= 3  # of three evaluations
    assert lines[-4] == f"all of it is in {run}" and lines[-1] == f"  python tools/report.py {run}"
    for line in lines[-3:-1]:
        python, program, *words = shlex.split(line)
        args = PROGRAMS[program](words)
        assert python == "python" and str(run) in (getattr(args, "model", ""), *getattr(args, "runs", []))


@pytest.mark.parametrize("options, said", [
    ("--task countdown sudoku --lora_r 2", "sample.py --model data/tiny --adapter {out} --task countdown --watch"),
    ("--data {data} --batch_size 2", "sample.py --model {out} --prompt 'your question'")])
def test_sft_says_it_too(options, said, tmp_path, capsys):
    data, out = tmp_path / "rows.jsonl", tmp_path / "run"
    data.write_text('{"prompt": "1 + 1?", "completion": "2"}\n' * 8)
    train(train_sft, out, options.format(data=data) + " --steps 1")
    assert said.format(out=out) in capsys.readouterr().out


def test_a_report_has_settings_before_and_after_curves_and_samples(run, monkeypatch):
    page = report.main([str(run)]).read_text()
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## Before and after", "## Curves", "## Samples", "## Settings"]
    rows = [row for row in read_rows(run / "metrics.jsonl") if "held_out_accuracy" in row]
    before, after = rows[0]["held_out_closed"], rows[-1]["held_out_closed"]
    assert f"| closed | {before:.1%} | {after:.1%} |" in page and "| steps | 2 |" in page
    rows = plot.read_run(run)[1]
    assert report.before_and_after({0: rows[0]})[0][1:] == [f"{rows[0]['held_out_accuracy']:.1%}", "not yet"]
    completion = read_rows(run / "samples.jsonl")[0]["completion"]
    assert completion in page and "2 of 2 steps" in page
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)  # without matplotlib
    page = report.main([str(run)]).read_text()
    assert "report.png" not in page and re.search(r"reward +[▁-█]{2}  \d", page)


def test_a_line_of_blocks_rises_with_the_numbers():
    assert report.sparkline([0, 1, 2, 7]) == "▁▂▃█" and report.sparkline([3, 3]) == "▁▁"


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(SystemExit, match="^error: [^\n]*holds no training to report on"):
        report.main([str(tmp_path)])
