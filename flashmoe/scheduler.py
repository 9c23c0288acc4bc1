"""Which requests run, and in what order: a bounded queue in front of one engine.

`submit` and `cancel` may come from any thread; `step` computes, in whichever thread calls it, one at a time.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence

from flashmoe.engine import Engine
from flashmoe.errors import FlashMoEError, QueueFullError
from flashmoe.generation import Constraint, GenerationRequest, Piece
from flashmoe.recorder import Recorder
from flashmoe.sampler import SamplingParams
from flashmoe.stats import GenerationStats
from flashmoe.tokenizer import Tokenizer
from storage.storage_errors import StorageError

DEFAULT_QUEUE = 256


class Scheduler:
    """Runs generation requests."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, recorder: Callable[[GenerationStats], Recorder],
        most_waiting: int = DEFAULT_QUEUE,
    ) -> None:  # fmt: skip
        self.engine, self.tokenizer, self.most_waiting = engine, tokenizer, most_waiting
        self.after_step: Callable[[], None] | None = None  # called in the computing thread
        self._recorder = recorder
        self._lock, self._work = threading.Lock(), threading.Condition()
        self._waiting: deque[GenerationRequest] = deque()
        self._running: list[GenerationRequest] = []
        self._recorders: dict[GenerationRequest, Recorder] = {}
        self._submitted = 0
        self._thread: threading.Thread | None = None
        self._stopping = False

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, sink: Callable[[Piece], None],
        stats: GenerationStats | None = None, constraint: Constraint | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> GenerationRequest:  # fmt: skip
        """Queue a generation behind token ids.

        Raises ContextError for a prompt that is empty or too long, ModelError for an id that the model does
        not know, QueueFullError when too many wait already.
        """
        self.engine.check_prompt(prompt)
        with self._work:
            if len(self._waiting) >= self.most_waiting:
                raise QueueFullError(
                    f"{len(self._waiting)} requests wait already; try again later", retry_after_s=5.0
                )
            self._submitted += 1
            request = GenerationRequest(
                self._submitted, prompt, params, self.tokenizer, self.engine.vocab_size, self.engine.context,
                sink, stats or GenerationStats(), constraint, cancelled,
            )  # fmt: skip
            self._recorders[request] = self._recorder(request.stats)
            self._waiting.append(request)
            self._work.notify_all()
        return request

    def step(self) -> bool:
        """Compute once for those that run; False if there was nothing to do."""
        with self._lock:
            return self._step()

    def start(self) -> None:
        """Compute in a thread of its own from now on."""
        assert self._thread is None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def stop(self, drain_s: float = 0.0) -> None:
        """End the thread, giving what runs and waits so many seconds to finish; the rest is cancelled."""

    def _run(self) -> None:
        while not self._stopping:
            with self._work:
                while not self._waiting and not self._running and not self._stopping:
                    self._work.wait()
            self.step()

    def _step(self) -> bool:
        if not self._running:
            if not self._waiting:
                return False
            self._running.append(self._waiting.popleft())
        request = self._running[0]
        recorder = self._recorders[request]
        try:
            if request.is_cancelled:
                request.end("cancelled")
            else:
                recorder.step_begins()
                cached = self.engine.reuse(request.tokens)
                if not request.generated:
                    request.stats.cached_tokens = cached
                    request.stats.prefill_tokens = len(request.tokens) - cached
                logits = self.engine.prefill(request.tokens[cached:])
                request.take(logits, recorder.token)
        except (FlashMoEError, StorageError) as error:
            request.end("error", error)
        if request.is_finished:
            self._recorders.pop(request).finish()
            self._running.clear()
        if self.after_step is not None:
            self.after_step()
        return True
