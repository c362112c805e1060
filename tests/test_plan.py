"""tools/plan.py against the published table, hand calculation, torch's counters and a real checkpoint."""
from types import SimpleNamespace

import pytest
import torch
from helpers import GOLDEN, ROOT, generator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_grpo
import train_sft
from lora import add_lora, init_lora
from model import LLaDA, rope_tables
from parallel import processes
from tools import gpu_8b, plan

LLADA_8B = ["--model", ROOT / "tests" / "llada_8b"]
BASE = 8_015_581_184  # weights of LLaDA-8B
SFT = "--batch_size 2 --microbatch 1 --max_length 300"
GRPO = ("--gen_length 64 --diffusion_steps 2 --block_length 32 --rollout_batch 2 --prompts_per_step 2 --group_size 2 "
        "--num_iterations 2 --microbatch 1")


def make_plan(*words):
    return plan.main(list(map(str, words)))


def plan_8b(*words):
    """The plan of a script on Countdown for LLaDA-8B. words: the script, then options."""
    return make_plan(*words, "--task", "countdown", *LLADA_8B)


# ---------------------------------------------------------------- LLaDA-8B

@pytest.mark.parametrize("words, sft_peak, sft_seconds, grpo_peak, grpo_seconds", [
    ("--gpus 1", 36.2, 3.0, 19.9, 208),
    ("--gpus 8", 24.5, 0.4, 18.1, 26),
    ("--gpus 8 --lora_r 0", 41.8, 0.5, 30.7, 26),
    ("--gpus 64 --replicas 8 --lora_r 0", 41.8, 0.5, 30.7, 13)])
def test_the_published_table_of_8b(words, sft_peak, sft_seconds, grpo_peak, grpo_seconds, capsys):
    batch = {"train_sft": "--batch_size", "train_grpo": "--prompts_per_step"}
    for script, peak, seconds, digits in (("train_sft", sft_peak, sft_seconds, 1),
                                          ("train_grpo", grpo_peak, grpo_seconds, 0)):
        planned = plan_8b(script, *words.split(), *[batch[script], 64] * ("64" in words))
        assert round(planned.memory()["peak"] / plan.GIB, 1) == peak
        step = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{'step':>12}"))
        assert round(float(step.split()[3]), digits) == seconds


def test_the_plan_of_8b_by_hand(capsys):
    """8.0156e9 parameters, AdamW's 8 bytes for each that is trained, 4 of gradient, 2 of the frozen copy."""
    memory = plan_8b("train_grpo", "--gpus", 8, "--lora_r", 0).memory()
    shares = {name: memory[name] * 8 / BASE for name in ("parameters", "gradients", "optimizer", "reference")}
    assert shares == {"parameters": 4, "gradients": 4, "optimizer": 8, "reference": 2}
    held = memory["parameters"] + memory["optimizer"] + memory["reference"]
    assert 2 * BASE < memory["rollout"] - held  # all weights are gathered
    capsys.readouterr()

    one_gpu = plan_8b("train_grpo")
    adapters = 128 * 32 * (3 * 8192 + 16384)
    assert one_gpu.memory()["parameters"] == 2 * BASE + 4 * adapters and one_gpu.memory()["reference"] == 0
    # the rollout: 2 FLOPs for each weight in blocks and adapters, and 4 T d a layer in attention; the last
    # layer's keys and values for 456 tokens, all else in it for the 32 of the block
    block, kv = 4 * 4096 ** 2 + 3 * 4096 * 12288, 2 * 4096 ** 2
    layer = 2 * (block + adapters / 32) + 4 * 456 * 4096
    left_out = 2 * (block + adapters / 32) * (1 - kv / block) + 4 * 456 * 4096
    rollout = 128 * 96 * (456 * 32 * layer - (456 - 32) * left_out + 32 * 2 * 126464 * 4096)
    assert one_gpu.flops("rollout") == pytest.approx(rollout)
    text = capsys.readouterr().out
    assert f"8,015,581,184 parameters, trained: {adapters:,} of LoRA r 128; GiB on a GPU of 1:" in text
    assert "\nfits in 79 GiB" in text and "128 x 96 rows of 456 tokens, 8 at a time" in text
    hours = (625 * 208.4 + 14 * 1064.5) / 3600
    assert f"{hours:.1f} hours: 625 steps, 14 evaluations" in text


def test_replicas_are_copies_of_a_job():
    copies = plan_8b("train_grpo", "--gpus", 64, "--lora_r", 0, "--replicas", 8, "--prompts_per_step", 64)
    single = plan_8b("train_grpo", "--gpus", 8, "--lora_r", 0, "--prompts_per_step", 8)
    assert copies.memory() == single.memory()


@pytest.mark.parametrize("words, helps", [
    ("train_sft --lora_r 0", ["--checkpoint_activations", "--lora_r 128"]),
    ("train_grpo --rollout_batch 1024", ["--rollout_batch 1"]),
    ("train_grpo --lora_r 0", ["4 GPUs", "8 GPUs"])])
