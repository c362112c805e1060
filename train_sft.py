"""Masked supervised fine-tuning (d1, section 3.1; LLaDA, section 2.3): stage one of d1.

    for each row: draw t ~ U(0, 1); replace every token of the completion by [MASK] with
    probability t; predict those tokens from the rest; weight their cross-entropy by 1 / t

    python train_sft.py --task countdown sudoku            the embedded model, on demonstrations
    python train_sft.py --data rows.jsonl --model MODEL    your rows of "prompt" and "completion"
"""
import torch

from d1 import draw_indices, forward_process, generator, sft_loss, sft_weights
from data import DEMONSTRATIONS, load_demonstrations
from parallel import PARALLEL_OPTIONS, clip_and_step, gathered, processes
from run import RUN_OPTIONS, Run, make_parser

MIN_T = 1e-3  # t = (1 - MIN_T) u + MIN_T: LLaDA's floor, which bounds the weight 1 / t
OPTIONS = {  # option: (for LLaDA-8B as the authors have it, for the embedded model, what it is)
    "rows": {
        "data": ("", "", 'rows of "prompt", "completion" or of "messages"; with --task, its file'),
        "split": ("mixed", "mixed", "which demonstrations: mixed, worked or corrected"),
        "count": (100_000, 100_000, "demonstrations to generate, over all tasks"),
        "gen_length": (0, 32, "pad completions with EOS to this length at least"),
        "max_length": (4096, 4096, "longer rows are skipped and counted"),
        "truncate": (False, False, "cut longer rows instead, as the authors do"),
    },
    "updates": {
        "steps": (2460, 1000, "updates; 2460 are 20 epochs of s1K"),
        "batch_size": (8, 64, "rows of an update, over all processes"),
        "microbatch": (1, 64, "rows in a forward and backward pass of a process"),
        "lr": (1e-5, 2e-3, "learning rate, decays linearly to 0"),
        "warmup": (0, 100, "updates of linear warm-up, 0: none"),
        "weight_decay": (0.1, 0.1, "of AdamW, 0: none"),
        "grad_clip": (1.0, 1.0, "largest norm of the gradient"),
        "lora_r": (128, 0, "rank of the adapters, 0 trains all weights"),
        "lora_alpha": (256.0, 256.0, "the scale of the adapters is alpha / r"),
        "lora_targets": ("q_proj k_proj v_proj", "q_proj k_proj v_proj", "adapted matrices"),
        "eval_every": (100, 250, "updates between losses on held-out rows, 0: only at the end"),
    },
    "run": RUN_OPTIONS | {"save_every": (500, 0, "steps between checkpoints, 0: only the last")},
    "processes": PARALLEL_OPTIONS,
}


def parse_args(argv=None):
    parser, _ = make_parser(argv, __doc__, OPTIONS)
    parser.add_argument("--task", nargs="+", choices=DEMONSTRATIONS, default=[], help="d1: s1k")
    return parser.parse_args(argv)


def encode_rows(examples, tokenizer, max_length, args, procs):
    """(ids, prompt length) of each row. Empty rows and too long rows are skipped and counted."""
    rows = []
    for example in procs.bar(examples, "encode", leave=False):
        prompt = tokenizer.encode_prompt(example["prompt"])  # chat format, up to the answer
        ids = prompt + tokenizer.encode_completion(example["completion"])
        ids = ids[:max_length] if args.truncate else ids
        if example["completion"].strip() and len(prompt) < len(ids) <= max_length:
            ids += [tokenizer.eos_id] * (args.gen_length - (len(ids) - len(prompt)))
            rows.append((ids, len(prompt)))
    if len(rows) < len(examples):
        procs.print(f"skipped {len(examples) - len(rows)} rows, empty or over {max_length} tokens")
    if len(rows) <= args.batch_size:
        raise SystemExit(f"error: only {len(rows)} usable rows for --batch_size {args.batch_size}")
    return rows


def collate(rows, eos_id):
    """Rows padded with EOS, which counts as answer. Returns ids (B, T) and answer (B, T) bool."""
    length = max(len(ids) for ids, _ in rows)  # T
    ids = torch.tensor([ids + [eos_id] * (length - len(ids)) for ids, _ in rows])
    prompt_lengths = torch.tensor([prompt_length for _, prompt_length in rows])
    return ids, torch.arange(length) >= prompt_lengths[:, None]


