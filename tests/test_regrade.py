"""tools/published.py and tools/regrade.py: the authors' rules against a transcription, their files, and ours."""
import json
import os
import random
import re
import time

import pytest

from data import TASKS
from data.format import MAX_TEXT, write_completion
from tools import regrade
from tools.published import (END, GRADERS, find_expression, find_grid, find_in_paper, find_latex, find_number,
                             make_example, reaches, write_prompt)

FOLDER = os.environ.get("D1_GENERATIONS", "")  # the authors' *_generations.json
needs_generations = pytest.mark.skipif(not FOLDER, reason="D1_GENERATIONS names no folder of the authors' generations")
SUDOKU = {"puzzle": "3102200002100320", "solution": "3142243142131324"}
EXAMPLES = {"countdown": {"numbers": [3, 7, 12], "target": 22}, "sudoku": SUDOKU, "gsm8k": {"answer": "18"},
            "math500": {"answer": r"\frac{1}{2}"}}
RIGHT = {"countdown": "3 + 7 + 12", "sudoku": SUDOKU["solution"], "gsm8k": "18", "math500": r"\frac12"}


# ---------------------------------------------------------------- the rules once more, by regular expressions

def read_number(texts):
    for text in texts:
        try:
            return float(text)
        except ValueError:
            continue
    return None


def transcribed_number(text):
    for box in re.findall(r"\\boxed{(.*?)}", text):
        number = read_number([box.strip(), *re.findall(r"-?\d+\.?\d*", box)[:1]])
        if number is not None:
            return number
    match = re.search("<answer>(.*?)</answer>", text, re.DOTALL)
    return read_number([match[1].strip(), *re.findall(r"-?\d+\.?\d*", match[1])[-1:]]) if match else None


def transcribed_grid(text):
    for pattern in (r"<answer>.*?```\s*([\d\s]+)```", r"<answer>(.*?)(?:<\|eot_id\|>|<\|endoftext\|>|</answer>)",
                    r"</answer>\s*(.*?)(?:<\|eot_id\|>|<\|endoftext\|>|$)", r"(\d{16})\s*</answer>", r"\b(\d{16})\b"):
        match = re.search(pattern, text, re.DOTALL)
        if match and match[1].strip():
            return re.sub(r"\s", "", match[1])
    return ""


def transcribed_box(text):
    """The four rules for the text of a box; None: no result."""
    if "\\boxed " in text:
        return text.split("\\boxed ")[-1].split("$")[0]
    for name in ("\\boxed", "\\fbox"):
        if name in text:
            tail = name + text.split(name)[-1]
            parts = [tail[:match.end()] for match in re.finditer("}", tail)]
            box = next((part for part in parts if part.count("{") == part.count("}")), None)
            inside = re.fullmatch(r"\\boxed\{(.*)\}", box or "", re.DOTALL)
            return inside[1] if inside else box
    return text


def transcribed_latex(text):
    latex = transcribed_box(text)
    match = None if latex else re.search("<answer>(.*?)</answer>", text, re.DOTALL)
    return match[1].strip() if match else latex


def transcribed_expression(text):
    expression = transcribed_box(text)
    if expression is None:
        match = re.search("<answer>(.*?)</answer>", text, re.DOTALL)
        expression = match[1].strip() if match else text
    expression = re.sub(r"\\times|\\cdot", "*", expression.replace("\\div", "/"))
    match = re.search(r"([0-9+\-*/() ]+)=[0-9. ]+", expression)
    return match[1].strip() if match else expression


PIECES = ["<answer>", "</answer>", "\\boxed{", "\\boxed ", "}", "{", "=", "```", *END, "1234", "4321" * 4, "\n", " ",
          "3 + 4", "$", "\\times", "\\div", "1,000", "...", "\\boxed{}", ".", "18 eggs", "nan", "-3",
          "\\fbox{", "\\boxed3", "\\boxed", "\\boxed{3{4}}", "<answer>5</answer>"]
