"""The router: which experts a token goes to, and with what weights."""

import torch
from torch import Tensor


def route(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Choose the experts of each token and their weights.

    logits [T, E] float32 -> expert ids [T, K] int64, weights [T, K] float32, largest first. Softmax over all
    experts, then the top k; `renormalise` scales each row to sum to one (Mixtral always, which equals a softmax
    over the chosen logits, arXiv 2401.04088 section 2.1; the others by `norm_topk_prob`). The native library
    does the same for one token (fm_route).
    """
    probabilities = torch.softmax(logits, dim=-1)  # [T, E]
    weights, expert_ids = torch.topk(probabilities, top_k, dim=-1)
    if renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return expert_ids, weights
