"""The sampler against the official sampler's tokens at every step, and the command line as a user calls it."""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import golden
from safetensors.torch import load_file

import sample
from data import TASKS
from data.tokenizer import Tokenizer
from model import LLaDA
from parallel import processes
from sample import choose, complete, generate, num_transfer_tokens, pad_left, row_noise
from transcription import gumbel_argmax

CASES = {name: case for name, case in json.loads(golden("sampler/cases.json").read_text()).items()
         if isinstance(case, dict) and "gen_length" in case}
TENSORS = load_file(golden("sampler/sampler.safetensors"))


def masked_positions(name, case):
    """The positions (B, M) that are masked before each step of the official run, in the canvas up to its block."""
    prompt, rounds = TENSORS[f"{name}.prompt"], case["steps"] * case["block_length"] // case["gen_length"]
    before = [torch.nn.functional.pad(prompt, (0, case["gen_length"]), value=case["mask_id"]),
              *TENSORS[f"{name}.history"]]
    for step in range(case["steps"]):
        end = prompt.shape[1] + (step // rounds + 1) * case["block_length"]
        yield (before[step][:, :end] == case["mask_id"]).nonzero()[:, 1].view(len(prompt), -1)


def official_draws(name, case):
    """The official run's random draws of each step, (B, M) or (B, M, V), cut to the masked positions."""
    noise = TENSORS.get(f"{name}.noise", ())
    return [torch.stack([row[at] for row, at in zip(draws, positions)])
            for draws, positions in zip(noise, masked_positions(name, case))]


class Biased:
    """The model with a constant added to its logits, as the golden cases about EOS have it."""

    def __init__(self, model, bias):
        self.model, self.bias = model, bias

    def __call__(self, *args, **options):
        return self.model(*args, **options) + self.bias


def run_case(name, case, monkeypatch):
    model = LLaDA.from_pretrained(golden(f"{case['model']}/config.json").parent).eval()
    if f"{name}.logit_bias" in TENSORS:
        model = Biased(model, TENSORS[f"{name}.logit_bias"])
    history, draws, noise = [], official_draws(name, case), None
    if case["remasking"] == "random":
        noise = torch.zeros(case["batch"], case["steps"], 2, case["block_length"])
        for step, values in enumerate(draws):
            noise[:, step, 1, :values.shape[1]] = values
    elif draws:  # the official choice by Gumbel noise in the place of ours
        noise = torch.zeros(case["batch"], case["steps"], 2, case["block_length"])
        monkeypatch.setattr(sample, "choose", lambda logits, temperature, uniform, mask_id:
                            gumbel_argmax(logits, temperature, draws[len(history)]))
    mask, eos, eot = TENSORS.get(f"{name}.attention_mask"), case["eos_id"], case["eot_id"]
    done = generate(
        model, TENSORS[f"{name}.prompt"], mask_id=case["mask_id"], gen_length=case["gen_length"],
        diffusion_steps=case["steps"], block_length=case["block_length"], temperature=case["temperature"],
        attn_mask=None if mask is None else mask.bool(), cfg_scale=case["cfg_scale"], remasking=case["remasking"],
        forbid=[eos] if case["logits_eos_inf"] else (),
        commit_last=[eos, eot] if case["confidence_eos_eot_inf"] else (),
        noise=noise, on_step=lambda x, unmasked_at, step: history.append(x.clone()))
    return done, torch.stack(history)


@pytest.mark.parametrize("name", CASES)
def test_every_step_equals_the_official_sampler(name, monkeypatch):
    done, history = run_case(name, CASES[name], monkeypatch)
    assert torch.equal(history, TENSORS[f"{name}.history"])
    assert torch.equal(done.ids, TENSORS[f"{name}.final"])


def test_all_golden_cases_are_here():
    assert len(CASES) == 22


def test_unmasked_at_replays_the_history(monkeypatch):
    name = "semi_ar_b3"
    done, history = run_case(name, CASES[name], monkeypatch)
    for step, canvas in enumerate(history):
        assert torch.equal(torch.where(done.unmasked_at <= step, done.ids, CASES[name]["mask_id"]), canvas)
    assert done.forwards == CASES[name]["steps"]


def test_num_transfer_tokens_table():
    for row in json.loads(golden("sampler/num_transfer_tokens.json").read_text()):
        assert [num_transfer_tokens(m, row["steps"]) for m in row["masks_per_row"]] == row["num_transfer_tokens"]


@pytest.mark.parametrize("temperature", [0.5, 1.3])
@pytest.mark.parametrize("how", [choose, gumbel_argmax])
def test_samples_follow_the_softmax(how, temperature):
    """Chi-square of 20,000 draws from five symbols, ours and LLaDA's, at two temperatures; ours never draws [MASK]."""
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 3.0], dtype=torch.float64)
    g, ours = torch.Generator().manual_seed(1), how is choose
    uniform = torch.rand(20_000, *(() if ours else (5,)), generator=g, dtype=torch.float64)
    tokens = how(logits.expand(20_000, 5), temperature, uniform, *([4] if ours else []))
    expected = (logits[:4 if ours else 5] / temperature).softmax(0) * 20_000
    counts = tokens.bincount(minlength=5).double()
    assert not ours or counts[4] == 0
    # 3 or 4 degrees of freedom, p = 0.001
    assert ((counts[:len(expected)] - expected) ** 2 / expected).sum() < (16.3 if ours else 18.5)


