"""LLaDA in plain PyTorch: the transformer, and its weights in and out in the published layout.

A LLaMA-style network with two differences: attention is bidirectional, and logits[i] predict token i,
not i + 1. Parameters have the names of the published checkpoints, so that none is ever renamed.
"""
import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from weights import (  # noqa: F401: the last three are only handed on
    check_fields, copy_into, find_checkpoint, load_weights, read_json, TINY, full_tensor, save_weights)

HEAD_CHUNK = 2 ** 26  # logits that exist at a time while tokens are scored: 0.25 GB in float32
SUPPORTED = {  # fields that would change the network, and the values of every published LLaDA
    "model_type": ["llada"], "block_type": ["llama"], "layer_norm_type": ["rms"], "activation_type": ["silu"],
    "rope": [True], "rope_full_precision": [True], "layer_norm_with_affine": [True], "alibi": [False],
    "bias_for_layer_norm": [False], "attention_layer_norm": [False], "include_bias": [False],
    "include_qkv_bias": [False], "scale_logits": [False], "input_emb_norm": [False], "clip_qkv": [None, False],
    "block_group_size": [1], "multi_query_attention": [None, False], "attention_dropout": [0.0],
    "residual_dropout": [0.0], "embedding_dropout": [0.0],
}


@dataclass(frozen=True)
class Config:
    """The fields of config.json that shape the network; `raw` holds the whole file, for a copy."""
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
    def from_folder(cls, folder):
        """Read config.json. Exits naming a field that is missing, malformed or not supported."""
        path = Path(folder) / "config.json"
        raw = read_json(path)
        full = {"model_type": None, "weight_tying": False, "init_std": 0.02, **raw, "raw": raw}
        full["n_kv_heads"] = raw.get("n_kv_heads") or raw.get("n_heads")
        full["embedding_size"] = raw.get("embedding_size") or raw.get("vocab_size")
        mlp_from_ratio = (raw.get("mlp_ratio") or 0) * (raw.get("d_model") or 0)
        full["mlp_hidden_size"] = raw.get("mlp_hidden_size") or mlp_from_ratio
        check_fields(path, full, SUPPORTED)
        for field in fields(cls)[:-1]:
            value, kind = full.get(field.name), field.type
            least = 0 if kind is bool or field.name.endswith("_id") else 1e-12
            type_fits = type(value) is kind or (kind is float and type(value) is int)
            if not type_fits or not value >= least:  # NaN is not >= anything
                raise SystemExit(f"error: {path}: {field.name} = {value!r} is no valid {kind.__name__}")
        config = cls(**{field.name: full[field.name] for field in fields(cls)})
        if config.d_model % (2 * config.n_heads) or config.n_heads % config.n_kv_heads:
            raise SystemExit(f"error: {path}: n_kv_heads must divide n_heads, 2 * n_heads d_model")
        for key in ("mask_token_id", "eos_token_id"):
            if full[key] >= config.embedding_size:
                raise SystemExit(f"error: {path}: {key} {full[key]} lies outside the embedding")
        return config


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))  # float64 is not rounded


def token_logps(x, head, targets):
    """log p of given tokens, from the features before the head, in float32 or wider.

    x (..., C); head (V, C); targets (...,) int64, or (..., G) for G tokens at each position. Returns the
    shape of targets. Of several chunks of HEAD_CHUNK logits only one exists at a time, in the backward
    pass too, which computes each again.
    """
    def score(x, targets):
        return at_least_float32(F.linear(x, head)).log_softmax(-1).gather(-1, targets)

    tokens = targets if targets.dim() == x.dim() else targets[..., None]  # (..., G)
    size = max(1, HEAD_CHUNK // len(head))
    chunks = list(zip(x.flatten(0, -2).split(size), tokens.flatten(0, -2).split(size)))
    if len(chunks) == 1:  # the backward pass needs all logits at once in any case
        logps = [score(*chunks[0])]
    else:
        logps = [checkpoint(score, *chunk, use_reentrant=False, preserve_rng_state=False)
                 for chunk in chunks]
    return torch.cat(logps).view(targets.shape).clone()  # FSDP wants an output that is no view


class RMSNorm(nn.Module):
    """LLaDA rounds before the weight; torch.nn.RMSNorm after it: a quarter of bfloat16 outputs differ."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        normed = F.rms_norm(at_least_float32(x), x.shape[-1:], eps=self.eps)
        return self.weight * normed.to(x.dtype)


def rope_tables(length, head_dim, theta, device):
    """cos and sin of position * theta ** (-2i / head_dim), two float32 (length, head_dim)."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.outer(torch.arange(length, device=device).float(), inverse).repeat(1, 2)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Rotate x (B, H, T, D) by its positions, in float32 or wider; the halves of D form the pairs."""
    wide = at_least_float32(x)
    left, right = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


def select_positions(x, keep):
    """x (B, T, C) at a slice of positions or at int64 (B, k) -> (B, k, C)."""
    if isinstance(keep, slice):
        return x[:, keep]
    return x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))


