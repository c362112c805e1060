"""Masked supervised fine-tuning (d1, section 3.1; LLaDA, section 2.3): stage one of d1.

    for each row: draw t ~ U(0, 1); replace every token of the completion by [MASK] with probability t;
    predict those tokens from the rest, and weight their cross-entropy by 1 / t

The prompt is never masked. The completion ends in EOS padding, which is trained as well: so the model learns to stop.

    python train_sft.py --task countdown sudoku                   generated demonstrations, the embedded model
    python train_sft.py --data rows.jsonl --model MODEL           your own rows with "prompt" and "completion"
"""
import torch

from d1 import draw_indices, forward_process, generator, sft_loss, sft_weights
from data import DEMONSTRATIONS
from data.files import read_rows
from data.tokenizer import Tokenizer
from model import Config, find_checkpoint
from parallel import PARALLEL_OPTIONS, clip_and_step, gathered, processes
from run import FOLDER_OPTIONS, Run, load_model, make_parser

MIN_T = 1e-3  # t = (1 - MIN_T) u + MIN_T: LLaDA's floor, which bounds the weight 1 / t
OPTIONS = {  # option: (the authors' value for LLaDA-8B, the embedded model's, what it is)
    "rows": {
        "data": (None, None, 'rows with "prompt" and "completion"; with --task, the file that the task reads'),
        "split": ("mixed", "mixed", "which demonstrations: mixed, worked or corrected"),
        "count": (100_000, 100_000, "demonstrations to generate, over all tasks"),
        "gen_length": (0, 32, "pad completions with EOS to this length at least"),
        "max_length": (4096, 4096, "longer rows are skipped and counted"),
        "truncate": (False, False, "cut longer rows instead, as the authors do"),
        "from_scratch": (False, False, "begin with random weights, in the shape of --model"),
    },
    "updates": {
        "steps": (2460, 1000, "updates; for the authors 20 epochs of s1K"),
        "batch_size": (8, 64, "rows of an update, over all processes"),
        "microbatch": (1, 64, "rows in a forward and backward pass of a process"),
        "lr": (1e-5, 2e-3, "learning rate, decays linearly to 0"),
        "warmup": (0, 100, "updates of linear warm-up"),
        "weight_decay": (0.1, 0.1, "of AdamW"),
        "grad_clip": (1.0, 1.0, "largest norm of the gradient"),
        "lora_r": (128, 0, "rank of the adapters, 0 trains all weights"),
        "lora_alpha": (256.0, 256.0, "the adapters' scale is alpha / r"),
        "lora_targets": (*2 * [["q_proj", "k_proj", "v_proj"]], "matrices with an adapter"),
        "eval_every": (100, 250, "updates between losses on held-out rows"),
    },
    "folder": FOLDER_OPTIONS,
    "processes": PARALLEL_OPTIONS,
}
# options that a resumed run may change: they do not decide what is learnt
MAY_CHANGE = ("out", "resume", "eval_every", "save_every", "microbatch", "device", "replicas", "checkpoint_activations",
              "compile", "timeout")


def new_parser(argv=None):
    """The options, with the defaults that apply to a command line."""
    parser, _ = make_parser(argv, __doc__, OPTIONS)
    parser.add_argument("--task", nargs="+", choices=sorted(DEMONSTRATIONS), help="whose demonstrations; d1: s1k")
    return parser


def parse_args(argv=None):
    return new_parser(argv).parse_args(argv)


# ---------------------------------------------------------------- rows

def read_examples(args):
    """Dicts with "prompt" and "completion", from --data or from the tasks' demonstrations, interleaved."""
    if not args.task:
        if not args.data:
            raise SystemExit("error: say what to train on: --task countdown, or --data with a file of rows")
        rows = read_rows(args.data, ("prompt", "completion"))
        for row in rows:
            if not isinstance(row["prompt"], str) or not isinstance(row["completion"], str):
                raise SystemExit(f"error: --data {args.data}, row {row['row']}: prompt and completion must be text")
        return rows
    if args.data and len(args.task) > 1:
        raise SystemExit(f"error: --data {args.data} holds the rows of one --task, {len(args.task)} were named")
    count = args.count // len(args.task)
    tasks = [DEMONSTRATIONS[name].load(args.split, data=args.data, count=count, seed=args.seed) for name in args.task]
    if any("completion" not in rows[0] for rows in tasks):
        raise SystemExit(f"error: --split {args.split} holds no demonstrations: use mixed, worked or corrected")
    return [example for examples in zip(*tasks) for example in examples]


