"""Grade generations by the rules of the d1 authors, beside the paper's numbers.

    python tools/regrade.py PATH...
    python tools/regrade.py --published_prompts --task gsm8k --model MODEL

PATH is a file of generations, or a folder of such files: the authors', named
<task>_<model>_<length>_<steps>_<process>_generations.json (the files of all
processes count as one evaluation), or ours, named <task>_<length>.jsonl, from
sample.py. --published_prompts takes the options of sample.py, and evaluates a
model with the authors' kind of prompt; every completion begins with
<reasoning>, as theirs do.
"""
import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's modules

import sample  # noqa: E402
from data import TASKS  # noqa: E402
from tools.measure import print_table  # noqa: E402
from tools.published import END, GRADERS, PAPER, PREFILL, find_in_paper, make_example, write_prompt  # noqa: E402

THEIRS = re.compile(r"((gsm8k|gsm|math500|math|countdown|sudoku)_.*?)_[0-9]+_generations\.json")
SHORT_NAMES = {"gsm": "gsm8k", "math": "math500"}  # of tasks in their file names
READ_BOXES = ("countdown", "math500")  # tasks in which their rule takes all the text where there is no box
OURS = re.compile(rf"({'|'.join(TASKS)})_([0-9]+)\.jsonl")
LONGEST_NAME = 36  # of an evaluation in the table, which then fits 100 columns
NOTES = {  # what the columns of the table mean
    "exact": "Believe exact: the problems that are solved, by our rules.",
    "published": "published: the authors' rules on the same texts, to set beside paper; of Sudoku they count cells.",
    "valid": "valid: the answer is 16 digits from 1 to 4.",
    "paper": "paper: LLaDA-8B-Instruct, as the authors print it."}


# ---------------------------------------------------------------- files of generations

def find_generations(paths):
    """{name of an evaluation: (task, gen_length, rows for `grade`)} of files and folders."""
    evaluations = {}
    for path in find_files(paths):
        read = read_theirs if path.suffix == ".json" else read_ours
        name, task, length, rows = read(path)
        if name in evaluations and evaluations[name][:2] != (task, length):
            raise SystemExit(f"error: {path}: another length than the other files of {name}")
        evaluations.setdefault(name, (task, length, []))[2].extend(rows)
    return evaluations


