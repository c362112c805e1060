"""variants/authors_rewards.py: hand-made texts, the authors' rules written once more in another way, and a run."""
import copy
import json
import random
import re
import time

import pytest
from helpers import EVERYWHERE, SMALL, read_rows

import train_grpo
from data import TASKS, math500
from data.format import MAX_TEXT
from data.tokenizer import Tokenizer
from variants import authors_rewards
from variants.authors_rewards import read_box, reward_gsm8k, reward_math500

GOOD = "<reasoning>\na\n</reasoning>\n<answer>\n18\n</answer>\n"
LINE = "<reasoning>a</reasoning> <answer>18</answer>"
EIGHTEEN, HALF = {"solution": "so #### 18"}, {"answer": "?", "solution": r"so $\boxed{\frac{1}{2}}$."}
PIECES = ["<answer>", "</answer>", "<reasoning>", "</reasoning>", *"\n\n \r{}$/=", "18", "³", "-3", GOOD, LINE,
          "\boxed", r"\boxed", r"\boxed ", r"\boxed{", r"\boxed{\frac12}", r"\fbox{1/2}", r"\frac", "0.5", r"\text{ "]


def random_texts(count):
    rng = random.Random(0)
    return ["".join(rng.choices(PIECES, k=rng.randint(0, 12))) for _ in range(count)]


# ---------------------------------------------------------------- GSM8K

@pytest.mark.parametrize("text, solution, rewards", [  # tags, soft, strict, integer, correct
    (GOOD, "#### 18", (0.5, 0, 0.5, 0.5, 2)), (GOOD, "####18\n#### 7", (0.5, 0, 0.5, 0.5, 2)),
    (GOOD[:-1], "#### 18", (0.5 - 0.048 + 0.001, 0, 0, 0.5, 2)),  # no line break at the end: all 48 cost
    (GOOD + "\n", "#### 18", (0.5 - 0.002, 0, 0.5, 0.5, 2)), (GOOD + "abc", "#### 18", (0.5 - 0.006, 0, 0, 0.5, 2)),
    (GOOD.replace("\na\n", "\na\nb\n"), "#### 18", (0.5, 0, 0, 0.5, 2)), (LINE, "#### 18", (0, 0.5, 0, 0.5, 2)),
    (" " + LINE, "#### 18", (0, 0, 0, 0.5, 2)), (GOOD.replace("18", "1,000"), "#### 1,000", (0.5, 0, 0.5, 0, 2)),
    (GOOD.replace("18", "1000"), "#### 1,000", (0.5, 0, 0.5, 0.5, 0)), ("18", "#### 18", (0, 0, 0, 0.5, 2)),
    (GOOD.replace("18", "-3"), "#### -3", (0.5, 0, 0.5, 0, 2)), ("18.0", "#### 18", (0, 0, 0, 0, 0)),
    (GOOD.replace("18", r"\boxed{18}"), "#### 18", (0.5, 0, 0.5, 0, 0)), ("<answer>² ", "#### 2", (0, 0, 0, 0.5, 0)),
    ("\n</answer>", "#### 18", (0.126, 0, 0, 0, 0)), ("x" * 99 + "\n<answer>\n18", "#### 18", (0.014, 0, 0, 0.5, 2))])
def test_gsm8k_slips(text, solution, rewards):
    assert tuple(reward_gsm8k(text, {"solution": solution}).values()) == pytest.approx(rewards)


def gsm8k_by_lines(text):
    """The rules for EIGHTEEN from pieces and lines of the text, without regular expressions and without `count`."""
    tag_lines = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
    pieces = {tag: text.split(tag) for tag in tag_lines}
    tags = sum(len(parts) == 2 for parts in pieces.values()) / 8
    if len(pieces["\n<answer>\n"]) == 2:
        tags -= len(text.split("\n</answer>\n").pop()) / 1000
    if len(pieces["\n</answer>"]) == 2:
        tags += (1 - len(pieces["\n</answer>"][1])) / 1000
    lines, soft = text.split("\n"), False
    strict = lines[:1] + lines[2:4] + lines[5:6] == ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]
    for end in range(len("<reasoning>"), len(lines[0]) * text.startswith("<reasoning>")):
        behind = text[end:].removeprefix("</reasoning>").lstrip()
        is_pair = text[end:].startswith("</reasoning>") and behind.startswith("<answer>")
        soft |= is_pair and "</answer>" in behind.split("\n")[0]
    answer = text.split("<answer>").pop().split("</answer>")[0].strip()
    return {"tags": tags, "soft": soft / 2, "strict": (strict and lines[6:] in ([""], ["", ""])) / 2,
            "integer": answer.isdigit() / 2, "correct": 2 * (answer == "18")}


def test_gsm8k_rules():
    earned = dict.fromkeys(gsm8k_by_lines(""), 0)
    for text in random_texts(5000):
        rewards, expected = reward_gsm8k(text, EIGHTEEN), gsm8k_by_lines(text)
        assert rewards.keys() == expected.keys()
        assert max(abs(rewards[name] - expected[name]) for name in earned) < 1e-9, text
        earned = {name: earned[name] + (rewards[name] > 0) for name in earned}
    assert min(earned.values()) > 10, earned


# ---------------------------------------------------------------- MATH

@pytest.mark.parametrize("text, rewards", [  # format, correct
    (r"<answer>\boxed{1/2}</answer>", (0.75, 2)), (r"<answer> so \boxed{0.5}", (0.75, 2)),
    (r"\boxed{\tfrac12}", (0.25, 2)), ("<answer>1/2</answer>", (0.75, 0)), ("1/2", (0.25, 2)),
    (r"\boxed{1/2} <answer>7</answer>", (0.75, 2)), (r"\boxed{1/2} \boxed{3", (0.25, 0)),
    (r"\boxed 1/2$ or", (0.25, 2)), (r"\fbox{1/2}", (0.25, 0)),
    ("\boxed", (0.5, 0)), ("<answer>\boxed", (1, 0)), ("<answer></answer>\boxed", (0.75, 0))])
