"""d1.py against the reference tensors (golden/README.md), against brute force and loops."""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import EOS_ID, GOLDEN, MASK_ID, reference_model, tensors, worst

from d1 import (completion_mask, diffu_grpo_loss, draw_indices, forward_process, generator, group_advantages, kl_k3,
                one_step_logps, sft_loss, sft_weights)
from model import LLaDA

META = json.loads((GOLDEN / "grpo/meta.json").read_text())
CASES = {name: case for name, case in META["cases"].items() if not case["cfg_scale"]}  # d1 trains without guidance
TABLES = json.loads((GOLDEN / "grpo/tables.json").read_text())
# dtype: ending of the reference's names, tolerances of log-probabilities, losses and gradients
PRECISIONS = {torch.float32: ("", 2e-4, 1e-5, 1e-4), torch.float64: ("_f64", 1e-10, 1e-10, 1e-10)}
N, G, P, L = 3, 4, 6, 5


def check_gradients(model, data, prefix, tolerance):
    """Compare with every reference gradient under `prefix`, and with the norm over all weights."""
    grads = {name: p.grad for name, p in model.named_parameters()}
    names = [key.removeprefix(prefix) for key in data if key.startswith(prefix) and "__global_norm__" not in key]
    for name in names:
        assert worst(grads[name], data[prefix + name]) < tolerance, name
    norm = math.sqrt(sum(float(grad.double().pow(2).sum()) for grad in grads.values()))
    assert abs(norm - float(data[prefix + "__global_norm__"])) < 100 * tolerance
    return len(names)


def relative_error(actual, expected):
    """The largest difference, relative to what is above 1."""
    expected = expected.flatten()
    return float(((actual - expected).abs() / expected.abs().clamp(min=1)).max())


# ---------------------------------------------------------------- against the reference

def test_completion_masks_end_with_the_first_eos():
    for row in TABLES["completion_mask"]:
        mask = completion_mask(torch.tensor([row["completion_ids"]]), row["eos_id"])
        assert mask.dtype == torch.bool and mask.int().tolist() == [row["mask"]]
    data = tensors("grpo/grpo.safetensors")
    mask = completion_mask(data["completion_ids"].view(2, 3, 16), EOS_ID)  # (N, G, L)
    assert torch.equal(mask.view(6, 16).int(), data["completion_mask"])


def test_advantages_equal_the_reference():
    for row in TABLES["advantages"]:
        rewards = torch.tensor(row["rewards"], dtype=torch.float32).view(-1, row["num_generations"])
        assert worst(group_advantages(rewards).flatten(), torch.tensor(row["advantages"])) < 1e-6
    data = tensors("grpo/grpo.safetensors")
    assert worst(group_advantages(data["rewards"].view(2, 3)).flatten(), data["advantages"]) < 1e-6
    for value in (0.0, 0.7, 2.2, -1 / 3):
        assert (group_advantages(torch.full((2, 7), value)).abs() <= 4e-7 * abs(value)).all()