def test_the_tail_is_sampled_and_the_ends_are_tokens():
    """Probability 1e-12 has its share of [0, 1); the smallest and the largest draw give tokens that can be."""
    p = torch.tensor([0.0, 1e-12, 1 - 3e-12, 2e-12, 0.0, 0.0], dtype=torch.float64)
    draws = torch.tensor([0.0, 0.9e-12, 1.1e-12, 1 - 2.2e-12, 1 - 1.8e-12, 1 - 2 ** -53], dtype=torch.float64)
    found = choose(p.log().expand(6, 6), 1.0, draws, mask_id=5)
    assert found.tolist() == [1, 1, 2, 2, 3, 3]


def test_draws_are_independent_between_positions_rounds_and_rows():
    """Chi-square of the nine pairs that two positions, committed one after the other in random order, can hold."""
    p = torch.tensor([0.5, 0.3, 0.2])

    def model(ids, attn_mask, keep):
        return torch.cat([p.log(), torch.tensor([2.0])]).repeat(*keep.shape, 1)  # the last one is [MASK]

    done = generate(model, torch.zeros(9000, 1, dtype=torch.long), mask_id=3, gen_length=2, diffusion_steps=2,
                    block_length=2, temperature=1.0, remasking="random",
                    noise=row_noise([(0, i) for i in range(9000)], 2, 2))
    counts = (3 * done.ids[:, 1] + done.ids[:, 2]).bincount(minlength=9)
    expected = 9000 * torch.outer(p, p).flatten()
    assert ((counts - expected) ** 2 / expected).sum() < 26.1  # 8 degrees of freedom, p = 0.001
    first = done.unmasked_at[:, 1] == 0
    assert abs(first.double().mean() - 0.5) < 0.02  # the order has draws of its own
    assert abs((done.ids[first, 1] == 0).double().mean() - 0.5) < 0.03


# ---------------------------------------------------------------- batches of prompts

@pytest.fixture(scope="module")
def tiny():
    model = LLaDA.from_pretrained("data/tiny").eval()
    return model, Tokenizer.from_folder("data/tiny", model.config)


PUZZLES = [example["prompt"] for example in TASKS["countdown"].load("test", count=8)]
SHORT = dict(gen_length=16, diffusion_steps=8, block_length=8)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_padded_row_equals_the_row_alone(tiny, temperature):
    model, tokenizer = tiny
    prompts = ["What is 7 * 3?", "Hi", PUZZLES[0]]
    keys, options = [(0, i) for i in range(3)], dict(temperature=temperature, **SHORT)
    together = complete(model, tokenizer, prompts, keys=keys, rollout_batch=3, **options)
    for i, prompt in enumerate(prompts):
        alone = complete(model, tokenizer, [prompt], keys=keys[i:i + 1], rollout_batch=1, **options)
        assert torch.equal(alone.ids[0], together.ids[i])
        assert torch.equal(alone.unmasked_at[0], together.unmasked_at[i])


