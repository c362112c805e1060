"""What a run needs besides the algorithm: processes, FSDP2, its folder and checkpoints, a log readable anywhere.

One process or many run the same script: under torchrun every process takes its share of the prompts, holds its share of
the weights (`parallelise`) and numbers are gathered. Without torchrun all this is a no-op.
"""
import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

MAX_FILE_BYTES = 5_000_000_000
LOST = re.compile("timed? ?out|timeout|connection (closed|reset|refused)|gloo|nccl", re.IGNORECASE)


@dataclass(frozen=True)
class Processes:
    """This process among all of the job."""
    rank: int
    world: int
    device: torch.device
    timeout: float = 600

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

    def check_replicas(self, replicas):
        """Raises ValueError where the processes do not divide into that many copies of the model."""
        if replicas < 1 or self.world % replicas:
            valid = [r for r in range(1, self.world + 1) if self.world % r == 0]
            raise ValueError(f"--replicas {replicas} does not divide {self.world} processes: use one of {valid}")

    def deal(self, count):
        """This process's items of `count`, as (index, counts). All get as many: what fills up does not count."""
        return [(i % count, i < count) for i in range(self.rank, -(-count // self.world) * self.world, self.world)]

    def whole(self, tensor):
        """The full values of a tensor on the CPU of the main process, nothing on the others. All must call."""
        full = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
        return full.cpu() if self.is_main else torch.empty(0)

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
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # where collectives and FSDP put their buffers
    try:
        if world > 1:
            join(device, timeout)
        yield Processes(rank, world, torch.device(device), timeout)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise SystemExit(f"error: rank {rank}: out of memory on {device}; what helps: a smaller --rollout_batch; "
                             "in training --microbatch 1, --checkpoint_activations, a smaller --lora_r, more "
                             f"processes (--plan tells what fits) ({str(error).splitlines()[0]})") from None
        if "EADDRINUSE" in str(error):
            raise SystemExit(f"error: port {os.environ['MASTER_PORT']} is in use, perhaps by another job: "
                             "give torchrun another --master_port") from None
        if world == 1 or not LOST.search(str(error)):
            raise
        raise SystemExit(f"error: rank {rank}: another process failed, or did not arrive within --timeout {timeout:g} "
                         f"s ({str(error).splitlines()[0]})") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def join(device, timeout, **alone):
    backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **alone)


# ---------------------------------------------------------------- FSDP2

def add_parallel_options(p):
    p.add_argument("--replicas", type=int, default=1, help="copies of the model, each over processes / replicas")
    p.add_argument("--keep_sharded", action="store_true",
                   help="never gather all weights at once, also not to sample: less memory, slower")
    p.add_argument("--checkpoint_activations", action="store_true", help="recompute blocks in the backward pass")
    p.add_argument("--compile", action="store_true", help="compile the blocks: slower to start, pays in long runs")
    p.add_argument("--plan", type=int, nargs="?", const=0, metavar="GPUS", help="only tell memory, cost and time of a "
                   "step on so many GPUs (default: torchrun's), from config.json alone; of the exact sampler")
    p.add_argument("--tensorboard", action="store_true", help="metrics.jsonl also as a TensorBoard log, in the same "
                   "folder: tensorboard --logdir runs")
    p.add_argument("--timeout", type=float, default=600, help="seconds to wait for another process before giving up")
    p.add_argument("--device", help="cuda, cuda:1, cpu; default: a GPU where there is one")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the computation, trained weights are kept in "
                   "float32; default: bfloat16 on a GPU, else float32")


def compile_blocks(model):
    """One compilation for all blocks, in place: names and FSDP's hooks stay as they are.

    Shapes are symbolic from the start, as rows leave and masks get fewer. Gradient, padding, kept positions, adapters
    and cache make some twenty variants, where torch by default gives up at 8 and goes on without a word, uncompiled.
    """
    for block in model.blocks:
        block.forward = torch.compile(block.forward, dynamic=True, recompile_limit=64)


def compile_time():
    """What --compile costs a run before it pays, in words."""
    return f"compiling took {torch._dynamo.utils.calculate_time_spent()['total_wall_time']:.0f} s of this run"


def parallelise(model, args, procs, dtype):
    """Everything that is done to a model from outside, while its weights are still on the meta device.

    The blocks, model.blocks, are compiled, recomputed and sharded one by one. dtype: of the computation; gradients are
    reduced in float32. With --replicas each copy of the model is spread over processes / replicas (HSDP).
    One process keeps the model plain, unless it trains all weights in another dtype than it computes in: FSDP over a
    group of one keeps the float32 weights.
    """
    if args.compile:
        compile_blocks(model)
    if args.checkpoint_activations:
        for block in model.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    if procs.world == 1:
        if not all(p.requires_grad and p.dtype != dtype for p in model.parameters()):
            return
        join(procs.device, procs.timeout, store=dist.HashStore(), rank=0, world_size=1)
    # cos and sin of the rotary embedding are inputs of a block and stay in float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = device_mesh(procs, args.replicas)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


def device_mesh(procs, replicas):
    """(processes,), or (replicas, processes / replicas). Its own groups would not have our timeout."""
    if replicas == 1:
        return DeviceMesh.from_group(dist.group.WORLD, procs.device.type)
    ranks, timeout = torch.arange(procs.world).view(replicas, -1), timedelta(seconds=procs.timeout)
    groups = [dist.new_subgroups_by_enumeration(each.tolist(), timeout)[0] for each in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, procs.device.type, ranks, mesh_dim_names=("replicate", "shard"))


@torch.no_grad()
def fill(p, read):
    """Set the part of a parameter that this process holds. read(slice) gives rows of the full values."""
    if not isinstance(p, DTensor):
        p.copy_(read(slice(None)))
        return
    local, dim = p.to_local(), p.device_mesh.ndim - 1  # the last dimension of the mesh shards rows, as torch.chunk does
    start = -(-len(p) // p.device_mesh.size(dim)) * p.device_mesh.get_local_rank(dim)
    if len(local):
        local.copy_(read(slice(start, start + len(local))))


@contextlib.contextmanager
def gathered(model, keep_sharded=False):
    """Inside, every process has all weights and runs as many forward passes as it likes: none waits for another one.

    For sampling and scoring without gradient; at the end the weights are spread again, as updates and saves need them.
    keep_sharded: gather block by block in every pass instead, in less memory; then all must run equally many.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules if not keep_sharded else ():
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()


def update_or_stop(optimizer, limit, where, found, procs):
    """Clip the gradients to a norm of `limit` over all processes, update, clear them.

    found: what this process measured, {name: number}. Returns the norm before clipping and what each process found.
    Where the norm is not finite all processes end before the update and say where that came from.
    """
    trainable = optimizer.param_groups[0]["params"]
    norm = torch.nn.utils.clip_grad_norm_(trainable, limit)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    per_rank = procs.gather([found])
    if not math.isfinite(norm):
        bad = [rank for rank, numbers in enumerate(per_rank) if not all(map(math.isfinite, numbers.values()))]
        raise SystemExit(f"error: {where}: gradient norm {norm}, "
                         f"{f'loss not finite on ranks {bad}' if bad else 'losses finite'}: {per_rank}; "
                         "stopped before the update, what is saved is intact")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, per_rank


@contextlib.contextmanager
def one_line_errors():
    """Bad input ends the program with one line and exit code 1, no traceback. Wrap preparation, not training."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


def pick_dtype(name, device):
    """The dtype of the computation: as named, else bfloat16 on a GPU that has it and float32 elsewhere."""
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
    chosen = " ".join(f"{name}={getattr(args, name)}" for name in table if getattr(args, name) is not None)
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

    A checkpoint is a model folder (weights or adapter, tokenizer) with optimizer.safetensors, state.json, run.json and,
    written last, complete.json with the size and SHA-256 of every file: what lacks it or disagrees with it is never
    resumed. Files hold full tensors, whatever the number of processes: saved on n, a run resumes on m.
    """

    def __init__(self, out, options, procs, resume=False, fixed=()):
        """Look at `out`, before any work. fixed: options that a resumed run may not change.

        Raises ValueError where `out` holds a run and resume is False, or where a fixed option differs.
        """
        self.out, self.procs = Path(out), procs
        self.options = json.loads(json.dumps(options, default=str))
        self.writer = import_writer() if options.get("tensorboard") else None
        old = self.out / "config.json"
        taken = any(procs.gather([old.exists()]))  # everyone has looked before the main process writes
        if taken and not resume:
            raise ValueError(f"--out {out} holds a run already: go on with --resume, or name another folder")
        if taken:
            before = json.loads(old.read_text())
            self.compare(before["options"], self.options, fixed)
            if before["processes"] != procs.world:
                procs.print(f"resumed on {procs.world} processes, not {before['processes']}: the same up to rounding")

    def open(self):
        """Begin to write; self.checkpoint is the newest whole checkpoint to go on from, or None at a start.

        Raises ValueError where another process writes in the folder or not every process sees it, OSError where it
        cannot be written.
        """
        newest = None
        if self.procs.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.out / ".lock")
            newest = self.newest_checkpoint()
            write_json(self.out / "config.json", self.settings())
        found = self.procs.gather([newest and newest.name])[0]  # one process looks, all go on from the same
        self.checkpoint = self.out / found if found else None
        if found and not self.checkpoint.exists():
            raise ValueError(f"rank {self.procs.rank} does not see {self.checkpoint}: --out must be on a shared disk")
        return self

    def settings(self):
        """Resolved options, library versions and the number of processes: the run's config.json."""
        versions = {name: version(name) for name in ("torch", "safetensors", "tokenizers", "numpy")}
        return {"options": self.options, "versions": {"python": sys.version.split()[0], **versions},
                "processes": self.procs.world}

    def compare(self, before, now, fixed):
        """Refuse a change of a fixed option, list every other."""
        changed = {name: (before.get(name), now[name]) for name in now if before.get(name) != now[name]}
        changed.pop("resume", None)
        for name in fixed:
            if name in changed and name in before:  # an option that came later has had its default
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

    def restore(self, model, optimizer, load, save, *files):
        """Open the folder and go on from its checkpoint if there is one. Returns self.state, a dict of JSON values.

        load(model, folder, fill=) and save(model, folder, whole=) are for the weights; files: each write(folder) adds
        to a checkpoint. Log lines behind it are dropped, a torn last one too: the run writes them again.
        """
        self.open()
        self.files = files
        self.tensors = (functools.partial(save, model), functools.partial(save_optimizer, model, optimizer))
        # unlogged: a finished step whose evaluation is still to come
        state = {"step": 0, "unlogged": None, "before": None, "after": None, "seconds": 0.0}
        if self.checkpoint:
            load(model, self.checkpoint, fill=fill)
            state = json.loads((self.checkpoint / "state.json").read_text())
            if state["step"]:  # else saved before the first update
                load_optimizer(model, optimizer, self.checkpoint)
            self.procs.print(f"resumed from {self.checkpoint}")
        logged = state["step"] - bool(state["unlogged"])
        for path in (self.out / "metrics.jsonl", self.out / "samples.jsonl") if self.procs.is_main else ():
            if path.exists():
                kept = [line for line in whole_lines(path) if json.loads(line)["step"] <= logged]
                write_text(path, "".join(line + "\n" for line in kept))
        if self.writer and self.procs.is_main:
            self.writer = self.writer(self.out, purge_step=logged + 1)  # likewise drops what lies behind
        self.state, self.start = state, time.monotonic() - state["seconds"]
        return state

    @property
    def seconds(self):
        """How long the run has taken, over all its lives."""
        return time.monotonic() - self.start

    def log(self, file, rows):
        """Append dicts to `file` as JSON lines; those of metrics.jsonl also to TensorBoard where that was asked for."""
        if self.procs.is_main:
            with open(self.out / file, "a", encoding="utf-8") as lines:
                lines.write(jsonl(rows))
            for row in rows if self.writer and file == "metrics.jsonl" else ():
                phases = {f"seconds/{phase}": value for phase, value in row.get("seconds", {}).items()}
                for name, value in (row | phases).items():
                    if name not in ("step", "seconds"):
                        self.writer.add_scalar(name, value, row["step"])
                self.writer.flush()

    def save(self, keep=2):
        """Write the checkpoint step_<step>/: weights, optimizer, state, and the files of others.

        Made aside, flushed to the disk, renamed, marked; then all but the newest `keep` are removed. Returns its path.
        """
        self.state["seconds"] = self.seconds
        folder = self.out / f"step_{self.state['step']:06d}"
        if not any(self.procs.gather([self.procs.is_main and folder.exists() and checkpoint_fault(folder) is None])):
            half = folder.with_suffix(".tmp")
            with tempfile.TemporaryDirectory() as nowhere:  # all gather, but what the others write is empty
                if self.procs.is_main:
                    for old in (folder, half):
                        shutil.rmtree(old, ignore_errors=True)
                    half.mkdir(parents=True)
                for write in self.tensors:
                    write(half if self.procs.is_main else Path(nowhere), whole=self.procs.whole)
            if self.procs.is_main:
                self.complete(half, folder, keep)
        if self.procs.world > 1:
            dist.barrier()  # nobody goes on, or leaves, before it is on the disk
        return folder

    def complete(self, half, folder, keep):
        """Add what does not take all processes, turn the folder into a checkpoint, then remove the oldest."""
        for write in self.files:
            write(half)
        write_json(half / "state.json", self.state)
        write_json(half / "run.json", self.settings())  # config.json is the model's
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

    @contextlib.contextmanager
    def resumable(self):
        """Inside, a run that is asked to stop saves a checkpoint, says how to go on, and exits with code STOPPED."""
        try:
            yield
        except Stopped:
            self.procs.print(f"stopped; the same command with --resume goes on from {self.save()}")
            raise SystemExit(STOPPED) from None
        finally:
            if self.procs.is_main:
                self.lock.close()

    def finish(self, summary):
        if self.procs.is_main:
            write_json(self.out / "summary.json", summary)


def import_writer():
    """TensorBoard's SummaryWriter. Raises ValueError in one line where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs a package of its own: pip install tensorboard") from None
    return SummaryWriter


def jsonl(rows):
    """Dicts as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def whole_lines(path):
    """The lines of a log without a last one that is torn, perhaps within a character. Texts hold other line ends."""
    return [line.decode() for line in path.read_bytes().split(b"\n")[:-1]]


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


def save_optimizer(model, optimizer, folder, whole):
    """Write the state as parameter/key to optimizer.safetensors; what is large is gathered and written file by file."""
    part, number = {}, 1
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            part[f"{name}/{key}"] = whole(value)
        if sum(t.numel() * t.element_size() for t in part.values()) > MAX_FILE_BYTES:
            save_file(part, folder / f"optimizer-{number}.safetensors")
            part, number = {}, number + 1
    save_file(part, folder / "optimizer.safetensors")


def load_optimizer(model, optimizer, folder):
    """Put back what `save_optimizer` wrote. Raises ValueError where the files are not of these parameters."""
    trained, found = {name: p for name, p in model.named_parameters() if p.requires_grad}, set()
    for path in folder.glob("optimizer*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for full in file.keys():
                name, key = full.rsplit("/", 1)
                found.add(name)
                if name in trained:
                    optimizer.state[trained[name]][key] = read_like(trained[name], file, full)
    wrong = found ^ trained.keys()
    if wrong:
        raise ValueError(f"{folder}: optimizer state and trained parameters differ in {min(wrong)}, "
                         "is this checkpoint of this run?")


def read_like(p, file, name):
    """A tensor of a safetensors file, spread over processes like `p`; a single number as it is."""
    if not file.get_slice(name).get_shape():
        return file.get_tensor(name).to(p.device)  # where the fused AdamW of a GPU counts its steps
    value = torch.zeros_like(p, requires_grad=False)
    fill(value, lambda rows: file.get_slice(name)[rows])
    return value


# ---------------------------------------------------------------- signals

STOPPED = 143  # exit code, as of a process that SIGTERM ended


class Stopped(Exception):
    """The run was asked to end."""


class Signals:
    """SIGTERM and Ctrl-C ask the run to end; work wrapped in `droppable` ends at once, on all processes alike.

    A second Ctrl-C leaves immediately: what is saved is never half there. together: the work in there waits for other
    processes, so they agree at every check.
    """

    def __init__(self, procs, together=False):
        self.procs, self.together, self.wanted = procs, together, False

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
        if self.agreed() if self.together else self.wanted:
            raise Stopped

    def agreed(self):
        return self.procs.sum({"stop": int(self.wanted)})["stop"] > 0

    @contextlib.contextmanager
    def droppable(self):
        """Gives `check`, to be called often; raises Stopped on all processes if one must."""
        with contextlib.suppress(Stopped):
            yield self.check
        if self.agreed():
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


# ---------------------------------------------------------------- memory and cost, told in advance (--plan)

GIB = 2 ** 30
SPARE = 5  # GiB of a GPU that CUDA, NCCL and the allocator's gaps take
RATE = 400e12  # FLOP/s of a GPU: 40% of an H100's 989 in bfloat16, usual in training; a bare matrix product gets 800
HELPS = {"microbatch": 1, "rollout_batch": 1, "checkpoint_activations": True, "keep_sharded": True, "lora_r": 128}
PLANNED = {
    "parameters": "trained ones in float32; a replica's GPUs share these, and the next three",
    "gradients": "float32", "optimizer": "AdamW: two moments in float32", "reference": "a frozen copy; LoRA needs none",
    "activations": "kept for the backward pass of a micro-batch", "block": "at work in the backward pass of one block",
    "logits": "a chunk, its log-softmax, their gradients: float32", "gathered": "what FSDP has whole of both at a time",
    "update": "peak of an update", "rollout": "peak without gradients", "peak": "the larger of the two"}


@dataclass(frozen=True)
class Passes:
    """`times` passes over `total` rows, `rows` at a time on a GPU; `kept` of their `length` positions see the head.

    narrow: as many in every row, so that the last block computes only those, but for keys and values.
    """
    total: int
    rows: int
    length: int
    kept: int
    times: int = 1
    narrow: bool = True


def planned_parameters(c, args):
    """Numbers of weights: of a block, of the rest (embedding, last norm, head), of all adapters. c: model.Config."""
    C, KV, M = c.d_model, c.n_kv_heads * c.head_dim, c.mlp_hidden_size
    ends = {"q_proj": 2 * C, "k_proj": C + KV, "v_proj": C + KV, "attn_out": 2 * C,
            "ff_proj": C + M, "up_proj": C + M, "ff_out": C + M}  # in + out of each matrix
    if unknown := set(args.lora_targets) - ends.keys():
        raise ValueError(f"--lora_targets {' '.join(sorted(unknown))}: choose from {' '.join(ends)}")
    return (2 * C * C + 2 * C * KV + 3 * C * M + 2 * C, (2 - c.weight_tying) * c.embedding_size * C + C,
            args.lora_r * c.n_layers * sum(ends[target] for target in args.lora_targets))


def planned_memory(c, args, gpus, chunk, passes):
    """{what: bytes} on each GPU in a step, by the names of PLANNED. passes: {"update": Passes, "rollout": Passes}.

    chunk: logits that exist at a time where tokens are scored. Left out: what is small beside blocks, such as ids,
    rotary tables and the adapters' products.
    """
    e, full, train = 4 if args.dtype == "float32" else 2, not args.lora_r, passes["update"]
    C, KV, M, V = c.d_model, c.n_kv_heads * c.head_dim, c.mlp_hidden_size, c.embedding_size
    block, rest, adapters = planned_parameters(c, args)
    count, shards, copied = c.n_layers * block + rest, gpus // args.replicas, full and bool(getattr(args, "beta", 0))
    trained = 4 * (count if full else adapters) / shards  # kept in float32
    found = {"parameters": trained if full else trained + e * count / shards, "gradients": trained,
             "optimizer": 2 * trained, "reference": copied * e * count / shards}
    tokens = train.rows * train.length
    layer = tokens * (8 * C  # for the backward pass of a block: what enters its norms, in float32
                      + e * (2 * C if full else 0)  # what they give before the weight, to train it
                      + e * 2 * C  # what the matrices read: q, k, v; ff_proj, up_proj
                      + e * (2 * C + 2 * KV)  # q, k, v and what attention gives
                      + e * (4 * M if full else 3 * M))  # gate, silu(gate), up; their product, to train ff_out
    layers = c.n_layers - train.narrow * (1 - train.kept / train.length)
    found["activations"] = tokens * e * C * c.n_layers if args.checkpoint_activations else layers * layer
    found["block"] = tokens * e * 3 * M + (layer if args.checkpoint_activations else 0)
    found["logits"] = 12 * min(chunk, train.rows * train.kept * V)
    sharded = gpus > 1 or full and e < 4
    some = sharded * e * (2 * block + rest)  # FSDP has two blocks and the rest whole
    found["gathered"] = some + sharded * full * (e * (block + rest) + 4 * block)  # and gradients, a block's in float32
    held = found["parameters"] + found["optimizer"] + found["reference"]
    # gradients grow as activations shrink: both are there at once only from the second micro-batch on
    both = sum if train.total // gpus > train.rows else max
    found["update"] = (held + both((found["gradients"], found["activations"]))
                       + max(found["block"], found["logits"]) + found["gathered"])
    sample = passes.get("rollout", Passes(0, train.rows, train.length, 0))  # or the held-out loss
    canvas = max(sample.rows * sample.length * e * (5 * C + 2 * KV + (3 if full else 4) * M),  # a block at its widest
                 sample.rows * sample.kept * V * (e + 24))  # logits of a window; their float64 copy, noise, the sum
    whole = some if args.keep_sharded else sharded * e * (count + adapters)
    found["rollout"] = held + whole + max(canvas, some * copied)
    found["peak"] = max(found["update"], found["rollout"])
    return found


def planned_flops(c, args, chunk, passes, train=False):
    """Floating-point operations of the passes over all GPUs, a multiplication and an addition being two.

    A weight that a token meets costs 2 forward, 2 backward for the gradient of its input, 2 more if it is trained.
    """
    block, _, adapters = planned_parameters(c, args)
    base, full = c.n_layers * (block - 2 * c.d_model), not args.lora_r
    forward = 1 + (train and args.checkpoint_activations)
    weights = base * (forward + train + train * full) + adapters * (forward + 2 * train)
    attention = 2 * passes.length * c.d_model * c.n_layers * (forward + 2 * train)  # q k, and its product with v
    again = passes.rows * passes.kept * c.embedding_size > chunk  # scored once more in the backward pass
    head = c.d_model * c.embedding_size * (1 + train * (1 + full + again))
    both = 2 * c.d_model * c.n_kv_heads * c.head_dim * c.n_layers  # keys and values: everywhere in the last block too
    spared = (weights * (1 - both / base) + attention) / c.n_layers * passes.narrow
    return 2 * passes.total * passes.times * (passes.length * (weights + attention) + passes.kept * head
                                              - (passes.length - passes.kept) * spared)


def print_plan(c, args, chunk, passes_of):
    """What --plan prints: memory on each GPU, what helps where it does not fit, cost and time of a step.

    passes_of(c, args, gpus) -> {phase: Passes}, of which "update" has a backward pass. Returns planned_memory's bytes.
    """
    gpus = args.plan or int(os.environ.get("WORLD_SIZE", 1))
    if gpus < 1:
        raise ValueError(f"--plan {gpus}: name a number of GPUs, e.g. --plan 8")
    procs = Processes(int(os.environ.get("RANK", 0)), gpus, torch.device("cpu"))
    procs.check_replicas(args.replicas)
    size = torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else 79  # of 80 GB

    def memory(gpus=gpus, **changes):
        other = argparse.Namespace(**{**vars(args), **changes})
        return planned_memory(c, other, gpus, chunk, passes_of(c, other, gpus))
    found, (block, rest, adapters) = memory(), planned_parameters(c, args)
    trained = f"{adapters:,} of LoRA r {args.lora_r}" if args.lora_r else "all"
    procs.print(f"{c.n_layers * block + rest:,} parameters, trained: {trained}; GiB on a GPU of {gpus}:")
    for name, words in PLANNED.items():
        procs.print(f"{name:>12} {found[name] / GIB:9.2f}  {words}")
    fits = found["peak"] / GIB < size - SPARE
    procs.print(f"{'fits' if fits else 'DOES NOT FIT'} in {size:.0f} GiB with {SPARE} left to CUDA, NCCL and gaps")
    if not fits:
        tries = {f"--{name} {'' if value is True else value}": memory(**{name: value})
                 for name, value in HELPS.items() if getattr(args, name, value) != value}
        for more in (2 * gpus, 4 * gpus, 8 * gpus):
            with contextlib.suppress(ValueError):  # the batch does not divide by them
                tries[f"{more} GPUs"] = memory(more)
        for words, other in tries.items():
            if other["peak"] < found["peak"]:
                procs.print(f"  {words:<25} {other['peak'] / GIB:7.2f}"
                            + ", fits" * (other["peak"] / GIB < size - SPARE))
    passes = passes_of(c, args, gpus)
    costs = {name: planned_flops(c, args, chunk, one, name == "update") for name, one in passes.items()}
    for name, cost in {**costs, "step": sum(costs.values())}.items():
        words = f"if a GPU does {RATE / 1e12:.0f} TFLOP/s and communication hides behind it: an estimate"
        if name in passes:
            one = passes[name]
            words = f"{one.times} passes over {one.total} rows of {one.length} tokens, {one.rows} at a time on a GPU"
        procs.print(f"{name:>12} {cost / 1e15:9.2f} PFLOP {cost / gpus / RATE:7.1f} s  {words}")
    return found
