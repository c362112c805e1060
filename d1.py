"""The mathematics of d1 (arXiv:2504.12216) as pure functions of tensors.

Two stages: masked SFT (`forward_process`, `sft_loss`) and diffu-GRPO. What makes diffu-GRPO GRPO for diffusion models
is one estimator: a masked diffusion model has no left-to-right factorisation, so log pi(o | q) is read off ONE forward
pass in which the whole completion is [MASK] and each prompt token is [MASK] with probability p (section 3.2).
Everything else is the clipped policy gradient: `group_advantages`, `kl_k3`, `diffu_grpo_loss`.

Shapes: B rows, N prompts, G completions of each, K prompt masks of each, P prompt and L completion tokens, T = P + L,
V vocabulary. Randomness is an argument everywhere: pass a generator made by `generator(seed, step, index)`.
"""
import functools
import hashlib

import torch
import torch.nn.functional as F

MAX_LOG_RATIO = 80.0  # float32's exp overflows at 88.7; a policy this far from its rollout is broken, see max_log_ratio


def generator(*key, device="cpu"):
    """A private torch.Generator from a key such as (seed, step, prompt index): the same key, the same numbers.

    Nothing here reads or writes the global random state, so a run does not depend on the number of processes and a
    resumed one repeats the original.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw_indices(size, step, count, seed):
    """The `count` indices of a step from an endless stream in which each of `size` items comes once per epoch.

    The order of an epoch is drawn from (seed, epoch), so no state is kept between steps.
    """
    positions = (divmod(position, size) for position in range(step * count, (step + 1) * count))
    return [epoch_order(size, seed, epoch)[offset] for epoch, offset in positions]


@functools.lru_cache(maxsize=4)  # one draw serves the many steps of an epoch
def epoch_order(size, seed, epoch):
    return torch.randperm(size, generator=generator(seed, "order", epoch)).tolist()


# ---------------------------------------------------------------- masked SFT

def forward_process(ids, p_mask, maskable, mask_id, generator):
    """Replace each maskable token by [MASK] with probability p_mask, independently (LLaDA, section 2.2).

    ids (B, T) int64; p_mask (B,); maskable (B, T) bool, False on the prompt. Returns noised (B, T), masked (B, T) bool.
    """
    draws = torch.rand(ids.shape, generator=generator, device=ids.device)
    masked = (draws < p_mask[:, None]) & maskable
    return ids.masked_fill(masked, mask_id), masked


def sft_loss(logits, ids, masked, t, answer, per_sequence=False):
    """Masked cross-entropy weighted by 1 / t, which bounds the negative log-likelihood (d1 eq. 1, LLaDA eq. 5).

    logits (M, V): of the masked positions only, in row-major order, as `model(..., keep=masked)` gives them; ids (B, T)
    the clean tokens; masked, answer (B, T) bool; t (B,) the masking probability of each row.
    per_sequence=False: sum of CE / t over the batch / number of answer tokens in the batch (the d1 authors' collator;
    with `answer` all True the pre-training loss). True: mean over rows of the row's sum / the row's answer length
    (LLaDA's GUIDELINES). EOS padding counts as answer in both: that is how the model learns to stop.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return sft_loss_of(-F.cross_entropy(logits, ids[masked], reduction="none"), masked, t, answer, per_sequence)


def sft_loss_of(logps, masked, t, answer, per_sequence=False):
    """`sft_loss` from the log-probabilities (M,) of the masked tokens: `model(..., keep=masked, targets=ids[masked])`.

    Where the vocabulary is large this is the form to train with: the logits never exist all at once.
    """
    weight = 1.0 / t[:, None].expand_as(masked)  # (B, T)
    if per_sequence:
        length = answer.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
        weight = weight / length / len(masked)
    else:
        weight = weight / answer.sum().clamp(min=1)
    return -(logps * weight[masked].to(logps.dtype)).sum()


# ---------------------------------------------------------------- diffu-GRPO

def one_step_logps(model, prompt, prompt_masked, completions, mask_id, attn_mask=None):
    """log pi(o_l | q') of every completion token from one forward pass with the whole completion masked (section 3.2).

    prompt (N, P); prompt_masked (N, K, P) bool, the q' of each mask; completions (N, G, L); attn_mask (N, P) bool,
    False at padding. Returns (N, K, G, L), at least float32, at temperature 1.

    The network sees the masked prompt and L times [MASK]: its input does not depend on the completion. So N * K rows
    score all N * K * G completions exactly, G times cheaper than a row for each. The authors' layout, a mask of its own
    for every completion, is N * G prompts with G = 1.
    """
    (N, K, P), (_, G, L) = prompt_masked.shape, completions.shape
    noised = prompt[:, None].masked_fill(prompt_masked, mask_id).view(N * K, P)  # (N * K, P)
    rows = torch.cat([noised, noised.new_full((N * K, L), mask_id)], dim=1)  # (N * K, T)
    if attn_mask is not None:
        attn_mask = F.pad(attn_mask, (0, L), value=True).repeat_interleave(K, dim=0)  # (N * K, T)
    targets = completions.transpose(1, 2).repeat_interleave(K, dim=0)  # (N * K, L, G)
    logps = model(rows, attn_mask=attn_mask, keep=slice(P, P + L), targets=targets)
    return logps.view(N, K, L, G).transpose(2, 3)  # (N, K, G, L)


def completion_mask(completions, eos_id):
    """True for the tokens that count: up to and including the first EOS. EOT does not end a completion.

    completions (..., L) int64 -> (..., L) bool.
    """
    ended = (completions == eos_id).cumsum(-1)
    return (ended == 0) | ((ended == 1) & (completions == eos_id))


def group_advantages(rewards):
    """reward minus the mean of its group, not divided by the standard deviation (section 3.1). (N, G) -> (N, G)."""
    return rewards - rewards.mean(-1, keepdim=True)


def kl_k3(logps, ref_logps):
    """Schulman's k3 estimator of KL(policy || reference) per token: exp(d) - d - 1 with d = ref - policy; >= 0."""
    d = ref_logps - logps
    return d.exp() - d - 1


def diffu_grpo_loss(logps, old_logps, ref_logps, advantages, mask, epsilon, beta, token_count):
    """The clipped objective of diffu-GRPO, to minimise (eq. 4 with the token-level mean of the authors' code).

        - 1 / tokens * sum_i sum_l [ min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i) - beta k3 ],
        rho = exp(logps - old_logps)

    logps, old_logps, ref_logps (N, K, G, L), the last None when beta is 0; advantages (N, G); mask (N, G, L) bool;
    token_count: counted completion tokens of the WHOLE batch, over all micro-batches and processes, so that their
    losses add up to the loss of the batch. The mean over K is taken here.
    Returns the scalar loss and sums for the log, each a share of the batch as well: `kl`, `clip_fraction` (tokens whose
    gradient is cut, on the side where it is cut), and `max_log_ratio`.
    """
    K = logps.shape[1]
    A = advantages[:, None, :, None]  # (N, 1, G, 1)
    counted = mask[:, None]  # (N, 1, G, L)
    weight = counted.to(logps.dtype) / (K * token_count)
    # tokens that do not count stay out of exp, where one overflow would be 0 * inf = NaN for the whole batch
    logps, old_logps = logps.masked_fill(~counted, 0.0), old_logps.masked_fill(~counted, 0.0)
    log_ratio = logps - old_logps  # (N, K, G, L)
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    per_token = -torch.minimum(ratio * A, clipped * A)
    stats = {"clip_fraction": ((clipped * A < ratio * A) * weight).sum().detach(),
             "max_log_ratio": log_ratio.abs().max().detach()}
    if beta:
        kl = kl_k3(logps, ref_logps.masked_fill(~counted, 0.0))
        stats["kl"] = (kl * weight).sum().detach()
        per_token = per_token + beta * kl
    return (per_token * weight).sum(), stats
