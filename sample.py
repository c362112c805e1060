"""The sampler: semi-autoregressive low-confidence remasking (LLaDA, section 2.4), and what is done with it.

    canvas = prompt + gen_length x [MASK]
    for each block, left to right, in diffusion_steps / blocks rounds:
        predict every masked token of the block; commit the most confident ones; leave the rest masked

`generate` works on tensors; `complete` turns prompts into texts and is the one path for RL rollouts and for evaluation.

    python sample.py --task countdown --split test           evaluate, every generation in a JSONL file
    python sample.py --task countdown --watch                watch one problem being solved
    python sample.py --prompt "What is 7 * 3?"               answer
"""
import argparse
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from d1 import completion_mask, generator
from data import TASKS
from data.tokenizer import Tokenizer
from model import Config, LLaDA, find_checkpoint
from parallel import Run, fill_defaults, free_folder, one_line_errors, pick_dtype, processes, progress

# option: (the paper's value, the embedded model's)
SAMPLING = {"gen_length": (256, 32), "diffusion_steps": (128, 32), "block_length": (32, 8), "rollout_batch": (8, 128)}


@dataclass
class Generation:
    """ids (B, T); unmasked_at (B, T), the step that committed each token, -1 if given; forwards: network calls."""
    ids: torch.Tensor
    unmasked_at: torch.Tensor
    forwards: int


@dataclass
class Completions:
    """ids, unmasked_at (R, L); texts: R strings, cut at the first EOS; lengths (R,): tokens before the first EOS."""
    ids: torch.Tensor
    texts: list
    lengths: torch.Tensor
    unmasked_at: torch.Tensor


def check_schedule(gen_length, diffusion_steps, block_length):
    """Raises ValueError naming the valid values where the canvas does not divide into blocks and rounds."""
    if min(gen_length, diffusion_steps, block_length) < 1:
        raise ValueError("--gen_length, --diffusion_steps and --block_length must be at least 1")
    if gen_length % block_length:
        valid = [b for b in range(1, gen_length + 1) if gen_length % b == 0]
        raise ValueError(f"--block_length {block_length} does not divide --gen_length {gen_length}: use one of {valid}")
    blocks = gen_length // block_length
    if diffusion_steps % blocks or diffusion_steps > gen_length:
        raise ValueError(f"--diffusion_steps {diffusion_steps} must be a multiple of the {blocks} blocks and at most "
                         f"--gen_length: use one of {list(range(blocks, gen_length + 1, blocks))}")


