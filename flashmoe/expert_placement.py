"""Where an expert that is in RAM and not in VRAM is computed: copied to the GPU, or on the CPU as it lies.

The choice of Fiddler (arXiv 2402.07033): whichever ends earlier by a cost model of a few constants, measured
at start. One event's misses are shared between two queues, copies over PCIe and the cores, both serial. Only
constants and counts go in, so a run can be repeated. For one token; of a prompt, experts are copied: their
arithmetic on the CPU would grow with the tokens.
"""

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from flashmoe.copy_engine import CopyEngine
from kernels.expert_ffn import Addresses, ExpertFFN
from kernels.native import Context, Experts
from storage.host import allocate_aligned

# A token's activations to the host and its products back: two small copies and their waits.
ROUND_TRIP_S: Final = 30e-6
# What is measured with: enough experts that none of them is still in the CPU's caches when its turn comes.
SCRATCH_BYTES: Final = 192 << 20
MAX_SCRATCH_EXPERTS: Final = 64
MEASURING_S: Final = 0.05  # each of the two rates
EXPERTS_AT_ONCE: Final = 4


@dataclass(frozen=True, slots=True)
class Placement:
    """The cost model, in seconds, and what the user wants: auto, never or always on the CPU."""

    mode: str
    copy_s: float = 0.0  # one expert over PCIe
    cpu_s: float = 0.0  # one expert for one token on the CPU, beside others
    round_trip_s: float = ROUND_TRIP_S  # as soon as there is one on the CPU

    def on_cpu(self, misses: int) -> int:
        """How many of an event's misses that are in RAM the CPU takes: fewest among equally good choices."""
        if self.mode != "auto":
            return misses if self.mode == "always" else 0
        return min(range(misses + 1), key=lambda n: (max(self.queues_s(misses - n, n)), n))

    def queues_s(self, copies: int, on_cpu: int) -> tuple[float, float]:
        """When each of the two is through with its share."""
        return copies * self.copy_s, on_cpu * self.cpu_s + (self.round_trip_s if on_cpu else 0.0)


def calibrate(
    mode: str, engine: CopyEngine, kernels: Context, experts: Experts, hidden_size: int, top_k: int
) -> Placement:
    """Measure with real copies into an arena that nobody uses yet and the real kernels, in about 0.2 s."""
    if mode == "never":
        return Placement(mode)
    nbytes = engine.expert_bytes
    count = max(EXPERTS_AT_ONCE, min(MAX_SCRATCH_EXPERTS, SCRATCH_BYTES // nbytes))
    scratch = allocate_aligned(count * nbytes)
    # Bytes that are ordinary numbers in every format: no zero pages, no denormals.
    torch.frombuffer(scratch, dtype=torch.uint8).fill_(0x3C)
    first = ctypes.addressof(ctypes.c_char.from_buffer(scratch))
    places: list[Addresses] = [
        (at, at + nbytes // 3, at + nbytes // 3 * 2) for at in range(first, first + count * nbytes, nbytes)
    ]  # of a packed expert only the first counts
    engine.pin(first, count * nbytes)
    try:
        copy_s = _seconds(count, lambda i: _copy(engine, i % engine.slots, places[i]))
        ffn = ExpertFFN(kernels, experts, hidden_size, top_k)
        at_once = min(EXPERTS_AT_ONCE, top_k)
        x = torch.linspace(-1, 1, hidden_size)[None]

        def compute(i: int) -> None:
            chosen = [places[(i * at_once + j) % count] for j in range(at_once)]
            ffn.begin(x)
            ffn.add_to_one_token(list(enumerate(chosen)))

        cpu_s = _seconds(count // at_once, compute) / at_once
    finally:
        engine.unpin(first)
    return Placement(mode, copy_s, cpu_s)


def _copy(engine: CopyEngine, slot: int, addresses: Addresses) -> None:
    engine.copy_in(slot, addresses)
    engine.wait(engine.mark())


def _seconds(count: int, deed: Callable[[int], None]) -> float:
    """The median time of a deed, done for about MEASURING_S over `count` different things."""
    deed(0)
    taken: list[float] = []
    end = time.perf_counter() + MEASURING_S
    while (begin := time.perf_counter()) < end or not taken:
        deed((len(taken) + 1) % count)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)
