"""Fold what training changed into the base model: out comes a model folder like the base.

    python tools/merge.py GSAI-ML/LLaDA-8B-Instruct runs/train_sft-s1k/step_002460 MERGED

BASE is the folder or hub id of the model that was trained, ADAPTER a checkpoint of its training: an adapter (ours or
PEFT's), or a whole model, which is kept in float32 while it is trained. OUT gets the base's files, names and dtypes.
"""
import argparse
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from any working directory

from lora import ADAPTER, LORA_TARGETS, PREFIX, adapter_parameters, add_lora, lora_modules  # noqa: E402
from model import (Config, LLaDA, at_least_float32, find_checkpoint, load_tensors, load_weights,  # noqa: E402
                   open_tensors, read_json, write_json)

PLAIN_LORA = {  # fields of PEFT's config: another value changes what the adapter computes, or its base
    "peft_type": ["LORA"], "use_rslora": [False], "use_dora": [False], "alpha_pattern": [{}, None],
    "rank_pattern": [{}, None], "fan_in_fan_out": [False], "alora_invocation_tokens": [None],
    "init_lora_weights": [True, False, "gaussian", "eva", "orthogonal"],  # not pissa, olora, corda, loftq
}
COPIED = ("config.json", "*.index.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json",
          "*.jinja", "*.py")  # what a loader of LLaDA reads beside the weights


# ---------------------------------------------------------------- the adapter

def read_adapter_config(folder):
    """The dict in adapter_config.json. Exits where it is anything but plain LoRA."""
    path = folder / "adapter_config.json"
    config = {"peft_type": None, "r": None, "lora_alpha": None, **read_json(path)}
    for key, allowed in PLAIN_LORA.items():
        if config.get(key, allowed[0]) not in allowed:
            raise SystemExit(f"error: {path}: {key} = {config[key]!r} is not supported, only {allowed[0]!r} is")
    r, alpha = config["r"], config["lora_alpha"]
    if type(r) is not int or r < 1 or type(alpha) not in (int, float) or not 0 < alpha < 1e6:
        raise SystemExit(f"error: {path}: r = {r!r} and lora_alpha = {alpha!r} must be positive numbers")
    return config


def load_adapter(model, folder):
    """Put the adapter of a folder on a model of shapes alone. Returns its factors, {PEFT's name: tensor}."""
    config = read_adapter_config(folder)
    with open_tensors(folder / ADAPTER) as file:
        names = " ".join(file.keys())
    targets = [target for target in LORA_TARGETS if f".{target}.lora_" in names]
    if not targets:
        raise SystemExit(f"error: {folder}: {ADAPTER} holds no adapter of a LLaDA")
    add_lora(model, config["r"], config["lora_alpha"], targets)
    factors = {name: torch.empty(p.shape) for name, p in adapter_parameters(model).items()}
    load_tensors(factors, folder, ADAPTER)
    return factors


def fold_in(modules, factors, tensors):
    """Add scale * B A to the adapted matrices in `tensors`, summed in float32 or wider and rounded once."""
    for name, module in modules.items():
        weight = tensors.get(f"{name}.weight")
        if weight is None:  # in another shard
            continue
        A, B = (factors[f"{PREFIX}{name}.lora_{x}.weight"] for x in "AB")
        tensors[f"{name}.weight"] = (at_least_float32(weight) + module.scale * B @ A).to(weight.dtype)


# ---------------------------------------------------------------- the model

def shard_files(folder):
    """The files that hold the weights of a model folder, as load_tensors finds them."""
    return sorted(folder.glob("model*.safetensors"))


def find_tensors(folder):
    """{name: file} of the weights of a model folder."""
    files = {}
    for path in shard_files(folder):
        with open_tensors(path) as file:
            files |= dict.fromkeys(file.keys(), path)
    return files