MARKS = ("\\boxed{", "<answer>", "</answer>", "}")


def mutate(text, rng):
    """A text cut and spliced at places that matter to the rules, or with a mark gone, doubled or another."""
    if rng.random() < 0.5:
        mark = rng.choice(MARKS)
        return text.replace(mark, rng.choice(("", " ", mark + mark, *PIECES)), rng.choice((1, -1)))
    places = [match.start() for match in re.finditer(r"<|\\boxed|\}|=|\d{4}", text)] or [0]
    a, b = sorted((rng.choice(places), rng.choice(places)))
    return text[:a] + rng.choice(PIECES) + text[b:b + rng.randint(0, 40)] + rng.choice((text[b:], rng.choice(PIECES)))


def assert_read_alike(texts):
    for text in texts:
        if len(text) <= MAX_TEXT:
            for ours, theirs in ((find_number, transcribed_number), (find_grid, transcribed_grid),
                                 (find_expression, transcribed_expression), (find_latex, transcribed_latex)):
                assert repr(ours(text)) == repr(theirs(text)), text  # repr: NaN is NaN


def test_texts_are_read_as_the_rules_say():
    rng = random.Random(0)
    texts = ["".join(rng.choices(PIECES, k=rng.randint(1, 12))) for _ in range(5000)]
    assert_read_alike([*texts, *(mutate(text, rng) for text in texts)])


# ---------------------------------------------------------------- the authors' files

COUNTS = {  # (problems, right) at lengths 128, 256 and 512, counted by their parse_and_get_acc.py; Sudoku: cells
    "countdown": (256, (53, 50, 41)), "gsm8k": (1130, (783, 863, 883)), "math500": (500, (130, 162, 181)),
    "sudoku": (2048, (240, 137, 112))}


@needs_generations
def test_their_files_give_the_first_row_of_the_paper(capsys):
    results = regrade.main([FOLDER])
    names = {f"{task}_instruct_{length}_{length // 2}": (of, right) for task, (of, rights) in COUNTS.items()
             for length, right in zip((128, 256, 512), rights)}
    assert results and results.keys() <= names.keys()  # lengths that are not in the folder are not looked for
    for name, result in results.items():
        of, right = names[name]
        assert result["problems"] == min(of, 256) if "sudoku" in name else of
        assert result["published"] == right / of
        assert "gsm8k" in name or f"{100 * right / of:.1f}" == str(result["paper"])
    header, *lines = capsys.readouterr().out.splitlines()
    assert {"problems", "published", "exact", "paper"} < set(header.split())
    assert len(lines[:lines.index("")]) == len(results)


@needs_generations
def test_their_texts_are_read_as_the_rules_say():
    rng = random.Random(0)
    texts = [row["text"] for _, _, rows in regrade.find_generations([FOLDER]).values() for row in rows]
    assert_read_alike([*texts, *(mutate(text, rng) for text in texts)])


def write_theirs(path, texts, truth=18.0, length=64):
    items = [{"question": "q", "ground_truth": truth, "generations": text} for text in texts]
    path.write_text(json.dumps({"generations": items, "gen_length": length}))


def test_files_of_one_evaluation_are_counted_together(tmp_path):
    """Sums over files, then one division: never a mean of means."""
    right = "<answer>\n\\boxed{18}\n</answer><|eot_id|><|endoftext|><|endoftext|>"
    write_theirs(tmp_path / "gsm_mine_64_32_0_generations.json", [right, "17", "16"])
    write_theirs(tmp_path / "gsm_mine_64_32_1_generations.json", [right])
    [(task, length, rows)] = regrade.find_generations([tmp_path]).values()
    result = regrade.grade(task, rows)
    assert (task, length, result["published"], result["exact"]) == ("gsm8k", 64, 0.5, 0.5)
    assert result["effective_tokens"] == (62 + 64 + 64 + 62) / 4  # the canvas without EOS
    write_theirs(tmp_path / "gsm_mine_64_32_2_generations.json", [right], length=128)
    with pytest.raises(SystemExit, match=r"^error: [^\n]*_2_generations.json: another length[^\n]*$"):
        regrade.find_generations([tmp_path])