@pytest.mark.parametrize("dtype", PRECISIONS)
@torch.no_grad()
def test_log_probabilities_equal_the_reference(dtype):
    data, model = tensors("grpo/grpo.safetensors"), reference_model("llada_mha", dtype)
    suffix, tolerance, _, _ = PRECISIONS[dtype]
    for masked, expected in zip(data["is_mask_prompt"], data[f"cfg0.policy_logps{suffix}"]):  # a mask per completion
        logps = one_step_logps(model, data["prompt_ids"], masked, data["completion_ids"][:, None], MASK_ID)
        assert worst(logps[:, 0], expected) < tolerance


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_losses_and_gradients_of_rl_equal_the_reference(case, dtype):
    data, meta = tensors("grpo/grpo.safetensors"), CASES[case]
    suffix, _, loss_tolerance, gradient_tolerance = PRECISIONS[dtype]
    model = LLaDA.from_pretrained(GOLDEN / "llada_mha", dtype=dtype)
    k = data["mask_seeds"].tolist().index(meta["mask_seed"])
    completions = data["completion_ids"][:, None]  # (N, G, L) with a mask for each completion: N = 6, G = 1
    logps = one_step_logps(model, data["prompt_ids"], data["is_mask_prompt"][k], completions, MASK_ID)
    old, ref = (data[f"cfg0.{name}_logps"][k].view_as(logps).to(dtype) for name in ("old", "ref"))
    if meta["num_iterations"] == 1:
        old = logps.detach()
    advantages, mask = data["advantages"].view(6, 1).to(dtype), completion_mask(completions, EOS_ID)

    def loss_of(mask, token_count):
        return diffu_grpo_loss(logps, old, ref, advantages, mask, meta["epsilon"], meta["beta"], token_count)

    loss, stats = loss_of(mask, mask.sum())
    assert worst(loss.detach().view(1), data[f"{case}.loss{suffix}"]) < loss_tolerance
    assert abs(float(stats["clip_fraction"]) - meta["fraction_gradient_clipped"]) < 1e-6
    each = torch.eye(96, dtype=torch.bool).view(96, 6, 1, 16)  # one token at a time, tokens after EOS too
    per_token, per_token_stats = torch.vmap(lambda token: loss_of(token, 1))(each)
    assert relative_error(per_token.detach(), data[f"{case}.per_token_loss"]) < 1e-4
    if meta["beta"]:
        assert abs(float(stats["kl"]) - meta["mean_kl"]) < 1e-5
        assert relative_error(per_token_stats["kl"], data[f"{case}.kl"]) < 1e-4
    loss.backward()
    count = check_gradients(model, data, f"{case}.grad{suffix}.", gradient_tolerance)
    assert count >= 4 or suffix  # in float64 the reference has a few weights of one case


@pytest.mark.parametrize("variant", ["d1", "pretrain"])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_losses_and_gradients_of_sft_equal_the_reference(variant, dtype):
    suffix, _, loss_tolerance, gradient_tolerance = PRECISIONS[dtype]
    data, model = tensors("sft/sft.safetensors"), LLaDA.from_pretrained(GOLDEN / "llada_mha", dtype=dtype)
    ids, noised = data["input_ids"], data[f"{variant}.noisy_ids"]  # (3, 40)
    masked = noised != ids
    answer = torch.arange(40) >= data["prompt_lengths"][:, None]
    if variant == "pretrain":  # no prompt
        answer = torch.ones_like(answer)
    logps = model(noised, keep=masked, targets=ids[masked])
    loss = sft_loss(logps, masked, sft_weights(data["t"].to(dtype), answer))
    assert worst(loss.detach().view(1), data[f"{variant}.loss{suffix}"]) < loss_tolerance
    loss.backward()
    assert check_gradients(model, data, f"{variant}.grad{suffix}.", gradient_tolerance) >= 4


# ---------------------------------------------------------------- masked SFT

def test_tokens_are_masked_independently_at_their_rate():
    ids = torch.arange(4 * 20_000).view(4, 20_000)
    before, t = ids.clone(), torch.tensor([0.0, 0.25, 0.9, 1.0])
    maskable = torch.arange(20_000) >= torch.tensor([0, 100, 5000, 7])[:, None]
    noised, masked = forward_process(ids, t, maskable, -1, generator(0))
    assert torch.equal(noised == -1, masked) and torch.equal(noised[~masked], ids[~masked])
    assert torch.equal(ids, before)
    assert not masked[~maskable].any() and not masked[0].any() and torch.equal(masked[3], maskable[3])
    for row in (1, 2):
        count, rate = int(maskable[row].sum()), float(t[row])
        assert abs(int(masked[row].sum()) - count * rate) < 5 * math.sqrt(count * rate * (1 - rate))
    centred = masked[1, 100:].double() - 0.25
    assert abs(float((centred[:-1] * centred[1:]).mean())) < 5 * 0.1875 / math.sqrt(19_900)  # neighbours


