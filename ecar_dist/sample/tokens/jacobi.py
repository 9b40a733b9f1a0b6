"""Speculative Jacobi decoding of `par` with n = 1: several tokens per pass, with the same result as one by one.

With fixed random numbers, each token of plain autoregression is a function of the tokens before it,

    x_j = argmax_v ( l_v(x_0 .. x_{j-1}) / temperature + g_jv ),    g_jv = -log(-log u_jv).

A window of guesses goes through the network at once, and each is replaced by this function of the guesses before it
(Jacobi's iteration; Teng et al., arXiv 2410.01699, for images). A token is final once all tokens before it are, so each
pass finalises at least one. The result equals plain autoregression with the same numbers, not only in distribution.
The coupling keeps guesses stable. MC-SJD (arXiv 2510.24211) couples the draws of successive passes maximally: a token
changes with probability TV, the total variation between the two distributions. Here the Gumbel noise g_j stays with its
position. A token then changes with probability at most 2 TV / (1 + TV) (Daliri et al., arXiv 2408.07978), and no draw
is ever rejected.
"""

from __future__ import annotations

import torch

from ecar_dist.command_line import say
from ecar_dist.flow.discrete.categorical import draw_codes
from ecar_dist.flow.guidance import guide
from ecar_dist.flow.unmasking import masked_guidance_scales
from ecar_dist.models.attention import KVCache
from ecar_dist.models.layers import unpatchify
from ecar_dist.models.tokens.par import PAR
from ecar_dist.sample.guided import is_doubled
from ecar_dist.sample.sampling_plan import SamplingPlan
from ecar_dist.sample.tokens.grouped import code_noise, next_logits


def draw_jacobi(
    model: PAR, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
) -> list[torch.Tensor]:
    """As `draw_grouped`, in fewer passes. Prints their number."""
    codes, passes = jacobi_codes(model, plan, labels, indices, seed)
    num_tokens = codes.shape[1]
    say(f"jacobi: {passes} passes for {num_tokens} tokens, {num_tokens / passes:.2f} tokens per pass")
    return [unpatchify(model.tokens_of(codes), model.patch_size)]


def jacobi_codes(
    model: PAR, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
) -> tuple[torch.Tensor, int]:
    """(codes int64 [B, N] in raster order, passes of the network).

    The batch advances at the pace of its slowest sample.
    """
    num_tokens = len(model.trunk.order)
    num_codes = model.output.out_features
    scales = masked_guidance_scales(plan.guidance_scale, tuple(range(num_tokens, -1, -1)), plan.guidance_ramp)
    cache = model.trunk.start_cache()

    # Tokens 0 .. done - 1 are final; the guesses follow. u are the random numbers of the window.
    codes = torch.zeros(len(labels), 0, dtype=torch.int64, device=labels.device)
    u = torch.empty(len(labels), 0, num_codes, device=labels.device)
    done = 0
    passes = 0
    logits = None
    while done < num_tokens:
        # Fill the window. A new guess uses its own random numbers with the latest logits.
        stop = min(done + plan.jacobi_window, num_tokens)
        first_new = done + u.shape[1]
        if first_new < stop:
            u = torch.cat((u, code_noise(seed, indices, first_new, stop, num_codes)), dim=1)
        missing = stop - codes.shape[1]
        if missing:
            last = torch.zeros_like(u[:, -missing:]) if logits is None else logits[:, -1:].expand(-1, missing, -1)
            guesses = draw_codes(last, u[:, -missing:], temperature=plan.temperature, top_k=plan.top_k)
            codes = torch.cat((codes, guesses), dim=1)

        # One pass for the whole window.
        logits = _window_logits(model, plan, codes, labels, done, stop, cache, scales)
        drawn = draw_codes(logits, u, temperature=plan.temperature, top_k=plan.top_k)  # [B, stop - done]
        passes += 1

        # The first token is final, and so is each later one as long as all guesses before it were right.
        right = (drawn == codes[:, done:])[:, :-1].long().cumprod(dim=1)
        accepted = 1 + int(right.sum(1).min())
        codes = torch.cat((codes[:, :done], drawn), dim=1)
        done += accepted
        cache.keep(done)
        u = u[:, accepted:]
    return codes, passes


def _window_logits(
    model: PAR,
    plan: SamplingPlan,
    codes: torch.Tensor,
    labels: torch.Tensor,
    start: int,
    stop: int,
    cache: KVCache,
    scales: tuple[float, ...],
) -> torch.Tensor:
    """The guided logits of tokens start .. stop - 1, float32 [B, stop - start, V], each with the scale of its step."""
    logits = next_logits(model, plan, codes[:, : stop - 1], labels, start, stop, cache)
    if not is_doubled(plan):
        return logits
    conditional, null = logits.chunk(2)
    steps = [guide(conditional[:, place], null[:, place], scale) for place, scale in enumerate(scales[start:stop])]
    return torch.stack(steps, dim=1)
