"""Copies of whole experts between RAM and VRAM, beside what the GPU computes.

An expert lies in RAM where its read has put it, in three parts or one, and in a VRAM slot as those parts one
behind the other. Copies in and copies out have a stream each, for PCIe is full duplex; each is first in,
first out. A `Ticket` stands for all copies of one direction that were asked for until then. Knows nothing
about who is resident: slots and addresses only.

`CudaCopyEngine` calls the driver directly: 1 to 2 microseconds a call, where torch's copy_ takes ten or more.
`HostCopyEngine` has ordinary memory for VRAM and copies at once: for tests, and for Triton's interpreter.
"""

import ctypes
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from flashmoe.errors import GpuError
from flashmoe.sizes import format_bytes
from kernels.expert_ffn import Addresses
from kernels.expert_slots import SlotLayout
from storage import host

Ticket = int  # copies in count up from 1, copies out down from -1; 0 is long done

EVENTS: Final = 512  # of each direction; older tickets than these are waited for before their event is reused
NOT_READY: Final = 600  # CUDA_ERROR_NOT_READY
DISABLE_TIMING: Final = 2  # CU_EVENT_DISABLE_TIMING
PORTABLE: Final = 1  # CU_MEMHOSTREGISTER_PORTABLE


class CopyEngine(Protocol):
    """Two queues of copies beside the stream that computes."""

    slots: int
    expert_bytes: int

    def copy_in(self, slot: int, addresses: Addresses) -> None:
        """Enqueue RAM -> VRAM of one expert."""
        ...

    def copy_out(self, slot: int, addresses: Addresses) -> None:
        """Enqueue VRAM -> RAM of one expert."""
        ...

    def mark(self) -> Ticket:
        """A ticket of everything that is to be copied in so far."""
        ...

    def mark_out(self) -> Ticket:
        """A ticket of everything that is to be copied out so far."""
        ...

    def is_done(self, ticket: Ticket) -> bool: ...

    def wait(self, ticket: Ticket) -> None:
        """Block the host."""
        ...

    def compute_waits(self, ticket: Ticket) -> None:
        """What is enqueued on the compute stream from now on runs after these copies."""
        ...

    def copies_wait_for_compute(self) -> None:
        """Copies in that follow run after what is enqueued on the compute stream now."""
        ...

    def copies_in_wait(self, ticket: Ticket) -> None:
        """Copies in that follow run after these copies out."""
        ...

    def copies_out_wait(self, ticket: Ticket) -> None:
        """Copies out that follow run after these copies in."""
        ...

    def pin(self, address: int, nbytes: int) -> None:
        """Lock memory that will be copied from and to. Raises GpuError."""
        ...

    def unpin(self, address: int) -> None: ...

    def close(self) -> None:
        """Wait for all copies and give back what the engine made; the arena is the caller's."""
        ...


class HostCopyEngine:
    """Copies at once, between ordinary memory: every ticket is done when it is made."""

    def __init__(self, arena: Tensor, layout: SlotLayout) -> None:
        """arena [slots, bytes] uint8, contiguous."""
        self.slots, self.expert_bytes = len(arena), layout.bytes
        self._base, self._stride = _check_arena(arena, layout)
        self._arena = arena

    def copy_in(self, slot: int, addresses: Addresses) -> None:
        at = self._base + slot * self._stride
        for address, offset, nbytes in pieces(addresses, self.expert_bytes):
            ctypes.memmove(at + offset, address, nbytes)

    def copy_out(self, slot: int, addresses: Addresses) -> None:
        at = self._base + slot * self._stride
        for address, offset, nbytes in pieces(addresses, self.expert_bytes):
            ctypes.memmove(address, at + offset, nbytes)

    def mark(self) -> Ticket:
        return 0

    def mark_out(self) -> Ticket:
        return 0

    def is_done(self, ticket: Ticket) -> bool:
        return True

    def wait(self, ticket: Ticket) -> None:
        pass

    def compute_waits(self, ticket: Ticket) -> None:
        pass

    def copies_wait_for_compute(self) -> None:
        pass

    def copies_in_wait(self, ticket: Ticket) -> None:
        pass

    def copies_out_wait(self, ticket: Ticket) -> None:
        pass

    def pin(self, address: int, nbytes: int) -> None:
        pass

    def unpin(self, address: int) -> None:
        pass

    def close(self) -> None:
        del self._arena


