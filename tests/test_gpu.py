"""The scripts on a pretend GPU (pretend_cuda.py): no CPU tensor where the GPU's belongs, few waits, few kernels."""
import copy
import inspect
import sys
import textwrap

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import PROBLEMS, ROOT, assert_same_log, generator, run_script, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import d1
import lora
import model as model_module
import parallel
import pretend_cuda
import sample
import train_grpo
import train_sft
from model import Config, LLaDA
from variants import estimators, evaluate, fast_dllm, grpo

pytestmark = pytest.mark.skipif(not pretend_cuda.IS_POSSIBLE, reason="this torch has other private names")
MESSAGE = ("on the same device|device type for generator but found|can't convert cuda:0|indices should be|"
           "different device")


@pytest.fixture
def gpu():
    with pretend_cuda.gpu() as waits:
        yield waits
        if dist.is_initialized():  # a run that failed leaves it
            dist.destroy_process_group()


# ---------------------------------------------------------------- what CUDA refuses and allows

def cuda(*shape):
    return torch.zeros(shape, device="cuda")


def fused_step_of_the_cpu():
    weight = nn.Parameter(cuda(3))
    weight.grad = cuda(3)
    optimizer = torch.optim.AdamW([weight], fused=True)
    optimizer.step()
    optimizer.state[weight]["step"] = torch.tensor(1.0)
    optimizer.step()


def gradient():
    weight = nn.Parameter(cuda(3))
    (weight * 2).sum().backward()
    return weight.grad


def change_in_recomputation():
    calls = []

    def work(x):
        calls.append(x)
        return (x * (2 if len(calls) == 1 else torch.ones(3))).exp()
    checkpoint(work, nn.Parameter(cuda(3)), use_reentrant=False).sum().backward()


