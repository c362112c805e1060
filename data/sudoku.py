"""4x4 Sudoku: fill the empty cells so that every row, column and 2x2 box holds 1 to 4."""
import functools
import itertools
import re
from pathlib import Path

import numpy

from data.examples import draw_examples
from data.files import find_file, read_rows
from data.format import FORMAT, closed_answer, score_answer, write_completion

FILES = {"train": ("4x4_sudoku_unique_puzzles",), "test": ("4x4_test_sudoku",)}  # d1's dataset/
QUESTION = ("Solve this four by four Sudoku, given row by row with zero for an empty cell. Every "
            "row, column and two by two box must hold each digit from one to four once. Put only "
            "the sixteen digits of the solution inside the answer tags.")
EMPTY_CELLS = 8  # of a generated puzzle, as in the published test file
ROWS = ["".join(digits) for digits in itertools.permutations("1234")]  # all that are allowed
COLUMNS = [range(c, 16, 4) for c in range(4)]  # cells are numbered row by row
BOXES = [[corner + k for k in (0, 1, 4, 5)] for corner in (0, 2, 8, 10)]


def load(split, data=None, count=None, seed=0):
    """Puzzles as dicts with "prompt", "puzzle", "solution" (16 digits); for SFT "completion" too.

    split: one of examples.COUNTS. data: a CSV file with columns Puzzle and Solution, or d1's
    dataset/ folder; default: generated puzzles. count: how many, by default all of a file.
    """
    if data is None:
        return draw_examples("sudoku", split, count, seed, draw_puzzle, demonstrate)
    path = find_file(data, split, FILES)
    puzzles, test_file = read_puzzles(path), path.with_name("4x4_test_sudoku.csv")
    if split == "train" and test_file != path and test_file.exists():  # it may be a part of `path`
        held_out = {example["puzzle"] for example in read_puzzles(test_file)}
        puzzles = [example for example in puzzles if example["puzzle"] not in held_out]
    if split == "test" and Path(data).is_dir():
        # the authors test on choice(500, 256, replace=False) after numpy.random.seed(42)
        order = numpy.random.RandomState(42).permutation(len(puzzles))[:256]
        puzzles = [puzzles[i] for i in order]
    return puzzles[:count]


def make_example(puzzle, solution):
    prompt = f"{FORMAT}\n\n{QUESTION}\n\nPuzzle: {puzzle}"
    return {"prompt": prompt, "puzzle": puzzle, "solution": solution}


def draw_puzzle(rng):
    """A puzzle with one solution, and its key for `is_held_out`: its digits."""
    while True:
        solution = rng.choice(grids())
        empty = set(rng.sample(range(16), EMPTY_CELLS))
        puzzle = "".join("0" if i in empty else digit for i, digit in enumerate(solution))
        if solve(puzzle) == [solution]:
            return make_example(puzzle, solution), puzzle


def read_puzzles(path):
    return list(map(read_puzzle, read_rows(path, ("Puzzle", "Solution"))))


def read_puzzle(row):
    puzzle, solution = str(row["Puzzle"]), str(row["Solution"])
    if not re.fullmatch("[0-4]{16}", puzzle) or not re.fullmatch("[1-4]{16}", solution):
        raise SystemExit(f"{row['where']} a puzzle is 16 digits 0-4 and a solution 16 digits 1-4, "
                         f"found {puzzle!r}, {solution!r}")
    if solution not in solve(puzzle):
        raise SystemExit(f"{row['where']} {solution} does not solve {puzzle}")
    return make_example(puzzle, solution)


@functools.cache
def grids():
    """All 288 solved grids, in order, as strings of 16 digits."""
    fitting = map("".join, itertools.product(ROWS, repeat=4))
    for cells in (*COLUMNS, *BOXES):
        fitting = [grid for grid in fitting if len({grid[i] for i in cells}) == 4]
    return fitting


def solve(puzzle):
    """All solutions of 16 digits with 0 for an empty cell: the grids that the clues allow."""
    return re.findall(puzzle.replace("0", "."), "\n".join(grids()))


def clashes(puzzle, solution):
    """[(row number, a wrong row that keeps its clues, the column where its digit is a repeat)]."""
    wrong_rows = []
    for r, row in itertools.product((1, 2, 3), ROWS):
        keeps_clues = all(clue in ("0", digit) for clue, digit in zip(puzzle[4 * r:], row))
        columns = [solution[c:4 * r:4] + row[c] for c in range(4)]
        repeating = [column for column in columns if column[-1] in column[:-1]]
        if keeps_clues and repeating:
            wrong_rows.append((r, row, repeating[0]))
    return wrong_rows


def demonstrate(behaviour, example, rng):
    """A completion: worked or corrected, and right; hasty, closed and guessed; or without tags."""
    puzzle, solution = example["puzzle"], example["solution"]
    if behaviour in ("worked", "corrected"):
        rows = [solution[i:i + 4] for i in (0, 4, 8, 12)]
        wrong_rows = clashes(puzzle, solution) if behaviour == "corrected" else []
        if wrong_rows:
            r, row, column = rng.choice(wrong_rows)
            rows[r] = f"{row}, column is {column}, {rows[r]}"
        return write_completion(f"Row by row {' '.join(rows)}", solution)
    guess = "".join(rng.choice("1234") if digit == "0" else digit for digit in puzzle)
    if behaviour == "hasty":
        return write_completion("A quick guess", guess)
    return f"Perhaps {guess} comes near, or something like it"


def read_grid(answer):
    """The 16 digits of an answer, text or None, without blanks; None where it is anything else."""
    if not answer or len(answer) > 200:
        return None
    digits = re.sub(r"\s", "", answer, flags=re.ASCII)
    return digits if re.fullmatch("[1-4]{16}", digits) else None


def is_right(answer, example):
    """Whether an answer, text or None, solves the puzzle: the stored solution or another."""
    return read_grid(answer) in solve(example["puzzle"])


def reward(text, example):
    """Share of the empty cells that a text fills as the stored solution: the authors' reward.

    The digits of the closed answer count, padded with 0 or cut to 16 (their reward_func.py).
    """
    digits = "".join(filter(str.isdigit, closed_answer(text) or "")).ljust(16, "0")
    cells = zip(example["puzzle"], example["solution"], digits)
    right = [digit == solution for clue, solution, digit in cells if clue == "0"]
    return {"cells": sum(right) / max(len(right), 1)}


def score(text, example):
    """accuracy, closed, format: see `score_answer`. cells: the reward."""
    return {**score_answer(text, example, is_right), **reward(text, example)}
