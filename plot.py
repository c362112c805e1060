"""The metrics of one or more runs as one picture: runs that differ in the seed alone are a line with a band, each task
has panels of its own.

    python plot.py runs/train_grpo-countdown                         one run
    python plot.py runs/mu4-* runs/mu12-* --x minutes --out mu.svg   a comparison, against wall-clock time

Needs matplotlib (pip install matplotlib).
"""
import argparse
import json
import re
from pathlib import Path

METRICS = ("reward", "accuracy", "held_out_sampled_accuracy", "kl", "clip_fraction", "loss", "held_out_loss")
DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))  # with the shade they tell lines apart in grey


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", help="folders with metrics.jsonl and config.json")
    p.add_argument("--metrics", nargs="+", help=f"default: the first four of {', '.join(METRICS)} there are")
    p.add_argument("--x", nargs="+", choices=("step", "update", "minutes"), default=["step"],
                   help="one or several; update: steps times num_iterations")
    p.add_argument("--smooth", type=int, default=1, help="mean over so many steps; evaluations are not smoothed")
    p.add_argument("--out", default="plot.png", help=".png or .svg")
    return p.parse_args(argv)


def read_run(folder):
    """(options, rows) of a run's folder; a row's "minutes" and "update" are the time and the updates so far."""
    folder, minutes, rows = Path(folder), 0.0, []
    for name in ("config.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise SystemExit(f"error: {folder}: no {name}, is this the folder of a training run?")
    options = json.loads((folder / "config.json").read_text())["options"]
    for n, line in enumerate((folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n"), 1):
        try:
            rows += [json.loads(line)] if line else []
        except ValueError as error:
            raise SystemExit(f"error: {folder}/metrics.jsonl, row {n}: not JSON ({error})") from None
        if line:
            minutes += sum(rows[-1]["seconds"].values()) / 60 if "seconds" in rows[-1] else 0.0
            rows[-1] |= {"minutes": minutes, "update": rows[-1]["step"] * options.get("num_iterations", 1)}
    if not rows:
        raise SystemExit(f"error: {folder}/metrics.jsonl holds no step yet")
    return options, rows


def group_runs(runs):
    """{label: [rows of each seed]}: a label names the options in which a group differs from the first, seed and
    folder aside."""
    aside = ("seed", "out", "resume", "tensorboard")
    options = [{k: v for k, v in given.items() if k not in aside} for given, _ in runs]
    differing = [k for k in dict.fromkeys(k for o in options for k in o) if len({repr(o.get(k)) for o in options}) > 1]
    groups = {}
    for given, (_, rows) in zip(options, runs):
        named = [k for k in differing if given.get(k) != options[0].get(k)] or differing
        said = ", ".join(f"{k} {given[k]}" for k in named if given.get(k) is not None)
        label = said or ("default" if named else str(given.get("task", "run")))
        groups.setdefault(label, []).append(rows)
    return dict(sorted(groups.items(), key=lambda item: [(not part.isdigit(), int(part) if part.isdigit() else part)
                                                         for part in re.split(r"(\d+)", item[0]) if part]))


def curve(seeds, metric, x, smooth):
    """(x, mean, lowest, highest) over the seeds, at the steps that all of them have. Four lists of one length."""
    tables = [{row["step"]: (row[x], row[metric]) for row in rows if row.get(metric) is not None} for rows in seeds]
    steps = sorted(set.intersection(*map(set, tables)))
    if "held_out" not in metric:
        tables = [dict(zip(steps, [(t[s][0], mean(t[before][1] for before in steps[max(0, i - smooth + 1):i + 1]))
                                   for i, s in enumerate(steps)])) for t in tables]
    values = [[table[step][1] for table in tables] for step in steps]
    return ([mean(table[step][0] for table in tables) for step in steps], list(map(mean, values)),
            list(map(min, values)), list(map(max, values)))


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def draw(parts, smooth):
    """A figure with a panel for each (title, groups, metric, x) of `parts`, lines labelled at their ends."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no display, no global state
    except ImportError:
        raise SystemExit("error: plot.py needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(5.2 * min(2, len(parts)), 3.4 * -(-len(parts) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(parts) // 2), min(2, len(parts)), squeeze=False).flat
    for (title, groups, metric, x), panel in zip(parts, panels):
        ends, shades = [], [0.65 * i / max(1, len(groups) - 1) for i in range(len(groups))]
        for i, (label, seeds) in enumerate(groups.items()):
            xs, ys, low, high = curve(seeds, metric, x, smooth)
            colour = (shades[i], 0.25 + 0.45 * shades[i], 0.55)  # dark to light blue-green: an order also in grey
            panel.plot(xs, ys, color=colour, linestyle=DASHES[i % len(DASHES)], linewidth=1.8)
            if len(seeds) > 1:
                panel.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0)
            if xs:
                ends.append((ys[-1], xs[-1], f" {label}", colour))
        panel.set_title(title + metric.replace("_", " "), loc="left", fontsize=11)
        seeds = sorted({len(seeds) for seeds in groups.values()})
        panel.set_xlabel(x if seeds == [1] else f"{x} (mean and range of {' or '.join(map(str, seeds))} seeds)")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        label_ends(panel, sorted(ends))
    for panel in list(panels):  # what is left of the grid
        panel.set_visible(False)
    return figure


def label_ends(panel, ends):
    """Write each line's label at its end, pushed up where it would cover the one below."""
    low, high = panel.get_ylim()
    line, last = (high - low) / 14, float("-inf")
    for y, x, label, colour in ends:
        last = max(y, last + line)
        panel.annotate(label, (x, y), xytext=(x, last), color=colour, fontsize=8, va="center", annotation_clip=False)


def main(args):
    runs = [read_run(folder) for folder in args.runs]
    present = {name for _, rows in runs for row in rows for name, value in row.items()
               if isinstance(value, (int, float))}
    metrics = args.metrics or [name for name in METRICS if name in present][:4]
    for name in metrics:
        if name not in present:
            raise SystemExit(f"error: --metrics {name}: not in these runs, they have {', '.join(sorted(present))}")
    tasks = {}
    for run in runs:
        tasks.setdefault(str(run[0].get("task")), []).append(run)
    figure = draw([(f"{task}: " if len(tasks) > 1 else "", group_runs(part), metric, x)
                   for task, part in tasks.items() for metric in metrics for x in args.x], args.smooth)
    figure.savefig(args.out, dpi=160)
    print(f"{len(runs)} runs, {', '.join(metrics)}: {args.out}")
    return figure


if __name__ == "__main__":
    main(parse_args())
