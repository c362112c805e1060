"""What the fast sampler (--cache, --threshold) costs and gains, on the embedded model and held-out problems.

    python tests/fast_table.py                     512 problems of countdown and sudoku, at temperature 0 and 0.9
    python tests/fast_table.py --json FILE         and write it

FLOPs: of all forward passes, matrix products and attention, counted by torch over one batch of problems. "gain": how
many times fewer than the exact sampler's. Tokens per second count whole canvases, and depend on the machine.
"""
import argparse
import json
import shlex
import sys
import time
from pathlib import Path

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import TASKS  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from model import LLaDA  # noqa: E402
from parallel import processes  # noqa: E402
from sample import evaluate, table  # noqa: E402


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(ROOT / "data/tiny"))
    p.add_argument("--task", nargs="+", default=["countdown", "sudoku"])
    p.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.9])
    p.add_argument("--block_length", type=int, nargs="+", default=[8])
    p.add_argument("--threshold", type=float, nargs="+", default=[0.9, 0.7, 0.5])
    p.add_argument("--split", choices=("train", "test"), default="test")
    p.add_argument("--count", type=int, default=512, help="problems")
    p.add_argument("--json", metavar="FILE")
    p.add_argument("--device")
    return p.parse_args(argv)


def main(args):
    rows, exact = [], {}
    with processes(args.device) as procs:
        model = LLaDA.from_pretrained(args.model, procs.device).eval()
        tokenizer = Tokenizer.from_folder(args.model, model.config)
        for task, temperature in ((task, t) for task in args.task for t in args.temperature):
            examples = TASKS[task].load(args.split, count=args.count)
            for block, threshold, cache in ((b, t, c) for b in args.block_length for t in (None, *args.threshold)
                                            for c in (None, "prefix", "dual")):
                options = dict(temperature=temperature, block_length=block, threshold=threshold, cache=cache,
                               gen_length=32, diffusion_steps=32, rollout_batch=128)
                start = time.monotonic()
                found, _ = evaluate(model, tokenizer, TASKS[task], examples, procs, 0, **options)
                seconds = time.monotonic() - start
                with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # others go uncounted
                    evaluate(model, tokenizer, TASKS[task], examples[:64], procs, 0, **options)
                flops = counter.get_total_flops() / len(examples[:64])
                first = exact.setdefault((task, temperature), flops)  # of the exact sampler
                rows.append({"task": task, "temperature": temperature, "block_length": block, "cache": cache or "-",
                             "threshold": threshold or "-", "accuracy": found["accuracy"], "rounds": found["rounds"],
                             "GFLOP": f"{flops / 1e9:.2f}", "gain": f"{first / flops:.2f}",
                             "tokens_per_second": 32 * len(examples) / seconds})
            procs.print(table([row for row in rows if (row["task"], row["temperature"]) == (task, temperature)]))
    if args.json:
        Path(args.json).write_text(json.dumps({"command": shlex.join(sys.argv), "rows": rows}, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main(parse_args())
