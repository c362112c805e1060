"""The paper's experiment in miniature: its table, its ablations, and the estimators that came after it.

    python tools/experiments.py table                  run what is missing, write docs/results/table.json, print it
    python tools/experiments.py ablations --jobs 2     the same, two runs side by side, one thread each

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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import number  # noqa: E402

RUNS = "runs/experiments"
TASKS = ("countdown", "sudoku")
LAST = 5  # a training's result is the mean over its last steps
GRPO = "--task {task} --seed {seed} --eval_count 0 --prompts_per_step 8"  # half the default
SHORT = f"variants/grpo.py {GRPO} --threshold 0.9"  # learns as well in half the time, see the samplers
MEASURED = SHORT.replace("--eval_count 0", "--eval_count 256 --eval_every 0")  # held-out problems, at the end
HABITS = SHORT.replace("variants/grpo.py", "tools/behaviours.py")
HELD_OUT = {"greedy_before": "greedy before", "greedy_after": "held-out greedy", "accuracy_after": "held-out"}
HABIT_NAMES = ("guess", "worked", "untagged")
SFT = ("train_sft.py --task countdown sudoku --split corrected --count 500 --steps 80 --batch_size 32 --lr 1e-4 "
       "--warmup 0 --seed {seed}")

BEFORE_TOO = MEASURED.replace("--eval_every 0", "--eval_every 20") + " --model <0>/step_000080"


def evaluate(model):
    """The commands that evaluate a model at three lengths."""
    return [f"sample.py --task {{task}} --count 256 --gen_length {length} --model {model}" for length in (24, 32, 48)]


# {experiment: {row: commands}}; <0>, <1> stand for the folders of a row's first and second command
EXPERIMENTS = {
    "table": {
        "base": evaluate("data/tiny"),
        "+ SFT": [SFT, *evaluate("<0>/step_000080")],
        "+ diffu-GRPO": [SHORT, *evaluate("<0>/step_000020")],
        "+ SFT + diffu-GRPO": [SFT, SHORT + " --model <0>/step_000080", *evaluate("<1>/step_000020")],
    },
    "estimators": {
        "one_step": [SHORT],
        **{name: [f"{SHORT} --estimator {name}"] for name in ("random_mask", "coupled", "trajectory")},
        "sequence": [SHORT + " --objective sequence"],  # as published: see PUBLISHED in variants/objectives.py
        "sequence, d1's epsilon and beta": [SHORT + " --objective sequence --epsilon 0.5 --beta 0.04"],
        "wd1": [SHORT + " --objective wd1"],
        "wd1, mean, d1's beta": [SHORT + " --objective wd1_mean --beta 0.04"],
    },
    "two_by_two": {  # of ESPO's paper: ratio, and what it is read from
        "token, one step": [MEASURED],
        "sequence, one step": [MEASURED + " --objective espo --estimator one_step"],
        "sequence, ELBO": [MEASURED + " --objective espo"],
        "token, one step, no KL": [MEASURED + " --beta 0"],
        "token, ELBO, no KL": [MEASURED + " --estimator elbo --beta 0"],  # k3 of weighted tokens overflows at last
        "sequence, one step, no KL": [MEASURED + " --objective espo --estimator one_step --beta 0"],
        "sequence, ELBO, no KL": [MEASURED + " --objective espo --beta 0"],
    },
    "methods": {  # as published, see PUBLISHED in variants/estimators.py and objectives.py
        "diffu-GRPO": [MEASURED],
        "wd1": [MEASURED + " --objective wd1"],
        "GSPO": [MEASURED + " --objective sequence"],
        "UniGRPO": [MEASURED + " --estimator random_mask"],
        "coupled-GRPO": [MEASURED + " --estimator coupled"],
        "StepMerge": [MEASURED + " --estimator trajectory"],
        "AGRPO": [MEASURED + " --estimator sampled_rounds --masks_per_prompt 4"],  # 24 of 128 rounds; here of some 20
        "ELBO, no KL": [MEASURED + " --estimator elbo --beta 0"],  # with d1's token ratio
        "ESPO": [MEASURED + " --objective espo"],
        "SPG": [MEASURED + " --objective spg"],
        "StableDRL": [MEASURED + " --objective stabledrl"],
        "JustGRPO": [MEASURED.replace("grpo.py", "just_grpo.py")],
        "diffu-GRPO, no KL": [MEASURED + " --beta 0"],
        "coupled-GRPO, no KL": [MEASURED + " --estimator coupled --beta 0"],
        "ESPO, no KL": [MEASURED + " --objective espo --beta 0"],
    },
    "traces": {  # of the SFT before RL: half of them go back ("corrected"), or none ("worked")
        "diffu-GRPO": [MEASURED],
        "corrected": [SFT, BEFORE_TOO],
        "worked": [SFT.replace("corrected", "worked"), BEFORE_TOO],
    },
    "habits": {  # why some methods end on a guess: the KL term, the reward, the tokens behind EOS
        "one_step": [HABITS],
        "random_mask": [HABITS + " --estimator random_mask"],
        "random_mask, no KL": [HABITS + " --estimator random_mask --beta 0"],
        "random_mask, exact reward": [HABITS + " --estimator random_mask --reward exact"],
        "random_mask, EOS behind EOS": [HABITS + " --estimator random_mask --fill_behind_eos"],
        "GSPO": [HABITS + " --objective sequence"],
        "ESPO, no KL": [HABITS + " --objective espo --beta 0"],
    },
    "samplers": {
        "exact": [f"train_grpo.py {GRPO}"],
        "threshold": [MEASURED],
        "threshold and cache": [SHORT + " --cache dual"],
        "threshold, random first": [SHORT + " --random_first"],
        "entropy bound": [f"variants/grpo.py {GRPO} --entropy_bound 0.5"],
        "entropy bound, random first": [f"variants/grpo.py {GRPO} --entropy_bound 0.5 --random_first"],
    },
    "ablations": {  # the telling rows first
        "as default": [SHORT],
        "mask per completion": [SHORT + " --estimator mask_per_completion"],
        **{f"K {k}": [f"{SHORT} --masks_per_prompt {k}"] for k in (6, 2)},
        **{f"mu {mu}": [f"{SHORT} --num_iterations {mu}"] for mu in (1, 12, 2, 8)},
        "fixed masks, mu 12": [SHORT + " --estimator fixed_masks --num_iterations 12"],
        **{f"p {p:g}": [f"{SHORT} --p_mask_prompt {p}"] for p in (0, 0.5, 0.7, 0.3)},
        "sequence mean": [SHORT + " --objective sequence_mean"],
        "Gumbel in bfloat16": [SHORT + " --gumbel_bfloat16"],
    },
}

ON_ONE_TASK = {"ablations": ("countdown",), "samplers": ("countdown",), "habits": ("sudoku",)}
DEAR = {"JustGRPO"}  # rows that run on the first task alone


def tasks_of(row, tasks):
    """The tasks on which a row runs."""
    return [task for task in tasks if row not in DEAR or task == TASKS[0]]


# ---------------------------------------------------------------- running

def out_of(command):
    """The folder of a command's output, named after its words, short enough for a file system."""
    words = [word.removeprefix("--").removesuffix(".py") for word in shlex.split(command)]
    name = "_".join(words).replace("/", "-")
    if len(name) > 150:
        name = f"{name[:140]}-{sha256(name.encode()).hexdigest()[:8]}"
    return f"{RUNS}/{name}"


