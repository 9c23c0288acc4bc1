"""Read experts in the background with a few plain threads.

Experts are read one after another, in the order in which they were asked for, each cut into pieces that
several threads read at once: so the first expert arrives first, and the drive always has several reads in
flight. Threads and not asyncio: through aiofiles' executor the same reads ran at the same speed for experts
of 9 MB and at 0.75 of it for 0.4 MB (scripts/bench_read_dispatch.py). Demand reads only; nothing is
cancelled except by `close`.
"""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from storage.expert_reader import ExpertReader, ReadPlan, Run
from storage.shard_file import PAGE_BYTES
from storage.storage_errors import ReadError

# scripts/bench_read_dispatch.py, drive of 2 GB/s, experts of 9 MB: with a free GIL, 2 or 4 threads and pieces
# of 1 MiB up to whole experts differ by no more than the noise. Beside a thread that wants the GIL, larger
# pieces are faster (2 MiB 1.2 to 2.2 times as fast as 1 MiB), but from 4 MiB on the first of four experts
# arrives 1.5 times as late. Experts of 0.4 MB, one piece each, want the 4 threads.
THREADS = 4
PIECE_BYTES = 2 << 20


class Completion(NamedTuple):
    """One expert has arrived, or will not."""

    tag: Any  # what `submit` was given
    views: tuple[memoryview, ...] | None  # the bytes of each extent in the plan's order; None after an error
    error: Exception | None
    read_bytes: int  # what the drive delivered
    seconds: float  # from submit to here


class _Request:
    """One submitted plan; its fields are guarded by the queue's lock."""

    def __init__(
        self, tag: Any, plan: ReadPlan, slot: memoryview | None, done: "queue.SimpleQueue[Completion]"
    ) -> None:
        self.tag = tag
        self.plan = plan
        self.slot = slot
        self.done = done
        self.submitted_s = time.perf_counter()
        self.pieces_left = 0
        self.read_bytes = 0
        self.error: Exception | None = None


class _Piece(NamedTuple):
    request: _Request
    run: Run
    begin: int
    nbytes: int


class ReadQueue:
    """First in, first out, over `threads` threads. `submit` and the counters may be used from any thread."""

    def __init__(self, reader: ExpertReader, threads: int = THREADS, piece_bytes: int = PIECE_BYTES) -> None:
        """`reader` stays the caller's: close the queue first, then the reader."""
        assert threads > 0 and piece_bytes >= PAGE_BYTES
        self._reader = reader
        self._piece_bytes = piece_bytes
        self._pieces: queue.SimpleQueue[_Piece | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._bytes_read = 0
        self._reads = 0
        self._in_flight = 0
        self._busy_s = 0.0
        self._busy_since_s = 0.0
        self._threads = [
            threading.Thread(target=self._work, name=f"read-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self, tag: Any, plan: ReadPlan, slot: memoryview | None, done: "queue.SimpleQueue[Completion]"
    ) -> None:
        """Ask for one expert; exactly one Completion will be put on `done`, success or not.

        `slot` is page-aligned writable memory of at least `plan.slot_bytes` that nobody else touches until
        then, or None if the reader works in place.
        """
        assert slot is None or slot.nbytes >= plan.slot_bytes, "the slot is smaller than the plan"
        assert slot is not None or self._reader.in_place, f"the {self._reader.name} reader needs a slot"
        request = _Request(tag, plan, slot, done)
        pieces = [
            _Piece(request, run, begin, nbytes)
            for run in plan.runs
            for begin, nbytes in cut_into_pieces(run.nbytes, self._piece_bytes)
        ]
        request.pieces_left = len(pieces)
        with self._lock:
            assert not self._closed, "the read queue is closed"
            for piece in pieces:  # under the lock, so that one expert's pieces stay together
                self._pieces.put(piece)

    @property
    def bytes_read(self) -> int:
        """Bytes delivered so far."""
        with self._lock:
            return self._bytes_read

    @property
    def reads(self) -> int:
        """Pieces read so far."""
        with self._lock:
            return self._reads

    @property
    def busy_s(self) -> float:
        """The time during which at least one read was in flight."""
        with self._lock:
            now_s = time.perf_counter() if self._in_flight else self._busy_since_s
            return self._busy_s + now_s - self._busy_since_s

    def close(self) -> None:
        """End the threads after the reads in flight; what still waits completes with a ReadError."""
        with self._lock:
            already, self._closed = self._closed, True
        if not already:
            for _ in self._threads:
                self._pieces.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (piece := self._pieces.get()) is not None:
            if self._begin(piece.request):
                self._read(piece)
            self._finish_piece(piece.request)
            del piece  # or an idle thread would keep the last slot's memory alive

    def _begin(self, request: _Request) -> bool:
        """Whether the piece is still worth reading; if so, a read is in flight from now on."""
        with self._lock:
            if self._closed and request.error is None:
                request.error = ReadError("the read was given up: the read queue was closed")
            if request.error is not None:
                return False
            if self._in_flight == 0:
                self._busy_since_s = time.perf_counter()
            self._in_flight += 1
            return True

    def _read(self, piece: _Piece) -> None:
        nbytes, error = 0, None
        try:
            nbytes = self._reader.read_run(piece.run, piece.request.slot, piece.begin, piece.nbytes)
        except Exception as caught:  # whatever it is, the thread lives on and the one who waits gets to know
            error = caught
        with self._lock:
            self._bytes_read += nbytes
            self._reads += 1
            piece.request.read_bytes += nbytes
            piece.request.error = piece.request.error or error
            self._in_flight -= 1
            if self._in_flight == 0:
                self._busy_s += time.perf_counter() - self._busy_since_s
                self._busy_since_s = 0.0

    def _finish_piece(self, request: _Request) -> None:
        """Complete the request with its last piece, and not before: its slot must not be written later."""
        with self._lock:
            request.pieces_left -= 1
            if request.pieces_left > 0:
                return
        views, error = None, request.error
        try:
            views = None if error else self._reader.views(request.plan, request.slot)
        except Exception as caught:  # a reader that checks what it hands out: the one who waits gets to know
            error = caught
        seconds = time.perf_counter() - request.submitted_s
        request.done.put(Completion(request.tag, views, error, request.read_bytes, seconds))


def cut_into_pieces(nbytes: int, piece_bytes: int) -> Iterator[tuple[int, int]]:
    """(begin, nbytes) of equal pieces of whole pages, about `piece_bytes` each.

    Equal, because an expert that straddles pages is a page longer than a round number, and a piece of one
    page would cost as much of the drive's time as a larger one.
    """
    count = max(1, round(nbytes / piece_bytes))
    step = -(-nbytes // (count * PAGE_BYTES)) * PAGE_BYTES
    for begin in range(0, nbytes, step):
        yield begin, min(step, nbytes - begin)
