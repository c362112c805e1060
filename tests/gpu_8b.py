"""LLaDA-8B itself on one GPU, weights random: a rollout, an SFT step and a diffu-GRPO step, beside what --plan says.

    python tests/gpu_8b.py             an 80 GB GPU; 5 minutes on an H100, as planned
    python tests/gpu_8b.py --tiny      the same with the embedded model's config, on a CPU, seconds

Options, model and train_step are those of the training scripts; random are only the weights and the tokens. MFU is of
the peak in bfloat16; the head, scored once more in the backward pass, is counted (2% of an update).
"""
import argparse
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

import model as model_file  # noqa: E402
import train_grpo  # noqa: E402
import train_sft  # noqa: E402
from d1 import generator  # noqa: E402
from data import TASKS  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from model import HEAD_CHUNK, Config  # noqa: E402
from parallel import (GIB, RATE, Signals, fill_defaults, pick_dtype, planned_flops, planned_memory,  # noqa: E402
                      processes)
from sample import complete  # noqa: E402

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # FLOP/s in bfloat16, dense


def random_weights(model, folder, fill):
    """In the place of read_weights: normal(0, 0.02), drawn on the device."""
    device = next(model.parameters()).device
    draw = torch.Generator(device).manual_seed(0)
    for name, p in model.named_parameters():
        if ".lora_" not in name:
            full = torch.ones(p.shape) if p.dim() == 1 else torch.randn(
                p.shape, generator=draw, device=device, dtype=p.dtype) * 0.02
            fill(p, full.__getitem__)
    return model


