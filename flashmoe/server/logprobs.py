"""Log probabilities in the two shapes of OpenAI's API."""

from collections.abc import Iterable
from typing import Any

from flashmoe.generation import TokenLogprob
from flashmoe.tokenizer import Tokenizer


def chat_entry(tokenizer: Tokenizer, logprob: TokenLogprob) -> dict[str, Any]:
    """One element of choices[].logprobs.content."""
    tops = [_entry(tokenizer, id, value) for id, value in logprob.top]
    return {**_entry(tokenizer, logprob.token_id, logprob.logprob), "top_logprobs": tops}


def completion_logprobs(
    tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob], offset: int
) -> dict[str, list[Any]]:
    """choices[].logprobs; `offset`: characters of text before these tokens."""
    shape: dict[str, list[Any]] = {
        "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
    }  # fmt: skip
    for logprob in logprobs:
        text = tokenizer.token_text(logprob.token_id)
        shape["tokens"].append(text)
        shape["token_logprobs"].append(_finite(logprob.logprob))
        tops = {tokenizer.token_text(id): _finite(value) for id, value in reversed(logprob.top)}
        shape["top_logprobs"].append(tops | {text: _finite(logprob.logprob)})
        shape["text_offset"].append(offset)
        offset += len(text)
    return shape


def _entry(tokenizer: Tokenizer, id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(id)
    return {"token": tokenizer.token_text(id), "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float) -> float:
    """JSON has no infinities: OpenAI writes -9999 for what cannot be."""
    return max(logprob, -9999.0)
