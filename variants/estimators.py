"""Estimators of a completion's log-probabilities: d1's under other prompt masks, and those of later papers.

An estimator is a `draw` and a `log_probs` for train_grpo.main, see train_grpo.train_step. A log_probs that scores each
prompt under K masks gives (n * K, G, L), and `scored` brings the rollout into the same shape for the objective.

Those of later papers show the network a part of the completion. So a row of the network serves one completion: they
cost G times as much as d1's and more. As in the papers, no token of the prompt is hidden but by block_masks.
"""
import argparse
from collections import namedtuple
from dataclasses import dataclass, replace
from functools import partial

import numpy
import torch

from d1 import generator, one_step_logps
from train_grpo import draw_prompt_masks, one_step
from variants.canvases import (block_masks, draw_block_masks, draw_rounds, draw_snapshots, masked_logps,
                               sampled_rounds, trajectory)


def repeat_prompts(rollout, masked, K, args):
    """The rollout with every prompt K times in a row, as far as objectives look at it."""
    return replace(rollout, advantages=rollout.advantages.repeat_interleave(K, dim=0),  # (n * K, G)
                   mask=rollout.mask.repeat_interleave(K, dim=0), token_count=K * rollout.token_count)


# ---------------------------------------------------------------- d1's estimator under other prompt masks

def draw_shared_masks(rollout, step, args, procs, K=None):
    """K prompt masks for each of the mu updates: (mu, N, K, P) bool."""
    K = K or args.masks_per_prompt
    all_masks = argparse.Namespace(**{**vars(args), "num_iterations": args.num_iterations * K})
    return draw_prompt_masks(rollout, step, all_masks, procs).unflatten(0, (-1, K)).transpose(1, 2)


def draw_own_masks(rollout, step, args, procs):
    """A prompt mask for each completion of each update: (mu, N, G, P) bool."""
    return draw_shared_masks(rollout, step, args, procs, K=args.group_size)


def draw_fixed_masks(rollout, step, args, procs):
    """One pattern of hidden prompt positions for all prompts, updates and steps, as an ablation: (mu, N, P) bool."""
    draws = torch.rand(rollout.prompt.shape[1], generator=generator(args.seed, "fixed mask"))
    is_hidden = (draws < args.p_mask_prompt).to(procs.device)  # (P,)
    position = (rollout.attn_mask.cumsum(-1) - 1).clamp(min=0)  # (N, P), counted from the prompt's first token
    masks = is_hidden[position] & rollout.attn_mask
    return masks.expand(args.num_iterations, -1, -1)


def under_masks(policy, rollout, masked, completions, mask_id):
    """d1's log-probabilities under K masks of each prompt (n, K, P). completions (n * K, G, L) -> (n * K, G, L)."""
    K = masked.shape[1]
    prompt, attn_mask = (x.repeat_interleave(K, dim=0) for x in (rollout.prompt, rollout.attn_mask))  # (n * K, P)
    return one_step_logps(policy, prompt, masked.flatten(0, 1), completions, mask_id, attn_mask)


def shared_masks(policy, rollout, masked, mask_id):
    """Algorithm 1 with a mean over K prompt masks (n, K, P), which the G completions share: (n * K, G, L)."""
    completions = rollout.completions.repeat_interleave(masked.shape[1], dim=0)
    return under_masks(policy, rollout, masked, completions, mask_id)


def mask_per_completion(policy, rollout, masked, mask_id):
    """The layout of the authors' code: every completion has a prompt mask of its own (n, G, P). Gives (n, G, L)."""
    completions = rollout.completions.flatten(0, 1)[:, None]  # (n * G, 1, L)
    return under_masks(policy, rollout, masked, completions, mask_id).view_as(rollout.completions)


# ---------------------------------------------------------------- estimators of later papers

@dataclass
class CompletionMasks:
    """What random_mask and coupled draw for the mu updates; [update, prompts] gives what they draw for n prompts."""
    masked: torch.Tensor       # (mu, N, K, G, L) bool, the completion tokens that an update hides
    ratio: torch.Tensor        # (mu, N, K, G), the probability with which it hides them
    token_count: torch.Tensor  # (mu,), hidden tokens that count, under all K masks, of all processes

    def __getitem__(self, index):
        return CompletionMasks(self.masked[index], self.ratio[index], self.token_count[index[0]])


