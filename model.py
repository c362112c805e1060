"""LLaDA in plain PyTorch: the transformer, LoRA, and weights in and out in the published layout.

A LLaMA-style network with two differences: attention is bidirectional and logits[i] predict token i, not i + 1.
Parameter names are those of the checkpoint (GSAI-ML/LLaDA-8B-Base, -Instruct, 1.5), so nothing is renamed on the way in
or out.

    python model.py merge BASE ADAPTER OUT                   fold a trained adapter into its base
"""
import argparse
import contextlib
import hashlib
import json
import re
import shutil
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# Fields that would change the network, each with the one value implemented here (all published LLaDA files have it).
SUPPORTED = {
    "model_type": "llada", "block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "rope": True,
    "rope_full_precision": True, "layer_norm_with_affine": True, "alibi": False, "include_bias": False,
    "include_qkv_bias": False, "bias_for_layer_norm": False, "attention_layer_norm": False, "scale_logits": False,
    "input_emb_norm": False, "block_group_size": 1, "multi_query_attention": None, "clip_qkv": None,
    "attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0,
}
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")  # every matrix of a block
MAX_SHARD_BYTES = 5_000_000_000
HEAD_CHUNK = 2 ** 26  # logits that exist at a time while tokens are scored: 0.25 GB in float32
# what a standard loader of LLaDA reads beside config and weights; carried along by `merge`, code never run
CARRIED = ("config.json", "model.safetensors.index.json", "generation_config.json", "tokenizer*.json",
           "special_tokens_map.json", "*.jinja", "*.py")


