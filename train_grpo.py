"""diffu-GRPO (d1, section 3.2, algorithm 1): policy-gradient RL for masked diffusion language models.

It is GRPO but for four things:
1. completions come from the diffusion sampler (sample.py), not from left-to-right decoding;
2. log pi(o | q) is the one-step estimate: one forward pass, the completion all [MASK], each prompt token [MASK] with
   probability p_mask_prompt; each of the mu updates per rollout has a fresh prompt mask, which lets mu be large;
3. the advantage is reward - mean of the group, not divided by the standard deviation;
4. all G completions of a prompt share its masks, so that one row scores them all (d1.one_step_logps).

    torchrun train_grpo.py --task countdown                  the embedded model, minutes on two CPU cores
"""
import argparse
import contextlib
import functools
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from d1 import (completion_mask, coupled_logps, diffu_grpo_loss, draw_indices, generator, group_advantages,
                masked_logps, one_step_logps, random_mask_ratio, sequence_loss, trajectory_logps, wd1_loss)
from data import TASKS
from data.tokenizer import Tokenizer
from model import (HEAD_CHUNK, Config, LLaDA, adapters_off, add_lora, find_checkpoint, init_lora, load_weights,
                   save_weights)
from parallel import (Passes, Processes, Run, Signals, add_parallel_options, compile_time, fill, fill_defaults,
                      gathered, one_line_errors, parallelise, pick_dtype, print_plan, processes, progress,
                      update_or_stop)
from sample import SAMPLING, add_sampling_options, check_schedule, complete, encode_prompts, evaluate, pad_left

# option: (PAPER, the authors' value at 8B; TINY, the embedded model's)
DEFAULTS = {
    **SAMPLING, "steps": (625, 20), "prompts_per_step": (16, 16), "group_size": (6, 6), "num_iterations": (8, 4),
    "lr": (3e-6, 5e-5), "lora_r": (128, 0), "microbatch": (1, 16), "eval_every": (50, 10), "eval_count": (256, 256),
}
# task: the paper's (updates, num_iterations), from which `default_options` has steps
UPDATES = {"gsm8k": (7700, 12), "math500": (6600, 12), "countdown": (5000, 8), "sudoku": (3800, 8)}

ESTIMATORS = ("one_step", "random_mask", "coupled", "trajectory")
OBJECTIVES = {"grpo": diffu_grpo_loss, "sequence": sequence_loss, "wd1": wd1_loss}

PLANNED_PROMPT = 200  # tokens of a prompt in --plan: where the authors cut theirs

# what a resumed run may not change: it decides what was learnt so far, or which draws come next
FIXED = ("task", "data", "model", "seed", "prompts_per_step", "lora_r", "lora_targets", "dtype", "estimator",
         "objective")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--task", choices=sorted(TASKS), required=True)
    p.add_argument("--data", help="a file of problems, a folder with the published ones, or a dataset id; default: "
                   "generated problems for countdown and sudoku, the public dataset for gsm8k and math500")
    p.add_argument("--eval_data", help="held-out problems; default: --data if that is no file, else the task's own")
    p.add_argument("--model", default="data/tiny", help="checkpoint folder or hub id")
    p.add_argument("--out", help="the run's folder, default runs/train_grpo-<task>")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, help="rollouts, each with num_iterations updates; d1: see UPDATES")
    p.add_argument("--prompts_per_step", type=int, help="prompts per rollout over all processes; d1: 16")
    p.add_argument("--group_size", type=int, help="G, completions per prompt; d1 code: 6")
    p.add_argument("--num_iterations", type=int, help="mu, updates per rollout; d1 code: 12, on puzzles 8")
    p.add_argument("--masks_per_prompt", type=int, default=1, help="K, prompt masks per update; d1 algorithm 1: 1")
    p.add_argument("--p_mask_prompt", type=float, default=0.15, help="of the one-step estimator; d1: 0.15")
    p.add_argument("--estimator", choices=ESTIMATORS, default="one_step",
                   help="of the log-probabilities; random_mask: UniGRPO, coupled: DiffuCoder, trajectory: d2")
    p.add_argument("--snapshots", type=int, default=4, help="of the rollout, that the trajectory estimator scores")
    p.add_argument("--objective", choices=sorted(OBJECTIVES), default="grpo",
                   help="sequence: GSPO's ratio; wd1: weighted log-likelihood, its paper has --beta 0")
    p.add_argument("--epsilon", type=float, default=0.5, help="clip range of the ratio; d1 code: 0.5")
    p.add_argument("--beta", type=float, default=0.04, help="weight of the KL term, 0 drops it; d1 code: 0.04")
    p.add_argument("--lr", type=float, help="constant; d1 code: 3e-6")
    p.add_argument("--weight_decay", type=float, default=0.1, help="d1: 0.1")
    p.add_argument("--grad_clip", type=float, default=0.2, help="d1: 0.2")
    add_sampling_options(p)
    p.add_argument("--temperature", type=float, default=0.9, help="of the rollouts; d1 code: 0.9")
    p.add_argument("--microbatch", type=int, help="prompts per forward and backward pass of a process; accumulated")
    p.add_argument("--lora_r", type=int, help="d1: 128; 0 trains all weights")
    p.add_argument("--lora_alpha", type=float, default=64, help="d1: 64")
    p.add_argument("--lora_targets", nargs="+", default=["q_proj", "k_proj", "v_proj", "up_proj"],
                   help="d1 code, in effect: q k v up")
    p.add_argument("--eval_every", type=int, help="steps between evaluations on held-out problems")
    p.add_argument("--eval_count", type=int, help="held-out problems per evaluation; 0: none")
    p.add_argument("--save_every", type=int, default=0, help="steps between checkpoints, 0: only the last")
    p.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint in --out, if any")
    add_parallel_options(p)
    return p.parse_args(argv)


