"""d1's sampler in fewer rounds, and with less to compute in a round: Fast-dLLM (arXiv:2505.22618). Both approximate.

threshold (section 3.3): a round commits every token of a higher probability, and at least the likeliest. A row that
has filled its block waits for the others. cache (section 3.2): keys and values outside the block are computed in the
block's first round only, before and behind the block ("dual") or only before it ("prefix").

entropy_bound (EB-Sampler, arXiv:2505.24857) takes the place of the threshold: a round commits as many positions, the
surest first, as keep the sum of their entropies but for the largest, in nats, within the bound. random_first (Single-
Step Initialization, openreview tiFsyANbEP): a row's first round commits one position of the first block, at random.
"""
import math

import torch
import torch.nn.functional as F

from model import apply_rope, at_least_float32, rope_tables
from sample import choose, num_transfer_tokens


@torch.no_grad()
def generate(model, prompt, attn_mask, noise, *, mask_id, eos_id, gen_length, diffusion_steps, block_length,
             temperature, on_step=None, threshold=None, entropy_bound=None, random_first=False, cache=None,
             choose=choose):
    """sample.generate, with a threshold or an entropy bound, a random beginning, a cache ("prefix" or "dual").

    A cache needs a model that is spread over processes to be within parallel.gathered.
    """
    assert diffusion_steps == gen_length or not random_first and threshold is entropy_bound is None, "too few rounds"
    (B, P), T = prompt.shape, prompt.shape[1] + gen_length
    x, attn_mask, committed_at = blank_canvas(prompt, attn_mask, gen_length, mask_id)  # (B, T) each
    schedule = num_transfer_tokens(block_length, diffusion_steps * block_length // gen_length)
    rows = torch.arange(B, device=x.device)  # (R,), those that go on
    rounds = torch.zeros_like(rows)  # (B,), that a row has taken: its own number of a round, without gaps
    for block, start in enumerate(range(P, T, block_length)):
        end, going = start + block_length, rows  # going (U,): rows that have masks in this block
        computed = slice(0, T)  # the part of the canvas that a round computes
        caches = make_caches(model, len(rows), T) if cache else []
        for step, count in enumerate(schedule, block * len(schedule)):
            masked, is_masked = find_masked(x[going], slice(start, end), mask_id)  # (U, M), positions to fill
            logits = predict(model, x[going], attn_mask[going], masked, computed, caches)  # (U, M, V)
            uniform = noise[going, step, :masked.shape[1]]  # (U, M)
            tokens = choose(logits, temperature, uniform, mask_id)  # (U, M)
            is_chosen = select(logits, tokens, is_masked, count, threshold, entropy_bound)  # (U, M)
            if random_first and step == 0:
                is_chosen = pick(uniform * 2 ** 26 % 1, 1)  # by the low bits: `choose` goes by the high ones
            places = going[:, None], masked
            x[places] = torch.where(is_chosen, tokens, x[places])
            committed_at[places] = torch.where(is_chosen, rounds[going, None], committed_at[places])
            rounds[going] += 1
            if on_step:
                on_step(x, committed_at)
            left = (x[going, start:end] == mask_id).any(dim=1).nonzero()[:, 0]  # places in `going` of rows with masks
            if len(left) < len(going):  # else the caches are as they should be, and not copied
                going, caches = going[left], [(keys[left], values[left]) for keys, values in caches]
            if not len(going):
                break
            computed = slice(start, end if cache == "dual" else T)
        ended = (x[rows, start:end] == eos_id).any(dim=1)  # (R,)
        done, rows = rows[ended], rows[~ended]
        x[done, end:] = eos_id
        committed_at[done, end:] = rounds[done, None] - 1
        if not len(rows):
            break
    return x, committed_at


def blank_canvas(prompt, attn_mask, gen_length, mask_id):
    """Canvases (B, T) with gen_length masks behind each prompt, their attn_mask, and their committed_at, all -1."""
    x = F.pad(prompt, (0, gen_length), value=mask_id)
    return x, F.pad(attn_mask, (0, gen_length), value=True), torch.full_like(x, -1)


def find_masked(x, block, mask_id):
    """Positions (U, M) of a block, the masked ones first; and which are masked. M is the most that a row has."""
    is_masked = x[:, block] == mask_id  # (U, block_length)
    order = is_masked.int().argsort(dim=1, descending=True, stable=True)[:, :int(is_masked.sum(dim=1).max())]
    return block.start + order, is_masked.gather(1, order)


def select(logits, tokens, is_masked, count, threshold, entropy_bound):
    """Which of the drawn tokens (U, M) a round commits, by the rule that is not None, or else `count`. (U, M) bool."""
    if entropy_bound is not None:
        return pick_by_entropy(logits, is_masked, entropy_bound)
    confidence = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]  # (U, M)
    return pick(confidence.masked_fill(~is_masked, -torch.inf), count, threshold)


def pick(confidence, count, threshold=None):
    """Which tokens a round commits: `count` of each row, or those above the threshold and the best of each row.

    confidence (U, M): log-probabilities, -inf where a token is committed already. Returns (U, M) bool.
    """
    best = confidence.argsort(dim=1, descending=True)
    if threshold is None:
        return torch.zeros_like(confidence, dtype=torch.bool).scatter(1, best[:, :count], True)
    return (confidence > math.log(threshold)).scatter(1, best[:, :1], True)


def pick_by_entropy(logits, is_masked, bound):
    """Which of the masked positions to commit, from their logits (U, M, V) at temperature 1. Returns (U, M) bool."""
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)  # (U, M), of -p log p
    entropy, order = entropy.masked_fill(~is_masked, torch.inf).sort(dim=1)
    is_within = entropy.cumsum(1) - entropy <= bound  # False behind the masked ones: inf - inf is NaN
    return torch.zeros_like(is_masked).scatter(1, order, is_within)


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
        h = run_block(block, h, cos, sin, attn_mask, keep, (*cache, computed.start))
    return at_least_float32(F.linear(net["ln_f"](h), net["ff_out"].weight))  # (U, M, V)


def run_block(block, x, cos, sin, attn_mask, keep, cache):
    """model.Block.forward for a part of the canvas, which attends to keys and values of the whole of it.

    x (U, S, C); cache: those keys and values, (U, KV, T, D), into which the part's go, and where the part starts.
    """
    keys, values, start = cache
    part = slice(start, start + x.shape[1])
    h = q_input = block.attn_norm(x)
    q_cos, q_sin = cos, sin  # (S, D)
    if keep is not None:
        index = keep[..., None].expand(-1, -1, x.shape[-1])
        x, q_input = x.gather(1, index), h.gather(1, index)  # (U, M, C)
        q_cos, q_sin = cos[keep][:, None], sin[keep][:, None]  # (U, 1, M, D)
    q, k, v = block.q_proj(q_input), block.k_proj(h), block.v_proj(h)
    q, k, v = (y.unflatten(-1, (-1, block.head_dim)).transpose(1, 2) for y in (q, k, v))  # (U, H, S, D)
    keys[:, :, part], values[:, :, part] = apply_rope(k, cos, sin), v
    a = F.scaled_dot_product_attention(apply_rope(q, q_cos, q_sin), keys, values, attn_mask, enable_gqa=block.grouped)
    x = x + block.attn_out(a.transpose(1, 2).flatten(2))
    h = block.ff_norm(x)
    return x + block.ff_out(F.silu(block.ff_proj(h)) * block.up_proj(h))  # (U, M, C)
