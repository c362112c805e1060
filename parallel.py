"""What a run needs besides the algorithm: processes, the run's folder, checkpoints, a log readable without a terminal.

One process or many run the same script: under torchrun every process takes its share of the prompts, gradients are
summed (each loss is already a share of the whole batch) and numbers are gathered. Without torchrun all this is a no-op.
"""
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

LOST = re.compile("timed? ?out|timeout|connection (closed|reset|refused)|gloo|nccl", re.IGNORECASE)


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
def processes(device=None, timeout=600):
    """Join the job that torchrun started, or be alone.

    device: cuda, cpu, or None for the best one present; timeout: seconds that one process waits for another.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"error: --device {device}: no CUDA GPU here, use --device cpu")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(seconds=timeout))
    try:
        yield Processes(rank, world, torch.device(device))
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise SystemExit(f"error: rank {rank}: out of memory on {device}; what helps: a smaller --rollout_batch; "
                             "in training --microbatch 1, --checkpoint_activations, a smaller --lora_r, more "
                             f"processes (--plan tells what fits) ({str(error).splitlines()[0]})") from None
        if world == 1 or not LOST.search(str(error)):
            raise
        raise SystemExit(f"error: rank {rank}: another process failed, or did not arrive within --timeout {timeout:g} "
                         f"s ({str(error).splitlines()[0]})") from None
    finally:
        if world > 1:
            dist.destroy_process_group()


def refuse_not_finite(where, grad_norm, per_rank):
    """End all processes before an update whose gradient norm is not finite, and say where it came from.

    grad_norm: the same on all processes; per_rank: what each of them measured, {name: number}.
    """
    if not math.isfinite(grad_norm):
        bad = [rank for rank, found in enumerate(per_rank) if not all(map(math.isfinite, found.values()))]
        raise SystemExit(f"error: {where}: gradient norm {grad_norm}, "
                         f"{f'loss not finite on ranks {bad}' if bad else 'losses finite'}: {per_rank}; "
                         "stopped before the update, what is saved is intact")


@contextlib.contextmanager
def one_line_errors():
    """Bad input ends the program with one line and exit code 1, no traceback. Wrap preparation, not training."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