@pytest.mark.parametrize("name, content, words", [
    ("gsm8k_x_64_32_0_generations.json", "{", "not a file of generations"),
    ("gsm8k_x_64_32_0_generations.json", '{"generations": []}', "gen_length"),
    ("gsm8k_x_64_32_0_generations.json", '{"gen_length": 64, "generations": [{"question": "q"}]}', "item 0"),
    ("sudoku_x_64_32_0_generations.json",
     '{"gen_length": 64, "generations": [{"question": "q", "generations": "", "ground_truth": "1"}]}', "item 0"),
    ("poetry.json", "{}", "the name must be"), ("poetry_32.jsonl", "{}", "the name must be"),
    ("gsm8k_64.jsonl", '{"completion": "x"}', "row 1"), ("gsm8k_64.jsonl", "x", "row 1"),
    ("readme.txt", "", "no generations in this folder")])
def test_generations_that_cannot_be_graded_are_named(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(SystemExit, match=rf"^error: {tmp_path}[^\n]*{words}[^\n]*$"):
        regrade.main([str(tmp_path if name == "readme.txt" else path)])
    with pytest.raises(SystemExit, match="^error: nowhere: no such file or folder$"):
        regrade.main(["nowhere"])


# ---------------------------------------------------------------- verdicts

@pytest.mark.parametrize("text, right", [
    (r"\boxed{1,000} \boxed{18}", 0), (r"\boxed{...} \boxed{18 eggs}", 1), ("<answer>7 + 11 = 18</answer>", 1),
    ("18", 0), (r"\boxed{} <answer>18</answer>", 1), ("\\boxed{a\n18}", 0)])
def test_gsm8k_takes_the_first_readable_box(text, right):
    assert GRADERS["gsm8k"](text, EXAMPLES["gsm8k"])["published"] == right


def test_gsm8k_problems_whose_answer_was_lost_cannot_be_solved():
    for truth in ("-3", None):
        assert GRADERS["gsm8k"](r"\boxed{-3}", {"answer": truth})["published"] == 0
    assert GRADERS["gsm8k"](r"\boxed{-3}", {"answer": "-3"})["exact"] == 1


@pytest.mark.parametrize("text, published, exact", [
    (r"\boxed{3 + 7 + 12}", 1, 1), (r"\boxed{3 + 7 + 12 = 22}", 1, 0), ("<answer>12+7+3</answer>", 0, 1),
    (r"\boxed{12 <answer>12+7+3</answer>", 1, 1), ("12+7+3", 1, 0), ("so 12 + 7 + 3 = 22.", 1, 0),
    (r"\fbox{12+7+3}", 0, 0), (r"\fbox{12+7+3=22}", 1, 0), (r"\boxed{12+7+3} \boxed3", 0, 1),
    (r"\boxed 12+7+3$.", 1, 1), (r"\boxed{3 \times 7 + 12}", 0, 0), (r"\boxed{12 +7 + 3 + 0}", 0, 0),
    (r"\boxed{12+7+3.}", 1, 0),
    (r"\boxed{}<answer>12+7+3</answer>", 0, 1), (r"\boxed{12(7)+3}", 0, 0), (r"\boxed{3/0+7+12}", 0, 0)])
def test_countdown_reads_expressions_as_python(text, published, exact):
    assert GRADERS["countdown"](text, EXAMPLES["countdown"]) == {"published": published, "of": 1, "exact": exact}


@pytest.mark.parametrize("text, truth, published, exact", [
    (r"\boxed{0.5}", "0.5", 1, 1), ("0.5", r"\frac12", 1, 0), ("so 0.5", "0.5", 0, 0),
    ("<answer>5</answer>", "5", 0, 1), (r"\boxed{} <answer>5</answer>", "5", 1, 1),
    (r"\boxed{5 <answer>5</answer>", "5", 1, 1), (r"\boxed{4}} <answer>5</answer>", "5", 0, 1),
    (r"\boxed{4} <answer>\boxed{5</answer>", "5", 0, 0), (r"\fbox{5}", r"\fbox{5}", 1, 0),
    (r"\boxed3{5}", r"\boxed3{5}", 1, 0), (r"\boxed{", r"\$", 0, 0),
    (r"\boxed{\%}", r"\$", 1, 0), (r"\boxed{}", r"\$", 1, 0)])
def test_math_takes_all_the_text_without_a_box(text, truth, published, exact):
    verdict = GRADERS["math500"](text, {"answer": truth})
    assert (verdict["published"], verdict["exact"]) == (published, exact)


def test_countdown_knows_more_operators_than_exact_arithmetic():
    for expression, numbers, target in (("2**3", [2, 3], 8), ("7//2", [2, 7], 3), ("3.5*2", [3, 5, 2], 7)):
        verdict = GRADERS["countdown"](f"\\boxed{{{expression}}}", {"numbers": numbers, "target": target})
        assert (verdict["published"], verdict["exact"]) == (1, 0)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_arithmetic_is_pythons():
    rng = random.Random(0)
    for _ in range(20_000):
        expression = "".join(rng.choices("012.+-*/() \n", k=rng.randint(1, 8)))  # short: eval ends soon
        try:
            value = complex(eval(expression.strip()))
        except (SyntaxError, TypeError, ArithmeticError):
            value = float("inf")
        for target in (0, 1, 2):
            assert reaches(expression, target) == (abs(value - target) < 1e-5), expression
    assert not reaches("2**.5**9**" * 9 + "9", 1) and not reaches("(-9.**154)**2.5*(9**154)", 1)


@pytest.mark.parametrize("text, right, exact, valid", [
    ("<answer>\n3142 2431\n4213 1324</answer>", 8, 1, 1), ("<answer>\n3142 2431\n4213 1324<|eot_id|>", 8, 0, 0),
    ("<answer>see ```3142243142131324```</answer>", 8, 0, 0), ("</answer> 3142243142131324<|endoftext|>", 8, 0, 0),
    (r"<answer>\boxed{3142243142131324}</answer>", 1, 1, 1), ("<answer>31422431</answer>", 4, 0, 0),
    ("<answer>31422431421313244</answer>", 8, 0, 0), ("<answer>", 0, 0, 0),
    ("<answer>3142243142131321</answer>", 7, 0, 1)])
def test_sudoku_pads_or_cuts_and_counts_cells(text, right, exact, valid):
    assert GRADERS["sudoku"](text, SUDOKU) == {"published": right, "of": 8, "exact": exact, "valid": valid}


@pytest.mark.parametrize("task", GRADERS)
def test_graders_are_total_and_bounded(task):
    for text in ["9**9**9**9", "(" * 10_000, "\\boxed{" * 20_000, "\\boxed{" + "{" * 10**5, "<answer>" * 20_000,
                 "1" * 10**6, "<answer>" + "1" * 10**6 + "</answer>", "```" + "1 " * 400_000, "\\boxed{\n" * 10**5,
                 "<answer>```" + " " * 500_000, "1" * 16 + " " * 900_000, "\\boxed{" + "\\frac" * 20_000 + "}",
                 "\\boxed " * 20_000, "1 + " * 250_000 + "=", "\ud800", "\0", "３" * 1000, "=1" * 300_000]:
        started = time.process_time()
        verdict = GRADERS[task](text, EXAMPLES[task])
        assert time.process_time() - started < 0.1, text[:40]
        assert all(isinstance(value, (int, float)) for value in verdict.values())


# ---------------------------------------------------------------- evaluation with their kind of prompt

def test_a_model_is_evaluated_with_their_kind_of_prompt(tmp_path, capsys):
    words = "--published_prompts --task countdown --count 3 --gen_length 16 --diffusion_steps 4 --device cpu"
    result = regrade.main([*words.split(), "--out", str(tmp_path / "run")])
    rows = [json.loads(line) for line in (tmp_path / "run" / "countdown_16.jsonl").read_text().splitlines()]
    assert len(rows) == result["problems"] == 3 and "published" in capsys.readouterr().out
    assert all(row["prefill"] == "<reasoning>" and "\\boxed{...}" in row["prompt"] for row in rows)
    [(_, _, graded)] = regrade.find_generations([tmp_path / "run"]).values()
    assert all(row["text"].startswith("<reasoning>") for row in graded)
    with pytest.raises(SystemExit, match="^error: --published_prompts evaluates a --task"):
        regrade.main(["--published_prompts"])


@pytest.mark.parametrize("task", TASKS)
def test_our_files_are_graded_with_what_the_prompt_began(tmp_path, task, capsys):
    text = write_completion("x", rf"\boxed{{{RIGHT[task]}}}" if task in regrade.READ_BOXES else RIGHT[task])
    row = {**EXAMPLES[task], "prompt": r"Answer in \boxed{}.", "prefill": text[:11], "completion": text[11:],
           "ended": True, "effective_tokens": 9}
    (tmp_path / f"{task}_32.jsonl").write_text(json.dumps(row) + "\n")
    [(name, result)] = regrade.main([str(tmp_path)]).items()
    assert name.endswith(f"{task}_32") and result["published"] == result["exact"] == 1 and result["problems"] == 1
    table = capsys.readouterr().out
    assert "\nBelieve exact" in table and max(map(len, table.splitlines())) <= 100 < len(name) + 64  # its columns


@pytest.mark.parametrize("task", TASKS)
def test_without_a_box_asked_for_their_rule_for_boxes_is_left_out(tmp_path, task, capsys):
    """Their rule would take all the text, and count none of our Countdown answers."""
    row = {**EXAMPLES[task], "prompt": "Answer.", "completion": write_completion("x", RIGHT[task]), "ended": True,
           "effective_tokens": 9}
    (tmp_path / f"{task}_32.jsonl").write_text(json.dumps(row) + "\n")
    [result] = regrade.main([str(tmp_path)]).values()
    header, _, _, *notes = capsys.readouterr().out.splitlines()
    assert result["exact"] == 1 and result["published"] == (None if task in regrade.READ_BOXES else 1)
    assert ("published" in header) == (not notes[-1].startswith("No")) == (result["published"] is not None)


def test_prompts_and_examples_have_what_they_are_made_of():
    assert write_prompt("countdown", EXAMPLES["countdown"]).endswith("\n\nNumbers: [3, 7, 12]\nTarget: 22")
    assert write_prompt("sudoku", SUDOKU).endswith(f"\n\nPuzzle: {SUDOKU['puzzle']}")
    assert write_prompt("gsm8k", {"question": "q"}).endswith("\n\nq")
    assert make_example("countdown", "q", [[3.0, 7.0, 12.0], 22.0]) == EXAMPLES["countdown"]
    assert make_example("sudoku", f"Solve {SUDOKU['puzzle']}.", SUDOKU["solution"]) == SUDOKU
    assert [make_example("gsm8k", "q", truth)["answer"] for truth in (18.0, None)] == ["18", None]


def test_the_papers_rows_stand_below_ours(capsys):
    assert find_in_paper("+ SFT", "sudoku", 512) == 4.6 and find_in_paper("+ SFT", "sudoku", 32) is None
    regrade.print_beside_the_paper("gsm8k", 256, 0.5, "mine")
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[0].split()[-2:] == ["gsm8k", "256"] and lines[1].split() == ["mine", "50.00%"]
    assert lines[-1].endswith("81.10%") and len(lines) == 6
    regrade.print_beside_the_paper("sudoku", 32, 1.0, "mine")
    assert capsys.readouterr().out == ""
