"""model.py against the reference tensors (tests/golden/README.md) and against float64 and brute force."""
import json
import weakref

import pytest
import torch
from helpers import GOLDEN, ROOT, generator, reference_model, tensors, worst
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_module
from model import Config, LLaDA, RMSNorm, apply_rope, rope_tables

MODELS = ("llada_mha", "llada_gqa")
MASK_ID = 500
IDS = torch.randint(480, (2, 11), generator=generator(5))
RAW = json.loads((GOLDEN / "llada_mha" / "config.json").read_text())


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
    assert worst(model(ids, keep=slice(4, 17)), logits[:, 4:17]) < 1e-12
    assert worst(model(ids, keep=index), logits.gather(1, index[..., None].expand(-1, -1, 512))) < 1e-12
    assert worst(model(ids, keep=masked), logits[masked]) < 1e-12
    assert model(ids, keep=torch.zeros_like(masked)).shape == (0, 512)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_block_with_a_cache_equals_the_plain_block(name):
    """Over any part of the canvas after a pass over all of it, with padding and grouped heads."""
    data, model = tensors(f"{name}/cases.safetensors"), reference_model(name, torch.float64)
    block, config = model.blocks[0], model.config
    attn_mask = data["PL.attention_mask"].bool()[:, None, None]
    x = model.model["transformer"]["wte"](data["PL.input_ids"])  # (3, 20, C)
    cos, sin = rope_tables(20, config.head_dim, config.rope_theta, "cpu")
    plain = block(x, cos, sin, attn_mask)
    keys, values = torch.zeros(2, 3, config.n_kv_heads, 20, config.head_dim, dtype=torch.float64)
    for start, end in ((0, 20), (9, 12), (5, 20), (0, 7)):
        part = x[:, start:end], cos[start:end], sin[start:end], attn_mask
        assert worst(block(*part, cache=(keys, values, start)), plain[:, start:end]) < 1e-10
        kept = block(*part, keep=slice(1, 3), cache=(keys, values, start))
        assert worst(kept, plain[:, start + 1:start + 3]) < 1e-10
    block(x[:, 9:12] + 1, cos[9:12], sin[9:12], attn_mask, cache=(keys, values, 9))
    changed = block(x[:, :7], cos[:7], sin[:7], attn_mask, cache=(keys, values, 0))
    assert worst(changed, plain[:, :7]) > 1e-3  # a changed part is seen by the next one


def test_a_too_long_input_is_a_plain_error():
    with pytest.raises(ValueError, match="129 tokens exceed max_sequence_length 128"):
        reference_model("llada_mha")(torch.zeros(1, 129, dtype=torch.int64))


# ---------------------------------------------------------------- scoring tokens in chunks

@pytest.mark.parametrize("tokens", [(), (3,)])
@pytest.mark.parametrize("keep", [slice(3, 9), torch.tensor([[1, 5], [0, 9]]), IDS % 3 == 0, IDS < 0])
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
    """8 rows, 300 tokens scored in each, V 20,000: 192 MB of logits in float32, 4 MB a chunk."""
    monkeypatch.setattr(model_module, "HEAD_CHUNK", 2 ** 20)
    config = make_config(tmp_path, n_layers=1, vocab_size=20_000, embedding_size=20_000, max_sequence_length=320)
    model = LLaDA(config).init_weights(generator())
    ids = torch.randint(480, (8, 320), generator=generator())
    targets = torch.randint(480, (8, 300, 6), generator=generator())
    with torch.set_grad_enabled(trained), PeakBytes() as peak:
        logps = model(ids, keep=slice(20, 320), targets=targets)
        if trained:
            logps.sum().backward()
    assert 2 * 4 * 2 ** 20 < peak.most < 40e6  # 10 and 34 MB seen; without chunks 385 and 592


# ---------------------------------------------------------------- config and weights

@torch.no_grad()
def test_tied_weights_equal_an_untied_head_with_the_same_values(tmp_path):
    untied = LLaDA(make_config(tmp_path)).init_weights(generator())
    tied = LLaDA(make_config(tmp_path, weight_tying=True))
    head = "model.transformer.ff_out.weight"
    tied.load_state_dict({name: p for name, p in untied.state_dict().items() if name != head}, strict=True)
    untied.get_parameter(head).copy_(untied.get_parameter("model.transformer.wte.weight"))
    assert torch.equal(tied(IDS), untied(IDS))


def test_init_weights_is_private_repeatable_and_smaller_into_the_residual(tmp_path):
    models = [LLaDA(make_config(tmp_path)) for _ in range(3)]  # nn.Linear itself draws from the global state
    state = torch.get_rng_state()
    for seed, model in zip((1, 1, 2), models):
        model.init_weights(generator(seed))
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


def test_config_fills_in_nulls_and_keeps_the_file(tmp_path):
    config = make_config(tmp_path, n_kv_heads=None, embedding_size=None, mlp_hidden_size=None, unknown={"a": [1]})
    assert (config.n_kv_heads, config.embedding_size, config.mlp_hidden_size) == (4, 512, 4 * 64)
    assert config.raw["unknown"] == {"a": [1]} and config.head_dim == 16
    assert make_config(tmp_path, mlp_ratio=7).mlp_hidden_size == 176  # the ratio only counts without a size
    assert make_config(tmp_path, removed=["alibi", "rope", "init_std"]).init_std == 0.02  # absent: the usual value


@pytest.mark.parametrize("field, value", [  # None: as if it were not there
    ("model_type", "llama"), ("model_type", None), ("mask_token_id", None), ("n_layers", None), ("alibi", True),
    ("clip_qkv", 8), ("block_group_size", 2), ("residual_dropout", 0.1), ("rope", False), ("d_model", "64"),
    ("n_layers", 2.5), ("n_layers", True), ("n_layers", 0), ("rope_theta", -1.0), ("rms_norm_eps", float("nan")),
    ("weight_tying", "yes"), ("d_model", 66), ("n_kv_heads", 3), ("mask_token_id", 512), ("eos_token_id", -1)])
def test_config_names_the_field_it_refuses(field, value, tmp_path):
    with pytest.raises(SystemExit, match=rf"^error: {tmp_path}/config.json: [^\n]*{field}[^\n]*$"):
        make_config(tmp_path, **{field: value})
