"""Methods after d1: estimators against a network of three symbols that is one big table, objectives against loops."""
import contextlib
import copy
import itertools
import json
import math
import runpy
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
from helpers import GOLDEN, MASK_ID, ROOT, embedded, read_rows, reference_model, tensors, worst

import sample
import train_grpo
import train_sft
from d1 import diffu_grpo_loss, generator, kl_k3, one_step_logps, sft_loss
from data import countdown
from model import LLaDA
from parallel import Processes
from train_grpo import Rollout, diffu_grpo, draw_prompt_masks
from variants import estimators, evaluate, grpo, llada_loss, llada_sampler, objectives

ALONE = Processes(0, 1, torch.device("cpu"), torch.float32)
P, L, MASK = 2, 3, 3  # symbols 0, 1, 2; canvases of five tokens: 4 ** 5 of them
EVERY = torch.tensor(list(itertools.product(range(3), repeat=L)))  # (27, L): all completions
PROMPT = torch.tensor([[0, 2], [1, 1]])
TABLE = torch.randn(4 ** (P + L), P + L, 4, generator=generator("table"), dtype=torch.float64)
TABLE[..., MASK] = -torch.inf
ALL_MASKS = list(itertools.product((False, True), repeat=L))
MASKED = torch.tensor(ALL_MASKS)[None, :, None].expand(2, -1, 27, -1)  # (N, K, G, L)


def network(ids, attn_mask=None, keep=None, targets=None):
    """Logits that are looked up by the whole canvas: every token depends on every other in its own way."""
    logits = TABLE[(ids * 4 ** torch.arange(P + L)).sum(1)]  # (B, T, 4)
    logits = logits.gather(1, keep[..., None].expand(-1, -1, 4))
    if targets is None:
        return logits
    return logits.log_softmax(-1).gather(-1, targets.view(*keep.shape, -1)).view(targets.shape)


def make_rollout(prompt=PROMPT, completions=EVERY.expand(2, 27, L), attn_mask=None, **fields):
    N, G = completions.shape[:2]
    attn_mask = torch.ones_like(prompt, dtype=torch.bool) if attn_mask is None else attn_mask
    fields = {"committed_at": None, "advantages": torch.ones(N, G), "token_count": 1.0,
              "mask": torch.ones_like(completions, dtype=torch.bool), **fields}
    return Rollout(prompt, attn_mask, completions, **fields)


def log_p(prompt, canvas, position, token):
    """log p of a token of the completion, from a list of its symbols and masks."""
    index = sum(int(symbol) * 4 ** i for i, symbol in enumerate([*prompt, *canvas]))
    return float(TABLE[index, P + position].log_softmax(-1)[token])


def by_hand(seen):
    """(2, 27, L): log p of each token of all completions, where seen(completion, l) lists the canvas."""
    return torch.tensor([[[log_p(prompt, seen(o, i), i, o[i]) for i in range(L)] for o in EVERY.tolist()]
                         for prompt in PROMPT.tolist()], dtype=torch.float64)


def hide(completion, mask):
    return [MASK if is_masked else symbol for symbol, is_masked in zip(completion, mask)]


def parse(options=""):
    return grpo.parse_args(f"--task countdown --prompts_per_step 2 {options}".split())


# ---------------------------------------------------------------- estimators

def test_hidden_tokens_are_scored_under_every_mask():
    masks = estimators.CompletionMasks(MASKED, None, None)
    logps = estimators.random_mask(network, make_rollout(), masks, MASK)  # (2 * 8, 27, L)
    expected = [by_hand(lambda o, i, mask=mask: hide(o, mask)) for mask in ALL_MASKS]
    torch.testing.assert_close(logps, torch.stack(expected, dim=1).flatten(0, 1))


def test_coupled_masks_score_every_token_with_its_weight():
    ratio = torch.rand(2, 8, 27, generator=generator("ratio"), dtype=torch.float64) * 0.6 + 0.2
    logps = estimators.coupled(network, make_rollout(), estimators.CompletionMasks(MASKED, ratio, None), MASK)
    full = by_hand(lambda o, i: [MASK] * L)
    for k, mask in enumerate(ALL_MASKS):
        complement = [not is_masked for is_masked in mask]
        seen = by_hand(lambda o, i, mask=mask: hide(o, mask if mask[i] else complement))
        probability = torch.where(torch.tensor(mask), ratio[:, k, :, None], 1 - ratio[:, k, :, None])
        torch.testing.assert_close(logps.view(2, 8, 27, L)[:, k], (full + seen / probability) / 2)


