"""The sampler of d1, LLaDA's low-confidence remasking, and its uses: answer, watch, evaluate.

    canvas = prompt + gen_length x [MASK]
    for each block, left to right, in diffusion_steps / blocks rounds:
        predict every masked token of the block
        commit the most confident of them, leave the others masked

    python sample.py --task countdown                 evaluate on held-out problems
    python sample.py --task countdown --watch         watch one problem being solved
    python sample.py --prompt "What is 7 * 3?"        answer
"""
import runpy
import textwrap
import time
from collections import namedtuple

import torch
import torch.nn.functional as F

from d1 import completion_mask, generator
from data import TASKS
from data.tokenizer import Tokenizer
from lora import load_adapter
from model import TINY, LLaDA, at_least_float32, find_checkpoint
from parallel import DEVICE_OPTIONS, compile_blocks, processes
from run import Run, make_parser

SAMPLING = {  # option: (for LLaDA-8B as the authors have it, for the embedded model, what it is)
    "gen_length": (256, 32, "tokens of a completion"),
    "diffusion_steps": (128, 32, "denoising rounds of a completion, a multiple of the blocks"),
    "block_length": (32, 8, "tokens of a block, filled left to right"),
    "rollout_batch": (8, 128, "rows in a forward pass of the sampler"),
}
OPTIONS = {
    "what to do": {
        "prompt": ("", "", "answer this prompt"),
        "adapter": ("", "", "LoRA of --model: a run's folder, its checkpoint, or PEFT's"),
        "watch": (False, False, "show the canvas filling in, see tools/watch.py"),
        "data": ("", "", "problems: file, d1's dataset folder, dataset id; or the task's own"),
        "count": (0, 0, "how many problems; 0: all, or 512 generated ones"),
        "out": ("", "", "folder of the results, or else runs/sample-TIME-TASK"),
        "seed": (0, 0, "of all random numbers"),
    },
    "sampler": SAMPLING | {"temperature": (0.0, 0.0, "of the draws, 0 is greedy")},
    "device": DEVICE_OPTIONS,
}


def num_transfer_tokens(block_length, rounds):
    """How many tokens each round of a block commits: as even as possible, larger rounds first."""
    return [block_length // rounds + (i < block_length % rounds) for i in range(rounds)]


def choose(logits, temperature, uniform, mask_id):
    """A token for every position, never [MASK]: at temperature 0 the argmax, else a draw.

    logits (..., V); uniform (...) in [0, 1), float64: else the tail would never be drawn. LLaDA's
    argmax over Gumbel noise has the same distribution, for V random numbers a token.
    """
    logits = logits.clone()
    logits[..., mask_id] = -torch.inf  # or a hole would stay
    if not temperature:
        return logits.argmax(-1)
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)  # (..., V)
    heights = uniform[..., None] * cumulative[..., -1:]  # (..., 1)
    tokens = torch.searchsorted(cumulative, heights, right=True)[..., 0]
    return tokens.clamp(max=logits.shape[-1] - 1)  # should a height round up to the total


@torch.no_grad()
def generate(model, prompt, attn_mask, noise, *, mask_id, eos_id, gen_length, diffusion_steps,
             block_length, temperature, on_step=lambda x, committed_at: None):
    """Fill gen_length masks behind each prompt (LLaDA, algorithm 5 and its generate.py).

    prompt (B, P); attn_mask (B, P) False at padding; noise (B, diffusion_steps, block_length)
    in [0, 1), float64; on_step(x, committed_at) is called after a round. Returns ids (B, T) and
    the round that committed each token, -1 in the prompt. A row ends with a block that holds EOS.
    """
    (B, P), T = prompt.shape, prompt.shape[1] + gen_length
    x = F.pad(prompt, (0, gen_length), value=mask_id)         # (B, T), the canvas
    attn_mask = F.pad(attn_mask, (0, gen_length), value=True)  # (B, T)
    committed_at = torch.full_like(x, -1)                     # (B, T)
    schedule = num_transfer_tokens(block_length, diffusion_steps * block_length // gen_length)
    rows = torch.arange(B, device=x.device)                   # (R,), those that go on
    step = 0  # rounds so far, over all blocks
    for start in range(P, T, block_length):
        end = start + block_length
        masked = torch.arange(start, end, device=x.device).expand(len(rows), -1)  # (R, M) positions
        for count in schedule:  # count: tokens that this round commits
            # only the masked positions go through the last layer and the head
            logits = at_least_float32(model(x[rows], attn_mask[rows], keep=masked))  # (R, M, V)
            uniform = noise[rows, step, :masked.shape[1]]     # (R, M)
            tokens = choose(logits, temperature, uniform, mask_id)  # (R, M)
            confidence = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]  # (R, M)
            order = confidence.argsort(dim=1, descending=True, stable=True)  # (R, M)
            best, others = order[:, :count], order[:, count:].sort(dim=1).values
            chosen = rows[:, None], masked.gather(1, best)
            x[chosen] = tokens.gather(1, best)  # (R, count)
            committed_at[chosen] = step
            masked = masked.gather(1, others)  # (R, M - count)
            step += 1
            on_step(x, committed_at)
        ended = (x[rows, start:end] == eos_id).any(dim=1)     # (R,)
        done, rows = rows[ended], rows[~ended]  # a GPU's host waits here, and nowhere else
        x[done, end:] = eos_id  # never looked at, but whole
        committed_at[done, end:] = step - 1
        if not len(rows):
            break
    return x, committed_at