def draw_completion_masks(rollout, step, args, procs, draw_ratio):
    """K masks of every completion for each of the mu updates; draw_ratio((mu, K, G), generator) gives their ratio."""
    shape = (args.num_iterations, args.masks_per_prompt, args.group_size)
    masks, ratios = [], []
    for i in procs.share(args.prompts_per_step, "--prompts_per_step"):
        numbers = generator(args.seed, "completion mask", step, i)
        ratios.append(draw_ratio(shape, numbers))  # (mu, K, G)
        masks.append(torch.rand(*shape, args.gen_length, generator=numbers) < ratios[-1][..., None])
    masked = torch.stack(masks, dim=1).to(procs.device)  # (mu, N, K, G, L)
    counts = [procs.sum(hidden.sum()) for hidden in masked & rollout.mask[:, None]]
    token_count = torch.tensor(counts, device=procs.device).clamp(min=1)
    return CompletionMasks(masked, torch.stack(ratios, dim=1).to(procs.device), token_count)


def spaced_ratio(shape, generator):
    """UniGRPO: a random ratio at the first of the mu updates, then evenly spaced over [0, 1). (mu, K, G)."""
    start = torch.rand(shape[1:], generator=generator)
    return (start + torch.arange(shape[0]).view(-1, 1, 1) / shape[0]) % 1


def random_mask(policy, rollout, masks, mask_id):
    """UniGRPO (MMaDA, arXiv:2505.15809, section 4.3): a random share of the tokens is hidden, scored and counted."""
    return masked_logps(policy, rollout, masks.masked, mask_id).flatten(0, 1)  # (n * K, G, L)


def hidden_alone(rollout, masks, K, args):
    """The rollout as `repeat_prompts` gives it, where only hidden tokens count."""
    rollout = repeat_prompts(rollout, masks, K, args)
    return replace(rollout, mask=rollout.mask & masks.masked.flatten(0, 1), token_count=masks.token_count)


def moderate_ratio(shape, generator):
    """DiffuCoder's code: between 0.2 and 0.8. (mu, K, G)."""
    return 0.2 + 0.6 * torch.rand(shape, generator=generator)


def coupled(policy, rollout, masks, mask_id):
    """Coupled-GRPO (DiffuCoder, arXiv:2506.20639, section 4.2): a mask, its complement, and the full mask.

        log pi(o_l) = [ log p(o_l | q, M...M) + w log p(o_l | q, the canvas of the two that hides l) ] / 2,
        w = 1 / ratio where the mask hides l, 1 / (1 - ratio) where its complement does

    So every token is scored in a context such as the sampler meets; w makes up for how seldom that mask hides it.
    """
    masked, ratio = masks.masked, masks.ratio[..., None]  # (n, K, G, L), (n, K, G, 1)
    both = torch.cat([masked, ~masked], dim=1)  # (n, 2 * K, G, L)
    by_mask, by_complement = masked_logps(policy, rollout, both, mask_id).chunk(2, dim=1)
    full = one_step(policy, rollout, torch.zeros_like(rollout.attn_mask), mask_id)[:, None]  # (n, 1, G, L)
    weighted = torch.where(masked, by_mask / ratio, by_complement / (1 - ratio))
    return ((full + weighted) / 2).flatten(0, 1)  # (n * K, G, L)


def draw_subsets(rollout, step, args, procs):
    """K random subsets of the L tokens of a completion for each of the mu updates: (mu, N, K, G, L) bool.

    Their sizes are uniform over 0 to L, and evenly spaced over the updates. All subsets of a size are equally likely.
    """
    mu, L = args.num_iterations, args.gen_length
    offset = (torch.arange(mu) * (L + 1) / mu).round().long().view(-1, 1, 1)
    masks = []
    for i in procs.share(args.prompts_per_step, "--prompts_per_step"):
        numbers = generator(args.seed, "subset", step, i)
        start = torch.randint(L + 1, (args.masks_per_prompt, args.group_size), generator=numbers)  # (K, G)
        size = (start + offset) % (L + 1)  # (mu, K, G)
        place = torch.rand(*size.shape, L, generator=numbers).argsort(-1).argsort(-1)  # of a token in a random order
        masks.append(place < size[..., None])
    return torch.stack(masks, dim=1).to(procs.device)