def test_the_expectation_of_the_elbo_is_the_mean_of_the_chain_rule_over_all_orders():
    """Every subset has the probability 1 / ((L + 1) (L over its size)). Gradients of empty ones are finite."""
    one = torch.ones((), requires_grad=True)
    expected = sum(by_hand(lambda o, i, order=order: hide(o, [when >= order[i] for when in order])).sum(-1)
                   for order in itertools.permutations(range(L))) / math.factorial(L)
    total = sum(estimators.elbo(lambda *row, targets: one * network(*row, targets=targets), make_rollout(),
                                MASKED[:, [k]], MASK).sum(-1) / (L + 1) / math.comb(L, sum(mask))
                for k, mask in enumerate(ALL_MASKS))
    torch.testing.assert_close(total, expected)
    assert torch.autograd.grad(total.sum(), one)[0].isfinite()
    both = estimators.elbo(network, make_rollout(), MASKED[:, [1, 6]], MASK)  # the mean of two draws
    each = [estimators.elbo(network, make_rollout(), MASKED[:, [k]], MASK) for k in (1, 6)]
    torch.testing.assert_close(both, sum(each) / 2)


def test_the_expectation_of_the_quadrature_is_that_of_the_elbo():
    """Two points are enough for three tokens. A mask has the probability of its tokens at the point's ratio."""
    points, _ = numpy.polynomial.legendre.leggauss(2)
    expected = sum(estimators.elbo(network, make_rollout(), MASKED[:, [k]], MASK).sum(-1) / (L + 1)
                   / math.comb(L, sum(mask)) for k, mask in enumerate(ALL_MASKS))
    total = 0
    for pair in itertools.product(range(8), repeat=2):
        ratio = estimators.quadrature_ratio((1, 2, 27), None).expand(2, -1, -1)  # (n, K, G)
        masks = estimators.CompletionMasks(MASKED[:, list(pair)], ratio, None)
        hidden = [sum(ALL_MASKS[k]) for k in pair]
        shares = [((1 + point) / 2) ** size * ((1 - point) / 2) ** (L - size) for point, size in zip(points, hidden)]
        total = total + math.prod(shares) * estimators.quadrature(network, make_rollout(), masks, MASK).sum(-1)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)  # the points are float32


def test_subsets_have_uniform_sizes_evenly_spaced_over_the_updates():
    args = parse("--estimator elbo --prompts_per_step 200 --num_iterations 8 --gen_length 7 --block_length 7 "
                 "--diffusion_steps 7")
    masked = estimators.draw_subsets(None, 3, args, ALONE)  # (8, 200, 2, 6, 7)
    assert masked.shape == (8, 200, 2, 6, 7)
    size = masked.sum(-1)
    assert size.sort(dim=0).values.eq(torch.arange(8).view(-1, 1, 1, 1)).all()
    assert float((size[0].flatten().bincount() / 2400 - 1 / 8).abs().max()) < 0.03
    assert float((masked.float().mean((0, 1, 2, 3)) - 0.5).abs().max()) < 0.02  # no position is favoured


def score_trajectory(committed_at, snapshots):
    rollout = make_rollout(committed_at=committed_at)
    drawn = estimators.draw_snapshots(rollout, 0, SimpleNamespace(snapshots=snapshots, num_iterations=3), ALONE)
    assert drawn.shape == (3, 2, 27, L) and torch.equal(drawn[0], drawn[2])
    return estimators.trajectory(network, rollout, drawn[1], MASK)


