"""Countdown: reach a target from given numbers with + - * /, each number used exactly once."""
import ast
import functools
import hashlib
import itertools
import operator
import random
import re
from fractions import Fraction

import numpy

from data.files import find_file, read_rows
from data.format import (FORMAT, MAX_TEXT, closed_answer, default_count, draw_behaviour, last_box, score_answer,
                         write_completion)
from data.published import first_answer, write_published

HUB = ("Jiayi-Pan/Countdown-Tasks-3to4", "data/train-00000-of-00001.parquet")  # what d1 trains on
NAMES = {"test": ("countdown_cd3_test.jsonl",)}  # in the folder dataset/ of the d1 authors' repository
HELD_OUT = 500

LARGEST = 20  # generated problems use three numbers from 1 to this and a target up to MAX_TARGET
MAX_TARGET = 99
ADDITIVE = 0.75  # share of generated problems that sums and differences alone can solve: a small model can learn those
NUMBERS, TARGET = re.compile(r" *[0-9]{1,9} *(, *[0-9]{1,9} *)*"), re.compile(r" *-?[0-9]{1,9} *")  # of a file's row
PYTHON_LOOKS = re.compile(r"[\d+\-*/().\s]+")
LEFT_SIDE = re.compile(r"(?<![0-9+\-*/() ])([0-9+\-*/() ]++)=[0-9. ]")
QUESTION = ("Make an arithmetic expression that equals the target. Use each number exactly once, with + - * / and "
            "parentheses. Put only the expression inside the answer tags.")


def write_prompt(numbers, target):
    return f"{FORMAT}\n\n{QUESTION}\n\nNumbers: {', '.join(map(str, numbers))}\nTarget: {target}"


def load(split, data=None, count=None, seed=0):
    """Problems as dicts with "prompt", "numbers", "target"; for demonstrations also "completion".

    split: "train" for RL; "test", held out; "worked", "mixed", "corrected", demonstrations for SFT, all worked or with
    format.BEHAVIOURS of that name. "test" draws from a part of the problem space that the others never see
    (`is_held_out`); a longer list begins with the shorter one. data: instead of generated problems those of a file, of
    d1's dataset/ folder, or of a dataset id (`read_problems`); count: how many, by default all of the file or
    format.COUNTS. Raises ValueError naming file and row.
    """
    if data is not None:
        return read_problems(find_file(data, NAMES.get(split, ()), HUB), split)[:count]
    count = default_count(split) if count is None else count
    rng = random.Random(f"countdown-{'test' if split == 'test' else 'train'}-{seed}")
    examples, seen, misses = [], set(), 0
    while len(examples) < count:
        misses += 1
        if misses > 300_000:
            raise ValueError(f"--count {count}: only {len(examples)} {split} problems have numbers up to {LARGEST}")
        numbers = tuple(rng.randint(1, LARGEST) for _ in range(3))
        found, additive = solutions(tuple(sorted(numbers))), rng.random() < ADDITIVE
        target = rng.choice([t for t in sorted(found) if is_additive(found[t]) or not additive])
        if is_held_out(numbers, target) != (split == "test") or (split == "test" and (numbers, target) in seen):
            continue
        misses = 0
        seen.add((numbers, target))
        examples.append({"prompt": write_prompt(numbers, target), "numbers": list(numbers), "target": target})
        if behaviour := draw_behaviour(split, rng):
            examples[-1]["completion"] = demonstrate(behaviour, numbers, target, rng)
    return examples


def is_held_out(numbers, target):
    """One problem in eight, by a hash of its sorted numbers and target: the order of the numbers does not matter."""
    return hashlib.sha256(f"{sorted(numbers)} {target}".encode()).digest()[0] < 32


def read_problems(path, split="test"):
    """Problems of a file in the published format, rows {"input": "30,100,93", "output": "23"}, all of them; or of the
    training set, rows {"nums": [30, 100, 93], "target": 23}, divided as in d1's code: three numbers only, permuted with
    seed 42, the last 500 held out.
    """
    rows = read_rows(path, ("input", "output"), ("nums", "target"))
    if "nums" in rows[0]:
        rows = [{**row, "input": ",".join(map(str, row["nums"])), "output": row["target"]} for row in rows
                if not isinstance(row["nums"], list) or len(row["nums"]) == 3]
        if len(rows) <= HELD_OUT:
            raise ValueError(f"--data {path}: {len(rows)} rows have three numbers, and {HELD_OUT} are held out")
        order = numpy.random.default_rng(42).permutation(len(rows))
        rows = [rows[i] for i in (order[-HELD_OUT:] if split == "test" else order[:-HELD_OUT])]
    return [read_problem(row, path) for row in rows]