def check_options(args, config):
    """Raises ValueError naming the option and its valid values."""
    check_schedule(args.gen_length, args.diffusion_steps, args.block_length, args.threshold)
    if args.threshold and args.keep_sharded:
        raise ValueError("--threshold with --keep_sharded: each process samples in as many forward passes as its own "
                         "rows need, and those that gather weights must be equally many: drop one of the two")
    for name in ("steps", "prompts_per_step", "num_iterations", "masks_per_prompt", "snapshots", "microbatch",
                 "rollout_batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, found {getattr(args, name)}")
    if args.group_size < 2:
        raise ValueError(f"--group_size {args.group_size}: a group of one has no advantage, use at least 2")
    if args.temperature <= 0:
        raise ValueError(f"--temperature {args.temperature} gives equal completions of a prompt: use e.g. 0.9")
    if not 0 <= args.p_mask_prompt <= 1:
        raise ValueError(f"--p_mask_prompt {args.p_mask_prompt} must lie in [0, 1]")


def default_options(task):
    """DEFAULTS, with how long the paper trains on this task."""
    updates, mu = UPDATES.get(task, UPDATES["countdown"])
    return {**DEFAULTS, "steps": (math.ceil(updates / mu), 20), "num_iterations": (mu, 4)}


def read_prompts(args, config, tokenizer, procs):
    """Training and held-out examples with their token ids under "ids", without those that are too long."""
    task, room = TASKS[args.task], config.max_sequence_length - args.gen_length
    examples = encode_prompts(task.load("train", data=args.data, seed=args.seed), tokenizer, room, procs)
    if len(examples) < args.prompts_per_step:
        raise ValueError(f"{len(examples)} usable prompts are fewer than --prompts_per_step {args.prompts_per_step}")
    source = args.eval_data or (args.data if args.data and not Path(args.data).is_file() else None)
    held_out = task.load("test", data=source, count=args.eval_count) if args.eval_count else []
    return examples, encode_prompts(held_out, tokenizer, room, procs)


def draw_prompt_masks(lengths, width, step, mine, args):
    """(N, mu, K, P) bool: the prompt tokens that each update's masks hide. Drawn per prompt, padding left alone.

    lengths: of this process's prompts; width: P; mine: their numbers within the step, over all processes.
    """
    masks = torch.zeros(len(lengths), args.num_iterations, args.masks_per_prompt, width, dtype=torch.bool)
    for row, (length, index) in enumerate(zip(lengths, mine)):
        draws = torch.rand(*masks.shape[1:3], length, generator=generator(args.seed, "prompt mask", step, index))
        masks[row, ..., width - length:] = draws < args.p_mask_prompt
    return masks