def resolve(commands, task, seed):
    """[(command, its folder)] of a row for a task and a seed."""
    resolved = []
    for command in commands:
        command = command.format(task=task, seed=seed)
        for number, (_, out) in enumerate(resolved):
            command = command.replace(f"<{number}>", out)
        resolved.append((command, out_of(command)))
    return resolved


def run(command, out, threads):
    """Run a command with --out, unless it has run; its output goes to <out>.log. A failure ends the experiment."""
    if (ROOT / out / "summary.json").exists():
        return
    (ROOT / out).parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, *shlex.split(command), "--out", out]
    if not command.startswith("sample.py"):
        words.append("--resume")
    with open(ROOT / f"{out}.log", "a") as log:
        code = subprocess.run(words, cwd=ROOT, stdout=log, stderr=log,
                              env={**os.environ, "OMP_NUM_THREADS": str(threads)}).returncode
    if code:
        raise SystemExit(f"error: {command} failed, see {out}.log")
    print("done:", command, flush=True)


def run_all(plans, jobs):
    """Run every command of every plan once: all first commands, then all second ones, which build on them."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        for stage in range(max(map(len, plans))):
            commands = dict.fromkeys(plan[stage] for plan in plans if len(plan) > stage)  # each once, in order
            list(pool.map(lambda item: run(*item, threads), commands))


# ---------------------------------------------------------------- collecting

def read_commits(plans):
    """The commits of this code at which the commands ran."""
    configs = [json.loads((ROOT / out / "config.json").read_text()) for plan in plans for _, out in plan]
    return sorted({config["commit"] for config in configs})


def read_evaluation(out):
    summary = json.loads((ROOT / out / "summary.json").read_text())
    return {f"length {summary['gen_length']}": summary["accuracy"]}


def read_training(out):
    """Reward and accuracy of a training's last rollouts, its median seconds a step, its curve of accuracy.

    And what was measured on held-out problems before and after it, and of habits.
    """
    lines = [json.loads(line) for line in (ROOT / out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in lines if "loss" in row]  # the other lines are evaluations, the first of them before step 1
    seconds = [60 * (row["minutes"] - before["minutes"]) for before, row in zip(lines, lines[1:]) if "loss" in row]
    result = {name: statistics.mean(row[name] for row in steps[-LAST:]) for name in ("reward", "accuracy")}
    summary = ROOT / out / "summary.json"
    after = json.loads(summary.read_text()) if summary.exists() else {}
    result |= {HELD_OUT[name]: value for name, value in after.items() if name in HELD_OUT}
    if any("guess_fraction" in row for row in steps):
        result |= {name: value for habit in HABIT_NAMES for name, value in read_habit(habit, steps).items()}
    return {**result, "seconds": statistics.median(seconds), "curve": [round(row["accuracy"], 4) for row in steps]}


def read_habit(habit, steps):
    """The share that a habit has in the last rollouts, and its mean advantage over all of them."""
    shares = [row.get(f"{habit}_fraction", 0) for row in steps]
    total = sum(share * row.get(f"{habit}_advantage", 0) for share, row in zip(shares, steps))
    return {habit: statistics.mean(shares[-LAST:]), f"{habit} advantage": total / max(sum(shares), 1e-9)}


def read_result(plan):
    """The result of a row for a task and a seed: of its evaluations, or of its training where it has none."""
    evaluations = [out for command, out in plan if command.startswith("sample.py")]
    if not evaluations:
        return read_training(plan[-1][1])
    return {name: value for out in evaluations for name, value in read_evaluation(out).items()}


def add_equal_time(values, first_seconds):
    """Add the accuracy that a training had when the first row's training ended. Clocks within 5% count as equal."""
    share = first_seconds / values["seconds"][0]
    values["accuracy in equal time"] = []
    for curve in values["curve"]:
        done = len(curve) if share > 0.95 else max(1, round(len(curve) * share))
        values["accuracy in equal time"].append(statistics.mean(curve[max(0, done - LAST):done]))