def draw_noise(ids, answer, keys, mask_id, u=None):
    """Mask the rows of a batch, each with a generator of its own key: they do not share noise.

    u (B,) takes the place of random draws from (0, 1). Returns noised, masked (B, T) and t (B,).
    """
    noised, masked, t = torch.empty_like(ids), torch.empty_like(answer), torch.empty(len(ids))
    for i, key in enumerate(keys):
        row = slice(i, i + 1)  # keeps the batch dimension
        random = generator(*key)
        draw = torch.rand(1, generator=random)  # first t, then the mask
        t[row] = (1 - MIN_T) * (draw if u is None else u[row]) + MIN_T
        noised[row], masked[row] = forward_process(ids[row], t[row], answer[row], mask_id, random)
    return noised, masked, t


def rows_loss(model, rows, *batch):
    """The share of a slice of rows in the loss of a batch (ids, noised, masked, weights)."""
    device = next(model.parameters()).device
    ids, noised, masked, weights = (tensor[rows].to(device) for tensor in batch)  # (b, T)
    logps = model(noised, keep=masked, targets=ids[masked])  # (M,), of the masked positions only
    return sft_loss(logps, masked, weights)


def train_step(step, model, optimizer, rows, tokenizer, args, procs, weigh=sft_weights):
    """One update. Every process draws the whole batch, and trains on its own rows of it."""
    drawn = draw_indices(len(rows), step, args.batch_size, args.seed)  # B row numbers
    ids, answer = collate([rows[i] for i in drawn], tokenizer.eos_id)  # (B, T)
    keys = [(args.seed, step, i) for i in range(args.batch_size)]  # a generator for each row
    noised, masked, t = draw_noise(ids, answer, keys, tokenizer.mask_id)  # (B, T), (B, T), (B,)
    weights = weigh(t, answer)  # (B, T)
    loss, share = 0.0, procs.share(args.batch_size, "--batch_size")
    for start in share[::args.microbatch]:
        part = slice(start, min(start + args.microbatch, share.stop))
        part_loss = rows_loss(model, part, ids, noised, masked, weights)
        (part_loss * procs.world).backward()  # FSDP averages over the processes, we want the sum
        loss += part_loss.item()
    warmed_up = min(1.0, (step + 1) / max(1, args.warmup))
    lr = args.lr * warmed_up * (1 - step / args.steps)  # linear up, linear down to 0
    optimizer.param_groups[0]["lr"] = lr
    grad_norm = clip_and_step(optimizer, args.grad_clip)
    return {"loss": procs.sum(loss), "lr": lr, "grad_norm": grad_norm}


@torch.no_grad()
def held_out_loss(model, rows, tokenizer, args, procs, weigh=sft_weights, draws=4):
    """The loss on held-out rows under fixed masks; t is stratified, `draws` values a row."""
    ids, answer = collate(rows * draws, tokenizer.eos_id)  # (draws * R, T)
    u = (torch.arange(len(ids)) + 0.5) / len(ids)  # (draws * R,)
    keys = [("held out", i) for i in range(len(ids))]  # the same at every evaluation
    noised, masked, t = draw_noise(ids, answer, keys, tokenizer.mask_id, u)
    weights, total = weigh(t, answer), 0.0
    with gathered(model), procs.stoppable():
        for start in range(0, len(ids), args.microbatch)[procs.rank::procs.world]:
            procs.check_stop()
            part = slice(start, start + args.microbatch)
            total += rows_loss(model, part, ids, noised, masked, weights).item()
    return procs.sum(total)  # rows are dealt out to the processes


def main(args, weigh=sft_weights):
    """Train. weigh(t, answer) gives the weight of every token, see `sft_weights`."""
    with processes(args) as procs:
        procs.share(args.batch_size, "--batch_size")
        run = Run("train_sft", args, procs)
        max_length = min(args.max_length, run.config.max_sequence_length)
        examples = load_demonstrations(args.task, args.split, args.data, args.count, args.seed)
        rows = encode_rows(examples, run.tokenizer, max_length, args, procs)  # alike on all
        order = torch.randperm(len(rows), generator=generator(args.seed, "held out")).tolist()
        count = min(256, max(1, len(rows) // 100))  # the authors hold out 1%, too
        held_out, rows = [rows[i] for i in order[:count]], [rows[i] for i in order[count:]]
        model, optimizer = run.load((0.9, 0.999), held_out + rows)
        procs.print(f"masked SFT on {len(rows)} rows, {len(held_out)} held out")
        with run:
            for step in range(run.step, args.steps + 1):
                if run.is_due(args.eval_every):
                    loss = held_out_loss(model, held_out, run.tokenizer, args, procs, weigh)
                    procs.print(f"step {step}: loss {loss:.3f} on held-out rows")
                    run.log("metrics.jsonl", [{"held_out_loss": loss}])
                if step == args.steps:
                    break
                row = train_step(step, model, optimizer, rows, run.tokenizer, args, procs, weigh)
                run.log_step(row, shown=("loss",))
        return run.finish()


if __name__ == "__main__":
    main(parse_args())
