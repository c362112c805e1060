"""LLaDA in plain PyTorch: the transformer, and its weights in and out in the published layout.

A LLaMA-style network with two differences: attention is bidirectional, and logits[i] predict token
i, not i + 1. On the disk all is safetensors and JSON: no pickle is opened, no foreign code run.
"""
import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

TINY = Path(__file__).resolve().parent / "data" / "tiny"
HEAD_CHUNK = 2 ** 26  # logits that exist at a time while tokens are scored: 0.25 GB in float32
recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
SUPPORTED = {  # fields that would change the network, with the value of every published LLaDA
    "model_type": "llada", "block_type": "llama", "layer_norm_type": "rms", "rope": True,
    "activation_type": "silu", "rope_full_precision": True, "layer_norm_with_affine": True,
    "block_group_size": 1, **dict.fromkeys((
        "alibi", "include_bias", "include_qkv_bias", "bias_for_layer_norm", "scale_logits",
        "attention_layer_norm", "input_emb_norm", "clip_qkv", "multi_query_attention",
        "attention_dropout", "residual_dropout", "embedding_dropout", "weight_tying"), 0),
}
SIZES = ("d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size", "embedding_size",
         "max_sequence_length", "mask_token_id", "eos_token_id")  # whole numbers


class Config(SimpleNamespace):
    """The fields of config.json; `raw` is the file as it is, for a copy."""

    @classmethod
    def from_folder(cls, folder):
        """Read config.json. Exits naming a field that is missing, malformed or not supported."""
        path = Path(folder, "config.json")
        raw = read_json(path)  # as published, and as copied
        config = cls(**{"model_type": "", "init_std": 0.02, **raw, "raw": raw})
        for name, value in SUPPORTED.items():
            if (vars(config).get(name, value) or 0) != value:
                raise SystemExit(f"error: {path}: is this a LLaDA? {name} must be {value!r}")
        for name in (*SIZES, "rope_theta", "rms_norm_eps", "init_std"):
            value, limit = getattr(config, name, None), 1e4 if name == "n_layers" else 1e12
            is_number = type(value) in (int, float) and 0 < value < limit
            if not is_number or (name in SIZES and value % 1):
                raise SystemExit(f"error: {path}: {name} = {value!r}: must lie in 0 to {limit:g}")
        if max(config.mask_token_id, config.eos_token_id) >= config.embedding_size:
            raise SystemExit(f"error: {path}: mask_token_id or eos_token_id has no embedding")
        config.head_dim = config.d_model // config.n_heads  # D
        return config


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))  # float64 is not rounded


