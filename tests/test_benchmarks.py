"""The four benchmarks: public data read as d1 reads it, rewards as the paper intends, grades as published."""
import json
import random
import re
import sys
import time
from fractions import Fraction
from types import SimpleNamespace

import huggingface_hub
import numpy
import pytest
import torch
from conftest import ROOT

import sample
import train_grpo
import train_sft
from data import TASKS, countdown, files, format, gsm8k, math500, s1k, sudoku
from data.format import MAX_TEXT, final_answer, last_box, write_completion
from data.published import END, PAPER, beside_the_paper, find_generations, first_answer, grade, paper
from data.tokenizer import Tokenizer
from model import Config
from parallel import Processes

TINY = SimpleNamespace(config=Config.from_folder(ROOT / "data" / "tiny"), procs=Processes(0, 1, torch.device("cpu")),
                       tokenizer=Tokenizer.from_folder(ROOT / "data" / "tiny"))
LIMIT = 0.010  # seconds that a reward, score or grader may take on any text
GENERATIONS = ROOT.parent / "shared" / "data" / "d1_generations"
COUNTDOWN = {"numbers": [3, 7, 12], "target": 22}
SUDOKU = {"puzzle": "3102200002100320", "solution": "3142243142131324"}
EXAMPLES = {"countdown": COUNTDOWN, "sudoku": SUDOKU, "gsm8k": {"answer": "18"}, "math500": {"answer": r"\frac{1}{2}"}}


def fails(call, *words, error=ValueError):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---------------------------------------------------------------- the published generations, graded again

@pytest.fixture(scope="module")
def generations():
    if not GENERATIONS.exists():
        pytest.skip("the published generations are not beside this repository")
    return find_generations([GENERATIONS], TASKS)


def test_the_papers_first_row(generations):
    found = {task: (len(rows), length, grade(TASKS[task], rows)) for task, length, rows in generations.values()}
    counts = {"math500": (500, 162), "countdown": (256, 50), "gsm8k": (1130, 863)}
    for task, (count, right) in counts.items():
        assert found[task][:2] == (count, 256) and found[task][2]["published"] == right / count
    assert found["sudoku"][2]["published"] == 137 / 2048  # cells, over all puzzles
    assert [round(100 * found[task][2]["published"], 2) for task in ("math500", "countdown", "sudoku", "gsm8k")] == [
        32.40, 19.53, 6.69, 76.37]
    for task, (_, _, result) in found.items():  # the paper gives one decimal; of GSM8K 1,130 of 1,319 items are there
        far = abs(100 * result["published"] - paper("LLaDA-8B-Instruct", task, 256))
        assert far < (0.4 if task == "gsm8k" else 0.05)


def their_number(text):
    """The GSM8K rule once more, by regular expressions and in no bounded time."""
    for box in re.findall(r"\\boxed{(.*?)}", text):
        for part in (box.strip(), *re.findall(r"-?\d+\.?\d*", box)[:1]):
            try:
                return float(part)
            except ValueError:
                continue
    answer = re.search("<answer>(.*?)</answer>", text, re.DOTALL)
    for part in (answer[1].strip(), *re.findall(r"-?\d+\.?\d*", answer[1])[-1:]) if answer else ():
        try:
            return float(part)
        except ValueError:
            continue
    return None


def their_grid(text):
    for pattern in (r"<answer>.*?```\s*([\d\s]+)```", r"<answer>(.*?)(?:<\|eot_id\|>|<\|endoftext\|>|</answer>)",
                    r"</answer>\s*(.*?)(?:<\|eot_id\|>|<\|endoftext\|>|$)", r"(\d{16})\s*</answer>", r"\b(\d{16})\b"):
        found = re.search(pattern, text, re.DOTALL)
        if found and found[1].strip():
            return re.sub(r"\s", "", found[1])
    return ""


def their_expression(text):
    boxes, found = [m.start() for m in re.finditer(r"\\boxed\{", text)], None
    if "\\boxed " in text:
        found = text.split("\\boxed ")[-1].split("$")[0]
    elif boxes:
        body = text[boxes[-1] + 7:]
        ends = [i for i, c in enumerate(body) if c == "}" and body[:i].count("{") == body[:i].count("}")]
        found = body[:ends[0]] if ends else None
    if found is None:
        answer = re.search("<answer>(.*?)</answer>", text, re.DOTALL)
        found = answer[1].strip() if answer else text
    found = re.sub(r"\\times|\\cdot", "*", found.replace("\\div", "/"))
    equation = re.search(r"([0-9+\-*/() ]+)=[0-9. ]+", found)
    return equation[1].strip() if equation else found