def test_keys_decide_the_noise(tiny):
    model, tokenizer = tiny
    state = torch.get_rng_state()
    options = dict(rollout_batch=4, temperature=1.0, **SHORT)
    one = complete(model, tokenizer, [PUZZLES[0]] * 4, keys=[(1, i) for i in range(4)], **options)
    two = complete(model, tokenizer, [PUZZLES[0]] * 4, keys=[(1, i) for i in range(4)], **options)
    assert torch.equal(one.ids, two.ids)
    assert len({tuple(row) for row in one.ids.tolist()}) > 1  # rows of one prompt draw different noise
    assert torch.equal(state, torch.get_rng_state())


class Counted(torch.nn.Module):
    """The model, noting how many rows each forward pass has and how many positions come out of it."""

    def __init__(self, model):
        super().__init__()
        self.model, self.shapes = model, []

    def forward(self, ids, **options):
        logits = self.model(ids, **options)
        self.shapes.append(tuple(logits.shape[:2]))
        return logits


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_rows_that_ended_leave_and_nothing_changes(tiny, temperature):
    """Texts, counted tokens and their order of commit are those of a full canvas; what follows the first EOS is EOS."""
    model, tokenizer = tiny
    prompts = ["Hi", *PUZZLES[1:]]
    options = dict(keys=[(0, i) for i in range(8)], rollout_batch=8, temperature=temperature, gen_length=32,
                   diffusion_steps=16, block_length=8)
    shrinking, full = Counted(model), Counted(model)
    done = complete(shrinking, tokenizer, prompts, **options)
    want = complete(full, tokenizer, prompts, fill_canvas=True, **options)
    assert torch.equal(done.ids, want.ids) and torch.equal(done.lengths, want.lengths) and done.texts == want.texts
    counted = sample.completion_mask(done.ids, tokenizer.eos_id)
    assert torch.equal(done.unmasked_at[counted], want.unmasked_at[counted])
    assert (done.ids[~counted] == tokenizer.eos_id).all() and (done.unmasked_at >= 0).all()
    assert full.shapes == [(8, 8), (8, 6), (8, 4), (8, 2)] * 4  # logits of what is masked in the block, nothing else
    assert {rows for rows, _ in shrinking.shapes[4:]} != {8} and shrinking.shapes[:4] == full.shapes[:4]
    alone = Counted(model)
    complete(alone, tokenizer, prompts[:1], **options | dict(keys=[(0, 0)]))
    assert len(alone.shapes) < 16 and done.lengths[0] < 32  # a batch in which all rows ended is done


def test_masks_in_prompts_must_be_equally_many(tiny):
    model, tokenizer = tiny
    prompt = torch.tensor([[1, tokenizer.mask_id, 3], [1, 2, 3]])
    with pytest.raises(ValueError, match="equally many"):
        generate(model, prompt, mask_id=tokenizer.mask_id, **SHORT)


def test_evaluation_batches_prompts_of_like_length(tiny):
    """The longest first; rows come back in order, also from an evaluation that goes on."""
    model, tokenizer = tiny
    examples = [{"prompt": "Hi " * n} for n in (1, 5, 2, 7, 3)]
    task = SimpleNamespace(score=lambda text, example: {"accuracy": float(len(text))})
    kept, options = [], dict(rollout_batch=2, temperature=0.9, keep=lambda rows: kept.append(rows), **SHORT)
    with processes("cpu") as procs:
        metrics, rows = sample.evaluate(model, tokenizer, task, examples, procs, 0, **options)
        again = sample.evaluate(model, tokenizer, task, examples, procs, 0, rows=[rows[3], rows[2]], **options)
    assert [[row["index"] for row in part] for part in kept] == [[3, 1], [4, 2], [0], [1, 4], [0]]
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4] and again == (metrics, rows)