@pytest.mark.parametrize("order", list(itertools.permutations(range(L))))
def test_snapshots_of_a_trajectory(order):
    """As many as rounds are the chain rule in the order of the commits; one snapshot is d1's estimate."""
    committed_at = torch.tensor(order).expand(2, 27, L)
    logps = score_trajectory(committed_at, L)
    torch.testing.assert_close(logps, by_hand(lambda o, i: hide(o, [when >= order[i] for when in order])))
    torch.testing.assert_close(logps.sum(-1).exp().sum(-1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(logps, score_trajectory(committed_at, 99))
    two = by_hand(lambda o, i: hide(o, [order[i] < 2 or when == 2 for when in order]))  # the first sees nothing
    torch.testing.assert_close(score_trajectory(committed_at, 2), two)
    nothing = torch.zeros(2, P, dtype=torch.bool)
    one = one_step_logps(network, PROMPT, nothing, EVERY.expand(2, 27, L), MASK)
    torch.testing.assert_close(score_trajectory(committed_at, 1), one)


def test_the_whole_trajectory_of_a_rollout_is_what_the_sampler_drew_from():
    noise = sample.draw_noise([("row", i) for i in range(2)], L, L)
    ids, when = sample.generate(network, PROMPT, torch.ones(2, P).bool(), noise, mask_id=MASK, eos_id=-1, gen_length=L,
                                diffusion_steps=L, block_length=L, temperature=1.0)
    ids, when = ids[:, P:], when[:, P:]
    rollout = make_rollout(completions=ids[:, None], committed_at=when[:, None])
    logps = estimators.trajectory(network, rollout, when[:, None], MASK)[:, 0]
    expected = [[log_p(PROMPT[b].tolist(), hide(ids[b].tolist(), (when[b] >= when[b, i]).tolist()), i, int(ids[b, i]))
                 for i in range(L)] for b in range(2)]
    torch.testing.assert_close(logps, torch.tensor(expected, dtype=torch.float64))


def test_the_mean_over_all_rounds_is_the_whole_trajectory():
    """Of d1's loss, by a loop over what `trajectory` says. 6 draws are 6, 3 or 2 of each of 1, 2 or 3 rounds."""
    numbers = generator("rounds")
    committed_at = torch.tensor([[0, 0, 0], [1, 0, 1], [0, 1, 1], [2, 0, 1], [1, 2, 0]])[torch.arange(54) % 5]
    advantages, old = (torch.randn(shape, generator=numbers, dtype=torch.float64) for shape in ((2, 27), (2, 27, L)))
    counted = torch.arange(L) < torch.randint(1, L + 1, (2, 27, 1), generator=numbers)
    rollout = make_rollout(committed_at=committed_at.view(2, 27, L), advantages=advantages, mask=counted)
    taken = 1 + rollout.committed_at.masked_fill(~counted, 0).amax(-1)  # (2, 27), rounds of a completion
    rounds = (torch.arange(6).view(1, 6, 1) * taken[:, None]) // 6  # (2, 6, 27)
    logps = estimators.sampled_rounds(network, rollout, rounds, MASK)
    args = SimpleNamespace(prompts_per_step=2, group_size=27, epsilon=0.2, beta=0.0)
    scored = estimators.committed_alone(rollout, rounds, 6, args)
    loss, _ = diffu_grpo(logps, old.repeat_interleave(6, dim=0), None, scored, None, args)
    ratio = (estimators.trajectory(network, rollout, rollout.committed_at, MASK) - old).exp()
    expected = -sum(clip_by_hand(ratio[n, i, j], advantages[n, i]) / taken[n, i] / 54
                    for n, i, j in counted.nonzero().tolist())
    torch.testing.assert_close(loss, expected)


def test_rounds_are_drawn_evenly_up_to_the_last_that_counts():
    args = parse("--estimator sampled_rounds --num_iterations 2 --masks_per_prompt 4 --prompts_per_step 300")
    committed_at = torch.arange(9).expand(300, 6, 9)
    mask = torch.arange(9) < torch.tensor([8, 8, 8, 3, 3, 1])[:, None]  # by completion of a group
    rounds = estimators.draw_rounds(SimpleNamespace(committed_at=committed_at, mask=mask.expand(300, 6, 9)), 0, args,
                                    ALONE)
    assert rounds.shape == (2, 300, 4, 6)
    of_all_updates = rounds.transpose(0, 1).flatten(1, 2)  # (300, 8, 6)
    assert of_all_updates[..., :3].sort(dim=1).values.eq(torch.arange(8)[:, None]).all()  # eight of eight
    assert not of_all_updates[..., 5].any()
    for update in (0, 1):
        shares = rounds[update, ..., 3:5].flatten().bincount() / 2400
        assert shares.shape == (3,) and float((shares - 1 / 3).abs().max()) < 0.03


@pytest.fixture
def rollout():
    """Two prompts of unequal length with four completions each, for the reference model."""
    numbers = generator("rollout")
    attn_mask = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    mask = torch.arange(5) < torch.randint(1, 6, (2, 4, 1), generator=numbers)
    prompt, completions = (torch.randint(480, shape, generator=numbers) for shape in ((2, 6), (2, 4, 5)))
    committed_at = torch.randint(5, (2, 4, 5), generator=numbers)
    return make_rollout(prompt, completions, attn_mask, committed_at=committed_at, mask=mask)


@pytest.mark.parametrize("name", estimators.ESTIMATORS)
@torch.no_grad()
def test_padding_neighbours_and_processes_do_not_change_the_log_probabilities(rollout, name):
    model, estimator = reference_model("llada_mha", torch.float64), estimators.ESTIMATORS[name]
    options = "--objective spg" if name == "block_masks" else f"--estimator {name}"
    args = parse(f"{options} --group_size 4 --gen_length 5 --block_length 1 --diffusion_steps 5")
    for index in range(2):
        part = slice(index, index + 1)
        masked = estimator.draw(rollout, 0, args, ALONE)[-1, part]
        together = estimator.log_probs(model, rollout[part], masked, MASK_ID)
        alone = rollout[part]
        alone.prompt, alone.attn_mask = (x[:, alone.attn_mask[0]] for x in (alone.prompt, alone.attn_mask))
        with_rank = Processes(index, 2, ALONE.device, ALONE.dtype)
        with_rank.sum = float  # no other process is there
        masked = estimator.draw(alone, 0, args, with_rank)[-1, 0:1]
        if name != "fixed_masks":  # which are drawn for the longest prompt
            assert worst(estimator.log_probs(model, alone, masked, MASK_ID), together) < 1e-6


@torch.no_grad()
def test_shared_and_own_prompt_masks_are_those_of_a_pass_for_each(rollout):
    model = reference_model("llada_mha", torch.float64)
    args = parse("--p_mask_prompt 0.4 --group_size 4 --masks_per_prompt 3")
    shared = estimators.draw_shared_masks(rollout, 7, args, ALONE)  # (mu, N, K, P)
    assert shared.shape == (4, 2, 3, 6) and not (shared & ~rollout.attn_mask[:, None]).any()
    args.masks_per_prompt = 1
    assert torch.equal(estimators.draw_shared_masks(rollout, 7, args, ALONE)[:, :, 0],
                       draw_prompt_masks(rollout, 7, args, ALONE))
    own = estimators.draw_own_masks(rollout, 7, args, ALONE)[2]  # (N, G, P)
    logps = estimators.shared_masks(model, rollout, shared[2], MASK_ID).view(2, 3, 4, 5)
    logps_of_own = estimators.mask_per_completion(model, rollout, own, MASK_ID)

    def under(mask):
        return one_step_logps(model, rollout.prompt, mask, rollout.completions, MASK_ID, rollout.attn_mask)

    for k in range(3):
        assert worst(logps[:, k], under(shared[2][:, k])) < 1e-12
    for g in range(4):
        assert worst(logps_of_own[:, g], under(own[:, g])[:, g]) < 1e-12


def test_fixed_masks_are_the_same_for_all_prompts_updates_and_steps():
    attn_mask = torch.arange(400) >= torch.tensor([[0], [100]])
    rollout = make_rollout(torch.zeros(2, 400), attn_mask=attn_mask)
    args = parse("--estimator fixed_masks --p_mask_prompt 0.9")
    masks, later = (estimators.draw_fixed_masks(rollout, step, args, ALONE) for step in (0, 9))
    assert masks.shape == (4, 2, 400) and torch.equal(masks, later) and torch.equal(masks[0], masks[3])
    assert torch.equal(masks[0, 0, :300], masks[0, 1, 100:]) and not masks[0, 1, :100].any()
    assert abs(float(masks[0, 0].float().mean()) - 0.9) < 0.08


@pytest.mark.parametrize("name, low, high", [("random_mask", 0, 1), ("coupled", 0.2, 0.8)])
def test_completion_masks_have_their_rate_and_are_counted(name, low, high):
    args = parse(f"--estimator {name} --masks_per_prompt 3 --gen_length 400")
    mask = torch.arange(400).expand(2, 6, 400) < 150
    drawn = estimators.ESTIMATORS[name].draw(SimpleNamespace(mask=mask), 7, args, ALONE)
    assert drawn.masked.shape == (4, 2, 3, 6, 400) and drawn.ratio.shape == (4, 2, 3, 6)
    assert low <= float(drawn.ratio.min()) < low + 0.1 and high - 0.1 < float(drawn.ratio.max()) <= high
    assert float((drawn.masked.float().mean(-1) - drawn.ratio).abs().max()) < 0.1
    assert drawn[2, 0:1].token_count == drawn.masked[2, ..., :150].sum()
    gaps = drawn.ratio.sort(dim=0).values.diff(dim=0)
    assert torch.allclose(gaps, torch.full_like(gaps, 0.25)) == (name == "random_mask")  # evenly over the updates


def test_a_block_of_each_canvas_is_half_done_and_all_behind_it_hidden():
    args = parse("--objective spg --prompts_per_step 100 --p_mask_prompt 0.2 --num_iterations 3")  # blocks of 8
    length = torch.tensor([32, 20, 8, 1, 9, 17])
    rollout = SimpleNamespace(mask=(torch.arange(32) < length[:, None]).expand(100, 6, 32),
                              attn_mask=(torch.arange(40) >= 10).expand(100, 40))
    masked = estimators.draw_block_masks(rollout, 1, args, ALONE)
    assert masked.shape == (3, 100, 2, 6, 72) and not masked[..., :10].any()
    assert float(masked[..., 10:40].float().mean()) == pytest.approx(0.2, abs=0.01)
    behind = masked[..., 40:].flip(-1).int().cumprod(-1).sum(-1)  # hidden tokens at the end
    assert (behind >= 32 - length).all()
    for g, most in enumerate(length.tolist()):
        hidden = masked[..., g, 40:40 + most].flatten(0, 2).float()  # (600, tokens that count)
        assert hidden.any(-1).all()
        starts = range(0, most, 8)
        chance = [[0.2 if position < start else 1 if position >= min(start + 8, most) else
                   (min(start + 8, most) - start + 1) / (2 * (min(start + 8, most) - start)) for start in starts]
                  for position in range(most)]
        weight = torch.bincount(torch.arange(4) % len(starts)) / 4  # of a block: those behind the end fold back
        expected = (torch.tensor(chance) * weight).sum(-1)
        assert float((hidden.mean(0) - expected).abs().max()) < 0.09, g
    with pytest.raises(SystemExit, match="a completion has 4 blocks"):
        args.masks_per_prompt = 5
        estimators.draw_block_masks(rollout, 1, args, ALONE)


# ---------------------------------------------------------------- objectives

N, G = 2, 3
ARGS = SimpleNamespace(epsilon=0.2, prompts_per_step=N, group_size=G)


def draw_numbers(seed):
    """Log-probabilities of three policies, and a rollout; in one completion no token counts."""
    numbers = generator("objective", seed)
    logps, old, ref = -2 * torch.rand(3, N, G, L, generator=numbers, dtype=torch.float64)
    mask = torch.rand(N, G, L, generator=numbers) < 0.7
    mask[0, 0] = False
    rewards = torch.randint(4, (N, G), generator=numbers).double()
    rollout = make_rollout(completions=torch.zeros(N, G, L), mask=mask, token_count=int(mask.sum()),
                           advantages=rewards - rewards.mean(-1, keepdim=True))
    return logps.requires_grad_(), old, ref, rollout


def clip_by_hand(ratio, advantage):
    return torch.minimum(ratio * advantage, ratio.clamp(1 - ARGS.epsilon, 1 + ARGS.epsilon) * advantage)


def gain_by_hand(name, n, i, counted, logps, old, advantages):
    """What a completion adds to the objective, without its KL."""
    ratios, length = [logps[n, i, j] - old[n, i, j] for j in counted], max(1, len(counted))
    if name == "espo":
        return clip_by_hand(torch.exp((logps[n, i] - old[n, i]).sum() / L), advantages[n, i])
    if name == "sequence":
        return clip_by_hand(torch.exp(sum(ratios, torch.zeros(())) / length), advantages[n, i])
    if name == "sequence_mean":
        return sum(clip_by_hand(ratio.exp(), advantages[n, i]) for ratio in ratios) / length
    likes, dislikes = advantages[n].exp(), (-advantages[n]).exp()
    weight = G * (likes[i] / likes.sum() - dislikes[i] / dislikes.sum())
    return weight * sum(logps[n, i, j] for j in counted) / (length if name == "wd1_mean" else 1)


def kl_by_hand(name, n, i, counted, logps, ref):
    if name == "espo":
        return (logps[n, i] - ref[n, i]).sum() ** 2 / (2 * L)
    return sum(kl_k3(logps[n, i, j], ref[n, i, j]) for j in counted) / max(1, len(counted))


@pytest.mark.parametrize("name", ["sequence", "espo", "sequence_mean", "wd1", "wd1_mean"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_objectives_and_their_gradients_are_those_of_loops(name, beta):
    for seed in range(3):
        logps, old, ref, rollout = draw_numbers(seed)
        ARGS.beta = beta
        loss, stats = objectives.OBJECTIVES[name](logps, old, ref, rollout, None, ARGS)
        expected = kl = 0
        for n, i in itertools.product(range(N), range(G)):
            counted = [j for j in range(L) if rollout.mask[n, i, j]]
            kl = kl + kl_by_hand(name, n, i, counted, logps, ref) / (N * G)
            expected = expected - gain_by_hand(name, n, i, counted, logps, old, rollout.advantages) / (N * G)
        torch.testing.assert_close(loss, expected + beta * kl)
        gradients = [torch.autograd.grad(value, logps, retain_graph=True)[0] for value in (loss, expected + beta * kl)]
        torch.testing.assert_close(*gradients)
        if beta:
            torch.testing.assert_close(stats["kl"], kl.detach())
        assert ("kl" in stats) == bool(beta) and ("clip_fraction" in stats) == ("wd1" not in name)


@pytest.mark.parametrize("name", ["sequence", "espo", "sequence_mean", "wd1", "wd1_mean"])
def test_a_token_that_does_not_count_cannot_overflow_and_equal_rewards_teach_nothing(name):
    ARGS.beta = 0.04
    logps, old, ref, rollout = draw_numbers(0)
    objective = objectives.OBJECTIVES[name]
    loss, _ = objective(logps, old, ref, rollout, None, ARGS)
    far = [torch.where(rollout.mask, x.detach(), value) for x, value in ((logps, -1e3), (old, 1e3), (ref, 1e4))]
    far[0].requires_grad_()
    loud, _ = objective(*far, rollout, None, ARGS)
    if name != "espo":  # in which all count
        torch.testing.assert_close(loud, loss)
    assert torch.isfinite(torch.autograd.grad(loud, far[0])[0]).all()
    ARGS.beta, rollout.advantages = 0.0, torch.zeros(N, G)
    assert not torch.autograd.grad(objective(logps, logps.detach(), None, rollout, None, ARGS)[0], logps)[0].any()


def test_the_loss_under_several_masks_is_the_mean_of_the_losses_under_each():
    K, ARGS.beta = 2, 0.04
    numbers, rollouts = zip(*((numbers, rollout) for *numbers, rollout in map(draw_numbers, range(K))))
    rollout = rollouts[0]
    together = [torch.stack(policies, dim=1).flatten(0, 1) for policies in zip(*numbers)]  # (N * K, G, L)
    for objective in (diffu_grpo, objectives.sequence, objectives.wd1):
        loss, stats = objective(*together, estimators.repeat_prompts(rollout, None, K, ARGS), None, ARGS)
        each = [objective(*policies, rollout, None, ARGS) for policies in numbers]
        torch.testing.assert_close(loss, sum(part for part, _ in each) / K)
        torch.testing.assert_close(stats["kl"], sum(stats["kl"] for _, stats in each) / K)


def sandwich_by_hand(name, n, i, logps, old, masked, rollout, power, omega):
    """What a completion adds to SPG's and StableDRL's gain, weights apart, and its ELBO before and now."""
    counted = [j for j in range(L) if rollout.mask[n, i, j]]
    hidden = [[j for j in counted if masked[n, k, i, j]] for k in range(2)]
    low, old_low = (sum(sum(x[n, k, i, j] for j in hidden[k]) / len(hidden[k]) for k in range(2)) / 2
                    for x in (logps, old))
    high = [sum(logps[n, k, i, j].exp() ** power * len(counted) / len(hidden[k]) for k in range(2) if j in hidden[k])
            for j in counted if any(j in tokens for tokens in hidden)]
    high = sum((value / 2).log() for value in high) / len(high) / power
    bound = low if rollout.advantages[n, i] > 0 else omega * high + (1 - omega) * low
    return rollout.advantages[n, i] * bound * (len(counted) if name == "spg" else 1), float((low - old_low).detach())


@pytest.mark.parametrize("name", ["spg", "stabledrl"])
def test_bounds_and_their_gradients_are_those_of_loops(name):
    logps, old, _, _ = zip(*map(draw_numbers, range(2)))
    logps, old = torch.stack(logps, dim=1).detach().requires_grad_(), 3 * torch.stack(old, dim=1)  # (N, K, G, L)
    rollout = draw_numbers(4)[-1]
    rollout.mask[..., 0] = True
    masked = torch.rand(N, 2, G, P + L, generator=generator("canvases")) < 0.5
    masked[..., P] = True  # at least one that counts
    args = SimpleNamespace(prompts_per_step=N, group_size=G, upper_power=1.5, upper_weight=0.4)
    repeated = estimators.repeat_prompts(rollout, masked, 2, args)
    loss, _ = objectives.OBJECTIVES[name](logps.flatten(0, 1), old.flatten(0, 1), None, repeated, masked, args)
    expected = 0
    for n in range(N):
        gains, differences = zip(*(sandwich_by_hand(name, n, i, logps, old, masked[..., P:], rollout, 1.5, 0.4)
                                   for i in range(G)))
        weights = torch.tensor([min(math.exp(difference), 5) for difference in differences], dtype=torch.float64)
        scale = weights / weights.sum() / N if name == "stabledrl" else torch.ones(G) / rollout.token_count
        expected = expected - sum(gain * part for gain, part in zip(gains, scale))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logps)[0] for value in (loss, expected)))


def test_random_masks_count_hidden_tokens_alone():
    (logps, old, ref, rollout), hidden = draw_numbers(3), torch.rand(N, 1, G, L, generator=generator("hidden")) < 0.5
    counted = rollout.mask & hidden[:, 0]
    scored = estimators.hidden_alone(rollout, estimators.CompletionMasks(hidden, None, counted.sum()), 1, ARGS)
    ARGS.beta = 0.04
    expected, _ = diffu_grpo_loss(logps, old, ref, rollout.advantages, counted, 0.2, 0.04, counted.sum())
    torch.testing.assert_close(diffu_grpo(logps, old, ref, scored, None, ARGS)[0], expected)


# ---------------------------------------------------------------- the programs

SMALL = "--group_size 3 --num_iterations 2 --gen_length 16 --device cpu"


def methods_of(args, monkeypatch):
    """What variants/grpo.py hands to train_grpo.main."""
    with monkeypatch.context() as patch:
        patch.setattr(train_grpo, "main", lambda args, **methods: methods)
        return grpo.main(args)


def take_step(options, monkeypatch, **replaced):
    """The log's row of one step of variants/grpo.py, which trains a copy of the embedded model."""
    args, tokenizer = parse(f"{SMALL} {options}"), embedded()[1]
    methods = methods_of(args, monkeypatch) | replaced
    examples, model = countdown.load("train", count=2), copy.deepcopy(embedded()[0])
    for example in examples:
        example["ids"] = tokenizer.encode_prompt(example["prompt"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_step = methods.pop("step") or train_grpo.train_step
    row, _ = train_step(0, model, lambda: contextlib.nullcontext(embedded()[0]), optimizer, tokenizer, examples, args,
                        ALONE, **methods)
    return row


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    "--masks_per_prompt 2", "--estimator mask_per_completion --objective sequence_mean",
    "--estimator fixed_masks --gumbel_bfloat16", "--estimator random_mask --masks_per_prompt 2 --objective wd1_mean",
    "--estimator coupled --objective sequence --beta 0.04 --epsilon 0.5 --cfg_scale 0.2",
    "--estimator elbo --objective espo --epsilon 0.2", "--estimator quadrature --objective espo --beta 0.01",
    "--estimator sampled_rounds --masks_per_prompt 3 --beta 0.04",
    "--estimator trajectory --threshold 0.9 --cache dual",
    "--entropy_bound 0.5 --random_first", "--objective spg", "--objective stabledrl"])
def test_a_step_starts_at_the_reference_and_does_not_depend_on_its_parts(monkeypatch, options):
    monkeypatch.setattr(countdown, "reward", lambda text, example: {"any": len(text) % 7})
    first = take_step(f"{options} --num_iterations 1", monkeypatch)
    assert first.get("kl", 0) == 0 == first.get("clip_fraction", 0) and first["grad_norm"] > 0
    whole, parts = (take_step(f"{options} --microbatch {size}", monkeypatch) for size in (2, 1))
    assert whole.get("kl", 1) > 0
    for name in {"loss", "kl", "grad_norm"} & whole.keys():
        assert whole[name] == pytest.approx(parts[name], rel=1e-4, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "--threshold 0.9"])
