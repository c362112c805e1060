"""The transcription that speed is measured against, itself against the reference tensors; then ours against it."""
from contextlib import nullcontext

import pytest
import torch
from conftest import golden, reference, tensors, worst
from test_d1 import BOTH, EOS_ID, MASK_ID, META, check_gradients

import train_grpo
import transcription
from d1 import completion_mask
from model import LLaDA
from parallel import Processes
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


def test_our_update_phase_under_the_same_masks():
    """With a mask for every completion (N x G prompts, G = 1) ours gives the transcription's losses and weights."""
    data, models = tensors("grpo/grpo.safetensors"), [LLaDA.from_pretrained(golden("llada_mha")) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    prompt, completions, masked = data["prompt_ids"], data["completion_ids"], data["is_mask_prompt"]
    mask, frozen = completion_mask(completions, EOS_ID), reference("llada_mha")
    args = train_grpo.parse_args(["--task", "countdown"])
    want = transcription.update_phase(
        models[0], lambda: nullcontext(frozen), optimizers[0], prompt, masked, completions, data["advantages"], mask,
        MASK_ID, epsilon=args.epsilon, beta=args.beta, grad_clip=args.grad_clip)
    rollout = train_grpo.Rollout(prompt, None, masked.transpose(0, 1)[:, :, None], completions[:, None],
                                 mask[:, None, None, None].expand(-1, 4, -1, -1, -1), data["advantages"][:, None],
                                 [int(mask.sum())] * 4)
    parts = [slice(0, 4), slice(4, 6)]
    train_grpo.score(models[1], lambda: nullcontext(frozen), rollout, parts, args, MASK_ID)
    got = [train_grpo.update_policy(0, m, models[1], optimizers[1], rollout, parts, args,
                                    Processes(0, 1, torch.device("cpu")), MASK_ID)["loss"] for m in range(4)]
    assert got == pytest.approx(want, abs=1e-5) and len(set(want)) == 4
    for one, two in zip(models[0].parameters(), models[1].parameters()):
        assert worst(two.detach(), one.detach()) < 1e-5
