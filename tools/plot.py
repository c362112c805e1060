"""Curves of training runs as one picture.

    python tools/plot.py runs/train_grpo-countdown               one run
    python tools/plot.py runs/train_grpo-countdown --every 30    while it runs
    python tools/plot.py runs/mu4-* runs/mu12-* --x minutes      a comparison
    python tools/plot.py --docs                                  those of docs/

Runs that differ in the seed alone are thin lines with their mean. Folders
without steps, such as evaluations, are skipped and named. Needs matplotlib:
pip install matplotlib
"""
import argparse
import json
import re
import sys
import time
from pathlib import Path
from statistics import mean

import numpy

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import number  # noqa: E402

TITLES = {  # metric: its title, which says what is good
    "held_out_accuracy": "Held-out problems solved (more is better)",
    "held_out_greedy": "Held-out problems solved, greedy (more is better)",
    "held_out_loss": "Loss on held-out rows (less is better)",
    "reward": "Mean reward of the rollouts (more is better)",
    "accuracy": "Rollouts that are right (more is better)",
    "kl": "KL to the initial policy, per token",
    "clip_fraction": "Tokens whose gradient is clipped",
    "loss": "Training loss (less is better)",
}
OF_RL, OF_SFT = ("held_out_accuracy", "reward", "kl", "clip_fraction"), ("held_out_loss", "loss")  # default
SHARES = ("accuracy", "greedy", "fraction", "closed", "format", "cells")  # shown in per cent
AXES = {"step": "steps", "update": "updates", "minutes": "minutes"}
ASIDE = {"seed", "out", "resume", "save_every", "device", "timeout"}  # options that no label names
# for all kinds of eyes; in grey, dashes tell lines apart, and of those with the same dashes one is darker
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#6b4a00")
DASHES = ("-", "--", ":", "-.")
SUFFIXES = (".png", ".svg", ".pdf")
FIGURES = {"estimators": ("update", "minutes"), "samplers": ("step", "minutes")}  # of docs/figures: their x axes


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="folders of training runs")
    parser.add_argument("--metrics", nargs="+", help=f"default: {', '.join(OF_RL)}; of SFT {', '.join(OF_SFT)}")
    parser.add_argument("--x", choices=AXES, default="step", help="update: steps times num_iterations")
    parser.add_argument("--smooth", type=number(int, 1), default=1,
                        help="mean over so many steps; evaluations are not smoothed")
    parser.add_argument("--out", default="plot.png", help=".png, .svg or .pdf (%(default)s)")
    parser.add_argument("--every", type=number(float, 1), metavar="SECONDS",
                        help="draw again until all runs have ended")
    parser.add_argument("--docs", action="store_true", help="draw docs/figures from docs/results")
    return parser.parse_args(argv)


# ---------------------------------------------------------------- runs

def read_run(folder):
    """(options, {step: row}) of a run's folder; the lines of a step and of its evaluation are one row.

    None, and a line that says why, where there is nothing to draw.
    """
    log, config = Path(folder, "metrics.jsonl"), Path(folder, "config.json")
    if not Path(folder).is_dir():
        return print(f"skipped {folder}: no such folder")
    if not config.is_file() or not log.is_file():
        missing = log if config.is_file() else config
        return print(f"skipped {folder}: no training run, it has no {missing.name}")
    options, rows = json.loads(config.read_text(encoding="utf-8"))["options"], {}
    *lines, torn = log.read_text(encoding="utf-8").split("\n")  # a run may be writing its last line
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SystemExit(f"error: {log}, row {number}: not JSON ({error})") from None
        row["update"] = row["step"] * options.get("num_iterations", 1)
        rows[row["step"]] = rows.get(row["step"], {}) | row
    if not rows:
        return print(f"skipped {folder}: it holds no step yet")
    return options, rows


