"""lora.py: adapters, their files beside PEFT itself, and `python lora.py merge BASE ADAPTER OUT`."""
import json
import shutil

import pytest
import torch
from helpers import GOLDEN, generator, reference_model, worst
from safetensors.torch import load_file, save_file

import lora
import weights
from lora import (ADAPTER, LORA_TARGETS, adapters_off, add_lora, attach_adapter, init_lora, load_trained, lora_modules,
                  merge, save_adapter, save_trained)
from model import LLaDA
from weights import save_weights

IDS = torch.randint(480, (2, 11), generator=generator(5))


def add_adapters(model, targets=LORA_TARGETS, r=4, alpha=6, seed=0):
    """Adapters that change the model: B is not zero."""
    init_lora(add_lora(model, r, alpha, targets), generator(seed))
    for name, module in lora_modules(model).items():
        module.lora_B.data.normal_(0, 0.1, generator=generator(len(name) + seed))
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


@pytest.mark.parametrize("r, targets", [(4, ["q_proj", "gate_proj"]), (4, []), (0, ["q_proj"])])
def test_wrong_options_are_refused(r, targets, fresh):
    with pytest.raises(SystemExit, match=r"^error: --lora_targets [^\n]*rank [^\n]*some of q_proj[^\n]*$"):
        add_lora(fresh, r, 8, targets)


# ---------------------------------------------------------------- files

@pytest.mark.parametrize("targets", [["v_proj", "q_proj", "v_proj"], ["ff_out"], LORA_TARGETS])
@torch.no_grad()
def test_peft_reads_our_adapter_and_we_read_theirs(targets, fresh, tmp_path):
    peft = pytest.importorskip("peft")
    adapted_logits = add_adapters(fresh, targets)(IDS)
    save_adapter(fresh, tmp_path)
    base, again = (LLaDA.from_pretrained(GOLDEN / "llada_mha", dtype=torch.float64) for _ in range(2))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    assert worst(theirs.base_model.model(IDS), adapted_logits) < 1e-10
    assert peft.get_peft_model_state_dict(theirs).keys() == load_file(tmp_path / ADAPTER).keys()
    theirs.save_pretrained(tmp_path / "theirs")
    assert worst(attach_adapter(again, tmp_path / "theirs")(IDS), adapted_logits) < 1e-10


@pytest.mark.parametrize("adapted", [False, True])
@torch.no_grad()
def test_what_was_trained_is_saved_and_loaded(adapted, fresh, tmp_path):
    other = LLaDA.from_pretrained(GOLDEN / "llada_mha", dtype=torch.float64)
    if adapted:
        add_adapters(fresh)
        add_lora(other, 4, 6, LORA_TARGETS)
    else:
        fresh.model["transformer"]["ln_f"].weight.mul_(2)
    save_trained(fresh, tmp_path)
    assert (tmp_path / ADAPTER).exists() == adapted
    load_trained(other, tmp_path)
    assert torch.equal(other(IDS), fresh(IDS))
    assert all(p.requires_grad == (not adapted or ".lora_" in name) for name, p in other.named_parameters())


