"""The mathematics of d1 (arXiv:2504.12216) as pure functions of tensors.

First masked SFT, then diffu-GRPO. Shapes: N prompts of P tokens, each with G completions of L
tokens, T = P + L; B rows of T tokens in SFT; V entries of the vocabulary.
"""
import hashlib

import torch
import torch.nn.functional as F


def generator(*key):
    """A torch.Generator seeded by a key such as (seed, "rollout", step, prompt)."""
    digest = hashlib.sha256(repr(key).encode()).digest()  # neighbouring keys, unrelated seeds
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw_indices(size, step, count, seed):
    """The `count` dataset indices of a step. Each epoch has its own order, so no state is kept."""
    epoch, start = divmod(step * count, size)
    epochs = range(epoch, epoch + 1 + (start + count - 1) // size)  # more than one at its end
    orders = [torch.randperm(size, generator=generator(seed, "order", epoch)) for epoch in epochs]
    return torch.cat(orders)[start:start + count].tolist()


def forward_process(ids, t, maskable, mask_id, generator):
    """Replace each maskable token by [MASK] with probability t (LLaDA, section 2.2).

    ids (B, T) int64; t (B,); maskable (B, T) bool. Returns the noised ids and what was masked.
    """
    masked = (torch.rand(ids.shape, generator=generator) < t[:, None]) & maskable
    return ids.masked_fill(masked, mask_id), masked  # (B, T) both


def sft_weights(t, answer):
    """The weight of each token's cross-entropy: 1 / t, per answer token of the batch (d1, eq. 1).

    t (B,); answer (B, T) bool. Returns (B, T). EOS padding counts: the model learns to stop.
    """
    return (1 / t / answer.sum().clamp(min=1))[:, None].expand(answer.shape)


def sft_loss(logps, masked, weights):
    """Weighted cross-entropy of the masked tokens. The losses of the rows of a batch add up.

    logps (M,): of the true tokens where `masked` is True, row by row; masked, weights (B, T).
    """
    return -(logps * weights[masked]).sum()  # (M,) summed


def one_step_logps(model, prompt, prompt_masked, completions, mask_id, attn_mask=None):
    """log pi(o_l | q') of all tokens from one pass over a fully masked completion (section 3.2).

    prompt, prompt_masked (what q' hides), attn_mask (False at padding): (N, P); completions, and
    what is returned: (N, G, L). The network sees no completion, so one row scores all G of them.
    """
    (N, P), L = prompt.shape, completions.shape[-1]
    noised = prompt.masked_fill(prompt_masked, mask_id)  # (N, P)
    rows = torch.cat([noised, noised.new_full((N, L), mask_id)], dim=1)  # (N, T)
    if attn_mask is not None:
        attn_mask = F.pad(attn_mask, (0, L), value=True)  # (N, T)
    keep = torch.arange(P, P + L, device=rows.device).expand(N, L)  # the completion's positions
    targets = completions.transpose(1, 2)  # (N, L, G): G tokens to score at each position
    return model(rows, attn_mask, keep, targets).transpose(1, 2)


def completion_mask(completions, eos_id):
    """True for the tokens that count, up to and including the first EOS. (..., L) -> bool."""
    eos_so_far = (completions == eos_id).cumsum(-1)  # (..., L), at and before a token
    return (eos_so_far == 0) | ((eos_so_far == 1) & (completions == eos_id))


def group_advantages(rewards):
    """The reward minus the mean of its group (section 3.1). (N, G) -> (N, G)."""
    return rewards - rewards.mean(-1, keepdim=True)


def kl_k3(logps, ref_logps):
    """Schulman's k3 estimate of KL(policy || reference) per token, 0 where they agree."""
    difference = ref_logps - logps  # (N, G, L)
    return difference.exp() - difference - 1


def diffu_grpo_loss(logps, old_logps, ref_logps, advantages, mask, epsilon, beta, token_count):
    """The clipped objective of diffu-GRPO, to minimise (eq. 4, but a mean over all tokens).

        - 1 / tokens * sum_i sum_l [ min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i) - beta KL ]

    rho = pi / pi_old. logps, old_logps, ref_logps (N, G, L); advantages (N, G); mask (N, G, L)
    bool; token_count: True values in the masks of the whole batch, so that the losses of its parts
    add up. Returns the loss, and a dict of statistics that add up in the same way.
    """
    def mean(values):  # this part's share of the mean over the batch
        return (values * mask).sum() / token_count

    # what does not count is 0 before exp: an overflow there would be inf * 0 = NaN
    log_ratio = (logps - old_logps).masked_fill(~mask, 0)  # (N, G, L)
    ratio = log_ratio.clamp(max=80).exp()  # float32's exp overflows at 88
    gain = ratio * advantages[..., None]  # (N, G, L)
    clipped_gain = ratio.clamp(1 - epsilon, 1 + epsilon) * advantages[..., None]  # (N, G, L)
    per_token = -torch.minimum(gain, clipped_gain)  # (N, G, L)
    stats = {"clip_fraction": mean((clipped_gain < gain).float())}  # tokens that lose the gradient
    if beta:
        kl = kl_k3(logps.masked_fill(~mask, 0), ref_logps.masked_fill(~mask, 0))  # (N, G, L)
        per_token = per_token + beta * kl  # (N, G, L)
        stats["kl"] = mean(kl.detach())
    return mean(per_token), stats