REFUSED = {
    "a sum": lambda: cuda(3) + torch.zeros(3),
    "a sum, the other way": lambda: torch.zeros(3) + cuda(3),
    "in place, into the CPU's": lambda: torch.zeros(3).add_(cuda(3)),
    "a number, in place": lambda: torch.zeros(()).add_(cuda()),
    "out": lambda: torch.add(cuda(3), cuda(3), out=torch.zeros(3)),
    "a vector and the device's number": lambda: torch.zeros(3) * cuda(),
    "a matrix": lambda: F.linear(cuda(2, 3), torch.zeros(4, 3)),
    "a module": lambda: nn.Linear(3, 4)(cuda(2, 3)),
    "a copied module": lambda: copy.deepcopy(nn.Linear(3, 4).to("cuda"))(torch.zeros(2, 3)),
    "a module from meta": lambda: nn.Linear(3, 4, device="meta").to_empty(device="cuda")(torch.zeros(2, 3)),
    "an embedding": lambda: F.embedding(torch.zeros(3, dtype=torch.long), cuda(4, 3)),
    "cat": lambda: torch.cat([cuda(3), torch.zeros(3)]),
    "stacked numbers": lambda: torch.stack([cuda(), torch.zeros(())]),
    "gather": lambda: cuda(3).gather(0, torch.zeros(1, dtype=torch.long)),
    "masked_fill": lambda: cuda(3).masked_fill(torch.ones(3, dtype=torch.bool), 0),
    "where": lambda: torch.where(cuda(3) > 0, torch.zeros(3), 0.0),
    "arange without a device": lambda: torch.arange(3) < cuda(3),
    "searchsorted": lambda: torch.searchsorted(cuda(3), torch.zeros(2)),
    "the CPU's generator": lambda: torch.rand(3, generator=torch.Generator(), device="cuda"),
    "the GPU's generator": lambda: torch.rand(3, generator=torch.Generator("cuda")),
    "an index of the GPU": lambda: torch.zeros(3)[cuda(1).long()],
    "values at an index": lambda: cuda(3).__setitem__(cuda(2).long(), torch.zeros(2)),
    "numpy": lambda: cuda(3).numpy(),
    "a mask of attention": lambda: F.scaled_dot_product_attention(*[cuda(1, 1, 2, 4)] * 3, torch.ones(2, 2) > 0),
    "cross entropy": lambda: F.cross_entropy(cuda(2, 3), torch.zeros(2, dtype=torch.long)),
    "a gradient from elsewhere": lambda: setattr(nn.Parameter(cuda(3)), "grad", torch.zeros(3)),
    "a gradient": lambda: gradient() + torch.zeros(3),
    "a view": lambda: cuda(4, 3).view(3, 4)[1:] + torch.zeros(2, 4),
    "padding": lambda: F.pad(cuda(3), (0, 1)) + torch.zeros(4),
    "the optimizer's step": fused_step_of_the_cpu,
    "recomputation": change_in_recomputation,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cuda_refuses_is_refused(name, gpu):
    with pytest.raises((RuntimeError, TypeError), match=MESSAGE):
        REFUSED[name]()


def test_what_cuda_allows_is_allowed(gpu):
    x = cuda(4, 3)
    assert x.is_cuda and x.device == torch.device("cuda:0") and torch.cuda.get_device_name() == pretend_cuda.NAME
    for y in (x + 1, x * torch.tensor(2.0), x[torch.tensor([0, 1])], x[[0, 1]], x[:, None], x.bfloat16(), x.T, x.data,
              torch.where(x > 0, torch.tensor(1.0), x), x.new_zeros(2), torch.zeros_like(x), x.unbind(0)[0],
              torch.rand(3, generator=torch.Generator("cuda"), device="cuda"), torch.zeros(3).to(x), gradient(),
              x.cpu().to("cuda"), torch.arange(3, device=x.device), nn.Linear(3, 2).cuda()(x),
              x.masked_fill(x > 1, torch.tensor(0.0))):
        assert y.device.type == "cuda"
    for y in (x.cpu(), x.to("cpu"), torch.tensor(x.tolist()), torch.zeros_like(x, device="cpu")):
        assert y.device.type == "cpu"
    x[0] = torch.ones(3)  # a slice is copied
    x[torch.tensor([1])] = 1.0
    x.cpu().zero_()  # another memory
    assert x.sum().item() == 6 and torch.zeros(4, 3).copy_(x).sum() == 6


def test_waits_are_counted_where_they_are(gpu):
    x = cuda(3)
    gpu.clear()
    x.sum().item(), bool(x.any()), x.nonzero(), x[x > 0], x.tolist(), x.cpu(), torch.zeros(3).to("cuda"), int(x[0])
    torch.tensor([1], device="cuda"), x[[0]], x + 1, x.argsort(), x[:2], x[x.long()], torch.zeros(3).tolist()
    assert sum(gpu.values()) == 10 and all(place.startswith("test_gpu.py:") for place in gpu)


# ---------------------------------------------------------------- the scripts

EVALUATION = "--task countdown --count 3 --gen_length 16 --diffusion_steps 4 --out {out}"
SMALL = f"--data {PROBLEMS} --steps 1 --prompts_per_step 2 --gen_length 16 --diffusion_steps 4"
FAST = SMALL.replace("--diffusion_steps 4", "--threshold 0.9 --cache dual")
SFT = "--task countdown --batch_size 4 --microbatch 2 --gen_length 0"


def learn(script, options):
    return lambda out, device, **methods: train(script, out, f"{options} --device {device}", **methods)


def answer(script, options):
    def work(out, device, **methods):
        words = f"{EVALUATION.format(out=out)} --device {device} {options}"
        return script.main(script.parse_args(words.split()), **methods)
    return work


def stop_and_resume(out, device):
    """Two steps of SFT, the second after a crash in the first life."""
    def weigh(*args):
        weighed.append(args)
        assert len(weighed) != 3  # of the held-out rows, of step 1, of step 2
        return d1.sft_weights(*args)
    weighed, options = [], f"{SFT} --save_every 1 --lora_r 2"
    with pytest.raises(AssertionError):
        learn(train_sft, options)(out, device, weigh=weigh)
    learn(train_sft, f"{options} --resume")(out, device)


RUNS = {
    "grpo": learn(train_grpo, SMALL),
    "grpo with LoRA": learn(train_grpo, f"{SMALL} --lora_r 2 --checkpoint_activations --eval_count 2"),
    "trajectory": learn(grpo, f"{FAST.replace('dual', 'prefix')} --estimator trajectory --lora_r 2"),
    "coupled": learn(grpo, f"{FAST} --estimator coupled --objective wd1 --lora_r 2"),
    "sft": learn(train_sft, f"{SFT} --steps 1"),
    "sft, resumed": stop_and_resume,
    "sample": answer(sample, "--temperature 0.9"),
    "sample fast": answer(evaluate, "--cfg_scale 0.5"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_the_gpu_mixes_no_devices(name, gpu, tmp_path, capsys):
    RUNS[name](tmp_path / "gpu", "cuda")
    assert sum(gpu.values()) > 0
    if name == "grpo with LoRA":  # the harness changes no number
        RUNS[name](tmp_path / "cpu", "cpu --dtype bfloat16")
        assert_same_log(tmp_path / "gpu", tmp_path / "cpu")


@pytest.mark.slow
def test_two_processes_mix_no_devices(tmp_path):
    done = run_script("tests/pretend_cuda.py", "train_grpo.py", "--task", "countdown", *SMALL.split(), "--lora_r", 2,
                      "--eval_count", 0, "--out", tmp_path / "run", processes=2, PYTHONPATH=str(ROOT / "tests"))
    assert done.returncode == 0 and "2 x cuda, torch.bfloat16" in done.stdout, done.stderr[-3000:]


# ---------------------------------------------------------------- the harness against mutants of the project

def mutate(function, old, new, monkeypatch):
    """Give a function of the project another text, wherever it was imported. Returns what it is then."""
    inner, source = inspect.unwrap(function), textwrap.dedent(inspect.getsource(function))
    assert old in source, old
    code, names = compile(source.replace(old, new), inspect.getsourcefile(inner), "exec"), {}
    exec(code, vars(sys.modules[inner.__module__]), names)
    mutant = names[inner.__name__]
    for module in list(sys.modules.values()):
        if vars(module).get(inner.__name__) is function:
            monkeypatch.setattr(module, inner.__name__, mutant)
    for name, estimator in estimators.ESTIMATORS.items():
        if estimator.log_probs is function:
            monkeypatch.setitem(estimators.ESTIMATORS, name, estimator._replace(log_probs=mutant))
    return mutant


MUTANTS = [  # (function, text, what takes its place, the run that sees it)
    (sample.pad_left, "for row in rows], device=device", "for row in rows]", "sample"),
    (sample.pad_left, "torch.arange(width, device=device)", "torch.arange(width)", "sample"),
    (sample.complete, "noise.to(device)", "noise", "sample"),
    (sample.generate, "torch.arange(B, device=x.device)", "torch.arange(B)", "sample"),
    (sample.generate, "end, device=x.device", "end", "sample"),
    (fast_dllm.generate, "torch.arange(B, device=x.device)", "torch.arange(B)", "coupled"),
    (model_module.rope_tables, "length, device=device", "length", "sample"),
    (model_module.rope_tables, "2, device=device", "2", "sample"),
    (d1.one_step_logps, ", device=rows.device", "", "grpo with LoRA"),
    (train_grpo.roll_out, ", device=procs.device", "", "grpo with LoRA"),
    (train_grpo.draw_prompt_masks, ".to(procs.device)", ".cpu()", "grpo with LoRA"),
    (train_sft.rows_loss, ".to(device)", "", "sft, resumed"),
    (estimators.trajectory, ", device=snapshot.device", "", "trajectory"),
]


@pytest.mark.slow
@pytest.mark.parametrize("function, old, new, name", MUTANTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_slip_in_the_project_is_found(function, old, new, name, gpu, tmp_path, monkeypatch):
    argument = {sample.generate: "generate", train_grpo.draw_prompt_masks: "draw"}.get(function)  # of main
    mutant = mutate(function, old, new, monkeypatch)
    methods = {argument: mutant} if argument else {}
    with pytest.raises(RuntimeError, match=MESSAGE):
        RUNS[name](tmp_path / "run", "cuda", **methods)


# ---------------------------------------------------------------- speed: waits and kernels

@pytest.mark.parametrize("options, most", [
    ({}, 1), ({"threshold": 0.9}, 3), ({"cache": "dual"}, 3), ({"cache": "dual", "threshold": 0.9}, 3)], ids=str)
def test_the_host_seldom_waits_in_a_round(options, most, gpu):
    """Rows of unequal prompts that leave one by one, so that caches are copied; 5 layers, which must not matter."""
    model = LLaDA.from_pretrained("data/tiny", "cuda", torch.bfloat16).eval()
    prompt = torch.randint(10, 600, (4, 20), generator=generator()).to("cuda")
    attn_mask = torch.arange(20, device="cuda") >= torch.tensor([[0], [3], [5], [9]], device="cuda")
    steps, rounds = 32 if "threshold" in options else 16, []
    noise = sample.draw_noise([("noise", i) for i in range(4)], steps, 8).to("cuda")
    generate = fast_dllm.generate if options else sample.generate
    gpu.clear()
    generate(model, prompt, attn_mask, noise, mask_id=727, eos_id=726, gen_length=32, diffusion_steps=steps,
             block_length=8, temperature=0.9, on_step=lambda *_: rounds.append(1), **options)
    print(f"{options}: {sum(gpu.values())} waits in {len(rounds)} rounds", dict(gpu))
    assert 0 < sum(gpu.values()) < most * len(rounds)


class Kernels(TorchDispatchMode):
    """Counts calls that compute, and the bytes they read and write; views are free."""
    launches = moved = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given, made = (([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)]) for x in ((args, kwargs), out))
        known = {t.untyped_storage()._cdata for t in given}
        is_view = not function._schema.is_mutable and all(t.untyped_storage()._cdata in known for t in made)
        if made and not is_view and function is not torch.ops.aten._unsafe_view.default:
            self.launches += 1
            self.moved += sum(min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in (*given, *made))
        return out


def test_a_block_takes_few_kernels_and_moves_few_bytes(monkeypatch):
    """LLaDA-8B's block with adapters as in a rollout; torch's own fused norm is counted in its parts here."""
    def attention(q, k, v, *_, **__):  # one kernel
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    config = Config.from_folder(ROOT / "tests" / "llada_8b")
    config.n_layers = 1
    with torch.device("meta"), torch.no_grad():
        model = LLaDA(config).bfloat16()
        lora.add_lora(model, 128, 64, ["q_proj", "k_proj", "v_proj", "up_proj"])
        x, tables = torch.empty(8, 456, 4096, dtype=torch.bfloat16), model_module.rope_tables(456, 128, 5e5, "meta")
        with Kernels() as kernels:
            model.blocks[0](x, *tables)
    print(f"{kernels.launches} launches, {kernels.moved / 1e9:.2f} GB")
    assert kernels.launches <= 60 and kernels.moved < 4.5e9


# ---------------------------------------------------------------- the choice of a device

@pytest.mark.parametrize("device, local_rank, gpus, message", [
    ("cuda:1", 1, 8, "cuda:1: torch sees 8 GPUs, a process needs its own"),  # all would share it
    ("", 8, 8, "cuda: torch sees 8 GPUs"), ("cuda:2", 0, 2, "cuda:2: torch sees 2 GPUs"), ("cuda", 0, 0, "cuda: ")])
def test_a_gpu_that_is_not_there_or_shared_is_refused(device, local_rank, gpus, message, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    with pretend_cuda.gpu(gpus), pytest.raises(SystemExit, match=f"^error: --device {message}[^\n]*$"):
        parallel.pick_device(device)


def test_a_process_takes_its_gpu_and_leaves_cudnns_plans_alone(monkeypatch):
    taken, allowed = [], []
    with pretend_cuda.gpu(8):
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", allowed.append)
        assert parallel.pick_device("cuda:3").type == "cuda"
        monkeypatch.setenv("LOCAL_RANK", "5")
        assert parallel.pick_device("").type == "cuda"
    assert taken == [3, 5] and allowed == [False, False] and parallel.pick_device("cpu").type == "cpu"
