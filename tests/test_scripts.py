"""The two training scripts from their command line, in-process; torchrun with two processes where it takes two."""
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import model as model_file
import parallel
import train_grpo
import train_sft
from d1 import draw_indices
from data import TASKS, countdown, sudoku
from data.tokenizer import Tokenizer
from model import LLaDA, load_lora
from parallel import Processes

GRPO = ["--task", "countdown", "--steps", 2, "--prompts_per_step", 4, "--group_size", 4, "--num_iterations", 2,
        "--eval_count", 4, "--gen_length", 32, "--diffusion_steps", 8, "--device", "cpu"]
SFT = ["--steps", 3, "--batch_size", 4, "--count", 40, "--device", "cpu"]


def grpo(out, *more):
    return train_grpo.main(train_grpo.parse_args(list(map(str, [*GRPO, "--out", out, *more]))))


def sft(out, *more):
    return train_sft.main(train_sft.parse_args(list(map(str, [*SFT, "--out", out, *more]))))


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_close(a, b, tolerance):
    """Two lists of metric rows agree but for timing."""
    assert len(a) == len(b)
    for left, right in zip(a, b):
        assert left.keys() == right.keys()
        for name in left.keys() - {"seconds", "tokens_per_second"}:
            assert left[name] == pytest.approx(right[name], abs=tolerance), name


# ---------------------------------------------------------------- diffu-GRPO

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("grpo") / "run"
    return out, grpo(out)


def test_a_run_leaves_the_documented_folder(run):
    out, summary = run
    files = "config.json metrics.jsonl samples.jsonl summary.json step_000002 .lock"
    assert {path.name for path in out.iterdir()} == set(files.split())
    assert summary == json.loads((out / "summary.json").read_text())
    documented = "task seed accuracy_before accuracy_after greedy_before greedy_after steps minutes device"
    assert all(summary[name] is not None for name in documented.split())
    rows = metrics(out)
    assert [row["step"] for row in rows] == [1, 2]
    documented = ("reward reward_exact reward_closed accuracy kl clip_fraction max_log_ratio grad_norm loss lr seconds "
                  "zero_spread_fraction completion_length tokens_per_second")
    assert all(name in row for row in rows for name in documented.split())
    assert len((out / "samples.jsonl").read_text().splitlines()) == 2 * 4
    model = LLaDA.from_pretrained(out / "step_000002")  # a checkpoint is a model folder like any other
    Tokenizer.from_folder(out / "step_000002", model.config)
    before, after = (load_file(f"{folder}/model.safetensors") for folder in ("data/tiny", out / "step_000002"))
    assert any(not torch.equal(before[name].float(), after[name].float()) for name in before)


def test_the_same_command_gives_the_same_run_and_leaves_global_randomness_alone(run, tmp_path):
    state = torch.get_rng_state()
    grpo(tmp_path / "again")
    assert torch.equal(state, torch.get_rng_state())
    assert_close(metrics(run[0]), metrics(tmp_path / "again"), 0)


