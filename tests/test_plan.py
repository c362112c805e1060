"""--plan against measurement: memory, FLOPs; and what a machine cannot do: no GPU, no bfloat16, out of memory."""
import pytest
import torch
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import gpu_8b
import train_grpo
import train_sft
from conftest import golden
from model import LORA_TARGETS, Config, LLaDA, add_lora, rope_tables
from parallel import Passes, fill_defaults, pick_dtype, planned_flops, planned_memory, planned_parameters, processes

LLADA_8B = str(gpu_8b.ROOT / "tests" / "llada_8b")
SFT = ["--batch_size", 4, "--microbatch", 2, "--max_length", 300]
GRPO = ["--gen_length", 64, "--diffusion_steps", 2, "--block_length", 32, "--rollout_batch", 2, "--prompts_per_step", 2,
        "--group_size", 2, "--num_iterations", 2, "--microbatch", 1]


# ---------------------------------------------------------------- what is planned is what is measured

@pytest.mark.parametrize("dtype, lora_r, checkpointed", [
    ("float32", 0, False), ("float32", 0, True), ("float32", 8, False), ("float32", 8, True),
    ("bfloat16", 0, False)])  # which is FSDP over one process
@pytest.mark.parametrize("script, words", [(train_sft, SFT), (train_grpo, GRPO)])
def test_planned_memory_and_flops(script, words, dtype, lora_r, checkpointed):
    """A whole step of the real script: its peak by the allocator, its FLOPs by torch's counter, within 10%."""
    _clear_sharding_prop_cache()  # DTensor remembers meshes of earlier process groups, which are gone
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


