"""The sampler against the official sampler's tokens at every step, and the command line as a user calls it."""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import golden
from safetensors.torch import load_file

import sample
from d1 import generator
from data import TASKS
from data.tokenizer import Tokenizer
from model import LLaDA, add_lora, lora_modules
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

    def model(ids, keep, **_):
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


@pytest.mark.parametrize("fast", [{}, dict(cache="prefix"), dict(threshold=0.9), dict(cache="dual", threshold=0.7)])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_padded_row_equals_the_row_alone(tiny, temperature, fast):
    model, tokenizer = tiny
    prompts = ["What is 7 * 3?", "Hi", *PUZZLES]
    keys, options = [(0, i) for i in range(len(prompts))], dict(temperature=temperature, **SHORT, **fast)
    together = complete(model, tokenizer, prompts, keys=keys, rollout_batch=len(prompts), **options)
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


# ---------------------------------------------------------------- the fast sampler: --cache and --threshold

@torch.no_grad()
def row_by_hand(model, x, attn_mask, noise, *, mask_id, eos_id, gen_length, diffusion_steps, block_length, temperature,
                cache, threshold, cfg_scale):
    """One row by loops, each round a plain pass over the whole canvas in which hooks put back frozen keys and values.

    x (P,), attn_mask (P,), noise (steps, 2, block_length). Returns ids (T,), unmasked_at (T,) and the rounds it took.
    """
    P, T = len(x), len(x) + gen_length
    rounds = block_length if threshold else diffusion_steps * block_length // gen_length
    x, unmasked_at = [*x.tolist()] + [mask_id] * gen_length, [-1] * T
    mask, total = torch.cat([attn_mask, torch.ones(gen_length, dtype=torch.bool)])[None], 0
    for begin in range(P, T, block_length):
        frozen, now = {}, {}
        end = T if cache == "prefix" else begin + block_length

        def put_back(module, args, output):
            old = frozen.setdefault((now["pass"], module), output)
            return torch.cat([old[:, :begin], output[:, begin:end], old[:, end:]], 1) if cache else output

        hooks = [p.register_forward_hook(put_back) for block in model.blocks for p in (block.k_proj, block.v_proj)]
        for i, count in enumerate(num_transfer_tokens(block_length, rounds)):
            masked = [at for at in range(begin, begin + block_length) if x[at] == mask_id]
            if not masked:
                break
            now["pass"], canvas = "conditional", torch.tensor([x])
            logits = model(canvas, attn_mask=mask)[0]
            if cfg_scale:
                now["pass"], canvas = "unconditional", torch.tensor([[mask_id] * P + x[P:]])
                logits = (1 + cfg_scale) * logits - cfg_scale * model(canvas, attn_mask=mask)[0]
            step, tokens, sure = (begin - P) // block_length * rounds + i, {}, {}
            for slot, at in enumerate(masked):
                tokens[at] = int(choose(logits[at], temperature, noise[step, 0, slot], mask_id))
                sure[at] = float(logits[at].softmax(-1)[tokens[at]])
            ranked = sorted(masked, key=lambda at: -sure[at])
            for at in [at for at in ranked if sure[at] > threshold] or ranked[:1] if threshold else ranked[:count]:
                x[at], unmasked_at[at] = tokens[at], step
            total += 1
        for hook in hooks:
            hook.remove()
        if eos_id in x[begin:begin + block_length]:
            rest = T - begin - block_length
            return x[:T - rest] + [eos_id] * rest, unmasked_at[:T - rest] + [max(unmasked_at)] * rest, total
    return x, unmasked_at, total


def random_or_tiny(name):
    """A model in float64, and four prompts of unequal length, padded."""
    model = LLaDA.from_pretrained("data/tiny" if name == "tiny" else golden(name), dtype=torch.float64).eval()
    if name == "tiny":
        tokenizer = Tokenizer.from_folder("data/tiny", model.config)
        return model, *pad_left([tokenizer.encode_prompt(p) for p in ("Hi", *PUZZLES[:3])], tokenizer.eos_id, "cpu")
    for m in lora_modules(add_lora(model, 4, 8, ["q_proj", "k_proj", "v_proj"], generator(0))).values():
        torch.nn.init.normal_(m.lora_B, 0, 0.1, generator=generator(1))
    return model, *pad_left([[5] * 3, [6, 7] * 3, [8] * 9, [3, 4, 5]], 0, "cpu")