def mutated(texts, rng):
    """Texts cut, doubled and spliced at places that matter to the rules."""
    pieces = ["<answer>", "</answer>", "\\boxed{", "\\boxed ", "}", "{", "=", "```", *END, "1234", "4321" * 4, "\n",
              " ", "3 + 4", "$", "\\times", "1,000", "...", "\\boxed{}", "."]
    for text in texts:
        places = [m.start() for m in re.finditer(r"<|\\boxed|\}|=|\d{4}", text)] or [0]
        a, b = sorted((rng.choice(places), rng.choice(places)))
        yield text[:a] + rng.choice(pieces) + text[rng.choice((a, b)):b + rng.randint(0, 40)] + rng.choice(
            (text[b:], rng.choice(pieces), ""))


def reading(text):
    found = next((n for box in gsm8k.boxes(text) if (n := gsm8k.to_float(box, first=True)) is not None), None)
    return gsm8k.to_float(first_answer(text), first=False) if found is None else found


@pytest.mark.parametrize("ours, theirs", [(reading, their_number), (sudoku.published_grid, their_grid),
                                          (countdown.published_expression, their_expression)])
def test_every_item_reads_as_the_rules_say(generations, ours, theirs):
    texts = [row["text"] for _, _, rows in generations.values() for row in rows]
    for text in (*texts, *mutated(texts, random.Random(0))):
        if len(text) <= MAX_TEXT:
            assert repr(ours(text)) == repr(theirs(text)), text


def test_the_sudoku_draw_is_the_published_one(generations):
    """Seven processes took every seventh of 256 puzzles drawn with seed 42."""
    drawn = [row["puzzle"] for row in sudoku.load("test", data=GENERATIONS.parent)]
    by_process = [[re.search("[0-9]{16}", item["question"])[0] for item in json.loads(path.read_text())["generations"]]
                  for path in sorted(GENERATIONS.glob("sudoku*"))]
    assert len(drawn) == 256 and by_process == [drawn[rank::7] for rank in range(7)]
    assert sudoku.load("test", data=GENERATIONS.parent, count=3) == sudoku.load("test", data=GENERATIONS.parent)[:3]


def test_regrade_prints_one_table(generations, capsys):
    results = sample.main(sample.parse_args(["--regrade", str(GENERATIONS)]))
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 5 and all(word in shown[0] for word in "published exact valid effective_tokens paper".split())
    assert "76.37%" in shown[2] and "32.40%" in shown[3] and "6.69%" in shown[4]
    assert results["sudoku_instruct_256_128"]["valid"] == 5 / 256


def their_file(path, task, question, truth, texts, length=64):
    items = [{"question": question, "ground_truth": truth, "generations": text} for text in texts]
    path.write_text(json.dumps({"generations": items, "gen_length": length, "diffusion_steps": 32}))
    return path


def test_files_of_one_evaluation_are_counted_together(tmp_path):
    """Sums over files, then one division: never a mean of means."""
    right = "<answer>\n\\boxed{18}\n</answer><|eot_id|><|endoftext|><|endoftext|>"
    their_file(tmp_path / "gsm8k_mine_64_32_0_generations.json", "gsm8k", "q", 18.0, [right, "17", "16"])
    their_file(tmp_path / "gsm8k_mine_64_32_1_generations.json", "gsm8k", "q", 18.0, [right])
    (task, length, rows), = find_generations([tmp_path], TASKS).values()
    result = grade(TASKS[task], rows)
    assert (task, length, result["published"]) == ("gsm8k", 64, 0.5)
    assert result["effective_tokens"] == (62 + 64 + 64 + 62) / 4  # canvas without EOS


@pytest.mark.parametrize("name, content, words", [
    ("gsm8k_x_64_32_0_generations.json", "{", ["not a file of generations"]),
    ("gsm8k_x_64_32_0_generations.json", '{"generations": []}', ["gen_length"]),
    ("gsm8k_x_64_32_0_generations.json", '{"gen_length": 64, "generations": [{"question": "q"}]}', ["item 0"]),
    ("sudoku_x_64_32_0_generations.json",
     '{"gen_length": 64, "generations": [{"question": "q", "generations": "", "ground_truth": "1"}]}', ["item 0"]),
    ("poetry.json", "{}", ["the name must be"]), ("poetry_32.jsonl", "{}", ["the name must be"]),
    ("gsm8k_64.jsonl", '{"completion": "x"}', ["row 1"]), ("gsm8k_64.jsonl", "x", ["row 1"]),
    ("readme.txt", "", ["no generations in this folder"])])