def token_logps(x, head, targets):
    """log p of given tokens, from the features before the head, in float32 or wider.

    x (..., C); head (V, C); targets (...) int64, or (..., G) for G tokens at each position. Never
    more than HEAD_CHUNK logits exist at a time: the backward pass computes them again.
    """
    def score(x, targets):  # (size, C), (size, G) -> (size, G)
        return at_least_float32(F.linear(x, head)).log_softmax(-1).gather(-1, targets)

    tokens = targets if targets.dim() == x.dim() else targets[..., None]  # (..., G)
    size = max(1, HEAD_CHUNK // len(head))  # positions in a chunk
    chunks = list(zip(x.flatten(0, -2).split(size), tokens.flatten(0, -2).split(size)))
    if len(chunks) > 1:  # else the backward pass needs all logits at once in any case
        score = functools.partial(recompute, score)
    logps = [score(*chunk) for chunk in chunks]
    return torch.cat(logps).view(targets.shape).clone()  # FSDP wants an output that is no view


class RMSNorm(nn.Module):
    """As LLaDA rounds, before the weight; torch.nn.RMSNorm rounds behind it, and differs."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)  # (..., C)


def rope_tables(length, head_dim, theta, device):
    """cos and sin of position * theta ** (-2i / head_dim), two float32 (length, head_dim)."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.outer(torch.arange(length, device=device).float(), inverse).repeat(1, 2)  # (T, D)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Rotate x (B, H, T, D) by its positions; halves of D form the pairs."""
    left, right = x.chunk(2, dim=-1)  # (B, H, T, D / 2)
    turned = torch.cat((-right, left), dim=-1)  # (B, H, T, D)
    return (x * cos + turned * sin).to(x.dtype)  # in float32 within, as cos and sin are


class Block(nn.Module):
    """Pre-norm attention and SwiGLU. ff_proj is its gate, up_proj and ff_out lead up and down."""

    def __init__(self, config):
        super().__init__()
        d_model, mlp_size = config.d_model, config.mlp_hidden_size
        self.head_dim = config.head_dim
        self.grouped = config.n_kv_heads != config.n_heads  # several queries share a key
        self.attn_norm = RMSNorm(d_model, config.rms_norm_eps)
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, config.n_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, config.n_kv_heads * config.head_dim, bias=False)
        self.attn_out = nn.Linear(d_model, d_model, bias=False)
        self.ff_norm = RMSNorm(d_model, config.rms_norm_eps)
        self.ff_proj = nn.Linear(d_model, mlp_size, bias=False)
        self.up_proj = nn.Linear(d_model, mlp_size, bias=False)
        self.ff_out = nn.Linear(mlp_size, d_model, bias=False)

    def forward(self, x, cos, sin, attn_mask=None, keep=None):
        """x (B, T, C) -> (B, T, C), or (B, k, C) where `keep`, int64 (B, k), names positions."""
        h = q_input = self.attn_norm(x)  # (B, T, C)
        q_cos, q_sin = cos, sin  # (T, D)
        if keep is not None:
            index = keep[..., None].expand(-1, -1, x.shape[-1])  # (B, k, C)
            x, q_input = x.gather(1, index), h.gather(1, index)  # (B, k, C)
            q_cos, q_sin = cos[keep][:, None], sin[keep][:, None]  # (B, 1, k, D)
        q, k, v = self.q_proj(q_input), self.k_proj(h), self.v_proj(h)  # (B, k, C), (B, T, KV * D)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))
        q, k = apply_rope(q, q_cos, q_sin), apply_rope(k, cos, sin)  # (B, H, k, D), (B, KV, T, D)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask, enable_gqa=self.grouped)  # (B, H, k, D)
        x = x + self.attn_out(a.transpose(1, 2).flatten(2))  # (B, k, C)
        h = self.ff_norm(x)  # (B, k, C)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))  # (B, k, C)


class LLaDA(nn.Module):
    """The network. `model(ids)` gives logits, once `load_weights` has filled it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict({
            "wte": nn.Embedding(config.embedding_size, config.d_model),  # the checkpoint's names
            "blocks": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
            "ff_out": nn.Linear(config.d_model, config.embedding_size, bias=False)})})  # the head

    @property
    def blocks(self):
        return self.model["transformer"]["blocks"]

    def forward(self, ids, attn_mask=None, keep=None, targets=None):
        """Logits (B, T, V), or only those of some positions, which are chosen before the head.

        ids (B, T) int64; attn_mask (B, T) bool, False at padding; keep: int64 (B, k) -> (B, k, V),
        or bool (B, T) -> (number of True, V); targets: tokens there to score, see `token_logps`.
        """
        net, config, T = self.model["transformer"], self.config, ids.shape[1]
        cos, sin = rope_tables(T, config.head_dim, config.rope_theta, ids.device)  # (T, D) both
        if attn_mask is not None:
            attn_mask = attn_mask[:, None, None, :]  # (B, 1, 1, T): all queries see the same keys
        is_ragged = keep is not None and keep.dtype == torch.bool  # not as many in each row
        x = net["wte"](ids)  # (B, T, C)
        *first_blocks, last_block = self.blocks
        for block in first_blocks:
            x = block(x, cos, sin, attn_mask)  # (B, T, C)
        x = last_block(x, cos, sin, attn_mask, None if is_ragged else keep)  # (B, k, C)
        x = net["ln_f"](x[keep] if is_ragged else x)  # (B, k, C) or (M, C)
        head = net["ff_out"].weight  # (V, C)
        return F.linear(x, head) if targets is None else token_logps(x, head, targets)

    @classmethod
    def from_pretrained(cls, name, device="cpu", dtype=torch.float32):
        """Load a checkpoint, a folder or hub id: the short way to a plain model."""
        folder = find_checkpoint(name)
        with torch.device("meta"):  # no memory until the weights come
            model = cls(Config.from_folder(folder)).to(dtype)
        load_weights(model, folder)  # compares the shapes, before they take memory
        load_weights(model.to_empty(device=device), folder)
        return model


def checkpoints(out):
    """The checkpoint folders of a run, oldest first. Other folders are nobody's business."""
    folders = [path for path in out.iterdir() if re.fullmatch(r"step_\d{6,}", path.name)]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step_")))


