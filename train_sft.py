"""Masked supervised fine-tuning (d1, section 3.1; LLaDA, section 2.3): the first stage, and how the embedded model was made.

    for each row: draw t ~ U(0, 1), replace every token of the completion by [MASK] with probability t, predict those
    tokens from the rest, weight the cross-entropy by 1 / t.

The prompt is never masked. The completion ends in EOS padding, which is trained as well: that is how the model learns to
stop. Rows come from a task's demonstrations (--task countdown sudoku) or a file (--data rows.jsonl with prompt, completion).
"""
import argparse
import time

import torch

from d1 import forward_process, generator, sft_loss
from data import TASKS
from data.format import read_rows
from data.tokenizer import Tokenizer
from model import LLaDA, Config, add_lora, find_checkpoint, save_lora
from parallel import Run, one_line_errors, pick_dtype, processes, progress

MIN_T = 1e-3  # t = (1 - 1e-3) u + 1e-3, LLaDA's floor, bounds the weight 1 / t
# option: (the paper's and the authors' value at 8B, the embedded model's)
PAPER, TINY = 0, 1
DEFAULTS = {
    "steps": (2460, 1000), "batch_size": (8, 64), "lr": (1e-5, 2e-3), "warmup": (0, 100), "lora_r": (128, 0),
    "gen_length": (0, 32), "microbatch": (1, 64), "eval_every": (100, 250),
}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--task", nargs="+", choices=sorted(TASKS), help="tasks whose demonstrations are trained, evenly")
    p.add_argument("--split", default="mixed", help="which demonstrations of the tasks: mixed or worked")
    p.add_argument("--data", help="a JSONL, JSON or CSV file with prompt and completion, instead of --task")
    p.add_argument("--model", default="data/tiny", help="checkpoint folder or hub id")
    p.add_argument("--from_scratch", action="store_true", help="random weights; config and tokenizer from --model")
    p.add_argument("--out", help="the run's folder, default runs/train_sft-<task>")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--count", type=int, default=100_000, help="demonstrations to generate over all tasks")
    p.add_argument("--steps", type=int, help="updates; d1: 20 epochs of s1K = 2460")
    p.add_argument("--batch_size", type=int, help="rows per update over all processes; d1 code: 8")
    p.add_argument("--microbatch", type=int, help="rows per forward pass and process")
    p.add_argument("--lr", type=float, help="d1: 1e-5, linear decay to 0")
    p.add_argument("--warmup", type=int, help="updates of linear warm-up; d1 code: 0")
    p.add_argument("--weight_decay", type=float, default=0.1, help="d1: 0.1")
    p.add_argument("--grad_clip", type=float, default=1.0, help="d1 code: 1.0")
    p.add_argument("--loss", choices=("d1", "llada"), default="d1", help="normalisation: over the batch, or per row")
    p.add_argument("--gen_length", type=int, help="pad completions with EOS to this length at least")
    p.add_argument("--max_length", type=int, default=4096, help="longer rows are skipped and counted; d1: 4096")
    p.add_argument("--lora_r", type=int, help="d1 code: 128; 0 trains all weights")
    p.add_argument("--lora_alpha", type=float, default=256, help="d1 code: 256")
    p.add_argument("--lora_targets", nargs="+", default=["q_proj", "k_proj", "v_proj"], help="d1 code: q k v")
    p.add_argument("--eval_every", type=int, help="updates between held-out losses")
    p.add_argument("--save_every", type=int, default=0, help="updates between checkpoints, 0: only the last")
    p.add_argument("--device", help="cuda, cuda:1, cpu; default: a GPU where there is one")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    return p.parse_args(argv)


