"""Read experts in the background with a few plain threads: demand reads first, then prefetch reads.

Experts are read one after another, in the order in which they were asked for, each cut into pieces that
several threads read at once: so the first expert arrives first, and the drive always has several reads in
flight. A piece of a prefetch read starts only when no demand piece waits; a prefetch read can be cancelled,
which takes effect between its pieces, or promoted to demand. Threads and not asyncio: through aiofiles'
executor the same reads ran at the same speed for experts of 9 MB and at 0.75 of it for 0.4 MB
(scripts/bench_read_dispatch.py).
"""

import queue
import threading
import time
from collections import deque
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
# Prefetch pieces in flight at once, and their size: a demand read waits behind them in the drive's own queue,
# and a cancelled read stops between them.
PREFETCH_THREADS = 2
PREFETCH_PIECE_BYTES = 1 << 20


class Completion(NamedTuple):
    """One expert has arrived, or will not."""

    tag: Any  # what `submit` was given
    views: tuple[memoryview, ...] | None  # the bytes of each extent in the plan's order; None after an error
    error: Exception | None
    read_bytes: int  # what the drive delivered
    seconds: float  # from submit to here


class Request:
    """One submitted plan, for `promote` and `cancel`. Its fields are guarded by the queue's lock."""

    def __init__(
        self, tag: Any, plan: ReadPlan, slot: memoryview | None, done: "queue.SimpleQueue[Completion]",
        is_prefetch: bool,
    ) -> None:  # fmt: skip
        self.tag, self.plan, self.slot, self.done = tag, plan, slot, done
        self.is_prefetch = is_prefetch
        self.submitted_s = time.perf_counter()
        self.waiting: deque[tuple[Run, int, int]] = deque()  # pieces: run, begin, nbytes
        self.in_flight = 0  # pieces
        self.read_bytes = 0
        self.error: Exception | None = None


class _Piece(NamedTuple):
    request: Request
    run: Run
    begin: int
    nbytes: int
    is_prefetch: bool  # when it started


class _BusyClock:
    """Seconds during which at least one of some things went on."""

    def __init__(self) -> None:
        self._count, self._seconds, self._since_s = 0, 0.0, 0.0

    def enter(self) -> None:
        if self._count == 0:
            self._since_s = time.perf_counter()
        self._count += 1

    def leave(self) -> None:
        self._count -= 1
        if self._count == 0:
            self._seconds += time.perf_counter() - self._since_s

    @property
    def seconds(self) -> float:
        return self._seconds + (time.perf_counter() - self._since_s if self._count else 0.0)


