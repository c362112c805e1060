"""model.py against the reference tensors (tests/golden/README.md), float64 and brute force; checkpoints in and out."""
import functools
import json
import shutil
import weakref

import huggingface_hub
import pytest
import torch
from helpers import GOLDEN, MASK_ID, ROOT, generator, reference_model, tensors, worst
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_module
from model import Config, LLaDA, RMSNorm, apply_rope, find_checkpoint, rope_tables, save_weights
from tools.measure import init_weights

MODELS = ("llada_mha", "llada_gqa")
IDS = torch.randint(480, (2, 11), generator=generator(5))
SHARD, INDEX = "model-00002-of-00002.safetensors", "model.safetensors.index.json"
UP = "model.transformer.blocks.1.up_proj.weight"  # lies in SHARD
RAW = json.loads((GOLDEN / "llada_mha" / "config.json").read_text())


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of a golden checkpoint, two shards in bfloat16, that the test may damage."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "llada_mha", folder, ignore=shutil.ignore_patterns("*cases*", "*intermediates*"))
    return folder


def make_config(folder, removed=(), **changed):
    """The config of a golden model with other fields."""
    raw = {key: value for key, value in (RAW | changed).items() if key not in removed}
    (folder / "config.json").write_text(json.dumps(raw))
    return Config.from_folder(folder)


# ---------------------------------------------------------------- the forward pass

# the tolerances leave room for other CPU kernels, see golden/README.md
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind, dtype, largest, mean", [
    ("logits", torch.float32, 2e-4, 2e-5), ("logits_f64", torch.float64, 1e-10, 1e-11),
    ("logits_bf16", torch.bfloat16, 0.5, 0.03)])
@torch.no_grad()
def test_logits_equal_the_reference(name, kind, dtype, largest, mean):
    data, model = tensors(f"{name}/cases.safetensors"), reference_model(name, dtype)
    cases = [key.split(".")[0] for key in data if key.endswith("." + kind)]
    assert cases
    for case in cases:
        attn_mask = data.get(f"{case}.attention_mask")
        logits = model(data[f"{case}.input_ids"], attn_mask=None if attn_mask is None else attn_mask.bool())
        expected = data[f"{case}.{kind}"]
        assert worst(logits, expected) < largest, case
        assert (logits.double() - expected.double()).abs().mean() < mean, case


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_intermediate_equals_the_reference(name, monkeypatch):
    data, model = tensors(f"{name}/intermediates.safetensors"), LLaDA.from_pretrained(GOLDEN / name)
    seen, rotated = {}, []
    for path, module in model.named_modules():
        def hook(module, inputs, output, short=path.removeprefix("model.transformer.")):
            seen[short] = output
            seen[short + ".input"] = inputs[0]
        module.register_forward_hook(hook)
    monkeypatch.setattr(model_module, "apply_rope", lambda *x: rotated.append(apply_rope(*x)) or rotated[-1])
    seen["logits"] = model(data["input_ids"])
    config = model.config
    for layer in range(config.n_layers):
        seen[f"blocks.{layer}.rotary_emb.q"], seen[f"blocks.{layer}.rotary_emb.k"] = rotated[2 * layer:2 * layer + 2]
        seen[f"blocks.{layer}.act"] = torch.nn.functional.silu(seen[f"blocks.{layer}.ff_proj"])
    tables = rope_tables(config.max_sequence_length, config.head_dim, config.rope_theta, "cpu")
    seen["rope.cos"], seen["rope.sin"] = tables
    names = data.keys() - {"input_ids"}
    assert len(names) >= 35
    for name in names:
        assert worst(seen[name], data[name]) < 2e-4, name


