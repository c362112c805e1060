"""Objectives that stand in the place of train_grpo.diffu_grpo, with the same arguments.

Each is a mean over completions, where diffu_grpo is a mean over tokens. Shapes: n prompts, G completions of L tokens.
"""
import torch

from d1 import kl_k3
from train_grpo import diffu_grpo


def token_mean(values, mask):
    """The mean of values (n, G, L) over the tokens that count, 0 where none does. (n, G)."""
    return values.masked_fill(~mask, 0).sum(-1) / mask.sum(-1).clamp(min=1)


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


def wd1(logps, old_logps, ref_logps, rollout, masked, args):
    """wd1 (arXiv:2507.08838): the log-likelihood under weights of both signs, without ratio and clip.

        - 1 / groups * sum_i [ softmax(A)_i - softmax(-A)_i ] sum_l logps,  softmax over the group

    As in its code (compute_loss of rev_grpo_trainer.py), which has no KL term.
    """
    weights = rollout.advantages.softmax(-1) - (-rollout.advantages).softmax(-1)  # (n, G), 0 in the sum of a group
    losses = -weights * args.group_size * logps.masked_fill(~rollout.mask, 0).sum(-1)
    return batch_mean(losses, {}, logps, ref_logps, rollout, args)


def wd1_mean(logps, old_logps, ref_logps, rollout, masked, args):
    """wd1 with the mean over the tokens of a completion in the place of its sum."""
    weights = rollout.advantages.softmax(-1) - (-rollout.advantages).softmax(-1)
    losses = -weights * args.group_size * token_mean(logps, rollout.mask)
    return batch_mean(losses, {}, logps, ref_logps, rollout, args)


OBJECTIVES = {"grpo": diffu_grpo, "sequence": sequence, "espo": espo, "sequence_mean": sequence_mean, "wd1": wd1,
              "wd1_mean": wd1_mean}
PUBLISHED = {  # where a paper differs from d1; (objective, task) where it differs between tasks
    "sequence": {"epsilon": 3e-4, "beta": 0.0},
    "espo": {"epsilon": 0.2, "beta": 1e-3},
    ("espo", "countdown"): {"epsilon": 0.0, "beta": 3e-3},  # so every gain ends where the ratio passes 1
    ("espo", "sudoku"): {"beta": 1e-2},
    "wd1": {"beta": 0.0},
}
