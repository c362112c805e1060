"""LLaDA-8B itself on one GPU, weights random: an SFT step, a rollout and a diffu-GRPO step, beside what is planned.

    python tools/gpu_8b.py             an 80 GB GPU; 8 minutes on an H100, as planned
    python tools/gpu_8b.py --tiny      the same with the embedded model's config, on a CPU, seconds

Options, model and train_step are those of the training scripts; random are only the weights and the tokens. MFU is the
share of the GPU's peak in bfloat16.
"""
import argparse
import contextlib
import functools
import gc
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_grpo  # noqa: E402
import train_sft  # noqa: E402
from d1 import generator  # noqa: E402
from data import TASKS  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from lora import adapters_off  # noqa: E402
from model import TINY  # noqa: E402
from parallel import processes  # noqa: E402
from run import Run  # noqa: E402
from sample import complete, sampling_options  # noqa: E402
from tools.measure import init_weights  # noqa: E402
from tools.plan import GIB, PROMPT_TOKENS, Plan, read_config  # noqa: E402

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # FLOP/s in bfloat16, dense
TFLOPS = 400e12  # of the planned seconds
TINY_SFT = "--batch_size 4 --microbatch 2 --max_length 256"
TINY_GRPO = ("--prompts_per_step 2 --num_iterations 2 --microbatch 1 "
             "--gen_length 64 --diffusion_steps 4 --block_length 32")


def draw_weights(model, _):
    """In the place of load_weights: random ones."""
    init_weights(model, generator("weights"))