@torch.no_grad()
def test_the_norm_rounds_before_the_weight():
    norm, x = RMSNorm(64, 1e-5).bfloat16(), 3 * torch.randn(200, 64, generator=generator()).bfloat16()
    norm.weight.normal_(1, 0.3, generator=generator(1))
    normed = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    rounded_twice = (normed.bfloat16().double() * norm.weight.double()).bfloat16()
    rounded_once = (normed * norm.weight.double()).bfloat16()  # as torch.nn.RMSNorm does
    assert (norm(x) != rounded_twice).double().mean() < 0.005
    assert 0.15 < (norm(x) != rounded_once).double().mean() < 0.35


@torch.no_grad()
def test_keep_equals_choosing_from_all_logits():
    ids, model = tensors("llada_mha/cases.safetensors")["A.input_ids"], reference_model("llada_mha", torch.float64)
    logits = model(ids)  # (3, 24, 512)
    index = torch.randint(24, (3, 5), generator=generator())
    masked = ids == MASK_ID
    assert worst(model(ids, keep=index), logits.gather(1, index[..., None].expand(-1, -1, 512))) < 1e-12
    assert worst(model(ids, keep=masked), logits[masked]) < 1e-12
    assert model(ids, keep=torch.zeros_like(masked)).shape == (0, 512)


# ---------------------------------------------------------------- scoring tokens in chunks

@pytest.mark.parametrize("tokens", [(), (3,)])
@pytest.mark.parametrize("keep", [None, torch.tensor([[1, 5], [0, 9]]), IDS % 3 == 0, IDS < 0])
@pytest.mark.parametrize("chunk", [1, 2 ** 26])
def test_targets_give_the_log_softmax_of_the_logits(fresh, monkeypatch, keep, tokens, chunk):
    monkeypatch.setattr(model_module, "HEAD_CHUNK", chunk)  # a position at a time, all at once
    logits = fresh(IDS, keep=keep)
    targets = torch.randint(480, (*logits.shape[:-1], *tokens), generator=generator(2))
    expected = logits.log_softmax(-1).gather(-1, targets if tokens else targets[..., None]).view_as(targets)
    results = []
    for logps in (fresh(IDS, keep=keep, targets=targets), expected):
        fresh.zero_grad()
        (logps * torch.linspace(0.5, 2, logps.numel()).view_as(logps)).sum().backward()
        results.append([logps.detach(), *(p.grad for p in fresh.parameters())])
    assert all(torch.allclose(*pair, rtol=0, atol=1e-12) for pair in zip(*results))


class PeakBytes(TorchDispatchMode):
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
def test_no_tensor_of_positions_times_vocabulary_exists(trained, monkeypatch, tmp_path):
    """4 rows, 300 tokens scored in each, V 20,000: 96 MB of logits in float32, 4 MB a chunk."""
    monkeypatch.setattr(model_module, "HEAD_CHUNK", 2 ** 20)
    config = make_config(tmp_path, n_layers=1, vocab_size=20_000, embedding_size=20_000, max_sequence_length=320)
    model = LLaDA(config)
    ids = torch.randint(480, (4, 320), generator=generator())
    keep = torch.arange(20, 320).expand(4, -1)
    targets = torch.randint(480, (4, 300, 6), generator=generator())
    with torch.set_grad_enabled(trained), PeakBytes() as peak:
        logps = model(ids, keep=keep, targets=targets)
        if trained:
            logps.sum().backward()
    assert 2 * 4 * 2 ** 20 < peak.most < 40e6  # 10 and 34 MB seen; without chunks 385 and 592


# ---------------------------------------------------------------- config and weights


def test_init_weights_is_private_repeatable_and_smaller_into_the_residual(tmp_path):
    models = [LLaDA(make_config(tmp_path)) for _ in range(3)]  # nn.Linear itself draws from the global state
    state = torch.get_rng_state()
    for seed, model in zip((1, 1, 2), models):
        init_weights(model, generator(seed))
    assert torch.equal(torch.get_rng_state(), state)
    one, two, other = (dict(model.named_parameters()) for model in models)
    wte, q_proj, down = (f"model.transformer.{n}.weight" for n in ("wte", "blocks.1.q_proj", "blocks.1.ff_out"))
    assert all(torch.equal(one[name], two[name]) for name in one) and not torch.equal(one[wte], other[wte])
    for name, std in ((wte, 0.02), (q_proj, 0.02), (down, 0.01)):  # down: / sqrt(2 * 2 layers)
        assert abs(one[name].std() / std - 1) < 0.05
    assert (one["model.transformer.ln_f.weight"] == 1).all()


