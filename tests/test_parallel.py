"""Several processes give the numbers of one process, also where each resumes what the other saved.

Under torchrun this file is a script: `worker` runs everything on all processes of one launch, and the tests compare.
"""
import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import PROBLEMS, ROOT, assert_same_run, embedded, read_rows, read_tensors, run_script, train, worst
from safetensors.torch import load_file, save_file

import train_grpo
import train_sft
from parallel import Processes, Stopped, clip_and_step, gathered, parallelise, processes
from run import Run
from variants import grpo

ALONE = Processes(0, 1, torch.device("cpu"), torch.float32)
RUNS = {  # two steps, of which both are saved; 5 held-out problems: processes have unequally many
    "grpo": (train_grpo, f"--data {PROBLEMS} --eval_count 5 --eval_every 1 --save_every 1"),
    "grpo with LoRA": (train_grpo, f"--data {PROBLEMS} --lora_r 3 --lr 1e-3 --save_every 1"),
    "trajectory": (grpo, f"--data {PROBLEMS} --estimator trajectory --save_every 1"),
    "sft": (train_sft, "--task countdown --lr 1e-4 --save_every 1 --microbatch 1"),
    "sft with LoRA": (train_sft, "--task countdown --lr 1e-4 --save_every 1 --lora_r 3"),
}
HYBRID = ("grpo", "sft with LoRA")  # with replicas, too


def folder_of(name, out):
    return Path(out) / name.replace(" ", "_")


def run(name, out, more=""):
    script, options = RUNS[name]
    train(script, folder_of(name, out), f"{options} {more}")


# ---------------------------------------------------------------- on all processes of a launch

def worker(out, replicas, resumed=""):
    """All that is run on several processes. resumed: a folder of runs that one process saved."""
    args = train_sft.parse_args("--device cpu --timeout 120".split())
    with processes(args) as procs:
        work_unequally(procs, out, int(replicas))
        stop_together(procs)
        for script in (train_grpo, train_sft):  # one group of processes for all runs
            script.processes = lambda *_: contextlib.nullcontext(procs)
        for name in RUNS if resumed else HYBRID:
            run(name, out, f"--replicas {replicas}")
            if resumed:
                run(name, resumed, "--resume")
        stop_where_one_process_has_no_finite_loss(procs, out)
        start_unlike(procs, out)


def start_unlike(procs, out):
    """Options, data and weights that differ between processes are named, with the ranks, before the first step."""
    shutil.copytree(ROOT / "data" / "tiny", Path(out, f"model{procs.rank}"))
    for fault, options, data in (("lr 0.{n}", f"--lr 0.{procs.rank}1", 1), ("checksum of data [0-9]+", "", procs.rank),
                                 (r"sizes of weights \[[0-9]+\]", "", 1)):
        args = train_sft.parse_args(f"--device cpu --out {out}/unlike-{fault[:2]} {options}".split())
        run = Run("train_sft", args, procs)
        if "weights" in fault:
            run.checkpoint = Path(out, f"model{procs.rank}")
            if procs.rank:
                os.truncate(run.checkpoint / "model.safetensors", 1000)
        words = rf"rank 0 has \['{fault.format(n='01')}'\], rank 1 has \['{fault.format(n='11')}'\]"
        with pytest.raises(SystemExit, match=words if procs.is_main else "^1$"):
            run.compare([data])


def work_unequally(procs, out, replicas):
    """Inside `gathered` a process makes as many forward passes as it likes; then training goes on."""
    args = train_sft.parse_args(f"--device cpu --replicas {replicas} --out {out}/unequal".split())
    model, ids = Run("train_sft", args, procs).load_model(), torch.arange(40).view(2, 20)
    with torch.no_grad(), gathered(model):
        inside = [model(ids[:, :20 - i]) for i in range(1 + 2 * procs.rank)][0]
    model(ids, targets=ids).mean().backward()
    assert procs.world == 1 or all(hasattr(p, "full_tensor") for p in model.parameters())  # sharded again
    grads = {name: getattr(p.grad, "full_tensor", lambda: p.grad)() for name, p in model.named_parameters()}
    if procs.is_main:
        save_file({"inside": inside, **grads}, Path(out) / "unequal.safetensors")


def stop_together(procs):
    """A signal to the last process ends the work of all."""
    with pytest.raises(Stopped), procs.stoppable():
        procs.stop_wanted = procs.rank == procs.world - 1
        procs.check_stop()
    procs.stop_wanted = False


def stop_where_one_process_has_no_finite_loss(procs, out):
    def objective(logps, *_):
        return logps.sum() * (float("nan") if procs.rank == procs.world - 1 else 1), {}
    with pytest.raises(RuntimeError, match="norm.* is non-finite"):
        train(train_grpo, Path(out, "stopped"), f"--steps 1 --data {PROBLEMS}", objective=objective)
    assert not list(Path(out, "stopped").glob("step_*"))


# ---------------------------------------------------------------- fixtures: a launch each

