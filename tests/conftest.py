"""The import path and the models that tests may change."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # plain `pytest` imports model, d1, ... as well

from helpers import GOLDEN  # noqa: E402
from model import LLaDA  # noqa: E402

torch.set_num_threads(1)  # the models here are tiny: threads cost more than they give


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes seconds; leave out with -m 'not slow'")


@pytest.fixture
def fresh():
    """A model of the test's own, in float64, so that equalities hold to rounding."""
    return LLaDA.from_pretrained(GOLDEN / "llada_mha", dtype=torch.float64)
