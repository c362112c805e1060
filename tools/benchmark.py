"""How fast, against a plain transcription of the published algorithm (transcription.py), on this machine.

    python tools/benchmark.py                      the table
    python tools/benchmark.py --quick --json FILE  fewer rounds, smaller sizes; the ratios go to FILE
    python tools/benchmark.py --size 8b            LLaDA-8B's shape, random weights, bfloat16: for a GPU of 80 GB

Both sides run by turns in one process, and a ratio is that of their medians. They share the network, so it is the
algorithm that is compared. Each draws its own noise: the transcription from one generator over all logits, ours per
row. "fast" is approximate: variants/fast_dllm.py with the dual cache and threshold 0.9. "limit" is the arithmetic of
ours (its matrix products, counted by torch) over what this machine does in the same time when it multiplies large
matrices.

The embedded model runs its own settings, completions of 32 tokens in blocks of 8, on its own problems, whose rows
leave after EOS. With the vocabulary of LLaDA-8B (random weights, so no row leaves) a case is an average step of a
canvas of d1, 200 + 256 tokens in blocks of 32, which finds 17 masked.
"""
import argparse
import contextlib
import copy
import functools
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_grpo  # noqa: E402
from d1 import completion_mask, draw_indices, generator, group_advantages  # noqa: E402
from data import TASKS  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from lora import adapters_off, add_lora, init_lora  # noqa: E402
from model import TINY, Config, LLaDA  # noqa: E402
from parallel import Processes  # noqa: E402
from sample import draw_noise, generate, pad_left  # noqa: E402
from tools import number, transcription  # noqa: E402
from tools.measure import by_turns, count_flops, init_weights, peak_flops, peak_memory, print_table  # noqa: E402
from variants import fast_dllm  # noqa: E402

NO_TOKEN = -1  # as eos_id: no row ever leaves
SCHEDULE = {"gen_length": 32, "diffusion_steps": 32, "block_length": 8}  # of the embedded model
LARGE_VOCABULARY = {"embedding_size": 126464}
SHAPE_OF_8B = {"d_model": 512, "n_layers": 8, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 1536,
               "embedding_size": 4096}  # its proportions, an eighth of its width
FULL_8B = {**LARGE_VOCABULARY, "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32,
           "mlp_hidden_size": 12288, "max_sequence_length": 4096, "rope_theta": 500000.0}
FAST = functools.partial(fast_dllm.generate, threshold=0.9, cache="dual")
QUICK_LIMIT = 2.5  # seconds of a first published run above which --quick lets it be the only run


@dataclass
class Case:
    words: str
    works: dict      # {"published": function, "ours": function, sometimes "fast": function}, without arguments
    tokens: int = 0  # of the completions that a run fills


# ---------------------------------------------------------------- what is measured

def build_model(device, dtype, **changes):
    """The embedded model's network with other sizes and random weights."""
    raw = json.loads((TINY / "config.json").read_text())
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        Path(folder, "config.json").write_text(json.dumps(raw | changes))
        model = LLaDA(Config.from_folder(folder)).to(dtype)
    init_weights(model.to_empty(device=device), generator("benchmark"))
    return model.eval()


def sampler(model, prompt, attn_mask, temperature, eos_id=NO_TOKEN, **schedule):
    """The works of a sampler: LLaDA's, ours, and the fast variant of ours, from the same prompts (B, P)."""
    mask_id, device = model.config.mask_token_id, prompt.device
    noise_generator = torch.Generator(device).manual_seed(0)
    keys = [("benchmark", i) for i in range(len(prompt))]
    is_token = torch.ones_like(prompt, dtype=torch.bool) if attn_mask is None else attn_mask

    def draw_uniform(*shape):
        return torch.rand(shape, generator=noise_generator, dtype=torch.float64, device=device)

    def published():
        return transcription.sample(model, prompt, mask_id=mask_id, attn_mask=attn_mask, temperature=temperature,
                                    uniform=draw_uniform, **schedule)[-1]

    def ours(generate=generate, diffusion_steps=schedule["diffusion_steps"]):
        noise = draw_noise(keys, diffusion_steps, schedule["block_length"]).to(device)
        return generate(model, prompt, is_token, noise, mask_id=mask_id, eos_id=eos_id, temperature=temperature,
                        **schedule | {"diffusion_steps": diffusion_steps})[0]

    fast = functools.partial(ours, FAST, schedule["gen_length"])  # may need a round for every token
    return {"published": published, "ours": ours, "fast": fast}


