"""What surrounds a training: options with presets, the model to train, the run's folder and its checkpoints.

A folder holds config.json, metrics.jsonl, samples.jsonl, summary.json and checkpoints such as step_000120/. A checkpoint
is a model folder (weights or adapter, tokenizer) with the optimizer's state beside it, all in safetensors. Every process
writes its own part of that state, so a run saved by n processes resumes on m.
"""
import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from tqdm import tqdm

from d1 import generator
from lora import add_lora, init_lora, load_trained, save_trained
from model import TINY, LLaDA, load_weights
from parallel import Stopped, parallelise

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # names such as "state.<parameter>.exp_avg"
KEPT_CHECKPOINTS = 2
PRESETS = ("8b", "tiny")  # columns of the options: what the authors do with LLaDA-8B, what suits the embedded model
FOLDER_OPTIONS = {
    "seed": (0, 0, "of all random numbers"),
    "out": (None, None, "folder of the run; default: runs/SCRIPT-TASK"),
    "resume": (False, False, "go on from the newest checkpoint in --out"),
    "save_every": (50, 0, "steps between checkpoints, 0: only the last"),
}


# ---------------------------------------------------------------- options

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of every option that has one."""


def make_parser(argv, description, groups):
    """A parser with the options of {group: {name: row}}, and the options that decide which of their defaults apply.

    The preset is --preset, or "tiny" for a model with the config.json of data/tiny, or "8b" for any other model.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter, add_help=False,
                                     conflict_handler="resolve", allow_abbrev=False)
    parser.add_argument("--model", default="data/tiny", help="checkpoint folder or hub id")
    parser.add_argument("--preset", choices=PRESETS, help="the defaults: of LLaDA-8B, or of data/tiny")
    parser.add_argument("--task", nargs="+")
    parser.add_argument("--gen_length", type=int)
    chosen, _ = parser.parse_known_args(argv)
    chosen.preset = chosen.preset or ("tiny" if is_tiny(chosen.model) else "8b")
    parser.add_argument("--help", "-h", action="help", help="show this and exit")
    parser.set_defaults(preset=chosen.preset)
    for title, options in groups.items():
        group = parser.add_argument_group(title)
        for name, (*defaults, words) in options.items():
            add_option(group, name, defaults[PRESETS.index(chosen.preset)], words)
    return parser, chosen


def is_tiny(model):
    """Whether a model is the one in data/tiny, or was trained from it."""
    config = Path(model, "config.json")
    same = config.is_file() and json.loads(config.read_text()) == json.loads((TINY / "config.json").read_text())
    return model == "data/tiny" or same


def add_option(group, name, default, words):
    """Add an option of the kind of its default: a flag, words, a number, a text."""
    if default is False:
        group.add_argument(f"--{name}", action="store_true", help=words)
    elif isinstance(default, list):
        group.add_argument(f"--{name}", nargs="+", default=default, help=words)
    elif default is None:
        group.add_argument(f"--{name}", help=words)
    else:
        group.add_argument(f"--{name}", type=number(type(default)), default=default, help=words)


def number(kind):
    """An argparse type: a number of a kind, int or float, not negative."""
    def parse(text):
        value = kind(text)
        if not value >= 0:
            raise argparse.ArgumentTypeError(f"{text} must not be negative")
        return value
    return parse


# ---------------------------------------------------------------- the model

def load_model(folder, config, args, procs, is_trained=True, from_scratch=False):
    """The network, spread over the processes: weights to train, in float32, or adapters to train, on a frozen base.

    is_trained: False for a frozen copy; from_scratch: random weights. What is frozen has the dtype of the computation.
    """
    with_adapters = bool(is_trained and args.lora_r)
    with torch.device("meta"):
        model = LLaDA(config).requires_grad_(is_trained)
        model.to(torch.float32 if is_trained and not with_adapters else procs.dtype)
        if with_adapters:
            add_lora(model, args.lora_r, args.lora_alpha, args.lora_targets)
    parallelise(model, args, procs)  # before it has any weights: no process ever holds more than its part
    model.to_empty(device=procs.device)
    if from_scratch:
        model.init_weights(generator(args.seed, "weights"))
    else:
        load_weights(model, folder)
    if with_adapters:
        init_lora(model, generator(args.seed, "lora"))
    return model.eval()


# ---------------------------------------------------------------- the folder

