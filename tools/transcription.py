"""The published algorithm as published: what the tests and the benchmark hold this repository against.

Logits of every position, float64 noise over all of them, a softmax tensor for the confidence, a loop over rows, one
row of the network per completion. Written from the descriptions of LLaDA and d1 and checked against reference tensors
(tests/test_transcription.py). Randomness is passed in. The network is ours, so that a ratio of times speaks of the
algorithm.
"""
import torch
import torch.nn.functional as F


def gumbel_argmax(logits, temperature, uniform):
    """The token of every position: argmax of exp(logits) / (-log u)^temperature in float64."""
    if temperature == 0:
        return logits.argmax(-1)
    return (logits.double().exp() / (-uniform.double().log()) ** temperature).argmax(-1)


@torch.no_grad()
def sample(model, prompt, *, mask_id, gen_length, diffusion_steps, block_length, temperature=0.0, uniform=None,
           attn_mask=None, cfg_scale=0.0, remasking="low_confidence", forbid=(), commit_last=()):
    """LLaDA's sampler. uniform(*shape): draws (B, T, V) for the tokens, or (B, T) where remasking is "random".

    Returns the canvas after every step, (diffusion_steps, B, T).
    """
    B, P = prompt.shape
    x = torch.cat([prompt, prompt.new_full((B, gen_length), mask_id)], dim=1)  # (B, T)
    is_prompt = x != mask_id
    if attn_mask is not None:
        attn_mask = torch.cat([attn_mask, attn_mask.new_ones(B, gen_length)], dim=1)
    blocks = gen_length // block_length
    rounds = diffusion_steps // blocks
    history = []
    for block in range(blocks):
        end = P + (block + 1) * block_length
        masked = (x[:, end - block_length:end] == mask_id).sum(1)  # (B,)
        for i in range(rounds):
            logits = model(x, attn_mask=attn_mask)  # (B, T, V)
            if cfg_scale:
                unconditional = model(x.masked_fill(is_prompt, mask_id), attn_mask=attn_mask)
                logits = unconditional + (cfg_scale + 1) * (logits - unconditional)
            logits[..., list(forbid)] = -torch.inf
            tokens = gumbel_argmax(logits, temperature, uniform(*logits.shape) if temperature else None)  # (B, T)
            logits[..., list(commit_last)] = -torch.inf
            if remasking == "random":
                confidence = uniform(*tokens.shape)
            else:
                confidence = logits.softmax(-1).gather(-1, tokens[..., None])[..., 0]  # (B, T)
            confidence[:, end:] = -torch.inf
            confidence = torch.where(x == mask_id, confidence, -torch.inf)
            for row in range(B):
                count = int(masked[row]) // rounds + (i < int(masked[row]) % rounds)
                chosen = confidence[row].topk(count).indices
                x[row, chosen] = tokens[row, chosen]
            history.append(x.clone())
    return torch.stack(history)


def log_probs(model, prompt, prompt_masked, completions, mask_id, attn_mask=None):
    """d1's estimator with a mask for every completion: logits of all positions, then those of the completion.

    prompt, prompt_masked (R, P); completions (R, L); attn_mask (R, P). Returns (R, L).
    """
    rows = torch.cat([prompt.masked_fill(prompt_masked, mask_id), torch.full_like(completions, mask_id)], dim=1)
    if attn_mask is not None:
        attn_mask = torch.cat([attn_mask, torch.ones_like(completions, dtype=torch.bool)], dim=1)
    logits = model(rows, attn_mask=attn_mask)[:, prompt.shape[1]:]  # (R, L, V)
    return -F.cross_entropy(logits.transpose(1, 2), completions, reduction="none")


def grpo_loss(logps, old_logps, ref_logps, advantages, mask, epsilon, beta):
    """d1's loss. logps, old_logps, ref_logps, mask (R, L); advantages (R,); ref_logps None where beta is 0."""
    ratio = (logps - old_logps).exp()
    loss = -torch.min(ratio * advantages[:, None], ratio.clamp(1 - epsilon, 1 + epsilon) * advantages[:, None])
    if beta:
        loss = loss + beta * ((ref_logps - logps).exp() - (ref_logps - logps) - 1)
    return (loss * mask).sum() / mask.sum()


def update_phase(model, reference, optimizer, prompt, prompt_masked, completions, advantages, mask, mask_id, *,
                 epsilon, beta, grad_clip, attn_mask=None):
    """Old and reference log-probs under all masks, then an update under each mask.

    reference(): a context that gives the reference policy; prompt (R, P); prompt_masked (mu, R, P); completions, mask
    (R, L); advantages (R,). Returns the losses.
    """
    def score(policy, masked):
        return log_probs(policy, prompt, masked, completions, mask_id, attn_mask)

    with torch.no_grad():
        old = [score(model, masked) for masked in prompt_masked]
        with reference() as policy:
            ref = [score(policy, masked) for masked in prompt_masked]
    losses = []
    for masked, old_logps, ref_logps in zip(prompt_masked, old, ref):
        loss = grpo_loss(score(model, masked), old_logps, ref_logps, advantages, mask, epsilon, beta)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
