"""4x4 Sudoku: fill the empty cells so that every row, column and 2x2 box holds 1 to 4."""
import functools
import hashlib
import itertools
import random
import re
from pathlib import Path

import numpy

from data.files import find_file, read_rows
from data.format import (FORMAT, MAX_TEXT, closed_answer, default_count, draw_behaviour, is_formatted, unboxed,
                         write_completion)
from data.published import END, write_published

# in the folder dataset/ of the d1 authors' repository
NAMES = {"train": ("4x4_sudoku_unique_puzzles.csv",), "test": ("4x4_test_sudoku.csv",)}

EMPTY_CELLS = 8  # as in the published test file
QUESTION = ("Solve this four by four Sudoku, given row by row with zero for an empty cell. Every row, column and two "
            "by two box must hold each digit from one to four once. Put only the sixteen digits of the solution inside "
            "the answer tags.")
ROWS = [range(4 * r, 4 * r + 4) for r in range(4)]
COLUMNS = [range(c, 16, 4) for c in range(4)]
BOXES = [[8 * r + 2 * c + k for k in (0, 1, 4, 5)] for r in (0, 1) for c in (0, 1)]


def write_prompt(puzzle):
    return f"{FORMAT}\n\n{QUESTION}\n\nPuzzle: {puzzle}"


def load(split, data=None, count=None, seed=0):
    """Puzzles as dicts with "prompt", "puzzle", "solution" (16 digits each); for demonstrations also "completion".

    Splits, `count` and errors as in data/countdown.py. data: CSV in the published format, columns Puzzle and Solution,
    or d1's dataset/ folder, of whose 500 test puzzles those 256 are drawn that d1 evaluates on. Generated puzzles have
    8 empty cells and exactly one solution.
    """
    if data is not None:
        puzzles = read_puzzles(find_file(data, NAMES.get(split, ())))
        if split == "test" and Path(data).is_dir():  # d1's draw, choice(500, 256, replace=False) after seed(42)
            puzzles = [puzzles[i] for i in numpy.random.RandomState(42).permutation(len(puzzles))[:256]]
        return puzzles[:count]
    count = default_count(split) if count is None else count
    rng = random.Random(f"sudoku-{'test' if split == 'test' else 'train'}-{seed}")
    examples, seen = [], set()
    while len(examples) < count:
        solution = rng.choice(grids())
        empty = set(rng.sample(range(16), EMPTY_CELLS))
        puzzle = "".join("0" if i in empty else d for i, d in enumerate(solution))
        if is_held_out(puzzle) != (split == "test") or (split == "test" and puzzle in seen) or len(solve(puzzle)) > 1:
            continue
        seen.add(puzzle)
        examples.append({"prompt": write_prompt(puzzle), "puzzle": puzzle, "solution": solution})
        if behaviour := draw_behaviour(split, rng):
            examples[-1]["completion"] = demonstrate(behaviour, puzzle, solution, rng)
    return examples


def is_held_out(puzzle):
    """One puzzle in eight, by a hash of its digits."""
    return hashlib.sha256(puzzle.encode()).digest()[0] < 32


def is_solution(grid):
    """Whether 16 digits satisfy the rules."""
    return all(len({grid[i] for i in cells}) == 4 for cells in (*COLUMNS, *BOXES, *ROWS)) and set(grid) <= set("1234")


def solves(grid, puzzle):
    """Whether 16 digits satisfy the rules and keep the clues."""
    return is_solution(grid) and all(clue in ("0", digit) for clue, digit in zip(puzzle, grid))


@functools.lru_cache(maxsize=1)
def grids():
    """All 288 solved grids, in order, as strings of 16 digits."""
    rows = ["".join(p) for p in itertools.permutations("1234")]
    return [g for g in map("".join, itertools.product(rows, repeat=4)) if is_solution(g)]


@functools.lru_cache(maxsize=1)
def grids_with():
    """{(cell, digit): the set of grid numbers that have the digit there}."""
    return {(i, d): {n for n, g in enumerate(grids()) if g[i] == d} for i in range(16) for d in "1234"}


def solve(puzzle):
    """All solutions of 16 digits with 0 for empty."""
    fits = [grids_with()[i, d] for i, d in enumerate(puzzle) if d != "0"]
    return [grids()[n] for n in sorted(set.intersection(*fits) if fits else range(len(grids())))]


def read_puzzles(path):
    examples = []
    for row in read_rows(path, ("Puzzle", "Solution")):
        puzzle, solution = str(row["Puzzle"]), str(row["Solution"])
        where = f"--data {path}, row {row['row']}"
        if not re.fullmatch("[0-4]{16}", puzzle) or not re.fullmatch("[1-4]{16}", solution):
            raise ValueError(f"{where}: a puzzle is 16 digits 0-4 and a solution 16 digits 1-4, "
                             f"found {puzzle!r}, {solution!r}")
        if not solves(solution, puzzle):
            raise ValueError(f"{where}: {solution} does not solve {puzzle}")
        examples.append({"prompt": write_prompt(puzzle), "puzzle": puzzle, "solution": solution})
    return examples