def check_schedule(gen_length, diffusion_steps, block_length):
    """End the program where the canvas does not divide into blocks, or the rounds by them."""
    lengths = [n for n in range(1, gen_length + 1) if gen_length % n == 0]
    if block_length not in lengths:
        raise SystemExit(f"error: --block_length {block_length}: choose one of {lengths}")
    rounds = list(range(gen_length // block_length, gen_length + 1, gen_length // block_length))
    if diffusion_steps not in rounds:
        raise SystemExit(f"error: --diffusion_steps {diffusion_steps}: choose one of {rounds}")


def draw_noise(keys, diffusion_steps, block_length):
    """(B, diffusion_steps, block_length) float64 in [0, 1); a row depends on its key alone."""
    shape = diffusion_steps, 2, block_length  # half are unused, but runs in docs/ drew them
    draws = [torch.rand(shape, generator=generator(*key), dtype=torch.float64) for key in keys]
    return torch.stack(draws)[:, :, 0]


def pad_left(rows, pad_id, device):
    """Lists of ids -> (B, P) padded on the left, and (B, P) bool, False at padding."""
    width = max(map(len, rows))  # P
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)  # (B,)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]


# R completions: ids and committed_at (R, L) as sampled, tokens before EOS (R,), texts up to EOS
Completions = namedtuple("Completions", "ids committed_at lengths texts")


@torch.compiler.set_stance("default")  # compiled; scores are not, to agree to the bit
def complete(model, tokenizer, prompts, keys, *, rollout_batch, generate=generate, **sampling):
    """One completion of each prompt, a list of token ids: for rollouts and for evaluation.

    keys: of the prompts' noise, see `draw_noise`; sampling: what `generate` takes besides.
    """
    device = next(model.parameters()).device
    batches = []
    for start in range(0, len(prompts), rollout_batch):
        batch = slice(start, start + rollout_batch)  # rows of one length, padded
        noise = draw_noise(keys[batch], sampling["diffusion_steps"], sampling["block_length"])
        prompt, attn_mask = pad_left(prompts[batch], tokenizer.eos_id, device)  # (B, P)
        canvas = generate(model, prompt, attn_mask, noise.to(device), mask_id=tokenizer.mask_id,
                          eos_id=tokenizer.eos_id, **sampling)
        batches.append(torch.stack(canvas)[:, :, prompt.shape[1]:])  # (2, B, L)
    ids, committed_at = torch.cat(batches, dim=1)  # (R, L) both
    lengths = (completion_mask(ids, tokenizer.eos_id) & (ids != tokenizer.eos_id)).sum(-1)  # (R,)
    texts = [tokenizer.decode(row) for row in ids.tolist()]  # up to EOS
    return Completions(ids, committed_at, lengths, texts)


def encode_prompts(examples, tokenizer, room, procs):
    """Set example["ids"], the tokens of its prompt; skip, never cut, those of more than `room`."""
    for example in examples:
        example["ids"] = tokenizer.encode_prompt(example["prompt"])
    fitting = [example for example in examples if len(example["ids"]) <= room]
    if len(fitting) < len(examples):
        procs.print(f"skipped {len(examples) - len(fitting)} prompts of more than {room} tokens")
    if examples and not fitting:
        raise SystemExit(f"error: no prompt has {room} tokens or fewer: lower --gen_length")
    return fitting


def evaluate(model, tokenizer, task, examples, procs, seed, *, rollout_batch, **sampling):
    """Complete and score every example. Returns ({metric: mean}, rows), on every process.

    In a row effective_tokens are those before EOS, rounds those in which a token was committed.
    """
    # the longest first: like lengths share a batch, and what exceeds the memory fails at once
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["ids"]))
    order = order[procs.rank::procs.world]  # our share
    rows = []
    with procs.stoppable():
        for start in procs.bar(range(0, len(order), rollout_batch), "evaluate", leave=False):
            batch = order[start:start + rollout_batch]
            prompts = [examples[i]["ids"] for i in batch]
            keys = [(seed, "evaluate", i) for i in batch]
            done = complete(model, tokenizer, prompts, keys, on_step=procs.check_stop,
                            rollout_batch=rollout_batch, **sampling)
            for i, text, length, rounds in zip(batch, done.texts, done.lengths, done.committed_at):
                example = {**examples[i], "index": i, "completion": text}
                example.pop("ids")
                rows.append({**example, **task.score(text, examples[i]),
                             "effective_tokens": int(length), "rounds": len(rounds.unique()),
                             "ended": bool(length < len(rounds))})
    rows = sorted(procs.gather(rows), key=lambda row: row["index"])
    names = [*task.score("", examples[0]), "effective_tokens", "rounds"]
    means = {name: sum(row[name] for row in rows) / len(rows) for name in names}
    procs.print(f"{means['accuracy']:.1%} of {len(rows)} problems right, "
                f"temperature {sampling['temperature']}")
    firsts = {"right" if row["accuracy"] == 1 else "wrong": row for row in reversed(rows)}
    for verdict, row in sorted(firsts.items()):
        question = row["prompt"].rpartition("\n\n")[2]  # without the instructions
        procs.print("  " + textwrap.shorten(f"{verdict}: {question} -> {row['completion']}", 150))
    return means, rows


