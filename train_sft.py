"""Masked supervised fine-tuning (d1, section 3.1; LLaDA, section 2.3): stage one; it also made the embedded model.

    for each row: draw t ~ U(0, 1), replace every token of the completion by [MASK] with probability t, predict those
    tokens from the rest, weight the cross-entropy by 1 / t.

The prompt is never masked. The completion ends in EOS padding, which is trained as well: that is how the model learns
to stop. Rows come from tasks' demonstrations (--task countdown sudoku) or a file of prompt and completion (--data).
"""
import argparse
import functools
import time

import torch

from d1 import draw_indices, forward_process, generator, sft_loss_of
from data import DEMONSTRATIONS
from data.files import read_rows
from data.tokenizer import Tokenizer
from model import (HEAD_CHUNK, Config, LLaDA, add_lora, find_checkpoint, init_lora, load_weights, read_weights,
                   save_weights)
from parallel import (Passes, Processes, Run, Signals, add_parallel_options, compile_time, fill, fill_defaults,
                      gathered, one_line_errors, parallelise, pick_dtype, print_plan, processes, progress,
                      update_or_stop)

MIN_T = 1e-3  # t = (1 - 1e-3) u + 1e-3, LLaDA's floor, bounds the weight 1 / t
# option: (PAPER, the authors' value at 8B; TINY, the embedded model's)
DEFAULTS = {
    "steps": (2460, 1000), "batch_size": (8, 64), "lr": (1e-5, 2e-3), "warmup": (0, 100), "lora_r": (128, 0),
    "gen_length": (0, 32), "microbatch": (1, 64), "eval_every": (100, 250),
}

# what a resumed run may not change: it decides what was learnt so far, or which draws come next
FIXED = ("task", "data", "split", "count", "model", "from_scratch", "seed", "batch_size", "loss", "max_length",
         "truncate", "lora_r", "lora_targets", "dtype")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--task", nargs="+", choices=sorted(DEMONSTRATIONS),
                   help="tasks whose demonstrations are trained, evenly; d1: s1k")
    p.add_argument("--split", default="mixed", help="which demonstrations of the tasks: mixed, worked or corrected")
    p.add_argument("--data", help="without --task: a file with prompt and completion; with one: the file of its rows")
    p.add_argument("--model", default="data/tiny", help="checkpoint folder or hub id")
    p.add_argument("--from_scratch", action="store_true", help="random weights; config and tokenizer from --model")
    p.add_argument("--out", help="the run's folder, default runs/train_sft-<task>")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--count", type=int, default=100_000, help="demonstrations to generate over all tasks")
    p.add_argument("--steps", type=int, help="updates; d1: 20 epochs of s1K = 2460")
    p.add_argument("--batch_size", type=int, help="rows per update over all processes; d1 code: 8")
    p.add_argument("--microbatch", type=int, help="rows per forward and backward pass of a process; accumulated")
    p.add_argument("--lr", type=float, help="d1: 1e-5, linear decay to 0")
    p.add_argument("--warmup", type=int, help="updates of linear warm-up; d1 code: 0")
    p.add_argument("--weight_decay", type=float, default=0.1, help="d1: 0.1")
    p.add_argument("--grad_clip", type=float, default=1.0, help="d1 code: 1.0")
    p.add_argument("--loss", choices=("d1", "llada"), default="d1", help="normalisation: over the batch, or per row")
    p.add_argument("--gen_length", type=int, help="pad completions with EOS to this length at least")
    p.add_argument("--max_length", type=int, default=4096, help="longer rows are skipped and counted; d1: 4096")
    p.add_argument("--truncate", action="store_true", help="cut longer rows instead, and count them; d1: so")
    p.add_argument("--lora_r", type=int, help="d1 code: 128; 0 trains all weights")
    p.add_argument("--lora_alpha", type=float, default=256, help="d1 code: 256")
    p.add_argument("--lora_targets", nargs="+", default=["q_proj", "k_proj", "v_proj"], help="d1 code: q k v")
    p.add_argument("--eval_every", type=int, help="updates between held-out losses")
    p.add_argument("--save_every", type=int, default=0, help="updates between checkpoints, 0: only the last")
    p.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint in --out, if any")
    add_parallel_options(p)
    return p.parse_args(argv)