def draw_completion_masks(step, mine, args):
    """(N, mu, K, G, L) bool, completion tokens that each update's masks hide, and (N, mu, K, G), with what probability.

    For the estimators that see a part of the completion; see `draw_prompt_masks`.
    """
    mu, shape, masks, ratios = args.num_iterations, (args.masks_per_prompt, args.group_size), [], []
    for index in mine:
        g = generator(args.seed, "completion mask", step, index)
        if args.estimator == "random_mask":
            ratios.append(random_mask_ratio(shape, mu, g))
        else:
            ratios.append(0.2 + 0.6 * torch.rand(mu, *shape, generator=g))  # DiffuCoder's code
        masks.append(torch.rand(mu, *shape, args.gen_length, generator=g) < ratios[-1][..., None])
    return torch.stack(masks), torch.stack(ratios)


def grade(task, examples, texts):
    """Rewards of every text, dicts {part: value}, and its scores. A reward that is no finite number is an error."""
    parts, scores = [], []
    for example, text in zip(examples, texts):
        part = task.reward(text, example)
        numbers = list(part.values()) if isinstance(part, dict) else [None]
        if any(isinstance(v, bool) or not isinstance(v, (int, float)) or not math.isfinite(v) for v in numbers):
            raise ValueError(f"{task.__name__}.reward returned {part!r} for {text[:80]!r}, "
                             "expected a dict of finite numbers")
        parts.append(part)
        scores.append(task.score(text, example))
    return parts, scores


@dataclass
class Rollout:
    """What a step's updates need: this process's N prompts, G completions of each, log-probs before the updates."""
    prompt: torch.Tensor  # (N, P)
    attn_mask: torch.Tensor | None  # (N, P), False at padding
    prompt_masked: torch.Tensor  # (N, mu, K, P)
    completions: torch.Tensor  # (N, G, L)
    mask: torch.Tensor  # (N, mu, 1 or K, G, L), True for tokens that count
    advantages: torch.Tensor  # (N, G)
    counts: list  # mu numbers, what the losses are divided by, see `batch_counts`
    unmasked_at: torch.Tensor | None = None  # (N, G, L), for the trajectory estimator
    completion_masked: torch.Tensor | None = None  # (N, mu, K, G, L), for random_mask and coupled
    ratio: torch.Tensor | None = None  # (N, mu, K, G), likewise
    old: torch.Tensor = None  # (N, mu, K, G, L)
    ref: torch.Tensor | None = None  # likewise


def batch_counts(mask, args, procs):
    """What the loss of each update is divided by, over all processes: counted tokens (a mean over K masks), or, where
    the objective is one of whole completions, completions.
    """
    tokens = procs.sum({m: int(mask[:, m].sum()) / mask.shape[2] for m in range(mask.shape[1])})
    completions = args.prompts_per_step * args.group_size
    return [max(count, 1) if args.objective == "grpo" else completions for count in tokens.values()]


def log_probs(policy, rollout, part, updates, args, mask_id):
    """(n, m, K, G, L): log-probs of a slice of the prompts under the masks of a slice of the updates (--estimator)."""
    given, rows = (policy, rollout.prompt[part]), rollout.completions[part]
    attn_mask = None if rollout.attn_mask is None else rollout.attn_mask[part]
    if args.estimator == "one_step":
        masked = rollout.prompt_masked[part, updates]  # (n, m, K, P)
        logps = one_step_logps(*given, masked.flatten(1, 2), rows, mask_id, attn_mask)
    elif args.estimator == "trajectory":  # no draw in it: the same for all updates
        logps = trajectory_logps(*given, rows, rollout.unmasked_at[part], args.snapshots, mask_id, attn_mask)
        return logps[:, None].expand(-1, len(range(args.num_iterations)[updates]), -1, -1, -1)
    else:
        masked = rollout.completion_masked[part, updates]  # (n, m, K, G, L)
        if args.estimator == "random_mask":
            logps = masked_logps(*given, rows, masked.flatten(1, 2), mask_id, attn_mask)
        else:
            ratio = rollout.ratio[part, updates]  # (n, m, K, G)
            logps = coupled_logps(*given, rows, masked.flatten(1, 2), ratio.flatten(1, 2), mask_id, attn_mask)
    return logps.unflatten(1, masked.shape[1:3])


