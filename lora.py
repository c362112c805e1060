"""LoRA (arXiv:2106.09685): adapters on the matrices of LLaDA's blocks, in PEFT's files."""
import contextlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from model import (copy_into, gather_weights, load_tensors, load_weights, read_json, save_weights,
                   write_json)

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
ADAPTER, PREFIX = "adapter_model.safetensors", "base_model.model."  # PEFT's names
# fields of PEFT's config that change what is computed, and leave names and shapes as they are
NOT_PLAIN = "use_rslora", "fan_in_fan_out", "alpha_pattern", "alora_invocation_tokens"


class LoRALinear(nn.Linear):
    """y = W x + (alpha / r) B A x with W frozen. A subclass, so that W keeps its name."""

    def __init__(self, linear, r, alpha):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight.requires_grad_(False)
        self.r, self.alpha, self.scale = r, alpha, alpha / r
        self.active = True  # off in `adapters_off`
        # float32 over a bfloat16 base, too: in eight bits of mantissa steps of 3e-6 would vanish
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(linear.weight.new_empty(r, linear.in_features, dtype=dtype))
        self.lora_B = nn.Parameter(linear.weight.new_empty(linear.out_features, r, dtype=dtype))

    def forward(self, x):
        rows = x.flatten(0, -2)  # (M, in)
        y = F.linear(rows, self.weight)  # (M, out)
        if self.active:  # in the model's dtype; scaled and added to y within the second product
            low = F.linear(rows, self.lora_A.to(x.dtype))  # (M, r)
            y.addmm_(low, self.lora_B.to(x.dtype).T, alpha=self.scale)
        return y.unflatten(0, x.shape[:-1])


def lora_modules(model):
    """{name: module} of the adapted matrices."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(model, r, alpha, targets):
    """Freeze the model, and put an adapter without values on the matrices `targets` of a block."""
    unknown = set(targets) - set(LORA_TARGETS)
    if unknown or not targets:
        raise SystemExit(f"error: --lora_targets {targets}: choose some of {LORA_TARGETS}")
    model.requires_grad_(False)  # only adapters learn
    for block in model.blocks:
        for target in targets:
            setattr(block, target, LoRALinear(getattr(block, target), r, alpha))
    return model


def init_lora(model, generator):
    """Draw A as PEFT does, kaiming_uniform(a=sqrt(5)); B is 0, so the model equals its base."""
    for module in lora_modules(model).values():
        bound = module.in_features ** -0.5  # of the uniform distribution
        draws = torch.rand(module.lora_A.shape, generator=generator)  # the same on all processes
        copy_into(module.lora_A, draws * 2 * bound - bound)
        copy_into(module.lora_B, torch.zeros(module.lora_B.shape))


@contextlib.contextmanager
def adapters_off(model):
    """Within, the model is its base: the reference policy of a run with LoRA."""
    modules = lora_modules(model).values()
    for module in modules:
        module.active = False
    try:
        yield model
    finally:
        for module in modules:
            module.active = True


def adapter_parameters(model):
    """{PEFT's name: parameter} of all adapters."""
    return {f"{PREFIX}{name}.weight": p for name, p in model.named_parameters() if "lora_" in name}


def save_trained(model, folder, base):
    """Save the adapters of a model that has some, else all weights. base: its name, for PEFT."""
    modules = lora_modules(model)
    if not modules:
        return save_weights(model, folder)
    first = next(iter(modules.values()))
    targets = sorted({name.rpartition(".")[2] for name in modules})  # such as q_proj
    # the targets as a pattern: the LM head is called ff_out too, and PEFT would adapt it
    pattern = rf".*\.blocks\.\d+\.({'|'.join(targets)})"
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": first.r, "bias": "none",
              "lora_alpha": first.alpha, "target_modules": pattern, "inference_mode": True}
    tensors = {f"{PREFIX}{name}.weight": w for name, w in gather_weights(model, True).items()}
    if tensors:
        write_json(Path(folder, "adapter_config.json"), config)
        save_file(tensors, Path(folder, ADAPTER), metadata={"format": "pt"})


def load_trained(model, folder):
    """Load what `save_trained` saved of a model of the same form."""
    if lora_modules(model):
        load_tensors(adapter_parameters(model), folder, ADAPTER)
    else:
        load_weights(model, folder)


def load_adapter(model, folder):
    """Put the adapter of a folder on a model: ours, or one of PEFT's that is plain LoRA."""
    config = read_json(folder / "adapter_config.json")
    if any(map(config.get, NOT_PLAIN)) or isinstance(config.get("init_lora_weights"), str):
        raise SystemExit(f"error: --adapter {folder}: only plain LoRA is supported")
    targets = [name for name in LORA_TARGETS if name in str(config.get("target_modules"))]
    load_trained(add_lora(model, config["r"], config["lora_alpha"], targets), folder)
