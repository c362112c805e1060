"""The paper's experiment in miniature: its table, its ablations, and the estimators that came after it.

    python tests/experiments.py table                  run what is missing, write results/table.json, print the table
    python tests/experiments.py ablations --jobs 2     the same, two runs side by side, one thread each
    python tests/experiments.py variant fixed_masks --task countdown ...      train_grpo.py with one thing changed

A row is a list of plain commands, which you can run by hand just as well; those whose output is there already are not
repeated. Runs lie in runs/experiments, their logs beside them, and plot.py draws them.
"""
import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402
import train_grpo  # noqa: E402
from d1 import diffu_grpo_loss, generator  # noqa: E402

RUNS = "runs/experiments"
TASKS = ("countdown", "sudoku")
LAST = 5  # a run's result: the mean over its last steps
GRPO = "train_grpo.py --task {task} --seed {seed} --eval_count 0"
EXACT = GRPO + " --prompts_per_step 8"  # half the default
SHORT = EXACT + " --threshold 0.9"  # learns as well in half the time, see the samplers
EVALUATE = "sample.py --task {task} --count 256 --gen_length 24 32 48 --model "
SFT = ("train_sft.py --task countdown sudoku --split corrected --count 500 --steps 80 --batch_size 32 --lr 1e-4 "
       "--warmup 0 --seed {seed}")


# ---------------------------------------------------------------- variants: what a fork would change

def fixed_masks(lengths, width, step, mine, args):
    """One pattern of masked prompt positions for all updates of all steps; everything else is drawn afresh."""
    masks = torch.zeros(len(lengths), args.num_iterations, args.masks_per_prompt, width, dtype=torch.bool)
    draws = torch.rand(args.masks_per_prompt, width, generator=generator(args.seed, "fixed mask"))
    for row, length in enumerate(lengths):
        masks[row, ..., width - length:] = (draws < args.p_mask_prompt)[:, :length]
    return masks


def mask_per_completion(policy, rollout, part, updates, args, mask_id, log_probs=train_grpo.log_probs):
    """The authors' layout, completion g under mask g alone: needs --masks_per_prompt equal to --group_size."""
    logps = log_probs(policy, rollout, part, updates, args, mask_id)  # (n, m, G, G, L)
    return logps.diagonal(dim1=2, dim2=3).movedim(-1, 2)[:, :, None]  # (n, m, 1, G, L)


def sequence_mean(logps, old_logps, ref_logps, advantages, mask, epsilon, beta, token_count):
    """The paper's eq. 4: the mean over completions of each one's mean over tokens. One process, one micro-batch."""
    parts = []
    for n, g in torch.cartesian_prod(*map(torch.arange, advantages.shape)).tolist():
        one = [x if x is None else x[n:n + 1, :, g:g + 1] for x in (logps, old_logps, ref_logps)]
        counted = mask[n:n + 1, :, g:g + 1]
        parts.append(diffu_grpo_loss(*one, advantages[n:n + 1, g:g + 1], counted, epsilon, beta,
                                     counted.sum().clamp(min=1) * advantages.numel()))
    stats = {name: (max if name.startswith("max_") else sum)(part[name] for _, part in parts) for name in parts[0][1]}
    return sum(loss for loss, _ in parts), stats


def gumbel_bfloat16(logits, temperature, uniform, mask_id):
    """LLaDA's sampling, exp(logits) / (-log u) ** temperature, with the noise in bfloat16 instead of float64."""
    logits = logits.clone()
    logits[..., mask_id] = -torch.inf
    if not temperature:
        return logits.argmax(-1)
    g = torch.Generator(logits.device).manual_seed(int(uniform.sum() * 2 ** 40))  # one number makes V of them
    noise = torch.rand(logits.shape, generator=g, device=logits.device, dtype=torch.bfloat16)
    return (logits.bfloat16().exp() / (-noise.log()) ** temperature).argmax(-1)


