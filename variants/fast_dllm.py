"""Fast-dLLM (arXiv:2505.22618): d1's sampler in fewer rounds, and with less to compute in a round. Both approximate.

threshold (section 3.3): a round commits every token of a higher probability, and at least the likeliest. A row that
has filled its block waits for the others. cache (section 3.2): keys and values outside the block are computed in the
block's first round only, before and behind the block ("dual") or only before it ("prefix").
"""
import math

import torch
import torch.nn.functional as F

from model import at_least_float32, rope_tables
from sample import choose, num_transfer_tokens


@torch.no_grad()
def generate(model, prompt, attn_mask, noise, *, mask_id, eos_id, gen_length, diffusion_steps, block_length,
             temperature, on_step=None, threshold=None, cache=None, choose=choose):
    """sample.generate, with a threshold, a cache ("prefix" or "dual"), or both.

    A threshold needs diffusion_steps equal to gen_length, the most rounds that there can be. A cache needs a model
    that is spread over processes to be within parallel.gathered.
    """
    assert threshold is None or diffusion_steps == gen_length, "a threshold can need a round for every token"
    (B, P), T = prompt.shape, prompt.shape[1] + gen_length
    x = F.pad(prompt, (0, gen_length), value=mask_id)  # (B, T), the canvas
    attn_mask = F.pad(attn_mask, (0, gen_length), value=True)  # (B, T)
    committed_at = torch.full_like(x, -1)  # (B, T)
    schedule = num_transfer_tokens(block_length, diffusion_steps * block_length // gen_length)
    rows = torch.arange(B, device=x.device)  # (R,), those that go on
    for block, start in enumerate(range(P, T, block_length)):
        end, going = start + block_length, rows  # going (U,): rows that have masks in this block
        computed = slice(0, T)  # the part of the canvas that a round computes
        caches = make_caches(model, len(rows), T) if cache else []
        for step, count in enumerate(schedule, block * len(schedule)):
            masked, is_masked = find_masked(x[going], slice(start, end), mask_id)  # (U, M), positions to fill
            logits = predict(model, x[going], attn_mask[going], masked, computed, caches)  # (U, M, V)
            tokens = choose(logits, temperature, noise[going, step, :masked.shape[1]], mask_id)  # (U, M)
            confidence = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]  # (U, M)
            is_chosen = pick(confidence.masked_fill(~is_masked, -torch.inf), count, threshold)  # (U, M)
            places = going[:, None], masked
            x[places] = torch.where(is_chosen, tokens, x[places])
            committed_at[places] = torch.where(is_chosen, step, committed_at[places])
            if on_step:
                on_step(x, committed_at)
            has_masks = (x[going, start:end] == mask_id).any(dim=1)  # (U,)
            going = going[has_masks]
            if not len(going):
                break
            computed = slice(start, end if cache == "dual" else T)
            caches = [(keys[has_masks], values[has_masks]) for keys, values in caches]
        ended = (x[rows, start:end] == eos_id).any(dim=1)  # (R,)
        x[rows[ended], end:] = eos_id
        committed_at[rows[ended], end:] = committed_at[rows[ended]].amax(dim=1, keepdim=True)
        rows = rows[~ended]
        if not len(rows):
            break
    return x, committed_at


def find_masked(x, block, mask_id):
    """Positions (U, M) of a block, the masked ones first; and which are masked. M is the most that a row has."""
    is_masked = x[:, block] == mask_id  # (U, block_length)
    order = is_masked.int().argsort(dim=1, descending=True, stable=True)[:, :int(is_masked.sum(dim=1).max())]
    return block.start + order, is_masked.gather(1, order)


def pick(confidence, count, threshold):
    """Which tokens a round commits: `count` of each row, or those above the threshold and the best of each row.

    confidence (U, M): log-probabilities, -inf where a token is committed already. Returns (U, M) bool.
    """
    best = confidence.argsort(dim=1, descending=True)
    if threshold is None:
        return torch.zeros_like(confidence, dtype=torch.bool).scatter(1, best[:, :count], True)
    return (confidence > math.log(threshold)).scatter(1, best[:, :1], True)


def make_caches(model, rows, length):
    """Room for the keys and values of a whole canvas in every block: pairs of (R, KV, T, D)."""
    weight = model.model["transformer"]["wte"].weight  # has the dtype of the computation
    shape = (rows, model.config.n_kv_heads, length, model.config.head_dim)
    return [(weight.new_empty(shape), weight.new_empty(shape)) for _ in model.blocks]


def predict(model, x, attn_mask, positions, computed, caches):
    """Logits (U, M, V) at some positions (U, M) of the canvas x (U, T).

    With caches only the slice `computed` of the canvas passes through the network: its keys and values go into the
    caches, those of the rest come from there.
    """
    if not caches:
        return at_least_float32(model(x, attn_mask, keep=positions))
    net, config = model.model["transformer"], model.config
    cos, sin = rope_tables(x.shape[1], config.head_dim, config.rope_theta, x.device)  # (T, D)
    cos, sin, attn_mask = cos[computed], sin[computed], attn_mask[:, None, None]
    outputs = [None] * (len(caches) - 1) + [positions - computed.start]  # only the last block leaves positions out
    h = net["wte"](x[:, computed])  # (U, S, C)
    for block, keep, cache in zip(model.blocks, outputs, caches):
        # not block(...): FSDP would take a block that is called alone for the whole model
        h = block.forward(h, cos, sin, attn_mask, keep, cache=(*cache, computed.start))
    head = net["wte" if config.weight_tying else "ff_out"]
    return at_least_float32(F.linear(net["ln_f"](h), head.weight))  # (U, M, V)