def average_step(model, rows, prompt_length, gen_length, block_length, temperature):
    """The works of one denoising step in the middle of a block, over rows x (prompt_length + gen_length) tokens."""
    masked = (block_length + 2) // 2  # mean of block_length, block_length - 2, ... 2: two tokens are committed a step
    shape = rows, prompt_length + gen_length - masked
    ids = torch.randint(600, shape, generator=generator("prompt")).to(next(model.parameters()).device)
    works = sampler(model, ids, None, temperature, gen_length=masked, diffusion_steps=1, block_length=masked)
    return {name: works[name] for name in ("published", "ours")}


def make_policy(model, lora_r=0):
    """(model, reference, optimizer) as a training script has them; lr 0 for the same work every time."""
    if lora_r:
        add_lora(model, lora_r, lora_r / 2, ["q_proj", "k_proj", "v_proj", "up_proj"])
        init_lora(model, generator("lora"))
        reference = functools.partial(adapters_off, model)
    else:
        frozen = copy.deepcopy(model).requires_grad_(False)
        reference = functools.partial(contextlib.nullcontext, frozen)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return model, reference, torch.optim.AdamW(trainable, lr=0.0, fused=True)


def step_options(prompts, group_size, mu, **schedule):
    words = {"prompts_per_step": prompts, "microbatch": prompts, "group_size": group_size, "num_iterations": mu,
             "rollout_batch": prompts * group_size, **schedule}
    return train_grpo.parse_args(["--task", "countdown", *(f"--{name}={value}" for name, value in words.items())])


def update_phase(policy, prompts, prompt_length, gen_length, mu, group_size=6):
    """The works of the update phase, on made-up completions: log-probabilities before the updates, then mu updates.

    The published algorithm has a prompt mask and a row of the network for every completion, ours for every prompt.
    """
    model = policy[0]
    config, device = model.config, next(model.parameters()).device
    args = step_options(prompts, group_size, mu)
    draw_ids = functools.partial(torch.randint, 100, 600, generator=generator("benchmark"))
    prompt = draw_ids((prompts, prompt_length)).to(device)
    completions = draw_ids((prompts, group_size, gen_length)).to(device)
    mask = completion_mask(completions, config.eos_token_id)
    advantages = group_advantages(torch.rand(prompts, group_size, generator=generator("rewards"))).to(device)
    rollout = train_grpo.Rollout(prompt, torch.ones_like(prompt, dtype=torch.bool), completions,
                                 torch.zeros_like(completions), mask, advantages, token_count=float(mask.sum()))
    masks = torch.rand(mu, prompts * group_size, prompt_length, generator=generator("masks")) < args.p_mask_prompt
    masks = masks.to(device)
    tokenizer = SimpleNamespace(mask_id=config.mask_token_id)

    def ours():  # the whole step, with these completions for its rollout
        with mock.patch.object(train_grpo, "roll_out", return_value=(rollout, [{}])):
            train_grpo.train_step(0, *policy, tokenizer, None, args, Processes(0, 1, device, None))

    def published():
        transcription.update_phase(*policy, rollout.prompt.repeat_interleave(group_size, 0), masks,
                                   rollout.completions.flatten(0, 1), rollout.advantages.flatten(),
                                   rollout.mask.flatten(0, 1), config.mask_token_id, epsilon=args.epsilon,
                                   beta=args.beta, grad_clip=args.grad_clip)

    return {"published": published, "ours": ours}


