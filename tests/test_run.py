"""What a run must survive: kills, signals, damaged files, a second run in its folder. It goes on to the bit."""
import errno
import fcntl
import functools
import gc
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
from helpers import PROBLEMS, ROOT, assert_same_run, read_rows, read_tensors, run_script, train

import train_grpo
import train_sft
from parallel import Stopped, processes

SMALL = "--steps 3 --save_every 1 --eval_every 2"
RUNS = {
    "grpo": (train_grpo, f"{SMALL} --data {PROBLEMS} --eval_count 3"),
    "grpo with LoRA": (train_grpo, f"{SMALL} --data {PROBLEMS} --lora_r 2 --lr 1e-3"),
    "sft": (train_sft, f"{SMALL} --task countdown --warmup 2"),
    "sft with LoRA": (train_sft, f"{SMALL} --task countdown --lora_r 2"),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A function that starts or resumes a run of RUNS, and that gives the folder of one that nothing interrupted."""
    shared = tmp_path_factory.mktemp("uninterrupted")

    def start(name, out, more=""):
        script, options = RUNS[name]
        train(script, out, f"{options} {more}")

    @functools.cache
    def folder(name):
        start(name, shared / name.replace(" ", "_"))
        return shared / name.replace(" ", "_")

    return start, folder


@pytest.fixture(scope="module")
def crashed(uninterrupted, tmp_path_factory):
    """The folder of the SFT run with LoRA, which crashed in step 3: it has the checkpoints of steps 1 and 2."""
    out = tmp_path_factory.mktemp("crashed") / "run"

    def train_step(step, *args, **options):
        assert step < 2, "crashed"
        return work(step, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        work = train_sft.train_step
        patch.setattr(train_sft, "train_step", train_step)
        with pytest.raises(AssertionError, match="crashed"):
            uninterrupted[0]("sft with LoRA", out)
    return out


@pytest.fixture
def crash(crashed, uninterrupted, tmp_path):
    """A copy of that folder, a function that resumes the run there, and the folder it should become."""
    start, folder = uninterrupted
    out = shutil.copytree(crashed, tmp_path / "run")
    return out, lambda more="": start("sft with LoRA", out, f"--resume {more}"), folder("sft with LoRA")


# ---------------------------------------------------------------- kills and signals

def kill_when(appears, start, log):
    """Run start() in a fork and kill it as soon as a file is there."""
    child = os.fork()  # not a new process, which would first import torch
    if not child:
        with open(log, "w") as sys.stdout, open(log, "w") as sys.stderr:
            try:
                start()
            finally:
                os._exit(0)
    until = time.monotonic() + 60
    while not appears.exists() and time.monotonic() < until:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name, moments", [  # after a checkpoint, and while it is written
    ("grpo", ["step_000001"]), ("grpo with LoRA", ["step_000001.tmp/adapter_model.safetensors", "step_000002"]),
    ("sft", ["step_000002.tmp/optimizer"]), ("sft with LoRA", ["step_000002"])])
def test_a_run_that_was_killed_goes_on_to_the_bit(uninterrupted, tmp_path, name, moments):
    start, folder = uninterrupted
    out = tmp_path / "run"
    for moment in moments:
        kill_when(out / moment, functools.partial(start, name, out, "--resume"), tmp_path / "log")
        assert not (out / "summary.json").exists()
    start(name, out, "--resume")
    assert_same_run(folder(name), out)
    assert not list(out.glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("name, function, calls, steps", [  # during which call the signal comes
    ("grpo", "evaluate", 1, 0), ("grpo", "complete", 2, 1), ("grpo", "clip_and_step", 3, 2),
    ("grpo", "evaluate", 3, 2), ("sft", "held_out_loss", 1, 0), ("sft", "clip_and_step", 1, 1)])
def test_a_signal_anywhere_leaves_a_checkpoint_and_costs_nothing(
        uninterrupted, tmp_path, monkeypatch, capsys, name, function, calls, steps):
    start, folder = uninterrupted
    module, seen, work = RUNS[name][0], [], getattr(RUNS[name][0], function)

    def interrupted(*args, **options):
        seen.append(1)
        if len(seen) == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return work(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, function, interrupted)
        try:
            start(name, tmp_path / "run", "--save_every 0")
        except SystemExit as stopped:
            assert stopped.code == 143
        else:
            raise AssertionError("the run did not stop")
    gc.collect()  # the traceback held the run, and so its lock
    last_line = capsys.readouterr().out.strip().splitlines()[-1]
    assert f"step {steps}" in last_line and "--resume" in last_line
    assert [path.name for path in (tmp_path / "run").glob("step_*")] == [f"step_{steps:06d}"] * (steps > 0)
    start(name, tmp_path / "run", "--resume")
    assert_same_run(folder(name), tmp_path / "run")


def test_a_second_ctrl_c_ends_at_once():
    with pytest.raises(KeyboardInterrupt), processes(train_sft.parse_args(["--device", "cpu"])) as procs:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # a scheduler may repeat itself
            os.kill(os.getpid(), number)
        raise AssertionError("the interrupt did not come")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # afterwards signals do what they always do
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    with pytest.raises(SystemExit) as stopped, processes(train_sft.parse_args(["--device", "cpu"])) as procs:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped), procs.stoppable():
            pass  # work that never looked is stopped at its end
        procs.check_stop()
    assert stopped.value.code == 143


def test_a_hangup_stops_like_other_signals_but_not_under_nohup():
    for handler, is_stopped in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
        before = signal.signal(signal.SIGHUP, handler)
        try:
            with processes(train_sft.parse_args(["--device", "cpu"])) as procs:
                os.kill(os.getpid(), signal.SIGHUP)
            assert procs.stop_wanted == is_stopped and signal.getsignal(signal.SIGHUP) == handler
        finally:
            signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_reader_that_closes_its_pipe_does_not_end_a_run(tmp_path):
    words = f"--task countdown --count 200 --batch_size 8 --warmup 0 --lora_r 2 --steps 6 --out {tmp_path / 'run'}"
    run = subprocess.Popen([sys.executable, "-u", "train_sft.py", *words.split()], cwd=ROOT, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.readline()
    run.stdout.close()
    assert "Traceback" not in run.communicate()[1] and run.returncode == 0
    assert (tmp_path / "run" / "summary.json").exists() and (tmp_path / "run" / "step_000006").exists()


@pytest.mark.slow
def test_torchrun_ends_with_our_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    words = ("-m", "torch.distributed.run", "train_sft.py", "--task", "countdown", "--device", "cpu")
    run = run_script(*words, "--out", tmp_path)
    assert run.returncode == 1
    *_, last, border = [line for line in run.stderr.splitlines() if line.strip()]
    assert last.endswith(f"error: --out {tmp_path} holds a run: continue it with --resume, or name another folder")
    assert set(border) == {"="}


# ---------------------------------------------------------------- checkpoints

def test_a_checkpoint_is_a_model_folder_with_its_optimizer_and_no_pickle(crash):
    out, resume, _ = crash
    assert sorted(path.name for path in out.glob("step_*")) == ["step_000001", "step_000002"]
    files = [path for path in (out / "step_000002").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    tensors = read_tensors(out / "step_000002")
    moments = [name for name in tensors if name.endswith(("exp_avg", "exp_avg_sq"))]
    assert len(moments) == 2 * sum("adapter" in name for name in tensors)
    steps = [tensor for name, tensor in tensors.items() if name.startswith("optimizer") and name not in moments]
    assert steps and all(float(step) == 2 for step in steps)
    resume()
    assert sorted(path.name for path in out.glob("step_*")) == ["step_000002", "step_000003"]


def remove(path):
    path.unlink()


def overwrite(path):
    path.write_bytes(b"\xff" * path.stat().st_size)


def empty(path):
    path.write_text("{}")


def cut_short(path):
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage, file", [
    (cut_short, "adapter_model.safetensors"), (remove, "adapter_model.safetensors"), (remove, "files.json"),
    (overwrite, "files.json"), (empty, "files.json"), (overwrite, "adapter_model.safetensors"),
    (overwrite, "optimizer/*.safetensors"), (remove, "tokenizer.json"), (cut_short, "optimizer/*.safetensors")])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(crash, capsys, damage, file):
    out, resume, expected = crash
    [path] = (out / "step_000002").glob(file)
    damage(path)
    resume()
    assert f"resumed from {out / 'step_000001'}" in capsys.readouterr().out
    assert_same_run(expected, out)


def test_without_a_sound_checkpoint_nothing_is_overwritten(crash):
    out, resume, _ = crash
    for path in out.glob("step_*/files.json"):
        path.unlink()
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="^error: --out [^\n]*: remove step_000001 step_000002$"):
        resume()
    assert (out / "metrics.jsonl").read_bytes() == before


def test_folders_with_other_names_are_nobodys_business(crash):
    out, resume, expected = crash
    names = ("step_best", "step_best2", "step_000001_v1", "step_9", "step_000009.tmp.old", "xstep_000007",
             "step_000007", "step_000008", "step_0000002")  # copies under the names of other steps
    for name in names:
        shutil.copytree(out / "step_000001", out / name)
    (out / "step_1000000").mkdir()  # a step like any other, and damaged
    resume()
    assert all((out / name / "files.json").exists() for name in names)
    assert (out / "step_000003").exists()  # what was just written stays
    shutil.rmtree(out / "step_1000000")
    for name in names:
        shutil.rmtree(out / name)
    assert_same_run(expected, out)


def test_a_folder_in_the_way_of_a_checkpoint_is_set_aside(crash):
    out, resume, expected = crash
    (out / "step_000003").mkdir()
    (out / "step_000003" / "notes").write_text("mine")
    resume()
    assert [path.read_text() for path in out.glob("step_000003.*/notes")] == ["mine"]
    shutil.rmtree(next(out.glob("step_000003.*")))
    assert_same_run(expected, out)


def test_a_resumed_run_notices_that_its_data_changed(tmp_path):
    rows, options = tmp_path / "rows.jsonl", f"--data {tmp_path / 'rows.jsonl'} --lora_r 2 --save_every 1 --steps"
    for answer in "bc":
        rows.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": answer}) + "\n" for i in range(70)))
        if answer == "b":
            train(train_sft, tmp_path / "run", f"{options} 2")
    shutil.rmtree(tmp_path / "run" / "step_000002")
    with pytest.raises(SystemExit, match="^error: --out [^\n]* was run on other data[^\n]*$"):
        train(train_sft, tmp_path / "run", f"{options} 2 --resume")
    assert not (tmp_path / "run" / "step_000002").exists()


def test_files_are_as_readable_as_the_umask_says(uninterrupted, tmp_path):
    before = os.umask(0o027)
    try:
        uninterrupted[0]("sft with LoRA", tmp_path / "run", "--steps 1")
    finally:
        os.umask(before)
    paths = [path for path in (tmp_path / "run").rglob("*") if path.name != ".lock"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_file()} == {0o640}
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_dir()} == {0o750}


# ---------------------------------------------------------------- the folder

def test_logs_are_cut_back_to_the_checkpoint(crash):
    out, resume, expected = crash
    with open(out / "metrics.jsonl", "ab") as log:
        log.write(b'{"step": 3, "minutes": 1.0, "loss": 7.0, "text": "a line end \xe2\x80\xa8 in a text"}\n')
        log.write('{"step": 4, "text": "é'.encode()[:-1])  # killed while it wrote, within a character
    (out / "samples.jsonl").write_text('{"step": 3, "minutes": 1.0}\n')
    resume()
    assert_same_run(expected, out)


def test_two_runs_in_one_folder_are_refused(crash):
    out, resume, _ = crash
    before = (out / "config.json").read_bytes()
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="^error: --out [^\n]*another process"):
            resume()
    assert (out / "config.json").read_bytes() == before
    with pytest.raises(SystemExit, match="^error: --out [^\n]*--resume"):  # and a run is not begun over another
        train(train_grpo, out)


def test_where_the_disk_has_no_locks_a_note_is_printed(crash, monkeypatch, capsys):
    out, resume, expected = crash

    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    resume()
    assert "cannot be locked" in "".join(capsys.readouterr())
    assert_same_run(expected, out)


@pytest.mark.parametrize("option", ["--lr 0.5", "--seed 6", "--dtype bfloat16", "--batch_size 4", "--lora_r 3",
                                    "--task sudoku"])
def test_a_resumed_run_cannot_change_what_is_learnt(crash, option):
    out, resume, _ = crash
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit, match=f"^error: --out [^\n]*{option.split()[0]}[^\n]*$"):
        resume(option)
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_resumed_run_may_change_how_it_is_computed(crash):
    out, resume, expected = crash
    resume("--save_every 0 --microbatch 3 --checkpoint_activations --timeout 60")
    assert_same_run(expected, out, 1e-5)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    minutes = [row["minutes"] for row in rows]
    assert minutes == sorted(minutes)  # the clock of the whole run, over both lives


@pytest.mark.slow
def test_a_finished_rl_run_may_be_made_longer(uninterrupted, tmp_path):
    start, folder = uninterrupted
    start("grpo with LoRA", tmp_path / "run", "--steps 2")
    start("grpo with LoRA", tmp_path / "run", "--resume")
    assert_same_run(folder("grpo with LoRA"), tmp_path / "run")


def test_a_run_that_is_resumed_when_finished_stays_as_it_is(uninterrupted, tmp_path):
    start, folder = uninterrupted
    out = shutil.copytree(folder("sft with LoRA"), tmp_path / "run")
    start("sft with LoRA", out, "--resume")
    assert_same_run(folder("sft with LoRA"), out)
    assert len(read_rows(out / "metrics.jsonl")) == len(read_rows(folder("sft with LoRA") / "metrics.jsonl"))
