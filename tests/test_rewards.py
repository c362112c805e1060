"""data/: the answer format, exact arithmetic, rewards and scores, on any text."""
import copy
import random
import re
import time
from fractions import Fraction

import pytest

from data import TASKS, countdown, gsm8k, math500, sudoku
from data.format import MAX_TEXT, closed_answer, is_formatted, last_box, write_completion
from data.tokenizer import EOT

COUNTDOWN = {"numbers": [3, 3, 7], "target": 13}
SUDOKU = {"puzzle": "3102200002100320", "solution": "3142243142131324"}
EXAMPLES = {"countdown": COUNTDOWN, "sudoku": SUDOKU, "gsm8k": {"answer": "18"}, "math500": {"answer": r"\frac{1}{2}"}}
RIGHT = {"countdown": "3 + 3 + 7", "sudoku": SUDOKU["solution"], "gsm8k": "18", "math500": r"\frac12"}


def answer(text):
    return write_completion("x", text)


def short(value):
    """The name of a parameter that may be long."""
    return ascii(value)[:40]


# ---------------------------------------------------------------- the answer format and exact arithmetic

@pytest.mark.parametrize("text, found", [
    ("a <answer> \n1 + 2\n </answer> b", "1 + 2"), ("<answer></answer>", ""), ("<answer>1</answer> <answer>2", "1"),
    ("<answer>1</answer><answer>2</answer>", "2"), ("<answer>1 <answer>2</answer> 3</answer>", "1 <answer>2"),
    ("<answer>1</answer> so </answer> <answer>", "1"), ("</answer><answer>", None), ("<ANSWER>1</ANSWER>", None),
    ("x" * MAX_TEXT + "<answer>1</answer>", "1"), ("<answer>1</answer>" + "x" * MAX_TEXT, None)], ids=short)
def test_the_last_closed_answer_counts(text, found):
    assert closed_answer(text) == found


def test_the_format_is_strict():
    good = write_completion("a\nb < c", "1")
    assert all(map(is_formatted, (good, f"\n {good} \n", write_completion("", ""))))
    for bad in ("", good.upper(), f"so {good}", f"{good}\nso", f"{good}\n{good}", good.replace("\n1\n", "1"),
                good.replace("</reasoning>\n", ""), good.replace("</answer>", ""), good.replace("b", "<answer>"),
                write_completion("a" * MAX_TEXT, "1")):
        assert not is_formatted(bad), bad


