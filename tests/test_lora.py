"""lora.py: adapters in the model, and their files beside PEFT itself. tests/test_merge.py folds them in."""
import pytest
import torch
from helpers import GOLDEN, generator, worst
from safetensors.torch import load_file

from lora import (ADAPTER, LORA_TARGETS, adapters_off, add_lora, init_lora, load_trained, lora_modules,
                  save_trained)
from model import LLaDA

IDS = torch.randint(480, (2, 11), generator=generator(5))


def add_adapters(model, targets=LORA_TARGETS):
    """Adapters that change the model: B is not zero."""
    init_lora(add_lora(model, 4, 6, targets), generator())
    for name, module in lora_modules(model).items():
        module.lora_B.data.normal_(0, 0.1, generator=generator(len(name)))
    return model


# ---------------------------------------------------------------- in the model

@torch.no_grad()
def test_lora_starts_at_the_base_and_trains_only_itself(fresh):
    base_logits, state = fresh(IDS), torch.get_rng_state()
    init_lora(add_lora(fresh, 4, 6, ["ff_out", "q_proj"]), generator())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(fresh(IDS), base_logits)
    trained = [name for name, p in fresh.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2 and all(".lora_" in name for name in trained)
    module = fresh.blocks[0].ff_out
    assert module.lora_A.shape == (4, 176) and module.lora_B.shape == (64, 4)
    drawn = module.lora_A * 176 ** 0.5  # PEFT's start: uniform in +- 1 / sqrt(in)
    assert -1 <= drawn.min() < -0.9 and 0.9 < drawn.max() <= 1


@torch.no_grad()
def test_adapters_off_is_the_base_exactly_and_ends_with_the_context(fresh):
    base_logits = fresh(IDS)
    adapted_logits = add_adapters(fresh)(IDS)
    assert worst(adapted_logits, base_logits) > 0.1
    with pytest.raises(KeyError), adapters_off(fresh):
        assert torch.equal(fresh(IDS), base_logits)
        raise KeyError
    assert torch.equal(fresh(IDS), adapted_logits)


def test_adapters_of_a_bfloat16_base_are_float32_and_get_the_gradient():
    model = add_adapters(LLaDA.from_pretrained(GOLDEN / "llada_mha", dtype=torch.bfloat16))
    loss = model(IDS).square().mean()
    loss.backward()
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16)
        assert (p.grad is not None and p.grad.abs().max() > 0) == (".lora_" in name), name
    assert loss.dtype == torch.bfloat16


@pytest.mark.parametrize("targets", [["q_proj", "gate_proj"], []])
def test_wrong_targets_are_refused(targets, fresh):
    with pytest.raises(SystemExit, match=r"^error: --lora_targets [^\n]*choose some of [^\n]*q_proj[^\n]*$"):
        add_lora(fresh, 4, 8, targets)


# ---------------------------------------------------------------- files

@pytest.mark.parametrize("targets", [["v_proj", "q_proj", "v_proj"], ["ff_out"], LORA_TARGETS])
@torch.no_grad()
def test_peft_reads_our_adapter_and_we_read_theirs(targets, fresh, tmp_path):
    peft = pytest.importorskip("peft")
    adapted_logits = add_adapters(fresh, targets)(IDS)
    save_trained(fresh, tmp_path, "base")
    base, again = (LLaDA.from_pretrained(GOLDEN / "llada_mha", dtype=torch.float64) for _ in range(2))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    assert worst(theirs.base_model.model(IDS), adapted_logits) < 1e-10
    assert peft.get_peft_model_state_dict(theirs).keys() == load_file(tmp_path / ADAPTER).keys()
    base.config = {}  # PEFT looks the name of the base up in it
    theirs.save_pretrained(tmp_path / "theirs")
    load_trained(add_lora(again, 4, 6, targets), tmp_path / "theirs")
    assert worst(again(IDS), adapted_logits) < 1e-10


@pytest.mark.parametrize("adapted", [False, True])
@torch.no_grad()
def test_what_was_trained_is_saved_and_loaded(adapted, fresh, tmp_path):
    other = LLaDA.from_pretrained(GOLDEN / "llada_mha", dtype=torch.float64)
    if adapted:
        add_adapters(fresh)
        add_lora(other, 4, 6, LORA_TARGETS)
    else:
        fresh.model["transformer"]["ln_f"].weight.mul_(2)
    save_trained(fresh, tmp_path, "base")
    assert (tmp_path / ADAPTER).exists() == adapted
    load_trained(other, tmp_path)
    assert torch.equal(other(IDS), fresh(IDS))
    assert all(p.requires_grad == (not adapted or ".lora_" in name) for name, p in other.named_parameters())


@pytest.mark.parametrize("name, r, targets, words", [
    ("llada_mha", 2, ["v_proj"], r"v_proj.lora_A.weight is \[4, 64\], the model needs \[2, 64\]"),
    ("llada_mha", 4, ["v_proj", "k_proj"], "k_proj.lora_A.weight is missing"),
    ("llada_gqa", 4, ["v_proj"], r"v_proj.lora_B.weight is \[64, 4\], the model needs \[32, 4\]")])
def test_adapters_of_another_form_are_refused_in_one_line(name, r, targets, words, fresh, tmp_path):
    save_trained(add_adapters(fresh, ["v_proj"]), tmp_path, "base")
    model = add_lora(LLaDA.from_pretrained(GOLDEN / name), r, 6, targets)
    with pytest.raises(SystemExit, match=rf"^error: {tmp_path}: [^\n]*{words}[^\n]*$"):
        load_trained(model, tmp_path)
