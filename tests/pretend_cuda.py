"""A pretend GPU: tensors lie on the CPU, say that they are on cuda:0, and what CUDA refuses raises CUDA's error.

    with pretend_cuda.gpu() as waits: ...            in a test; waits counts where the host waits for the device
    torchrun tests/pretend_cuda.py train_sft.py ...  a script on it

A mode sees every call of torch's Python functions. A tensor on the GPU bears a mark, and so does what is computed from
it; a call with tensors of both kinds raises, but for what CUDA allows. Not seen: kernels, streams, memory, NCCL, C++,
torch.compile.
"""
import collections
import contextlib
import functools
import runpy
import sys
import types
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.utils.checkpoint
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

# names that torch may change: where one is missing there is no pretend GPU
IS_POSSIBLE = (hasattr(torch.Tensor, "_make_subclass") and hasattr(torch.autograd, "_engine_run_backward")
               and hasattr(torch._C, "_group_tensors_by_device_and_dtype")
               and hasattr(torch.utils.checkpoint, "_allowed_determinism_checks_to_fns"))
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
NAME = "NVIDIA H100 80GB HBM3"
MOVES = {"to", "cpu", "cuda", "type_as"}
INDEXING = {"__getitem__", "__setitem__", "index", "index_put", "index_put_"}
COPIES = {"copy_", "_foreach_copy_", "all_gather_copy_in"}
MIXING = COPIES | {"__deepcopy__", "__repr__", "__reduce_ex__", "_has_compatible_shallow_copy_type", "as_tensor",
                   "backward", "expand_as", "is_same_size", "reshape_as", "set_", "tensor", "view_as"}
# beside a CUDA tensor a number without dimensions may lie on the CPU, but not in these
STRICT = {"_foreach_add_", "_foreach_norm", "_fused_adam_", "_fused_adamw_", "addmm", "addmm_", "cat", "embedding",
          "gather", "index_select", "linear", "matmul", "scatter", "scatter_", "searchsorted", "stack"}
WAITING = {"__bool__", "__contains__", "__float__", "__format__", "__index__", "__int__", "__repr__", "allclose",
           "equal", "is_nonzero", "item", "masked_select", "nonzero", "tolist", "unique"}
FROM_THE_HOST = {"as_tensor", "asarray", "new_tensor", "tensor"}


def leaves(value):
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)


def local(tensor):
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def on_gpu(tensor):
    return getattr(local(tensor), "_on_gpu", False)


def mark(value):
    for tensor in leaves(value):
        with torch._C.DisableTorchFunction():
            local(tensor)._on_gpu = not local(tensor).is_meta
    return value


def device_type(value):
    """"cuda", "cpu" or "meta", if value is a device or its name."""
    if isinstance(value, torch.device) or isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu", "meta"):
        return torch.device(value).type


class PretendGPU(TorchFunctionMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, _, args=(), kwargs=None):
        name, args, kwargs = getattr(function, "__name__", "").split(".")[0], list(args), dict(kwargs or {})
        if function is torch.device or name == "_parse_to":
            return function(*args, **kwargs)
        if name in ("__get__", "__set__"):
            return self.use_attribute(function, name, function.__self__.__name__, args)
        if name == "to" and len(args) > 1 and isinstance(args[1], torch.Tensor):  # like another tensor
            args[1:2] = [GPU if on_gpu(args[1]) else CPU, args[1].dtype]
        named = None  # the device that the call names
        for place, key in [*((args, i) for i in range(len(args))), (kwargs, "device")]:
            kind = device_type(place.get(key) if place is kwargs else place[key])
            if kind:
                named, place[key] = kind, CPU if kind == "cuda" else place[key]
        if name in MOVES:
            return self.move(function, name, named, args, kwargs)
        given = list(leaves((args, kwargs)))
        target = named or ("cuda" if any(map(on_gpu, given)) else "cpu")
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch._C.Generator) and value.device.type != target:
                raise RuntimeError(f"Expected a '{target}' device type for generator but found '{value.device.type}'")
        self.check(function, name, args, kwargs)
        if named == "cuda" and name in FROM_THE_HOST:
            self.wait(f"{name} on the device")
        out = args[0] if name == "pin_memory" else function(*args, **kwargs)
        if target == "cuda":  # but not what the call hands back as it was, on the CPU
            mark([t for t in leaves(out) if on_gpu(t) or not any(t is other for other in given)])
        return out

    def use_attribute(self, function, access, name, args):
        tensor = args[0]
        if access == "__set__":
            if name == "grad" and args[1] is not None and on_gpu(tensor) != on_gpu(args[1]):
                raise RuntimeError("assigned grad has data located on a different device")
            if name == "data" and on_gpu(args[1]):
                mark(tensor)
            return function(*args)
        if on_gpu(tensor) and name in ("device", "is_cuda", "is_cpu"):
            return {"device": GPU, "is_cuda": True, "is_cpu": False}[name]
        out = function(*args)
        return mark(out) if on_gpu(tensor) else out  # .T, .grad, .data

    def move(self, function, name, named, args, kwargs):
        before = "cuda" if on_gpu(args[0]) else "cpu"
        after = name if name in ("cpu", "cuda") else named or before
        out = args[0] if name == "cuda" else function(*args, **kwargs)
        if "meta" in (after, local(args[0]).device.type):
            return out
        if before != after:
            self.wait(f"{name}, {before} to {after}")
            out = out.clone()  # no longer the same memory
        return mark(out) if after == "cuda" else out

    def check(self, function, name, args, kwargs):
        """Raise where CUDA raises, note where the host waits."""
        given = list(leaves((args, kwargs)))
        if name in INDEXING:
            self.check_index(args[0], args[1])
            is_slice = not list(leaves(args[1])) and not isinstance(args[1], list)
            if name == "__setitem__" and is_slice:  # a copy, from wherever
                return
            given = [args[0], *leaves((args[2:], kwargs))]
        on = [on_gpu(tensor) for tensor in given]
        if any(on) and name in WAITING:
            self.wait(name)
        if any(on) and name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if any(on) and not all(on) and name in COPIES:
            self.wait("copy between devices")
        # aten: called by a dispatch mode, which sees what autograd saved, without marks
        if name in MIXING or getattr(function, "namespace", "") == "aten" or not any(on) or all(on):
            return
        apart = [t for t, here in zip(given, on) if not here and not t.is_meta and (t.dim() or name in STRICT)]
        is_in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
        if apart or is_in_place and not on[0] or "out" in kwargs and not on_gpu(kwargs["out"]):
            shapes = [(str(GPU if here else CPU), *t.shape) for t, here in zip(given, on)]
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
                               f"and cpu! ({name} of {shapes})")

    def check_index(self, tensor, index):
        is_tuple = isinstance(index, tuple) or isinstance(index, list) and not all(isinstance(i, int) for i in index)
        for i in index if is_tuple else [index]:
            if not on_gpu(tensor):
                if isinstance(i, torch.Tensor) and on_gpu(i):
                    raise RuntimeError("indices should be either on cpu or on the same device as the tensor")
            elif isinstance(i, list) or isinstance(i, torch.Tensor) and i.dim() and not on_gpu(i):
                self.wait("index from the host")
            elif isinstance(i, torch.Tensor) and (i.dtype == torch.bool or not i.dim()):
                self.wait("index by a mask" if i.dim() else "index by a number on the device")

    def wait(self, what):
        """Count a wait of the host, by the first line of code that is neither torch's nor ours."""
        frame, here = sys._getframe(), (str(Path(torch.__file__).parent), __file__, "<")
        while frame.f_back and frame.f_code.co_filename.startswith(here):
            frame = frame.f_back
        self.waits[f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}: {what}"] += 1


