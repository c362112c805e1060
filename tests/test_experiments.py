"""experiments.py: what each variant changes, and that every command can run and is named apart from the others."""
import functools
import json
import shlex

import experiments
import pytest
import sample
import torch
import train_grpo
import train_sft
from conftest import reference
from test_estimators import drawn

from d1 import generator, kl_k3, one_step_logps

PARSERS = {"train_grpo.py": train_grpo, "train_sft.py": train_sft, "sample.py": sample}
PLANS = [experiments.resolve(commands, task, seed) for rows in experiments.EXPERIMENTS.values()
         for commands in rows.values() for task in experiments.TASKS for seed in (0, 1)]


def test_every_command_parses_and_has_a_folder_of_its_own():
    commands = dict(pair for plan in PLANS for pair in plan)
    assert len(set(commands.values())) == len(commands) and max(map(len, commands.values())) < 200
    for command in commands:
        words = shlex.split(command)
        if words[:2] == ["tests/experiments.py", "variant"]:
            assert words[2] in experiments.VARIANTS
            words = ["train_grpo.py", *words[3:]]
        PARSERS[words[0]].parse_args(words[1:])


def test_a_later_command_builds_on_the_folder_of_an_earlier_one():
    sft, grpo, evaluation = experiments.resolve(experiments.EXPERIMENTS["table"]["+ SFT + diffu-GRPO"], "sudoku", 2)
    assert f"--model {sft[1]}/step_" in grpo[0] and f"--model {grpo[1]}/step_" in evaluation[0]
    assert "--task sudoku" in grpo[0] and "--seed 2" in sft[0]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """What two updates of two prompts log, under the variant that is put in place before."""
    def run(name):
        out = tmp_path_factory.mktemp("runs") / name
        train_grpo.main(train_grpo.parse_args(shlex.split(
            f"--task countdown --steps 1 --prompts_per_step 2 --group_size 4 --masks_per_prompt 4 --num_iterations 2 "
            f"--p_mask_prompt 0.5 --eval_count 0 --lr 1e-3 --device cpu --out {shlex.quote(str(out))}")))
        row = json.loads((out / "metrics.jsonl").read_text())
        return {name: value for name, value in row.items() if name not in ("seconds", "tokens_per_second")}
    plain = run("plain")
    assert run("again") == plain
    return run, plain


@pytest.mark.parametrize("name", experiments.VARIANTS)
def test_a_variant_changes_a_run(short_run, name, monkeypatch):
    place, what, function = experiments.VARIANTS[name]
    assert callable(place[what])
    monkeypatch.setitem(place, what, function)
    run, plain = short_run
    changed = {key for key, value in run(name).items() if value != plain[key]}
    assert {"loss", "grad_norm"} <= changed and ("completion_length" in changed) == (name == "gumbel_bfloat16")


def test_fixed_masks_are_the_same_for_all_updates_and_steps():
    args = train_grpo.parse_args(["--task", "countdown", "--num_iterations", "3", "--p_mask_prompt", "0.3"])
    one = experiments.fixed_masks([400, 300], 400, 0, [0, 1], args)
    assert one.shape == (2, 3, 1, 400) and torch.equal(one, experiments.fixed_masks([400, 300], 400, 9, [4, 7], args))
    assert torch.equal(one[:, 0], one[:, 2]) and not one[1, ..., :100].any()
    assert torch.equal(one[0, 0, 0, :300], one[1, 0, 0, 100:]) and abs(float(one[0].float().mean()) - 0.3) < 0.08


def test_a_mask_per_completion_is_the_layout_of_a_row_per_completion():
    net, draw = reference("llada_mha", torch.float64), functools.partial(torch.randint, generator=generator("layout"))
    N, mu, G, P, L = 2, 3, 4, 6, 5
    prompt, completions = draw(480, (N, P)), draw(480, (N, G, L))
    masked = draw(3, (N, mu, G, P)) == 0
    args = train_grpo.parse_args(["--task", "countdown", "--masks_per_prompt", "4"])
    rollout = train_grpo.Rollout(prompt, None, masked, completions, None, None, None)
    with torch.no_grad():
        got = experiments.mask_per_completion(net, rollout, slice(None), slice(None), args, 500)  # (N, mu, 1, G, L)
        rows = one_step_logps(net, prompt.repeat_interleave(G, 0), masked.transpose(1, 2).flatten(0, 1),
                              completions.view(N * G, 1, L), 500)  # (N * G, mu, 1, L)
    torch.testing.assert_close(got[:, :, 0], rows.view(N, G, mu, L).transpose(1, 2))


def test_the_sequence_mean_is_that_of_loops():
    logps, old, ref, A, mask = drawn(0)
    mask = mask[:, :1]
    got, _ = experiments.sequence_mean(logps, old, ref, A, mask, 0.2, 0.04, None)
    N, K, G, L = logps.shape
    want = 0
    for n, k, i in ((n, k, i) for n in range(N) for k in range(K) for i in range(G)):
        tokens = [l for l in range(L) if mask[n, 0, i, l]]
        for l in tokens:
            rho = torch.exp(logps[n, k, i, l] - old[n, k, i, l])
            clipped = torch.minimum(rho * A[n, i], rho.clamp(0.8, 1.2) * A[n, i])
            want = want - (clipped - 0.04 * kl_k3(logps[n, k, i, l], ref[n, k, i, l])) / len(tokens) / (N * K * G)
    torch.testing.assert_close(got, want)


def test_noise_in_bfloat16_cuts_the_tail_and_nothing_else():
    logits = torch.tensor([2.0, 1.0, 0.0, -9.0, 5.0]).expand(1, 20000, 5)  # the last is [MASK]
    uniform = torch.rand(1, 20000, generator=generator("u"), dtype=torch.float64)
    drawn_tokens = experiments.gumbel_bfloat16(logits, 1.0, uniform, 4)
    counts = torch.bincount(drawn_tokens.flatten(), minlength=5) / 20000
    want = logits[0, 0, :4].softmax(-1)
    assert counts[4] == 0 and counts[3] == 0 and float((counts[:3] - want[:3]).abs().max()) < 0.02
    assert experiments.gumbel_bfloat16(logits, 0.0, None, 4).eq(0).all()


def test_results_are_means_over_seeds_and_equal_time(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    rows = {"base": ["train_grpo.py --task {task} --seed {seed}"],
            "slow": ["train_grpo.py --task {task} --seed {seed} --beta 0"]}
    for row, seconds in (("base", 2), ("slow", 4)):
        for seed in (0, 1):
            out = tmp_path / experiments.resolve(rows[row], "sudoku", seed)[-1][1]
            out.mkdir(parents=True)
            (out / "summary.json").write_text("{}")
            (out / "metrics.jsonl").write_text("".join(
                json.dumps({"reward": seed + i, "accuracy": i / 20, "seconds": {"a": seconds}}) + "\n"
                for i in range(20)))
    base, slow = experiments.collect(rows, ["sudoku"], [0, 1])
    assert base["mean"]["reward"] == 17.5 and base["spread"]["reward"] == pytest.approx(0.5 ** 0.5)
    assert base["mean"]["accuracy in equal time"] == base["mean"]["accuracy"] == pytest.approx(17 / 20)
    assert slow["mean"]["seconds"] == 4 and slow["mean"]["accuracy in equal time"] == pytest.approx(7 / 20)
