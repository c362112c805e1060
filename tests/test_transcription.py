"""The transcription that speed is measured against, itself against the reference tensors; then ours against it."""

import pytest
import torch
from conftest import golden, reference, tensors, worst
from test_d1 import BOTH, EOS_ID, MASK_ID, META, check_gradients

import transcription
from d1 import completion_mask
from model import LLaDA
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
