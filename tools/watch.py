"""Watch the canvas of one completion fill in, coloured by round; what sample.py --watch starts.

    python sample.py --task countdown --watch              a held-out problem, and whether the answer is right
    python sample.py --prompt "What is 7 * 3?" --watch     or a question of yours
    python sample.py --task sudoku --watch --count 5       or the fifth problem of the task

Blue tokens came first, red ones last. Where there is no terminal, every round is printed below the other.
"""
import shutil
import sys
import textwrap
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample  # noqa: E402
from data import TASKS  # noqa: E402
from data.format import closed_answer, unboxed  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from model import find_checkpoint  # noqa: E402

COLOURS = (39, 45, 51, 50, 48, 46, 118, 154, 190, 226, 220, 214, 208, 203)  # blue to red, of a terminal's 256
PAUSE = 0.08  # seconds after a round: slow enough to see
MASK, EOS = "░", "·"


def read_canvas(tokenizer, ids, committed_at):
    """[(character, the round that committed it, or -1)] of a completion: ids (L,), committed_at (L,)."""
    symbols = {tokenizer.mask_id: MASK, tokenizer.eos_id: EOS}
    tokens = zip(ids.tolist(), committed_at.tolist())
    return [(character, step) for token, step in tokens
            for character in symbols.get(token) or tokenizer.decode([token])]


def wrap(characters, columns):
    """Lines, each a list of (character, round), of at most `columns` characters."""
    lines = [[]]
    for character, step in characters:
        if character == "\n" or len(lines[-1]) == columns:
            lines.append([])
        if character != "\n":
            lines[-1].append((character, step))
    return lines


def fit(lines, height):
    """As many lines as there is room for, up to the last that holds a token of the newest round."""
    newest = max(step for line in lines for _, step in line)
    last = max(i for i, line in enumerate(lines) if any(step == newest for _, step in line))
    first = max(0, last + 1 - height)
    return lines[first:first + height]


def paint(line, rounds):
    """The text of a line in the colours of its rounds."""
    return "".join(character if step < 0 else
                   f"\x1b[38;5;{COLOURS[step * len(COLOURS) // rounds]}m{character}\x1b[0m"
                   for character, step in line)


def show(tokenizer, question, rounds, ids, committed_at):
    """Draw a round: on a terminal the question and what fits the window, else the plain canvas."""
    characters = read_canvas(tokenizer, ids, committed_at)
    count = f"round {int(committed_at.max()) + 1} of {rounds}"
    if not sys.stdout.isatty():
        return print("".join(character for character, _ in characters), count, sep="\n")
    columns, height = shutil.get_terminal_size()
    head = textwrap.wrap(question, columns)[:max(1, height // 3)]
    lines = fit(wrap(characters, columns), max(1, height - len(head) - 3))
    print("\x1b[2J\x1b[H" + "\n".join([*head, *(paint(line, rounds) for line in lines), count]), flush=True)
    time.sleep(PAUSE)


def verdict(text, example, task):
    """Whether a completion is right, and why: its answer, and its scores."""
    scores, answer = task.score(text, example), closed_answer(text)
    why = "no answer is closed" if answer is None else f"the answer is {unboxed(answer)}"
    numbers = "  ".join(f"{name} {value:g}" for name, value in scores.items())
    return f"{'right' if scores['accuracy'] == 1 else 'wrong'}: {why}\n{numbers}"


def main(args):
    """Watch --prompt, or the first problem of --task; with --count the last of so many."""
    args.watch, example, canvases = False, None, []
    if not args.prompt and args.task:
        example = TASKS[args.task].load("test", data=args.data or None, count=args.count or 1)[-1]
        args.prompt = example["prompt"]
    question = args.prompt.rpartition("\n\n")[2]  # without the instructions
    tokenizer = Tokenizer.from_folder(find_checkpoint(args.model))

    def generate(model, prompt, *inputs, on_step, **options):
        def show_round(x, committed_at):  # (1, T) both
            on_step()  # where a signal ends the program
            completion = x[0, prompt.shape[1]:], committed_at[0, prompt.shape[1]:]  # (L,) both
            canvases.append(completion[0])
            show(tokenizer, question, args.diffusion_steps, *completion)
        return sample.generate(model, prompt, *inputs, on_step=show_round, **options)

    sample.main(args, generate=generate)  # prints the answer
    if example:
        print(verdict(tokenizer.decode(canvases[-1]), example, TASKS[args.task]))


if __name__ == "__main__":
    main(sample.parse_args())
