"""The d1 authors' evaluation: their prompts, their files of generations, their table. Their graders are the tasks'."""
import json
import re
from pathlib import Path

END = ("<|eot_id|>", "<|endoftext|>")  # their texts keep the end tokens
PREFILL = "<reasoning>"  # begins every completion
NAME = re.compile(r"((gsm8k|gsm|math500|math|countdown|sudoku)_.*?)_[0-9]+_generations\.json")
TASK = {"gsm": "gsm8k", "math": "math500"}  # short forms in file names
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


def paper(row, task, gen_length):
    """A number of the paper's table, or None where it has none."""
    return dict(zip((128, 256, 512), PAPER[row].get(task, ()))).get(gen_length)


def table(rows):
    """Lines of aligned columns, a line of names first, from dicts of texts and numbers; shares as per cent."""
    def cell(name, value):
        if isinstance(value, float):
            plain = ("effective_tokens", "rounds", "tokens_per_second", "paper")
            return f"{value:.1f}" if name in plain else f"{value:.2%}"
        return "" if value is None else str(value)

    names = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    lines = [names, *([cell(name, row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([first.ljust(widths[0]), *(text.rjust(w) for text, w in zip(rest, widths[1:]))]).rstrip()
                     for first, *rest in lines)


def beside_the_paper(results, model):
    """Our accuracy by the published rules above the paper's table, where that has the task and length; else nothing."""
    known = [r for r in results if paper("LLaDA-8B-Instruct", r["task"], r["gen_length"]) is not None]
    ours = {f"{r['task']} {r['gen_length']}": r["published"] for r in known}
    theirs = [{"by the published rules": name} | {f"{r['task']} {r['gen_length']}":
                                                  paper(name, r["task"], r["gen_length"]) / 100 for r in known}
              for name in PAPER]
    return "\n" + table([{"by the published rules": model, **ours}, *theirs]) if known else ""


def write_published(instruction, question):
    """The prompt of an evaluation as published: an expert, the answer in a box. Our words after their description."""
    return (f"You are an expert in mathematics and logic. {instruction} Work step by step and give the final answer in "
            "\\boxed{}.\nUse this format:\n<reasoning>\n...\n</reasoning>\n<answer>\n\\boxed{...}\n</answer>\n\n"
            f"{question}")


def first_answer(text):
    """The text inside the first <answer>...</answer>, stripped, or None: where their graders look."""
    start = text.find("<answer>")
    end = text.find("</answer>", start)
    return text[start + len("<answer>"):end].strip() if 0 <= start < end else None


def grade(task, rows):
    """Counts over rows {"text", "example", "effective_tokens"}: {name: share}, sums first, then one division.

    published: by the authors' rules; exact, valid: by ours on the same texts (`published` of the task's module).
    """
    verdicts = [task.published(row["text"], row["example"]) for row in rows]
    total = {name: sum(verdict[name] for verdict in verdicts) for name in verdicts[0]}
    return {"published": total["published"] / total.pop("of"),
            **{name: value / len(rows) for name, value in total.items() if name != "published"},
            "effective_tokens": sum(row["effective_tokens"] for row in rows) / len(rows)}


def find_generations(paths, tasks):
    """{name: (task, gen_length, rows for `grade`)} of files, or of all that lie in a folder: the authors' or our own.

    Theirs are <task>_<model>_<length>_<steps>_<process>_generations.json, one name per evaluation; ours
    <task>_<length>.jsonl. tasks: {name: module}. Raises FileNotFoundError or ValueError naming the file, and the item.
    """
    found = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"--regrade {path}: no such file or folder")
        files = [path]
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if NAME.fullmatch(p.name) or ours(p, tasks))
        if not files:
            raise FileNotFoundError(f"--regrade {path}: no generations in this folder, neither *_generations.json nor "
                                    "<task>_<length>.jsonl")
        for file in files:
            name, task, length, rows = (read_theirs if file.suffix == ".json" else read_ours)(file, tasks)
            if name in found and found[name][:2] != (task, length):
                raise ValueError(f"--regrade {file}: another length than the other files of {name}")
            found.setdefault(name, (task, length, []))[2].extend(rows)
    return found


def ours(path, tasks):
    """The match of (task, gen_length) in the name of a JSONL file of ours, or None."""
    return re.fullmatch(rf"({'|'.join(tasks)})_([0-9]+)\.jsonl", path.name)


def read_theirs(path, tasks):
    name = NAME.fullmatch(path.name)
    if name is None:
        raise ValueError(f"--regrade {path}: the name must be <task>_..._<process>_generations.json")
    task = TASK.get(name[2], name[2])
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        length, items = int(data["gen_length"]), data["generations"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--regrade {path}: not a file of generations ({error!r})") from None
    rows = []
    for n, item in enumerate(items):
        try:
            text = item["generations"]
            rows.append({"text": text, "example": tasks[task].published_example(item["question"], item["ground_truth"]),
                         "effective_tokens": length - text.count(END[1])})  # the texts spell out the whole canvas
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"--regrade {path}, item {n}: not a generation of {task} ({error!r})") from None
    return name[1], task, length, rows


def read_ours(path, tasks):
    name = ours(path, tasks)
    if name is None:
        raise ValueError(f"--regrade {path}: the name must be <task>_<length>.jsonl")
    rows = []
    for n, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        try:
            rows += [graded_row(json.loads(line))] if line else []
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--regrade {path}, row {n}: not a generation ({error!r})") from None
    return str(path.with_suffix("")), name[1], int(name[2]), rows


def graded_row(row):
    """A row of ours for `grade`: the text as the authors' files have it, with an end token where the canvas has one."""
    return {"text": row["completion"] + END[1] * row["ended"], "example": row,
            "effective_tokens": row["effective_tokens"]}
