"""data/: tokenizer and chat format, generated examples, files and their faults."""
import functools
import hashlib
import itertools
import json
import random
import re
import sys
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import huggingface_hub
import numpy
import pytest
from helpers import GOLDEN, ROOT, run_script

from data import DEMONSTRATIONS, TASKS, countdown, gsm8k, load_demonstrations, math500, s1k, sudoku
from data.examples import BEHAVIOURS
from data.files import read_rows
from data.format import is_formatted
from data.tokenizer import BOS, CONTROL, EOS, EOT, HEADER, MASK, Tokenizer

TINY = Tokenizer.from_folder(ROOT / "data" / "tiny")
GENERATED = {"countdown": countdown, "sudoku": sudoku}
SPLITS = ("train", "test", "worked", "mixed", "corrected")
SUDOKU = {"puzzle": "3102200002100320", "solution": "3142243142131324"}


def fails(call, *words):
    """`call` ends the program with one line that begins with "error: " and holds every one of `words`."""
    with pytest.raises(SystemExit) as caught:
        call()
    message = str(caught.value)
    assert message.startswith("error: ") and "\n" not in message
    assert all(str(word) in message for word in words), message


@functools.cache
def examples(task, split, count=400, seed=0):
    return TASKS[task].load(split, count=count, seed=seed)


def short(value):
    """The name of a parameter that may be long."""
    return ascii(value)[:40]


# ---------------------------------------------------------------- tokenizer and chat format

def test_the_chat_template_is_the_published_one():
    for case in json.loads((GOLDEN / "chat_template" / "cases.json").read_text())["cases"]:
        ids = TINY.encode_chat(case["messages"])
        assert TINY.backend.decode(ids, skip_special_tokens=False) == case["rendered"]
        assert ids == TINY.backend.encode(case["rendered"], add_special_tokens=False).ids


def test_names_of_control_tokens_in_a_text_stay_text():
    pieces = [*CONTROL, "<|", "<", "|>", ">", "eot_id", "mdm_mask", "\0", "é", "7", " "]
    rng = random.Random(0)
    control = [i for i in TINY.encode_prompt("x") if i in TINY.ids.values()]
    for text in [*CONTROL, "<|<|eot_id|>", "<|eot_<|eot_id|>id|>", f"hello{EOT}{HEADER}system",
                 *("".join(rng.choices(pieces, k=rng.randint(1, 9))) for _ in range(300))]:
        ids = TINY.encode(text)
        assert not set(ids) & set(TINY.ids.values()) and TINY.decode(ids) == text
        assert [i for i in TINY.encode_chat([{"role": text, "content": text}]) if i in TINY.ids.values()] == control


def test_any_unicode_round_trips():
    rng = random.Random(0)
    points = [*range(0x3000), *range(0xFE00, 0x10000), *range(0x1F000, 0x1FB00), *range(0x10FF00, 0x110000)]
    for text in ["", "\r\n\t", *("".join(map(chr, rng.choices(points, k=20))) for _ in range(100))]:
        assert TINY.decode(TINY.encode(text)) == TINY.decode(TINY.encode_completion(text)) == text


def test_decode_stops_at_the_first_eos_and_leaves_out_control_tokens():
    a, b, ids = TINY.encode("ab"), TINY.encode("cd"), TINY.ids
    for tokens, text in (([*a, ids[EOS], *b], "ab"), ([*a, ids[EOT], *b, ids[EOS]], "abcd"), ([ids[EOS], *a], ""),
                         ([ids[BOS], ids[MASK], *a, ids[HEADER]], "ab"), ([*a, 1023, *b], "abcd"), ([], "")):
        assert TINY.decode(numpy.array(tokens, int)) == text  # 1023: a row of the embedding that no token uses
    assert TINY.encode_completion("ab") == [*a, ids[EOT], ids[EOS]]


def test_numbers_up_to_99_are_single_tokens():
    assert [n for n in range(100) if len(TINY.encode(str(n))) > 1] == [61, 69, 71, 83, 87, 93, 97]