class Run:
    """The folder of one run. All processes call its methods; the main process writes."""

    def __init__(self, out, args, procs, may_change=()):
        """Take the folder `out`. With --resume it may hold this run, whose options differ in `may_change` alone."""
        self.out, self.args, self.procs = Path(out), args, procs
        self.step, self.started, self.evaluations = 0, time.monotonic(), {}
        fault = self.take_folder(may_change) if procs.is_main else None
        fault = procs.gather([fault])[0]
        if fault:
            raise SystemExit(f"error: --out {out}: {fault}" if procs.is_main else 1)

    def take_folder(self, may_change):
        """Lock the folder and write config.json. Returns what speaks against it, or None."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.out / ".lock", "w")  # held until this process ends, however it ends
        if not lock(self.lock):
            return "another process is writing there, stop it first"
        options = json.loads(json.dumps(vars(self.args), default=str))
        if any(path.name not in (".lock", "config.json") for path in self.out.iterdir()):
            if not options.get("resume"):
                return "holds a run: continue it with --resume, or name another folder"
            before = json.loads((self.out / "config.json").read_text())["options"]
            for name in sorted(before.keys() & options.keys() - set(may_change)):
                if before[name] != options[name]:
                    return f"--{name} was {before[name]!r} there, a resumed run cannot change it to {options[name]!r}"
        write_json(self.out / "config.json", {
            "options": options, "command": shlex.join(sys.argv), "commit": git_commit(),
            "versions": {name: version(name) for name in ("torch", "safetensors", "tokenizers", "numpy")},
            "device": device_name(self.procs.device), "processes": self.procs.world})
        return None

    @property
    def minutes(self):
        """How long the run has taken, over all its lives."""
        return (time.monotonic() - self.started) / 60

    def log(self, file, rows):
        """Append dicts to `file`, a JSON line each."""
        if self.procs.is_main:
            with open(self.out / file, "a", encoding="utf-8") as lines:
                lines.write(json_lines(rows))

    def train(self, take_step, evaluate, shown):
        """Take all steps that are left. In between log, evaluate and save when due; stop cleanly on a signal.

        take_step(step) gives a row of metrics and sample rows; evaluate(step) the held-out metrics after so many steps,
        {} where nothing is held out; shown: the metrics on a step's line.
        """
        args, procs, no_bar = self.args, self.procs, None if self.procs.is_main else True  # None: a bar on a terminal
        with self.stops_cleanly(), tqdm(total=args.steps, initial=self.step, disable=no_bar) as bar:
            while True:
                is_last = self.step >= args.steps
                if self.step not in self.evaluations and (is_last or self.step % args.eval_every == 0):
                    self.evaluations[self.step] = {"step": self.step, **evaluate(self.step)}
                    self.log("metrics.jsonl", [self.evaluations[self.step] | {"minutes": self.minutes}])
                if is_last:
                    break
                row, samples = take_step(self.step)
                self.step += 1
                self.log("metrics.jsonl", [{"step": self.step, **row, "minutes": self.minutes}])
                self.log("samples.jsonl", [{"step": self.step, **sample} for sample in samples])
                procs.print(f"step {self.step}/{args.steps} ", *(f"{name} {row[name]:.3f}" for name in shown))
                bar.update()
                if self.step == args.steps or (args.save_every and self.step % args.save_every == 0):
                    self.save()

    @contextlib.contextmanager
    def stops_cleanly(self):
        """Within, a run that a signal stops writes a checkpoint and says how to go on."""
        try:
            yield
        except Stopped:
            if self.step not in map(step_of, checkpoints(self.out)):
                self.save()
            self.procs.print(f"stopped after step {self.step}: the same command with --resume goes on")
            raise

    def restore(self, model, optimizer, tokenizer):
        """Go on from the newest checkpoint, if there is one; self.step is then the number of steps done.

        Log lines behind the checkpoint are dropped: the run writes them again.
        """
        self.contents = model, optimizer, tokenizer
        folder = self.procs.gather([newest_checkpoint(self.out)])[0]  # one process looks, all take the same
        if folder:
            load_trained(model, folder)
            state = optimizer_state(model, optimizer)
            reader = HuggingFaceStorageReader(str(folder / "optimizer"))
            dcp.load(state, storage_reader=reader, no_dist=self.procs.world == 1)
            settings = get_optimizer_state_dict(model, optimizer, options=FLAT)  # lr and the like: from the options
            set_optimizer_state_dict(model, optimizer, {**settings, **state}, options=FLAT)
            self.step = step_of(folder)
            self.procs.print(f"resumed from {folder}")
        logs = [], []
        if self.procs.is_main:
            logs = [cut_log(self.out / file, self.step) for file in ("metrics.jsonl", "samples.jsonl")]
        rows = self.procs.gather(logs[0])
        self.evaluations = {row["step"]: row for row in rows if "loss" not in row}
        self.started -= 60 * rows[-1]["minutes"] if rows else 0

    def save(self):
        """Write the checkpoint of self.step, then remove all but the newest."""
        model, optimizer, tokenizer = self.contents
        folder = self.out / f"step_{self.step:06d}"
        unfinished = folder.with_suffix(".tmp")
        if self.procs.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
        self.procs.gather([])  # wait: the others write into this folder
        save_trained(model, unfinished, self.args.model, self.procs.is_main)
        # not consolidated: torch 2.13 then writes 0 into tensors without dimensions, such as AdamW's step
        writer = HuggingFaceStorageWriter(str(unfinished / "optimizer"), save_distributed=True)
        dcp.save(optimizer_state(model, optimizer), storage_writer=writer, no_dist=self.procs.world == 1)
        if self.procs.is_main:
            tokenizer.save(unfinished)
            finish_checkpoint(unfinished, folder)
            for old in checkpoints(self.out)[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(old)
        self.procs.gather([])  # wait: until it is on the disk

    def finish(self, summary):
        """Write summary.json."""
        if self.procs.is_main:
            write_json(self.out / "summary.json", {**summary, "minutes": self.minutes,
                                                   "device": device_name(self.procs.device)})


# ---------------------------------------------------------------- checkpoints and files

def optimizer_state(model, optimizer):
    """AdamW's moments and step counts, {"state.<parameter>.<key>": tensor}."""
    everything = get_optimizer_state_dict(model, optimizer, options=FLAT)
    return {name: value for name, value in everything.items() if name.startswith("state.")}


