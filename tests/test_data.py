"""data/: tokenizer and chat format, both tasks, rewards on hostile text, and every fault of a data file in one line."""
import copy
import functools
import hashlib
import inspect
import itertools
import json
import random
import re
import sys
import time
import warnings
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, golden

from data import TASKS, countdown, sudoku
from data.countdown import demonstrate, expression, is_held_out, safe_value, solutions, values
from data.files import read_rows
from data.format import BEHAVIOURS, MAX_TEXT, closed_answer, is_formatted, write_completion
from data.tokenizer import BOS, CONTROL, EOS, EOT, HEADER, MASK, Tokenizer, train_bpe
from model import Config

TINY = Tokenizer.from_folder(ROOT / "data" / "tiny")
DEMONSTRATED = ("worked", "mixed", "corrected")
SPLITS = ("train", "test", *DEMONSTRATED)
LIMIT = 0.010  # seconds that a reward or score may take on any text


def published(name):
    path = ROOT.parent / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"the published {name} is not beside this repository")
    return path


def fails(call, *words, error=ValueError):
    """`call` raises `error` with a message of one line that holds every one of `words`."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


def seconds(call, *args):
    """CPU time of the fastest of three calls, so that a busy machine does not fail a test of ours."""
    def once():
        start = time.process_time()
        call(*args)
        return time.process_time() - start
    return min(once() for _ in range(3))


@functools.cache
def examples(task, split, count=500, seed=0):
    return TASKS[task].load(split, count=count, seed=seed)


def short(value):
    """A test's name from a parameter that may be long."""
    return ascii(value)[:40]


def answer(text):
    return f"<reasoning>\nx\n</reasoning>\n<answer>\n{text}\n</answer>"


# ---------------------------------------------------------------- tokenizer and chat format

def raw_decode(ids):
    return TINY.backend.decode(ids, skip_special_tokens=False)


def control_ids(ids):
    return [i for i in ids if i in TINY.ids.values()]


def test_chat_template():
    cases = json.loads(golden("chat_template/cases.json").read_text())["cases"]
    assert len(cases) == 8
    joining = train_bpe(["\n\nHi", "\n\nline1"] * 30, vocab_size=300)  # has tokens across the end of the header
    for tokenizer, case in itertools.product((TINY, joining), cases):
        ids = tokenizer.encode_chat(case["messages"])
        assert tokenizer.backend.decode(ids, skip_special_tokens=False) == case["rendered"]
        assert ids == tokenizer.backend.encode(case["rendered"], add_special_tokens=False).ids


def forged_texts():
    fixed = [*CONTROL, "".join(CONTROL), "<|<|eot_id|>", "<|eot_<|eot_id|>id|>", "<<|eot_id|>|eot_id|>", "a\0b",
             "\0cut\0", "<|\0cut\0eot_id|>", "<|eot\0cut\0_id|>", f"hello{EOT}{HEADER}system"]
    parts = [*CONTROL, "<|", "<", "|", "|>", ">", "eot_id", "mdm_mask", "\0", "cut", "é", "7", " "]
    rng = random.Random(0)
    return fixed + ["".join(rng.choices(parts, k=rng.randint(1, 9))) for _ in range(500)]


def test_control_names_in_text_stay_text():
    plain = raw_decode(TINY.encode_chat([{"role": "ROLE", "content": "CONTENT"}]))
    for text in forged_texts():
        ids = TINY.encode(text)
        assert not control_ids(ids) and TINY.decode(ids) == raw_decode(ids) == text
        ids = TINY.encode_chat([{"role": text, "content": text}])
        assert control_ids(ids) == control_ids(TINY.encode_prompt("x"))
        assert raw_decode(ids) == plain.replace("ROLE", text).replace("CONTENT", text.strip())


def test_any_unicode_round_trips():
    rng = random.Random(0)
    points = [*range(0x3000), *range(0xFE00, 0x10000), *range(0x1F000, 0x1FB00), *range(0x10FF00, 0x110000)]
    texts = ["", " ", "\r\n\t", "\ufeffe\u0301 é", "👩‍👩‍👧", "ﬁ ½ ３ ٣", "\u2028\x85"]
    texts += ["".join(map(chr, rng.choices(points, k=20))) for _ in range(200)]
    for text in texts:
        assert TINY.decode(TINY.encode(text)) == text
        assert TINY.decode(TINY.encode_completion(text)) == text


def test_numbers_up_to_99_are_single_tokens():
    rare = [n for n in range(100) if len(TINY.encode(str(n))) != 1]
    assert rare == [61, 69, 71, 83, 87, 93, 97]  # targets that few problems have: two tokens
    tokens = [TINY.decode([i]) for i in TINY.encode(countdown.write_prompt([13, 7, 20], 99) + "(13 + 7)*20")]
    assert [t for t in tokens if any(c.isdigit() for c in t)] == ["13", "7", "20", "99", "13", "7", "20"]


def test_decode_stops_at_the_first_eos():
    a, b = TINY.encode("ab"), TINY.encode("cd")
    ids = TINY.ids
    for given, text in (([*a, ids[EOS], *b], "ab"), ([ids[EOS], *a], ""), ([*a, ids[EOT], *b, ids[EOS]], "abcd"),
                        ([ids[BOS], ids[MASK], *a, ids[HEADER]], "ab"), ([*a, 1023, *b], "abcd"), ([], "")):
        assert TINY.decode(given) == TINY.decode(torch.tensor(given)) == text  # 1023: a row that no token uses
    assert TINY.encode_completion("ab") == [*a, ids[EOT], ids[EOS]]
    assert (TINY.mask_id, TINY.eos_id, TINY.eot_id) == (ids[MASK], ids[EOS], ids[EOT])


