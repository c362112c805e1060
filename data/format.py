"""The answer format of all tasks, for prompts, demonstrations, rewards and scores."""
import re

FORMAT = ("Think first, then answer, with each tag on a line of its own:\n"
          "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>")
# Linear: no two parts of the pattern can match the same text in two ways.
UNTAGGED = r"(?:(?!</?reasoning>|</?answer>)[\s\S])*"
STRICT = rf"<reasoning>\n{UNTAGGED}\n</reasoning>\n<answer>\n{UNTAGGED}\n</answer>"
MAX_TEXT = 20_000  # characters: longer than any completion; a longer text is cut before parsing


def write_completion(reasoning, answer):
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"


def closed_answer(text):
    """The text inside the last closed <answer>...</answer>, stripped; None if none was closed.

    As in the authors' rewards: an answer begins at the first tag behind the end of another.
    """
    closed = [part for part in text[-MAX_TEXT:].split("</answer>")[:-1] if "<answer>" in part]
    return closed[-1].partition("<answer>")[2].strip() if closed else None


def is_formatted(text):
    """Whether the text is <reasoning> and <answer>, each closed, all four tags on own lines."""
    return len(text) <= MAX_TEXT and re.fullmatch(STRICT, text.strip()) is not None


def last_box(text):
    r"""The content of the last \boxed{...}, braces balanced; None if there is none or it is open.

    `\boxed 5`, with a blank, holds the text up to the next dollar: a rule of the MATH graders.
    """
    text = text[-MAX_TEXT:]
    if "\\boxed " in text:
        return text.rpartition("\\boxed ")[2].partition("$")[0]
    _, box, content = text.rpartition("\\boxed{")
    depth = 1
    for i, character in enumerate(content if box else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return content[:i]
    return None


def unboxed(answer):
    """An answer, text or None, without the box around it."""
    return last_box(answer or "") or answer


def score_answer(text, example, is_right):
    """Scores of a text. accuracy: is_right(answer, example) of its closed answer, without a box.

    closed: there is a closed answer. format: the whole text has the shared format.
    """
    answer = closed_answer(text)
    return {"accuracy": float(is_right(unboxed(answer), example)),
            "closed": float(answer is not None), "format": float(is_formatted(text))}
