r"""train_grpo.py with the rewards of GSM8K and MATH that the authors' code computes, slip for slip.

    python variants/authors_rewards.py --task gsm8k --model GSAI-ML/LLaDA-8B-Instruct

They trained the paper's models; docs/differences.md, items 17 and 18, says where ours differ. Prompts and scores stay
ours. The rules are in diffu-grpo/reward_func.py and diffu-grpo/math500_utils.py of github.com/dllm-reasoning/d1.
"""
import re
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_grpo  # noqa: E402
from data import TASKS, math500  # noqa: E402
from data.format import MAX_TEXT  # noqa: E402
from tools import published  # noqa: E402

TAG_LINES = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
SOFT = r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>"  # no line break inside a pair of tags
STRICT = r"<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$"


def reward_gsm8k(text, example):
    """Tags up to 0.5, less 0.001 for each character behind them; soft, strict, integer 0.5; the string behind #### 2.

    Only the first MAX_TEXT characters of a text count, so that SOFT takes bounded time; theirs has no such limit.
    """
    text = text[:MAX_TEXT]
    behind = 0  # characters
    if text.count("\n<answer>\n") == 1:
        behind += len(text.split("\n</answer>\n")[-1])  # all of the text where that tag is absent
    if text.count("\n</answer>") == 1:
        behind += len(text.split("\n</answer>")[-1]) - 1  # one is free, and none earns 0.001
    answer = text.split("<answer>")[-1].split("</answer>")[0].strip()
    return {"tags": 0.125 * sum(text.count(tag) == 1 for tag in TAG_LINES) - 0.001 * behind,
            "soft": 0.5 * (re.match(SOFT, text) is not None),
            "strict": 0.5 * (re.match(STRICT, text) is not None),
            "integer": 0.5 * answer.isdigit(),
            "correct": 2.0 * (answer == example["solution"].split("####")[1].strip())}


def read_box(text):
    """The text of the last box, see `published.read_box`; all of the text where it never closes."""
    box = published.read_box(text)
    return text if box is None else box


def reward_math500(text, example):
    """Format 0.75 behind an <answer>, closed or not, else 0.25; correct 2: the box has the form of the solution's.

    A solution with an open box, at which their code stops, counts whole. A row without one has an answer.
    """
    _, tag, behind = text.partition("<answer>")
    place = re.split("</?answer>", behind)[0] if tag else text
    has_box = "\x08oxed" in place  # they wrote "\boxed", where \b is a backspace
    box, solution = read_box(text), example["solution"]
    truth = read_box(solution) if solution else example["answer"]
    forms = math500.normalise(box), math500.normalise(truth)
    is_right = box == truth if None in forms else forms[0] == forms[1]  # both may be empty
    return {"format": 0.25 + 0.5 * bool(tag) + 0.25 * has_box, "correct": 2.0 * is_right}


REWARDS = {"gsm8k": reward_gsm8k, "math500": reward_math500}


def main(args):
    task = TASKS[args.task]
    if args.task not in REWARDS:
        raise SystemExit(f"error: --task {args.task}: its reward is the authors' already, run train_grpo.py")
    args.out = args.out or f"runs/authors_rewards-{args.task}"
    TASKS[args.task] = SimpleNamespace(__name__=__name__, load=task.load, score=task.score, reward=REWARDS[args.task])
    try:
        return train_grpo.main(args)
    finally:
        TASKS[args.task] = task


if __name__ == "__main__":
    main(train_grpo.parse_args())
