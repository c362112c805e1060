"""Sorting, a task of one's own in 40 lines: five numbers from 1 to 20, the smallest first. It would live in data/."""
import random
import re

from data.format import FORMAT, closed_answer, default_count, score_answer, write_completion

QUESTION = "Sort these numbers, the smallest first. Put only the sorted numbers inside the answer tags."


def load(split, data=None, count=None, seed=0):
    """Examples with "prompt" and "numbers"; those of "worked", for SFT, with "completion". "test" is held out."""
    if data is not None:
        raise ValueError(f"--data {data}: the lists to sort are generated")
    rng, examples = random.Random(f"sorting-{split}-{seed}"), []
    while len(examples) < (default_count(split) if count is None else count):
        numbers = [rng.randint(1, 20) for _ in range(5)]
        if (sum(numbers) % 8 == 0) != (split == "test"):  # held out: one in eight, whatever the order of its numbers
            continue
        prompt = f"{FORMAT}\n\n{QUESTION}\n\nNumbers: {', '.join(map(str, numbers))}"
        examples.append({"prompt": prompt, "numbers": numbers})
        if split == "worked":
            examples[-1]["completion"] = write_completion("In order", ", ".join(map(str, sorted(numbers))))
    return examples


def places(answer, example):
    """Share of the places that hold the right number. Total: any answer, text or None, has one."""
    found, right = re.findall("[0-9]+", answer or ""), [str(n) for n in sorted(example["numbers"])]
    return sum(a == b for a, b in zip(found, right)) / max(len(found), len(right))


def reward(text, example):
    """A tenth for an answer that was closed, and the share of its places that are right."""
    return {"closed": 0.1 * (closed_answer(text) is not None), "places": places(closed_answer(text), example)}


def score(text, example):
    return score_answer(text, example, lambda answer, example: places(answer, example) == 1)