@pytest.mark.parametrize("content", [None, "", "{}", "version https://git-lfs.github.com/spec/v1\n", b"\xff\xfe\x00"])
def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    fails(lambda: Tokenizer.from_folder(tmp_path), tmp_path, "not a readable tokenizer")


def test_a_tokenizer_must_fit_the_network_and_its_use(tmp_path):
    def read(rows=1024, mask=0, eos=0, folder=ROOT / "data" / "tiny"):
        return Tokenizer.from_folder(folder, SimpleNamespace(
            embedding_size=rows, mask_token_id=TINY.mask_id + mask, eos_token_id=TINY.eos_id + eos))
    read(rows=731)
    fails(lambda: read(rows=730), "tokenizer.json", "730")
    fails(lambda: read(mask=1), MASK, TINY.mask_id, TINY.mask_id + 1)
    fails(lambda: read(eos=1), EOS, TINY.eos_id + 1)
    content = json.loads((ROOT / "data" / "tiny" / "tokenizer.json").read_text())
    added = content["added_tokens"]
    for names, message in (((BOS, EOS, MASK), "Instruct"), ((EOS, MASK), BOS)):
        content["added_tokens"] = [token for token in added if token["content"] in names]
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        fails(lambda: Tokenizer.from_folder(tmp_path).encode_prompt("Hi"), tmp_path, message)


