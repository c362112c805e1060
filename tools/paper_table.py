"""The paper's table: 4 tasks x 3 lengths x 4 rows, with the trainings that they need, one command after the other.

    python tools/paper_table.py --gpus 8 --puzzles d1/dataset     LLaDA-8B; days, see docs/scaling.md
    python tools/paper_table.py --show                            what there is so far, beside the paper
    python tools/paper_table.py --dry_run                         the commands alone

Repeat the command to go on: what is done stays, a training resumes from its checkpoint. A stage begins from merged
weights. The last checkpoint is evaluated; the paper's rows with RL are the best checkpoint on the test set.
"""
import argparse
import functools
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import number  # noqa: E402
from tools.measure import print_table  # noqa: E402
from tools.published import PAPER, find_in_paper  # noqa: E402
from tools.regrade import find_generations, grade  # noqa: E402

TASKS, LENGTHS = ("gsm8k", "math500", "countdown", "sudoku"), (128, 256, 512)
BASE, SFT, RL, SFT_RL = PAPER  # the rows, in the order in which they are made
FOLDERS = {BASE: "base", SFT: "sft", RL: "rl", SFT_RL: "sft_rl"}
PUZZLES = ("countdown", "sudoku")  # their test problems are in the authors' repository
PATIENCE = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}  # seconds that torchrun gives a stopped run for its checkpoint
TRAINING = {"countdown": ["--data", "Jiayi-Pan/Countdown-Tasks-3to4"]}  # the others load what the paper trains on


class Table:
    """The runs of a table, in folders below args.out."""

    def __init__(self, args):
        self.args = args
        self.launcher = [sys.executable]
        if args.gpus > 1:
            self.launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.gpus}"]

    def run(self, words, out, log):
        """Run a command, its output to a file; a failure ends the program."""
        words = [str(word) for word in words]
        print(shlex.join(words), flush=True)
        if self.args.dry_run:
            return
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            code = subprocess.run(words, stdout=file, stderr=file, env={**os.environ, **PATIENCE}).returncode
        if code or not out.exists():
            raise SystemExit(f"error: exit code {code}, see {log}; mend it and repeat the command")

    @functools.cache
    def train(self, name, script, base, *options):
        """Train from the folder `base` unless that is done. Returns the folder of the merged model."""
        out = self.args.out / name
        merged, log = out / "merged", self.args.out / f"{name}.log"
        if merged.exists():  # a folder that is there is whole
            return merged
        if not (out / "summary.json").exists():
            words = [ROOT / script, "--model", base, *options, "--out", out, "--resume"]
            self.run([*self.launcher, *words], out / "summary.json", log)
        checkpoint = max(out.glob("step_*[0-9]"), default=out / "step_LAST")
        self.run([sys.executable, ROOT / "tools" / "merge.py", base, checkpoint, merged], merged, log)
        return merged

    def model(self, row, task):
        """The model of a row for a task."""
        args = self.args
        if row == BASE:
            return args.model
        if row == SFT:
            return self.train("sft", "train_sft.py", args.model, *shlex.split(args.sft))
        base = args.model if row == RL else self.model(SFT, task)
        options = ["--task", task, *TRAINING.get(task, ()), *shlex.split(args.grpo.format(task=task))]
        return self.train(f"{FOLDERS[row]}-{task}", "train_grpo.py", base, *options)

    def evaluation(self, row, task, length):
        return self.args.out / f"{FOLDERS[row]}-{task}-{length}"

    def evaluate(self, row, task, length):
        """Complete a task's test problems at a length, unless that is done."""
        out = self.evaluation(row, task, length)
        if (out / "summary.json").exists():
            return
        model = self.model(row, task)
        if not self.args.dry_run:
            shutil.rmtree(out, ignore_errors=True)  # of an evaluation that was cut short
        words = ["--task", task, "--gen_length", length, "--model", model, "--out", out]
        script = [ROOT / "tools" / "regrade.py", "--published_prompts"]
        if self.args.our_prompts:
            script = [ROOT / "sample.py"]
        if self.args.puzzles and task in PUZZLES:
            words += ["--data", self.args.puzzles]
        words += shlex.split(self.args.sample.format(task=task))
        self.run([*self.launcher, *script, *words], out / "summary.json", out.with_name(f"{out.name}.log"))

    def show(self):
        """Print the table beside the paper's. Returns {cell: share}.

        By the authors' rules; after * by exact answers, as the prompts asked for no box; "." where nothing is yet.
        """
        found, lines = {}, []
        for row in self.args.rows:
            line = {"per cent (paper)": row}
            for task in self.args.tasks:
                for length in self.args.lengths:
                    folder, cell = self.evaluation(row, task, length), "."
                    if (folder / "summary.json").exists():
                        [(_, _, rows)] = find_generations([folder]).values()
                        grades = grade(task, rows)
                        cell, share = "", grades["published"]
                        if share is None:
                            cell, share = "*", grades["exact"]
                        cell += f"{100 * share:.1f}"
                        found[row, task, length] = share
                    paper = find_in_paper(row, task, length)
                    line[f"{task} {length}"] = f"{cell} ({paper or '-'})"
            lines.append(line)
        print_table(lines)
        return found


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="GSAI-ML/LLaDA-8B-Instruct", help="folder or hub id of the base")
    parser.add_argument("--out", type=Path, default=Path("runs/paper_table"), help="folder of all runs")
    parser.add_argument("--gpus", type=number(int, 1), default=1, help="processes of torchrun on this node")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--lengths", nargs="+", type=number(int, 1), default=LENGTHS)
    parser.add_argument("--rows", nargs="+", choices=tuple(PAPER), default=tuple(PAPER), metavar="ROW",
                        help=f"some of {', '.join(map(repr, PAPER))}")
    parser.add_argument("--sft", default="--task s1k --truncate", help="options of train_sft.py")
    parser.add_argument("--grpo", default="", help="further options of train_grpo.py; {task} becomes the task")
    parser.add_argument("--sample", default="", help="further options of sample.py; {task} becomes the task")
    parser.add_argument("--puzzles", help="d1/dataset, for the authors' test puzzles in the place of generated ones")
    parser.add_argument("--our_prompts", action="store_true", help="evaluate with the prompts of our training scripts")
    parser.add_argument("--show", action="store_true", help="print what there is, run nothing")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, run nothing")
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    if Path(args.model).is_dir():
        args.model = str(Path(args.model).resolve())
    return args


def main(argv=None):
    args = parse_args(argv)
    table = Table(args)
    for row in () if args.show else args.rows:
        for task in args.tasks:
            for length in args.lengths:
                table.evaluate(row, task, length)
    return {} if args.dry_run else table.show()


if __name__ == "__main__":
    main()
