"""The sampler: semi-autoregressive low-confidence remasking (LLaDA, section 2.4), and what is done with it.

    canvas = prompt + gen_length x [MASK]
    for each block, left to right, in diffusion_steps / blocks rounds:
        predict every masked token of the block; commit the most confident ones; leave the rest masked

Faster, and no longer the same (Fast-dLLM, arXiv:2505.22618): --threshold commits all tokens it is sure of, in fewer
rounds; --cache computes what lies outside the block in the block's first round only.

`generate` works on tensors; `complete` turns prompts into texts and is the one path for RL rollouts and for evaluation.

    python sample.py --task countdown                        evaluate, every generation in a JSONL file
    python sample.py --task all --gen_length 128 256 512     the paper's table
    python sample.py --regrade FOLDER                        grade generations again, ours or the d1 authors'
    python sample.py --task countdown --watch                watch one problem being solved
    python sample.py --prompt "What is 7 * 3?"               answer
"""
import argparse
import json
import math
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F

from d1 import completion_mask, generator
from data import TASKS
from data.published import PREFILL, beside_the_paper, find_generations, grade, graded_row, paper, table
from data.tokenizer import Tokenizer
from model import Config, LLaDA, at_least_float32, find_checkpoint
from parallel import (STOPPED, Run, Signals, Stopped, compile_blocks, compile_time, fill_defaults, free_folder, jsonl,
                      one_line_errors, pick_dtype, processes, progress, whole_lines, write_text)

# option: (the paper's value, the embedded model's)
SAMPLING = {"gen_length": (256, 32), "diffusion_steps": (128, 32), "block_length": (32, 8), "rollout_batch": (8, 128),
            "cache": (None, None), "threshold": (None, None)}
# what a resumed evaluation may not change
FIXED = ("task", "split", "data", "model", "published_prompts", "seed", "diffusion_steps", "block_length",
         "temperature", "cfg_scale", "remasking", "cache", "threshold", "dtype")


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


def check_schedule(gen_length, diffusion_steps, block_length, threshold=None, remasking="low_confidence"):
    """Raises ValueError naming the valid values where the canvas does not divide into blocks and rounds."""
    if threshold is not None:
        if not 0 < threshold <= 1:
            raise ValueError(f"--threshold {threshold} must lie in (0, 1]: it is a probability")
        if remasking == "random":
            raise ValueError("--threshold needs --remasking low_confidence: it compares confidences")
        diffusion_steps = gen_length  # at most
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


def row_noise(keys, diffusion_steps, block_length):
    """(B, diffusion_steps, 2, block_length) float64 in [0, 1), each row's from a generator made of its key.

    So they depend neither on the rows around it, which may leave the batch, nor on processes or device.
    """
    shape = (diffusion_steps, 2, block_length)
    return torch.stack([torch.rand(shape, generator=generator(*key), dtype=torch.float64) for key in keys])


def predict(model, x, attn_mask, masked, mask_id, cfg_scale, given, caches=(None, None), start=0):
    """Logits (B, M, V) of the masked positions, under classifier-free guidance if cfg_scale > 0.

    That is un + (1 + scale) (cond - un), where un sees every given token masked. caches: of cond and un; start: the
    position at which x begins, if they are filled.
    """
    options = dict(attn_mask=attn_mask, keep=masked - start, start=start)
    logits = model(x, cache=caches[0], **options)
    if cfg_scale:
        unconditional = model(x.masked_fill(given, mask_id), cache=caches[1], **options)
        logits = unconditional + (cfg_scale + 1) * (logits - unconditional)
    return at_least_float32(logits)


def choose(logits, temperature, uniform, mask_id):
    """A token for every position, never [MASK]: drawn from softmax(logits / temperature), the argmax at 0.

    logits (B, M, V), uniform (B, M) float64 -> (B, M). LLaDA takes the argmax of logits + temperature * Gumbel noise:
    the same distribution, but V random numbers and 2 V logarithms per position where looking one number up in the
    cumulative distribution does. All in float64, or the tail is never sampled (arXiv:2409.02908).
    """
    logits = logits.clone()
    logits[..., mask_id] = -torch.inf
    if not temperature:
        return logits.argmax(-1)
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)  # (B, M, V)
    found = torch.searchsorted(cumulative, uniform[..., None] * cumulative[..., -1:], right=True)
    return found[..., 0].clamp(max=logits.shape[-1] - 1)  # should the product round up to the whole


