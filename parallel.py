"""One process or many: torchrun's processes, signals to stop, FSDP2 applied from outside."""
import contextlib
import functools
import os
import signal
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from model import recompute

DEVICE_OPTIONS = {  # for the columns see run.PRESETS
    "device": ("", "", "cuda, cuda:1 or cpu; or else a GPU where there is one"),
    "dtype": ("", "", "of the computation: float32, bfloat16; or else bfloat16 on a GPU"),
    "compile": (False, False, "compile the blocks: pays in runs of many minutes"),
    "timeout": (1800.0, 600.0, "seconds that one process waits for another"),
}
PARALLEL_OPTIONS = DEVICE_OPTIONS | {
    "checkpoint_activations": (False, False, "recompute the blocks in the backward pass"),
    "replicas": (1, 1, "copies of the model, each sharded over processes / replicas"),
}
POSITIVE = {"steps", "prompts_per_step", "batch_size", "num_iterations", "microbatch", "timeout",
            "rollout_batch", "replicas", "lr", "lora_alpha", "grad_clip"}  # never 0
STOPS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP  # torchrun passes them on


class Stopped(SystemExit):
    """A signal asked the program to end. 143 is a shell's exit code for that."""


@dataclass
class Processes:
    """This process among all processes of the job."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype         # of the computation; weights that are trained stay in float32
    stop_wanted: bool = False  # set by a signal

    @property
    def is_main(self):
        return self.rank == 0

    def share(self, count, option):
        """This process's part of range(count), which must divide. option: the name of count."""
        if count % self.world:
            raise SystemExit(f"error: {option} {count} does not divide by {self.world} processes")
        size = count // self.world
        return range(self.rank * size, (self.rank + 1) * size)  # neighbours stay together

    def gather(self, rows):
        """The lists of all processes as one list, in the order of the processes."""
        if self.world == 1:
            return rows
        lists = [None] * self.world  # filled in place
        dist.all_gather_object(lists, rows)
        return [row for rows in lists for row in rows]

    def sum(self, number):
        """The sum of a number over all processes."""
        return sum(self.gather([float(number)]))

    def print(self, text):
        """Print on the main process, above its progress bar."""
        if self.is_main:
            with contextlib.suppress(BrokenPipeError):  # train on when `| head` has seen enough
                tqdm.write(text)

    def bar(self, *args, **options):
        """A progress bar, on the main process, and there on a terminal alone."""
        return tqdm(*args, disable=None if self.is_main else True, **options)  # None: unless piped

    def note_signal(self, number, frame):
        self.stop_wanted = True  # acted on by `check_stop`
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once

    def check_stop(self, *_):
        """Raise Stopped where a signal came. To be called often, within `stoppable`."""
        if self.stop_wanted:
            raise Stopped(143)

    @contextlib.contextmanager
    def stoppable(self):
        """Work that a signal may drop: a signal to one process raises Stopped on all of them."""
        with contextlib.suppress(Stopped):  # until all processes have agreed
            yield
        if self.sum(self.stop_wanted):  # the others got here with their work done
            raise Stopped(143)


@contextlib.contextmanager
def processes(args):
    """Join the job that torchrun started, or be alone. Gives a `Processes`."""
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and not (name in POSITIVE) * 1e-20 <= value < 2 ** 32:
            raise SystemExit(f"error: --{name} {value}: choose a number above 0, below 2 ** 32")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device)
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if dtype not in ("bfloat16", "float32"):
        raise SystemExit(f"error: --dtype {dtype}: choose float32 or bfloat16")
    if world > 1:
        dist.init_process_group(timeout=timedelta(seconds=args.timeout))  # gloo, on GPUs also NCCL
    procs = Processes(rank, world, device, getattr(torch, dtype))
    stops = {number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN}  # by nohup
    handlers = {number: signal.signal(number, procs.note_signal) for number in stops}
    try:
        yield procs
    except torch.OutOfMemoryError as error:
        error.add_note("Lower --rollout_batch or --microbatch; tools/plan.py tells what fits.")
        raise
    except SystemExit as error:  # torchrun shows its text below its own traceback
        ErrorHandler().record_exception(error)
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if dist.is_initialized():  # not after an error: NCCL would wait here for the others
        dist.destroy_process_group()


def pick_device(name):
    """The torch.device of --device; "cuda" is the GPU of this process."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        index = local_rank if device.index is None else device.index
        if index >= gpus or (local_rank and device.index is not None):
            raise SystemExit(f"error: --device {device}: torch sees {gpus} GPUs, a process needs "
                             "its own: use cuda with at most so many processes, or cpu")
        torch.cuda.set_device(index)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape
    return device


def compile_blocks(model):
    """Compile the blocks, in place. Rows leave and masks shrink: shapes are symbolic."""
    torch._dynamo.config.recompile_limit = 64  # an argument of torch.compile only after 2.9
    for block in model.blocks:
        block.forward = torch.compile(block.forward, dynamic=True)


def parallelise(model, args, procs):
    """Compile, recompute and shard the blocks of a model whose weights are on the meta device."""
    if procs.world % args.replicas:
        raise SystemExit(f"error: --replicas {args.replicas} must divide {procs.world} processes")
    if args.compile:
        compile_blocks(model)
    if args.checkpoint_activations:
        for block in model.blocks:
            block.forward = functools.partial(recompute, block.forward)
    # one process needs FSDP only to cast, where float32 weights are to compute in bfloat16
    is_mixed = all(p.dtype != procs.dtype for p in model.parameters())
    if procs.world == 1 and not is_mixed:
        return
    if procs.world == 1:
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)  # a group of one
    shape, names = (args.replicas, procs.world // args.replicas), ("replicate", "shard")
    mesh = dist.device_mesh.init_device_mesh(procs.device.type, shape, mesh_dim_names=names)
    if args.replicas == 1:  # else HSDP: only gradients travel between the copies of the model
        mesh = mesh["shard"]
    # cos and sin of the rotary embedding are inputs of a block, and stay in float32
    policy = MixedPrecisionPolicy(procs.dtype, torch.float32, cast_forward_inputs=False)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)  # blocks first, then the rest


@contextlib.contextmanager
def gathered(model):
    """Within, every process holds all weights, and computes without waiting for others."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.unshard()  # gathers its weights
        module.set_reshard_after_forward(False, recurse=False)  # or the first pass frees them
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()  # frees those of others


def clip_and_step(optimizer, max_norm):
    """Clip the gradients, which must be finite, update, clear. Returns the norm before that."""
    weights = optimizer.param_groups[0]["params"]
    norm = torch.nn.utils.clip_grad_norm_(weights, max_norm, error_if_nonfinite=True)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    optimizer.step()
    optimizer.zero_grad()  # sets them to None
    return norm.item()