def read_results(path):
    """[(options, {step: row})] of a file that experiments.py wrote: accuracies, and a median step's time."""
    runs = []
    for result in json.loads(Path(path).read_text(encoding="utf-8"))["rows"]:
        command = result["commands"][-1][0]
        mu = int((re.findall(r"--num_iterations (\d+)", command) or [4])[0])
        for seed, accuracies in enumerate(result["values"]["curve"]):
            options = {"task": result["task"], "seed": seed, "": result["row"]}
            runs.append((options, {step: {"step": step, "update": mu * step, "accuracy": accuracy,
                                          "minutes": step * result["values"]["seconds"][0] / 60}
                                   for step, accuracy in enumerate(accuracies, 1)}))
    return runs


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
        label = ", ".join(f"{name} {options.get(name)}".strip() for name in differing) or task_of(options)
        groups.setdefault(label, []).append(rows)
    if "" in differing:  # rows of results keep their order
        return groups
    return dict(sorted(groups.items(), key=lambda group: in_order_of_numbers(group[0])))


def in_order_of_numbers(label):
    """A key to sort by: "mu 4" comes before "mu 12"."""
    return [(not piece.isdigit(), int(piece) if piece.isdigit() else piece) for piece in re.split(r"(\d+)", label)]


def curve(seeds, metric, x, smooth):
    """The points of a group: x, means, and a list of values for each seed, at the steps that all of them have."""
    seeds = [{step: row for step, row in rows.items() if row.get(metric) is not None} for rows in seeds]
    steps = sorted(set.intersection(*map(set, seeds)))
    window = 1 if metric.startswith("held_out") else smooth
    columns = []  # of each seed, the values at these steps
    for rows in seeds:
        values = [rows[step][metric] for step in steps]
        columns.append([mean(values[max(0, i + 1 - window):i + 1]) for i in range(len(values))])
    return [mean(rows[step][x] for rows in seeds) for step in steps], list(map(mean, zip(*columns))), columns


# ---------------------------------------------------------------- the picture

