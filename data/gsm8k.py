"""GSM8K (arXiv:2110.14168): grade-school word problems, the answer is a number."""
import re
from fractions import Fraction

from data.files import find_file, read_rows
from data.format import FORMAT, MAX_TEXT, closed_answer, is_formatted, score_answer, unboxed

FILES = {"train": ("gsm8k_train", "openai/gsm8k", "main/train-00000-of-00001.parquet"),
         "test": ("gsm8k_test", "openai/gsm8k", "main/test-00000-of-00001.parquet")}
QUESTION = "Solve the problem. Put only the final number inside the answer tags."
NUMBER = re.compile(r"([-−]?)\\?\$?"
                    r"((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
UNCLEAR = re.compile(r"(?i:minus|negative)|[\w)][-−]\\?\$?[.0-9]|[-−](?!\\?\$?[.0-9])\W*[0-9]"
                     r"|[0-9]\s*(?:!|[kKM]\b|hundred|thousand|million|billion|dozen)")
WHOLE = re.compile(r"-?([0-9]{1,15}|[0-9]{1,3}(,[0-9]{3}){1,4})")
SOFT = r"(?s)<reasoning>(?:(?!</reasoning>).)*</reasoning>\s*<answer>.*?</answer>"
TAG_LINES = ("\n<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")


def load(split, data=None, count=None, seed=0):
    """Dicts with "prompt", "question", "solution", "answer" (its number as text, without commas).

    split: train (7,473) or test (1,319). data: see `find_file`; an answer ends in "#### number".
    """
    rows = read_rows(find_file(data, split, FILES), ("question", "answer"))
    return list(map(read_problem, rows[:count]))


def read_problem(row):
    question, solution = str(row["question"]).strip(), str(row["answer"])
    number = read_number(solution.rpartition("####")[2])
    if "####" not in solution or number is None:
        raise SystemExit(f"{row['where']} answer must end in '#### number': {solution[-40:]!r}")
    prompt = f"{FORMAT}\n\n{QUESTION}\n\n{question}"
    return {"prompt": prompt, "question": question, "solution": solution, "answer": str(number)}


def read_number(text):
    """The number (Fraction) of "$1,000.", "-$3", "18 eggs"; None for "1 of 2", "- 5", "5!"."""
    clear = text and len(text) <= 200 and not UNCLEAR.search(text)
    numbers = NUMBER.findall(text) if clear else []
    if len(numbers) != 1:
        return None
    sign, digits = numbers[0]
    return Fraction(("-" if sign else "") + digits.replace(",", ""))


def is_right(answer, example):
    """Whether an answer, text or None, states the number of the solution."""
    return read_number(answer) == Fraction(example["answer"])


def reward(text, example):
    """Rewards as the paper intends (section 4): the format up to 2, an integer 0.5, correct 2.

    tags: 0.125 for each of the four tags that stands once, on its own line, less 0.001 for each
    character behind them, never below 0. soft: reasoning, then answer, both closed. strict: the
    whole format. integer: the answer is "18", "-3" or "1,000". correct: it is right, boxed or not.
    """
    text = text[:MAX_TEXT]
    answer = closed_answer(text)
    tags = 0.125 * sum(f"\n{text}\n".count(tag) == 1 for tag in TAG_LINES)
    behind = text.rpartition("</answer>")[2].strip() if "</answer>" in text else ""
    return {"tags": max(0.0, tags - 0.001 * len(behind)),
            "soft": 0.5 * (re.match(SOFT, text.strip()) is not None),
            "strict": 0.5 * is_formatted(text),
            "integer": 0.5 * (WHOLE.fullmatch(answer or "") is not None),
            "correct": 2.0 * is_right(unboxed(answer), example)}


def score(text, example):
    return score_answer(text, example, is_right)
