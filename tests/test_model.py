"""model.py against the reference tensors (golden/README.md), and every fault of a checkpoint folder in one line."""
import json
import math
import os
import shutil
import stat
import weakref

import pytest
import torch
from conftest import ROOT, golden, reference, tensors, worst
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_file
from model import (LORA_TARGETS, SUPPORTED, Config, LLaDA, RMSNorm, adapters_off, add_lora, load_lora, load_weights,
                   lora_modules, merge, merge_lora, rope_tables, save_lora)

MODELS = ("llada_mha", "llada_gqa")
MASK_ID, EOS_ID = 500, 481
RAW = json.loads(golden("llada_mha/config.json").read_text())
LLADA_8B = json.loads((ROOT / "tests" / "llada_8b" / "config.json").read_text())  # the published values


def g(seed=0):
    return torch.Generator().manual_seed(seed)


IDS = torch.randint(480, (2, 11), generator=g(5))


# ---------------------------------------------------------------- the forward pass

# room for other CPU kernels: seen between them 1.9e-5, 4e-14, 0.22 at most, and in bfloat16 0.02 in the mean
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind, dtype, atol, mean, least", [
    ("logits", torch.float32, 2e-4, 2e-5, 4), ("logits_f64", torch.float64, 1e-10, 1e-11, 2),
    ("logits_bf16", torch.bfloat16, 0.5, 0.03, 1)])
@torch.no_grad()
def test_logits(name, kind, dtype, atol, mean, least):
    data, net = tensors(f"{name}/cases.safetensors"), reference(name, dtype)
    cases = [key.split(".")[0] for key in data if key.endswith("." + kind)]
    assert len(cases) >= least
    for case in cases:
        mask = data.get(f"{case}.attention_mask")
        got = net(data[f"{case}.input_ids"], attn_mask=None if mask is None else mask.bool())
        assert worst(got, data[f"{case}.{kind}"]) < atol, case
        assert (got.double() - data[f"{case}.{kind}"].double()).abs().mean() < mean, case


@torch.no_grad()
def test_norm_rounds_before_the_weight():
    norm, x = RMSNorm(64, 1e-5).bfloat16(), 3 * torch.randn(200, 64, generator=g()).bfloat16()
    norm.weight.normal_(1, 0.3, generator=g(1))
    normed = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    want = (normed.bfloat16().double() * norm.weight.double()).bfloat16()
    assert (norm(x) != want).double().mean() < 0.005
    once = (normed * norm.weight.double()).bfloat16()  # torch.nn.RMSNorm's order
    assert 0.15 < (norm(x) != once).double().mean() < 0.35


@torch.no_grad()
def test_ignoring_the_padding_mask_is_the_old_behaviour():
    data, net = tensors("llada_mha/cases.safetensors"), reference("llada_mha")
    ids, mask = data["PL.input_ids"], data["PL.attention_mask"].bool()
    ignored = net(ids)
    assert worst(ignored, data["PL.logits_mask_ignored"]) < 2e-4
    assert worst(ignored, net(ids, attn_mask=mask)) > 1
    assert worst(net(ids, attn_mask=torch.ones_like(mask)), ignored) < 1e-4


@torch.no_grad()
def test_left_padding_equals_the_row_alone():
    data, net = tensors("llada_mha/cases.safetensors"), reference("llada_mha", torch.float64)
    ids, mask = data["PL.input_ids"], data["PL.attention_mask"].bool()
    padded = net(ids, attn_mask=mask)
    for row in range(len(ids)):
        pads = int((~mask[row]).sum())
        # positions shift by the padding, tables are float32: equal to their rounding, not to float64's
        assert worst(padded[row:row + 1, pads:], net(ids[row:row + 1, pads:])) < 1e-5
    assert len({int(n) for n in (~mask).sum(1)}) == 3


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_intermediates(name, monkeypatch):
    data, net = tensors(f"{name}/intermediates.safetensors"), LLaDA.from_pretrained(golden(name))
    seen, rotated = {}, []
    for path, module in net.named_modules():
        def hook(module, args, output, short=path.removeprefix("model.transformer.")):
            seen[short], seen[short + ".input"] = output, args[0]
        module.register_forward_hook(hook)
    rope = model_file.apply_rope
    monkeypatch.setattr(model_file, "apply_rope", lambda *args: rotated.append(rope(*args)) or rotated[-1])
    seen["logits"] = net(data["input_ids"])
    for i in range(net.config.n_layers):
        seen[f"blocks.{i}.rotary_emb.q"], seen[f"blocks.{i}.rotary_emb.k"] = rotated[2 * i:2 * i + 2]
        seen[f"blocks.{i}.act"] = torch.nn.functional.silu(seen[f"blocks.{i}.ff_proj"])
    c = net.config
    seen["rope.cos"], seen["rope.sin"] = rope_tables(c.max_sequence_length, c.head_dim, c.rope_theta, "cpu")
    keys = data.keys() - {"input_ids"}
    assert len(keys) >= 35
    for key in sorted(keys):
        assert worst(seen[key], data[key]) < 2e-4, key


