"""What came after d1: estimators against a network of three symbols that is one big table, objectives against loops."""
import itertools
import json

import pytest
import torch

import train_grpo
from d1 import (coupled_logps, diffu_grpo_loss, generator, kl_k3, masked_logps, one_step_logps, random_mask_ratio,
                sequence_loss, trajectory_logps, wd1_loss)
from model import at
from sample import generate, row_noise

P, L, MASK = 2, 3, 3  # symbols 0, 1, 2; canvases of five tokens: 4 ** 5 of them
EVERY = torch.tensor(list(itertools.product(range(3), repeat=L)))  # (27, L): all completions
PROMPT = torch.tensor([[0, 2], [1, 1]])
COMPLETIONS = EVERY.expand(2, 27, L)
PLACE = 4 ** torch.arange(P + L)
TABLE = torch.randn(4 ** (P + L), P + L, 4, generator=generator("table"), dtype=torch.float64)
TABLE[..., MASK] = -torch.inf


def network(ids, attn_mask=None, keep=None, targets=None, cache=None, start=0):
    """Logits looked up by the whole canvas: every token depends on every other in its own way."""
    logits = at(TABLE[(ids * PLACE).sum(1)], keep)
    return logits if targets is None else logits.log_softmax(-1).gather(-1, targets.view(*logits.shape[:2], -1)).view(
        targets.shape)


def logp(prompt, canvas, position, token):
    """log p of one token of the completion, from a list of its symbols and masks."""
    index = sum(int(symbol) * 4 ** i for i, symbol in enumerate([*prompt, *canvas]))
    return float(TABLE[index, P + position].log_softmax(-1)[token])


def by_hand(seen):
    """(2, 27, L): log p of each token of all completions where seen(completion, l) lists its canvas."""
    return torch.tensor([[[logp(prompt, seen(o, i), i, o[i]) for i in range(L)] for o in EVERY.tolist()]
                         for prompt in PROMPT.tolist()], dtype=torch.float64)


def hide(o, mask):
    return [MASK if masked else symbol for symbol, masked in zip(o, mask)]


ORDERS = list(itertools.permutations(range(L)))
ALL_MASKS = list(itertools.product((False, True), repeat=L))


def test_masked_logps_of_every_mask_and_completion():
    masked = torch.tensor(ALL_MASKS)[None, :, None].expand(2, -1, 27, -1)  # (N, S, G, L)
    want = torch.stack([by_hand(lambda o, i, m=mask: hide(o, m)) for mask in ALL_MASKS], dim=1)
    torch.testing.assert_close(masked_logps(network, PROMPT, COMPLETIONS, masked, MASK), want)


def test_coupled_logps_of_every_mask_and_completion():
    ratio = torch.rand(2, 8, 27, generator=generator("ratio"), dtype=torch.float64) * 0.6 + 0.2
    masked = torch.tensor(ALL_MASKS)[None, :, None].expand(2, -1, 27, -1)
    got = coupled_logps(network, PROMPT, COMPLETIONS, masked, ratio, MASK)  # (2, 8, 27, L)
    full = by_hand(lambda o, i: [MASK] * L)
    for k, mask in enumerate(ALL_MASKS):
        complement = [not m for m in mask]
        part = by_hand(lambda o, i, m=mask, c=complement: hide(o, m if m[i] else c))
        probability = torch.where(torch.tensor(mask), ratio[:, k, :, None], 1 - ratio[:, k, :, None])
        torch.testing.assert_close(got[:, k], (full + part / probability) / 2)


@pytest.mark.parametrize("order", ORDERS)
def test_the_whole_trajectory_is_a_distribution(order):
    """As many snapshots as steps: the chain rule in the order of the commits, and the probabilities add up to 1."""
    unmasked_at = torch.tensor(order).expand(2, 27, L)
    got = trajectory_logps(network, PROMPT, COMPLETIONS, unmasked_at, L, MASK)
    want = by_hand(lambda o, i: hide(o, [when >= order[i] for when in order]))
    torch.testing.assert_close(got[:, 0], want)
    torch.testing.assert_close(got.sum(-1).exp().sum(-1), torch.ones(2, 1, dtype=torch.float64))
    torch.testing.assert_close(got, trajectory_logps(network, PROMPT, COMPLETIONS, unmasked_at, 99, MASK))


@pytest.mark.parametrize("order", ORDERS)
def test_snapshots_in_between(order):
    """Two snapshots of three steps: the first two commits see nothing, the last one both; one snapshot is one step."""
    unmasked_at = torch.tensor(order).expand(2, 27, L)
    got = trajectory_logps(network, PROMPT, COMPLETIONS, unmasked_at, 2, MASK)[:, 0]
    want = by_hand(lambda o, i: hide(o, [order[i] < 2 or when == 2 for when in order]))
    torch.testing.assert_close(got, want)
    one = one_step_logps(network, PROMPT, torch.zeros(2, 1, P, dtype=torch.bool), COMPLETIONS, MASK)
    torch.testing.assert_close(trajectory_logps(network, PROMPT, COMPLETIONS, unmasked_at, 1, MASK), one)


