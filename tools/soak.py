"""A soak: SFT, then diffu-GRPO, on two processes, killed and meddled with about twice a minute.

    python tools/soak.py --minutes 20

Each life of a run ends by SIGKILL to one process or to all, by SIGTERM or SIGHUP to all; at a random moment, while a
checkpoint is written, or as it gets its name. Between two lives somebody copies, damages or removes things in its
folder. Meanwhile others start a second run there, another option, one process unlike the other; merges and
evaluations are killed as well. The next life is the same command with --resume. Prints what each life did and lost.
Ends with exit code 1 if anything but repeated steps was lost, or let in what it must refuse. Linux only.
"""
import argparse
import collections
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import number  # noqa: E402

SFT = ("train_sft.py --task countdown sudoku --count 1000 --steps 100000 --save_every 5 --eval_every 50 --device cpu "
       "--lora_r 4 --batch_size 8")
GRPO = ("train_grpo.py --task countdown --steps 10000 --save_every 1 --eval_every 20 --eval_count 16 --group_size 2 "
        "--prompts_per_step 2 --gen_length 16 --device cpu")
ENDS = ("SIGKILL to one", "SIGKILL to all", "SIGTERM to all", "SIGHUP to all")
MOMENTS = ("at random", "while a checkpoint is written", "as a checkpoint gets its name")
FOREIGN = ("step_best", "step_000001_v1", "step_{:06d}", "notes")  # names for copies of a checkpoint
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


# ---------------------------------------------------------------- what is in a folder

def workers(torchrun):
    """Process ids of torchrun's children."""
    children = [task / "children" for task in Path(f"/proc/{torchrun}/task").iterdir()]
    return [int(pid) for file in children for pid in file.read_text().split()]


def logged_losses(out):
    """[(step, loss)] of a run's log, without the evaluations and a torn last line."""
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def has_gaps_or_doubles(steps):
    return steps != list(range(1, len(steps) + 1))


def resumed_at(log):
    """The step at which the newest life of a run began: that of the last line "resumed from RUN/step_000120"."""
    steps = [line.rsplit("_", 1)[1] for line in log.read_text().splitlines() if line.startswith("resumed from")]
    return int(steps[-1]) if steps else 0


def contents(folder):
    """{name: size} of all files below a folder."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def checkpoints(out):
    return sorted(path for path in out.glob("step_*") if path.name[5:].isdigit())


# ---------------------------------------------------------------- a life and its end

def start(command, log):
    with open(log, "w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=ENVIRONMENT)


def wait_until_it_trains(job, log):
    """Wait until a job has loaded all; its log then says what it trains on."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and job.poll() is None and not re.search("SFT on|GRPO on", log.read_text()):
        time.sleep(0.1)


def wait_for(moment, out, job, seconds):
    """Wait some seconds, then for the moment, a minute at most."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.05)
    before, deadline = {path.name for path in out.glob("step_*")}, time.monotonic() + 60 * (moment != "at random")
    while time.monotonic() < deadline and job.poll() is None:
        new = {path.name for path in out.glob("step_*")} - before
        if any(name.endswith(".tmp") == (moment == MOMENTS[1]) for name in new):
            return
        time.sleep(0.001)


def end_life(job, end, rng):
    """End a job; 60 s are given to leave. Returns whether it had to be forced."""
    children = workers(job.pid)
    if end == "SIGKILL to one" and children:
        os.kill(rng.choice(children), signal.SIGKILL)
    elif end == "SIGKILL to all":
        kill([job.pid, *children])
    else:
        job.send_signal(signal.SIGHUP if "HUP" in end else signal.SIGTERM)
    try:
        job.wait(60)
    except subprocess.TimeoutExpired:
        kill([job.pid, *children])
        job.wait()
        return True
    return False


def kill(pids):
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


# ---------------------------------------------------------------- what others do

def meddle(out, rng):
    """Do to a run's folder what people and disks do. Returns what was done, and the copies with their contents."""
    found, copies = checkpoints(out), {}
    if not found:
        return "nothing", copies
    deed = rng.choice(("nothing", "copied", "cut short", "header damaged", "file removed", "log torn"))
    if deed == "copied":
        for name in FOREIGN:
            copy = out / name.format(int(found[-1].name[5:]) + rng.randint(1, 50))
            if not copy.exists():
                copies[copy] = contents(shutil.copytree(found[-1], copy))
    elif deed == "log torn":
        with open(out / "metrics.jsonl", "ab") as log:
            log.write(b'{"step": 1, "lo')
    elif deed != "nothing" and len(found) > 1:
        path = rng.choice([path for path in found[-1].rglob("*.safetensors")])
        if deed == "file removed":
            path.unlink()
        elif deed == "cut short":
            os.truncate(path, path.stat().st_size - 1)
        else:
            path.write_bytes(b"\xff" * path.stat().st_size)
    return deed, copies


