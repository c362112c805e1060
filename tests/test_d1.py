"""d1.py against the reference tensors (golden/README.md), brute force, and what a fully masked completion implies."""
import json
import math

import pytest
import torch
from conftest import golden, reference, tensors, worst

from d1 import (completion_mask, diffu_grpo_loss, forward_process, generator, group_advantages, kl_k3, one_step_logps,
                sft_loss, sft_loss_of)
from model import LLaDA

MASK_ID, EOS_ID = 500, 481
META = json.loads(golden("grpo/meta.json").read_text())
TABLES = json.loads(golden("grpo/tables.json").read_text())
BOTH = [(torch.float32, ""), (torch.float64, "_f64")]


def guided(net, scale):
    """The network under classifier-free guidance: the unconditional half sees every prompt token masked."""
    def logits(ids, attn_mask, keep):
        blind = ids.clone()
        blind[:, :keep.start] = MASK_ID
        cond, un = net(ids, attn_mask, keep), net(blind, attn_mask, keep)
        return un + (scale + 1) * (cond - un)
    return scorer(logits) if scale else net


def scorer(logits):
    """A network of which only the logits are known."""
    def model(ids, attn_mask=None, keep=None, targets=None):
        return logits(ids, attn_mask, keep).log_softmax(-1).gather(-1, targets)
    return model


def check_gradients(net, data, prefix, tolerance):
    """Every reference gradient under `prefix`, and the norm over all weights. Returns how many there were."""
    grads = {name: p.grad for name, p in net.named_parameters()}
    names = [key.removeprefix(prefix) for key in data if key.startswith(prefix) and "__global_norm__" not in key]
    for name in names:
        assert worst(grads[name], data[prefix + name]) < tolerance, name
    norm = math.sqrt(sum(float(x.double().pow(2).sum()) for x in grads.values()))
    assert abs(norm - float(data[prefix + "__global_norm__"])) < 100 * tolerance
    return len(names)


def relative(got, want):
    """The largest difference, relative above 1."""
    return float(((got - want.flatten()).abs() / want.flatten().abs().clamp(min=1)).max())


# ---------------------------------------------------------------- tables

@pytest.mark.parametrize("row", TABLES["completion_mask"])
def test_completion_mask(row):
    mask = completion_mask(torch.tensor([row["completion_ids"]]), row["eos_id"])
    assert mask.dtype == torch.bool and mask.int().tolist() == [row["mask"]]


def test_completion_mask_of_the_reference_batch():
    data = tensors("grpo/grpo.safetensors")
    mask = completion_mask(data["completion_ids"].view(2, 3, 16), EOS_ID)  # (N, G, L)
    assert torch.equal(mask.view(6, 16).int(), data["completion_mask"]) and mask.sum() == 65


@pytest.mark.parametrize("row", TABLES["advantages"])
def test_advantages(row):
    rewards = torch.tensor(row["rewards"], dtype=torch.float32).view(-1, row["num_generations"])
    assert worst(group_advantages(rewards).flatten(), torch.tensor(row["advantages"])) < 1e-6


def test_advantages_of_the_reference_batch():
    data = tensors("grpo/grpo.safetensors")
    assert worst(group_advantages(data["rewards"].view(2, 3)).flatten(), data["advantages"]) < 1e-6


@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, 2.2, -1 / 3, 1e-4])
@pytest.mark.parametrize("G", [2, 3, 6, 7, 12])
def test_equal_rewards_have_advantage_zero(value, G):
    assert (group_advantages(torch.full((2, G), value)).abs() <= 4e-7 * abs(value)).all()


# ---------------------------------------------------------------- log-probs, loss and gradients against the reference