def read_examples(args):
    """Dicts with prompt and completion, from --data or the tasks' demonstrations, interleaved."""
    if args.data and not args.task:
        rows = read_rows(args.data, ("prompt", "completion"))
        for row in rows:
            if not isinstance(row["prompt"], str) or not isinstance(row["completion"], str):
                raise ValueError(f"--data {args.data}, row {row['row']}: prompt and completion must be text")
        return rows
    if not args.task:
        raise ValueError("--task or --data is needed: what should be trained?")
    if args.data and len(args.task) > 1:
        raise ValueError(f"--data {args.data} holds the rows of one --task, {len(args.task)} were named")
    each = [DEMONSTRATIONS[task].load(args.split, data=args.data, count=args.count // len(args.task), seed=args.seed)
            for task in args.task]
    if any("completion" not in rows[0] for rows in each):
        raise ValueError(f"--split {args.split} holds no demonstrations, use mixed, worked or corrected")
    return [example for group in zip(*each) for example in group]


def encode_rows(examples, tokenizer, args, procs):
    """(ids, prompt length) of each row; those without a target or above max_length are counted, reported and skipped,
    or with --truncate cut where that leaves a target.
    """
    rows, empty, long = [], 0, 0
    procs.print(f"encoding {len(examples)} rows")
    for example in examples:
        prompt = tokenizer.encode_prompt(example["prompt"])
        completion = tokenizer.encode_completion(example["completion"])
        over = len(prompt) + len(completion) > args.max_length
        long += over
        if over and args.truncate:
            completion = completion[:max(0, args.max_length - len(prompt))]
        if not example["completion"].strip() or not completion:
            empty += 1
        elif not over or args.truncate:
            completion += [tokenizer.eos_id] * (args.gen_length - len(completion))
            rows.append((prompt + completion, len(prompt)))
    if empty or long:
        procs.print(f"skipped {empty} rows without a completion and {'cut ' if args.truncate else ''}{long} longer "
                    f"than {args.max_length} tokens")
    if len(rows) < args.batch_size + 1:
        raise ValueError(f"{len(rows)} usable rows do not fill a batch of {args.batch_size} and a held-out row")
    return rows


def batches(items, size):
    return [items[i:i + size] for i in range(0, len(items), size)]


def collate(rows, length, eos_id):
    """Rows right-padded with EOS, which counts as answer. Returns ids (B, T), answer (B, T) bool."""
    ids = torch.tensor([ids + [eos_id] * (length - len(ids)) for ids, _ in rows])
    answer = torch.arange(length) >= torch.tensor([prompt for _, prompt in rows])[:, None]
    return ids, answer


def noise(ids, answer, keys, mask_id, u=None):
    """Each row's t and mask from its own generator, so that they do not depend on the batch around it.

    Returns noised (B, T), masked (B, T), t (B,). keys: one tuple per row; u: fixed draws in (0, 1) instead of random t.
    """
    noised, masked, t = [], [], []
    for i, key in enumerate(keys):
        g = generator(*key)
        draw = torch.rand(1, generator=g)
        t.append((1 - MIN_T) * (draw if u is None else u[i:i + 1]) + MIN_T)
        one = forward_process(ids[i:i + 1], t[-1], answer[i:i + 1], mask_id, g)
        noised.append(one[0])
        masked.append(one[1])
    return torch.cat(noised), torch.cat(masked), torch.cat(t)


def batch_loss(model, batch, per_sequence):
    """The SFT loss of one forward pass over (ids, noised, masked, t, answer)."""
    device = next(model.parameters()).device
    ids, noised, masked, t, answer = (x.to(device) for x in batch)
    logps = model(noised, keep=masked, targets=ids[masked])  # (M,): of the masked positions only
    return sft_loss_of(logps, masked, t, answer, per_sequence)


@torch.no_grad()
def held_out_loss(model, rows, tokenizer, args, procs, signals, draws=4):
    """LLaDA's loss over held-out rows at fixed masks, t stratified: each row sees `draws` values over (0, 1)."""
    total, length = 0.0, max(len(row) for row, _ in rows)
    parts = batches([(i, d) for d in range(draws) for i in range(len(rows))], args.microbatch)
    with gathered(model, args.keep_sharded), signals.droppable() as check:
        for number, counts in procs.deal(len(parts)):
            check()
            part = parts[number]
            ids, answer = collate([rows[i] for i, _ in part], length, tokenizer.eos_id)
            u = torch.tensor([((i + 0.5) / len(rows) + d) / draws for i, d in part])
            noised, masked, t = noise(ids, answer, [("held out", i, d) for i, d in part], tokenizer.mask_id, u)
            loss = batch_loss(model, (ids, noised, masked, t, answer), per_sequence=True).item()
            total += loss * len(part) * counts
    return procs.sum({"loss": total})["loss"] / (draws * len(rows))


def draw_batch(rows, step, args, tokenizer, mine):
    """This process's share of a step's rows, noised, in micro-batches, each with its share of the loss.

    Yields (ids, noised, masked, t, answer), share.
    """
    chosen = [rows[i] for i in draw_indices(len(rows), step, args.batch_size, args.seed)]
    ids, answer = collate(chosen, max(len(row) for row, _ in chosen), tokenizer.eos_id)  # alike on every process
    for part in batches(list(mine), args.microbatch):
        noised, masked, t = noise(ids[part], answer[part], [(args.seed, step, i) for i in part], tokenizer.mask_id)
        share = answer[part].sum() / answer.sum() if args.loss == "d1" else len(part) / len(ids)
        yield (ids[part], noised, masked, t, answer[part]), float(share)


def learning_rate(step, args):
    """Linear warm-up, linear decay to zero."""
    return args.lr * min(1.0, (step + 1) / max(1, args.warmup)) * (1 - step / args.steps)


def train_step(step, model, optimizer, rows, tokenizer, args, procs):
    """One update on this process's share of the step's rows. Returns the step's row for the log."""
    began, loss, tokens = time.monotonic(), 0.0, 0
    optimizer.param_groups[0]["lr"] = learning_rate(step, args)
    for batch, share in draw_batch(rows, step, args, tokenizer, procs.share(args.batch_size, "--batch_size")):
        part = batch_loss(model, batch, args.loss == "llada") * share
        (part * procs.world).backward()  # FSDP takes the mean over the processes
        loss, tokens = loss + part.item(), tokens + batch[0].numel()
    grad_norm, per_rank = update_or_stop(optimizer, args.grad_clip, f"step {step + 1}", {"loss": loss}, procs)
    return {"step": step + 1, "loss": sum(found["loss"] for found in per_rank),
            "lr": learning_rate(step, args), "grad_norm": grad_norm,
            "tokens_per_second": procs.world * tokens / (time.monotonic() - began)}


def build_model(args, folder, procs, dtype):
    """The model, spread over the processes, with adapters if it is to have some; `dtype` is what it computes in."""
    def shape(model):
        if args.lora_r:
            add_lora(model, args.lora_r, args.lora_alpha, args.lora_targets)
        parallelise(model, args, procs, dtype)
    kept = dtype if args.lora_r else torch.float32  # updates would vanish in bfloat16
    model = LLaDA.empty(Config.from_folder(folder), procs.device, kept, shape)
    if args.from_scratch:
        model.init_weights(generator(args.seed, "weights"), fill)
    else:
        read_weights(model, folder, fill)
    return init_lora(model, generator(args.seed, "lora"), fill)


def passes_of(c, args, gpus):
    """What a step does, for --plan: rows as long as they may be, half of their tokens masked, as on average."""
    mine = Processes(0, gpus, torch.device("cpu")).share(args.batch_size, "--batch_size")
    length = min(args.max_length, c.max_sequence_length)
    return {"update": Passes(args.batch_size, min(args.microbatch, len(mine)), length, length // 2, narrow=False)}


def main(args):
    if args.plan is not None:
        with one_line_errors():
            config = Config.from_folder(find_checkpoint(args.model, ("config.json",)))
            fill_defaults(args, DEFAULTS, config)
            return print_plan(config, args, HEAD_CHUNK, passes_of)
    with processes(args.device, args.timeout) as procs, Signals(procs, args.keep_sharded) as signals:
        with one_line_errors():
            folder = find_checkpoint(args.model)
            config = Config.from_folder(folder)
            chosen = fill_defaults(args, DEFAULTS, config)
            device, dtype = procs.device, pick_dtype(args.dtype, procs.device)
            procs.share(args.batch_size, "--batch_size")
            procs.check_replicas(args.replicas)
            name = "-".join(args.task or ["data"])
            options = {**vars(args), "device": device, "dtype": dtype}
            run = Run(args.out or f"runs/train_sft-{name}", options, procs, args.resume, FIXED)
            tokenizer = Tokenizer.from_folder(folder, config)
            rows = encode_rows(read_examples(args), tokenizer, args, procs)
            model = build_model(args, folder, procs, dtype)
            trainable = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trainable, lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay,
                                          fused=True)
            state = run.restore(model, optimizer, load_weights, functools.partial(save_weights, base=args.model),
                                tokenizer.save)
        order = torch.randperm(len(rows), generator=generator(args.seed, "held out")).tolist()
        held = [rows[i] for i in order[:min(256, max(1, len(rows) // 100))]]  # 1%, as the authors hold out
        rows = [rows[i] for i in order[len(held):]]
        procs.print(f"masked SFT: {sum(p.numel() for p in trainable):,} trainable parameters, {len(rows)} rows, "
                    f"{len(held)} held out, {procs.world} x {device} {dtype}\n{chosen}")
        with run.resumable():
            if state["before"] is None:
                state["before"] = state["after"] = held_out_loss(model, held, tokenizer, args, procs, signals)
            for step, show in progress(range(state["step"] - bool(state["unlogged"]), args.steps), procs, "sft"):
                if not state["unlogged"]:
                    with signals.droppable():
                        pass  # an update is short: a stop waits for its end
                    state["unlogged"] = train_step(step, model, optimizer, rows, tokenizer, args, procs)
                    state["step"] = step + 1
                row, last = state["unlogged"], step + 1 == args.steps
                if last or args.eval_every and (step + 1) % args.eval_every == 0:
                    row["held_out_loss"] = held_out_loss(model, held, tokenizer, args, procs, signals)
                    state["after"] = row["held_out_loss"]
                run.log("metrics.jsonl", [row])
                state["unlogged"] = None
                show(loss=f"{row['loss']:.3f}", held_out=f"{state['after']:.3f}",
                     tokens_s=f"{row['tokens_per_second']:.0f}")
                if last or args.save_every and (step + 1) % args.save_every == 0:
                    run.save()

        before, after = state["before"], state["after"]
        summary = {"task": name, "seed": args.seed, "held_out_loss_before": before, "held_out_loss_after": after,
                   "steps": args.steps, "minutes": run.seconds / 60, "device": str(device)}
        run.finish(summary)
        procs.print(f"held-out loss {before:.3f} -> {after:.3f}, in {summary['minutes']:.1f} minutes"
                    + (f"; {compile_time()}" if args.compile else ""))
        procs.print(f"the model is in {run.out}/step_{args.steps:06d}, the log in {run.out}/metrics.jsonl")
        return summary


if __name__ == "__main__":
    main(parse_args())
