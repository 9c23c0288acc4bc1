"""FlashMoE: run Mixture-of-Experts models that are larger than your memory.

Public names load on first use, so that `flashmoe --help` needs no torch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashmoe.api import LLM
    from flashmoe.chat import Chat
    from flashmoe.errors import FlashMoEError
    from flashmoe.generation import Generation, Piece
    from flashmoe.sampler import SamplingParams
    from flashmoe.stats import GenerationStats

# torch is left with sampling, but its OpenMP threads would spin long after that, on the cores that our own
# threads need by then (docs/log.md). Read when torch loads; whoever set either variable knows better.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

__version__ = "0.1.0"
__all__ = ["LLM", "Chat", "FlashMoEError", "Generation", "GenerationStats", "Piece", "SamplingParams"]

_HOMES = {
    "LLM": "flashmoe.api",
    "Chat": "flashmoe.chat",
    "Generation": "flashmoe.generation",
    "Piece": "flashmoe.generation",
    "FlashMoEError": "flashmoe.errors",
    "SamplingParams": "flashmoe.sampler",
    "GenerationStats": "flashmoe.stats",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flashmoe' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