def step_of(folder):
    return int(folder.name.removeprefix("step_"))


def checkpoints(out):
    """The checkpoint folders of a run, oldest first. Folders of other names are nobody's business."""
    return sorted((path for path in out.iterdir() if re.fullmatch(r"step_\d{6,}", path.name)), key=step_of)


def newest_checkpoint(out):
    """The newest checkpoint of which every file is there with its size, or None. Names those it skips."""
    for folder in reversed(checkpoints(out)):
        listing = folder / "files.json"
        sizes = json.loads(listing.read_text()) if listing.exists() else {}
        if sizes and all((folder / file).exists() and (folder / file).stat().st_size == sizes[file] for file in sizes):
            return folder
        print(f"skipped {folder}: a file is missing or of another size than in files.json", file=sys.stderr)
    return None


def finish_checkpoint(unfinished, folder):
    """List the sizes of all files, bring them to the disk, give the folder its name: it is whole or not there."""
    files = [path for path in unfinished.rglob("*") if path.is_file()]
    write_json(unfinished / "files.json", {str(path.relative_to(unfinished)): path.stat().st_size for path in files})
    for path in files:
        shutil.copymode(unfinished / "files.json", path)  # safetensors makes files for the owner alone
        sync(path)
    sync(unfinished)
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one: a sound one would not be written again
    unfinished.rename(folder)
    sync(folder.parent)


def cut_log(path, step):
    """Drop the rows of a log behind `step`, and a last line that was cut off. Returns the rows that stay."""
    # texts hold other line ends, and the cut may go through a character
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows = [row for row in map(json.loads, lines) if row["step"] <= step]
    write_text(path, json_lines(rows))
    return rows


def lock(file):
    """Whether this process alone holds the file. A killed torchrun may leave workers that write beside the next run."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, or a disk without locks
        print(f"note: {file.name} cannot be locked here: start one run at a time in this folder", file=sys.stderr)
    return True


def sync(path):
    """Force a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_text(path, text):
    """Replace a file as a whole: a crash leaves the old text or the new text."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text, encoding="utf-8")
    sync(unfinished)
    unfinished.replace(path)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def git_commit():
    """The commit of this code, None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    return subprocess.getoutput(shlex.join(command)) if shutil.which("git") else None
