"""Memory, cost and time of a training, told from config.json and the options before anything is loaded.

    python tools/plan.py train_grpo --task countdown --model tests/llada_8b --gpus 8
    python tools/plan.py train_sft --task s1k --model tests/llada_8b --gpus 8 --lora_r 0

All further options are those of the script. Rollouts count in full: a completion that ends early costs less.
"""
import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from any working directory

import train_grpo  # noqa: E402
import train_sft  # noqa: E402
from lora import add_lora  # noqa: E402
from model import HEAD_CHUNK, Config, LLaDA, find_checkpoint  # noqa: E402
from parallel import Processes  # noqa: E402
from sample import check_schedule  # noqa: E402
from tools import number  # noqa: E402

GIB = 2 ** 30
PROMPT_TOKENS = 200  # of a planned prompt
SPARE_GIB = 5  # of a GPU, for CUDA, NCCL and the gaps of the allocator
MEMORY = {  # what takes memory on a GPU
    "parameters": "trained ones in float32; this and the next three are shared by the GPUs of a replica",
    "gradients": "in float32",
    "optimizer": "AdamW: two moments in float32",
    "reference": "a frozen copy; LoRA needs none",
    "activations": "kept for the backward pass of a micro-batch",
    "block": "at work in the backward pass of one block",
    "logits": "a chunk, its log-softmax, their gradients, in float32",
    "gathered": "weights and gradients that FSDP has in full in an update",
    "update": "peak of an update",
    "rollout": "peak without gradients",
    "peak": "the larger of the two",
}
HELPS = {"microbatch": 1, "rollout_batch": 1, "checkpoint_activations": True, "lora_r": 128}


@dataclass(frozen=True)
class Passes:
    """Passes of the network over all rows of a phase, `times` over."""
    total: int                  # rows, over all GPUs
    rows: int                   # at a time on a GPU
    length: int                 # tokens of a row
    scored: int                 # of these tokens go through the head
    times: int = 1
    is_narrow: bool = True      # the last block leaves out the other tokens, but for their keys and values
    has_backward: bool = False

    def __str__(self):
        return f"{self.times} x {self.total} rows of {self.length} tokens, {self.rows} at a time on a GPU"


def plan_sft(config, args, gpus):
    """{phase: Passes} of train_sft.py: rows as long as they may be, half of their tokens masked, as on average."""
    share = Processes(0, gpus, None, None).share(args.batch_size, "--batch_size")
    length = min(args.max_length, config.max_sequence_length)
    update = Passes(args.batch_size, min(args.microbatch, len(share)), length, length // 2,
                    is_narrow=False, has_backward=True)
    # how many rows are held out is not known before they are read
    return {"update": update, "evaluation": Passes(0, update.rows, length, 0)}


def plan_grpo(config, args, gpus):
    """{phase: Passes} of train_grpo.py, for prompts of PROMPT_TOKENS tokens."""
    check_schedule(args.gen_length, args.diffusion_steps, args.block_length)
    N, length = args.prompts_per_step, PROMPT_TOKENS + args.gen_length
    share = Processes(0, gpus, None, None).share(N, "--prompts_per_step")
    rollout = Passes(N * args.group_size, args.rollout_batch, length, args.block_length, args.diffusion_steps)
    update = Passes(N, min(args.microbatch, len(share)), length, args.gen_length, args.num_iterations,
                    has_backward=True)
    policies = 2 if args.beta else 1  # the reference is scored, too
    return {"rollout": rollout,
            "logps": replace(update, times=policies * args.num_iterations, has_backward=False),
            "update": update,
            "evaluation": replace(rollout, total=2 * args.eval_count)}  # at the rollout temperature and greedy


SCRIPTS = {"train_grpo": (train_grpo.parse_args, plan_grpo), "train_sft": (train_sft.parse_args, plan_sft)}


