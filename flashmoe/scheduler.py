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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from flashmoe.background_prefill import BackgroundPrefill
from flashmoe.budget import MOST_STEP_TOKENS, PREFILL_CHUNK
from flashmoe.decoder import RoutingObserver, Stretch
from flashmoe.errors import ContextError, FlashMoEError, ModelError, QueueFullError
from flashmoe.generation import Constraint, GenerationRequest, Piece
from flashmoe.kv_cache import KVPool, OneSequence, shared_prefix
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
RETRY_AFTER_S = 2.0
# A step may take so much longer with a prompt in the background, and a prompt always gets so much of it.
STRETCH, LEAST_SLICE = 1.3, 0.05
NEWEST = 0.2  # weight of the newest step in the running mean of how long one takes
FINISHING_S = 0.5  # how long to work on a prompt, nobody decoding, before others are looked at

logger = logging.getLogger(__name__)


class BatchDecoder(Protocol):
    """What computes: flashmoe/decoder.py."""

    observer: RoutingObserver | None

    def forward_batch(
        self, batch: Sequence[Stretch], check: Callable[[], None] | None = None
    ) -> Tensor:
        """New tokens of B sequences -> logits [B, V]."""


@dataclass(slots=True)
class Totals:
    """What a scheduler has done so far."""

    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preempted: int = 0  # requests that gave their KV cache up for others, and ran again


class _AllCancelled(Exception):
    """Nobody wants what a step computes."""


@dataclass(eq=False, slots=True)
class _Running:
    request: GenerationRequest
    recorder: Recorder
    kv_cache: Any  # what the pool gave

    @property
    def pending(self) -> list[int]:
        """Tokens that are not in the KV cache yet."""
        return self.request.tokens[self.kv_cache.length :]

    @property
    def is_decoding(self) -> bool:
        missing: int = len(self.request.tokens) - self.kv_cache.length
        return missing == 1 and self.request.generated > 0


