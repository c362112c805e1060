"""Shared by the tests: reference tensors, small models, and ways to run a script."""
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.tokenizer import Tokenizer
from model import LLaDA

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
# six Countdown problems: two steps of four prompts go through them and begin again
PROBLEMS = ROOT / "tests" / "problems.jsonl"
MASK_ID, EOS_ID = 500, 481  # of the models there


@functools.cache
def tensors(path):
    """{name: tensor} of a reference file below tests/golden. Shared between tests: do not change them in place."""
    return load_file(GOLDEN / path)


@functools.cache
def reference_model(name, dtype=torch.float32):
    """A tiny reference model, llada_mha or llada_gqa. Shared between tests: do not change it."""
    return LLaDA.from_pretrained(GOLDEN / name, dtype=dtype).eval()


@functools.cache
def embedded():
    """The model of data/tiny and its tokenizer. Shared between tests: do not change it."""
    model = LLaDA.from_pretrained("data/tiny").eval()
    return model, Tokenizer.from_folder(ROOT / "data" / "tiny", model.config)


def worst(actual, expected):
    """The largest absolute difference; NaN where anything is NaN, so that `worst(...) < tolerance` fails."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    return float((actual - expected).abs().max())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def run_script(*words, processes=1, timeout=300, cwd=ROOT, **environment):
    """Run a script from `cwd` to its end. Returns a CompletedProcess with stdout and stderr as text."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run([*launcher, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


# ---------------------------------------------------------------- runs of the training scripts

EVERYWHERE = "--seed 5 --steps 2 --eval_every 50 --save_every 0 --device cpu"
SMALL = {  # the options of a run of seconds; what a test adds wins
    "train_grpo": "--task countdown --prompts_per_step 4 --group_size 4 --num_iterations 2 --gen_length 32 "
                  "--diffusion_steps 8 --eval_count 0",
    "train_sft": "--batch_size 8 --count 200 --warmup 0",
    "variants.grpo": "--task countdown --prompts_per_step 4 --group_size 4 --num_iterations 2 --gen_length 32 "
                     "--threshold 0.9 --eval_count 0",
}


def train(script, out, options="", **methods):
    """Run train_grpo or train_sft in this process, with some of its options in one text. Returns what `main` does."""
    words = f"{EVERYWHERE} {SMALL[script.__name__]} --out {out} {options}"
    return script.main(script.parse_args(words.split()), **methods)


def read_rows(path):
    """The rows of a .jsonl file, but for the time."""
    rows = map(json.loads, path.read_text(encoding="utf-8").split("\n")[:-1])  # texts hold other line ends
    return [{name: value for name, value in row.items() if name != "minutes"} for row in rows]


def read_tensors(folder):
    """Every tensor below a folder, {"file name": tensor}."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{path.relative_to(folder)} {name}": tensor for path in files for name, tensor in load_file(path).items()}


def assert_same_log(run, other, tolerance=0.0):
    rows, others = read_rows(run / "metrics.jsonl"), read_rows(other / "metrics.jsonl")
    assert len(rows) == len(others)
    for row, expected in zip(rows, others):
        assert row == pytest.approx(expected, rel=0, abs=tolerance)


def assert_same_run(run, other, tolerance=0.0):
    """Two runs have the same log, samples and last weights; without a tolerance also the same optimizer."""
    assert_same_log(run, other, tolerance)
    last, other_last = sorted(run.glob("step_*"))[-1], sorted(other.glob("step_*"))[-1]
    assert last.name == other_last.name
    tensors, others = read_tensors(last), read_tensors(other_last)
    if tolerance:  # other processes divide the optimizer in other ways
        tensors, others = ({k: v for k, v in x.items() if "optimizer" not in k} for x in (tensors, others))
    assert tensors.keys() == others.keys() and tensors
    assert max(worst(tensors[name], others[name]) for name in tensors) <= tolerance
    if (run / "samples.jsonl").exists():
        assert read_rows(run / "samples.jsonl") == read_rows(other / "samples.jsonl")