class Plan:
    """What a training takes on a number of GPUs. config: model.Config; args: the parsed options of `script`."""

    def __init__(self, script, config, args, gpus):
        if gpus < 1 or args.replicas < 1 or gpus % args.replicas:
            raise SystemExit(f"error: --replicas {args.replicas} does not divide --gpus {gpus}")
        self.script, self.config, self.args, self.gpus = script, config, args, gpus
        self.C, self.V = config.d_model, config.embedding_size
        self.KV, self.M = config.n_kv_heads * config.head_dim, config.mlp_hidden_size
        self.passes = SCRIPTS[script][1](config, args, gpus)
        self.trains_all = not args.lora_r
        self.itemsize = 4 if args.dtype == "float32" else 2  # bytes of a number in the computation
        # numbers of weights, counted in a model that has shapes alone
        with torch.device("meta"):
            model = LLaDA(config)
        self.base = count_weights(model)
        self.block = count_weights(model.blocks[0])
        self.outside = self.base - config.n_layers * self.block  # embedding, last norm, head
        if args.lora_r:
            add_lora(model, args.lora_r, args.lora_alpha, args.lora_targets.split())
        self.adapters = count_weights(model) - self.base
        self.trained = self.base if self.trains_all else self.adapters
        self.has_copy = self.trains_all and getattr(args, "beta", 0) > 0  # the reference policy
        self.is_sharded = gpus > 1 or (self.trains_all and self.itemsize < 4)  # by FSDP, which also casts
        self.two_blocks = self.itemsize * (2 * self.block + self.outside)  # FSDP gathers a block ahead

    def with_options(self, gpus=None, **options):
        """The plan of the same training with other options."""
        args = argparse.Namespace(**{**vars(self.args), **options})
        return Plan(self.script, self.config, args, gpus or self.gpus)

    # ---------------------------------------------------------------- memory

    def memory(self):
        """{what: bytes} on each GPU in a step, by the names of MEMORY. What is small is left out, such as ids."""
        update, shards = self.passes["update"], self.gpus // self.args.replicas
        tokens = update.rows * update.length
        scored = update.scored if update.is_narrow else update.length  # in SFT a row may be masked throughout
        trained = 4 * self.trained / shards
        frozen = self.itemsize * self.base / shards
        memory = {
            "parameters": trained if self.trains_all else trained + frozen,
            "gradients": trained,
            "optimizer": 2 * trained,
            "reference": frozen if self.has_copy else 0,
            # of the last block only the tokens that it computes
            "activations": tokens * self.activations_of_token() * (self.config.n_layers - 1 + scored / update.length),
            "block": tokens * self.itemsize * 3 * self.M,
            "logits": 12 * min(HEAD_CHUNK, update.rows * scored * self.V),
            "gathered": self.gathered_in_update(),
        }
        if self.args.checkpoint_activations:  # only the inputs of the blocks are kept, then a block runs again
            memory["activations"] = tokens * self.itemsize * self.C * self.config.n_layers
            memory["block"] += tokens * self.activations_of_token()
        held = memory["parameters"] + memory["optimizer"] + memory["reference"]
        # gradients grow as activations shrink: both are there at once only from the second micro-batch on
        combine = sum if update.total // self.gpus > update.rows else max
        memory["update"] = (held + combine((memory["gradients"], memory["activations"]))
                            + max(memory["block"], memory["logits"]) + memory["gathered"])
        memory["rollout"] = held + self.added_without_gradients()
        memory["peak"] = max(memory["update"], memory["rollout"])
        return memory

    def activations_of_token(self):
        """Bytes that a block keeps of a token for its backward pass."""
        C = self.C
        numbers = 2 * C  # what the matrices read: q, k, v; ff_proj, up_proj
        numbers += 2 * C + 2 * self.KV  # q, k, v, and what attention gives
        numbers += 3 * self.M  # gate, silu(gate), up
        if self.trains_all:
            numbers += 2 * C  # what the norms give before their weights
            numbers += self.M  # silu(gate) * up, which ff_out reads
        return self.itemsize * numbers + 2 * 4 * C  # what enters the norms, in float32

    def gathered_in_update(self):
        """Bytes of weights and gradients that FSDP has in full at a time."""
        if not self.is_sharded:
            return 0
        gradients = self.itemsize * (self.block + self.outside) + 4 * self.block
        return self.two_blocks + (gradients if self.trains_all else 0)

    def added_without_gradients(self):
        """Bytes of a rollout, or of the held-out loss, beside the weights that a GPU holds anyway."""
        passes = self.passes["evaluation"]  # as wide as a rollout
        # numbers of a token in a block at its widest, where an adapter's product stands beside its matrix's
        widest = 5 * self.C + 2 * self.KV + (3 if self.trains_all else 4) * self.M
        in_block = passes.rows * passes.length * self.itemsize * widest
        # the sampler has two copies of the logits in float32 and two in float64
        in_sampler = passes.rows * passes.scored * self.V * 24
        of_reference = self.two_blocks if self.has_copy and self.gpus > 1 else 0
        gathered = self.itemsize * (self.base + self.adapters) if self.is_sharded else 0
        return gathered + max(in_block, in_sampler, of_reference)

    # ---------------------------------------------------------------- cost

    def flops(self, phase):
        """Floating-point operations of a phase over all GPUs; a multiplication and an addition count as two.

        A weight that a token meets costs 2 forward, 2 backward for the gradient of its input, 2 more if it is trained.
        """
        passes, blocks = self.passes[phase], self.config.n_layers
        backward, trains_all = passes.has_backward, self.trains_all
        forward = 2 if backward and self.args.checkpoint_activations else 1  # times that the blocks run
        matrices = blocks * (self.block - 2 * self.C)  # without the norms
        weights = matrices * (forward + backward + backward * trains_all) + self.adapters * (forward + 2 * backward)
        # every token with every token: q k, and the product with v
        attention = 2 * passes.length * self.C * blocks * (forward + 2 * backward)
        # where the logits come in chunks, the backward pass scores once more
        is_chunked = passes.rows * passes.scored * self.V > HEAD_CHUNK
        head = self.C * self.V * (1 + backward * (1 + trains_all + is_chunked))
        # in a narrow last block a token that is not scored costs its keys and values alone
        share_of_kv = 2 * self.C * self.KV * blocks / matrices
        left_out = (weights * (1 - share_of_kv) + attention) / blocks if passes.is_narrow else 0
        # the frozen embedding needs no gradient, so neither do the inputs of the first q, k and v
        spared = backward * (not trains_all) * self.C * (self.C + 2 * self.KV)
        of_row = (passes.length * (weights + attention - spared) + passes.scored * head
                  - (passes.length - passes.scored) * left_out)
        return 2 * passes.total * passes.times * of_row

    def checkpoint_bytes(self):
        """What a checkpoint takes on disk: the trained weights and AdamW's two moments, all in float32."""
        return 3 * 4 * self.trained


