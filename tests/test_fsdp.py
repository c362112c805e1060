"""FSDP2 with gloo on CPU processes: every number as on one process.

Under torchrun this file is a script that runs PARITY and RUNS on all processes and writes what came out of them; the
tests do the same on one process and compare.
"""
import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, golden, worst
from safetensors.torch import load_file, save_file

import model as model_file
import parallel
import train_grpo
import train_sft
from d1 import completion_mask, generator, group_advantages
from data import countdown
from parallel import Processes, Signals, Stopped, fill, gathered, processes
from sample import evaluate

MODEL = golden("llada_gqa/config.json").parent
TOKENIZER = SimpleNamespace(mask_id=500, eos_id=481)
LORA = ["--lora_r", 4, "--lora_targets", "q_proj", "up_proj", "ff_out"]  # rank 4 on 3 processes: one has 0 rows of A
SFT = ["--model", MODEL, "--batch_size", 12, "--microbatch", 2, "--steps", 4, "--lr", 1e-3, "--warmup", 0,
       "--grad_clip", 1e9, "--lora_r", 0]
GRPO = ["--task", "countdown", "--model", MODEL, "--prompts_per_step", 12, "--microbatch", 2, "--grad_clip", 1e9,
        "--num_iterations", 1, "--masks_per_prompt", 2, "--lora_r", 0]


def parse(module, *words):
    return module.parse_args(list(map(str, words)))


class Catch:
    """An optimizer that keeps the gradients and changes nothing."""

    def __init__(self, model, procs):
        self.model, self.procs, self.tensors = model, procs, {}
        self.param_groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]

    def step(self):
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                self.tensors[name] = self.procs.whole(p.grad)

    def zero_grad(self, set_to_none):
        pass


def build(module, args, procs, dtype=torch.float32):
    """A model as the script builds it, its adapters away from zero."""
    model = (train_sft.build_model if module is train_sft else train_grpo.build_policy)(args, MODEL, procs, dtype)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            fill(p, torch.empty(p.shape).normal_(0, 0.1, generator=generator(name)).__getitem__)
    return model


def sft_gradients(procs, *more):
    """One train_step on 12 rows: its loss and every gradient, whole."""
    args = parse(train_sft, *SFT, *more)
    model = build(train_sft, args, procs)
    rows = [(torch.randint(480, (12 + i % 7,), generator=generator("row", i)).tolist(), 3 + i % 5) for i in range(12)]
    caught = Catch(model, procs)
    row = train_sft.train_step(0, model, caught, rows, TOKENIZER, args, procs)
    return caught.tensors | {"loss": torch.tensor(row["loss"]), "grad_norm": torch.tensor(row["grad_norm"])}


def a_rollout(model, procs, args, G=3, P=7, L=9):
    """A made-up rollout of 12 prompts, of which this process has its share; old and reference policy a little off."""
    N, draw = args.prompts_per_step, functools.partial(torch.randint, generator=generator("rollout"))
    prompt, completions = draw(480, (N, P)), draw(478, 486, (N, G, L))  # some EOS
    masked = draw(4, (N, 1, args.masks_per_prompt, P)) == 0
    attn_mask = torch.arange(P) >= draw(4, (N, 1))
    mask, advantages = completion_mask(completions, TOKENIZER.eos_id), group_advantages(draw(5, (N, G)).float())
    mine = list(procs.share(N, ""))
    rollout = train_grpo.Rollout(prompt[mine], attn_mask[mine], masked[mine], completions[mine],
                                 mask[mine][:, None, None], advantages[mine], [int(mask.sum())])
    every = slice(0, len(mine))
    with torch.no_grad(), gathered(model):
        now = train_grpo.log_probs(model, rollout, every, slice(None), args, TOKENIZER.mask_id)  # (N, 1, K, G, L)
    noise = torch.randn(2, N, *now.shape[1:], generator=generator("drift"))[:, mine]
    rollout.old, rollout.ref = now + 0.4 * noise
    return rollout


