"""How the d1 authors evaluate: the kind of their prompts, their graders, and the table of the paper.

Their graders differ from our scores: they look for boxes first, of several answers they take the first, and so on.
Each grader here gives a dict: "published", what they count; "of", how much there was to get; "exact", whether the same
text is right by our rules. Every grader ends in linear time on any text.
"""
import ast
import operator
import re
from fractions import Fraction

from data import countdown, gsm8k, math500, sudoku
from data.format import MAX_TEXT, closed_answer, last_box, unboxed

END = ("<|eot_id|>", "<|endoftext|>")  # their texts keep the end tokens
PREFILL = "<reasoning>"  # begins every completion
# accuracy in % at generation length 128, 256, 512 (table 1)
PAPER = {
    "LLaDA-8B-Instruct": {"gsm8k": (68.7, 76.7, 78.2), "math500": (26.0, 32.4, 36.2), "countdown": (20.7, 19.5, 16.0),
                          "sudoku": (11.7, 6.7, 5.5)},
    "+ SFT": {"gsm8k": (66.5, 78.8, 81.1), "math500": (26.2, 32.6, 34.8), "countdown": (20.3, 14.5, 23.8),
              "sudoku": (16.5, 8.5, 4.6)},
    "+ diffu-GRPO": {"gsm8k": (72.6, 79.8, 81.9), "math500": (33.2, 37.2, 39.2), "countdown": (33.2, 31.3, 37.1),
                     "sudoku": (18.4, 12.9, 11.0)},
    "+ SFT + diffu-GRPO": {"gsm8k": (73.2, 81.1, 82.1), "math500": (33.8, 38.6, 40.2), "countdown": (34.8, 32.0, 42.2),
                           "sudoku": (22.1, 16.7, 9.5)},
}


def find_in_paper(row, task, gen_length):
    """A number of the paper's table in per cent, or None where it has none."""
    return dict(zip((128, 256, 512), PAPER[row].get(task, ()))).get(gen_length)


# ---------------------------------------------------------------- prompts and examples

def write_prompt(task, example):
    """The prompt of an evaluation as the authors describe it: an expert, the answer in a box. The words are ours.

    For Sudoku theirs asks for no box.
    """
    if task == "countdown":
        instruction = ("With the numbers given, each used exactly once, and + - * / write an arithmetic expression "
                       "that equals the target; only that expression belongs in the box.")
        question = f"Numbers: {example['numbers']}\nTarget: {example['target']}"
    elif task == "sudoku":
        instruction = ("Solve this four by four Sudoku: each row, column and two by two box holds 1 to 4 once, zero "
                       "is an empty cell. The answer is the sixteen digits of the solution, row by row.")
        question = f"Puzzle: {example['puzzle']}"
    else:
        instruction, question = "Solve the following problem.", example["question"]
    return (f"You are an expert in mathematics and logic. {instruction} Work step by step and give the final answer "
            "in \\boxed{}.\nUse this format:\n<reasoning>\n...\n</reasoning>\n<answer>\n\\boxed{...}\n</answer>"
            f"\n\n{question}")


def make_example(task, question, truth):
    """The example behind an item of the authors' files. Raises ValueError or TypeError for an item of another task."""
    if task == "countdown":
        numbers, target = truth
        return {"numbers": [int(n) for n in numbers], "target": int(target)}
    if task == "sudoku":
        puzzle = re.search("(?<![0-9])[0-9]{16}(?![0-9])", question)
        if puzzle is None or not re.fullmatch("[0-9]{16}", truth):
            raise ValueError("no puzzle or no solution of 16 digits")
        return {"puzzle": puzzle[0], "solution": truth}
    if task == "gsm8k":  # the authors lost some answers
        return {"question": question, "answer": None if truth is None else str(Fraction(truth))}
    return {"question": question, "answer": truth}


# ---------------------------------------------------------------- what several graders share

def first_answer(text):
    """The text inside the first <answer>...</answer>, stripped, or None: where their graders look."""
    start = text.find("<answer>")
    end = text.find("</answer>", start)
    return text[start + len("<answer>"):end].strip() if 0 <= start < end else None


def final_answer(text):
    """Where we look: the last closed answer, boxed or not; without an answer the last box; else None."""
    return unboxed(closed_answer(text)) or last_box(text)


