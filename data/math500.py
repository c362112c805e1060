r"""MATH (arXiv:2103.03874): competition problems in LaTeX; trained on MATH, tested on MATH-500."""
import re

from data.files import find_file, read_rows
from data.format import FORMAT, closed_answer, last_box, score_answer, unboxed

FILES = {"train": ("math500_train", "nlile/hendrycks-MATH-benchmark",
                   "data/train-00000-of-00001.parquet"),
         "test": ("math500_test", "HuggingFaceH4/MATH-500", "test.jsonl")}
QUESTION = r"Solve the problem. Put only the final answer, as \boxed{...}, inside the answer tags."
SPELLINGS = (("\n", ""), (r"\!", ""), (r"\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"),
             (r"\left", ""), (r"\right", ""), (r"^{\circ}", ""), (r"^\circ", ""), (r"\$", ""))


def load(split, data=None, count=None, seed=0):
    """Dicts with "prompt", "question", "solution" ("" where there is none), "answer" (LaTeX).

    split: train (12,000) or test (500). data: see `find_file`; rows have problem and answer, or
    problem and solution that ends in a box.
    """
    rows = read_rows(find_file(data, split, FILES), ("problem",))
    return list(map(read_problem, rows[:count]))


def read_problem(row):
    question, solution = str(row["problem"]).strip(), str(row.get("solution") or "")
    answer = last_box(solution) if row.get("answer") is None else str(row["answer"])
    if not answer or not answer.strip():
        raise SystemExit(f"{row['where']} no answer, and no solution that ends in \\boxed{{}}")
    prompt = f"{FORMAT}\n\n{QUESTION}\n\n{question}"
    return {"prompt": prompt, "question": question, "solution": solution, "answer": answer}


def normalise(text):
    r"""The canonical form of a LaTeX answer by the rules of the MATH graders, in linear time.

    Spacing, \left, \right, degrees, dollar and per cent signs and a unit, \text{ ...}, go; "x = 5"
    becomes 5; \dfrac12, \frac{1}{2}, 1/2 and 0.5 get one form. None where the rules give up: on
    several units, on a command without its argument, on a slash that is not between integers.
    """
    for old, new in SPELLINGS:
        text = text.replace(old, new)
    text, *units = text.split(r"\text{ ")
    if len(units) > 1:
        return None
    text = re.sub(r"(^|[ {])\.", r"\g<1>0.", text.replace(r"\%", ""))
    text = re.sub("^[^=]{0,2}=([^=]*)$", r"\1", text)  # the left side of an equation
    if re.search(r"\\sqrt(\\sqrt|$)", text):
        return None
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    broken = re.search(r"\\frac([^{]?)(\\frac|$)", text)
    if broken and not broken[1]:
        return None
    if not broken:
        text = re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", text)
        text = re.sub(r"\\frac([^{]){", r"\\frac{\1}{", text)  # \frac1{72}; \frac{72}1 stays
    text = "1/2" if text == "0.5" else text
    if text.count("/") == 1 and not re.fullmatch(r"\s*[+-]?\d+\s*/\s*[+-]?\d+\s*", text):
        return None
    return re.sub(r"^(0|-?[1-9]\d*)/(0|-?[1-9]\d*)$", r"\\frac{\1}{\2}", text)


def is_right(answer, example):
    """Whether an answer, LaTeX or None, and the solution have one text, or one form, not empty."""
    answer, solution = answer or "", example["answer"]
    forms = normalise(answer), normalise(solution)
    return forms[0] == forms[1] if all(forms) else answer == solution


def reward(text, example):
    r"""Rewards as the paper intends (section 4): the format up to 1, correct 2.

    format: 1 for a closed answer with a closed box in it, 0.75 for a closed answer without, 0.5
    for a box alone, else 0.25. correct: the answer, or without an answer the box, is right.
    """
    answer = closed_answer(text)
    boxed = last_box(text if answer is None else answer) is not None
    return {"format": 0.25 + 0.5 * (answer is not None) + 0.25 * boxed,
            "correct": 2.0 * is_right(unboxed(answer) or last_box(text), example)}


def score(text, example):
    return score_answer(text, example, is_right)