@pytest.mark.parametrize("scale, key", [(0, "cfg0"), (0.7, "cfg0.7")])
@pytest.mark.parametrize("dtype, suffix", BOTH)
@torch.no_grad()
def test_one_step_logps(scale, key, dtype, suffix):
    data, net = tensors("grpo/grpo.safetensors"), reference("llada_mha", dtype)
    masked = data["is_mask_prompt"].transpose(0, 1)  # (N, K, P) = (6, 4, 12)
    got = one_step_logps(guided(net, scale), data["prompt_ids"], masked, data["completion_ids"][:, None], MASK_ID)
    want = data[f"{key}.policy_logps{suffix}"].transpose(0, 1)[:, :, None]  # (N, K, G, L) = (6, 4, 1, 16)
    assert worst(got, want) < (1e-10 if suffix else 2e-4)


@pytest.mark.parametrize("case", META["cases"])
@pytest.mark.parametrize("dtype, suffix", BOTH)
def test_diffu_grpo(case, dtype, suffix):
    data, meta = tensors("grpo/grpo.safetensors"), META["cases"][case]
    net, cfg = LLaDA.from_pretrained(golden("llada_mha"), dtype=dtype), meta["cfg_scale"]
    k, key = data["mask_seeds"].tolist().index(meta["mask_seed"]), f"cfg{cfg or 0}"
    # one mask per completion, the authors' layout: N = 6, G = 1
    masked, completions = data["is_mask_prompt"][k][:, None], data["completion_ids"][:, None]  # (N, K, P), (N, G, L)
    logps = one_step_logps(guided(net, cfg), data["prompt_ids"], masked, completions, MASK_ID)
    old = logps.detach() if meta["num_iterations"] == 1 else data[f"{key}.old_logps"][k].view_as(logps).to(dtype)
    ref = data[f"{key}.ref_logps"][k].view_as(logps).to(dtype) if meta["beta"] else None
    advantages, mask = data["advantages"].view(6, 1).to(dtype), completion_mask(completions, EOS_ID)

    def loss_of(mask, token_count):
        return diffu_grpo_loss(logps, old, ref, advantages, mask, meta["epsilon"], meta["beta"], token_count)

    loss, stats = loss_of(mask, mask.sum())
    assert worst(loss.detach().view(1), data[f"{case}.loss{suffix}"]) < (1e-10 if suffix else 1e-5)
    assert abs(float(stats["clip_fraction"]) - meta["fraction_gradient_clipped"]) < 1e-6
    assert abs(float(stats["kl"]) - meta["mean_kl"]) < 1e-5 if meta["beta"] else "kl" not in stats

    each = torch.eye(96, dtype=torch.bool).view(96, 6, 1, 16)  # one token at a time, those after EOS too
    tokens, per_token = torch.vmap(lambda one: loss_of(one, 1))(each)
    assert relative(tokens.detach(), data[f"{case}.per_token_loss"]) < 1e-4
    assert relative(per_token["max_log_ratio"], data[f"{case}.coef_1"].log().abs()) < 1e-4
    assert relative(per_token["kl"], data[f"{case}.kl"]) < 1e-4 if meta["beta"] else f"{case}.kl" not in data

    loss.backward()
    count = check_gradients(net, data, f"{case}.grad{suffix}.", 1e-10 if suffix else 1e-4)
    assert count >= (0 if suffix and case not in ("a_d1yaml", "d_cfg") else 4)


def test_all_five_grpo_cases_are_there():
    assert len(META["cases"]) == 5 and len(TABLES["completion_mask"]) >= 6 and len(TABLES["advantages"]) >= 4
    for key, values in {"cfg_scale": {0.0, 0.7}, "beta": {0.0, 0.04}, "epsilon": {0.2, 0.5}}.items():
        assert {case[key] for case in META["cases"].values()} == values


