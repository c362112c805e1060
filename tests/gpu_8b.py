"""LLaDA-8B itself on one GPU, weights random: a rollout, an SFT step and a diffu-GRPO step, beside what --plan says.

    python tests/gpu_8b.py             an 80 GB GPU; 5 minutes on an H100, as planned
    python tests/gpu_8b.py --tiny      the same with the embedded model's config, on a CPU, seconds

Options, model and train_step are those of the training scripts; random are only the weights and the tokens.
"""
import argparse
import sys
import time
from pathlib import Path
from unittest import mock

import torch
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
from parallel import GIB, RATE, Signals, fill_defaults, pick_dtype, planned_flops, planned_memory, processes  # noqa: E402
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
        self.config, self.procs = Config.from_folder(args.model), procs
        fill_defaults(args, script.DEFAULTS, self.config)
        dtype = pick_dtype(args.dtype, procs.device)
        args.dtype, self.passes = str(dtype).removeprefix("torch."), script.passes_of(args, 1)
        self.tokenizer = Tokenizer.from_folder(ROOT / "data" / "tiny")
        self.tokenizer.mask_id, self.tokenizer.eos_id = self.config.mask_token_id, self.config.eos_token_id
        with mock.patch.object(model_file, "read_weights", random_weights), \
                mock.patch.object(train_sft, "read_weights", random_weights):
            self.model = (train_sft.build_model if script is train_sft else train_grpo.build_policy)(
                args, args.model, procs, dtype)
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer, self.frozen = torch.optim.AdamW(trained, lr=args.lr), []
            if script is train_sft:
                rows = [(self.ids(i, args.max_length), args.max_length // 8) for i in range(args.batch_size)]
                self.run = lambda step: train_sft.train_step(step, self.model, self.optimizer, rows, self.tokenizer,
                                                             args, procs)
                return
            reference = train_grpo.reference_policy(self.model, args, args.model, procs, dtype) if args.beta else None
        if reference and not args.lora_r:
            with reference() as policy:
                self.frozen = list(policy.parameters())
        examples = TASKS["countdown"].load("train", count=args.prompts_per_step)
        for i, example in enumerate(examples):
            example["ids"] = self.ids(i, train_grpo.PLANNED_PROMPT)
        self.run = lambda step: train_grpo.train_step(step, self.model, reference, self.optimizer, self.tokenizer,
                                                      examples, args, procs, Signals(procs))

    def ids(self, key, length):
        return torch.randint(min(self.config.mask_token_id, self.config.eos_token_id), (length,),
                             generator=generator(key)).tolist()

    def rollout(self, rows):
        """One batch of completions alone."""
        args = self.args
        sampling = {name: getattr(args, name) for name in (*train_grpo.SAMPLING, "temperature")} | {"rollout_batch": rows}
        prompts = [self.ids(i, train_grpo.PLANNED_PROMPT) for i in range(rows)]
        return complete(self.model, self.tokenizer, prompts, keys=[(i,) for i in range(rows)], **sampling)

    def planned(self):
        return planned_memory(self.config, self.args, 1, HEAD_CHUNK, self.passes)

    def flops(self, *phases):
        return sum(planned_flops(self.config, self.args, self.passes[name], name == "update") for name in phases)

    def peak(self, run):
        """Bytes that were allocated at once while run() went on, and its seconds."""
        device = self.procs.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            began = time.monotonic()
            run()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated(), time.monotonic() - began
        states = [v for state in self.optimizer.state.values() for v in state.values()]
        held = [getattr(t, "_local_tensor", t) for t in (*self.model.parameters(), *states, *self.frozen)]
        began = time.monotonic()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            run()
        seconds, now, most = time.monotonic() - began, 0, 0
        events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return most + sum(t.numel() * t.itemsize for t in held), seconds


def show(name, job, measured, phases, tokens):
    """One line: measured beside planned."""
    (peak, seconds), planned, cost = measured, job.planned(), job.flops(*phases)
    device = torch.cuda.get_device_name() if job.procs.device.type == "cuda" else "CPU"
    use = next((f"{cost / seconds / peak_rate:6.1%}" for gpu, peak_rate in PEAKS.items() if gpu in device), "     -")
    print(f"{name:<22} {seconds:8.1f} {cost / RATE:8.1f} {tokens / seconds:10.0f} {cost / seconds / 1e12:9.2f} {use} "
          f"{peak / GIB:9.3f} {planned['update' if phases == ('update',) else 'rollout' if len(phases) == 1 else 'peak'] / GIB:9.3f}",
          flush=True)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tiny", action="store_true", help="the embedded model's config, short rows")
    p.add_argument("--device")
    args = p.parse_args(argv)
    ...


if __name__ == "__main__":
    main()
