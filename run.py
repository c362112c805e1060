"""What surrounds a training: options, the model to train, the run's folder, its checkpoints.

A checkpoint such as step_000120/ is a model folder (weights or adapter, tokenizer) with the
optimizer's state beside it, all in safetensors. Every process writes its own part of that state,
and a run saved by n processes resumes on m.
"""
import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from tqdm import tqdm

from d1 import generator
from data.tokenizer import Tokenizer
from lora import add_lora, init_lora, load_trained, save_trained
from model import TINY, Config, LLaDA, find_checkpoint, load_weights, read_json
from parallel import PARALLEL_OPTIONS, Stopped, parallelise

PRESETS = ("8b", "tiny")  # columns: what the authors do with LLaDA-8B, what suits data/tiny
RUN_OPTIONS = {
    "seed": (0, 0, "of all random numbers"),
    "out": ("", "", "folder of the run, or else runs/SCRIPT-TASK"),
    "resume": (False, False, "go on from the newest checkpoint in --out"),
    "save_every": (50, 0, "steps between checkpoints, 0: only the last"),
}
MAY_CHANGE = {  # what may change when a run is resumed: it does not decide what is learnt
    "out", "resume", "save_every", "eval_every", "microbatch", "rollout_batch", *PARALLEL_OPTIONS}


def make_parser(argv, description, groups):
    """A parser with the options of {group: {name: (8b, tiny, words)}}, and a glance at the options.

    The preset, the column that gives the defaults, is --preset, or "tiny" for a model with the
    config.json of data/tiny, or "8b" for any other model.
    """
    parser = argparse.ArgumentParser(
        description=description.partition("\n")[0], add_help=False, allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, conflict_handler="resolve")
    parser.add_argument("--model", default="data/tiny", help="checkpoint folder or hub id")
    parser.add_argument("--preset", choices=PRESETS, help="defaults of LLaDA-8B or of data/tiny")
    parser.add_argument("--task", nargs="+")  # for the glance; the script adds its own
    parser.add_argument("--gen_length", type=int)
    glance, _ = parser.parse_known_args(argv)
    config = Path(glance.model, "config.json")
    is_tiny = config.is_file() and read_json(config) == read_json(TINY / "config.json")
    glance.preset = glance.preset or PRESETS[is_tiny or glance.model == "data/tiny"]
    parser.set_defaults(preset=glance.preset)
    parser.add_argument("--help", action="help", help="show this and exit")
    for title, options in groups.items():
        group = parser.add_argument_group(title)
        for name, (*defaults, words) in options.items():
            default = defaults[PRESETS.index(glance.preset)]
            kind = {"type": type(default), "default": default}
            if default is False:
                kind = {"action": "store_true"}
            group.add_argument(f"--{name}", help=words, **kind)
    return parser, glance


