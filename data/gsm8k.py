"""GSM8K (arXiv:2110.14168): grade-school word problems, the answer one number."""
import re
from fractions import Fraction

from data.files import SUFFIXES, find_file, read_rows
from data.format import FORMAT, MAX_TEXT, closed_answer, final_answer, is_formatted, score_answer, unboxed
from data.published import first_answer, write_published

HUB = {"train": ("openai/gsm8k", "main/train-00000-of-00001.parquet"),
       "test": ("openai/gsm8k", "main/test-00000-of-00001.parquet")}
QUESTION = "Solve the problem. Put only the final number inside the answer tags."
NUMBER = re.compile(r"[-−]?(?:[0-9](?:[0-9,]*[0-9])?(?:\.[0-9]+)?|\.[0-9]+)")
THOUSANDS = re.compile(r"[0-9]{1,3}(,[0-9]{3})+")
WHOLE = re.compile(r"-?([0-9]{1,15}|[0-9]{1,3}(,[0-9]{3}){1,4})")
PUBLISHED_NUMBER = re.compile(r"-?\d+\.?\d*")
SOFT = re.compile(r"<reasoning>(?:(?!</reasoning>).)*</reasoning>\s*+<answer>(?:(?!</answer>).)*</answer>", re.DOTALL)
TAGS = ("\n<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")


def load(split, data=None, count=None, seed=0):
    """Problems as dicts with "prompt", "question", "answer" (text of the number, without thousands commas).

    split: train (7,473) or test (1,319); data: a file with question and answer (ending in "#### number", as published),
    a folder or dataset id that holds the published files; default: the public dataset. Raises ValueError naming
    file and row.
    """
    if split not in HUB:
        raise ValueError(f"--split {split}: GSM8K has train and test")
    path = find_file(data, [f"gsm8k_{split}{suffix}" for suffix in SUFFIXES], HUB[split])
    return [read_problem(row, path) for row in read_rows(path, ("question", "answer"))[:count]]


def read_problem(row, path):
    question, answer = str(row["question"]).strip(), str(row["answer"]).rpartition("####")
    number = read_number(answer[2])
    if not answer[1] or number is None:
        raise ValueError(f"--data {path}, row {row['row']}: the answer must end in '#### number', "
                         f"found {str(row['answer'])[-40:]!r}")
    return {"prompt": f"{FORMAT}\n\n{QUESTION}\n\n{question}", "question": question, "answer": str(number)}


def published_prompt(example):
    return write_published("Solve the following problem.", example["question"])


def published_example(question, truth):
    """An example from an item of the authors' files; the answer is None where they lost it."""
    return {"question": question, "answer": None if truth is None else str(Fraction(truth))}


def read_number(text):
    """The number (Fraction) that `text` states, or None where it holds no number or several.

    Currency, units, a final period and thousands commas may stand around and in it: "$1,000.", "-3", "18 dollars".
    """
    found = NUMBER.findall(text) if text and len(text) <= 200 else []
    if len(found) != 1:
        return None
    number = found[0].replace("−", "-")
    well_set = "," not in number or THOUSANDS.fullmatch(number.lstrip("-").partition(".")[0])
    return Fraction(number.replace(",", "")) if well_set else None


def is_right(answer, example):
    """Whether an answer, text or None, is one number, equal to the solution's."""
    return example["answer"] is not None and read_number(answer) == Fraction(example["answer"])


def reward(text, example):
    """As the paper intends (table in section 4): format of the tags up to 2, integer 0.5, correct 2.

    tags: 0.125 for each of the four tags that stands once, on its own line, less 0.001 for each character after the
    last, never below 0. soft: reasoning, then answer, both closed. strict: each tag on its own line, nothing around.
    integer: the answer is one whole number and nothing else ("-3" and "1,000" are). correct: `is_right`, boxed or not.
    """
    text = text[:MAX_TEXT]
    after = len(text.rpartition("</answer>")[2].strip()) if "</answer>" in text else 0
    tags = 0.125 * sum(f"\n{text}\n".count(tag) == 1 for tag in TAGS)
    answer = closed_answer(text)
    return {"tags": max(0.0, tags - 0.001 * after), "soft": 0.5 * (SOFT.match(text.strip()) is not None),
            "strict": 0.5 * is_formatted(text),
            "integer": 0.5 * (WHOLE.fullmatch(answer or "") is not None),
            "correct": 2.0 * is_right(unboxed(answer), example)}


def score(text, example):
    """accuracy: a closed answer that is the right number; closed, format: see `score_answer`."""
    return score_answer(text, example, is_right)


def published(text, example):
    """The authors' verdict on a completion, and ours. {name: value} with "of", how much there was to get.

    Theirs: the first number of the first readable \\boxed{}, anywhere; without one the last number in the first
    answer; equal as floats. So "1,000" reads as 1. Their reader of the test set loses negative answers, whose problems
    nobody can solve (answer None in their files). exact: `is_right` of the last answer, commas and all.
    """
    truth = None if example["answer"] is None else Fraction(example["answer"])
    found = next((number for box in boxes(text) if (number := to_float(box, first=True)) is not None), None)
    if found is None:
        found = to_float(first_answer(text), first=False)
    return {"published": float(truth is not None and truth >= 0 and found == float(truth)), "of": 1,
            "exact": float(is_right(final_answer(text), example))}


def boxes(text):
    r"""The texts from each \boxed{ to the next closing brace of the same line, in linear time."""
    for line in text[:MAX_TEXT].split("\n"):
        start = line.find("\\boxed{")
        while start >= 0 and (end := line.find("}", start)) >= 0:
            yield line[start + len("\\boxed{"):end].strip()
            start = line.find("\\boxed{", end)


def to_float(text, first):
    """What Python's float reads, else the first or last run of digits in the text; None where there is none."""
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        found = PUBLISHED_NUMBER.findall(text)
        return float(found[0 if first else -1]) if found else None