def whole_step(policy, tokenizer, examples, prompts, mu, schedule, group_size=6):
    """The works of an RL step on Countdown: roll out, grade, mu updates."""
    model = policy[0]
    device, task = next(model.parameters()).device, TASKS["countdown"]
    args = step_options(prompts, group_size, mu, **schedule)

    def ours(generate=generate, args=args):
        return train_grpo.train_step(0, *policy, tokenizer, examples, args, Processes(0, 1, device, None),
                                     generate=generate)

    def published():
        drawn = draw_indices(len(examples), 0, prompts, args.seed)
        batch = [examples[i] for i in drawn for _ in range(group_size)]
        prompt, attn_mask = pad_left([example["ids"] for example in batch], tokenizer.eos_id, device)
        works = sampler(model, prompt, attn_mask, args.temperature, **schedule)
        completions = works["published"]()[:, prompt.shape[1]:]  # (R, L)
        rewards = torch.tensor([sum(task.reward(tokenizer.decode(ids), example).values())
                                for ids, example in zip(completions.tolist(), batch)], device=device)
        masks = (torch.rand(mu, *prompt.shape, generator=generator("masks")) < args.p_mask_prompt).to(device)
        transcription.update_phase(*policy, prompt, masks, completions,
                                   group_advantages(rewards.view(-1, group_size)).flatten(),
                                   completion_mask(completions, tokenizer.eos_id), tokenizer.mask_id,
                                   epsilon=args.epsilon, beta=args.beta, grad_clip=args.grad_clip, attn_mask=attn_mask)

    fast_args = step_options(prompts, group_size, mu, **schedule | {"diffusion_steps": schedule["gen_length"]})
    return {"published": published, "ours": ours, "fast": functools.partial(ours, FAST, fast_args)}


# ---------------------------------------------------------------- the table

def cases_embedded(device, dtype, quick):
    """Cases of the embedded model's size, and of the parts that grow with LLaDA-8B's vocabulary and shape."""
    model = LLaDA.from_pretrained(TINY, device, dtype).eval()
    tokenizer = Tokenizer.from_folder(TINY)
    examples = [{**example, "ids": tokenizer.encode_prompt(example["prompt"])}
                for example in TASKS["countdown"].load("train", count=96)]
    rows = 12 if quick else 96
    prompt, attn_mask = pad_left([example["ids"] for example in examples[:rows]], tokenizer.eos_id, device)
    for t in (0.0, 0.9):
        yield Case(f"sampler, T {t:g}, {rows} x ({prompt.shape[1]} + 32)",
                   sampler(model, prompt, attn_mask, t, tokenizer.eos_id, **SCHEDULE), rows * 32)
        if not quick:
            yield Case(f"sampler, T {t:g}, 24 x ({prompt.shape[1]} + 32), all to the end",
                       sampler(model, prompt[:24], attn_mask[:24], t, **SCHEDULE), 24 * 32)
    large = build_model(device, dtype, **LARGE_VOCABULARY)
    shapes = [(1, 200, 256, 32)] if quick else [(2, 200, 256, 32), (1, 200, 256, 32), (6, 17, 32, 8)]
    for t in (0.9,) if quick else (0.0, 0.9):
        for rows, prompt_length, gen_length, block_length in shapes:
            yield Case(f"sampler, T {t:g}, V 126,464, a step of {rows} x ({prompt_length} + {gen_length})",
                       average_step(large, rows, prompt_length, gen_length, block_length, t), 2 * rows)
    if not quick:
        yield Case("update phase, mu 2, 1 x 6, V 126,464", update_phase(make_policy(large, 16), 1, 18, 32, mu=2))
        shaped = build_model(device, dtype, **SHAPE_OF_8B)
        for t in (0.0, 0.9):
            yield Case(f"sampler, T {t:g}, 8B's proportions, a step of 6 x (200 + 256)",
                       average_step(shaped, 6, 200, 256, 32, t), 12)
    policy = make_policy(model)
    prompts, mu = (8, 2) if quick else (16, 12)
    yield Case(f"update phase, mu {mu}, {prompts} x 6", update_phase(policy, prompts, 18, 32, mu))
    yield Case(f"whole step, T 0.9, mu {mu}, 4 x 6", whole_step(policy, tokenizer, examples, 4, mu, SCHEDULE), 24 * 32)


