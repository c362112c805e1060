"""The sampler against the official sampler's tokens at every step, batches of prompts, and the command line."""
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import GOLDEN, PROBLEMS, ROOT, embedded, read_rows, reference_model, tensors, train
from torch.nn import functional as F

import sample
import train_grpo
from data import TASKS
from model import find_checkpoint
from parallel import Processes
from sample import choose, complete, draw_noise, generate, num_transfer_tokens
from tools import merge
from tools.transcription import gumbel_argmax

OFFICIAL = tensors("sampler/sampler.safetensors")


def is_covered(name, case):
    """Whether d1 samples so. The other cases are in the tests of variants/, which has guidance and the like."""
    plain = not case["cfg_scale"] and case["remasking"] == "low_confidence"
    return plain and not case["logits_eos_inf"] and not case["confidence_eos_eot_inf"] and name != "prompt_has_mask"


ALL_CASES = json.loads((GOLDEN / "sampler/cases.json").read_text())
CASES = {name: case for name, case in ALL_CASES.items() if is_covered(name, case)}  # 12 of 22
ALONE = Processes(0, 1, torch.device("cpu"), torch.float32)
PUZZLES = [example["prompt"] for example in TASKS["countdown"].load("test", count=6)]
SHORT = dict(gen_length=16, diffusion_steps=8, block_length=8)


# ---------------------------------------------------------------- token for token