@torch.no_grad()
def score(model, reference, rollout, slices, args, mask_id):
    """Set the log-probs of the rollout under the policy that made it and the reference: one batch for all masks."""
    def all_masks(policy):
        return torch.cat([log_probs(policy, rollout, part, slice(None), args, mask_id) for part in slices])

    rollout.old = all_masks(model)
    if reference:
        with reference() as policy:
            rollout.ref = all_masks(policy)


def add_up(rows):
    """One dict of a list of dicts: sums, but for names that begin with max_."""
    return {name: (max if name.startswith("max_") else sum)(row[name] for row in rows) for name in rows[0]}


def update_policy(step, update, model, optimizer, rollout, slices, args, procs, mask_id):
    """One clipped update under its own prompt masks. Returns what is logged of it, over all processes."""
    rows = []
    for part in slices:
        logps = log_probs(model, rollout, part, slice(update, update + 1), args, mask_id)[:, 0]  # (n, K, G, L)
        loss, stats = OBJECTIVES[args.objective](
            logps, rollout.old[part, update], None if rollout.ref is None else rollout.ref[part, update],
            rollout.advantages[part], rollout.mask[part, update], args.epsilon, args.beta, rollout.counts[update])
        (loss * procs.world).backward()  # FSDP takes the mean over the processes
        rows.append({"loss": loss.item(), **{name: float(value) for name, value in stats.items()}})
    grad_norm, per_rank = update_or_stop(optimizer, args.grad_clip, f"step {step + 1}, update {update + 1}",
                                         add_up(rows), procs)
    return {**add_up(per_rank), "grad_norm": grad_norm}


def mean_of(rows, procs):
    """{name: mean} of a list of dicts over all processes."""
    rows = procs.gather(rows)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def build_policy(args, folder, procs, dtype):
    """The model, spread over the processes, with adapters if it is to have some; `dtype` is what it computes in."""
    def shape(model):
        if args.lora_r:
            add_lora(model, args.lora_r, args.lora_alpha, args.lora_targets)
        parallelise(model, args, procs, dtype)
    kept = dtype if args.lora_r else torch.float32  # updates would vanish in bfloat16
    model = LLaDA.from_pretrained(folder, procs.device, kept, shape, fill)
    return init_lora(model, generator(args.seed, "lora"), fill).eval()  # no dropout: the first ratio is 1


def reference_policy(model, args, folder, procs, dtype):
    """A context giving the initial policy: adapters off, or a frozen model of its own when all weights are trained."""
    if args.lora_r:
        return lambda: adapters_off(model)
    frozen = LLaDA.from_pretrained(folder, procs.device, dtype, lambda model: parallelise(
        model.requires_grad_(False), args, procs, dtype), fill)
    return lambda: contextlib.nullcontext(frozen)


def held_out_metrics(model, tokenizer, task, examples, args, procs, signals, words):
    """Held-out metrics at the rollout temperature and greedy, on the same problems and noise every time."""
    found = {}
    for name, temperature in (("sampled", args.temperature), ("greedy", 0.0)) if examples else ():
        sampling = {option: getattr(args, option) for option in SAMPLING}
        with gathered(model, args.keep_sharded):
            metrics, _ = evaluate(model, tokenizer, task, examples, procs, args.seed, f"{words}, {name}",
                                  temperature=temperature, droppable=signals.droppable,
                                  fill_canvas=args.keep_sharded, **sampling)
        found |= {f"{name}_{metric}": value for metric, value in metrics.items()}
    if found:
        procs.print(f"{words}: accuracy {found['sampled_accuracy']:.1%} at temperature {args.temperature}, "
                    f"{found['greedy_accuracy']:.1%} greedy, on {len(examples)} held-out problems")
    return found


def summarise(args, device, before, after, minutes):
    """What summary.json says: accuracy at the rollout temperature, greedy beside it, then every held-out metric."""
    return {"task": args.task, "seed": args.seed,
            "accuracy_before": before.get("sampled_accuracy"), "accuracy_after": after.get("sampled_accuracy"),
            "greedy_before": before.get("greedy_accuracy"), "greedy_after": after.get("greedy_accuracy"),
            "steps": args.steps, "minutes": minutes, "device": str(device), "before": before, "after": after}


