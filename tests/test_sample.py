"""The sampler against the official sampler's tokens at every step, and the command line as a user calls it."""
import json

import pytest
import torch
from conftest import golden
from safetensors.torch import load_file

import sample
from data.tokenizer import Tokenizer
from model import LLaDA
from sample import choose, complete, generate, num_transfer_tokens, pad_left

CASES = {name: case for name, case in json.loads(golden("sampler/cases.json").read_text()).items()
         if isinstance(case, dict) and "gen_length" in case}
TENSORS = load_file(golden("sampler/sampler.safetensors"))


def golden_uniform(noise, steps_taken):
    """The official run's random draws, one per step, cut to the window that we ask for."""
    def uniform(window, *size):
        return noise[steps_taken[0]][:, window]
    return uniform


class Biased:
    """The model with a constant added to its logits, as the golden cases about EOS have it."""

    def __init__(self, model, bias):
        self.model, self.bias = model, bias

    def __call__(self, *args, **options):
        return self.model(*args, **options) + self.bias


def run_case(name, case):
    model = LLaDA.from_pretrained(golden(f"{case['model']}/config.json").parent).eval()
    if f"{name}.logit_bias" in TENSORS:
        model = Biased(model, TENSORS[f"{name}.logit_bias"])
    history, taken = [], [0]

    def record(x, unmasked_at, step):
        history.append(x.clone())
        taken[0] = step

    mask = TENSORS.get(f"{name}.attention_mask")
    noise = TENSORS.get(f"{name}.noise")
    eos, eot = case["eos_id"], case["eot_id"]
    done = generate(
        model, TENSORS[f"{name}.prompt"], mask_id=case["mask_id"], gen_length=case["gen_length"],
        diffusion_steps=case["steps"], block_length=case["block_length"], temperature=case["temperature"],
        attn_mask=None if mask is None else mask.bool(), cfg_scale=case["cfg_scale"], remasking=case["remasking"],
        forbid=[eos] if case["logits_eos_inf"] else (),
        commit_last=[eos, eot] if case["confidence_eos_eot_inf"] else (),
        uniform=None if noise is None else golden_uniform(noise, taken), on_step=record)
    return done, torch.stack(history)


@pytest.mark.parametrize("name", CASES)
def test_every_step_equals_the_official_sampler(name):
    done, history = run_case(name, CASES[name])
    assert torch.equal(history, TENSORS[f"{name}.history"])
    assert torch.equal(done.ids, TENSORS[f"{name}.final"])


def test_all_golden_cases_are_here():
    assert len(CASES) == 22


def test_unmasked_at_replays_the_history():
    name = "semi_ar_b3"
    done, history = run_case(name, CASES[name])
    for step, canvas in enumerate(history):
        assert torch.equal(torch.where(done.unmasked_at <= step, done.ids, CASES[name]["mask_id"]), canvas)
    assert done.forwards == CASES[name]["steps"]


def test_num_transfer_tokens_table():
    for row in json.loads(golden("sampler/num_transfer_tokens.json").read_text()):
        assert [num_transfer_tokens(m, row["steps"]) for m in row["masks_per_row"]] == row["num_transfer_tokens"]


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.0])
def test_gumbel_choice(temperature):
    tensors = load_file(golden("sampler/gumbel.safetensors"))
    logits = tensors["logits"]
    found = choose(torch.cat([logits, logits[..., :1]], -1), temperature,
                   lambda window, size: torch.cat([tensors["noise"], tensors["noise"][..., :1]], -1), None, mask_id=-1)
    assert torch.equal(found, tensors[f"t{temperature}.argmax"])


def test_samples_follow_the_softmax_and_never_the_mask_token():
    """Chi-square of 20,000 draws from five symbols, one of them [MASK], at two temperatures."""
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 3.0], dtype=torch.float64)
    for temperature in (0.5, 1.3):
        g = torch.Generator().manual_seed(1)
        tokens = choose(logits.expand(20_000, 1, 5), temperature,
                        lambda w, size: torch.rand(20_000, 1, 5, generator=g, dtype=torch.float64), None, mask_id=4)
        expected = (logits[:4] / temperature).softmax(0) * 20_000
        counts = tokens.flatten().bincount(minlength=5).double()
        assert counts[4] == 0
        assert ((counts[:4] - expected) ** 2 / expected).sum() < 16.3  # 3 degrees of freedom, p = 0.001


# ---------------------------------------------------------------- batches of prompts

@pytest.fixture(scope="module")
def tiny():
    model = LLaDA.from_pretrained("data/tiny").eval()
    return model, Tokenizer.from_folder("data/tiny", model.config)


SHORT = dict(gen_length=16, diffusion_steps=8, block_length=8)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_padded_row_equals_the_row_alone(tiny, temperature):
    model, tokenizer = tiny
    prompts = ["What is 7 * 3?", "Hi", "Numbers: 3, 7, 12\nTarget: 22"]
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
    one = complete(model, tokenizer, ["Hi"] * 4, keys=[(1, i) for i in range(4)], **options)
    two = complete(model, tokenizer, ["Hi"] * 4, keys=[(1, i) for i in range(4)], **options)
    assert torch.equal(one.ids, two.ids)
    assert len({tuple(row) for row in one.ids.tolist()}) > 1  # rows of one prompt draw different noise
    assert torch.equal(state, torch.get_rng_state())


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
