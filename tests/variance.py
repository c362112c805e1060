"""Is a prompt mask shared by the group better than a mask for every completion? The variance of the gradient says.

    python tests/variance.py --json results/variance.json

The gradient of diffu-GRPO's loss at ratio 1, over all weights of the embedded model: real rollouts at temperature 0.9,
real rewards, G 6; kl has no gradient where policy and reference agree. Three ways to spend masks: one for every
completion (the authors' code: G rows of the network), one for the group (ours: 1 row), K for the group (K rows). They
have the same expectation. Per way, estimated without bias from many draws of masks, the rollouts fixed:

    mask    E ||g - E g||^2 over masks, mean over prompts
    total   the same over masks and prompts, each with its completions: that of a step with one prompt

both as a ratio to one mask for every completion. Groups without spread count, with their gradient of zero.
"""
import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from d1 import completion_mask, diffu_grpo_loss, generator, group_advantages, one_step_logps  # noqa: E402
from data import TASKS  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from model import LLaDA  # noqa: E402
from parallel import write_text  # noqa: E402
from sample import complete, table  # noqa: E402
from train_grpo import grade  # noqa: E402

G, K = 6, (1, 2, 3, 6)
OWN = "one for every completion"
FORMS = [OWN, *(f"{k} for the group" for k in K)]


class Moments:
    """Mean and unbiased variance (summed over components) of vectors that are not kept."""

    def __init__(self):
        self.count, self.sum, self.squares = 0, 0.0, 0.0

    def add(self, vector):
        self.count, self.sum = self.count + 1, self.sum + vector
        self.squares += squared_norm(vector)

    @property
    def mean(self):
        return self.sum / self.count

    @property
    def variance(self):
        return (self.squares - self.count * squared_norm(self.mean)) / (self.count - 1)


def squared_norm(vector):
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64)) ** 2


def roll_out(model, tokenizer, name, count, seed):
    """[(prompt (1, P), completions (1, G, L), advantages (1, G))] of `count` training problems."""
    examples = TASKS[name].load("train", count=count, seed=seed)
    repeated = [e for e in examples for _ in range(G)]
    done = complete(model, tokenizer, [e["prompt"] for e in repeated], rollout_batch=128, gen_length=32,
                    diffusion_steps=32, block_length=8, temperature=0.9,
                    keys=[("variance", seed, i) for i in range(len(repeated))])
    rewards = torch.tensor([sum(parts.values()) for parts in grade(TASKS[name], repeated, done.texts)[0]])
    prompts = [torch.tensor([tokenizer.encode_prompt(e["prompt"])]) for e in examples]
    return list(zip(prompts, done.ids.view(count, 1, G, -1), group_advantages(rewards.view(count, 1, G))))