def official_draws(name, case):
    """The official run's noise at each step, (B, M, V), cut to the positions that are masked in its block."""
    prompt, rounds = OFFICIAL[f"{name}.prompt"], case["steps"] * case["block_length"] // case["gen_length"]
    canvases = [F.pad(prompt, (0, case["gen_length"]), value=case["mask_id"]), *OFFICIAL[f"{name}.history"]]
    for step, draws in enumerate(OFFICIAL[f"{name}.noise"]):
        end = prompt.shape[1] + (step // rounds + 1) * case["block_length"]
        masked = (canvases[step][:, :end] == case["mask_id"]).nonzero()[:, 1].view(len(prompt), -1)
        yield torch.stack([row[positions] for row, positions in zip(draws, masked)])


@pytest.mark.parametrize("name", CASES)
def test_every_step_equals_the_official_sampler(name, monkeypatch):
    case, model, history = CASES[name], reference_model(CASES[name]["model"]), []
    prompt, bias = OFFICIAL[f"{name}.prompt"], OFFICIAL.get(f"{name}.logit_bias", 0)
    attn_mask = OFFICIAL.get(f"{name}.attention_mask", torch.ones_like(prompt)).bool()
    if case["temperature"]:  # the official choice by Gumbel noise in the place of ours
        draws = official_draws(name, case)
        monkeypatch.setattr(sample, "choose", lambda logits, temperature, *_:
                            gumbel_argmax(logits, temperature, next(draws)))
    ids, committed_at = generate(
        lambda *args, **options: model(*args, **options) + bias, prompt, attn_mask,
        torch.zeros(len(prompt), case["steps"], case["block_length"]), mask_id=case["mask_id"],
        eos_id=-1,  # which never comes: the official sampler fills every row to its end
        gen_length=case["gen_length"], diffusion_steps=case["steps"], block_length=case["block_length"],
        temperature=case["temperature"], on_step=lambda x, committed_at: history.append(x.clone()))
    assert torch.equal(torch.stack(history), OFFICIAL[f"{name}.history"])
    assert torch.equal(ids, OFFICIAL[f"{name}.final"])
    for step, canvas in enumerate(history):  # committed_at replays the run
        assert torch.equal(torch.where(committed_at <= step, ids, case["mask_id"]), canvas)


def test_the_tokens_of_a_round_equal_the_official_table():
    for row in json.loads((GOLDEN / "sampler/num_transfer_tokens.json").read_text()):
        assert [num_transfer_tokens(m, row["steps"]) for m in row["masks_per_row"]] == row["num_transfer_tokens"]


# ---------------------------------------------------------------- draws

@pytest.mark.parametrize("temperature", [0.5, 1.3])
def test_draws_follow_the_softmax_and_are_never_mask(temperature):
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 3.0], dtype=torch.float64)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts = choose(logits.expand(20_000, 5), temperature, uniform, mask_id=4).bincount(minlength=5)
    expected = (logits[:4] / temperature).softmax(0) * 20_000
    assert counts[4] == 0
    assert ((counts[:4] - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_the_tail_is_drawn_and_the_ends_are_tokens():
    p = torch.tensor([0.0, 1e-12, 1 - 3e-12, 2e-12, 0.0, 0.0], dtype=torch.float64)
    draws = torch.tensor([0.0, 0.9e-12, 1.1e-12, 1 - 2.2e-12, 1 - 1.8e-12, 1 - 2 ** -53], dtype=torch.float64)
    assert choose(p.log().expand(6, 6), 1.0, draws, mask_id=5).tolist() == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("block_length", [1, 2])  # the two tokens are drawn one after the other, or at once
def test_draws_are_independent_between_rounds_positions_and_rows(block_length):
    p = torch.tensor([0.5, 0.3, 0.2])
    logits = torch.cat([p.log(), torch.tensor([2.0])])  # the last token is [MASK]
    rounds = 2 // block_length
    prompt = torch.zeros(9000, 1, dtype=torch.long)
    noise = draw_noise([(0, i) for i in range(9000)], rounds, block_length)
    ids, _ = generate(
        lambda ids, attn_mask, keep: logits.repeat(*keep.shape, 1), prompt, prompt == 0, noise, mask_id=3, eos_id=9,
        gen_length=2, diffusion_steps=rounds, block_length=block_length, temperature=1.0)
    counts, expected = (3 * ids[:, 1] + ids[:, 2]).bincount(minlength=9), 9000 * torch.outer(p, p).flatten()
    assert ((counts - expected) ** 2 / expected).sum() < 26.1  # chi-square, 8 degrees of freedom, p = 0.001


# ---------------------------------------------------------------- batches of prompts

def answer(texts, temperature=0.9, rollout_batch=8, **sampling):
    """Completions of the embedded model; the key of a text is its place in a fixed list."""
    model, tokenizer = embedded()
    keys = [(0, (["Hi", "What is 7 * 3?"] + PUZZLES).index(text)) for text in texts]
    prompts = [tokenizer.encode_prompt(text) for text in texts]
    return complete(model, tokenizer, prompts, keys, rollout_batch=rollout_batch, temperature=temperature,
                    **{**SHORT, **sampling})


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_completion_depends_neither_on_its_batch_nor_on_its_neighbours(temperature):
    state, texts = torch.get_rng_state(), ["What is 7 * 3?", "Hi", *PUZZLES]
    together = answer(texts, temperature)
    in_parts = answer(texts, temperature, rollout_batch=3)
    assert torch.equal(together.ids, in_parts.ids) and torch.equal(together.committed_at, in_parts.committed_at)
    for i, text in enumerate(texts):
        alone = answer([text], temperature)
        assert torch.equal(alone.ids[0], together.ids[i]) and alone.texts[0] == together.texts[i]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_rows_that_ended_leave_and_equal_a_full_canvas_up_to_eos(temperature):
    model, tokenizer = embedded()
    sampling = dict(gen_length=32, diffusion_steps=16, block_length=8)
    rows_of_passes = []

    def counted(ids, attn_mask, keep):
        rows_of_passes.append(len(ids))
        return model(ids, attn_mask, keep=keep)

    def full_canvas(_, *args, eos_id, **options):
        return generate(model, *args, eos_id=-1, **options)  # no row ever ends

    done = answer(["Hi", *PUZZLES], temperature, **sampling, generate=lambda _, *args, **options:
                  generate(counted, *args, **options))
    expected = answer(["Hi", *PUZZLES], temperature, **sampling, generate=full_canvas)
    assert torch.equal(done.lengths, expected.lengths) and done.texts == expected.texts
    last_block = (done.ids == tokenizer.eos_id).int().argmax(-1, keepdim=True) // 8  # of the first EOS
    seen = (torch.arange(32) // 8 <= last_block) | ~(done.ids == tokenizer.eos_id).any(-1, keepdim=True)
    assert torch.equal(done.ids[seen], expected.ids[seen])  # as sampled, also behind EOS
    assert torch.equal(done.committed_at[seen], expected.committed_at[seen])
    assert (done.ids[~seen] == tokenizer.eos_id).all() and (done.committed_at >= 0).all()
    assert rows_of_passes[:4] == [7] * 4 and rows_of_passes[-1] < 7 and 0 < done.lengths.min() < 32


# ---------------------------------------------------------------- evaluation

def test_an_evaluation_scores_every_problem_once_the_longest_prompts_first(capsys):
    model, tokenizer = embedded()
    examples = [{"prompt": "Hi " * n, "index": 7} for n in (1, 5, 2, 70, 3)]  # a column of the task's own
    fitting = sample.encode_prompts(examples, tokenizer, 60, ALONE)
    assert len(fitting) == 4 and "skipped 1 prompts of more than 60 tokens" in capsys.readouterr().out
    widths = []

    def spied(model, prompt, *args, **options):
        widths.append(prompt.shape[1])
        return generate(model, prompt, *args, **options)

    task = SimpleNamespace(score=lambda text, example: {"accuracy": float(len(example["prompt"]))})
    metrics, rows = sample.evaluate(model, tokenizer, task, fitting, ALONE, 0, rollout_batch=2, temperature=0.0,
                                    generate=spied, **SHORT)
    assert [row["index"] for row in rows] == [0, 1, 2, 3] and widths == sorted(widths, reverse=True)
    assert metrics["accuracy"] == sum(len(example["prompt"]) for example in fitting) / 4
    assert all(row["rounds"] <= 8 and row["ended"] == (row["effective_tokens"] < 16) for row in rows)


# ---------------------------------------------------------------- command line

def call(words):
    return sample.main(sample.parse_args(f"{words} --device cpu".split()))


def test_an_evaluation_leaves_the_documented_files(tmp_path):
    texts = []
    for rollout_batch in (2, 128):
        out = tmp_path / str(rollout_batch)
        summary = call(f"--task countdown --count 5 --temperature 0.9 --rollout_batch {rollout_batch} --out {out}")
        rows = read_rows(out / "countdown_32.jsonl")
        assert [row["index"] for row in rows] == list(range(5))
        assert summary["accuracy"] == sum(row["accuracy"] for row in rows) / 5 and summary["task"] == "countdown"
        written = json.loads((out / "summary.json").read_text())
        assert written["accuracy"] == summary["accuracy"] and {"minutes", "device"} <= written.keys()
        assert json.loads((out / "config.json").read_text())["options"]["temperature"] == 0.9
        texts.append([row["completion"] for row in rows])
    assert texts[0] == texts[1]


def test_a_prompt_is_answered_and_watched_where_there_is_no_terminal(capsys):
    prompt = ["--prompt", "Numbers: 3, 7, 12\nTarget: 22", "--device", "cpu", "--diffusion_steps", "8"]
    sample.main(sample.parse_args(prompt))
    plain = capsys.readouterr().out
    sample.main(sample.parse_args([*prompt, "--watch"]))
    watched = capsys.readouterr().out
    assert watched.endswith(plain) and plain.strip() and "round 1 of 8" in watched and "\x1b[2J" not in watched
    call("--task countdown --watch --diffusion_steps 4")
    assert "round 1 of 4" in capsys.readouterr().out


def test_a_right_and_a_wrong_completion_are_shown_in_two_lines_at_most(capsys):
    model, tokenizer = embedded()
    examples = [{"prompt": f"Do it.\n\nNumber {i}\nTarget"} for i in range(4)]
    examples = sample.encode_prompts(examples, tokenizer, 60, ALONE)
    for threshold, verdicts in ((1, ["right: Number 2", "wrong: Number 0"]), (-1, ["right: Number 0"])):
        task = SimpleNamespace(score=lambda text, example: {"accuracy": float(int(example["prompt"][15]) > threshold)})
        sample.evaluate(model, tokenizer, task, examples, ALONE, 0, rollout_batch=4, temperature=0.9, **SHORT)
        first, *lines = capsys.readouterr().out.splitlines()
        assert first == f"{50 if threshold == 1 else 100:.1f}% of 4 problems right, temperature 0.9"
        assert [line.split(" Target -> ")[0].strip() for line in lines] == verdicts
        assert all(len(line) <= 152 for line in lines)


def test_the_folder_of_a_run_means_its_newest_checkpoint_and_its_preset(tmp_path):
    for name in ("step_000002", "step_999999", "step_1000000", "step_1000001.tmp", "step_best9"):
        shutil.copytree(ROOT / "data" / "tiny", tmp_path / name)
    assert find_checkpoint(tmp_path) == tmp_path / "step_1000000"
    assert find_checkpoint(tmp_path / "step_000002") == tmp_path / "step_000002"
    (tmp_path / "config.json").write_text('{"options": {}}')  # as a run's
    assert sample.parse_args(["--task", "countdown", "--model", str(tmp_path)]).preset == "tiny"
    summary = call(f"--task countdown --count 2 --diffusion_steps 4 --model {tmp_path} --out {tmp_path / 'out'}")
    assert summary["problems"] == 2


def test_an_adapter_answers_like_the_model_into_which_it_is_merged(tmp_path):
    out = tmp_path / "run"
    train(train_grpo, out, f"--data {PROBLEMS} --steps 1 --lora_r 4 --lr 0.01")
    merge.main(["data/tiny", str(out / "step_000001"), str(tmp_path / "merged")])
    words = "--task countdown --count 4 --diffusion_steps 8 --temperature 0.9"
    rows = []
    for name, model in (("adapter", f"--adapter {out}"), ("merged", f"--model {tmp_path / 'merged'}"), ("base", "")):
        call(f"{words} {model} --out {tmp_path / 'of' / name}")
        rows.append([row["completion"] for row in read_rows(tmp_path / 'of' / name / "countdown_32.jsonl")])
    assert rows[0] == rows[1] != rows[2]
    config = json.loads((out / "step_000001" / "adapter_config.json").read_text())
    for odd in ({"use_rslora": True}, {"init_lora_weights": "pissa"}, {"alpha_pattern": {"q_proj": 2}}):
        (out / "step_000001" / "adapter_config.json").write_text(json.dumps(config | odd))
        with pytest.raises(SystemExit, match="^error: --adapter [^\n]*only plain LoRA is supported$"):
            call(f"--prompt x --adapter {out}")


@pytest.mark.parametrize("words, message", [
    ("", "--task countdown, or --prompt"),
    ("--model nowhere --prompt x", "--model nowhere: no such folder"),
    ("--task countdown --data nofile.jsonl", "--data nofile.jsonl"),
    ("--prompt x --block_length 7", "--block_length 7"),
    ("--prompt x --diffusion_steps 5", "--diffusion_steps 5"),
    ("--prompt x --temperature -1", "--temperature"),
    ("--prompt x --dtype half", "--dtype half"),
    ("--task countdown --gen_length 512", "lower --gen_length"),
    ("--prompt x --gen_length 504 --diffusion_steps 63", "no prompt has 8 tokens or fewer: lower --gen_length"),
])
def test_bad_options_are_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no runs/ should appear
    with pytest.raises(SystemExit) as stopped:
        call(words)
    said = f"{stopped.value}{capsys.readouterr().err}"
    assert message in said and "\n" not in str(stopped.value) and not list(tmp_path.iterdir())
