"""The transcription that speed is measured against, itself against the reference tensors; then ours against it."""
import copy
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT, golden, reference, tensors, worst
from test_d1 import BOTH, EOS_ID, MASK_ID, META, check_gradients

import train_grpo
import transcription
from d1 import completion_mask, draw_indices
from data import TASKS
from data.tokenizer import Tokenizer
from model import LLaDA
from parallel import Processes, Signals
from sample import pad_left
from test_sample import CASES, Biased

SAMPLER = "sampler/sampler.safetensors"


@pytest.mark.parametrize("name", CASES)
def test_every_step_of_the_sampler(name):
    data, case, model = tensors(SAMPLER), CASES[name], reference(CASES[name]["model"])
    if f"{name}.logit_bias" in data:
        model = Biased(model, data[f"{name}.logit_bias"])
    noise, mask = iter(data.get(f"{name}.noise", ())), data.get(f"{name}.attention_mask")
    history = transcription.sample(
        model, data[f"{name}.prompt"], mask_id=case["mask_id"], gen_length=case["gen_length"],
        diffusion_steps=case["steps"], block_length=case["block_length"], temperature=case["temperature"],
        attn_mask=None if mask is None else mask.bool(), cfg_scale=case["cfg_scale"], remasking=case["remasking"],
        forbid=[case["eos_id"]] if case["logits_eos_inf"] else (),
        commit_last=[case["eos_id"], case["eot_id"]] if case["confidence_eos_eot_inf"] else (),
        uniform=lambda *shape: next(noise).clone())
    assert torch.equal(history, data[f"{name}.history"])


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.0])
def test_gumbel_noise(temperature):
    data = tensors("sampler/gumbel.safetensors")
    found = transcription.gumbel_argmax(data["logits"], temperature, data["noise"])
    assert torch.equal(found, data[f"t{temperature}.argmax"])


@pytest.mark.parametrize("case", [name for name, meta in META["cases"].items() if not meta["cfg_scale"]])
@pytest.mark.parametrize("dtype, suffix", BOTH)
def test_log_probs_loss_and_gradients(case, dtype, suffix):
    data, meta = tensors("grpo/grpo.safetensors"), META["cases"][case]
    net = LLaDA.from_pretrained(golden("llada_mha"), dtype=dtype)
    k = data["mask_seeds"].tolist().index(meta["mask_seed"])
    completions = data["completion_ids"]
    logps = transcription.log_probs(net, data["prompt_ids"], data["is_mask_prompt"][k], completions, MASK_ID)
    assert worst(logps.detach(), data[f"cfg0.policy_logps{suffix}"][k]) < (1e-10 if suffix else 2e-4)
    old = logps.detach() if meta["num_iterations"] == 1 else data["cfg0.old_logps"][k].to(dtype)
    ref = data["cfg0.ref_logps"][k].to(dtype) if meta["beta"] else None
    loss = transcription.grpo_loss(logps, old, ref, data["advantages"].to(dtype), completion_mask(completions, EOS_ID),
                                   meta["epsilon"], meta["beta"])
    assert worst(loss.detach().view(1), data[f"{case}.loss{suffix}"]) < (1e-10 if suffix else 1e-5)
    loss.backward()
    check_gradients(net, data, f"{case}.grad{suffix}.", 1e-10 if suffix else 1e-4)


def perturbed(model):
    """A reference policy that is not the policy to begin with."""
    frozen, g = copy.deepcopy(model).requires_grad_(False), torch.Generator().manual_seed(0)
    for p in frozen.parameters():
        p.add_(0.02 * torch.randn(p.shape, generator=g))
    return lambda: nullcontext(frozen)


def same_weights(one, two):
    return all(worst(b.detach(), a.detach()) < 1e-5 for a, b in zip(one.parameters(), two.parameters()))