def train_step(step, model, reference, optimizer, tokenizer, examples, args, procs, signals):
    """The algorithm: one rollout and its mu updates. Returns the step's row for the log and some samples.

    A stop that is asked for during the rollout drops it (parallel.Stopped); once updates begin, the step is finished.
    """
    task, G, mu, mask_id = TASKS[args.task], args.group_size, args.num_iterations, tokenizer.mask_id
    device = procs.device

    # roll out G completions of each prompt of this process's share
    clock = [time.monotonic()]
    mine = procs.share(args.prompts_per_step, "--prompts_per_step")  # which prompts of the step are ours
    drawn = draw_indices(len(examples), step, args.prompts_per_step, args.seed)
    batch = [examples[drawn[i]] for i in mine]
    repeated = [example for example in batch for _ in range(G)]
    sampling = {name: getattr(args, name) for name in (*SAMPLING, "temperature")}
    with gathered(model, args.keep_sharded), signals.droppable() as check:
        done = complete(model, tokenizer, [e["ids"] for e in repeated], on_step=check, fill_canvas=args.keep_sharded,
                        keys=[(args.seed, "rollout", step, i, g) for i in mine for g in range(G)], **sampling)
    completions = done.ids.view(len(batch), G, -1)  # (N, G, L)
    mask = completion_mask(completions, tokenizer.eos_id)[:, None, None].expand(-1, mu, -1, -1, -1)  # (N, mu, 1, G, L)
    clock.append(time.monotonic())

    # reward, advantages, K x mu masks
    parts, scores = grade(task, repeated, done.texts)
    rewards = torch.tensor([float(sum(p.values())) for p in parts], device=device).view(len(batch), G)
    prompt, attn_mask = pad_left([e["ids"] for e in batch], tokenizer.eos_id, device)  # (N, P)
    prompt_masked = draw_prompt_masks([len(e["ids"]) for e in batch], prompt.shape[1], step, mine, args)
    completion_masked = ratio = None
    if args.estimator in ("random_mask", "coupled"):
        completion_masked, ratio = (x.to(device) for x in draw_completion_masks(step, mine, args))
    if args.estimator == "random_mask":  # what is not masked is not scored
        mask = mask & completion_masked  # (N, mu, K, G, L)
    rollout = Rollout(prompt, attn_mask, prompt_masked.to(device), completions, mask, group_advantages(rewards),
                      batch_counts(mask, args, procs), done.unmasked_at.view_as(completions), completion_masked, ratio)

    # old and reference log-probs under each of the masks
    slices = [slice(i, i + args.microbatch) for i in range(0, len(batch), args.microbatch)]
    with gathered(model, args.keep_sharded):
        score(model, reference, rollout, slices, args, mask_id)
    clock.append(time.monotonic())

    # mu updates
    updates = [update_policy(step, m, model, optimizer, rollout, slices, args, procs, mask_id) for m in range(mu)]
    clock.append(time.monotonic())

    seconds = dict(zip(("rollout", "logps", "update"), (b - a for a, b in zip(clock, clock[1:]))))
    row = {"step": step + 1,
           **mean_of([{"reward": sum(part.values()), "accuracy": score["accuracy"], "completion_length": length,
                       **{f"reward_{name}": value for name, value in part.items()}}
                      for part, score, length in zip(parts, scores, done.lengths.tolist())], procs),
           **mean_of([{"zero_spread_fraction": float(min(group) == max(group))} for group in rewards.tolist()], procs),
           **{name: value / (1 if name.startswith("max_") else mu) for name, value in add_up(updates).items()},
           "lr": args.lr, "seconds": seconds,
           "tokens_per_second": procs.world * done.ids.numel() / seconds["rollout"]}
    samples = [{"step": step + 1, "prompt": batch[0]["prompt"], "completion": text, "reward": part}
               for text, part in zip(done.texts[:G], parts)]
    return row, samples


