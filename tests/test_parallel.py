"""Checkpoints, a run's folder, signals: what a run must survive."""
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, golden, worst

import parallel
import train_grpo
import train_sft
from model import Config, LLaDA
from parallel import (Processes, Run, Signals, Stopped, checkpoint_fault, compile_blocks, compile_time, load_optimizer,
                      save_optimizer)
from sample import generate

ALONE = Processes(0, 1, torch.device("cpu"))
OPTIONS = {"task": "countdown", "steps": 4, "lr": 0.1, "resume": False}


def save(run, step, value=0.0, unlogged=None):
    def tensors(into, whole):
        parallel.save_file({"w/exp_avg": whole(torch.full((3,), value))}, into / "optimizer.safetensors")
    run.tensors, run.state = [tensors], run.state | {"step": step, "unlogged": unlogged}
    return run.save()


def restore(run):
    model = torch.nn.ParameterDict({"w": torch.zeros(3)})
    return run.restore(model, torch.optim.AdamW(model.parameters()), lambda *_, **__: None, lambda *_, **__: None,
                       lambda into: (into / "tokenizer.json").write_text("{}"))


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run", OPTIONS, ALONE)
    restore(run)
    return run


def resumed(run, **changes):
    """The folder opened again, after the process that held it ended."""
    run.lock.close()
    return Run(run.out, {**OPTIONS, **changes}, ALONE, resume=True, fixed=("task",)).open()


# ---------------------------------------------------------------- checkpoints

def test_the_newest_whole_checkpoint_is_found_and_two_are_kept(run):
    folders = [save(run, step) for step in (1, 2, 3)]
    assert [folder.exists() for folder in folders] == [False, True, True]
    assert resumed(run).checkpoint == folders[2]
    assert {p.name for p in folders[2].iterdir()} == {"tokenizer.json", "optimizer.safetensors", "state.json",
                                                      "run.json", "complete.json"}
    options = json.loads((folders[2] / "run.json").read_text())
    assert options["options"] == OPTIONS and options["versions"]["torch"] == torch.__version__


def test_files_are_as_readable_as_the_umask_says(run):
    before = os.umask(0o027)
    try:
        folder = save(run, 1)
    finally:
        os.umask(before)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o640 for path in folder.iterdir() if path.name != "complete.json")


def no_marker(folder):
    (folder / "complete.json").unlink()


def shorter(folder):
    data = (folder / "optimizer.safetensors").read_bytes()
    (folder / "optimizer.safetensors").write_bytes(data[:-4])