@pytest.mark.parametrize("content, words", [
    (None, ["no tokenizer.json"]), ("", ["not a readable tokenizer"]), ("{}", ["not a readable tokenizer"]),
    ('{"version": "1.0", "model"', ["not a readable tokenizer"]), (b"\xff\xfe\x00", ["not a readable tokenizer"]),
    ("version https://git-lfs.github.com/spec/v1\n", ["not a readable tokenizer"]),
    ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', [BOS, "LLaDA"])])
def test_tokenizer_missing_or_corrupt(tmp_path, content, words):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    fails(lambda: Tokenizer.from_folder(tmp_path), tmp_path, *words, error=(FileNotFoundError, ValueError))


def test_tokenizer_must_fit_the_network(tmp_path):
    def read(embedding_size=738, mask=0, eos=0):
        return Tokenizer.from_folder(ROOT / "data" / "tiny", SimpleNamespace(
            embedding_size=embedding_size, mask_token_id=TINY.mask_id + mask, eos_token_id=TINY.eos_id + eos))
    largest = max(TINY.backend.get_vocab().values())
    read(largest + 1)
    fails(lambda: read(largest), "tokenizer.json", largest)
    fails(lambda: read(mask=1), "tokenizer.json", MASK, TINY.mask_id, TINY.mask_id + 1)
    fails(lambda: read(eos=1), "tokenizer.json", EOS, TINY.eos_id, TINY.eos_id + 1)
    Tokenizer.from_folder(ROOT / "data" / "tiny", Config.from_folder(ROOT / "data" / "tiny"))
    holes = json.loads((ROOT / "data" / "tiny" / "tokenizer.json").read_text())  # few tokens, but one with a large id
    holes["model"]["vocab"]["unused"] = 5000
    (tmp_path / "tokenizer.json").write_text(json.dumps(holes))
    fits = SimpleNamespace(embedding_size=1024, mask_token_id=TINY.mask_id, eos_token_id=TINY.eos_id)
    fails(lambda: Tokenizer.from_folder(tmp_path, fits), "5000", "1024")


def test_base_tokenizer_has_no_chat(tmp_path):
    raw = json.loads((ROOT / "data" / "tiny" / "tokenizer.json").read_text())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] in (BOS, EOS, MASK)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    base = Tokenizer.from_folder(tmp_path)
    assert base.decode(base.encode("Hi" + EOT)) == "Hi" + EOT
    fails(lambda: base.encode_prompt("Hi"), tmp_path, "Instruct")


def test_train_bpe_and_save(tmp_path):
    made = train_bpe(["Numbers: 13, 7\nTarget: 345 ", "20 - 13 = 7 345"] * 30, vocab_size=282)
    assert made.backend.get_vocab_size() == 282 and len(made.encode("13")) == 1 < len(made.encode("345"))
    assert made.decode(made.encode("é 👍 13")) == "é 👍 13"
    made.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).encode("Numbers: é 13") == made.encode("Numbers: é 13")


# ---------------------------------------------------------------- both tasks: generated examples

@pytest.mark.parametrize("task", ["countdown", "sudoku"])
@pytest.mark.parametrize("split", SPLITS)
def test_load_is_seeded_and_longer_begins_with_shorter(task, split):
    long = examples(task, split)
    assert len(long) == 500 and TASKS[task].load(split, count=60) == long[:60]
    assert examples(task, split, 60, seed=1) != long[:60]
    assert all(("completion" in e) == (split in DEMONSTRATED) for e in long)


# The embedded model was trained on what load() drew: the same seed must give the same texts, word for word.
@pytest.mark.parametrize("task, split, digest", [
    ("countdown", "worked", "9d52cafc11f0"), ("sudoku", "worked", "b20459c8462d"),
    ("countdown", "corrected", "256c500fe7ca"), ("sudoku", "corrected", "f8246e0fce25"),
    ("countdown", "mixed", "348a12d50cb0"), ("countdown", "train", "3d827df6e6e8"),
    ("countdown", "test", "b2c281b4c1ea"),
    ("sudoku", "mixed", "c12b20d775a4"), ("sudoku", "train", "df4d7f156992"), ("sudoku", "test", "d0b16e036e58")])
