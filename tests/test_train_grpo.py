"""train_grpo.py as a user runs it, on the embedded model, and as a forker changes it."""
import contextlib
import json

import pytest
import task_sorting
import torch
from helpers import GOLDEN, PROBLEMS, ROOT, assert_same_run, embedded, read_rows, train

import sample
import train_grpo
import train_sft
from data import DEMONSTRATIONS, TASKS, countdown
from data.tokenizer import Tokenizer
from model import LLaDA
from parallel import Processes
from tools import transcription

ALONE = Processes(0, 1, torch.device("cpu"), torch.float32)
# where rewards do not matter
QUICK = f"--data {PROBLEMS} --steps 1 --prompts_per_step 2 --group_size 2 --gen_length 16 --diffusion_steps 4"
REFERENCE = json.loads((GOLDEN / "run_seed_5.json").read_text())


def check_against_reference(rows, expected):
    """1e-4 leaves room for the kernels of other CPUs; on the machine of the reference it is 1e-7."""
    for row, reference in zip(rows, expected, strict=True):
        assert {name: row[name] for name in reference} == pytest.approx(reference, rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two steps with its evaluations, and what `main` returned."""
    out = tmp_path_factory.mktemp("grpo") / "run"
    return out, train(train_grpo, out, "--eval_count 4")


# ---------------------------------------------------------------- the numbers

def test_a_run_gives_the_numbers_of_the_reference_run(run):
    check_against_reference([row for row in read_rows(run[0] / "metrics.jsonl") if "loss" in row], REFERENCE["grpo"])


def test_a_run_with_lora_gives_the_numbers_of_the_reference_run_and_trains_the_adapter_alone(tmp_path):
    out = tmp_path / "run"
    train(train_grpo, out, "--lora_r 4 --lr 1e-3")
    check_against_reference([row for row in read_rows(out / "metrics.jsonl") if "loss" in row], REFERENCE["grpo_lora"])
    names = {path.name for path in (out / "step_000002").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "optimizer", "files.json"}


@pytest.mark.parametrize("options, tolerance", [
    ("", 0), ("--microbatch 1 --rollout_batch 5", 1e-5),
    pytest.param("--checkpoint_activations", 1e-6, marks=pytest.mark.slow)])
def test_the_same_options_give_the_same_run_in_whatever_parts_it_is_computed(run, tmp_path, options, tolerance):
    state = torch.get_rng_state()
    train(train_grpo, tmp_path / "again", f"--eval_count 4 {options}")
    assert_same_run(run[0], tmp_path / "again", tolerance)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.slow
def test_compiled_blocks_change_nothing(tmp_path, monkeypatch):
    """Through the whole of torch.compile but the C++ it would write, and for one of the blocks: that takes minutes."""
    compiled, compile = [], torch.compile

    def compile_first(function, **words):
        compiled.append(function)
        return compile(function, backend="aot_eager", **words) if len(compiled) == 1 else function

    monkeypatch.setattr(torch, "compile", compile_first)
    train(train_grpo, tmp_path / "plain", f"--data {PROBLEMS} --steps 1 --checkpoint_activations")
    assert not compiled
    train(train_grpo, tmp_path / "compiled", f"--data {PROBLEMS} --steps 1 --checkpoint_activations --compile")
    assert_same_run(tmp_path / "plain", tmp_path / "compiled", 1e-5)
    assert len(compiled) >= 4  # blocks


@pytest.mark.slow
def test_compiled_blocks_sample_and_leave_the_first_ratio_at_one(tmp_path, monkeypatch):
    """In bfloat16 with adapters, where inductor's kernels with a graph round otherwise than those without."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    differences, load_model = [], train_grpo.Run.load_model

    def load_one_block(run):  # inductor is slow
        model = load_model(run)
        model.model["transformer"]["blocks"] = model.blocks[:1]
        return model

    def watch(logps, old_logps, ref_logps, *rest):
        differences.append([float((logps.detach() - other).abs().max()) for other in (old_logps, ref_logps)])
        return train_grpo.diffu_grpo(logps, old_logps, ref_logps, *rest)

    monkeypatch.setattr(train_grpo.Run, "load_model", load_one_block)
    train(train_grpo, tmp_path / "run", f"{QUICK} --compile --dtype bfloat16 --lora_r 4", objective=watch)
    assert differences[0] == [0, 0] and len(differences) == 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # of the sampler


def test_a_step_makes_of_completions_and_masks_what_the_plain_algorithm_makes(monkeypatch):
    """One default step against tools/transcription.py, with prompts of unequal lengths and parts of unequal size."""
    seen = {}

    def spy(name):
        function = getattr(train_grpo, name)
        monkeypatch.setattr(train_grpo, name, lambda *a, **words: seen.setdefault(name, function(*a, **words)))

    def reward(text, example):
        return {"letters": sum(map(ord, text)) % 7 / 7, "words": float(len(text.split()))}

    spy("complete")
    monkeypatch.setattr(countdown, "reward", reward)
    models = [LLaDA.from_pretrained("data/tiny").eval() for _ in range(3)]
    with torch.no_grad():  # a reference policy other than the policy
        for i, p in enumerate(models[2].parameters()):
            p.add_(0.002 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models[:2]]
    tokenizer = embedded()[1]
    examples = countdown.load("train", count=4)
    for i, example in enumerate(examples):
        example["ids"] = tokenizer.encode_prompt(example["prompt"])[i:]
    words = ("--task countdown --prompts_per_step 3 --group_size 2 --num_iterations 2 --microbatch 2 --gen_length 8 "
             "--diffusion_steps 8 --rollout_batch 6 --temperature 3")
    args = train_grpo.parse_args(words.split())

    def keep_masks(*arguments):
        return seen.setdefault("masks", train_grpo.draw_prompt_masks(*arguments))  # (mu, N, P)

    def reference():
        return contextlib.nullcontext(models[2])

    row, _ = train_grpo.train_step(0, models[0], reference, optimizers[0], tokenizer, examples, args, ALONE,
                                   draw=keep_masks)
    completions = seen["complete"].ids  # (N * G, L)
    rewards = torch.tensor([sum(reward(text, None).values()) for text in seen["complete"].texts]).view(3, 2)
    batch = [examples[i]["ids"] for i in train_grpo.draw_indices(4, 0, 3, args.seed) for _ in range(2)]
    prompt, attn_mask = sample.pad_left(batch, tokenizer.eos_id, "cpu")  # (N * G, P)
    losses = transcription.update_phase(
        models[1], reference, optimizers[1], prompt, seen["masks"].repeat_interleave(2, 1), completions,
        (rewards - rewards.mean(1, keepdim=True)).flatten(), train_grpo.completion_mask(completions, tokenizer.eos_id),
        tokenizer.mask_id, epsilon=args.epsilon, beta=args.beta, grad_clip=args.grad_clip, attn_mask=attn_mask)
    assert row["loss"] == pytest.approx(sum(losses) / 2, abs=1e-5)
    moved = [(a - b).abs().max() for a, b in zip(models[0].parameters(), models[1].parameters())]
    trained = [(a - b).abs().max() for a, b in zip(models[0].parameters(), embedded()[0].parameters())]
    assert max(moved) < 1e-5 and max(trained) > 1e-3


# ---------------------------------------------------------------- the folder

def test_a_run_leaves_the_documented_folder(run):
    out, summary = run
    assert {path.name for path in out.iterdir()} == {
        "config.json", "metrics.jsonl", "samples.jsonl", "summary.json", "step_000002", ".lock"}
    written = json.loads((out / "summary.json").read_text())
    names = "task seed accuracy_before accuracy_after greedy_before greedy_after steps minutes device"
    assert all(written[name] is not None for name in names.split())
    assert {name: value for name, value in written.items() if name in summary} == summary
    config = json.loads((out / "config.json").read_text())
    assert config["options"]["lr"] == 5e-5 and config["torch"] == torch.__version__
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    names = ("reward reward_exact reward_closed accuracy completion_length zero_spread_fraction loss clip_fraction kl "
             "grad_norm")
    assert all(name in row for row in rows[1:3] for name in names.split())
    assert all({"held_out_accuracy", "held_out_greedy"} <= row.keys() for row in (rows[0], rows[3]))
    assert [row["step"] for row in read_rows(out / "samples.jsonl")] == [1] * 4 + [2] * 4  # the group of a prompt
    model = LLaDA.from_pretrained(out / "step_000002")  # a checkpoint is a model folder like any other
    Tokenizer.from_folder(out / "step_000002", model.config)
    ids = torch.arange(20)[None]
    assert not torch.equal(model(ids), embedded()[0](ids))


def test_a_run_without_an_evaluation_before_training_has_no_before(tmp_path):
    train(train_grpo, tmp_path / "run", f"{QUICK} --eval_count 0")
    with pytest.raises(SystemExit, match="^error: [^\n]* --eval_count 0, --resume cannot change that$"):
        train(train_grpo, tmp_path / "run", f"{QUICK} --steps 2 --eval_count 4 --resume")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 1 and not {"accuracy_before", "accuracy_after"} & summary.keys()


def test_a_finished_run_is_not_taken_twice(run):
    before = read_rows(run[0] / "metrics.jsonl")
    for script in (train_grpo, train_sft):
        with pytest.raises(SystemExit, match="^error: --out [^\n]*holds a run"):
            train(script, run[0], "--task countdown")
    assert read_rows(run[0] / "metrics.jsonl") == before


# ---------------------------------------------------------------- the methods that a fork replaces

@pytest.mark.parametrize("options", ["", "--lora_r 4 --lr 1e-3", "--microbatch 1", "--checkpoint_activations"])
def test_before_the_first_update_the_ratio_is_one_and_the_kl_zero(tmp_path, options):
    updates = []

    def watch(logps, old_logps, ref_logps, *rest):
        updates.append((torch.equal(logps, old_logps), torch.equal(logps, ref_logps)))
        return train_grpo.diffu_grpo(logps, old_logps, ref_logps, *rest)

    train(train_grpo, tmp_path / "run", f"{options} --data {PROBLEMS} --steps 1", objective=watch)
    parts = len(updates) // 2
    assert all(ratio and kl for ratio, kl in updates[:parts])
    assert not any(ratio or kl for ratio, kl in updates[parts:])  # the second update; the reference stayed


def test_every_method_can_be_replaced(tmp_path):
    """Values drawn come back by update and part; statistics are logged; generate serves rollouts and evaluation."""
    calls = []

    def draw(rollout, step, args, procs):
        calls.append("draw")
        assert rollout.committed_at.shape == rollout.mask.shape == (4, 4, 32)
        return torch.arange(2)[:, None] * 10 + torch.arange(4)  # (mu, N)

    def log_probs(policy, rollout, masked, mask_id):
        calls.append(("log_probs", masked.tolist(), len(rollout.prompt)))
        return train_grpo.one_step(policy, rollout, torch.zeros_like(rollout.attn_mask), mask_id)

    def objective(logps, old_logps, ref_logps, rollout, masked, args):
        calls.append(("objective", masked.tolist()))
        return logps.sum(), {"prompts": torch.tensor(float(len(masked)))}

    def generate(*args, **options):
        calls.append("generate")
        return sample.generate(*args, **options)

    train(train_grpo, tmp_path / "run", f"--data {PROBLEMS} --microbatch 3 --steps 1 --eval_count 4",
          draw=draw, log_probs=log_probs, objective=objective, generate=generate)
    parts = [[0, 1, 2], [3], [10, 11, 12], [13]]
    assert [call[1] for call in calls if call[0] == "objective"] == parts
    assert [call[1] for call in calls if call[0] == "log_probs"] == parts * 3  # old, reference, updates
    assert calls.count("draw") == 1 and calls.count("generate") == 1 + 2 * 2
    assert read_rows(tmp_path / "run" / "metrics.jsonl")[1]["prompts"] == 4

    def step(number, model, reference, optimizer, tokenizer, examples, args, procs, **methods):
        return {"reward": 1.0, "accuracy": 1.0, "kl": 0.0, "loss": float(number), "mine": methods["draw"] is draw}, []

    train(train_grpo, tmp_path / "other", f"--data {PROBLEMS}", step=step, draw=draw)
    rows = [row for row in read_rows(tmp_path / "other" / "metrics.jsonl") if "loss" in row]
    assert [row["loss"] for row in rows] == [0, 1] and all(row["mine"] for row in rows)


def test_without_beta_there_is_no_reference(tmp_path, monkeypatch):
    loaded, load_model = [], train_grpo.Run.load_model
    monkeypatch.setattr(train_grpo.Run, "load_model", lambda run, **words:
                        loaded.append(words) or load_model(run, **words))
    train(train_grpo, tmp_path / "run", f"{QUICK} --beta 0")
    assert loaded == [{}] and all("kl" not in row for row in read_rows(tmp_path / "run" / "metrics.jsonl"))


# ---------------------------------------------------------------- rewards and gradients

def test_equal_rewards_teach_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(countdown, "reward", lambda text, example: {"same": 0.5})
    train(train_grpo, tmp_path / "run", f"{QUICK} --beta 0 --weight_decay 0")
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert all(row["loss"] == 0 and row["zero_spread_fraction"] == 1 and row["reward_same"] == 0.5 for row in rows)
    folders = "data/tiny", tmp_path / "run" / "step_000001"
    before, after = (LLaDA.from_pretrained(folder).state_dict() for folder in folders)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_named(tmp_path, monkeypatch, value):
    monkeypatch.setattr(countdown, "reward", lambda text, example: {"exact": value})
    with pytest.raises((ValueError, SystemExit), match=r"data.countdown.reward.*\{'exact': (nan|inf)\}"):
        train(train_grpo, tmp_path / "run", QUICK)


def test_a_reward_that_raises_keeps_its_traceback(tmp_path, monkeypatch):
    def unpack_too_much(text, example):
        a, b = [text]
    monkeypatch.setattr(countdown, "reward", unpack_too_much)
    with pytest.raises(ValueError, match="not enough values") as raised:
        train(train_grpo, tmp_path / "run", QUICK)
    assert raised.traceback[-1].name == "unpack_too_much"


def test_a_gradient_that_is_not_finite_stops_before_the_update(tmp_path):
    def objective(logps, *_):
        return logps.sum() * float("nan"), {}
    with pytest.raises(RuntimeError, match="norm.* is non-finite"):
        train(train_grpo, tmp_path / "run", f"{QUICK} --save_every 1", objective=objective)
    assert not list((tmp_path / "run").glob("step_*"))


# ---------------------------------------------------------------- options

@pytest.mark.parametrize("options, message", [
    ("--gen_length 30", "--block_length 8"),
    ("--diffusion_steps 5", "--diffusion_steps 5"),
    ("--temperature 0", "--temperature 0"),
    ("--group_size 1", "--group_size 1"),
    ("--microbatch 0", "--microbatch 0"),
    ("--beta -1", "--beta"),
    ("--lr nan", "--lr"),
    ("--lr inf", "--lr inf: choose a number above 0, below 2 ** 32"),
    ("--model nowhere", "--model nowhere: no such folder"),
    ("--data absent.jsonl", "--data absent.jsonl"),
    ("--gen_length 504 --diffusion_steps 63", "--gen_length"),
    ("--lora_r 4 --lora_targets o_proj", "--lora_targets"),
])
def test_bad_options_are_one_line(tmp_path, options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(train_grpo, tmp_path / "run", options)
    assert message in f"{stopped.value}{capsys.readouterr().err}" and "\n" not in str(stopped.value)
    assert not list(tmp_path.glob("run/step_*"))


def options_of(words, script=train_grpo):
    return vars(script.parse_args(words.split()))


def test_presets_follow_the_model_and_the_task(run):
    models = ("data/tiny", run[0] / "step_000002", ROOT / "tests" / "llada_8b")
    tiny, trained_from_it, large = (options_of(f"--task countdown --model {model}") for model in models)
    assert tiny["preset"] == trained_from_it["preset"] == "tiny" and large["preset"] == "8b"
    assert {**tiny, "model": 0} == {**trained_from_it, "model": 0}
    assert (large["lr"], large["lora_r"], large["gen_length"], large["diffusion_steps"]) == (3e-6, 128, 256, 128)
    assert options_of("--task countdown --model GSAI-ML/LLaDA-8B-Instruct")["preset"] == "8b"
    assert options_of("--task countdown --model GSAI-ML/LLaDA-8B-Instruct --preset tiny")["lr"] == tiny["lr"]
    for task, steps, mu in (("countdown", 625, 8), ("sudoku", 475, 8), ("gsm8k", 642, 12), ("math500", 550, 12)):
        options = options_of(f"--task {task} --preset 8b")
        assert (options["steps"], options["num_iterations"]) == (steps, mu)
    assert options_of("--task gsm8k --preset 8b --num_iterations 3")["num_iterations"] == 3


def test_the_default_number_of_rounds_follows_the_length():
    assert options_of("--task countdown --preset 8b --gen_length 512")["diffusion_steps"] == 256
    assert options_of("--task countdown --gen_length 16")["diffusion_steps"] == 16
    assert options_of("--task countdown --preset 8b --gen_length 512", sample)["diffusion_steps"] == 256
    assert options_of("--task countdown --gen_length 16 --diffusion_steps 4")["diffusion_steps"] == 4


# ---------------------------------------------------------------- prompt masks

def test_prompt_masks_have_their_rate_and_leave_padding_alone():
    words = "--task countdown --prompts_per_step 2 --num_iterations 200 --p_mask_prompt 0.3"
    args = train_grpo.parse_args(words.split())
    attn_mask = torch.arange(20) >= torch.tensor([0, 8])[:, None]  # (N, P)

    def draw(attn_mask, procs=ALONE, step=0):
        fields = dict.fromkeys(train_grpo.Rollout.__dataclass_fields__) | {"attn_mask": attn_mask}
        return train_grpo.draw_prompt_masks(train_grpo.Rollout(**fields), step, args, procs)

    masks = draw(attn_mask)  # (mu, N, P)
    assert masks.shape == (200, 2, 20) and masks.dtype == torch.bool and not masks[:, 1, :8].any()
    assert abs(masks[:, attn_mask].float().mean() - 0.3) < 0.03
    second = Processes(1, 2, torch.device("cpu"), torch.float32)  # which has the second prompt, less padded
    assert torch.equal(draw(attn_mask[1:, 8:], second)[:, 0], masks[:, 1, 8:])
    assert not torch.equal(draw(attn_mask, step=1), masks) and not torch.equal(masks[0], masks[1])


# ---------------------------------------------------------------- a task of one's own

@pytest.mark.slow
def test_a_task_of_ones_own_is_one_file(tmp_path, monkeypatch):
    """Three functions and a line in TASKS: SFT, RL and evaluation know it."""
    monkeypatch.setitem(TASKS, "sorting", task_sorting)
    monkeypatch.setitem(DEMONSTRATIONS, "sorting", task_sorting)
    example = {"numbers": [7, 3, 12, 3, 9]}
    for answer, share in (("3, 3, 7, 9, 12", 1), ("12, 9, 7, 3, 3", 0.2), ("3, 3, 7, 9, 12, 12", 5 / 6), ("", 0)):
        assert task_sorting.reward(f"so <answer>\n{answer}\n</answer>", example) == {"closed": 0.1, "places": share}
    train(train_sft, tmp_path / "sft", "--task sorting --split worked --steps 1")
    train(train_grpo, tmp_path / "rl", f"--task sorting --model {tmp_path / 'sft' / 'step_000001'}")
    rows = [row for row in read_rows(tmp_path / "rl" / "metrics.jsonl") if "loss" in row]
    assert all(row["reward"] == pytest.approx(row["reward_closed"] + row["reward_places"]) for row in rows)
    model, out = tmp_path / "rl" / "step_000002", tmp_path / "sample"
    words = f"--task sorting --count 4 --model {model} --device cpu --out {out}"
    assert {"accuracy", "closed", "effective_tokens"} <= sample.main(sample.parse_args(words.split())).keys()
