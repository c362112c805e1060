"""What Fast-dLLM's cache and threshold, and EB-Sampler's entropy bound, cost and gain: embedded model,
held-out problems.

    python tools/fast_table.py                     512 problems of countdown and sudoku, at temperature 0 and 0.9
    python tools/fast_table.py --json FILE         and write it

FLOPs are those of all forward passes, matrix products and attention, counted by torch over one batch of problems.
"gain" is how many times fewer they are than those of the exact sampler. Tokens per second count whole completions, and
depend on the machine.
"""
import argparse
import contextlib
import functools
import io
import itertools
import json
import shlex
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import TASKS  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from model import TINY, LLaDA  # noqa: E402
from parallel import Processes  # noqa: E402
from sample import encode_prompts, evaluate  # noqa: E402
from tools import number  # noqa: E402
from tools.measure import count_flops, print_table  # noqa: E402
from variants import fast_dllm  # noqa: E402

LENGTH, COUNTED = 32, 64  # tokens of a completion; problems of which the FLOPs are counted


def measure(model, tokenizer, task, examples, procs, sampler, **sampling):
    """{"accuracy", "rounds", "GFLOP" of a problem, "tokens_per_second"} of a sampler."""
    evaluate_on = functools.partial(
        evaluate, model, tokenizer, TASKS[task], procs=procs, seed=0, rollout_batch=128, gen_length=LENGTH,
        diffusion_steps=LENGTH, generate=functools.partial(fast_dllm.generate, **sampler),
        **sampling)
    with contextlib.redirect_stdout(io.StringIO()):  # `evaluate` prints samples
        start = time.monotonic()
        means, _ = evaluate_on(examples=examples)
        seconds = time.monotonic() - start
        with sdpa_kernel(SDPBackend.MATH):  # torch does not count the other kernels of a CPU
            flops = count_flops(lambda: evaluate_on(examples=examples[:COUNTED]))
    return {"accuracy": means["accuracy"], "rounds": means["rounds"],
            "GFLOP": flops / len(examples[:COUNTED]) / 1e9, "tokens_per_second": LENGTH * len(examples) / seconds}


def measure_all(model, tokenizer, task, temperature, args, procs):
    """A row for every block length, threshold or entropy bound, and cache. The first row is the exact sampler.

    With --random_first the thresholds and bounds have a second row, for completions that begin at a random position.
    """
    split = "train" if args.train_split else "test"
    room = model.config.max_sequence_length - LENGTH
    examples = encode_prompts(TASKS[task].load(split, count=args.count), tokenizer, room, procs)
    rules = [{}, *({"threshold": threshold} for threshold in args.threshold),
             *({"entropy_bound": bound} for bound in args.entropy_bound)]
    rules += [{**rule, "random_first": True} for rule in rules[1:] if args.random_first]
    rows = []
    for block, rule, cache in itertools.product(args.block_length, rules, args.cache):
        sampler = {**rule, "cache": cache} if cache != "-" else rule
        row = {"task": task, "temperature": temperature, "block_length": block,
               **{name: sampler.get(name, "-") for name in ("cache", "threshold", "entropy_bound", "random_first")}}
        row |= measure(model, tokenizer, task, examples, procs, sampler,
                       temperature=temperature, block_length=block)
        row["gain"] = (rows or [row])[0]["GFLOP"] / row["GFLOP"]
        rows.append(row)
    return rows


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=["countdown", "sudoku"])
    parser.add_argument("--temperature", type=number(float), nargs="+", default=[0.0, 0.9], help="0 is greedy")
    parser.add_argument("--block_length", type=number(int, 1), nargs="+", default=[8])
    parser.add_argument("--threshold", type=number(float, 0.1), nargs="+", default=[0.9, 0.7, 0.5])
    parser.add_argument("--entropy_bound", type=number(float), nargs="+", default=[0.1, 0.5, 1.0],
                        help="0: a token a round")
    parser.add_argument("--cache", nargs="+", choices=("-", "prefix", "dual"), default=["-", "prefix", "dual"])
    parser.add_argument("--random_first", action="store_true", help="measure it with each threshold and bound, too")
    parser.add_argument("--train_split", action="store_true", help="training problems instead of held-out ones")
    parser.add_argument("--count", type=number(int, 1), default=512, help="problems")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(args):
    """Print a table for every task and temperature, and return all rows."""
    procs = Processes(0, 1, torch.device(args.device), torch.float32)
    model = LLaDA.from_pretrained(TINY, procs.device).eval()
    tokenizer = Tokenizer.from_folder(TINY, model.config)
    all_rows = []
    for task, temperature in itertools.product(args.task, args.temperature):
        rows = measure_all(model, tokenizer, task, temperature, args, procs)
        print_table([{**{name: str(value) for name, value in row.items()}, "accuracy": f"{row['accuracy']:.1%}",
                      **{name: f"{row[name]:.2f}" for name in ("rounds", "GFLOP", "gain")},
                      "tokens_per_second": f"{row['tokens_per_second']:.0f}"} for row in rows])
        all_rows += rows
    if args.json:
        results = {"command": shlex.join(["python", "tools/fast_table.py", *sys.argv[1:]]), "rows": all_rows}
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    return all_rows


if __name__ == "__main__":
    main(parse_args())
