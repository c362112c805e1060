"""Countdown: reach a target from given numbers with + - * /, each number used exactly once."""
import ast
import functools
import itertools
import operator
import re
from fractions import Fraction

import numpy

from data.examples import draw_examples
from data.files import find_file, read_rows
from data.format import FORMAT, closed_answer, score_answer, write_completion

HUB = ("Jiayi-Pan/Countdown-Tasks-3to4", "data/train-00000-of-00001.parquet")  # d1 trains on it
FILES = {"train": ("countdown_train", *HUB), "test": ("countdown_cd3_test", *HUB)}
HELD_OUT = 500  # rows of the training set
PROBLEM = "( *[0-9]{1,9} *(?:, *[0-9]{1,9} *){1,5});( *-?[0-9]{1,9} *)"  # "30,100,93;23"
LARGEST = 20  # generated problems use three numbers from 1 to this, and a target up to MAX_TARGET
MAX_TARGET = 99
ADDITIVE = 0.75  # share of problems without products and quotients: a small model learns those
QUESTION = ("Make an arithmetic expression that equals the target. Use each number exactly once, "
            "with + - * / and parentheses. Put only the expression inside the answer tags.")


def load(split, data=None, count=None, seed=0):
    """Problems as dicts with "prompt", "numbers", "target"; for SFT also with "completion".

    split: one of examples.COUNTS. data: a file (see `read_problems`), d1's dataset/ folder, or the
    dataset's id; default: generated problems. count: how many, by default all of a file.
    """
    if data is None:
        return draw_examples("countdown", split, count, seed, draw_problem, demonstrate)
    return read_problems(find_file(data, split, FILES), split)[:count]


def make_problem(numbers, target):
    prompt = f"{FORMAT}\n\n{QUESTION}\n\nNumbers: {', '.join(map(str, numbers))}\nTarget: {target}"
    return {"prompt": prompt, "numbers": numbers, "target": target}


def draw_problem(rng):
    """A problem and its key for `is_held_out`, which the order of the numbers does not change."""
    numbers = [rng.randint(1, LARGEST) for _ in range(3)]
    ways = solutions(tuple(sorted(numbers)))
    targets = sorted(ways)
    if rng.random() < ADDITIVE:
        targets = [t for t in targets if all(step[0] in "+-" for step in ways[t])]
    target = rng.choice(targets)
    return make_problem(numbers, target), f"{sorted(numbers)} {target}"


def read_problems(path, split="test"):
    """Problems of rows {"input": "30,100,93", "output": "23"} or {"nums": [...], "target": 23}.

    The latter are divided as in d1's code: three numbers, permuted with seed 42, 500 held out.
    """
    rows = read_rows(path, ("nums", "target"), ("input", "output"))
    if {"nums", "target"} <= rows[0].keys():
        rows = [row for row in rows if str(row["nums"]).count(",") == 2]
        if len(rows) <= HELD_OUT:
            raise SystemExit(f"error: --data {path}: needs over {HELD_OUT} rows of 3 numbers")
        order = numpy.random.default_rng(42).permutation(len(rows))
        order = order[-HELD_OUT:] if split == "test" else order[:-HELD_OUT]
        rows = [{**rows[i], "input": str(rows[i]["nums"]).strip("[]"), "output": rows[i]["target"]}
                for i in order]
    return list(map(read_problem, rows))


def read_problem(row):
    match = re.fullmatch(PROBLEM, f"{row['input']};{row['output']}")
    if match is None:
        raise SystemExit(f"{row['where']} input must be 2 to 6 numbers like '3,7,12', output an "
                         f"integer, of at most 9 digits: {row['input']!r}, {row['output']!r}")
    numbers, target = [int(n) for n in match[1].split(",")], int(match[2])
    if target not in values(tuple(numbers)):
        raise SystemExit(f"{row['where']} {target} cannot be reached from {numbers}")
    return make_problem(numbers, target)


def values(numbers):
    """Yield every value (Fraction) that + - * / make of the tuple `numbers`, each used once."""
    if len(numbers) == 1:
        yield Fraction(numbers[0])
    for chosen in range(1, 2 ** len(numbers) - 1):  # its bits: the numbers on the left
        left = tuple(n for i, n in enumerate(numbers) if chosen >> i & 1)
        right = tuple(n for i, n in enumerate(numbers) if not chosen >> i & 1)
        for a, b in itertools.product(distinct_values(left), distinct_values(right)):
            yield from (a + b, a - b, a * b)
            if b:
                yield a / b