@pytest.mark.parametrize("variant", ["d1", "official", "pretrain"])
@pytest.mark.parametrize("dtype, suffix", BOTH)
def test_sft(variant, dtype, suffix):
    data, net = tensors("sft/sft.safetensors"), LLaDA.from_pretrained(golden("llada_mha"), dtype=dtype)
    ids, noisy = data["input_ids"], data[f"{variant}.noisy_ids"]  # (3, 40)
    masked, t = noisy != ids, data["t"].to(dtype)
    answer = torch.arange(40) >= data["prompt_lengths"][:, None] if variant != "pretrain" else torch.ones_like(masked)
    assert (noisy[masked] == MASK_ID).all() and torch.equal(masked, data["mask_all"] & answer)
    official = variant == "official"
    loss = sft_loss_of(net(noisy, keep=masked, targets=ids[masked]), masked, t, answer, per_sequence=official)
    from_logits = sft_loss(net(noisy, keep=masked), ids, masked, t, answer, per_sequence=official)
    for found in (loss, from_logits):
        assert worst(found.detach().view(1), data[f"{variant}.loss{suffix}"]) < (1e-10 if suffix else 1e-5)
    loss.backward()
    assert check_gradients(net, data, f"{variant}.grad{suffix}.", 1e-10 if suffix else 1e-4) >= 4


# ---------------------------------------------------------------- masked SFT: properties

def test_forward_process():
    B, T = 4, 20_000
    ids = torch.arange(B * T).view(B, T)
    p = torch.tensor([0.0, 0.25, 0.9, 1.0])
    maskable = torch.arange(T) >= torch.tensor([0, 100, 5000, 7])[:, None]
    noised, masked = forward_process(ids, p, maskable, -1, generator(0))
    assert torch.equal(noised == -1, masked) and torch.equal(noised[~masked], ids[~masked])
    assert not masked[~maskable].any() and not masked[0].any() and torch.equal(masked[3], maskable[3])
    for row in (1, 2):
        n = int(maskable[row].sum())
        assert abs(int(masked[row].sum()) - n * p[row]) < 5 * math.sqrt(n * p[row] * (1 - p[row]))
    x = masked[1, 5000:].double() - 0.25
    assert abs(float((x[:-1] * x[1:]).mean())) < 5 * 0.1875 / math.sqrt(15_000)  # neighbours are independent
    assert torch.equal(ids, torch.arange(B * T).view(B, T))  # not changed in place
    again, other = (forward_process(ids, p, maskable, -1, generator(seed))[1] for seed in (0, 1))
    assert torch.equal(masked, again) and not torch.equal(masked, other)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_sft_loss_by_hand(per_sequence):
    ids = torch.randint(7, (3, 5), generator=generator(1))
    masked = torch.rand(3, 5, generator=generator(2)) < 0.6
    answer = masked | (torch.rand(3, 5, generator=generator(3)) < 0.5)
    t, logits = torch.tensor([0.2, 0.5, 0.9]), torch.randn(int(masked.sum()), 7, generator=generator(4))
    total, m = 0.0, 0
    for b in range(3):
        for j in range(5):
            if masked[b, j]:
                nll = math.log(sum(math.exp(x) for x in logits[m].tolist())) - float(logits[m, ids[b, j]])
                total += nll / float(t[b]) / (3 * int(answer[b].sum()) if per_sequence else int(answer.sum()))
                m += 1
    assert m > 5 and abs(float(sft_loss(logits, ids, masked, t, answer, per_sequence)) - total) < 1e-5


def test_sft_loss_where_nothing_is_masked():
    ids, nothing = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.bool)
    logits = torch.zeros(0, 7, requires_grad=True)
    loss = sft_loss(logits, ids, nothing, torch.full((2,), 0.001), ~nothing)
    loss.backward()
    assert float(loss.detach()) == 0 and logits.grad.shape == (0, 7)


# ---------------------------------------------------------------- the estimator: properties

N, G, K, P, L = 3, 4, 2, 6, 5


def batch(seed=0):
    """prompt (N, P), prompt_masked (N, K, P), completions (N, G, L) for the tiny models."""
    g = generator(seed)
    prompt, completions = torch.randint(480, (N, P), generator=g), torch.randint(480, (N, G, L), generator=g)
    completions[0, 1, 2] = completions[1, 0, 4] = EOS_ID
    return prompt, torch.rand(N, K, P, generator=g) < 0.3, completions