def committed(confidence, fillable, count, threshold):
    """(B, M) bool: the `count` most confident tokens of a row; with a threshold all above it, at least the first.

    confidence (B, M): log-probabilities; fillable (B, M) bool, without a threshold all True, in each row at the front.
    """
    if threshold is None:
        best = confidence.argsort(dim=1, descending=True)[:, :count]
        return torch.zeros_like(fillable).scatter(1, best, True)
    confidence = confidence.masked_fill(~fillable, -torch.inf)
    return (confidence > math.log(threshold)).scatter(1, confidence.argmax(dim=1, keepdim=True), True)


@torch.no_grad()
def generate(model, prompt, *, mask_id, gen_length, diffusion_steps, block_length, temperature=0.0, noise=None,
             attn_mask=None, cfg_scale=0.0, remasking="low_confidence", forbid=(), commit_last=(), eos_id=None,
             on_step=None, cache=None, threshold=None):
    """Fill gen_length masks after `prompt` (B, P), all rows in lockstep. Returns a Generation.

    noise: see `row_noise`, needed if temperature > 0 or remasking is "random"; attn_mask (B, P) bool, False at left
    padding; forbid: token ids that are never emitted (LLaDA's logits_eos_inf); commit_last: token ids whose positions
    are committed last (its confidence_eos_eot_inf, at any temperature); eos_id: a row leaves the batch after a block
    that holds it, the rest of its canvas is eos_id (LLaDA fills its canvas: None); on_step(x, unmasked_at, step):
    called after every round. Raises ValueError for an impossible schedule.

    cache: after a block's first round keys and values outside it stay as they are ("dual"), or those before it do
    ("prefix"). threshold: a round commits all tokens of a higher probability, at least one; a block has up to
    block_length rounds, whatever diffusion_steps, each of which counts as a step, and a row is left out of those it
    does not need.
    """
    check_schedule(gen_length, diffusion_steps, block_length, threshold, remasking)
    (B, P), T, forwards = prompt.shape, prompt.shape[1] + gen_length, 0
    rounds = block_length if threshold else diffusion_steps * block_length // gen_length
    x = F.pad(prompt, (0, gen_length), value=mask_id)  # (B, T)
    given = x != mask_id
    if (given.sum(1) != (P if cache or threshold else given[0].sum())).any():  # LLaDA fills those too
        raise ValueError("the rows of a batch must have equally many [MASK] in their prompts, with cache or threshold "
                         "none")
    unmasked_at = torch.where(given, -1, -2)  # -2: still masked
    if attn_mask is not None:
        attn_mask = F.pad(attn_mask, (0, gen_length), value=True)  # (B, T)
    rows = torch.arange(B, device=x.device)[:, None]  # (R, 1): those that go on
    for block, begin in enumerate(range(P, T, block_length)):
        end, going = begin + block_length, rows  # going (R, 1): those with masks left in this block
        masked = (x[rows[:, 0], :end] == mask_id).nonzero()[:, 1].view(len(rows), -1)  # (R, M) positions
        span, caches = slice(0, T), ([], []) if cache else (None, None)  # the first round computes and keeps all of it
        for step, count in enumerate(num_transfer_tokens(block_length, rounds), block * rounds):
            live = going[:, 0]
            live_mask = None if attn_mask is None else attn_mask[live]
            # only what is masked goes through the last layer's queries and MLP, the head, and the draws
            logits = predict(model, x[live, span], live_mask, masked, mask_id, cfg_scale, given[live, span], caches,
                             span.start)  # (R, M, V)
            if forbid:
                logits[..., list(forbid)] = -torch.inf
            draws = (None, None) if noise is None else noise[live, step, :, :masked.shape[1]].unbind(1)  # (R, M) each
            tokens = choose(logits, temperature, draws[0], mask_id)  # (R, M)
            if remasking == "random":
                confidence = draws[1]
            else:  # the log-probability of the token without noise
                if commit_last:
                    logits[..., list(commit_last)] = -torch.inf
                confidence = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]  # (R, M)
            fillable = x[going, masked] == mask_id  # (R, M)
            chosen = committed(confidence, fillable, count, threshold)  # (R, M)
            x[going, masked] = torch.where(chosen, tokens, x[going, masked])
            unmasked_at[going, masked] = torch.where(chosen, step, unmasked_at[going, masked])
            forwards += 2 if cfg_scale else 1
            if on_step:
                on_step(x, unmasked_at, step + 1)
            left, most = fillable & ~chosen, masked.shape[1] - count  # known without waiting for the device
            if threshold:  # rows differ in what they have left; one that has nothing waits for the next block
                more = left.any(1)
                going, masked, left = going[more], masked[more], left[more]
                if not len(going):
                    break
                most = int(left.sum(1).max())
                for kept in chain(*caches) if cache else ():
                    kept[:] = [tensor[more] for tensor in kept]
            masked = masked.gather(1, left.int().argsort(dim=1, descending=True, stable=True)[:, :most])
            if cache:
                span = slice(begin, end if cache == "dual" else T)
        if eos_id is not None and not masked.numel():  # else a mask of the prompt is left, and nothing is final
            ended = (x[rows[:, 0], begin:end] == eos_id).any(1)
            done, rows = rows[ended, 0], rows[~ended]
            x[done, end:] = eos_id
            unmasked_at[done, end:] = unmasked_at[done].amax(1, keepdim=True)
            if not len(rows):
                break
    return Generation(x, unmasked_at, forwards)


