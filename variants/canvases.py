"""Estimators that score what the sampler saw: the canvases of a rollout, or canvases that look like them.

They are in the table of estimators.py, as are the papers' settings. A log_probs of K canvases of each completion gives
(n * K, G, L).
"""
import torch
import torch.nn.functional as F

from d1 import generator


def make_canvases(rollout, masked, mask_id):
    """Rows of prompt and completion (n * S * G, T), partly masked, and their attn_mask.

    masked bool, of the completion (n, S, G, L) or of the whole row (n, S, G, T).
    """
    n, S, G, width = masked.shape
    P, L = rollout.prompt.shape[1], rollout.completions.shape[-1]
    prompt = rollout.prompt[:, None, None].expand(n, S, G, P)
    rows = torch.cat([prompt, rollout.completions[:, None].expand(n, S, G, L)], dim=-1)  # (n, S, G, T)
    rows = rows.masked_fill(F.pad(masked, (P + L - width, 0)), mask_id)
    return rows.flatten(0, 2), F.pad(rollout.attn_mask, (0, L), value=True).repeat_interleave(S * G, dim=0)


def masked_logps(policy, rollout, masked, mask_id):
    """log p(o_l | q, the tokens of o that are not masked) from S canvases of each completion: (n, S, G, L).

    masked as in `make_canvases`. Only where it is True the network does not see the token that it scores.
    """
    rows, attn_mask = make_canvases(rollout, masked, mask_id)  # (n * S * G, T)
    P, T = rollout.prompt.shape[1], rows.shape[1]
    keep = torch.arange(P, T, device=rows.device).expand(len(rows), -1)  # the completion's positions
    targets = rollout.completions[:, None].expand(*masked.shape[:-1], -1)  # (n, S, G, L)
    return policy(rows, attn_mask, keep, targets=targets.flatten(0, 2)).view(targets.shape)


def draw_snapshots(rollout, step, args, procs):
    """The snapshot that scores each token, the same for all updates: (mu, N, G, L) int64.

    The rounds of a completion are cut into equal parts. A snapshot is the canvas at the beginning of a part.
    """
    rounds = rollout.committed_at.amax(-1, keepdim=True) + 1  # (N, G, 1)
    snapshots = min(args.snapshots, int(rounds.max()))
    return (rollout.committed_at * snapshots // rounds).expand(args.num_iterations, -1, -1, -1)


def trajectory(policy, rollout, snapshot, mask_id):
    """d2's StepMerge (arXiv:2509.21474): each token is scored in the snapshot (n, G, L) after which it was committed.

    One snapshot is d1's estimate without prompt masks. With as many as rounds each token is scored on the very canvas
    that the sampler saw when it drew the token: at temperature 1, as in d1, whatever temperature it drew at.
    """
    numbers = torch.arange(int(snapshot.max()) + 1, device=snapshot.device)  # (S,)
    masked = snapshot[:, None] >= numbers[:, None, None]  # (n, S, G, L): not yet committed
    return masked_logps(policy, rollout, masked, mask_id).gather(1, snapshot[:, None])[:, 0]


def draw_rounds(rollout, step, args, procs):
    """K of the rounds that each completion took, for each of the mu updates: (mu, N, K, G) int64.

    Each is uniform over the rounds up to the last that committed a token that counts. Together they spread evenly.
    """
    draws = args.num_iterations * args.masks_per_prompt
    last = rollout.committed_at.masked_fill(~rollout.mask, 0).amax(-1)  # (N, G)
    rounds = []
    for i, most in zip(procs.share(args.prompts_per_step, "--prompts_per_step"), last):
        numbers = generator(args.seed, "rounds", step, i)
        place = torch.rand(draws, args.group_size, generator=numbers).argsort(0)  # in a random order of the draws
        share = (place + torch.rand(draws, args.group_size, generator=numbers)) / draws  # (draws, G), in [0, 1]
        rounds.append((share.to(procs.device) * (most + 1)).long().minimum(most))
    return torch.stack(rounds).unflatten(1, (-1, args.masks_per_prompt)).transpose(0, 1)


def sampled_rounds(policy, rollout, rounds, mask_id):
    """AGRPO (arXiv:2510.04019; agrpo_trainer.py, compute_loss): what sampled rounds (n, K, G) committed.

    It is scored on the canvas that the sampler saw, as by `trajectory` with all snapshots: at temperature 1, where
    AGRPO scores at the temperature of the rollouts, among the tokens of its top-p and top-k. Gives (n * K, G, L).
    """
    masked = rollout.committed_at[:, None] >= rounds[..., None]  # (n, K, G, L)
    return masked_logps(policy, rollout, masked, mask_id).flatten(0, 1)


def draw_block_masks(rollout, step, args, procs):
    """What SPG hides of each row in K canvases, for each of the mu updates: (mu, N, K, G, T) bool.

    In every canvas a block of the completion is half done: of its m tokens that count 1 to m are hidden, and all
    behind. What stands before it, the prompt too, is hidden with probability p_mask_prompt.
    """
    K, size, L = args.masks_per_prompt, args.block_length, args.gen_length
    if K > L // size:
        raise SystemExit(f"error: --masks_per_prompt {K}: a completion has {L // size} blocks, one for each canvas")
    mu, G, position, masks = args.num_iterations, args.group_size, torch.arange(L), []
    places = procs.share(args.prompts_per_step, "--prompts_per_step")
    for i, mask, is_real in zip(places, rollout.mask.cpu(), rollout.attn_mask.cpu()):  # (G, L) and (P,)
        numbers = generator(args.seed, "block mask", step, i)
        length = mask.sum(-1)  # (G,)
        blocks = torch.rand(mu, G, L // size, generator=numbers).argsort(-1)[..., :K]  # (mu, G, K), all unlike
        start = size * (blocks.transpose(1, 2) % ((length - 1) // size + 1))[..., None]  # (mu, K, G, 1)
        end = (start + size).minimum(length[:, None])
        count = 1 + (torch.rand(mu, K, G, 1, generator=numbers) * (end - start)).long()  # of 1 to m
        inside = (start <= position) & (position < end)  # (mu, K, G, L)
        draws = torch.rand(mu, K, G, L, generator=numbers)
        place = draws.masked_fill(~inside, 2).argsort(-1).argsort(-1)  # those of the block come first
        masked = (position >= end) | inside & (place < count) | (position < start) & (draws < args.p_mask_prompt)
        prompt = torch.zeros(mu, K, G, len(is_real), dtype=torch.bool)
        prompt[..., is_real] = torch.rand(mu, K, G, int(is_real.sum()), generator=numbers) < args.p_mask_prompt
        masks.append(torch.cat([prompt, masked], dim=-1))
    return torch.stack(masks, dim=1).to(procs.device)


def block_masks(policy, rollout, masked, mask_id):
    """SPG (arXiv:2510.09541; spg_trainer.py, forward_process "block_random"): canvases (n, K, G, T) -> (n * K, G, L).

    They look as the sampler's do between two rounds. `spg` and `stabledrl` in objectives.py make bounds of them.
    """
    return masked_logps(policy, rollout, masked, mask_id).flatten(0, 1)