def test_microbatches_do_not_change_the_run(run, tmp_path):
    grpo(tmp_path / "small", "--microbatch", 1, "--rollout_batch", 3)
    assert_close(metrics(run[0]), metrics(tmp_path / "small"), 1e-5)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(script, *words):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port()]
    return subprocess.run(list(map(str, [*launch, script, *words])), capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_processes_repeat_one(run, tmp_path):
    done = torchrun("train_grpo.py", *GRPO, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert_close(metrics(run[0]), metrics(tmp_path / "two"), 1e-4)
    assert done.stdout.count("diffu-GRPO on countdown") == 1  # only the main process prints
    texts = [(out / "samples.jsonl").read_text() for out in (run[0], tmp_path / "two")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("more", [[], ["--lora_r", 4]])
def test_kl_is_zero_before_the_first_update(tmp_path, more):
    """mu = 1: the only update of step 1 sees policy = old policy = reference; it works with beta > 0."""
    grpo(tmp_path / "run", "--num_iterations", 1, "--eval_count", 0, *more)
    first, second = metrics(tmp_path / "run")
    assert first["kl"] == 0 and first["clip_fraction"] == 0
    assert second["kl"] > 0  # the reference stayed where the policy started


def test_sft_then_merge_then_rl(tmp_path, capsys):
    """The two stages with adapters: RL starts at, and is held to, the merged model; the adapter itself is refused."""
    sft(tmp_path / "sft", "--task", "countdown", "--lora_r", 4, "--lr", "2e-3", "--warmup", 0, "--steps", 2)
    adapter, merged = tmp_path / "sft" / "step_000002", tmp_path / "merged"
    with pytest.raises(SystemExit, match=rf"^error: --model {adapter}: an adapter of data/tiny, not a model: [^\n]*$"):
        grpo(tmp_path / "rl", "--model", adapter)
    done = subprocess.run(list(map(str, [sys.executable, "model.py", "merge", "data/tiny", adapter, merged])))
    assert done.returncode == 0
    ids, plain = torch.arange(20)[None], LLaDA.from_pretrained("data/tiny")
    with torch.no_grad():
        before, after, tuned = plain(ids), LLaDA.from_pretrained(merged)(ids), load_lora(plain, adapter)(ids)
    assert (before - tuned).abs().max() > 0.1 and (after - tuned).abs().max() < 1e-4
    grpo(tmp_path / "rl", "--model", merged, "--lora_r", 4, "--lr", "1e-3", "--num_iterations", 1, "--eval_count", 0)
    first, second = metrics(tmp_path / "rl")
    assert first["kl"] == 0 and second["kl"] > 0
    words = ["merge", merged, tmp_path / "rl" / "step_000002", tmp_path / "final"]
    model_file.main(model_file.parse_args(list(map(str, words))))
    assert "note" not in capsys.readouterr().err
    Tokenizer.from_folder(tmp_path / "final", LLaDA.from_pretrained(tmp_path / "final").config)


def test_beta_zero_has_no_reference_and_no_kl(tmp_path, monkeypatch):
    monkeypatch.setattr(train_grpo, "reference_policy", None)  # would fail if called
    grpo(tmp_path / "run", "--beta", 0, "--eval_count", 0)
    assert all("kl" not in row for row in metrics(tmp_path / "run"))


def test_lora_trains_the_adapter_alone(tmp_path):
    out = tmp_path / "run"
    grpo(out, "--lora_r", 4, "--lr", "1e-3", "--eval_count", 0, "--steps", 1)
    folder = out / "step_000001"
    files = "adapter_model.safetensors adapter_config.json tokenizer.json optimizer.safetensors state.json"
    assert {p.name for p in folder.iterdir()} == {*files.split(), "run.json", "complete.json"}
    plain, adapted = LLaDA.from_pretrained("data/tiny"), load_lora(LLaDA.from_pretrained("data/tiny"), folder)
    ids = torch.arange(20)[None]
    assert not torch.equal(plain(ids), adapted(ids))


def test_masks_per_prompt_and_padded_prompts(tmp_path):
    """Prompts of different lengths in one batch: left padding is in the update as well."""
    problems = [("1,2,3", 6), ("12,34,56", 102), ("1,2,3,4", 10), ("10,20", 30)]
    data = tmp_path / "problems.jsonl"
    data.write_text("\n".join(json.dumps({"input": n, "output": str(t)}) for n, t in problems))
    grpo(tmp_path / "run", "--data", data, "--masks_per_prompt", 3, "--eval_count", 0)
    assert len(metrics(tmp_path / "run")) == 2


def test_equal_rewards_train_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(countdown, "reward", lambda text, example: {"same": 0.5})
    grpo(tmp_path / "run", "--beta", 0, "--eval_count", 0, "--weight_decay", 0)
    assert all(row["loss"] == 0 and row["zero_spread_fraction"] == 1 for row in metrics(tmp_path / "run"))
    before, after = (load_file(f"{folder}/model.safetensors") for folder in ("data/tiny", tmp_path / "run/step_000002"))
    assert all(torch.equal(before[name].float(), after[name]) for name in before)


@pytest.mark.parametrize("value", [None, {"exact": float("nan")}, {"exact": "1"}, 1.0, {"exact": True}])
def test_a_reward_that_is_no_number_is_named(value, tmp_path, monkeypatch):
    monkeypatch.setattr(countdown, "reward", lambda text, example: value)
    with pytest.raises(ValueError, match="data.countdown.reward returned"):
        grpo(tmp_path / "run", "--eval_count", 0)


def test_a_reward_that_raises_is_not_swallowed(tmp_path, monkeypatch):
    def broken(text, example):
        raise ZeroDivisionError("in the reward")
    monkeypatch.setattr(countdown, "reward", broken)
    with pytest.raises(ZeroDivisionError, match="in the reward"):
        grpo(tmp_path / "run", "--eval_count", 0)


def test_a_gradient_that_is_not_finite_stops_before_the_update(tmp_path, monkeypatch):
    monkeypatch.setattr(train_grpo, "group_advantages", lambda rewards: rewards * float("inf"))
    with pytest.raises(SystemExit, match="step 1, update 1: gradient norm nan, loss not finite on ranks"):
        grpo(tmp_path / "run", "--eval_count", 0)


@pytest.mark.parametrize("more, message", [
    (["--group_size", 1], "--group_size 1: a group of one has no advantage"),
    (["--gen_length", 30], "--block_length 8 does not divide --gen_length 30"),
    (["--p_mask_prompt", 1.5], "--p_mask_prompt 1.5 must lie in"),
    (["--steps", 0], "--steps must be at least 1"),
    (["--temperature", 0], "gives equal completions of a prompt"),
    (["--threshold", 1.5], "--threshold 1.5 must lie in (0, 1]"),
    (["--threshold", 0.9, "--keep_sharded"], "--threshold with --keep_sharded: each process samples"),
    (["--model", "nowhere"], "--model nowhere: no such folder"),
    (["--gen_length", 504, "--diffusion_steps", 63], "0 usable prompts are fewer than --prompts_per_step"),
    (["--data", "absent.jsonl"], "--data absent.jsonl: no such file"),
    (["--lora_r", 4, "--lora_targets", "o_proj"], "--lora_targets o_proj: choose from q_proj"),
])
def test_bad_options_are_one_line_before_any_work(more, message, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        grpo(tmp_path / "run", *more)
    assert message in str(stopped.value) and "\n" not in str(stopped.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_refused_before_any_work(run, monkeypatch):
    before = (run[0] / "metrics.jsonl").read_text()
    for module, script in ((train_grpo, grpo), (train_sft, sft)):
        monkeypatch.setattr(module, "Tokenizer", None)  # would fail if anything were encoded or loaded
        with pytest.raises(SystemExit, match="holds a run already"):
            script(run[0], *([] if script is grpo else ["--task", "countdown"]))
    assert (run[0] / "metrics.jsonl").read_text() == before


def test_prompts_must_divide_by_the_processes():
    with pytest.raises(ValueError, match="--prompts_per_step 16 does not divide by 3 processes: use 15 or 18"):
        Processes(0, 3, torch.device("cpu")).share(16, "--prompts_per_step")
    assert list(Processes(1, 2, torch.device("cpu")).share(4, "--prompts_per_step")) == [2, 3]


def test_every_prompt_comes_once_per_epoch_in_an_order_of_its_own():
    drawn = [i for step in range(5) for i in draw_indices(10, step, 4, seed=0)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]
    assert draw_indices(3, 0, 8, seed=0)[:3] == draw_indices(3, 0, 3, seed=0)  # a batch may span epochs


def test_prompt_masks_have_their_rate_and_leave_padding_alone():
    words = "--task countdown --num_iterations 50 --masks_per_prompt 4 --p_mask_prompt 0.3"
    args = train_grpo.parse_args(words.split())
    masks = train_grpo.draw_prompt_masks([20, 12], 20, 0, [0, 1], args)  # (2, 50, 4, 20)
    assert not masks[1, ..., :8].any()
    assert abs(masks[0].float().mean() - 0.3) < 0.03 and abs(masks[1, ..., 8:].float().mean() - 0.3) < 0.03
    alone = train_grpo.draw_prompt_masks([12], 12, 0, [1], args)  # other neighbours, other padding: the same masks
    assert torch.equal(alone[0], masks[1, ..., 8:])


# ---------------------------------------------------------------- resume

def assert_same_run(a, b, tolerance=0):
    """Weights, log and samples of two finished runs; bit for bit but for timing."""
    assert_close(metrics(a), metrics(b), tolerance)
    last = sorted(path.name for path in a.glob("step_*"))[-1]
    for file in (path for path in (a / last).glob("*.safetensors")):
        one, two = load_file(file), load_file(b / last / file.name)
        assert one.keys() == two.keys() and len(one) > 0
        for name in one:
            assert (one[name] - two[name]).abs().max() <= tolerance, name
    if (a / "samples.jsonl").exists() and not tolerance:
        assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()


RESUMED = {  # each crosses an epoch: 4 prompts of 6 a step, 4 rows of 12
    "grpo": (grpo, ["--steps", 4, "--eval_every", 2, "--save_every", 1]),
    "grpo with LoRA": (grpo, ["--steps", 4, "--eval_every", 2, "--save_every", 1, "--lora_r", 2]),
    "sft": (sft, ["--steps", 5, "--eval_every", 2, "--save_every", 1, "--warmup", 2]),
}


@pytest.fixture(scope="module", params=RESUMED)
def whole(request, tmp_path_factory):
    """A script with options and data, and the folder of a run that nothing interrupted."""
    script, options = RESUMED[request.param]
    folder = tmp_path_factory.mktemp("whole")
    rows = ([{"input": f"{i},2,3", "output": str(i + 5)} for i in range(6)] if script is grpo else
            [{"prompt": f"Say {i}", "completion": f"{i}"} for i in range(13)])
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = [*options, "--data", folder / "rows.jsonl"]
    script(folder / "run", *options)
    return script, options, folder / "run"


def interrupt(monkeypatch, module, name, calls):
    """Send SIGTERM to ourselves during the given call of a function."""
    original, seen = getattr(module, name), []

    def wrapped(*args, **kwargs):
        seen.append(1)
        if len(seen) == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)
    monkeypatch.setattr(module, name, wrapped)


@pytest.mark.parametrize("name, calls", [
    ("evaluation before", 1), ("rollout", 2), ("update", 3), ("evaluation", 3), ("save", 2)])
def test_a_signal_anywhere_costs_nothing(whole, tmp_path, monkeypatch, capsys, name, calls):
    script, options, uninterrupted = whole
    where = {"rollout": (train_grpo, "complete"), "update": (train_grpo, "update_policy"),
             "save": (parallel.Run, "save"), "evaluation": (train_grpo, "evaluate")}
    if script is sft:
        where = {"rollout": (train_sft, "draw_batch"), "update": (train_sft, "batch_loss"),
                 "save": (parallel.Run, "save"), "evaluation": (train_sft, "held_out_loss")}
    with monkeypatch.context() as patch:
        interrupt(patch, *where[name.split()[0]], calls)
        with pytest.raises(SystemExit) as stopped:
            script(tmp_path / "run", *options)
    assert stopped.value.code == parallel.STOPPED
    assert "the same command with --resume goes on from" in capsys.readouterr().out
    assert not (tmp_path / "run" / "summary.json").exists()
    script(tmp_path / "run", *options, "--resume")
    assert_same_run(uninterrupted, tmp_path / "run")


def test_killed_at_twenty_random_moments(tmp_path):
    """SIGKILL, also in the middle of a save: every time it resumes, and ends on the same weights."""
    options = ["--task", "countdown", "--steps", 150, "--save_every", 1, "--lora_r", 2, "--eval_every", 10]
    sft(tmp_path / "whole", *options)
    rng, kills = random.Random(0), 0
    while kills < 20 and not (tmp_path / "run" / "summary.json").exists():
        child = os.fork()  # a fork, so that a life is not spent on importing torch
        if not child:
            with open(tmp_path / "log", "a") as sys.stdout, open(tmp_path / "log", "a") as sys.stderr:
                try:
                    sft(tmp_path / "run", *options, "--resume")
                finally:
                    os._exit(0)
        time.sleep(rng.uniform(0, 0.8))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    sft(tmp_path / "run", *options, "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    steps = [row["step"] for row in metrics(tmp_path / "run")]
    assert steps == list(range(1, 151))


# ---------------------------------------------------------------- SFT

def test_sft_from_random_weights_learns_and_writes_a_model(tmp_path):
    summary = sft(tmp_path / "run", "--task", "countdown", "--from_scratch", "--steps", 25, "--batch_size", 16,
                  "--count", 300, "--warmup", 5, "--gen_length", 32)
    assert summary["held_out_loss_after"] < summary["held_out_loss_before"] - 1
    rows = metrics(tmp_path / "run")
    assert rows[-1]["held_out_loss"] < rows[0]["loss"] - 1
    assert [row["lr"] for row in rows[:2]] == pytest.approx([2e-3 / 5, 2e-3 * 2 / 5 * 24 / 25])  # warm-up times decay
    assert rows[-1]["lr"] == pytest.approx(2e-3 / 25)
    LLaDA.from_pretrained(tmp_path / "run" / "step_000025")


@pytest.mark.parametrize("loss", ["d1", "llada"])
def test_accumulation_does_not_change_sft(tmp_path, loss):
    options = ["--task", "sudoku", "--steps", 2, "--loss", loss]
    sft(tmp_path / "whole", *options, "--microbatch", 4)
    sft(tmp_path / "parts", *options, "--microbatch", 1)
    assert_close(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), 1e-4)


def test_sft_on_a_file_skips_and_counts_unusable_rows(tmp_path, capsys):
    rows = [{"prompt": f"Say {i}", "completion": f"{i}"} for i in range(12)]
    rows += [{"prompt": "nothing", "completion": " "}, {"prompt": "long", "completion": "word " * 300}]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    sft(tmp_path / "run", "--data", data, "--max_length", 100, "--lora_r", 2)
    assert "skipped 1 rows without a completion and 1 longer than 100 tokens" in capsys.readouterr().out
    assert (tmp_path / "run" / "step_000003" / "adapter_model.safetensors").exists()
    data.write_text(json.dumps(rows[0]) + "\n{broken\n")
    with pytest.raises(SystemExit, match="row 2: not JSON"):
        sft(tmp_path / "other", "--data", data)


def test_sft_needs_rows(tmp_path):
    for more, message in ((["--count", 3], "do not fill a batch"), (["--split", "test"], "holds no demonstrations")):
        with pytest.raises(SystemExit, match=message):
            sft(tmp_path / "run", "--task", "countdown", *more)


def test_noise_masks_the_completion_and_its_padding_but_never_the_prompt():
    rows = [([1] * 10 + [2] * 20, 10), ([1] * 5 + [2] * 5, 5)]
    ids, answer = train_sft.collate(rows, 30, eos_id=9)
    assert ids[1, 10:].eq(9).all() and answer[1, 5:].all() and not answer[1, :5].any()
    rates = torch.zeros(30)
    for i in range(300):
        noised, masked, t = train_sft.noise(ids, answer, [(i, 0), (i, 1)], mask_id=7)
        assert not masked[~answer].any() and torch.equal(noised == 7, masked)
        rates += masked[1] / 300
    assert (rates[5:] - 0.5).abs().max() < 0.12  # t ~ U(0, 1), EOS padding like any other token
    alone = train_sft.noise(ids[1:], answer[1:], [(299, 1)], mask_id=7)
    assert torch.equal(alone[0][0], noised[1])


def test_tasks_have_the_three_functions():
    for task in TASKS.values():
        assert callable(task.load)  # of public data in tests/test_benchmarks.py
    for task in (countdown, sudoku):
        example = task.load("test", count=1)[0]
        assert "prompt" in example and isinstance(task.reward("", example), dict)
        assert "accuracy" in task.score("", example)
