"""How fast, against a plain transcription of the published algorithm (transcription.py), on this machine.

    python tests/benchmark.py                      the table
    python tests/benchmark.py --quick --json FILE  fewer rounds, smaller sizes
    python tests/benchmark.py --size 8b            LLaDA-8B's shape, random weights, bfloat16: for a GPU of 80 GB
    python tests/scaling.py                        cost against size

They run by turns in one process; a ratio is that of their medians. They share the network, so it is the algorithm
that is compared, and each draws its own noise: the transcription from one generator over all logits, ours per row.
"fast" is approximate: dual cache and threshold 0.9. The embedded model runs its own settings, 16 prompts of 6, 32
tokens in blocks of 8, on its own problems, whose rows leave after EOS. With the vocabulary of LLaDA-8B (random weights,
so no row leaves) it is d1's: an average step of a canvas of 200 + 256 tokens in blocks of 32, which finds 17 masked.
"limit": the arithmetic of ours (its matrix products, counted by torch) over what this machine does in its time when it
multiplies large matrices and does nothing else; counting takes longer than a run, so not with --quick.
"""
import argparse
import contextlib
import copy
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_grpo  # noqa: E402
import transcription  # noqa: E402
from d1 import completion_mask, draw_indices, generator, group_advantages  # noqa: E402
from data import TASKS  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from model import Config, LLaDA, adapters_off, add_lora, init_lora  # noqa: E402
from parallel import Processes, Signals  # noqa: E402
from sample import generate, pad_left, row_noise, table  # noqa: E402

G, MU = 6, 12
QUICK_LIMIT = 2.5  # seconds of theirs above which --quick takes one run of each
TINY = ROOT / "data/tiny"
RAW = json.loads((TINY / "config.json").read_text())
LARGE = {"vocab_size": 126464, "embedding_size": 126464, "mask_token_id": 126336, "eos_token_id": 126081}
SHAPE_8B = {"d_model": 512, "n_layers": 8, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 1536,
            "vocab_size": 4096, "embedding_size": 4096}
FAST = {"cache": "dual", "threshold": 0.9}
FULL_8B = {**LARGE, "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288,
           "max_sequence_length": 4096, "rope_theta": 500000.0}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="fewer rounds, smaller sizes")
    p.add_argument("--json", metavar="FILE", help="write the ratios there")
    p.add_argument("--size", choices=("embedded", "8b"), default="embedded")
    p.add_argument("--shape", choices=("tiny",), help="with --size 8b: the same code with the embedded model's shape")
    p.add_argument("--profile", metavar="FILE", help="write there where a rollout's time goes, theirs and ours")
    p.add_argument("--rounds", type=int, help="default: 5, with --quick 2")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--memory", metavar="WHAT", help=argparse.SUPPRESS)  # used by itself: one process for each peak
    return p.parse_args(argv)


# ---------------------------------------------------------------- measuring

def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work, device):
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def by_turns(works, rounds, device, limit=math.inf):
    """Median seconds of each after a first run of all, or that first run where the first of them takes over `limit`."""
    first = [seconds(work, device) for work in works]
    if first[0] > limit:
        return first
    times = [[seconds(work, device) for work in works] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times)]


def hottest(work, device):
    """Ten lines of a profile: the operations that take the most time by themselves."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as trace:
        work()
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(trace.key_averages(), key=lambda e: getattr(e, field), reverse=True)
    total = sum(getattr(e, field) for e in events)
    return [{"operation": e.key[:60], "calls": e.count, "ms": f"{getattr(e, field) / 1e3:.1f}",
             "share": f"{getattr(e, field) / total:.0%}"} for e in events[:10]]


def peak_flops(device, dtype):
    """Floating-point operations per second of a large matrix product: the machine's own arithmetic limit."""
    size = 8192 if device.type == "cuda" else 1536
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size ** 3 / min(seconds(lambda: a @ a, device) for _ in range(5))


