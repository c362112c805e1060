"""What the programs around share: random weights, clocks, counts of arithmetic, tables."""
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from model import copy_into


def init_weights(model, generator):
    """Random weights: normal(0, init_std), smaller by sqrt(2 layers) into the residual stream.

    generator: on the model's device or on the CPU, where the draws are then made.
    """
    for name, parameter in model.named_parameters():
        weights = torch.ones(parameter.shape, device=generator.device)  # of a norm
        if parameter.dim() > 1:
            into_residual = ".blocks." in name and ("attn_out" in name or "ff_out" in name)
            divisor = (2 * model.config.n_layers) ** 0.5 if into_residual else 1.0
            weights.normal_(0.0, model.config.init_std / divisor, generator=generator)
        copy_into(parameter, weights)


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work, device):
    """How long work() takes, on a GPU until it is idle again."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def by_turns(works, rounds, device, limit=float("inf")):
    """{name: median seconds} of {name: function}, run by turns after a first run of each that does not count.

    Where the first function takes over `limit` seconds, the first runs are the only ones.
    """
    first = {name: seconds(work, device) for name, work in works.items()}
    if next(iter(first.values())) > limit:
        return first
    times = [{name: seconds(work, device) for name, work in works.items()} for _ in range(rounds)]
    return {name: statistics.median(turn[name] for turn in times) for name in works}


def peak_flops(device, dtype):
    """Floating-point operations per second of a large matrix product: the machine's own limit."""
    size = 8192 if device.type == "cuda" else 1536
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size ** 3 / min(seconds(lambda: matrix @ matrix, device) for _ in range(5))


def peak_memory(work):
    """The bytes that work() needs on the GPU above what lies there already."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def count_flops(work):
    """The floating-point operations of work() in matrix products, and in attention where torch counts it."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def print_table(rows):
    """Print dicts of texts as columns, the first column to the left, the others to the right."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([row.get(name, "") for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:]))]
        print("  ".join(cells).rstrip())
