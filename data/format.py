"""The answer format shared by all tasks, in prompts, demonstrations, rewards and scores alike."""
import re

FORMAT = ("Think first, then answer, with each tag on a line of its own:\n"
          "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>")
# Linear: no two parts of the pattern can match the same text in two ways.
STRICT = re.compile(r"<reasoning>\n(?:(?!</?reasoning>|</?answer>).)*\n</reasoning>\n"
                    r"<answer>\n(?:(?!</?reasoning>|</?answer>).)*\n</answer>\s*", re.DOTALL)
COUNTS = {"train": 4096, "test": 512, "worked": 100_000, "mixed": 100_000}  # generated examples, unless told otherwise
MAX_TEXT = 20_000  # characters: longer than any completion; a longer text is cut before it is parsed


def default_count(split):
    """How many examples a split has where they are generated. Raises ValueError for a split that does not exist."""
    if split not in COUNTS:
        raise ValueError(f"--split {split}: choose from {', '.join(COUNTS)}")
    return COUNTS[split]


def write_completion(reasoning, answer):
    """The text of a completion in the shared format."""
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"


def closed_answer(text):
    """The text inside the last closed <answer>...</answer>, stripped, or None where no answer was closed.

    Of several closed answers the last counts; of nested ones the innermost; an unclosed one after it is ignored, and so
    is a closing tag without an opening one.
    """
    text = text[-MAX_TEXT:]
    last_end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, last_end) if last_end >= 0 else -1
    return text[start + len("<answer>"):text.find("</answer>", start)].strip() if start >= 0 else None


def is_formatted(text):
    """Whether the whole text is <reasoning> and <answer>, once each, closed, every tag on its own line."""
    return len(text) <= MAX_TEXT and STRICT.fullmatch(text.strip()) is not None


def last_box(text):
    r"""The content of the last \boxed{...} with its braces balanced, None where there is none or it was not closed.

    Of `\boxed 5`, with a blank, the text up to the next dollar, wherever that stands: a rule of the MATH graders.
    """
    text = text[-MAX_TEXT:]
    if "\\boxed " in text:
        return text.rpartition("\\boxed ")[2].partition("$")[0]
    start, depth = text.rfind("\\boxed{"), 0
    for i in range(start, len(text)) if start >= 0 else ():
        depth += (text[i] == "{") - (text[i] == "}")
        if text[i] == "}" and depth == 0:
            return text[start + len("\\boxed{"):i]
    return None


def unboxed(answer):
    """An answer without the box around it, if there is one; None of None."""
    return last_box(answer or "") or answer


def score_answer(text, example, is_right):
    """The scores of a text. accuracy: is_right(answer, example) of the closed answer, boxed or not; closed: any closed
    answer; format: the whole text in the shared format.
    """
    answer = closed_answer(text)
    return {"accuracy": float(is_right(unboxed(answer), example)), "closed": float(answer is not None),
            "format": float(is_formatted(text))}


def final_answer(text):
    """What the text answers: the box in the last closed answer, or that answer, or the last box; None without any."""
    return unboxed(closed_answer(text)) or last_box(text)