@torch.no_grad()
def test_keep_equals_choosing_from_all_logits():
    ids, net = tensors("llada_mha/cases.safetensors")["A.input_ids"], reference("llada_mha", torch.float64)
    full = net(ids)  # (3, 24, 512)
    index = torch.randint(24, (3, 5), generator=g())
    chosen = ids == MASK_ID
    assert worst(net(ids, keep=slice(4, 17)), full[:, 4:17]) < 1e-12
    assert worst(net(ids, keep=index), full.gather(1, index[..., None].expand(-1, -1, 512))) < 1e-12
    assert worst(net(ids, keep=chosen), full[chosen]) < 1e-12 and 0 < chosen.sum() < chosen.numel()
    assert net(ids, keep=torch.zeros_like(chosen)).shape == (0, 512)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_pass_with_a_cache_equals_the_plain_one(name):
    """Over any part of the canvas, right after a pass over all of it: with padding, adapters, grouped heads."""
    data, net = tensors(f"{name}/cases.safetensors"), LLaDA.from_pretrained(golden(name), dtype=torch.float64)
    for m in lora_modules(add_lora(net, 4, 8, LORA_TARGETS, g())).values():
        m.lora_B.normal_(0, 0.1, generator=g(1))
    ids, mask, cache = data["PL.input_ids"], data["PL.attention_mask"].bool(), []
    plain = net(ids, attn_mask=mask)
    assert torch.equal(net(ids, attn_mask=mask, cache=cache), plain) and len(cache) == len(net.blocks)
    for start, end in ((0, ids.shape[1]), (9, 12), (5, ids.shape[1]), (0, 7)):
        part = dict(ids=ids[:, start:end], attn_mask=mask, cache=cache, start=start)
        assert worst(net(**part), plain[:, start:end]) < 1e-10
        assert worst(net(**part, keep=slice(1, 3)), plain[:, start + 1:start + 3]) < 1e-10
    changed = ids.clone()
    changed[:, 9:12] = 7  # what a part changes is seen by the next one
    net(changed[:, 9:12], attn_mask=mask, cache=cache, start=9)
    assert worst(net(ids[:, :7], attn_mask=mask, cache=cache), plain[:, :7]) > 1e-3


@torch.no_grad()
def test_tied_weights():
    untied = LLaDA(Config.from_dict(RAW)).init_weights(g())
    tied = LLaDA(Config.from_dict(RAW | {"weight_tying": True}))
    names = {k: v for k, v in untied.state_dict().items() if k != "model.transformer.ff_out.weight"}
    tied.load_state_dict(names, strict=True)
    untied.model["transformer"]["ff_out"].weight.copy_(untied.model["transformer"]["wte"].weight)
    ids = torch.randint(480, (2, 9), generator=g())
    assert torch.equal(tied(ids), untied(ids))


def test_too_long_is_refused():
    with pytest.raises(ValueError, match="129 tokens exceed max_sequence_length 128"):
        reference("llada_mha")(torch.zeros(1, 129, dtype=torch.int64))


def test_init_weights_is_private_and_repeatable():
    one, two, other = (LLaDA(Config.from_dict(RAW)) for _ in range(3))
    before = torch.get_rng_state()
    one.init_weights(g(1)), two.init_weights(g(1)), other.init_weights(g(2))
    assert torch.equal(before, torch.get_rng_state())
    wte, q, down = "wte.weight", "blocks.1.q_proj.weight", "blocks.1.ff_out.weight"
    a, b, c = ({k.removeprefix("model.transformer."): p for k, p in m.named_parameters()} for m in (one, two, other))
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a[wte], c[wte])
    assert abs(a[wte].std() / 0.02 - 1) < 0.05 and abs(a[q].std() / 0.02 - 1) < 0.05
    assert abs(a[down].std() / 0.01 - 1) < 0.05  # / sqrt(2 * 2 layers)
    assert (a["ln_f.weight"] == 1).all()


def published_shapes(d=4096, mlp=12288, vocab=126464, layers=32):
    """{name: shape} of LLaDA-8B's index, written out from the published table."""
    block = {"attn_norm": (d,), "q_proj": (d, d), "k_proj": (d, d), "v_proj": (d, d), "attn_out": (d, d),
             "ff_norm": (d,), "ff_proj": (mlp, d), "up_proj": (mlp, d), "ff_out": (d, mlp)}
    return {"model.transformer.wte.weight": (vocab, d), "model.transformer.ln_f.weight": (d,),
            "model.transformer.ff_out.weight": (vocab, d),
            **{f"model.transformer.blocks.{i}.{k}.weight": v for i in range(layers) for k, v in block.items()}}


def test_llada_8b_on_the_meta_device():
    with torch.device("meta"):
        net = LLaDA(Config.from_dict(LLADA_8B))
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    assert shapes == published_shapes() and len(shapes) == 291
    assert sum(p.numel() for p in net.parameters()) == 8_015_581_184
    assert net.state_dict().keys() == shapes.keys()  # no buffers
    assert sum(p.numel() * 2 for p in net.parameters()) == 16_031_162_368  # the index's total_size, bfloat16


