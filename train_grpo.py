"""diffu-GRPO (d1, arXiv:2504.12216, algorithm 1): GRPO for a masked diffusion language model.

It differs from the GRPO you know in three ways:
1. Completions come from the diffusion sampler (sample.py), not from left-to-right decoding.
2. log pi(o | q) is estimated in one forward pass: the whole completion is [MASK], and each prompt
   token is [MASK] with probability p_mask_prompt. Every update draws new prompt masks, which makes
   many updates per rollout safe.
3. The advantage is the reward minus the mean of its group, not divided by the standard deviation.

    torchrun train_grpo.py --task countdown            the embedded model, minutes on two CPU cores
    torchrun --nproc_per_node 8 train_grpo.py --task countdown --model GSAI-ML/LLaDA-8B-Instruct
"""
import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from d1 import (completion_mask, diffu_grpo_loss, draw_indices, generator, group_advantages,
                one_step_logps)
from data import TASKS
from lora import adapters_off
from parallel import PARALLEL_OPTIONS, clip_and_step, gathered, processes
from run import RUN_OPTIONS, Run, make_parser
from sample import (SAMPLING, check_schedule, complete, encode_prompts, evaluate, generate,
                    pad_left, sampling_options)

OPTIONS = {  # option: (for LLaDA-8B as the authors have it, for the embedded model, what it is)
    "problems": {
        "data": ("", "", "training problems: file, d1's dataset folder, dataset id; or its own"),
        "eval_data": ("", "", "held-out problems; or --data where that is no file; or the task's"),
        "eval_count": (256, 256, "held-out problems in an evaluation, 0: none"),
        "eval_every": (50, 10, "steps between evaluations, 0: only at the end"),
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
        "p_mask_prompt": (0.15, 0.15, "share of prompt tokens that an update hides, 0: none"),
        "epsilon": (0.5, 0.5, "clip range of the ratio, 0: clip at 1"),
        "beta": (0.04, 0.04, "weight of the KL term, 0: no reference policy"),
        "lr": (3e-6, 5e-5, "learning rate, constant"),
        "weight_decay": (0.1, 0.1, "of AdamW, 0: none"),
        "grad_clip": (0.2, 0.2, "largest norm of the gradient"),
        "microbatch": (1, 16, "prompts in a forward and backward pass of a process"),
        "lora_r": (128, 0, "rank of the adapters, 0 trains all weights"),
        "lora_alpha": (64.0, 64.0, "the scale of the adapters is alpha / r"),
        "lora_targets": (*2 * ["q_proj k_proj v_proj up_proj"], "adapted matrices"),
    },
    "run": RUN_OPTIONS,
    "processes": PARALLEL_OPTIONS,
}
PAPER_UPDATES = {  # how long the paper trains LLaDA-8B on a task: (updates, num_iterations)
    "countdown": (5000, 8), "sudoku": (3800, 8), "gsm8k": (7700, 12), "math500": (6600, 12)}


def new_parser(argv=None):
    parser, glance = make_parser(argv, __doc__, OPTIONS)
    parser.add_argument("--task", choices=sorted(TASKS), required=True)
    if glance.preset == "8b":
        updates, mu = PAPER_UPDATES.get(glance.task, (5000, 8))
        parser.set_defaults(steps=math.ceil(updates / mu), num_iterations=mu)
    return parser


def parse_args(argv=None):
    return new_parser(argv).parse_args(argv)


@dataclass
class Rollout:
    """This process's N prompts, with G completions each."""
    prompt: torch.Tensor        # (N, P) token ids, padded on the left
    attn_mask: torch.Tensor     # (N, P) bool, False at padding
    completions: torch.Tensor   # (N, G, L) token ids as sampled, behind the first EOS too
    committed_at: torch.Tensor  # (N, G, L) the denoising round that fixed each token
    mask: torch.Tensor          # (N, G, L) bool, True up to and including the first EOS
    advantages: torch.Tensor    # (N, G)
    token_count: float          # True values in the masks of all processes

    def __getitem__(self, prompts):
        """The rollout of a slice of the prompts; token_count stays that of the whole step."""
        tensors = {name: value for name, value in vars(self).items() if name != "token_count"}
        return replace(self, **{name: tensor[prompts] for name, tensor in tensors.items()})


