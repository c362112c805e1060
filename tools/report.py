"""A training run on one page: settings, before and after, curves, three samples.

    python tools/report.py runs/train_grpo-countdown

writes report.md, and report.png, into that folder. The curves need matplotlib
(pip install matplotlib); without it a line of blocks takes their place.
"""
import argparse
import importlib.util
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import plot  # noqa: E402

SETTINGS = ("task", "model", "preset", "steps", "num_iterations", "prompts_per_step", "group_size", "batch_size",
            "gen_length", "diffusion_steps", "block_length", "temperature", "lr", "epsilon", "beta", "p_mask_prompt",
            "lora_r", "seed")  # those that a reader asks for first
BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values):
    """Numbers as a line of blocks, the lowest the smallest block."""
    low, high = min(values), max(values)
    return "".join(BLOCKS[int((value - low) / (high - low or 1) * (len(BLOCKS) - 1))] for value in values)


def number(name, value):
    return f"{value:.1%}" if name.endswith(plot.SHARES) else f"{value:.3g}"


def table(head, rows):
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def before_and_after(rows):
    """Rows of a table: each held-out metric at the first and at the last evaluation."""
    evaluations = [row for _, row in sorted(rows.items()) if any(name.startswith("held_out_") for name in row)]
    if not evaluations:
        return [["nothing was held out", "", ""]]
    first, last = evaluations[0], evaluations[-1]
    names = [name for name in last if name.startswith("held_out_") and name in first]
    names.sort(key=lambda name: not name.endswith(("accuracy", "greedy", "loss")))  # these first
    return [[name.removeprefix("held_out_").replace("_", " ").replace("greedy", "accuracy, greedy"),
             number(name, first[name]), "not yet" if last is first else number(name, last[name])] for name in names]


def pick_samples(path):
    """Up to three logged completions, (why it is shown, row): the first, the last right one, the last wrong one."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    samples = [json.loads(line) for line in lines]
    if not samples:
        return []
    chosen = [("The first", samples[0])]
    for verdict, is_right in (("right", True), ("wrong", False)):
        chosen += [(f"The last {verdict}", row) for row in samples if (row["accuracy"] == 1) == is_right][-1:]
    return chosen


def curves(folder, rows):
    """A picture where matplotlib is installed, else lines of blocks."""
    if importlib.util.find_spec("matplotlib"):
        plot.main([str(folder), "--out", str(folder / "report.png")])
        return "![curves](report.png)"
    names = [name for name in plot.TITLES if plot.has_metric(rows, name)]
    values = {name: [row[name] for _, row in sorted(rows.items()) if name in row] for name in names}
    return "\n".join(f"    {name:18} {sparkline(values[name])}  {number(name, values[name][-1])}" for name in names)


def write_report(folder):
    """Write report.md. Returns its path."""
    run = plot.read_run(folder)
    if run is None:
        raise SystemExit(f"error: {folder} holds no training to report on, name the folder of a run")
    options, rows = run
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    step = max(rows)
    has_ended = (folder / "summary.json").exists()
    state = f"{step} of {options.get('steps', '?')} steps, {rows[step]['minutes']:.1f} minutes"
    settings = [[name, options[name]] for name in SETTINGS if options.get(name) not in (None, [])]
    pages = [
        f"# {plot.task_of(options)}: {folder.name}",
        f"{state}, {config['processes']} x {config['device']}, torch {config['torch']}"
        + (f", commit {config['commit'][:9]}" if config["commit"] else "") + ("" if has_ended else "; not at its end"),
        f"    {config['command']}",
        "## Before and after\nOn held-out problems, before the first update and at the last evaluation.",
        table(["", "before", "after"], before_and_after(rows)),
        "## Curves", curves(folder, rows),
        "## Samples"]
    for title, row in pick_samples(folder / "samples.jsonl"):
        question = row["prompt"].rpartition("\n\n")[2]  # without the instructions
        fence = "````"  # longer than any in a completion
        pages.append(f"{title} (step {row['step']}, reward {row['reward']:.2f}, "
                     f"{'right' if row['accuracy'] == 1 else 'wrong'}):\n"
                     f"{fence}\n{question}\n\n{row['completion']}\n{fence}")
    if pages[-1] == "## Samples":
        pages.append("None were logged.")
    pages += ["## Settings", table(["option", "value"], settings), "All options are in config.json."]
    path = folder / "report.md"
    path.write_text("\n\n".join(pages) + "\n", encoding="utf-8")
    return path


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run")
    path = write_report(parser.parse_args(argv).run)
    print(path)
    return path


if __name__ == "__main__":
    main()
