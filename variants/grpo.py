"""train_grpo.py with other estimators, objectives and samplers, in any combination.

    python variants/grpo.py --task countdown --masks_per_prompt 6
    python variants/grpo.py --task countdown --estimator trajectory --snapshots 4 --objective sequence
    python variants/grpo.py --task countdown --threshold 0.9

A method of your own is a program such as this one: its functions, its options, one call of train_grpo.main.
"""
import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_grpo  # noqa: E402
from variants import estimators, objectives  # noqa: E402
from variants.estimators import ESTIMATORS  # noqa: E402
from variants.evaluate import add_sampler_options, check_rounds, drop_unread, pick_generate  # noqa: E402
from variants.objectives import OBJECTIVES  # noqa: E402


def published(argv):
    """The settings of the papers of the chosen methods, by option, where they differ from d1's."""
    glance = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("task", "estimator", "objective"):
        glance.add_argument(f"--{name}")
    chosen, _ = glance.parse_known_args(argv)
    by_objective = objectives.PUBLISHED.get(chosen.objective, {})
    by_task = objectives.PUBLISHED.get((chosen.objective, chosen.task), {})
    estimator = chosen.estimator or by_objective.get("estimator")
    return estimators.PUBLISHED.get(estimator, {}) | by_objective | by_task


def parse_args(argv=None):
    """The options of train_grpo.py and of the methods, without those that the chosen methods do not read."""
    parser = train_grpo.new_parser(argv)
    parser.description = __doc__.partition("\n")[0]
    group = parser.add_argument_group("methods")
    group.add_argument("--estimator", choices=ESTIMATORS, default="one_step", help="see variants/estimators.py")
    group.add_argument("--masks_per_prompt", type=int, default=1, help="K, masks of a prompt in an update")
    group.add_argument("--snapshots", type=int, default=4, help="of a rollout, for --estimator trajectory")
    group.add_argument("--objective", choices=OBJECTIVES, default="grpo",
                       help="see variants/objectives.py; where papers differ from d1, defaults are theirs")
    group.add_argument("--upper_power", type=float, default=1.5, help="of SPG's upper bound, beta in its paper")
    group.add_argument("--upper_weight", type=float, default=0.5, help="of SPG's upper bound, omega in its paper")
    parser.set_defaults(**published(argv))
    add_sampler_options(parser)
    parser.add_argument("--random_first", action="store_true",
                        help="let rollouts begin at one random position; with --threshold or --entropy_bound")
    args = parser.parse_args(argv)
    if min(args.masks_per_prompt, args.snapshots) < 1:
        raise SystemExit("error: --masks_per_prompt and --snapshots must be at least 1")
    unread = {"p_mask_prompt", "masks_per_prompt", "snapshots"} - set(ESTIMATORS[args.estimator].options)
    drop_unread(args, argv, unread, f"by --estimator {args.estimator}")
    if (args.objective in ("spg", "stabledrl")) != (args.estimator == "block_masks"):
        raise SystemExit("error: --objective spg or stabledrl and --estimator block_masks go together: name both")
    if args.objective == "espo" and ESTIMATORS[args.estimator].scored is not estimators.repeat_prompts:
        raise SystemExit(f"error: --objective espo counts all tokens, --estimator {args.estimator} only some")
    unread = objectives.ALL_OPTIONS.difference(objectives.OPTIONS.get(args.objective, ("epsilon", "beta")))
    drop_unread(args, argv, unread, f"by --objective {args.objective}")
    args.beta = getattr(args, "beta", 0.0)  # which train_grpo looks at
    check_rounds(args, argv)
    if args.random_first and args.threshold is args.entropy_bound is None:
        raise SystemExit("error: --random_first would be ignored: add --threshold or --entropy_bound, or leave it out")
    args.out = args.out or f"runs/grpo-{args.task}-{args.estimator}-{args.objective}"
    return args


def begin_at_random(*inputs, generate, **methods):
    """train_grpo.train_step, whose rollouts begin at one random position. Evaluations do not."""
    generate = functools.partial(generate, random_first=True)
    return train_grpo.train_step(*inputs, generate=generate, **methods)


def main(args, step=None):
    """Train. step: in the place of train_grpo.train_step, where rollouts begin as usual."""
    estimator = ESTIMATORS[args.estimator]

    def objective(logps, old_logps, ref_logps, rollout, masked, args):
        rollout = estimator.scored(rollout, masked, len(logps) // len(rollout.prompt), args)
        return OBJECTIVES[args.objective](logps, old_logps, ref_logps, rollout, masked, args)

    return train_grpo.main(args, draw=estimator.draw, log_probs=estimator.log_probs, objective=objective,
                           generate=pick_generate(args), step=begin_at_random if args.random_first else step)


if __name__ == "__main__":
    main(parse_args())
