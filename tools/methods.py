"""All methods side by side: what experiments.py measured, at equal rollouts, row passes and minutes.

    python tools/experiments.py methods --jobs 2    run what is missing: hours
    python tools/methods.py --count                 count a step's row passes and time it: minutes
    python tools/methods.py                         print the table, draw docs/figures/methods.png

A row pass is a row of the network that goes forward; one that goes backward counts as two more. Minutes are those of
one CPU core. Both are of one step of Countdown, of a model that diffu-GRPO has trained, so that completions are long.
"""
import argparse
import importlib
import json
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn.modules.module import register_module_forward_pre_hook  # noqa: E402

from model import LLaDA  # noqa: E402
from tools import experiments  # noqa: E402
from tools.plot import save_small  # noqa: E402

RESULTS = ROOT / "docs" / "results"
TASK = experiments.TASKS[0]
FIRST = "diffu-GRPO"  # the method whose row passes and minutes are a budget for all
LAST = experiments.LAST
FULL = "20 rollouts"
# rows of an earlier experiment: the same runs, without held-out problems
EARLIER = {"wd1": "wd1", "sequence": "GSPO", "random_mask": "UniGRPO", "coupled": "coupled-GRPO",
           "trajectory": "StepMerge"}


# ---------------------------------------------------------------- costs

def count_step(command, model):
    """{"row_passes", "seconds"} of a command's first step, from a model. Seconds begin at its first forward pass."""
    script, *words = shlex.split(command)
    program = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    rows, starts = [], []

    def count(module, inputs):
        if isinstance(module, LLaDA):
            starts.append(time.process_time())
            rows.append(len(inputs[0]) * (3 if torch.is_grad_enabled() else 1))

    hook = register_module_forward_pre_hook(count)
    try:
        with tempfile.TemporaryDirectory() as folder:
            options = ["--model", model, "--steps", "1", "--eval_count", "0", "--out", f"{folder}/run"]
            program.main(program.parse_args([*words, *options]))
            return {"row_passes": sum(rows), "seconds": time.process_time() - starts[0]}
    finally:
        hook.remove()


def count_all(rows):
    """[{row, row_passes, seconds}] of every method."""
    torch.set_num_threads(1)
    [(_, trained)] = experiments.resolve(rows[FIRST], TASK, 0)
    counted = []
    for row, commands in rows.items():
        [(command, _)] = experiments.resolve(commands, TASK, 0)
        counted.append({"row": row, **count_step(command, str(ROOT / trained))})
        print(counted[-1], flush=True)
    return counted


# ---------------------------------------------------------------- the table

def accuracy_after(curve, steps):
    """The mean accuracy of the rollouts over the LAST steps up to one, at the latest that of the curve's end."""
    done = min(len(curve), max(1, round(steps)))
    return mean(curve[max(0, done - LAST):done])


def read_rows():
    """The rows of docs/results/methods.json; where those of estimators.json have more seeds, their curves."""
    rows = {(row["row"], row["task"]): row for row in json.loads((RESULTS / "methods.json").read_text())["rows"]}
    for row in json.loads((RESULTS / "estimators.json").read_text())["rows"]:
        name = EARLIER.get(row["row"]), row["task"]
        held_out = rows[name]["values"] if name in rows else {}
        if name[0] and len(held_out.get("curve", ())) < len(row["values"]["curve"]):
            rows[name] = {**row, "row": name[0], "values": {**held_out, "curve": row["values"]["curve"]}}
    return list(rows.values())


def compare(collected, counted):
    """[{row, task, seeds, columns: {title: accuracies of the seeds}, row_passes, seconds}] with equal budgets.

    collected: rows of experiments.collect; counted: those of `count_all`. The budget is what FIRST uses in all.
    """
    costs = {cost["row"]: cost for cost in counted}
    compared = []
    for row in collected:
        cost, first = costs[row["row"]], costs[FIRST]
        curves = row["values"]["curve"]
        columns = {FULL: [accuracy_after(curve, len(curve)) for curve in curves]}
        for title, unit in (("equal row passes", "row_passes"), ("equal minutes", "seconds")):
            share = first[unit] / cost[unit]  # of the steps that are within the budget
            columns[title] = [accuracy_after(curve, share * len(curve)) for curve in curves]
        columns |= {name: row["values"][name] for name in ("held-out", "held-out greedy") if name in row["values"]}
        compared.append({"row": row["row"], "task": row["task"], "seeds": len(curves), "columns": columns,
                         "row_passes": cost["row_passes"], "seconds": cost["seconds"]})
    return compared


