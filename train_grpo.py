"""diffu-GRPO (d1, arXiv:2504.12216, algorithm 1): GRPO for a masked diffusion language model.

It differs from the GRPO you know in three ways:
1. Completions come from the diffusion sampler (sample.py), not from left-to-right decoding.
2. log pi(o | q) is estimated in one forward pass: the whole completion is [MASK], and each prompt token is [MASK] with
   probability p_mask_prompt. Every update draws new prompt masks, which makes many updates per rollout safe.
3. The advantage is the reward minus the mean of its group; it is not divided by the standard deviation.

    torchrun train_grpo.py --task countdown                       the embedded model, minutes on two CPU cores
    torchrun --nproc_per_node 8 train_grpo.py --task countdown --model GSAI-ML/LLaDA-8B-Instruct
"""
import contextlib
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from d1 import completion_mask, diffu_grpo_loss, draw_indices, generator, group_advantages, one_step_logps
from data import TASKS
from data.tokenizer import Tokenizer
from lora import adapters_off
from model import Config, find_checkpoint
from parallel import PARALLEL_OPTIONS, clip_and_step, gathered, processes
from run import FOLDER_OPTIONS, Run, load_model, make_parser
from sample import (SAMPLING, check_schedule, complete, encode_prompts, evaluate, generate, pad_left, sampling_options,
                    set_diffusion_steps)

OPTIONS = {  # option: (the authors' value for LLaDA-8B, the embedded model's, what it is)
    "problems": {
        "data": (None, None, "training problems: a file, d1's dataset folder or a dataset id; default: the task's own"),
        "eval_data": (None, None, "held-out problems; default: --data where that is no file, else the task's own"),
        "eval_count": (256, 256, "held-out problems in an evaluation"),
        "eval_every": (50, 10, "steps between evaluations"),
    },
    "rollouts": {
        "steps": (625, 20, "rollouts, each of which serves num_iterations updates"),
        "prompts_per_step": (16, 16, "over all processes"),
        "group_size": (6, 6, "G, completions of a prompt"),
        **SAMPLING,
        "temperature": (0.9, 0.9, "of the draws"),
    },
    "updates": {
        "num_iterations": (8, 4, "mu, updates per rollout"),
        "p_mask_prompt": (0.15, 0.15, "share of the prompt's tokens that an update hides"),
        "epsilon": (0.5, 0.5, "clip range of the ratio"),
        "beta": (0.04, 0.04, "weight of the KL term"),
        "lr": (3e-6, 5e-5, "learning rate, constant"),
        "weight_decay": (0.1, 0.1, "of AdamW"),
        "grad_clip": (0.2, 0.2, "largest norm of the gradient"),
        "microbatch": (1, 16, "prompts in a forward and backward pass of a process"),
        "lora_r": (128, 0, "rank of the adapters, 0 trains all weights"),
        "lora_alpha": (64.0, 64.0, "the adapters' scale is alpha / r"),
        "lora_targets": (*2 * [["q_proj", "k_proj", "v_proj", "up_proj"]], "matrices with an adapter"),
    },
    "folder": FOLDER_OPTIONS,
    "processes": PARALLEL_OPTIONS,
}
PAPER_UPDATES = {  # how long the paper trains LLaDA-8B on a task: (updates, num_iterations)
    "countdown": (5000, 8), "sudoku": (3800, 8), "gsm8k": (7700, 12), "math500": (6600, 12),
}
# options that a resumed run may change: they do not decide what is learnt
MAY_CHANGE = ("out", "resume", "steps", "eval_every", "save_every", "rollout_batch", "microbatch", "device", "replicas",
              "checkpoint_activations", "compile", "timeout")


def new_parser(argv=None):
    """The options, with the defaults that apply to a command line."""
    parser, chosen = make_parser(argv, __doc__, OPTIONS)
    parser.add_argument("--task", choices=sorted(TASKS), required=True)
    set_diffusion_steps(parser, chosen)
    if chosen.preset == "8b" and chosen.task and chosen.task[0] in PAPER_UPDATES:
        updates, mu = PAPER_UPDATES[chosen.task[0]]
        parser.set_defaults(steps=math.ceil(updates / mu), num_iterations=mu)
    return parser


def parse_args(argv=None):
    return new_parser(argv).parse_args(argv)


# ---------------------------------------------------------------- the algorithm

@dataclass
class Rollout:
    """This process's N prompts, with G completions each."""
    prompt: torch.Tensor        # (N, P) token ids, padded on the left
    attn_mask: torch.Tensor     # (N, P) bool, False at padding
    completions: torch.Tensor   # (N, G, L) token ids, all EOS behind the first EOS
    committed_at: torch.Tensor  # (N, G, L) the denoising round that fixed each token
    mask: torch.Tensor          # (N, G, L) bool, True up to and including the first EOS
    advantages: torch.Tensor    # (N, G)
    token_count: float          # True tokens in the masks of all processes

    def __getitem__(self, prompts):
        """The rollout of a slice of the prompts; token_count stays that of the step."""
        tensors = {name: value for name, value in vars(self).items() if name != "token_count"}
        return replace(self, **{name: tensor[prompts] for name, tensor in tensors.items()})