def test_all_snapshots_give_what_the_network_said_when_the_sampler_drew(monkeypatch, options):
    """In a step as it is trained, with text behind an EOS inside its block, with rows that leave early."""
    options += " --estimator trajectory --snapshots 99 --gen_length 32 --rollout_batch 1 --group_size 8"
    methods = methods_of(parse(options), monkeypatch)
    seen, scored = [], []

    def generate(model, *args, **sampling):
        rounds = []  # log-probabilities (T, V) of the canvas before each round of a single row

        def look(ids, attn_mask, keep):
            logits = model(ids, attn_mask)  # (1, T, V)
            rounds.append(logits.log_softmax(-1)[0])
            return logits.gather(1, keep[..., None].expand(-1, -1, logits.shape[-1]))

        (ids,), (when,) = canvas = methods["generate"](look, *args, **sampling)
        seen.append([float(rounds[when[i]][i, ids[i]]) for i in range(len(ids) - 32, len(ids))])
        return canvas

    def log_probs(policy, rollout, *args):
        scored.append((rollout, methods["log_probs"](policy, rollout, *args)))
        return scored[-1][1]

    take_step(f"{SMALL} {options}", monkeypatch, generate=generate, log_probs=log_probs)
    rollout, logps = scored[0]  # before the updates
    assert worst(logps[rollout.mask], torch.tensor(seen).view_as(logps)[rollout.mask]) < 1e-5
    behind = (rollout.completions != embedded()[1].eos_id) & ~rollout.mask
    assert behind.any() and not rollout.mask.all(-1).any(dim=1).all()


