"""tools/watch.py: the canvas as lines that fit a window, and the verdict."""
import io
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, embedded

from data import TASKS
from tools import watch


@pytest.mark.parametrize("columns", [1, 3, 7, 80])
def test_lines_are_no_wider_than_the_window_and_lose_nothing(columns):
    text = "abcdefgh\n\nxy\nabc"
    lines = watch.wrap([(character, 0) for character in text], columns)
    assert all(len(line) <= columns for line in lines)
    assert "".join(character for line in lines for character, _ in line) == text.replace("\n", "")
    rows = sum(max(1, -(-len(line) // columns)) for line in text.split("\n"))  # as a terminal would wrap them
    assert len(lines) == rows


@pytest.mark.parametrize("newest, height, shown", [
    (0, 4, [0, 1, 2, 3]), (9, 4, [6, 7, 8, 9]), (5, 4, [2, 3, 4, 5]), (5, 40, [*range(10)]), (3, 1, [3])])
def test_the_window_holds_the_newest_tokens(newest, height, shown):
    lines = [[(str(i), 7 if i == newest else -1)] for i in range(10)]
    assert [int(line[0][0]) for line in watch.fit(lines, height)] == shown


def test_a_canvas_shows_masks_tokens_and_ends():
    tokenizer = embedded()[1]
    ids = torch.tensor([*tokenizer.encode("12 is"), tokenizer.mask_id, tokenizer.eos_id])
    steps = torch.tensor([*range(len(ids) - 2), -1, 3])
    characters = watch.read_canvas(tokenizer, ids, steps)
    assert "".join(character for character, _ in characters) == "12 is░·"
    assert characters[0] == ("1", 0) and characters[-2:] == [("░", -1), ("·", 3)]


def test_a_frame_fits_the_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    tokenizer = embedded()[1]
    monkeypatch.setattr(watch.shutil, "get_terminal_size", lambda: os.terminal_size((20, 8)))
    monkeypatch.setattr(watch, "PAUSE", 0)
    monkeypatch.setattr(watch.sys, "stdout", Terminal())
    ids = torch.full((400,), tokenizer.mask_id)
    ids[:3] = torch.tensor(tokenizer.encode("12")[0])
    watch.show(tokenizer, "Numbers: 3, 7, 12 Target: 22 " * 9, 32, ids, torch.tensor([0, 1, 2] + [-1] * 397))
    frame = watch.sys.stdout.getvalue()
    assert frame.count("\n") < 8 and "round 3 of 32" in frame and "\x1b[38;5;39m1" in frame


def test_the_verdict_says_why():
    task, example = TASKS["countdown"], {"numbers": [3, 7, 12], "target": 22}
    answer = "<answer>\n{}\n</answer>"
    for text, said in ((answer.format("3 + 7 + 12"), "right: the answer is 3 + 7 + 12\naccuracy 1"),
                       (answer.format("3 + 7"), "wrong: the answer is 3 + 7\naccuracy 0"),
                       ("3 + 7 + 12", "wrong: no answer is closed")):
        assert watch.verdict(text, example, task).startswith(said)


@pytest.mark.slow
def test_the_option_of_sample_starts_it_from_any_folder(tmp_path):
    words = ["--task", "countdown", "--watch", "--diffusion_steps", "4", "--device", "cpu"]
    run = subprocess.run([sys.executable, ROOT / "sample.py", *words], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and "round 1 of 4" in run.stdout, run.stderr
    assert run.stdout.splitlines()[-2].startswith(("right: ", "wrong: ")) and not list(tmp_path.iterdir())