def roll_out(step, model, tokenizer, examples, args, procs, generate=generate):
    """Sample G completions of each prompt and grade them. Returns the Rollout, and a dict for each completion."""
    G = args.group_size
    drawn = draw_indices(len(examples), step, args.prompts_per_step, args.seed)
    places = procs.share(args.prompts_per_step, "--prompts_per_step")  # which of the step's prompts are ours
    repeated = [examples[drawn[i]] for i in places for _ in range(G)]  # every prompt G times
    keys = [(args.seed, "rollout", step, i, g) for i in places for g in range(G)]
    completions = complete(model, tokenizer, [example["ids"] for example in repeated], keys, generate=generate,
                           on_step=procs.check_stop, **sampling_options(args))
    rows = [grade(TASKS[args.task], text, example) for text, example in zip(completions.texts, repeated)]
    rewards = torch.tensor([row["reward"] for row in rows], device=procs.device).view(-1, G)  # (N, G)
    no_spread = (rewards == rewards[:, :1]).all(-1).tolist()  # N, True for groups that teach nothing
    for i, length in enumerate(completions.lengths.tolist()):
        rows[i] |= {"completion_length": length, "zero_spread_fraction": float(no_spread[i // G])}

    prompt, attn_mask = pad_left([example["ids"] for example in repeated[::G]], tokenizer.eos_id, procs.device)
    ids = completions.ids.view(*rewards.shape, -1)  # (N, G, L)
    mask = completion_mask(ids, tokenizer.eos_id)
    return Rollout(prompt, attn_mask, ids, completions.committed_at.view_as(ids), mask, group_advantages(rewards),
                   token_count=procs.sum(mask.sum())), rows


def grade(task, text, example):
    """What is logged of a completion: its reward, the parts of the reward, the task's scores."""
    parts = task.reward(text, example)
    reward = float(sum(parts.values()))
    if not math.isfinite(reward):
        raise ValueError(f"{task.__name__}.reward gave {parts} for {text[:80]!r}: the parts must be finite numbers")
    return {"reward": reward, **{f"reward_{name}": value for name, value in parts.items()},
            **task.score(text, example), "prompt": example["prompt"], "completion": text}


def draw_prompt_masks(rollout, step, args, procs):
    """Which prompt tokens each of the mu updates hides: (mu, N, P) bool. Padding is left alone."""
    masks = []
    for i, is_real in zip(procs.share(args.prompts_per_step, "--prompts_per_step"), rollout.attn_mask.cpu()):
        mask = torch.zeros(args.num_iterations, len(is_real), dtype=torch.bool)  # (mu, P)
        draws = torch.rand(args.num_iterations, int(is_real.sum()),
                           generator=generator(args.seed, "prompt mask", step, i))
        mask[:, is_real] = draws < args.p_mask_prompt
        masks.append(mask)
    return torch.stack(masks, dim=1).to(procs.device)


def one_step(policy, rollout, masked, mask_id):
    """d1's log-probabilities (N, G, L) of a rollout's completions under prompt masks (N, P)."""
    return one_step_logps(policy, rollout.prompt, masked, rollout.completions, mask_id, rollout.attn_mask)


def diffu_grpo(logps, old_logps, ref_logps, rollout, masked, args):
    """d1's objective; see `diffu_grpo_loss`. `masked` is for estimators that score only some of the tokens."""
    return diffu_grpo_loss(logps, old_logps, ref_logps, rollout.advantages, rollout.mask, args.epsilon, args.beta,
                           rollout.token_count)


def train_step(step, model, reference, optimizer, tokenizer, examples, args, procs, *,
               draw=draw_prompt_masks, log_probs=one_step, objective=diffu_grpo, generate=generate):
    """One rollout and the mu updates that it serves. Returns the step's row for the log, and a row per completion.

    reference(): a context that gives the reference policy, None where beta is 0.
    """
    mu, mask_id = args.num_iterations, tokenizer.mask_id

    # 1. roll out: G completions of each prompt, their rewards, their advantages within the group
    with torch.no_grad(), gathered(model), procs.stoppable():
        rollout, rows = roll_out(step, model, tokenizer, examples, args, procs, generate)
    masks = draw(rollout, step, args, procs)  # masks[update, slice of prompts]
    parts = [slice(i, i + args.microbatch) for i in range(0, len(rollout.prompt), args.microbatch)]

    # 2. log-probabilities before the updates, of the policy and of the reference, under the masks of every update
    def score(policy):  # [update][part] (n, G, L)
        return [[log_probs(policy, rollout[part], masks[update, part], mask_id) for part in parts]
                for update in range(mu)]

    with torch.no_grad(), gathered(model):
        old_logps = ref_logps = score(model)
        if args.beta:
            with reference() as frozen:
                ref_logps = score(frozen)

    # 3. mu updates on the same completions, each under its own prompt masks
    stats, grad_norm = [], 0.0
    for update in range(mu):
        for i, part in enumerate(parts):
            logps = log_probs(model, rollout[part], masks[update, part], mask_id)  # (n, G, L)
            loss, shares = objective(logps, old_logps[update][i], ref_logps[update][i], rollout[part],
                                     masks[update, part], args)
            (loss * procs.world).backward()  # FSDP takes the mean over the processes, we want their sum
            stats.append({"loss": loss.detach(), **shares})
        grad_norm += clip_and_step(optimizer, args.grad_clip, loss, f"step {step + 1}", procs) / mu
    log = {name: procs.sum(sum(shares[name] for shares in stats)) / mu for name in stats[0]}  # means over the updates
    return {**procs.mean(rows), **log, "grad_norm": grad_norm}, rows


# ---------------------------------------------------------------- the run

def load_prompts(args, config, tokenizer, procs):
    """Training and held-out examples with the token ids of their prompts."""
    task, room = TASKS[args.task], config.max_sequence_length - args.gen_length
    examples = encode_prompts(task.load("train", data=args.data, seed=args.seed), tokenizer, room, procs)
    if len(examples) < args.prompts_per_step:
        raise SystemExit(f"error: {len(examples)} usable prompts are fewer than --prompts_per_step "
                         f"{args.prompts_per_step}")
    source = args.eval_data
    if source is None and args.data and not Path(args.data).is_file():
        source = args.data
    held_out = task.load("test", data=source, count=args.eval_count) if args.eval_count else []
    return examples, encode_prompts(held_out, tokenizer, room, procs)


def load_reference(model, folder, config, args, procs):
    """A context that gives the initial policy: the adapters off, or a frozen model where all weights are trained."""
    if args.lora_r:
        return lambda: adapters_off(model)
    if not args.beta:
        return None
    frozen = load_model(folder, config, args, procs, is_trained=False)
    return lambda: contextlib.nullcontext(frozen)


def evaluate_policy(step, model, tokenizer, held_out, args, procs, generate):
    """Metrics on held-out problems, at the rollout temperature and greedy: the same problems and noise every time."""
    metrics = {}
    for name, temperature in (("sampled", args.temperature), ("greedy", 0.0)) if held_out else ():
        sampling = sampling_options(args) | {"temperature": temperature, "generate": generate}
        with gathered(model):
            means, _ = evaluate(model, tokenizer, TASKS[args.task], held_out, procs, args.seed, **sampling)
        procs.print(f"after step {step}: {means['accuracy']:.1%} of {len(held_out)} held-out problems are right at "
                    f"temperature {temperature}")
        metrics |= {f"held_out_{name}_{metric}": value for metric, value in means.items()}
    return metrics


def summarise(run, args):
    """What summary.json says: accuracy at the rollout temperature and greedy, before and after."""
    summary = {"task": args.task, "seed": args.seed, "steps": args.steps}
    for when, step in (("before", 0), ("after", args.steps)):
        metrics = run.evaluations.get(step, {})
        summary[f"accuracy_{when}"] = metrics.get("held_out_sampled_accuracy")
        summary[f"greedy_{when}"] = metrics.get("held_out_greedy_accuracy")
    return summary


def main(args, draw=draw_prompt_masks, log_probs=one_step, objective=diffu_grpo, generate=generate, step=None):
    """Train. What d1 does can be swapped by an argument, see `train_step`; `step` takes the place of all of it."""
    check_schedule(args.gen_length, args.diffusion_steps, args.block_length)
    if not args.temperature:
        raise SystemExit("error: --temperature 0 gives equal completions of a prompt: use for example 0.9")
    methods = {"draw": draw, "log_probs": log_probs, "objective": objective, "generate": generate}
    with processes(args.device, args.dtype, args.timeout) as procs:
        procs.share(args.prompts_per_step, "--prompts_per_step")
        run = Run(args.out or f"runs/train_grpo-{args.task}", args, procs, MAY_CHANGE)
        folder = find_checkpoint(args.model)
        config = Config.from_folder(folder)
        tokenizer = Tokenizer.from_folder(folder, config)
        examples, held_out = load_prompts(args, config, tokenizer, procs)
        model = load_model(folder, config, args, procs)
        reference = load_reference(model, folder, config, args, procs)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, args.lr, betas=(0.9, 0.99), weight_decay=args.weight_decay, fused=True)
        run.restore(model, optimizer, tokenizer)
        procs.print(f"diffu-GRPO on {args.task}: {sum(p.numel() for p in trainable):,} trainable parameters, "
                    f"{len(examples)} prompts, {procs.world} x {procs.device} {procs.dtype}, preset {args.preset}")

        def take_step(number):
            row, completions = (step or train_step)(number, model, reference, optimizer, tokenizer, examples, args,
                                                    procs, **methods)
            return row, completions[:args.group_size]  # the samples of one prompt

        run.train(take_step, lambda number: evaluate_policy(number, model, tokenizer, held_out, args, procs, generate),
                  shown=("reward", "accuracy", "kl"))
        summary = summarise(run, args)
        run.finish(summary)
        procs.print(f"the model is in {run.out}/step_{args.steps:06d}, the log in {run.out}/metrics.jsonl")
        return summary


if __name__ == "__main__":
    main(parse_args())
