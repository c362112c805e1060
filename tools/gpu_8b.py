"""LLaDA-8B itself on one GPU, weights random: seconds and memory of its work, beside what is planned.

    python tools/gpu_8b.py                    all parts; 7 minutes on an H100, as planned
    python tools/gpu_8b.py profile rollout    some of them
    python tools/gpu_8b.py --tiny             the embedded model's config and short rows, on a CPU, a minute

profile   which attention torch takes and the ten longest kernels, in four rounds of a rollout and in an SFT update
rollout   6 completions of 256 tokens in 128 rounds
compiled  the same with compiled blocks, and their longest kernels
sft       an SFT update of 8 rows of 4,096 tokens
gdpo      a diffu-GRPO step of 2 prompts x 6, mu 12: GDPO in NeMo-RL takes 95 s for its own on an H100
kill      one of two processes of a small run is killed: does the job end (NCCL where there are two GPUs)
step      a diffu-GRPO step of 16 prompts x 6, mu 8; half of the time

Options, model and train_step are those of the training scripts; random are only the weights and the tokens. A line
stands as soon as it is measured. MFU is the share of the GPU's peak in bfloat16.
"""
import argparse
import contextlib
import functools
import gc
import random
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from torch.autograd import DeviceType
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
from tools.measure import init_weights, peak_flops  # noqa: E402
from tools.plan import GIB, PROMPT_TOKENS, Plan, read_config  # noqa: E402
from tools.soak import end_life, logged_losses, start, wait_for  # noqa: E402

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # FLOP/s in bfloat16, dense
TFLOPS = 400e12  # of the planned seconds
COLUMNS = "{:<30} {:>8} {:>8} {:>9} {:>8} {:>5} {:>9} {:>9}"
OF_8B = ["--model", ROOT / "tests" / "llada_8b", "--preset", "8b", "--lora_r", 128]
OF_TINY = {
    train_sft: ["--model", TINY, *"--batch_size 4 --microbatch 2 --max_length 256".split()],
    train_grpo: ["--model", TINY, *("--prompts_per_step 2 --num_iterations 2 --microbatch 1 "
                                    "--gen_length 64 --diffusion_steps 4 --block_length 32").split()]}
KILLED = "train_grpo.py --task countdown --steps 10000 --eval_count 0 --prompts_per_step 2 --timeout 60"


def draw_weights(model, _):
    """In the place of load_weights: random ones, drawn on the model's device, where 8B take no time."""
    if next(model.parameters()).is_meta:  # load_weights compares shapes here
        return
    init_weights(model, torch.Generator(next(model.parameters()).device).manual_seed(0))


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
        lengths = [PROMPT_TOKENS - 7 * (i % 8) for i in range(len(examples))]  # unequal, so that they are padded
        return [{**example, "ids": self.draw_ids(i, lengths[i])} for i, example in enumerate(examples)]

    def roll_out(self, rows=6, only_last_block=False):
        """So many completions alone; or four rounds of their last block, in a canvas of the same length."""
        options, prompt_length = sampling_options(self.args), PROMPT_TOKENS
        if only_last_block:
            prompt_length += options["gen_length"] - options["block_length"]
            options |= {"gen_length": options["block_length"], "diffusion_steps": 4}
        prompts = [self.draw_ids(i, prompt_length - 7 * i) for i in range(rows)]
        complete(self.model, self.tokenizer, prompts, [(i,) for i in range(rows)], **options)


def new_job(is_tiny, procs, script, *words):
    """A Job of LLaDA-8B, or in small. words: further options of the script."""
    return Job(script, [*OF_8B, *(OF_TINY[script] if is_tiny else ()), *words], procs)


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
    """A line of the table. measured: (bytes, seconds); planned: bytes. Returns both bytes."""
    peak, seconds = measured
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    mfu = [f"{flops / seconds / most:.0%}" for gpu, most in PEAKS.items() if gpu in device] or ["-"]
    print(COLUMNS.format(name, f"{seconds:.1f}", f"{flops / TFLOPS:.1f}", f"{tokens / seconds:.0f}",
                         f"{flops / seconds / 1e12:.2f}", mfu[0], f"{peak / GIB:.3f}", f"{planned / GIB:.3f}"),
          flush=True)
    return peak, planned


def print_profile(name, work):
    """The attention that torch chose in work(), and the ten kernels (on a CPU: operations) that took longest."""
    on_gpu = torch.cuda.is_available()
    work()  # warms up
    began = time.monotonic()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as trace:
        work()
        if on_gpu:
            torch.cuda.synchronize()
    seconds, events = time.monotonic() - began, trace.key_averages()
    attention = {event.key.removeprefix("aten::") for event in events if "_scaled_dot_product_" in event.key}
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    times = [(event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count, event.key)
             for event in events if event.device_type == kind and not event.is_user_annotation]
    total = sum(time for time, _, _ in times)
    print(f"{name}: {seconds:.2f} s, of it kernels {total / 1e6:.2f} s; attention: {', '.join(sorted(attention))}")
    for microseconds, count, key in sorted(times, reverse=True)[:10]:
        print(f"  {microseconds / 1e3:9.1f} ms {microseconds / max(total, 1):4.0%} {count:6} x {key[:88]}", flush=True)


