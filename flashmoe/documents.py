"""Texts and conversations out of a file, and their order: every data set in turn."""

import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flashmoe.errors import ConfigError

LIMIT_BYTES = 256 << 20
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Document:
    """A text to run through (`turns` is empty), or the user's turns of a conversation."""

    dataset: str
    text: str = ""
    turns: tuple[str, ...] = ()


def read_documents(path: Path) -> list[Document]:
    """Of a .jsonl each line: {"text"} or {"turns"} or {"prompt"}, with "domain", "category" or "dataset" to
    say what it belongs to; of any other file all of it, as one text. ConfigError says what cannot be used.
    """
    try:
        size = path.stat().st_size
        if size > LIMIT_BYTES:
            raise ConfigError(f"{path} has {size} bytes; a text may have {LIMIT_BYTES}")
        content = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read text from {path}: {error}") from error
    if path.suffix != ".jsonl":
        documents = [Document(path.stem, content)]
    else:
        documents = [
            _of_line(line, path.stem, f"{path}, line {number}")
            for number, line in enumerate(content.split("\n"), 1)
            if line.strip()
        ]
    if not any(document.turns or document.text.strip() for document in documents):
        raise ConfigError(f"{path} holds no text")
    return documents


def in_turn(documents: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """(data set, …) pairs so that the data sets alternate while they last."""
    waiting: dict[str, deque[T]] = {}
    for dataset, item in documents:
        waiting.setdefault(dataset, deque()).append(item)
    while waiting:
        for dataset in list(waiting):
            yield dataset, waiting[dataset].popleft()
            if not waiting[dataset]:
                del waiting[dataset]


def _of_line(line: str, stem: str, place: str) -> Document:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON: {error}") from error
    if isinstance(value, str):
        return Document(stem, value)
    if not isinstance(value, dict):
        raise ConfigError(f"{place} is neither a text nor an object")
    names = (value[key] for key in ("domain", "category", "dataset") if isinstance(value.get(key), str))
    dataset = next(names, stem)
    if isinstance(value.get("text"), str):
        return Document(dataset, value["text"])
    turns = value.get("turns", [value["prompt"]] if "prompt" in value else None)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise ConfigError(f'{place} has no "text", and no "turns" or "prompt" for the model to answer')
    return Document(dataset, turns=tuple(turns))