def read_box(text):
    r"""The text of the last box by their rule: behind `\boxed ` up to the next dollar, else braces balanced.

    A \boxed counts whatever follows it, without one an \fbox, and without either the whole text. Only \boxed{...}
    loses its name. None: the box never closes.
    """
    if "\\boxed " in text:
        return text.rpartition("\\boxed ")[2].partition("$")[0]
    start = text.rfind("\\boxed" if "\\boxed" in text else "\\fbox")
    if start < 0:
        return text
    depth = 0
    for end in range(start, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if text[end] == "}" and depth == 0:
            box = text[start:end + 1]
            return box[len("\\boxed{"):-1] if box.startswith("\\boxed{") else box
    return None


# ---------------------------------------------------------------- GSM8K and MATH

def find_boxes(text):
    r"""The texts from each \boxed{ to the next closing brace of the same line."""
    for line in text[:MAX_TEXT].split("\n"):
        start = line.find("\\boxed{")
        while start >= 0 and (end := line.find("}", start)) >= 0:
            yield line[start + len("\\boxed{"):end].strip()
            start = line.find("\\boxed{", end)


def read_float(text, place):
    """The float of a text, or else of the run of digits at `place`, 0 or -1; None where there is none."""
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        runs = re.findall(r"-?\d+\.?\d*", text)
        return float(runs[place]) if runs else None


def find_number(text):
    """The first number of the first readable box anywhere; without one the last number of the first answer."""
    numbers = (read_float(box, place=0) for box in find_boxes(text))
    number = next((number for number in numbers if number is not None), None)
    return read_float(first_answer(text), place=-1) if number is None else number


def grade_gsm8k(text, example):
    """Theirs: `find_number` equals the solution as a float, so that "1,000" reads as 1.

    Their reader of the test set loses negative answers: nobody can solve those problems (None in their files).
    """
    if example["answer"] is None:
        return {"published": 0.0, "of": 1, "exact": 0.0}
    truth = Fraction(example["answer"])
    return {"published": float(truth >= 0 and find_number(text) == float(truth)), "of": 1,
            "exact": float(gsm8k.is_right(final_answer(text), example))}


def find_latex(text):
    """Their box, or the first answer where it is empty or never closes. None: there is neither."""
    text = text[-MAX_TEXT:]
    box = read_box(text)
    answer = None if box else first_answer(text)
    return box if answer is None else answer


def grade_math500(text, example):
    """Theirs: `find_latex` has the form of the solution. An empty form equals an empty one, which ours refuses."""
    latex, solution = find_latex(text), example["answer"]
    both_empty = latex is not None and math500.normalise(latex) == math500.normalise(solution) == ""
    return {"published": float(both_empty or math500.is_right(latex, example)), "of": 1,
            "exact": float(math500.is_right(final_answer(text), example))}


# ---------------------------------------------------------------- Countdown

LEFT_SIDE = re.compile(r"(?<![0-9+\-*/() ])([0-9+\-*/() ]++)=[0-9. ]")


def raise_to(base, exponent):
    """base ** exponent. OverflowError for an integer of more than about 10,000 bits."""
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > 10_000:
        raise OverflowError("too large an integer")
    return base ** exponent


OPERATORS = {**countdown.OPERATORS, ast.Pow: raise_to, ast.FloorDiv: operator.floordiv}


def find_expression(text):
    r"""Their box, else the first answer, else all the text, with operators for \div, \times and \cdot.

    Of an equation only the left side.
    """
    text = text[-MAX_TEXT:]
    expression = next(part for part in (read_box(text), first_answer(text), text) if part is not None)
    expression = expression.replace(r"\div", "/").replace(r"\times", "*").replace(r"\cdot", "*")
    equation = LEFT_SIDE.search(expression)
    return equation[1].strip() if equation else expression


def reaches(expression, target):
    """Whether Python's value of an expression of at most 200 characters is within 1e-5 of the target. Runs no code."""
    def walk(node):
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.UnaryOp):
            return OPERATORS[type(node.op)](walk(node.operand))
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        raise SyntaxError("neither a number nor arithmetic")

    if len(expression) > 200 or not re.fullmatch(r"[\d+\-*/().\s]+", expression):
        return False
    try:
        return abs(walk(ast.parse(expression.strip(), mode="eval").body) - target) < 1e-5
    except (SyntaxError, KeyError, ArithmeticError, RecursionError, MemoryError, TypeError):
        return False  # TypeError: arithmetic with "...", // of a complex root of a negative number


def grade_countdown(text, example):
    """Theirs: `find_expression` has the numbers given as its digits, and Python's value of it is the target."""
    expression = find_expression(text)
    numbers = sorted(map(int, re.findall(r"\d+", expression[:200])))
    right = numbers == sorted(example["numbers"]) and reaches(expression, example["target"])
    return {"published": float(right), "of": 1, "exact": float(countdown.is_right(final_answer(text), example))}


# ---------------------------------------------------------------- Sudoku

def find_grid(text):
    """The digits, or whatever stands there, that they take for the solution; blanks removed.

    The first that is not blank of: digits fenced by ``` behind <answer>; what follows <answer> up to an end tag or end
    token; what follows </answer>; 16 digits before </answer>; 16 digits anywhere.
    """
    text = text[:MAX_TEXT]
    answer, behind = text.partition("<answer>")[2], text.partition("</answer>")[2]
    fenced = re.search(r"```([\d\s]++)```", answer)
    parts = [fenced[1] if fenced else "", cut_before(answer, (*END, "</answer>"), default=""),
             cut_before(behind.lstrip(), END, default=behind)]
    for pattern in (r"(\d{16})\s*+</answer>", r"\b(\d{16})\b"):
        match = re.search(pattern, text)
        parts.append(match[1] if match else "")
    return re.sub(r"\s", "", next((part for part in parts if part.strip()), ""))


def cut_before(text, ends, default):
    """`text` up to the first of `ends`, or `default` where it holds none."""
    places = [place for place in map(text.find, ends) if place >= 0]
    return text[:min(places)] if places else default


def grade_sudoku(text, example):
    """Theirs: empty cells in which `find_grid`, filled up with zeros or cut to 16, is the stored solution.

    valid: our answer is 16 digits from 1 to 4.
    """
    answer, puzzle = final_answer(text), example["puzzle"]
    filled = find_grid(text).ljust(16, "0")[:16]
    right = sum(filled[i] == example["solution"][i] for i in range(16) if puzzle[i] == "0")
    return {"published": right, "of": puzzle.count("0"), "exact": float(sudoku.is_right(answer, example)),
            "valid": float(sudoku.read_grid(answer) is not None)}


GRADERS = {"countdown": grade_countdown, "gsm8k": grade_gsm8k, "math500": grade_math500, "sudoku": grade_sudoku}