def read_problem(row, path):
    given, output = str(row["input"]), str(row["output"])
    if not NUMBERS.fullmatch(given) or not TARGET.fullmatch(output):
        raise ValueError(f"--data {path}, row {row['row']}: input must be whole numbers like '3,7,12' and output "
                         f"one integer, each of at most 9 digits, found {row['input']!r}, {row['output']!r}")
    numbers, target = [int(n) for n in given.split(",")], int(output)
    if not 2 <= len(numbers) <= 6:
        raise ValueError(f"--data {path}, row {row['row']}: {len(numbers)} numbers, expected 2 to 6")
    if target not in values(tuple(numbers)):
        raise ValueError(f"--data {path}, row {row['row']}: {target} cannot be reached from {numbers}")
    return {"prompt": write_prompt(numbers, target), "numbers": numbers, "target": target}


def published_prompt(example):
    return write_published("With the numbers given, each used exactly once, and + - * / write an arithmetic expression "
                           "that equals the target; only that expression belongs in the box.",
                           f"Numbers: {example['numbers']}\nTarget: {example['target']}")


def published_example(question, truth):
    """An example from an item of the authors' files."""
    numbers, target = truth
    return {"numbers": [int(n) for n in numbers], "target": int(target)}


def values(numbers):
    """Yield every value (Fraction) that + - * / make of the tuple `numbers`, each used once, some more than once."""
    if len(numbers) == 1:
        yield Fraction(numbers[0])
    for chosen in range(2 ** (len(numbers) - 1) - 1):  # all ways to part the numbers in two, the first on the left
        left = numbers[:1] + tuple(n for i, n in enumerate(numbers[1:]) if chosen >> i & 1)
        right = tuple(n for i, n in enumerate(numbers[1:]) if not chosen >> i & 1)
        for a, b in itertools.product(distinct_values(left), distinct_values(right)):
            yield from (a + b, a - b, b - a, a * b, *([a / b] if b else []), *([b / a] if a else []))


@functools.lru_cache(maxsize=64)  # the parts of one row of six numbers
def distinct_values(numbers):
    return frozenset(values(numbers))


# ---------------------------------------------------------------- demonstrations

