"""Cost against size of the exact sampler and the update phase: exponents, fitted on log-log by least squares.

    OMP_NUM_THREADS=1 python tools/scaling.py --json FILE

One size changes, the others stay; a small model with random weights; CPU seconds of this process (so that what else
runs hardly counts), or a GPU's wall clock. "arithmetic" is the exponent of the matrix products as torch counts them,
on a CPU without attention. Time has less where small operations cost the same at any size, and more where attention
tells. "last" is the exponent between the two largest sizes, where fixed costs count least.
"""
import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from d1 import generator  # noqa: E402
from tools import number  # noqa: E402
from tools.benchmark import build_model, make_policy, sampler, update_phase  # noqa: E402
from tools.measure import count_flops, print_table, seconds  # noqa: E402

SHAPE = {"d_model": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 192,
         "max_sequence_length": 4096}
ROWS, TOKENS, GROUP = (1, 4, 16, 64), (64, 128, 256, 512, 1024), (2, 8, 32, 64)
# what: (sizes, what the algorithm lets one expect)
SAMPLER = {"rows": (ROWS, "1"), "prompt": (TOKENS, "up to 1, attention up to 2"),
           "length": (TOKENS, "about 2: length x steps")}
UPDATE = {"prompts": (ROWS, "1"), "prompt": (TOKENS, "up to 1, attention up to 2"),
          "length": (TOKENS, "1, attention up to 2"), "group": (GROUP, "0")}


def make_sampling(model, rows=2, prompt=64, length=64):
    device = next(model.parameters()).device
    ids = torch.randint(600, (rows, prompt), generator=generator("scaling")).to(device)
    return sampler(model, ids, None, 0.9, gen_length=length, diffusion_steps=length // 2, block_length=32)["ours"]


def make_update(model, prompts=2, prompt=64, length=64, group=6):
    return update_phase(make_policy(model), prompts, prompt, length, mu=1, group_size=group)["ours"]


def exponent(sizes, costs):
    """The slope of log cost over log size."""
    return statistics.linear_regression(list(map(math.log, sizes)), list(map(math.log, costs))).slope


def run_cost(work, device):
    start = time.process_time()
    wall = seconds(work, device)
    return wall if device.type == "cuda" else time.process_time() - start


def least_cost(work, device, repeats):
    """The least of some runs, since noise only adds, after a first run, which counts if it takes over two seconds."""
    first = run_cost(work, device)
    return first if first > 2 else min(run_cost(work, device) for _ in range(repeats))


def fit(make, name, sizes, device, repeats):
    """{"sizes", "seconds", "exponent", "last", "arithmetic", "last_arithmetic"} of a cost over one size."""
    works = [make(build_model(device, torch.float32, **SHAPE), **{name: size}) for size in sizes]
    times = [least_cost(work, device, repeats) for work in works]
    flops = [count_flops(work) for work in works]
    return {"sizes": sizes, "seconds": times,
            "exponent": exponent(sizes, times), "last": exponent(sizes[-2:], times[-2:]),
            "arithmetic": exponent(sizes, flops), "last_arithmetic": exponent(sizes[-2:], flops[-2:])}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write sizes, seconds and exponents there")
    parser.add_argument("--repeats", type=number(int, 1), default=3, help="runs of each size, one where it takes long")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(args):
    """Print the table and return {"sampler rows": see `fit`, ...}."""
    device, fits, rows = torch.device(args.device), {}, []
    for phase, make, cases in (("sampler", make_sampling, SAMPLER), ("update", make_update, UPDATE)):
        for name, (sizes, expected) in cases.items():
            fitted = fits[f"{phase} {name}"] = fit(make, name, sizes, device, args.repeats)
            rows.append({"cost": f"{phase}, {name} {sizes[0]} to {sizes[-1]}",
                         "seconds": "{:.3f} to {:.3f}".format(fitted["seconds"][0], fitted["seconds"][-1]),
                         "time": f"{fitted['exponent']:.2f}", "last": f"{fitted['last']:.2f}",
                         "arithmetic": f"{fitted['arithmetic']:.2f}", "its last": f"{fitted['last_arithmetic']:.2f}",
                         "expected": expected})
            print(rows[-1], file=sys.stderr, flush=True)
    print_table(rows)
    if args.json:
        Path(args.json).write_text(json.dumps(fits, indent=1) + "\n")
    return fits


if __name__ == "__main__":
    main(parse_args())