def encode_rows(examples, tokenizer, max_length, args, procs):
    """(ids, prompt length) of each row. Rows without a target or of more than max_length tokens are counted.

    Such rows are skipped; with --truncate long rows are cut where that leaves a target.
    """
    rows, empty, long = [], 0, 0
    for example in examples:
        prompt = tokenizer.encode_prompt(example["prompt"])
        completion = tokenizer.encode_completion(example["completion"])
        is_long = len(prompt) + len(completion) > max_length
        long += is_long
        if is_long and args.truncate:
            completion = completion[:max(0, max_length - len(prompt))]
        if not example["completion"].strip() or not completion:
            empty += 1
        elif not is_long or args.truncate:
            completion += [tokenizer.eos_id] * (args.gen_length - len(completion))
            rows.append((prompt + completion, len(prompt)))
    if empty or long:
        procs.print(f"skipped {empty} rows without a completion, {'cut' if args.truncate else 'skipped'} {long} rows "
                    f"longer than {max_length} tokens")
    if len(rows) <= args.batch_size:
        raise SystemExit(f"error: {len(rows)} usable rows do not fill --batch_size {args.batch_size} and a held-out row")
    return rows


def split_rows(rows, seed):
    """Rows to train on, and held-out rows: 1% of all, as the authors hold out, at most 256."""
    order = torch.randperm(len(rows), generator=generator(seed, "held out")).tolist()
    count = min(256, max(1, len(rows) // 100))
    return [rows[i] for i in order[count:]], [rows[i] for i in order[:count]]


# ---------------------------------------------------------------- the algorithm

def collate(rows, eos_id):
    """Rows padded on the right with EOS, which counts as answer. Returns ids (B, T) and answer (B, T) bool."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [eos_id] * (length - len(ids)) for ids, _ in rows])
    answer = torch.arange(length) >= torch.tensor([prompt_length for _, prompt_length in rows])[:, None]
    return ids, answer


def draw_noise(ids, answer, keys, mask_id, u=None):
    """Mask each row of a batch with a generator of its own key, so that a row's noise does not depend on its batch.

    u (B,): what to use in the place of random draws from (0, 1). Returns noised (B, T), masked (B, T), t (B,).
    """
    noised, masked, t = torch.empty_like(ids), torch.empty_like(answer), torch.empty(len(ids))
    for i, key in enumerate(keys):
        row, row_generator = slice(i, i + 1), generator(*key)
        draw = torch.rand(1, generator=row_generator)
        t[row] = (1 - MIN_T) * (draw if u is None else u[row]) + MIN_T
        noised[row], masked[row] = forward_process(ids[row], t[row], answer[row], mask_id, row_generator)
    return noised, masked, t


def rows_loss(model, ids, noised, masked, weights, rows):
    """The share of some rows in the loss of a batch, from one forward pass over them."""
    device = next(model.parameters()).device
    ids, noised, masked, weights = (x[rows].to(device) for x in (ids, noised, masked, weights))
    logps = model(noised, keep=masked, targets=ids[masked])  # (M,), of the masked positions only
    return sft_loss(logps, masked, weights)


def learning_rate(step, args):
    """Linear warm-up, then linear decay to zero."""
    return args.lr * min(1.0, (step + 1) / max(1, args.warmup)) * (1 - step / args.steps)


def train_step(step, model, optimizer, rows, tokenizer, args, procs, weigh=sft_weights):
    """One update. Every process draws the whole batch and trains on its own rows. Returns the step's row for the log."""
    batch = [rows[i] for i in draw_indices(len(rows), step, args.batch_size, args.seed)]
    ids, answer = collate(batch, tokenizer.eos_id)  # (B, T)
    keys = [(args.seed, step, i) for i in range(args.batch_size)]
    noised, masked, t = draw_noise(ids, answer, keys, tokenizer.mask_id)
    weights = weigh(t, answer)  # (B, T)
    optimizer.param_groups[0]["lr"] = learning_rate(step, args)
    share, loss = procs.share(args.batch_size, "--batch_size"), 0.0
    for start in range(share.start, share.stop, args.microbatch):
        part = slice(start, min(start + args.microbatch, share.stop))
        part_loss = rows_loss(model, ids, noised, masked, weights, part)
        (part_loss * procs.world).backward()  # FSDP takes the mean over the processes, we want their sum
        loss += float(part_loss)
    grad_norm = clip_and_step(optimizer, args.grad_clip, loss, f"step {step + 1}", procs)
    return {"loss": procs.sum(loss), "lr": learning_rate(step, args), "grad_norm": grad_norm}


@torch.no_grad()
def held_out_loss(model, rows, tokenizer, args, procs, weigh=sft_weights, draws=4):
    """The loss on held-out rows, every time under the same masks. t is stratified: a row sees `draws` values of it."""
    ids, answer = collate(rows * draws, tokenizer.eos_id)  # (draws * R, T)
    u = (torch.arange(draws * len(rows)) + 0.5) / (draws * len(rows))  # (draws * R,)
    keys = [("held out", i) for i in range(len(u))]
    noised, masked, t = draw_noise(ids, answer, keys, tokenizer.mask_id, u)
    weights, total = weigh(t, answer), 0.0
    with gathered(model), procs.stoppable():
        for start in range(procs.rank * args.microbatch, len(u), procs.world * args.microbatch):
            procs.check_stop()
            total += float(rows_loss(model, ids, noised, masked, weights, slice(start, start + args.microbatch)))
    return procs.sum(total)


# ---------------------------------------------------------------- the run

def main(args, weigh=sft_weights):
    """Train. weigh(t, answer) gives the weight of every token, see `sft_weights`."""
    with processes(args.device, args.dtype, args.timeout) as procs:
        run = Run(args.out or f"runs/train_sft-{'-'.join(args.task or ['data'])}", args, procs, MAY_CHANGE)
        procs.share(args.batch_size, "--batch_size")
        folder = find_checkpoint(args.model)
        config = Config.from_folder(folder)
        tokenizer = Tokenizer.from_folder(folder, config)
        max_length = min(args.max_length, config.max_sequence_length)
        rows, held_out = split_rows(encode_rows(read_examples(args), tokenizer, max_length, args, procs), args.seed)
        model = load_model(folder, config, args, procs, from_scratch=args.from_scratch)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True)
        run.restore(model, optimizer, tokenizer)
        procs.print(f"masked SFT: {sum(p.numel() for p in trainable):,} trainable parameters, {len(rows)} rows, "
                    f"{len(held_out)} held out, {procs.world} x {procs.device} {procs.dtype}, preset {args.preset}")

        def take_step(step):
            with procs.stoppable():
                procs.check_stop()  # an update is short: a signal waits for its end
            return train_step(step, model, optimizer, rows, tokenizer, args, procs, weigh), []

        def evaluate(step):
            loss = held_out_loss(model, held_out, tokenizer, args, procs, weigh)
            procs.print(f"after step {step}: loss {loss:.3f} on {len(held_out)} held-out rows")
            return {"held_out_loss": loss}

        run.train(take_step, evaluate, shown=("loss",))
        summary = {"task": args.task, "seed": args.seed, "steps": args.steps,
                   "held_out_loss_before": run.evaluations[0]["held_out_loss"],
                   "held_out_loss_after": run.evaluations[args.steps]["held_out_loss"]}
        run.finish(summary)
        procs.print(f"the model is in {run.out}/step_{args.steps:06d}, the log in {run.out}/metrics.jsonl")
        return summary


if __name__ == "__main__":
    main(parse_args())