def pick_dtype(name, device):
    """The dtype of the weights: as named, else bfloat16 on a GPU that has it and float32 elsewhere."""
    gpu = torch.device(device).type == "cuda"
    able = not gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "bfloat16" and not able:
        raise ValueError(f"--dtype bfloat16: {torch.cuda.get_device_name(device)} does not have it: use float32")
    return getattr(torch, name or ("bfloat16" if gpu and able else "float32"))


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
    """A run's folder: config.json, metrics.jsonl, samples.jsonl, step_000120/, summary.json. One process writes.

    A checkpoint is a model folder (weights or adapter, tokenizer) with optimizer.safetensors, state.json and, written
    last, complete.json with the size and SHA-256 of every file: what lacks it or disagrees with it is never resumed.
    """

    def __init__(self, out, options, procs, resume=False, fixed=()):
        """Open `out`; self.checkpoint is the newest whole checkpoint to go on from, or None at a start.

        fixed: options that a resumed run may not change. Raises ValueError where `out` holds a run and resume is False,
        where a fixed option differs, or where `out` cannot be written.
        """
        self.out, self.procs = Path(out), procs
        options = json.loads(json.dumps(options, default=str))
        old = self.out / "config.json"
        taken = any(procs.gather([old.exists()]))  # everyone has looked before the main process writes
        if taken and not resume:
            raise ValueError(f"--out {out} holds a run already: go on with --resume, or name another folder")
        if taken:
            self.compare(json.loads(old.read_text())["options"], options, fixed)
        newest = None
        if procs.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.out / ".lock")
            newest = self.newest_checkpoint()
            versions = {"python": sys.version.split()[0], "torch": torch.__version__}
            write_json(old, {"options": options, "versions": versions, "processes": procs.world})
        found = procs.gather([newest and newest.name])[0]  # one process looks, all go on from the same
        self.checkpoint = self.out / found if found else None

    def compare(self, before, now, fixed):
        """Refuse a change of a fixed option, list every other."""
        changed = {name: (before.get(name), now[name]) for name in now if before.get(name) != now[name]}
        changed.pop("resume", None)
        for name in fixed:
            if name in changed:
                raise ValueError(f"--{name} was {changed[name][0]!r} in {self.out} and is {changed[name][1]!r}: a "
                                 "resumed run cannot change it, name another --out")
        for name, (old, new) in changed.items():
            self.procs.print(f"resumed with another --{name}: {old!r} -> {new!r}")

    def newest_checkpoint(self):
        for folder in sorted(self.out.glob("step_*[0-9]"), reverse=True):
            fault = checkpoint_fault(folder)
            if fault is None:
                return folder
            self.procs.print(f"skipped {folder}: {fault}")
        return None

    def restore(self, model, optimizer, load_weights):
        """Go on from the checkpoint if there is one: weights and optimizer. Returns the run's state, a dict for `save`.

        Log lines behind it are dropped, a torn last one too: the run writes them again.
        """
        # unlogged: a finished step whose evaluation is still to come
        state = {"step": 0, "unlogged": None, "before": None, "after": None, "seconds": 0.0}
        if self.checkpoint:
            load_weights(model, self.checkpoint)
            load_optimizer(model, optimizer, self.checkpoint / "optimizer.safetensors")
            state = json.loads((self.checkpoint / "state.json").read_text())
            self.procs.print(f"resumed from {self.checkpoint}")
        logged = state["step"] - bool(state["unlogged"])
        for path in (self.out / "metrics.jsonl", self.out / "samples.jsonl") if self.procs.is_main else ():
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= logged]
                write_text(path, "".join(kept))
        return state

    def log(self, file, rows):
        """Append dicts to `file` as JSON lines."""
        if self.procs.is_main:
            with open(self.out / file, "a", encoding="utf-8") as lines:
                lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def save(self, state, tensors, *writers, keep=2):
        """Write the checkpoint step_<state["step"]>/: state, a dict of JSON values; tensors; what each writer adds.

        Made aside, flushed to the disk, renamed, marked; then all but the newest `keep` are removed. Returns its path.
        """
        folder = self.out / f"step_{state['step']:06d}"
        if self.procs.is_main and not (folder.exists() and checkpoint_fault(folder) is None):
            half = folder.with_suffix(".tmp")
            for old in (folder, half):
                shutil.rmtree(old, ignore_errors=True)
            half.mkdir(parents=True)
            for write in writers:
                write(half)
            save_file(tensors, half / "optimizer.safetensors")
            write_json(half / "state.json", state)
            umask = os.umask(0)
            os.umask(umask)
            for path in half.iterdir():  # safetensors makes files for the owner alone
                path.chmod(0o666 & ~umask)
            marks = {path.name: fingerprint(path) for path in sorted(half.iterdir())}
            half.rename(folder)
            flush(self.out)
            write_json(folder / "complete.json", marks)
            whole = [f for f in sorted(self.out.glob("step_*[0-9]")) if (f / "complete.json").exists()]
            for old in whole[:-keep]:
                shutil.rmtree(old)
        if self.procs.world > 1:
            dist.barrier()  # nobody goes on, or leaves, before it is on the disk
        return folder

    @contextlib.contextmanager
    def resumable(self, save):
        """Inside, a run that is asked to stop saves a checkpoint, says how to go on, and exits with code STOPPED."""
        try:
            yield
        except Stopped:
            self.procs.print(f"stopped; the same command with --resume goes on from {save()}")
            raise SystemExit(STOPPED) from None
        finally:
            if self.procs.is_main:
                self.lock.close()

    def finish(self, summary):
        if self.procs.is_main:
            write_json(self.out / "summary.json", summary)


