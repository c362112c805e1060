"""A soak: SFT, then diffu-GRPO, on two processes, killed at a random moment about once a minute.

    python tools/soak.py --minutes 20

Each life of a run ends by SIGKILL to one process, SIGKILL to all, or SIGTERM to all (a scheduler's pre-emption). The
next life is the same command with --resume. Prints what each life did and lost. Ends with exit code 1 if anything but
repeated steps was lost. Linux only.
"""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SFT = "train_sft.py --task countdown sudoku --count 4000 --steps 100000 --save_every 5 --eval_every 50 --device cpu"
GRPO = ("train_grpo.py --task countdown --steps 10000 --save_every 1 --eval_every 20 --eval_count 16 --group_size 4 "
        "--prompts_per_step 4 --device cpu")
ENDS = ("SIGKILL to one", "SIGKILL to all", "SIGTERM to all")


def workers(torchrun):
    """Process ids of torchrun's children."""
    children = [task / "children" for task in Path(f"/proc/{torchrun}/task").iterdir()]
    return [int(pid) for file in children for pid in file.read_text().split()]


def logged_steps(out):
    """The steps in a run's log: the lines with a loss, without the evaluations and a torn last line."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row["step"] for row in rows if "loss" in row]


def has_gaps_or_doubles(steps):
    return steps != list(range(1, len(steps) + 1))


def resumed_at(log):
    """The step at which the newest life of a run began: that of the last line "resumed from RUN/step_000120"."""
    steps = [line.rsplit("_", 1)[1] for line in log.read_text().splitlines() if line.startswith("resumed from")]
    return int(steps[-1]) if steps else 0


def live(command, log, seconds, end, rng):
    """Run for some seconds, then end the run; 60 s are given to leave. Returns whether it had to be forced."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        job = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=environment)
    time.sleep(seconds)
    if job.poll() is not None:
        raise SystemExit(f"error: the run ended by itself, see {log}")
    children = workers(job.pid)
    if end == "SIGKILL to one":
        os.kill(rng.choice(children), signal.SIGKILL)
    elif end == "SIGKILL to all":
        kill([job.pid, *children])
    else:
        job.terminate()
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


def soak(words, out, minutes, every, rng):
    """Many lives of one run. Returns (lives, steps done twice, faults)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words.split(),
               "--out", str(out), "--resume"]
    deadline = time.monotonic() + 60 * minutes
    lives = repeated = faults = 0
    while time.monotonic() < deadline:
        before, end = logged_steps(out), rng.choice(ENDS)
        lives += 1
        log = out.with_name(f"{out.name}-{lives}.log")
        is_forced = live(command, log, rng.uniform(0.5, 1.5) * every, end, rng)
        after, start = logged_steps(out), resumed_at(log)
        repeated += max(0, len(before) - start)
        checks = {"HAD TO BE FORCED": is_forced, "LOG HAS GAPS OR DOUBLES": has_gaps_or_doubles(after),
                  "LOST STEPS": len(after) < start}
        found = [fault for fault, is_so in checks.items() if is_so]
        faults += len(found)
        print(f"{words.split()[0]:14} life {lives:2d}: {len(before):5d} steps before, went on from {start:5d}, "
              f"reached {len(after):5d},", ", ".join([end, *found]), flush=True)
    return lives, repeated, faults


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--every", type=float, default=60, help="seconds between kills, on average")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng, folder = random.Random(args.seed), Path(tempfile.mkdtemp(prefix="soak-"))
    counts = [soak(words, folder / name, args.minutes / 2, args.every, rng)
              for words, name in ((SFT, "sft"), (GRPO, "grpo"))]
    lives, repeated, faults = map(sum, zip(*counts))
    print(f"{lives} lives, {repeated} steps done twice, {faults} faults; logs in {folder}")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