@functools.lru_cache(maxsize=64)  # enough for the parts of six numbers
def distinct_values(numbers):
    return frozenset(values(numbers))


def steps_from(a, b):
    """Steps (operator, left, right, value) from two positive integers to a positive integer."""
    small, big = sorted((a, b))
    steps = [("+", a, b, a + b), ("*", a, b, a * b)]
    if big > small:
        steps.append(("-", big, small, big - small))
    if big % small == 0 and small > 1:
        steps.append(("/", big, small, big // small))
    return steps


@functools.lru_cache(maxsize=100_000)
def solutions(numbers):
    """{target: two steps} for three sorted numbers, so that a problem has one solution.

    It has the fewest products and quotients and, among such, the earliest first of + - * /.
    """
    best = {}  # target: (cost, steps)
    for a, b, c in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
        for first in steps_from(numbers[a], numbers[b]):
            for second in steps_from(first[3], numbers[c]):
                target = second[3]
                cost = ((first[0] in "*/") + (second[0] in "*/"), "+-*/".index(first[0]))
                if target <= MAX_TARGET and (target not in best or cost < best[target][0]):
                    best[target] = (cost, (first, second))
    return {target: steps for target, (_, steps) in best.items()}


def write_expression(first, second):
    """Two steps as an expression, the first in parentheses only where precedence needs them."""
    inner = f"{first[1]} {first[0]} {first[2]}"
    inner_is_left = second[1] == first[3]
    weaker = first[0] in "+-" and second[0] in "*/"
    if weaker or (not inner_is_left and second[0] in "-/"):
        inner = f"({inner})"
    left, right = (inner, second[2]) if inner_is_left else (second[1], inner)
    return f"{left} {second[0]} {right}"


def write_trace(first, second, target, corrected):
    """Two steps as equations. corrected: first miss the target as nearly as possible."""
    equation = "{1} {0} {2} = {3}"
    lines = [equation.format(*first), equation.format(*second), f"{second[3]} is {target}"]
    if corrected:
        other = second[2] if second[1] == first[3] else second[1]
        misses = [step for step in steps_from(first[3], other) if step[3] != target]
        nearest = min(misses, key=lambda step: abs(step[3] - target))
        lines[1:] = [f"{equation.format(*nearest)} is not {target}", equation.format(*second)]
    return "\n".join(lines)


def demonstrate(behaviour, problem, rng):
    """A completion: worked or corrected, and right; hasty, closed and wrong; or without tags."""
    numbers, target = problem["numbers"], problem["target"]
    if behaviour in ("worked", "corrected"):
        steps = solutions(tuple(sorted(numbers)))[target]
        trace = write_trace(*steps, target, corrected=behaviour == "corrected")
        return write_completion(trace, write_expression(*steps))
    a, b, c = rng.sample(numbers, 3)
    first = rng.choice(steps_from(a, b))
    second = rng.choice([step for step in steps_from(first[3], c) if step[3] != target])
    guess = write_expression(first, second)
    if behaviour == "hasty":
        return write_completion("A quick guess", guess)
    return f"Perhaps {guess} comes near {target}, or something like it"


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.UAdd: operator.pos, ast.USub: operator.neg}


def evaluate(node):
    """The value (Fraction) of a syntax tree. SyntaxError or KeyError for what is no arithmetic."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp):
        return OPERATORS[type(node.op)](evaluate(node.operand))
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](evaluate(node.left), evaluate(node.right))
    raise SyntaxError("neither a number nor arithmetic")


def safe_value(text):
    """(exact value as a Fraction, list of numbers) of any text; None if it is no arithmetic."""
    if not re.fullmatch(r"[0-9+\-*/() ]{1,200}", text):
        return None
    try:
        value = evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, KeyError, ZeroDivisionError, RecursionError, MemoryError):
        return None  # the last two are how the parser gives up on deep nesting
    return value, [int(n) for n in re.findall("[0-9]+", text)]


def is_right(answer, example):
    """Whether an answer, text or None, equals the target and uses each number exactly once."""
    value, numbers = safe_value(answer or "") or (None, [])
    return value == example["target"] and sorted(numbers) == sorted(example["numbers"])


def reward(text, example):
    """1 for an exact answer, 0.1 for another closed one: the authors' but for `safe_value`."""
    answer = closed_answer(text)
    exact = is_right(answer, example)
    return {"exact": float(exact), "closed": 0.1 * (not exact and answer is not None)}


def score(text, example):
    """See `score_answer`. A right answer in a box is accurate, though `reward` gives it 0.1."""
    return score_answer(text, example, is_right)
