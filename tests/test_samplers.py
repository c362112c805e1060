"""variants/fast_dllm.py, variants/llada_sampler.py and the program that evaluates with them."""
import functools
import json
import subprocess
import sys

import pytest
import torch
from helpers import GOLDEN, ROOT, embedded, read_rows, reference_model, tensors, worst
from torch.nn import functional as F

import sample
from data import TASKS
from model import LLaDA, rope_tables
from sample import choose, draw_noise, num_transfer_tokens, pad_left
from tools.transcription import gumbel_argmax
from variants import evaluate, fast_dllm, llada_sampler

OFFICIAL = tensors("sampler/sampler.safetensors")
CASES = json.loads((GOLDEN / "sampler/cases.json").read_text())
BEYOND_D1 = ["cfg", "cfg_small", "gqa_cfg", "leftpad_cfg", "temp_1.0_cfg", "eos_bias_logits_eos_inf",
             "eos_bias_confidence_inf", "eos_bias_both", "random_remask", "prompt_has_mask"]
PUZZLES = [example["prompt"] for example in TASKS["countdown"].load("test", count=3)]


# ---------------------------------------------------------------- LLaDA's sampler

@pytest.mark.parametrize("name", BEYOND_D1)
def test_every_step_equals_the_official_sampler(name):
    case, model, history = CASES[name], reference_model(CASES[name]["model"]), []
    prompt, bias = OFFICIAL[f"{name}.prompt"], OFFICIAL.get(f"{name}.logit_bias", 0)
    attn_mask = OFFICIAL.get(f"{name}.attention_mask", torch.ones_like(prompt)).bool()
    canvases = [F.pad(prompt, (0, case["gen_length"]), value=case["mask_id"]), *OFFICIAL[f"{name}.history"]]
    rounds, draws = case["steps"] * case["block_length"] // case["gen_length"], []
    for step, numbers in enumerate(OFFICIAL.get(f"{name}.noise", ())):  # (B, T) or (B, T, V), cut to masked positions
        end = prompt.shape[1] + (step // rounds + 1) * case["block_length"]
        masked = (canvases[step][:, :end] == case["mask_id"]).nonzero()[:, 1].view(len(prompt), -1)
        draws.append(torch.stack([row[positions] for row, positions in zip(numbers, masked)]))
    noise = torch.zeros(len(prompt), case["steps"], 2 * case["block_length"], dtype=torch.float64)
    if case["remasking"] == "random":
        for step, numbers in enumerate(draws):
            noise[:, step, :numbers.shape[1]] = numbers.double() / 2 ** 26  # the bits that the order is made of

    ids, committed_at = llada_sampler.generate(
        lambda *args, **options: model(*args, **options) + bias, prompt, attn_mask, noise, mask_id=case["mask_id"],
        eos_id=-1,  # which never comes: the official sampler fills every row to its end
        gen_length=case["gen_length"], diffusion_steps=case["steps"], block_length=case["block_length"],
        temperature=case["temperature"], on_step=lambda x, committed_at: history.append(x.clone()),
        cfg_scale=case["cfg_scale"], random_remasking=case["remasking"] == "random",
        forbid=[case["eos_id"]] if case["logits_eos_inf"] else [],
        commit_last=[case["eos_id"], case["eot_id"]] if case["confidence_eos_eot_inf"] else [],
        choose=lambda logits, temperature, *_: gumbel_argmax(logits, temperature, (draws or [0] * 99)[len(history)]))
    assert torch.equal(torch.stack(history), OFFICIAL[f"{name}.history"])
    assert torch.equal(ids, OFFICIAL[f"{name}.final"])
    for step, canvas in enumerate(history):  # committed_at replays the run
        replayed = torch.where(committed_at <= step, ids, case["mask_id"])[:, prompt.shape[1]:]
        assert name == "prompt_has_mask" or torch.equal(replayed, canvas[:, prompt.shape[1]:])


def answer_puzzles(generate, model=None, temperature=0.9, **sampling):
    """ids and committed_at of two short prompts and three puzzles, padded, from the embedded model."""
    tokenizer = embedded()[1]
    prompts = [tokenizer.encode_prompt(text) for text in ("Hi", "What is 7 * 3?", *PUZZLES)]
    prompt, attn_mask = pad_left(prompts, 0, "cpu")
    sampling = {"gen_length": 24, "diffusion_steps": 12, "block_length": 8, "temperature": temperature, **sampling}
    noise = draw_noise([(3, i) for i in range(5)], sampling["diffusion_steps"], 8)
    return generate(model or embedded()[0], prompt, attn_mask, noise, mask_id=tokenizer.mask_id,
                    eos_id=tokenizer.eos_id, **sampling)


@pytest.mark.parametrize("generate", [llada_sampler.generate, fast_dllm.generate])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_without_their_options_both_samplers_are_that_of_d1(generate, temperature):
    for result, expected in zip(answer_puzzles(generate, temperature=temperature),
                                answer_puzzles(sample.generate, temperature=temperature)):
        assert torch.equal(result, expected)


def test_random_remasking_draws_the_order_and_the_tokens_independently():
    p = torch.tensor([0.5, 0.3, 0.2])
    logits = torch.cat([p.log(), torch.tensor([2.0])])  # the last token is [MASK]
    ids, committed_at = llada_sampler.generate(
        lambda ids, attn_mask, keep: logits.repeat(*keep.shape, 1), torch.zeros(9000, 1, dtype=torch.long),
        torch.ones(9000, 1, dtype=torch.bool), draw_noise([(0, i) for i in range(9000)], 2, 2), mask_id=3, eos_id=9,
        gen_length=2, diffusion_steps=2, block_length=2, temperature=1.0, random_remasking=True)
    is_first = (committed_at[:, 1] == 0).long()
    counts = (9 * is_first + 3 * ids[:, 1] + ids[:, 2]).bincount(minlength=18)
    expected = 9000 * torch.outer(torch.tensor([0.5, 0.5]), torch.outer(p, p).flatten()).flatten()
    assert ((counts - expected) ** 2 / expected).sum() < 40.8  # chi-square, 17 degrees of freedom, p = 0.001


def test_a_row_whose_prompt_still_holds_a_mask_goes_on_after_eos():
    """Its [MASK] is the least confident and stays; the first token is EOS; prompts with unequal masks are refused."""
    def model(ids, attn_mask, keep):
        wanted = torch.where(keep == 1, 2, 4)  # EOS behind the prompt, then 4
        return F.one_hot(wanted, 6) * torch.where(keep == 0, 1.0, 9.0)[..., None]
    generate = functools.partial(llada_sampler.generate, model, noise=torch.zeros(1, 2, 2), mask_id=5, eos_id=2,
                                 gen_length=2, diffusion_steps=2, block_length=1, temperature=0.0)
    assert generate(torch.tensor([[5]]), torch.ones(1, 1).bool())[0].tolist() == [[5, 2, 4]]
    assert generate(torch.tensor([[1]]), torch.ones(1, 1).bool())[0].tolist() == [[1, 2, 2]]
    with pytest.raises(ValueError, match="equally many"):
        generate(torch.tensor([[5], [1]]), torch.ones(2, 1).bool())


def test_noise_in_bfloat16_cuts_the_tail_and_nothing_else():
    logits = torch.tensor([2.0, 1.0, 0.0, -9.0, 5.0]).expand(1, 20_000, 5)  # the last is [MASK]
    uniform = torch.rand(1, 20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shares = torch.bincount(llada_sampler.gumbel_bfloat16(logits, 1.0, uniform, 4).flatten(), minlength=5) / 20_000
    assert shares[4] == 0 and shares[3] == 0
    assert float((shares[:3] - logits[0, 0, :4].softmax(-1)[:3]).abs().max()) < 0.02
    assert llada_sampler.gumbel_bfloat16(logits, 0.0, None, 4).eq(0).all()


# ---------------------------------------------------------------- Fast-dLLM's sampler

@torch.no_grad()
def fill_by_hand(model, x, attn_mask, noise, *, mask_id, eos_id, gen_length, diffusion_steps, block_length,
                 temperature, cache, threshold, entropy_bound, random_first):
    """One row by loops, where every round computes the whole canvas and hooks put back what a cache would keep.

    x (P,), attn_mask (P,), noise (steps, block_length). Returns ids and committed_at, lists of T numbers.
    """
    P, T = len(x), len(x) + gen_length
    x, committed_at = x.tolist() + [mask_id] * gen_length, [-1] * T
    step = taken = 0  # rounds of the schedule, and those in which this row had a mask
    attn_mask = F.pad(attn_mask, (0, gen_length), value=True)[None]
    for begin in range(P, T, block_length):
        end = begin + block_length
        first_outputs, changes = {}, slice(begin, T if cache == "prefix" else end)

        def put_back(module, args, output):
            if not cache:
                return output
            first = first_outputs.setdefault(module, output)
            return torch.cat([first[:, :begin], output[:, changes], first[:, changes.stop:]], dim=1)

        projections = [p for block in model.blocks for p in (block.k_proj, block.v_proj)]
        hooks = [p.register_forward_hook(put_back) for p in projections]
        for count in num_transfer_tokens(block_length, diffusion_steps * block_length // gen_length):
            masked = [i for i in range(begin, end) if x[i] == mask_id]
            logits = model(torch.tensor([x]), attn_mask)[0]
            tokens = {i: int(choose(logits[i], temperature, noise[step, n], mask_id)) for n, i in enumerate(masked)}
            ranked = sorted(masked, key=lambda i: -logits[i].softmax(-1)[tokens[i]])
            if threshold:
                count = max(1, sum(float(logits[i].softmax(-1)[tokens[i]]) > threshold for i in masked))
            if entropy_bound:
                entropies = {i: float(torch.distributions.Categorical(logits=logits[i]).entropy()) for i in masked}
                ranked = sorted(masked, key=entropies.get)
                h = [entropies[i] for i in ranked]
                count = max([n for n in range(1, len(h) + 1) if sum(h[:n]) - max(h[:n]) <= entropy_bound], default=0)
            if random_first and step == 0:
                bits = [int(number * 2 ** 53) % 2 ** 27 for number in noise[0].double()]
                ranked, count = [masked[bits.index(max(bits))]], 1
            for i in ranked[:count]:
                x[i], committed_at[i] = tokens[i], taken
            step, taken = step + 1, taken + bool(masked)
        for hook in hooks:
            hook.remove()
        if eos_id in x[begin:end]:
            return x[:end] + [eos_id] * (T - end), committed_at[:end] + [max(committed_at)] * (T - end)
    return x, committed_at


@functools.cache
def cached_model(name):
    """A model in float64, so that no near tie is decided by rounding."""
    return LLaDA.from_pretrained("data/tiny" if name == "tiny" else GOLDEN / name, dtype=torch.float64).eval()


@pytest.mark.parametrize("name, temperature, threshold, entropy_bound, random_first", [
    ("tiny", 0.9, 0.9, None, False), ("tiny", 0.0, None, None, False), ("llada_gqa", 0.9, None, None, False),
    ("llada_gqa", 0.0, 0.3, None, True), ("tiny", 0.9, None, 0.5, True), ("llada_gqa", 0.9, None, 13.0, False)])
@pytest.mark.parametrize("cache", [None, "prefix", "dual"])
def test_every_row_of_a_batch_equals_the_row_by_hand(name, temperature, threshold, entropy_bound, random_first, cache):
    model, tokenizer = cached_model(name), embedded()[1]
    prompts = [[5] * 3, [6, 7] * 3, [8] * 9]
    if name == "tiny":
        prompts = [tokenizer.encode_prompt(text) for text in ("Hi", *PUZZLES[:2])]
    prompt, attn_mask = pad_left(prompts, 0, "cpu")
    options = dict(mask_id=model.config.mask_token_id, eos_id=model.config.eos_token_id, gen_length=16, block_length=8,
                   diffusion_steps=16 if threshold or entropy_bound else 8, temperature=temperature, cache=cache,
                   threshold=threshold, entropy_bound=entropy_bound, random_first=random_first)
    noise = draw_noise([(3, i) for i in range(3)], options["diffusion_steps"], 8)
    ids, committed_at = fast_dllm.generate(model, prompt, attn_mask, noise, **options)
    rounds = []
    for row in range(3):
        expected = fill_by_hand(model, prompt[row], attn_mask[row], noise[row], **options)
        assert (ids[row].tolist(), committed_at[row].tolist()) == expected
        rounds.append(len(set(expected[1])))
        assert set(expected[1][len(prompt[0]):]) == set(range(rounds[-1] - 1))  # numbered without gaps, and -1
    assert not (threshold or entropy_bound) or max(rounds) < 16  # several tokens in a round


def test_a_threshold_that_nothing_exceeds_commits_one_token_a_round():
    results = answer_puzzles(functools.partial(fast_dllm.generate, threshold=1.0), diffusion_steps=24)
    expected = answer_puzzles(sample.generate, diffusion_steps=24)
    assert all(map(torch.equal, results, expected))
    with pytest.raises(AssertionError, match="too few rounds"):
        answer_puzzles(functools.partial(fast_dllm.generate, threshold=0.9))


def test_rows_leave_a_block_and_the_batch_when_they_are_done():
    rows, model = [], embedded()[0]

    def count_rows(ids, *args, **options):
        rows.append(len(ids))
        return model(ids, *args, **options)

    answer_puzzles(functools.partial(fast_dllm.generate, threshold=0.9), count_rows, diffusion_steps=24)
    assert rows[0] == 5 and min(rows) < 5 and len(rows) < 24


# ---------------------------------------------------------------- the program

def call(out, options):
    words = f"--task countdown --count 3 --gen_length 16 --device cpu --out {out} {options}".split()
    return evaluate.main(evaluate.parse_args(words))


@pytest.mark.parametrize("options", ["--threshold 0.9 --cache dual", "--cfg_scale 0.5 --random_remasking",
                                     "--logits_eos_inf --confidence_eos_eot_inf"])
def test_an_evaluation_does_not_depend_on_its_batches(tmp_path, options):
    for batch in (1, 3):
        call(tmp_path / str(batch), f"{options} --temperature 0.0 --rollout_batch {batch}")
    rows, others = (read_rows(tmp_path / name / "countdown_16.jsonl") for name in "13")
    assert rows == others and len(rows) == 3
    assert "logits_eos_inf" not in options or not any(row["ended"] for row in rows)


@pytest.mark.parametrize("options, message", [
    ("--threshold 2", "--threshold 2.0 must lie in (0, 1]"),
    ("--threshold 0", "--threshold 0.0 must lie in (0, 1]"),
    ("--threshold 0.9 --diffusion_steps=8", "--diffusion_steps would be ignored with --threshold"),
    ("--entropy_bound -1", "--entropy_bound -1.0 must be at least 0"),
    ("--entropy_bound 1 --diffusion_steps 8", "--diffusion_steps would be ignored with --entropy_bound"),
    ("--entropy_bound 1 --threshold 0.9", "--threshold and --entropy_bound do not combine"),
    ("--cache dual --cfg_scale 1", "--entropy_bound, --cache do not combine with LLaDA's sampler"),
    ("--random_remasking --confidence_eos_eot_inf", "--confidence_eos_eot_inf would be ignored"),
])
def test_options_that_would_be_ignored_are_refused(options, message):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(evaluate.parse_args(f"--task countdown {options}".split()))
    assert message in str(stopped.value) and "\n" not in str(stopped.value)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["grpo", "llada_loss", "authors_rewards"])
def test_the_programs_run_from_any_directory(tmp_path, program):
    done = subprocess.run([sys.executable, ROOT / "variants" / f"{program}.py", "--help"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "--gen_length" in done.stdout


@pytest.mark.parametrize("name", ["llada_mha", "llada_gqa"])
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
        cached = fast_dllm.run_block(block, *part, None, (keys, values, start))
        assert worst(cached, plain[:, start:end]) < 1e-10
        keep = torch.tensor([[1, 2]] * 3)
        chosen = fast_dllm.run_block(block, *part, keep, (keys, values, start))
        assert worst(chosen, plain[:, start + 1:start + 3]) < 1e-10
    fast_dllm.run_block(block, x[:, 9:12] + 1, cos[9:12], sin[9:12], attn_mask, None, (keys, values, 9))
    changed = fast_dllm.run_block(block, x[:, :7], cos[:7], sin[:7], attn_mask, None, (keys, values, 0))
    assert worst(changed, plain[:, :7]) > 1e-3  # a changed part is seen by the next one