# ---------------------------------------------------------------- the parts

def show_profile(make_job):
    job = make_job(train_grpo, "--rollout_batch", 6)
    print_profile("4 rounds of a rollout of 6", functools.partial(job.roll_out, only_last_block=True))
    job = make_job(train_sft, "--batch_size", 1, "--microbatch", 1)
    print_profile("SFT update of 1 row", functools.partial(job.step, 0))


def measure_rollout(make_job, *words):
    job = make_job(train_grpo, "--rollout_batch", 6, *words)
    job.roll_out(only_last_block=True)  # warms up
    plan, args = job.plan, job.args
    planned = plan.memory()["rollout"] - plan.memory()["optimizer"]  # it has no state before the first update
    name = f"rollout, 6 x {args.gen_length}, {args.diffusion_steps} rounds"
    row = show(" ".join([name, *words]), measure(job, job.roll_out), planned,
               plan.flops("rollout") * 6 / plan.passes["rollout"].total, 6 * args.gen_length)
    if words:
        print_profile("4 rounds of it", functools.partial(job.roll_out, only_last_block=True))
    return row


def measure_compiled(make_job):
    return measure_rollout(make_job, "--compile")


def measure_sft(make_job):
    job = make_job(train_sft)
    job.step(0)  # warms up, and makes the optimizer's state
    plan, update = job.plan, job.plan.passes["update"]
    return show(f"SFT update, {update.total} x {update.length}", measure(job, lambda: job.step(1)),
                plan.memory()["peak"], plan.flops("update"), update.total * update.length)


def measure_step(make_job, *words):
    job, ratios = make_job(train_grpo, *words), []
    plan, args, completions = job.plan, job.args, job.plan.passes["rollout"].total

    def objective(logps, old_logps, *others):
        ratios.append((logps.detach() - old_logps).abs().max())
        return train_grpo.diffu_grpo(logps, old_logps, *others)
    flops = sum(plan.flops(phase) for phase in ("rollout", "logps", "update"))
    name = f"GRPO step, {args.prompts_per_step} x {args.group_size}, mu {args.num_iterations}"
    row = show(name, measure(job, lambda: job.step(0, objective=objective)), plan.memory()["peak"], flops,
               completions * args.gen_length)
    first = ratios[:len(ratios) // args.num_iterations]  # before any update: exactly 0, or kernels differ
    print(f"  largest log ratio of its first update: {float(max(first)):g}", flush=True)
    return row


def measure_gdpo(make_job):
    return measure_step(make_job, "--prompts_per_step", 2, "--num_iterations", 12, "--rollout_batch", 12)


def kill_one(make_job):
    device, seconds = "cuda" if torch.cuda.device_count() > 1 else "cpu", 30
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with tempfile.TemporaryDirectory() as folder:
        out, began = Path(folder, "run"), time.monotonic()
        command = [*launcher, *KILLED.split(), "--device", device, "--out", str(out)]
        job = start(command, Path(folder, "log"))
        wait_for("at random", out, job, seconds)
        is_forced = end_life(job, "SIGKILL to one", random.Random(0))
        left, steps = time.monotonic() - began - seconds, len(logged_losses(out))
    end = "HAD TO BE FORCED" if is_forced else "ended"
    print(f"one of two processes on {device} killed after {steps} steps: the job {end} in {left:.1f} s", flush=True)


PARTS = {"profile": show_profile, "rollout": measure_rollout, "compiled": measure_compiled, "sft": measure_sft,
         "gdpo": measure_gdpo, "kill": kill_one, "step": measure_step}


def main(argv=None):
    """Returns {part: (bytes measured, bytes planned)}, of those that measure bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--tiny", action="store_true", help="in small; without compiled, which takes minutes")
    parser.add_argument("--device", default="", help="cuda or cpu, or else a GPU where there is one")
    parser.set_defaults(dtype="")  # bfloat16 on a GPU
    args = parser.parse_args(argv)
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {' '.join(sorted(unknown))}: choose some of {', '.join(PARTS)}")
    parts = args.parts or [part for part in PARTS if not args.tiny or part != "compiled"]
    began, rows = time.monotonic(), {}
    with processes(args) as procs:
        print(f"torch {torch.__version__}, {procs.device}, {procs.dtype}")
        if procs.device.type == "cuda" and not args.tiny:
            rate = peak_flops(procs.device, procs.dtype) / 1e12
            print(f"{torch.cuda.get_device_name()}, {rate:.0f} TFLOP/s in a product of large matrices")
        print(COLUMNS.format("", "seconds", "planned", "tokens/s", "TFLOP/s", "MFU", "peak GiB", "planned"))
        for part in parts:
            rows[part] = PARTS[part](functools.partial(new_job, args.tiny, procs))
            gc.collect()  # a model holds itself in a cycle
    print(f"{time.monotonic() - began:.0f} s in all; planned seconds are for {TFLOPS / 1e12:.0f} TFLOP/s; tokens: "
          "trained in SFT, else generated")
    return {part: row for part, row in rows.items() if row}


if __name__ == "__main__":
    main()