def test_generations_that_cannot_be_graded_are_named(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        sample.main(sample.parse_args(["--regrade", str(tmp_path if name == "readme.txt" else path)]))
    message = str(stopped.value)
    assert message.startswith("error: --regrade") and "\n" not in message and all(w in message for w in words), message


# ---------------------------------------------------------------- graders and rewards

@pytest.mark.parametrize("text, box, answer", [
    (r"\boxed{5}", "5", "5"), (r"\boxed{\frac{1}{2}} or \boxed{3}", "3", "3"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", r"\frac{1}{2}"),
    (r"\boxed{5", None, None), ("5", None, None), (r"$\boxed 7$ is it", "7", "7"),
    (r"\boxed{1}<answer>2</answer>", "1", "2"), (r"\boxed{1}<answer>so \boxed{2}</answer>", "2", "2"),
    (r"<answer>\boxed{}32</answer>", "", r"\boxed{}32"), (r"<answer></answer>\boxed{5}", "5", "5")])
def test_boxes_and_answers(text, box, answer):
    assert last_box(text) == box and final_answer(text) == answer


@pytest.mark.parametrize("text, number", [
    ("18", 18), ("-3", -3), ("−3", -3), ("$1,000.", 1000), ("18.0", 18), ("18 dollars", 18), ("\\$8,400", 8400),
    ("60\\%", 60), (".5", Fraction(1, 2)), ("1,234,567.25", Fraction(4938269, 4)), ("12,34", None), ("1234,567", None),
    ("16 - 7 = 9", None), ("", None), (None, None), ("no number", None), ("1e9", None), ("1" * 201, None), ("٣", None)])
def test_read_number(text, number):
    assert gsm8k.read_number(text) == number


def gsm8k_parts(text, answer="18"):
    return tuple(gsm8k.reward(text, {"answer": answer}).values())


@pytest.mark.parametrize("text, answer, parts", [  # tags, soft, strict, integer, correct
    (write_completion("a", "18"), "18", (0.5, 0.5, 0.5, 0.5, 2.0)),
    (write_completion("two\nlines\n\nof work", "18"), "18", (0.5, 0.5, 0.5, 0.5, 2.0)),  # their code: no format reward
    (write_completion("word " * 110, "18"), "18", (0.5, 0.5, 0.5, 0.5, 2.0)),  # theirs deducts the whole length: -0.07
    (write_completion("a", "18") + "\n", "18", (0.5, 0.5, 0.5, 0.5, 2.0)),
    (write_completion("a", "-3"), "-3", (0.5, 0.5, 0.5, 0.5, 2.0)),  # theirs: not an integer
    (write_completion("a", "1,000"), "1000", (0.5, 0.5, 0.5, 0.5, 2.0)),  # theirs: neither an integer nor right
    (write_completion("a", "18.0"), "18", (0.5, 0.5, 0.5, 0, 2.0)),  # theirs compares texts: wrong
    (write_completion("a", "18 dollars"), "18", (0.5, 0.5, 0.5, 0, 2.0)),
    (write_completion("a", "17"), "18", (0.5, 0.5, 0.5, 0.5, 0)),
    (write_completion("a", "18") + " and so on", "18", (0.5 - 0.009, 0.5, 0, 0.5, 2.0)),
    (write_completion("a", "18") + "x" * 5000, "18", (0, 0.5, 0, 0.5, 2.0)),  # never below 0
    ("<reasoning>a</reasoning><answer>18</answer>", "18", (0, 0.5, 0, 0.5, 2.0)),
    ("<answer>\n18\n</answer>", "18", (0.25, 0, 0, 0.5, 2.0)),
    ("<answer>\n18", "18", (0.125, 0, 0, 0, 0)), ("18", "18", (0, 0, 0, 0, 0)), ("", "18", (0, 0, 0, 0, 0))])
def test_gsm8k_reward(text, answer, parts):
    assert gsm8k_parts(text, answer) == pytest.approx(parts)


@pytest.mark.parametrize("text, parts", [  # format, correct
    (write_completion("a", r"\boxed{\frac12}"), (1.0, 2.0)),  # their code: .75, as "\boxed" is a backspace there
    (write_completion("a", r"\frac{1}{2}"), (0.75, 2.0)), (write_completion("a", "0.5"), (0.75, 2.0)),
    (r"it is \boxed{1/2}", (0.5, 2.0)), ("it is 1/2", (0.25, 0)), ("", (0.25, 0)),
    (r"<answer>\boxed{\frac{1}{2}}", (0.5, 2.0)),  # theirs: an unclosed tag counts as one
    (write_completion("a", r"\boxed{2}"), (1.0, 0)), (write_completion(r"\boxed{0.5}", "2"), (0.75, 0)),
    (write_completion("a", r"\boxed{\frac{1}{2}"), (0.75, 0))])
def test_math_reward(text, parts):
    assert tuple(math500.reward(text, EXAMPLES["math500"]).values()) == parts


@pytest.mark.parametrize("task, answer", [("countdown", "3 + 7 + 12"), ("sudoku", SUDOKU["solution"])])
def test_a_box_around_a_right_answer_scores_and_is_not_rewarded(task, answer):
    """The rewards stay those that trained the published models."""
    boxed, plain = (write_completion("a", text) for text in (rf"\boxed{{{answer}}}", answer))
    module, example = TASKS[task], EXAMPLES[task]
    assert module.score(boxed, example) == module.score(plain, example)
    assert sum(module.reward(boxed, example).values()) < sum(module.reward(plain, example).values()) == 1


@pytest.mark.parametrize("text, form", [
    (r"\dfrac{1}{2}", r"\frac{1}{2}"), (r"\tfrac12", r"\frac{1}{2}"), (r"\frac1{72}", r"\frac{1}{72}"),
    (r"\frac{72}1", r"\frac{72}1"), ("1/2", r"\frac{1}{2}"), ("-3/4", r"\frac{-3}{4}"), ("0.5", r"\frac{1}{2}"),
    (".25", "0.25"), (r"{.25}", "{0.25}"), (r"\sqrt3", r"\sqrt{3}"), (r"2 \sqrt {5}", r"2\sqrt{}{5}"),
    (r"\left( 1, 2 \right)", "(1,2)"), (r"90^\circ", "90"), (r"90^{\circ}", "90"), (r"\$36", "36"), (r"10\%", "10"),
    (r"5.4 \text{ cents}", "5.4"), ("x = 5", "5"), ("ab=5", "5"), ("abc=5", "abc=5"), ("a=b=5", "a=b=5"),
    ("1,\\!000", "1,000"), ("", ""),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\2\end{pmatrix}"), ("02/3", "02/3"),
    (r"\frac", None), (r"\sqrt", None), ("a/b", None), (r"\text{ a}\text{ b}", None), (r"\frac1", r"\frac1")])
def test_normalise(text, form):
    assert math500.normalise(text) == form


def test_answers_without_a_canonical_form_are_compared_as_they_stand():
    assert math500.same("a/b", "a/b") and not math500.same("a/b", "a / b")
    assert not math500.same("x" * (MAX_TEXT + 1), "y") and math500.same("x" * (MAX_TEXT + 1), "x" * (MAX_TEXT + 1))


@pytest.mark.parametrize("text, right", [
    (r"\boxed{18}", True), (r"\boxed{1,000} \boxed{18}", False), (r"\boxed{...} \boxed{18}", True),
    ("<answer>7 + 11 = 18</answer>", True), ("18", False), (r"\boxed{18 eggs}", True),
    (r"\boxed{} <answer>18</answer>", True), ("\\boxed{a\n18}", False), (r"\boxed{nan} \boxed{18}", False)])
def test_gsm8k_published(text, right):
    assert gsm8k.published(text, EXAMPLES["gsm8k"])["published"] == right


def test_gsm8k_published_cannot_reward_an_answer_its_reader_loses():
    for answer in ("-3", None):
        assert gsm8k.published(r"\boxed{-3}", {"answer": answer})["published"] == 0
    assert gsm8k.published(r"\boxed{-3}", {"answer": "-3"})["exact"] == 1


@pytest.mark.parametrize("text, published, exact", [
    (r"\boxed{3 + 7 + 12}", 1, 1), (r"\boxed{3 + 7 + 12 = 22}", 1, 1), ("<answer>12+7+3</answer>", 1, 1),
    (r"\boxed{3 \times 7 + 12}", 0, 0), ("12 + 7 + 3", 1, 1), ("so 12 + 7 + 3 = 22.", 1, 1), (r"\boxed{12 + 7}", 0, 0),
    (r"\boxed{12 +7 + 3 + 0}", 0, 0), (r"\boxed{12+7+3.}", 1, 0), (r"\boxed{}<answer>12+7+3</answer>", 0, 0),
    (r"\boxed{12(7)+3}", 0, 0), (r"\boxed{3/0+7+12}", 0, 0)])
def test_countdown_published(text, published, exact):
    assert countdown.published(text, COUNTDOWN) == {"published": published, "of": 1, "exact": exact}


@pytest.mark.parametrize("expression, numbers, target", [
    ("2**3", [2, 3], 8), ("7//2", [2, 7], 3), ("3.5*2", [3, 5, 2], 7)])
def test_countdown_published_knows_what_python_knows_and_exact_does_not(expression, numbers, target):
    found = countdown.published(f"\\boxed{{{expression}}}", {"numbers": numbers, "target": target})
    assert (found["published"], found["exact"]) == (1, 0)


@pytest.mark.parametrize("text, right, exact, valid", [
    ("<answer>3142243142131324</answer>", 8, 1, 1), ("<answer>\n3142 2431\n4213 1324<|eot_id|>", 8, 1, 1),
    ("<answer>see ```3142243142131324```</answer>", 8, 1, 1), ("</answer> 3142243142131324<|endoftext|>", 8, 1, 1),
    ("3142243142131324", 8, 1, 1), ("<answer>31422431</answer>", 4, 0, 0),
    ("<answer>31422431421313244</answer>", 8, 0, 0), ("<answer>3142243142131324", 8, 1, 1), ("<answer>", 0, 0, 0),
    ("", 0, 0, 0), ("<answer></answer><|eot_id|>", 0, 0, 0), ("<answer>3142243142131321</answer>", 8, 0, 1)])
def test_sudoku_published(text, right, exact, valid):
    empty = [i for i in range(16) if SUDOKU["puzzle"][i] == "0"]
    if "1321<" in text:
        right = sum("3142243142131321"[i] == SUDOKU["solution"][i] for i in empty)
    elif len(re.sub(r"\D", "", text)) == 8:
        right = sum(i < 8 for i in empty)
    assert sudoku.published(text, SUDOKU) == {"published": right, "of": len(empty), "exact": exact, "valid": valid}


BAIT = ["9**9**9**9", "30**93**100", "(" * 10_000, "-" * 10_000, "\\" * 100_000, "\\boxed{" * 20_000, "{" * 100_000,
        "\\boxed{" + "{" * 100_000, "<answer>" * 20_000, "</answer>" * 20_000, "1" * 1_000_000, "1," * 500_000,
        "<answer>" + "1" * 1_000_000 + "</answer>", "```" + "1 " * 400_000, "<answer>```" + " " * 500_000,
        "1" * 16 + " " * 900_000, "\\frac" * 20_000, "\\boxed{" + "\\frac" * 20_000 + "}",
        "\\boxed{" + "/" * 100_000 + "}",
        "\\boxed{" + "\\text{ " * 20_000 + "}" * 20_001, "\\boxed " * 20_000, "<reasoning>" * 50_000, "\n" * 1_000_000,
        "\\boxed{" + "=" * 100_000 + "}", "1 + " * 250_000 + "=", "<reasoning>\n" + "\n</reasoning>" * 50_000,
        "\\boxed{\n" * 100_000, "\ud800", "\0", "３" * 1000, "$" * 1_000_000, "\\sqrt" * 100_000, "=1" * 300_000]


@pytest.mark.parametrize("text", BAIT, ids=lambda text: repr(text[:16]) + f" x {len(text)}")
@pytest.mark.parametrize("task", TASKS)
def test_graders_are_total_and_bounded(task, text):
    module, example = TASKS[task], EXAMPLES[task]
    for call in (module.reward, module.score, module.published):
        fastest = []
        for _ in range(3):
            start = time.process_time()
            found = call(text, example)
            fastest.append(time.process_time() - start)
        assert min(fastest) < LIMIT, (call.__name__, min(fastest))
        assert all(isinstance(value, (int, float)) for value in found.values())
    assert module.score(text, example)["accuracy"] == 0


# ---------------------------------------------------------------- files

PROBLEM = {"question": "How many eggs?", "answer": "16 - 3 - 4 = 9\n9 * 2 = 18\n#### 1,018"}


def test_gsm8k_rows(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [PROBLEM, {**PROBLEM, "answer": "#### -3"}])
    first, second = gsm8k.load("train", data=path)
    assert (first["answer"], second["answer"]) == ("1018", "-3") and first["prompt"].endswith("\n\nHow many eggs?")
    assert gsm8k.load("test", data=path, count=1) == [first]
    right = write_completion("16 - 3", "1018")
    assert gsm8k.score(right, first) == {"accuracy": 1, "closed": 1, "format": 1}


@pytest.mark.parametrize("change, words", [
    ({"answer": "18"}, ["#### number", "'18'"]), ({"answer": "#### "}, ["#### number"]),
    ({"answer": None}, ["'answer'"]), ({"answer": "#### many"}, ["#### number"]), ({"question": None}, ["'question'"])])
def test_gsm8k_bad_row_is_named(tmp_path, change, words):
    path = write_lines(tmp_path / "rows.jsonl", [PROBLEM, {**PROBLEM, **change}])
    fails(lambda: gsm8k.load("train", data=path), path, "row 2", *words)


def test_math_rows(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [
        {"problem": "p", "answer": "007"}, {"problem": "p", "solution": r"first \boxed{1} then \boxed{\frac{1}{2}}"}])
    assert [row["answer"] for row in math500.load("train", data=path)] == ["007", r"\frac{1}{2}"]
    write_lines(path, [{"problem": "p", "answer": "1"}, {"problem": "p", "solution": "no box"}])
    fails(lambda: math500.load("test", data=path), path, "row 2", "neither an answer")


def test_s1k_rows(tmp_path):
    row = {"question": " q ", "thinking_trajectories": ["think\nhard", "unused"], "attempt": "so it is 4\n"}
    path = write_lines(tmp_path / "rows.jsonl", [row])
    example, = s1k.load(data=path)
    assert example["completion"] == "<reasoning>\nthink\nhard\n</reasoning>\n<answer>\nso it is 4\n</answer>"
    assert example["prompt"].startswith(format.FORMAT) and example["prompt"].endswith("\n\nq")
    write_lines(path, [row, {**row, "thinking_trajectories": []}])
    fails(lambda: s1k.load(data=path), path, "row 2", "thinking_trajectories")


def countdown_rows(count):
    rng = random.Random(0)
    rows = []
    while len(rows) < count:
        numbers = [rng.randint(1, 99) for _ in range(3 + rng.randrange(2))]
        rows.append({"nums": numbers, "target": sum(numbers)})
    return rows


def test_the_countdown_training_set_is_divided_as_d1_does(tmp_path):
    rows = countdown_rows(1300)
    path = write_lines(tmp_path / "rows.jsonl", rows)
    three = [row for row in rows if len(row["nums"]) == 3]
    shuffled = [three[i]["nums"] for i in numpy.random.default_rng(42).permutation(len(three))]
    assert [e["numbers"] for e in countdown.load("train", data=path)] == shuffled[:-500]
    assert [e["numbers"] for e in countdown.load("test", data=path)] == shuffled[-500:]
    fails(lambda: countdown.load("train", data=write_lines(path, rows[:600])), path, "500 are held out")


def test_parquet(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    fails(lambda: gsm8k.load("test", data=tmp_path / "rows.parquet"), "rows.parquet", "pip install pyarrow")
    monkeypatch.undo()
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet
    parquet.write_table(pyarrow.Table.from_pylist(countdown_rows(1300)), tmp_path / "rows.parquet")
    lines = write_lines(tmp_path / "rows.jsonl", countdown_rows(1300))
    assert countdown.load("train", data=tmp_path / "rows.parquet") == countdown.load("train", data=lines)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and nothing")
    fails(lambda: gsm8k.load("test", data=tmp_path / "rows.parquet"), "not a parquet file")


def cut_off(monkeypatch):
    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network here\nand a long story")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)


@pytest.mark.parametrize("load, dataset, name", [
    (lambda: gsm8k.load("test"), "openai/gsm8k", "main/test-00000-of-00001.parquet"),
    (lambda: gsm8k.load("train"), "openai/gsm8k", "main/train-00000-of-00001.parquet"),
    (lambda: math500.load("test"), "HuggingFaceH4/MATH-500", "test.jsonl"),
    (lambda: math500.load("train"), "nlile/hendrycks-MATH-benchmark", "data/train-00000-of-00001.parquet"),
    (s1k.load, "simplescaling/s1K", "data/train-00000-of-00001.parquet"),
    (lambda: countdown.load("train", data="Jiayi-Pan/Countdown-Tasks-3to4"), "Jiayi-Pan/Countdown-Tasks-3to4",
     "data/train-00000-of-00001.parquet"),
    (lambda: gsm8k.load("test", data="mine/gsm8k-copy"), "mine/gsm8k-copy", "main/test-00000-of-00001.parquet")])
def test_offline_says_how_to_fetch(monkeypatch, load, dataset, name):
    cut_off(monkeypatch)
    fails(load, f"hf download {dataset} {name} --repo-type dataset", "--data", error=FileNotFoundError)


def test_a_cached_dataset_is_read_without_network(tmp_path):
    """The library's own cache layout, read by the library itself in offline mode."""
    import subprocess
    commit = "0" * 40
    snapshot = tmp_path / "datasets--HuggingFaceH4--MATH-500" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    write_lines(snapshot / "test.jsonl", [{"problem": "p", "answer": "7"}])
    (tmp_path / "datasets--HuggingFaceH4--MATH-500" / "refs").mkdir()
    (tmp_path / "datasets--HuggingFaceH4--MATH-500" / "refs" / "main").write_text(commit)
    code = "from data import math500; print(math500.load('test')[0]['answer'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          env={"PATH": "", "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert done.stdout == "7\n", done.stderr


def test_a_folder_gives_each_task_its_file(tmp_path, monkeypatch):
    write_lines(tmp_path / "gsm8k_test.jsonl", [PROBLEM])
    assert len(gsm8k.load("test", data=tmp_path)) == 1
    fails(lambda: sudoku.load("test", data=tmp_path), tmp_path, "4x4_test_sudoku.csv", error=FileNotFoundError)
    monkeypatch.setattr(files, "fetch", lambda dataset, name: write_lines(tmp_path / "fetched.jsonl", [
        {"problem": dataset, "answer": name}]))
    assert math500.load("test", data=tmp_path)[0]["question"] == "HuggingFaceH4/MATH-500"
    assert countdown.load("test", data=write_lines(tmp_path / "c.jsonl", [{"input": "1,2,3", "output": "6"}]))


@pytest.mark.parametrize("task", ["gsm8k", "math500"])
def test_splits_that_do_not_exist_are_named(task):
    fails(lambda: TASKS[task].load("mixed"), "--split mixed", "train and test")


# ---------------------------------------------------------------- evaluation

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Published test sets in small."""
    path = tmp_path_factory.mktemp("dataset")
    write_lines(path / "gsm8k_test.jsonl", [{**PROBLEM, "question": f"How many eggs are {n}?"} for n in range(5)])
    write_lines(path / "math500_test.jsonl", [{"problem": f"What is {n}?", "answer": str(n)} for n in range(5)])
    write_lines(path / "countdown_cd3_test.jsonl", [{"input": f"{n},2,3", "output": str(n + 5)} for n in range(1, 6)])
    (path / "4x4_test_sudoku.csv").write_text("Puzzle,Solution\n" + f"{SUDOKU['puzzle']},{SUDOKU['solution']}\n" * 5)
    return path


SHORT = ["--block_length", 8, "--diffusion_steps", 4, "--device", "cpu", "--temperature", 0.9]


def evaluated(out, folder, *more):
    words = ["--task", "all", "--data", folder, "--out", out, "--gen_length", 8, 16, *SHORT, "--rollout_batch", 2,
             *more]
    return sample.main(sample.parse_args(list(map(str, words))))


def texts(out):
    return {path.name: path.read_text() for path in out.glob("*.jsonl")}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, evaluated(out, folder)


def test_all_tasks_and_lengths_in_one_run(whole):
    out, summary = whole
    names = [f"{task}_{length}.jsonl" for task in TASKS for length in (8, 16)]
    assert sorted(texts(out)) == sorted(names)
    assert [(r["task"], r["gen_length"], r["problems"]) for r in summary["results"]] == [
        (task, length, 5) for task in sorted(TASKS) for length in (8, 16)]
    recorded = "device dtype rollout_batch processes seed temperature remasking model data".split()
    assert all(name in summary for name in recorded) and json.loads((out / "summary.json").read_text()) == summary
    for task, length, rows in find_generations([out], TASKS).values():  # grading the files again changes nothing
        result = next(r for r in summary["results"] if (r["task"], r["gen_length"]) == (task, length))
        assert all(result[name] == value for name, value in grade(TASKS[task], rows).items())


@pytest.mark.parametrize("torn", ["", '{"index": 3, "prom'])
def test_a_half_finished_evaluation_goes_on(whole, folder, tmp_path, capsys, torn):
    out, summary = whole
    half = tmp_path / "run"
    half.mkdir()
    (half / "config.json").write_bytes((out / "config.json").read_bytes())
    lines = (out / "countdown_8.jsonl").read_text().splitlines(keepends=True)
    (half / "countdown_8.jsonl").write_text("".join(lines[:3]) + torn)
    (half / "countdown_16.jsonl").write_text(torn)  # killed within its first row
    with pytest.raises(SystemExit, match="holds a run already"):
        evaluated(half, folder)
    again = evaluated(half, folder, "--resume")
    assert texts(half) == texts(out)
    for one, two in zip(summary["results"], again["results"]):
        assert one.keys() == two.keys() and all(one[name] == two[name] for name in one if "second" not in name)
    for name, value, old in (("temperature", 0.5, "0.9"), ("cache", "dual", None), ("threshold", 0.9, None)):
        with pytest.raises(SystemExit, match=f"--{name} was {old}"):
            evaluated(half, folder, "--resume", f"--{name}", value)


def test_one_and_three_processes_count_the_same(whole, folder, tmp_path):
    """Five problems do not divide by three processes."""
    import os
    import subprocess
    out = tmp_path / "run"
    words = ["--task", "countdown", "--data", folder, "--out", out, "--gen_length", 8, *SHORT, "--rollout_batch", 1]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3",
                           "sample.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert texts(out)["countdown_8.jsonl"] == texts(whole[0])["countdown_8.jsonl"]
    assert done.stdout.count("every generation is in") == 1


def test_published_prompts(folder, tmp_path):
    summary = evaluated(tmp_path / "run", folder, "--published_prompts", "--task", "countdown", "--gen_length", 8)
    row = json.loads((tmp_path / "run" / "countdown_8.jsonl").read_text().splitlines()[0])
    assert row["completion"].startswith("<reasoning>") and "\\boxed{...}" in row["prompt"]
    assert summary["published_prompts"]
    for task, module in TASKS.items():
        example = module.load("test", data=folder)[0]
        prompt = module.published_prompt(example)
        assert prompt != example["prompt"] and "Use this format" in prompt
        assert str(example.get("question") or example.get("puzzle") or example["target"]) in prompt


def test_a_prompt_that_is_too_long_is_counted_and_left_out(folder, tmp_path, capsys):
    rows = [PROBLEM, {**PROBLEM, "question": "eggs " * 2000}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    summary = evaluated(tmp_path / "run", path, "--task", "gsm8k", "--gen_length", 8)
    assert summary["results"][0]["problems"] == 1 and "skipped 1 of 2 prompts" in capsys.readouterr().out


def test_one_file_cannot_serve_all_tasks(folder, tmp_path):
    with pytest.raises(SystemExit, match="name a folder"):
        evaluated(tmp_path / "run", folder / "gsm8k_test.jsonl")


def test_the_papers_table_stands_below_ours():
    results = [{"task": "gsm8k", "gen_length": 256, "published": 0.5},
               {"task": "sudoku", "gen_length": 32, "published": 1.0}]
    lines = beside_the_paper(results, "mine").splitlines()
    assert lines[1].split()[-2:] == ["gsm8k", "256"] and lines[2].split() == ["mine", "50.00%"]
    assert lines[-1].split()[-1] == "81.10%" and len(lines) == 3 + len(PAPER)
    assert beside_the_paper(results[1:], "mine") == ""


# ---------------------------------------------------------------- training

def grpo(out, task, *more):
    words = ["--task", task, "--steps", 1, "--prompts_per_step", 2, "--group_size", 2, "--num_iterations", 1,
             "--eval_count", 2, "--gen_length", 16, "--diffusion_steps", 4, "--device", "cpu", "--out", out, *more]
    return train_grpo.main(train_grpo.parse_args(list(map(str, words))))


@pytest.mark.parametrize("task, parts", [("gsm8k", "tags soft strict integer correct"), ("math500", "format correct")])
def test_grpo_trains_on_the_public_formats(folder, tmp_path, monkeypatch, task, parts):
    rows = [json.loads(line) for line in (folder / f"{task}_test.jsonl").read_text().splitlines()]
    if task == "math500":
        rows = [{"problem": row["problem"], "solution": rf"so \\boxed{{{row['answer']}}}"} for row in rows]
    train = write_lines(tmp_path / "train.jsonl", rows)
    summary = grpo(tmp_path / "run", task, "--data", train, "--eval_data", folder)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert [name for name in row if name.startswith("reward_")] == [f"reward_{part}" for part in parts.split()]
    assert summary["before"].keys() >= {"sampled_accuracy", "greedy_closed"}
    cut_off(monkeypatch)
    with pytest.raises(SystemExit, match="neither cached nor reachable"):  # the held-out problems are the public ones
        grpo(tmp_path / "other", task, "--data", train)


def test_grpo_takes_the_papers_length_for_the_task():
    steps = {task: train_grpo.default_options(task)["steps"][0] for task in TASKS}
    assert steps == {"gsm8k": 642, "math500": 550, "countdown": 625, "sudoku": 475}
    assert [train_grpo.default_options(task)["num_iterations"][0] for task in ("math500", "sudoku")] == [12, 8]


def test_a_folder_gives_grpo_its_held_out_problems_too(tmp_path):
    write_lines(tmp_path / "gsm8k_train.jsonl", [PROBLEM] * 3)
    write_lines(tmp_path / "gsm8k_test.jsonl", [{**PROBLEM, "question": "How many hens?"}])
    args = train_grpo.parse_args(["--task", "gsm8k", "--data", str(tmp_path)])
    args.gen_length, args.prompts_per_step, args.eval_count = 16, 2, 4
    train, held_out = train_grpo.read_prompts(args, TINY.config, TINY.tokenizer, TINY.procs)
    assert len(train) == 3 and [row["question"] for row in held_out] == ["How many hens?"]


def sft(out, data, *more):
    words = ["--task", "s1k", "--data", data, "--steps", 2, "--batch_size", 2, "--device", "cpu", "--out", out, *more]
    return train_sft.main(train_sft.parse_args(list(map(str, words))))


def test_sft_trains_on_s1k(tmp_path, capsys):
    row = {"question": "What is 2 + 2?", "thinking_trajectories": ["two and two"], "attempt": "4"}
    long = {**row, "thinking_trajectories": ["on and on " * 500]}
    path = write_lines(tmp_path / "rows.jsonl", [row] * 4 + [long, {**row, "question": "why " * 500}])
    sft(tmp_path / "run", path, "--max_length", 300)
    assert "skipped 0 rows without a completion and 2 longer than 300 tokens" in capsys.readouterr().out
    assert (tmp_path / "run" / "step_000002" / "model.safetensors").exists()
    args = train_sft.parse_args(["--max_length", "300", "--batch_size", "2", "--gen_length", "0", "--truncate"])
    rows = train_sft.encode_rows(s1k.load(data=path), TINY.tokenizer, args, TINY.procs)
    assert "skipped 1 rows without a completion and cut 2 longer than 300 tokens" in capsys.readouterr().out
    whole = TINY.tokenizer.encode_completion(s1k.load(data=path)[4]["completion"])
    ids, prompt = rows[4]
    assert len(ids) == 300 and ids[prompt:] == whole[:300 - prompt] and len(rows) == 5


@pytest.mark.parametrize("words, message", [
    (["--task", "countdown", "--data", "rows"], "holds no demonstrations"),
    (["--task", "countdown", "s1k", "--data", "rows"], "of one --task, 2 were named")])
def test_sft_data_must_fit_its_task(tmp_path, words, message):
    path = write_lines(tmp_path / "rows.jsonl", [{"input": "1,2,3", "output": "6"}])
    with pytest.raises(SystemExit, match=message):
        train_sft.main(train_sft.parse_args([str(path) if word == "rows" else word for word in words]))
