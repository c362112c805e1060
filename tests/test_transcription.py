"""tools/transcription.py, which speed is measured against, itself against the reference tensors."""
import json

import pytest
import torch
from helpers import EOS_ID, GOLDEN, MASK_ID, reference_model, tensors, worst

from d1 import completion_mask
from tools import transcription

CASES = json.loads((GOLDEN / "sampler/cases.json").read_text())
META = json.loads((GOLDEN / "grpo/meta.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_every_step_of_the_sampler_equals_the_reference(name):
    data, case, model = tensors("sampler/sampler.safetensors"), CASES[name], reference_model(CASES[name]["model"])
    bias, noise, mask = (data.get(f"{name}.{key}") for key in ("logit_bias", "noise", "attention_mask"))
    draws = iter(() if noise is None else noise)
    history = transcription.sample(
        lambda ids, attn_mask: model(ids, attn_mask) + (0 if bias is None else bias), data[f"{name}.prompt"],
        mask_id=case["mask_id"], gen_length=case["gen_length"], diffusion_steps=case["steps"],
        block_length=case["block_length"], temperature=case["temperature"], cfg_scale=case["cfg_scale"],
        attn_mask=None if mask is None else mask.bool(), remasking=case["remasking"],
        forbid=[case["eos_id"]] if case["logits_eos_inf"] else (),
        commit_last=[case["eos_id"], case["eot_id"]] if case["confidence_eos_eot_inf"] else (),
        uniform=lambda *shape: next(draws).clone())
    assert torch.equal(history, data[f"{name}.history"])


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.0])
def test_gumbel_noise_equals_the_reference(temperature):
    data = tensors("sampler/gumbel.safetensors")
    chosen = transcription.gumbel_argmax(data["logits"], temperature, data["noise"])
    assert torch.equal(chosen, data[f"t{temperature}.argmax"])


@pytest.mark.parametrize("case", [name for name, meta in META["cases"].items() if not meta["cfg_scale"]])
@torch.no_grad()
def test_log_probabilities_and_losses_equal_the_reference(case):
    data, meta = tensors("grpo/grpo.safetensors"), META["cases"][case]
    model = reference_model("llada_mha", torch.float64)
    k, completions = data["mask_seeds"].tolist().index(meta["mask_seed"]), data["completion_ids"]
    logps = transcription.log_probs(model, data["prompt_ids"], data["is_mask_prompt"][k], completions, MASK_ID)
    assert worst(logps, data["cfg0.policy_logps_f64"][k]) < 1e-10
    old, ref = (data[f"cfg0.{name}_logps"][k].double() for name in ("old", "ref"))
    if meta["num_iterations"] == 1:
        old = logps
    loss = transcription.grpo_loss(logps, old, ref, data["advantages"].double(), completion_mask(completions, EOS_ID),
                                   meta["epsilon"], meta["beta"])
    assert worst(loss.view(1), data[f"{case}.loss_f64"]) < 1e-10