def published_prompt(example):
    return write_published("Solve this four by four Sudoku: each row, column and two by two box holds 1 to 4 once, "
                           "zero is an empty cell. The answer is the sixteen digits of the solution, row by row.",
                           f"Puzzle: {example['puzzle']}")


def published_example(question, truth):
    """An example from an item of the authors' files."""
    puzzle = re.search(r"(?<![0-9])[0-9]{16}(?![0-9])", question)
    if puzzle is None or not re.fullmatch("[0-9]{16}", truth):
        raise ValueError("no puzzle or no solution of 16 digits")
    return {"puzzle": puzzle[0], "solution": truth}


def clashes(puzzle, solution):
    """Rows that could stand in the solution's stead and clash with a column above: (row number, row, that column).

    Each holds 1 to 4 and keeps its clues; rows above are the solution's; the column ends in the digit that it repeats.
    """
    found = []
    for r, row in itertools.product((1, 2, 3), map("".join, itertools.permutations("1234"))):
        columns = [solution[c:4 * r:4] + row[c] for c in range(4)]
        bad = [column for column in columns if column[-1] in column[:-1]]
        if bad and all(clue in ("0", digit) for clue, digit in zip(puzzle[4 * r:], row)):
            found.append((r, row, bad[0]))
    return found


def demonstrate(behaviour, puzzle, solution, rng):
    """A completion: worked or corrected, and right; hasty, closed and guessed; or without tags."""
    if behaviour in ("worked", "corrected"):
        rows = [solution[r[0]:r[-1] + 1] for r in ROWS]
        if behaviour == "corrected" and (found := clashes(puzzle, solution)):
            r, row, column = rng.choice(found)
            rows[r] = f"{row}, column is {column}, {rows[r]}"
        return write_completion(f"Row by row {' '.join(rows)}", solution)
    guess = "".join(rng.choice("1234") if d == "0" else d for d in puzzle)
    if behaviour == "hasty":
        return write_completion("A quick guess", guess)
    return f"Perhaps {guess} comes near, or something like it"


def fill(answer):
    """The 16 digits of an answer, text or None, blanks removed, or None."""
    digits = re.sub(r"\s", "", answer, flags=re.ASCII) if answer and len(answer) <= 200 else ""
    return digits if re.fullmatch("[1-4]{16}", digits) else None


def cell_share(grid, example):
    """Share of the empty cells that `grid` fills as the stored solution does."""
    empty = [i for i, d in enumerate(example["puzzle"]) if d == "0"]
    return sum(grid[i] == example["solution"][i] for i in empty) / max(len(empty), 1) if grid else 0.0


def reward(text, example):
    """Share of the empty cells filled right; 0 where no answer of 16 digits was closed (section 4 of the paper)."""
    return {"cells": cell_share(fill(closed_answer(text)), example)}


def score(text, example):
    """accuracy: solved by the rules, clues kept; cells: the published metric; closed, format: see `score_answer`."""
    grid = fill(unboxed(closed_answer(text)))
    return {"accuracy": float(grid is not None and solves(grid, example["puzzle"])), "cells": cell_share(grid, example),
            "closed": float(closed_answer(text) is not None), "format": float(is_formatted(text))}


# ---------------------------------------------------------------- the authors' evaluation

FENCED, BEFORE_END = re.compile(r"```([\d\s]++)```"), re.compile(r"(\d{16})\s*+</answer>")
ALONE = re.compile(r"\b(\d{16})\b")


def published_grid(text):
    """The digits, or whatever stands there, that the authors' evaluation takes for the solution; blanks removed.

    The first that is not blank of: digits fenced by ``` after <answer>; what follows <answer> up to an end tag or end
    token; what follows </answer>; 16 digits before </answer>; 16 digits anywhere.
    """
    text = text[:MAX_TEXT]
    answer, after = text.partition("<answer>")[2], text.partition("</answer>")[2]
    fenced = FENCED.search(answer)
    parts = [fenced[1] if fenced else "", before(answer, (*END, "</answer>"), default=""),
             before(after.lstrip(), END, default=after),
             *(match[1] for pattern in (BEFORE_END, ALONE) if (match := pattern.search(text)))]
    return re.sub(r"\s", "", next((part for part in parts if part.strip()), ""))


def before(text, ends, default):
    """`text` up to the first of `ends`, or `default` where it holds none."""
    found = [i for i in map(text.find, ends) if i >= 0]
    return text[:min(found)] if found else default


def published(text, example):
    """The authors' verdict on a completion, and ours. {name: value}; "published" cells right of "of" empty ones.

    Theirs: `published_grid`, filled up with zeros or cut to 16, against the stored solution in the empty cells. exact:
    that grid, as it stands, solves the puzzle by the rules and keeps the clues. valid: it is 16 digits from 1 to 4.
    """
    grid, puzzle = published_grid(text), example["puzzle"]
    filled = grid.ljust(16, "0")[:16]
    valid = re.fullmatch("[1-4]{16}", grid) is not None
    return {"published": sum(filled[i] == example["solution"][i] for i in range(16) if puzzle[i] == "0"),
            "of": puzzle.count("0"), "exact": float(valid and solves(grid, puzzle)), "valid": float(valid)}
