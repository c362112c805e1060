"""Is a prompt mask shared by the group better than a mask for every completion? The variance of the gradient says.

    python tools/variance.py --json docs/results/variance.json

The gradient of diffu-GRPO's loss at ratio 1, over all weights of the embedded model: real rollouts at temperature 0.9,
real rewards, G 6; the KL term has no gradient where policy and reference agree. Three ways to spend masks: one for
every completion (the authors' code: G rows of the network), one for the group (ours: 1 row), K for the group (K rows).
They have the same expectation. Per way, estimated without bias from many draws of masks, the rollouts fixed:

    mask    E ||g - E g||^2 over masks, mean over prompts
    total   the same over masks and prompts, each with its completions: that of a step with one prompt

both as a ratio to one mask for every completion. Groups without spread count, with their gradient of zero.
"""
import argparse
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
from model import TINY, LLaDA  # noqa: E402
from run import write_json  # noqa: E402
from sample import complete  # noqa: E402
from tools import number  # noqa: E402
from tools.measure import print_table  # noqa: E402

G, K = 6, (1, 2, 3, 6)
OWN = "one for every completion"
WAYS = [OWN, *(f"{k} for the group" for k in K)]


class Moments:
    """Mean and unbiased variance (summed over components) of vectors that are not kept."""

    def __init__(self):
        self.count, self.sum, self.squares = 0, 0.0, 0.0

    def add(self, vector):
        self.count += 1
        self.sum = self.sum + vector
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
    prompts = [tokenizer.encode_prompt(example["prompt"]) for example in examples]
    keys = [("variance", seed, i) for i in range(count * G)]
    completions = complete(model, tokenizer, [ids for ids in prompts for _ in range(G)], keys, rollout_batch=128,
                           gen_length=32, diffusion_steps=32, block_length=8, temperature=0.9)
    rewards = [sum(TASKS[name].reward(text, examples[i // G]).values()) for i, text in enumerate(completions.texts)]
    advantages = group_advantages(torch.tensor(rewards).view(count, 1, G))
    return list(zip([torch.tensor([ids]) for ids in prompts], completions.ids.view(count, 1, G, -1), advantages))


def gradient(model, group, masked, token_count):
    """The gradient as one vector. masked (1, P): shared by the group; (G, P): a row for every completion."""
    prompt, completions, advantages = group
    if len(masked) > 1:
        prompt, completions, advantages = prompt.expand(G, -1), completions.transpose(0, 1), advantages.view(G, 1)
    mask = completion_mask(completions, model.config.eos_token_id)
    logps = one_step_logps(model, prompt, masked, completions, model.config.mask_token_id)
    loss, _ = diffu_grpo_loss(logps, logps.detach(), None, advantages, mask, 0.5, 0.0, token_count)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def measure_group(draw_gradient, draws):
    """{way: Moments} of one prompt's gradients. draw_gradient(rows): under fresh masks; draws: of masks."""
    moments = {way: Moments() for way in WAYS}
    for _ in range(draws // K[-1]):
        for _ in range(K[-1]):
            moments[OWN].add(draw_gradient(G))
        shared = torch.stack([draw_gradient(1) for _ in range(K[-1])])
        for k, way in zip(K, WAYS[1:]):
            for gradients in shared.split(k):  # at ratio 1 the gradient under K masks is the mean of K gradients
                moments[way].add(gradients.mean(0))
    return moments


def measure(model, groups, p, draws, seed):
    """{way: (mask, total)}: the two variances. draws: of masks per prompt, a multiple of the largest K."""
    within, means = {way: [] for way in WAYS}, {way: Moments() for way in WAYS}
    size = sum(parameter.numel() for parameter in model.parameters())
    counts = [int(completion_mask(completions, model.config.eos_token_id).sum()) for _, completions, _ in groups]
    for i, group in enumerate(groups):
        mask_generator = generator("variance", seed, p, i)

        def draw_gradient(rows):
            masked = torch.rand(rows, group[0].shape[1], generator=mask_generator) < p
            return gradient(model, group, masked, statistics.mean(counts))

        has_spread = bool(group[2].any())  # else the gradient is zero whatever the masks
        moments = measure_group(draw_gradient, draws) if has_spread else {}
        for way in WAYS:
            within[way].append(moments[way].variance if has_spread else 0.0)
            means[way].add(moments[way].mean if has_spread else torch.zeros(size))
    variances = {}
    for way, k in zip(WAYS, (1, *K)):
        mask = statistics.mean(within[way])
        variances[way] = mask, means[way].variance - mask / (draws // k) + mask  # less what masks leave in a mean
    return variances


def ratios(seeds, way, i):
    """[of all seeds, least, most of a seed]: the variance of a way over that of a mask for every completion."""
    each = [variances[way][i] / variances[OWN][i] for variances in seeds]
    pooled = sum(variances[way][i] for variances in seeds) / sum(variances[OWN][i] for variances in seeds)
    return [round(ratio, 4) for ratio in (pooled, min(each), max(each))]


def rows_of(task, p, seeds):
    """A row of the table for every way to spend masks. seeds: of each the dict of `measure`."""
    rows = []
    for way in WAYS:
        mask, total = (sum(variances[way][i] for variances in seeds) for i in range(2))
        rows.append({"task": task, "p": p, "masks": way, "rows": G if way == OWN else int(way.split()[0]),
                     "mask": ratios(seeds, way, 0), "total": ratios(seeds, way, 1),
                     "mask_share": round(mask / total, 4)})
    return rows


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=["countdown", "sudoku"])
    parser.add_argument("--p_mask_prompt", type=number(float), nargs="+", default=[0.15, 0.3], help="0: none")
    parser.add_argument("--prompts", type=number(int, 1), default=16)
    parser.add_argument("--draws", type=number(int, 1), default=12, help="of masks per prompt: 12, 18, 24 ...")
    parser.add_argument("--seeds", type=number(int, 1), default=3, help="each with its own problems and masks")
    parser.add_argument("--json", metavar="FILE", help="write the ratios there")
    args = parser.parse_args(argv)
    if args.draws % K[-1] or args.draws < 2 * K[-1]:
        raise SystemExit(f"error: --draws {args.draws}: use a multiple of {K[-1]} from {2 * K[-1]}, so that each way "
                         "has two draws")
    return args


def main(args):
    """Print the table and return its rows, ratios as [of all seeds, least, most of a seed]."""
    model, start, rows = LLaDA.from_pretrained(TINY).eval(), time.monotonic(), []
    tokenizer = Tokenizer.from_folder(TINY)
    for task in args.tasks:
        groups = [roll_out(model, tokenizer, task, args.prompts, seed) for seed in range(args.seeds)]
        for p in args.p_mask_prompt:
            seeds = [measure(model, groups[seed], p, args.draws, seed) for seed in range(args.seeds)]
            rows += rows_of(task, p, seeds)
            print(f"{task}, p {p}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    texts = []
    for row in rows:
        spans = {name: "{:.2f} ({:.2f} to {:.2f})".format(*row[name]) for name in ("mask", "total")}
        texts.append({name: str(value) for name, value in row.items()} | spans)
    print_table(texts)
    if args.json:
        options = {name: value for name, value in vars(args).items() if name != "json"}
        write_json(Path(args.json), {"command": shlex.join(["python", "tools/variance.py", *sys.argv[1:]]), **options,
                                     "group_size": G, "rows": rows})
    return rows


if __name__ == "__main__":
    main(parse_args())