def gradient(model, prompt, masked, completions, advantages, token_count):
    """One vector. masked (1, K, P): shared by the group; (G, 1, P): one for every completion."""
    c, own = model.config, len(masked) > 1
    if own:
        prompt, completions, advantages = prompt.expand(G, -1), completions.transpose(0, 1), advantages.view(G, 1)
    mask = completion_mask(completions, c.eos_token_id)
    logps = one_step_logps(model, prompt, masked, completions, c.mask_token_id)
    loss, _ = diffu_grpo_loss(logps, logps.detach(), None, advantages, mask, 0.5, 0.0, token_count)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def measure(model, groups, p, draws, seed):
    """{form: (mask, total)}: the two variances. draws: of masks per prompt, a multiple of the largest K."""
    within, means = {form: [] for form in FORMS}, {form: Moments() for form in FORMS}
    counts = [int(completion_mask(c, model.config.eos_token_id).sum()) for _, c, _ in groups]
    for i, (prompt, completions, advantages) in enumerate(groups):
        found, g = {form: Moments() for form in FORMS}, generator("variance", seed, p, i)

        def one(rows):
            masked = torch.rand(rows, 1, prompt.shape[1], generator=g) < p
            return gradient(model, prompt, masked, completions, advantages, statistics.mean(counts))

        for _ in range(draws // K[-1]):
            if not advantages.any():  # the gradient is zero whatever the masks
                break
            for _ in range(K[-1]):
                found[OWN].add(one(G))
            shared = torch.stack([one(1) for _ in range(K[-1])])
            for k, form in zip(K, FORMS[1:]):
                for part in shared.split(k):  # at ratio 1 the gradient under K masks is the mean of theirs
                    found[form].add(part.mean(0))
        for form, moments in found.items():
            within[form].append(moments.variance if moments.count else 0.0)
            means[form].add(moments.mean if moments.count else torch.zeros(sum(q.numel() for q in model.parameters())))
    result = {}
    for form, k in zip(FORMS, (1, *K)):
        mask = statistics.mean(within[form])
        result[form] = mask, means[form].variance - mask / (draws // k) + mask  # less what is left of masks in a mean
    return result


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=["countdown", "sudoku"])
    p.add_argument("--p_mask_prompt", type=float, nargs="+", default=[0.15, 0.3])
    p.add_argument("--prompts", type=int, default=16)
    p.add_argument("--draws", type=int, default=12, help="of masks per prompt: 12, 18, 24 ...")
    p.add_argument("--seeds", type=int, default=3, help="each with its own problems, rollouts and masks")
    p.add_argument("--json", metavar="FILE", help="write the ratios there")
    args = p.parse_args(argv)
    if args.draws % K[-1] or args.draws < 2 * K[-1]:
        p.error(f"--draws {args.draws}: use a multiple of {K[-1]} from {2 * K[-1]}, so that each way has two draws")
    return args


def main(args):
    """Returns the rows of the table, ratios as [of all seeds, least, most of one]."""
    model, start, rows = LLaDA.from_pretrained(ROOT / "data/tiny").eval(), time.monotonic(), []
    tokenizer = Tokenizer.from_folder(ROOT / "data/tiny", model.config)
    for task in args.tasks:
        groups = [roll_out(model, tokenizer, task, args.prompts, seed) for seed in range(args.seeds)]
        flat = sum(not advantages.any() for seed in groups for *_, advantages in seed) / args.prompts / args.seeds
        for p in args.p_mask_prompt:
            found = [measure(model, groups[seed], p, args.draws, seed) for seed in range(args.seeds)]
            for form in FORMS:
                pooled = [[sum(seed[f][i] for seed in found) for i in range(2)] for f in (form, OWN)]
                ratios = [[seed[form][i] / seed[OWN][i] for seed in found] for i in range(2)]
                mask, total = ([round(x, 4) for x in (ours / theirs, min(r), max(r))]
                               for ours, theirs, r in zip(*pooled, ratios))
                share = pooled[0][0] / pooled[0][1]
                rows.append({"task": task, "p": p, "masks": form, "rows": G if form == OWN else int(form.split()[0]),
                             "mask": mask, "total": total, "mask_share": round(share, 4),
                             "zero_spread": flat})
            print(f"{task}, p {p}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    print(table([{**row, **{key: "{:.2f} ({:.2f} to {:.2f})".format(*row[key]) for key in ("mask", "total")},
                  "mask_share": f"{row['mask_share']:.0%}"} for row in rows]))
    print(f"{args.seeds} seeds x {args.prompts} prompts x {args.draws} draws: all seeds (least to most of one); "
          f"{time.monotonic() - start:.0f} s")
    if args.json:
        options = {key: value for key, value in vars(args).items() if key != "json"}
        write_text(Path(args.json), json.dumps({
            "command": shlex.join(["python", "tests/variance.py", *sys.argv[1:]]), **options, "group_size": G,
            "minutes": round((time.monotonic() - start) / 60, 1), "rows": rows}, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main(parse_args())