def test_shared_masks_equal_a_row_for_every_completion():
    net = LLaDA.from_pretrained(golden("llada_mha"), dtype=torch.float64)
    prompt, masked, completions = batch()
    mask, A = completion_mask(completions, EOS_ID), torch.randn(N, G, generator=generator(7), dtype=torch.float64)
    drift = 0.3 * torch.randn(2, N, K, G, L, generator=generator(8), dtype=torch.float64)
    with torch.no_grad():
        now = one_step_logps(net, prompt, masked, completions, MASK_ID)
    old, ref = now + drift[0], now + drift[1]

    def run(logps, old, ref, A, mask):
        net.zero_grad()
        loss, stats = diffu_grpo_loss(logps, old, ref, A, mask, 0.2, 0.04, mask.sum())
        loss.backward()
        return loss.detach(), stats, {name: p.grad for name, p in net.named_parameters()}

    def as_rows(x):  # (N, ..., L) of a prompt and its completions -> N * G prompts of one completion each
        return x.transpose(1, 2).reshape(N * G, K, 1, L) if x.dim() == 4 else x.reshape(N * G, 1, *x.shape[2:])

    shared = run(one_step_logps(net, prompt, masked, completions, MASK_ID), old, ref, A, mask)
    prompt, masked = prompt.repeat_interleave(G, 0), masked.repeat_interleave(G, 0)
    rows = one_step_logps(net, prompt, masked, as_rows(completions), MASK_ID)
    assert worst(rows.detach(), as_rows(now)) < 1e-12
    each = run(rows, *map(as_rows, (old, ref, A, mask)))
    assert abs(shared[0] - each[0]) < 1e-12 and abs(shared[0]) > 1e-3
    assert all(abs(shared[1][key] - each[1][key]) < 1e-12 for key in ("kl", "clip_fraction", "max_log_ratio"))
    for name in shared[2]:
        assert worst(shared[2][name], each[2][name]) < 1e-12, name
    assert max(float(x.abs().max()) for x in shared[2].values()) > 1e-2


@torch.no_grad()
def test_logps_by_brute_force():
    net, (prompt, masked, completions) = reference("llada_gqa", torch.float64), batch(1)
    got = one_step_logps(net, prompt, masked, completions, MASK_ID)
    assert got.shape == (N, K, G, L)
    for n in range(N):
        for k in range(K):
            noised = [MASK_ID if masked[n, k, j] else int(prompt[n, j]) for j in range(P)]
            logps = net(torch.tensor([noised + [MASK_ID] * L]))[0, P:].log_softmax(-1)  # (L, V)
            for i in range(G):
                want = torch.stack([logps[j, completions[n, i, j]] for j in range(L)])
                assert worst(got[n, k, i], want) < 1e-12
    assert (got.exp() > 0).all() and (got <= 0).all()


@torch.no_grad()
def test_logps_do_not_depend_on_other_rows_or_completions():
    net, (prompt, masked, completions) = reference("llada_mha", torch.float64), batch(2)
    together = one_step_logps(net, prompt, masked, completions, MASK_ID)
    alone = one_step_logps(net, prompt[1:2], masked[1:2], completions[1:2], MASK_ID)
    assert worst(together[1:2], alone) < 1e-12
    changed = completions.clone()
    changed[1, 2] = 7
    again = one_step_logps(net, prompt, masked, changed, MASK_ID)
    same = torch.ones(N, G, dtype=torch.bool)
    same[1, 2] = False
    assert torch.equal(again.transpose(1, 2)[same], together.transpose(1, 2)[same])


