"""The router of one layer on a GPU, for a few tokens, and the norm before it (kernels/cpu/attention.cpp).

Two kernels: a program for each token's logit of each expert; then one for each token, which ranks all experts
at once: an expert's rank is the number of those that are likelier. As one kernel, in which the last program
with a logit ranks, it took 5.1 us on an H100 for one token, these 5.0. Both are compiled once for any number
of tokens: a token's bits do not depend on those beside it.
Axis letters: T tokens, D hidden, E experts, K experts a token.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_gemv import launch_options, wait_for_inputs


@triton.jit(do_not_specialize_on_alignment=["logits"])
def _store_logits(
    x, norm, eps, router, h_out, logits, saved, E: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    SAVE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One expert and one token a program; the first expert's stores the normed x, and x."""
    e, t = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, C)
    inside = c < D
    gain = tl.load(norm + c, mask=inside, other=0.0)
    weight = tl.load(router + e * D + c, mask=inside, other=0.0) * gain
    wait_for_inputs(PDL)
    v = tl.load(x + t * D + c, mask=inside, other=0.0)
    squares, logit = tl.split(tl.sum(tl.join(v * v, weight * v), axis=0))  # one reduction
    scale = tl.div_rn(1.0, tl.sqrt_rn(squares / D + eps))
    tl.store(logits + t * E + e, logit * scale)
    if e == 0:
        tl.store(h_out + t * D + c, v * scale * gain, mask=inside)
        if SAVE:
            tl.store(saved + t * D + c, v, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["probabilities", "ids", "weights", "table", "slots"])
def _choose_experts(
    probabilities, ids, weights, table, slots, missed, layer, E: tl.constexpr, K: tl.constexpr,
    P: tl.constexpr, NORMALISE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token a program: softmax, then each expert's rank among all."""
    t = tl.program_id(0)
    e = tl.arange(0, P)
    slot = tl.load(table + e, mask=e < E, other=0)  # older than the kernel before this one
    wait_for_inputs(PDL)
    logits = tl.load(probabilities + t * E + e, mask=e < E, other=-1e30)
    raised = tl.exp(logits - tl.max(logits))
    total = tl.sum(raised)
    p = tl.div_rn(raised, total + tl.zeros((P,), tl.float32))
    tl.store(probabilities + t * E + e, p, mask=e < E)
    p = tl.where(e < E, p, -1.0)
    before = (p[:, None] > p[None, :]) | ((p[:, None] == p[None, :]) & (e[:, None] < e[None, :]))
    rank = tl.sum(before.to(tl.int32), axis=0)  # over rows: those of a thread first
    # NaN has no order: then the first K, and whoever reads the logits reports it.
    rank = tl.where(total == total, rank, e)
    chosen = (rank < K) & (e < E)
    w = p
    if NORMALISE:
        w = tl.div_rn(p, tl.sum(tl.where(chosen, p, 0.0)) + tl.zeros((P,), tl.float32))
    place = t * K + rank
    tl.store(ids + place, e, mask=chosen)
    tl.store(weights + place, w, mask=chosen)
    tl.store(slots + place, slot, mask=chosen)
    if tl.min(tl.where(chosen, slot, 0)) < 0:
        tl.atomic_min(missed, layer)


def route(
    x: Tensor,
    norm: Tensor,
    eps: float,
    router: Tensor,
    normalise: bool,
    table: Tensor,
    h_out: Tensor,
    probabilities: Tensor,
    ids: Tensor,
    weights: Tensor,
    slots: Tensor,
    missed: Tensor,
    layer: int,
    saved: Tensor | None = None,
) -> None:
    """The router of one layer and the norm before it, in fp32.

    x [T, D] fp32, norm [D], router [E, D] fp32, table int32 [E]: each expert's slot, -1 for one that is
    absent. Writes h_out [T, D], probabilities [T, E], and likeliest first (the lower id where two are equal)
    ids int32 [T, K], weights [T, K] (normalise: summing to 1) and slots int32 [T, K]. missed int32 [1] =
    min(missed, layer) if one is absent. saved [T, D]: a copy of x, if given.
    """
    tokens, hidden = x.shape
    experts, top_k = len(router), ids.shape[1]
    assert router.is_contiguous()
    padded = triton.next_power_of_2(hidden)
    options = launch_options(x.device)
    _store_logits[(experts, tokens)](
        x, norm, eps, router, h_out, probabilities, x if saved is None else saved, E=experts, D=hidden,
        C=padded, SAVE=saved is not None, num_warps=max(1, min(16, padded // 512)), **options,
    )  # fmt: skip
    _choose_experts[(tokens,)](
        probabilities, ids, weights, table, slots, missed, layer, E=experts, K=top_k,
        P=max(2, triton.next_power_of_2(experts)), NORMALISE=normalise, num_warps=4, **options,
    )  # fmt: skip