def lock(path):
    """Hold `path` until this process ends, however it ends. Raises ValueError where another process holds it.

    A killed torchrun leaves its workers running for a while: they must not write beside the run that resumes.
    """
    file = open(path, "w")
    if os.name == "posix":
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out {path.parent}: another process is writing there, stop it first") from None
    return file


def flush(path):
    """Force a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def write_text(path, text):
    """Write, flush, rename: a crash leaves the old file or the new one."""
    half = path.with_suffix(".tmp")
    half.write_text(text, encoding="utf-8")
    flush(half)
    half.replace(path)
    flush(path.parent)


def fingerprint(path):
    """[size, SHA-256] of a file, which is flushed to the disk."""
    flush(path)
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def checkpoint_fault(folder):
    """What is wrong with a checkpoint folder, or None if every file is there and as it was written."""
    marker = folder / "complete.json"
    if not marker.exists():
        return "not complete, the run ended while it was written"
    for name, mark in json.loads(marker.read_text()).items():
        if not (folder / name).exists():
            return f"{name} is missing"
        if fingerprint(folder / name) != mark:
            return f"{name} is damaged"
    return None


def optimizer_tensors(model, optimizer):
    """{parameter/key: tensor} of the optimizer's state, by the names of the model's parameters."""
    return {f"{name}/{key}": value.detach().cpu() for name, p in model.named_parameters()
            for key, value in optimizer.state.get(p, {}).items()}


def load_optimizer(model, optimizer, path):
    """Put back what `optimizer_tensors` gave. Raises ValueError where a parameter has no state in the file."""
    state = {}
    for key, value in load_file(path).items():
        name, key = key.rsplit("/", 1)
        state.setdefault(name, {})[key] = value
    for name, p in model.named_parameters():
        if p.requires_grad and state:  # empty: saved before the first update
            if name not in state:
                raise ValueError(f"{path}: no optimizer state of {name}, is this checkpoint of this run?")
            optimizer.state[p] = {k: v if v.dim() == 0 else v.to(p) for k, v in state[name].items()}


# ---------------------------------------------------------------- signals

STOPPED = 143  # exit code, as of a process that SIGTERM ended


class Stopped(Exception):
    """The run was asked to end."""


class Signals:
    """SIGTERM and Ctrl-C ask the run to end; work wrapped in `droppable` ends at once, on all processes alike.

    A second Ctrl-C leaves immediately: what is saved is never half there.
    """

    def __init__(self, procs):
        self.procs, self.wanted = procs, False

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, _):
        if self.wanted and number == signal.SIGINT:
            os._exit(130)
        self.wanted = True

    def check(self, *_):
        if self.wanted:
            raise Stopped

    @contextlib.contextmanager
    def droppable(self):
        """Around work without collectives. Gives `check`, to be called often; raises Stopped on all if one must."""
        with contextlib.suppress(Stopped):
            yield self.check
        if self.procs.sum({"stop": int(self.wanted)})["stop"]:
            raise Stopped


def progress(items, procs, describe):
    """A progress bar on a terminal; elsewhere a plain line about every twentieth of the way. Yields (item, show).

    Call show(**numbers) with what to display beside the rate. items: a range; where it begins is done already.
    """
    done = items.start // items.step
    total = done + len(items)
    bar = tqdm(total=total, initial=done, desc=describe, dynamic_ncols=True, disable=None if procs.is_main else True)
    start, every = time.monotonic(), max(1, total // 20)
    for n, item in enumerate(items, done + 1):
        shown = {}
        yield item, shown.update
        bar.set_postfix(shown)
        bar.update()
        if bar.disable and procs.is_main and (n % every == 0 or n == total):
            numbers = " ".join(f"{k}={v}" for k, v in shown.items())
            print(f"{describe} {n}/{total} {time.monotonic() - start:.0f}s {numbers}", flush=True)
    bar.close()