def find_checkpoint(name):
    """The folder of a model: data/tiny, a folder or its newest checkpoint, a hub id's snapshot."""
    folder = TINY if name == "data/tiny" else Path(name)
    if folder.is_dir():
        return [folder, *checkpoints(folder)][-1]
    from huggingface_hub import snapshot_download  # slow to import; comes with tokenizers
    try:
        return Path(snapshot_download(str(name), ignore_patterns=["*.bin", "*.pt*"]))
    except (OSError, ValueError) as error:  # ValueError: not of the form of an id
        reason = str(error).splitlines()[0]
        raise SystemExit(f"error: --model {name}: no such folder or hub id: {reason}") from None


def read_json(path):
    """The JSON object in a file of 16 MB at most."""
    try:
        return dict(json.loads(path.open(encoding="utf-8").read(2 ** 24)))  # a list is no object
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise SystemExit(f"error: {path}: expected a JSON object ({error})") from None


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def copy_into(parameter, tensor):
    """Copy a full tensor into a parameter; where FSDP has spread it, this process's rows."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        tensor = distribute_tensor(tensor, mesh, placements, src_data_rank=None)  # nothing is sent
    parameter.copy_(tensor)  # casts to the parameter's dtype


def open_tensors(path):
    """A safetensors file, of which only the header is read."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise SystemExit(f"error: {path}: {error}: incomplete (git lfs pull)?") from None


def load_tensors(parameters, folder, files="model*.safetensors"):
    """Fill {name: parameter} from one file, or from shards; exits naming the tensor at fault."""
    stored = {}  # {name: the open file that holds it}
    for path in sorted(Path(folder).glob(files)):
        tensors = open_tensors(path)
        if stored.keys() & tensors.keys():  # shards of two models
            raise SystemExit(f"error: {path}: some of its tensors are in another file, too")
        stored |= dict.fromkeys(tensors.keys(), tensors)
    if not stored:
        raise SystemExit(f"error: {folder} has no {files}: convert a pickle to safetensors")
    for name in sorted(stored.keys() | parameters.keys()):
        shape = stored[name].get_slice(name).get_shape() if name in stored else "missing"
        needed = list(parameters[name].shape) if name in parameters else "no such tensor"
        if shape != needed:
            raise SystemExit(f"error: {folder}: {name} is {shape}, the model needs {needed}")
        if parameters[name].is_meta:  # nothing to fill yet, the shapes fit
            continue
        tensor = stored[name].get_tensor(name)
        if tensor.dtype.itemsize < 2 or not tensor.isfinite().all():
            raise SystemExit(f"error: {folder}: {name} holds NaN, Inf or single bytes")
        copy_into(parameters[name], tensor)  # one tensor in memory at a time


def load_weights(model, folder):
    """Load all weights of the model but its adapters, which have a file of their own."""
    load_tensors({name: p for name, p in model.named_parameters() if ".lora_" not in name}, folder)


def gather_weights(model, trained=False):
    """{name: tensor on the CPU} on the main process, {} on others; of all, or what is trained."""
    # one at a time is whole on the GPU
    full = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained)
    return get_model_state_dict(model, options=full)


def save_weights(model, folder):
    """Write config.json and the weights: one file, or shards of 5 GB."""
    from huggingface_hub import save_torch_state_dict  # slow to import
    tensors = gather_weights(model)
    if tensors:
        write_json(Path(folder, "config.json"), model.config.raw)
        save_torch_state_dict(tensors, folder)