class Run:
    """A training and its folder. All processes call its methods; the main process writes."""

    def __init__(self, script, args, procs, may_change=()):
        """Take the folder; with --resume it may hold this run, its options but for MAY_CHANGE."""
        task = "-".join([args.task] if isinstance(args.task, str) else args.task) or "data"
        self.out, self.args, self.procs = Path(args.out or f"runs/{script}-{task}"), args, procs
        self.step, self.started = 0, time.monotonic()
        fault = self.take_folder(MAY_CHANGE.union(may_change)) if procs.is_main else ""
        fault = procs.gather([fault])[0]
        if fault:
            raise SystemExit(f"error: --out {self.out} {fault}" if procs.is_main else 1)
        self.checkpoint = find_checkpoint(args.model)
        self.config = Config.from_folder(self.checkpoint)
        self.tokenizer = Tokenizer.from_folder(self.checkpoint, self.config)

    def take_folder(self, may_change):
        """Lock the folder and write config.json. Returns what speaks against it, or ""."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.out / ".lock", "w")  # held until this process ends
        if not lock(self.lock):
            return "is in use: another process is writing there, stop it first"
        options, path = vars(self.args), self.out / "config.json"
        if {file.name for file in self.out.iterdir()} - {".lock", path.name}:
            if not options.get("resume"):
                return "holds a run: continue it with --resume, or name another folder"
            before = read_json(path)["options"]
            for name in sorted(before.keys() & options.keys() - may_change):
                if before[name] != options[name]:
                    return f"was run with --{name} {before[name]}, a resumed run cannot change that"
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        write_json(path, {
            "options": options, "command": shlex.join(sys.argv), "torch": torch.__version__,
            "commit": subprocess.getoutput(shlex.join(git)), "device": self.procs.device_name,
            "processes": self.procs.world})
        return ""

    def load(self, betas):
        """The model to train and its optimizer, as the newest checkpoint has them, if any."""
        args, procs = self.args, self.procs
        self.model = self.load_model()
        weights = [p for p in self.model.parameters() if p.requires_grad]
        decay = args.weight_decay
        self.optimizer = torch.optim.AdamW(weights, args.lr, betas, weight_decay=decay, fused=True)
        procs.print(f"{sum(p.numel() for p in weights):,} weights to train, preset {args.preset}, "
                    f"{procs.world} x {procs.device}, {procs.dtype}")
        self.restore()
        return self.model, self.optimizer

    def load_model(self, is_trained=True):
        """The network, spread over the processes: what is trained in float32, or a frozen copy."""
        args, dtype = self.args, self.procs.dtype
        has_adapters = is_trained and args.lora_r > 0
        with torch.device("meta"):
            model = LLaDA(self.config).requires_grad_(is_trained)
            model.to(torch.float32 if is_trained and not has_adapters else dtype)
            if has_adapters:
                add_lora(model, args.lora_r, args.lora_alpha, args.lora_targets.split())
        parallelise(model, args, self.procs)  # without weights: nobody ever holds all of them
        load_weights(model.to_empty(device=self.procs.device), self.checkpoint)
        if has_adapters:
            init_lora(model, generator(args.seed, "lora"))
        return model.eval()

    def __enter__(self):
        no_bar = None if self.procs.is_main else True  # None: a bar on a terminal alone
        self.bar = tqdm(total=self.args.steps, initial=self.step, disable=no_bar)

    def __exit__(self, kind, *_):
        """After a signal, write a checkpoint and say how to go on."""
        self.bar.close()
        if kind is Stopped:
            self.save()
            self.procs.print(f"stopped after step {self.step}: --resume goes on from there")

    @property
    def minutes(self):
        """How long the run has taken, over all its lives."""
        return (time.monotonic() - self.started) / 60

    def is_due(self, every):
        """Whether what happens every so many steps, and after the last, happens now."""
        return self.step == self.args.steps or (every and self.step % every == 0)

    def log_step(self, row, samples=(), shown=()):
        """Log a step, show some of its metrics, save when due, stop where a signal came."""
        self.step += 1
        self.log("metrics.jsonl", [row])
        self.log("samples.jsonl", samples)
        values = [f"{name} {row[name]:.3f}" for name in shown if name in row]
        self.procs.print(f"step {self.step}/{self.args.steps}  {'  '.join(values)}")
        self.bar.update()
        if self.is_due(self.args.save_every):
            self.save()
        with self.procs.stoppable():
            self.procs.check_stop()

    def log(self, file, rows):
        """Append dicts to `file`, a JSON line each, with the step and the minutes so far."""
        if self.procs.is_main:
            now = {"step": self.step, "minutes": self.minutes}
            with open(self.out / file, "a", encoding="utf-8") as lines:
                lines.write(json_lines([now | row for row in rows]))

    def finish(self, **results):
        """Write summary.json: results, and the held-out metrics before and after training."""
        rows = read_log(self.out / "metrics.jsonl") if self.procs.is_main else []
        held_out = [row for row in self.procs.gather(rows) if "loss" not in row]
        for when, row in zip(("before", "after"), held_out[:1] + held_out[-1:]):
            results |= {f"{name[9:]}_{when}": row[name] for name in row if "held_out_" in name}
        summary = {"task": self.args.task, "seed": self.args.seed, "steps": self.step, **results,
                   "minutes": self.minutes, "device": self.procs.device_name}
        if self.procs.is_main:
            write_json(self.out / "summary.json", summary)
        self.procs.print(f"all of it is in {self.out}")
        return summary

    def restore(self):
        """Go on from the newest checkpoint, if any. Drops log lines behind it: they come again."""
        whole = [folder for folder in checkpoints(self.out) if is_whole(folder)]
        folder = self.procs.gather(whole[-1:])[0] if whole else None  # all take the same
        if folder:
            load_trained(self.model, folder)
            reader = dcp.HuggingFaceStorageReader(str(folder / "optimizer"))
            with warnings.catch_warnings(action="ignore"):  # that a process is alone
                dcp.load(optimizer_state(self.model, self.optimizer), storage_reader=reader)
            self.step = step_of(folder)
            self.procs.print(f"resumed from {folder}")
        if self.procs.is_main:
            cut_log(self.out / "samples.jsonl", self.step)
            for row in cut_log(self.out / "metrics.jsonl", self.step)[-1:]:
                self.started -= 60 * row["minutes"]

    def save(self):
        """Write the checkpoint of self.step, unless it is there; remove all but the newest two."""
        folder = self.out / f"step_{self.step:06d}"
        if any(self.procs.gather([is_whole(folder)])):
            return
        unfinished = folder.with_suffix(".tmp")
        if self.procs.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
        self.procs.gather([])  # wait: the others write into this folder
        save_trained(self.model, unfinished, self.args.model, self.procs.is_main)
        # not consolidated: torch 2.13 then writes 0 into tensors without dimensions
        writer = dcp.HuggingFaceStorageWriter(str(unfinished / "optimizer"), save_distributed=True)
        with warnings.catch_warnings(action="ignore"):  # that a process is alone
            dcp.save(optimizer_state(self.model, self.optimizer), storage_writer=writer)
        if self.procs.is_main:
            self.tokenizer.save(unfinished)
            finish_checkpoint(unfinished, folder)
            for old in checkpoints(self.out)[:-2]:
                shutil.rmtree(old)
        self.procs.gather([])  # wait: until it is on the disk


# ---------------------------------------------------------------- files

def optimizer_state(model, optimizer):
    """AdamW's state, {"<parameter>/exp_avg": tensor, ...}; zeros before the first update."""
    state = {}
    for name, p in model.named_parameters():
        if p.requires_grad and not optimizer.state[p]:
            optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                                  "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        state |= {f"{name}/{key}": value for key, value in optimizer.state.get(p, {}).items()}
    return state


