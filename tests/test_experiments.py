"""The experiments: their commands are sound, results are collected as the tables say. And what measures is right."""
import json
import shlex

import pytest
import sample
import torch
import train_grpo
import train_sft

from model import TINY
from tools import behaviours, experiments, methods, scaling, variance
from variants import grpo, just_grpo

PARSERS = {"train_grpo.py": train_grpo, "variants/grpo.py": grpo, "variants/just_grpo.py": just_grpo,
           "tools/behaviours.py": behaviours, "train_sft.py": train_sft, "sample.py": sample}
PLANS = [experiments.resolve(commands, task, seed) for rows in experiments.EXPERIMENTS.values()
         for commands in rows.values() for task in experiments.TASKS for seed in (0, 1)]


def test_every_command_parses_and_has_a_folder_of_its_own():
    folders = dict(command for plan in PLANS for command in plan)
    assert len(set(folders.values())) == len(folders)
    assert max(map(len, folders.values())) < 200  # file systems allow 255
    for command, out in folders.items():
        script, *words = shlex.split(command)
        args = PARSERS[script].parse_args([*words, "--out", out])
        assert args.out == out


def test_a_command_builds_on_the_folder_of_the_command_before_it():
    row = experiments.EXPERIMENTS["table"]["+ SFT + diffu-GRPO"]
    (sft, sft_out), (grpo, grpo_out), *evaluations = experiments.resolve(row, "sudoku", 2)
    assert "--seed 2" in sft and "--task sudoku" in grpo
    assert f"--model {sft_out}/step_" in grpo
    assert len(evaluations) == 3 and all(f"--model {grpo_out}/step_" in command for command, _ in evaluations)


def write_training(out, seconds, seed):
    """The folder of a training of 20 steps whose accuracy rises, with an evaluation between steps."""
    out.mkdir(parents=True)
    minutes, rows = 0.0, [{"step": 0, "minutes": 0.0}]
    for step in range(1, 21):
        minutes += seconds / 60
        rows.append({"step": step, "reward": seed + step, "accuracy": step / 20, "loss": 0.0, "minutes": minutes})
        if step == 10:
            minutes += 7.0
            rows.append({"step": step, "held_out_greedy_accuracy": 1.0, "minutes": minutes})
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "summary.json").write_text(json.dumps({"greedy_after": seed / 4} if seconds == 4 else {}))