VARIANTS = {  # name: (where, under what name, what stands there instead)
    "fixed_masks": (vars(train_grpo), "draw_prompt_masks", fixed_masks),
    "mask_per_completion": (vars(train_grpo), "log_probs", mask_per_completion),
    "sequence_mean": (train_grpo.OBJECTIVES, "grpo", sequence_mean),
    "gumbel_bfloat16": (vars(sample), "choose", gumbel_bfloat16),
}

# ---------------------------------------------------------------- rows: {label: [commands]}


def variant(name):
    return SHORT.replace("train_grpo.py", f"tests/experiments.py variant {name}")


EXPERIMENTS = {
    "table": {
        "base": [EVALUATE + "data/tiny"],
        "+ SFT": [SFT, EVALUATE + "<0>/step_000080"],
        "+ diffu-GRPO": [SHORT, EVALUATE + "<0>/step_000020"],
        "+ SFT + diffu-GRPO": [SFT, SHORT + " --model <0>/step_000080", EVALUATE + "<1>/step_000020"],
    },
    "estimators": {
        "one_step": [SHORT],
        **{name: [f"{SHORT} --estimator {name}"] for name in ("random_mask", "coupled", "trajectory")},
        **{name: [f"{SHORT} --objective {name}"] for name in ("sequence", "wd1")},
    },
    "samplers": {
        "exact": [EXACT],
        "threshold": [SHORT],
        "threshold and cache": [SHORT + " --cache dual"],
    },
    "ablations": {  # the telling ones first
        "as default": [SHORT],
        "mask per completion": [variant("mask_per_completion") + " --masks_per_prompt 6"],
        **{f"K {k}": [f"{SHORT} --masks_per_prompt {k}"] for k in (6, 2)},
        **{f"mu {mu}": [f"{SHORT} --num_iterations {mu}"] for mu in (1, 12, 2, 8)},
        "fixed masks, mu 12": [variant("fixed_masks") + " --num_iterations 12"],
        **{f"p {p:g}": [f"{SHORT} --p_mask_prompt {p}"] for p in (0, 0.5, 0.7, 0.3)},
        "sequence mean": [variant("sequence_mean")],
        "Gumbel in bfloat16": [variant("gumbel_bfloat16")],
    },
}

# ---------------------------------------------------------------- running and collecting

def out_of(command):
    """The folder of a command's output, named after its words, short enough for a file system."""
    given = [word for word in shlex.split(command) if word not in ("tests/experiments.py", "variant")]
    name = "_".join(word.removeprefix("--").removesuffix(".py") for word in given).replace("/", "-")
    return f"{RUNS}/{name}" if len(name) < 160 else f"{RUNS}/{name[:150]}-{sha256(name.encode()).hexdigest()[:8]}"


def resolve(commands, task, seed):
    """The commands of a row for a task and a seed; <0>, <1> stand for the folders of the first, the second."""
    done = []
    for command in commands:
        command = command.format(task=task, seed=seed)
        for number, earlier in enumerate(done):
            command = command.replace(f"<{number}>", earlier[1])
        done.append((command, out_of(command)))
    return done


def run(command, out, threads):
    """One command with --out, unless it has run; its output goes to <out>.log. A failure ends the experiment."""
    if (ROOT / out / "summary.json").exists():
        return
    (ROOT / out).parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, *shlex.split(command), "--out", out, "--resume"]
    with open(ROOT / f"{out}.log", "a") as log:
        code = subprocess.run(words, cwd=ROOT, stdout=log, stderr=log,
                              env={**os.environ, "OMP_NUM_THREADS": str(threads)}).returncode
    if code:
        raise SystemExit(f"error: {command} failed, see {out}.log")
    print("done:", command, flush=True)