def count_weights(module):
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------- command line

def read_config(name):
    """The Config of a folder or hub id. Of a hub id nothing but config.json is downloaded."""
    if name != "data/tiny" and not Path(name).is_dir():
        from huggingface_hub import hf_hub_download  # slow to import
        try:
            name = Path(hf_hub_download(name, "config.json")).parent
        except (OSError, ValueError) as error:  # ValueError: not of the form of an id
            reason = str(error).splitlines()[0]
            raise SystemExit(f"error: --model {name}: no such folder, and the hub gave no config.json of that name "
                             f"({reason}); tests/llada_8b has LLaDA-8B's") from None
    return Config.from_folder(find_checkpoint(name))


def print_memory(plan, gib):
    """Memory by MEMORY, whether it fits into `gib` GiB, and what helps where it does not."""
    memory, room = plan.memory(), (gib - SPARE_GIB) * GIB
    trained = "all" if plan.trains_all else f"{plan.adapters:,} of LoRA r {plan.args.lora_r}"
    print(f"{plan.base:,} parameters, trained: {trained}; GiB on a GPU of {plan.gpus}:")
    for name, words in MEMORY.items():
        print(f"{name:>12} {memory[name] / GIB:9.2f}  {words}")
    fits = memory["peak"] < room
    print(f"{'fits' if fits else 'DOES NOT FIT'} in {gib:g} GiB with {SPARE_GIB} left to CUDA, NCCL and gaps")
    others = {} if fits else alternatives(plan)
    for words, other in others.items():
        peak = other.memory()["peak"]
        if peak < memory["peak"]:
            print(f"  {words:<25} {peak / GIB:7.2f}{', fits' if peak < room else ''}")


def alternatives(plan):
    """{words: plan} of what may need less memory."""
    plans = {}
    for name, value in HELPS.items():
        if getattr(plan.args, name, value) != value:
            words = f"--{name}" if value is True else f"--{name} {value}"
            plans[words] = plan.with_options(**{name: value})
    for gpus in (2 * plan.gpus, 4 * plan.gpus, 8 * plan.gpus):
        if plan.passes["update"].total % gpus == 0:
            plans[f"{gpus} GPUs"] = plan.with_options(gpus=gpus)
    return plans


def print_cost(plan, tflops):
    """Cost and time by phases, of a step, of an evaluation, of the run."""
    rate, steps, every = plan.gpus * tflops * 1e12, plan.args.steps, plan.args.eval_every

    def show(name, flops, words):
        print(f"{name:>12} {flops / 1e15:9.2f} PFLOP {flops / rate:7.1f} s  {words}")

    costs = {phase: plan.flops(phase) for phase in plan.passes}
    evaluation = costs.pop("evaluation")
    for phase, flops in costs.items():
        show(phase, flops, plan.passes[phase])
    step = sum(costs.values())
    show("step", step, "all of these")
    if evaluation:  # of SFT, unknown
        show("evaluation", evaluation, plan.passes["evaluation"])
    evaluations = len({*range(0, steps, every), steps}) if every else 1
    run = steps * step + evaluations * evaluation
    show("run", run, f"{run / rate / 3600:.1f} hours: {steps} steps, {evaluations} evaluations"
                     f"{'' if evaluation else ' (not counted)'}")
    print(f"times are estimates, for {tflops:g} TFLOP/s a GPU and communication hidden behind them")
    saved, size = "after the last step alone", plan.checkpoint_bytes() / GIB
    if plan.args.save_every:
        saved = f"every {plan.args.save_every} steps, {plan.args.save_every * step / rate / 60:.1f} minutes"
    print(f"a checkpoint takes {size:.1f} GiB on disk, written {saved}; leave room for three, {3 * size:.1f} GiB")


def main(argv=None):
    """Print the plan, and return it."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("script", choices=SCRIPTS)
    parser.add_argument("--gpus", type=number(int, 1), default=1, help="over all nodes (default: 1)")
    parser.add_argument("--gpu_memory", type=number(float, 0.1), default=79,
                        help="GiB of a GPU (default: 79, of an 80 GB GPU)")
    parser.add_argument("--tflops", type=number(float, 0.1), default=400,
                        help="1e12 operations a second of a GPU (default: 400, 40%% of an H100's peak in bfloat16)")
    own, words = parser.parse_known_args(argv)
    args = SCRIPTS[own.script][0](words)
    plan = Plan(own.script, read_config(args.model), args, own.gpus)
    print_memory(plan, own.gpu_memory)
    print_cost(plan, own.tflops)
    return plan


if __name__ == "__main__":
    main()
