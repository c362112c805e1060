"""The sampler of d1: LLaDA's semi-autoregressive low-confidence remasking, and what is done with it.

    canvas = prompt + gen_length x [MASK]
    for each block, left to right, in diffusion_steps / blocks rounds:
        predict every masked token of the block; commit the most confident ones; leave the rest masked

`generate` works on tensors. `complete` turns prompts into texts, for RL rollouts and for evaluation alike.

    python sample.py --task countdown                        evaluate on held-out problems
    python sample.py --task countdown --watch                watch one problem being solved
    python sample.py --prompt "What is 7 * 3?"               answer
"""
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from d1 import completion_mask, generator
from data import TASKS
from data.tokenizer import Tokenizer
from model import Config, LLaDA, at_least_float32, find_checkpoint
from parallel import DEVICE_OPTIONS, compile_blocks, processes
from run import PRESETS, Run, make_parser

SAMPLING = {  # option: (the authors' value for LLaDA-8B, the embedded model's, what it is)
    "gen_length": (256, 32, "tokens of a completion"),
    "diffusion_steps": (128, 32, "denoising rounds of a completion, a multiple of the blocks"),
    "block_length": (32, 8, "tokens of a block, filled left to right"),
    "rollout_batch": (8, 128, "rows in a forward pass of the sampler"),
}
OPTIONS = {
    "what to do": {
        "prompt": (None, None, "answer this prompt"),
        "watch": (False, False, "show the canvas filling in, coloured by round"),
        "data": (None, None, "problems: a file, d1's dataset folder or a dataset id; default: the task's own"),
        "count": (0, 0, "how many problems; 0: all, or 512 generated ones"),
        "train_split": (False, False, "training problems instead of held-out ones"),
        "out": (None, None, "folder of the results; default: runs/sample-TASK-TIME"),
        "seed": (0, 0, "of all random numbers"),
    },
    "sampler": SAMPLING | {"temperature": (0.0, 0.0, "of the draws, 0 is greedy")},
    "device": DEVICE_OPTIONS,
}


def num_transfer_tokens(block_length, rounds):
    """How many tokens each round of a block commits: as even as possible, the larger rounds first."""
    return [block_length // rounds + (i < block_length % rounds) for i in range(rounds)]


def choose(logits, temperature, uniform, mask_id):
    """A token for every position, never [MASK]: the argmax at temperature 0, else a draw from the softmax.

    logits (..., V); uniform (...) float64 in [0, 1) -> (...). LLaDA takes the argmax of logits + temperature * Gumbel
    noise: the same distribution with V random numbers, where we look one number up in the cumulative distribution.
    In float64, or tokens of small probability would never be drawn (arXiv:2409.02908).
    """
    logits = logits.clone()
    logits[..., mask_id] = -torch.inf
    if not temperature:
        return logits.argmax(-1)
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)  # (..., V)
    tokens = torch.searchsorted(cumulative, uniform[..., None] * cumulative[..., -1:], right=True)
    return tokens[..., 0].clamp(max=logits.shape[-1] - 1)  # should the product round up to the total