def one_bit(folder):
    data = bytearray((folder / "optimizer.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "optimizer.safetensors").write_bytes(data)


def no_optimizer(folder):
    (folder / "optimizer.safetensors").unlink()


def no_state(folder):
    (folder / "state.json").unlink()


@pytest.mark.parametrize("damage, words", [
    (no_marker, "not complete"), (shorter, "optimizer.safetensors is damaged"),
    (one_bit, "optimizer.safetensors is damaged"), (no_state, "state.json is missing"),
    (no_optimizer, "optimizer.safetensors is missing")])
def test_a_damaged_checkpoint_is_skipped_and_named(run, capsys, damage, words):
    good, bad = save(run, 1), save(run, 2)
    damage(bad)
    (run.out / "step_000003.tmp").mkdir()  # left over by a run that was killed
    assert words in checkpoint_fault(bad) and checkpoint_fault(good) is None
    assert resumed(run).checkpoint == good
    shown = capsys.readouterr().out
    assert f"skipped {bad}" in shown and words in shown


def test_damaged_checkpoints_do_not_push_out_whole_ones(run):
    good = save(run, 1)
    no_marker(save(run, 2))
    save(run, 3)
    assert good.exists()


def test_a_full_disk_leaves_the_checkpoint_before(run, monkeypatch):
    good = save(run, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(parallel, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(run, 2)
    assert resumed(run).checkpoint == good


def test_a_disk_that_fills_up_ends_the_run_and_leaves_the_checkpoint_before(tmp_path):
    """The real script, where no file may grow over a megabyte from the second step on."""
    limited = ("import resource, signal, sys, train_sft\n"
               "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
               "if '--resume' in sys.argv: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
               "train_sft.main(train_sft.parse_args())")
    words = [sys.executable, "-c", limited, "--task", "countdown", "--count", "40", "--batch_size", "4", "--save_every",
             "1", "--device", "cpu", "--out", str(tmp_path / "run"), "--steps"]
    first = subprocess.run([*words, "1"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert first.returncode == 0, first.stderr
    second = subprocess.run([*words, "2", "--resume"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert second.returncode != 0 and "File too large" in second.stderr
    assert checkpoint_fault(tmp_path / "run" / "step_000001") is None
    assert not (tmp_path / "run" / "step_000002").exists()


def test_a_checkpoint_written_twice_stays_as_it_was(run):
    folder = save(run, 1, value=1.0)
    mark = json.loads((folder / "complete.json").read_text())
    save(run, 1, value=2.0)
    assert json.loads((folder / "complete.json").read_text()) == mark and checkpoint_fault(folder) is None
    one_bit(folder)
    save(run, 1, value=2.0)
    assert json.loads((folder / "complete.json").read_text()) != mark and checkpoint_fault(folder) is None


def trained(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_the_optimizer_comes_back_to_the_bit(tmp_path, monkeypatch):
    with torch.random.fork_rng():
        (one, first), (two, second) = trained(0), trained(1)
    monkeypatch.setattr(parallel, "MAX_FILE_BYTES", 20)  # a file for weight, the rest for bias
    save_optimizer(one, first, tmp_path, ALONE.whole)
    assert {p.name for p in tmp_path.iterdir()} == {"optimizer-1.safetensors", "optimizer.safetensors"}
    load_optimizer(two, second, tmp_path)
    two.load_state_dict(one.state_dict())
    for model, optimizer in ((one, first), (two, second)):
        optimizer.zero_grad()
        model(torch.arange(3.0)).pow(2).sum().backward()
        optimizer.step()
    assert torch.equal(one.weight, two.weight) and torch.equal(one.bias, two.bias)
    (tmp_path / "optimizer.safetensors").unlink()
    with pytest.raises(ValueError, match="optimizer state and trained parameters differ in bias"):
        load_optimizer(two, trained()[1], tmp_path)


# ---------------------------------------------------------------- a run's folder

def test_a_run_is_not_overwritten(run):
    with pytest.raises(ValueError, match="holds a run already: go on with --resume"):
        Run(run.out, OPTIONS, ALONE)


def test_changed_options_are_listed_and_structural_ones_refused(run, capsys):
    assert resumed(run, lr=0.2).checkpoint is None  # nothing saved yet: it starts again
    assert "resumed with another --lr: 0.1 -> 0.2" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--task was 'countdown' in .* and is 'sudoku'"):
        resumed(run, task="sudoku")


def test_a_disk_that_not_all_nodes_share_is_named(run):
    save(run, 1)

    class Elsewhere(Processes):
        def gather(self, items):
            return ["step_000001"] if items == [None] else items
    with pytest.raises(ValueError, match="rank 1 does not see .*step_000001: --out must be on a shared disk"):
        Run(run.out / "mount", OPTIONS, Elsewhere(1, 2, torch.device("cpu")), resume=True).open()


def test_two_runs_do_not_write_in_one_folder(run):
    with pytest.raises(ValueError, match="another process is writing there"):
        Run(run.out, OPTIONS, ALONE, resume=True).open()
    assert resumed(run).lock


def test_a_folder_that_cannot_be_made_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Run(tmp_path / "file" / "run", OPTIONS, ALONE).open()


@pytest.mark.parametrize("unlogged, kept", [(None, [1, 2]), ([{"step": 2}, []], [1])])
def test_the_log_is_cut_back_to_the_checkpoint(run, unlogged, kept):
    for step in (1, 2, 3):
        run.log("metrics.jsonl", [{"step": step, "text": "another line end \u2028 in a text"}])
    with open(run.out / "metrics.jsonl", "ab") as log:
        log.write('{"step": 4, "text": "é'.encode()[:-1])  # killed while it wrote, within a character
    save(run, 2, unlogged=unlogged)
    run.lock.close()
    state = restore(Run(run.out, OPTIONS, ALONE, resume=True))
    assert (state["step"], state["unlogged"]) == (2, unlogged)
    assert [json.loads(line)["step"] for line in (run.out / "metrics.jsonl").read_text().split("\n")[:-1]] == kept


METRICS = [{"step": step, "loss": 1.0 / step, "seconds": {"rollout": 2.0, "update": 3.0}} for step in (1, 2, 3)]


def log_and_resume(out):
    """A run that logs three steps with --tensorboard, loses what lies behind its checkpoint of the first, goes on."""
    run = Run(out, {**OPTIONS, "tensorboard": True}, ALONE)
    restore(run)
    run.log("metrics.jsonl", METRICS)
    run.log("samples.jsonl", [{"step": 1, "completion": "no number"}])
    save(run, 1)
    run.lock.close()
    run = Run(out, {**OPTIONS, "tensorboard": True}, ALONE, resume=True)
    restore(run)
    run.log("metrics.jsonl", [{"step": 2, "loss": 7.0}])
    return run


def test_metrics_go_to_tensorboard_too(tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, *scalar):
            calls.append(scalar)

        def flush(self):
            calls.append("flush")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    log_and_resume(tmp_path / "run")
    steps = [[("loss", 1.0 / step, step), ("seconds/rollout", 2.0, step), ("seconds/update", 3.0, step), "flush"]
             for step in (1, 2, 3)]
    assert calls == [(tmp_path / "run", 1), *sum(steps, []), (tmp_path / "run", 2), ("loss", 7.0, 2), "flush"]
    calls.clear()

    class Other(Processes):
        def gather(self, items):
            return items
    other = Run(tmp_path / "other", {**OPTIONS, "tensorboard": True}, Other(1, 2, torch.device("cpu")))
    restore(other)
    other.log("metrics.jsonl", METRICS)
    assert not calls  # only the main process writes


def test_tensorboard_reads_what_was_written(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator",
                                 reason="tensorboard is not installed")
    found = reader.EventAccumulator(str(log_and_resume(tmp_path / "run").out)).Reload()
    assert set(found.Tags()["scalars"]) == {"loss", "seconds/rollout", "seconds/update"}
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 1.0), (2, 7.0)]


@pytest.mark.parametrize("script", [train_sft, train_grpo])
def test_without_tensorboard_nothing_begins(tmp_path, monkeypatch, script):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    words = ["--task", "countdown", "--tensorboard", "--device", "cpu", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match=r"^error: --tensorboard [^\n]*pip install tensorboard$"):
        script.main(script.parse_args(words))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- signals

def test_a_signal_drops_what_is_droppable_and_handlers_come_back(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with Signals(ALONE) as signals:
        with signals.droppable() as check:
            check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            with signals.droppable() as check:
                check()
                raise AssertionError("check() did not stop the work")
        with pytest.raises(Stopped), signals.droppable():
            pass  # work that never looked: stopped at its end
        left = []
        monkeypatch.setattr(os, "_exit", left.append)
        os.kill(os.getpid(), signal.SIGTERM)
        assert left == []  # a scheduler may repeat itself
        os.kill(os.getpid(), signal.SIGINT)
        assert left == [130]
    assert signal.getsignal(signal.SIGTERM) is before


# ---------------------------------------------------------------- processes that go wrong

WORKER = """
import os, signal, sys, time
from types import SimpleNamespace
import torch
sys.path.insert(0, {root!r})
from parallel import parallelise, processes
with processes("cpu", timeout=5) as procs:
    model = torch.nn.Linear(4, 4)
    model.blocks = []
    parallelise(model, SimpleNamespace(replicas=1, compile=False, checkpoint_activations=False), procs, torch.float32)
    model(torch.ones(1, 4)).sum().backward()
    if procs.rank == 1:
        {deed}
    model(torch.ones(1, 4))
"""


@pytest.mark.parametrize("deed, words", [
    ("raise ValueError('the first cause')", "the first cause"),
    ("os.kill(os.getpid(), signal.SIGKILL)", "Signal 9"),
    ("time.sleep(120)", "did not arrive within --timeout 5 s"),
    ("raise SystemExit('error: said in one line')", "error: said in one line")])
def test_a_process_that_goes_wrong_ends_the_job(tmp_path, deed, words):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), deed=deed))
    start = time.monotonic()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, script], capture_output=True, text=True, timeout=90,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode != 0 and time.monotonic() - start < 60
    assert words in done.stderr, done.stderr


# ---------------------------------------------------------------- compiled blocks

@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="compiling for a CPU needs g++")
def test_compiled_blocks_give_the_numbers_of_plain_ones():
    """Gradients and tokens; names of the parameters do not change, so neither do checkpoints. One block: one's time."""
    config = Config.from_dict(json.loads(golden("llada_gqa/config.json").read_text()) | {"n_layers": 1})
    plain, compiled = (LLaDA(config).init_weights(torch.Generator().manual_seed(0)) for _ in range(2))
    compile_blocks(compiled)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    ids, found = torch.arange(40).view(2, 20), []
    for model in (plain, compiled):
        model(ids, keep=slice(10, 20), targets=ids[:, 10:]).sum().backward()
        done = generate(model, ids, mask_id=500, gen_length=4, diffusion_steps=2, block_length=4)
        found.append((done.ids, [p.grad for p in model.parameters()]))
    assert torch.equal(found[0][0], found[1][0])
    assert all(worst(one, two) < 1e-4 * max(1, one.abs().max()) for one, two in zip(found[0][1], found[1][1]))
    assert float(compile_time().split()[2]) > 0
