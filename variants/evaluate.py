"""sample.py with other samplers: Fast-dLLM's (fast_dllm.py), or LLaDA's with all that it can do (llada_sampler.py).

    python variants/evaluate.py --task countdown --threshold 0.9 --cache dual
    python variants/evaluate.py --task countdown --entropy_bound 0.5
    python variants/evaluate.py --task countdown --cfg_scale 0.5
"""
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from model import find_checkpoint  # noqa: E402
from variants import fast_dllm, llada_sampler  # noqa: E402


def add_sampler_options(parser):
    """Add the options that `pick_generate` reads."""
    group = parser.add_argument_group("samplers of fewer rounds, which are approximate")
    group.add_argument("--threshold", type=float, help="commit all tokens of a higher probability; its paper: 0.9")
    group.add_argument("--entropy_bound", type=float,
                       help="commit what stays within, in nats, 0: a token a round; EB-Sampler")
    group.add_argument("--cache", choices=("prefix", "dual"), help="keep keys and values before, or around the block")
    group = parser.add_argument_group("LLaDA's sampler")
    group.add_argument("--cfg_scale", type=float, default=0.0, help="of classifier-free guidance, 0: none")
    group.add_argument("--random_remasking", action="store_true", help="commit tokens in random order")
    group.add_argument("--logits_eos_inf", action="store_true", help="never emit EOS")
    group.add_argument("--confidence_eos_eot_inf", action="store_true", help="commit EOS and EOT last")
    group.add_argument("--gumbel_bfloat16", action="store_true", help="draw tokens as the authors' training does")


def drop_unread(args, argv, options, reason):
    """Remove options that would be ignored. End the program where the command line names one of them."""
    words = [word.split("=")[0] for word in (sys.argv if argv is None else argv)]
    for name in sorted(options):
        if f"--{name}" in words:
            raise SystemExit(f"error: --{name} would be ignored {reason}: leave it out")
        delattr(args, name)


def check_rounds(args, argv):
    """Let --threshold or --entropy_bound take the place of --diffusion_steps, which they ignore."""
    named = {"threshold": args.threshold, "entropy_bound": getattr(args, "entropy_bound", None)}
    named = {name: value for name, value in named.items() if value is not None}
    if not named:
        return
    if len(named) > 1:
        raise SystemExit("error: --threshold and --entropy_bound do not combine: leave one out")
    [(name, value)] = named.items()
    if name == "threshold" and not 0 < value <= 1:
        raise SystemExit(f"error: --threshold {value} must lie in (0, 1]: it is a probability")
    if value < 0:
        raise SystemExit(f"error: --entropy_bound {value} must be at least 0: it is a sum of entropies")
    drop_unread(args, argv, ["diffusion_steps"], f"with --{name}")
    args.diffusion_steps = args.gen_length  # the most rounds that can be needed


def pick_generate(args):
    """What to use in the place of sample.generate."""
    draw = llada_sampler.gumbel_bfloat16 if args.gumbel_bfloat16 else sample.choose
    fast = {"threshold": args.threshold, "entropy_bound": args.entropy_bound, "cache": args.cache}
    is_fast = any(value is not None for value in fast.values())
    if is_fast and (args.cfg_scale or args.random_remasking or args.logits_eos_inf or args.confidence_eos_eot_inf):
        raise SystemExit("error: --threshold, --entropy_bound, --cache do not combine with LLaDA's sampler: drop some")
    if args.random_remasking and args.confidence_eos_eot_inf:
        raise SystemExit("error: --confidence_eos_eot_inf would be ignored with --random_remasking: leave one out")
    if is_fast:
        return functools.partial(fast_dllm.generate, **fast, choose=draw)
    tokenizer = Tokenizer.from_folder(find_checkpoint(args.model))
    forbid = [tokenizer.eos_id] if args.logits_eos_inf else []
    commit_last = [tokenizer.eos_id, tokenizer.eot_id] if args.confidence_eos_eot_inf else []
    return functools.partial(llada_sampler.generate, cfg_scale=args.cfg_scale, forbid=forbid, commit_last=commit_last,
                             random_remasking=args.random_remasking, choose=draw)


def parse_args(argv=None):
    parser = sample.new_parser(argv)
    parser.description = __doc__.partition("\n")[0]
    add_sampler_options(parser)
    args = parser.parse_args(argv)
    check_rounds(args, argv)
    return args


def main(args):
    return sample.main(args, generate=pick_generate(args))


if __name__ == "__main__":
    main(parse_args())
