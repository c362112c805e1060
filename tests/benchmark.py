"""How fast, against a plain transcription of the published algorithm (transcription.py), on this machine.

    python tests/benchmark.py                      the table
    python tests/benchmark.py --quick --json FILE  fewer rounds, smaller sizes
    python tests/benchmark.py --size 8b            LLaDA-8B's shape, random weights, bfloat16: for a GPU of 80 GB

The two run by turns in one process; a ratio is that of their medians. They share the network, so it is the algorithm
that is compared, and each draws its own noise: the transcription from one generator over all logits, ours per row.
"limit": the arithmetic of ours (its matrix products, counted by torch) over what this machine does in its time when it
multiplies large matrices and does nothing else.
"""
import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
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
RAW = json.loads((ROOT / "data/tiny/config.json").read_text())
LARGE = {"vocab_size": 126464, "embedding_size": 126464, "mask_token_id": 126336, "eos_token_id": 126081}
SHAPE_8B = {"d_model": 512, "n_layers": 8, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 1536,
            "vocab_size": 4096, "embedding_size": 4096}
FULL_8B = {**LARGE, "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288,
           "max_sequence_length": 4096, "rope_theta": 500000.0}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="fewer rounds, smaller sizes")
    p.add_argument("--json", metavar="FILE", help="write the ratios there")
    p.add_argument("--size", choices=("embedded", "8b"), default="embedded")
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


def by_turns(ours, theirs, rounds, device):
    """Median seconds of each, after one run that does not count."""
    times = [(seconds(ours, device), seconds(theirs, device)) for _ in range(rounds + 1)][1:]
    return [statistics.median(column) for column in zip(*times)]


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


# ---------------------------------------------------------------- what is measured: pairs of functions (ours, theirs)

def sampler(model, prompt, temperature, eos_id=None, attn_mask=None, **schedule):
    """The exact sampler and LLaDA's, from the same prompts."""
    options = dict(mask_id=model.config.mask_token_id, temperature=temperature, attn_mask=attn_mask, **schedule)
    g = torch.Generator(prompt.device).manual_seed(0)
    keys = [("benchmark", i) for i in range(len(prompt))]

    def uniform(*shape):
        return torch.rand(shape, generator=g, dtype=torch.float64, device=prompt.device)

    def ours():
        noise = row_noise(keys, schedule["diffusion_steps"], schedule["block_length"]).to(prompt.device)
        return generate(model, prompt, eos_id=eos_id, noise=noise, **options).ids

    return ours, lambda: transcription.sample(model, prompt, uniform=uniform, **options)[-1]


def update_phase(model, P, L, prompts, mu, lora):
    """Old and reference log-probs and mu updates, on made-up completions; one mask per prompt, and per completion."""
    c, device = model.config, next(model.parameters()).device
    draw = functools.partial(torch.randint, generator=generator("benchmark"))
    prompt = draw(100, 600, (prompts, P)).to(device)
    completions = draw(100, 600, (prompts, G, L)).to(device)
    masked = (torch.rand(prompts, mu, 1, P, generator=generator("masks")) < 0.15).to(device)
    advantages = group_advantages(draw(5, (prompts, G)).float()).to(device)
    mask = completion_mask(completions, c.eos_token_id)
    if lora:
        model = init_lora(add_lora(model, 16, 8, ["q_proj", "k_proj", "v_proj", "up_proj"]), generator("lora"))
        reference = functools.partial(adapters_off, model)
    else:
        frozen = LLaDA.empty(c, device, next(model.parameters()).dtype).requires_grad_(False)
        frozen.load_state_dict(model.state_dict())
        reference = functools.partial(contextlib.nullcontext, frozen)
    args = train_grpo.parse_args(["--task", "countdown"])
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.0)  # the same work every time
    procs = Processes(0, 1, device)

    def ours():
        rollout = train_grpo.Rollout(prompt, None, masked, completions, mask[:, None, None].expand(-1, mu, -1, -1, -1),
                                     advantages, [int(mask.sum())] * mu)
        train_grpo.score(model, reference, rollout, [slice(None)], args, c.mask_token_id)
        return [train_grpo.update_policy(0, m, model, optimizer, rollout, [slice(None)], args, procs, c.mask_token_id)
                for m in range(mu)]

    rows = [prompt.repeat_interleave(G, 0), masked[:, :, 0].transpose(0, 1).repeat_interleave(G, 1),
            completions.flatten(0, 1), advantages.flatten(), mask.flatten(0, 1)]
    return ours, lambda: transcription.update_phase(model, reference, optimizer, *rows, c.mask_token_id,
                                                    epsilon=args.epsilon, beta=args.beta, grad_clip=args.grad_clip)