def test_the_trained_weights_can_still_be_trained_after_sampling(tiny):
    model, tokenizer = tiny
    ids = generate(model, pad_left([[1, 2, 3]], 0, "cpu")[0], mask_id=tokenizer.mask_id, **SHORT).ids
    model(ids).sum().backward()  # would raise if sampling had made inference tensors
    model.zero_grad()


@pytest.mark.parametrize("bad, words", [
    (dict(gen_length=30), "block_length 8 does not divide --gen_length 30"),
    (dict(diffusion_steps=5), r"use one of \[4, 8, 12"),
    (dict(diffusion_steps=64), "at most --gen_length"),
    (dict(block_length=0), "at least 1"),
])
def test_impossible_schedules_name_the_valid_values(bad, words):
    with pytest.raises(ValueError, match=words):
        sample.check_schedule(**{**dict(gen_length=32, diffusion_steps=16, block_length=8), **bad})


# ---------------------------------------------------------------- command line

def call(*words):
    return sample.main(sample.parse_args([*map(str, words), "--device", "cpu"]))


def test_evaluation_writes_every_generation(tmp_path, capsys):
    summary = call("--task", "countdown", "--count", 5, "--out", tmp_path / "run", "--rollout_batch", 2)
    rows = [json.loads(line) for line in (tmp_path / "run" / "countdown_32.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    assert summary["results"][0]["accuracy"] == sum(row["accuracy"] for row in rows) / 5
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["dtype"] == "float32"
    shown = capsys.readouterr().out
    for word in ("accuracy", "format", "effective_tokens", "tokens_per_second", "device", "dtype", "block_length"):
        assert word in shown


def test_evaluation_does_not_depend_on_the_batch(tmp_path):
    texts = []
    for batch in (1, 4):
        call("--task", "sudoku", "--count", 4, "--temperature", 0.9, "--out", tmp_path / str(batch),
             "--rollout_batch", batch)
        lines = (tmp_path / str(batch) / "sudoku_32.jsonl").read_text().splitlines()
        texts.append([json.loads(line)["completion"] for line in lines])
    assert texts[0] == texts[1]


def test_a_prompt_is_answered_and_watched(capsys):
    call("--prompt", "Numbers: 3, 7, 12\nTarget: 22", "--gen_length", 16, "--diffusion_steps", 4)
    plain = capsys.readouterr().out
    call("--prompt", "Numbers: 3, 7, 12\nTarget: 22", "--gen_length", 16, "--diffusion_steps", 4, "--watch")
    watched = capsys.readouterr().out
    assert "step   1/4" in watched and "░" in watched
    assert watched.endswith(plain)


def test_the_canvas_is_redrawn_in_place_on_a_terminal(tiny):
    model, tokenizer = tiny

    class Terminal(list):
        def isatty(self):
            return True

        def write(self, text):
            self.append(text)

        def flush(self):
            pass

    screen = Terminal()
    ids, _ = pad_left([tokenizer.encode_prompt("Hi")], 0, "cpu")
    generate(model, ids, mask_id=tokenizer.mask_id, on_step=sample.watcher(tokenizer, ids.shape[1], 8, screen), **SHORT)
    text = "".join(screen)
    assert text.count("\x1b[J") == 7 and "\x1b[38;5;21m" in text and "\x1b[38;5;196m" in text


@pytest.mark.parametrize("words, message", [
    ([], "--task, --prompt or --regrade is needed"),
    (["--model", "nowhere", "--prompt", "x"], "--model nowhere: no such folder"),
    (["--task", "countdown", "--data", "nofile.jsonl"], "--data nofile.jsonl: no such file"),
    (["--prompt", "x", "--device", "cuda"], "no CUDA GPU"),
    (["--prompt", "x", "--block_length", "7"], "--block_length 7 does not divide"),
    (["--prompt", "x", "--temperature", "-1"], "--temperature must not be negative"),
    (["--task", "countdown", "--count", "0"], "--count must be at least 1"),
])
def test_bad_input_is_one_line(words, message):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("a CUDA GPU is here")
    with pytest.raises(SystemExit) as stopped:
        call(*words) if "cuda" not in words else sample.main(sample.parse_args(words))
    assert message in str(stopped.value) and "\n" not in str(stopped.value)