def test_trainings_are_collected_over_seeds_and_compared_in_equal_time(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    command = "train_grpo.py --task {task} --seed {seed}"
    rows = {"base": [command], "slow": [command + " --beta 0"]}
    rows["not yet"] = [command + " --beta 1"]
    for row, seconds in (("base", 2), ("slow", 4)):
        for seed in (0, 1):
            [(_, out)] = experiments.resolve(rows[row], "sudoku", seed)
            write_training(tmp_path / out, seconds, seed)
    base, slow = experiments.collect(rows, ["sudoku"], [0, 1, 2])
    assert base["seeds"] == [0, 1]
    assert base["mean"]["reward"] == 18.5 and base["spread"]["reward"] == pytest.approx(0.5 ** 0.5)
    assert base["mean"]["accuracy in equal time"] == base["mean"]["accuracy"] == pytest.approx(18 / 20)
    assert slow["mean"]["seconds"] == pytest.approx(4)  # without the evaluation
    assert slow["mean"]["accuracy in equal time"] == pytest.approx(8 / 20)  # after half of its steps
    assert slow["values"]["held-out greedy"] == [0, 0.25] and "held-out greedy" not in base["mean"]


def test_a_dear_row_runs_on_the_first_task_alone():
    assert experiments.tasks_of("JustGRPO", experiments.TASKS) == ["countdown"]
    assert experiments.tasks_of("ESPO", experiments.TASKS) == list(experiments.TASKS)
    assert all(any(row in rows for rows in experiments.EXPERIMENTS.values()) for row in experiments.DEAR)


def test_evaluations_of_a_row_are_collected_by_length(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    commands = experiments.evaluate("data/tiny")
    for (_, out), length in zip(experiments.resolve(commands, "countdown", 0), (24, 32, 48)):
        (tmp_path / out).mkdir(parents=True)
        (tmp_path / out / "summary.json").write_text(json.dumps({"gen_length": length, "accuracy": length / 100}))
    [row] = experiments.collect({"base": commands}, ["countdown"], [0])
    assert row["mean"] == {"length 24": 0.24, "length 32": 0.32, "length 48": 0.48} and row["spread"] == {}


def test_methods_are_compared_at_what_the_first_method_uses():
    """The others have 10, 5 and 20 of their 20 steps within its row passes; a mean is over the last 5 steps."""
    curve = [step / 100 for step in range(1, 21)]
    costs = {"diffu-GRPO": (100, 2.0), "dear": (200, 8.0), "cheap": (50, 2.0)}
    collected = [{"row": row, "task": "sudoku", "values": {"curve": [curve, curve], "held-out": [0.5, 0.7]}}
                 for row in costs]
    counted = [{"row": row, "row_passes": rows, "seconds": seconds} for row, (rows, seconds) in costs.items()]
    first, dear, cheap = (row["columns"] for row in methods.compare(collected, counted))
    assert first["equal row passes"] == first["20 rollouts"] == pytest.approx([0.18, 0.18])
    assert dear["equal row passes"] == pytest.approx([0.08, 0.08])  # steps 6 to 10
    assert dear["equal minutes"] == pytest.approx([0.03, 0.03]) and cheap["equal row passes"] == first["20 rollouts"]
    assert methods.cell(cheap["held-out"]) == "60.0 ± 14.1" and methods.cell(None) == ""


@pytest.mark.slow
def test_row_passes_are_the_rows_that_a_step_scores():
    """G rows in the place of one, by the old policy, the reference and the new policy, which is differentiated."""
    command = ("variants/grpo.py --task countdown --prompts_per_step 2 --group_size 3 --num_iterations 2 "
               "--gen_length 8 --diffusion_steps 1 --block_length 8")
    shared, own = (methods.count_step(f"{command} --estimator {name}", str(TINY))["row_passes"]
                   for name in ("one_step", "mask_per_completion"))
    assert shared == 2 * 3 + 2 * 2 * 5 and own == 2 * 3 + 2 * 2 * 3 * 5


def test_habits_are_told_by_their_first_words():
    texts = ["<reasoning>\nA quick guess\n", "Perhaps 3", "<reasoning>\nRow by row", "<reasoning>\n3 + 4", "Well"]
    assert [behaviours.behaviour(text) for text in texts] == ["guess", "untagged", "worked", "worked", "other"]
    rows = [{"completion": text, "reward": reward, "accuracy": 0.0} for text, reward in zip(texts[:4], (1, 0, 1, 4))]
    counts = behaviours.count_behaviours(rows, group_size=2)
    assert counts["worked_fraction"] == 0.5 and counts["worked_reward"] == 2.5 and counts["worked_advantage"] == 0
    assert counts["guess_advantage"] == 0.5 == -counts["untagged_advantage"]
    late = {"worked_fraction": 1.0, "worked_advantage": -0.5}
    assert experiments.read_habit("worked", [counts] + 5 * [late]) == {
        "worked": 1, "worked advantage": pytest.approx(-5 * 0.5 / 5.5)}


# ---------------------------------------------------------------- measuring

def test_an_exponent_is_the_slope_of_the_logarithms():
    sizes = [1, 4, 16, 64]
    assert scaling.exponent(sizes, [3 * size ** 1.5 for size in sizes]) == pytest.approx(1.5)


@pytest.mark.slow
def test_arithmetic_grows_with_the_rows_and_not_with_the_group():
    fitted = scaling.fit(scaling.make_sampling, "rows", (1, 2), torch.device("cpu"), repeats=1)
    assert fitted["arithmetic"] == pytest.approx(1)
    fitted = scaling.fit(scaling.make_update, "group", (2, 16), torch.device("cpu"), repeats=1)
    assert fitted["arithmetic"] == pytest.approx(0)


def test_moments_are_the_mean_and_the_unbiased_variance():
    vectors, moments = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), variance.Moments()
    for vector in vectors:
        moments.add(vector)
    assert torch.allclose(moments.mean, vectors.mean(0))
    assert moments.variance == pytest.approx(float(vectors.var(0).sum()), rel=1e-5)


@pytest.mark.slow
def test_the_variance_of_masks_and_of_prompts_is_found_again(monkeypatch):
    """Gradients of known variance: 1 between prompts, 4 of a shared mask, 8 of masks for every completion."""
    noise = torch.Generator().manual_seed(1)
    prompts = torch.randn(400, generator=noise)
    groups = [(torch.tensor([[i]]), torch.zeros(1, 6, 2, dtype=torch.long), torch.ones(1, 6)) for i in range(400)]
    model = torch.nn.Linear(1, 1, bias=False)
    model.config = type("Config", (), {"eos_token_id": 9})

    def gradient(model, group, masked, token_count):
        return prompts[group[0][0]] + torch.randn(1, generator=noise) * (8 if len(masked) > 1 else 4) ** 0.5

    monkeypatch.setattr(variance, "gradient", gradient)
    variances = variance.measure(model, groups, 0.15, 12, 0)
    for way, mask in zip(variance.WAYS, (8, 4, 2, 4 / 3, 4 / 6)):
        assert variances[way] == pytest.approx((mask, 1 + mask), rel=0.15), way