def count_flops(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def random_model(device, dtype, **changes):
    config = Config.from_dict({**RAW, **changes})
    model = LLaDA.empty(config, device, dtype)
    g = torch.Generator(device).manual_seed(0)
    for p in model.parameters():
        p.data.fill_(1) if p.dim() == 1 else p.data.normal_(0, 0.02, generator=g)
    return model.eval()


# ---------------------------------------------------------------- what is measured: functions (theirs, ours, ...)

def sampler(model, prompt, temperature, eos_id=None, attn_mask=None, **schedule):
    """LLaDA's sampler, the exact one and the fast one, from the same prompts."""
    options = dict(mask_id=model.config.mask_token_id, temperature=temperature, attn_mask=attn_mask, **schedule)
    g = torch.Generator(prompt.device).manual_seed(0)
    keys = [("benchmark", i) for i in range(len(prompt))]

    def uniform(*shape):
        return torch.rand(shape, generator=g, dtype=torch.float64, device=prompt.device)

    def ours(**fast):
        steps = schedule["gen_length" if fast else "diffusion_steps"]  # with a threshold up to one for every token
        noise = row_noise(keys, steps, schedule["block_length"]).to(prompt.device)
        return generate(model, prompt, eos_id=eos_id, noise=noise, **options, **fast).ids

    return (lambda: transcription.sample(model, prompt, uniform=uniform, **options)[-1], ours,
            functools.partial(ours, **FAST))


def average_step(model, rows, P, L, block_length, temperature):
    """One denoising step in the middle of a block, rows x (P + L): theirs and the exact one."""
    masked = (block_length + 2) // 2  # mean of block_length, block_length - 2, ... 2: two tokens are committed a step
    device = next(model.parameters()).device
    ids = torch.randint(600, (rows, P + L - masked), generator=generator("prompt")).to(device)
    return sampler(model, ids, temperature, gen_length=masked, diffusion_steps=1, block_length=masked)[:2]


def policy(model, lora):
    """(model, reference policy, optimizer) as a training script has them; lr 0 for the same work every time."""
    if lora:
        model = init_lora(add_lora(model, lora, lora / 2, ["q_proj", "k_proj", "v_proj", "up_proj"]), generator("lora"))
        reference = functools.partial(adapters_off, model)
    else:
        frozen = copy.deepcopy(model).requires_grad_(False)
        reference = functools.partial(contextlib.nullcontext, frozen)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return model, reference, torch.optim.AdamW(trainable, lr=0.0, fused=True)


def update_phase(trained, P, L, prompts, mu, group=G):
    """Old and reference log-probs and mu updates, on made-up completions; a mask per completion, and per prompt."""
    model, reference, optimizer = trained
    c, device = model.config, next(model.parameters()).device
    draw = functools.partial(torch.randint, generator=generator("benchmark"))
    prompt = draw(100, 600, (prompts, P)).to(device)
    completions = draw(100, 600, (prompts, group, L)).to(device)
    masked = (torch.rand(prompts, mu, 1, P, generator=generator("masks")) < 0.15).to(device)
    advantages = group_advantages(draw(5, (prompts, group)).float()).to(device)
    mask = completion_mask(completions, c.eos_token_id)
    args, procs = train_grpo.parse_args(["--task", "countdown"]), Processes(0, 1, device)

    def ours():
        rollout = train_grpo.Rollout(prompt, None, masked, completions, mask[:, None, None].expand(-1, mu, -1, -1, -1),
                                     advantages, [int(mask.sum())] * mu)
        train_grpo.score(model, reference, rollout, [slice(None)], args, c.mask_token_id)
        return [train_grpo.update_policy(0, m, model, optimizer, rollout, [slice(None)], args, procs, c.mask_token_id)
                for m in range(mu)]

    rows = [prompt.repeat_interleave(group, 0), masked[:, :, 0].transpose(0, 1).repeat_interleave(group, 1),
            completions.flatten(0, 1), advantages.flatten(), mask.flatten(0, 1)]
    return lambda: transcription.update_phase(model, reference, optimizer, *rows, c.mask_token_id, beta=args.beta,
                                              epsilon=args.epsilon, grad_clip=args.grad_clip), ours


def whole_step(trained, tokenizer, examples, prompts, mu, schedule):
    """train_grpo.train_step, exact and fast, and the same from the transcription: roll out, reward, mu updates."""
    model, reference, optimizer = trained
    device, task = next(model.parameters()).device, TASKS["countdown"]
    args = train_grpo.parse_args(["--task", "countdown", "--temperature", "0.9", "--prompts_per_step", str(prompts),
                                  "--group_size", str(G), "--num_iterations", str(mu), "--microbatch", str(prompts),
                                  "--rollout_batch", str(prompts * G)])
    vars(args).update(schedule)
    procs = Processes(0, 1, device)
    signals, g = Signals(procs), torch.Generator(device).manual_seed(0)

    def ours(**fast):
        options = argparse.Namespace(**{**vars(args), **fast})
        return train_grpo.train_step(0, model, reference, optimizer, tokenizer, examples, options, procs, signals)

    def theirs():
        batch = [examples[i] for i in draw_indices(len(examples), 0, prompts, args.seed) for _ in range(G)]
        prompt, attn_mask = pad_left([e["ids"] for e in batch], tokenizer.eos_id, device)
        ids = transcription.sample(
            model, prompt, mask_id=tokenizer.mask_id, attn_mask=attn_mask, temperature=0.9, **schedule,
            uniform=lambda *shape: torch.rand(shape, generator=g, dtype=torch.float64, device=device))[-1]
        completions = ids[:, prompt.shape[1]:]
        rewards = torch.tensor([sum(task.reward(tokenizer.decode(row), e).values())
                                for row, e in zip(completions.tolist(), batch)], device=device)
        masked = torch.rand(mu, *prompt.shape, generator=g, device=device) < args.p_mask_prompt
        transcription.update_phase(
            model, reference, optimizer, prompt, masked, completions, group_advantages(rewards.view(-1, G)).flatten(),
            completion_mask(completions, tokenizer.eos_id), tokenizer.mask_id, epsilon=args.epsilon, beta=args.beta,
            grad_clip=args.grad_clip, attn_mask=attn_mask)

    return theirs, ours, functools.partial(ours, **FAST)


# ---------------------------------------------------------------- memory

def resident(field):
    """Bytes of this process's memory now (VmRSS) or at most so far (VmHWM); Linux."""
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))


