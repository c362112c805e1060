"""train_sft.py: which rows are trained, how they are masked, and that a run does what its options say."""
import json

import pytest
import torch
from helpers import EOS_ID, GOLDEN, MASK_ID, assert_same_log, assert_same_run, embedded, read_rows, train

import train_sft
from model import LLaDA
from parallel import Processes
from tools import tiny

ALONE = Processes(0, 1, torch.device("cpu"), torch.float32)
REFERENCE = json.loads((GOLDEN / "run_seed_5.json").read_text())


def parse(words):
    return train_sft.parse_args(words.split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("sft") / "run"
    return out, train(train_sft, out, "--task countdown sudoku")


# ---------------------------------------------------------------- runs

def test_a_run_gives_the_numbers_of_the_reference_run(run):
    rows = read_rows(run[0] / "metrics.jsonl")
    for row, expected in zip([row for row in rows if "loss" in row], REFERENCE["sft"], strict=True):
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    losses = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    summary = json.loads((run[0] / "summary.json").read_text())
    assert [summary["loss_before"], summary["loss_after"]] == losses
    assert {"task", "seed", "steps", "minutes", "device"} <= summary.keys()


def test_the_same_command_gives_the_same_run_and_leaves_the_global_random_state_alone(run, tmp_path):
    state = torch.get_rng_state()
    train(train_sft, tmp_path / "again", "--task countdown sudoku")
    assert_same_run(run[0], tmp_path / "again")
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("options", ["--microbatch 3", "--checkpoint_activations"])
def test_accumulation_and_recomputation_change_nothing(run, tmp_path, options):
    train(train_sft, tmp_path / "again", f"--task countdown sudoku {options}")
    assert_same_log(run[0], tmp_path / "again", 1e-4)  # the second step sees the weights of the first


@pytest.mark.slow
def test_random_weights_learn_and_the_held_out_loss_is_measured_on_fixed_masks(tmp_path):
    words = "--steps 25 --batch_size 16 --count 300 --warmup 5 --eval_every 5 --lr 2e-3"
    tiny.main(["random", str(tmp_path / "random")])
    train(train_sft, tmp_path / "run", f"--task countdown --model {tmp_path / 'random'} {words}")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    losses = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    assert len(losses) == 6 and losses[-1] < losses[0] - 1
    rates = [row["lr"] for row in rows if "loss" in row]
    assert rates[:2] == pytest.approx([2e-3 / 5, 2e-3 * 2 / 5 * 24 / 25])  # warm-up times decay
    assert rates[-1] == pytest.approx(2e-3 / 25)
    model, tokenizer = LLaDA.from_pretrained(tmp_path / "run" / "step_000025"), embedded()[1]
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), embedded()[0].parameters()))
    rows, args = [(list(range(5, 30)), 9), (list(range(8, 60)), 20)], parse("--task countdown --microbatch 3")
    again = [train_sft.held_out_loss(model, rows, tokenizer, args, ALONE) for _ in range(2)]
    args.microbatch = 1
    assert again[0] == again[1] == pytest.approx(train_sft.held_out_loss(model, rows, tokenizer, args, ALONE), 1e-5)


def test_the_weights_of_the_tokens_can_be_replaced(tmp_path):
    train(train_sft, tmp_path / "run", "--task countdown --steps 1",
          weigh=lambda t, answer: torch.zeros(answer.shape))
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert all(row.get("loss", row.get("held_out_loss")) == 0 for row in rows)


# ---------------------------------------------------------------- rows

