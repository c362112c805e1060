"""4x4 Sudoku: fill the empty cells so that every row, column and 2x2 box holds 1 to 4."""
import functools
import hashlib
import itertools
import random
import re

from data.format import FORMAT, closed_answer, default_count, is_formatted, read_rows, write_completion

EMPTY_CELLS = 8  # as in the published test file
QUESTION = ("Solve this four by four Sudoku, given row by row with zero for an empty cell. Every row, column and two "
            "by two box must hold each digit from one to four once. Put only the sixteen digits of the solution inside "
            "the answer tags.")
BEHAVIOURS = {"worked": 0.20, "hasty": 0.45, "untagged": 0.35}  # see data/countdown.py
ROWS = [range(4 * r, 4 * r + 4) for r in range(4)]
COLUMNS = [range(c, 16, 4) for c in range(4)]
BOXES = [[8 * r + 2 * c + k for k in (0, 1, 4, 5)] for r in (0, 1) for c in (0, 1)]


def write_prompt(puzzle):
    return f"{FORMAT}\n\n{QUESTION}\n\nPuzzle: {puzzle}"


def load(split, data=None, count=None, seed=0):
    """Puzzles as dicts with "prompt", "puzzle", "solution" (16 digits each); for demonstrations also "completion".

    Splits, `count` and errors as in data/countdown.py. data: CSV in the published format, columns Puzzle and Solution.
    Generated puzzles have 8 empty cells and exactly one solution.
    """
    if data is not None:
        return read_puzzles(data)[:count]
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
        if split in ("worked", "mixed"):
            behaviour = "worked" if split == "worked" else rng.choices(list(BEHAVIOURS), list(BEHAVIOURS.values()))[0]
            examples[-1]["completion"] = demonstrate(behaviour, puzzle, solution, rng)
    return examples


def is_held_out(puzzle):
    """One puzzle in eight, by a hash of its digits."""
    return hashlib.sha256(puzzle.encode()).digest()[0] < 32


def is_solution(grid):
    """Whether 16 digits satisfy the rules."""
    return all(len({grid[i] for i in cells}) == 4 for cells in (*COLUMNS, *BOXES, *ROWS)) and set(grid) <= set("1234")


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
        if not is_solution(solution) or any(p not in ("0", s) for p, s in zip(puzzle, solution)):
            raise ValueError(f"{where}: {solution} does not solve {puzzle}")
        examples.append({"prompt": write_prompt(puzzle), "puzzle": puzzle, "solution": solution})
    return examples


def demonstrate(behaviour, puzzle, solution, rng):
    """A completion, one of BEHAVIOURS: worked and right; hasty, closed and guessed; or an aside without tags."""
    if behaviour == "worked":
        rows = " ".join(solution[r[0]:r[-1] + 1] for r in ROWS)
        return write_completion(f"Row by row {rows}", solution)
    guess = "".join(rng.choice("1234") if d == "0" else d for d in puzzle)
    if behaviour == "hasty":
        return write_completion("A quick guess", guess)
    return f"Perhaps {guess} comes near, or something like it"


def fill(text):
    """The 16 digits of the closed answer, blanks removed, or None."""
    answer = closed_answer(text)
    digits = re.sub(r"\s", "", answer, flags=re.ASCII) if answer and len(answer) <= 200 else ""
    return digits if re.fullmatch("[1-4]{16}", digits) else None


def cell_share(grid, example):
    """Share of the empty cells that `grid` fills as the stored solution does."""
    empty = [i for i, d in enumerate(example["puzzle"]) if d == "0"]
    return sum(grid[i] == example["solution"][i] for i in empty) / max(len(empty), 1) if grid else 0.0


def reward(text, example):
    """Share of the empty cells filled right; 0 where no answer of 16 digits was closed (section 4 of the paper)."""
    return {"cells": cell_share(fill(text), example)}


def score(text, example):
    """accuracy: solved by the rules, clues kept; cells: the published metric; closed, format: as in Countdown."""
    grid = fill(text)
    solved = grid is not None and is_solution(grid) and all(p in ("0", g) for p, g in zip(example["puzzle"], grid))
    return {"accuracy": float(solved), "cells": cell_share(grid, example),
            "closed": float(closed_answer(text) is not None), "format": float(is_formatted(text))}