def test_parts_of_an_sft_batch_add_up_and_nothing_masked_costs_nothing():
    masked, answer = torch.rand(2, 4, 9, generator=generator(1)) < torch.tensor([0.4, 0.8])[:, None, None]
    weights, logps = sft_weights(torch.tensor([0.2, 0.5, 0.7, 0.9]), answer), torch.randn(4, 9, generator=generator(2))
    parts = [slice(0, 1), slice(1, 4)]
    shares = [sft_loss(logps[part][masked[part]], masked[part], weights[part]) for part in parts]
    by_hand = sum(-logps[b, j] / t / answer.sum() for b, t in enumerate((0.2, 0.5, 0.7, 0.9)) for j in range(9)
                  if masked[b, j])
    assert abs(sum(shares) - sft_loss(logps[masked], masked, weights)) < 1e-6 and abs(sum(shares) - by_hand) < 1e-6
    nothing = torch.zeros_like(masked)
    assert sft_loss(logps[nothing], nothing, weights) == 0


# ---------------------------------------------------------------- the estimator

def draw_batch(seed=0):
    """prompt (N, P), prompt_masked (N, P), completions (N, G, L) for the tiny models."""
    g = generator(seed)
    prompt, completions = torch.randint(480, (N, P), generator=g), torch.randint(480, (N, G, L), generator=g)
    completions[0, 1, 2] = completions[1, 0, 4] = EOS_ID
    return prompt, torch.rand(N, P, generator=g) < 0.3, completions


@torch.no_grad()
def test_log_probabilities_are_those_of_brute_force():
    model, (prompt, masked, completions) = reference_model("llada_gqa", torch.float64), draw_batch(1)
    logps = one_step_logps(model, prompt, masked, completions, MASK_ID)
    assert logps.shape == (N, G, L)
    for n in range(N):
        noised = [MASK_ID if masked[n, j] else int(prompt[n, j]) for j in range(P)]
        expected = model(torch.tensor([noised + [MASK_ID] * L]))[0, P:].log_softmax(-1)  # (L, V)
        for i in range(G):
            assert worst(logps[n, i], expected.gather(1, completions[n, i][:, None])[:, 0]) < 1e-12


def test_one_row_scores_all_completions_as_a_row_for_each_does(fresh):
    prompt, masked, completions = draw_batch()
    advantages = torch.randn(N, G, generator=generator(7), dtype=torch.float64)
    mask, drift = completion_mask(completions, EOS_ID), torch.randn(2, N, G, L, generator=generator(8)).double()

    def run(prompt, masked, *grouped):
        completions, drift, other_drift, advantages, mask = grouped
        fresh.zero_grad()
        logps = one_step_logps(fresh, prompt, masked, completions, MASK_ID)
        old, ref = logps.detach() + 0.3 * drift, logps.detach() + 0.3 * other_drift
        loss, stats = diffu_grpo_loss(logps, old, ref, advantages, mask, 0.2, 0.04, mask.sum())
        loss.backward()
        return [logps.detach().flatten(), loss.detach(), stats["kl"], *[p.grad for p in fresh.parameters()]]

    grouped = (completions, *drift, advantages, mask)
    shared = run(prompt, masked, *grouped)
    rows = [x.flatten(0, 1)[:, None] for x in grouped]  # G = 1
    each = run(prompt.repeat_interleave(G, 0), masked.repeat_interleave(G, 0), *rows)
    assert all(worst(one, other) < 1e-12 for one, other in zip(shared, each))
    assert max(float(grad.abs().max()) for grad in shared[3:]) > 1e-2


@torch.no_grad()
def test_padded_prompts_and_neighbours_change_nothing():
    model, (prompt, masked, completions) = reference_model("llada_mha", torch.float64), draw_batch(3)
    pads = [0, 3, 5]
    attn_mask = torch.arange(P) >= torch.tensor(pads)[:, None]
    prompt = prompt.masked_fill(~attn_mask, EOS_ID)
    together = one_step_logps(model, prompt, masked, completions, MASK_ID, attn_mask)
    for n, pad in enumerate(pads):
        row = slice(n, n + 1)
        alone = one_step_logps(model, prompt[row, pad:], masked[row, pad:], completions[row], MASK_ID)
        assert worst(together[row], alone) < 1e-6  # positions shift; the rotary tables are float32
    assert worst(together, one_step_logps(model, prompt, masked, completions, MASK_ID)) > 0.1


