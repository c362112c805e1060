"""What a method does to the habits of the embedded model: variants/grpo.py, which logs their shares and rewards.

    python tools/behaviours.py --task sudoku --estimator random_mask
    python tools/behaviours.py --task sudoku --estimator random_mask --reward exact

A completion of the embedded model says in its first words what it will do (data/tiny/README.md): work the problem out,
guess, or talk without tags. metrics.jsonl gets, for each habit, its share of a step's rollouts, and their mean reward,
advantage and accuracy. --reward exact pays for a solved problem alone. --fill_behind_eos scores canvases that hold EOS
behind the first EOS, in place of what was sampled there.
"""
import argparse
import sys
import types
from collections import defaultdict
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_grpo  # noqa: E402
from data import TASKS  # noqa: E402
from variants import grpo  # noqa: E402

OPENINGS = {"<reasoning>\nA quick guess": "guess", "Perhaps": "untagged", "<reasoning>\n": "worked"}


def behaviour(text):
    """The habit that a completion follows, by its first words."""
    return next((name for opening, name in OPENINGS.items() if text.startswith(opening)), "other")


def count_behaviours(rows, group_size):
    """{"guess_fraction", "guess_reward", ...}: of each habit its share of the rows, and means over its rows."""
    found = defaultdict(list)
    for start in range(0, len(rows), group_size):
        group = rows[start:start + group_size]
        average = mean(row["reward"] for row in group)
        for row in group:
            values = {"reward": row["reward"], "advantage": row["reward"] - average, "accuracy": row["accuracy"]}
            found[behaviour(row["completion"])].append(values)
    counts = {f"{habit}_fraction": len(of_habit) / len(rows) for habit, of_habit in found.items()}
    means = {f"{habit}_{name}": mean(values[name] for values in of_habit)
             for habit, of_habit in found.items() for name in of_habit[0]}
    return counts | means


def filled(draw, eos_id):
    """draw, which first overwrites what a rollout says behind the first EOS."""
    def fill_and_draw(rollout, step, args, procs):
        rollout.completions = rollout.completions.masked_fill(~rollout.mask, eos_id)  # (N, G, L)
        return draw(rollout, step, args, procs)

    return fill_and_draw


def train_step(step, model, reference, optimizer, tokenizer, examples, args, procs, *, draw, **methods):
    """train_grpo.train_step, and what the habits did. For one process."""
    if args.fill_behind_eos:
        draw = filled(draw, tokenizer.eos_id)
    log, rows = train_grpo.train_step(step, model, reference, optimizer, tokenizer, examples, args, procs, draw=draw,
                                      **methods)
    return log | count_behaviours(rows, args.group_size), rows


def pay_for_solutions(task):
    """A task whose reward is 1 for a solved problem, else 0."""
    def reward(text, example):
        return {"exact": task.score(text, example)["accuracy"]}

    return types.SimpleNamespace(**{**vars(task), "reward": reward})


def parse_args(argv=None):
    """The options of variants/grpo.py, and what the rollouts are paid for and hold behind EOS."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--reward", choices=("own", "exact"), default="own")
    own.add_argument("--fill_behind_eos", action="store_true")
    chosen, others = own.parse_known_args(argv)
    args = grpo.parse_args(others)
    args.reward, args.fill_behind_eos = chosen.reward, chosen.fill_behind_eos
    return args


def main(args):
    if args.reward == "exact":
        TASKS[args.task] = pay_for_solutions(TASKS[args.task])
    return grpo.main(args, step=train_step)


if __name__ == "__main__":
    main(parse_args())