class Job(Run):
    """A training without a folder, its weights random. step(number) is the train_step of the script."""

    def __init__(self, script, words, procs):
        """script: train_sft or train_grpo, the module; words: its options."""
        self.script, self.procs = script, procs
        self.args = args = script.parse_args(["--task", "countdown", *map(str, words)])
        args.dtype = str(procs.dtype).removeprefix("torch.")
        self.checkpoint, self.config = None, read_config(args.model)
        self.plan = Plan(script.__name__, self.config, args, procs.world)
        self.tokenizer = Tokenizer.from_folder(TINY)  # any will do: its control tokens get the model's ids
        self.tokenizer.mask_id, self.tokenizer.eos_id = self.config.mask_token_id, self.config.eos_token_id
        with mock.patch("run.load_weights", draw_weights):
            self.model = self.load_model()
            self.frozen = self.load_model(is_trained=False) if self.plan.has_copy else None
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=args.lr, fused=True)
        if script is train_sft:
            self.inputs = self.model, self.optimizer, self.draw_rows(), self.tokenizer, args, procs
            return
        reference = functools.partial(adapters_off, self.model)
        if self.frozen:
            reference = functools.partial(contextlib.nullcontext, self.frozen)
        self.inputs = self.model, reference, self.optimizer, self.tokenizer, self.draw_prompts(), args, procs

    def step(self, number, **methods):
        return self.script.train_step(number, *self.inputs, **methods)

    def draw_ids(self, key, length):
        """Random tokens below the control tokens."""
        limit = min(self.config.mask_token_id, self.config.eos_token_id)
        return torch.randint(limit, (length,), generator=generator(key)).tolist()

    def draw_rows(self):
        """Rows of SFT, an eighth of each a prompt."""
        length = self.plan.passes["update"].length
        return [(self.draw_ids(i, length), length // 8) for i in range(self.args.batch_size)]

    def draw_prompts(self):
        """Problems of Countdown, each with a random prompt."""
        examples = TASKS["countdown"].load("train", count=self.args.prompts_per_step)
        return [{**example, "ids": self.draw_ids(i, PROMPT_TOKENS)} for i, example in enumerate(examples)]

    def roll_out(self, rows):
        """So many completions alone."""
        prompts, keys = [self.draw_ids(i, PROMPT_TOKENS) for i in range(rows)], [(i,) for i in range(rows)]
        complete(self.model, self.tokenizer, prompts, keys, **sampling_options(self.args))


# ---------------------------------------------------------------- measuring

def measure(job, work):
    """Call work(). Returns the bytes that were allocated at once meanwhile, and the seconds it took."""
    if next(job.model.parameters()).is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        began = time.monotonic()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(), time.monotonic() - began
    held, began = held_bytes(job), time.monotonic()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    seconds = time.monotonic() - began
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    added = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        added += event.nbytes()
        most = max(most, added)
    return held + most, seconds


def held_bytes(job):
    """Bytes of the weights, of the optimizer's state and of the reference."""
    tensors = list(job.model.parameters())
    tensors += [value for state in job.optimizer.state.values() for value in state.values()]
    if job.frozen:
        tensors += job.frozen.parameters()
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.itemsize for tensor in local)


def show(name, measured, planned, flops, tokens):
    """A line of the table. measured: (bytes, seconds); planned: bytes."""
    peak, seconds = measured
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    mfu = [f"{flops / seconds / most:.0%}" for gpu, most in PEAKS.items() if gpu in device] or ["-"]
    print(f"{name:<30} {seconds:8.1f} {flops / TFLOPS:8.1f} {tokens / seconds:9.0f} {flops / seconds / 1e12:8.2f} "
          f"{mfu[0]:>5} {peak / GIB:9.3f} {planned / GIB:9.3f}", flush=True)
    return peak, planned


def measure_sft(words, procs):
    """(bytes measured, bytes planned) of an SFT step."""
    job = Job(train_sft, words, procs)
    job.step(0)  # warms up, and makes the optimizer's state
    plan, update = job.plan, job.plan.passes["update"]
    measured = measure(job, lambda: job.step(1))
    return show(f"SFT step, {update.total} rows of {update.length}", measured, plan.memory()["peak"],
                plan.flops("update"), update.total * update.length)


def measure_grpo(words, procs):
    """[(bytes measured, bytes planned)] of a rollout of 6 completions, and of a diffu-GRPO step."""
    job = Job(train_grpo, words, procs)
    plan, args = job.plan, job.plan.args
    memory, completions = plan.memory(), plan.passes["rollout"].total
    sampled = memory["rollout"] - memory["optimizer"]  # it has no state before the first update
    measured = measure(job, lambda: job.roll_out(6))
    rollout = show(f"rollout, 6 x {args.gen_length}, {args.diffusion_steps} rounds", measured, sampled,
                   plan.flops("rollout") * 6 / completions, 6 * args.gen_length)
    flops = plan.flops("rollout") + plan.flops("logps") + plan.flops("update")
    ratios = []

    def objective(logps, old_logps, *others):
        ratios.append((logps.detach() - old_logps).abs().max())
        return train_grpo.diffu_grpo(logps, old_logps, *others)
    measured = measure(job, lambda: job.step(0, objective=objective))
    step = show(f"GRPO step, {args.prompts_per_step} x {args.group_size} completions", measured, memory["peak"],
                flops, completions * args.gen_length)
    first = ratios[:len(ratios) // args.num_iterations]  # before any update: exactly 0, or kernels differ
    print(f"largest log ratio of the first update: {float(max(first)):g}")
    return [rollout, step]


def main(argv=None):
    """Returns [(bytes measured, bytes planned)] of an SFT step, a rollout, a GRPO step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the embedded model's config and short rows")
    parser.add_argument("--device", default="", help="cuda or cpu, or else a GPU where there is one")
    parser.set_defaults(dtype="")  # bfloat16 on a GPU
    args = parser.parse_args(argv)
    sft = ["--model", ROOT / "tests" / "llada_8b", "--preset", "8b", "--lora_r", 128]
    grpo = [*sft, "--rollout_batch", 6]
    if args.tiny:
        sft += ["--model", TINY, *TINY_SFT.split()]
        grpo += ["--model", TINY, *TINY_GRPO.split()]
    began = time.monotonic()
    with processes(args) as procs:
        print(f"{'':<30} {'seconds':>8} {'planned':>8} {'tokens/s':>9} {'TFLOP/s':>8} {'MFU':>5} {'peak GiB':>9} "
              f"{'planned':>9}")
        sft_step = measure_sft(sft, procs)
        gc.collect()  # of the first model, which holds itself in a cycle
        rows = [sft_step, *measure_grpo(grpo, procs)]
    print(f"{time.monotonic() - began:.0f} s in all; planned seconds are for {TFLOPS / 1e12:.0f} TFLOP/s; tokens: "
          "trained in SFT, else generated")
    return rows


if __name__ == "__main__":
    main()