@pytest.mark.parametrize("name, temperature, cfg_scale, threshold", [
    ("tiny", 0.0, 0.0, 0.9), ("tiny", 0.9, 0.0, 0.9), ("tiny", 0.0, 0.0, None), ("llada_gqa", 0.9, 0.0, None),
    ("llada_gqa", 0.0, 0.0, 0.3), ("llada_mha", 0.9, 0.7, 0.3)])
@pytest.mark.parametrize("cache", [None, "prefix", "dual"])
def test_every_row_equals_the_row_by_hand(name, temperature, cfg_scale, threshold, cache):
    model, prompt, attn_mask = random_or_tiny(name)
    options = dict(mask_id=model.config.mask_token_id, eos_id=model.config.eos_token_id, gen_length=24,
                   diffusion_steps=12, block_length=8, temperature=temperature, cache=cache, threshold=threshold,
                   cfg_scale=cfg_scale)
    noise = row_noise([(3, i) for i in range(4)], 24 if threshold else 12, 8)
    done = generate(model, prompt, attn_mask=attn_mask, noise=noise, **options)
    rounds = []
    for row in range(4):
        ids, unmasked_at, total = row_by_hand(model, prompt[row], attn_mask[row], noise[row], **options)
        assert done.ids[row].tolist() == ids and done.unmasked_at[row].tolist() == unmasked_at
        assert len({*unmasked_at} - {-1}) == total
        rounds.append(total)
        one = slice(row, row + 1)
        alone = generate(model, prompt[one], attn_mask=attn_mask[one], noise=noise[one], **options)
        assert alone.forwards == total * (2 if cfg_scale else 1) and alone.ids[0].tolist() == ids
    assert not threshold or min(rounds) < max(rounds) < 24  # rows differ, tokens come several at a time


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("block_length", [8, 16])
def test_a_cache_refreshed_every_round_is_exact(tiny, cache, block_length):
    """Token by token, also where the block is the whole canvas; and one refreshed once per block is not."""
    model, tokenizer = tiny
    prompt, attn_mask = pad_left([tokenizer.encode_prompt(p) for p in PUZZLES], tokenizer.eos_id, "cpu")
    canvas = []

    def refreshed(ids, *, attn_mask, keep, cache, start):
        if start:
            cache.clear()
            model(canvas[-1], attn_mask=attn_mask, cache=cache)
        return model(ids, attn_mask=attn_mask, keep=keep, cache=cache, start=start)

    options = dict(mask_id=tokenizer.mask_id, attn_mask=attn_mask, gen_length=16, diffusion_steps=16,
                   block_length=block_length, on_step=lambda x, unmasked_at, step: canvas.append(x.clone()))
    exact = generate(model, prompt, **options)
    done = generate(refreshed, prompt, cache=cache, **options)
    assert torch.equal(done.ids, exact.ids) and torch.equal(done.unmasked_at, exact.unmasked_at)
    assert not torch.equal(generate(model, prompt, cache=cache, **options).unmasked_at, exact.unmasked_at)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_threshold_that_nothing_exceeds_commits_one_token_per_round(tiny, temperature):
    model, tokenizer = tiny
    options = dict(keys=[(0, i) for i in range(8)], rollout_batch=8, gen_length=16, block_length=8,
                   temperature=temperature)
    done = complete(model, tokenizer, PUZZLES, diffusion_steps=2, threshold=1.0, **options)
    want = complete(model, tokenizer, PUZZLES, diffusion_steps=16, **options)
    assert torch.equal(done.ids, want.ids) and torch.equal(done.unmasked_at, want.unmasked_at)


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


@pytest.mark.parametrize("more", [[], ["--cache", "dual", "--threshold", 0.9]])
def test_evaluation_does_not_depend_on_the_batch(tmp_path, more):
    texts = []
    for batch in (1, 4):
        call("--task", "sudoku", "--count", 4, "--temperature", 0.9, "--out", tmp_path / str(batch),
             "--rollout_batch", batch, *more)
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
    (["--prompt", "x", "--threshold", "0"], "--threshold 0.0 must lie in (0, 1]"),
    (["--prompt", "x", "--threshold", "90"], "--threshold 90.0 must lie in (0, 1]"),
    (["--prompt", "x", "--threshold", "0.9", "--remasking", "random"], "--threshold needs --remasking low_confidence"),
])
def test_bad_input_is_one_line(words, message):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("a CUDA GPU is here")
    with pytest.raises(SystemExit) as stopped:
        call(*words) if "cuda" not in words else sample.main(sample.parse_args(words))
    assert message in str(stopped.value) and "\n" not in str(stopped.value)
