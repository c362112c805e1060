"""What measures speed and variance measures what it says, on sizes that take seconds."""
import json

import benchmark
import pytest
import scaling
import torch
import variance
from conftest import reference, worst

from d1 import group_advantages


def test_moments_are_mean_and_variance():
    vectors, moments = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), variance.Moments()
    for vector in vectors:
        moments.add(vector)
    assert torch.allclose(moments.mean, vectors.mean(0)) and moments.count == 7
    assert moments.variance == pytest.approx(float(vectors.var(0).sum()), rel=1e-5)


@pytest.fixture
def group():
    """A prompt, six completions and advantages for the reference model."""
    g, G = torch.Generator().manual_seed(1), variance.G
    prompt, completions = torch.randint(400, (1, 12), generator=g), torch.randint(400, (1, G, 8), generator=g)
    return prompt, completions, group_advantages(torch.rand(1, G, generator=g)), g


def test_ways_to_spend_masks_agree_where_the_masks_do(group):
    prompt, completions, advantages, g = group
    model = reference("llada_mha", torch.float64)

    def gradient(masked):
        return variance.gradient(model, prompt, masked, completions, advantages.double(), 48)

    masks = torch.rand(3, 1, 12, generator=g) < 0.3
    shared = [gradient(mask[None]) for mask in masks]
    assert worst(gradient(masks[:1].expand(variance.G, -1, -1)), shared[0]) < 1e-12
    assert worst(gradient(masks.transpose(0, 1)), torch.stack(shared).mean(0)) < 1e-12  # K = 3: the mean of theirs
    assert worst(shared[0], shared[1]) > 1e-6


def test_variances_of_masks_and_prompts(group, monkeypatch):
    """On gradients of known variance: 1 between prompts, 4 of a shared mask, 8 of masks of their own; flat groups."""
    prompt, completions, advantages, g = group
    groups = [(prompt, completions, advantages)] * 400
    model, means = torch.nn.Linear(1, 1, bias=False), torch.randn(400, generator=g).repeat_interleave(24)
    model.config, calls = reference("llada_mha").config, iter(means)

    def gradient(model, prompt, masked, *rest):
        return next(calls) + torch.randn(1, generator=g) * (8 if len(masked) > 1 else 4) ** 0.5

    monkeypatch.setattr(variance, "gradient", gradient)
    found = variance.measure(model, groups, 0.15, 12, 0)
    for form, mask in zip(variance.FORMS, (8, 4, 2, 4 / 3, 4 / 6)):
        assert found[form] == pytest.approx((mask, 1 + mask), rel=0.15), form
    flat = variance.measure(model, [(prompt, completions, torch.zeros_like(advantages))] * 2, 0.15, 12, 0)
    assert set(flat.values()) == {(0.0, 0.0)}


def test_variance_runs(tmp_path, capsys):
    words = ["--tasks", "countdown", "--p_mask_prompt", "0.15", "--prompts", "2", "--seeds", "1"]
    variance.main(variance.parse_args([*words, "--json", str(tmp_path / "found.json")]))
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["masks"] for row in found["rows"]] == variance.FORMS and found["prompts"] == 2
    assert all(0 < row["mask"][0] and 0 < row["mask_share"] for row in found["rows"])
    with pytest.raises(SystemExit):
        variance.parse_args(["--draws", "6"])


def test_exponents(monkeypatch):
    sizes = [1, 4, 16, 64]
    assert scaling.exponent(sizes, [3 * size ** 1.5 for size in sizes]) == pytest.approx(1.5)
    monkeypatch.setattr(scaling, "SAMPLER", {"rows": ((1, 2), "1")})
    monkeypatch.setattr(scaling, "UPDATE", {"group": ((2, 16), "0")})
    found = scaling.main(scaling.parse_args(["--repeats", "1", "--device", "cpu"]))
    assert found["sampler rows"]["arithmetic"] == pytest.approx(1)
    assert found["update group"]["arithmetic"] == pytest.approx(0)


def test_the_benchmark_of_the_8b_in_small(tmp_path, capsys):
    ratios = benchmark.main(benchmark.parse_args(
        ["--size", "8b", "--shape", "tiny", "--rounds", "1", "--device", "cpu", "--profile", f"{tmp_path}/profile"]))
    keys = [f"sampler_{name}{rows}" for rows in ("", "_one_row") for name in ("exact_t0", "exact_t09", "fast")]
    assert set(ratios) == {*keys, "update_phase", "step_exact", "step_fast"}
    assert (tmp_path / "profile").read_text().count("aten::") == 20
