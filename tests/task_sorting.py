"""Sorting, a task of one's own: five numbers from 1 to 20, the smallest first. It would live in data/."""
import re

from data.examples import draw_examples
from data.format import FORMAT, closed_answer, score_answer, write_completion

QUESTION = "Sort these numbers, the smallest first. Put only the sorted numbers inside the answer tags."


def load(split, data=None, count=None, seed=0):
    """Examples with "prompt" and "numbers"; for SFT also with "completion". An eighth is held out for "test"."""
    if data:
        raise SystemExit(f"error: --data {data}: the lists to sort are generated, leave it out")
    return draw_examples("sorting", split, count, seed, draw_problem, demonstrate)


def draw_problem(rng):
    """A problem and its key: lists of the same numbers are on the same side of the split."""
    numbers = [rng.randint(1, 20) for _ in range(5)]
    prompt = f"{FORMAT}\n\n{QUESTION}\n\nNumbers: {', '.join(map(str, numbers))}"
    return {"prompt": prompt, "numbers": numbers}, str(sorted(numbers))


def demonstrate(behaviour, problem, rng):
    return write_completion("In order", ", ".join(map(str, sorted(problem["numbers"]))))


def right_places(answer, example):
    """Share of the places that hold the right number. Total: any answer, text or None, has a share."""
    numbers, expected = re.findall("[0-9]+", answer or ""), [str(n) for n in sorted(example["numbers"])]
    return sum(a == b for a, b in zip(numbers, expected)) / max(len(numbers), len(expected))


def reward(text, example):
    """A tenth for an answer that was closed, and the share of its places that are right."""
    answer = closed_answer(text)
    return {"closed": 0.1 * (answer is not None), "places": right_places(answer, example)}


def score(text, example):
    return score_answer(text, example, lambda answer, example: right_places(answer, example) == 1)
