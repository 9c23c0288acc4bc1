"""Answer many prompts at once: the stage of a batch job, such as Ray Data's `map_batches`.

Nothing here imports Ray: a batch is a dict of columns, as any such library hands it over.
"""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.api import LLM
from flashmoe.errors import ConfigError, FlashMoEError, QueueFullError
from flashmoe.generation import Piece
from flashmoe.sampler import SamplingParams
from flashmoe.stats import GenerationStats
from storage.storage_errors import StorageError

Column = NDArray[Any]


class FlashMoEBatch:
    """Opens a model once and answers a batch a call: `ds.map_batches(FlashMoEBatch, …)`.

    A row of `column` is a question, or a conversation: a list of {"role", "content"}. Three columns follow:
    `output`, `output`_finish_reason, and `output`_error, which says why a row has no answer (a prompt longer
    than the context, say); such a row does not end the job.
    """

    def __init__(
        self, model: str | None = None, *, ram_budget: str = "auto", column: str = "prompt",
        output: str = "answer", system: str | None = None, sampling: Mapping[str, Any] | None = None,
        **llm_options: Any,
    ) -> None:  # fmt: skip
        """`sampling` as in `SamplingParams`, `llm_options` as in `LLM`. Raises what `LLM` raises."""
        self.llm = LLM(model, ram_budget=ram_budget, **llm_options)
        self._column, self._output, self._system = column, output, system
        self._params = self.llm.sampling_params(dict(sampling or {}))
        self.llm.scheduler.start()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with its answers. Raises ConfigError for a batch without the column."""
        if self._column not in batch:
            raise ConfigError(
                f"a batch has the columns {', '.join(batch)}, none is {self._column!r}; name it by `column`"
            )
        answers = self._answer([self._messages(row) for row in batch[self._column]])
        name = self._output
        columns = {
            name: [answer.text for answer in answers],
            f"{name}_finish_reason": [answer.finish_reason for answer in answers],
            f"{name}_error": [answer.error for answer in answers],
        }
        return {**batch, **{key: np.array(values, object) for key, values in columns.items()}}

    def close(self) -> None:
        """Free the model's memory; the end of the process does it too."""
        self.llm.scheduler.stop()
        self.llm.close()

    def _messages(self, row: Any) -> list[dict[str, Any]]:
        """A conversation; columns of Arrow or numpy hold theirs as arrays of dicts."""
        begin = [] if self._system is None else [{"role": "system", "content": self._system}]
        if isinstance(row, str):
            return [*begin, {"role": "user", "content": row}]
        if isinstance(row, Sequence | np.ndarray) and all(isinstance(message, Mapping) for message in row):
            return [*begin, *map(dict, row)]
        raise ConfigError(f"column {self._column!r} holds {type(row).__name__}, neither text nor messages")

    def _answer(self, conversations: Sequence[list[dict[str, Any]]]) -> list["_Answer"]:
        """All that the scheduler takes at once; the next ones as others end."""
        answers = [_Answer(self.llm, messages, self._params) for messages in conversations]
        running: deque[_Answer] = deque()
        for answer in answers:
            while not answer.submit():
                if not running:
                    raise FlashMoEError("the scheduler takes no request at all; is another user filling it?")
                running.popleft().ended.wait()
            running.append(answer)
        for answer in running:
            answer.ended.wait()
        return answers


class _Answer:
    """One row's."""

    def __init__(self, llm: LLM, messages: list[dict[str, Any]], params: SamplingParams) -> None:
        self._llm, self._messages, self._params = llm, messages, params
        self._pieces: list[str] = []
        self.finish_reason, self.error = "", ""
        self.ended = threading.Event()

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def submit(self) -> bool:
        """False if too many wait. What is wrong with the row becomes its error."""
        try:
            ids = self._llm.encode(self._messages)
            self._llm.scheduler.submit(ids, self._params, self._take, GenerationStats())
        except QueueFullError:
            return False
        except (FlashMoEError, StorageError) as error:
            self._end("error", str(error))
        return True

    def _take(self, piece: Piece) -> None:
        self._pieces.append(piece.text)
        if piece.finish_reason is not None:
            self._end(piece.finish_reason, "" if piece.error is None else str(piece.error))

    def _end(self, reason: str, error: str) -> None:
        self.finish_reason, self.error = reason, error
        self.ended.set()