@pytest.mark.parametrize("text, box", [
    (r"\boxed{\frac{1}{2}} or \boxed{3}", "3"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{5", None),
    ("5", None), (r"$\boxed 7$ is it", "7"), (r"\boxed{}", ""), (r"} \boxed{{}", None)])
def test_boxes_have_balanced_braces(text, box):
    assert last_box(text) == box


@pytest.mark.parametrize("text", [
    "9**9**9**9", "7//2", "7 % 2", "1e9", "0x10", "1_0", "3.5", "３ + 4", "", " ", "1/0", "3(5)", "(1,2)", "()",
    "1 +\n2", "1\t+ 2", "__import__('os')", "1 if 1 else 2", "~1", "07 + 1", "(1", "1 2", "1j", "True", "1 # 2", "1\0",
    "(" * 200, "1(" * 66 + ")" * 66, "9" * 201, "(" * 10_000 + "1" + ")" * 10_000, "1+" * 10**6], ids=short)
def test_what_is_no_arithmetic_has_no_value(text):
    assert countdown.safe_value(text) is None
    assert countdown.reward(answer(text), COUNTDOWN)["exact"] == 0


def test_arithmetic_is_exact_and_left_associative():
    for text, value in (("8 - 3 - 2", 3), ("8 / 4 / 2", 1), ("6/(1-3/4)", 24), ("1/3", Fraction(1, 3)), ("2 - -3", 5),
                        ("-" * 199 + "1", -1), ("(" * 99 + "1" + ")" * 99, 1), ("9*" * 99 + "9", 9**100)):
        assert countdown.safe_value(text) == (value, [int(n) for n in re.findall(r"\d+", text)])
    rng = random.Random(0)
    for _ in range(1000):
        text = "".join(rng.choices("0123456789+-*/() ", k=rng.randint(1, 9)))
        result = countdown.safe_value(text)
        if result:
            exact = re.sub(r"\d+", r"Fraction(\g<0>)", text)
            assert result[0] == eval(exact.strip(), {"Fraction": Fraction})


# ---------------------------------------------------------------- rewards

@pytest.mark.parametrize("text, total", [
    ("3 - (-3 - 7)", 1), ("7+3+3", 1), ("7 + 3 * 2", 0.1), ("7 + 3", 0.1), ("13", 0.1), ("3 + 3 + 7 + 0", 0.1),
    ("7 + 7 - 3 / 3", 0.1), ("3 + 3 + 7 = 13", 0.1), ("33 - 7", 0.1), ("", 0.1), (r"\boxed{3 + 3 + 7}", 0.1)])
def test_countdown_reward(text, total):
    """As in the authors' reward a box is no arithmetic. The accuracy looks into it, on every task."""
    rewards, scores = countdown.reward(answer(text), COUNTDOWN), countdown.score(answer(text), COUNTDOWN)
    assert rewards == {"exact": float(total == 1), "closed": 0.1 * (total == 0.1)}
    assert scores == {"accuracy": float(total == 1 or "boxed" in text), "closed": 1, "format": 1}


@pytest.mark.parametrize("text, cells, accuracy", [
    ("3142\n2431\r\n4213\t\n1324", 1, 1), (" " * 300 + RIGHT["sudoku"], 1, 1), ("3122243142131324", 7 / 8, 0),
    ("1142243142131324", 1, 0),  # a clue changed: the metric looks at empty cells only
    (RIGHT["sudoku"][:-1], 7 / 8, 0), (RIGHT["sudoku"] + "1", 1, 0), (SUDOKU["puzzle"], 0, 0), ("", 0, 0),
    ("３" + RIGHT["sudoku"][1:], 1, 0), ("|".join(RIGHT["sudoku"]), 1, 0), ("1: " + RIGHT["sudoku"], 0, 0)])
def test_sudoku_reward(text, cells, accuracy):
    assert sudoku.reward(answer(text), SUDOKU) == {"cells": cells}
    assert sudoku.score(answer(text), SUDOKU) == {"accuracy": accuracy, "cells": cells, "closed": 1, "format": 1}


def test_the_sudoku_reward_is_the_authors():
    """Their rule, by a regular expression: the digits of the last answer, padded or cut, the share of empty cells."""
    rng, puzzle, solution = random.Random(0), SUDOKU["puzzle"], SUDOKU["solution"]
    pieces = ["<answer>", "</answer>", *"0123", "1432", "4213", "\n", " x ", "３", "²", solution, solution[:9]]
    for _ in range(5000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 20)))
        answers = re.findall("<answer>(.*?)</answer>", text, re.DOTALL)
        digits = "".join(character for character in (answers or [""])[-1] if character.isdigit())
        digits = (digits + 16 * "0")[:16]
        empty = [i for i in range(16) if puzzle[i] == "0"]
        share = sum(digits[i] == solution[i] for i in empty) / len(empty)
        assert sudoku.reward(text, SUDOKU) == {"cells": share}, text


def test_another_solution_of_a_sudoku_is_accurate():
    stored, other = sudoku.solve("12" + "0" * 14)[:2]
    scores = sudoku.score(answer(other), {"puzzle": "12" + "0" * 14, "solution": stored})
    assert scores["accuracy"] == 1 and 0 < scores["cells"] < 1


@pytest.mark.parametrize("text, number", [
    ("-3", -3), ("−3", -3), ("$1,000.", 1000), ("18 dollars", 18), ("60\\%", 60), (".5", Fraction(1, 2)),
    ("1,234,567.25", Fraction(4938269, 4)), ("12,34", None), ("16 - 7 = 9", None), (None, None), ("1e9", None),
    ("1" * 201, None), ("٣", None), ("-$5", -5), ("-\\$1,000.50", Fraction(-2001, 2)), ("$-5", -5),
    ("18 eggs!", 18), ("18 ten-dollar bills", 18), ("5km", 5), ("1,0000", None), ("1000,000", None),
    # the sign stands apart, or the number goes on: what it says is not plain
    ("- 5", None), ("-$ 5", None), ("-€5", None), ("--5", None), ("x-5", None), ("minus 5", None),
    ("Negative 5", None), ("5k", None), ("5 K", None), ("$5M", None), ("5 million", None), ("5!", None)])
def test_read_number(text, number):
    assert gsm8k.read_number(text) == number


@pytest.mark.parametrize("text, truth, rewards", [  # tags, soft, strict, integer, correct
    (answer("-3") + "\n", "-3", (0.5, 0.5, 0.5, 0.5, 2)), (answer("1,000"), "1000", (0.5, 0.5, 0.5, 0.5, 2)),
    (answer("18.0"), "18", (0.5, 0.5, 0.5, 0, 2)), (answer(r"\boxed{18}"), "18", (0.5, 0.5, 0.5, 0, 2)),
    (answer("17"), "18", (0.5, 0.5, 0.5, 0.5, 0)), (answer("18") + " and so on", "18", (0.491, 0.5, 0, 0.5, 2)),
    (answer("18") + "x" * 5000, "18", (0, 0.5, 0, 0.5, 2)),  # never below 0
    ("<reasoning>a</reasoning> <answer>18</answer>", "18", (0, 0.5, 0, 0.5, 2)),
    ("<answer>\n18\n</answer>", "18", (0.25, 0, 0, 0.5, 2)), ("<answer>\n18", "18", (0.125, 0, 0, 0, 0))])