@torch.no_grad()
def generate(model, prompt, attn_mask, noise, *, mask_id, eos_id, gen_length, diffusion_steps, block_length,
             temperature, on_step=None):
    """Fill gen_length masks behind each prompt (LLaDA, algorithm 5 and its generate.py).

    prompt (B, P); attn_mask (B, P) bool, False at padding; noise (B, diffusion_steps, block_length) float64 in [0, 1),
    not used at temperature 0; on_step(x, committed_at) is called after every round. Returns ids (B, T) and
    committed_at (B, T), the round that committed each token, -1 in the prompt. A row leaves the batch after a block
    that holds EOS; the rest of its canvas is EOS.
    """
    (B, P), T = prompt.shape, prompt.shape[1] + gen_length
    x = F.pad(prompt, (0, gen_length), value=mask_id)  # (B, T), the canvas
    attn_mask = F.pad(attn_mask, (0, gen_length), value=True)  # (B, T)
    committed_at = torch.full_like(x, -1)
    schedule = num_transfer_tokens(block_length, diffusion_steps * block_length // gen_length)
    rows = torch.arange(B, device=x.device)  # (R,), those that go on
    step = 0
    for start in range(P, T, block_length):
        end = start + block_length
        masked = torch.arange(start, end, device=x.device).expand(len(rows), -1)  # (R, M), positions to fill
        for count in schedule:
            # only the masked positions go through the last layer and the head
            logits = at_least_float32(model(x[rows], attn_mask[rows], keep=masked))  # (R, M, V)
            tokens = choose(logits, temperature, noise[rows, step, :masked.shape[1]], mask_id)  # (R, M)
            confidence = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]  # (R, M), at temperature 1
            order = confidence.argsort(dim=1, descending=True)
            best, rest = order[:, :count], order[:, count:].sort(dim=1).values
            x[rows[:, None], masked.gather(1, best)] = tokens.gather(1, best)
            committed_at[rows[:, None], masked.gather(1, best)] = step
            masked = masked.gather(1, rest)
            step += 1
            if on_step:
                on_step(x, committed_at)
        ended = (x[rows, start:end] == eos_id).any(dim=1)
        x[rows[ended], end:] = eos_id
        committed_at[rows[ended], end:] = step - 1
        rows = rows[~ended]
        if not len(rows):
            break
    return x, committed_at


def check_schedule(gen_length, diffusion_steps, block_length):
    """End the program with the valid values where the canvas does not divide into blocks and rounds."""
    if gen_length % block_length:
        valid = [b for b in range(1, gen_length + 1) if gen_length % b == 0]
        raise SystemExit(f"error: --block_length {block_length} does not divide --gen_length {gen_length}: use {valid}")
    blocks = gen_length // block_length
    if diffusion_steps % blocks or not blocks <= diffusion_steps <= gen_length:
        raise SystemExit(f"error: --diffusion_steps {diffusion_steps} must be a multiple of the {blocks} blocks and at "
                         f"most --gen_length: use {list(range(blocks, gen_length + 1, blocks))}")


def draw_noise(keys, diffusion_steps, block_length):
    """(B, diffusion_steps, block_length) float64 in [0, 1): each row's numbers come from a generator of its own key.

    So they depend neither on the rows beside it nor on the number of processes.
    """
    # half of the numbers is unused: the published runs of this repository drew two per position
    shape = (diffusion_steps, 2, block_length)
    draws = [torch.rand(shape, generator=generator(*key), dtype=torch.float64)[:, 0] for key in keys]
    return torch.stack(draws)