def roll_out(step, model, tokenizer, examples, args, procs, generate=generate):
    """Sample G completions of each prompt and grade them. Returns the Rollout and rows to log."""
    G = args.group_size
    drawn = draw_indices(len(examples), step, args.prompts_per_step, args.seed)
    places = procs.share(args.prompts_per_step, "--prompts_per_step")  # our prompts of the step
    repeated = [examples[drawn[i]] for i in places for _ in range(G)]  # each prompt G times
    keys = [(args.seed, "rollout", step, i, g) for i in places for g in range(G)]  # of their noise
    done = complete(model, tokenizer, [example["ids"] for example in repeated], keys,
                    generate=generate, on_step=procs.check_stop, **sampling_options(args))
    rows = [grade(TASKS[args.task], *each) for each in zip(done.texts, repeated, done.lengths)]
    rewards = torch.tensor([row["reward"] for row in rows], device=procs.device).view(-1, G)  # (N, G)

    prompts = [example["ids"] for example in repeated[::G]]  # N lists
    prompt, attn_mask = pad_left(prompts, tokenizer.eos_id, procs.device)  # (N, P)
    ids = done.ids.view(*rewards.shape, -1)  # (N, G, L)
    mask = completion_mask(ids, tokenizer.eos_id)  # (N, G, L)
    return Rollout(prompt, attn_mask, ids, done.committed_at.view_as(ids), mask,
                   group_advantages(rewards), token_count=procs.sum(mask.sum())), rows


def grade(task, text, example, length):
    """What is logged of a completion: its reward, the parts of the reward, the task's scores."""
    parts = task.reward(text, example)  # such as {"exact": 1.0, "closed": 0.0}
    row = {"reward": float(sum(parts.values())), **task.score(text, example),
           **{f"reward_{name}": value for name, value in parts.items()},
           "completion_length": int(length), "prompt": example["prompt"], "completion": text}
    if not math.isfinite(row["reward"]):
        raise ValueError(f"{task.__name__}.reward gave {parts}, no finite numbers, for {text!r}")
    return row


def draw_prompt_masks(rollout, step, args, procs):
    """Which prompt tokens each of the mu updates hides: (mu, N, P) bool. Padding is left alone."""
    mu = args.num_iterations
    masks = torch.zeros_like(rollout.attn_mask).repeat(mu, 1, 1)  # (mu, N, P)
    places = procs.share(args.prompts_per_step, "--prompts_per_step")
    for i, mask, is_real in zip(places, masks.unbind(1), rollout.attn_mask):  # (mu, P) and (P,)
        random = generator(args.seed, "prompt mask", step, i)  # the prompt's own, on any rank
        draws = torch.rand(mu, int(is_real.sum()), generator=random).to(procs.device)
        mask[:, is_real] = draws < args.p_mask_prompt  # (mu, P), a view into masks
    return masks


def one_step(policy, rollout, masked, mask_id):
    """d1's estimate of log pi, (N, G, L), of a rollout's completions under prompt masks (N, P)."""
    return one_step_logps(policy, rollout.prompt, masked, rollout.completions, mask_id,
                          rollout.attn_mask)


def diffu_grpo(logps, old_logps, ref_logps, rollout, masked, args):
    """d1's objective, see `diffu_grpo_loss`; it scores every token, whatever was `masked`."""
    return diffu_grpo_loss(logps, old_logps, ref_logps, rollout.advantages, rollout.mask,
                           args.epsilon, args.beta, rollout.token_count)


