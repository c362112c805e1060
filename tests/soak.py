"""A soak: SFT, then diffu-GRPO, two processes, killed at a random moment about once a minute. Not part of the suite.

    python tests/soak.py --minutes 20

Each life ends by one of: SIGKILL to one process, SIGKILL to all, SIGTERM to all (a scheduler's pre-emption). The next
life is the same command with --resume. Prints what each life did and lost; ends with exit code 1 if anything but
repeated steps was lost.
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
SFT = ["train_sft.py", "--task", "countdown", "sudoku", "--count", 4000, "--steps", 100_000, "--save_every", 20,
       "--eval_every", 50]
GRPO = ["train_grpo.py", "--task", "countdown", "--steps", 10_000, "--save_every", 1, "--eval_count", 16,
        "--group_size", 4, "--prompts_per_step", 4]


def workers(torchrun):
    """Process ids of torchrun's children (Linux)."""
    return [int(pid) for task in Path(f"/proc/{torchrun}/task").iterdir()
            for pid in (task / "children").read_text().split()]


def steps_of(out):
    """Steps in the log; a torn last line does not count."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def live(command, log, seconds, how, rng):
    """Run until `seconds` have passed, then end it; 60 s are given to leave. Returns whether it had to be forced."""
    with open(log, "a") as file:
        job = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    time.sleep(seconds)
    if job.poll() is not None:
        raise SystemExit(f"error: the run ended by itself, see {log}")
    children = workers(job.pid)
    if how == "SIGKILL to one":
        os.kill(rng.choice(children), signal.SIGKILL)
    elif how == "SIGKILL to all":
        for pid in (job.pid, *children):
            os.kill(pid, signal.SIGKILL)
    else:
        job.terminate()
    try:
        job.wait(60)
        return False
    except subprocess.TimeoutExpired:
        for pid in (job.pid, *children):
            os.kill(pid, signal.SIGKILL)
        job.wait()
        return True


def soak(words, out, minutes, every, rng):
    """Lives of one script. Returns (lives, steps repeated, faults)."""
    log, command = out.with_suffix(".log"), [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2,
                                             *words, "--out", out, "--resume"]
    end, lives, repeated, faults = time.monotonic() + 60 * minutes, 0, 0, 0
    while time.monotonic() < end:
        before, how = steps_of(out), rng.choice(["SIGKILL to one", "SIGKILL to all", "SIGTERM to all"])
        forced = live(list(map(str, command)), log, rng.uniform(0.5, 1.5) * every, how, rng)
        after = steps_of(out)
        whole = after == list(range(1, len(after) + 1))
        resumed = [line for line in log.read_text().splitlines() if line.startswith("resumed from")]
        at = int(resumed[-1].rsplit("_", 1)[1]) if before and resumed else 0
        lives, repeated, faults = lives + 1, repeated + max(0, len(before) - at), faults + forced + (not whole)
        print(f"{words[0]:14} life {lives:2d}: {len(before):5d} steps logged before, went on from {at:5d}, reached "
              f"{len(after):5d}, ended by {how}{', HAD TO BE FORCED' if forced else ''}"
              f"{'' if whole else ', LOG HAS GAPS OR DOUBLES'}", flush=True)
    return lives, repeated, faults


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=20)
    p.add_argument("--every", type=float, default=60, help="seconds between kills, on average")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    rng, folder = random.Random(args.seed), Path(tempfile.mkdtemp(prefix="soak-"))
    found = [soak(words, folder / name, args.minutes / 2, args.every, rng)
             for words, name in ((SFT, "sft"), (GRPO, "grpo"))]
    lives, repeated, faults = map(sum, zip(*found))
    print(f"{lives} lives, {repeated} steps done twice, {faults} faults; logs in {folder}")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