@pytest.fixture
def data(tmp_path):
    """12 short rows, a row without a completion and a long row."""
    rows = [{"prompt": f"Say {i}", "completion": f"{i}"} for i in range(12)]
    rows += [{"prompt": "nothing", "completion": " "}, {"prompt": "long", "completion": "word " * 300}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def encode(words, max_length):
    args = parse(words)
    examples = train_sft.load_demonstrations(args.task, args.split, args.data, args.count, args.seed)
    return train_sft.encode_rows(examples, embedded()[1], max_length, args, ALONE)


def test_rows_without_a_completion_and_long_rows_are_skipped_and_counted(data, capsys):
    rows = encode(f"--data {data} --batch_size 4 --gen_length 16", 100)
    assert len(rows) == 12 and all(len(ids) - prompt_length == 16 for ids, prompt_length in rows)
    assert "skipped 2 rows, empty or over 100 tokens" in capsys.readouterr().out
    ids, prompt_length = rows[3]
    tokenizer = embedded()[1]
    assert ids[:prompt_length] == tokenizer.encode_prompt("Say 3")
    completion = tokenizer.encode_completion("3")
    assert ids[prompt_length:] == completion + [tokenizer.eos_id] * (16 - len(completion))


def test_messages_are_a_chat_whose_last_turn_is_learnt(tmp_path):
    """As the published chat template lays out all of the chat."""
    file, tokenizer, answer = tmp_path / "rows.jsonl", embedded()[1], {"role": "assistant", "content": " Yes.\n"}
    cases = json.loads((GOLDEN / "chat_template" / "cases.json").read_text())["cases"]
    chats = [[*case["messages"], answer] for case in cases if case["messages"]]
    file.write_text("".join(json.dumps({"messages": chat, "id": i}) + "\n" for i, chat in enumerate(chats)))
    rows = encode(f"--data {file} --batch_size 2 --gen_length 0", 2000)
    assert len(rows) == len(chats) > 5
    for (ids, prompt_length), chat in zip(rows, chats):
        laid_out = tokenizer.encode_chat(chat)  # ends in the header of another answer
        assert ids[:-1] == laid_out[:len(ids) - 1] and ids[-2:] == [tokenizer.eot_id, tokenizer.eos_id]
        assert ids[prompt_length:] == tokenizer.encode_completion("Yes.")


@pytest.mark.parametrize("row", [
    *[{"messages": chat} for chat in (
        5, "Hi", [], ["Hi", "Yes"], [{"role": "assistant", "content": "Hi"}], [{"role": "user", "content": "Hi"}] * 2,
        [{"role": "user", "content": None}, {"role": "assistant", "content": "Hi"}],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ["Hi"]}])],
    {"prompt": ["Hi"], "completion": "Yes"}, {"prompt": "Hi", "completion": 5}])
def test_rows_that_are_no_demonstration_are_named(row, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit, match="^error: --data [^\n]*rows.jsonl, row 1: needs prompt and completion"):
        encode(f"--data {file}", 100)


def test_truncate_cuts_long_rows_where_that_leaves_a_target(data, capsys):
    rows = encode(f"--data {data} --batch_size 4 --truncate", 60)
    assert len(rows) == 13 and len(rows[-1][0]) == 60
    assert "skipped 1 rows, empty or over 60 tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0 usable rows"):
        encode(f"--data {data} --batch_size 4 --truncate", 5)  # the prompts alone are longer


def test_no_row_is_longer_than_the_network(data, tmp_path, capsys):
    longest = embedded()[0].config.max_sequence_length
    data.write_text(data.read_text() + "\n" + json.dumps({"prompt": "longer", "completion": "7 * 3 " * longest}))
    train(train_sft, tmp_path / "run", f"--data {data} --batch_size 4 --steps 1 --max_length 4096")
    assert f"skipped 3 rows, empty or over {longest} tokens" in capsys.readouterr().out


def test_the_noise_of_a_row_depends_neither_on_its_batch_nor_on_its_padding():
    rows = [([1] * 10 + [2] * 20, 10), ([1] * 5 + [2] * 5, 5)]
    ids, answer = train_sft.collate(rows, EOS_ID)
    assert ids[1, 10:].eq(EOS_ID).all() and answer[1, 5:].all() and not answer[1, :5].any()
    rates = torch.zeros(30)
    for i in range(300):
        noised, masked, t = train_sft.draw_noise(ids, answer, [(i, 0), (i, 1)], MASK_ID)
        assert not masked[~answer].any() and torch.equal(noised == MASK_ID, masked)
        rates += masked[1] / 300
    assert (rates[5:] - 0.5).abs().max() < 0.12  # t ~ U(0, 1); EOS padding like any other token
    alone = train_sft.draw_noise(ids[1:], answer[1:], [(299, 1)], MASK_ID)
    assert torch.equal(alone[0][0], noised[1]) and torch.equal(alone[2][0], t[1])


# ---------------------------------------------------------------- options

@pytest.mark.parametrize("options, message", [
    ("", "say what to train on"),
    ("--task countdown --split test", "--split mixed or worked"),
    ("--task countdown --count 3", "--batch_size 8"),
    ("--task countdown --microbatch 0", "--microbatch 0"),
    ("--task countdown --lr nan", "--lr"),
    ("--data absent.jsonl", "--data absent.jsonl"),
    ("--task countdown sudoku --data rows.jsonl", "--data rows.jsonl"),
    ("--data broken.jsonl", "broken.jsonl, row 2"),
    ("--data numbers.jsonl", "numbers.jsonl, row 1: no 'messages', need prompt, completion or messages"),
])
def test_bad_options_are_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{broken\n')
    (tmp_path / "numbers.jsonl").write_text('{"question": 1, "answer": "b"}\n')
    with pytest.raises(SystemExit) as stopped:
        train(train_sft, tmp_path / "run", options)
    assert message in f"{stopped.value}{capsys.readouterr().err}" and "\n" not in str(stopped.value)