def test_the_training_program_runs_with_a_cache_on_a_model_that_fsdp_holds(tmp_path):
    options = f"{SMALL} --steps 1 --eval_count 0 --cache prefix --dtype bfloat16"  # trained in float32: FSDP casts
    grpo.main(parse(f"{options} --out {tmp_path}"))
    assert read_rows(tmp_path / "metrics.jsonl")[-1]["grad_norm"] > 0


@pytest.mark.parametrize("options, message", [
    ("--estimator coupled --p_mask_prompt 0.1", "--p_mask_prompt would be ignored by --estimator coupled"),
    ("--snapshots 3", "--snapshots would be ignored by --estimator one_step"),
    ("--estimator trajectory --masks_per_prompt 2", "--masks_per_prompt would be ignored by --estimator trajectory"),
    ("--objective wd1 --epsilon=0.5", "--epsilon would be ignored by --objective wd1"),
    ("--objective spg --beta 0.1", "--beta would be ignored by --objective spg"),
    ("--objective espo --estimator random_mask", "--objective espo counts all tokens, --estimator random"),
    ("--upper_power 2", "--upper_power would be ignored by --objective grpo"),
    ("--objective spg --estimator one_step", "--objective spg or stabledrl and --estimator block_masks go together"),
    ("--estimator block_masks", "--objective spg or stabledrl and --estimator block_masks go together"),
    ("--random_first", "--random_first would be ignored: add --threshold or --entropy_bound"),
    ("--masks_per_prompt 0", "--masks_per_prompt and --snapshots must be at least 1"),
])
def test_options_that_would_be_ignored_are_refused(options, message):
    with pytest.raises(SystemExit) as stopped:
        parse(options)
    assert message in str(stopped.value) and "\n" not in str(stopped.value)


