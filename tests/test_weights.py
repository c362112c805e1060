"""weights.py: checkpoints in and out, and every fault of a checkpoint folder in one line."""
import json
import os
import shutil
import stat

import pytest
import torch
from helpers import GOLDEN, ROOT, reference_model, tensors
from safetensors.torch import load_file, save_file

import weights
from model import LLaDA
from weights import find_checkpoint, save_weights

SHARD, INDEX = "model-00002-of-00002.safetensors", "model.safetensors.index.json"
UP = "model.transformer.blocks.1.up_proj.weight"  # lies in SHARD


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of a golden checkpoint, two shards in bfloat16, that the test may damage."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "llada_mha", folder, ignore=shutil.ignore_patterns("*cases*", "*intermediates*"))
    return folder


def edit_json(path, change):
    """Change a JSON file in place: `change` gets its object."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(path, change):
    data = load_file(path)
    change(data)
    save_file(data, path)


# ---------------------------------------------------------------- faults

def set_config(**changed):
    return lambda folder: edit_json(folder / "config.json", lambda raw: raw.update(changed))


def set_index(**changed):
    """Change rows of the weight map; None takes one away."""
    def damage(folder):
        def change(index):
            rows = index["weight_map"] | changed
            index["weight_map"] = {name: file for name, file in rows.items() if file is not None}
        edit_json(folder / INDEX, change)
    return damage


def set_tensor(change):
    return lambda folder: edit_tensors(folder / SHARD, lambda data: data.update({UP: change(data[UP])}))


def cut_shard(size):
    return lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:size])


def keep_only_pickles(folder):
    for path in folder.glob("model*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")


FAULTS = {  # number in a list of faults and name: (what happens to a good folder, words of the message)
    "3 no config": (lambda f: (f / "config.json").unlink(), "config.json: expected a JSON object"),
    "4 config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: expected a JSON object"),
    "4 config a list": (lambda f: (f / "config.json").write_text("[1]"), "config.json: expected a JSON object"),
    "5 shape": (set_config(mlp_hidden_size=160), r"0.ff_out.weight is float \[64, 176\], .* float \[64, 160\]"),
    "6 missing": (set_index(**{UP: None}), f"{UP} is missing"),
    "6 many missing": (set_config(n_layers=9), "blocks.2.attn_norm.weight is missing"),
    "7 unexpected": (set_index(bias=SHARD), "tensor bias .* no such tensor"),
    "7 head though tied": (set_config(weight_tying=True), "transformer.ff_out.weight .* no such tensor"),
    "8 shard missing": (lambda f: (f / SHARD).unlink(), f"{SHARD}: .*incomplete download"),
    "9 shard cut": (cut_shard(-100), f"{SHARD}: .*incomplete download"),
    "9 header cut": (cut_shard(100), f"{SHARD}: .*incomplete download"),
    "9 empty": (cut_shard(0), f"{SHARD}: .*incomplete download"),
    "10 LFS pointer": (lambda f: (f / SHARD).write_text("version https://git-lfs"), f"{SHARD}: .*git lfs pull"),
    "11 only pickles": (keep_only_pickles, "model.safetensors: .*pickle .*convert it to safetensors"),
    "11 renamed pickle": (lambda f: torch.save(torch.ones(9), f / SHARD), f"{SHARD}: .*pickle"),
    "12 parent": (set_index(**{UP: f"../{SHARD}"}), f"{INDEX}: .* of {UP} is not a plain"),
    "12 absolute": (set_index(**{UP: f"/{SHARD}"}), f"{INDEX}: .* of {UP} is not a plain"),
    "12 subfolder": (set_index(**{UP: f"a/{SHARD}"}), f"{INDEX}: .* of {UP} is not a plain"),
    "12 number": (set_index(**{UP: 3}), f"{INDEX}: 3 of {UP} is not a plain"),
    "12 no weight map": (lambda f: (f / INDEX).write_text("{}"), f"{INDEX}: no weight_map"),
    "12 a list": (lambda f: (f / INDEX).write_text('{"weight_map": [1]}'), f"{INDEX}: no weight_map"),
    "13 not in its shard": (set_index(**{UP: "model-00001-of-00002.safetensors"}), f"{UP} is not in the file"),
    "14 dtype": (set_tensor(lambda t: t.to(torch.int8)), f"{UP} is I8"),
    "15 NaN": (set_tensor(lambda t: t * float("nan")), f"{SHARD}: {UP} holds NaN or Inf"),
    "15 Inf": (set_tensor(lambda t: -t / 0), f"{SHARD}: {UP} holds NaN or Inf"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_damaged_folder_is_refused_in_one_line(name, checkpoint):
    damage, words = FAULTS[name]
    damage(checkpoint)
    with pytest.raises(SystemExit, match=rf"^error: {checkpoint}[^\n]*{words}[^\n]*$"):
        LLaDA.from_pretrained(checkpoint)


def test_nothing_is_read_into_the_model_before_every_header_was_checked(checkpoint):
    set_tensor(lambda t: t[:5].clone())(checkpoint)
    model = LLaDA.from_pretrained(GOLDEN / "llada_mha")
    before = {name: p.clone() for name, p in model.named_parameters()}
    edit_tensors(checkpoint / "model-00001-of-00002.safetensors", lambda data: [t.zero_() for t in data.values()])
    with pytest.raises(SystemExit, match=UP):
        weights.load_weights(model, checkpoint)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", ["/no/such/folder", "a/b/c", "./a/b", "../b", "has a space/b", "some/model"])
def test_neither_folder_nor_reachable_hub_id(name, monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SystemExit, match=rf"^error: --model {name}: no such folder[^\n]*hf download {name}[^\n]*$"):
        find_checkpoint(name)


def test_the_default_model_is_found_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("data/tiny") == ROOT / "data" / "tiny"
    (tmp_path / "mine").mkdir()
    assert find_checkpoint("mine").resolve() == tmp_path / "mine"


def test_code_in_the_folder_is_never_imported(checkpoint):
    for name in ("modeling_llada.py", "configuration_llada.py", "__init__.py"):
        (checkpoint / name).write_text("raise SystemExit('imported')")
    assert "auto_map" in json.loads((checkpoint / "config.json").read_text())
    LLaDA.from_pretrained(checkpoint)


# ---------------------------------------------------------------- out and in again

@pytest.mark.parametrize("name", ["llada_mha", "llada_gqa"])
@pytest.mark.parametrize("sharded", [False, True])
@torch.no_grad()
def test_a_saved_model_loads_with_the_same_logits_and_layout(name, sharded, tmp_path, monkeypatch):
    model = reference_model(name)
    if sharded:
        monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 150_000)
    save_weights(model, tmp_path / "out")
    again = LLaDA.from_pretrained(tmp_path / "out")
    ids = tensors(f"{name}/cases.safetensors")["A.input_ids"]
    assert torch.equal(again(ids), model(ids)) and again.config == model.config
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == model.config.raw
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    if not sharded:
        assert [path.name for path in files] == ["model.safetensors"]
        return
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in model.parameters())
    assert index["weight_map"] == {tensor: path.name for path in files for tensor in load_file(path)}
    assert all(path.stat().st_size < 155_000 for path in files)


@torch.no_grad()
def test_saving_over_a_sharded_checkpoint_leaves_no_old_weights(fresh, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(weights, "MAX_SHARD_BYTES", 150_000)
        save_weights(fresh, tmp_path)
    fresh.model["transformer"]["ln_f"].weight.mul_(2)
    save_weights(fresh, tmp_path)
    again = LLaDA.from_pretrained(tmp_path, dtype=torch.float64)
    assert all(torch.equal(*pair) for pair in zip(again.parameters(), fresh.parameters()))


def test_files_keep_their_dtype_and_have_the_mode_of_the_umask(tmp_path):
    umask = os.umask(0o027)
    try:
        save_weights(reference_model("llada_mha", torch.bfloat16), tmp_path / "out")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "out" / "model.safetensors").stat().st_mode) == 0o640
    saved, published = load_file(tmp_path / "out" / "model.safetensors"), {}
    for path in (GOLDEN / "llada_mha").glob("model-*.safetensors"):
        published |= load_file(path)
    assert saved.keys() == published.keys()
    assert all(torch.equal(saved[name], published[name]) for name in saved)  # bfloat16 both


def test_only_the_writer_writes(tmp_path):
    save_weights(reference_model("llada_mha"), tmp_path / "out", is_writer=False)
    assert not (tmp_path / "out").exists()