def draw(panels, smooth):
    """A figure with a panel for each (title, groups, metric, x), two in a row."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no display, no global state
    except ImportError:
        raise SystemExit("error: plot.py needs matplotlib: pip install matplotlib") from None
    columns, rows = min(2, len(panels)), -(-len(panels) // 2)
    figure = Figure(figsize=(5.4 * columns, 3.3 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for (title, groups, metric, x), panel in zip(panels, axes):
        draw_lines(panel, groups, metric, x, smooth)
        panel.set_title(title, loc="left", fontsize=11)
        counts = sorted({len(seeds) for seeds in groups.values()})
        notes = [f"thick: mean of {' or '.join(map(str, counts))} seeds"] if counts != [1] else []
        notes += [f"over {smooth} steps"] if smooth > 1 and not metric.startswith("held_out") else []
        panel.set_xlabel(AXES[x] + f" ({', '.join(notes)})" * bool(notes))
    for panel in axes[len(panels):]:  # what is left of the grid
        panel.set_visible(False)
    figure.draw_without_rendering()  # now the axes have their places
    for panel in axes[:len(panels)]:
        label_lines(panel)
    return figure


def draw_lines(panel, groups, metric, x, smooth):
    """A thick line for each group, and a thin one for each seed where there are several. Evaluations get markers."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter
    panel.names = []  # (label, line): several are written at the ends of their lines
    for i, (label, seeds) in enumerate(groups.items()):
        style = {"linestyle": DASHES[i % len(DASHES)], "color": COLOURS[i % len(COLOURS)]}
        xs, means, columns = curve(seeds, metric, x, smooth)
        marker = "o" if metric.startswith("held_out") or len(xs) == 1 else None  # a line of one point shows nothing
        [line] = panel.plot(xs, means, linewidth=2, marker=marker, markersize=4.5, zorder=3, label=label, **style)
        for values in columns if len(seeds) > 1 else ():
            panel.plot(xs, values, linewidth=0.7, alpha=0.45, color=style["color"], label="_seed")
        panel.names += [(label, line)] if len(groups) > 1 else []
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    if panel.dataLim.ymin >= 0:
        panel.set_ylim(0, 1.05 * panel.dataLim.ymax or 1)
    if metric.endswith(SHARES):
        panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def label_lines(panel, gap=11):
    """Write each label at the end of its line, in its colour; labels that would overlap move apart, on a leash."""
    from matplotlib.patheffects import withStroke
    scale = 72 / panel.figure.dpi  # pixels to points
    ends = [panel.transData.transform((line.get_xdata()[-1], line.get_ydata()[-1])) * scale for _, line in panel.names]
    heights = spread([(x, y, 5 * len(label)) for (x, y), (label, _) in zip(ends, panel.names)], gap)
    for (label, line), (x, y), height in zip(panel.names, ends, heights):
        leash = {"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2}
        panel.annotate(label, (line.get_xdata()[-1], line.get_ydata()[-1]), (9, height - y), fontsize=8, va="center",
                       textcoords="offset points", color=line.get_color(), annotation_clip=False, zorder=4,
                       arrowprops=leash, path_effects=[withStroke(linewidth=2.5, foreground="white")])


def spread(labels, gap):
    """New heights of labels (x, y, width), moved apart until none that share a column are closer than `gap`."""
    heights = [y for _, y, _ in labels]
    for _ in range(200):
        for i, (x, _, width) in enumerate(labels):
            for j, (other_x, _, other_width) in enumerate(labels[:i]):
                close = gap - abs(heights[i] - heights[j])
                if close > 0 and x < other_x + other_width and other_x < x + width:
                    up, down = (i, j) if (heights[i], i) > (heights[j], j) else (j, i)
                    heights[up] += close / 2
                    heights[down] -= close / 2
    return heights


def make_panels(runs, metrics, axes):
    """[(title, groups, metric, x)]: each task has panels of its own."""
    panels, tasks = [], sorted({task_of(options) for options, _ in runs})
    for task in tasks:
        of_task = [(options, rows) for options, rows in runs if task_of(options) == task]
        default = [name for names in (OF_RL, OF_SFT) for name in names if name != "loss" or names == OF_SFT]
        for metric in metrics or default:
            having = [(options, rows) for options, rows in of_task if has_metric(rows, metric)]
            if metric == "loss" and not metrics:  # that of RL says nothing
                having = [(options, rows) for options, rows in having if not has_metric(rows, "reward")]
            title = TITLES.get(metric, metric.replace("_", " "))
            title = title if len(tasks) == 1 else f"{task}: {title[0].lower()}{title[1:]}"
            panels += [(title, group_runs(having), metric, x) for x in axes if having]
    return panels


def draw_runs(args):
    """Read the runs and write the picture. Returns the figure."""
    out = Path(args.out)
    if out.suffix not in SUFFIXES or not out.parent.is_dir():
        raise SystemExit(f"error: --out {out}: must end in {', '.join(SUFFIXES)}, in a folder that exists")
    read = [read_run(folder) for folder in args.runs]
    runs = [run for run in read if run is not None]
    if not runs:
        raise SystemExit("error: nothing to draw: name the folder of a run, such as runs/train_grpo-countdown")
    for name in args.metrics or ():
        if not any(has_metric(rows, name) for _, rows in runs):
            names = sorted({name for _, rows in runs for row in rows.values() for name in row})
            raise SystemExit(f"error: --metrics {name}: not in these runs, they have {', '.join(names)}")
    panels = make_panels(runs, args.metrics, [args.x])
    if not panels:
        raise SystemExit(f"error: these runs have none of {', '.join(TITLES)}: name some with --metrics")
    figure = draw(panels, args.smooth)
    figure.savefig(out, dpi=160)
    print(f"{len(runs)} run{'s' * (len(runs) > 1)}, {len(panels)} panels: {out}")
    return figure


def save_small(figure, path, colours=128):
    """Save a figure as a PNG of few colours, a fifth of the bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image  # comes with matplotlib
    figure.set_dpi(150)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    Image.fromarray(numpy.asarray(canvas.buffer_rgba())).convert("RGB").quantize(colours).save(path, optimize=True)


def draw_docs(folder=ROOT / "docs"):
    """Draw every picture of docs/figures whose numbers are in docs/results."""
    for name, axes in FIGURES.items():
        figure = draw(make_panels(read_results(folder / "results" / f"{name}.json"), ["accuracy"], axes), smooth=5)
        save_small(figure, folder / "figures" / f"{name}.png")
        print(folder / "figures" / f"{name}.png")


def main(argv=None):
    args = parse_args(argv)
    if args.docs:
        return draw_docs()
    figure = draw_runs(args)
    while args.every and not all(Path(folder, "summary.json").exists() for folder in args.runs):
        time.sleep(args.every)
        figure = draw_runs(args)
    return figure


if __name__ == "__main__":
    main()