def read_examples(args):
    """Dicts with prompt and completion, from --data or the tasks' demonstrations, interleaved."""
    if args.data:
        return read_rows(args.data, ("prompt", "completion"))
    if not args.task:
        raise ValueError("--task or --data is needed: what should be trained?")
    each = [TASKS[task].load(args.split, count=args.count // len(args.task), seed=args.seed) for task in args.task]
    if any("completion" not in rows[0] for rows in each):
        raise ValueError(f"--split {args.split} holds no demonstrations, use mixed or worked")
    return [example for group in zip(*each) for example in group]


def encode_rows(examples, tokenizer, args, procs):
    """(ids, prompt length) of each row; rows without a target or above max_length are skipped, counted and reported."""
    rows, empty, long = [], 0, 0
    for example in examples:
        prompt, completion = tokenizer.encode_prompt(example["prompt"]), tokenizer.encode_completion(example["completion"])
        if not example["completion"].strip():
            empty += 1
        elif len(prompt) + len(completion) > args.max_length:
            long += 1
        else:
            completion += [tokenizer.eos_id] * (args.gen_length - len(completion))
            rows.append((prompt + completion, len(prompt)))
    if empty or long:
        procs.print(f"skipped {empty} rows without a completion and {long} longer than {args.max_length} tokens")
    if len(rows) < args.batch_size + 1:
        raise ValueError(f"{len(rows)} usable rows do not fill a batch of {args.batch_size} and a held-out row")
    return rows


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


def batch_loss(model, batch, args, scale):
    """One forward pass; `scale` is this micro-batch's share of the batch."""
    ids, noised, masked, t, answer = (x.to(args.device) for x in batch)
    logits = model(noised, keep=masked)  # (M, V): the masked positions only
    return sft_loss(logits, ids, masked, t, answer, per_sequence=args.loss == "llada") * scale


@torch.no_grad()
def held_out_loss(model, rows, tokenizer, args, procs, draws=4):
    """The mean loss over held-out rows at fixed masks, t stratified: each row sees `draws` values spread over (0, 1)."""
    total, n = 0.0, len(rows) * draws
    jobs = [(i, d) for d in range(draws) for i in range(len(rows))][procs.rank::procs.world]
    for start in range(0, len(jobs), args.microbatch):
        part = jobs[start:start + args.microbatch]
        chosen = [rows[i] for i, _ in part]
        ids, answer = collate(chosen, max(len(r[0]) for r in chosen), tokenizer.eos_id)
        u = torch.tensor([((i + 0.5) / len(rows) + d) / draws for i, d in part])
        noised, masked, t = noise(ids, answer, [(0, "held out", i, d) for i, d in part], tokenizer.mask_id, u)
        total += float(batch_loss(model, (ids, noised, masked, t, answer), args, len(part) / n))
    return procs.sum({"loss": total})["loss"]


def main(args):
    with processes(args.device) as procs:
        with one_line_errors():
            folder = find_checkpoint(args.model)
            config = Config.from_folder(folder)
            column = TINY if config.d_model < 1024 else PAPER
            for name, values in DEFAULTS.items():
                if getattr(args, name) is None:
                    setattr(args, name, values[column])
            args.device, dtype = procs.device, pick_dtype(args.dtype, procs.device)
            tokenizer = Tokenizer.from_folder(folder, config)
            mine = procs.share(args.batch_size, "--batch_size")
            rows = encode_rows(read_examples(args), tokenizer, args, procs)
            if args.from_scratch:
                model = LLaDA(config).init_weights(generator(args.seed, "weights")).to(procs.device, dtype)
            else:
                model = LLaDA.from_pretrained(folder, procs.device, dtype)
            if args.lora_r:
                add_lora(model, args.lora_r, args.lora_alpha, args.lora_targets, generator(args.seed, "lora"))
            name = "-".join(args.task or ["data"])
            options = {**vars(args), "device": str(procs.device), "dtype": str(dtype)}
            run = Run(args.out or f"runs/train_sft-{name}", options, procs)
        order = torch.randperm(len(rows), generator=generator(args.seed, "held out")).tolist()
        held = [rows[i] for i in order[:min(256, max(1, len(rows) // 100))]]  # 1%, as the authors hold out
        rows = [rows[i] for i in order[len(held):]]
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay)
        procs.print(f"{sum(p.numel() for p in trainable):,} trainable parameters, {len(rows)} rows, {len(held)} held out, "
                    f"{procs.world} x {procs.device} {dtype}, options from the {('paper', 'tiny')[column]} column: "
                    + " ".join(f"{name}={getattr(args, name)}" for name in DEFAULTS))
        before, start, epoch, queue = held_out_loss(model, held, tokenizer, args, procs), time.monotonic(), 0, []
        latest = before

        for step, show in progress(range(args.steps), procs, "sft", args.steps):
            began = time.monotonic()
            while len(queue) < args.batch_size:  # every row once per epoch, in an order drawn from (seed, epoch)
                shuffled = torch.randperm(len(rows), generator=generator(args.seed, "order", epoch)).tolist()
                queue, epoch = queue + shuffled, epoch + 1
            batch, queue = queue[:args.batch_size], queue[args.batch_size:]
            length = max(len(rows[i][0]) for i in batch)
            lr = args.lr * min(1.0, (step + 1) / max(1, args.warmup)) * (1 - step / args.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            ids, answer = collate([rows[i] for i in batch], length, tokenizer.eos_id)
            answer_tokens, loss = int(answer.sum()), 0.0
            for first in range(mine.start, mine.stop, args.microbatch):
                part = slice(first, min(first + args.microbatch, mine.stop))
                noised, masked, t = noise(ids[part], answer[part], [(args.seed, step, i) for i in range(part.start, part.stop)],
                                          tokenizer.mask_id)
                here = int(answer[part].sum()) / answer_tokens if args.loss == "d1" else len(ids[part]) / len(ids)
                loss_part = batch_loss(model, (ids[part], noised, masked, t, answer[part]), args, here)
                loss_part.backward()
                loss += loss_part.item()
            procs.sum_gradients(trainable)
            grad_norm = float(torch.nn.utils.clip_grad_norm_(trainable, args.grad_clip))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss = procs.sum({"loss": loss})["loss"]

            row = {"step": step + 1, "loss": loss, "lr": lr, "grad_norm": grad_norm,
                   "tokens_per_second": ids.numel() / (time.monotonic() - began)}
            if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
                latest = row["held_out_loss"] = held_out_loss(model, held, tokenizer, args, procs)
            run.log("metrics.jsonl", [row])
            show(loss=f"{loss:.3f}", held_out=f"{latest:.3f}", tokens_s=f"{row['tokens_per_second']:.0f}")
            if step + 1 == args.steps or args.save_every and (step + 1) % args.save_every == 0:
                run.save(step + 1, lambda f: save(model, tokenizer, f, args))
        run.finish({"task": name, "seed": args.seed, "held_out_loss_before": before, "held_out_loss_after": latest,
                    "steps": args.steps, "minutes": (time.monotonic() - start) / 60, "device": str(procs.device)})
        procs.print(f"held-out loss {before:.3f} -> {latest:.3f}; the model is in {run.out}/step_{args.steps:06d}")


def save(model, tokenizer, folder, args):
    if args.lora_r:
        save_lora(model, folder, base=args.model)
    else:
        model.save_pretrained(folder)
    tokenizer.save(folder)


if __name__ == "__main__":
    main(parse_args())