@torch.no_grad()
def test_bfloat16_logits_are_scored_in_float32():
    model, (prompt, masked, completions) = reference_model("llada_mha", torch.bfloat16), draw_batch()
    logps = one_step_logps(model, prompt, masked, completions, MASK_ID)
    rows = F.pad(prompt.masked_fill(masked, MASK_ID), (0, L), value=MASK_ID)  # (N, T)
    expected = model(rows)[:, P:].float().log_softmax(-1).gather(-1, completions.transpose(1, 2))
    assert worst(logps, expected.transpose(1, 2)) < 1e-6


# ---------------------------------------------------------------- the loss

def draw_numbers(seed=0):
    """logps, old, ref (N, G, L); advantages (N, G); mask (N, G, L), all float64."""
    g = generator(seed)
    logps, old, ref = (-3 + 0.6 * torch.randn(N, G, L, generator=g, dtype=torch.float64) for _ in range(3))
    return logps, old, ref, torch.randn(N, G, generator=g, dtype=torch.float64), torch.rand(N, G, L, generator=g) < 0.7


def differentiate(logps, *rest):
    """The loss, its gradient in the log-probabilities, and the statistics."""
    leaf = logps.clone().requires_grad_()
    loss, stats = diffu_grpo_loss(leaf, *rest)
    loss.backward()
    return loss.detach(), leaf.grad, stats


@pytest.mark.parametrize("epsilon, beta", [(0.2, 0.04), (0.5, 0.0)])
def test_the_loss_is_that_of_a_loop_over_the_tokens(epsilon, beta):
    logps, old, ref, advantages, mask = draw_numbers()
    count = 2 * int(mask.sum())  # as if another process held the other half
    total = kl = clipped = 0.0
    for n, i, j in mask.nonzero().tolist():
        policy, before, reference = (float(x[n, i, j]) for x in (logps, old, ref))
        ratio, advantage = math.exp(policy - before), float(advantages[n, i])
        k3 = math.exp(reference - policy) - (reference - policy) - 1
        bounded = min(max(ratio, 1 - epsilon), 1 + epsilon)
        total -= (min(ratio * advantage, bounded * advantage) - beta * k3) / count
        kl += k3 / count
        clipped += (ratio > 1 + epsilon if advantage > 0 else ratio < 1 - epsilon) / count
    loss, stats = diffu_grpo_loss(logps, old, ref, advantages, mask, epsilon, beta, count)
    assert abs(float(loss) - total) < 1e-12
    assert abs(float(stats["clip_fraction"]) - clipped) < 1e-7 and 0.05 < clipped < 0.45
    assert abs(float(stats["kl"]) - kl) < 1e-12 if beta else "kl" not in stats


def test_losses_gradients_and_statistics_of_parts_add_up():
    *numbers, mask = draw_numbers(2)
    loss, gradient, stats = differentiate(*numbers, mask, 0.2, 0.1, mask.sum())
    shares = [differentiate(*[x[n:n + 1] for x in (*numbers, mask)], 0.2, 0.1, mask.sum()) for n in range(N)]
    assert abs(sum(share[0] for share in shares) - loss) < 1e-14
    assert worst(torch.cat([share[1] for share in shares]), gradient) < 1e-16
    for key in stats:
        assert abs(sum(share[2][key] for share in shares) - stats[key]) < 1e-7  # the clipped share is float32


def test_kl_is_zero_at_the_reference_and_positive_elsewhere():
    logps, _, ref, _, mask = draw_numbers(3)
    assert (kl_k3(logps, logps) == 0).all() and (kl_k3(logps, ref) > 0).all()
    loss, gradient, stats = differentiate(logps, logps, logps, torch.zeros(N, G), mask, 0.2, 9.0, 1)
    assert loss == 0 and stats["kl"] == 0 and (gradient == 0).all()


