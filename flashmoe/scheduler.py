"""Which requests run, and in what order: continuous batching over one decoder.

Every step computes one token of each request that decodes, all in one forward pass, so that they share each
layer's reads and weights. Prompts run in chunks: several in one pass while nobody decodes, otherwise
in the time in which the others wait for the drive (flashmoe/background_prefill.py). A token's bits do not
depend on who runs beside it, so neither do answers. `submit` and `cancel` may come from any thread; `step`
computes, in whichever thread calls it, one at a time.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from flashmoe.background_prefill import BackgroundPrefill
from flashmoe.batch import Running, Totals, Waiting, next_tokens
from flashmoe.budget import MOST_STEP_TOKENS, PREFILL_CHUNK
from flashmoe.decoder import RoutingObserver, Stretch
from flashmoe.engine import check_prompt
from flashmoe.errors import FlashMoEError, QueueFullError
from flashmoe.generation import Constraint, GenerationRequest, Piece
from flashmoe.kv_cache import KVPool, shared_prefix
from flashmoe.prompt_lane import ChunkPace, PromptLane
from flashmoe.queue_pace import QueuePace
from flashmoe.recorder import Recorder
from flashmoe.sampler import SamplingParams
from flashmoe.stats import GenerationStats
from flashmoe.tokenizer import Tokenizer
from storage.storage_errors import StorageError

DEFAULT_QUEUE = 256
# A prompt waits for another one that begins alike and is being computed, if that saves so many tokens.
WORTH_WAITING = 32
# A prompt of few tokens, such as the next message of a chat, runs among the tokens that decode.
SHORT_PROMPT = 16
RETRY_AFTER_S = 2.0  # of one that shuts down: another may have taken its place by then
IDLE_S = 2.0  # without work, before conversations are written to disk

logger = logging.getLogger(__name__)


class BatchDecoder(Protocol):
    """What computes: flashmoe/decoder.py, gpu_decoder.py."""

    observer: RoutingObserver | None
    runs_prompts_together: bool  # whether one pass may have tokens of several

    def forward_batch(
        self, batch: Sequence[Stretch], check: Callable[[], None] | None = None
    ) -> Tensor:
        """New tokens of B sequences -> logits [B, V]."""


class _AllCancelled(Exception):
    """Nobody wants what a step computes."""


class Scheduler:
    """Runs generation requests, at most `most_running` together."""

    def __init__(
        self, decoder: BatchDecoder, kv_pool: KVPool, tokenizer: Tokenizer,
        recorder: Callable[[GenerationStats], Recorder], most_running: int,
        most_waiting: int = DEFAULT_QUEUE,
    ) -> None:  # fmt: skip
        assert 0 < most_running <= MOST_STEP_TOKENS
        self.decoder, self.kv_pool, self.tokenizer = decoder, kv_pool, tokenizer
        self.most_running, self.most_waiting = most_running, most_waiting
        self.after_step: Callable[[], None] | None = None  # called in the computing thread
        self.totals, self.queue_pace = Totals(), QueuePace()
        self.step_began_s = self._step_ended_s = 0.0  # perf_counter, of the last step
        self._recorder = recorder
        self._lock = threading.RLock()  # of whoever computes
        self._stepping = False
        self._work = threading.Condition()  # guards what is waiting; notified when there is more, or a step
        self._waiting: deque[Waiting] = deque()
        self._running: list[Running] = []
        self._lane: PromptLane | None = None
        self._oldest_is_next = False
        self._chunk_pace = ChunkPace()
        self._submitted = 0
        self._thread: threading.Thread | None = None
        self._stopping = False

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_thread(self) -> bool:
        """Whether a thread of its own computes."""
        return self._thread is not None

    @property
    def is_alive(self) -> bool:
        """False if that thread has died, which is a bug."""
        thread = self._thread
        return thread is None or thread.is_alive()

    def use_background(self, background: BackgroundPrefill | None) -> None:
        """Run prompts there while others decode; None: between their steps."""
        with self.exclusive():
            self._lane = None if background is None else PromptLane(background)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Nothing is computed meanwhile. Raises FlashMoEError while requests run."""
        with self._lock:
            self._end_cancelled()
            if self._running or self._stepping:
                raise FlashMoEError(
                    f"{len(self._running)} generations run on this LLM; let them finish or close them first"
                )
            yield

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raises ContextError for an empty prompt or one longer than the context, ModelError for an id that
        the model does not know."""
        check_prompt(prompt, self.kv_pool.config.vocab_size, self.kv_pool.context)

    def check_room(self) -> None:
        """Raises QueueFullError when too many wait already; it says when those will have begun."""
        with self._work:
            if self._stopping:
                raise QueueFullError("no new requests: it is shutting down", RETRY_AFTER_S)
            waiting = len(self._waiting)
            if waiting >= self.most_waiting:
                raise QueueFullError(
                    f"{waiting} requests wait already, which is the limit; try again later",
                    self.queue_pace.wait_s(waiting, len(self._running)),
                )

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, sink: Callable[[Piece], None],
        stats: GenerationStats | None = None, constraint: Constraint | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> GenerationRequest:  # fmt: skip
        """Queue a generation behind token ids. `cancelled` is asked now and then, before every layer mostly.

        Raises what `check_prompt` and `check_room` raise.
        """
        self.check_prompt(prompt)
        with self._work:
            self.check_room()
            self._submitted += 1
            request = GenerationRequest(
                self._submitted, prompt, params, self.tokenizer, self.kv_pool.config.vocab_size,
                self.kv_pool.context, sink, GenerationStats() if stats is None else stats, constraint,
                cancelled,
            )  # fmt: skip
            self._waiting.append(Waiting(request, self._recorder(request.stats)))
            self._work.notify_all()
        return request

    def advance(self) -> None:
        """Have something computed: by the thread that does so, if there is one, or else here."""
        if not self.has_thread:
            self.step()
            return
        with self._work:
            self._work.wait(timeout=0.1)

    def step(self) -> bool:
        """Compute once for those that run; False if there was nothing to do."""
        with self._lock:
            if not self._running and not self._waiting:
                return False
            assert not self._stepping, "a sink or a callback must not compute"
            self._stepping, self.step_began_s = True, time.perf_counter()
            try:
                self._recover()
                self._end_cancelled()
                self.kv_pool.is_busy = any(running.is_decoding for running in self._running)
                self.kv_pool.write_ahead()
                self._admit()
                self._compute()
            finally:
                self._stepping, self._step_ended_s = False, time.perf_counter()
                if self.after_step is not None:
                    self.after_step()
                with self._work:
                    self._work.notify_all()
            return True

    def retire(self, request: GenerationRequest) -> None:
        """Cancel a request and, unless a thread computes or we are in the middle of a step, see to it now."""
        request.cancel()
        if not self.has_thread:
            with self._lock:
                if not self._stepping:
                    self._end_cancelled()

    def start(self) -> None:
        """Compute in a thread of its own from now on."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def stop(self, drain_s: float = 0.0) -> None:
        """End the thread, giving what runs and waits so many seconds to finish; the rest is cancelled.
        Meanwhile no requests are taken; afterwards whoever asks computes."""
        deadline = time.monotonic() + drain_s
        with self._work:
            self._stopping = True
            self._work.notify_all()
            while self._thread is not None and self.is_alive and (self._running or self._waiting):
                if not self._work.wait(timeout=max(0.0, deadline - time.monotonic())):
                    break
        thread, self._thread = self._thread, None
        self._cancel_all()
        if thread is not None:
            with self._work:
                self._work.notify_all()
            thread.join()
        with self._lock:
            self._end_cancelled()
        self._stopping = False

    # The thread

    def _run(self) -> None:
        while self._thread is threading.current_thread():
            try:
                if not self.step() and not self._save_one():
                    with self._work:
                        if self._thread is threading.current_thread() and not self._waiting:
                            self._work.wait(timeout=IDLE_S / 2)
            except BaseException as error:  # a bug, or a panic in a library: who ran gets to know
                logger.exception("a step failed")
                self._fail_all(error)

    def _fail_all(self, error: BaseException) -> None:
        """End whoever ran."""
        with self._lock:
            for running in list(self._running):
                self._end(running, "error", _as_exception(error))
            self._give_lane_up()

    def _save_one(self) -> bool:
        """Nothing has been done for a while: a conversation that is not on disk yet goes there."""
        with self._lock:
            idle = not self._waiting and time.perf_counter() - self._step_ended_s >= IDLE_S
            return idle and self.kv_pool.save_one()

    # Who comes and goes

    def _recover(self) -> None:
        """After a step that a Ctrl-C cut short anywhere."""
        if self._lane is not None and not self._lane.is_active:
            self._give_lane_up()
        for running in self._running:
            if running.missing == 0:  # it ran, and its next token was not chosen
                running.kv_cache.truncate(len(running.request.tokens) - 1)

    def _cancel_all(self) -> None:
        with self._work:
            for request in [w.request for w in self._waiting] + [r.request for r in self._running]:
                request.cancel()

    def _end_cancelled(self) -> None:
        members = self._lane.members if self._lane is not None else []
        for running in members:
            running.request.poll()
        for running in [r for r in self._running if r.request.is_cancelled]:
            self._end(running, "cancelled")
        if members and not any(r in self._running for r in members):
            self._give_lane_up()
        with self._work:
            gone = [w for w in self._waiting if w.request.poll()]
            self._waiting = deque(w for w in self._waiting if w not in gone)
        for waiting in gone:
            self._refuse(waiting, "cancelled")

    def _admit(self) -> None:
        """Let those that wait begin, in their order, as far as there is room."""
        for waiting in list(self._waiting):
            if len(self._running) >= self.most_running:
                return
            if self._is_worth_waiting(waiting.request.tokens):
                continue
            try:
                running = self._begin(waiting)
            except Exception as error:
                logger.exception("a request could not begin")
                self._remove_waiting(waiting)
                self._refuse(waiting, "error", error)
                continue
            if running is None:
                return

    def _begin(self, waiting: Waiting) -> Running | None:
        """None if there is no room for it."""
        tokens = waiting.request.tokens
        kv_cache: Any = self.kv_pool.take(tokens)
        try:
            if not self.kv_pool.grow(kv_cache, len(tokens) + 1):
                assert self._running, "one request always has room"
                self.kv_pool.keep(kv_cache)
                return None
            running = Running(waiting.request, waiting.recorder, kv_cache)
            self._running.append(running)
        except BaseException:
            self.kv_pool.keep(kv_cache)
            raise
        self._remove_waiting(waiting)
        with self._work:
            self.queue_pace.begins(waiting.request.number)
        if not waiting.has_run:
            waiting.recorder.starts()
            stats = waiting.request.stats
            stats.cached_tokens, stats.prefill_tokens = kv_cache.length, running.missing
            self.totals.prompt_tokens += len(tokens)
            self.totals.cached_tokens += kv_cache.length
        return running

    def _remove_waiting(self, waiting: Waiting) -> None:
        with self._work:
            self._waiting.remove(waiting)

    def _is_worth_waiting(self, tokens: list[int]) -> bool:
        """Whether a prompt that is being computed begins alike, further than anybody has got yet."""
        for running in self._running:
            if not running.is_decoding:
                shared = shared_prefix(running.request.tokens, tokens)
                if min(shared, len(tokens) - 1) >= running.kv_cache.length + WORTH_WAITING:
                    return True
        return False

    def _make_room(self) -> None:
        """Room for a token more of each that decodes; the youngest gives way if there is none."""
        for running in list(self._running):
            while running in self._running and not self.kv_pool.grow(
                running.kv_cache, len(running.request.tokens)
            ):
                youngest = self._running[-1]
                if self._lane is not None and youngest in self._lane.members:
                    self._give_lane_up()
                self._preempt(youngest)

    def _preempt(self, running: Running) -> None:
        """It begins again later: its tokens stay, their keys and values go."""
        self._running.remove(running)
        self.kv_pool.release(running.kv_cache)
        self.totals.preempted += 1
        with self._work:
            self._waiting.appendleft(Waiting(running.request, running.recorder, has_run=True))

    def _end(self, running: Running, reason: str, error: Exception | None = None) -> None:
        self._leave_early(running.request, lambda: self._leave(running), reason, error)

    def _refuse(self, waiting: Waiting, reason: str, error: Exception | None = None) -> None:
        """End one that does not run."""
        self._note_end(waiting.request)  # it may have run before
        self._leave_early(waiting.request, waiting.recorder.finish, reason, error)

    def _leave_early(
        self, request: GenerationRequest, leave: Callable[[], None], reason: str, error: Exception | None
    ) -> None:
        piece = request.end(reason, error)
        if error is None:
            self.totals.cancelled += 1
        else:
            self.totals.failed += 1
        leave()
        request.deliver(piece)

    def _leave(self, running: Running) -> None:
        """Its figures are whole before its last piece goes out."""
        self._running.remove(running)
        self._note_end(running.request)
        try:
            if self._lane is None or not self._lane.leaves(running):
                self.kv_pool.keep(running.kv_cache)
            running.recorder.finish()
        except Exception:  # its answer is there all the same
            logger.exception("a request's end failed")

    def _note_end(self, request: GenerationRequest) -> None:
        with self._work:
            self.queue_pace.ends(request.number)

    # Computing

    def _compute(self) -> None:
        self._make_room()
        lane = self._lane if self.decoder.observer is None else None  # who watches, sees pass after pass
        in_lane = lane.members if lane is not None else []
        decoding = [r for r in self._running if r.is_decoding]
        prompts = [r for r in self._running if not r.is_decoding and r not in in_lane]
        if not decoding:
            self._chunk_pace = ChunkPace()
            if lane is not None and in_lane:
                self._finish_lane(lane)
            elif prompts:
                self._forward(self._next_chunk(prompts))
            return
        together = decoding + self._short(prompts, MOST_STEP_TOKENS - len(decoding))
        prompts = [r for r in prompts if r not in together]
        if lane is None:
            if prompts and self._chunk_pace.is_due:
                seconds = self._timed(self._next_chunk(prompts))
                self._chunk_pace.chunk_ran(seconds, len(decoding), len(prompts))
            self._chunk_pace.step_ran(self._timed(_pending(together)))
            return
        if prompts and not in_lane:
            lane.begin(next_tokens(prompts, PREFILL_CHUNK))
        if lane.members:
            lane.run_beside(len(decoding), lambda: self._timed(_pending(together)))
            if lane.is_done:
                self._end_lane()
        else:
            lane.note_step(len(decoding), self._timed(_pending(together)))

    def _short(self, prompts: Sequence[Running], room: int) -> list[Running]:
        """Prompts so short that they run among the tokens that decode, `room` tokens in all."""
        longest, chosen = SHORT_PROMPT if self.decoder.runs_prompts_together else 1, []
        for running in prompts:
            if running.missing <= min(longest, room):
                room -= running.missing
                chosen.append(running)
        return chosen

    def _next_chunk(self, prompts: list[Running]) -> list[tuple[Running, list[int]]]:
        """Of several prompts if the decoder can; or else of the oldest and of the shortest in turn."""
        if not self.decoder.runs_prompts_together:
            self._oldest_is_next = not self._oldest_is_next
            prompts = [prompts[0] if self._oldest_is_next else min(prompts, key=lambda r: r.missing)]
        return next_tokens(prompts, PREFILL_CHUNK)

    def _timed(self, work: list[tuple[Running, list[int]]]) -> float:
        """`_forward` for those that are still there -> seconds."""
        begin = time.perf_counter()
        self._forward([(running, tokens) for running, tokens in work if running in self._running])
        return time.perf_counter() - begin

    def _forward(self, work: list[tuple[Running, list[int]]]) -> None:
        """Run the next tokens of some; whose are then all in the KV cache get a token more."""
        if not work:
            return
        for running, _ in work:
            running.recorder.step_begins()
        try:
            batch = [Stretch(running.kv_cache, tokens) for running, tokens in work]
            many = sum(len(tokens) for _, tokens in work) > MOST_STEP_TOKENS
            logits = self._decoder(many).forward_batch(batch, _check_of([running for running, _ in work]))
        except _AllCancelled:
            self._end_cancelled()
            return
        except Exception as error:
            if not isinstance(error, (FlashMoEError, StorageError)):
                logger.exception("a step failed")
            for running, _ in work:
                self._end(running, "error", error)
            return
        for (running, _), row in zip(work, logits, strict=True):
            if running.missing == 0:
                self._take(running, row)

    def _decoder(self, many: bool) -> BatchDecoder:
        """The background's has the workspace for many tokens; here it never runs beside."""
        lane = self._lane
        if many and lane is not None and not lane.is_active and self.decoder.observer is None:
            return lane.background.decoder
        return self.decoder

    def _take(self, running: Running, logits: Tensor) -> None:
        request = running.request
        if request.is_cancelled:
            return
        try:
            piece = request.take(logits, running.recorder.token)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # of this request alone; a panic of a library is no Exception
            self._end(running, "error", _as_exception(error))
            return
        self.totals.generated_tokens += 1
        if request.is_finished:
            self._leave(running)
            self.totals.finished += 1
        request.deliver(piece)

    def _finish_lane(self, lane: PromptLane) -> None:
        """Nobody decodes any more."""
        try:
            lane.run_alone(_check_of(lane.members))
        except _AllCancelled:
            self._end_cancelled()
            return
        if lane.is_done:
            self._end_lane()

    def _end_lane(self) -> None:
        """The chunk is through, or failed."""
        members, logits, error = self._give_lane_up()
        for i, running in enumerate(members):
            if running not in self._running:  # cancelled meanwhile
                continue
            if error is not None:
                self._end(running, "error", error)
            elif logits is not None and running.missing == 0:
                self._take(running, logits[i])

    def _give_lane_up(self) -> tuple[list[Running], Tensor | None, Exception | None]:
        """What is not in the KV caches yet is run again."""
        if self._lane is None:
            return [], None, None
        members, logits, error, free = self._lane.end()
        for kv_cache in free:
            self.kv_pool.keep(kv_cache)
        return members, logits, error


def _check_of(members: Sequence[Running]) -> Callable[[], None]:
    """What a forward pass calls before each layer: it stops when nobody wants it any more."""

    def check() -> None:
        if all([running.request.poll() for running in members]):
            raise _AllCancelled

    return check


def _as_exception(error: BaseException) -> Exception:
    if isinstance(error, Exception):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def _pending(members: Sequence[Running]) -> list[tuple[Running, list[int]]]:
    return [(running, running.pending) for running in members]