def passes_of(c, args, gpus):
    """What a step does, for --plan, with prompts of PLANNED_PROMPT tokens."""
    mine = Processes(0, gpus, torch.device("cpu")).share(args.prompts_per_step, "--prompts_per_step")
    length, N, K = PLANNED_PROMPT + args.gen_length, args.prompts_per_step, args.masks_per_prompt
    mu = args.num_iterations
    G, part = args.group_size, min(args.microbatch, len(mine))
    rows = {"one_step": K, "random_mask": K * G, "coupled": 2 * K * G + 1, "trajectory": args.snapshots * G}
    scored = Passes(N * rows[args.estimator], part * rows[args.estimator], length, args.gen_length, mu)
    policies, draws = 2 if args.beta else 1, 1 if args.estimator == "trajectory" else mu  # it is scored once for all mu
    return {"rollout": Passes(N * G, args.rollout_batch, length, args.block_length, args.diffusion_steps),
            "logps": replace(scored, times=policies * draws), "update": scored}


def main(args):
    if args.plan is not None:
        with one_line_errors():
            config = Config.from_folder(find_checkpoint(args.model, ("config.json",)))
            fill_defaults(args, default_options(args.task), config)
            check_options(args, config)
            return print_plan(config, args, HEAD_CHUNK, passes_of)
    with processes(args.device, args.timeout) as procs, Signals(procs, args.keep_sharded) as signals:
        with one_line_errors():
            folder = find_checkpoint(args.model)
            config = Config.from_folder(folder)
            chosen = fill_defaults(args, default_options(args.task), config)
            check_options(args, config)
            dtype, task = pick_dtype(args.dtype, procs.device), TASKS[args.task]
            procs.share(args.prompts_per_step, "--prompts_per_step")
            procs.check_replicas(args.replicas)
            options = {**vars(args), "device": procs.device, "dtype": dtype}
            run = Run(args.out or f"runs/train_grpo-{args.task}", options, procs, args.resume, FIXED)
            tokenizer = Tokenizer.from_folder(folder, config)
            examples, held_out = read_prompts(args, config, tokenizer, procs)
            model = build_policy(args, folder, procs, dtype)
            trainable = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trainable, lr=args.lr, betas=(0.9, 0.99), weight_decay=args.weight_decay,
                                          fused=True)
            reference = reference_policy(model, args, folder, procs, dtype) if args.beta else None
            state = run.restore(model, optimizer, load_weights, functools.partial(save_weights, base=args.model),
                                tokenizer.save)
        procs.print(f"diffu-GRPO on {args.task}: {sum(p.numel() for p in trainable):,} trainable parameters, "
                    f"{len(examples)} prompts, {procs.world} x {procs.device} {dtype}\n{chosen}")
        evaluation = functools.partial(held_out_metrics, model, tokenizer, task, held_out, args, procs, signals)
        with run.resumable():
            state["before"] = state["before"] or evaluation("before")
            for step, show in progress(range(state["step"] - bool(state["unlogged"]), args.steps), procs, args.task):
                if not state["unlogged"]:
                    state["unlogged"] = train_step(step, model, reference, optimizer, tokenizer, examples, args, procs,
                                                   signals)
                    state["step"] = step + 1
                row, samples = state["unlogged"]
                last = step + 1 == args.steps
                if last or args.eval_every and (step + 1) % args.eval_every == 0:
                    state["after"] = evaluation(f"step {step + 1}")
                    row |= {f"held_out_{name}": value for name, value in state["after"].items()}
                run.log("metrics.jsonl", [row])
                run.log("samples.jsonl", samples)
                state["unlogged"] = None
                show(reward=f"{row['reward']:.3f}", accuracy=f"{row['accuracy']:.1%}", kl=f"{row.get('kl', 0):.3f}",
                     tokens_s=f"{row['tokens_per_second']:.0f}")
                if last or args.save_every and (step + 1) % args.save_every == 0:
                    run.save()

        summary = summarise(args, procs.device, state["before"], state["after"] or state["before"], run.seconds / 60)
        run.finish(summary)
        if held_out:
            procs.print("held-out accuracy {accuracy_before:.1%} -> {accuracy_after:.1%} at the rollout temperature, "
                        "{greedy_before:.1%} -> {greedy_after:.1%} greedy, in {minutes:.1f} minutes".format(**summary))
        procs.print(f"the model is in {run.out}/step_{args.steps:06d}, the log in {run.out}/metrics.jsonl"
                    + (f"; {compile_time()}" if args.compile else ""))
        return summary


if __name__ == "__main__":
    main(parse_args())
