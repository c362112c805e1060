"""The mathematics of d1 (arXiv:2504.12216) as pure functions of tensors.

Two stages: masked SFT (`forward_process`, `sft_loss`) and diffu-GRPO. What makes diffu-GRPO GRPO for diffusion models
is one estimator: a masked diffusion model has no left-to-right factorisation, so log pi(o | q) is read off ONE forward
pass in which the whole completion is [MASK] and each prompt token is [MASK] with probability p (section 3.2).
Everything else is the clipped policy gradient: `group_advantages`, `kl_k3`, `diffu_grpo_loss`. Other estimators and
objectives, which came after d1, stand at the end.

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


def only_counted(mask, *logps):
    """The mask as (N, 1 or K, G, L), and the log-probs with 0 where it is False; None stays None.

    So tokens that do not count stay out of exp, where one overflow would be 0 * inf = NaN for the whole batch.
    """
    counted = mask if mask.dim() == 4 else mask[:, None]
    return counted, *(x if x is None else x.masked_fill(~counted, 0.0) for x in logps)


def diffu_grpo_loss(logps, old_logps, ref_logps, advantages, mask, epsilon, beta, token_count):
    """The clipped objective of diffu-GRPO, to minimise (eq. 4 with the token-level mean of the authors' code).

        - 1 / tokens * sum_i sum_l [ min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i) - beta k3 ],
        rho = exp(logps - old_logps)

    logps, old_logps, ref_logps (N, K, G, L), the last None when beta is 0; advantages (N, G); mask (N, G, L) bool, or
    (N, K, G, L) where each mask scores other tokens; token_count: counted completion tokens of the WHOLE batch, over
    all micro-batches and processes, so that their losses add up to the loss of the batch; under masks that score
    other tokens their mean over K, which is taken here.
    Returns the scalar loss and sums for the log, each a share of the batch as well: `kl`, `clip_fraction` (tokens whose
    gradient is cut, on the side where it is cut), and `max_log_ratio`.
    """
    K = logps.shape[1]
    A = advantages[:, None, :, None]  # (N, 1, G, 1)
    counted, logps, old_logps, ref_logps = only_counted(mask, logps, old_logps, ref_logps)
    weight = counted.to(logps.dtype) / (K * token_count)
    log_ratio = logps - old_logps  # (N, K, G, L)
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    per_token = -torch.minimum(ratio * A, clipped * A)
    stats = {"clip_fraction": ((clipped * A < ratio * A) * weight).sum().detach(),
             "max_log_ratio": log_ratio.abs().max().detach()}
    if beta:
        kl = kl_k3(logps, ref_logps)
        stats["kl"] = (kl * weight).sum().detach()
        per_token = per_token + beta * kl
    return (per_token * weight).sum(), stats


# ---------------------------------------------------------------- estimators that came after
# Each gives log-probs (N, K, G, L) in place of `one_step_logps`, from canvases that show a part of the completion. So a
# row serves one completion: they cost G times as much and more. The prompt is not masked, as in their papers.

def masked_logps(model, prompt, completions, masked, mask_id, attn_mask=None):
    """log p(o_l | q, what is not `masked` of o) at every position: S canvases of each completion, a row for each.

    prompt (N, P); completions (N, G, L); masked (N, S, G, L) bool; attn_mask (N, P). Returns (N, S, G, L). Means
    something where `masked` is True: elsewhere the network sees the token it scores. All estimators are made of this.
    """
    (N, P), (_, S, G, L) = prompt.shape, masked.shape
    noised = completions[:, None].masked_fill(masked, mask_id)  # (N, S, G, L)
    rows = torch.cat([prompt[:, None, None].expand(N, S, G, P), noised], dim=-1).flatten(0, 2)  # (N * S * G, T)
    if attn_mask is not None:
        attn_mask = F.pad(attn_mask, (0, L), value=True).repeat_interleave(S * G, dim=0)  # (N * S * G, T)
    targets = completions[:, None].expand(N, S, G, L).flatten(0, 2)  # (N * S * G, L)
    return model(rows, attn_mask=attn_mask, keep=slice(P, P + L), targets=targets).view(N, S, G, L)


def random_mask_ratio(shape, num_iterations, generator):
    """UniGRPO's share of masked tokens: a random one at the first of mu updates, then evenly spaced over [0, 1).

    Returns (mu, *shape). With it `masked_logps` is UniGRPO's estimator (MMaDA, arXiv:2505.15809, section 4.3): tokens
    that are masked are scored and counted, the others are not.
    """
    start = torch.rand(shape, generator=generator)
    spaced = torch.arange(num_iterations).view(-1, *[1] * len(shape)) / num_iterations
    return (start + spaced) % 1


def coupled_logps(model, prompt, completions, masked, ratio, mask_id, attn_mask=None):
    """Coupled-GRPO (DiffuCoder, arXiv:2506.20639, section 4.2): a mask, its complement, and the full mask.

        log pi(o_l) = [ log p(o_l | q, M...M) + w log p(o_l | q, the canvas of the two that masks l) ] / 2,
        w = 1 / ratio where l is in the mask, 1 / (1 - ratio) where it is in the complement

    So every token is scored, in a context as the sampler meets it; w makes up for how seldom l is in that mask.
    masked (N, K, G, L) bool; ratio (N, K, G), the masking probability, in [0.2, 0.8] as in their code -> (N, K, G, L).
    """
    K = masked.shape[1]
    both = torch.cat([masked, ~masked], dim=1)  # (N, 2 * K, G, L)
    one, other = masked_logps(model, prompt, completions, both, mask_id, attn_mask).split(K, dim=1)
    nothing = torch.zeros_like(prompt, dtype=torch.bool)[:, None]  # (N, 1, P)
    full = one_step_logps(model, prompt, nothing, completions, mask_id, attn_mask)  # (N, 1, G, L)
    ratio = ratio[..., None].to(full.dtype)  # (N, K, G, 1)
    return (full + torch.where(masked, one / ratio, other / (1 - ratio))) / 2


def trajectory_logps(model, prompt, completions, unmasked_at, snapshots, mask_id, attn_mask=None):
    """d2's StepMerge (arXiv:2509.21474): each token scored in the snapshot of the rollout in which it was committed.

    The rollout's steps are cut into `snapshots` equal parts, of which the network sees the canvas at the beginning: one
    part is the one-step estimate, as many parts as steps are the log-probabilities the sampler drew from.
    unmasked_at (N, G, L): the step that committed each token, of which a completion took max + 1. Returns (N, 1, G, L).
    """
    steps = unmasked_at.amax(-1, keepdim=True) + 1  # (N, G, 1)
    S = min(snapshots, int(steps.max()))
    part = unmasked_at * S // steps  # (N, G, L), in [0, S)
    masked = part[:, None] >= torch.arange(S, device=part.device)[:, None, None]  # (N, S, G, L)
    return masked_logps(model, prompt, completions, masked, mask_id, attn_mask).gather(1, part[:, None])


# ---------------------------------------------------------------- objectives that came after
# Each takes the place of `diffu_grpo_loss`, with the same arguments but for the last: completion_count, the number of
# completions of the whole batch. A completion's log-probability is the mean over its counted tokens.

def completion_means(x, counted):
    """(N, K, G): the mean of x (N, K, G, L), which is 0 where nothing counts, over the tokens that do."""
    return x.sum(-1) / counted.sum(-1).clamp(min=1)


def sequence_loss(logps, old_logps, ref_logps, advantages, mask, epsilon, beta, completion_count):
    """GSPO (arXiv:2507.18071, eq. 5): one ratio for a whole completion, clipped as a whole, to minimise.

        - 1 / completions * sum_i [ min(s_i A_i, clip(s_i, 1 - eps, 1 + eps) A_i) - beta mean_l k3 ],
        s_i = exp(mean_l (logps - old_logps))

    Theirs has no KL term and an epsilon of 3e-4: a mean over tokens moves less than a token.
    """
    counted, logps, old_logps, ref_logps = only_counted(mask, logps, old_logps, ref_logps)
    A, weight = advantages[:, None], 1.0 / (logps.shape[1] * completion_count)  # (N, 1, G)
    log_ratio = completion_means(logps - old_logps, counted)  # (N, K, G)
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    loss = -torch.minimum(ratio * A, clipped * A).sum() * weight
    stats = {"clip_fraction": (clipped * A < ratio * A).sum() * weight, "max_log_ratio": log_ratio.abs().max().detach()}
    if beta:
        kl = completion_means(kl_k3(logps, ref_logps), counted).sum() * weight
        stats["kl"], loss = kl.detach(), loss + beta * kl
    return loss, stats


def wd1_loss(logps, old_logps, ref_logps, advantages, mask, epsilon, beta, completion_count):
    """wd1 (arXiv:2507.08838): log-likelihood with positive and negative weights, no ratio and no clip, to minimise.

        - 1 / groups * sum_i [ softmax(A)_i - softmax(-A)_i ] mean_l logps,  softmax over the group

    epsilon is not used, old_logps only for the log. Theirs has no KL term: beta 0.
    """
    counted, logps, old_logps, ref_logps = only_counted(mask, logps, old_logps, ref_logps)
    weight = 1.0 / (logps.shape[1] * completion_count)
    push = advantages.softmax(-1) - (-advantages).softmax(-1)  # (N, G), adds up to 0 in a group
    group_size = advantages.shape[1]
    loss = -(push[:, None] * completion_means(logps, counted)).sum() * group_size * weight
    stats = {"clip_fraction": torch.zeros(()), "max_log_ratio": (logps - old_logps).abs().max().detach()}
    if beta:
        kl = completion_means(kl_k3(logps, ref_logps), counted).sum() * weight
        stats["kl"], loss = kl.detach(), loss + beta * kl
    return loss, stats