class Job:
    """What a training script's main prepares. run(step) is its train_step, passes what --plan counts of it."""

    def __init__(self, script, procs, *words):
        self.args = args = script.parse_args(["--task", "countdown", *map(str, words)])
        self.script, self.config, self.procs = script, Config.from_folder(args.model), procs
        fill_defaults(args, script.DEFAULTS, self.config)
        dtype = pick_dtype(args.dtype, procs.device)
        args.dtype, self.passes = str(dtype).removeprefix("torch."), script.passes_of(self.config, args, procs.world)
        self.tokenizer = Tokenizer.from_folder(ROOT / "data" / "tiny")
        self.tokenizer.mask_id, self.tokenizer.eos_id = self.config.mask_token_id, self.config.eos_token_id
        build, reference = train_sft.build_model if script is train_sft else train_grpo.build_policy, None
        with mock.patch.object(model_file, "read_weights", random_weights), \
                mock.patch.object(train_sft, "read_weights", random_weights):
            self.model = build(args, args.model, procs, dtype)
            if script is train_grpo and args.beta:
                reference = train_grpo.reference_policy(self.model, args, args.model, procs, dtype)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=args.lr,
                                           fused=True)
        if script is train_sft:
            rows = [(self.ids(i, args.max_length), args.max_length // 8) for i in range(args.batch_size)]
            self.work = self.model, self.optimizer, rows, self.tokenizer, args, procs
            return
        examples = TASKS["countdown"].load("train", count=args.prompts_per_step)
        for i, example in enumerate(examples):
            example["ids"] = self.ids(i, train_grpo.PLANNED_PROMPT)
        self.work = (self.model, reference, self.optimizer, self.tokenizer, examples, args, procs, Signals(procs))

    def run(self, step):
        return self.script.train_step(step, *self.work)

    def ids(self, key, length):
        return torch.randint(min(self.config.mask_token_id, self.config.eos_token_id), (length,),
                             generator=generator(key)).tolist()

    def rollout(self, rows):
        """So many completions alone."""
        args = self.args
        sampling = {name: getattr(args, name) for name in (*train_grpo.SAMPLING, "temperature")}
        prompts = [self.ids(i, train_grpo.PLANNED_PROMPT) for i in range(rows)]
        return complete(self.model, self.tokenizer, prompts, keys=[(i,) for i in range(rows)], **sampling)

    def planned(self):
        return planned_memory(self.config, self.args, self.procs.world, HEAD_CHUNK, self.passes)

    def flops(self, *phases):
        return sum(planned_flops(self.config, self.args, HEAD_CHUNK, self.passes[name], name == "update")
                   for name in phases)

    def peak(self, run):
        """Bytes that were allocated at once while run() went on, and its seconds."""
        device = self.procs.device
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            began = time.monotonic()
            run()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated(), time.monotonic() - began
        held = [v for state in self.optimizer.state.values() for v in state.values()] + list(self.model.parameters())
        if self.script is train_grpo and self.args.beta and not self.args.lora_r:
            with self.work[1]() as frozen:
                held += frozen.parameters()
        held = [t.to_local() if isinstance(t, DTensor) else t for t in held]
        began = time.monotonic()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            run()
        seconds, now, most = time.monotonic() - began, 0, 0
        events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return most + sum(t.numel() * t.itemsize for t in held), seconds


def show(name, job, measured, cost, tokens, planned):
    """One line: measured beside planned."""
    peak, seconds = measured
    device = torch.cuda.get_device_name() if job.procs.device.type == "cuda" else "CPU"
    use = [f"{cost / seconds / most:.0%}" for gpu, most in PEAKS.items() if gpu in device] or ["-"]
    print(f"{name:<30} {seconds:8.1f} {cost / RATE:8.1f} {tokens / seconds:10.0f} {cost / seconds / 1e12:8.2f} "
          f"{use[0]:>5} {peak / GIB:9.3f} {planned / GIB:9.3f}", flush=True)


def main(argv=None):
    """Returns {job: (bytes measured, bytes planned)}."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tiny", action="store_true", help="the embedded model's config and short rows")
    p.add_argument("--device", help="cuda, cpu; default: a GPU where there is one")
    args = p.parse_args(argv)
    sft = ["--lora_r", 128]
    grpo = ["--lora_r", 128, "--rollout_batch", 6]
    if args.tiny:
        sft += ["--batch_size", 4, "--microbatch", 2, "--max_length", 256]
        grpo += ["--prompts_per_step", 2, "--num_iterations", 2, "--microbatch", 1, "--diffusion_steps", 4]
    folder, found = ROOT / ("data/tiny" if args.tiny else "tests/llada_8b"), {}
    with processes(args.device) as procs:
        began = time.monotonic()
        print(f"{'':<30} {'seconds':>8} {'planned':>8} {'tokens/s':>10} {'TFLOP/s':>8} {'MFU':>5} {'peak GiB':>9} "
              f"{'planned':>9}")
        job = Job(train_sft, procs, "--model", folder, "--device", procs.device, *sft)
        job.run(0)  # warms up, and makes the optimizer's state
        done, rows, length = job.peak(lambda: job.run(1)), job.args.batch_size, job.args.max_length
        name, planned = f"SFT step, {rows} rows of {length}", job.planned()["peak"]
        show(name, job, done, job.flops("update"), rows * length, planned)
        found[name], job = (done[0], planned), None
        gc.collect()
        job = Job(train_grpo, procs, "--model", folder, "--device", procs.device, *grpo)
        a, rows = job.args, job.args.prompts_per_step * job.args.group_size
        done, planned = job.peak(lambda: job.rollout(6)), job.planned()
        sampled = planned["rollout"] - planned["optimizer"]  # which has no state before the first update
        name = f"rollout, 6 x {a.gen_length}, {a.diffusion_steps} steps"
        show(name, job, done, job.flops("rollout") * 6 / rows, 6 * a.gen_length, sampled)
        found[name] = done[0], sampled
        done, name = job.peak(lambda: job.run(0)), f"GRPO step, {a.prompts_per_step} x {a.group_size} completions"
        show(name, job, done, job.flops(*job.passes), rows * a.gen_length, planned["peak"])
        found[name] = done[0], planned["peak"]
        print(f"{time.monotonic() - began:.0f} s in all; planned seconds are for {RATE / 1e12:.0f} TFLOP/s; tokens: "
              "trained in SFT, else generated")
    return found


if __name__ == "__main__":
    main()
