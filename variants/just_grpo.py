"""JustGRPO (arXiv:2601.15165; grpo.py): GRPO with exact log-probabilities, for completions sampled left to right.

    python variants/just_grpo.py --task countdown

A rollout commits one token a round, the first that is masked. So log pi(o | q) is the sum of log p(o_t | q, o_<t,
M...M): one row of the network for every token. Each pass scores a few positions and has a backward pass of its own,
which keeps the memory constant. There is one update per rollout and no KL term, so the ratio is 1 and the clip inert:

    - 1 / (L * completions of unequal groups) * sum_i A_i sum_t log p(o_t | q, o_<t, M...M),
    A = (r - mean) / (std + 1e-4)

JustGRPO trains on the tokens behind EOS too; here they were not sampled. Its group has 16 completions, its learning
rate is 1.7 times d1's. Evaluations commit the most confident token of a block first, as in d1, or those above a
threshold.
"""
import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import train_grpo  # noqa: E402
from parallel import clip_and_step, gathered  # noqa: E402
from variants import fast_dllm  # noqa: E402
from variants.canvases import make_canvases  # noqa: E402
from variants.evaluate import check_rounds, drop_unread  # noqa: E402

UNREAD = "num_iterations p_mask_prompt epsilon beta".split()


def score_positions(policy, rollout, positions, mask_id):
    """log p(o_t | q, o_<t, M...M) at some positions t (S,) of all completions: (n, S, G)."""
    (n, G, L), P = rollout.completions.shape, rollout.prompt.shape[1]
    is_hidden = torch.arange(L, device=positions.device) >= positions[:, None, None]  # (S, 1, L)
    rows, attn_mask = make_canvases(rollout, is_hidden.expand(n, -1, G, -1), mask_id)  # (n * S * G, T)
    keep = (P + positions).repeat_interleave(G).repeat(n)[:, None]  # (n * S * G, 1)
    targets = rollout.completions[..., positions].transpose(1, 2)  # (n, S, G)
    return policy(rows, attn_mask, keep, targets=targets.reshape(-1, 1)).view(n, -1, G)


def train_step(step, model, reference, optimizer, tokenizer, examples, args, procs, **unused):
    """In the place of train_grpo.train_step: one rollout and one update. Returns a row of metrics, and sample rows."""
    left_to_right = argparse.Namespace(**{**vars(args), "block_length": 1, "diffusion_steps": args.gen_length})
    with torch.no_grad(), gathered(model), procs.stoppable():
        rollout, rows = train_grpo.roll_out(step, model, tokenizer, examples, left_to_right, procs)
    spread = rollout.advantages.std(-1, keepdim=True)  # (N, 1), of the rewards
    rollout.advantages = rollout.advantages / (spread + 1e-4)  # (N, G)
    teaching = procs.sum((spread > 1e-6).sum()) * args.group_size  # completions
    lengths = procs.gather([int(rollout.mask.sum(-1).max())])
    positions = torch.arange(max(lengths), device=procs.device).split(args.positions_per_pass)  # on all ranks alike

    total = 0.0
    for start in range(0, len(rollout.prompt), args.microbatch):
        batch = rollout[start:start + args.microbatch]  # n prompts
        for part in positions:
            logps = score_positions(model, batch, part, tokenizer.mask_id)  # (n, S, G)
            gains = batch.advantages[:, None] * logps * batch.mask[..., part].transpose(1, 2)  # (n, S, G)
            loss = -gains.sum() / (args.gen_length * max(1, teaching))
            (loss * procs.world).backward()  # FSDP averages over the processes, we want the sum
            total += loss.item()
    log = {"loss": procs.sum(total), "grad_norm": clip_and_step(optimizer, args.grad_clip),
           "zero_spread_fraction": 1 - teaching / (args.prompts_per_step * args.group_size)}
    for name, value in rows[0].items():
        if not isinstance(value, str):
            log[name] = procs.sum(sum(row[name] for row in rows)) / (len(rows) * procs.world)
    return log, rows


def parse_args(argv=None):
    parser = train_grpo.new_parser(argv)
    parser.description = __doc__.partition("\n")[0]
    parser.add_argument("--positions_per_pass", type=int, default=8, help="in a forward and backward pass")
    parser.add_argument("--threshold", type=float, help="for evaluations, see variants/fast_dllm.py")
    parser.set_defaults(temperature=1.0, grad_clip=1.0, weight_decay=0.0)
    args = parser.parse_args(argv)
    if args.positions_per_pass < 1:
        raise SystemExit("error: --positions_per_pass must be at least 1")
    check_rounds(args, argv)
    drop_unread(args, argv, UNREAD, "by JustGRPO")
    args.beta = 0.0  # train_grpo.main looks at it
    args.out = args.out or f"runs/just_grpo-{args.task}"
    return args


def main(args):
    generate = train_grpo.generate
    if args.threshold:
        generate = functools.partial(fast_dllm.generate, threshold=args.threshold)
    return train_grpo.main(args, step=train_step, generate=generate)


if __name__ == "__main__":
    main(parse_args())