class ReadQueue:
    """Two queues, each first in, first out, over `threads` threads; for use from any thread."""

    def __init__(
        self,
        reader: ExpertReader,
        threads: int = THREADS,
        piece_bytes: int = PIECE_BYTES,
        prefetch_threads: int = PREFETCH_THREADS,
        prefetch_piece_bytes: int = PREFETCH_PIECE_BYTES,
    ) -> None:
        """`reader` stays the caller's: close the queue first, then the reader."""
        assert min(threads, prefetch_threads) > 0 and min(piece_bytes, prefetch_piece_bytes) >= PAGE_BYTES
        self._reader = reader
        self._piece_bytes, self._prefetch_piece_bytes = piece_bytes, prefetch_piece_bytes
        self._prefetch_threads = prefetch_threads
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True a piece, False to end a thread
        self._lock = threading.Lock()
        self._closed = False
        self._demand: deque[Request] = deque()  # requests with pieces that wait
        self._prefetch: deque[Request] = deque()
        self._pending: set[Request] = set()  # whose completion is still to come
        self._prefetch_pieces = 0  # in flight
        self._bytes_read = 0
        self._reads = 0
        self._busy, self._demand_busy = _BusyClock(), _BusyClock()
        self._threads = [
            threading.Thread(target=self._work, name=f"read-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        tag: Any,
        plan: ReadPlan,
        slot: memoryview | None,
        done: "queue.SimpleQueue[Completion]",
        prefetch: bool = False,
    ) -> Request:
        """Ask for one expert; exactly one Completion will be put on `done`, success or not, unless `cancel`
        withdraws it.

        `slot` is page-aligned writable memory of at least `plan.slot_bytes` that nobody else touches until
        then, or None if the reader works in place.
        """
        assert slot is None or slot.nbytes >= plan.slot_bytes, "the slot is smaller than the plan"
        assert slot is not None or self._reader.in_place, f"the {self._reader.name} reader needs a slot"
        request = Request(tag, plan, slot, done, prefetch)
        piece_bytes = self._prefetch_piece_bytes if prefetch else self._piece_bytes
        request.waiting.extend(
            (run, begin, nbytes)
            for run in plan.runs
            for begin, nbytes in cut_into_pieces(run.nbytes, piece_bytes)
        )
        pieces = len(request.waiting)
        with self._lock:
            assert not self._closed, "the read queue is closed"
            self._pending.add(request)
            (self._prefetch if prefetch else self._demand).append(request)
            if not prefetch:
                self._demand_busy.enter()
        for _ in range(pieces):
            self._wake.put(True)
        return request

    def promote(self, request: Request) -> None:
        """Make a prefetch read a demand read, the last of those that wait; it may have arrived already."""
        with self._lock:
            if not request.is_prefetch or request not in self._pending:
                return
            request.is_prefetch = False
            self._demand_busy.enter()
            pieces = len(request.waiting)
            if pieces:
                self._prefetch.remove(request)
                self._demand.append(request)
        for _ in range(pieces):
            self._wake.put(True)

    def cancel(self, request: Request) -> bool:
        """Give a prefetch read up. True: it was withdrawn, and no Completion will come, its slot is free now.
        False: it has arrived, or its Completion comes once the pieces in flight have ended."""
        with self._lock:
            if not request.is_prefetch or not request.waiting:
                return False
            self._forget_waiting(request)
            if request.in_flight == 0:
                self._pending.discard(request)
                request.slot = None
                return True
            request.error = ReadError("the read was given up: it was cancelled")
            return False

    def is_pending(self, tag: Any) -> bool:
        """Whether the Completion of what was submitted with this very object is still to come."""
        with self._lock:
            return any(request.tag is tag for request in self._pending)

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
            return self._busy.seconds

    @property
    def demand_busy_s(self) -> float:
        """The time during which a demand read was waited for or in flight: the rest is free for guesses."""
        with self._lock:
            return self._demand_busy.seconds

    def close(self) -> None:
        """End the threads after the reads in flight; what still waits completes with a ReadError."""
        with self._lock:
            already, self._closed = self._closed, True
        if not already:
            for _ in self._threads:
                self._wake.put(False)
        for thread in self._threads:
            thread.join()
        for request in (*self._demand, *self._prefetch):
            with self._lock:
                self._forget_waiting(request)
                request.error = ReadError("the read was given up: the read queue was closed")
            self._complete(request)

    def _work(self) -> None:
        while self._wake.get():
            while (piece := self._begin_piece()) is not None:
                if self._read(piece):
                    self._complete(piece.request)
                del piece  # or an idle thread would keep the last slot's memory alive

    def _begin_piece(self) -> _Piece | None:
        """The next piece to read, which is in flight from now on."""
        with self._lock:
            if self._closed:
                return None
            waiting = self._demand
            if not waiting:
                waiting = self._prefetch
                if not waiting or self._prefetch_pieces >= self._prefetch_threads:
                    return None
            request = waiting[0]
            piece = _Piece(request, *request.waiting.popleft(), request.is_prefetch)
            if not request.waiting:
                waiting.popleft()
            request.in_flight += 1
            self._prefetch_pieces += piece.is_prefetch
            self._busy.enter()
            return piece

    def _read(self, piece: _Piece) -> bool:
        """Whether this was the request's last piece."""
        nbytes, error, request = 0, None, piece.request
        try:
            nbytes = self._reader.read_run(piece.run, request.slot, piece.begin, piece.nbytes)
        except Exception as caught:  # whatever it is, the thread lives on and the one who waits gets to know
            error = caught
        with self._lock:
            self._bytes_read += nbytes
            self._reads += 1
            self._busy.leave()
            self._prefetch_pieces -= piece.is_prefetch
            request.read_bytes += nbytes
            request.error = request.error or error
            request.in_flight -= 1
            if request.error is not None:
                self._forget_waiting(request)
            # Not before the last piece: the slot must not be written later.
            return request.in_flight == 0 and not request.waiting

    def _forget_waiting(self, request: Request) -> None:
        if request.waiting:
            request.waiting.clear()
            (self._prefetch if request.is_prefetch else self._demand).remove(request)

    def _complete(self, request: Request) -> None:
        views, error = None, request.error
        try:
            views = None if error else self._reader.views(request.plan, request.slot)
        except Exception as caught:  # a reader that checks what it hands out: the one who waits gets to know
            error = caught
        seconds = time.perf_counter() - request.submitted_s
        with self._lock:
            self._pending.discard(request)
            if not request.is_prefetch:
                self._demand_busy.leave()
            request.slot = None  # tag and request may know each other: memory must not wait for a collector
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