class Scheduler:
    """Runs generation requests, at most `most_running` together."""

    def __init__(
        self, decoder: BatchDecoder, kv_pool: KVPool | OneSequence, tokenizer: Tokenizer,
        recorder: Callable[[GenerationStats], Recorder], most_running: int,
        most_waiting: int = DEFAULT_QUEUE,
    ) -> None:  # fmt: skip
        self.decoder, self.kv_pool, self.tokenizer = decoder, kv_pool, tokenizer
        self.most_running, self.most_waiting = most_running, most_waiting
        self.after_step: Callable[[], None] | None = None  # called in the computing thread
        self.background: BackgroundPrefill | None = None  # runs prompts while others decode, if it can
        self.totals = Totals()
        self.step_began_s = 0.0  # perf_counter, of the last step
        self._recorder = recorder
        self._lock = threading.RLock()  # of whoever computes
        self._work = threading.Condition()  # guards what is waiting; notified when there is more, or a step
        self._waiting: deque[_Waiting] = deque()
        self._running: list[_Running] = []
        self._in_background: list[_Running] = []  # whose tokens are in the chunk that runs there
        self._left_behind: list[Any] = []  # KV caches of requests that are gone, which the chunk still uses
        self._pace = _Pace()
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

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raises ContextError for an empty prompt or one longer than the context, ModelError for an id that
        the model does not know."""
        vocab_size, context = self.kv_pool.config.vocab_size, self.kv_pool.context
        if not prompt:
            raise ContextError("the prompt has no tokens; give at least one word")
        if max(prompt) >= vocab_size:
            raise ModelError(
                f"the tokenizer made id {max(prompt)}; the model knows {vocab_size}:"
                " they do not belong together"
            )
        if len(prompt) > context:
            raise ContextError(
                f"the prompt has {len(prompt)} tokens, the context holds {context};"
                " shorten it, start afresh with /reset, or give a larger --context"
            )

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, sink: Callable[[Piece], None],
        stats: GenerationStats | None = None, constraint: Constraint | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> GenerationRequest:  # fmt: skip
        """Queue a generation behind token ids.

        Raises what `check_prompt` raises, and QueueFullError when too many wait already.
        """
        self.check_prompt(prompt)
        with self._work:
            if self._stopping:
                raise QueueFullError("no new requests: it is shutting down", RETRY_AFTER_S)
            if len(self._waiting) >= self.most_waiting:
                raise QueueFullError(
                    f"{len(self._waiting)} requests wait already, which is the limit; try again later",
                    RETRY_AFTER_S,
                )
            self._submitted += 1
            request = GenerationRequest(
                self._submitted, prompt, params, self.tokenizer, self.kv_pool.config.vocab_size,
                self.kv_pool.context, sink, GenerationStats() if stats is None else stats, constraint,
                cancelled,
            )  # fmt: skip
            self._waiting.append(_Waiting(request, self._recorder(request.stats)))
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
            self.step_began_s = time.perf_counter()
            try:
                self._end_cancelled()
                self._admit()
                self._compute()
            finally:
                if self.after_step is not None:
                    self.after_step()
                with self._work:
                    self._work.notify_all()
            return True

    def retire(self, request: GenerationRequest) -> None:
        """Cancel a request and, unless a thread computes, see to it at once."""
        request.cancel()
        if not self.has_thread:
            with self._lock:
                self._end_cancelled()

    def start(self) -> None:
        """Compute in a thread of its own from now on."""
        assert self._thread is None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def stop(self, drain_s: float = 0.0) -> None:
        """Take no more requests and end the thread, giving what runs and waits so many seconds to finish; the
        rest is cancelled."""
        deadline = time.monotonic() + drain_s
        with self._work:
            self._stopping = True
            self._work.notify_all()
            while self._thread is not None and (self._running or self._waiting):
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

    def _run(self) -> None:
        while self._thread is threading.current_thread():
            try:
                if not self.step() and not self._save_one():
                    with self._work:
                        if self._thread is threading.current_thread() and not self._waiting:
                            self._work.wait(timeout=1.0)
            except Exception as error:  # a bug of ours: those who ran get to know, the others go on
                logger.exception("a step failed")
                self._end_all_running(error)

    def _end_all_running(self, error: Exception) -> None:
        """Or, if nobody runs, the first that waits: what failed was to let it begin."""
        with self._lock:
            self._give_background_up()
            if not self._running and self._waiting:
                with self._work:
                    first = self._waiting.popleft()
                self.totals.failed += 1
                piece = first.request.end("error", error)
                first.recorder.finish()
                first.request.deliver(piece)
            for running in list(self._running):
                self._end(running, "error", error)

    def _save_one(self) -> bool:
        """Nothing else is to be done: a conversation that is not on disk yet goes there."""
        with self._lock:
            return not self._waiting and self.kv_pool.save_one()

    def _cancel_all(self) -> None:
        with self._work:
            for request in [w.request for w in self._waiting] + [r.request for r in self._running]:
                request.cancel()

    def _end_cancelled(self) -> None:
        for running in [r for r in self._running if r.request.is_cancelled]:
            self._end(running, "cancelled")
        if self._in_background and not any(r in self._running for r in self._in_background):
            self._give_background_up()
        with self._work:
            gone = [w for w in self._waiting if w.request.is_cancelled]
            self._waiting = deque(w for w in self._waiting if not w.request.is_cancelled)
        for waiting in gone:
            self.totals.cancelled += 1
            piece = waiting.request.end("cancelled")
            waiting.recorder.finish()
            waiting.request.deliver(piece)

    def _admit(self) -> None:
        """Let those that wait begin, in their order, as far as there is room."""
        while self._waiting and len(self._running) < self.most_running:
            waiting = self._waiting[0]
            tokens = waiting.request.tokens
            if self._is_worth_waiting(tokens):
                return
            kv_cache: Any = self.kv_pool.take(tokens)
            if not self.kv_pool.grow(kv_cache, len(tokens) + 1):
                self.kv_pool.keep(kv_cache)
                assert self._running, "one request always has room"
                return
            with self._work:
                self._waiting.popleft()
            request = waiting.request
            if not waiting.has_run:
                request.stats.cached_tokens = kv_cache.length
                request.stats.prefill_tokens = len(tokens) - kv_cache.length
                self.totals.prompt_tokens += len(tokens)
                self.totals.cached_tokens += kv_cache.length
                waiting.recorder.starts()
            self._running.append(_Running(request, waiting.recorder, kv_cache))

    def _is_worth_waiting(self, tokens: list[int]) -> bool:
        """Whether a prompt that is being computed begins alike, further than anybody has got yet."""
        for running in self._running:
            if not running.is_decoding:
                shared = shared_prefix(running.request.tokens, tokens)
                if min(shared, len(tokens) - 1) >= running.kv_cache.length + WORTH_WAITING:
                    return True
        return False

    def _compute(self) -> None:
        self._make_room()
        if self.background is not None and not self.background.is_active:
            self._in_background = []
        decoding = [r for r in self._running if r.is_decoding]
        prefilling = [r for r in self._running if not r.is_decoding and r not in self._in_background]
        if not decoding:
            if self._in_background:
                self._finish_background()
            else:
                self._forward(_first_tokens(prefilling, PREFILL_CHUNK))
            return
        short = self._short_prompts(prefilling, MOST_STEP_TOKENS - len(decoding))
        prompts = [r for r in prefilling if r not in short]
        if prompts and not self._in_background:
            background = self._usable_background()
            if background is None:
                self._forward(_first_tokens(prompts, PREFILL_CHUNK))
            else:
                self._begin_in_background(background, prompts)
        if self._in_background:
            self._forward_beside_background(decoding + short)
        else:
            self._pace.alone(len(decoding), self._timed(decoding + short))

    def _timed(self, running: list[_Running]) -> float:
        """Run what is pending of each -> seconds."""
        begin = time.perf_counter()
        self._forward([(r, r.pending) for r in running])
        return time.perf_counter() - begin

    def _usable_background(self) -> BackgroundPrefill | None:
        """None while somebody watches the routing, which takes one forward pass after the other."""
        return None if self.decoder.observer is not None else self.background

    def _begin_in_background(self, background: BackgroundPrefill, prompts: list[_Running]) -> None:
        work = _first_tokens(prompts, PREFILL_CHUNK)
        background.begin([Stretch(running.kv_cache, tokens) for running, tokens in work])
        self._in_background = [running for running, _ in work]
        for running in self._in_background:
            running.recorder.step_begins()

    def _forward_beside_background(self, running: list[_Running]) -> None:
        """A step, with pieces of the chunk while it waits for the drive and in a slice behind it."""
        background = self.background
        assert background is not None
        with background.in_waits():
            seconds = self._timed(running)
        background.run_for(self._pace.slice_s(len(running), seconds))
        if background.is_done:
            self._end_background()

    def _finish_background(self) -> None:
        """Nobody decodes any more."""
        assert self.background is not None
        self.background.hurry()

        def check() -> None:
            if all([running.request.poll() for running in self._in_background]):
                raise _AllCancelled

        try:
            self.background.run_for(FINISHING_S, check)
        except _AllCancelled:
            self._give_background_up()
            self._end_cancelled()
            return
        if self.background.is_done:
            self._end_background()

    def _end_background(self) -> None:
        """The chunk is through, or failed."""
        background, finished = self.background, self._in_background
        assert background is not None
        logits, error = background.result, background.error
        self._give_background_up()
        for i, running in enumerate(finished):
            if running not in self._running:  # cancelled meanwhile
                continue
            if error is not None:
                self._end(running, "error", error)
            elif logits is not None and running.kv_cache.length == len(running.request.tokens):
                self._take(running, logits[i])

    def _give_background_up(self) -> None:
        """Its requests begin their chunk again, if it is not through."""
        if self.background is not None:
            self.background.end()
        self._in_background = []
        for kv_cache in self._left_behind:
            self.kv_pool.keep(kv_cache)
        self._left_behind.clear()

    def _short_prompts(self, prefilling: list[_Running], room: int) -> list[_Running]:
        chosen = []
        for running in prefilling:
            tokens = len(running.pending)
            if tokens <= min(SHORT_PROMPT, room):
                room -= tokens
                chosen.append(running)
        return chosen

    def _make_room(self) -> None:
        """Room for a token more of each that decodes; the youngest gives way if there is none."""
        for running in list(self._running):
            while running in self._running and not self.kv_pool.grow(
                running.kv_cache, len(running.request.tokens)
            ):
                others = [r for r in self._running if r not in self._in_background]
                if others:
                    self._preempt(others[-1])
                else:
                    self._give_background_up()

    def _preempt(self, running: _Running) -> None:
        """It begins again later: its tokens stay, their keys and values go."""
        self._running.remove(running)
        self.kv_pool.release(running.kv_cache)
        self.totals.preempted += 1
        with self._work:
            self._waiting.appendleft(_Waiting(running.request, running.recorder, has_run=True))

    def _forward(self, work: list[tuple[_Running, list[int]]]) -> None:
        """Run the next tokens of some; whose are then all in the KV cache get a token more."""

        def check() -> None:
            if all([running.request.poll() for running, _ in work]):
                raise _AllCancelled

        for running, _ in work:
            running.recorder.step_begins()
        try:
            batch = [Stretch(running.kv_cache, tokens) for running, tokens in work]
            many = sum(len(tokens) for _, tokens in work) > MOST_STEP_TOKENS
            background = self._usable_background() if many else None
            decoder = self.decoder if background is None else background.decoder
            logits = decoder.forward_batch(batch, check)
        except _AllCancelled:
            self._end_cancelled()
            return
        except (FlashMoEError, StorageError) as error:
            for running, _ in work:
                self._end(running, "error", error)
            return
        for (running, _), row in zip(work, logits, strict=True):
            if running.kv_cache.length == len(running.request.tokens):
                self._take(running, row)

    def _take(self, running: _Running, logits: Tensor) -> None:
        request = running.request
        if request.is_cancelled:
            return
        try:
            piece = request.take(logits, running.recorder.token)
        except FlashMoEError as error:
            self._end(running, "error", error)
            return
        self.totals.generated_tokens += 1
        if request.is_finished:
            self._leave(running)
            self.totals.finished += 1
        request.deliver(piece)

    def _end(self, running: _Running, reason: str, error: Exception | None = None) -> None:
        piece = running.request.end(reason, error)
        self._leave(running)
        if error is None:
            self.totals.cancelled += 1
        else:
            self.totals.failed += 1
        running.request.deliver(piece)

    def _leave(self, running: _Running) -> None:
        """Its figures are whole before its last piece goes out."""
        self._running.remove(running)
        if running in self._in_background:  # a piece of work may still write to it
            self._left_behind.append(running.kv_cache)
        else:
            self.kv_pool.keep(running.kv_cache)
        running.recorder.finish()


class _Pace:
    """How long a chunk in the background may hold a step up, from the time that steps take without one."""

    def __init__(self) -> None:
        self._alone_s: dict[int, float] = {}  # by the number of requests that decode

    def alone(self, decoding: int, seconds: float) -> None:
        """A step took so long with no chunk beside it."""
        before = self._alone_s.get(decoding, seconds)
        self._alone_s[decoding] = before + NEWEST * (seconds - before)

    def slice_s(self, decoding: int, seconds: float) -> float:
        """How long the chunk may go on behind a step that took `seconds` beside it."""
        alone_s = self._alone_s.get(decoding, seconds / STRETCH)
        return max(LEAST_SLICE * alone_s, STRETCH * alone_s - seconds)


@dataclass(eq=False, slots=True)
class _Waiting:
    request: GenerationRequest
    recorder: Recorder
    has_run: bool = False


def _first_tokens(prefilling: list[_Running], most: int) -> list[tuple[_Running, list[int]]]:
    """The next tokens of prompts, in their order, `most` in all."""
    work = []
    for running in prefilling:
        tokens = running.pending[:most]
        if tokens:
            work.append((running, tokens))
            most -= len(tokens)
    return work
