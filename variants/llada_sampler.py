"""What LLaDA's generate.py can do and d1 does not use: guidance, random remasking, EOS options, [MASK] in prompts."""
import torch
import torch.nn.functional as F

from model import at_least_float32
from sample import choose, num_transfer_tokens


@torch.no_grad()
def generate(model, prompt, attn_mask, noise, *, mask_id, eos_id, gen_length, diffusion_steps, block_length,
             temperature, on_step=None, cfg_scale=0.0, random_remasking=False, forbid=(), commit_last=(),
             choose=choose):
    """sample.generate, with what LLaDA's sampler has beyond it. A [MASK] in a prompt is filled like the others.

    cfg_scale: of the guidance, see `predict`; random_remasking: commit tokens in random order; forbid: ids that are
    never emitted (LLaDA's logits_eos_inf); commit_last: ids that are committed last (its confidence_eos_eot_inf).
    """
    (B, P), T = prompt.shape, prompt.shape[1] + gen_length
    x = F.pad(prompt, (0, gen_length), value=mask_id)  # (B, T), the canvas
    attn_mask = F.pad(attn_mask, (0, gen_length), value=True)  # (B, T)
    is_prompt = x != mask_id  # (B, T)
    if len(is_prompt.sum(dim=1).unique()) > 1:
        raise ValueError("the prompts of a batch must hold equally many [MASK]")
    committed_at = torch.full_like(x, -1)  # (B, T)
    schedule = num_transfer_tokens(block_length, diffusion_steps * block_length // gen_length)
    rows = torch.arange(B, device=x.device)  # (R,), those that go on
    step = 0
    for end in range(P + block_length, T + 1, block_length):
        for count in schedule:
            masked = (x[rows, :end] == mask_id).nonzero()[:, 1].view(len(rows), -1)  # (R, M) positions
            logits = predict(model, x[rows], attn_mask[rows], masked, is_prompt[rows], mask_id, cfg_scale)  # (R, M, V)
            logits[..., list(forbid)] = -torch.inf
            uniform = noise[rows, step, :masked.shape[1]]  # (R, M)
            tokens = choose(logits, temperature, uniform, mask_id)  # (R, M)
            logits[..., list(commit_last)] = -torch.inf
            confidence = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]  # (R, M)
            if random_remasking:
                confidence = uniform * 2 ** 26 % 1  # the low bits: `choose` goes by the high ones
            best = confidence.argsort(dim=1, descending=True)[:, :count]
            places = rows[:, None], masked.gather(1, best)
            x[places] = tokens.gather(1, best)
            committed_at[places] = step
            step += 1
            if on_step:
                on_step(x, committed_at)
        is_full = (x[rows, :end] != mask_id).all(dim=1)  # (R,), False where a prompt still holds [MASK]
        ended = (x[rows, end - block_length:end] == eos_id).any(dim=1) & is_full
        x[rows[ended], end:] = eos_id
        committed_at[rows[ended], end:] = step - 1
        rows = rows[~ended]
        if not len(rows):
            break
    return x, committed_at


def predict(model, x, attn_mask, positions, is_prompt, mask_id, cfg_scale):
    """Logits (R, M, V) at some positions (R, M) of the canvas x (R, T), under classifier-free guidance.

    That is un + (1 + scale) (cond - un), where `un` are the logits without the prompt: all of it is [MASK].
    """
    logits = model(x, attn_mask, keep=positions)
    if cfg_scale:
        unconditional = model(x.masked_fill(is_prompt, mask_id), attn_mask, keep=positions)
        logits = unconditional + (1 + cfg_scale) * (logits - unconditional)
    return at_least_float32(logits)


def gumbel_bfloat16(logits, temperature, uniform, mask_id):
    """LLaDA's draw in the place of sample.choose: the argmax of exp(logits) / (-log u) ** temperature.

    Its noise is in bfloat16, as in the authors' training: tokens of small probability are almost never drawn.
    """
    logits = logits.clone()
    logits[..., mask_id] = -torch.inf
    if not temperature:
        return logits.argmax(-1)
    numbers = torch.Generator(logits.device).manual_seed(int(uniform.sum() * 2 ** 40))  # one seed gives all V draws
    noise = torch.rand(logits.shape, generator=numbers, device=logits.device, dtype=torch.bfloat16)
    return (logits.bfloat16().exp() / (-noise.log()) ** temperature).argmax(-1)
