"""Shared by the tests: the import path, and where the reference tensors lie."""
import functools
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that plain `pytest` imports model, d1, ... as `python -m pytest` does

from model import LLaDA  # noqa: E402

torch.set_num_threads(1)  # the models here are tiny: threads cost more than they give


def golden(path):
    """A reference file: the full collection beside the repository if it is there, else the part in tests/golden."""
    full = ROOT.parent / "shared" / "golden" / path
    return full if full.exists() else ROOT / "tests" / "golden" / path


@functools.cache
def tensors(path):
    """{name: tensor} of a reference file. Shared between tests: do not change them in place."""
    return load_file(golden(path))


@functools.cache
def reference(name, dtype=torch.float32):
    """A tiny reference model, llada_mha or llada_gqa. Shared between tests: do not change it."""
    return LLaDA.from_pretrained(golden(name), dtype=dtype)


def worst(got, want):
    """The largest absolute difference; NaN where anything is NaN, so that `worst(...) < tolerance` fails."""
    assert got.shape == want.shape and got.dtype == want.dtype, (got.shape, want.shape, got.dtype, want.dtype)
    return float((got - want).abs().max())


@pytest.fixture
def fresh():
    """A model of one's own to change: float64, so that equalities hold to rounding."""
    return LLaDA.from_pretrained(golden("llada_mha"), dtype=torch.float64)
