"""tools/merge.py: adapters, ours and PEFT's, and whole models folded into their base; what is refused."""
import functools
import json
import os
import shutil
import stat

import huggingface_hub
import pytest
import torch
from helpers import GOLDEN, generator, reference_model, worst
from safetensors.torch import load_file, save_file

from lora import ADAPTER, add_lora, init_lora, lora_modules, save_trained
from model import LLaDA, save_weights
from tools import merge as merge_file
from tools.merge import merge

IDS = torch.randint(480, (2, 11), generator=generator(5))
SHARDED = GOLDEN / "llada_mha"  # bfloat16, two shards


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A base in float32 and several shards, with files of a standard loader beside it."""
    folder = tmp_path / "base"
    folder.mkdir()
    with monkeypatch.context() as patch:
        small = functools.partial(huggingface_hub.save_torch_state_dict, max_shard_size=150_000)
        patch.setattr(huggingface_hub, "save_torch_state_dict", small)
        save_weights(reference_model("llada_mha"), folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "modeling_llada.py"):
        (folder / name).write_text(f"{name} of the base")
    (folder / "optimizer.safetensors").write_text("no part of the model")
    return folder


def save_adapted(base, folder, targets=("q_proj", "up_proj", "ff_out"), seed=0):
    """Save an adapter of `base` that changes it. Returns the adapted model."""
    model = add_lora(LLaDA.from_pretrained(base), 4, 6, targets)
    init_lora(model, generator(seed))
    for name, module in lora_modules(model).items():
        module.lora_B.data.normal_(0, 0.1, generator=generator(len(name) + seed))
    folder.mkdir()
    save_trained(model, folder, str(base))
    return model


@torch.no_grad()
def test_merging_gives_the_adapted_logits_in_the_layout_of_the_base(base, tmp_path, capsys):
    adapter, out = tmp_path / "adapter", tmp_path / "new" / "out"
    adapted = save_adapted(base, adapter)
    umask = os.umask(0o027)
    try:
        merge_file.main([str(base), str(adapter), str(out)])
    finally:
        os.umask(umask)
    merged = LLaDA.from_pretrained(out)
    assert worst(merged(IDS), adapted(IDS)) < 1e-4
    assert worst(merged(IDS), reference_model("llada_mha")(IDS)) > 0.1
    assert [row["adapter"] for row in json.loads((out / "merged.json").read_text())["merges"]] == [str(adapter)]
    names = {path.name for path in base.iterdir()} - {"optimizer.safetensors"}
    assert {path.name for path in out.iterdir()} == names | {"merged.json"}
    for name in names:
        assert stat.S_IMODE((out / name).stat().st_mode) == 0o640
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
def test_an_adapter_of_peft_is_merged(base, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = save_adapted(base, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(LLaDA.from_pretrained(base), tmp_path / "ours")
    theirs.base_model.model.config = {}  # PEFT looks the name of the base up in it
    theirs.save_pretrained(tmp_path / "theirs")
    merge(base, tmp_path / "theirs", tmp_path / "out")
    assert worst(LLaDA.from_pretrained(tmp_path / "out")(IDS), adapted(IDS)) < 1e-4


@torch.no_grad()
def test_a_merged_weight_is_rounded_once(tmp_path):
    module = save_adapted(SHARDED, tmp_path / "adapter").blocks[0].up_proj  # rank 4, alpha 6
    merge(SHARDED, tmp_path / "adapter", tmp_path / "out")
    exact = module.weight.double() + 6 / 4 * module.lora_B.double() @ module.lora_A.double()
    merged = LLaDA.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).blocks[0].up_proj.weight
    assert ((merged.double() - exact).abs() <= exact.abs() * 2 ** -8).all()


def test_a_whole_model_takes_the_files_and_dtypes_of_its_base(fresh, tmp_path):
    for p in fresh.parameters():
        p.data += 1e-3
    (tmp_path / "trained").mkdir()
    save_weights(fresh, tmp_path / "trained")  # one file, float64
    merge(SHARDED, tmp_path / "trained", tmp_path / "out")
    for path in SHARDED.glob("model-*.safetensors"):
        stored = load_file(tmp_path / "out" / path.name)
        assert stored.keys() == load_file(path).keys()
        assert all(torch.equal(t, fresh.get_parameter(k).bfloat16()) for k, t in stored.items())
    assert json.loads((tmp_path / "out" / "merged.json").read_text())["merges"] == []


# ---------------------------------------------------------------- refused, before anything is written

def test_merging_an_adapter_twice_is_refused_and_another_one_is_not(base, tmp_path, capsys):
    for seed in (0, 1):
        save_adapted(base, tmp_path / f"adapter{seed}", seed=seed)
    merge(base, tmp_path / "adapter0", tmp_path / "out")
    with pytest.raises(SystemExit, match=r"^error: [^\n]*out: [^\n]*adapter0 is merged into it already[^\n]*$"):
        merge(tmp_path / "out", tmp_path / "adapter0", tmp_path / "twice")
    with pytest.raises(SystemExit, match=r"^error: [^\n]*out exists already[^\n]*$"):
        merge(base, tmp_path / "adapter0", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter0", "adapter1", "out"}
    assert "note:" not in capsys.readouterr().err
    merge(tmp_path / "out", tmp_path / "adapter1", tmp_path / "both")
    assert len(json.loads((tmp_path / "both" / "merged.json").read_text())["merges"]) == 2
    assert f"says it was trained on {base}" in capsys.readouterr().err


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


FAULTS = {  # name: (what happens to an adapter of rank 4, words of the message)
    "rank": (set_config(r=8), r"lora_A.weight is \[4, 64\], the model needs \[8, 64\]"),
    "more blocks": (set_tensors(lambda k, v: {k: v, k.replace("blocks.1", "blocks.7"): v.clone()}), "no such tensor"),
    "fewer blocks": (set_tensors(lambda k, v: {k: v} if "blocks.0" in k else {}), "blocks.1.* is missing"),
    "no LoRA": (set_tensors(lambda k, v: {"x": torch.ones(1)}), "holds no adapter"),
    "infinite": (set_tensors(lambda k, v: {k: v / 0}), "NaN, Inf"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json"),
    "no tensors": (lambda folder: (folder / ADAPTER).unlink(), "holds no weights"),
    "no safetensors": (lambda folder: (folder / ADAPTER).write_text("version https://git-lfs"), "git lfs pull"),
    "no rank": (set_config(r=None), "r = None"),
    "NaN": (set_config(lora_alpha=float("nan")), "lora_alpha = nan"),
    "huge": (set_config(lora_alpha=1e40), "lora_alpha = 1e.40"),
    "scaled otherwise": (set_config(use_rslora=True), "use_rslora = True is not supported"),
    "another base": (set_config(init_lora_weights="pissa_niter_4"), "init_lora_weights = 'pissa_niter_4'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_damaged_adapter_is_refused_in_one_line(name, tmp_path):
    damage, words = FAULTS[name]
    save_adapted(SHARDED, tmp_path / "adapter", ["q_proj", "k_proj"])
    damage(tmp_path / "adapter")
    with pytest.raises(SystemExit, match=rf"^error: {tmp_path}[^\n]*({words})[^\n]*$"):
        merge(SHARDED, tmp_path / "adapter", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_model_that_overflows_in_the_dtype_of_its_base_is_refused(fresh, tmp_path):
    shutil.copytree(SHARDED, tmp_path / "base")
    for path in (tmp_path / "base").glob("model-*.safetensors"):
        save_file({key: tensor.half() for key, tensor in load_file(path).items()}, path)
    for p in fresh.parameters():
        p.data *= 1e7  # finite in float64, and more than float16 holds
    (tmp_path / "trained").mkdir()
    save_weights(fresh, tmp_path / "trained")
    with pytest.raises(SystemExit, match=r"^error: [^\n]* overflows with this adapter or model[^\n]*$"):
        merge(tmp_path / "base", tmp_path / "trained", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "trained"}


@pytest.mark.parametrize("text", ["{", "[]", '{"merges": 1}', '{"merges": [{}]}', '{"merges": ["x"]}'])
def test_a_damaged_record_of_merges_is_one_line(base, tmp_path, text):
    save_adapted(base, tmp_path / "adapter")
    (base / "merged.json").write_text(text)
    with pytest.raises(SystemExit, match=r"^error: [^\n]*merged.json: expected [^\n]*$"):
        merge(base, tmp_path / "adapter", tmp_path / "out")


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    save_adapted(base, tmp_path / "adapter", ["k_proj"])
    with pytest.raises(SystemExit, match=r"^error: [^\n]*adapter: [^\n]*k_proj[^\n]*the model needs[^\n]*$"):
        merge(GOLDEN / "llada_gqa", tmp_path / "adapter", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_a_fault_while_writing_leaves_nothing_behind(tmp_path):
    shutil.copytree(SHARDED, tmp_path / "base")
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        tensors = load_file(tmp_path / "base" / name)
        save_file({key: tensor.half() for key, tensor in tensors.items()}, tmp_path / "base" / name)
    save_adapted(tmp_path / "base", tmp_path / "adapter")
    set_tensors(lambda k, v: {k: 1e4 * v})(tmp_path / "adapter")  # the products are more than float16 holds
    with pytest.raises(SystemExit, match=r"^error: [^\n]* overflows with this adapter[^\n]*$"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_links_out_of_the_base_are_not_followed_but_those_of_the_hubs_cache_are(base, tmp_path):
    save_adapted(base, tmp_path / "adapter")
    cached = tmp_path / "hub" / "snapshots" / "1234"
    shutil.copytree(base, cached)
    blobs = tmp_path / "hub" / "blobs"
    blobs.mkdir()
    (cached / "tokenizer.json").rename(blobs / "5678")
    (cached / "tokenizer.json").symlink_to("../../blobs/5678")
    merge(cached, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    (tmp_path / "private").write_text("a key")
    for folder, name in ((base, "special_tokens_map.json"), (base, "merged.json"), (tmp_path / "adapter", "a.json")):
        (folder / name).symlink_to(tmp_path / "private")
        with pytest.raises(SystemExit, match=rf"^error: [^\n]*{name} links to [^\n]*private, outside"):
            merge(base, tmp_path / "adapter", tmp_path / "again")
        assert not (tmp_path / "again").exists()
        (folder / name).unlink()