class CudaCopyEngine:
    """Copies on two CUDA streams, ordered by events; every return code is checked."""

    def __init__(
        self, arena: Tensor, layout: SlotLayout, compute: "torch.cuda.Stream | None" = None
    ) -> None:
        """arena [slots, bytes] uint8 on the GPU. `compute`: the stream of the kernels, by default the current
        one. For use from the thread that makes this."""
        self.slots, self.expert_bytes = len(arena), layout.bytes
        self._base, self._stride = _check_arena(arena, layout)
        self._arena = arena
        self._driver = _Driver()
        compute = compute or torch.cuda.current_stream(arena.device)
        self._compute = compute.cuda_stream
        self._streams = [_new_stream(arena.device) for _ in range(2)]  # kept alive
        self._in, self._out = (Lane(self._driver, stream.cuda_stream) for stream in self._streams)
        self._computed = self._driver.new_event()

    def copy_in(self, slot: int, addresses: Addresses) -> None:
        copy, stream = self._driver.copy_in, self._in.stream
        at = self._base + slot * self._stride
        for address, offset, nbytes in pieces(addresses, self.expert_bytes):
            if code := copy(at + offset, address, nbytes, stream):
                self._driver.fail(code, "copying an expert to the GPU")

    def copy_out(self, slot: int, addresses: Addresses) -> None:
        copy, stream = self._driver.copy_out, self._out.stream
        at = self._base + slot * self._stride
        for address, offset, nbytes in pieces(addresses, self.expert_bytes):
            if code := copy(address, at + offset, nbytes, stream):
                self._driver.fail(code, "copying an expert from the GPU")

    def mark(self) -> Ticket:
        return self._in.mark()

    def mark_out(self) -> Ticket:
        return -self._out.mark()

    def is_done(self, ticket: Ticket) -> bool:
        return self._in.is_done(ticket) if ticket > 0 else self._out.is_done(-ticket)

    def wait(self, ticket: Ticket) -> None:
        if ticket > 0:
            self._in.wait(ticket)
        else:
            self._out.wait(-ticket)

    def compute_waits(self, ticket: Ticket) -> None:
        self._stream_waits(self._compute, ticket)

    def copies_wait_for_compute(self) -> None:
        self._driver.record(self._computed, self._compute)
        self._driver.stream_waits(self._in.stream, self._computed)

    def copies_in_wait(self, ticket: Ticket) -> None:
        self._stream_waits(self._in.stream, ticket)

    def copies_out_wait(self, ticket: Ticket) -> None:
        self._stream_waits(self._out.stream, ticket)

    def pin(self, address: int, nbytes: int) -> None:
        reason = None
        try:
            host.populate(address, nbytes)  # the driver would do it alone: 15 GiB took it 3 to 4.6 s
        except OSError as error:
            reason = error.strerror
        code = self._driver.register(address, nbytes, PORTABLE) if reason is None else 0
        if code:
            reason = self._driver.error_text(code)
        if reason is not None:
            raise GpuError(
                f"{format_bytes(nbytes)} of expert slots in RAM cannot be pinned for the GPU ({reason});"
                " raise the limit of locked memory (ulimit -l) or try a smaller --ram-budget"
            )

    def unpin(self, address: int) -> None:
        self._driver.check(self._driver.unregister(address), "releasing pinned memory")

    def close(self) -> None:
        for stream, lane in zip(self._streams, (self._in, self._out), strict=True):
            stream.synchronize()
            lane.close()
        self._driver.destroy_event(self._computed)
        del self._arena  # whoever still holds the engine must not hold the GPU's memory

    def _stream_waits(self, stream: int, ticket: Ticket) -> None:
        if ticket and not self.is_done(ticket):
            event = self._in.event(ticket) if ticket > 0 else self._out.event(-ticket)
            self._driver.stream_waits(stream, event)


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class EventDriver(Protocol):
    """What a lane needs of the driver. Events and streams are handles."""

    def new_event(self) -> int: ...
    def destroy_event(self, event: int) -> None: ...
    def record(self, event: int, stream: int) -> None: ...
    def has_happened(self, event: int) -> bool: ...
    def synchronize(self, event: int) -> None: ...