def sampling_options(args):
    """What `complete` needs of the options."""
    return {name: getattr(args, name) for name in (*SAMPLING, "temperature")}


def new_parser(argv=None):
    parser, _ = make_parser(argv, __doc__, OPTIONS)
    parser.add_argument("--task", choices=sorted(TASKS), help="evaluate it, or watch one problem")
    return parser


def parse_args(argv=None):
    return new_parser(argv).parse_args(argv)


def load_problems(task, args, tokenizer, room, procs):
    """The held-out problems of a task with the tokens of their prompts."""
    examples = TASKS[task].load("test", data=args.data or None, count=args.count or None)
    return encode_prompts(examples, tokenizer, room, procs)


def main(args, load=load_problems, generate=generate):
    """Answer or evaluate. load(task, args, tokenizer, room, procs) gives the examples."""
    if args.watch:  # a program around this one, with the same options
        return runpy.run_path(str(TINY.parents[1] / "tools" / "watch.py"))["main"](args)
    check_schedule(args.gen_length, args.diffusion_steps, args.block_length)
    if not args.prompt and not args.task:
        raise SystemExit("error: say what to do: --task countdown, or --prompt with a question")
    sampling = {**sampling_options(args), "generate": generate}
    with processes(args) as procs:
        checkpoint = find_checkpoint(args.model)  # once: it may ask the hub
        model = LLaDA.from_pretrained(checkpoint, procs.device, procs.dtype).eval()
        tokenizer = Tokenizer.from_folder(checkpoint, model.config)
        if args.adapter:
            load_adapter(model, find_checkpoint(args.adapter))
        if args.compile:
            compile_blocks(model)
        room = model.config.max_sequence_length - args.gen_length  # for a prompt
        if args.prompt:
            [row] = encode_prompts([{"prompt": args.prompt}], tokenizer, room, procs)
            sampling["on_step"] = procs.check_stop
            done = complete(model, tokenizer, [row["ids"]], [(args.seed, "answer")], **sampling)
            return print(done.texts[0])
        examples = load(args.task, args, tokenizer, room, procs)
        run = Run(time.strftime("sample-%m%d-%H%M%S"), args, procs)
        run.compare(examples)
        task = TASKS[args.task]
        metrics, rows = evaluate(model, tokenizer, task, examples, procs, args.seed, **sampling)
        run.log(f"{args.task}_{args.gen_length}.jsonl", rows)
        return run.finish(gen_length=args.gen_length, problems=len(rows), **metrics)


if __name__ == "__main__":
    main(parse_args())