def find_files(paths):
    """The files among the paths, and in place of a folder all its files with the name of an evaluation."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise SystemExit(f"error: {path}: no such file or folder")
        if path.is_dir():
            known = [file for pattern in (THEIRS, OURS) for file in sorted(path.iterdir())
                     if pattern.fullmatch(file.name)]
            if not known:
                raise SystemExit(f"error: {path}: no generations in this folder, neither *_generations.json nor "
                                 "<task>_<length>.jsonl")
            files += known
        else:
            files.append(path)
    return files


def read_theirs(path):
    """(name, task, gen_length, rows) of a file of the authors."""
    match = THEIRS.fullmatch(path.name)
    if match is None:
        raise SystemExit(f"error: {path}: the name must be <task>_..._<process>_generations.json")
    task = SHORT_NAMES.get(match[2], match[2])
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        length, items = int(content["gen_length"]), content["generations"]
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"error: {path}: not a file of generations ({error!r})") from None
    rows = []
    for n, item in enumerate(items):
        try:
            text = item["generations"]
            rows.append({"text": text, "example": make_example(task, item["question"], item["ground_truth"]),
                         "box_asked_for": True,
                         "effective_tokens": length - text.count(END[1])})  # the texts spell out all EOS of the canvas
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SystemExit(f"error: {path}, item {n}: not a generation of {task} ({error!r})") from None
    return match[1], task, length, rows


def read_ours(path):
    """(name, task, gen_length, rows) of a file that sample.py wrote."""
    match = OURS.fullmatch(path.name)
    if match is None:
        raise SystemExit(f"error: {path}: the name must be <task>_<length>.jsonl")
    rows = []
    for n, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):  # texts may hold other line ends
        if not line:
            continue
        try:
            row = json.loads(line)
            # as the authors' texts: what the prompt began, and an end token where the canvas has one
            text = row.get("prefill", "") + row["completion"] + END[1] * row["ended"]
            rows.append({"text": text, "example": row, "box_asked_for": "\\boxed" in row["prompt"],
                         "effective_tokens": row["effective_tokens"]})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SystemExit(f"error: {path}, row {n}: not a generation ({error!r})") from None
    return str(path.with_suffix("")), match[1], int(match[2]), rows


# ---------------------------------------------------------------- grades

def grade(task, rows):
    """{name: share} over rows {"text", "example", "box_asked_for", "effective_tokens"}: sums first, then one division.

    published: by the authors' rules, None where they mean nothing: they read boxes, and the prompt asks for none.
    exact, valid: by ours on the same texts.
    """
    verdicts = [GRADERS[task](row["text"], row["example"]) for row in rows]
    total = {name: sum(verdict[name] for verdict in verdicts) for name in verdicts[0]}
    published = total.pop("published") / total.pop("of")
    if task in READ_BOXES and not all(row["box_asked_for"] for row in rows):
        published = None
    ours = {name: count / len(rows) for name, count in total.items()}
    effective_tokens = sum(row["effective_tokens"] for row in rows) / len(rows)
    return {"published": published, **ours, "effective_tokens": effective_tokens}


def regrade(paths):
    """Print a table of the generations in files. Returns {name: grades}."""
    results, lines = {}, []
    for name, (task, length, rows) in find_generations(paths).items():
        reference = find_in_paper("LLaDA-8B-Instruct", task, length)
        results[name] = {"problems": len(rows), **grade(task, rows), "paper": reference}
        shown = {key: show(key, value) for key, value in results[name].items()}
        short = name if len(name) <= LONGEST_NAME else "..." + name[3 - LONGEST_NAME:]
        lines.append({"generations": short, "problems": "", "published": "", "exact": "", "valid": "", **shown})
    columns = [column for column in lines[0] if any(line[column] for line in lines)]
    print_table([{column: line[column] for column in columns} for line in lines])
    print("", *(note for column, note in NOTES.items() if column in columns), sep="\n")
    if any(result["published"] is None for result in results.values()):
        print("No published where the prompt asks for no box: their rules would take all the text for it.")
    return results


def show(name, value):
    """A cell of a table. Shares become per cent; the paper's numbers are in per cent already."""
    if value is None:
        return ""
    if name == "problems":
        return str(value)
    return f"{value:.1f}" if name in ("effective_tokens", "paper") else f"{value:.2%}"


def print_beside_the_paper(task, gen_length, published, model):
    """Print our accuracy by their rules above the paper's rows, where the paper has that task and length."""
    rows = [{"by the published rules": model, f"{task} {gen_length}": f"{published:.2%}"}]
    for name in PAPER:
        number = find_in_paper(name, task, gen_length)
        if number is None:
            return
        rows.append({"by the published rules": name, f"{task} {gen_length}": f"{number:.2f}%"})
    print()
    print_table(rows)


# ---------------------------------------------------------------- evaluation with their kind of prompt

def load_published_problems(task, args, tokenizer, room, procs):
    """`sample.load_problems` with the authors' kind of prompt, and the tokens with which every completion begins."""
    examples = sample.load_problems(task, args, tokenizer, float("inf"), procs)
    for example in examples:
        example.update(prompt=write_prompt(task, example), prefill=PREFILL)
    prefill = tokenizer.encode(PREFILL)
    examples = sample.encode_prompts(examples, tokenizer, room - len(prefill), procs)
    for example in examples:
        example["ids"] += prefill
    return examples


def evaluate(argv):
    """Evaluate a model with the authors' kind of prompt, by the options of sample.py. Returns its grades."""
    args = sample.parse_args(argv)
    if not args.task or args.prompt or args.watch:
        raise SystemExit("error: --published_prompts evaluates a --task, without --prompt and --watch")
    args.out = args.out or f"runs/published-{args.task}-{time.strftime('%m%d-%H%M%S')}"
    sample.main(args, load=load_published_problems)
    if int(os.environ.get("RANK", 0)) > 0:  # the main process has written the generations
        return None
    [result] = regrade([Path(args.out) / f"{args.task}_{args.gen_length}.jsonl"]).values()
    print_beside_the_paper(args.task, args.gen_length, result["published"], args.model)
    return result


def main(argv):
    if "--published_prompts" in argv:
        return evaluate([word for word in argv if word != "--published_prompts"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a file of generations, or a folder of such files")
    return regrade(parser.parse_args(argv).paths)


if __name__ == "__main__":
    main(sys.argv[1:])