@pytest.mark.parametrize("size", [80.0, 1e4, math.inf])
def test_a_token_that_does_not_count_never_reaches_the_loss(size):
    logps, old, ref, advantages, mask = (x.float() if x.is_floating_point() else x for x in draw_numbers(5))
    quiet = differentiate(logps, old, ref, advantages, mask, 0.2, 0.1, mask.sum())
    for sign in (-1, 1):
        far_old, far_ref = old.masked_fill(~mask, sign * size), ref.masked_fill(~mask, -sign * size)
        loud = differentiate(logps, far_old, far_ref, advantages, mask, 0.2, 0.1, mask.sum())
        assert loud[0] == quiet[0] and torch.equal(loud[1], quiet[1]) and loud[2] == quiet[2]


@pytest.mark.parametrize("size", [80.0, 1e4])
@pytest.mark.parametrize("advantage, sign, gain", [  # min(rho A, clip(rho) A) at epsilon 0.2; None: unbounded
    (1, 1, 1.2), (1, -1, 0.0), (0, 1, 0.0), (-1, -1, -0.8), (-1, 1, None)])
def test_a_huge_ratio_gives_no_nan_and_is_not_overlooked(size, advantage, sign, gain):
    advantages, mask = torch.full((1, 1), float(advantage)), torch.ones(1, 1, 2, dtype=torch.bool)
    logps = torch.tensor([-1.0, -2.0]).view(1, 1, 2)
    old = logps - torch.tensor([sign * size, 0.0])
    loss, gradient, _ = differentiate(logps, old, None, advantages, mask, 0.2, 0.0, 2)
    assert not gradient.isnan().any()
    assert abs(gradient[..., 1] + advantage / 2) < 1e-6  # the other token is trained as ever
    if gain is None:
        assert loss > 1e30
    else:
        assert abs(loss + (gain + advantage) / 2) < 1e-6 and abs(gradient[..., 0]) < 1e-6


# ---------------------------------------------------------------- randomness

def test_a_generator_is_a_function_of_its_key():
    keys = [(0,), (1,), (-1,), ("0",), (0, 0), (0, 1), (1, 0), (1, 12), (11, 2), (0, "x"), (2 ** 70, 1)]
    draws = [tuple(torch.rand(4, generator=generator(*key)).tolist()) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [tuple(torch.rand(4, generator=generator(*key)).tolist()) for key in keys]
    many = torch.cat([torch.rand(1, generator=generator(0, "row", i)) for i in range(2000)])
    assert abs(many.mean() - 0.5) < 5 * (1 / 12 / 2000) ** 0.5  # neighbouring keys, unrelated numbers


def test_every_item_comes_once_per_epoch_in_an_order_of_its_own():
    drawn = [i for step in range(5) for i in draw_indices(10, step, 4, seed=0)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]
    assert draw_indices(3, 0, 8, seed=0)[:3] == draw_indices(3, 0, 3, seed=0)  # a batch may span epochs
    assert draw_indices(10, 0, 10, seed=0) != draw_indices(10, 0, 10, seed=1)


def test_inputs_and_the_global_random_state_stay_as_they_were():
    prompt, masked, completions = draw_batch()
    logps, old, ref, advantages, mask = draw_numbers()
    inputs = [prompt, masked, completions, logps, old, ref, advantages, mask]
    copies, state = [x.clone() for x in inputs], torch.get_rng_state()
    one_step_logps(reference_model("llada_mha"), prompt, masked, completions, MASK_ID)
    diffu_grpo_loss(logps, old, ref, group_advantages(advantages), mask, 0.2, 0.1, mask.sum())
    forward_process(prompt, torch.full((N,), 0.5), masked, MASK_ID, generator(1))
    draw_indices(10, 0, 4, seed=0)
    assert all(map(torch.equal, inputs, copies)) and torch.equal(torch.get_rng_state(), state)