@pytest.mark.parametrize("shared", [False, True])
def test_our_update_phase_under_the_same_masks(shared):
    """Ours gives the transcription's losses and weights after four updates, in either layout.

    Not shared: a mask for every completion, six prompts with G = 1. Shared: two prompts with G = 3 and K = 2 masks,
    which are twelve rows of the transcription.
    """
    data, models = tensors("grpo/grpo.safetensors"), [LLaDA.from_pretrained(golden("llada_mha")) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    N, K, G = (2, 2, 3) if shared else (6, 1, 1)
    prompt = data["prompt_ids"].view(N, G, -1)[:, 0]  # those of a group are alike
    prompt_masked = data["is_mask_prompt"].view(4, N, G, -1)[:, :, :K].transpose(0, 1)  # (N, mu, K, P)
    completions, advantages = data["completion_ids"].view(N, G, -1), data["advantages"].view(N, G)
    mask, frozen = completion_mask(completions, EOS_ID), perturbed(models[0])
    rows = [x[:, None].expand(N, K, G, *x.shape[2:]).flatten(0, 2) for x in (completions, advantages, mask)]
    args = train_grpo.parse_args(["--task", "countdown"])
    want = transcription.update_phase(
        models[0], frozen, optimizers[0], prompt.repeat_interleave(K * G, 0),
        prompt_masked.transpose(0, 1).flatten(1, 2).repeat_interleave(G, 1), *rows, MASK_ID,
        epsilon=args.epsilon, beta=args.beta, grad_clip=args.grad_clip)
    rollout = train_grpo.Rollout(prompt, None, prompt_masked, completions,
                                 mask[:, None, None].expand(-1, 4, -1, -1, -1), advantages, [int(mask.sum())] * 4)
    parts = [slice(0, 1), slice(1, N)]
    train_grpo.score(models[1], frozen, rollout, parts, args, MASK_ID)
    got = [train_grpo.update_policy(0, m, models[1], optimizers[1], rollout, parts, args,
                                    Processes(0, 1, torch.device("cpu")), MASK_ID)["loss"] for m in range(4)]
    assert got == pytest.approx(want, abs=1e-5) and len(set(want)) == 4
    assert same_weights(*models)


def test_our_step_with_the_same_completions_and_masks(monkeypatch):
    """What train_step makes of a rollout, rewards, advantages and mu updates, is what the transcription makes of it."""
    seen, procs = {}, Processes(0, 1, torch.device("cpu"))

    def spy(name):
        work = getattr(train_grpo, name)
        monkeypatch.setattr(train_grpo, name, lambda *a, **options: seen.setdefault(name, work(*a, **options)))

    def reward(text, example):
        return {"letters": sum(map(ord, text)) % 7 / 7, "words": float(len(text.split()))}

    spy("complete"), spy("draw_prompt_masks")
    monkeypatch.setattr(TASKS["countdown"], "reward", reward)
    models = [LLaDA.from_pretrained(ROOT / "data/tiny").eval() for _ in range(2)]
    optimizers, frozen = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models], perturbed(models[0])
    tokenizer = Tokenizer.from_folder(ROOT / "data/tiny", models[0].config)
    examples = TASKS["countdown"].load("train", count=4)
    for i, example in enumerate(examples):  # prompts of different lengths
        example["ids"] = tokenizer.encode_prompt(example["prompt"])[i:]
    args = train_grpo.parse_args(
        "--task countdown --prompts_per_step 3 --group_size 2 --num_iterations 2 --microbatch 2 --gen_length 8 "
        "--diffusion_steps 8 --block_length 8 --rollout_batch 6 --temperature 3".split())
    train_grpo.train_step(0, models[1], frozen, optimizers[1], tokenizer, examples, args, procs, Signals(procs))
    batch = [examples[i] for i in draw_indices(4, 0, 3, args.seed) for _ in range(2)]
    rewards = [sum(reward(text, None).values()) for text in seen["complete"].texts]
    advantages = [a - (rewards[i // 2 * 2] + rewards[i // 2 * 2 + 1]) / 2 for i, a in enumerate(rewards)]
    prompt, attn_mask = pad_left([e["ids"] for e in batch], tokenizer.eos_id, procs.device)
    masked = seen["draw_prompt_masks"][:, :, 0].transpose(0, 1).repeat_interleave(2, 1)  # (mu, R, P)
    completions = seen["complete"].ids
    transcription.update_phase(
        models[0], frozen, optimizers[0], prompt, masked, completions, torch.tensor(advantages),
        completion_mask(completions, tokenizer.eos_id), tokenizer.mask_id, epsilon=args.epsilon, beta=args.beta,
        grad_clip=args.grad_clip, attn_mask=attn_mask)
    assert any(advantages) and same_weights(*models)
    assert not same_weights(models[0], LLaDA.from_pretrained(ROOT / "data/tiny"))
