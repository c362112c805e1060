"""One process or many: torchrun's processes, the signals that stop them, and FSDP2 applied to a model from outside.

Without torchrun there is one process, nothing here communicates, and a model stays the plain module that it is.
"""
import contextlib
import functools
import math
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

STOPPED = 143  # exit code of a program that a signal ended: the shell's for SIGTERM
DEVICE_OPTIONS = {
    "device": (None, None, "cuda, cuda:1 or cpu; default: a GPU where there is one"),
    "dtype": (None, None, "of the computation, float32 or bfloat16; default: bfloat16 on a GPU"),
    "compile": (False, False, "compile the blocks: pays in runs of many minutes"),
}
PARALLEL_OPTIONS = DEVICE_OPTIONS | {
    "checkpoint_activations": (False, False, "recompute the blocks in the backward pass: less memory, more time"),
    "replicas": (1, 1, "copies of the model, each sharded over processes / replicas"),
    "timeout": (600.0, 600.0, "seconds that one process waits for another"),
}


class Stopped(Exception):
    """SIGTERM or Ctrl-C asked the program to end."""


@dataclass
class Processes:
    """This process among all processes of the job."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype          # of the computation; weights that are trained stay in float32
    stop_wanted: bool = False   # set by a signal

    @property
    def is_main(self):
        return self.rank == 0

    def share(self, count, option):
        """This process's part of range(count), which must divide evenly. option: what the user calls `count`."""
        if count % self.world:
            multiple = max(1, count // self.world) * self.world
            raise SystemExit(f"error: {option} {count} does not divide by {self.world} processes: use {multiple}")
        size = count // self.world
        return range(self.rank * size, (self.rank + 1) * size)

    def gather(self, rows):
        """The lists of all processes as one list, in the order of the processes."""
        if self.world == 1:
            return rows
        lists = [None] * self.world
        dist.all_gather_object(lists, rows)
        return [row for rows in lists for row in rows]

    def sum(self, number):
        """The sum of a number over all processes."""
        return sum(self.gather([float(number)]))

    def mean(self, rows):
        """{name: mean} of the numbers in the dicts of all processes; texts are left out."""
        rows = self.gather([{k: v for k, v in row.items() if not isinstance(v, str)} for row in rows])
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}

    def print(self, *words):
        """Print on the main process, above its progress bar."""
        if self.is_main:
            tqdm.write(" ".join(map(str, words)))
            sys.stdout.flush()

    def note_signal(self, number, frame):
        self.stop_wanted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends the program at once

    def check_stop(self, *_):
        """Raise Stopped where a signal came. To be called often, within `stoppable`."""
        if self.stop_wanted:
            raise Stopped

    @contextlib.contextmanager
    def stoppable(self):
        """Work that a signal may drop: if one process got it, all raise Stopped, at the latest when the block ends."""
        with contextlib.suppress(Stopped):
            yield
        if self.sum(self.stop_wanted):
            raise Stopped


@contextlib.contextmanager
def processes(device=None, dtype=None, timeout=600):
    """Join the job that torchrun started, or be alone. Gives a `Processes`.

    device: "cuda", "cuda:1", "cpu", by default a GPU where there is one; dtype: "float32" or "bfloat16", by default
    bfloat16 on a GPU; timeout: seconds that one process waits for another.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(device)
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    procs = Processes(rank, world, device, pick_dtype(dtype, device))
    handlers = {number: signal.signal(number, procs.note_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield procs
    except Stopped:
        raise SystemExit(STOPPED) from None
    except torch.OutOfMemoryError as error:
        error.add_note("What helps: a smaller --rollout_batch, --microbatch 1, --checkpoint_activations, a smaller "
                       "--lora_r, more processes; tools/plan.py tells what fits.")
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if dist.is_initialized():  # not after an error: NCCL would wait here for processes that are elsewhere
        dist.destroy_process_group()


def pick_device(name):
    """The torch.device of --device; "cuda" is this process's own GPU."""
    has_gpu = torch.cuda.is_available()
    name = name or ("cuda" if has_gpu else "cpu")
    if not name.startswith("cuda"):
        return torch.device(name)
    if not has_gpu:
        raise SystemExit(f"error: --device {name}: torch sees no CUDA GPU here, use --device cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
    torch.cuda.set_device(device)
    return device


def pick_dtype(name, device):
    """The torch.dtype of --dtype."""
    if name not in (None, "float32", "bfloat16"):
        raise SystemExit(f"error: --dtype {name}: choose float32 or bfloat16")
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return getattr(torch, name or ("bfloat16" if has_bfloat16 else "float32"))


# ---------------------------------------------------------------- FSDP2

def compile_blocks(model):
    """Compile the blocks in place. Rows leave and masks shrink, so shapes are symbolic and variants many."""
    for block in model.blocks:
        block.forward = torch.compile(block.forward, dynamic=True, recompile_limit=64)


def parallelise(model, args, procs):
    """Compile, recompute and shard the blocks of a model, in place, while its weights are on the meta device."""
    if args.compile:
        compile_blocks(model)
    if args.checkpoint_activations:
        for block in model.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    is_mixed = all(p.dtype != procs.dtype for p in model.parameters())  # kept in float32, computed in bfloat16
    if procs.world == 1 and not is_mixed:
        return
    if procs.world == 1:  # FSDP over a group of one process does the casting
        backend = "nccl" if procs.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if args.replicas < 1 or procs.world % args.replicas:
        raise SystemExit(f"error: --replicas {args.replicas} does not divide {procs.world} processes")
    shape, names = (procs.world,), ("shard",)
    if args.replicas > 1:  # HSDP: only gradients travel between the copies
        shape, names = (args.replicas, procs.world // args.replicas), ("replicate", "shard")
    mesh = init_device_mesh(procs.device.type, shape, mesh_dim_names=names)
    # cos and sin of the rotary embedding are inputs of a block, and stay in float32
    policy = MixedPrecisionPolicy(param_dtype=procs.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


@contextlib.contextmanager
def gathered(model):
    """Within, every process holds all weights: it samples and scores for as long as it needs, and waits for nobody."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()


def clip_and_step(optimizer, max_norm, loss, where, procs):
    """Clip the gradients, update the weights, clear the gradients. Returns the norm before clipping.

    A norm that is not finite ends the run before the update, on all processes; `loss` and `where` are told then.
    """
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_norm)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not math.isfinite(norm):
        raise SystemExit(f"error: {where}: the gradient norm is {norm}, the losses by rank are "
                         f"{procs.gather([float(loss)])}: stopped before the update, what is saved is intact")
    optimizer.step()
    optimizer.zero_grad()
    return norm