def test_the_trajectory_of_a_rollout_is_what_the_sampler_drew_from():
    noise = row_noise([("row", i) for i in range(2)], L, L)
    done = generate(network, PROMPT, mask_id=MASK, gen_length=L, diffusion_steps=L, block_length=L, temperature=1.0,
                    noise=noise)
    ids, when = done.ids[:, P:], done.unmasked_at[:, P:]
    got = trajectory_logps(network, PROMPT, ids[:, None], when[:, None], L, MASK)[:, 0, 0]
    want = [[logp(PROMPT[b].tolist(), hide(ids[b].tolist(), (when[b] >= when[b, i]).tolist()), i, int(ids[b, i]))
             for i in range(L)] for b in range(2)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_a_padded_prompt_changes_nothing():
    """attn_mask goes to every row: the estimators of a prompt do not see what pads it."""
    seen = []

    def recorder(ids, attn_mask=None, keep=None, targets=None):
        seen.append((ids.clone(), attn_mask))
        return network(ids, attn_mask, keep, targets)
    attn_mask = torch.tensor([[False, True], [True, True]])
    masked = torch.rand(2, 2, 27, L, generator=generator("some")) < 0.5
    masked_logps(recorder, PROMPT, COMPLETIONS, masked, MASK, attn_mask)
    ids, mask = seen[0]
    assert ids.shape == (2 * 2 * 27, P + L) and mask.shape == ids.shape and bool(mask[:, P:].all())
    assert all(row[:P].tolist() == attn_mask[PROMPT.tolist().index(prompt[:P].tolist())].tolist()
               for prompt, row in zip(ids, mask))


def test_random_mask_ratios_are_evenly_spaced():
    ratios = torch.stack([random_mask_ratio((3, 2), 4, generator("ratio", i)) for i in range(400)])  # (400, 4, 3, 2)
    assert bool(((ratios >= 0) & (ratios < 1)).all())
    gaps = ratios.sort(1).values.diff(dim=1)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 0.25))
    assert abs(float(ratios[:, 0].mean()) - 0.5) < 0.03


@pytest.mark.parametrize("estimator, low, high", [("random_mask", 0, 1), ("coupled", 0.2, 0.8)])
def test_completion_masks_have_their_rate_whatever_the_processes(estimator, low, high):
    args = train_grpo.parse_args(["--task", "countdown", "--estimator", estimator, "--masks_per_prompt", "2",
                                  "--num_iterations", "4", "--gen_length", "400", "--group_size", "3"])
    masks, ratios = train_grpo.draw_completion_masks(7, range(6), args)
    assert masks.shape == (6, 4, 2, 3, 400) and ratios.shape == (6, 4, 2, 3)
    assert low <= float(ratios.min()) < low + 0.1 and high - 0.1 < float(ratios.max()) <= high
    assert float((masks.float().mean(-1) - ratios).abs().max()) < 0.1
    some, _ = train_grpo.draw_completion_masks(7, [2, 5], args)
    assert torch.equal(some, masks[[2, 5]]) and not torch.equal(masks[0], masks[1])


# ---------------------------------------------------------------- objectives

def drawn(seed, N=2, K=2, G=3):
    """Log-probs of three policies, advantages, a mask that differs by prompt mask; one completion counts nowhere."""
    g = generator("objective", seed)
    logps, old, ref = (-torch.rand(3, N, K, G, L, generator=g, dtype=torch.float64) * 2).unbind()
    mask = torch.rand(N, K, G, L, generator=g) < 0.7
    mask[0, 0, 0] = False
    rewards = torch.randint(4, (N, G), generator=g).double()
    return logps.requires_grad_(), old, ref, rewards - rewards.mean(-1, keepdim=True), mask


def completions_of(mask):
    """(prompt, mask, completion), its counted positions, and their number, at least 1."""
    for index in itertools.product(*map(range, mask.shape[:3])):
        counted = [j for j in range(L) if mask[index][j]]
        yield *index, counted, max(1, len(counted))


def gspo_by_hand(logps, old, ref, A, mask, epsilon, beta):
    total, (N, K, G, _) = 0, logps.shape
    for n, k, i, counted, length in completions_of(mask):
        s = torch.exp(sum((logps[n, k, i, j] - old[n, k, i, j] for j in counted), torch.zeros(())) / length)
        total = total - torch.minimum(s * A[n, i], s.clamp(1 - epsilon, 1 + epsilon) * A[n, i])
        total = total + beta * sum(kl_k3(logps[n, k, i, j], ref[n, k, i, j]) for j in counted) / length
    return total / (N * K * G)