def pad_left(rows, pad_id, device):
    """Lists of ids -> (B, P) padded on the left, and (B, P) bool, False at padding, or None if nothing was padded."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    attn_mask = torch.arange(width, device=device) >= width - lengths[:, None]
    return ids, None if bool(attn_mask.all()) else attn_mask


def complete(model, tokenizer, prompts, *, keys, rollout_batch, gen_length, diffusion_steps, block_length,
             fill_canvas=False, threshold=None, **sampling):
    """One completion for each prompt, a text or token ids, in order: the one path for rollouts and for evaluation.

    keys: one tuple per prompt, the key of its noise; rollout_batch: rows per forward pass; fill_canvas: go on after
    EOS, where every process must run as many forward passes; the rest goes to `generate`. All that follows the first
    EOS comes back as EOS. The result depends neither on rollout_batch nor on fill_canvas, up to rounding.
    """
    device, parts, noisy = next(model.parameters()).device, [], gen_length if threshold else diffusion_steps
    rows = [tokenizer.encode_prompt(p) if isinstance(p, str) else p for p in prompts]
    for start in range(0, len(rows), rollout_batch):
        batch = slice(start, start + rollout_batch)
        ids, attn_mask = pad_left(rows[batch], tokenizer.eos_id, device)
        done = generate(model, ids, attn_mask=attn_mask, mask_id=tokenizer.mask_id, gen_length=gen_length,
                        diffusion_steps=diffusion_steps, block_length=block_length,
                        noise=row_noise(keys[batch], noisy, block_length).to(device), threshold=threshold,
                        eos_id=None if fill_canvas else tokenizer.eos_id, **sampling)
        parts.append((done.ids[:, -gen_length:], done.unmasked_at[:, -gen_length:]))
    ids, unmasked_at = (torch.cat(tensors) for tensors in zip(*parts))  # (R, L) each
    counted = completion_mask(ids, tokenizer.eos_id)
    ids = ids.masked_fill(~counted, tokenizer.eos_id)
    lengths = (counted & (ids != tokenizer.eos_id)).sum(-1)
    return Completions(ids, [tokenizer.decode(row) for row in ids.tolist()], lengths, unmasked_at)


def encode_prompts(examples, tokenizer, room, procs):
    """Give each example its "ids": the prompt, then what its completion must begin with ("prefill", if it has one).

    Returns the examples without those of more than `room` tokens, which are counted and reported, never cut.
    """
    for example in examples:
        example["ids"] = tokenizer.encode_prompt(example["prompt"]) + tokenizer.encode(example.get("prefill", ""))
    fitting = [example for example in examples if len(example["ids"]) <= room]
    if len(fitting) < len(examples):
        procs.print(f"skipped {len(examples) - len(fitting)} of {len(examples)} prompts: they leave no room for the "
                    f"completion, which begins at {room} tokens at the latest")
    return fitting


def evaluate(model, tokenizer, task, examples, procs, seed, describe="evaluate", droppable=nullcontext, rows=(),
             keep=None, **sampling):
    """Complete every example and score it. Returns ({metric: mean}, rows): all rows, in order, on every process.

    A row holds the example, its index, completion and metrics, its effective tokens (before the first EOS), whether it
    ended, and the rounds it took. droppable: of parallel.Signals, where a signal may end the work; rows: those that are
    done already; keep(rows): is given those of each round of batches. Prompts of like length share a batch, the longest
    first: little padding, and what does not fit into memory fails at once.
    """
    rows, size = list(rows), sampling["rollout_batch"] * procs.world
    prompts = [example.get("ids") or example["prompt"] for example in examples]
    missing = sorted(set(range(len(examples))) - {row["index"] for row in rows}, key=lambda i: (-len(prompts[i]), i))
    model.eval()
    for start, show in progress(range(0, len(missing), size), procs, describe):
        indices = missing[start:start + size]
        part = indices[procs.rank::procs.world] or indices[:1]  # nobody idle: all run equally many forward passes
        with droppable() as check:
            done = complete(model, tokenizer, [prompts[i] for i in part],
                            keys=[(seed, "evaluate", i) for i in part], on_step=check, **sampling)
        found = {}
        numbers = done.lengths.tolist(), done.unmasked_at.tolist()
        for i, text, length, steps in zip(part, done.texts, *numbers):
            text, example = examples[i].get("prefill", "") + text, {**examples[i]}
            example.pop("ids", None)
            found[i] = {"index": i, **example, "completion": text, **task.score(text, example),
                        "effective_tokens": length, "ended": length < sampling["gen_length"],
                        "rounds": len({*steps})}
        found = {row["index"]: row for row in procs.gather(list(found.values()))}
        rows += found.values()
        if keep:
            keep(list(found.values()))
        show(accuracy=f"{sum(row['accuracy'] for row in rows) / len(rows):.1%}")
    names = [*task.score("", examples[0]), "effective_tokens", "rounds"]
    rows.sort(key=lambda row: row["index"])
    return {name: sum(row[name] for row in rows) / len(rows) for name in names}, rows


# ---------------------------------------------------------------- command line

def add_sampling_options(p, several=False):
    p.add_argument("--gen_length", type=int, nargs="+" if several else None,
                   help="completion tokens" + ", one or several" * several + "; d1: 256")
    p.add_argument("--diffusion_steps", type=int, help="forward passes per completion; d1: gen_length / 2")
    p.add_argument("--block_length", type=int, help="tokens per block, filled left to right; d1: 32")
    p.add_argument("--rollout_batch", type=int, help="rows per forward pass while sampling")
    p.add_argument("--cache", choices=("prefix", "dual"), help="approximate: compute keys and values before the block "
                   "(dual: and behind it) only in its first round; Fast-dLLM: dual")
    p.add_argument("--threshold", type=float, help="approximate: commit all tokens of a higher probability, at least "
                   "one a round, whatever --diffusion_steps; Fast-dLLM: 0.9")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="data/tiny", help="checkpoint folder or hub id")
    p.add_argument("--prompt", help="answer this prompt")
    p.add_argument("--watch", action="store_true", help="show the canvas filling in, coloured by step")
    p.add_argument("--task", choices=(*sorted(TASKS), "all"),
                   help="evaluate this task, or all; with --watch, show one of its problems")
    p.add_argument("--regrade", nargs="+", metavar="PATH", help="grade files of generations, or all in a folder")
    p.add_argument("--split", default="test", help="test (held out) or train")
    p.add_argument("--data", help="a file of problems, a folder with the published ones, or a dataset id; default: "
                   "generated problems for countdown and sudoku, the public dataset for gsm8k and math500")
    p.add_argument("--count", type=int, help="how many problems; default: all there are, or 512 generated ones")
    p.add_argument("--published_prompts", action="store_true",
                   help="the prompts of the d1 authors' evaluation (answer in a box) instead of training's")
    p.add_argument("--out", help="folder for <task>_<length>.jsonl and summary.json, default runs/sample-<task>")
    p.add_argument("--resume", action="store_true", help="go on with the half-finished evaluation in --out")
    p.add_argument("--seed", type=int, default=0)
    add_sampling_options(p, several=True)
    p.add_argument("--temperature", type=float, default=0.0, help="of the draws; d1: 0 in evaluation, 0.9 in RL")
    p.add_argument("--cfg_scale", type=float, default=0.0, help="classifier-free guidance; d1: 0")
    p.add_argument("--remasking", choices=("low_confidence", "random"), default="low_confidence")
    p.add_argument("--compile", action="store_true", help="compile the blocks: slower to start, pays in long runs")
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
    on_step = watcher(tokenizer, ids.shape[1], sampling["diffusion_steps"]) if args.watch else None
    done = complete(model, tokenizer, [prompt], keys=[(args.seed, "answer")], on_step=on_step, fill_canvas=args.watch,
                    **sampling)
    if not args.watch or not sys.stdout.isatty():
        print(done.texts[0])


def pick_schedules(args, config):
    """[(gen_length, diffusion_steps)]: steps that are not given keep the share of the length they have by default."""
    usual = argparse.Namespace(**dict.fromkeys(SAMPLING))
    fill_defaults(usual, SAMPLING, config)
    given = args.diffusion_steps
    fill_defaults(args, SAMPLING, config)
    lengths = args.gen_length if isinstance(args.gen_length, list) else [args.gen_length]
    schedules = [(length, length if args.threshold is not None else  # at most
                  given or max(1, length * usual.diffusion_steps // usual.gen_length)) for length in lengths]
    for length, steps in schedules:
        check_schedule(length, steps, args.block_length, args.threshold, args.remasking)
    return schedules


def read_problems(args, task, tokenizer, room, procs):
    """The encoded problems of one task."""
    examples = TASKS[task].load(args.split, data=args.data, count=args.count)
    if args.published_prompts:
        examples = [{**e, "prompt": TASKS[task].published_prompt(e), "prefill": PREFILL} for e in examples]
    examples = encode_prompts(examples, tokenizer, room, procs)
    if not examples:
        raise ValueError(f"no problems of {task} to evaluate: --count must be at least 1")
    return examples


def read_done(path, examples):
    """The rows of an evaluation that was interrupted; a last line that is torn is dropped, also from the file."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in whole_lines(path)]
    for row in rows:
        if row["index"] >= len(examples) or row["prompt"] != examples[row["index"]]["prompt"]:
            raise ValueError(f"{path}, row {row['index'] + 1}: of other problems than these, name another --out")
    write_text(path, jsonl(rows))
    return rows


