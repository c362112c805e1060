"""LoRA (arXiv:2106.09685): adapters on LLaDA's blocks, in PEFT's files, and folded into their base.

    python lora.py merge BASE ADAPTER OUT
"""
import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from model import Config, LLaDA, at_least_float32
from weights import (check_fields, copy_into, find_checkpoint, load_tensors, load_weights, open_safetensors,
                     read_json, read_tensors, save_tensors, save_weights, weight_files)

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")  # of a block
ADAPTER = "adapter_model.safetensors"
PLAIN_LORA = {  # fields of PEFT's config: another value changes what the adapter computes, or its base
    "peft_type": ["LORA"], "use_rslora": [False], "use_dora": [False], "alpha_pattern": [{}, None],
    "fan_in_fan_out": [False], "alora_invocation_tokens": [None],
    "init_lora_weights": [True, False, "gaussian", "eva", "orthogonal"],  # not pissa, olora, corda, loftq
}
COPIED = ("config.json", "*.index.json", "generation_config.json", "tokenizer*.json",
          "special_tokens_map.json", "*.jinja", "*.py")  # what a loader of LLaDA reads beside the weights


class LoRALinear(nn.Linear):
    """y = W x + (alpha / r) B A x with W frozen. A subclass, so that W keeps its name in the checkpoint."""

    def __init__(self, linear, r, alpha):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight.requires_grad_(False)
        self.r, self.alpha, self.scale = r, alpha, alpha / r
        self.active = True
        # float32 over a bfloat16 base, too: in eight bits of mantissa steps of 3e-6 would vanish
        device, dtype = linear.weight.device, torch.promote_types(linear.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.empty(r, linear.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(linear.out_features, r, device=device, dtype=dtype))

    def forward(self, x):
        y = F.linear(x, self.weight)
        if not self.active:
            return y
        low = F.linear(x, self.lora_A.to(x.dtype))  # (..., r), computed in the model's dtype
        return y + self.scale * F.linear(low, self.lora_B.to(x.dtype))


def lora_modules(model):
    """{name: module} of the adapted matrices."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def add_lora(model, r, alpha, targets):
    """Freeze the model and put an adapter, still to be initialised, on every block matrix in `targets`."""
    unknown = set(targets) - set(LORA_TARGETS)
    if unknown or not targets or r < 1:
        raise SystemExit(f"error: --lora_targets {' '.join(targets)} --lora_r {r}: the rank must be at least 1, "
                         f"the matrices some of {' '.join(LORA_TARGETS)}")
    assert not lora_modules(model), "this model has adapters already"
    model.requires_grad_(False)
    for block in model.blocks:
        for target in targets:
            setattr(block, target, LoRALinear(getattr(block, target), r, alpha))
    return model


def init_lora(model, generator):
    """Draw A as PEFT does, kaiming_uniform(a=sqrt(5)), and set B to 0: the model still equals its base."""
    for module in lora_modules(model).values():
        bound = module.in_features ** -0.5
        copy_into(module.lora_A, torch.rand(module.lora_A.shape, generator=generator) * 2 * bound - bound)
        copy_into(module.lora_B, torch.zeros(module.lora_B.shape))
    return model


@contextlib.contextmanager
def adapters_off(model):
    """Inside, the model computes as its base: the reference policy of a run with LoRA."""
    modules = lora_modules(model).values()
    for module in modules:
        module.active = False
    try:
        yield model
    finally:
        for module in modules:
            module.active = True


# ---------------------------------------------------------------- PEFT's files

def adapter_parameters(model):
    """{PEFT's name: parameter} of all adapters."""
    return {f"base_model.model.{name}.lora_{x}.weight": getattr(module, f"lora_{x}")
            for name, module in lora_modules(model).items() for x in "AB"}


def save_adapter(model, folder, base="", is_writer=True):
    """Write the adapters and adapter_config.json. base: folder or hub id of the model that they belong to."""
    folder, modules = Path(folder), lora_modules(model)
    targets = [target for target in LORA_TARGETS if any(name.endswith("." + target) for name in modules)]
    first = next(iter(modules.values()))
    # the targets as a pattern, since the LM head is called ff_out too, and PEFT would adapt it
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": first.r, "lora_alpha": first.alpha,
              "target_modules": rf".*\.blocks\.\d+\.({'|'.join(targets)})", "lora_dropout": 0.0, "bias": "none",
              "fan_in_fan_out": False, "inference_mode": True, "task_type": None}
    if is_writer:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_tensors(adapter_parameters(model), folder / ADAPTER, is_writer)


def read_adapter_config(folder):
    """The dict in adapter_config.json. Exits where it is anything but plain LoRA."""
    path = Path(folder) / "adapter_config.json"
    config = {"peft_type": None, "r": None, "lora_alpha": None, **read_json(path)}
    check_fields(path, config, PLAIN_LORA)
    r, alpha = config["r"], config["lora_alpha"]
    if type(r) is not int or r < 1 or type(alpha) not in (int, float) or not 0 < alpha < 1e6:
        raise SystemExit(f"error: {path}: r = {r!r} and lora_alpha = {alpha!r} must be positive numbers")
    return config


def load_adapter(model, folder):
    """Load the adapters of a model that has the same adapters already."""
    config, module = read_adapter_config(folder), next(iter(lora_modules(model).values()))
    if (config["r"], config["lora_alpha"]) != (module.r, module.alpha):
        raise SystemExit(f"error: {folder}: this adapter has --lora_r {config['r']} --lora_alpha "
                         f"{config['lora_alpha']:g}, the options say {module.r} and {module.alpha:g}")
    load_tensors(adapter_parameters(model), folder, ADAPTER)


def attach_adapter(model, folder):
    """Put the adapter of a folder, ours or PEFT's, on the model. Exits where it fits another base."""
    config = read_adapter_config(folder)
    with open_safetensors(Path(folder) / ADAPTER) as file:
        names = " ".join(file.keys())
    targets = [target for target in LORA_TARGETS if f".{target}.lora_" in names]
    if not targets:
        raise SystemExit(f"error: {folder}: {ADAPTER} holds no adapter of a LLaDA")
    add_lora(model, config["r"], config["lora_alpha"], targets)
    load_adapter(model, folder)
    return model


def save_trained(model, folder, base="", is_writer=True):
    """Save the adapters of a model that has some, else all weights."""
    if lora_modules(model):
        save_adapter(model, folder, base, is_writer)
    else:
        save_weights(model, folder, is_writer)


def load_trained(model, folder):
    """Load what `save_trained` saved of a model of the same form."""
    load = load_adapter if lora_modules(model) else load_weights
    load(model, folder)


# ---------------------------------------------------------------- merge

@torch.no_grad()
def merge(base, trained, out):
    """Write the model folder `out`: the base with what training changed, one shard in memory at a time.

    trained: an adapter, which is folded in, or a whole model trained from the base. Files, names, dtypes, config
    and tokenizer are the base's; merged.json lists the adapters. Exits before it writes: `out` exists, the adapter
    is one of another base, or it is in already.
    """
    folder, trained, out = find_checkpoint(base), Path(trained), Path(out)
    unfinished = out.with_name(out.name + ".tmp")
    if out.exists() or unfinished.exists():
        raise SystemExit(f"error: {out} or {unfinished} exists already: remove it, or name a new folder")
    with torch.device("meta"):
        model = LLaDA(Config.from_folder(folder))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    files, record = weight_files(folder, shapes), folder / "merged.json"
    merges = json.loads(record.read_text()) if record.is_file() else []
    trained_files, factors = {}, {}
    if (trained / "config.json").is_file():
        trained_files = {name: path for path, names in weight_files(trained, shapes).items() for name in names}
    else:
        attach_adapter(model, trained)  # on the meta device: checked, but not kept
        factors = dict(read_tensors(trained / ADAPTER, adapter_parameters(model)))
        merges.append(describe_merge(merges, base, trained))
    unfinished.mkdir(parents=True)
    (unfinished / "merged.json").write_text(json.dumps(merges, indent=2) + "\n")
    for path in {path for pattern in COPIED for path in folder.glob(pattern)}:
        shutil.copyfile(path, unfinished / path.name)
    for path, names in tqdm(files.items(), desc="merge", unit="shard"):
        tensors = dict(read_tensors(path, names))
        for name in trained_files.keys() & names:  # training keeps its weights in float32
            trained_weight = dict(read_tensors(trained_files[name], [name]))[name]
            tensors[name] = trained_weight.to(tensors[name].dtype)
        fold_in(lora_modules(model), factors, tensors)
        save_tensors(tensors, unfinished / path.name)
    os.sync()  # before the folder gets its name, its files are on the disk
    unfinished.rename(out)


def fold_in(modules, factors, tensors):
    """Add scale * B A to the adapted matrices in `tensors`, summed in float32 or wider and rounded once."""
    for name, module in modules.items():
        weight = tensors.get(f"{name}.weight")
        if weight is not None:
            A, B = (at_least_float32(factors[f"base_model.model.{name}.lora_{x}.weight"]) for x in "AB")
            tensors[f"{name}.weight"] = (at_least_float32(weight) + module.scale * B @ A).to(weight.dtype)


def describe_merge(merges, base, trained):
    """A row for merged.json. Exits where this very adapter is in `merges` already."""
    digest = hashlib.sha256((trained / ADAPTER).read_bytes()).hexdigest()
    if digest in [row["sha256"] for row in merges]:
        raise SystemExit(f"error: {base}: {trained} is merged into it already (see merged.json): use it as it is")
    trained_on = read_adapter_config(trained).get("base_model_name_or_path") or base
    if Path(trained_on).resolve() != Path(base).resolve():
        print(f"note: {trained} says it was trained on {trained_on}: {base} must be the same weights", file=sys.stderr)
    return {"adapter": str(trained), "trained_on": str(trained_on), "sha256": digest}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Fold a trained adapter into its base.")
    parser.add_argument("command", choices=["merge"])
    parser.add_argument("base", metavar="BASE", help="the model the adapter was trained on: folder or hub id")
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder, or a whole model trained from BASE")
    parser.add_argument("out", metavar="OUT", help="a new folder, in BASE's layout and dtypes")
    args = parser.parse_args(argv)
    merge(args.base, args.adapter, args.out)
    print(f"{args.out}: {args.base} with {args.adapter}, a model folder like any other")


if __name__ == "__main__":
    main()
