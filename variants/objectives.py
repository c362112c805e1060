"""Objectives that stand in the place of train_grpo.diffu_grpo, with the same arguments.

Each but spg is a mean over completions, where diffu_grpo is a mean over tokens. Shapes: n prompts, G completions of L
tokens.
"""
import functools
import math

import torch

from d1 import kl_k3
from train_grpo import diffu_grpo


def token_sum(values, mask):
    """The sum of values (n, G, L) over the tokens that count. (n, G)."""
    return values.masked_fill(~mask, 0).sum(-1)


def token_mean(values, mask):
    """The mean of values (n, G, L) over the tokens that count, 0 where none does. (n, G)."""
    return token_sum(values, mask) / mask.sum(-1).clamp(min=1)


def clipped_loss(log_ratio, advantages, epsilon):
    """-min(rho A, clip(rho, 1 - eps, 1 + eps) A), and 1 where the clip takes the gradient away; of any shape."""
    ratio = log_ratio.clamp(max=80).exp()  # float32's exp overflows at 88
    gain = ratio * advantages
    clipped_gain = ratio.clamp(1 - epsilon, 1 + epsilon) * advantages
    return -torch.minimum(gain, clipped_gain), (clipped_gain < gain).float()


def k3_mean(logps, ref_logps, mask):
    """d1's KL term, a mean over the tokens of each completion. (n, G)."""
    # what does not count is 0 before exp: an overflow there would be inf * 0 = NaN
    return token_mean(kl_k3(logps.masked_fill(~mask, 0), ref_logps.masked_fill(~mask, 0)), mask)


def k2_of_sums(logps, ref_logps, mask):
    """ESPO's KL term: half the square of the difference of the sums, divided by L. (n, G)."""
    return (logps - ref_logps).sum(-1) ** 2 / (2 * logps.shape[-1])


def batch_mean(losses, stats, logps, ref_logps, rollout, args, kl_of=k3_mean):
    """The mean of losses (n, G) and of stats over the completions of the whole batch, the KL term added.

    Micro-batches and processes give shares, which add up.
    """
    if args.beta:
        kl = kl_of(logps, ref_logps, rollout.mask)  # (n, G)
        losses = losses + args.beta * kl
        stats = {**stats, "kl": kl.detach()}
    K = len(losses) // len(rollout.prompt)  # masks of each prompt
    completions = args.prompts_per_step * args.group_size * K
    return losses.sum() / completions, {name: values.sum() / completions for name, values in stats.items()}


def sequence(logps, old_logps, ref_logps, rollout, masked, args):
    """GSPO (arXiv:2507.18071, eq. 5): one ratio for a whole completion, clipped as a whole.

        - 1 / completions * sum_i [ min(s_i A_i, clip(s_i, 1 - eps, 1 + eps) A_i) - beta mean_l KL ],
        s_i = exp(mean_l (logps - old_logps))

    GSPO has no KL term and an epsilon of 3e-4 (4e-4 above): the mean over tokens moves less than a token.
    """
    log_ratio = token_mean(logps - old_logps, rollout.mask)  # (n, G)
    losses, is_cut = clipped_loss(log_ratio, rollout.advantages, args.epsilon)
    return batch_mean(losses, {"clip_fraction": is_cut}, logps, ref_logps, rollout, args)


def espo(logps, old_logps, ref_logps, rollout, masked, args):
    """ESPO (arXiv:2512.03759; espo_trainer.py, compute_loss): `sequence` over all L tokens, with a KL of their sums.

        - 1 / completions * sum_i [ min(s_i A_i, clip(s_i, 1 - eps, 1 + eps) A_i) - beta d_ref^2 / (2 L) ],
        s_i = exp(d_old / L),  d_old = sum_l (logps - old_logps),  d_ref = sum_l (logps - ref_logps)

    Tokens behind the first EOS count too. Its advantages are G / (G - 1) times d1's.
    """
    log_ratio = (logps - old_logps).mean(-1)  # (n, G)
    losses, is_cut = clipped_loss(log_ratio, rollout.advantages, args.epsilon)
    return batch_mean(losses, {"clip_fraction": is_cut}, logps, ref_logps, rollout, args, kl_of=k2_of_sums)


def sequence_mean(logps, old_logps, ref_logps, rollout, masked, args):
    """d1's eq. 4 as it stands in the paper: the mean over completions of the mean over the tokens of each."""
    log_ratio = (logps - old_logps).masked_fill(~rollout.mask, 0)  # (n, G, L)
    losses, is_cut = clipped_loss(log_ratio, rollout.advantages[..., None], args.epsilon)
    stats = {"clip_fraction": token_mean(is_cut, rollout.mask)}
    return batch_mean(token_mean(losses, rollout.mask), stats, logps, ref_logps, rollout, args)


