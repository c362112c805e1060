"""The picture at the top of README.md: a canvas filling in, beside the curves of
the run that trained its model.

    python train_grpo.py --task countdown
    python tools/picture.py runs/train_grpo-countdown

writes docs/figures/readme.png. The canvas is that of one held-out problem, at
temperature 0, after several of its rounds. Needs matplotlib.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402
from data import TASKS  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from model import LLaDA, find_checkpoint  # noqa: E402
from tools import number  # noqa: E402
from tools.plot import read_run, save_small  # noqa: E402
from tools.watch import COLOURS, EOS, read_canvas, verdict, wrap  # noqa: E402

ROUNDS = (4, 12, 20, 32)  # of the sampler: the canvases that are shown
INK, PAPER, FAINT = "#e6e6e6", "#16181d", "#8a8f98"  # of the terminal
WIDTH, HEIGHT = 28, 11  # of a canvas, in characters and lines


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a run of train_grpo.py with data/tiny")
    parser.add_argument("--index", type=number(), default=6, help="of the held-out problem")
    parser.add_argument("--out", default=str(ROOT / "docs" / "figures" / "readme.png"))
    return parser.parse_args(argv)


def sample_canvases(options, folder, index):
    """(problem, {round: canvas}, text) of a held-out problem; a canvas is what `read_canvas` gives."""
    task, checkpoint = TASKS[options["task"]], find_checkpoint(folder)
    example = task.load("test", count=index + 1)[-1]
    model, tokenizer = LLaDA.from_pretrained(checkpoint).eval(), Tokenizer.from_folder(checkpoint)
    prompt, canvases = tokenizer.encode_prompt(example["prompt"]), {}

    def on_step(x, committed_at):  # (1, T) both
        ids, steps = x[0, len(prompt):], committed_at[0, len(prompt):]  # (L,)
        canvases[int(steps.max()) + 1] = read_canvas(tokenizer, ids, steps)

    schedule = {name: options[name] for name in sample.SAMPLING}
    done = sample.complete(model, tokenizer, [prompt], [(0, "answer")], temperature=0.0, on_step=on_step, **schedule)
    return example, canvases, done.texts[0]


def colour_of(step, rounds):
    """The colour of a round as #rrggbb: that of a terminal's 256."""
    number = COLOURS[step * len(COLOURS) // rounds] - 16
    levels = (0, 95, 135, 175, 215, 255)
    return "#%02x%02x%02x" % tuple(levels[number // 6 ** i % 6] for i in (2, 1, 0))


def draw_canvas(panel, characters, rounds, left, top, line_height, size):
    """Write a canvas into a panel whose x axis counts characters and whose y axis counts lines."""
    for row, line in enumerate(wrap(characters, WIDTH)):
        for column, (character, step) in enumerate(line):
            is_token = step >= 0 and character != EOS
            colour = colour_of(step, rounds) if is_token else FAINT
            panel.text(left + column, top - row * line_height, character, color=colour, family="monospace", size=size,
                       ha="center", va="center")


def draw_terminal(panel, example, canvases, text, task, size=9.5):
    """The problem, four canvases and the verdict, as a terminal shows them."""
    panel.set(xlim=(-1, 2 * WIDTH + 1), ylim=(-2 * HEIGHT - 3.5, 2.2), xticks=[], yticks=[], facecolor=PAPER)
    question = example["prompt"].rpartition("\n\n")[2].replace("\n", "   ")
    panel.text(0, 1, question, color=INK, family="monospace", size=size, va="center", weight="bold")
    for i, number in enumerate(ROUNDS):
        left, top = i % 2 * (WIDTH + 1) + 0.5, -1 - i // 2 * HEIGHT
        panel.text(left - 0.5, top, f"round {number} of {ROUNDS[-1]}", color=FAINT, family="monospace", size=size,
                   va="center")
        draw_canvas(panel, canvases[number], ROUNDS[-1], left, top - 1.2, 1.0, size)
    panel.text(0, -2 * HEIGHT - 2.2, verdict(text, example, task).split("\n")[0], color=INK, family="monospace",
               size=size, va="center", weight="bold")


def draw_curves(panel, rows, task_name):
    """Reward of the rollouts and held-out accuracy over the steps."""
    from matplotlib.ticker import MaxNLocator
    steps = [step for step in rows if "reward" in rows[step]]
    held_out = [step for step in rows if "held_out_accuracy" in rows[step]]
    middle = steps[len(steps) // 2]
    panel.plot(steps, [rows[step]["reward"] for step in steps], color="#0072b2", linewidth=2)
    panel.plot(held_out, [rows[step]["held_out_accuracy"] for step in held_out], "--o", color="#d55e00", linewidth=2)
    panel.annotate("mean reward\nof the rollouts", (middle, rows[middle]["reward"]), (6, 2), color="#0072b2",
                   textcoords="offset points", size=9.5, va="center")
    for step in held_out:
        share = rows[step]["held_out_accuracy"]
        panel.annotate(f"{share:.0%}", (step, share), (0, -14), textcoords="offset points", color="#d55e00", size=9.5,
                       ha="center", weight="bold")
    share = rows[held_out[-1]]["held_out_accuracy"]
    panel.annotate("held-out problems solved", (held_out[-1], share), (8, -28), textcoords="offset points",
                   color="#d55e00", size=9.5, ha="right")
    panel.set_xlabel("step of diffu-GRPO")
    panel.set_title(f"python train_grpo.py --task {task_name}", loc="left", size=10, family="monospace")
    panel.set_ylim(0, 0.75)
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 5, 10]))
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)


def main(argv=None):
    from matplotlib.figure import Figure
    args = parse_args(argv)
    run = read_run(args.run)
    if run is None or not isinstance(run[0].get("task"), str) or len(run[1]) < 2:
        raise SystemExit(f"error: {args.run}: name the folder of a finished run of train_grpo.py")
    options, rows = run
    example, canvases, text = sample_canvases(options, args.run, args.index)
    figure = Figure(figsize=(10.4, 4.3), layout="constrained")
    terminal, curves = figure.subplots(1, 2, width_ratios=(1.35, 1))
    draw_terminal(terminal, example, canvases, text, TASKS[options["task"]])
    draw_curves(curves, rows, options["task"])
    save_small(figure, args.out)
    print(verdict(text, example, TASKS[options["task"]]), args.out, sep="\n")


if __name__ == "__main__":
    main()