def grpo_gradients(procs, *more):
    """One update_policy on 12 prompts: what it logs and every gradient, whole."""
    args = parse(train_grpo, *GRPO, *more)
    model = build(train_grpo, args, procs)
    rollout, caught = a_rollout(model, procs, args), Catch(model, procs)
    slices = [slice(i, i + args.microbatch) for i in range(0, len(rollout.prompt), args.microbatch)]
    row = train_grpo.update_policy(0, 0, model, caught, rollout, slices, args, procs, TOKENIZER.mask_id)
    return caught.tensors | {name: torch.tensor(value) for name, value in row.items()}


def no_masks_in_the_second_half(procs):
    """The rows of the last process, or half of them, have no masked token."""
    noise = train_sft.noise

    def patched(ids, answer, keys, mask_id, u=None):
        return noise(ids, answer & (torch.tensor([i for *_, i in keys]) < 6)[:, None], keys, mask_id, u)
    train_sft.noise = patched
    try:
        return sft_gradients(procs)
    finally:
        train_sft.noise = noise


CASES = {
    "sft, all weights": sft_gradients,
    "sft, LoRA": lambda procs, *more: sft_gradients(procs, *LORA, *more),
    "sft, per row": lambda procs, *more: sft_gradients(procs, "--loss", "llada", *more),
    "grpo, all weights": grpo_gradients,
    "grpo, LoRA": lambda procs, *more: grpo_gradients(procs, *LORA, *more),
}


# ---------------------------------------------------------------- what is run on several processes

def stopped_together(procs):
    """A signal to one process where forward passes wait for each other: all stop at the same check."""
    model, ids = build(train_sft, parse(train_sft, *SFT), procs), torch.arange(40).view(2, 20)
    signals, passes = Signals(procs, together=True), []
    with contextlib.suppress(Stopped), gathered(model, keep_sharded=True), signals.droppable() as check:
        for i in range(4):
            passes.append(model(ids, targets=ids).detach())
            signals.wanted = i == 1 and procs.rank == procs.world - 1
            check()
    assert len(passes) == 2
    return {"passes": passes[1]}


def not_finite_on_one_process(procs):
    """All processes stop before the update and name the one it came from."""
    loss, last = train_sft.batch_loss, procs.rank == procs.world - 1
    train_sft.batch_loss = lambda *args: loss(*args) * (float("nan") if last else 1)
    try:
        sft_gradients(procs)
    except SystemExit as stopped:
        assert f"step 1: gradient norm nan, loss not finite on ranks [{procs.world - 1}]" in str(stopped)
    else:
        raise AssertionError("the update happened")
    finally:
        train_sft.batch_loss = loss


def in_bfloat16(procs):
    """Computed in bfloat16, kept in float32 what is trained: the same numbers however it is spread."""
    found, ids = {}, torch.arange(40).view(2, 20)
    for name, more in (("lora", LORA), ("all", [])):
        model = build(train_sft, parse(train_sft, *SFT, *more), procs, torch.bfloat16)
        for p in model.parameters():
            assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
        with torch.no_grad(), gathered(model):
            found[name] = model(ids, targets=ids)
        assert model(ids[:, :3]).dtype == torch.bfloat16 and found[name].dtype == torch.float32
    return found


