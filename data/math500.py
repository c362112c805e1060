r"""MATH (arXiv:2103.03874): competition problems, answers in LaTeX; trained on its train set, evaluated on MATH-500."""
import re

from data.files import SUFFIXES, find_file, read_rows
from data.format import FORMAT, MAX_TEXT, closed_answer, final_answer, last_box, score_answer
from data.published import first_answer, write_published

HUB = {"train": ("nlile/hendrycks-MATH-benchmark", "data/train-00000-of-00001.parquet"),
       "test": ("HuggingFaceH4/MATH-500", "test.jsonl")}
QUESTION = r"Solve the problem. Put only the final answer, as \boxed{...}, inside the answer tags."


def load(split, data=None, count=None, seed=0):
    """Problems as dicts with "prompt", "question", "answer" (LaTeX).

    split: train (12,000) or test (500); data: a file with problem and answer, or problem and solution, whose last box
    then is the answer; a folder or dataset id that holds the published files; default: the public dataset. Raises
    ValueError naming file and row.
    """
    if split not in HUB:
        raise ValueError(f"--split {split}: MATH has train and test")
    path = find_file(data, [f"math500_{split}{suffix}" for suffix in SUFFIXES], HUB[split])
    return [read_problem(row, path) for row in read_rows(path, ("problem",))[:count]]


def read_problem(row, path):
    question = str(row["problem"]).strip()
    answer = str(row["answer"]) if row.get("answer") is not None else last_box(str(row.get("solution", "")))
    if not answer or not answer.strip():
        raise ValueError(f"--data {path}, row {row['row']}: neither an answer nor a solution that ends in \\boxed{{}}")
    return {"prompt": f"{FORMAT}\n\n{QUESTION}\n\n{question}", "question": question, "answer": answer}


def published_prompt(example):
    return write_published("Solve the following problem.", example["question"])


def published_example(question, truth):
    """An example from an item of the authors' files."""
    return {"question": question, "answer": truth}


# ---------------------------------------------------------------- when two LaTeX answers are the same

def brace_arguments(text, command, count):
    r"""Put braces around the arguments of `command` that lack them: \sqrt3, \frac1b, \frac1{72}, but not \frac{72}1.

    count: of its arguments. None where an argument is missing.
    """
    first, *rest = text.split(command)
    for i, part in enumerate(rest):
        if not part:
            return None
        if part[0] != "{":
            bare = part[:1] if count == 1 or part[1:2] == "{" else part[:2]
            if len(part) < count:
                return text
            part = "".join(f"{{{symbol}}}" for symbol in bare) + part[len(bare):]
        rest[i] = part
    return command.join([first, *rest])


def normalise(text):
    r"""The canonical form of a LaTeX answer, by the rules of the MATH graders, in linear time; None where they give up.

    Spacing, \left and \right, degrees, dollar and per cent signs go; dfrac and tfrac are frac; a unit on the right
    (\text{ ...}) goes; "x = 5" is 5; \sqrt3, \frac12, 1/2 and 0.5 get one form. They give up on several units, on a
    command that lacks its argument, and on one slash between what are not whole numbers.
    """
    for old, new in (("\n", ""), (r"\!", ""), (r"\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), (r"\left", ""),
                     (r"\right", ""), (r"^{\circ}", ""), (r"^\circ", ""), (r"\$", "")):
        text = text.replace(old, new)
    text, *units = text.split(r"\text{ ")
    if len(units) > 1:
        return None
    for old, new in ((r"\%", ""), (" .", " 0."), ("{.", "{0.")):
        text = text.replace(old, new)
    text = "0" + text if text.startswith(".") else text
    left, *right = text.split("=")
    if len(right) == 1 and len(left) <= 2:
        text = right[0]
    text = brace_arguments(text, r"\sqrt", 1)
    text = text and brace_arguments(text.replace(" ", ""), r"\frac", 2)
    if text == "0.5":
        return r"\frac{1}{2}"
    if text and text.count("/") == 1:
        a, b = text.split("/")
        if not re.fullmatch(r"\s*[+-]?\d+\s*", a) or not re.fullmatch(r"\s*[+-]?\d+\s*", b):
            return None
        return rf"\frac{{{a}}}{{{b}}}" if re.fullmatch(r"(0|-?[1-9]\d*)/(0|-?[1-9]\d*)", text) else text
    return text


def same(a, b):
    """Whether two LaTeX answers agree in their canonical form, or in the text where one has none."""
    short = len(a) <= MAX_TEXT and len(b) <= MAX_TEXT
    forms = [normalise(a), normalise(b)] if short else [None]
    return a == b if None in forms else forms[0] == forms[1]


# ---------------------------------------------------------------- rewards and scores

def is_right(answer, example):
    """Whether an answer, LaTeX or None, is the solution's."""
    return answer is not None and same(answer, example["answer"])


def reward(text, example):
    r"""format: 1 for a closed answer with a box in it, .75 for one without, .5 for a box alone, .25 else; correct: 2.

    As the paper intends (table in section 4). A box counts where it is closed.
    """
    answer = closed_answer(text)
    boxed = last_box(text if answer is None else answer) is not None
    return {"format": 0.25 + 0.5 * (answer is not None) + 0.25 * boxed,
            "correct": 2.0 * is_right(final_answer(text), example)}


def score(text, example):
    """accuracy: a closed answer equal to the solution's; closed, format: see `score_answer`."""
    return score_answer(text, example, is_right)


def published(text, example):
    """The authors' verdict on a completion, and ours. {name: value} with "of", how much there was to get.

    Theirs: the last box anywhere, or the first answer where there is no box or an empty one. exact: of the last answer.
    """
    return {"published": float(is_right(last_box(text) or first_answer(text), example)), "of": 1,
            "exact": float(is_right(final_answer(text), example))}