def train_step(step, model, reference, optimizer, tokenizer, examples, args, procs, *,
               draw=draw_prompt_masks, log_probs=one_step, objective=diffu_grpo,
               generate=generate):
    """One rollout and the mu updates that it serves. Returns a row of metrics, and sample rows."""
    mu, mask_id = args.num_iterations, tokenizer.mask_id

    # 1. roll out: G completions of each prompt, their rewards, their advantages in the group
    with torch.no_grad(), gathered(model), procs.stoppable():
        rollout, rows = roll_out(step, model, tokenizer, examples, args, procs, generate)
    masks = draw(rollout, step, args, procs)  # masks[update, slice of prompts]
    parts = [slice(i, i + args.microbatch) for i in range(0, len(rollout.prompt), args.microbatch)]

    # 2. log-probabilities before the updates, of policy and reference, under every update's masks
    passes = [(update, part) for update in range(mu) for part in parts]
    with torch.no_grad(), gathered(model):
        old_logps = [log_probs(model, rollout[p], masks[u, p], mask_id) for u, p in passes]
        ref_logps = old_logps  # not looked at where beta is 0
        if args.beta:
            with reference() as base:
                ref_logps = [log_probs(base, rollout[p], masks[u, p], mask_id) for u, p in passes]

    # 3. mu updates on the same completions, each under its own prompt masks
    stats, grad_norm = [], 0.0  # of all updates
    scored = zip(old_logps, ref_logps)  # in the order of the updates
    for update in range(mu):
        for part in parts:
            batch, masked = rollout[part], masks[update, part]  # n prompts
            logps = log_probs(model, batch, masked, mask_id)  # (n, G, L)
            loss, shares = objective(logps, *next(scored), batch, masked, args)
            (loss * procs.world).backward()  # FSDP averages over the processes, we want the sum
            stats.append({"loss": loss.detach(), **shares})
        grad_norm += clip_and_step(optimizer, args.grad_clip) / mu
    log = {name: procs.sum(sum(shares[name] for shares in stats)) / mu for name in stats[0]}
    no_spread = procs.sum((rollout.advantages.abs() < 1e-6).all(1).sum())  # they teach nothing
    log["zero_spread_fraction"] = no_spread / args.prompts_per_step
    for name, value in rows[0].items():
        if not isinstance(value, str):
            log[name] = procs.sum(sum(row[name] for row in rows)) / (len(rows) * procs.world)
    return {**log, "grad_norm": grad_norm}, rows


def load_prompts(run, args, procs):
    """Training and held-out examples with the tokens of their prompts."""
    task, room = TASKS[args.task], run.config.max_sequence_length - args.gen_length
    examples = task.load("train", data=args.data or None, seed=args.seed)
    source = args.eval_data or ("" if Path(args.data).is_file() else args.data)
    held_out = task.load("test", data=source or None, count=args.eval_count)
    return [encode_prompts(rows, run.tokenizer, room, procs) for rows in (examples, held_out)]


def evaluate_policy(run, model, held_out, args, procs, generate):
    """Metrics on held-out problems at the rollout temperature, and the greedy accuracy."""
    task, metrics = TASKS[args.task], {}
    for temperature in (args.temperature, 0.0):
        setup = sampling_options(args) | {"temperature": temperature, "generate": generate}
        with gathered(model):
            means, _ = evaluate(model, run.tokenizer, task, held_out, procs, args.seed, **setup)
        metrics = metrics or {f"held_out_{name}": mean for name, mean in means.items()}
    return {**metrics, "held_out_greedy": means["accuracy"]}  # of the second round


def main(args, draw=draw_prompt_masks, log_probs=one_step, objective=diffu_grpo,
         generate=generate, step=None):
    """Train. What d1 does can be replaced, see `train_step`; `step` takes the place of it all."""
    methods = dict(draw=draw, log_probs=log_probs, objective=objective, generate=generate)
    check_schedule(args.gen_length, args.diffusion_steps, args.block_length)
    if args.temperature == 0 or args.group_size < 2:
        raise SystemExit("error: --temperature 0 and --group_size 1 leave no advantages to learn")
    with processes(args) as procs:
        procs.share(args.prompts_per_step, "--prompts_per_step")
        run = Run("train_grpo", args, procs, may_change=["steps"])
        examples, held_out = load_prompts(run, args, procs)
        model, optimizer = run.load((0.9, 0.99), examples + held_out)
        frozen = model  # below its adapters
        if args.beta and not args.lora_r:
            frozen = run.load_model(is_trained=False)  # a copy as large as the model
        reference = functools.partial(adapters_off, frozen)
        procs.print(f"diffu-GRPO on {len(examples)} prompts of {args.task}")
        with run, torch.compiler.set_stance("force_eager"):  # --compile is for sampling alone
            for number in range(run.step, args.steps + 1):
                if held_out and run.is_due(args.eval_every):
                    metrics = evaluate_policy(run, model, held_out, args, procs, generate)
                    run.log("metrics.jsonl", [metrics])
                if number == args.steps:
                    break
                inputs = model, reference, optimizer, run.tokenizer, examples, args, procs
                row, samples = (step or train_step)(number, *inputs, **methods)
                run.log_step(row, samples[:args.group_size], shown=("reward", "accuracy", "kl"))
        return run.finish()


if __name__ == "__main__":
    main(parse_args())