def test_gsm8k_reward(text, truth, rewards):
    assert tuple(gsm8k.reward(text, {"answer": truth}).values()) == pytest.approx(rewards)


@pytest.mark.parametrize("text, rewards", [  # format, correct
    (answer(r"\boxed{\frac12}"), (1, 2)), (answer("0.5"), (0.75, 2)), (r"it is \boxed{1/2}", (0.5, 2)),
    ("1/2", (0.25, 0)), (write_completion(r"\boxed{0.5}", "2"), (0.75, 0)), (answer(r"\boxed{2"), (0.75, 0))])
def test_math_reward(text, rewards):
    assert tuple(math500.reward(text, EXAMPLES["math500"]).values()) == rewards


def test_an_empty_form_is_no_answer():
    r"""\$, \text{ east} and 10\% lose what they hold as signs and units: nothing is left to compare."""
    for truth in (r"\$", r"\text{ east}", " "):
        example = {"answer": truth}
        assert not any(math500.is_right(wrong, example) for wrong in (None, "", r"\%", r"\text{ west}"))
        assert math500.is_right(truth, example)
        assert math500.reward(answer(r"\boxed{}"), example)["correct"] == 0


@pytest.mark.parametrize("text, form", [
    (r"\tfrac12", r"\frac{1}{2}"), (r"\frac1{72}", r"\frac{1}{72}"), (r"\frac{72}1", r"\frac{72}1"),
    ("0.5", r"\frac{1}{2}"), ("-3/4", r"\frac{-3}{4}"), (".25", "0.25"), (r"{.25}", "{0.25}"),
    (r"\sqrt3", r"\sqrt{3}"), (r"2 \sqrt {5}", r"2\sqrt{}{5}"), (r"\left( 1, 2 \right)", "(1,2)"),
    (r"90^{\circ}", "90"), (r"\$36", "36"), (r"10\%", "10"), (r"5.4 \text{ cents}", "5.4"), ("x = 5", "5"),
    ("abc=5", "abc=5"), ("a=b=5", "a=b=5"), ("", ""), ("02/3", "02/3"), (r"\frac", None), (r"\sqrt\sqrt3", None),
    (r"\frac\frac12", None), ("a/b", None), (r"\text{ a}\text{ b}", None), (r"\frac1", r"\frac1")])
def test_latex_has_one_form(text, form):
    assert math500.normalise(text) == form


BAIT = ["9**9**9**9", "(" * 10_000, "\\" * 100_000, "\\boxed{" * 20_000, "\\boxed{" + "{" * 100_000,
        "<answer>" * 20_000, "</answer>" * 20_000, "<answer></answer>" * 60_000, "1" * 10**6, "1," * 500_000,
        answer("1" * 10**6), answer("1 " * 9000), "\\frac" * 20_000, "\\boxed{" + "\\frac" * 3000 + "}",
        "\\boxed{" + "/" * 10**5 + "}", "\\boxed{" + "\\text{ " * 2000 + "}" * 2001, "\\boxed " * 20_000,
        "\\boxed{" + "=" * 15_000 + "}", "\\boxed{" + "\\sqrt" * 3000 + "1}", "<reasoning>\n" + "\n</reasoning>" * 900,
        "<reasoning>" + "</reasoning>" + " " * 15_000 + "<", "<reasoning>\n" + "<reasonin" * 2000, "\n" * 10**6,
        "\ud800", "\0", "３" * 1000, "$" * 10**6]


@pytest.mark.parametrize("task", TASKS)
def test_rewards_are_total_pure_and_bounded_on_hostile_texts(task):
    module, example, rng = TASKS[task], copy.deepcopy(EXAMPLES[task]), random.Random(0)
    pieces = ["<answer>", "</answer>", "<reasoning>", "</reasoning>", "\n", " ", "3", "1432", *"+-*/(){}$,._=", "**",
              "１", "\0", EOT, "\ud800", "\\boxed{", "\\frac", "\\text{ ", RIGHT[task], answer(RIGHT[task])]
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 25))) for _ in range(1500)]
    parts = list(module.reward("", example))
    for text in texts + BAIT:
        started = time.process_time()
        rewards, scores = module.reward(text, example), module.score(text, example)
        if time.process_time() - started > 0.02:  # the machine may be busy: once more
            started = time.process_time()
            module.reward(text, example), module.score(text, example)
            assert time.process_time() - started < 0.02, (text[:40], len(text))
        values = [*rewards.values(), *scores.values()]
        assert list(rewards) == parts and all(type(value) is float and 0 <= value <= 2 for value in values)
        assert scores["format"] <= scores["closed"] and example == EXAMPLES[task]
    assert not any(module.score(text, example)["accuracy"] for text in BAIT)
    assert module.score(answer(RIGHT[task]), example)["accuracy"] == 1