class Block(nn.Module):
    """Pre-norm attention and SwiGLU; ff_proj is the gate, up_proj the way up, ff_out the way down."""

    def __init__(self, config):
        super().__init__()
        d_model, mlp_size = config.d_model, config.mlp_hidden_size
        self.head_dim = config.head_dim
        self.grouped = config.n_kv_heads != config.n_heads
        self.attn_norm = RMSNorm(d_model, config.rms_norm_eps)
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, config.n_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, config.n_kv_heads * config.head_dim, bias=False)
        self.attn_out = nn.Linear(d_model, d_model, bias=False)
        self.ff_norm = RMSNorm(d_model, config.rms_norm_eps)
        self.ff_proj = nn.Linear(d_model, mlp_size, bias=False)
        self.up_proj = nn.Linear(d_model, mlp_size, bias=False)
        self.ff_out = nn.Linear(mlp_size, d_model, bias=False)

    def forward(self, x, cos, sin, attn_mask=None, keep=None, cache=None):
        """x (B, T, C) -> (B, k, C): all positions give keys and values, those in `keep` an output."""
        h = kept = self.attn_norm(x)
        q_cos, q_sin = cos, sin
        if keep is not None:
            x, kept = select_positions(x, keep), select_positions(h, keep)  # (B, k, C)
            q_cos, q_sin = cos[keep].unsqueeze(-3), sin[keep].unsqueeze(-3)
        q, k, v = self.q_proj(kept), self.k_proj(h), self.v_proj(h)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))
        q, k = apply_rope(q, q_cos, q_sin), apply_rope(k, cos, sin)  # (B, H, k, D), (B, KV, T, D)
        if cache is not None:  # Fast-dLLM: keys and values of the whole canvas, of which x is a part
            (keys, values, start), end = cache, cache[2] + k.shape[2]
            keys[:, :, start:end] = k
            values[:, :, start:end] = v
            k, v = keys, values
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask, enable_gqa=self.grouped)
        x = x + self.attn_out(attended.transpose(1, 2).flatten(2))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))  # (B, k, C)


class LLaDA(nn.Module):
    """The network: `model(ids)` gives logits, once `init_weights` or `load_weights` has set its weights."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        modules = {"wte": nn.Embedding(config.embedding_size, config.d_model),
                   "blocks": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
                   "ln_f": RMSNorm(config.d_model, config.rms_norm_eps)}
        if not config.weight_tying:
            modules["ff_out"] = nn.Linear(config.d_model, config.embedding_size, bias=False)  # the head
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(modules)})

    @property
    def blocks(self):
        return self.model["transformer"]["blocks"]

    def forward(self, ids, attn_mask=None, keep=None, targets=None):
        """Logits (B, T, V), or only those at the positions `keep`, which are chosen before the head.

        ids (B, T) int64; attn_mask (B, T) bool, False at padding; keep: a slice or int64 (B, k) -> (B, k, V),
        or bool (B, T) -> (number of True, V); targets: tokens at these positions, one or G at each: returns
        their log-probabilities instead, see `token_logps`.
        """
        net, length = self.model["transformer"], ids.shape[1]
        if length > self.config.max_sequence_length:
            raise ValueError(f"{length} tokens exceed max_sequence_length {self.config.max_sequence_length}")
        x = net["wte"](ids)  # (B, T, C)
        cos, sin = rope_tables(length, self.config.head_dim, self.config.rope_theta, ids.device)
        if attn_mask is not None:
            attn_mask = attn_mask[:, None, None, :]  # (B, 1, 1, T): every query sees the same keys
        *first_blocks, last_block = self.blocks
        for block in first_blocks:
            x = block(x, cos, sin, attn_mask)
        if isinstance(keep, torch.Tensor) and keep.dtype == torch.bool:  # not as many in each row
            x = last_block(x, cos, sin, attn_mask)[keep]  # (number of True, C)
        else:
            x = last_block(x, cos, sin, attn_mask, keep)  # (B, k, C)
        x, head = net["ln_f"](x), net["wte" if self.config.weight_tying else "ff_out"].weight
        return F.linear(x, head) if targets is None else token_logps(x, head, targets)

    def init_weights(self, generator):
        """Draw weights from normal(0, init_std), those into the residual smaller by sqrt(2 layers)."""
        for name, parameter in self.named_parameters():
            weights = torch.ones(parameter.shape)
            if parameter.dim() > 1:
                into_residual = re.search(r"\.blocks\..*(attn_out|ff_out)\.weight", name)
                divisor = (2 * self.config.n_layers) ** 0.5 if into_residual else 1.0
                weights.normal_(0.0, self.config.init_std / divisor, generator=generator)
            copy_into(parameter, weights)
        return self

    @classmethod
    def from_pretrained(cls, name, device="cpu", dtype=torch.float32):
        """Load a checkpoint: a folder or hub id."""
        folder = find_checkpoint(name)
        with torch.device("meta"):
            model = cls(Config.from_folder(folder)).to(dtype)
        load_weights(model.to_empty(device=device), folder)
        return model
