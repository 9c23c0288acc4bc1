"""Copies between VRAM slots and RAM slots, in an order in which nobody reads what is not there yet.

What goes up is copied to a free slot, what comes down to a RAM slot that is free or holds a copy of what lies
above. A slot may be given out again while something still reads it: the copy that writes it is then put
behind, on the device. The host waits only before the drive may write to a RAM slot, and before the CPU reads
one.
Knows nothing about who is resident.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from flashmoe.copy_engine import CopyEngine, Ticket
from flashmoe.expert_cache import ExpertCache
from flashmoe.expert_slots import CacheCounters
from flashmoe.weights import ExpertId
from kernels.expert_ffn import Addresses

REMEMBERED: Final = 256  # copies, before those that have ended are forgotten


@dataclass(slots=True)
class VramCounters(CacheCounters):
    """`hits` and `misses` are VRAM's; reads, their bytes and the time waited for them are RAM's below, as of
    the last event's end. `prefetch_*`: guesses copied to VRAM."""

    ram_hits: int = 0  # of the misses, those that RAM held
    cpu_experts: int = 0  # of the misses, those computed on the CPU
    in_place: int = 0  # of the misses, those that the GPU has read in RAM
    promoted: int = 0  # of these, those copied to VRAM afterwards
    bytes_in: int = 0  # over PCIe: copied, or read in place
    bytes_out: int = 0


class TierCopies:
    """Free VRAM slots, experts on their way down, and the copies under way."""

    def __init__(self, engine: CopyEngine, ram: ExpertCache, slots: int, counters: VramCounters) -> None:
        self.free = deque(range(slots))  # first in, first out: the first has long been copied out
        self.falling: deque[tuple[ExpertId, int]] = deque()  # what goes down, and its slot until then
        self._engine, self._ram, self._slots, self._counters = engine, ram, slots, counters
        self._newest: dict[ExpertId, Ticket] = {}  # the last copy from or to an expert's RAM slot
        self._emptying: dict[int, Ticket] = {}  # slots that are being copied out
        self._last_in: Ticket = 0

    def up(self, key: ExpertId) -> tuple[int, Ticket]:
        """Copy an expert that RAM holds to a free slot; if there is none, something falls first."""
        if not self.free:
            self._down(*self.falling.popleft())
        slot = self.free.popleft()
        for reading in (self._emptying.pop(slot, 0), self._newest.get(key, 0)):
            if reading < 0:  # the slot is being copied out, or the expert has only just come down
                self._engine.copies_in_wait(reading)
        self._engine.copy_in(slot, self._ram.addresses(key))
        self._last_in = self._newest[key] = self._engine.mark()
        self._counters.bytes_in += self._engine.expert_bytes
        return slot, self._last_in

    def let_fall(self) -> None:
        """Copy down what is to go."""
        while self.falling:
            self._down(*self.falling.popleft())
        if len(self._newest) > REMEMBERED:
            self._newest = {key: t for key, t in self._newest.items() if not self._engine.is_done(t)}

    def wait_for(self, key: ExpertId) -> None:
        """Until an expert's RAM slot is neither read nor written."""
        if ticket := self._newest.pop(key, 0):
            self._engine.wait(ticket)

    def addresses_for_cpu(self, key: ExpertId) -> Addresses:
        """Where an expert lies in RAM, once it does."""
        if (ticket := self._newest.get(key, 0)) < 0:
            self._engine.wait(ticket)
        return self._ram.addresses(key)

    def recover(self, taken: Collection[int]) -> None:
        """Wait for all copies; slots that are not `taken` are free."""
        self._engine.wait(self._engine.mark())
        self._engine.wait(self._engine.mark_out())
        self.falling.clear()
        self._newest.clear()
        self._emptying.clear()
        self.free = deque(slot for slot in range(self._slots) if slot not in taken)

    def _down(self, key: ExpertId, slot: int) -> None:
        self._engine.copies_out_wait(self._last_in)  # it may have filled this slot, or read the RAM slot
        self._ram.fall(key, lambda addresses: self._engine.copy_out(slot, addresses))
        self._newest[key] = self._emptying[slot] = self._engine.mark_out()
        self._counters.bytes_out += self._engine.expert_bytes
        self.free.append(slot)