def peak_on_gpu(work):
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def measure_peak(what):
    """Print the bytes that one update phase needs above the weights: `what` is 0 (theirs) or 1, and the vocabulary."""
    side, vocabulary = what.split()
    large = vocabulary == "large"
    work, before = update_case(large, torch.device("cpu"), 1 if large else 16, mu=1)[int(side)], resident("VmRSS")
    work()
    print(resident("VmHWM") - before)


def peaks_on_cpu(vocabulary):
    """Bytes of theirs and ours, each from a process of its own."""
    words = [sys.executable, __file__, "--device", "cpu", "--memory"]
    started = [subprocess.Popen([*words, f"{side} {vocabulary}"], stdout=subprocess.PIPE, text=True) for side in (0, 1)]
    return [int(process.communicate()[0]) for process in started]


def update_case(large, device, prompts, mu):
    model = random_model(device, torch.float32, **LARGE) if large else LLaDA.from_pretrained(TINY, device).eval()
    return update_phase(policy(model, 16 if large else 0), 18, 32, prompts, mu)


# ---------------------------------------------------------------- the table

def cases_embedded(args, device):
    """(keys and words of ours, theirs and ours, tokens a run) of the embedded model's size; key None: only shown."""
    model = LLaDA.from_pretrained(TINY, device).eval()
    tokenizer = Tokenizer.from_folder(TINY, model.config)
    examples = [{**e, "ids": tokenizer.encode_prompt(e["prompt"])} for e in TASKS["countdown"].load("train", count=96)]
    rows = 12 if args.quick else 96
    prompt, mask = pad_left([e["ids"] for e in examples[:rows]], tokenizer.eos_id, device)
    schedule = dict(gen_length=32, diffusion_steps=32, block_length=8)
    for t, key in ((0.0, "sampler_exact_t0"), (0.9, "sampler_exact_t09")):
        words, works = f"T {t:g}, {rows} x ({prompt.shape[1]} + 32)", sampler(model, prompt, t, tokenizer.eos_id, mask,
                                                                             **schedule)
        fast = [("sampler_fast", f"sampler, fast, {words}")] if t else []
        yield [(key, f"sampler, {words}"), *fast], works[:2 + len(fast)], rows * 32
        if not args.quick:
            yield ([(None, f"  of 24, all to the end, T {t:g}")],
                   sampler(model, prompt[:24], t, None, mask if mask is None else mask[:24], **schedule)[:2], 24 * 32)
    large = random_model(device, torch.float32, **LARGE)
    for t, key in ((0.0, "sampler_exact_t0_large_vocab"), (0.9, "sampler_exact_t09_large_vocab")):
        if t or not args.quick:
            rows = 1 if args.quick else 2
            yield ([(key, f"sampler, T {t:g}, V 126,464, a step of {rows} x (200 + 256)")],
                   average_step(large, rows, 200, 256, 32, t), 2 * rows)
        for rows, P, L, block_length in () if args.quick else ((1, 200, 256, 32), (6, 17, 32, 8)):
            yield ([(None, f"  of {rows} x ({P} + {L}), T {t:g}")],
                   average_step(large, rows, P, L, block_length, t), 2 * rows)
    del large
    if not args.quick:
        shaped = random_model(device, torch.float32, **SHAPE_8B)
        for t in (0.0, 0.9):
            yield ([(None, f"sampler, T {t:g}, 8B's proportions, a step of 6 x (200 + 256)")],
                   average_step(shaped, 6, 200, 256, 32, t), 12)
    for large in (False, True):
        if not (large and args.quick):
            prompts, mu = (1, 2) if large else (8, 2) if args.quick else (16, MU)
            yield ([("update_phase_large_vocab" if large else "update_phase",
                     f"update phase, mu {mu}, {prompts} x {G}" + ", V 126,464" * large)],
                   update_case(large, device, prompts, mu), None)
    words = f"T 0.9, mu {MU}, 4 x {G}"
    yield ([("step_exact", f"whole step, {words}"), ("step_fast", f"whole step, fast, {words}")],
           whole_step(policy(model, 0), tokenizer, examples, 4, MU, schedule), 4 * G * 32)