@pytest.fixture(scope="module")
def one(tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    work_unequally(ALONE, out, 1)
    for name in RUNS:
        run(name, out)
    return out


def without_the_last_step(runs, to):
    """A copy of finished runs from which the last checkpoint is gone."""
    for name in RUNS:
        folder = shutil.copytree(folder_of(name, runs), folder_of(name, to))
        shutil.rmtree(folder / "step_000002")
        (folder / "summary.json").unlink()
    return to


@pytest.fixture(scope="module")
def two(one, tmp_path_factory):
    """Two processes, which also go on with the runs of one."""
    out = tmp_path_factory.mktemp("two")
    resumed = without_the_last_step(one, out / "resumed")
    done = run_script(__file__, out, 1, resumed, processes=2, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("diffu-GRPO on 6 prompts") == 7  # the main process prints, the other does not
    return out


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Four processes with two copies of the model (HSDP)."""
    out = tmp_path_factory.mktemp("four")
    done = run_script(__file__, out, 2, processes=4, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    return out


# ---------------------------------------------------------------- the tests

@pytest.mark.slow
@pytest.mark.parametrize("many, name", [*(("two", name) for name in RUNS), *(("four", name) for name in HYBRID)])
def test_many_processes_give_the_run_of_one(one, many, name, request):
    assert_same_run(folder_of(name, one), folder_of(name, request.getfixturevalue(many)), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_what_one_process_saved_two_resume_and_the_other_way(one, two, name, tmp_path, capsys):
    assert_same_run(folder_of(name, one), folder_of(name, two / "resumed"), 1e-5)
    resumed = without_the_last_step(two, tmp_path)
    run(name, resumed, "--resume")
    assert "step_000001" in capsys.readouterr().out
    assert_same_run(folder_of(name, one), folder_of(name, resumed), 1e-5)
    for runs, parts in ((one, 1), (two, 2)):  # every process saves its own part of the optimizer
        assert len(list(folder_of(name, runs).glob("step_000002/optimizer/*.safetensors"))) == parts


@pytest.mark.slow
@pytest.mark.parametrize("many", ["two", "four"])
def test_processes_sample_freely_and_then_train_as_one(one, many, request):
    expected, actual = (load_file(runs / "unequal.safetensors") for runs in (one, request.getfixturevalue(many)))
    assert expected.keys() == actual.keys()
    assert max(worst(actual[name], expected[name]) for name in expected) < 1e-5


@pytest.mark.slow
def test_a_process_that_fails_or_hangs_ends_the_job(tmp_path):
    script = ("import signal, sys\nsys.path.insert(0, {root!r})\nfrom parallel import processes\nimport train_sft\n"
              "with processes(train_sft.parse_args(['--device', 'cpu', '--timeout', '5'])) as procs:\n"
              "    if procs.rank == 1:\n        {deed}\n    procs.sum(1)\n")
    jobs, started = {}, time.monotonic()
    for words, deed in (("the first cause", "raise ValueError('the first cause')"), ("imed out", "signal.pause()")):
        path = tmp_path / f"{len(jobs)}.py"
        path.write_text(script.format(root=str(ROOT), deed=deed))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(path)]
        jobs[words] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True,
                                       env={**os.environ, "OMP_NUM_THREADS": "1"})
    for words, job in jobs.items():
        stderr = job.communicate(timeout=120)[1]
        assert job.returncode != 0 and words in stderr, stderr[-3000:]
    assert time.monotonic() - started < 90


def test_work_is_divided_evenly_or_refused():
    second = Processes(1, 2, torch.device("cpu"), torch.float32)
    assert list(second.share(4, "--prompts_per_step")) == [2, 3]
    with pytest.raises(SystemExit, match="^error: --prompts_per_step 5 does not divide[^\n]* 2 processes"):
        second.share(5, "--prompts_per_step")
    args, four = train_sft.parse_args(["--replicas", "3"]), Processes(0, 4, torch.device("cpu"), torch.float32)
    with pytest.raises(SystemExit, match="^error: --replicas 3 [^\n]* 4 processes"):
        parallelise(embedded()[0], args, four)


def test_gradients_are_clipped_and_a_norm_that_is_not_finite_changes_nothing():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.tensor([3.0, 4.0])
    assert clip_and_step(optimizer, 0.5) == 5
    assert weight.tolist() == pytest.approx([-0.3, -0.4]) and weight.grad is None
    weight.grad = torch.tensor([float("nan"), 1.0])
    with pytest.raises(RuntimeError, match="norm.* is non-finite"):
        clip_and_step(optimizer, 0.5)
    assert weight.tolist() == pytest.approx([-0.3, -0.4])


@pytest.mark.parametrize("script", [train_grpo, train_sft])
def test_bfloat16_does_not_lose_small_updates(tmp_path, script):
    """All weights: computed in bfloat16, kept in float32. A step of 1e-6 is far below bfloat16's resolution."""
    train(script, tmp_path / "run", "--task countdown --dtype bfloat16 --lr 1e-6 --steps 1 --weight_decay 0")
    before, after = read_tensors(ROOT / "data" / "tiny"), read_tensors(tmp_path / "run" / "step_000001")
    moved = torch.cat([(after[name].float() - before[name].float()).abs().flatten() for name in before])
    assert (moved > 0.5e-6).float().mean() > 0.2 and moved.max() < 2.5e-6
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("options", ["", "--lora_r 4"])
def test_before_the_first_update_the_kl_is_zero_in_bfloat16_too(tmp_path, options):
    train(train_grpo, tmp_path / "run", f"--data {PROBLEMS} --dtype bfloat16 --steps 1 --num_iterations 1 {options}")
    [row] = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert row["kl"] == 0 and row["clip_fraction"] == 0 and row["grad_norm"] > 0


if __name__ == "__main__":
    worker(*sys.argv[1:])