def whole_step(model, tokenizer, examples, prompts, mu, schedule):
    """train_grpo.train_step, and the same from the transcription: roll out, reward, mu updates."""
    device, task = next(model.parameters()).device, TASKS["countdown"]
    args = train_grpo.parse_args(["--task", "countdown", "--temperature", "0.9", "--prompts_per_step", str(prompts),
                                  "--group_size", str(G), "--num_iterations", str(mu), "--microbatch", str(prompts),
                                  "--rollout_batch", str(prompts * G)])
    vars(args).update(schedule)
    frozen = LLaDA.from_pretrained("data/tiny", device).requires_grad_(False).eval()
    reference = functools.partial(contextlib.nullcontext, frozen)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    procs = Processes(0, 1, device)
    signals, g = Signals(procs), torch.Generator(device).manual_seed(0)

    def ours():
        return train_grpo.train_step(0, model, reference, optimizer, tokenizer, examples, args, procs, signals)

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
    return ours, theirs


# ---------------------------------------------------------------- memory

def resident(field):
    """Bytes of this process's memory now (VmRSS) or at most so far (VmHWM); Linux."""
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))


def measure_peak(what, args):
    """Print the bytes that one update phase needs above the weights: `what` is ours or theirs, and the vocabulary."""
    side, vocabulary = what.split()
    ours, theirs = update_case(vocabulary == "large", torch.device(args.device), mu=1)
    work, before = ours if side == "ours" else theirs, resident("VmRSS")
    work()
    print(resident("VmHWM") - before)


def peak_memory(side, vocabulary, args):
    """Bytes, on a GPU from its allocator, on a CPU from a process of its own."""
    if args.device.startswith("cuda"):
        ours, theirs = update_case(vocabulary == "large", torch.device(args.device), mu=1)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        (ours if side == "ours" else theirs)()
        return torch.cuda.max_memory_allocated() - before
    words = [sys.executable, __file__, "--memory", f"{side} {vocabulary}", "--device", args.device]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def update_case(large, device, mu):
    changes = {**LARGE, "n_layers": 5} if large else {}
    model = random_model(device, torch.float32, **changes)
    return update_phase(model, 18, 32, prompts=1 if large else 4, mu=mu, lora=large)


# ---------------------------------------------------------------- the table

def cases_embedded(args, device):
    """(key, words, ours, theirs, tokens per run) of the embedded model's size; key None: shown, not written."""
    model = LLaDA.from_pretrained("data/tiny", device).eval()
    tokenizer = Tokenizer.from_folder("data/tiny", model.config)
    examples = [{**e, "ids": tokenizer.encode_prompt(e["prompt"])} for e in TASKS["countdown"].load("train", count=256)]
    rows = 6 if args.quick else 24
    prompt, mask = pad_left([e["ids"] for e in examples[:rows]], tokenizer.eos_id, device)
    schedule = dict(gen_length=32, diffusion_steps=32, block_length=8)
    for t, key in ((0.0, "sampler_exact_t0"), (0.9, "sampler_exact_t09")):
        yield (key, f"sampler, T {t:g}, {rows} rows", *sampler(model, prompt, t, tokenizer.eos_id, mask, **schedule),
               rows * 32)
        if not args.quick:
            yield (None, f"  with all rows to the end, T {t:g}", *sampler(model, prompt, t, None, mask, **schedule),
                   rows * 32)
    large = random_model(device, torch.float32, **LARGE)
    rows = 1 if args.quick else 2
    ids = torch.randint(600, (rows, 42), generator=generator("prompt")).to(device)
    short = dict(gen_length=8, diffusion_steps=8, block_length=8)  # one block of a canvas of the same size
    for t, key in ((0.0, "sampler_exact_t0_large_vocab"), (0.9, "sampler_exact_t09_large_vocab")):
        if t or not args.quick:
            yield key, f"sampler, T {t:g}, V 126,464, rows {rows}", *sampler(large, ids, t, **short), rows * 8
    del large
    if not args.quick:
        shaped = random_model(device, torch.float32, **SHAPE_8B)
        ids = torch.randint(600, (2, 212), generator=generator("prompt")).to(device)
        for t in (0.0, 0.9):
            yield (None, f"sampler, T {t:g}, 8B's proportions, 2 rows",
                   *sampler(shaped, ids, t, gen_length=16, diffusion_steps=8, block_length=16), 32)
    for large in (False, True):
        if not (large and args.quick):
            prompts, mu = (1, 2) if large else (4, 2 if args.quick else MU)
            yield ("update_phase_large_vocab" if large else "update_phase",
                   f"update phase, mu {mu}, {prompts} x {G}" + ", V 126,464" * large,
                   *update_case(large, device, mu), None)
    prompts = 1 if args.quick else 4
    yield ("step_exact", f"whole step, T 0.9, mu {MU}, {prompts} x {G}",
           *whole_step(model, tokenizer, examples, prompts, MU, schedule), prompts * G * 32)