@torch.no_grad()
def test_left_padded_prompts_equal_the_prompt_alone():
    net, (prompt, masked, completions) = reference("llada_mha", torch.float64), batch(3)
    pads = [0, 3, 5]
    attn_mask = torch.arange(P) >= torch.tensor(pads)[:, None]
    prompt = prompt.masked_fill(~attn_mask, EOS_ID)
    got = one_step_logps(net, prompt, masked, completions, MASK_ID, attn_mask)
    for n, pad in enumerate(pads):
        alone = one_step_logps(net, prompt[n:n + 1, pad:], masked[n:n + 1, :, pad:], completions[n:n + 1], MASK_ID)
        assert worst(got[n:n + 1], alone) < 1e-6  # positions shift; the rotary tables are float32
    assert worst(got, one_step_logps(net, prompt, masked, completions, MASK_ID)) > 0.1


@torch.no_grad()
def test_half_precision_logits_are_scored_in_float32():
    net, (prompt, masked, completions) = reference("llada_mha", torch.bfloat16), batch()
    got = one_step_logps(net, prompt, masked, completions, MASK_ID)
    assert got.dtype == torch.float32
    rows = torch.cat([prompt[:, None].masked_fill(masked, MASK_ID), torch.full((N, K, L), MASK_ID)], -1)  # (N, K, T)
    want = net(rows.view(N * K, P + L), keep=slice(P, P + L)).view(N, K, 1, L, 512).float().log_softmax(-1)
    index = completions[:, None, ..., None].expand(N, K, G, L, 1)
    assert worst(got, want.expand(N, K, G, L, 512).gather(-1, index)[..., 0]) < 1e-6


def test_gradient_of_the_logits_at_ratio_one():
    """- sum_i A_i onehot(o_i) / Z, the softmax terms cancelling: zero where all completions agree."""
    prompt, masked, completions = batch()
    masked, completions = masked[:, :1], completions.masked_fill(completions == EOS_ID, 0)
    completions[:, :, 3] = completions[:, :1, 3]
    logits = torch.randn(N, L, 512, generator=generator(6), dtype=torch.float64, requires_grad=True)
    rewards = torch.rand(N, G, generator=generator(7), dtype=torch.float64)
    A, mask = group_advantages(rewards), completion_mask(completions, EOS_ID)
    logps = one_step_logps(scorer(lambda *_: logits), prompt, masked, completions, MASK_ID)
    loss, stats = diffu_grpo_loss(logps, logps.detach(), None, A, mask, 0.2, 0.0, mask.sum())
    loss.backward()
    want = -(A[..., None, None] * torch.nn.functional.one_hot(completions, 512)).sum(1) / (N * G * L)  # (N, L, V)
    assert worst(logits.grad, want) < 1e-15 and want.abs().max() > 1e-3
    assert logits.grad[:, 3].abs().max() < 1e-15
    assert abs(loss) < 1e-15 and stats["clip_fraction"] == 0 and stats["max_log_ratio"] == 0


# ---------------------------------------------------------------- the loss: properties

def numbers(seed=0, spread=0.6):
    """logps, old, ref (N, K, G, L); advantages (N, G); mask (N, G, L), all float64."""
    g = generator(seed)
    logps, old, ref = (-3 + spread * torch.randn(N, K, G, L, generator=g, dtype=torch.float64) for _ in range(3))
    return logps, old, ref, torch.randn(N, G, generator=g, dtype=torch.float64), torch.rand(N, G, L, generator=g) < 0.7


def grad_of(logps, *rest):
    """The loss, its gradient in the log-probs, and the stats."""
    leaf = logps.clone().requires_grad_()
    loss, stats = diffu_grpo_loss(leaf, *rest)
    loss.backward()
    return loss.detach(), leaf.grad, stats