def test_a_run_records_the_options_that_it_reads_and_has_a_folder_of_its_own():
    args = parse("--estimator trajectory --objective wd1 --threshold 0.9 --gen_length 24")
    assert args.beta == 0 and parse("--objective wd1 --beta 0.04").beta == 0.04 == parse("--objective wd1_mean").beta
    by_task = [parse(f"--objective espo --task {task}") for task in ("countdown", "sudoku", "gsm8k")]
    assert [(args.epsilon, args.beta) for args in by_task] == [(0, 3e-3), (0.2, 1e-2), (0.2, 1e-3)]
    powers = [parse(f"--objective spg --task {task}").upper_power for task in ("countdown", "sudoku")]
    assert powers == [1.5, 1.0] and parse("--objective stabledrl").estimator == "block_masks"
    assert (parse("--objective espo").estimator, parse("--objective espo --estimator one_step").masks_per_prompt) == (
        "elbo", 1)
    assert parse("--estimator elbo").masks_per_prompt == 2 and parse("--estimator=elbo").epsilon == 0.5
    assert (parse("--objective sequence").epsilon, parse("--objective sequence_mean").epsilon) == (3e-4, 0.5)
    assert args.out == "runs/grpo-countdown-trajectory-wd1" and args.diffusion_steps == 24 and args.snapshots == 4
    assert not {"p_mask_prompt", "masks_per_prompt", "epsilon"} & vars(args).keys()
    for options in ("--gumbel_bfloat16", "--gumbel_bfloat16 --threshold 0.9"):
        assert evaluate.pick_generate(parse(options)).keywords["choose"] is llada_sampler.gumbel_bfloat16