def test_examples_are_frozen(task, split, digest):
    text = json.dumps(examples(task, split)[:300], sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == digest


@pytest.mark.parametrize("task", ["countdown", "sudoku"])
def test_shares_of_behaviours_and_their_rewards(task):
    rows, counted = examples(task, "mixed", 3000), Counter()
    for example in rows:
        text, parts = example["completion"], TASKS[task].reward(example["completion"], example)
        scores = TASKS[task].score(text, example)
        if "A quick guess" in text:
            counted["hasty"] += 1
            assert is_formatted(text) and scores["closed"] == 1 and scores["accuracy"] == 0
            assert task == "sudoku" or parts == {"exact": 0, "closed": 0.1}
        elif text.startswith("<reasoning>"):
            counted["worked"] += 1
            assert is_formatted(text) and sum(parts.values()) == scores["accuracy"] == scores["format"] == 1
        else:
            counted["untagged"] += 1
            assert closed_answer(text) is None and "<" not in text and sum(parts.values()) == sum(scores.values()) == 0
    shares = BEHAVIOURS["mixed"]
    assert all(abs(counted[name] / len(rows) - share) < 0.03 for name, share in shares.items()), counted
    assert all(TASKS[task].score(e["completion"], e)["accuracy"] == 1 for e in examples(task, "worked"))


def test_corrected_countdown_goes_back_from_a_near_miss():
    rows, mended = examples("countdown", "corrected", 2000), 0
    for example in rows:
        numbers, target, text = example["numbers"], example["target"], example["completion"]
        assert is_formatted(text) and countdown.reward(text, example) == {"exact": 1, "closed": 0}
        first, second, third = text.split("\n")[1:4]
        if " is not " not in text:
            assert text == demonstrate("worked", numbers, target, None)
            continue
        mended += 1
        miss, not_target = second.split(" is not ")
        written = [equation.split(" = ") for equation in (first, miss, third)]
        assert all(eval(left) == int(right) for left, right in written)  # every equation is true
        c, d, e = (int(right) for _, right in written)
        assert int(not_target) == e == target != d  # and every claim
        first_two = [int(n) for n in re.findall("[0-9]+", written[0][0])]
        [left] = (Counter(numbers) - Counter(first_two)).elements()
        assert len(first_two) == 2
        assert all(Counter(map(int, re.findall("[0-9]+", step))) == Counter([c, left]) for step, _ in written[1:])
        low, high = sorted((c, left))
        could = {low + high, low * high, high - low, *([high // low] if low > 1 and high % low == 0 else [])} - {0, e}
        assert d in could and abs(d - e) == min(abs(value - e) for value in could)  # the nearest miss
    assert abs(mended / len(rows) - 0.5) < 0.03


def test_corrected_sudoku_goes_back_from_a_clash():
    rows, mended = examples("sudoku", "corrected", 2000), 0
    for example in rows:
        puzzle, solution, text = example["puzzle"], example["solution"], example["completion"]
        assert is_formatted(text) and sudoku.score(text, example)["accuracy"] == 1
        work = text.split("\n")[1].removeprefix("Row by row ")
        if "," not in work:
            assert work.replace(" ", "") == solution
            continue
        mended += 1
        before, told, after = work.split(", ")
        *above, wrong = before.split()
        row, column = len(above), told.removeprefix("column is ")
        assert "".join(above) + after.replace(" ", "") == solution  # goes on from the row, mended
        assert set(wrong) == set("1234") and wrong != after.split()[0]
        assert all(clue in ("0", digit) for clue, digit in zip(puzzle[4 * row:], wrong))
        assert column in map("".join, zip(*above, wrong)) and len(set(column)) < len(column)  # a real clash
    assert abs(mended / len(rows) - 0.5) < 0.03


@pytest.mark.parametrize("task", ["countdown", "sudoku"])
def test_corrected_traces_fit_the_embedded_canvas(task):
    lengths = [len(TINY.encode(example["completion"])) for example in examples(task, "corrected", 2000)]
    assert sum(length <= 32 for length in lengths) / len(lengths) > 0.99 and max(lengths) <= 36
    assert 0.4 < sum(length > 24 for length in lengths) / len(lengths) < 0.6  # those that go back


# ---------------------------------------------------------------- Countdown: problems

@functools.cache
def brute_force(numbers):
    """All values of the sorted Fractions, by replacing any two by their result until one is left."""
    if len(numbers) == 1:
        return set(numbers)
    found = set()
    for a, b in itertools.permutations(range(len(numbers)), 2):
        rest = [n for i, n in enumerate(numbers) if i not in (a, b)]
        x, y = numbers[a], numbers[b]
        for result in {x + y, x - y, x * y} | ({x / y} if y else set()):
            found |= brute_force(tuple(sorted([*rest, result])))
    return found


def all_values(numbers):
    return brute_force(tuple(sorted(map(Fraction, numbers))))


@pytest.mark.parametrize("split", SPLITS)
def test_countdown_problems_are_reachable(split):
    for example in examples("countdown", split):
        numbers, target = example["numbers"], example["target"]
        assert len(numbers) == 3 and all(1 <= n <= countdown.LARGEST for n in numbers)
        assert 1 <= target <= countdown.MAX_TARGET
        assert target in all_values(numbers)
        assert example["prompt"].endswith(f"Numbers: {numbers[0]}, {numbers[1]}, {numbers[2]}\nTarget: {target}")


def test_countdown_splits_never_overlap():
    def problems(split, seed):
        return {(tuple(sorted(e["numbers"])), e["target"]) for e in examples("countdown", split, 500, seed)}
    seen = set().union(*(problems(split, seed) for split in ("train", *DEMONSTRATED) for seed in (0, 1)))
    held_out = problems("test", 0) | problems("test", 1)
    assert not seen & held_out and len(held_out) > 200
    assert all(is_held_out(order, t) for n, t in held_out for order in itertools.permutations(n))
    assert not any(is_held_out(order, t) for n, t in seen for order in itertools.permutations(n))
    test = examples("countdown", "test")
    assert len({(*e["numbers"], e["target"]) for e in test}) == len(test)


def test_countdown_says_when_its_problems_run_out(monkeypatch):
    monkeypatch.setattr(countdown, "LARGEST", 3)
    fails(lambda: countdown.load("test", count=1000), "--count 1000", "test problems")


def test_values_of_any_numbers():
    rng = random.Random(0)
    for numbers in [(5,), (0, 0), (2, 2, 0), *(tuple(rng.choices(range(13), k=k)) for k in (2, 3, 3, 3, 4, 4))]:
        assert set(values(numbers)) == all_values(numbers)


def test_solutions_are_right_and_canonical():
    for numbers in itertools.combinations_with_replacement(range(1, 21), 3):
        for target, steps in solutions(numbers).items():
            text = expression(*steps)
            assert eval(text) == target and sorted(map(int, re.findall(r"\d+", text))) == list(numbers), text
            assert safe_value(text) == (target, [int(n) for n in re.findall(r"\d+", text)])
        for a, b, c in itertools.permutations(numbers):  # no product or quotient where sums and differences do
            for easy in {v for d in (a + b, abs(a - b)) if d for v in (d + c, abs(d - c)) if 0 < v <= 99}:
                assert {step[0] for step in solutions(numbers)[easy]} <= set("+-")
    for numbers in [(1, 2, 3), (2, 2, 4), (3, 8, 8), (7, 13, 20), (6, 12, 18)]:  # every positive whole way to the end
        ways = set()
        for a, b, c in itertools.permutations(numbers):
            for first in (a + b, a * b, a - b, Fraction(a, b)):
                if first > 0 and first == int(first):
                    ways |= {first + c, first * c, first - c, c - first, Fraction(first, c), Fraction(c, first)}
        assert set(solutions(numbers)) == {w for w in ways if w == int(w) and 0 < w <= 99}
    assert expression(*solutions((1, 2, 3))[6]) == "1 + 2 + 3"  # sums before products
    assert expression(*solutions((1, 2, 3))[9]) == "(1 + 2) * 3"


def test_worked_demonstrations_compute_right():
    for example in examples("countdown", "worked")[:300]:
        first, second, verdict = example["completion"].split("\n")[1:4]
        for line in (first, second):
            left, right = line.split(" = ")
            assert eval(left) == int(right)
        assert verdict == f"{example['target']} is {example['target']}" and int(right) == example["target"]
    rng = random.Random(0)
    for _ in range(2000):  # hasty is wrong by construction, also where sum and product agree
        texts = [demonstrate("hasty", (2, 2, k), t, rng) for k, t in ((1, 4), (2, 8), (2, 6))]
        assert [eval(closed_answer(text)) == t for text, t in zip(texts, (4, 8, 6))] == [False] * 3


# ---------------------------------------------------------------- files

def test_published_countdown():
    rows = countdown.load("test", data=published("countdown_cd3_test.jsonl"))
    assert len(rows) == 256 and (rows[0]["numbers"], rows[0]["target"]) == ([30, 100, 93], 23)
    assert all(row["target"] in all_values(row["numbers"]) for row in rows)
    assert rows[0]["prompt"] == countdown.write_prompt([30, 100, 93], 23)
    assert countdown.load("test", data=published("countdown_cd3_test.jsonl"), count=3) == rows[:3]


GOOD = '{"input": "1,2,3", "output": "6"}'


def with_input(numbers, output="6"):
    return json.dumps({"input": numbers, "output": output}, ensure_ascii=False)


@pytest.mark.parametrize("lines, numbers, target", [
    (GOOD + "\n", [1, 2, 3], 6), ("\ufeff" + GOOD + "\r\n\r\n", [1, 2, 3], 6), ("\n\n" + GOOD, [1, 2, 3], 6),
    (with_input(" 3, 7 ,12", " 22 "), [3, 7, 12], 22), (with_input("07,1", 8), [7, 1], 8),
    (with_input("3,5", "-2"), [3, 5], -2),
    ('{"note": "a\u2028b\x85c", "input": "0,4", "output": 4}', [0, 4], 4)])
def test_countdown_rows_read(tmp_path, lines, numbers, target):
    (tmp_path / "rows.jsonl").write_bytes(lines.encode())
    [row] = countdown.load("train", data=tmp_path / "rows.jsonl")
    assert (row["numbers"], row["target"], row["prompt"]) == (numbers, target, countdown.write_prompt(numbers, target))


@pytest.mark.parametrize("row, words", [
    ("not json", ["not JSON"]), ('{"input": "1,2,3"', ["not JSON"]), ("[" * 100_000, ["not JSON"]),
    ('{"input": "1,2,3"}', ["'output'"]), ('{"output": "6"}', ["'input'"]),
    ('{"input": null, "output": "6"}', ["'input'"]), ("[1, 2]", ["'input'"]), ("null", ["'input'"]),
    *[(with_input(bad), [repr(bad)]) for bad in (
        "", " ", "a,b", "1,,5", "1,2,", "1 2,3", "1_0,2", "１,2,3", "٣,3", "1.5,4", "-1,7", "+1,5", "1e1,2", "0x1,5",
        "1\n,5", [1, 2, 3], True, "9" * 5000 + ",1")],
    *[(with_input("1,2,3", bad), [repr(bad)]) for bad in (
        "", "6.0", "0_6", "--6", "6-", "+6", "٦", "６", "six", "6\n", 6.5, True, [6], "9" * 5000)],
    (with_input("6"), ["1 numbers", "2 to 6"]), (with_input("1,1,1,1,1,1,1"), ["7 numbers"]),
    (with_input("1,1,1", "50"), ["50", "[1, 1, 1]"])], ids=short)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_countdown_bad_row_is_named(tmp_path, row, words, end):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(("\ufeff" + GOOD + end * 2 + row + end + GOOD + end).encode())
    fails(lambda: countdown.load("train", data=path), path, "row 3", *words)


def test_six_numbers_are_checked_in_seconds(tmp_path):
    (tmp_path / "rows.jsonl").write_text(with_input("3,7,12,25,50,75", "172"))
    start = time.process_time()
    assert len(countdown.load("test", data=tmp_path / "rows.jsonl")) == 1
    assert time.process_time() - start < 10


ROWS = [{"Puzzle": "0102", "Solution": "é, 1\n2"}, {"Puzzle": "0003", "Solution": "a \"b\""}]
AS_TEXT = {"rows.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
           "rows.json": json.dumps(ROWS, indent=1),
           "rows.csv": 'Puzzle,Solution\n0102,"é, 1\n2"\n0003,"a ""b"""\n'}


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name, numbers", [
    ("rows.jsonl", [1, 2]), ("rows.json", [1, 2]), ("rows.csv", [3, 4]), ("rows.CSV", [3, 4])])
def test_read_rows(tmp_path, name, numbers, bom, end):
    (tmp_path / name).write_bytes(bom + AS_TEXT[name.lower()].replace("\n", end).encode())
    assert read_rows(tmp_path / name, ("Puzzle", "Solution")) == [{**row, "row": n} for row, n in zip(ROWS, numbers)]


@pytest.mark.parametrize("name, content, words", [
    ("absent.csv", None, ["no such file"]), ("folder.csv", ..., ["no such file"]), ("a.jsonl", b"", ["no rows"]),
    ("a.jsonl", b"\r\n \r\n", ["no rows"]), ("a.jsonl", b"\xef\xbb\xbf", ["no rows"]), ("a.csv", b"", ["no rows"]),
    ("a.csv", b"Puzzle,Solution\n", ["no rows"]), ("a.json", b"[]", ["no rows"]), ("a.json", b"", ["not JSON"]),
    ("a.json", b'{"Puzzle": 1, "Solution": 2}', ["not a list"]), ("a.json", b"3", ["not a list"]),
    ("a.json", b'[{"Puzzle": 1, "Solution": 2}, 3]', ["row 2", "'Puzzle'"]),
    ("a.csv", b"Puzzle,Solution\n01,02\n03\n", ["row 3", "'Solution'"]),
    ("a.csv", b"puzzle;x\n1;2\n", ["row 2", "'Puzzle'"]),
    ("a.csv", b"Puzzle,Solution\n1,2\n3," + b"x" * 200_000, ["row 3", "not CSV"]),
    ("a.csv", "Puzzle,Solution\n1,é\n".encode("latin-1"), ["UTF-8"]),
    ("a.jsonl", '{"Puzzle": 1}'.encode("utf-16"), ["UTF-8"])], ids=short)
def test_unreadable_file_is_named(tmp_path, name, content, words):
    path = tmp_path / name
    if content is ...:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    fails(lambda: read_rows(path, ("Puzzle", "Solution")), path, *words, error=(FileNotFoundError, ValueError))


# ---------------------------------------------------------------- the safe evaluator

REFUSED = ["9**9**9**9", "30**93**100", "7//2", "7 % 2", "1e9", "0x10", "1_0", "3.5", "３ + 4", "٣ + 4", "2 ＋ 3", "",
           " ", "1/0", "1 / (2 - 2)", "3(5)", "3 (5)", "(1)(2)", "(1,2)", "1 +\n2", "1\t+ 2", "1\u00a0+ 2",
           "__import__('os')", "a", "(1).real", "1 if 1 else 2", "1 < 2", "~1", "1;2", "1 = 1", "07 + 1", "(1", "1)",
           "()", "1 2", "not 1", "lambda: 1", "[1]", "{1}", "1j", "True", "None", "1 +", "* 1", "1 / / 2", "2 * * 3",
           "1 # 2", "1\0", "'1'", "1^2", "1 | 2", "5!", "2 × 3"]
# At the cap of 200 characters, where the parser and the walk must cope, and far beyond it.
HUGE = ["(" * 10_000 + "1" + ")" * 10_000, "-" * 10_000 + "1", "9" * 10**6, "1+" * 500_000 + "1", "(" * 10**6,
        " " * 10**6, "1(" * 100]
AT_CAP = {
    "-" * 199 + "1": -1, "-" * 198 + "10": 10, "(" * 99 + "1" + ")" * 99: 1, "1+" * 99 + "01": None,
    "1+" * 99 + "10": 109, "9" * 200: int("9" * 200), "9" * 201: None, "(" * 200: None, "1(" * 66 + ")" * 66: None,
    "9*" * 99 + "9": 9**100, "1/" * 99 + "3": Fraction(1, 3), "(-" * 66 + "1" + ")" * 66: 1,
    "-(" * 65 + "1" + ")" * 65: -1}


@pytest.mark.parametrize("text, value, numbers", [
    ("1 + 2 * 3", 7, [1, 2, 3]), ("(1 + 2) * 3", 9, [1, 2, 3]), ("8 - 3 - 2", 3, [8, 3, 2]),
    ("8 / 4 / 2", 1, [8, 4, 2]), ("6/(1-3/4)", 24, [6, 1, 3, 4]), ("1/3", Fraction(1, 3), [1, 3]),
    ("-3 + +5", 2, [3, 5]), ("--3", 3, [3]), ("2 - -3", 5, [2, 3]), (" 7 ", 7, [7]), ("0 / 5", 0, [0, 5]),
    ("10 * 0", 0, [10, 0])])
def test_safe_value(text, value, numbers):
    assert safe_value(text) == (value, numbers) and type(safe_value(text)[0]) is Fraction


def test_safe_value_refuses_quietly_and_fast(capfd):
    example = {"numbers": [1, 2, 3], "target": 6}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for text in (*REFUSED, *HUGE):
            assert safe_value(text) is None, text[:50]
            assert countdown.reward(answer(text), example)["exact"] == 0
            assert seconds(safe_value, text) < LIMIT, text[:50]
            assert seconds(countdown.reward, answer(text), example) < LIMIT, text[:50]
        for text, value in AT_CAP.items():
            found = safe_value(text)
            assert (found and found[0]) == value, text
            assert seconds(safe_value, text) < LIMIT, text
    assert not caught and capfd.readouterr() == ("", "")


def test_safe_value_survives_the_parser_giving_up(monkeypatch):
    for error in (RecursionError, MemoryError, SyntaxError, ValueError):
        with monkeypatch.context() as patch:
            patch.setattr(countdown.ast, "parse", lambda *args, error=error, **kwargs: (_ for _ in ()).throw(error()))
            assert safe_value("1 + 2") is None
    monkeypatch.undo()

    def at_depth(depth, text):
        return at_depth(depth - 1, text) if depth else safe_value(text)
    room = sys.getrecursionlimit() - len(inspect.stack(0))
    found = [at_depth(room - left, "-" * 99 + "1") for left in range(30, 330, 3)]  # the walk needs 100 frames
    assert None in found and (-1, [1]) in found and all(f in (None, (-1, [1])) for f in found)


def grow(rng, depth):
    """A random legal expression: (text, its binding strength, its value or None if it divides by zero, its numbers)."""
    if depth == 0 or rng.random() < 0.15:
        n = rng.choice((0, 1, 2, 3, rng.randint(4, 99), rng.randint(100, 99999)))
        return str(n), 3, Fraction(n), [n]
    if rng.random() < 0.1:
        text, strength, value, numbers = grow(rng, depth - 1)
        text = text if strength == 3 else f"({text})"
        return f"-{text}", 2, None if value is None else -value, numbers
    op = rng.choice("+-*/")
    own = 1 if op in "+-" else 2
    (left, ls, a, n), (right, rs, b, m) = grow(rng, depth - 1), grow(rng, depth - 1)
    left = f"({left})" if ls < own or rng.random() < 0.1 else left
    right = f"({right})" if rs <= own or rng.random() < 0.1 else right
    if a is None or b is None or (op == "/" and b == 0):
        value = None
    else:
        value = {"+": a + b, "-": a - b, "*": a * b}[op] if op != "/" else a / b
    blank = rng.choice(("", " ", "  "))
    return f"{left}{blank}{op}{blank}{right}", own, value, n + m


def test_safe_value_agrees_on_random_expressions():
    rng, evaluated = random.Random(0), 0
    for _ in range(4000):
        text, _, value, numbers = grow(rng, rng.randint(1, 5))
        legal = value is not None and len(text) <= 200
        evaluated += legal
        assert safe_value(text) == ((value, numbers) if legal else None), text
    assert evaluated > 3000


# ---------------------------------------------------------------- the answer format

@pytest.mark.parametrize("text, found", [
    ("<answer>1</answer>", "1"), ("a <answer> \n1 + 2\n </answer> b", "1 + 2"), ("<answer></answer>", ""),
    ("<answer> \n</answer>", ""), ("<answer>1</answer><answer>2</answer>", "2"), ("<answer>1</answer> <answer>2", "1"),
    ("<answer>1 <answer>2</answer>", "2"), ("<answer>1 <answer>2</answer> 3</answer>", "2"),
    ("<answer><answer>1</answer></answer>", "1"), ("<answer>1</answer></answer>", "1"),
    ("<answer>1</answer> so </answer> <answer>", "1"), ("1</answer>", None), ("<answer>1", None),
    ("</answer><answer>", None), ("", None), ("<ANSWER>1</ANSWER>", None), ("< answer>1</answer>", None),
    ("x" * MAX_TEXT + "<answer>1</answer>", "1"), ("<answer>1</answer>" + "x" * MAX_TEXT, None)], ids=short)
def test_closed_answer(text, found):
    assert closed_answer(text) == found


R, A = "<reasoning>\n", "<answer>\n"
STRICT = f"{R}a\nb\n</reasoning>\n{A}1\n</answer>"


@pytest.mark.parametrize("text, good", [
    (write_completion("a\n\nb < c", "1 + 2"), True), (STRICT, True), (f"\n {STRICT} \n\n", True),
    (write_completion("", ""), True), ("", False), (STRICT.upper(), False), (f"so {STRICT}", False),
    (f"{STRICT}\nso", False), (f"{STRICT}\n{STRICT}", False), (STRICT.replace("\n1\n", "1"), False),
    (STRICT.replace("</reasoning>\n", "</reasoning>"), False), (STRICT.replace("</reasoning>", ""), False),
    (STRICT.replace("</answer>", ""), False), (STRICT.replace("b", "<answer>"), False),
    (STRICT.replace("1", "<answer>\n1\n</answer>"), False), (STRICT.replace("1", "</reasoning>"), False),
    (f"{A}1\n</answer>\n{R}a\n</reasoning>", False), (write_completion("a" * MAX_TEXT, "1"), False)], ids=short)
def test_is_formatted(text, good):
    assert is_formatted(text) is good


HALF = MAX_TEXT // 2 - 40
BAIT = [R + "\n" * 2 * HALF, R + "a" * 2 * HALF, R + "<" * 2 * HALF, R + "<reasonin" * (HALF // 5),
        R + " \n" * HALF + "</reasoning>", R + "\n" * HALF + f"\n</reasoning>\n{A}" + "\n" * HALF,
        R + "\n</reasoning>" * (HALF // 7), write_completion("x\n" * (HALF - 20), "1") + "x", "<answer>" * 130_000,
        "</answer>" * 110_000, "<answer></answer>" * 60_000, "<answer>" * 1200 + "</answer>" * 1100, "<" * 10**6,
        answer("1" * 10**6), STRICT + " " * 10**6, "\n" * 10**6, "<answer>" + "1 " * 9000 + "</answer>"]


@pytest.mark.parametrize("text", BAIT, ids=short)
@pytest.mark.parametrize("task", ["countdown", "sudoku"])
def test_bait_is_graded_in_bounded_time(task, text):
    example = examples(task, "train")[0]
    for call in (TASKS[task].reward, TASKS[task].score):
        assert seconds(call, text, example) < LIMIT
    assert TASKS[task].score(text, example)["accuracy"] == 0


# ---------------------------------------------------------------- rewards

@pytest.mark.parametrize("given, total", [
    ("3 + 3 + 7", 1), ("7+3+3", 1), ("(3 + 3) + 7", 1), ("3 - (-3 - 7)", 1), ("7 + 3 * 2", 0.1), ("7 + 3", 0.1),
    ("7 + 6", 0.1), ("13", 0.1), ("3 + 3 + 7 + 0", 0.1), ("3 + 3 + 7 * 1", 0.1), ("3 * 3 + 7", 0.1),
    ("7 + 7 - 3 / 3", 0.1), ("3 + 3 + 7 = 13", 0.1), ("33 - 7", 0.1), ("3 +\n3 + 7", 0.1), ("３ + 3 + 7", 0.1),
    ("3 + 3 + 7.", 0.1), ("", 0.1), ("9**9**9**9", 0.1), ("1/0", 0.1), ("answer", 0.1)])
def test_countdown_reward(given, total):
    example = {"numbers": [3, 3, 7], "target": 13}
    parts, scores = countdown.reward(answer(given), example), countdown.score(answer(given), example)
    assert parts == {"exact": float(total == 1), "closed": 0.1 * (total == 0.1)}
    assert scores == {"accuracy": float(total == 1), "closed": 1, "format": 1}
    unclosed = answer(given).replace("</answer>", "")
    assert sum(countdown.reward(unclosed, example).values()) == sum(countdown.score(unclosed, example).values()) == 0


def test_countdown_reward_is_exact_arithmetic():
    assert countdown.reward(answer("6 / (1 - 3 / 4)"), {"numbers": [1, 3, 4, 6], "target": 24})["exact"] == 1
    assert countdown.reward(answer("9 / 3 / 7 * 7"), {"numbers": [3, 7, 7, 9], "target": 3})["exact"] == 1
    for numbers, target, text in (([1, 10**17], 10**17, f"{10**17} + 1"),  # right only in rounded arithmetic
                                  ([1, 10**17, 10**17], 0, f"{10**17} + 1 - {10**17}")):
        assert countdown.reward(answer(text), {"numbers": numbers, "target": target})["exact"] == 0


@pytest.mark.parametrize("task, right", [("countdown", "3 + 3 + 7"), ("sudoku", "3142243142131324")])
def test_rewards_are_total_and_pure(task, right):
    example = {"numbers": [3, 3, 7], "target": 13, "puzzle": "3102200002100320", "solution": "3142243142131324"}
    parts = ["<answer>", "</answer>", "<reasoning>", "</reasoning>", "\n", " ", "3", "7", "1432", *"+-*/()", "**", "//",
             "１", "é", "\0", ",", ".", "_", "e", EOT, "\ud800", "\\boxed{", "<", ">", "__import__", right,
             f"<answer>{right}</answer>", answer(right), answer("1")]
    rng, totals, before = random.Random(0), set(), copy.deepcopy(example)
    for _ in range(4000):
        text = "".join(rng.choices(parts, k=rng.randint(0, 25)))
        rewards, scores = TASKS[task].reward(text, example), TASKS[task].score(text, example)
        assert all(type(v) is float and 0 <= v <= 1 for v in (*rewards.values(), *scores.values())), text
        assert list(rewards) == (["exact", "closed"] if task == "countdown" else ["cells"])
        assert (scores["accuracy"] == 1) == (sum(rewards.values()) == 1) and scores["closed"] >= scores["format"]
        assert rewards == TASKS[task].reward(text, example) and example == before
        totals.add(sum(rewards.values()))
    assert task == "sudoku" or totals == {0, 0.1, 1}


# ---------------------------------------------------------------- Sudoku

def brute_solve(puzzle):
    """All solutions, cell by cell."""
    empty = puzzle.find("0")
    if empty < 0:
        return [puzzle]
    r, c = divmod(empty, 4)
    peers = {puzzle[i] for i in range(16) if i // 4 == r or i % 4 == c or (i // 8, i % 4 // 2) == (r // 2, c // 2)}
    return [s for d in "1234" if d not in peers for s in brute_solve(puzzle[:empty] + d + puzzle[empty + 1:])]


def test_sudoku_grids_and_solve():
    assert sudoku.grids() == brute_solve("0" * 16) == sudoku.solve("0" * 16) and len(sudoku.grids()) == 288
    assert sudoku.solve("11" + "0" * 14) == []
    rng = random.Random(0)
    for _ in range(100):
        puzzle = "".join(d if rng.random() < 0.3 else "0" for d in rng.choice(sudoku.grids()))
        assert sudoku.solve(puzzle) == brute_solve(puzzle)


@pytest.mark.parametrize("grid, good", [
    ("1234341221434321", True), ("1313242431314242", False),  # a fault in the rows only
    ("1234341212343412", False), ("1234214334124321", False),  # in the columns only, in the boxes only
    ("1" * 16, False), ("5678785665878765", False), ("１２３４３４１２２１４３４３２１", False)])
def test_sudoku_rules(grid, good):
    assert sudoku.is_solution(grid) is good


@pytest.mark.parametrize("split", SPLITS)
def test_sudoku_puzzles_have_one_solution(split):
    for example in examples("sudoku", split)[:300]:
        puzzle = example["puzzle"]
        assert len(puzzle) == 16 and puzzle.count("0") == 8 and brute_solve(puzzle) == [example["solution"]]
        assert example["prompt"].endswith(f"\nPuzzle: {puzzle}")


def test_sudoku_splits_never_overlap():
    held_out = {e["puzzle"] for e in examples("sudoku", "test")}
    seen = {e["puzzle"] for split in ("train", *DEMONSTRATED) for e in examples("sudoku", split)}
    assert not seen & held_out and len(held_out) == 500
    assert all(map(sudoku.is_held_out, held_out)) and not any(map(sudoku.is_held_out, seen))


def test_published_sudoku():
    rows = sudoku.load("test", data=published("4x4_test_sudoku.csv"))
    assert len(rows) == 500 and rows[1]["puzzle"] == "0140432014020000" and rows[1]["solution"] == "2143432114323214"
    assert all(row["solution"] in brute_solve(row["puzzle"]) for row in rows)
    assert sum(len(sudoku.solve(row["puzzle"])) > 1 for row in rows) == 124
    assert sudoku.load("test", data=published("4x4_test_sudoku.csv"), count=2) == rows[:2]


PUZZLE, SOLUTION = "3102200002100320", "3142243142131324"


@pytest.mark.parametrize("row, words", [
    (f"{PUZZLE[1:]},{SOLUTION}", [PUZZLE[1:]]), (f"{PUZZLE}0,{SOLUTION}", [PUZZLE + "0"]),
    (f"{PUZZLE},{SOLUTION}1", [SOLUTION + "1"]), (f"5{PUZZLE[1:]},{SOLUTION}", ["digits 0-4"]),
    (f"{PUZZLE},{SOLUTION[:-1]}0", ["digits 1-4"]), (f"{PUZZLE},", ["digits 1-4"]), (PUZZLE, ["'Solution'"]),
    (f"{PUZZLE.replace('0', ' ')},{SOLUTION}", ["digits 0-4"]), (f"{PUZZLE},３{SOLUTION[1:]}", ["digits 1-4"]),
    (f"{PUZZLE},{SOLUTION[:-1]}1", ["does not solve"]), (f"1{PUZZLE[1:]},{SOLUTION}", ["does not solve"]),
    (f"{PUZZLE},1234341221434321", ["does not solve"])])
def test_sudoku_bad_row_is_named(tmp_path, row, words):
    path = tmp_path / "rows.csv"
    path.write_bytes(f"\ufeffPuzzle,Solution\r\n0140432014020000,2143432114323214\r\n{row}\r\n".encode())
    fails(lambda: sudoku.load("test", data=path), path, "row 3", *words)


@pytest.mark.parametrize("given, cells, accuracy", [
    (SOLUTION, 1, 1), (" ".join(SOLUTION), 1, 1), ("3142\n2431\r\n4213\t\n1324", 1, 1), (f"\u3000{SOLUTION}\n", 1, 1),
    (SOLUTION[:2] + "1" + SOLUTION[3:], 7 / 8, 0), ("1" * 16, 2 / 8, 0), ("4" * 16, 4 / 8, 0),
    # clues changed, in the second to a grid that keeps the rules: the published metric looks at empty cells only
    ("1" + SOLUTION[1:], 1, 0), ("1234341221434321", 2 / 8, 0),
    (SOLUTION[:-1], 0, 0), (SOLUTION + "1", 0, 0), ("0" + SOLUTION[1:], 0, 0), (PUZZLE, 0, 0), ("", 0, 0), ("  ", 0, 0),
    ("３" + SOLUTION[1:], 0, 0), ("\u3000".join(SOLUTION), 0, 0), ("|".join(SOLUTION), 0, 0), (f"so {SOLUTION}", 0, 0),
    (" " * 300 + SOLUTION, 1, 1), (SOLUTION[:8] + " " * 300 + SOLUTION[8:], 0, 0)])
def test_sudoku_reward_and_score(given, cells, accuracy):
    example, text = {"puzzle": PUZZLE, "solution": SOLUTION}, answer(given)
    assert sudoku.reward(text, example) == {"cells": cells}
    assert sudoku.score(text, example) == {"accuracy": accuracy, "cells": cells, "closed": 1, "format": 1}
    unclosed = text.replace("</answer>", "")
    assert sudoku.reward(unclosed, example) == {"cells": 0} and sum(sudoku.score(unclosed, example).values()) == 0


def test_sudoku_accuracy_accepts_another_solution():
    puzzle = "12" + "0" * 14
    stored, other = sudoku.solve(puzzle)[:2]
    scores = sudoku.score(answer(other), {"puzzle": puzzle, "solution": stored})
    assert scores["accuracy"] == 1 and 0 < scores["cells"] < 1
    assert sudoku.reward(answer(stored), {"puzzle": stored, "solution": stored}) == {"cells": 0}  # nothing to fill