def test_math_slips(text, rewards):
    assert tuple(reward_math500(text, HALF).values()) == rewards


@pytest.mark.parametrize("text, box", [
    (r"\boxed{a} \boxed{\frac{1}{2}} \fbox{b}", r"\frac{1}{2}"), (r"\boxed{}", ""), (r"\boxed5{6}7", r"\boxed5{6}"),
    (r"\boxed}{5}", r"\boxed}{5}"), (r"\fbox{1} \fbox{{2}}3", r"\fbox{{2}}"), (r"\boxed{1} \boxed {2}$", "{2}"),
    (r"\boxed 1$ \boxed{2}", "1"), (r"a \boxed{1", r"a \boxed{1"), ("a {1}", "a {1}"), ("", "")])
def test_boxes(text, box):
    assert read_box(text) == box


@pytest.mark.parametrize("solution, answer, right", [
    (r"\boxed{3}, so \boxed{4}", "3", "4"), ("", "4", "4"), (r"an open \boxed{4", "4", r"an open \boxed{4"),
    ("no box", "4", "no box"), (r"\boxed 4$", "5", "4")])
def test_the_truth_of_math_is_the_box_of_the_solution_where_there_is_one(solution, answer, right):
    for text in ("3", "4", "5", solution):
        correct = reward_math500(text, {"solution": solution, "answer": answer})["correct"]
        assert correct == 2 * (read_box(text) == read_box(right))


@pytest.mark.parametrize("text, solution, right", [
    (r"\boxed{\$}", r"\boxed{}", True), ("", r"\boxed{ }", True), (r"\boxed{a/b}", r"\boxed{a/b}", True),
    (r"\boxed{a / b}", r"\boxed{a/b}", False), (r"\boxed{\frac}", r"\boxed{}", False)])
def test_forms_may_be_empty_and_texts_without_a_form_are_compared(text, solution, right):
    assert reward_math500(text, {"solution": solution})["correct"] == 2 * right


def math_by_places(text):
    """The rules for HALF: the shortest balanced piece from the last box, the part of the text behind <answer>."""
    parts = text.split("<answer>")
    place = parts[1].split("</answer>")[0] if parts[1:] else text
    start = text.rfind("\\boxed") if "\\boxed" in text else text.rfind("\\fbox")
    ends = [i + 1 for i in range(start, len(text)) if start >= 0 and text[i] == "}"]
    balanced = [text[start:end] for end in ends if text[start:end].count("{") == text[start:end].count("}")]
    box = re.sub(r"(?s)^\\boxed\{(.*)\}$", r"\1", (balanced or [text])[0])
    if "\\boxed " in text:
        box = re.search(r"(?s).*\\boxed ([^$]*)", text)[1]
    return {"format": 0.25 + 0.5 * (len(parts) > 1) + 0.25 * (chr(8) + "oxed" in place),
            "correct": 2.0 * (math500.normalise(box) == r"\frac{1}{2}")}


def test_math_rules():
    texts = random_texts(5000)
    for text in texts:
        assert reward_math500(text, HALF) == math_by_places(text), text
    assert sum(reward_math500(text, HALF)["correct"] for text in texts) > 200


# ---------------------------------------------------------------- both

BAIT = ["<reasoning>" + "</reasoning><answer>" * 10**4, "<answer></answer>" * 10**5, "\n" * 10**6, r"\boxed{" * 10**5,
        r"\boxed" + "}" * 10**5, r"\fbox" * 10**5, r"\boxed{" + r"\frac12" * 2000 + "}", "1" * 10**6, "\ud800"]


@pytest.mark.parametrize("task", authors_rewards.REWARDS)
def test_rewards_are_total_pure_and_bounded(task):
    reward, example = authors_rewards.REWARDS[task], {**HALF, **EIGHTEEN}
    for text in BAIT + random_texts(500):
        started, before = time.process_time(), copy.deepcopy(example)
        rewards = reward(text, example)
        assert time.process_time() - started < 2 and example == before
        assert all(type(value) is float and -0.002 * MAX_TEXT <= value <= 2 for value in rewards.values())


def test_the_program_trains_on_the_rewards_of_the_authors(tmp_path, monkeypatch):
    """On the texts that a model should write, with the answers as the data spell them."""
    monkeypatch.setattr(Tokenizer, "decode", lambda *_: GOOD.replace("18", "1,000"))
    rows, ours = [{"question": f"{i} + 1,000?", "answer": "Add. #### 1,000"} for i in range(8)], TASKS["gsm8k"]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    words = f"{EVERYWHERE} {SMALL['train_grpo']} --task gsm8k --data {path} --eval_data {path} --out {tmp_path}/run"
    args = train_grpo.parse_args(f"{words} --steps 1 --gen_length 8 --diffusion_steps 1 --num_iterations 1".split())
    authors_rewards.main(args)
    (row,) = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    parts = {name: row[f"reward_{name}"] for name in ("tags", "soft", "strict", "integer", "correct")}
    assert parts == {"tags": 0.5, "soft": 0, "strict": 0.5, "integer": 0, "correct": 2} and row["accuracy"] == 1
    assert TASKS["gsm8k"] is ours


@pytest.mark.parametrize("task", ["countdown", "sudoku"])
def test_tasks_that_have_the_reward_of_the_authors_are_refused(task):
    with pytest.raises(SystemExit, match=f"^error: --task {task}: .*run train_grpo.py$"):
        authors_rewards.main(train_grpo.parse_args(["--task", task]))