def is_refused(command, log):
    """Whether a command ends with an error in one line."""
    job = start(command, log)
    try:
        return job.wait(180) != 0 and "error: " in log.read_text()
    except subprocess.TimeoutExpired:
        kill([job.pid])
        return False


def intrude(words, out, log, rng):
    """Try what must be refused beside a living run. Returns (what, whether it was refused and changed nothing)."""
    before = (out / "config.json").read_bytes() if (out / "config.json").exists() else b""
    deed = rng.choice(("second run", "second run resuming", "another option"))
    more = {"second run": [], "second run resuming": ["--resume"], "another option": ["--resume", "--seed", "7"]}[deed]
    refused = is_refused([sys.executable, *words, "--out", str(out), *more], log)
    after = (out / "config.json").read_bytes() if (out / "config.json").exists() else b""
    return deed, refused and before == after


def differ(words, out, log, port):
    """Start two processes with options that differ, as on two nodes. Returns whether both refused."""
    common = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]
    jobs = [start([*common, f"--node_rank={rank}", *words, "--out", str(out), "--lr", f"{1 + rank}e-4"],
                  log.with_suffix(f".{rank}")) for rank in range(2)]
    try:
        codes = [job.wait(180) for job in jobs]
    except subprocess.TimeoutExpired:
        for job in jobs:
            kill([job.pid])
        return False
    said = "".join(log.with_suffix(f".{rank}").read_text() for rank in range(2))
    return all(codes) and "lr 0.0001" in said and "lr 0.0002" in said


def interrupt_merge(out, folder, rng):
    """Kill a merge. Returns whether its folder is absent, or a whole model."""
    merged = folder / f"merged-{time.time_ns()}"
    command = [sys.executable, "tools/merge.py", "data/tiny", str(checkpoints(out)[-1]), str(merged)]
    job = start(command, folder / "merge.log")
    time.sleep(rng.uniform(2, 9))
    job.kill()
    job.wait()
    expected = {path.name for path in (ROOT / "data" / "tiny").glob("*.safetensors")}
    return not merged.exists() or expected <= set(contents(merged))


def interrupt_evaluation(folder, rng):
    """Kill an evaluation, and repeat it. Returns whether the second refuses, or gives every row."""
    out = folder / f"evaluation-{time.time_ns()}"
    words = ["sample.py", "--task", "countdown", "--count", "64", "--device", "cpu", "--out", str(out)]
    command = [sys.executable, *words]
    job = start(command, folder / "evaluation.log")
    time.sleep(rng.uniform(3, 12))
    job.kill()
    job.wait()
    job = start(command, folder / "evaluation.log")
    if job.wait() != 0:
        return "holds a run" in (folder / "evaluation.log").read_text()
    return len((out / "countdown_32.jsonl").read_bytes().splitlines()) == 64


# ---------------------------------------------------------------- many lives