@pytest.mark.parametrize("lora_r", [0, 8])
@pytest.mark.parametrize("name", ["llada_mha", "llada_gqa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planned_activations_are_what_the_graph_keeps(name, dtype, lora_r):
    """Tensors that autograd saves in the blocks, each storage once, parameters and rotary tables aside."""
    net = LLaDA.from_pretrained(golden(name), dtype=dtype)
    if lora_r:
        add_lora(net, lora_r, 16, ["q_proj", "k_proj", "v_proj", "up_proj"], torch.Generator().manual_seed(0))
    saved, size = {}, 2 * 128 * min(net.config.d_model, net.config.n_kv_heads * net.config.head_dim) * dtype.itemsize
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights and tensor.untyped_storage().nbytes() >= size:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x = torch.randn(2, 128, net.config.d_model, dtype=dtype, requires_grad=True)
        tables = rope_tables(128, net.config.head_dim, net.config.rope_theta, "cpu")
        for block in net.blocks:
            x = block(x, *tables)
    args = train_sft.parse_args(["--lora_r", str(lora_r), "--dtype", str(dtype).removeprefix("torch.")])
    planned = planned_memory(net.config, args, 1, 1, {"update": Passes(2, 2, 128, 0, narrow=False)})
    assert planned["activations"] == pytest.approx(sum(t.untyped_storage().nbytes() for t in saved.values()), rel=0.01)


@pytest.mark.parametrize("folder", ["data/tiny", LLADA_8B, "tests/golden/llada_gqa"])
@pytest.mark.parametrize("targets", [["q_proj", "k_proj"], list(LORA_TARGETS)])
def test_planned_parameters_are_the_models(folder, targets):
    config = Config.from_folder(folder)
    net = LLaDA.empty(config, "meta", shape=lambda model: add_lora(model, 8, 16, targets))
    args = train_sft.parse_args(["--lora_r", "8", "--lora_targets", *targets])
    block, rest, adapters = planned_parameters(config, args)
    assert adapters == sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert config.n_layers * block + rest + adapters == sum(p.numel() for p in net.parameters())


def plan(capsys, script, *words):
    """(bytes by what holds them, the text) of --plan for LLaDA-8B."""
    task = ["--task", "countdown"] if "--model" in words else ["--task", "countdown", "--model", LLADA_8B]
    found = script.main(script.parse_args([*task, *map(str, words)]))
    return {name: size / gpu_8b.GIB for name, size in found.items()}, capsys.readouterr().out


def test_plan_of_8b(capsys):
    """What can be worked out by hand: 8.0156e9 parameters, AdamW's 8 bytes for each that is trained, 4 of gradient."""
    billion = 8.015581184e9 / 2 ** 30
    found, text = plan(capsys, train_grpo, "--plan", 8, "--lora_r", 0)
    assert [found[name] for name in ("parameters", "gradients", "optimizer", "reference")] == pytest.approx(
        [billion * size / 8 for size in (4, 4, 8, 2)])
    assert "8,015,581,184 parameters, trained: all; GiB on a GPU of 8:" in text and "\nfits in" in text
    assert 2 * billion < found["rollout"] - sum(found[n] for n in ("parameters", "optimizer", "reference"))  # gathered
    found, text = plan(capsys, train_grpo, "--plan", 1)
    adapters = 128 * 32 * (3 * 8192 + 16384)
    assert found["parameters"] * 2 ** 30 == 2 * 8_015_581_184 + 4 * adapters and found["reference"] == 0
    assert f"trained: {adapters:,} of LoRA r 128" in text and "128 passes over 96 rows of 456 tokens" in text
    # the rollout by hand: 2 FLOPs for each weight, 6.98e9 in blocks and adapters, and 4 T d a layer in attention
    # layer; the last layer's keys and values for 456 tokens, all else in it for the 32 of the block
    block, kv = 4 * 4096 ** 2 + 3 * 4096 * 12288, 2 * 4096 ** 2
    layer = 2 * (block + adapters / 32) + 4 * 456 * 4096
    spared = 2 * (block + adapters / 32) * (1 - kv / block) + 4 * 456 * 4096
    rollout = 128 * 96 * (456 * 32 * layer - (456 - 32) * spared + 32 * 2 * 126464 * 4096)
    assert f"rollout {rollout / 1e15:9.2f} PFLOP {rollout / 4e14:7.1f} s" in text
    copies, _ = plan(capsys, train_grpo, "--plan", 64, "--lora_r", 0, "--replicas", 8, "--prompts_per_step", 64)
    one, _ = plan(capsys, train_grpo, "--plan", 8, "--lora_r", 0, "--prompts_per_step", 8)
    assert copies == one  # eight copies of a job on eight GPUs


@pytest.mark.parametrize("script, words, helps", [
    (train_sft, ["--lora_r", 0], ["--checkpoint_activations", "--lora_r 128"]),
    (train_sft, ["--microbatch", 4, "--batch_size", 8], ["--microbatch 1", "--checkpoint_activations"]),
    (train_grpo, ["--lora_r", 0], ["4 GPUs", "8 GPUs"]),
    (train_grpo, ["--rollout_batch", 1024], ["--rollout_batch 1"])])
def test_plan_says_what_helps(capsys, script, words, helps):
    found, text = plan(capsys, script, "--plan", 1, *words)
    assert "DOES NOT FIT in 79 GiB" in text and found["peak"] > 74
    for option in helps:
        line = next(line for line in text.splitlines() if line.startswith(f"  {option} "))
        count = ["--plan", option.split()[0]] if option.endswith("GPUs") else ["--plan", 1, *option.split()]
        other, _ = plan(capsys, script, *words, *count)
        assert f"{other['peak']:.2f}" in line and line.endswith("fits") == (other["peak"] < 74)


def test_plan_counts_what_is_computed_once():
    """The trajectory estimator has no draw: old and reference log-probs serve all updates. One chunk is scored once."""
    args = train_grpo.parse_args(["--task", "countdown", "--model", LLADA_8B, "--estimator", "trajectory"])
    fill_defaults(args, train_grpo.default_options("countdown"), Config.from_folder(LLADA_8B))
    passes = train_grpo.passes_of(None, args, 1)
    assert (passes["logps"].times, passes["update"].times) == (2, 8)
    one, two = (planned_flops(Config.from_folder(LLADA_8B), args, 126464 * positions, Passes(1, 1, 456, 256), True)
                for positions in (256, 255))  # in a chunk
    assert two - one == 2 * 4096 * 126464 * 256


def test_plan_reads_only_config_json(capsys, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text((gpu_8b.ROOT / "data/tiny/config.json").read_text())
    monkeypatch.chdir(tmp_path)
    for script in (train_sft, train_grpo):
        assert plan(capsys, script, "--model", tmp_path, "--plan", 2)[0]["peak"] < 1
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("words, message", [
    (["--plan", 7], "--prompts_per_step 16 does not divide by 7 processes: use 14 or 21"),
    (["--plan", 8, "--lora_targets", "o_proj"], "--lora_targets o_proj: choose from q_proj k_proj"),
    (["--plan", -1], "--plan -1: name a number of GPUs"),
    (["--plan", 8, "--replicas", 3], "--replicas 3 does not divide 8 processes"),
    (["--plan", 8, "--block_length", 7], "--block_length 7 does not divide"),
    (["--plan", 8, "--model", "nowhere"], "--model nowhere: no such folder")])
def test_plan_refuses_in_one_line(capsys, words, message):
    with pytest.raises(SystemExit, match=rf"^error: {message}[^\n]*$"):
        plan(capsys, train_grpo, *words)


def test_the_8b_script_runs_at_small_size():
    found = gpu_8b.main(["--tiny", "--device", "cpu"])
    assert len(found) == 3 and all(planned == pytest.approx(peak, rel=0.15) for peak, planned in found.values())


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