def cases_8b(args, device):
    """The same for LLaDA-8B's shape in bfloat16, built on the device; d1's settings, LoRA in the updates."""
    model = random_model(device, torch.bfloat16, **({} if args.shape else FULL_8B))
    P, L, mu, block_length = (16, 4, 1, 2) if args.shape else (200, 32, 2, 32) if args.quick else (200, 256, MU, 32)
    schedule = dict(gen_length=L, diffusion_steps=L // 2, block_length=block_length)
    for rows in (6, 1):
        ids = torch.randint(600, (rows, P), generator=generator("prompt")).to(device)
        for t, key in ((0.0, "sampler_exact_t0"), (0.9, "sampler_exact_t09")):
            words, works = f"T {t:g}, {rows} x ({P} + {L})", sampler(model, ids, t, **schedule)
            fast, one = [("sampler_fast", f"sampler, fast, {words}")] if t else [], "_one_row" * (rows == 1)
            yield ([(k + one, w) for k, w in [(key, f"sampler, {words}"), *fast]], works[:2 + len(fast)], rows * L)
    tokenizer = Tokenizer.from_folder(TINY)
    tokenizer.mask_id, tokenizer.eos_id = model.config.mask_token_id, model.config.eos_token_id
    examples = TASKS["countdown"].load("train", count=1)
    examples[0]["ids"] = ids[0].tolist()
    trained = policy(model, 128)
    yield [("update_phase", f"update phase, mu {mu}, 1 x {G}")], update_phase(trained, P, L, 1, mu), None
    yield ([("step_exact", f"whole step, T 0.9, mu {mu}, 1 x {G}"), ("step_fast", "  fast")],
           whole_step(trained, tokenizer, examples, 1, mu, schedule), G * L)


def main(args):
    """Returns {key: ratio}, which --json writes."""
    if args.memory:
        return measure_peak(args.memory)
    device, embedded = torch.device(args.device), args.size == "embedded"
    dtype = torch.float32 if embedded else torch.bfloat16
    rounds, start = args.rounds or (2 if args.quick else 5), time.monotonic()
    peak, rows, ratios = peak_flops(device, dtype), [], {}

    def memory(key, words, theirs, ours):
        ratios[key] = theirs / ours
        rows.append({"what": words, "published": f"{theirs / 1e9:.2f} GB", "ours": f"{ours / 1e9:.2f} GB",
                     "ratio": f"{theirs / ours:.2f}"})

    for names, works, tokens in (cases_embedded if embedded else cases_8b)(args, device):
        slow, *found = by_turns(works, rounds, device, QUICK_LIMIT if args.quick else math.inf)
        for (key, words), work, fast in zip(names, works[1:], found):
            rows.append({"what": words, "published": f"{slow:.3f} s", "ours": f"{fast:.3f} s",
                         "ratio": f"{slow / fast:.2f}", "tokens/s": f"{tokens / fast:.0f}" if tokens else None,
                         "limit": None if args.quick else f"{count_flops(work) / fast / peak:.0%}"})
            print(rows[-1], file=sys.stderr, flush=True)
            if key:
                ratios[key] = slow / fast
        key = names[0][0]
        if device.type == "cuda" and key == "update_phase":
            memory("update_memory", "peak memory of an update", *map(peak_on_gpu, works))
        if args.profile and key == "sampler_exact_t09":
            lines = "\n\n".join(f"{side}: {names[0][1]}\n{table(hottest(work, device))}"
                                for side, work in zip(("published", "ours"), works))
            Path(args.profile).write_text(lines + "\n")
            print(lines)
    if device.type == "cpu" and embedded:
        memory("update_memory", "peak memory of an update", *peaks_on_cpu("own"))
        if not args.quick:
            memory("update_memory_large_vocab", "peak memory of an update, V 126,464", *peaks_on_cpu("large"))
    print(table(rows))
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    counted = f"medians of {rounds}" + f", of one first run above {QUICK_LIMIT} s" * args.quick
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{name}{load}, {str(dtype).removeprefix('torch.')}, {counted}, "
          f"{peak / 1e9:.0f} GFLOP/s in a matrix product, {time.monotonic() - start:.0f} s in all")
    if args.json:
        Path(args.json).write_text(json.dumps(ratios, indent=2) + "\n")
    return ratios


if __name__ == "__main__":
    main(parse_args())