def num_transfer_tokens(masked, rounds):
    """How many tokens each round commits: as even as possible, the larger rounds first."""
    return [masked // rounds + (i < masked % rounds) for i in range(rounds)]


def row_noise(keys, device):
    """uniform(window, *size): float64 draws (B, window, *size), each row from its own generator made of its key.

    So a row's noise does not depend on the rows around it, nor on the number of processes.
    """
    generators = [generator(*key, device=device) for key in keys]

    def uniform(window, *size):
        shape = (window.stop - window.start, *size)
        return torch.stack([torch.rand(shape, generator=g, dtype=torch.float64, device=device) for g in generators])
    return uniform


def predict(model, x, attn_mask, window, mask_id, cfg_scale, given):
    """Logits (B, W, V) of the window, under classifier-free guidance if cfg_scale > 0: un + (1 + scale) (cond - un)."""
    logits = model(x, attn_mask=attn_mask, keep=window)
    if cfg_scale:
        unconditional = model(x.masked_fill(given, mask_id), attn_mask=attn_mask, keep=window)
        logits = unconditional + (cfg_scale + 1) * (logits - unconditional)
    return logits


def choose(logits, temperature, uniform, window, mask_id):
    """The token of every position: argmax of logits + temperature * Gumbel noise, never [MASK]. (B, W, V) -> (B, W).

    Float64 noise: with bfloat16 noise the tail of the distribution is never sampled (arXiv:2409.02908).
    """
    if temperature:
        logits = logits.double() - temperature * (-uniform(window, logits.shape[-1]).log()).log()
    else:
        logits = logits.clone()
    logits[..., mask_id] = -torch.inf
    return logits.argmax(-1)


@torch.no_grad()
def generate(model, prompt, *, mask_id, gen_length, diffusion_steps, block_length, temperature=0.0, uniform=None,
             attn_mask=None, cfg_scale=0.0, remasking="low_confidence", forbid=(), commit_last=(), on_step=None):
    """Fill gen_length masks after `prompt` (B, P), all rows in lockstep. Returns a Generation.

    attn_mask (B, P) bool, False at left padding; uniform: see `row_noise`, needed if temperature > 0 or remasking is
    "random"; forbid: token ids that are never emitted (LLaDA's logits_eos_inf); commit_last: token ids whose positions
    are committed last (its confidence_eos_eot_inf, at any temperature); on_step(x, unmasked_at, step): called after
    every round. Raises ValueError for an impossible schedule.
    """
    check_schedule(gen_length, diffusion_steps, block_length)
    P, blocks, step = prompt.shape[1], gen_length // block_length, 0
    x = F.pad(prompt, (0, gen_length), value=mask_id)  # (B, T)
    given = x != mask_id
    unmasked_at = torch.where(given, -1, -2)  # -2: still masked
    if attn_mask is not None:
        attn_mask = F.pad(attn_mask, (0, gen_length), value=True)  # (B, T)
    prompt_has_masks = not bool(given[:, :P].all())  # LLaDA fills those too
    for end in range(P + block_length, P + gen_length + 1, block_length):
        window = slice(0 if prompt_has_masks else end - block_length, end)
        for count in num_transfer_tokens(block_length, diffusion_steps // blocks):
            logits = predict(model, x, attn_mask, window, mask_id, cfg_scale, given)  # (B, W, V)
            logits[..., list(forbid)] = -torch.inf
            tokens = choose(logits, temperature, uniform, window, mask_id)  # (B, W)
            if remasking == "random":
                confidence = uniform(window)
            else:  # the log-probability of the token without noise
                logits[..., list(commit_last)] = -torch.inf
                confidence = logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)  # (B, W)
                confidence = confidence.clamp(min=torch.finfo(confidence.dtype).min)  # -inf is for what is not masked
            confidence = confidence.masked_fill(x[:, window] != mask_id, -torch.inf)
            chosen = confidence.topk(count, dim=1).indices  # (B, count)
            x.scatter_(1, chosen + window.start, tokens.gather(1, chosen))
            unmasked_at.scatter_(1, chosen + window.start, step)
            step += 1
            if on_step:
                on_step(x, unmasked_at, step)
    return Generation(x, unmasked_at, step * (2 if cfg_scale else 1))


def pad_left(rows, pad_id, device):
    """Lists of ids -> (B, P) padded on the left, and (B, P) bool, False at padding, or None if nothing was padded."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    attn_mask = torch.arange(width, device=device) >= width - lengths[:, None]
    return ids, None if bool(attn_mask.all()) else attn_mask


def complete(model, tokenizer, prompts, *, keys, rollout_batch, gen_length, **sampling):
    """One completion for each prompt, a text or token ids, in order: the one path for rollouts and for evaluation.

    keys: one tuple per prompt, the key of its noise; rollout_batch: rows per forward pass; the rest goes to `generate`.
    The result does not depend on rollout_batch, up to rounding.
    """
    device, parts = next(model.parameters()).device, []
    rows = [tokenizer.encode_prompt(p) if isinstance(p, str) else p for p in prompts]
    for start in range(0, len(rows), rollout_batch):
        batch = slice(start, start + rollout_batch)
        ids, attn_mask = pad_left(rows[batch], tokenizer.eos_id, device)
        done = generate(model, ids, attn_mask=attn_mask, mask_id=tokenizer.mask_id, gen_length=gen_length,
                        uniform=row_noise(keys[batch], device), **sampling)
        parts.append((done.ids[:, -gen_length:], done.unmasked_at[:, -gen_length:]))
    ids, unmasked_at = (torch.cat(tensors) for tensors in zip(*parts))  # (R, L) each
    lengths = (completion_mask(ids, tokenizer.eos_id) & (ids != tokenizer.eos_id)).sum(-1)
    return Completions(ids, [tokenizer.decode(row) for row in ids.tolist()], lengths, unmasked_at)


def evaluate(model, tokenizer, task, examples, procs, seed, describe="evaluate", droppable=nullcontext, **sampling):
    """Complete every example and score it. Returns ({metric: mean}, rows): all rows, in order, on every process.

    Each row holds the example's index, prompt, completion, its metrics and its effective tokens (before the first EOS).
    droppable: of parallel.Signals, where a signal may end the work.
    """
    indices, rows = [i for i, _ in procs.deal(len(examples))], []
    size = sampling["rollout_batch"]
    model.eval()
    with droppable() as check:
        for start, show in progress(range(0, len(indices), size), procs, describe):
            part = indices[start:start + size]
            done = complete(model, tokenizer, [examples[i]["prompt"] for i in part], on_step=check,
                            keys=[(seed, "evaluate", i) for i in part], **sampling)
            for i, text, length in zip(part, done.texts, done.lengths.tolist()):
                metrics = task.score(text, examples[i])
                rows.append({"index": i, "prompt": examples[i]["prompt"], "completion": text, **metrics,
                             "effective_tokens": length})
            show(accuracy=f"{sum(r['accuracy'] for r in rows) / len(rows):.1%}")
    rows = sorted({row["index"]: row for row in procs.gather(rows)}.values(), key=lambda row: row["index"])
    names = [name for name in rows[0] if name not in ("index", "prompt", "completion")]
    return {name: sum(row[name] for row in rows) / len(rows) for name in names}, rows


# ---------------------------------------------------------------- command line

def add_sampling_options(p):
    p.add_argument("--gen_length", type=int, help="completion tokens; d1: 256")
    p.add_argument("--diffusion_steps", type=int, help="forward passes per completion; d1: gen_length / 2")
    p.add_argument("--block_length", type=int, help="tokens per block, filled left to right; d1: 32")
    p.add_argument("--rollout_batch", type=int, help="rows per forward pass while sampling")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="data/tiny", help="checkpoint folder or hub id")
    p.add_argument("--prompt", help="answer this prompt")
    p.add_argument("--watch", action="store_true", help="show the canvas filling in, coloured by step")
    p.add_argument("--task", choices=sorted(TASKS), help="evaluate this task; with --watch, show one of its problems")
    p.add_argument("--split", default="test", help="test (held out) or train")
    p.add_argument("--data", help="evaluate the problems of this file instead of generated ones")
    p.add_argument("--count", type=int, help="how many problems; default: all of the file, or 512 generated ones")
    p.add_argument("--out", help="folder for generations.jsonl and summary.json, default runs/sample-<task>")
    p.add_argument("--seed", type=int, default=0)
    add_sampling_options(p)
    p.add_argument("--temperature", type=float, default=0.0, help="of the Gumbel noise; d1: 0 in evaluation, 0.9 in RL")
    p.add_argument("--cfg_scale", type=float, default=0.0, help="classifier-free guidance; d1: 0")
    p.add_argument("--remasking", choices=("low_confidence", "random"), default="low_confidence")
    p.add_argument("--device", help="cuda, cuda:1, cpu; default: a GPU where there is one")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    return p.parse_args(argv)


RAMP = (21, 27, 33, 39, 45, 51, 50, 48, 46, 82, 118, 154, 190, 226, 220, 214, 208, 202, 196)  # 256-colour, blue to red


def canvas_text(tokenizer, ids, unmasked_at, total, colour):
    """One row of the canvas as text: masks as a shade, EOS as a dot, tokens coloured by the step of their commit."""
    pieces = []
    for token, step in zip(ids, unmasked_at):
        text = "░" if token == tokenizer.mask_id else "·" if token == tokenizer.eos_id else tokenizer.decode([token])
        if colour and step >= 0 and text:
            shade = RAMP[step * (len(RAMP) - 1) // max(1, total - 1)]
            text = "\n".join(f"\x1b[38;5;{shade}m{line}\x1b[0m" if line else line for line in text.split("\n"))
        pieces.append(text)
    return "".join(pieces)


def watcher(tokenizer, prompt_length, total, out=None):
    """An on_step that redraws the completion in place on a terminal, and prints one line per step elsewhere."""
    out, drawn = sys.stdout if out is None else out, [0]  # drawn: lines of the last picture

    def show(x, unmasked_at, step):
        args = x[0, prompt_length:].tolist(), unmasked_at[0, prompt_length:].tolist(), total
        if not out.isatty():
            plain = canvas_text(tokenizer, *args, colour=False).replace("\n", "\\n")
            print(f"step {step:3d}/{total} {plain}", file=out)
            return
        width = shutil.get_terminal_size().columns
        lines = canvas_text(tokenizer, *args, colour=False).split("\n")
        if drawn[0]:
            print(f"\x1b[{drawn[0]}A\x1b[J", end="", file=out)
        legend = "".join(f"\x1b[38;5;{shade}m█\x1b[0m" for shade in RAMP)
        print(canvas_text(tokenizer, *args, colour=True), file=out)
        print(f"step {step}/{total}   first {legend} last", file=out, flush=True)
        drawn[0] = 1 + sum(max(1, -(-len(line) // width)) for line in lines)
        time.sleep(0.08)  # slow enough to see
    return show


def answer(model, tokenizer, prompt, args, sampling):
    """Print the answer to one prompt, watched or not."""
    ids, _ = pad_left([tokenizer.encode_prompt(prompt)], tokenizer.eos_id, next(model.parameters()).device)
    on_step = watcher(tokenizer, ids.shape[1], args.diffusion_steps) if args.watch else None
    done = complete(model, tokenizer, [prompt], keys=[(args.seed, "answer")], on_step=on_step, **sampling)
    if not args.watch or not sys.stdout.isatty():
        print(done.texts[0])


def main(args):
    with processes(args.device) as procs:
        with one_line_errors():
            folder = find_checkpoint(args.model)
            config = Config.from_folder(folder)
            fill_defaults(args, SAMPLING, config)
            check_schedule(args.gen_length, args.diffusion_steps, args.block_length)
            if args.temperature < 0 or args.rollout_batch < 1:
                raise ValueError("--temperature must not be negative and --rollout_batch must be at least 1")
            dtype = pick_dtype(args.dtype, procs.device)
            tokenizer = Tokenizer.from_folder(folder, config)
            if args.prompt is None and args.task is None:
                raise ValueError("--task or --prompt is needed: what should be answered?")
            sampling = {name: getattr(args, name) for name in (*SAMPLING, "temperature", "cfg_scale", "remasking")}
            if args.task:
                examples = TASKS[args.task].load(args.split, data=args.data, count=args.count)
                if not examples:
                    raise ValueError("no problems to evaluate: --count must be at least 1")
            model = LLaDA.from_pretrained(folder, procs.device, dtype).eval()
            if args.prompt is None and not args.watch:
                options = {**vars(args), "device": procs.device, "dtype": dtype}
                run = Run(args.out or free_folder(f"runs/sample-{args.task}"), options, procs).open()
        if args.prompt is not None or args.watch:
            prompt = args.prompt if args.prompt is not None else examples[0]["prompt"]
            if args.prompt is None:
                print(prompt.split("\n\n", 2)[-1] + "\n")
            return answer(model, tokenizer, prompt, args, sampling)
        start = time.monotonic()
        metrics, rows = evaluate(model, tokenizer, TASKS[args.task], examples, procs, args.seed, args.task, **sampling)
        seconds = time.monotonic() - start
        run.log("generations.jsonl", rows)
        summary = {"task": args.task, "problems": len(rows), **metrics,
                   "tokens_per_second": len(rows) * args.gen_length / seconds, "seconds": seconds, "model": args.model,
                   "device": str(procs.device), "dtype": str(dtype).removeprefix("torch."), **sampling,
                   "seed": args.seed}
        run.finish(summary)
        for name, value in summary.items():
            procs.print(f"{name:>18}  {value:.4g}" if isinstance(value, float) else f"{name:>18}  {value}")
        procs.print(f"every generation is in {run.out}/generations.jsonl")
        return summary


if __name__ == "__main__":
    main(parse_args())
