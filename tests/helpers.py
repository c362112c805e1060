"""Shared by the tests: reference tensors, small models, and ways to run a script."""
import functools
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from model import LLaDA

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"


@functools.cache
def tensors(path):
    """{name: tensor} of a reference file below tests/golden. Shared between tests: do not change them in place."""
    return load_file(GOLDEN / path)


@functools.cache
def reference_model(name, dtype=torch.float32):
    """A tiny reference model, llada_mha or llada_gqa. Shared between tests: do not change it."""
    return LLaDA.from_pretrained(GOLDEN / name, dtype=dtype).eval()


def worst(actual, expected):
    """The largest absolute difference; NaN where anything is NaN, so that `worst(...) < tolerance` fails."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    return float((actual - expected).abs().max())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def run_script(*words, processes=1, timeout=300, **environment):
    """Run a script of the repository to its end. Returns a CompletedProcess with stdout and stderr as text."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run([*launcher, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