@torch.no_grad()
def test_a_checkpoint_with_the_width_and_layout_of_8b(tmp_path):
    """Real config but for 2 layers and 512 tokens; six shards, a block's tensors in several of them, as published."""
    raw = LLADA_8B | {"n_layers": 2, "vocab_size": 512, "embedding_size": 512, "mask_token_id": 500,
                      "eos_token_id": 481, "pad_token_id": 481}
    shapes, weight_map, total = published_shapes(vocab=512, layers=2), {}, 0
    ramp = torch.linspace(-0.02, 0.02, 12288 * 4096).bfloat16()
    for shard in range(6):
        names = list(shapes)[shard::6]
        data = {name: ramp[:math.prod(shapes[name])].view(shapes[name]).clone() for name in names}
        for n, name in enumerate(names):  # told apart by their first element
            data[name].view(-1)[0] = shard + n / 8
        file = f"model-{shard + 1:05d}-of-00006.safetensors"
        save_file(data, tmp_path / file)
        weight_map |= dict.fromkeys(names, file)
        total += sum(2 * t.numel() for t in data.values())
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(raw))
    net = LLaDA.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for shard in range(6):
        for n, name in enumerate(list(shapes)[shard::6]):
            p = net.get_parameter(name)
            assert p.shape == shapes[name] and p.dtype == torch.bfloat16
            assert p.view(-1)[0] == shard + n / 8 and torch.equal(p.view(-1)[1:], ramp[1:p.numel()]), name
    assert net(torch.tensor([[1, 500, 2]])).isfinite().all()
    shutil.rmtree(tmp_path)  # 0.9 GB


# ---------------------------------------------------------------- config.json

def test_config_nulls_defaults_and_extra_fields():
    raw = RAW | {"n_kv_heads": None, "embedding_size": None, "mlp_hidden_size": None, "torch_dtype": "bfloat16",
                 "_name_or_path": "elsewhere", "something_new": {"a": [1]}}
    config = Config.from_dict(raw)
    assert (config.n_kv_heads, config.embedding_size, config.mlp_hidden_size) == (4, 512, 4 * 64)
    assert config.raw == raw and config.head_dim == 16
    assert Config.from_dict({k: v for k, v in raw.items() if k != "n_kv_heads"}).n_kv_heads == 4
    assert Config.from_dict(RAW | {"mlp_ratio": 7}).mlp_hidden_size == 176  # ignored where mlp_hidden_size is set
    without = {k: v for k, v in RAW.items() if k not in SUPPORTED or k == "model_type"}
    assert Config.from_dict(without).d_model == 64  # an absent flag has its usual value


OTHER = {None: 8, 0.0: 0.1, 1: 2, "llada": "llama", "llama": "sequential", "rms": "default", "silu": "swiglu"}


@pytest.mark.parametrize("key, value", [
    (k, not v if isinstance(v, bool) else OTHER[v]) for k, v in SUPPORTED.items()])
def test_config_refuses_what_it_does_not_implement(key, value):
    with pytest.raises(ValueError, match=rf"^here: {key} = {value!r} is not supported[^\n]*$"):
        Config.from_dict(RAW | {key: value}, source="here")


@pytest.mark.parametrize("change, words", [
    *(({key: None}, key) for key in ("model_type", "d_model", "n_layers", "n_heads", "vocab_size", "mask_token_id",
                                     "eos_token_id", "rope_theta", "rms_norm_eps", "max_sequence_length")),
    ({"d_model": "64"}, "d_model"), ({"n_layers": 2.5}, "n_layers"), ({"n_layers": True}, "n_layers"),
    ({"n_layers": 0}, "n_layers"), ({"rope_theta": -1.0}, "rope_theta"), ({"weight_tying": "yes"}, "weight_tying"),
    ({"d_model": 66}, "d_model"), ({"n_kv_heads": 3}, "n_kv_heads"),
    ({"mlp_hidden_size": None, "mlp_ratio": None}, "mlp_hidden_size"),
    ({"mask_token_id": 512}, "mask_token_id 512 .*512 rows"), ({"mask_token_id": -1}, "mask_token_id"),
    ({"eos_token_id": 9999}, "eos_token_id")])
def test_config_names_the_key(change, words):
    raw = {k: v for k, v in (RAW | change).items() if v is not None or len(change) > 1}
    with pytest.raises(ValueError, match=rf"^here: [^\n]*{words}[^\n]*$"):
        Config.from_dict(raw, source="here")


# ---------------------------------------------------------------- faults of a checkpoint folder

def copy_checkpoint(folder, name="llada_mha"):
    folder.mkdir()
    for file in golden(name).glob("*"):
        if file.name.startswith(("model", "config")):
            shutil.copyfile(file, folder / file.name)
    return folder


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_config(folder, **change):
    (folder / "config.json").write_text(json.dumps(RAW | change))


def edit_tensors(folder, change):
    data = load_file(folder / SHARD)
    change(data)
    save_file(data, folder / SHARD)


def single_file(folder, change=lambda data: None):
    data = {}
    for path in sorted(folder.glob("model-*")):
        data |= load_file(path)
        path.unlink()
    (folder / INDEX).unlink()
    change(data)
    save_file(data, folder / "model.safetensors")