def live(words, out, every, rng, lives):
    """One life of a run, and what happens around it. Returns the faults, counts, and steps done twice."""
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", *words, "--out", str(out), "--resume"]
    deed, copies = meddle(out, rng)
    before, end, moment = dict(logged_losses(out)), rng.choice(ENDS), rng.choice(MOMENTS)
    log = out.with_name(f"{out.name}-{lives}.log")
    job = start(command, log)
    intruder, was_refused = "nobody", True
    if rng.random() < 0.8:  # else the end may come while it loads
        wait_until_it_trains(job, log)
        if rng.random() < 0.3 and job.poll() is None:
            intruder, was_refused = intrude(words, out, log.with_suffix(".intruder"), rng)
    wait_for(moment, out, job, rng.uniform(0, 2) * every)
    ended = job.poll() is not None
    is_forced = not ended and end_life(job, end, rng)
    losses = logged_losses(out)
    steps, begun = [step for step, _ in losses], resumed_at(log)
    is_touched = any(files not in map(contents, out.glob(f"{copy.name}*")) for copy, files in copies.items())
    is_another = any(before.get(step, loss) != loss for step, loss in losses)
    checks = {"ENDED BY ITSELF": ended, "HAD TO BE FORCED": is_forced, "A COPY WAS TOUCHED": is_touched,
              "LOG HAS GAPS OR DOUBLES": has_gaps_or_doubles(steps), "LOST STEPS": len(steps) < begun,
              f"LET IN: {intruder}": not was_refused, "A REPEATED STEP IS ANOTHER": is_another}
    faults = [fault for fault, is_so in checks.items() if is_so]
    print(f"{words[0]:14} life {lives:2d}: {len(before):5d} steps before, {deed}, went on from {begun:5d}, reached "
          f"{len(steps):5d}, {end} {moment}, intruder: {intruder}", *faults, flush=True)
    for copy, files in copies.items():
        for folder in out.glob(f"{copy.name}*"):  # a copy in the way of a checkpoint is set aside under a longer name
            if contents(folder) == files:
                shutil.rmtree(folder)
    return faults, [f"folder {deed}", end, moment, f"intruder: {intruder}"], max(0, len(before) - begun)


def soak(words, out, minutes, every, rng):
    """Many lives of one run. Returns (counts of what happened, steps done twice, faults)."""
    deadline = time.monotonic() + 60 * minutes
    counts, repeated, faults = collections.Counter(), 0, []
    folder = out.parent
    counts["processes that differ"] += 1
    if not differ(words, folder / f"{out.name}-differ", folder / "differ.log", 29500 + rng.randint(0, 400)):
        faults.append("PROCESSES THAT DIFFER WERE LET IN")
    while time.monotonic() < deadline and "ENDED BY ITSELF" not in faults:
        counts["lives"] += 1
        new_faults, events, twice = live(words, out, every, rng, counts["lives"])
        counts.update(events)
        if rng.random() < 0.2 and "train_sft.py" in words and checkpoints(out):
            counts["merge killed"] += 1
            new_faults += [] if interrupt_merge(out, folder, rng) else ["HALF A MERGE"]
        if rng.random() < 0.2:
            counts["evaluation killed"] += 1
            new_faults += [] if interrupt_evaluation(folder, rng) else ["HALF AN EVALUATION"]
        faults += new_faults
        repeated += twice
    return counts, repeated, faults


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=number(float, 0.1), default=20)
    parser.add_argument("--every", type=number(float, 1), default=15, help="seconds between kills, on average")
    parser.add_argument("--seed", type=number(), default=0)
    args = parser.parse_args(argv)
    rng, folder = random.Random(args.seed), Path(tempfile.mkdtemp(prefix="soak-"))
    counts, repeated, faults = collections.Counter(), 0, []
    for words, name in ((SFT, "sft"), (GRPO, "grpo")):
        events, twice, new_faults = soak(words.split(), folder / name, args.minutes / 2, args.every, rng)
        counts.update(events)
        repeated += twice
        faults += new_faults
    print(", ".join(f"{name} {count}" for name, count in counts.items()))
    print(f"{counts['lives']} lives, {repeated} steps done twice, {len(faults)} faults {faults}; logs in {folder}")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