def test_the_plan_says_what_helps(words, helps, capsys):
    assert plan_8b(*words.split()).memory()["peak"] > 74 * plan.GIB
    text = capsys.readouterr().out
    assert "DOES NOT FIT in 79 GiB" in text
    for change in helps:
        line = next(line for line in text.splitlines() if line.startswith(f"  {change} "))
        options = ["--gpus", change.split()[0]] if change.endswith("GPUs") else change.split()
        peak = plan_8b(*words.split(), *options).memory()["peak"] / plan.GIB
        assert f"{peak:.2f}" in line and line.endswith("fits") == (peak < 74)


def test_the_head_is_scored_again_only_where_it_comes_in_chunks(monkeypatch):
    costs = []
    for chunk in (126464 * 256, 126464 * 255):
        monkeypatch.setattr(plan, "HEAD_CHUNK", chunk)
        costs.append(plan_8b("train_grpo").flops("update"))
    assert costs[1] - costs[0] == pytest.approx(2 * 4096 * 126464 * 256 * 16 * 8)


# ---------------------------------------------------------------- planned beside measured

@pytest.mark.slow
@pytest.mark.parametrize("script, words, dtype", [
    (train_sft, f"{SFT} --lora_r 0 --checkpoint_activations", "float32"),
    (train_sft, f"{SFT} --lora_r 8", "bfloat16"),
    (train_grpo, f"{GRPO} --lora_r 0", "float32")])
def test_planned_memory_and_flops_are_those_of_a_real_step(script, words, dtype):
    with processes(SimpleNamespace(device="cpu", dtype=dtype)) as procs:
        job = gpu_8b.Job(script, words.split(), procs)
        if script is train_sft:
            job.step(0)  # the optimizer has its state from here on
        measured, _ = gpu_8b.measure(job, lambda: job.step(1))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it knows no fused attention
            job.step(2)
    planned = sum(job.plan.flops(phase) for phase in job.plan.passes if phase != "evaluation")
    print(f"memory {job.plan.memory()['peak'] / measured:.3f}, FLOPs {planned / counter.get_total_flops():.3f}")
    # of SFT the plan is an upper bound: a row that is masked throughout
    assert job.plan.memory()["peak"] == pytest.approx(measured, rel=0.08)
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.07)


@pytest.mark.parametrize("name, lora_r, dtype", [("llada_mha", 0, "float32"), ("llada_gqa", 8, "bfloat16")])
def test_planned_activations_are_what_the_graph_keeps(name, lora_r, dtype):
    """Tensors that autograd saves in the blocks, each storage once, weights and rotary tables aside."""
    planned = make_plan("train_sft", "--task", "countdown", "--model", GOLDEN / name, "--dtype", dtype,
                        "--max_length", 128, "--batch_size", 2, "--microbatch", 2,
                        "--lora_r", lora_r, "--lora_targets", "q_proj k_proj v_proj up_proj")
    model = LLaDA.from_pretrained(GOLDEN / name, dtype=getattr(torch, dtype))
    if lora_r:
        init_lora(add_lora(model, lora_r, 8, planned.args.lora_targets.split()), generator())
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    smallest = 2 * 128 * min(planned.C, planned.KV) * model.blocks[0].q_proj.weight.itemsize
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage.nbytes() >= smallest:
            saved[storage.data_ptr()] = tensor  # held, so that no other tensor gets this address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        x = torch.randn(2, 128, planned.C, dtype=getattr(torch, dtype), requires_grad=True)
        tables = rope_tables(128, model.config.head_dim, model.config.rope_theta, "cpu")
        for block in model.blocks:
            x = block(x, *tables)
    kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    assert planned.memory()["activations"] == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("lora_r", [0, 8])
def test_a_checkpoint_is_as_large_as_planned(lora_r, tmp_path):
    words = ["--task", "countdown", "--count", 200, "--steps", 1, "--batch_size", 1, "--lora_r", lora_r]
    words = [*map(str, words), "--device", "cpu", "--out", str(tmp_path / "run")]
    train_sft.main(train_sft.parse_args(words))
    files = [path for path in (tmp_path / "run" / "step_000001").rglob("*.safetensors")]
    planned = make_plan("train_sft", *words)
    assert planned.checkpoint_bytes() == pytest.approx(sum(path.stat().st_size for path in files), rel=0.05)


# ---------------------------------------------------------------- the command line

def test_the_plan_needs_config_json_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text((ROOT / "data" / "tiny" / "config.json").read_text())
    monkeypatch.chdir(tmp_path)
    asked = []

    def download(*words):
        asked.append(words)
        return str(tmp_path / "config.json")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for script in plan.SCRIPTS:
        of_folder = make_plan(script, "--task", "countdown", "--model", tmp_path, "--preset", "8b", "--gpus", 2)
        of_hub = make_plan(script, "--task", "countdown", "--model", "some/model", "--gpus", 2)
        assert of_folder.memory() == of_hub.memory()
    assert asked == [("some/model", "config.json")] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("words, message", [
    ("--gpus 7", "--prompts_per_step 16 does not divide by 7"),
    ("--gpus 8 --replicas 3", "--replicas 3 does not divide --gpus 8"),
    ("--lora_targets o_proj", "--lora_targets "),
    ("--block_length 7", "--block_length 7"),
])
def test_a_plan_that_cannot_be_is_refused_in_one_line(words, message):
    with pytest.raises(SystemExit, match=rf"^error: {message}[^\n]*$"):
        plan_8b("train_grpo", *words.split())