def elbo(policy, rollout, masked, mask_id):
    """ESPO (arXiv:2512.03759; espo_trainer.py, _get_elbo): every token under a subset S or under its complement.

        log pi(o_l) = (L + 1) / (2 |S|) log p(o_l | q, the tokens outside S)           where l is in S
                      (L + 1) / (2 (L - |S|)) log p(o_l | q, the tokens of S)         elsewhere

    The sum over all L tokens is an unbiased estimate of the any-order ELBO: the mean over all orders of the chain
    rule. It includes the EOS behind the first one, and those in later blocks nobody sampled. K subsets give one mean,
    before any exponential.
    """
    by_subset, by_complement = masked_logps(policy, rollout, torch.cat([masked, ~masked], 1), mask_id).chunk(2, dim=1)
    size, L = masked.sum(-1, keepdim=True), masked.shape[-1]
    hidden = torch.where(masked, size, L - size)  # (n, K, G, L), tokens hidden beside one that is scored: at least 1
    weight = (L + 1) / (2 * hidden)
    return (weight * torch.where(masked, by_subset, by_complement)).mean(1)  # (n, G, L)


def quadrature_ratio(shape, generator):
    """GDPO: the K points at which Gauss and Legendre look at [0, 1], for every completion. (mu, K, G)."""
    points, _ = numpy.polynomial.legendre.leggauss(shape[1])
    return torch.tensor((points + 1) / 2, dtype=torch.float32)[:, None].expand(shape)


def quadrature(policy, rollout, masks, mask_id):
    """GDPO (arXiv:2510.08554): the integral of the ELBO over the ratio t of hidden tokens, from K points t_k.

        log pi(o_l) = sum_k w_k / t_k [log p(o_l | q, canvas k) where it hides l],  w_k Gauss-Legendre's weights

    The sum over all L tokens estimates the any-order ELBO, as `elbo` does: without bias where L is 2 K at most.
    """
    masked, ratio = masks.masked, masks.ratio  # (n, K, G, L), (n, K, G)
    _, weights = numpy.polynomial.legendre.leggauss(ratio.shape[1])  # of [-1, 1]: they sum up to 2
    weight = torch.tensor(weights / 2, device=ratio.device)[:, None] / ratio  # (n, K, G)
    logps = masked_logps(policy, rollout, masked, mask_id)
    return (weight[..., None].to(logps) * logps * masked).sum(1)  # (n, G, L)


def committed_alone(rollout, rounds, K, args):
    """The rollout as `repeat_prompts` gives it, where only the tokens of the sampled rounds count.

    token_count becomes K times the completions of the batch. So d1's objective is an unbiased estimate of a mean over
    completions: of the mean over their rounds, of the sum over the tokens of a round. AGRPO can draw rounds by their
    entropy too, and weigh them, to the same end.
    """
    is_drawn = (rollout.committed_at[:, None] == rounds[..., None]).flatten(0, 1)  # (n * K, G, L)
    repeated = repeat_prompts(rollout, rounds, K, args)
    completions = args.prompts_per_step * args.group_size * K
    return replace(repeated, mask=repeated.mask & is_drawn, token_count=completions)


Estimator = namedtuple("Estimator", "draw log_probs options scored", defaults=[repeat_prompts])
ESTIMATORS = {  # options: those of train_grpo.py and grpo.py that an estimator reads
    "one_step": Estimator(draw_shared_masks, shared_masks, ("p_mask_prompt", "masks_per_prompt")),
    "mask_per_completion": Estimator(draw_own_masks, mask_per_completion, ("p_mask_prompt",)),
    "fixed_masks": Estimator(draw_fixed_masks, one_step, ("p_mask_prompt",)),
    "random_mask": Estimator(partial(draw_completion_masks, draw_ratio=spaced_ratio), random_mask,
                             ("masks_per_prompt",), hidden_alone),
    "coupled": Estimator(partial(draw_completion_masks, draw_ratio=moderate_ratio), coupled, ("masks_per_prompt",)),
    "elbo": Estimator(draw_subsets, elbo, ("masks_per_prompt",)),
    "quadrature": Estimator(partial(draw_completion_masks, draw_ratio=quadrature_ratio), quadrature,
                            ("masks_per_prompt",)),
    "trajectory": Estimator(draw_snapshots, trajectory, ("snapshots",)),
    "block_masks": Estimator(draw_block_masks, block_masks, ("p_mask_prompt", "masks_per_prompt")),
    "sampled_rounds": Estimator(draw_rounds, sampled_rounds, ("masks_per_prompt",), committed_alone),
}
PUBLISHED = {  # where a paper differs from d1
    "elbo": {"masks_per_prompt": 2},
    "quadrature": {"masks_per_prompt": 3},
    "block_masks": {"masks_per_prompt": 2},
    "sampled_rounds": {"masks_per_prompt": 24, "num_iterations": 1, "epsilon": 0.2, "beta": 0.0},
}