def wd1_by_hand(logps, old, ref, A, mask, epsilon, beta):
    total, (N, K, G, _) = 0, logps.shape
    for n, k, i, counted, length in completions_of(mask):
        push = A[n].exp()[i] / A[n].exp().sum() - (-A[n]).exp()[i] / (-A[n]).exp().sum()
        total = total - push * sum(logps[n, k, i, j] for j in counted) / length / (N * K)
        total = total + beta * sum(kl_k3(logps[n, k, i, j], ref[n, k, i, j]) for j in counted) / length / (N * K * G)
    return total


def grpo_by_hand(logps, old, ref, A, mask, epsilon, beta):
    N, K, G, _ = logps.shape
    total = 0
    for n, k, i, j in itertools.product(range(N), range(K), range(G), range(L)):
        if mask[n, k, i, j]:
            rho = torch.exp(logps[n, k, i, j] - old[n, k, i, j])
            total = total - torch.minimum(rho * A[n, i], rho.clamp(1 - epsilon, 1 + epsilon) * A[n, i])
            total = total + beta * kl_k3(logps[n, k, i, j], ref[n, k, i, j])
    return total / int(mask.sum())


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("loss, by_loops", [(diffu_grpo_loss, grpo_by_hand), (sequence_loss, gspo_by_hand),
                                            (wd1_loss, wd1_by_hand)])
def test_objectives_and_their_gradients_are_those_of_loops(loss, by_loops, seed, beta):
    logps, old, ref, A, mask = drawn(seed)
    count = int(mask.sum()) / mask.shape[1] if loss is diffu_grpo_loss else A.numel()
    got, stats = loss(logps, old, ref if beta else None, A, mask, 0.2, beta, count)
    want = by_loops(logps, old, ref, A, mask, 0.2, beta)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, logps)[0] for x in (got, want)))
    assert ("kl" in stats) == bool(beta) and all(torch.isfinite(torch.as_tensor(v)) for v in stats.values())


@pytest.mark.parametrize("loss", [diffu_grpo_loss, sequence_loss, wd1_loss])
def test_what_does_not_count_cannot_overflow(loss):
    logps, old, ref, A, mask = drawn(0)
    want = loss(logps, old, ref, A, mask, 0.2, 0.04, 6)[0]
    far = [torch.where(mask, x.detach(), value) for x, value in ((logps, 1e3), (old, -1e3), (ref, 1e4))]
    far[0].requires_grad_()
    got = loss(*far, A, mask, 0.2, 0.04, 6)[0]
    torch.testing.assert_close(got, want)
    assert bool(torch.isfinite(torch.autograd.grad(got, far[0])[0]).all())


@pytest.mark.parametrize("loss", [sequence_loss, wd1_loss])
def test_equal_rewards_push_nothing(loss):
    logps, old, ref, A, mask = drawn(1)
    got, _ = loss(logps, logps.detach(), None, torch.zeros_like(A), mask, 0.2, 0.0, 6)
    assert float(got.detach()) == 0 and float(torch.autograd.grad(got, logps)[0].abs().max()) == 0


# ---------------------------------------------------------------- in the trainer

SMALL = ["--task", "countdown", "--steps", "1", "--prompts_per_step", "2", "--group_size", "3", "--eval_count", "0",
         "--num_iterations", "2", "--gen_length", "16", "--diffusion_steps", "4", "--masks_per_prompt", "2",
         "--device", "cpu"]


def train(out, *more):
    train_grpo.main(train_grpo.parse_args([*SMALL, "--out", str(out), *more]))
    return json.loads((out / "metrics.jsonl").read_text())


@pytest.mark.parametrize("estimator, objective", [*((name, "grpo") for name in train_grpo.ESTIMATORS),
                                                  ("one_step", "sequence"), ("random_mask", "wd1")])
def test_the_trainer_under_every_estimator_and_objective(tmp_path, monkeypatch, estimator, objective):
    """One update: the policy is the old one and the reference. Two: it has moved, and micro-batches do not matter."""
    monkeypatch.setattr(train_grpo.TASKS["countdown"], "reward", lambda text, example: {"any": len(text) % 7})
    options = ["--estimator", estimator, "--objective", objective]
    still = train(tmp_path / "one", *options, "--num_iterations", "1")
    assert still["kl"] == still["max_log_ratio"] == still["clip_fraction"] == 0 and still["grad_norm"] > 0
    whole = train(tmp_path / "whole", *options)
    parts = train(tmp_path / "parts", *options, "--microbatch", "1")
    assert whole["kl"] > 0 and whole["max_log_ratio"] > 0
    for name in ("loss", "kl", "grad_norm", "clip_fraction"):
        assert whole[name] == pytest.approx(parts[name], rel=1e-4, abs=1e-6), name