@pytest.mark.parametrize("dtype, suffix, tolerance", [(torch.float32, "", 1e-4), (torch.float64, "_f64", 1e-10)])
def test_losses_and_gradients_of_sft_equal_those_of_llada(dtype, suffix, tolerance):
    data, model = tensors("sft/sft.safetensors"), LLaDA.from_pretrained(GOLDEN / "llada_mha", dtype=dtype)
    ids, noised = data["input_ids"], data["official.noisy_ids"]  # (3, 40)
    answer, masked = torch.arange(40) >= data["prompt_lengths"][:, None], noised != ids
    weights = llada_loss.llada_weights(data["t"].to(dtype), answer)
    loss = sft_loss(model(noised, keep=masked, targets=ids[masked]), masked, weights)
    assert worst(loss.detach().view(1), data[f"official.loss{suffix}"]) < tolerance
    loss.backward()
    prefix, weights = f"official.grad{suffix}.", dict(model.named_parameters())
    names = [key.removeprefix(prefix) for key in data if key.startswith(prefix) and "__global_norm__" not in key]
    assert len(names) >= 4 and all(worst(weights[name].grad, data[prefix + name]) < tolerance for name in names)


def test_the_sft_program_trains_with_the_weights_of_llada(tmp_path, monkeypatch):
    lines = [json.dumps({"prompt": "Hi " * (1 + i % 9), "completion": "Yes"}) for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    options = f"--data {tmp_path}/rows.jsonl --steps 1 --batch_size 8 --device cpu --out {tmp_path}/"
    train_sft.main(train_sft.parse_args(f"{options}d1".split()))
    monkeypatch.setattr(sys, "argv", ["llada_loss.py", *f"{options}llada".split()])
    runpy.run_path(str(ROOT / "variants" / "llada_loss.py"), run_name="__main__")
    losses = [read_rows(tmp_path / name / "metrics.jsonl")[1]["loss"] for name in ("d1", "llada")]
    assert losses[0] != losses[1]