@dataclass(frozen=True)
class Config:
    """The fields of config.json that shape the network; `raw` keeps the whole file so that a copy loses nothing."""
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp_hidden_size: int
    vocab_size: int
    embedding_size: int
    max_sequence_length: int
    mask_token_id: int
    eos_token_id: int
    rope_theta: float
    rms_norm_eps: float
    weight_tying: bool
    init_std: float
    raw: dict

    @property
    def head_dim(self):
        return self.d_model // self.n_heads

    @classmethod
    def from_dict(cls, raw, source="config"):
        """Read LLaDA's config.json. Raises ValueError naming the key that is missing, malformed or not supported."""
        for key, value in SUPPORTED.items():
            given = raw.get(key, None if key == "model_type" else value)
            if given != value and not (value is None and given is False):
                raise ValueError(f"{source}: {key} = {given!r} is not supported, this LLaDA has {value!r}")
        full = dict(raw)
        full["n_kv_heads"] = raw.get("n_kv_heads") or raw.get("n_heads")
        full["embedding_size"] = raw.get("embedding_size") or raw.get("vocab_size")
        full["mlp_hidden_size"] = raw.get("mlp_hidden_size") or (raw.get("mlp_ratio") or 0) * (raw.get("d_model") or 0)
        full.setdefault("weight_tying", False)
        full.setdefault("init_std", 0.02)
        values = {}
        for field in fields(cls):
            if field.name == "raw":
                continue
            kinds = (int, float) if field.type is float else field.type
            value = full.get(field.name)
            if not isinstance(value, kinds) or (isinstance(value, bool) and field.type is not bool):
                raise ValueError(f"{source}: {field.name} must be a {field.type.__name__}, found {value!r}")
            if field.type is not bool and value < (0 if field.name.endswith("_id") else 1e-12):
                raise ValueError(f"{source}: {field.name} must be positive, found {value!r}")
            values[field.name] = value
        config = cls(**values, raw=dict(raw))
        if config.d_model % (2 * config.n_heads) or config.n_heads % config.n_kv_heads:
            raise ValueError(f"{source}: d_model must divide by 2 * n_heads and n_heads by n_kv_heads, found "
                             f"{config.d_model}, {config.n_heads}, {config.n_kv_heads}")
        for key in ("mask_token_id", "eos_token_id"):
            if getattr(config, key) >= config.embedding_size:
                raise ValueError(f"{source}: {key} {getattr(config, key)} lies outside the embedding of "
                                 f"{config.embedding_size} rows")
        return config

    @classmethod
    def from_folder(cls, folder):
        """Read `folder`/config.json. Raises FileNotFoundError or ValueError in one line."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: no config.json here, expected a LLaDA checkpoint folder")
        try:
            raw = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error})") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: expected a JSON object")
        return cls.from_dict(raw, source=str(path))


def at_least_float32(x):
    """float32 for half precision, float64 stays float64: 'full precision' never rounds a wider input down."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def token_logps(x, head, targets):
    """log p of given tokens from the features before the head, in float32 or wider, at temperature 1.

    x (..., C); head (V, C); targets (...,) int64, or (..., G) for G tokens at each position. Returns targets' shape.
    Goes through the head in chunks of HEAD_CHUNK logits. Where there are several, each is computed again in the
    backward pass, so that never more than one exists, neither now nor kept for the gradient.
    """
    def score(x, targets):
        return at_least_float32(F.linear(x, head)).log_softmax(-1).gather(-1, targets)

    tokens = targets if targets.dim() == x.dim() else targets[..., None]
    size = max(1, HEAD_CHUNK // len(head))
    chunks = list(zip(x.flatten(0, -2).split(size), tokens.flatten(0, -2).split(size)))  # (size, C), (size, G)
    if len(chunks) == 1:  # the backward pass needs it in any case: kept, it is computed once
        logps = [score(*chunks[0])]
    else:
        logps = [checkpoint(score, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.cat(logps).view(targets.shape).clone()  # FSDP wants an output that is no view


@torch.no_grad()
def fill(p, read):
    """Set a parameter to a tensor of which read(slice) gives rows. One that is spread over processes needs another."""
    p.copy_(read(slice(None)))


def whole(p):
    """The full values of a parameter on the CPU. The counterpart of `fill`, likewise to be replaced."""
    return p.detach().cpu()


class RMSNorm(nn.Module):
    """LLaDA casts back *before* the weight; torch.nn.RMSNorm after it, which changes a quarter of bfloat16 outputs."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        normed = F.rms_norm(at_least_float32(x), x.shape[-1:], eps=self.eps)
        return self.weight * normed.to(x.dtype)


def rope_tables(length, head_dim, theta, device):
    """cos and sin of position * theta ** (-2i / head_dim), both halves alike: two float32 (length, head_dim)."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), inverse).repeat(1, 2)
    return angles.cos(), angles.sin()  # (T, D) each


def apply_rope(x, cos, sin):
    """Rotate x (B, H, T, D) by its positions, in float32 or wider; half-split ("rotate half"), not interleaved."""
    wide = at_least_float32(x)
    left, right = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


def at(x, keep):
    """x (B, T, C) at the positions `keep`: all if None, a slice or int64 (B, k) -> (B, k, C), bool (B, T) -> (M, C)."""
    if keep is None:
        return x
    if isinstance(keep, slice):
        return x[:, keep]
    return x[keep] if keep.dtype == torch.bool else x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))


class Block(nn.Module):
    """Pre-norm attention and SwiGLU; the names are the checkpoint's: ff_proj is the gate, ff_out the way down."""

    def __init__(self, config):
        super().__init__()
        c, kv_size = config, config.n_kv_heads * config.head_dim
        self.head_dim, self.grouped = c.head_dim, c.n_kv_heads != c.n_heads
        self.attn_norm = RMSNorm(c.d_model, c.rms_norm_eps)
        self.q_proj = nn.Linear(c.d_model, c.d_model, bias=False)
        self.k_proj = nn.Linear(c.d_model, kv_size, bias=False)
        self.v_proj = nn.Linear(c.d_model, kv_size, bias=False)
        self.attn_out = nn.Linear(c.d_model, c.d_model, bias=False)
        self.ff_norm = RMSNorm(c.d_model, c.rms_norm_eps)
        self.ff_proj = nn.Linear(c.d_model, c.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(c.d_model, c.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(c.mlp_hidden_size, c.d_model, bias=False)

    def forward(self, x, cos, sin, attn_mask=None, keep=None, cache=None, start=0):
        """x (B, S, C) -> (B, k, C). Keys and values come from everywhere, all else only where the output is kept.

        cache: [] or [keys, values] (B, KV, T, D), of which those from `start` on are set to x's, see LLaDA.forward.
        """
        h = self.attn_norm(x)
        x, hq, keep = at(x, keep), at(h, keep), slice(None) if keep is None else keep  # (B, k, C)
        q, k, v = (p(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for p, h in ((self.q_proj, hq), (self.k_proj, h), (self.v_proj, h)))
        q = apply_rope(q, cos[keep].unsqueeze(-3), sin[keep].unsqueeze(-3))  # (B, H, k, D)
        k = apply_rope(k, cos, sin)  # (B, KV, S, D)
        if cache:
            for cached, new in zip(cache, (k, v)):
                cached[:, :, start:start + new.shape[2]] = new
            k, v = cache  # (B, KV, T, D)
        elif cache is not None:
            cache += k, v
        a = F.scaled_dot_product_attention(q, k, v, attn_mask, enable_gqa=self.grouped)  # (B, H, k, D)
        x = x + self.attn_out(a.transpose(1, 2).flatten(2))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))  # (B, k, C)


class LLaDA(nn.Module):
    """The network. `model(ids)` gives logits; weights are uninitialised until `init_weights` or `from_pretrained`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        parts = {
            "wte": nn.Embedding(config.embedding_size, config.d_model),
            "blocks": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
        }
        if not config.weight_tying:
            parts["ff_out"] = nn.Linear(config.d_model, config.embedding_size, bias=False)  # the LM head
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(parts)})  # so that names equal the checkpoint's

    @property
    def blocks(self):
        return self.model["transformer"]["blocks"]

    def forward(self, ids, attn_mask=None, keep=None, targets=None, cache=None, start=0):
        """Logits for every position, or only for those in `keep`, which are chosen in the last block, before the head.

        ids (B, T) int64; attn_mask (B, T) bool, False at padding, whose keys no query sees; keep: a slice of positions
        -> (B, k, V), an int64 tensor (B, k) -> (B, k, V), or a bool tensor (B, T) -> (number of True, V).
        targets: tokens at the kept positions, one or G of each, (B, k[, G]) or (number of True[, G]): instead of logits
        their log-probabilities come back, see `token_logps`.
        cache: an empty list, into which this pass puts every block's keys and values, or one so filled by a pass over
        all T: then ids (B, S) may be the positions from `start` on alone; their keys and values replace those in the
        cache, all others are taken from there as they are (Fast-dLLM, arXiv:2505.22618). attn_mask still covers T.
        """
        net, length = self.model["transformer"], start + ids.shape[1]
        if length > self.config.max_sequence_length:
            raise ValueError(f"{length} tokens exceed max_sequence_length {self.config.max_sequence_length}")
        x = net["wte"](ids)  # (B, T, C)
        tables = rope_tables(length, self.config.head_dim, self.config.rope_theta, ids.device)
        cos, sin = (table[start:] for table in tables)  # (S, D) each
        if attn_mask is not None:
            attn_mask = attn_mask[:, None, None, :]  # (B, 1, 1, T): every query sees the same keys
        if cache == []:
            cache += [[] for _ in self.blocks]
        unequal = isinstance(keep, torch.Tensor) and keep.dtype == torch.bool  # numbers of kept: after attention
        chosen = [None] * (len(self.blocks) - 1) + [None if unequal else keep]
        for block, kept, cached in zip(self.blocks, chosen, cache or [None] * len(self.blocks)):
            x = block(x, cos, sin, attn_mask, kept, cached, start)  # (B, S, C), the last (B, k, C)
        x = at(x, keep) if unequal else x  # (M, C)
        x, head = net["ln_f"](x), net["wte" if self.config.weight_tying else "ff_out"].weight
        return F.linear(x, head) if targets is None else token_logps(x, head, targets)

    def init_weights(self, generator, fill=fill):
        """Random weights: normal(0, init_std), the two projections into the residual smaller by sqrt(2 layers)."""
        for name, p in self.named_parameters():
            if p.dim() == 1:
                full = torch.ones(p.shape)
            else:
                into_residual = ".blocks." in name and name.endswith(("attn_out.weight", "ff_out.weight"))
                std = self.config.init_std / ((2 * self.config.n_layers) ** 0.5 if into_residual else 1.0)
                full = torch.empty(p.shape).normal_(0.0, std, generator=generator)
            fill(p, full.__getitem__)
        return self

    @classmethod
    def empty(cls, config, device="cpu", dtype=torch.float32, shape=None):
        """A model whose weights are still to be filled in. shape(model) may add adapters or shard it before it has any.

        So it never takes more memory than what this process holds of it in the end.
        """
        with torch.device("meta"):
            model = cls(config).to(dtype)
        if shape:
            shape(model)
        return model.to_empty(device=device)

    @classmethod
    def from_pretrained(cls, name, device="cpu", dtype=torch.float32, shape=None, fill=fill):
        """Load a checkpoint folder or hub id: strict, safetensors only. Errors: one line that names file and tensor.

        shape: see `empty`; fill: see the function, another one reads only the rows that a process holds.
        """
        folder = find_checkpoint(name)
        return read_weights(cls.empty(Config.from_folder(folder), device, dtype, shape), folder, fill)

    def save_pretrained(self, folder, max_shard_bytes=MAX_SHARD_BYTES, whole=whole):
        """Write config.json and safetensors as LLaDA does: one file, or shards and an index above `max_shard_bytes`.

        whole: gives the full values of a parameter; called shard by shard, so that no more than one is in memory.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if any(isinstance(m, LoRALinear) for m in self.modules()):
            raise ValueError("merge_lora(model) first, or save_lora(model, folder): a checkpoint holds plain weights")
        (folder / "config.json").write_text(json.dumps(self.config.raw, indent=2) + "\n")
        tensors = dict(self.named_parameters())
        sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
        shards = [[]]
        for name in tensors:
            if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > max_shard_bytes:
                shards.append([])
            shards[-1].append(name)
        if len(shards) == 1:
            full = {n: whole(t) for n, t in tensors.items()}
            save_file(full, folder / "model.safetensors", metadata={"format": "pt"})
            (folder / "model.safetensors.index.json").unlink(missing_ok=True)  # an older one would win when loading
            return
        weight_map = {}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            save_file({n: whole(tensors[n]) for n in names}, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


# ---------------------------------------------------------------- files

def find_checkpoint(name, files=("*.safetensors", "*.json", "*.py")):
    """A folder for `name`: itself if it is one, else the hub's snapshot of that id (downloaded once, then cached)."""
    folder = Path(name) if Path(name).is_dir() else download(name, files)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = adapter_config(folder).get("base_model_name_or_path") or "BASE"
        raise ValueError(f"--model {name}: an adapter of {base}, not a model: fold it in with python model.py merge "
                         f"{base} {name} OUT, then --model OUT")
    return folder


def download(name, files):
    """The hub's snapshot of an id, limited to `files`. Raises FileNotFoundError that says how to get it by hand."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or str(name).startswith("."):
        raise FileNotFoundError(f"--model {name}: no such folder, and not a hub id like GSAI-ML/LLaDA-8B-Instruct")
    from huggingface_hub import snapshot_download  # arrives with tokenizers; only needed for hub ids
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(files)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"--model {name}: neither a local folder nor reachable on the hub ({first}); on a "
                                f"machine with network run: hf download {name}, then copy the folder here") from None


def open_safetensors(path):
    """safe_open with the two usual faults explained: a cut-off download and a Git-LFS pointer or renamed pickle."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        text = str(error)
    hint = "not a safetensors file"
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        hint = "a Git-LFS pointer, not the weights: run git lfs pull"
    elif head[:2] in (b"PK", b"\x80\x02"):
        hint = "a renamed pickle, refused: convert it to safetensors"
    elif re.search("(?i)incomplete|invalid ?header ?length|header ?too ?small", text):
        hint = "truncated, an incomplete download? fetch it again"
    raise ValueError(f"{path}: {hint} ({text})") from None


def weight_files(folder, expected):
    """{path: [tensor names]} for a checkpoint folder, after checking names and shapes of every tensor from the headers.

    Follows weight_map: one block's tensors may lie in any shard. Raises FileNotFoundError / ValueError before any
    weight is read: shards missing or truncated, paths leading out of the folder, tensors missing, unexpected or of
    wrong shape.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{index}: not a weight index, it needs a JSON object with weight_map") from None
        for key, file in weight_map.items():
            if not isinstance(file, str) or not re.fullmatch(r"[\w][\w.-]*\.safetensors", file):
                raise ValueError(f"{index}: weight_map[{key}] = {file!r} is not a plain .safetensors file name")
    elif (folder / "model.safetensors").is_file():
        with open_safetensors(folder / "model.safetensors") as file:
            weight_map = dict.fromkeys(file.keys(), "model.safetensors")
    else:
        pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        raise FileNotFoundError(f"{folder}: no model.safetensors" + (
            f"; {pickles[0]} is a pickle, which can run code and is refused: convert it to safetensors" if pickles else
            " and no model.safetensors.index.json"))
    report_names(folder, expected, weight_map)
    files = {}
    for key, file in weight_map.items():
        files.setdefault(folder / file, []).append(key)
    for path, names in files.items():
        if not path.exists():
            raise FileNotFoundError(f"{path}: named in the index but missing, an incomplete download?")
        with open_safetensors(path) as file:
            inside = set(file.keys())
            for key in names:
                if key not in inside:
                    raise ValueError(f"{path}: the index says {key} is here, it is not")
                shape = tuple(file.get_slice(key).get_shape())
                if shape != expected[key]:
                    raise ValueError(f"{path}: {key} has shape {shape}, the config asks for {expected[key]}")
    return files


def report_names(folder, expected, found):
    """Raise ValueError naming the tensors that are missing or not part of the network."""
    for wrong, words in ((expected.keys() - found, "missing"), (found - expected.keys(), "unexpected")):
        if wrong:
            names = sorted(wrong)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{folder}: {words} tensor {', '.join(names[:3])}{more}; is config.json of this "
                             "checkpoint?")


def read_weights(model, folder, fill=fill):
    """Fill the weights of the model from a checkpoint folder, adapters aside, one tensor at a time."""
    weights = {name: p for name, p in model.named_parameters() if ".lora_" not in name}
    for path, names in weight_files(folder, {name: tuple(p.shape) for name, p in weights.items()}).items():
        with open_safetensors(path) as file:
            for key in names:
                fill(weights[key], lambda rows: read_tensor(file, key, path, rows))
    return model


def load_tensor(path, key):
    with open_safetensors(path) as file:
        return read_tensor(file, key, path)


def read_tensor(file, key, path, rows=slice(None)):
    """Rows of one tensor; raises ValueError where it is not floating point or holds NaN or Inf."""
    tensor = file.get_slice(key)[rows]
    if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{path}: {key} has dtype {tensor.dtype}; only float64, float32, float16, bfloat16 are read")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{path}: {key} holds NaN or Inf")
    return tensor


# ---------------------------------------------------------------- LoRA (arXiv:2106.09685), files and names as PEFT's

class LoRALinear(nn.Linear):
    """y = W x + (alpha / r) B A x with W frozen. A subclass, so that the weight keeps its name in the checkpoint."""

    def __init__(self, base, r, alpha):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight.requires_grad_(False)
        self.scale, self.active = alpha / r, True
        # float32 even over a bfloat16 base: steps of 3e-6 would vanish in eight bits of mantissa
        wide = {"device": base.weight.device, "dtype": torch.promote_types(base.weight.dtype, torch.float32)}
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **wide))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, r, **wide))

    def forward(self, x):
        y = F.linear(x, self.weight)
        if not self.active:
            return y
        low = F.linear(x, self.lora_A.to(x.dtype))  # kept in float32, computed in the model's dtype
        return y + self.scale * F.linear(low, self.lora_B.to(x.dtype))

    def merged(self, weight, A, B):
        """weight + scale B A, summed in float32 or wider and rounded once."""
        return (weight.to(torch.promote_types(weight.dtype, B.dtype)) + self.scale * B @ A).to(weight.dtype)


def lora_modules(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(model, r, alpha, targets, generator=None):
    """Freeze the model and put an adapter on every block matrix named in `targets`. Changes nothing until trained.

    r, alpha: rank and scale (the update is alpha / r * B A); targets: names of LORA_TARGETS; generator: of `init_lora`,
    None where that is called later. Raises ValueError for an unknown target or where adapters are on already.
    """
    unknown = set(targets) - set(LORA_TARGETS)
    if unknown or not targets or r < 1:
        raise ValueError(f"--lora_targets {' '.join(sorted(unknown))}: choose from {' '.join(LORA_TARGETS)}, rank >= 1")
    if lora_modules(model):
        raise ValueError("this model has adapters already: merge_lora(model) first")
    model.requires_grad_(False)
    for block in model.blocks:
        for target in LORA_TARGETS:
            if target in targets:
                setattr(block, target, LoRALinear(getattr(block, target), r, alpha))
    return init_lora(model, generator) if generator else model


def init_lora(model, generator, fill=fill):
    """PEFT's start, kaiming_uniform(a=sqrt(5)) for A and 0 for B, so that the model is still its base."""
    for m in lora_modules(model).values():
        bound = m.in_features ** -0.5
        a = torch.rand(m.lora_A.shape, generator=generator) * 2 * bound - bound
        fill(m.lora_A, a.__getitem__)
        fill(m.lora_B, torch.zeros(m.lora_B.shape).__getitem__)
    return model


@contextlib.contextmanager
def adapters_off(model):
    """Inside, the model is the frozen base: the reference policy of an RL run with LoRA."""
    modules = lora_modules(model).values()
    for m in modules:
        m.active = False
    try:
        yield model
    finally:
        for m in modules:
            m.active = True


@torch.no_grad()
def merge_lora(model):
    """Fold the adapters into the weights and take them off. Raises ValueError if there are none (merged already?)."""
    if not lora_modules(model):
        raise ValueError("no adapters to merge: they were merged already, or never added")
    for block in model.blocks:
        for target in LORA_TARGETS:
            layer = getattr(block, target)
            if isinstance(layer, LoRALinear):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
                plain.weight = nn.Parameter(layer.merged(layer.weight, layer.lora_A, layer.lora_B))
                setattr(block, target, plain)
    return model.requires_grad_(True)


def save_lora(model, folder, base="", whole=whole):
    """Write adapter_model.safetensors and adapter_config.json under PEFT's names. `base`: where the base model lies."""
    modules = lora_modules(model)
    if not modules:
        raise ValueError("no adapters to save")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(modules.values()))
    r = first.lora_A.shape[0]
    targets = [t for t in LORA_TARGETS if any(name.endswith("." + t) for name in modules)]
    # a pattern and not a list: the LM head is called ff_out too, and PEFT would adapt it
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": r, "lora_alpha": first.scale * r,
              "target_modules": rf".*\.blocks\.\d+\.({'|'.join(targets)})", "lora_dropout": 0.0, "bias": "none",
              "fan_in_fan_out": False, "inference_mode": True, "task_type": None}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {f"base_model.model.{name}.lora_{x}.weight": whole(getattr(m, f"lora_{x}"))
               for name, m in modules.items() for x in "AB"}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def save_weights(model, folder, base="", whole=whole):
    """The adapter where the model has one, else the whole model: what a training run saves."""
    save_lora(model, folder, base, whole) if lora_modules(model) else model.save_pretrained(folder, whole=whole)


def load_weights(model, folder, fill=fill):
    """The counterpart of `save_weights`: into a model that has the same form, adapters included."""
    for layer in list(lora_modules(model).values())[:1]:
        config, r = adapter_config(folder), layer.lora_A.shape[0]
        if (config["r"], config["lora_alpha"]) != (r, layer.scale * r):
            raise ValueError(f"{folder}: this adapter needs --lora_r {config['r']} --lora_alpha "
                             f"{config['lora_alpha']:g}, the options say {r} and {layer.scale * r:g}")
    return (read_adapter if lora_modules(model) else read_weights)(model, folder, fill)


def adapter_config(folder):
    """The dict in `folder`/adapter_config.json. Raises an error where it is not there, or anything but plain LoRA."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file() or not (path.parent / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(f"{folder}: expected adapter_config.json and adapter_model.safetensors")
    try:
        config = json.loads(path.read_text())
        kind, r, alpha = config["peft_type"], config["r"], config["lora_alpha"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: expected a JSON object with peft_type, r and lora_alpha") from None
    other = [key for key in ("use_rslora", "use_dora", "alpha_pattern", "fan_in_fan_out") if config.get(key)]
    if kind != "LORA" or other:
        raise ValueError(f"{path}: {other[0] if other else f'peft_type {kind}'} is not supported, only plain LoRA")
    if type(r) is not int or r < 1 or type(alpha) not in (int, float):
        raise ValueError(f"{path}: r = {r!r} and lora_alpha = {alpha!r} must be numbers, r at least 1")
    return config


def load_lora(model, folder, fill=fill):
    """Put the adapter of `folder` (ours or PEFT's) on the model. Raises ValueError where it belongs to another base."""
    folder = Path(folder)
    config = adapter_config(folder)
    with open_safetensors(folder / "adapter_model.safetensors") as file:
        names = list(file.keys())
    targets = [t for t in LORA_TARGETS if any(f".{t}.lora_" in name for name in names)]
    if not targets:
        raise ValueError(f"{folder}: no LoRA tensor of a LLaDA block in adapter_model.safetensors")
    add_lora(model, config["r"], config["lora_alpha"], targets)
    return read_adapter(model, folder, fill)


def read_adapter(model, folder, fill=fill):
    """Copy adapter_model.safetensors into the adapters of the model, which must be the same ones."""
    path = Path(folder) / "adapter_model.safetensors"
    with open_safetensors(path) as file:
        tensors = {key: read_tensor(file, key, path) for key in file.keys()}
    wanted = {f"base_model.model.{name}.lora_{x}.weight": getattr(m, f"lora_{x}")
              for name, m in lora_modules(model).items() for x in "AB"}
    report_names(folder, wanted, tensors)
    for key, parameter in wanted.items():
        if parameter.shape != tensors[key].shape:
            raise ValueError(f"{folder}: {key} has shape {tuple(tensors[key].shape)}, this model needs "
                             f"{tuple(parameter.shape)}: an adapter of another base?")
        fill(parameter, tensors[key].__getitem__)
    return model


# ---------------------------------------------------------------- command line

@torch.no_grad()
def merge(base, trained, out):
    """Write the model folder `out`: `base` with what training changed, one shard in memory at a time.

    base: folder or hub id; trained: an adapter, which is folded in, or a whole model, whose weights take the places of
    the base's (training keeps them in float32). Files, index, names, dtypes, config and tokenizer are the base's:
    whatever loads the base loads `out`. Returns the adapters folded in so far, which merged.json keeps. Raises
    ValueError or FileNotFoundError before it writes: `out` not new, an adapter of another base or merged already.
    """
    folder, trained, out = find_checkpoint(base), Path(trained), Path(out)
    if out.exists():
        raise ValueError(f"{out}: exists already, name a new folder")
    with torch.device("meta"):
        model = LLaDA(Config.from_folder(folder))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    files, layers, values, source, record = weight_files(folder, shapes), {}, {}, {}, folder / "merged.json"
    merges = json.loads(record.read_text()) if record.is_file() else []
    if (trained / "config.json").is_file():
        source = {key: path for path, names in weight_files(trained, shapes).items() for key in names}
    else:
        load_lora(model, trained, lambda p, read: values.update({p: read(slice(None))}))  # on the meta device, all else
        layers = {f"{name}.weight": layer for name, layer in lora_modules(model).items()}
        merges = add_merge(merges, base, trained)
    half = out.with_name(out.name + ".tmp")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    (half / "merged.json").write_text(json.dumps(merges, indent=2) + "\n")
    for path in {path for pattern in CARRIED for path in folder.glob(pattern)}:
        shutil.copyfile(path, half / path.name)
    for path, names in tqdm(files.items(), desc="merge", unit="shard"):
        tensors = {key: load_tensor(path, key) for key in names}
        for key in source.keys() & names:
            tensors[key] = load_tensor(source[key], key).to(tensors[key].dtype)
        for key in layers.keys() & names:
            layer = layers[key]
            tensors[key] = layer.merged(tensors[key], values[layer.lora_A], values[layer.lora_B])
        save_file(tensors, half / path.name, metadata={"format": "pt"})
        shutil.copymode(half / "config.json", half / path.name)  # safetensors makes files for the owner alone
    half.rename(out)
    return merges


def add_merge(merges, base, trained):
    """The record of merges with one more. Raises ValueError where this very adapter is in it."""
    with open(trained / "adapter_model.safetensors", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest in [earlier["sha256"] for earlier in merges]:
        raise ValueError(f"{base}: {trained} is merged into it already, use it as it is (see merged.json)")
    trained_on = adapter_config(trained).get("base_model_name_or_path") or base
    if str(trained_on) != str(base) and Path(trained_on).resolve() != Path(base).resolve():
        print(f"note: {trained} says it was trained on {trained_on}: {base} must be the same weights", file=sys.stderr)
    return [*merges, {"adapter": str(trained), "trained_on": trained_on, "sha256": digest}]


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Fold a trained adapter into its base.")
    command = p.add_subparsers(dest="command", required=True).add_parser("merge", help=merge.__doc__.splitlines()[0])
    command.add_argument("base", metavar="BASE", help="the model the adapter was trained on: folder or hub id")
    command.add_argument("adapter", metavar="ADAPTER", help="adapter folder; or a whole model trained from BASE")
    command.add_argument("out", metavar="OUT", help="a new folder, in BASE's layout and dtypes")
    return p.parse_args(argv)


def main(args):
    try:
        merge(args.base, args.adapter, args.out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{args.base} with {args.adapter} is in {args.out}: a model folder like any other")


if __name__ == "__main__":
    main(parse_args())