def test_llada_8b_has_the_published_names_and_shapes():
    with torch.device("meta"):
        model = LLaDA(Config.from_folder(ROOT / "tests" / "llada_8b"))
    d, mlp, vocab = 4096, 12288, 126464  # written out from the published index
    block = {"attn_norm": (d,), "q_proj": (d, d), "k_proj": (d, d), "v_proj": (d, d), "attn_out": (d, d),
             "ff_norm": (d,), "ff_proj": (mlp, d), "up_proj": (mlp, d), "ff_out": (d, mlp)}
    published = {"wte": (vocab, d), "ln_f": (d,), "ff_out": (vocab, d)}
    published |= {f"blocks.{i}.{name}": shape for i in range(32) for name, shape in block.items()}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == {f"model.transformer.{name}.weight": shape for name, shape in published.items()}
    assert model.state_dict().keys() == shapes.keys()  # no buffers
    assert sum(p.numel() * 2 for p in model.parameters()) == 16_031_162_368  # the index's total_size, bfloat16


def test_config_keeps_the_file(tmp_path):
    config = make_config(tmp_path, unknown={"a": [1]})
    assert config.raw["unknown"] == {"a": [1]} and config.head_dim == 16
    assert make_config(tmp_path, removed=["alibi", "rope", "init_std"]).init_std == 0.02  # absent: the usual value


# ---------------------------------------------------------------- faults of a folder, each refused in one line

def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def set_config(**changed):
    return write("config.json", json.dumps(RAW | changed))


def set_tensor(change):
    """A tensor of SHARD becomes what `change` makes of it; None takes it away."""
    def damage(folder):
        data = load_file(folder / SHARD)
        data[UP] = change(data[UP])
        save_file({name: tensor for name, tensor in data.items() if tensor is not None}, folder / SHARD)
    return damage


def move_shard_out(folder):
    (folder / SHARD).rename(folder.parent / SHARD)
    write(INDEX, f'{{"weight_map": {{"a": "../{SHARD}"}}}}')(folder)


