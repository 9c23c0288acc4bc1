"""A conversation with a model: messages, and the ids that the model saw and wrote."""

import json
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.generation import Generation, Piece
from flashmoe.sampler import SamplingParams
from flashmoe.stats import GenerationStats

if TYPE_CHECKING:
    from flashmoe.api import LLM


class Chat:
    """A conversation. Later turns prefill only what is new."""

    def __init__(self, llm: "LLM", system: str | None, sampling: dict[str, Any]) -> None:
        self.llm = llm
        self.stats = GenerationStats()
        self._system, self._sampling = system, dict(sampling)
        llm.sampling_params(self._sampling)  # a bad option is an error now, not at the first turn
        self.reset()

    @property
    def system(self) -> str | None:
        """The system prompt; setting it starts the conversation afresh."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        self._system = text
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, keep the system prompt and the resident experts."""
        self.messages: list[dict[str, str]] = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})
        self._text, self._ids = "", []  # type: str, list[int]  # the conversation as the model saw and wrote it

    def stream(
        self, message: str, *, cancel: Callable[[], bool] | None = None, **sampling: Any
    ) -> Generator[Piece, None, None]:
        """Answer one message piece by piece. An answer cut short is kept as far as it came.

        Raises ContextError when the conversation no longer fits; `reset` helps then.
        """
        turn = self._begin(message, sampling)
        try:
            yield from self.llm.stream_tokens(turn.prompt, turn.params, self.stats, cancel)
        finally:
            self._keep(turn)

    async def astream(self, message: str, **sampling: Any) -> AsyncGenerator[Piece, None]:
        """As `stream`, for asyncio; several chats may go on together."""
        turn = self._begin(message, sampling)
        try:
            async with aclosing(self.llm.astream_tokens(turn.prompt, turn.params, self.stats)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            self._keep(turn)

    def send(self, message: str, **sampling: Any) -> Generation:
        """Answer one message to its end."""
        for _ in self.stream(message, **sampling):
            pass
        return Generation.of(self.stats)

    async def asend(self, message: str, **sampling: Any) -> Generation:
        """As `send`, for asyncio."""
        async for _ in self.astream(message, **sampling):
            pass
        return Generation.of(self.stats)

    def _begin(self, message: str, sampling: dict[str, Any]) -> "_Turn":
        self.stats = GenerationStats()
        params = self.llm.sampling_params({**self._sampling, **sampling})
        user = {"role": "user", "content": message}
        text = self.llm.tokenizer.apply_chat_template([*self.messages, user])
        return _Turn(user, text, self._encode(text), params, self.stats)

    def _keep(self, turn: "_Turn") -> None:
        ids = list(turn.stats.token_ids)
        if ids:
            self.messages += [turn.user, {"role": "assistant", "content": turn.stats.text}]
            self._ids = turn.prompt + ids
            self._text = turn.text + self.llm.tokenizer.decode(ids, skip_special_tokens=False)

    def save(self, path: Path) -> None:
        """Write the conversation as JSON: {"messages": [{"role", "content"}, …]}."""
        path.write_text(json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1) + "\n", "utf-8")

    def _encode(self, prompt_text: str) -> list[int]:
        """Token ids of the conversation. What the model wrote keeps the ids it chose, which encoding its text
        anew need not give back: otherwise the KV cache of the last answer would be lost."""
        if self._text and prompt_text.startswith(self._text):
            return self._ids + self.llm.tokenizer.encode(prompt_text[len(self._text) :])
        return self.llm.encode_chat(prompt_text)


@dataclass(frozen=True, slots=True)
class _Turn:
    """A message, and what the model sees of the conversation with it."""

    user: dict[str, str]
    text: str
    prompt: list[int]
    params: SamplingParams
    stats: GenerationStats
