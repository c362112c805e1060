"""The metrics of training runs as one picture. Runs that differ in the seed alone are a line with a band.

    python tools/plot.py runs/train_grpo-countdown                         one run
    python tools/plot.py runs/mu4-* runs/mu12-* --x minutes --out mu.svg   a comparison, against wall-clock time

Each task has panels of its own. Needs matplotlib: pip install matplotlib
"""
import argparse
import json
import re
from pathlib import Path
from statistics import mean

METRICS = ("held_out_accuracy", "held_out_greedy", "held_out_loss", "reward", "kl", "loss")
ASIDE = {"seed", "out", "resume", "save_every", "device", "timeout"}  # options that no label names
DASHES = ("-", "--", ":", "-.")  # with the shade they tell lines apart in grey


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders with metrics.jsonl and config.json")
    parser.add_argument("--metrics", nargs="+", help=f"default: the first four of {', '.join(METRICS)} that a run has")
    parser.add_argument("--x", choices=("step", "update", "minutes"), default="step",
                        help="update: steps times num_iterations")
    parser.add_argument("--smooth", type=int, default=1, help="mean over so many steps; evaluations are not smoothed")
    parser.add_argument("--out", default="plot.png", help=".png or .svg")
    return parser.parse_args(argv)


# ---------------------------------------------------------------- runs

def read_run(folder):
    """(options, {step: row}) of a run's folder; the lines of a step and of its evaluation are one row."""
    folder = Path(folder)
    for name in ("config.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise SystemExit(f"error: {folder}: no {name}, is this the folder of a training run?")
    options = json.loads((folder / "config.json").read_text())["options"]
    rows = {}
    for number, line in enumerate((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SystemExit(f"error: {folder}/metrics.jsonl, row {number}: not JSON ({error})") from None
        row["update"] = row["step"] * options.get("num_iterations", 1)
        rows[row["step"]] = rows.get(row["step"], {}) | row
    if not rows:
        raise SystemExit(f"error: {folder}/metrics.jsonl holds no step yet")
    return options, rows


def task_of(options):
    """The name of a run's task: SFT has several, or none."""
    task = options.get("task") or "data"
    return task if isinstance(task, str) else " ".join(task)


def has_metric(rows, name):
    return any(isinstance(row.get(name), (int, float)) for row in rows.values())


def group_runs(runs):
    """{label: [rows of each seed]}. A label names the options in which the runs of a group differ from the others."""
    names = {name for options, _ in runs for name in options} - ASIDE
    differing = sorted(name for name in names if len({repr(options.get(name)) for options, _ in runs}) > 1)
    groups = {}
    for options, rows in runs:
        label = ", ".join(f"{name} {options.get(name)}" for name in differing) or task_of(options)
        groups.setdefault(label, []).append(rows)
    return dict(sorted(groups.items(), key=lambda group: in_order_of_numbers(group[0])))


def in_order_of_numbers(label):
    """A key to sort by: "mu 4" comes before "mu 12"."""
    return [(not piece.isdigit(), int(piece) if piece.isdigit() else piece) for piece in re.split(r"(\d+)", label)]


def curve(seeds, metric, x, smooth):
    """The points of a line: x, mean, lowest, highest over the seeds, at the steps that all of them have."""
    seeds = [{step: row for step, row in rows.items() if row.get(metric) is not None} for rows in seeds]
    steps = sorted(set.intersection(*map(set, seeds)))
    window = 1 if metric.startswith("held_out") else smooth
    columns = []  # of each seed, the values at these steps
    for rows in seeds:
        values = [rows[step][metric] for step in steps]
        columns.append([mean(values[max(0, i + 1 - window):i + 1]) for i in range(len(values))])
    points = list(zip(*columns))
    return [mean(rows[step][x] for rows in seeds) for step in steps], *(list(map(f, points)) for f in (mean, min, max))


# ---------------------------------------------------------------- the picture

def draw(panels, x, smooth):
    """A figure with a panel for each (title, groups, metric), two in a row."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no display, no global state
    except ImportError:
        raise SystemExit("error: plot.py needs matplotlib: pip install matplotlib") from None
    columns, rows = min(2, len(panels)), -(-len(panels) // 2)
    figure = Figure(figsize=(5.2 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for (title, groups, metric), panel in zip(panels, axes):
        draw_lines(panel, groups, metric, x, smooth)
        panel.set_title(title, loc="left", fontsize=11)
        counts = sorted({len(seeds) for seeds in groups.values()})
        panel.set_xlabel(x if counts == [1] else f"{x} (mean and range of {' or '.join(map(str, counts))} seeds)")
    for panel in axes:  # what is left of the grid
        panel.set_visible(False)
    return figure


def draw_lines(panel, groups, metric, x, smooth):
    """One line for each group, dark to light, which is an order in grey as well. Evaluations get markers."""
    from matplotlib.ticker import MaxNLocator
    marker = "o" if metric.startswith("held_out") else None
    for i, (label, seeds) in enumerate(groups.items()):
        shade = 0.65 * i / max(1, len(groups) - 1)
        colour = (shade, 0.25 + 0.45 * shade, 0.55)
        xs, means, lowest, highest = curve(seeds, metric, x, smooth)
        panel.plot(xs, means, DASHES[i % len(DASHES)], color=colour, linewidth=1.8, marker=marker, markersize=4,
                   label=label)
        if len(seeds) > 1:
            panel.fill_between(xs, lowest, highest, color=colour, alpha=0.18, linewidth=0)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)
    panel.xaxis.set_major_locator(MaxNLocator(integer=x != "minutes"))
    if len(groups) > 1:
        panel.legend(fontsize=8, frameon=False)


def main(argv=None):
    args = parse_args(argv)
    runs = [read_run(folder) for folder in args.runs]
    for name in args.metrics or ():
        if not any(has_metric(rows, name) for _, rows in runs):
            names = sorted({name for _, rows in runs for row in rows.values() for name in row})
            raise SystemExit(f"error: --metrics {name}: not in these runs, they have {', '.join(names)}")
    panels, tasks = [], sorted({task_of(options) for options, _ in runs})
    for task in tasks:
        of_task = [(options, rows) for options, rows in runs if task_of(options) == task]
        present = [name for name in args.metrics or METRICS if any(has_metric(rows, name) for _, rows in of_task)]
        for metric in present if args.metrics else present[:4]:
            having = [(options, rows) for options, rows in of_task if has_metric(rows, metric)]
            title = metric.replace("_", " ")
            panels.append((title if len(tasks) == 1 else f"{task}: {title}", group_runs(having), metric))
    if not panels:
        raise SystemExit(f"error: these runs have none of {', '.join(METRICS)}: name some with --metrics")
    figure = draw(panels, args.x, args.smooth)
    figure.savefig(args.out, dpi=160)
    print(f"{len(runs)} runs, {len(panels)} panels: {args.out}")
    return figure


if __name__ == "__main__":
    main()