def evaluate_into(run, task, model, tokenizer, examples, procs, signals, seed, sampling):
    """One evaluation, its rows written as they come, in the end in order. Returns what summary.json says of it."""
    file, start = f"{task}_{sampling['gen_length']}.jsonl", time.monotonic()
    with one_line_errors():
        done = procs.gather(read_done(run.out / file, examples) if procs.is_main else [])
    metrics, rows = evaluate(model, tokenizer, TASKS[task], examples, procs, seed, file.removesuffix(".jsonl"),
                             droppable=signals.droppable, rows=done, keep=lambda new: run.log(file, new), **sampling)
    if procs.is_main:
        write_text(run.out / file, jsonl(rows))
    seconds, new = time.monotonic() - start, len(rows) - len(done)
    if hasattr(TASKS[task], "published"):
        metrics |= grade(TASKS[task], [graded_row(row) for row in rows])
    return {"task": task, "gen_length": sampling["gen_length"], "diffusion_steps": sampling["diffusion_steps"],
            "problems": len(rows), **metrics, "tokens_per_second": new * sampling["gen_length"] / seconds,
            "seconds": seconds}


def regrade(paths):
    """Print a table of generations that lie in files. Returns {name: result}."""
    results = {}
    for name, (task, length, rows) in find_generations(paths, TASKS).items():
        results[name] = {"problems": len(rows), **grade(TASKS[task], rows),
                         "paper": paper("LLaDA-8B-Instruct", task, length)}
    print(table([{"generations": name, **result} for name, result in results.items()]))
    return results