class Generator(torch._C.Generator):
    """torch.Generator(device), which draws the CPU's numbers."""
    device = property(lambda self: torch.device(self.kind))

    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu")
        self.kind = torch.device(device).type
        return self


class Event:
    """An event or a stream: nothing runs beside anything here."""

    def __init__(self, *_, **__):
        self.record_event = Event

    def record(self, *_):
        pass

    synchronize = wait = wait_event = wait_stream = record


def patches(waits, count):
    """(object, attribute, value): torch.cuda with so many GPUs, and places where marks would be lost."""
    cuda, make_subclass, backward = torch.cuda, torch.Tensor._make_subclass, torch.autograd._engine_run_backward
    group = torch._C._group_tensors_by_device_and_dtype
    gpu = types.SimpleNamespace(name=NAME, total_memory=85_014_740_992, major=9, minor=0)
    values = {"is_available": True, "is_initialized": True, "is_bf16_supported": True, "device_count": count,
              "current_device": 0, "set_device": None, "synchronize": None, "get_device_name": NAME,
              "is_current_stream_capturing": False, "get_device_properties": gpu, "memory_allocated": 2 ** 30,
              "max_memory_allocated": 2 ** 31, "reset_peak_memory_stats": None}
    for name, value in values.items():
        yield cuda, name, lambda *_, value=value, **__: value
    for name in ("Stream", "Event", "current_stream"):
        yield cuda, name, Event
    for name in ("stream", "device"):
        yield cuda, name, contextlib.nullcontext

    def run_backward(*args, **kwargs):  # its hooks and recomputation are the program's own
        with PretendGPU(waits):
            return backward(*args, **kwargs)

    def make_marked_subclass(cls, data, requires_grad=False, **kwargs):  # such as a parameter
        out = make_subclass(cls, data, requires_grad, **kwargs)
        return mark(out) if on_gpu(data) else out

    def group_by_device(lists, with_indices=False):
        return {(GPU if any(map(on_gpu, leaves(found[0]))) else device, dtype): found
                for (device, dtype), found in group(lists, with_indices).items()}

    for name in ("_cuda_graph_capture_health_check", "_accelerator_graph_capture_health_check"):
        if hasattr(torch.optim.Optimizer, name):  # they ask the driver
            yield torch.optim.Optimizer, name, lambda self: None
    collectives = torch.distributed.fsdp._fully_shard._fsdp_collectives
    if hasattr(collectives, "record_grad_output_stream"):  # from 2.15 on
        yield collectives, "record_grad_output_stream", lambda buffer, stream: None
    yield torch, "Generator", Generator
    yield torch.autograd, "_engine_run_backward", run_backward
    yield torch.Tensor, "_make_subclass", staticmethod(make_marked_subclass)
    yield torch._C, "_group_tensors_by_device_and_dtype", group_by_device
    yield dist, "init_process_group", functools.partial(dist.init_process_group, "cpu:gloo,cuda:gloo")


@contextlib.contextmanager
def gpu(count=1):
    """Within, torch has `count` GPUs. Gives a Counter of places where the host waited."""
    waits = collections.Counter()
    with contextlib.ExitStack() as stack:
        for place, name, value in patches(waits, count):
            stack.enter_context(mock.patch.object(place, name, value))
        stack.enter_context(mock.patch.dict(torch.utils.checkpoint._allowed_determinism_checks_to_fns,
                                            default=lambda x: (x.shape, x.dtype)))
        stack.enter_context(PretendGPU(waits))
        yield waits


if __name__ == "__main__":
    script, *sys.argv[1:] = sys.argv[1:]
    sys.path.insert(0, str(Path(script).resolve().parent))
    with gpu(count=8):
        runpy.run_path(script, run_name="__main__")