def only_pickle(folder):
    single_file(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def set_value(data, key, value):
    data[key].view(-1)[3] = value


def cut(folder, size):
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:size])


def move(folder, file):
    edit_index(folder, lambda weight_map: weight_map.update({UP: file}))


SHARD, INDEX = "model-00002-of-00002.safetensors", "model.safetensors.index.json"
HEAD, UP = "model.transformer.ff_out.weight", "model.transformer.blocks.1.up_proj.weight"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
FAULTS = {  # name: (what happens to a good folder, words of the message)
    "3 no config": (lambda f: (f / "config.json").unlink(), "no config.json here"),
    "4 config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
    "4 config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: expected a JSON object"),
    "4 other model": (lambda f: edit_config(f, model_type="llama"), "config.json: model_type = 'llama' is not"),
    "5 shape": (lambda f: edit_config(f, mlp_hidden_size=160), r"0.ff_out.weight has shape \(64, 176\), .*\(64, 160\)"),
    "6 missing": (lambda f: edit_index(f, lambda m: m.pop(UP)), f"missing tensor {UP}"),
    "6 missing, single file": (lambda f: single_file(f, lambda d: d.pop(UP)), f"missing tensor {UP}"),
    "6 many missing": (lambda f: edit_config(f, n_layers=9), "missing tensor .* and 60 more"),
    "7 unexpected": (lambda f: edit_index(f, lambda m: m.update(bias=SHARD)), "unexpected tensor bias"),
    "7 unexpected, one file": (lambda f: single_file(f, lambda d: d.update(b=torch.ones(1))), "unexpected tensor b;"),
    "7 head though tied": (lambda f: edit_config(f, weight_tying=True), f"unexpected tensor {HEAD}"),
    "8 shard missing": (lambda f: (f / SHARD).unlink(), f"{SHARD}: named in the index but missing"),
    "9 shard cut": (lambda f: cut(f, -100), f"{SHARD}: truncated, an incomplete download"),
    "9 header cut": (lambda f: cut(f, 100), f"{SHARD}: truncated, an incomplete download"),
    "9 four bytes": (lambda f: cut(f, 4), f"{SHARD}: truncated, an incomplete download"),
    "9 empty": (lambda f: cut(f, 0), f"{SHARD}: truncated, an incomplete download"),
    "9 a web page": (lambda f: (f / SHARD).write_bytes(b"<html>" + bytes(999)), f"{SHARD}: not a safetensors file"),
    "10 LFS pointer": (lambda f: (f / SHARD).write_text(LFS), f"{SHARD}: a Git-LFS pointer.*git lfs pull"),
    "11 only pickle": (only_pickle, "pytorch_model.bin is a pickle.*convert it to safetensors"),
    "11 renamed pickle": (lambda f: torch.save(torch.ones(9), f / SHARD), f"{SHARD}: a renamed pickle"),
    "11 nothing": (lambda f: [p.unlink() for p in f.glob("model*")], "no model.safetensors and no .*index.json"),
    "12 parent": (lambda f: move(f, f"../{SHARD}"), rf"{INDEX}: weight_map\[{UP}\]"),
    "12 absolute": (lambda f: move(f, f"/{SHARD}"), rf"{INDEX}: weight_map\[{UP}\]"),
    "12 subfolder": (lambda f: move(f, f"a/{SHARD}"), rf"{INDEX}: weight_map\[{UP}\]"),
    "12 a number": (lambda f: move(f, 3), rf"{INDEX}: weight_map\[{UP}\]"),
    "12 not an index": (lambda f: (f / INDEX).write_text("{}"), f"{INDEX}: not a weight index"),
    "12 a list": (lambda f: (f / INDEX).write_text('{"weight_map": [1]}'), f"{INDEX}: not a weight index"),
    "13 not in its shard": (lambda f: move(f, "model-00001-of-00002.safetensors"), f"00001-of.*the index says {UP}"),
    "14 dtype": (lambda f: edit_tensors(f, lambda d: d.update({UP: d[UP].to(torch.int8)})), f"{SHARD}: {UP} has dtype"),
    "15 NaN": (lambda f: edit_tensors(f, lambda d: set_value(d, UP, float("nan"))), f"{SHARD}: {UP} holds NaN"),
    "15 Inf": (lambda f: edit_tensors(f, lambda d: set_value(d, UP, -float("inf"))), f"{SHARD}: {UP} holds NaN or Inf"),
    "18 mask id": (lambda f: edit_config(f, mask_token_id=512), "config.json: mask_token_id 512 lies outside"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_of_a_folder(name, tmp_path):
    damage, words = FAULTS[name]
    folder = copy_checkpoint(tmp_path / "checkpoint")
    LLaDA.from_pretrained(folder)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"^{tmp_path}[^\n]*{words}[^\n]*$"):
        LLaDA.from_pretrained(folder)


@pytest.mark.parametrize("name", ["no_such_folder", "/no/such/folder", "a/b/c", "./a/b", "../b", "has a space/b"])
def test_fault_1_neither_folder_nor_hub_id(name):
    with pytest.raises(FileNotFoundError, match=rf"^--model {name}: no such folder, and not a hub id[^\n]*$"):
        LLaDA.from_pretrained(name)