def step_of(folder):
    return int(folder.name.removeprefix("step_"))


def checkpoints(out):
    """The checkpoint folders of a run, oldest first. Other folders are nobody's business."""
    folders = [path for path in out.iterdir() if re.fullmatch(r"step_\d{6,}", path.name)]
    return sorted(folders, key=step_of)


def is_whole(folder):
    """Whether all files of a checkpoint are there, with the sizes in files.json."""
    listing = folder / "files.json"
    sizes = read_json(listing) if listing.exists() else {"files.json": 0}
    files = {name: folder / name for name in sizes}
    return all(file.exists() and file.stat().st_size == sizes[name] for name, file in files.items())


def finish_checkpoint(unfinished, folder):
    """List all files, bring them to the disk, give the folder its name: it is whole or absent."""
    paths = [path for path in unfinished.rglob("*") if path.is_file()]
    sizes = {str(path.relative_to(unfinished)): path.stat().st_size for path in paths}
    write_json(unfinished / "files.json", sizes)
    for path in (*paths, unfinished):
        path.chmod((unfinished / "files.json").stat().st_mode | path.stat().st_mode & 0o111)
        sync(path)
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    unfinished.rename(folder)
    sync(folder.parent)


def read_log(path):
    """The rows of a log, without a last line that was torn, perhaps within a character."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def cut_log(path, step):
    """Drop what a run that resumes at `step` logs again: later steps, its evaluation at `step`."""
    # the row of a step k tells how step k - 1, counted from 0, was taken
    rows = [row for row in read_log(path) if row["step"] - ("loss" in row or "reward" in row) < step]
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json_lines(rows), encoding="utf-8")
    unfinished.replace(path)
    return rows


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def lock(file):
    """Whether this process alone holds the file. Workers may outlive a torchrun that was killed."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, or a disk without locks
        print(f"note: {file.name} cannot be locked: start no second run there", file=sys.stderr)
    return True


def sync(path):
    """Force a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    sync(path)
