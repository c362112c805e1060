"""Cost against size of the exact sampler and the update phase: exponents, fitted on log-log by least squares.

    OMP_NUM_THREADS=1 python tests/scaling.py --json FILE

One size changes, the others stay; a small model with random weights; CPU seconds of this process (so that what else
runs hardly counts), or a GPU's wall clock. "arithmetic": the exponent of the matrix products as torch counts them, on
a CPU without attention. Time has less where small operations cost the same at any size, and more where attention
tells. "last": the exponent between the two largest sizes, where fixed costs count least.
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
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmark import count_flops, policy, random_model, sampler, seconds, update_phase  # noqa: E402
from d1 import generator  # noqa: E402
from sample import table  # noqa: E402

SHAPE = {"d_model": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 192,
         "max_sequence_length": 4096}
ROWS, TOKENS, GROUP = (1, 4, 16, 64), (64, 128, 256, 512, 1024), (2, 8, 32, 64)
# what: (sizes, what the algorithm lets one expect)
SAMPLER = {"rows": (ROWS, "1"), "prompt": (TOKENS, "up to 1, attention up to 2"),
           "length": (TOKENS, "about 2: length x steps")}
UPDATE = {"prompts": (ROWS, "1"), "prompt": (TOKENS, "up to 1, attention up to 2"),
          "length": (TOKENS, "1, attention up to 2"), "group": (GROUP, "0")}


def sampling(model, rows=2, prompt=64, length=64):
    ids = torch.randint(600, (rows, prompt), generator=generator("scaling")).to(next(model.parameters()).device)
    return sampler(model, ids, 0.9, gen_length=length, diffusion_steps=length // 2, block_length=32)[1]


def updating(model, prompts=2, prompt=64, length=64, group=6):
    return update_phase(policy(model, 0), prompt, length, prompts, mu=1, group=group)[1]


def exponent(sizes, costs):
    """The slope of log cost over log size."""
    return statistics.linear_regression(*(list(map(math.log, values)) for values in (sizes, costs))).slope


def cost(work, device, repeats):
    """The least of some runs, after one that does not count: noise only adds."""
    def once():
        start = time.process_time()
        wall = seconds(work, device)
        return wall if device.type == "cuda" else time.process_time() - start
    return min(once() for _ in range(repeats + 1))


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", metavar="FILE", help="write sizes, seconds and exponents there")
    p.add_argument("--repeats", type=int, default=3, help="runs of each that count, one if it takes over two seconds")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return p.parse_args(argv)


def main(args):
    """Returns {"sampler rows": {"sizes", "seconds", "exponent", "last", "arithmetic"}, ...}."""
    device, found, rows = torch.device(args.device), {}, []
    for phase, make, cases in (("sampler", sampling, SAMPLER), ("update", updating, UPDATE)):
        for name, (sizes, expected) in cases.items():
            times, flops = [], []
            for size in sizes:
                work = make(random_model(device, torch.float32, **SHAPE), **{name: size})
                first = cost(work, device, 0)
                times.append(first if first > 2 else cost(work, device, args.repeats))
                flops.append(count_flops(work))
            result = {"sizes": sizes, "seconds": times, "exponent": exponent(sizes, times),
                      "last": exponent(sizes[-2:], times[-2:]), "arithmetic": exponent(sizes, flops),
                      "last_arithmetic": exponent(sizes[-2:], flops[-2:])}
            found[f"{phase} {name}"] = result
            rows.append({"cost": f"{phase}, {name} {sizes[0]} to {sizes[-1]}",
                         "seconds": f"{times[0]:.3f} to {times[-1]:.3f}", "time": f"{result['exponent']:.2f}",
                         "last": f"{result['last']:.2f}", "arithmetic": f"{result['arithmetic']:.2f}",
                         "its last": f"{result['last_arithmetic']:.2f}", "expected": expected})
            print(rows[-1], file=sys.stderr, flush=True)
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main(parse_args())