def refuse_links(folder):
    """Exit where a file of a model folder is a link to a file outside it: what is in OUT, people upload."""
    inside = (folder.resolve(), folder.resolve().parent.parent / "blobs")  # the hub's cache links to its blobs
    for path in folder.iterdir():
        if path.is_file() and path.resolve().parent not in inside:
            raise SystemExit(f"error: {path} links to {path.resolve()}, outside the model: put a copy in its place")


def read_merges(folder):
    """[{"adapter": ..., "sha256": ...}] of the adapters that are in the weights of a model folder."""
    record = folder / "merged.json"
    merges = read_json(record).get("merges") if record.exists() else []
    if not isinstance(merges, list) or not all(isinstance(row, dict) and "sha256" in row for row in merges):
        raise SystemExit(f"error: {record}: expected the merges that tools/merge.py wrote")
    return merges


def write_shard(tensors, path):
    """Write the tensors of a shard. Exits where one holds NaN or Inf, as after an overflow."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise SystemExit(f"error: {name} overflows with this adapter or model: is its lora_alpha right?")
    save_file(tensors, path, metadata={"format": "pt"})


def describe_merge(merges, base, adapter):
    """A row for merged.json. Exits where this very adapter is in `merges` already."""
    digest = hashlib.sha256((adapter / ADAPTER).read_bytes()).hexdigest()
    if digest in [row["sha256"] for row in merges]:
        raise SystemExit(f"error: {base}: {adapter} is merged into it already (see merged.json): use it as it is")
    trained_on = read_adapter_config(adapter).get("base_model_name_or_path") or base
    if Path(trained_on).resolve() != Path(base).resolve():
        print(f"note: {adapter} says it was trained on {trained_on}: {base} must be the same weights", file=sys.stderr)
    return {"adapter": str(adapter), "trained_on": str(trained_on), "sha256": digest}


@torch.no_grad()
def merge(base, trained, out):
    """Write the model folder `out`: the base with what training changed, one shard in memory at a time.

    trained: the folder of an adapter or of a whole model. merged.json lists the adapters that are in the weights.
    Exits before it writes: `out` exists, the adapter is of another base, or in already.
    """
    folder, trained, out = find_checkpoint(base), Path(trained), Path(out)
    if out.exists():
        raise SystemExit(f"error: {out} exists already: remove it, or name a new folder")
    if not any(trained.glob("*.safetensors")):
        raise SystemExit(f"error: {trained} holds no weights: name a checkpoint, such as RUN/step_000020")
    refuse_links(folder)
    refuse_links(trained)
    with torch.device("meta"):
        model = LLaDA(Config.from_folder(folder))
    load_weights(model, folder)  # compares names and shapes, before anything is written
    merges = read_merges(folder)
    factors, trained_files = {}, {}
    if (trained / "config.json").is_file():
        load_weights(model, trained)
        trained_files = find_tensors(trained)
    else:
        factors = load_adapter(model, trained)
        merges.append(describe_merge(merges, base, trained))

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as aside:  # removed if anything fails
        unfinished = Path(aside, "model")
        unfinished.mkdir()
        for path in {path for pattern in COPIED for path in folder.glob(pattern)}:
            shutil.copyfile(path, unfinished / path.name)
        write_json(unfinished / "merged.json", {"merges": merges})
        for path in tqdm(shard_files(folder), desc="merge", unit="shard"):
            tensors = load_file(path)
            for name in trained_files.keys() & tensors.keys():
                with open_tensors(trained_files[name]) as file:
                    tensors[name] = file.get_tensor(name).to(tensors[name].dtype)
            fold_in(lora_modules(model), factors, tensors)
            write_shard(tensors, unfinished / path.name)
            shutil.copymode(unfinished / "merged.json", unfinished / path.name)  # safetensors: for the owner alone
        os.sync()  # the files are on the disk before the folder gets its name
        unfinished.rename(out)
        os.sync()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "adapter", "out"):
        parser.add_argument(name, metavar=name.upper())
    args = parser.parse_args(argv)
    merge(args.base, args.adapter, args.out)
    print(f"{args.out}: {args.base} with {args.adapter}, a model folder like any other")


if __name__ == "__main__":
    main()
