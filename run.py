"""What surrounds a training: options, the model, the run's folder and its checkpoints, which
are model folders such as step_000120/ with the optimizer's state beside it."""
import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from d1 import generator
from data.tokenizer import Tokenizer
from lora import add_lora, init_lora, load_trained, save_trained
from model import (TINY, Config, LLaDA, checkpoints, find_checkpoint, load_weights, open_tensors,
                   read_json, write_json)
from parallel import PARALLEL_OPTIONS, Stopped, parallelise

PRESETS = ("8b", "tiny")  # columns: what the authors do with LLaDA-8B, what suits data/tiny
RUN_OPTIONS = {
    "seed": (0, 0, "of all random numbers"),
    "out": ("", "", "folder of the run, or else runs/SCRIPT-TASK"),
    "resume": (False, False, "go on from the newest checkpoint in --out"),
    "save_every": (50, 0, "steps between checkpoints, 0: only the last"),
}
MAY_CHANGE = {*RUN_OPTIONS, *PARALLEL_OPTIONS, "eval_every", "microbatch", "rollout_batch"}
MAY_CHANGE -= {"seed", "dtype"}  # a resumed run keeps what decides what is learnt


def make_parser(argv, description, groups):
    """A parser with the options of {group: {name: (8b, tiny, words)}}, and a glance at some."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]; --help lists them", description=description.partition("\n")[0],
        allow_abbrev=False, add_help=False, conflict_handler="resolve")
    parser.suggest_on_error = True  # for a misspelt task, from Python 3.14 on
    parser.add_argument("--model", default="data/tiny", help="checkpoint folder or hub id")
    parser.add_argument("--preset", choices=PRESETS, help="defaults of LLaDA-8B or of data/tiny")
    parser.add_argument("--task")  # for the glance; the script adds its own
    parser.add_argument("--gen_length", type=int)
    glance, _ = parser.parse_known_args(argv)  # what the defaults hang on
    is_local = glance.model == "data/tiny" or Path(glance.model).is_dir()  # else of the hub
    config = is_local and read_json(find_checkpoint(glance.model) / "config.json")
    glance.preset = glance.preset or PRESETS[config == read_json(TINY / "config.json")]
    parser.set_defaults(preset=glance.preset)  # shown by --help, kept in config.json
    parser.add_argument("-h", "--help", action="help", help="show this and exit")
    column = PRESETS.index(glance.preset)
    for title, options in groups.items():
        group = parser.add_argument_group(title)
        for name, (*defaults, words) in options.items():
            default = defaults[column]  # also gives the option's type
            if name == "diffusion_steps" and glance.gen_length:  # their ratio stays
                default = default * glance.gen_length // options["gen_length"][column]
            shown = " (%(default)s)" * (str(default) not in ("", "False"))
            kind = {"type": type(default), "default": default, "metavar": type(default).__name__}
            if default is False:
                kind = {"action": "store_true"}
            group.add_argument(f"--{name}", help=words + shown, **kind)
    return parser, glance


class Run:
    """A training and its folder. All processes call its methods; the main process writes."""

    def __init__(self, script, args, procs, may_change=()):
        """Take the folder; with --resume it may hold this run, its options but for MAY_CHANGE."""
        self.tasks = [args.task] if isinstance(args.task, str) else args.task
        self.out = Path(args.out or f"runs/{script}-{'-'.join(self.tasks) or 'data'}")
        self.args, self.procs = args, procs
        self.device = torch.cuda.get_device_name() if procs.device.type == "cuda" else "cpu"
        self.step, self.started = 0, time.monotonic()
        self.logs = {"metrics.jsonl": 0, "samples.jsonl": 0}  # their sizes after the last step
        fault = self.take_folder(MAY_CHANGE.union(may_change)) if procs.is_main else None
        fault = procs.gather([fault])[0]  # the main process's, for all
        if fault:
            raise SystemExit(f"error: --out {self.out} {fault}" if procs.is_main else 1)
        self.checkpoint = find_checkpoint(args.model)  # the folder to begin from
        self.config = Config.from_folder(self.checkpoint)
        self.tokenizer = Tokenizer.from_folder(self.checkpoint, self.config)

    def take_folder(self, may_change):
        """Lock the folder and write config.json. Returns what speaks against it, if anything."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.out / ".lock", "w")  # held until this process ends
        try:
            import fcntl
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # perhaps a worker that outlived its torchrun
            return "is in use: another process is writing there, stop it first"
        except (ImportError, OSError):  # Windows, or a disk without locks
            self.procs.print(f"note: {self.out} cannot be locked, start no second run in it")
        options, path = vars(self.args), self.out / "config.json"
        if {file.name for file in self.out.iterdir()} - {".lock", path.name}:
            if not options.get("resume"):
                return "holds a run: continue it with --resume, or name another folder"
            before = read_json(path)["options"]  # of the run's first life
            for name in sorted(before.keys() & options.keys() - may_change):
                if before[name] != options[name]:
                    return f"was run with --{name} {before[name]}, --resume cannot change that"
        git = shlex.join(["git", "-C", str(TINY), "rev-parse", "HEAD"])  # of this code
        status, commit = subprocess.getstatusoutput(git)
        write_json(path, {
            "options": options, "command": shlex.join(sys.argv), "commit": commit * (status == 0),
            "torch": torch.__version__, "device": self.device, "processes": self.procs.world})

    def compare(self, data):
        """End where the processes differ in options, versions, data or files of the model."""
        self.data = sum(zlib.crc32(repr(row).encode()) for row in enumerate(data))
        sizes = [path.stat().st_size for path in sorted(self.checkpoint.glob("*.safetensors"))]
        seen = {**vars(self.args), "torch": torch.__version__, "sizes of weights": sizes,
                "checksum of data": self.data, "sight of --out": self.out.exists()}
        everyone = self.procs.gather([{f"{name} {value}" for name, value in seen.items()}])
        common = set.intersection(*everyone)
        faults = [f"rank {rank} has {sorted(has - common)}" for rank, has in enumerate(everyone)]
        if any(has != common for has in everyone):
            raise SystemExit(f"error: {', '.join(faults)}" if self.procs.is_main else 1)

    def load(self, betas, data):
        """The model to train and its optimizer, as the newest checkpoint has them, if any."""
        args, procs = self.args, self.procs
        self.compare(data)
        self.model = self.load_model()
        weights = [p for p in self.model.parameters() if p.requires_grad]  # in float32
        self.optimizer = torch.optim.AdamW(
            weights, args.lr, betas, weight_decay=args.weight_decay, fused=True)
        procs.print(f"{sum(p.numel() for p in weights):,} weights to train, preset {args.preset}, "
                    f"{procs.world} x {procs.device}, {procs.dtype}")
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process
        self.restore()  # weights, optimizer, step
        return self.model, self.optimizer

    def load_model(self, is_trained=True):
        """The network, spread over the processes: what is trained in float32, or a frozen copy."""
        args, dtype = self.args, self.procs.dtype
        has_adapters = is_trained and args.lora_r > 0  # then its base is frozen
        with torch.device("meta"):
            model = LLaDA(self.config).requires_grad_(is_trained)
            model.to(torch.float32 if is_trained and not has_adapters else dtype)
            if has_adapters:
                add_lora(model, args.lora_r, args.lora_alpha, args.lora_targets.split())
        load_weights(model, self.checkpoint)  # compares the shapes, before they take memory
        parallelise(model, args, self.procs)  # without weights: nobody ever holds all of them
        load_weights(model.to_empty(device=self.procs.device), self.checkpoint)
        init_lora(model, generator(args.seed, "lora"))  # nothing without adapters
        return model.eval()  # no dropout anywhere

    def __enter__(self):
        self.bar = self.procs.bar(total=self.args.steps, initial=self.step)

    def __exit__(self, kind, *_):
        """After a signal, write a checkpoint and say how to go on."""
        self.bar.close()
        if kind is Stopped:
            self.save()
            self.procs.print(f"stopped after step {self.step}: --resume goes on from there")

    @property
    def now(self):
        """The step, and the minutes that the run has taken, over all its lives."""
        return {"step": self.step, "minutes": (time.monotonic() - self.started) / 60}

    def is_due(self, every):
        """Whether what happens every so many steps, and after the last, happens now."""
        return self.step == self.args.steps or (every and self.step % every == 0)

    def log_step(self, row, samples=(), shown=()):
        """Log a step, show some of its metrics, save when due, stop where a signal came."""
        self.step += 1
        self.log("metrics.jsonl", [row])
        self.log("samples.jsonl", samples)
        if self.procs.is_main:
            self.logs = {name: (self.out / name).stat().st_size for name in self.logs}
        values = [f"{name} {row[name]:.3f}" for name in shown if name in row]
        self.procs.print(f"step {self.step}/{self.args.steps}  {'  '.join(values)}")
        self.bar.update()  # below the lines
        if self.is_due(self.args.save_every):
            self.save()
        with self.procs.stoppable():
            self.procs.check_stop()

    def log(self, file, rows):
        """Append dicts to `file`, a JSON line each, with the step and the minutes so far."""
        if self.procs.is_main:
            lines = [json.dumps(self.now | row, ensure_ascii=False) + "\n" for row in rows]
            with open(self.out / file, "a", encoding="utf-8") as log:
                log.writelines(lines)

    def finish(self, **results):
        """Write summary.json: results, and the held-out metrics before and after training."""
        log, times = self.out / "metrics.jsonl", {0: "before", self.step: "after"}
        lines = log.read_text("utf-8").splitlines() if log.exists() else []
        for row in [json.loads(line) for line in lines if "held_out_" in line]:
            when = times.get(row["step"], "")
            if when:
                results |= {f"{name[9:]}_{when}": row[name] for name in row if "held_out_" in name}
        summary = {"task": self.args.task, "seed": self.args.seed, "steps": self.step, **results,
                   "minutes": self.now["minutes"], "device": self.device}
        if self.procs.is_main:
            write_json(self.out / "summary.json", summary)
        self.procs.print(f"all of it is in {self.out}")
        if "lora_r" in self.args:  # a training
            model = f"{self.args.model} --adapter {self.out}" if self.args.lora_r else self.out
            what = f"--task {self.tasks[0]} --watch" if self.tasks else "--prompt 'your question'"
            self.procs.print(f"  python sample.py --model {model} {what}\n"
                             f"  python tools/plot.py {self.out}\n"
                             f"  python tools/report.py {self.out}")
        return summary

    def restore(self):
        """Go on from the newest checkpoint, if any. Drops log lines behind it: they come again."""
        folders = checkpoints(self.out)
        whole = list(filter(is_whole, folders))
        others = " ".join(folder.name for folder in folders if folder not in whole)
        if others:
            self.procs.print(f"skipped {others}: a copy, or files are missing or damaged")
        if others and not whole:
            raise SystemExit(f"error: --out {self.out} has no whole checkpoint: remove {others}")
        for folder in self.procs.gather(whole[-1:])[:1]:  # all processes take the same
            record = read_json(folder / "files.json")
            if record["data"] != self.data:
                raise SystemExit(f"error: --out {self.out} was run on other data: restore it")
            load_trained(self.model, folder)  # weights or adapters
            state = optimizer_state(self.model, self.optimizer)  # filled in place
            dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(f"{folder}/optimizer"))
            self.step, self.logs = record["step"], record["logs"]
            self.started -= 60 * record["minutes"]  # its earlier lives
            self.procs.print(f"resumed from {folder}")
        for name in self.logs if self.procs.is_main else ():
            with open(self.out / name, "ab") as log:
                log.truncate(min(log.tell(), self.logs[name]))

    def save(self):
        """Write the checkpoint of self.step, unless it is there; remove all but the newest two."""
        folder = self.out / f"step_{self.step:06d}"
        if not self.step or any(self.procs.gather([is_whole(folder)])):
            return  # nothing is new
        draft = folder.with_suffix(".tmp")
        if self.procs.is_main:
            shutil.rmtree(draft, ignore_errors=True)  # of a life that was cut short
            draft.mkdir()
        self.procs.gather([])  # wait: the others write into this folder
        save_trained(self.model, draft, self.args.model)
        # not consolidated: torch 2.13 then writes 0 into tensors without dimensions
        writer = dcp.HuggingFaceStorageWriter(f"{draft}/optimizer", save_distributed=True)
        dcp.save(optimizer_state(self.model, self.optimizer), storage_writer=writer)
        if self.procs.is_main:
            self.tokenizer.save(draft)
            record = self.now | {"logs": self.logs, "data": self.data, "files": file_sizes(draft)}
            write_json(draft / "files.json", record)  # last: it tells all others
            mode = (draft / "files.json").stat().st_mode  # the umask's; safetensors' is 0600
            for path in (*draft.rglob("*"), draft):
                path.chmod(mode | path.stat().st_mode & 0o111)
            os.sync()  # the logs, too, before the name says so
            if folder.exists():  # a damaged one
                folder.rename(f"{folder}.{time.time_ns()}")
            draft.rename(folder)  # so it is whole, or absent
            os.sync()
            for old in list(filter(is_whole, checkpoints(self.out)))[:-2]:
                shutil.rmtree(old)
        self.procs.gather([])  # wait: until it is on the disk


def optimizer_state(model, optimizer):
    """AdamW's own tensors, {"state.<parameter>.exp_avg": tensor, ...}, not copies."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def file_sizes(folder):
    """{name: bytes} of all files of a checkpoint but files.json."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "files.json"]
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def is_whole(folder):
    """Whether a checkpoint has its own name, and all its files with sizes and headers."""
    try:
        record = read_json(folder / "files.json")
        for path in folder.rglob("*.safetensors"):
            open_tensors(path)
    except SystemExit:
        return False
    is_copy = folder.name != f"step_{record.get('step', 0):06d}"
    return not is_copy and record["files"].items() <= file_sizes(folder).items()