def cases_8b(args, device):
    """The same for LLaDA-8B's shape in bfloat16, built on the device."""
    model = random_model(device, torch.bfloat16, **FULL_8B)
    for rows in (6, 1):
        ids = torch.randint(126000, (rows, 200), generator=generator("prompt")).to(device)
        schedule = dict(gen_length=32, diffusion_steps=16, block_length=32) if args.quick else dict(
            gen_length=256, diffusion_steps=128, block_length=32)
        for t, key in ((0.0, "sampler_exact_t0"), (0.9, "sampler_exact_t09")):
            yield (key if rows == 6 else None, f"sampler, T {t:g}, {rows} x 200 + {schedule['gen_length']}",
                   *sampler(model, ids, t, **schedule), rows * schedule["gen_length"])
    yield ("update_phase", f"update phase, mu {MU}, 1 x {G}",
           *update_phase(model, 200, 256, 1, 2 if args.quick else MU, lora=True), None)


def main(args):
    device = torch.device(args.device)
    if args.memory:
        return measure_peak(args.memory, args)
    dtype = torch.float32 if args.size == "embedded" else torch.bfloat16
    rounds, start = args.rounds or (2 if args.quick else 5), time.monotonic()
    peak, rows, ratios = peak_flops(device, dtype), [], {}
    for key, words, ours, theirs, tokens in (cases_embedded if args.size == "embedded" else cases_8b)(args, device):
        fast, slow = by_turns(ours, theirs, rounds, device)
        rows.append({"what": words, "published": f"{slow:.3f} s", "ours": f"{fast:.3f} s",
                     "ratio": f"{slow / fast:.2f}", "tokens/s": f"{tokens / fast:.0f}" if tokens else None,
                     "limit": f"{count_flops(ours) / fast / peak:.0%}"})
        print(rows[-1], file=sys.stderr, flush=True)
        if key:
            ratios[key] = slow / fast
    for vocabulary in ("own", "large") if args.size == "embedded" and not args.quick else ("own",):
        theirs, ours = (peak_memory(side, vocabulary, args) for side in ("theirs", "ours"))
        ratios["update_memory" + "_large_vocab" * (vocabulary == "large")] = theirs / ours
        rows.append({"what": "peak memory of an update" + ", V 126,464" * (vocabulary == "large"),
                     "published": f"{theirs / 1e9:.2f} GB", "ours": f"{ours / 1e9:.2f} GB",
                     "ratio": f"{theirs / ours:.2f}"})
    print(table(rows))
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{name}{load}, {str(dtype).removeprefix('torch.')}, medians of {rounds}, "
          f"{peak / 1e9:.0f} GFLOP/s in a matrix product, {time.monotonic() - start:.0f} s in all")
    if args.json:
        Path(args.json).write_text(json.dumps(ratios, indent=2) + "\n")
    return ratios


if __name__ == "__main__":
    main(parse_args())