@pytest.mark.parametrize("epsilon, beta", [(0.2, 0.04), (0.5, 0.0), (0.2, 1.0)])
def test_loss_by_hand(epsilon, beta):
    logps, old, ref, A, mask = numbers()
    count = 2 * int(mask.sum())  # as if another process held the other half
    total = kl = clipped = 0.0
    for n in range(N):
        for k in range(K):
            for i in range(G):
                for j in range(L):
                    if mask[n, i, j]:
                        a, b, c = (float(x[n, k, i, j]) for x in (logps, old, ref))
                        rho, adv = math.exp(a - b), float(A[n, i])
                        k3 = math.exp(c - a) - (c - a) - 1
                        cut = rho > 1 + epsilon if adv > 0 else rho < 1 - epsilon  # the side where the gradient is cut
                        bounded = min(max(rho, 1 - epsilon), 1 + epsilon)
                        total -= (min(rho * adv, bounded * adv) - beta * k3) / (K * count)
                        kl, clipped = kl + k3 / (K * count), clipped + cut / (K * count)
    loss, stats = diffu_grpo_loss(logps, old, ref if beta else None, A, mask, epsilon, beta, count)
    assert abs(float(loss) - total) < 1e-12
    assert abs(float(stats["clip_fraction"]) - clipped) < 1e-12 and 0.05 < clipped < 0.45
    assert abs(float(stats["kl"]) - kl) < 1e-12 if beta else "kl" not in stats


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_gradient_by_finite_differences(beta):
    logps, old, ref, A, mask = numbers(1)
    rest = (old, ref if beta else None, A, mask, 0.2, beta, mask.sum())
    _, gradient, _ = grad_of(logps, *rest)
    steps = 1e-6 * torch.eye(logps.numel(), dtype=torch.float64).view(-1, *logps.shape)  # one entry at a time
    moved = torch.vmap(lambda step: diffu_grpo_loss(logps + step, *rest)[0])
    assert worst((moved(steps) - moved(-steps)) / 2e-6, gradient.flatten()) < 1e-8
    skipped = ~mask[:, None].expand_as(logps)
    assert (gradient[skipped] == 0).all() and (gradient[~skipped] != 0).sum() > 40


def test_micro_batches_add_up():
    logps, old, ref, A, mask = numbers(2)
    whole, gradient, stats = grad_of(logps, old, ref, A, mask, 0.2, 0.1, mask.sum())
    parts = [grad_of(logps[i:i + 1], old[i:i + 1], ref[i:i + 1], A[i:i + 1], mask[i:i + 1], 0.2, 0.1, mask.sum())
             for i in range(N)]
    assert abs(sum(p[0] for p in parts) - whole) < 1e-14
    assert worst(torch.cat([p[1] for p in parts]), gradient) < 1e-16
    for key in ("kl", "clip_fraction"):
        assert abs(sum(p[2][key] for p in parts) - stats[key]) < 1e-14
    assert max(p[2]["max_log_ratio"] for p in parts) == stats["max_log_ratio"]


def test_kl_is_zero_at_the_reference_and_positive_elsewhere():
    logps, _, ref, _, _ = numbers(3)
    assert (kl_k3(logps, logps) == 0).all() and (kl_k3(logps, ref) > 0).all()
    every = torch.ones(N, G, L, dtype=torch.bool)
    loss, gradient, stats = grad_of(logps, logps, logps, torch.zeros(N, G), every, 0.2, 9.0, 1)
    assert loss == 0 and stats["kl"] == 0 and (gradient == 0).all()


def test_equal_rewards_give_no_loss():
    logps, old, _, _, mask = numbers(4)
    A = group_advantages(torch.full((N, G), 0.5, dtype=torch.float64))
    for old_logps in (old, logps, old - 1000):
        loss, gradient, _ = grad_of(logps, old_logps, None, A, mask, 0.2, 0.0, mask.sum())
        assert loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [80.0, 200.0, 1e4, float("inf")])
def test_huge_log_ratio_at_a_token_that_does_not_count(size, dtype):
    logps, old, ref, A, mask = (x.to(dtype) if x.is_floating_point() else x for x in numbers(5))
    quiet = grad_of(logps, old, ref, A, mask, 0.2, 0.1, mask.sum())
    skipped = ~mask[:, None].expand_as(logps)
    for sign in (-1, 1):
        far_old, far_ref = old.masked_fill(skipped, sign * size), ref.masked_fill(skipped, -sign * size)
        loud = grad_of(logps, far_old, far_ref, A, mask, 0.2, 0.1, mask.sum())
        assert loud[0] == quiet[0] and torch.equal(loud[1], quiet[1]) and loud[2] == quiet[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [80.0, 200.0, 1e4])