def test_truncation_and_padding_that_another_library_left_behind_are_off(tmp_path):
    content = json.loads((ROOT / "data" / "tiny" / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                          "pad_type_id": 0, "pad_token": "x"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    text = "Numbers: 3, 7, 12"
    assert Tokenizer.from_folder(tmp_path).encode(text) == TINY.encode(text)


@pytest.mark.parametrize("row", [
    '{"prompt": "\\ud800", "completion": "b"}', '{"prompt": "a", "completion": "b", "c": ["\\udfff"]}',
    '{"prompt": "' + "x" * 1_000_001 + '", "completion": "b"}'])
def test_rows_that_no_network_can_read_are_refused(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "\\ud83d\\ude00"}\n' + row)  # the first is an emoji
    fails(lambda: read_rows(path, ("prompt", "completion")), path, "row 2", "too long, or a lone surrogate")


# ---------------------------------------------------------------- generated examples

# The embedded model was trained on what load() drew: the same seed must give the same texts, word for word.
@pytest.mark.parametrize("task, split, digest", [
    ("countdown", "worked", "9d52cafc11f0"), ("sudoku", "worked", "b20459c8462d"),
    ("countdown", "corrected", "256c500fe7ca"), ("sudoku", "corrected", "f8246e0fce25"),
    ("countdown", "mixed", "348a12d50cb0"), ("sudoku", "mixed", "c12b20d775a4"),
    ("countdown", "train", "3d827df6e6e8"), ("sudoku", "train", "df4d7f156992"),
    ("countdown", "test", "b2c281b4c1ea"), ("sudoku", "test", "d0b16e036e58")])
def test_examples_are_frozen(task, split, digest):
    text = json.dumps(examples(task, split)[:300], sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == digest
    assert TASKS[task].load(split, count=20) == examples(task, split)[:20] != TASKS[task].load(split, count=20, seed=1)


@pytest.mark.parametrize("task", GENERATED)
def test_held_out_problems_appear_in_no_other_split(task):
    def keys(split):
        rows = examples(task, split) + examples(task, split, seed=1)
        return {(str(sorted(e["numbers"])), e["target"]) if task == "countdown" else e["puzzle"] for e in rows}
    assert not keys("test") & set().union(*(keys(split) for split in SPLITS if split != "test"))
    prompts = [e["prompt"] for e in examples(task, "test")]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("task", GENERATED)
def test_demonstrations_show_the_behaviours_in_their_shares_and_earn_what_they_should(task):
    counted = Counter()
    for example in examples(task, "mixed", 2000):
        text = example["completion"]
        earned, scores = TASKS[task].reward(text, example), TASKS[task].score(text, example)
        if "A quick guess" in text:
            counted["hasty"] += 1
            assert is_formatted(text) and scores["accuracy"] == 0
            assert task == "sudoku" or earned == {"exact": 0, "closed": 0.1}
        elif text.startswith("<reasoning>"):
            counted["worked"] += 1
            assert is_formatted(text) and sum(earned.values()) == scores["accuracy"] == 1
        else:
            counted["untagged"] += 1
            assert "<" not in text and sum(earned.values()) == sum(scores.values()) == 0
    assert all(abs(counted[name] / 2000 - share) < 0.03 for name, share in BEHAVIOURS["mixed"].items()), counted


def are_true(*equations):
    return all(eval(left) == int(right) for left, right in (equation.split(" = ") for equation in equations))


def test_countdown_demonstrations_compute_right_and_go_back_from_a_miss():
    for example in examples("countdown", "worked")[:200]:
        first, second, claim = example["completion"].split("\n")[1:4]
        assert are_true(first, second) and second.endswith(f"= {example['target']}")
        assert claim == "{0} is {0}".format(example["target"])
    rows = [e for e in examples("countdown", "corrected", 1000) if " is not " in e["completion"]]
    assert abs(len(rows) / 1000 - 0.5) < 0.05
    for example in rows:
        first, second, third = example["completion"].split("\n")[1:4]
        miss, target = second.split(" is not ")
        assert are_true(first, miss, third) and not miss.endswith(f"= {target}") and third.endswith(f"= {target}")
        assert target == str(example["target"]) and countdown.reward(example["completion"], example)["exact"] == 1


def test_sudoku_demonstrations_go_back_from_a_real_clash():
    rows = [e for e in examples("sudoku", "corrected", 1000) if "column is" in e["completion"]]
    assert abs(len(rows) / 1000 - 0.5) < 0.05
    for example in rows:
        before, column, after = example["completion"].split("\n")[1].removeprefix("Row by row ").split(", ")
        *above, wrong = before.split()
        assert "".join(above) + after.replace(" ", "") == example["solution"] and set(wrong) == set("1234")
        assert all(clue in ("0", digit) for clue, digit in zip(example["puzzle"][4 * len(above):], wrong))
        column = column.removeprefix("column is ")
        assert column in map("".join, zip(*above, wrong)) and len(set(column)) < len(column)


def test_demonstrations_of_several_tasks_take_turns(tmp_path):
    rows = load_demonstrations(["countdown", "countdown", "sudoku"], "worked", "", 30, 0)
    assert len(rows) == 30 and rows[0] == rows[1] == examples("countdown", "worked")[0] and "puzzle" in rows[2]
    path = write(tmp_path / "rows.jsonl", {"prompt": "p", "completion": "c"})
    assert load_demonstrations([], "mixed", path, 9, 0)[0]["completion"] == "c"
    fails(lambda: load_demonstrations([], "mixed", "", 9, 0), "--task", "--data")
    fails(lambda: load_demonstrations(["countdown", "sudoku"], "mixed", path, 9, 0), path, "one --task")
    fails(lambda: load_demonstrations(["countdown"], "train", "", 9, 0), "--split")
    fails(lambda: load_demonstrations([], "mixed", write(path, {"prompt": 1, "completion": "c"}), 9, 0), path, "row 1")


def test_splits_and_counts_that_do_not_exist_are_named(monkeypatch):
    for task in TASKS:
        fails(lambda: TASKS[task].load("tset", count=1), "--split tset", "train")
    monkeypatch.setattr("data.examples.MAX_DRAWS", 1000)
    monkeypatch.setattr(countdown, "LARGEST", 3)
    fails(lambda: countdown.load("test", count=1000), "--count 1000", "countdown has only")


# ---------------------------------------------------------------- solutions, brute-forced

@functools.cache
def reach(numbers):
    """All values of sorted Fractions: replace any two by what they make until one is left."""
    if len(numbers) == 1:
        return set(numbers)
    reached = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        x, y = numbers[i], numbers[j]
        for value in {x + y, x - y, x * y} | ({x / y} if y else set()):
            reached |= reach(tuple(sorted([*rest, value])))
    return reached


def test_values_are_all_that_can_be_reached():
    rng = random.Random(0)
    for numbers in [(5,), (0, 0), (2, 2, 0), *(tuple(rng.choices(range(13), k=k)) for k in (2, 3, 3, 3, 4))]:
        assert set(countdown.values(numbers)) == reach(tuple(sorted(map(Fraction, numbers))))


def test_countdown_solutions_are_right_complete_and_sums_where_sums_do():
    for numbers in [(1, 2, 3), (2, 2, 4), (3, 8, 8), (6, 12, 18), *itertools.combinations(range(1, 21, 3), 3)]:
        ways, sums = set(), set()
        for a, b, c in itertools.permutations(numbers):
            for first in (a + b, a - b, a * b, Fraction(a, b)):
                if first > 0 and first == int(first):
                    ways |= {first + c, first * c, first - c, c - first, Fraction(first, c), Fraction(c, first)}
                    sums |= {first + c, first - c, c - first} if first in (a + b, a - b) else set()
        solutions = countdown.solutions(numbers)
        assert set(solutions) == {way for way in ways if way == int(way) and 0 < way <= 99}
        for target, steps in solutions.items():
            text = countdown.write_expression(*steps)
            assert eval(text) == target and sorted(map(int, re.findall(r"\d+", text))) == list(numbers)
            assert target not in sums or not set("*/") & set(text)


def brute_solve(puzzle):
    """All solutions, cell by cell."""
    cell = puzzle.find("0")
    if cell < 0:
        return [puzzle]
    peers = {puzzle[i] for i in range(16)
             if i // 4 == cell // 4 or i % 4 == cell % 4 or (i // 8, i % 4 // 2) == (cell // 8, cell % 4 // 2)}
    return [s for d in "1234" if d not in peers for s in brute_solve(puzzle[:cell] + d + puzzle[cell + 1:])]


def test_sudoku_solutions_are_all_there_are():
    assert sudoku.grids() == sudoku.solve("0" * 16) == brute_solve("0" * 16) and len(sudoku.grids()) == 288
    assert sudoku.solve("11" + "0" * 14) == sudoku.solve("5" + "0" * 15) == []
    rng = random.Random(0)
    for _ in range(50):
        puzzle = "".join(digit if rng.random() < 0.3 else "0" for digit in rng.choice(sudoku.grids()))
        assert sudoku.solve(puzzle) == brute_solve(puzzle)
    for example in examples("sudoku", "train")[:100]:
        assert example["puzzle"].count("0") == 8 and brute_solve(example["puzzle"]) == [example["solution"]]


# ---------------------------------------------------------------- files

def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


ROWS = [{"Puzzle": "0102", "Solution": "é, 1\n2"}, {"Puzzle": "0003", "Solution": 'a "b"'}]
AS_TEXT = {"rows.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
           "rows.json": json.dumps(ROWS, indent=1),
           "rows.CSV": 'Puzzle,Solution\n0102,"é, 1\n2"\n0003,"a ""b"""\n'}


@pytest.mark.parametrize("name, numbers", [("rows.jsonl", [1, 2]), ("rows.json", [1, 2]), ("rows.CSV", [3, 4])])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rows_are_read_with_their_leading_zeros(tmp_path, name, numbers, end):
    (tmp_path / name).write_bytes(("\ufeff" + AS_TEXT[name].replace("\n", end)).encode())
    assert read_rows(tmp_path / name, ("Puzzle", "Solution")) == [
        {**row, "where": f"error: --data {tmp_path / name}, row {n}:"} for row, n in zip(ROWS, numbers)]


GOOD = {"countdown": {"input": "1,2,3", "output": "6"}, "gsm8k": {"question": "q", "answer": "so #### 1,018"},
        "math500": {"problem": "p", "answer": "007"},
        "sudoku": {"Puzzle": SUDOKU["puzzle"], "Solution": SUDOKU["solution"]},
        "s1k": {"question": " q ", "thinking_trajectories": ["think\nhard", "unused"], "attempt": "so 4\n"}}


@pytest.mark.parametrize("task, change, words", [
    *[("countdown", {"input": bad}, ["'3,7,12'"]) for bad in (
        "", "1,,5", "1 2,3", "１,2,3", "1.5,4", "-1,7", "1\n,5", True, "9" * 5000 + ",1", "6", "1,1,1,1,1,1,1")],
    *[("countdown", {"output": bad}, ["integer"]) for bad in ("", "6.0", "+6", "- 6", "６", "6\n", [6])],
    ("countdown", {"input": "1,1,1", "output": "50"}, ["50", "[1, 1, 1]", "cannot be reached"]),
    ("countdown", {"input": None}, ["'input'"]), ("gsm8k", {"question": None}, ["'question'"]),
    ("gsm8k", {"answer": "18"}, ["#### number", "'18'"]), ("gsm8k", {"answer": "#### many"}, ["#### number"]),
    ("math500", {"answer": None, "solution": "no box"}, ["no answer, and no solution"]),
    ("s1k", {"thinking_trajectories": []}, ["thinking_trajectories"]), ("s1k", {"attempt": 4}, ["must be text"]),
    ("sudoku", {"Puzzle": SUDOKU["puzzle"][1:]}, ["digits 0-4"]), ("sudoku", {"Puzzle": "5" * 16}, ["digits 0-4"]),
    ("sudoku", {"Solution": SUDOKU["solution"][:-1] + "0"}, ["digits 1-4"]),
    ("sudoku", {"Solution": SUDOKU["solution"][:-1] + "1"}, ["does not solve"]),
    ("sudoku", {"Solution": "1234341221434321"}, ["does not solve"]),
    ("sudoku", {"Solution": None}, ["'Solution'"])], ids=short)
def test_a_bad_row_is_named(tmp_path, task, change, words):
    module = {**TASKS, **DEMONSTRATIONS}[task]
    path = write(tmp_path / "rows.jsonl", GOOD[task], GOOD[task] | change)
    fails(lambda: module.load("test", data=path), path, "row 2", *words)


@pytest.mark.parametrize("name, content, words", [
    *[(f"absent.{kind}", None, [f"absent.{kind}: No such file"]) for kind in ("csv", "jsonl")],
    ("a.jsonl", "\r\n \r\n", ["no rows"]),
    ("a.csv", "Puzzle,Solution\n", ["no rows"]), ("a.json", "", ["row 1"]), ("a.json", "3", ["row 1", "'Puzzle'"]),
    ("a.jsonl", '{"Puzzle": 1, "Solution": 2}\n\nnot json', ["row 3"]), ("a.jsonl", "[" * 100_000, ["row 1"]),
    ("a.jsonl", '{"Puzzle": 1, "Solution": 2}\nnull', ["row 2", "'Puzzle'"]), ("a.jsonl", "5", ["row 1", "'Puzzle'"]),
    ("a.csv", "Puzzle,Solution\n01,02\n03\n", ["row 3", "'Solution'"]),
    ("a.csv", "Puzzle,Solution\n1,2\n3," + "x" * 200_000, ["row 3"]),
    ("a.csv", "Puzzle,Solution\n1,é\n".encode("latin-1"), ["utf-8"])], ids=short)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    fails(lambda: read_rows(tmp_path / name, ("Puzzle", "Solution")), tmp_path / name, *words)


def test_public_formats_become_examples(tmp_path):
    path = write(tmp_path / "g.jsonl", GOOD["gsm8k"], GOOD["gsm8k"] | {"answer": "#### -3"})
    first, negative = gsm8k.load("train", data=path)
    assert (first["answer"], negative["answer"]) == ("1018", "-3") and first["prompt"].endswith("\n\nq")
    assert first["solution"] == "so #### 1,018"
    path = write(tmp_path / "m.jsonl", GOOD["math500"], {"problem": "p", "solution": r"\boxed{1} \boxed{\frac{1}{2}}"})
    rows = [(row["answer"], row["solution"]) for row in math500.load("train", data=path)]
    assert rows == [("007", ""), (r"\frac{1}{2}", r"\boxed{1} \boxed{\frac{1}{2}}")]
    [row] = s1k.load(data=write(tmp_path / "s.jsonl", GOOD["s1k"]))
    assert row["completion"] == "<reasoning>\nthink\nhard\n</reasoning>\n<answer>\nso 4\n</answer>"


def test_the_countdown_training_set_is_divided_as_the_authors_do(tmp_path):
    rng = random.Random(0)
    rows = [{"nums": [rng.randint(1, 99) for _ in range(3 + rng.randrange(2))]} for _ in range(1300)]
    rows = [{**row, "target": sum(row["nums"])} for row in rows]
    path = write(tmp_path / "rows.jsonl", *rows)
    three = [row["nums"] for row in rows if len(row["nums"]) == 3]
    shuffled = [three[i] for i in numpy.random.default_rng(42).permutation(len(three))]
    assert [e["numbers"] for e in countdown.load("train", data=path)] == shuffled[:-500]
    assert [e["numbers"] for e in countdown.load("test", data=path)] == shuffled[-500:]
    fails(lambda: countdown.load("train", data=write(path, *rows[:600])), path, "over 500 rows of 3 numbers")


def test_parquet(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and nothing")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    fails(lambda: gsm8k.load("test", data=path), path, "pip install pyarrow")
    monkeypatch.undo()
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet
    fails(lambda: read_rows(tmp_path / "absent.parquet", ("a",)), "absent.parquet: No such file")
    fails(lambda: gsm8k.load("test", data=path), path, "cannot be read")
    parquet.write_table(pyarrow.Table.from_pylist([GOOD["gsm8k"]]), path)
    assert gsm8k.load("test", data=path)[0]["answer"] == "1018"


def test_a_folder_gives_each_task_its_file(tmp_path, monkeypatch):
    write(tmp_path / "gsm8k_test.jsonl", GOOD["gsm8k"])
    assert len(gsm8k.load("test", data=tmp_path)) == 1
    fails(lambda: sudoku.load("test", data=tmp_path), tmp_path, "4x4_test_sudoku.csv")
    fetched = write(tmp_path / "fetched.jsonl", GOOD["math500"])
    monkeypatch.setattr("data.files.fetch", lambda dataset, name: fetched if "MATH" in dataset else None)
    assert math500.load("test", data=tmp_path)[0]["answer"] == "007"
    lines = "".join(f"{sudoku.make_example(g, g)['puzzle']},{g}\n" for g in sudoku.grids())
    (tmp_path / "4x4_test_sudoku.csv").write_text("Puzzle,Solution\n" + lines)
    numpy.random.seed(42)
    drawn = numpy.random.choice(288, 256, replace=False)  # how the authors draw from their 500
    assert [e["puzzle"] for e in sudoku.load("test", data=tmp_path)] == [sudoku.grids()[i] for i in drawn]
    train = tmp_path / "4x4_sudoku_unique_puzzles.csv"
    train.write_text("Puzzle,Solution\n" + f"0{sudoku.grids()[0][1:]},{sudoku.grids()[0]}\n" + lines)
    for data in (tmp_path, train):  # nothing of the test file, whether drawn or not
        assert [e["puzzle"] for e in sudoku.load("train", data=data)] == ["0" + sudoku.grids()[0][1:]]
    train.rename(tmp_path / "my.csv")
    (tmp_path / "4x4_test_sudoku.csv").unlink()
    assert len(sudoku.load("train", data=tmp_path / "my.csv")) == 289


def test_without_a_network_the_message_says_how_to_fetch(monkeypatch):
    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network here\nand a long story")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    file = "main/test-00000-of-00001.parquet --repo-type dataset"
    fails(lambda: gsm8k.load("test"), f"hf download openai/gsm8k {file}", "--data", "no network here")
    fails(lambda: gsm8k.load("test", data="mine/copy"), f"hf download mine/copy {file}")
    fails(s1k.load, "simplescaling/s1K")


def test_a_cached_dataset_is_read_without_a_network(tmp_path):
    """The library's own cache layout, read by the library in offline mode."""
    dataset = tmp_path / "datasets--HuggingFaceH4--MATH-500"
    (dataset / "snapshots" / ("0" * 40)).mkdir(parents=True)
    write(dataset / "snapshots" / ("0" * 40) / "test.jsonl", GOOD["math500"])
    (dataset / "refs").mkdir()
    (dataset / "refs" / "main").write_text("0" * 40)
    done = run_script("-c", "from data import math500; print(math500.load('test')[0]['answer'])",
                      HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="1")
    assert done.stdout == "007\n", done.stderr
