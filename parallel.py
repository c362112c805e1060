"""What a run needs besides the algorithm: processes, the run's folder, checkpoints, a log readable without a terminal.

One process or many run the same script: under torchrun every process takes its share of the prompts, gradients are
summed (each loss is already a share of the whole batch) and numbers are gathered. Without torchrun all this is a no-op.
"""
import contextlib
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm


@dataclass(frozen=True)
class Processes:
    """This process among all of the job."""
    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0

    def share(self, count, option):
        """This process's range of `count` items. Raises ValueError where they do not divide by the processes."""
        if count % self.world:
            lower = count // self.world * self.world
            raise ValueError(f"{option} {count} does not divide by {self.world} processes: "
                             f"use {f'{lower} or ' if lower else ''}{lower + self.world}")
        size = count // self.world
        return range(self.rank * size, (self.rank + 1) * size)

    def sum(self, values):
        """{name: number} summed over all processes."""
        if self.world == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(values, total.tolist()))

    def gather(self, items):
        """The lists (of JSON values) of all processes as one, in the order of the processes."""
        if self.world == 1:
            return items
        mine = torch.tensor(list(json.dumps(items).encode()), dtype=torch.uint8, device=self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(mine)], device=self.device))
        longest = int(max(sizes))
        parts = [mine.new_empty(longest) for _ in sizes]
        dist.all_gather(parts, F.pad(mine, (0, longest - len(mine))))
        return [item for part, size in zip(parts, sizes) for item in json.loads(bytes(part[:int(size)].tolist()))]

    def sum_gradients(self, parameters):
        """Add up .grad over all processes, as one flat tensor. A parameter without gradient counts as zero."""
        if self.world == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for p, part in zip(parameters, flat.split([g.numel() for g in grads])):
            p.grad = part.view_as(p)

    def print(self, *words):
        if self.is_main:
            tqdm.write(" ".join(map(str, words)))
            sys.stdout.flush()


@contextlib.contextmanager
def processes(device=None):
    """Join the job that torchrun started, or be alone. device: cuda, mps, cpu, or None for the best one present."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"error: --device {device}: no CUDA GPU here, use --device cpu")
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Processes(int(os.environ.get("RANK", 0)), world, torch.device(device))
    finally:
        if world > 1:
            dist.destroy_process_group()


@contextlib.contextmanager
def one_line_errors():
    """Bad input ends the program with one line and exit code 1, no traceback. Wrap preparation, not training."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


def pick_dtype(name, device):
    """The dtype of the weights: as named, else bfloat16 on a GPU and float32 elsewhere."""
    return getattr(torch, name or ("bfloat16" if torch.device(device).type == "cuda" else "float32"))


def fill_defaults(args, table, config):
    """Set the options that were not given, from `table`: {option: (paper, tiny)}. Returns a line that says so.

    The second column is for models like the embedded one, where the values of an 8B model make no sense.
    """
    tiny = config.d_model < 1024
    for name, values in table.items():
        if getattr(args, name) is None:
            setattr(args, name, values[tiny])
    chosen = " ".join(f"{name}={getattr(args, name)}" for name in table)
    return f"{'TINY' if tiny else 'PAPER'} column unless given: {chosen}"


# ---------------------------------------------------------------- a run's folder

def free_folder(path):
    """`path`, or `path`-2, -3, ... where that holds something already."""
    number, free = 1, Path(path)
    while free.exists():
        number += 1
        free = Path(f"{path}-{number}")
    return free


class Run:
    """A run's folder: config.json, metrics.jsonl, samples.jsonl, step_000120/, summary.json. One process writes."""

    def __init__(self, out, options, procs):
        """Raises ValueError where `out` holds a run already or cannot be written."""
        self.out, self.procs = Path(out), procs
        if (self.out / "config.json").exists():
            raise ValueError(f"--out {out} holds a run already: name another folder or remove this one")
        if procs.world > 1:
            dist.barrier()  # everyone has looked before the main process writes
        if not procs.is_main:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        versions = {"python": sys.version.split()[0], "torch": torch.__version__}
        text = json.dumps({"options": options, "versions": versions, "processes": procs.world}, indent=2, default=str)
        (self.out / "config.json").write_text(text + "\n")

    def log(self, file, rows):
        """Append dicts to `file` as JSON lines."""
        if self.procs.is_main:
            with open(self.out / file, "a", encoding="utf-8") as lines:
                lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def save(self, step, *writers):
        """Make step_<step>/ and call each writer with it; renamed into place when complete, so never half there."""
        if not self.procs.is_main:
            return
        folder = self.out / f"step_{step:06d}"
        half = folder.with_suffix(".tmp")
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        for write in writers:
            write(half)
        half.rename(folder)

    def finish(self, summary):
        if self.procs.is_main:
            (self.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def progress(items, procs, describe, total=None):
    """A progress bar on a terminal; elsewhere a plain line about every twentieth of the way. Yields (item, show).

    Call show(**numbers) with what to display beside the rate.
    """
    total = total or len(items)
    bar = tqdm(total=total, desc=describe, dynamic_ncols=True, disable=None if procs.is_main else True)
    start, every = time.monotonic(), max(1, total // 20)
    for n, item in enumerate(items, 1):
        shown = {}
        yield item, shown.update
        bar.set_postfix(shown)
        bar.update()
        if bar.disable and procs.is_main and (n % every == 0 or n == total):
            numbers = " ".join(f"{k}={v}" for k, v in shown.items())
            print(f"{describe} {n}/{total} {time.monotonic() - start:.0f}s {numbers}", flush=True)
    bar.close()
