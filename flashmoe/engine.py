"""Prefill and decode: token ids in, logits out, reusing the KV cache of what went before."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from flashmoe.budget import PREFILL_CHUNK
from flashmoe.decoder import Decoder
from flashmoe.errors import ContextError, ModelError
from flashmoe.kv_cache import shared_prefix

if TYPE_CHECKING:
    from flashmoe.gpu_decoder import GpuDecoder


class Engine:
    """One sequence, the decoder's own."""

    def __init__(self, decoder: "Decoder | GpuDecoder") -> None:
        self.decoder = decoder

    @property
    def tokens(self) -> list[int]:
        """The ids whose keys and values are in the KV cache."""
        return self.decoder.kv_cache.tokens

    @property
    def context(self) -> int:
        return self.decoder.kv_cache.context

    @property
    def vocab_size(self) -> int:
        return self.decoder.config.vocab_size

    @property
    def is_full(self) -> bool:
        """No further token fits in the context."""
        return len(self.tokens) >= self.context

    def reuse(self, prompt: Sequence[int]) -> int:
        """Keep what the KV cache shares with `prompt`, at most all but its last token; returns how many
        tokens. Raises what `check_prompt` raises."""
        check_prompt(prompt, self.vocab_size, self.context)
        shared = min(shared_prefix(self.tokens, list(prompt)), len(prompt) - 1)
        self.decoder.kv_cache.truncate(shared)
        return shared

    def prefill(self, new_tokens: Sequence[int], check: Callable[[], None] | None = None) -> Tensor:
        """Run `new_tokens` behind the KV cache in chunks -> logits [V] of the last one.

        `check` is called before every layer and may raise to stop; finished chunks stay in the KV cache.
        """
        for begin in range(0, len(new_tokens), PREFILL_CHUNK):
            chunk = new_tokens[begin : begin + PREFILL_CHUNK]
            logits = self.decoder.forward(chunk, check=check)
        return logits

    def decode_one_token(self, token_id: int, check: Callable[[], None] | None = None) -> Tensor:
        """Run the token sampled last -> logits [V] of the next one. ContextError when the context is full."""
        if self.is_full:
            raise ContextError(f"the context of {self.context} tokens is full; start afresh with /reset")
        return self.decoder.forward([token_id], check=check)

    def reset(self) -> None:
        """Forget the sequence; resident experts stay."""
        self.settle()
        self.decoder.kv_cache.truncate(0)

    def settle(self) -> None:
        """Have counters know of all that has run."""
        self.decoder.settle()


def check_prompt(prompt: Sequence[int], vocab_size: int, context: int) -> None:
    """Raises ContextError for an empty prompt or one longer than the context, ModelError for an id that the
    model does not know."""
    if not prompt:
        raise ContextError("the prompt has no tokens; give at least one word")
    unknown = max(prompt) if max(prompt) >= vocab_size else min(prompt)
    if not 0 <= unknown < vocab_size:
        raise ModelError(
            f"the tokenizer made id {unknown}; the model knows {vocab_size}: they do not belong together"
        )
    if len(prompt) > context:
        raise ContextError(
            f"the prompt has {len(prompt)} tokens, the context holds {context};"
            " shorten it, start afresh with /reset, or give a larger --context"
        )
