"""Generated examples: their splits, the behaviours of demonstrations, and how both are drawn."""
import hashlib
import random

# split: how many examples it has by default
COUNTS = {"train": 4096, "test": 512, "worked": 100_000, "mixed": 100_000, "corrected": 1000}
# split: shares of the behaviours that it demonstrates. "mixed" is what the embedded model knows
# (data/tiny/README.md); in "corrected" every other trace goes wrong and mends itself
BEHAVIOURS = {"mixed": {"worked": 0.20, "hasty": 0.45, "untagged": 0.35},
              "corrected": {"worked": 0.50, "corrected": 0.50}}
MAX_DRAWS = 300_000  # for an example; after that many the problems count as exhausted


def draw_examples(task, split, count, seed, draw, demonstrate):
    """Draw `count` examples, by default COUNTS; a longer list begins with the shorter list.

    task: its name, a part of the seed. draw(rng) returns an example with a "prompt", and the key
    for `is_held_out`. demonstrate(behaviour, example, rng) returns a completion.
    """
    if split not in COUNTS:
        raise SystemExit(f"error: --split {split}: choose from {', '.join(COUNTS)}")
    count = COUNTS[split] if count is None else count
    is_test = split == "test"
    rng = random.Random(f"{task}-{'test' if is_test else 'train'}-{seed}")
    examples, prompts = [], set()
    while len(examples) < count:
        for _ in range(MAX_DRAWS):
            example, key = draw(rng)
            if is_held_out(key) == is_test and not (is_test and example["prompt"] in prompts):
                break
        else:
            raise SystemExit(f"error: --count {count}: {task} has only {len(examples)} problems")
        if split not in ("train", "test"):
            shares = BEHAVIOURS.get(split)
            behaviour = rng.choices(list(shares), shares.values())[0] if shares else "worked"
            example["completion"] = demonstrate(behaviour, example, rng)
        examples.append(example)
        prompts.add(example["prompt"])
    return examples


def is_held_out(key):
    """Whether a problem belongs to "test": an eighth of them do, by the hash of their key."""
    return hashlib.sha256(key.encode()).digest()[0] < 32