@pytest.mark.parametrize("advantage, sign, objective", [  # min(rho A, clip(rho) A) at epsilon 0.2; None: unbounded
    (1, 1, 1.2), (1, -1, 0.0), (0, 1, 0.0), (0, -1, 0.0), (-1, -1, -0.8), (-1, 1, None)])
def test_huge_log_ratio_at_a_token_that_counts(size, dtype, advantage, sign, objective):
    A, mask = torch.full((1, 1), advantage, dtype=dtype), torch.ones(1, 1, 2, dtype=torch.bool)
    logps = torch.tensor([-1.0, -2.0], dtype=dtype).view(1, 1, 1, 2)
    old = logps - torch.tensor([sign * size, 0.0], dtype=dtype)
    loss, gradient, stats = grad_of(logps, old, None, A, mask, 0.2, 0.0, 2)
    assert not gradient.isnan().any() and stats["max_log_ratio"] == size
    assert abs(gradient[..., 1] + advantage / 2) < 1e-6  # the other token is trained as ever
    if objective is None:
        assert loss > 1e30  # nobody overlooks it
    else:
        assert abs(loss + (objective + advantage) / 2) < 1e-6 and abs(gradient[..., 0]) < 1e-6
    # the policy as far from its reference: the penalty is finite, or Inf and so noticed
    loss, gradient, stats = grad_of(logps, logps, old, A, mask, 0.2, 0.04, 2)
    assert not loss.isnan() and not gradient.isnan().any() and stats["kl"] > 30


def test_inputs_are_not_changed_in_place():
    inputs = numbers(6)
    copies = [x.clone() for x in inputs]
    logps, old, ref, A, mask = inputs
    diffu_grpo_loss(logps, old, ref, A, mask, 0.2, 0.1, mask.sum())
    prompt, masked, completions = batch()
    kept = prompt.clone(), masked.clone(), completions.clone()
    one_step_logps(reference("llada_mha"), prompt, masked, completions, MASK_ID)
    assert all(map(torch.equal, inputs, copies)) and all(map(torch.equal, (prompt, masked, completions), kept))


# ---------------------------------------------------------------- randomness

def test_generator_is_a_function_of_its_key():
    keys = [(0,), (1,), (-1,), ("0",), (0, 0), (0, 1), (1, 0), (1, 12), (11, 2), (0, 0, 0), (0, "x"), (2 ** 70, 1)]
    draws = [tuple(torch.rand(4, generator=generator(*key)).tolist()) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [tuple(torch.rand(4, generator=generator(*key)).tolist()) for key in keys]
    assert draws[0] == tuple(torch.rand(4, generator=generator(0, device="cpu")).tolist())
    many = torch.cat([torch.rand(1, generator=generator(0, "row", i)) for i in range(2000)])
    assert abs(many.mean() - 0.5) < 5 * (1 / 12 / 2000) ** 0.5  # neighbouring keys, unrelated numbers


def test_the_global_random_state_is_never_touched():
    before = torch.get_rng_state()
    logps, old, ref, A, mask = numbers()
    prompt, masked, completions = batch()
    one_step_logps(reference("llada_mha"), prompt, masked, completions, MASK_ID)
    every = torch.ones_like(prompt, dtype=torch.bool)
    forward_process(prompt, torch.full((N,), 0.5), every, MASK_ID, generator(1))
    grad_of(logps, old, ref, group_advantages(A), completion_mask(completions, EOS_ID), 0.2, 0.1, 9)
    sft_loss(torch.zeros(N * P, 512), prompt, every, torch.ones(N), every)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)  # and nothing reads it
    one = numbers(0)[0]
    torch.manual_seed(2)
    assert torch.equal(one, numbers(0)[0])