def cases_8b(device, dtype, quick, shape=FULL_8B, prompt_length=200):
    """The same for LLaDA-8B's shape, built on the device, in d1's settings, with LoRA in the updates."""
    model, tokenizer = build_model(device, dtype, **shape), Tokenizer.from_folder(TINY)
    length, mu = (32, 2) if quick else (256, 12)
    schedule = {"gen_length": length, "diffusion_steps": length // 2, "block_length": 32}
    for rows in (6, 1):
        prompt = torch.randint(600, (rows, prompt_length), generator=generator("prompt")).to(device)
        for t in (0.0, 0.9):
            yield Case(f"sampler, T {t:g}, {rows} x ({prompt_length} + {length})",
                       sampler(model, prompt, None, t, **schedule), rows * length)
    policy = make_policy(model, lora_r=128)
    yield Case(f"update phase, mu {mu}, 1 x 6", update_phase(policy, 1, prompt_length, length, mu))
    example = TASKS["countdown"].load("train", count=1)[0] | {"ids": prompt[0].tolist()}
    yield Case(f"whole step, T 0.9, mu {mu}, 1 x 6", whole_step(policy, tokenizer, [example], 1, mu, schedule),
               6 * length)


def time_rows(case, times, peak, device):
    """The rows of a case for the table: ours, and the fast variant, beside the published side. peak may be None."""
    rows = []
    for name in list(case.works)[1:]:
        work, ratio = case.works[name], times["published"] / times[name]
        row = {"what": case.words + ", fast" * (name == "fast"), "published": f"{times['published']:.3f} s",
               "ours": f"{times[name]:.3f} s", "ratio": f"{ratio:.2f}"}
        if case.tokens:
            row["tokens/s"] = f"{case.tokens / times[name]:.0f}"
        if peak:
            row["limit"] = f"{count_flops(work) / times[name] / peak:.0%}"
        if device.type == "cuda":
            row["memory"] = f"{peak_memory(case.works['published']) / 1e9:.2f} -> {peak_memory(work) / 1e9:.2f} GB"
        rows.append(row)
    return rows


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller sizes")
    parser.add_argument("--json", metavar="FILE", help="write the ratios there")
    parser.add_argument("--size", choices=("embedded", "8b"), default="embedded")
    parser.add_argument("--rounds", type=number(int, 1), help="default: 5, with --quick 2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(args):
    """Print the table and return its rows."""
    device, start = torch.device(args.device), time.monotonic()
    dtype = torch.bfloat16 if args.size == "8b" else torch.float32
    rounds = args.rounds or (2 if args.quick else 5)
    limit = QUICK_LIMIT if args.quick else float("inf")
    peak, rows = peak_flops(device, dtype), []
    make_cases = cases_8b if args.size == "8b" else cases_embedded
    for case in make_cases(device, dtype, args.quick):
        times = by_turns(case.works, rounds, device, limit)
        rows += time_rows(case, times, None if args.quick else peak, device)  # counting takes longer than a run
        print(rows[-1], file=sys.stderr, flush=True)
    print_table(rows)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{name}, {str(dtype).removeprefix('torch.')}, medians of {rounds}, {peak / 1e9:.0f} GFLOP/s in a matrix "
          f"product, {time.monotonic() - start:.0f} s in all")
    if args.json:
        ratios = {row["what"].strip(): float(row["ratio"]) for row in rows}
        Path(args.json).write_text(json.dumps(ratios, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    main(parse_args())