class Lane:
    """One stream and its tickets, which count up from 1; a ring of events stands for the youngest of them."""

    def __init__(self, driver: EventDriver, stream: int) -> None:
        self._driver, self.stream = driver, stream
        self._events = [driver.new_event() for _ in range(EVENTS)]
        self._newest = self._done = 0

    def mark(self) -> int:
        ticket = self._newest + 1
        if ticket - self._done > EVENTS:
            self.wait(ticket - EVENTS)
        self._driver.record(self._events[ticket % EVENTS], self.stream)
        self._newest = ticket
        return ticket

    def event(self, ticket: int) -> int:
        """Of a ticket that may not be done yet."""
        return self._events[ticket % EVENTS]

    def is_done(self, ticket: int) -> bool:
        if ticket > self._done and self._driver.has_happened(self.event(ticket)):
            self._done = ticket
        return ticket <= self._done

    def wait(self, ticket: int) -> None:
        if ticket > self._done:
            self._driver.synchronize(self.event(ticket))
            self._done = ticket

    def close(self) -> None:
        for event in self._events:
            self._driver.destroy_event(event)
        self._events.clear()


class _Driver:
    """The calls of libcuda that we use. Those that only enqueue keep the GIL: giving it up for a microsecond
    may cost a wait for whoever takes it."""

    def __init__(self) -> None:
        try:
            quick, slow = ctypes.PyDLL("libcuda.so.1"), ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise GpuError(f"the NVIDIA driver's library cannot be loaded: {error}") from error
        pointer, size = ctypes.c_uint64, ctypes.c_size_t
        self.copy_in = _function(quick, "cuMemcpyHtoDAsync_v2", pointer, pointer, size, pointer)
        self.copy_out = _function(quick, "cuMemcpyDtoHAsync_v2", pointer, pointer, size, pointer)
        self._create = _function(quick, "cuEventCreate", ctypes.c_void_p, ctypes.c_uint)
        self._destroy = _function(quick, "cuEventDestroy_v2", pointer)
        self._record = _function(quick, "cuEventRecord", pointer, pointer)
        self._query = _function(quick, "cuEventQuery", pointer)
        self._stream_wait = _function(quick, "cuStreamWaitEvent", pointer, pointer, ctypes.c_uint)
        self._text = _function(quick, "cuGetErrorString", ctypes.c_int, ctypes.c_void_p)
        self._synchronize = _function(slow, "cuEventSynchronize", pointer)
        self.register = _function(slow, "cuMemHostRegister_v2", pointer, size, ctypes.c_uint)
        self.unregister = _function(slow, "cuMemHostUnregister", pointer)

    def new_event(self) -> int:
        event = ctypes.c_uint64()
        self.check(self._create(ctypes.addressof(event), DISABLE_TIMING), "making an event")
        return event.value

    def destroy_event(self, event: int) -> None:
        self.check(self._destroy(event), "giving an event back")

    def record(self, event: int, stream: int) -> None:
        if code := self._record(event, stream):
            self.fail(code, "recording an event")

    def stream_waits(self, stream: int, event: int) -> None:
        if code := self._stream_wait(stream, event, 0):
            self.fail(code, "ordering two streams")

    def has_happened(self, event: int) -> bool:
        code = self._query(event)
        if code not in (0, NOT_READY):
            self.fail(code, "asking for an event")
        return bool(code == 0)

    def synchronize(self, event: int) -> None:
        self.check(self._synchronize(event), "waiting for a copy")

    def check(self, code: int, deed: str) -> None:
        if code:
            self.fail(code, deed)

    def fail(self, code: int, deed: str) -> None:
        raise GpuError(f"{deed} failed: {self.error_text(code)}")

    def error_text(self, code: int) -> str:
        text = ctypes.c_char_p()
        self._text(code, ctypes.addressof(text))
        return f"CUDA error {code}, {text.value.decode() if text.value else 'unknown'}"


def _function(library: ctypes.CDLL, name: str, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.argtypes, function.restype = arguments, ctypes.c_int
    return function


def pieces(addresses: Addresses, nbytes: int) -> list[tuple[int, int, int]]:
    """(RAM address, offset in the slot, bytes) of an expert's copies: one, or of gate, up and down each."""
    gate, up, down = addresses
    part = nbytes // 3
    if up == 0 or (up == gate + part and down == up + part):
        return [(gate, 0, nbytes)]
    return [(gate, 0, part), (up, part, part), (down, 2 * part, part)]


def _check_arena(arena: Tensor, layout: SlotLayout) -> tuple[int, int]:
    """(address, bytes from one slot to the next)"""
    assert arena.dim() == 2 and arena.dtype == torch.uint8 and arena.is_contiguous()
    assert layout.bytes <= arena.shape[1], "an expert is larger than a slot"
    return arena.data_ptr(), arena.stride(0)