def pad_left(rows, pad_id, device):
    """Lists of ids -> (B, P) padded on the left, and (B, P) bool, False at padding."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]


@dataclass
class Completions:
    """R completions of L tokens, all EOS behind the first EOS."""
    ids: torch.Tensor           # (R, L)
    committed_at: torch.Tensor  # (R, L), the round that committed each token
    lengths: torch.Tensor       # (R,), tokens before the first EOS
    texts: list                 # R strings, up to the first EOS


def complete(model, tokenizer, prompts, keys, *, rollout_batch, generate=generate, **sampling):
    """One completion for each prompt, in order: the one path for rollouts and for evaluation.

    prompts: lists of token ids; keys: of each prompt's noise, see `draw_noise`; rollout_batch: rows per forward pass;
    sampling: gen_length, diffusion_steps, block_length, temperature, on_step. The result does not depend on
    rollout_batch, up to rounding.
    """
    device, length = next(model.parameters()).device, sampling["gen_length"]
    ids, committed_at = [], []
    for start in range(0, len(prompts), rollout_batch):
        batch = slice(start, start + rollout_batch)
        noise = draw_noise(keys[batch], sampling["diffusion_steps"], sampling["block_length"]).to(device)
        canvas, steps = generate(model, *pad_left(prompts[batch], tokenizer.eos_id, device), noise,
                                 mask_id=tokenizer.mask_id, eos_id=tokenizer.eos_id, **sampling)
        ids.append(canvas[:, -length:])
        committed_at.append(steps[:, -length:])
    ids, committed_at = torch.cat(ids), torch.cat(committed_at)  # (R, L) each
    counted = completion_mask(ids, tokenizer.eos_id)
    ids = ids.masked_fill(~counted, tokenizer.eos_id)
    lengths = (counted & (ids != tokenizer.eos_id)).sum(-1)
    return Completions(ids, committed_at, lengths, [tokenizer.decode(row) for row in ids.tolist()])


# ---------------------------------------------------------------- evaluation

def encode_prompts(examples, tokenizer, room, procs):
    """Give each example the token ids of its prompt, as example["ids"]. Returns those of at most `room` tokens.

    Longer prompts are counted and reported, never cut.
    """
    for example in examples:
        example["ids"] = tokenizer.encode_prompt(example["prompt"])
    fitting = [example for example in examples if len(example["ids"]) <= room]
    if len(fitting) < len(examples):
        procs.print(f"skipped {len(examples) - len(fitting)} of {len(examples)} prompts: longer than {room} tokens, "
                    "they leave no room for the completion")
    return fitting


def evaluate(model, tokenizer, task, examples, procs, seed, *, rollout_batch, **sampling):
    """Complete every example and score it. Returns ({metric: mean}, rows); the rows are the same on every process.

    A row holds the example and its index, the completion, the task's scores, effective_tokens (before the first EOS),
    ended (by EOS), and the rounds in which a token was committed.
    """
    # the longest first: like lengths share a batch, and what does not fit into memory fails at once
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["ids"]))[procs.rank::procs.world]
    starts, rows = range(0, len(order), rollout_batch), []
    with procs.stoppable():
        for start in tqdm(starts, desc="evaluate", leave=False, disable=None if procs.is_main else True):
            indices = order[start:start + rollout_batch]
            prompts, keys = [examples[i]["ids"] for i in indices], [(seed, "evaluate", i) for i in indices]
            completions = complete(model, tokenizer, prompts, keys, rollout_batch=rollout_batch,
                                   on_step=procs.check_stop, **sampling)
            rows += score_rows(task, examples, indices, completions)
    rows = sorted(procs.gather(rows), key=lambda row: row["index"])
    names = [*task.score("", examples[0]), "effective_tokens", "rounds"]
    return {name: sum(row[name] for row in rows) / len(rows) for name in names}, rows


def score_rows(task, examples, indices, completions):
    """The rows of an evaluation for some of its examples, as dicts of JSON values."""
    rows, gen_length = [], completions.ids.shape[1]
    columns = zip(indices, completions.texts, completions.lengths.tolist(), completions.committed_at.tolist())
    for i, text, length, steps in columns:
        example = {name: value for name, value in examples[i].items() if name != "ids"}
        rows.append({**example, "index": i, "completion": text, **task.score(text, example),
                     "effective_tokens": length, "ended": length < gen_length, "rounds": len(set(steps))})
    return rows


# ---------------------------------------------------------------- command line

def set_diffusion_steps(parser, chosen):
    """Let the default number of denoising rounds keep its share of the completion's length."""
    length, rounds = (SAMPLING[name][PRESETS.index(chosen.preset)] for name in ("gen_length", "diffusion_steps"))
    if chosen.gen_length:
        parser.set_defaults(diffusion_steps=max(1, chosen.gen_length * rounds // length))


def sampling_options(args):
    """What `complete` needs of the options, as a dict."""
    return {name: getattr(args, name) for name in (*SAMPLING, "temperature")}


def new_parser(argv=None):
    """The options, with the defaults that apply to a command line."""
    parser, chosen = make_parser(argv, __doc__, OPTIONS)
    parser.add_argument("--task", choices=sorted(TASKS), help="evaluate this task; with --watch, show one problem")
    set_diffusion_steps(parser, chosen)
    return parser


def parse_args(argv=None):
    return new_parser(argv).parse_args(argv)


def load_problems(task, args, tokenizer, room, procs):
    """The problems of a task with their token ids, see `encode_prompts`."""
    split = "train" if args.train_split else "test"
    return encode_prompts(TASKS[task].load(split, args.data, args.count or None), tokenizer, room, procs)


RAMP = (21, 27, 33, 39, 45, 51, 50, 48, 46, 82, 118, 154, 190, 226, 220, 214, 208, 202, 196)  # of 256 colours: blue to red


def make_watcher(tokenizer, gen_length, rounds):
    """An `on_step` that redraws the canvas in place: masks as shades, EOS as dots, tokens coloured by their round."""
    def show(x, committed_at):
        steps = committed_at[0, -gen_length:].tolist()
        canvas = ""
        for token, step in zip(x[0, -gen_length:].tolist(), steps):
            text = {tokenizer.mask_id: "░", tokenizer.eos_id: "·"}.get(token) or tokenizer.decode([token])
            shade = RAMP[step * (len(RAMP) - 1) // rounds]
            canvas += text if step < 0 else f"\x1b[38;5;{shade}m{text}\x1b[0m"
        if sys.stdout.isatty():
            print(f"\x1b[2J\x1b[H{canvas}\n")  # on a cleared screen
            time.sleep(0.08)  # slow enough to see
        print(f"round {max(steps) + 1}/{rounds}", flush=True)
    return show


def answer(model, tokenizer, prompt, args, generate, procs):
    """Print the answer to one prompt, with --watch while it comes into being."""
    on_step = procs.check_stop
    if args.watch:
        on_step = make_watcher(tokenizer, args.gen_length, args.diffusion_steps)
    completions = complete(model, tokenizer, [tokenizer.encode_prompt(prompt)], [(args.seed, "answer")],
                           generate=generate, on_step=on_step, **sampling_options(args))
    print(completions.texts[0])


def main(args, load=load_problems, generate=generate):
    """load(task, args, tokenizer, room, procs) gives the examples, `generate` fills canvases: swap them to experiment.

    Returns the summary of an evaluation.
    """
    if args.prompt is None and args.task is None:
        raise SystemExit("error: say what to do: --task countdown, or --prompt with a question")
    check_schedule(args.gen_length, args.diffusion_steps, args.block_length)
    with processes(args.device, args.dtype) as procs:
        folder = find_checkpoint(args.model)
        config = Config.from_folder(folder)
        tokenizer = Tokenizer.from_folder(folder, config)
        if args.prompt is None:
            examples = load(args.task, args, tokenizer, config.max_sequence_length - args.gen_length, procs)
        model = LLaDA.from_pretrained(folder, procs.device, procs.dtype).eval()
        if args.compile:
            compile_blocks(model)
        if args.prompt is not None:
            return answer(model, tokenizer, args.prompt, args, generate, procs)
        if args.watch:
            return answer(model, tokenizer, examples[0]["prompt"], args, generate, procs)
        run = Run(args.out or time.strftime(f"runs/sample-{args.task}-%m%d-%H%M%S"), args, procs)
        started = time.monotonic()
        metrics, rows = evaluate(model, tokenizer, TASKS[args.task], examples, procs, args.seed, generate=generate,
                                 **sampling_options(args))
        speed = len(rows) * args.gen_length / (time.monotonic() - started)
        run.log(f"{args.task}_{args.gen_length}.jsonl", rows)
        summary = {"task": args.task, "gen_length": args.gen_length, "problems": len(rows), **metrics,
                   "tokens_per_second": speed}
        run.finish(summary)
        procs.print(f"{metrics['accuracy']:.1%} of {len(rows)} problems of {args.task} are right; "
                    f"every completion is in {run.out}")
        return summary


if __name__ == "__main__":
    main(parse_args())