def has_run(plan):
    return all((ROOT / out / "summary.json").exists() for _, out in plan)


def collect(rows, tasks, seeds):
    """[{row, task, seeds, commands, values: {name: a number per seed}, mean, spread}] of what has run.

    spread: the sample standard deviation. Of a training: reward and accuracy of the rollouts over its last steps, the
    held-out accuracies if measured, "seconds" of the median step of all seeds, and the accuracy in equal time.
    """
    collected, first_seconds = [], {}
    for label, commands in rows.items():
        for task in tasks_of(label, tasks):
            ran = [seed for seed in seeds if has_run(resolve(commands, task, seed))]
            if not ran:
                continue
            results = [read_result(resolve(commands, task, seed)) for seed in ran]
            values = {name: [result[name] for result in results] for name in results[0]}
            if "curve" in values:
                values["seconds"] = [statistics.median(values["seconds"])]
                add_equal_time(values, first_seconds.setdefault(task, values["seconds"][0]))
            numbers = {name: column for name, column in values.items() if name != "curve"}
            collected.append({
                "row": label, "task": task, "seeds": ran, "values": values,
                "commands": resolve(commands, task, "SEED"),
                "mean": {name: statistics.mean(column) for name, column in numbers.items()},
                "spread": {name: statistics.stdev(column) for name, column in numbers.items() if len(column) > 1}})
    return collected


def show(collected):
    """Print the rows as a Markdown table: mean and spread in per cent, and the seconds of a step."""
    for row in collected:
        cells = []
        for name, mean in row["mean"].items():
            spread = f" ± {100 * row['spread'][name]:.1f}" if name in row["spread"] else ""
            cells.append(f"{mean:.1f} s" if name == "seconds" else f"{name} {100 * mean:.1f}{spread}")
        print(f"| {row['task']} | {row['row']} | {len(row['seeds'])} seeds | {' | '.join(cells)} |")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=sorted(EXPERIMENTS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="only these; no file is written")
    parser.add_argument("--seeds", nargs="+", type=number(), default=[0, 1, 2])
    parser.add_argument("--jobs", type=number(int, 1), default=1, help="runs side by side, which share the cores")
    parser.add_argument("--rows", nargs="+", help="only these; no file is written")
    parser.add_argument("--collect", action="store_true", help="run nothing; read what has run")
    return parser.parse_args(argv)


def main(args):
    all_rows = EXPERIMENTS[args.experiment]
    unknown = set(args.rows or ()) - set(all_rows)
    if unknown:
        raise SystemExit(f"error: --rows {' '.join(unknown)}: choose from {', '.join(all_rows)}")
    rows = {row: all_rows[row] for row in args.rows or all_rows}
    tasks = args.tasks or ON_ONE_TASK.get(args.experiment, TASKS)
    plans = [resolve(commands, task, seed) for row, commands in rows.items() for task in tasks_of(row, tasks)
             for seed in args.seeds]
    if not args.collect:
        run_all(plans, args.jobs)
    collected = collect(rows, tasks, args.seeds)
    show(collected)
    if not args.rows and not args.tasks:
        command = f"python tools/experiments.py {args.experiment} --seeds {' '.join(map(str, args.seeds))}"
        results = {"command": command, "commits": read_commits(filter(has_run, plans)),
                   "device": f"CPU, {os.cpu_count()} cores, float32", "rows": collected}
        path = ROOT / f"docs/results/{args.experiment}.json"
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(parse_args())
