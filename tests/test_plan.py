"""--plan against measurement: memory, FLOPs; and what a machine cannot do: no GPU, no bfloat16, out of memory."""
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import gpu_8b
import train_grpo
import train_sft
from model import HEAD_CHUNK, Config, LLaDA, add_lora
from parallel import Processes, pick_dtype, planned_memory, planned_parameters, processes

LLADA_8B = str(gpu_8b.ROOT / "tests" / "llada_8b")
SFT = ["--batch_size", 4, "--microbatch", 2, "--max_length", 300]
GRPO = ["--gen_length", 64, "--diffusion_steps", 2, "--block_length", 32, "--rollout_batch", 2, "--prompts_per_step", 2,
        "--group_size", 2, "--num_iterations", 2, "--microbatch", 1]


# ---------------------------------------------------------------- what is planned is what is measured

@pytest.mark.parametrize("dtype, lora_r, checkpointed", [
    ("float32", 0, False), ("float32", 0, True), ("float32", 8, False), ("float32", 8, True),
    ("bfloat16", 0, False), ("bfloat16", 8, False)])  # bfloat16 and all trained: FSDP over one process
@pytest.mark.parametrize("script, words", [(train_sft, SFT), (train_grpo, GRPO)])
def test_planned_memory_and_flops(script, words, dtype, lora_r, checkpointed):
    """A whole step of the real script: its peak by the allocator, its FLOPs by torch's counter, within 10%."""
    words = [*words, "--model", "data/tiny", "--dtype", dtype, "--lora_r", lora_r, "--device", "cpu"]
    with processes("cpu") as procs:
        job = gpu_8b.Job(script, procs, *words, *["--checkpoint_activations"] * checkpointed)
        if script is train_sft:
            job.run(0)  # the optimizer has its state from here on
        measured, _ = job.peak(lambda: job.run(1))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it knows no fused attention
            job.run(2)
    planned = job.planned()
    print(f"memory {planned['peak'] / measured:.3f}, FLOPs {job.flops(*job.passes) / counter.get_total_flops():.3f}")
    assert planned["peak"] == pytest.approx(measured, rel=0.10)
    assert job.flops(*job.passes) == pytest.approx(counter.get_total_flops(), rel=0.10)


# ---------------------------------------------------------------- the machine

@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is here")
@pytest.mark.parametrize("script, task", [(train_grpo, "countdown"), (train_sft, "countdown")])
def test_fault_82_without_a_gpu(script, task, tmp_path):
    with pytest.raises(SystemExit, match=r"^error: --device cuda: no CUDA GPU here, use --device cpu$"):
        script.main(script.parse_args(["--task", task, "--device", "cuda", "--out", str(tmp_path / "run")]))
    assert not (tmp_path / "run").exists()
    with processes() as procs:
        assert procs.device.type == "cpu"  # what runs without --device


def test_fault_83_a_gpu_without_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    for able in (False, True):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
        assert pick_dtype(None, "cuda:0") == (torch.bfloat16 if able else torch.float32)
        assert pick_dtype("float32", "cuda:0") == pick_dtype(None, "cpu") == torch.float32
        assert pick_dtype("bfloat16", "cpu") == torch.bfloat16
    assert pick_dtype("bfloat16", "cuda:0") == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(ValueError, match="^--dtype bfloat16: Tesla V100 does not have it: use float32$"):
        pick_dtype("bfloat16", "cuda:0")


KNOBS = r"what helps: a smaller --rollout_batch; [^\n]*--microbatch 1, --checkpoint_activations, [^\n]*--lora_r, more"


@pytest.mark.parametrize("script", [train_grpo, train_sft])
def test_fault_84_out_of_gpu_memory_names_the_knobs(script, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
    monkeypatch.setattr(script, "train_step", full)
    words = ["--task", "countdown", "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    words += ["--eval_count", "0"] if script is train_grpo else ["--count", "100"]
    with pytest.raises(SystemExit, match=rf"^error: rank 0: out of memory on cpu; {KNOBS}[^\n]*2.00 GiB[^\n]*$"):
        script.main(script.parse_args(words))


def test_fault_84_out_of_cpu_memory_names_the_knobs():
    with pytest.raises(SystemExit, match=rf"^error: rank 0: out of memory on cpu; {KNOBS}[^\n]*$"), processes("cpu"):
        torch.empty(2 ** 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="size"), processes("cpu"):  # every other error stays what it is
        torch.ones(2) + torch.ones(3)