def run_all(rows, tasks, seeds, jobs):
    """Every command of every row once; all first commands before all second ones, since those build on them."""
    plans = [resolve(commands, task, seed) for commands in rows.values() for task in tasks for seed in seeds]
    with ThreadPoolExecutor(jobs) as pool:
        for stage in range(max(map(len, plans))):
            commands = dict(plan[stage][::-1] for plan in plans if len(plan) > stage)  # {out: command}
            list(pool.map(lambda item: run(item[1], item[0], max(1, (os.cpu_count() or 1) // jobs)), commands.items()))


def result_of(out):
    """What a finished run says: accuracies by length of an evaluation, or the curve of a training."""
    summary = json.loads((ROOT / out / "summary.json").read_text())
    if "results" in summary:
        return {f"length {r['gen_length']}": r["accuracy"] for r in summary["results"]}
    rows = [json.loads(line) for line in open(ROOT / out / "metrics.jsonl")]
    last = {name: statistics.mean(row[name] for row in rows[-LAST:]) for name in ("reward", "accuracy")}
    return {**last, "seconds": statistics.median(sum(row["seconds"].values()) for row in rows),
            "curve": [round(row["accuracy"], 4) for row in rows]}


def collect(rows, tasks, seeds):
    """[{row, task, commands, values: {name: one per seed}, mean, spread}]; spread is the sample standard deviation.

    Of a training: reward and accuracy of the rollouts over its last steps; "seconds", the median step's, by which
    "accuracy in equal time" looks up how far it was when the first row ended.
    """
    found, first = [], {}
    for label, commands in rows.items():
        for task in tasks:
            results = [result_of(resolve(commands, task, seed)[-1][1]) for seed in seeds]
            values = {name: [result[name] for result in results] for name in results[0]}
            if "curve" in values:
                seconds = statistics.median(values["seconds"])
                values["seconds"] = [seconds]
                steps = min(len(curve) for curve in values["curve"])
                share = first.setdefault(task, seconds) / seconds  # of its steps; clocks within 5% count as equal
                done = steps if share > 0.95 else max(1, round(steps * share))
                values["accuracy in equal time"] = [statistics.mean(curve[max(0, done - LAST):done])
                                                    for curve in values["curve"]]
            numbers = {name: v for name, v in values.items() if name != "curve"}
            found.append({"row": label, "task": task, "commands": resolve(commands, task, "SEED"), "values": values,
                          "mean": {name: statistics.mean(v) for name, v in numbers.items()},
                          "spread": {name: statistics.stdev(v) for name, v in numbers.items() if len(v) > 1}})
    return found


def show(found):
    """The rows as a table for the README: mean and spread, in per cent, and the seconds of a step."""
    for row in found:
        cells = [f"{mean:.1f} s" if name == "seconds" else f"{name} {100 * mean:.1f}" +
                 (f" ± {100 * row['spread'][name]:.1f}" if name in row["spread"] else "")
                 for name, mean in row["mean"].items()]
        print(f"| {row['task']} | {row['row']} | {' | '.join(cells)} |")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("experiment", choices=sorted(EXPERIMENTS))
    p.add_argument("--tasks", nargs="+", default=None, choices=TASKS)
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--jobs", type=int, default=1, help="runs side by side, which share the cores")
    p.add_argument("--rows", nargs="+", help="only these")
    return p.parse_args(argv)


def main(args):
    rows = {label: c for label, c in EXPERIMENTS[args.experiment].items() if not args.rows or label in args.rows}
    tasks = args.tasks or (("countdown",) if args.experiment in ("ablations", "samplers") else TASKS)
    run_all(rows, tasks, args.seeds, args.jobs)
    found = collect(rows, tasks, args.seeds)
    show(found)
    if not args.rows:
        (ROOT / "results").mkdir(exist_ok=True)
        command = f"python tests/experiments.py {args.experiment} --seeds {' '.join(map(str, args.seeds))}"
        (ROOT / f"results/{args.experiment}.json").write_text(json.dumps(
            {"command": command, "device": f"CPU, {os.cpu_count()} cores, float32", "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["variant"]:
        place, name, function = VARIANTS[sys.argv[2]]
        place[name] = function
        train_grpo.main(train_grpo.parse_args(sys.argv[3:]))
    else:
        main(parse_args())