def cell(values):
    """Mean and sample standard deviation of shares, in per cent."""
    if not values:
        return ""
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"


def show(compared):
    """Print a Markdown table for each task, the best after all rollouts first."""
    titles = (FULL, "equal row passes", "equal minutes", "held-out", "held-out greedy")
    for task in dict.fromkeys(row["task"] for row in compared):
        print(f"| {task} | seeds | {' | '.join(titles)} | row passes a step | seconds |\n" + "|---" * 9 + "|")
        of_task = [row for row in compared if row["task"] == task]
        for row in sorted(of_task, key=lambda row: -mean(row["columns"][FULL])):
            cells = [cell(row["columns"].get(title)) for title in titles]
            cells += [f"{row['row_passes']:,}", f"{row['seconds']:.1f}"]
            print(f"| {row['row']} | {row['seeds']} | {' | '.join(cells)} |")
        print()


# ---------------------------------------------------------------- the picture

MARKS = {  # column: marker, its face, its size, its name in the picture
    FULL: ("o", "black", 6, "rollouts"),
    "equal row passes": ("s", "none", 10, "at equal row passes"),
    "held-out greedy": ("D", "#b0b0b0", 7, "held-out, greedy"),
}


def draw(compared):
    """A panel for each task, a line for each method: its accuracies, and those of the seeds' rollouts as ticks."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state
    tasks = list(dict.fromkeys(row["task"] for row in compared))
    figure = Figure(figsize=(10.8, 0.9 + 0.34 * len(compared) / len(tasks)), layout="constrained")
    for task, panel in zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0]):
        rows = sorted((row for row in compared if row["task"] == task), key=lambda row: mean(row["columns"][FULL]))
        draw_rows(panel, rows, named=max(compared, key=distance))
        panel.set_title(f"{task.capitalize()}: problems solved", loc="left", fontsize=11)
    return figure


def draw_rows(panel, rows, named):
    """Draw the rows from below; the marks have names at one of them."""
    from matplotlib.ticker import PercentFormatter
    for height, row in enumerate(rows):
        seeds = row["columns"][FULL]
        panel.plot([min(seeds), max(seeds)], [height, height], color="black", linewidth=1)
        panel.plot(seeds, [height] * len(seeds), "|", color="black", markersize=8)
        for title, (marker, face, size, name) in MARKS.items():
            if title in row["columns"]:
                place = (mean(row["columns"][title]), height)
                panel.plot(*place, marker, color="black", markerfacecolor=face, markersize=size, zorder=3)
            if row is named:
                panel.annotate(name, place, (-5, 8), fontsize=7.5, textcoords="offset points")
    panel.set_yticks(range(len(rows)), [row["row"] for row in rows])
    panel.set_ylim(-0.6, len(rows) - 0.2)
    panel.set_xlim(left=0)
    panel.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.grid(axis="x", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def distance(row):
    """The least distance of two marks of a row, -1 where one is missing."""
    if not MARKS.keys() <= row["columns"].keys():
        return -1
    places = sorted(mean(row["columns"][title]) for title in MARKS)
    return min(right - left for left, right in zip(places, places[1:]))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="count row passes and seconds, write them")
    return parser.parse_args(argv)


def main(args):
    if args.count:
        counted = count_all(experiments.EXPERIMENTS["methods"])
        device = f"CPU, 1 of {os.cpu_count()} cores, float32"
        written = {"command": "python tools/methods.py --count", "device": device, "rows": counted}
        return (RESULTS / "methods_cost.json").write_text(json.dumps(written, indent=1) + "\n")
    compared = compare(read_rows(), json.loads((RESULTS / "methods_cost.json").read_text())["rows"])
    show(compared)
    save_small(draw(compared), ROOT / "docs" / "figures" / "methods.png")


if __name__ == "__main__":
    main(parse_args())
