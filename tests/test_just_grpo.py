"""variants/just_grpo.py against the chain rule, and its chunks against one pass over the whole trajectory."""
import argparse
import copy
import itertools

import pytest
import torch
from helpers import embedded, read_rows, reference_model, worst

import train_grpo
from data import countdown
from parallel import Processes
from variants import estimators, just_grpo

ALONE = Processes(0, 1, torch.device("cpu"), torch.float32)
SMALL = "--task countdown --prompts_per_step 2 --group_size 4 --gen_length 16 --device cpu"


def parse(options=""):
    return just_grpo.parse_args(f"{SMALL} {options}".split())


@torch.no_grad()
def test_left_to_right_is_the_chain_rule():
    """Over three symbols of the reference model: the probabilities of all completions, renormalised, sum to 1."""
    model, symbols = reference_model("llada_mha", torch.float64), torch.tensor([3, 7, 9])
    every = symbols[torch.tensor(list(itertools.product(range(3), repeat=3)))]  # (27, L)
    rollout = argparse.Namespace(prompt=torch.tensor([[0, 5, 6]]), completions=every[None],
                                 attn_mask=torch.tensor([[False, True, True]]))
    logps = just_grpo.score_positions(model, rollout, torch.arange(3), 500)[0].T  # (27, L)
    total = torch.zeros(27, dtype=torch.float64)
    for (i, completion), t in itertools.product(enumerate(every.tolist()), range(3)):
        row = torch.tensor([[5, 6, *completion[:t], *[500] * (3 - t)]])
        all_logps = model(row, torch.ones_like(row).bool())[0, 2 + t].log_softmax(-1)
        assert float(logps[i, t]) == pytest.approx(float(all_logps[completion[t]]), abs=1e-6)
        total[i] += logps[i, t] - all_logps[symbols].logsumexp(0)
    assert float(total.exp().sum()) == pytest.approx(1, abs=1e-5)


def train_once(options, monkeypatch):
    """The metrics of one step, and how it changed the head of a copy of the embedded model."""
    monkeypatch.setattr(countdown, "reward", lambda text, example: {"any": len(text) % 7})
    examples, model, tokenizer = countdown.load("train", count=2), copy.deepcopy(embedded()[0]), embedded()[1]
    for example in examples:
        example["ids"] = tokenizer.encode_prompt(example["prompt"])
    inputs = model, None, torch.optim.SGD(model.parameters(), lr=1.0), tokenizer, examples, parse(options), ALONE
    row, _ = just_grpo.train_step(0, *inputs)
    return row, model, examples


@pytest.mark.slow
def test_chunks_add_up_to_one_pass_over_the_whole_trajectory(monkeypatch):
    whole, model, examples = train_once("--positions_per_pass 99", monkeypatch)
    for options in ("--positions_per_pass 1 --microbatch 1", "--positions_per_pass 5 --microbatch 2"):
        row, other, _ = train_once(options, monkeypatch)
        assert row == pytest.approx(whole, rel=1e-4, abs=1e-6)
        assert all(worst(*pair) < 1e-5 for pair in zip(other.parameters(), model.parameters()))
    (policy, tokenizer), args = embedded(), parse("--block_length 1")
    with torch.no_grad():
        rollout, _ = train_grpo.roll_out(0, policy, tokenizer, examples, args, ALONE)
    policy = copy.deepcopy(policy)
    logps = estimators.trajectory(policy, rollout, rollout.committed_at, tokenizer.mask_id)  # (2, 4, 16)
    spread = rollout.advantages.std(-1, keepdim=True)
    assert (spread > 0).all()
    loss = -(rollout.advantages / (spread + 1e-4) * (logps * rollout.mask).sum(-1)).sum() / (16 * 8)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in policy.parameters()]).norm()
    assert (whole["loss"], whole["grad_norm"]) == pytest.approx((float(loss), float(norm)), rel=1e-4)


def test_options_that_it_does_not_read_are_refused_and_a_run_has_its_settings(tmp_path):
    with pytest.raises(SystemExit, match="--beta would be ignored by JustGRPO"):
        parse("--beta 0.1")
    args = parse(f"--steps 1 --eval_count 2 --threshold 0.9 --out {tmp_path}")
    assert (args.temperature, args.grad_clip, args.weight_decay) == (1, 1, 0) and "epsilon" not in args
    just_grpo.main(args)
    assert read_rows(tmp_path / "metrics.jsonl")[-1].keys() >= {"step", "held_out_greedy"}