FAULTS = {  # name: (what happens to a good folder, words of the message)
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: expected a JSON object"),
    "config a list": (write("config.json", "[1]"), "config.json: expected a JSON object"),
    "config nested without end": (write("config.json", "[" * 100_000), "config.json: expected a JSON object"),
    "another shape": (set_config(mlp_hidden_size=160), r"0.ff_out.weight is \[64, 176\], the model needs \[64, 160\]"),
    "a tensor missing": (set_tensor(lambda t: None), f"{UP} is missing"),
    "layers too many": (set_config(n_layers=1), "blocks.1.attn_norm.weight is .* no such tensor"),
    "a shard missing": (lambda f: (f / SHARD).unlink(), "blocks.0.ff_norm.weight is missing"),
    "shards of two models": (lambda f: shutil.copy(f / SHARD, f / "model.safetensors"), "are in another file, too"),
    "a shard cut": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-100]), f"{SHARD}: .*incomplete"),
    "an LFS pointer": (write(SHARD, "version https://git-lfs"), f"{SHARD}: .*git lfs pull"),
    "a shard outside": (move_shard_out, "blocks.0.ff_norm.weight is missing"),
    "neither shards nor file": (lambda f: [p.unlink() for p in f.glob("*.safetensors")], "has no model.*pickle"),
    "a renamed pickle": (lambda f: torch.save(torch.ones(9), f / SHARD), f"{SHARD}: "),
    "whole numbers": (set_tensor(lambda t: t.to(torch.int8)), f"{UP} holds .*single bytes"),
    "eight bits": (set_tensor(lambda t: t.to(torch.float8_e4m3fn)), f"{UP} "),
    "NaN": (set_tensor(lambda t: t * float("nan")), f"{UP} holds NaN"),
    "Inf": (set_tensor(lambda t: -t / 0), f"{UP} holds NaN, Inf"),
    "no size": (set_config(mlp_hidden_size=None), "config.json: mlp_hidden_size"),
    **{f"{field} = {value!r}": (set_config(**{field: value}), rf"config.json: .*{field}") for field, value in [
        ("model_type", "llama"), ("model_type", None), ("alibi", True), ("clip_qkv", 8), ("residual_dropout", 0.1),
        ("rope", False), ("block_group_size", 2), ("mask_token_id", None), ("mask_token_id", 512),
        ("eos_token_id", -1),
        ("eos_token_id", 512), ("n_layers", True), ("n_layers", 2.5), ("n_heads", 0), ("d_model", "64"),
        ("d_model", None), ("rope_theta", -1.0), ("rope_theta", 0), ("rms_norm_eps", float("nan")),
        ("max_sequence_length", 0)]},
    "another shape than memory has room for": (
        set_config(d_model=2 ** 20), r"attn_norm.weight is \[64\], the model needs \[1048576\]"),
    "a billion layers": (set_config(n_layers=10 ** 9), "config.json: n_layers = 1000000000"),
    "a config of 20 MB": (set_config(note="x" * 2 * 10 ** 7), "config.json: expected a JSON object"),
    "d_model = 66": (set_config(d_model=66), r"attn_norm.weight is \[64\], the model needs \[66\]"),
    "n_kv_heads = 3": (set_config(n_kv_heads=3), r"k_proj.weight is \[64, 64\], the model needs \[48, 64\]"),
    "weight_tying = 'yes'": (set_config(weight_tying="yes"), "weight_tying must be"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_damaged_folder_is_refused_in_one_line(name, checkpoint):
    damage, words = FAULTS[name]
    damage(checkpoint)
    with pytest.raises(SystemExit, match=rf"^error: {checkpoint}[^\n]*{words}[^\n]*$"):
        LLaDA.from_pretrained(checkpoint)


@pytest.mark.parametrize("name", ["/no/such/folder", "a/b/c", "../b", "has a space/b", "some/model"])
def test_neither_folder_nor_reachable_hub_id(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SystemExit, match=rf"^error: --model {name}: no such folder[^\n]+$"):
        find_checkpoint(name)


def test_the_default_model_is_found_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("data/tiny") == ROOT / "data" / "tiny"


def test_code_in_the_folder_is_never_imported(checkpoint):
    for name in ("modeling_llada.py", "configuration_llada.py", "__init__.py"):
        (checkpoint / name).write_text("raise SystemExit('imported')")
    assert "auto_map" in json.loads((checkpoint / "config.json").read_text())
    LLaDA.from_pretrained(checkpoint)


# ---------------------------------------------------------------- out and in again

@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_has_the_published_tensors_and_layout(name, tmp_path, monkeypatch):
    """In shards, and then, over these, in one file."""
    published = load_file(GOLDEN / name / SHARD) | load_file(GOLDEN / name / SHARD.replace("2-of", "1-of"))
    dtype = published[UP].dtype
    model = LLaDA.from_pretrained(GOLDEN / name, dtype=dtype)
    small = functools.partial(huggingface_hub.save_torch_state_dict, max_shard_size=150_000)
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "save_torch_state_dict", small)
        save_weights(model, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(path.stat().st_size < 155_000 for path in files)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    assert index["weight_map"] == {tensor: path.name for path in files for tensor in load_file(path)}
    again = LLaDA.from_pretrained(tmp_path, dtype=dtype)
    assert again.config == model.config and again.config.raw == json.loads((GOLDEN / name / "config.json").read_text())
    save_weights(again, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == published.keys()
    assert all(torch.equal(saved[key], published[key]) for key in saved)