def each_reads_its_part(procs, replicas):
    """Loading reads, and the process then holds, no more than its rows."""
    read, original = [], model_file.read_tensor

    def counted(*args):
        read.append(original(*args))
        return read[-1]
    model_file.read_tensor = counted
    model = build(train_sft, parse(train_sft, *SFT, "--replicas", replicas), procs)
    model_file.read_tensor = original
    held = sum(p.to_local().numel() for p in model.parameters())
    most = sum(-(-len(p) * replicas // procs.world) * p[0].numel() for p in model.parameters())
    assert sum(t.numel() for t in read) == held <= most
    total = procs.sum({"read": held})["read"]
    assert total == sum(p.numel() for p in model.parameters()) * replicas


def saved_shard_by_shard(procs, folder):
    """The main process never holds more than a file of the full weights, the others none of them."""
    model, held = build(train_sft, parse(train_sft, *SFT), procs), [0]

    def whole(p):
        full = procs.whole(p)
        held.append(held[-1] + full.nbytes)
        weakref.finalize(full, lambda size: held.append(held[-1] - size), full.nbytes)
        return full
    with tempfile.TemporaryDirectory() as nowhere:
        model.save_pretrained(folder if procs.is_main else nowhere, max_shard_bytes=150_000, whole=whole)
    total = sum(4 * p.numel() for p in model.parameters())
    assert 100_000 < max(held) <= 150_000 < total / 3 if procs.is_main else max(held) == 0


def unequal_work(procs):
    """Inside gathered(), a process may run as many forward passes as it likes; afterwards training goes on."""
    model, ids = build(train_sft, parse(train_sft, *SFT), procs), torch.arange(40).view(2, 20)
    with torch.no_grad(), gathered(model):
        logps = [model(ids[:, :20 - i], targets=ids[:, :20 - i]) for i in range(1 + 2 * procs.rank)][0]
    model(ids, targets=ids).mean().backward()
    return {"inside": logps} | {name: procs.whole(p.grad) for name, p in model.named_parameters()}


def equal_work_where_weights_stay_sharded(procs):
    """5 problems: the last process has fewer, but runs as many passes."""
    task = SimpleNamespace(score=lambda text, example: {"accuracy": float(len(text) + example["number"])})
    tokenizer = SimpleNamespace(**vars(TOKENIZER), encode_prompt=lambda p: [ord(c) for c in p],
                                decode=lambda ids: " ".join(map(str, ids)))
    examples = [{"prompt": "x" * (3 + i), "number": i} for i in range(5)]
    model = build(train_sft, parse(train_sft, *SFT), procs)
    with gathered(model, keep_sharded=True):
        found, rows = evaluate(model, tokenizer, task, examples, procs, 0, rollout_batch=1, gen_length=8,
                               diffusion_steps=4, block_length=4, temperature=0.7, fill_canvas=True)
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(procs.world == 1 or hasattr(p, "full_tensor") for p in model.parameters())  # sharded again
    return {name: torch.tensor(value) for name, value in found.items()}


PARITY = {
    **CASES,
    "sft where a process has no masked token": no_masks_in_the_second_half,
    "unequal work": unequal_work,
    "equal work": equal_work_where_weights_stay_sharded,
    "stopped together": stopped_together,
    "bfloat16": in_bfloat16,
}
RUNS = {
    "sft": (train_sft, ["--batch_size", 12, "--microbatch", 2, "--steps", 3]),
    "grpo": (train_grpo, ["--task", "countdown", "--prompts_per_step", 12, "--group_size", 3, "--steps", 3,
                          "--num_iterations", 2, "--eval_count", 5, "--eval_every", 1, "--gen_length", 16,
                          "--diffusion_steps", 4]),
}
RUNS["grpo, LoRA"] = (train_grpo, [*RUNS["grpo"][1], "--lora_r", 2, "--lr", 1e-3])
RUNS["grpo, kept sharded"] = (train_grpo, [*RUNS["grpo"][1], "--keep_sharded", "--checkpoint_activations",
                                           "--cache", "dual"])
RUNS["grpo"][1].extend(["--cache", "prefix", "--threshold", 0.1])  # processes make unequally many forward passes


def run(name, small, out, *more):
    """A script on the files of `small`, with a reward that even random weights earn."""
    module, options = RUNS[name]
    data = ["--model", small, "--data", small / f"{name.split(',')[0]}.jsonl"]
    countdown.reward, reward = lambda text, example: {"length": len(text) % 5 / 4}, countdown.reward
    try:
        module.main(parse(module, *options, *data, "--save_every", 1, "--device", "cpu", "--out", out, *more))
    finally:
        countdown.reward = reward


def worker(small, out, replicas, resume=""):
    """On every process: all of PARITY, then the scripts, which are started or go on from `resume`."""
    small, out, replicas = Path(small), Path(out), int(replicas)
    with processes("cpu", timeout=60) as procs:
        for name, case in PARITY.items():
            more = ["--replicas", replicas] if name in CASES else []
            tensors = case(procs, *more)
            if procs.is_main:
                save_file({key: t.contiguous() for key, t in tensors.items()}, out / f"{name}.safetensors")
        each_reads_its_part(procs, replicas)
        saved_shard_by_shard(procs, out / "shards")
        not_finite_on_one_process(procs)
        for module in (train_sft, train_grpo):  # one group of processes for all of them
            module.processes = lambda *_: contextlib.nullcontext(procs)
        parallel.MAX_FILE_BYTES = 20_000  # optimizer files
        for name in RUNS:
            more = ["--resume"] if resume else []
            run(name, small, (Path(resume) if resume else out) / name, *more, "--replicas", replicas)


# ---------------------------------------------------------------- the tests

def torchrun(nodes, count, *words):
    """Start a job as so many launches of torchrun with `count` processes each, and wait for its end."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc_per_node", count,
              "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--local_addr", "127.0.0.1"]
    jobs = [subprocess.Popen(list(map(str, [*launch, *words])), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                             text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(nodes)]
    try:
        for job in jobs:
            errors = job.communicate(timeout=300)[1]
            assert job.returncode == 0, errors[-5000:]
    finally:
        for job in jobs:
            job.terminate()  # does nothing where it has ended


@pytest.fixture(scope="module")
def alone():
    """What every case gives on one process, computed once."""
    def case(name):
        with processes("cpu") as procs:
            return PARITY[name](procs)
    return functools.cache(case)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint with random weights and the embedded model's tokenizer, and rows to train on."""
    folder = tmp_path_factory.mktemp("small")
    raw = json.loads((ROOT / "data/tiny/config.json").read_text())
    raw |= {"d_model": 36, "n_layers": 2, "mlp_hidden_size": 50}
    config = model_file.Config.from_dict(raw)
    model_file.LLaDA.empty(config).init_weights(generator("small")).save_pretrained(folder)
    shutil.copy(ROOT / "data/tiny/tokenizer.json", folder)
    rows = {"sft": [{"prompt": f"Say {i}", "completion": f"{i}" * (i % 9 + 1)} for i in range(40)],
            "grpo": [{"input": f"{i},2,3", "output": str(i + 5)} for i in range(30)]}
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small):
    """The runs on one process, uninterrupted."""
    out = tmp_path_factory.mktemp("one")
    for name in RUNS:
        run(name, small, out / name)
    return out


def cut(folder, to):
    """A copy of the folders of finished runs in which the last step has not happened."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("summary.json"))
    for name in RUNS:
        shutil.rmtree(sorted((to / name).glob("step_*"))[-1])
    return to


@pytest.fixture(scope="module")
def two(tmp_path_factory, small):
    """Two processes as two nodes of one job, all from the start."""
    out = tmp_path_factory.mktemp("two")
    torchrun(2, 1, __file__, small, out, 1)
    return out


@pytest.fixture(scope="module")
def three(tmp_path_factory, small, two):
    """Three processes, which go on with the runs of two."""
    out = tmp_path_factory.mktemp("three")
    torchrun(1, 3, __file__, small, out, 1, cut(two, out / "resumed"))
    return out


@pytest.fixture(scope="module")
def four(tmp_path_factory, small):
    """Four processes with two replicas of the model (HSDP)."""
    out = tmp_path_factory.mktemp("four")
    torchrun(1, 4, __file__, small, out, 2)
    return out


@pytest.fixture(params=["two", "three", "four"])
def many(request):
    return request.getfixturevalue(request.param)


def relative(found, wanted):
    """The largest difference between two dicts of tensors, relative to the gradient norm where that exceeds 1."""
    assert found.keys() == wanted.keys()
    return max(worst(found[name], t) for name, t in wanted.items()) / max(1.0, wanted.get("grad_norm", 1.0))


@pytest.mark.parametrize("name", PARITY)
def test_many_processes_give_the_numbers_of_one(alone, many, name):
    one, found = alone(name), load_file(many / f"{name}.safetensors")
    assert relative(found, one) < 1e-5
    assert name not in CASES or sum(bool(t.abs().max() > 1e-3) for t in found.values()) > 6


def files(run, number=-1):
    """Every tensor of a checkpoint of a run, the last."""
    folder = sorted(run.glob("step_*"))[number]
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def rows(run):
    """The numbers of metrics.jsonl but for timing."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: x for name, x in row.items() if name not in ("seconds", "tokens_per_second")} for row in lines]


def assert_same_run(run, other):
    """1e-6 is what rounding may cost; 6e-8 was seen, in a gradient norm, and 2e-8 in weights."""
    assert [row["step"] for row in rows(run)] == [1, 2, 3]
    for one, two in zip(rows(run), rows(other), strict=True):
        assert one == pytest.approx(two, rel=0, abs=1e-6)
    one, two = files(run), files(other)
    assert one.keys() == two.keys() and len(one) > 20
    assert all(worst(one[name], two[name]) < 1e-6 for name in one)
    if (run / "samples.jsonl").exists():
        assert (run / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()


@pytest.mark.parametrize("name", RUNS)
def test_many_processes_give_the_run_of_one(whole, two, four, name):
    for out in (two, four):
        assert_same_run(whole / name, out / name)
    before, after = files(whole / name, -2), files(whole / name)
    assert any(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", RUNS)
def test_saved_on_two_processes_resumed_on_one_and_on_three(small, whole, two, three, name, tmp_path, capsys):
    resumed = cut(two, tmp_path / "resumed") / name
    assert "LoRA" in name or (resumed / "step_000002/optimizer-3.safetensors").exists()  # more files than one
    run(name, small, resumed, "--resume")
    shown = capsys.readouterr().out
    assert f"resumed from {resumed}/step_000002" in shown and "resumed on 1 processes, not 2" in shown
    assert_same_run(whole / name, resumed)
    assert_same_run(whole / name, three / "resumed" / name)


def test_what_many_processes_save_one_reads(many):
    one, saved = (model_file.LLaDA.from_pretrained(folder).state_dict() for folder in (MODEL, many / "shards"))
    assert len(list((many / "shards").glob("*.safetensors"))) > 3
    assert one.keys() == saved.keys() and all(torch.equal(one[name], saved[name]) for name in one)


def test_two_launches_of_torchrun_are_two_nodes_of_one_job(two):
    assert all(json.loads((two / name / "config.json").read_text())["processes"] == 2 for name in RUNS)


# ---------------------------------------------------------------- one process

@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("more", [["--microbatch", 1], ["--microbatch", 12], ["--checkpoint_activations"]])
def test_accumulation_and_recomputation_change_nothing(alone, name, more):
    with processes("cpu") as procs:
        assert relative(CASES[name](procs, *more), alone(name)) < 1e-6


@pytest.mark.parametrize("more", [[], ["--checkpoint_activations"]])
def test_compiled_blocks_change_nothing(alone, more, monkeypatch):
    compiled, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled.append(f) or compile(f, backend="aot_eager",
                                                                                             **options))
    with processes("cpu") as procs:
        assert relative(CASES["grpo, LoRA"](procs, "--compile", *more), alone("grpo, LoRA")) < 1e-6
    assert len(compiled) == 2  # blocks


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_small_updates_are_not_lost_in_bfloat16(small, tmp_path, name):
    """All weights: computed in bfloat16, kept in float32; a step of 1e-6 is far below bfloat16's resolution."""
    run(name, small, tmp_path / "run", "--dtype", "bfloat16", "--lr", 1e-6, "--steps", 1, "--weight_decay", 0,
        *(["--warmup", 0] if name == "sft" else ["--num_iterations", 1, "--eval_count", 0]))
    before, after = load_file(small / "model.safetensors"), load_file(tmp_path / "run/step_000001/model.safetensors")
    moved = torch.cat([(after[name] - before[name]).abs().flatten() for name in before])
    assert (moved > 0.5e-6).float().mean() > 0.2 and moved.max() < 1.1e-6
    assert name == "sft" or rows(tmp_path / "run")[0]["kl"] == 0  # the reference computes just the same


def test_replicas_must_divide_the_processes():
    with pytest.raises(ValueError, match="--replicas 3 does not divide 4 processes: use one of .1, 2, 4."):
        Processes(0, 4, torch.device("cpu")).check_replicas(3)


def test_a_port_in_use_is_one_line(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit, match=f"^error: port {port} is in use.*--master_port[^\n]*$"):
            with processes("cpu"):
                raise AssertionError


if __name__ == "__main__":
    worker(*sys.argv[1:])