def test_fault_2_hub_id_offline(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"^--model some/model: [^\n]*hf download some/model[^\n]*$"):
        LLaDA.from_pretrained("some/model")


def test_fault_16_code_in_the_folder_is_never_imported(tmp_path):
    folder = copy_checkpoint(tmp_path / "checkpoint")
    for name in ("modeling_llada.py", "configuration_llada.py", "__init__.py"):
        (folder / name).write_text("raise SystemExit('imported')")
    assert "auto_map" in RAW
    LLaDA.from_pretrained(folder)


# ---------------------------------------------------------------- weights out and in again

@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard_bytes, files", [(10 ** 9, 1), (150_000, None)])
@torch.no_grad()
def test_round_trip(name, shard_bytes, files, tmp_path):
    net = LLaDA.from_pretrained(copy_checkpoint(tmp_path / "a", name))
    raw = json.loads((tmp_path / "a" / "config.json").read_text()) | {"unknown_key": [1, {"b": None}]}
    (tmp_path / "a" / "config.json").write_text(json.dumps(raw))
    net = LLaDA.from_pretrained(tmp_path / "a")
    net.save_pretrained(tmp_path / "b", max_shard_bytes=shard_bytes)
    weights = sorted(p.name for p in (tmp_path / "b").glob("*.safetensors"))
    again = LLaDA.from_pretrained(tmp_path / "b")
    ids = tensors(f"{name}/cases.safetensors")["A.input_ids"]
    assert torch.equal(again(ids), net(ids)) and again.config == net.config
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == raw
    if files == 1:
        assert weights == ["model.safetensors"]
    else:
        assert len(weights) > 2 and weights[0] == f"model-00001-of-{len(weights):05d}.safetensors"
        index = json.loads((tmp_path / "b" / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in net.parameters())
        assert all((tmp_path / "b" / w).stat().st_size < shard_bytes + 5000 for w in weights)


@torch.no_grad()
def test_saving_over_a_sharded_checkpoint_leaves_no_old_weights(fresh, tmp_path):
    fresh.save_pretrained(tmp_path, max_shard_bytes=150_000)
    fresh.model["transformer"]["ln_f"].weight.mul_(2)
    fresh.save_pretrained(tmp_path)
    ids = tensors("llada_mha/cases.safetensors")["A.input_ids"]
    assert torch.equal(LLaDA.from_pretrained(tmp_path, dtype=torch.float64)(ids), fresh(ids))


def test_dtype_is_kept_on_the_way_out(tmp_path):
    reference("llada_mha", torch.bfloat16).save_pretrained(tmp_path)
    data, stored = load_file(tmp_path / "model.safetensors"), {}
    for path in golden("llada_mha").glob("model-*.safetensors"):
        stored |= load_file(path)  # bfloat16
    assert data.keys() == stored.keys() and all(torch.equal(data[k], stored[k]) for k in stored)


# ---------------------------------------------------------------- scoring tokens in chunks

@pytest.mark.parametrize("tokens", [(), (3,)])
@pytest.mark.parametrize("keep", [slice(3, 9), torch.tensor([[1, 5], [0, 9]]), IDS % 3 == 0, IDS < 0])
@pytest.mark.parametrize("chunk", [1, 2 ** 26])
def test_targets_give_the_log_softmax_of_the_logits(fresh, monkeypatch, keep, tokens, chunk):
    monkeypatch.setattr(model_file, "HEAD_CHUNK", chunk)  # a position at a time, all at once
    logits = fresh(IDS, keep=keep)
    targets = torch.randint(480, (*logits.shape[:-1], *tokens), generator=g(2))
    index = targets if tokens else targets[..., None]
    want = logits.log_softmax(-1).gather(-1, index).view_as(targets)
    found = {}
    for name, logps in (("want", want), ("got", fresh(IDS, keep=keep, targets=targets))):
        fresh.zero_grad()
        (logps * torch.linspace(0.5, 2, logps.numel()).view_as(logps)).sum().backward()
        found[name] = [logps.detach(), *(p.grad for p in fresh.parameters())]
    assert all(torch.allclose(*pair, rtol=0, atol=1e-12) for pair in zip(found["got"], found["want"]))


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside hold at one time."""
    now = most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for storage in [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]:
            if storage._cdata not in known:  # not a view of an argument
                self.hold(storage.nbytes())
                weakref.finalize(storage, self.hold, -storage.nbytes())
        return out

    def hold(self, size):
        self.now += size
        self.most = max(self.most, self.now)


@pytest.mark.parametrize("trained", [False, True])
def test_no_tensor_of_positions_times_vocabulary_exists(trained, monkeypatch):
    """8 rows, 300 tokens scored in each, V 20,000: 192 MB of logits in float32, 4 MB a chunk."""
    monkeypatch.setattr(model_file, "HEAD_CHUNK", 2 ** 20)
    raw = RAW | {"n_layers": 1, "vocab_size": 20_000, "embedding_size": 20_000, "max_sequence_length": 320}
    net = LLaDA(Config.from_dict(raw)).init_weights(g())
    ids, targets = torch.randint(480, (8, 320), generator=g()), torch.randint(480, (8, 300, 6), generator=g())
    with torch.set_grad_enabled(trained), Peak() as peak:
        logps = net(ids, keep=slice(20, 320), targets=targets)
        if trained:
            logps.sum().backward()
    assert 2 * 4 * 2 ** 20 < peak.most < 40e6  # 10 and 34 MB seen; without chunks 385 and 592, kept for backward 221


# ---------------------------------------------------------------- LoRA

def adapted(net, targets=LORA_TARGETS, r=4, alpha=6, seed=0):
    """Adapters that do something: B away from zero."""
    add_lora(net, r, alpha, targets, g(seed))
    for name, p in net.named_parameters():
        if name.endswith("lora_B"):
            p.data.normal_(0, 0.1, generator=g(len(name)))
    return net


@torch.no_grad()
def test_lora_starts_at_the_base_and_trains_only_itself(fresh):
    base = fresh(IDS)
    before = torch.get_rng_state()
    add_lora(fresh, 4, 6, ["q_proj", "ff_out"], g())
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(fresh(IDS), base)
    trained = [name for name, p in fresh.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2 and all(".lora_" in name for name in trained)
    layer = fresh.model["transformer"]["blocks"][0].ff_out
    assert layer.lora_A.shape == (4, 176) and layer.lora_B.shape == (64, 4) and layer.scale == 1.5
    assert 0.9 < layer.lora_A.abs().max() * 176 ** 0.5 <= 1  # uniform in +- 1 / sqrt(in), PEFT's start


def test_lora_gradient_reaches_the_adapters_only(fresh):
    adapted(fresh)(IDS).square().mean().backward()
    for name, p in fresh.named_parameters():
        assert (p.grad is not None and p.grad.abs().max() > 0) == (".lora_" in name), name


@torch.no_grad()
def test_adapters_off_is_the_base_exactly(fresh):
    base = fresh(IDS)
    on = adapted(fresh)(IDS)
    assert worst(on, base) > 0.1
    with adapters_off(fresh) as same:
        assert same is fresh and torch.equal(fresh(IDS), base)
    assert torch.equal(fresh(IDS), on)
    with pytest.raises(KeyError), adapters_off(fresh):
        raise KeyError
    assert torch.equal(fresh(IDS), on)  # on again after an exception


@pytest.mark.parametrize("targets", [["q_proj"], ["ff_out", "attn_out"], LORA_TARGETS])
@torch.no_grad()
def test_merge_equals_the_adapter_once(fresh, targets, tmp_path):
    on = adapted(fresh, targets)(IDS)
    with pytest.raises(ValueError, match="merge_lora"):
        fresh.save_pretrained(tmp_path)
    assert merge_lora(fresh) is fresh and worst(fresh(IDS), on) < 1e-10
    assert not any("lora" in name for name in fresh.state_dict())
    assert all(p.requires_grad for p in fresh.parameters())
    with pytest.raises(ValueError, match="merged already"):
        merge_lora(fresh)
    fresh.save_pretrained(tmp_path)
    assert torch.equal(LLaDA.from_pretrained(tmp_path, dtype=torch.float64)(IDS), fresh(IDS))


@torch.no_grad()
def test_half_precision_base_has_float32_adapters():
    net = adapted(LLaDA.from_pretrained(golden("llada_mha"), dtype=torch.bfloat16), r=2)
    layer = net.model["transformer"]["blocks"][0].up_proj
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32 and net(IDS).dtype == torch.bfloat16
    exact = layer.weight.double() + 3 * layer.lora_B.double() @ layer.lora_A.double()
    merged = merge_lora(net).model["transformer"]["blocks"][0].up_proj.weight
    assert merged.dtype == torch.bfloat16
    assert ((merged.double() - exact).abs() <= exact.abs() * 2 ** -8).all()  # rounded once


@torch.no_grad()
def test_lora_files_are_peft_files_and_load_again(fresh, tmp_path):
    targets = ["up_proj", "ff_out", "k_proj"]
    on = adapted(fresh, targets)(IDS)
    save_lora(fresh, tmp_path, base="some/base")
    data = load_file(tmp_path / "adapter_model.safetensors")
    blocks = range(2)
    assert data.keys() == {f"base_model.model.model.transformer.blocks.{i}.{t}.lora_{x}.weight"
                           for i in blocks for t in targets for x in "AB"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "base_model_name_or_path": "some/base", "bias": "none",
                "lora_dropout": 0.0, "target_modules": r".*\.blocks\.\d+\.(k_proj|up_proj|ff_out)"}
    assert expected.items() <= config.items()
    again = load_lora(LLaDA.from_pretrained(golden("llada_mha"), dtype=torch.float64), tmp_path)
    assert torch.equal(again(IDS), on)
    assert all(p.requires_grad == (".lora_" in name) for name, p in again.named_parameters())


def edit_adapter(folder, **change):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def edit_names(folder, change):
    """`change`: a function of name and tensor that gives the names and tensors to store."""
    old, new = load_file(folder / "adapter_model.safetensors"), {}
    for name, tensor in old.items():
        new |= change(name, tensor)
    save_file(new, folder / "adapter_model.safetensors")


ADAPTER_FAULTS = {
    "19 rank": (lambda f: edit_adapter(f, r=8), r"has shape \(4, 64\), this model needs \(8, 64\)"),
    "20 more blocks": (lambda f: edit_names(f, lambda k, v: {k: v, k.replace("blocks.1", "blocks.7"): v.clone()}),
                       "unexpected tensor .*blocks.7"),
    "20 fewer blocks": (lambda f: edit_names(f, lambda k, v: {k: v} if "blocks.0" in k else {}), "missing tensor"),
    "20 wider": (lambda f: edit_names(f, lambda k, v: {k: torch.cat([v, v], 1) if "lora_A" in k else v}),
                 r"has shape \(4, 128\), this model needs \(4, 64\)"),
    "the head too": (lambda f: edit_names(f, lambda k, v: {k: v, k.replace("blocks.1.q_proj", "ff_out"): v.clone()}),
                     "tensor .*ff_out"),
    "a strange name": (lambda f: edit_names(f, lambda k, v: {k: v, "x": torch.ones(1)}), "unexpected tensor x"),
    "only strange names": (lambda f: edit_names(f, lambda k, v: {"x": torch.ones(1)}), "no LoRA tensor"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "expected adapter_config.json"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    "config not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json"),
    "config without r": (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA"}'), "peft_type, r and"),
    "another scale": (lambda f: edit_adapter(f, use_rslora=True), "use_rslora"),
    "another scale for some": (lambda f: edit_adapter(f, alpha_pattern={"q_proj": 3}), "alpha_pattern"),
    "other layout": (lambda f: edit_adapter(f, fan_in_fan_out=True), "fan_in_fan_out"),
    "DoRA": (lambda f: edit_adapter(f, use_dora=True), "use_dora"),
    "not LoRA": (lambda f: edit_adapter(f, peft_type="IA3"), "peft_type"),
}


@pytest.mark.parametrize("name", ADAPTER_FAULTS)
def test_fault_of_an_adapter(name, tmp_path):
    damage, words = ADAPTER_FAULTS[name]
    save_lora(adapted(LLaDA.from_pretrained(golden("llada_mha")), ["q_proj", "k_proj"]), tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"^{tmp_path}[^\n]*({words})[^\n]*$"):
        load_lora(LLaDA.from_pretrained(golden("llada_mha")), tmp_path)


def test_adapter_on_another_base(tmp_path):
    save_lora(adapted(LLaDA.from_pretrained(golden("llada_mha")), ["q_proj", "v_proj"]), tmp_path)
    with pytest.raises(ValueError, match=r"v_proj.lora_B.weight has shape \(64, 4\), this model needs \(32, 4\).*base"):
        load_lora(LLaDA.from_pretrained(golden("llada_gqa")), tmp_path)


def test_lora_refusals(fresh, tmp_path):
    for targets in (["o_proj"], ["q_proj", "gate_proj"], []):
        with pytest.raises(ValueError, match=r"^--lora_targets [^\n]*choose from q_proj"):
            add_lora(fresh, 4, 8, targets, g())
    with pytest.raises(ValueError, match="rank >= 1"):
        add_lora(fresh, 0, 8, ["q_proj"], g())
    with pytest.raises(ValueError, match="no adapters to save"):
        save_lora(fresh, tmp_path)
    add_lora(fresh, 4, 8, ["q_proj"], g())
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(fresh, 4, 8, ["k_proj"], g())


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["ff_out"], LORA_TARGETS])
@torch.no_grad()
def test_peft_itself_reads_the_adapter(targets, fresh, tmp_path):
    peft = pytest.importorskip("peft")
    on = adapted(fresh, targets)(IDS)
    save_lora(fresh, tmp_path)
    base = LLaDA.from_pretrained(golden("llada_mha"), dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    assert worst(theirs.base_model.model(IDS), on) < 1e-10
    state = peft.get_peft_model_state_dict(theirs)
    assert state.keys() == load_file(tmp_path / "adapter_model.safetensors").keys()
    theirs.save_pretrained(tmp_path / "theirs")  # and back: what PEFT writes, we read
    back = load_lora(LLaDA.from_pretrained(golden("llada_mha"), dtype=torch.float64), tmp_path / "theirs")
    assert worst(back(IDS), on) < 1e-10


# ---------------------------------------------------------------- python model.py merge BASE ADAPTER OUT

def base_and_adapter(tmp_path, seed=0, name="llada_mha"):
    """A sharded base with files of a standard loader beside it, an adapter of it, and the adapted logits, float32."""
    base, adapter = tmp_path / "base", tmp_path / f"adapter{seed}"
    if not base.exists():
        reference(name).save_pretrained(base, max_shard_bytes=150_000)
        for file in ("tokenizer.json", "tokenizer_config.json", "modeling_llada.py"):
            (base / file).write_text(f"{file} of the base")
        (base / "optimizer.safetensors").write_text("no part of the model")
    net = adapted(LLaDA.from_pretrained(base), ["q_proj", "up_proj", "ff_out"], seed=seed)
    save_lora(net, adapter, base=base)
    with torch.no_grad():
        return base, adapter, net(IDS)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"}


def test_merge_on_the_command_line(tmp_path, capsys):
    base, adapter, logits = base_and_adapter(tmp_path)
    umask = os.umask(0o027)
    try:
        model_file.main(model_file.parse_args(["merge", str(base), str(adapter), str(tmp_path / "out")]))
    finally:
        os.umask(umask)
    out, shards = tmp_path / "out", sorted(base.glob("model-*.safetensors"))
    merged = LLaDA.from_pretrained(out)
    with torch.no_grad():
        assert worst(merged(IDS), logits) < 1e-4 and worst(merged(IDS), reference("llada_mha")(IDS)) > 0.1
    record = json.loads((out / "merged.json").read_text())
    assert [row["adapter"] for row in record] == [str(adapter)]
    # the layout is the base's: config, index and tokenizer to the byte, each tensor in its shard, untouched ones equal
    assert files(out).items() >= files(base).items() and files(out).keys() - files(base).keys() == {"merged.json"}
    assert [p.name for p in shards] == sorted(p.name for p in out.glob("*.safetensors"))
    for path in shards:
        old, new = load_file(path), load_file(out / path.name)
        assert {k: (v.shape, v.dtype) for k, v in old.items()} == {k: (v.shape, v.dtype) for k, v in new.items()}
        for key in old:
            touched = any(f".{target}." in key and ".blocks." in key for target in ("q_proj", "up_proj", "ff_out"))
            assert torch.equal(old[key], new[key]) != touched, key
        assert stat.S_IMODE((out / path.name).stat().st_mode) == 0o640
    assert capsys.readouterr().err.count("note:") == 0


def test_merging_twice_is_refused_and_another_adapter_is_not(tmp_path, capsys):
    base, adapter, _ = base_and_adapter(tmp_path)
    merge(base, adapter, tmp_path / "out")
    with pytest.raises(ValueError, match=r"^[^\n]*out: [^\n]*adapter0 is merged into it already[^\n]*$"):
        merge(tmp_path / "out", adapter, tmp_path / "twice")
    with pytest.raises(ValueError, match=r"out: exists already, name a new folder$"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "twice").exists() and not list(tmp_path.glob("*.tmp"))
    assert "note:" not in capsys.readouterr().err
    _, second, _ = base_and_adapter(tmp_path, seed=1)
    merge(tmp_path / "out", second, tmp_path / "both")
    assert len(json.loads((tmp_path / "both" / "merged.json").read_text())) == 2
    assert f"note: {second} says it was trained on {base}" in capsys.readouterr().err


def test_a_whole_model_takes_the_files_and_dtypes_of_its_base(tmp_path):
    """After training all weights, kept in float32 and in one file: out come bfloat16 and the base's shards."""
    base, trained = copy_checkpoint(tmp_path / "base"), LLaDA.from_pretrained(golden("llada_mha"))
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(1e-3)
    trained.save_pretrained(tmp_path / "trained")
    assert merge(base, tmp_path / "trained", tmp_path / "out") == []
    for path in base.glob("model-*.safetensors"):
        stored = load_file(tmp_path / "out" / path.name)
        assert stored.keys() == load_file(path).keys()
        assert all(torch.equal(t, trained.get_parameter(k).bfloat16()) for k, t in stored.items())


def test_fault_20_merge_with_an_adapter_of_another_base(tmp_path):
    base, adapter, _ = base_and_adapter(tmp_path)
    with pytest.raises(SystemExit, match=r"^error: [^\n]*adapter0: [^\n]*an adapter of another base\?$"):
        reference("llada_gqa").save_pretrained(tmp_path / "gqa")
        save_lora(adapted(LLaDA.from_pretrained(base), ["k_proj"]), adapter)
        model_file.main(model_file.parse_args(["merge", str(tmp_path / "gqa"), str(adapter), str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_no_model(tmp_path):
    base, adapter, _ = base_and_adapter(tmp_path)
    words = rf"^--model {adapter}: an adapter of {base}, not a model: [^\n]*merge {base} {adapter} OUT[^\n]*$"
    with pytest.raises(ValueError, match=words):
        LLaDA.from_pretrained(adapter)


def test_fault_19_resuming_with_another_rank_or_scale(tmp_path):
    _, adapter, _ = base_and_adapter(tmp_path)
    for r, alpha in ((2, 6), (4, 12)):
        net = add_lora(LLaDA.from_pretrained(golden("llada_mha")), r, alpha, ["q_proj", "up_proj", "ff_out"], g())
        with pytest.raises(ValueError, match=rf"needs --lora_r 4 --lora_alpha 6, the options say {r} and {alpha}$"):
            load_weights(net, adapter)
    other = add_lora(LLaDA.from_pretrained(golden("llada_mha")), 4, 6, ["q_proj"], g())
    with pytest.raises(ValueError, match="unexpected tensor .*ff_out"):
        load_weights(other, adapter)