def set_config(**changed):
    def damage(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return damage


def set_tensors(change):
    """`change` gets a name and a tensor and gives a dict of what is stored instead."""
    def damage(folder):
        changed = [change(name, tensor) for name, tensor in load_file(folder / ADAPTER).items()]
        save_file({name: tensor for row in changed for name, tensor in row.items()}, folder / ADAPTER)
    return damage


ADAPTER_FAULTS = {  # name: (what happens to an adapter of rank 4, words of the message)
    "rank": (set_config(r=8), r"q_proj.lora_A.weight is float \[4, 64\], .* \[8, 64\]|k_proj.lora_A"),
    "more blocks": (set_tensors(lambda k, v: {k: v, k.replace("blocks.1", "blocks.7"): v.clone()}), "blocks.7"),
    "fewer blocks": (set_tensors(lambda k, v: {k: v} if "blocks.0" in k else {}), "blocks.1.* is missing"),
    "the head": (set_tensors(lambda k, v: {k: v, k.replace("blocks.1.q_proj", "ff_out"): v.clone()}), "ff_out"),
    "no LoRA": (set_tensors(lambda k, v: {"x": torch.ones(1)}), "holds no adapter"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json"),
    "no tensors": (lambda f: (f / ADAPTER).unlink(), ADAPTER),
    "no rank": (set_config(r=None), "r = None"),
    "NaN": (set_config(lora_alpha=float("nan")), "lora_alpha = nan"),
    **{f"{key}": (set_config(**{key: value}), f"{key} = .* is not supported") for key, value in [
        ("use_rslora", True), ("use_dora", True), ("alpha_pattern", {"q_proj": 3}), ("fan_in_fan_out", True),
        ("peft_type", "IA3"), ("init_lora_weights", "pissa_niter_4")]},
}


@pytest.mark.parametrize("name", ADAPTER_FAULTS)
def test_a_damaged_adapter_is_refused_in_one_line(name, fresh, tmp_path):
    damage, words = ADAPTER_FAULTS[name]
    save_adapter(add_adapters(fresh, ["q_proj", "k_proj"]), tmp_path)
    damage(tmp_path)
    with pytest.raises(SystemExit, match=rf"^error: {tmp_path}[^\n]*({words})[^\n]*$"):
        attach_adapter(LLaDA.from_pretrained(GOLDEN / "llada_mha"), tmp_path)


def test_an_adapter_of_another_base_is_refused(fresh, tmp_path):
    save_adapter(add_adapters(fresh, ["v_proj"]), tmp_path)
    with pytest.raises(SystemExit, match=r"v_proj.lora_B.weight is float \[64, 4\], the model needs float \[32, 4\]"):
        attach_adapter(LLaDA.from_pretrained(GOLDEN / "llada_gqa"), tmp_path)


def test_other_options_than_the_adapters_are_refused(fresh, tmp_path):
    save_adapter(add_adapters(fresh, ["q_proj"]), tmp_path)
    for r, alpha, targets, words in ((2, 6, ["q_proj"], "--lora_r 4 --lora_alpha 6, the options say 2 and 6"),
                                     (4, 12, ["q_proj"], "--lora_r 4 --lora_alpha 6, the options say 4 and 12"),
                                     (4, 6, ["q_proj", "k_proj"], "k_proj.lora_A.weight is missing")):
        model = add_lora(LLaDA.from_pretrained(GOLDEN / "llada_mha"), r, alpha, targets)
        with pytest.raises(SystemExit, match=words):
            load_trained(model, tmp_path)


# ---------------------------------------------------------------- merge

@pytest.fixture
def base(tmp_path, monkeypatch):
    """A base in float32 and several shards, with files of a standard loader beside it."""
    folder = tmp_path / "base"
    with monkeypatch.context() as patch:
        patch.setattr(weights, "MAX_SHARD_BYTES", 150_000)
        save_weights(reference_model("llada_mha"), folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "modeling_llada.py"):
        (folder / name).write_text(f"{name} of the base")
    (folder / "optimizer.safetensors").write_text("no part of the model")
    return folder


def save_adapted(base, folder, seed=0):
    """Save an adapter of `base`. Returns the adapted model."""
    model = add_adapters(LLaDA.from_pretrained(base), ["q_proj", "up_proj", "ff_out"], seed=seed)
    save_adapter(model, folder, base=base)
    return model


@torch.no_grad()
def test_merge_gives_the_adapted_logits_in_the_layout_of_the_base(base, tmp_path, capsys):
    adapted, adapter, out = save_adapted(base, tmp_path / "adapter"), tmp_path / "adapter", tmp_path / "out"
    lora.main(["merge", str(base), str(adapter), str(out)])
    merged = LLaDA.from_pretrained(out)
    assert worst(merged(IDS), adapted(IDS)) < 1e-4
    assert worst(merged(IDS), reference_model("llada_mha")(IDS)) > 0.1
    assert [row["adapter"] for row in json.loads((out / "merged.json").read_text())] == [str(adapter)]
    expected = {path.name for path in base.iterdir()} - {"optimizer.safetensors"} | {"merged.json"}
    assert {path.name for path in out.iterdir()} == expected
    for name in expected - {"merged.json"}:
        if not name.endswith(".safetensors"):
            assert (out / name).read_bytes() == (base / name).read_bytes()
            continue
        before, after = load_file(base / name), load_file(out / name)
        assert before.keys() == after.keys()
        for key in before:
            is_adapted = ".blocks." in key and any(f".{t}." in key for t in ("q_proj", "up_proj", "ff_out"))
            assert torch.equal(before[key], after[key]) != is_adapted, key
    assert "note:" not in capsys.readouterr().err


@torch.no_grad()
def test_merge_rounds_once(tmp_path):
    shutil.copytree(GOLDEN / "llada_mha", tmp_path / "base")  # bfloat16
    module = save_adapted(tmp_path / "base", tmp_path / "adapter").blocks[0].up_proj
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    exact = module.weight.double() + 6 / 4 * module.lora_B.double() @ module.lora_A.double()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    name = "model.transformer.blocks.0.up_proj.weight"
    merged = load_file(tmp_path / "out" / index["weight_map"][name])[name]
    assert merged.dtype == torch.bfloat16
    assert ((merged.double() - exact).abs() <= exact.abs() * 2 ** -8).all()


def test_merging_an_adapter_twice_is_refused_and_another_one_is_not(base, tmp_path, capsys):
    for seed in (0, 1):
        save_adapted(base, tmp_path / f"adapter{seed}", seed)
    merge(base, tmp_path / "adapter0", tmp_path / "out")
    with pytest.raises(SystemExit, match=r"^error: [^\n]*out: [^\n]*adapter0 is merged into it already[^\n]*$"):
        merge(tmp_path / "out", tmp_path / "adapter0", tmp_path / "twice")
    with pytest.raises(SystemExit, match=r"^error: [^\n]*out [^\n]*exists already[^\n]*$"):
        merge(base, tmp_path / "adapter0", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter0", "adapter1", "out"}
    assert "note:" not in capsys.readouterr().err
    merge(tmp_path / "out", tmp_path / "adapter1", tmp_path / "both")
    assert len(json.loads((tmp_path / "both" / "merged.json").read_text())) == 2
    assert f"says it was trained on {base}" in capsys.readouterr().err


def test_a_whole_model_takes_the_files_and_dtypes_of_its_base(fresh, tmp_path):
    shutil.copytree(GOLDEN / "llada_mha", tmp_path / "base")  # bfloat16, two shards
    for p in fresh.parameters():
        p.data += 1e-3
    save_weights(fresh, tmp_path / "trained")  # one file
    merge(tmp_path / "base", tmp_path / "trained", tmp_path / "out")
    for path in (tmp_path / "base").glob("model-*.safetensors"):
        stored = load_file(tmp_path / "out" / path.name)
        assert stored.keys() == load_file(path).keys()
        assert all(torch.equal(t, fresh.get_parameter(k).bfloat16()) for k, t in stored.items())


def test_merge_into_another_base_is_refused_before_it_writes(base, tmp_path):
    save_adapter(add_adapters(LLaDA.from_pretrained(base), ["k_proj"]), tmp_path / "adapter")
    with pytest.raises(SystemExit, match=r"^error: [^\n]*adapter: [^\n]*k_proj[^\n]*the model needs[^\n]*$"):
        merge(GOLDEN / "llada_gqa", tmp_path / "adapter", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_an_adapter_is_no_model(base, tmp_path):
    save_adapted(base, tmp_path / "adapter")
    adapter = tmp_path / "adapter"
    command = f"python lora.py merge {base} {adapter} OUT"
    with pytest.raises(SystemExit, match=rf"^error: --model {adapter} is an adapter[^\n]*{command}[^\n]*$"):
        LLaDA.from_pretrained(adapter)