def wd1(logps, old_logps, ref_logps, rollout, masked, args, total=token_sum):
    """wd1 (arXiv:2507.08838): the log-likelihood under weights of both signs, without ratio and clip.

        - 1 / groups * sum_i [ softmax(A)_i - softmax(-A)_i ] sum_l logps,  softmax over the group

    As in its code (compute_loss of rev_grpo_trainer.py), which has no KL term. wd1_mean has the mean over the tokens
    of a completion in the place of the sum.
    """
    weights = rollout.advantages.softmax(-1) - (-rollout.advantages).softmax(-1)  # (n, G), 0 in the sum of a group
    losses = -weights * args.group_size * total(logps, rollout.mask)
    return batch_mean(losses, {}, logps, ref_logps, rollout, args)


def sandwich(logps, rollout, masked, args):
    """SPG's bounds (arXiv:2510.09541; spg_trainer.py, _get_per_seq_logps) on log pi of a token, (n, G) each.

        lower = mean_k mean_l log p_kl,  over the hidden tokens of canvas k that count: a share T_k of those that count
        upper = 1 / power * mean_l log mean_k [ p_kl^power / T_k, 0 where k does not hide l ],  over tokens hidden once

    The second is lower where A > 0, else upper_weight * upper + (1 - upper_weight) * lower.
    """
    K, L = masked.shape[1], logps.shape[-1]
    logps, counted = logps.unflatten(0, (-1, K)), rollout.mask.unflatten(0, (-1, K))  # (n, K, G, L)
    hidden = masked[..., -L:] & counted
    share = hidden.sum(-1, keepdim=True) / counted.sum(-1, keepdim=True)  # (n, K, G, 1)
    lower = token_mean(logps, hidden).mean(1)
    is_hidden = hidden.any(1)  # (n, G, L), in some canvas
    powers = (args.upper_power * logps - share.log()).masked_fill(~hidden, -torch.inf)
    powers = powers.masked_fill(~is_hidden[:, None], 0)  # else NaN in the backward pass
    upper = token_mean(powers.logsumexp(1) - math.log(K), is_hidden) / args.upper_power
    mixed = args.upper_weight * upper + (1 - args.upper_weight) * lower
    return lower, torch.where(rollout.advantages[::K] > 0, lower, mixed)


def spg(logps, old_logps, ref_logps, rollout, masked, args):
    """SPG (arXiv:2510.09541): the policy gradient of its bounds, without ratio, clip and KL.

        - 1 / tokens * sum_i A_i |o_i| bound_i,  |o_i| tokens that count
    """
    K = masked.shape[1]
    _, bound = sandwich(logps, rollout, masked, args)  # (n, G)
    gain = rollout.advantages[::K] * rollout.mask[::K].sum(-1) * bound
    return -gain.sum() / (rollout.token_count / K), {}


def stabledrl(logps, old_logps, ref_logps, rollout, masked, args):
    """StableDRL (arXiv:2603.06743; llada_svpo.py, compute_loss_spg): SPG's bounds, self-normalised weights.

        - 1 / groups * sum_i w_i A_i bound_i,  w = softmax over the group of min(lower - lower_old, log 5)

    The weights have no gradient. Its softmax is over the rows of a device, which are of one group.
    """
    lower, bound = sandwich(logps, rollout, masked, args)  # (n, G)
    old_lower, _ = sandwich(old_logps, rollout, masked, args)
    weights = (lower - old_lower).clamp(max=math.log(5)).softmax(-1).detach()
    gain = weights * rollout.advantages[::masked.shape[1]] * bound
    return -gain.sum() / args.prompts_per_step, {}


OBJECTIVES = {"grpo": diffu_grpo, "sequence": sequence, "espo": espo, "sequence_mean": sequence_mean, "wd1": wd1,
              "wd1_mean": functools.partial(wd1, total=token_mean), "spg": spg, "stabledrl": stabledrl}
PUBLISHED = {  # where a paper differs from d1; (objective, task) where it differs between tasks
    "sequence": {"epsilon": 3e-4, "beta": 0.0},
    "espo": {"estimator": "elbo", "epsilon": 0.2, "beta": 1e-3},
    ("espo", "countdown"): {"epsilon": 0.0, "beta": 3e-3},  # so every gain ends where the ratio passes 1
    ("espo", "sudoku"): {"beta": 1e-2},
    "wd1": {"beta": 0.0},
    "spg": {"estimator": "block_masks", "num_iterations": 4},
    ("spg", "sudoku"): {"upper_power": 1.0},
    "stabledrl": {"estimator": "block_masks", "num_iterations": 2},
}
OPTIONS = {  # of those below, what an objective reads where that is not epsilon and beta
    "wd1": ("beta",), "wd1_mean": ("beta",),
    "spg": ("upper_power", "upper_weight"), "stabledrl": ("upper_power", "upper_weight"),
}
ALL_OPTIONS = {"epsilon", "beta", "upper_power", "upper_weight"}