def results(a, b):
    """(operator, left, right, value) for the operations on two positive integers with a positive integer result."""
    big, small = max(a, b), min(a, b)
    found = [("+", a, b, a + b), ("*", a, b, a * b)]
    if big > small:
        found.append(("-", big, small, big - small))
    if big % small == 0 and small > 1:
        found.append(("/", big, small, big // small))
    return found


@functools.lru_cache(maxsize=100_000)
def solutions(numbers):
    """{target: canonical solution} for three sorted numbers: the first in a fixed order, so one answer per problem.

    A solution is two steps ((op, left, right, value), (op, left, right, value)); the order tries sums and differences
    before products and quotients.
    """
    found = {}
    for a, b, c in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
        for first in results(numbers[a], numbers[b]):
            for second in results(first[3], numbers[c]):
                cost = (sum("+-*/".index(s[0]) > 1 for s in (first, second)), "+-*/".index(first[0]))
                if second[3] <= MAX_TARGET and (second[3] not in found or cost < found[second[3]][0]):
                    found[second[3]] = (cost, (first, second))
    return {target: steps for target, (_, steps) in found.items()}


def is_additive(steps):
    return all(operator in "+-" for operator, *_ in steps)


def expression(first, second):
    """The two steps as one expression; parentheses around the first only where precedence needs them."""
    inner = f"{first[1]} {first[0]} {first[2]}"
    left_is_inner = second[1] == first[3]
    needs = first[0] in "+-" and second[0] in "*/" or not left_is_inner and second[0] in "-/"
    inner = f"({inner})" if needs else inner
    return f"{inner} {second[0]} {second[2]}" if left_is_inner else f"{second[1]} {second[0]} {inner}"


def equation(step):
    return f"{step[1]} {step[0]} {step[2]} = {step[3]}"


def work(first, second, target):
    """Try, compute, compare with the target."""
    return f"{equation(first)}\n{equation(second)}\n{second[3]} is {target}"


def correct(first, second, target):
    """Try, compute, notice that the second step misses the target, go back to it: the miss is the nearest there is."""
    other = second[2] if second[1] == first[3] else second[1]
    miss = min((s for s in results(first[3], other) if s[3] != target), key=lambda s: abs(s[3] - target))
    return f"{equation(first)}\n{equation(miss)} is not {target}\n{equation(second)}"


def demonstrate(behaviour, numbers, target, rng):
    """A completion: worked or corrected, and right; hasty, closed and wrong; or without tags."""
    if behaviour in ("worked", "corrected"):
        steps = solutions(tuple(sorted(numbers)))[target]
        return write_completion((work if behaviour == "worked" else correct)(*steps, target), expression(*steps))
    a, b, c = rng.sample(numbers, 3)
    first = rng.choice(results(a, b))
    second = rng.choice([s for s in results(first[3], c) if s[3] != target])
    if behaviour == "hasty":
        return write_completion("A quick guess", expression(first, second))
    return f"Perhaps {expression(first, second)} comes near {target}, or something like it"


# ---------------------------------------------------------------- rewards and scores

EXACT = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
         ast.UAdd: operator.pos, ast.USub: operator.neg}
AS_PYTHON = {**EXACT, ast.Pow: operator.pow, ast.FloorDiv: operator.floordiv}


def evaluate(text, operators, number):
    """The value of an arithmetic expression of at most 200 characters, or None: a walk over its syntax tree that knows
    constants, which `number` makes, and the `operators`, and nothing else: no names, no calls.
    """
    def walk(node):
        if isinstance(node, ast.Constant):
            return number(node.value)
        operands = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
        return operators[type(node.op)](*map(walk, operands))

    try:
        return walk(ast.parse(text.strip(), mode="eval").body) if len(text) <= 200 else None
    except (ValueError, SyntaxError, TypeError, AttributeError, KeyError, ArithmeticError, RecursionError, MemoryError):
        return None  # what is no arithmetic, divides by zero, or exceeds the parser's own limits


def safe_value(text):
    """The exact value (Fraction) of an arithmetic expression and its list of numbers, or None.

    Total and bounded for any text: a whitelist of characters, whole numbers, + - * / and signs, at most 200 characters.
    """
    value = evaluate(text, EXACT, Fraction) if re.fullmatch(r"[0-9+\-*/() ]{1,200}", text) else None
    return None if value is None else (value, [int(n) for n in re.findall("[0-9]+", text)])


def is_exact(answer, example):
    """Whether an answer, text or None, equals the target and uses each number exactly once."""
    found = safe_value(answer) if answer else None
    return found is not None and found[0] == example["target"] and sorted(found[1]) == sorted(example["numbers"])


def reward(text, example):
    """1 for an exact answer, 0.1 for any other closed answer, else 0 (as the authors' code, with a safe evaluator)."""
    answer = closed_answer(text)
    exact = is_exact(answer, example)
    return {"exact": float(exact), "closed": 0.1 * (not exact and answer is not None)}


def score(text, example):
    """accuracy: exact answers; closed, format: see `score_answer`."""
    return score_answer(text, example, is_exact)


def published_expression(text):
    r"""Where the authors' evaluation finds the expression: the last box, else the first answer, else all the text;
    \div, \times, \cdot made operators; of an equation the left side.
    """
    text = text[-MAX_TEXT:]
    found = next(part for part in (last_box(text), first_answer(text), text) if part is not None)
    found = found.replace(r"\div", "/").replace(r"\times", "*").replace(r"\cdot", "*")
    equation = LEFT_SIDE.search(found)
    return equation[1].strip() if equation else found


def published(text, example):
    """The authors' verdict on a completion, and ours. {name: value} with "of", how much there was to get.

    Theirs: Python's value of `published_expression` lies within 1e-5 of the target, its digits are the numbers given.
    exact: the same expression by the safe evaluator, which knows no decimals, no ** and no //.
    """
    expression, numbers = published_expression(text), sorted(example["numbers"])
    right = len(expression) <= 200 and sorted(map(int, re.findall(r"\d+", expression))) == numbers
    value = evaluate(expression, AS_PYTHON, float) if right and PYTHON_LOOKS.fullmatch(expression) else None
    exact = safe_value(expression)
    return {"published": float(value is not None and abs(value - example["target"]) < 1e-5), "of": 1,
            "exact": float(exact is not None and exact[0] == example["target"] and sorted(exact[1]) == numbers)}