def main(args):
    if args.regrade:
        with one_line_errors():
            return regrade(args.regrade)
    with processes(args.device) as procs, Signals(procs) as signals:
        with one_line_errors():
            if args.prompt is None and args.task is None:
                raise ValueError("--task, --prompt or --regrade is needed: what should be done?")
            tasks = sorted(TASKS) if args.task == "all" else [args.task] if args.task else []
            if len(tasks) > 1 and args.data and Path(args.data).is_file():
                raise ValueError(f"--data {args.data}: one file cannot hold the problems of all tasks, name a folder")
            folder = find_checkpoint(args.model)
            config = Config.from_folder(folder)
            schedules = pick_schedules(args, config)
            if args.temperature < 0 or args.rollout_batch < 1:
                raise ValueError("--temperature must not be negative and --rollout_batch must be at least 1")
            dtype, answering = pick_dtype(args.dtype, procs.device), args.prompt is not None or args.watch
            if not answering:
                out = args.out or f"runs/sample-{args.task}"
                run = Run(out if args.out or args.resume else free_folder(out),
                          {**vars(args), "device": procs.device, "dtype": dtype}, procs, args.resume, FIXED)
            tokenizer = Tokenizer.from_folder(folder, config)
            room = config.max_sequence_length - max(length for length, _ in schedules)
            problems = {task: read_problems(args, task, tokenizer, room, procs) for task in tasks}
            sampling = {name: getattr(args, name) for name in (*SAMPLING, "temperature", "cfg_scale", "remasking")}
            sampling["gen_length"], sampling["diffusion_steps"] = schedules[0]
            model = LLaDA.from_pretrained(folder, procs.device, dtype, compile_blocks if args.compile else None).eval()
            if not answering:
                run.open()
        if answering:
            prompt = args.prompt if args.prompt is not None else problems[tasks[0]][0]["prompt"]
            if args.prompt is None:
                print(prompt.split("\n\n", 2)[-1] + "\n")
            return answer(model, tokenizer, prompt, args, sampling)
        results = []
        try:
            for task, examples in problems.items():
                for length, steps in schedules:
                    results.append(evaluate_into(run, task, model, tokenizer, examples, procs, signals, args.seed,
                                                 sampling | {"gen_length": length, "diffusion_steps": steps}))
        except Stopped:
            procs.print(f"stopped; the same command with --resume --out {run.out} goes on")
            raise SystemExit(STOPPED) from None
        settings = {"model": args.model, "data": args.data, "split": args.split, "device": str(procs.device),
                    "dtype": str(dtype).removeprefix("torch."), "processes": procs.world, "seed": args.seed,
                    **{name: getattr(args, name) for name in (
                        "rollout_batch", "block_length", "cache", "threshold", "temperature", "cfg_scale",
                        "remasking", "published_prompts")}}
        summary = {**settings, "results": results}
        run.finish(summary)
        hidden = ("seconds", "diffusion_steps")
        procs.print(table([{k: v for k, v in result.items() if k not in hidden} for result in results])
                    + beside_the_paper(results, args.model))
        procs.print(" ".join(f"{name}={value}" for name, value in settings.items() if value is not None))
        procs.print(f"every generation is in {run.out}" + (f"; {compile_time()}" if args.compile else ""))
        return summary


if __name__ == "__main__":
    main(parse_args())
