"""Keys and values of conversations, in fp32, within one budget of tokens.

A sequence's memory is reserved for the whole context and takes pages only as tokens arrive, so a long context
costs nothing until it is used, and every sequence is contiguous: the strides, and so the bits of attention,
depend neither on the context nor on who else is there. `KVPool` counts what is in use, in blocks of tokens.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashmoe.config import ModelConfig
from flashmoe.session_store import Saving, SessionStore
from storage import host

BLOCK = 64  # tokens that are counted, and given back, together
SHORTEST_STORED = 64  # tokens; less is computed faster than it is worth a file
WITHOUT_LOSS = 1 / 4  # of all tokens: so many can be had at once without dropping what is not on disk
SHORTEST_SHARED = 8  # tokens; less of a beginning is not worth keeping or copying


class KVCache:
    """One sequence. `tokens` are the ids whose keys and values are valid; native code writes those of new
    ones behind them, layer by layer, then `append` is called. Layout [layers, 2, context, KV heads, d].
    """

    def __init__(self, config: ModelConfig, context: int) -> None:
        self.context = context
        self.tokens: list[int] = []
        self._layers = config.num_hidden_layers
        self._row_bytes = 4 * config.num_key_value_heads * config.head_dim
        self._mapping = host.reserve(2 * self._layers * context * self._row_bytes)
        shape = (self._layers, 2, context, config.num_key_value_heads, config.head_dim)
        self._all = torch.frombuffer(self._mapping, dtype=torch.float32).view(shape)

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def address(self) -> int:
        """Where its memory begins."""
        return self._all.data_ptr()

    def offsets(self, layer: int) -> tuple[int, int]:
        """How far from there a layer's keys and values begin, in bytes: the same in every sequence."""
        step = self.context * self._row_bytes
        return 2 * layer * step, (2 * layer + 1) * step

    def tensors(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole context, [context, G, d] each, valid or not."""
        return self._all[layer, 0], self._all[layer, 1]

    def claim(self, length: int) -> None:
        """Have memory for so many tokens: the system gives it as they come."""

    def append(self, tokens: list[int]) -> None:
        """Make more tokens valid, once every layer has them."""
        self.tokens += tokens

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        del self.tokens[length:]

    def copy_from(self, other: "KVCache", tokens: int) -> None:
        """Become the first `tokens` of another sequence of the same context."""
        self._all[:, :, :tokens].copy_(other._all[:, :, :tokens])
        self.tokens = other.tokens[:tokens]

    def give_back(self, begin: int) -> None:
        """Return the memory behind the first `begin` tokens."""
        step = self.context * self._row_bytes
        for part in range(2 * self._layers):
            first = part * step + begin * self._row_bytes
            host.give_back(self._mapping, first, (part + 1) * step - first)


def shared_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences begin with alike."""
    shortest = min(len(a), len(b))
    if a[:shortest] == b[:shortest]:
        return shortest
    low, high = 0, shortest  # the first `low` are alike, the first `high` are not
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low


@dataclass(frozen=True, slots=True)
class _Writing:
    """A sequence that a thread writes to disk: nobody may run or drop it until that has ended."""

    kv: KVCache
    saving: Saving
    thread: threading.Thread


class KVPool:
    """The memory of all sequences: those that run, and those kept because a prompt may begin like them.

    Sizes are in tokens, counted in blocks. Not thread-safe; the two sizes may be read from any thread.
    """

    def __init__(
        self, config: ModelConfig, context: int, total_tokens: int, store: SessionStore | None = None,
        new_sequence: Callable[[], Any] | None = None,
    ) -> None:  # fmt: skip
        """`total_tokens`: at least `context`. `store`: has on disk what is kept here, or was. `new_sequence`
        makes others than `KVCache`s, such as a GPU's; they have its methods."""
        assert total_tokens >= context
        self.config, self.context, self.total_tokens = config, context, total_tokens
        self.is_busy = False  # whether somebody decodes, who should not wait for a write
        self._store = store
        self._new_sequence = new_sequence or partial(KVCache, config, context)
        self._unsaved: dict[KVCache, None] = {}  # those kept that the store has not been given
        self._writing: _Writing | None = None  # beside those kept
        self._counted: dict[KVCache, int] = {}
        self._kept: dict[KVCache, None] = {}  # the least recently used first
        self._idle: list[KVCache] = []  # reserved memory without pages

    @property
    def used_tokens(self) -> int:
        """Of all sequences, in whole blocks."""
        return sum(list(self._counted.values()))

    @property
    def kept(self) -> list[KVCache]:
        """Sequences that nobody runs, the least recently used first."""
        return list(self._kept)

    def take(self, tokens: list[int]) -> KVCache:
        """A sequence for a prompt, with what any other has of its beginning: at most all but the last token.

        A kept one is taken over if nearly all of it is of use, or there is no room for a copy.
        """
        shared = {kv: min(shared_prefix(kv.tokens, tokens), len(tokens) - 1) for kv in self._counted}
        used = {kv: place for place, kv in enumerate(self._kept)}
        best = max(shared, key=lambda kv: (shared[kv], used.get(kv, -1)), default=None)
        length = 0 if best is None else shared[best]
        stored = self._from_store(tokens, length)
        if stored is not None:
            return stored
        if best is None or length < SHORTEST_SHARED:
            return self._new()
        if self._writing is not None and best is self._writing.kv and length >= best.length - BLOCK:
            self._end_write()  # to be taken over
        was_kept, copy = best in self._kept, self._new()
        try:
            return self._begin_like(best, copy, length, tokens)
        except BaseException:  # no memory for a copy, or a Ctrl-C
            if was_kept and best in self._counted:
                self._kept.setdefault(best)
            if copy in self._counted:
                self.release(copy)
            raise

    def _begin_like(self, best: KVCache, copy: KVCache, length: int, tokens: list[int]) -> KVCache:
        """The first `length` tokens of a sequence: in `copy`, or that sequence itself."""
        if best not in self._kept:
            if self.grow(copy, length):
                copy.copy_from(best, length)
            return copy
        del self._kept[best]  # not to be dropped for its own copy
        worth_keeping = length < best.length - BLOCK
        if worth_keeping and self.grow(copy, len(tokens)):
            self._kept[best] = None  # used just now
            copy.copy_from(best, length)
            return copy
        self.release(copy)
        if best in self._unsaved:
            del self._unsaved[best]
            if worth_keeping:
                self._save(best)
        self.truncate(best, length)
        return best

    def grow(self, kv: KVCache, length: int) -> bool:
        """Make room for `length` tokens, dropping kept sequences; False, and nothing is dropped, if those
        that run leave none."""
        wanted = self._in_blocks(length) - self._counted[kv]
        if wanted > self._room() + sum(self._counted[other] for other in self._kept):
            if self._writing is None:
                return False
            self._end_write()
            return self.grow(kv, length)
        while wanted > self._room():
            if self._writing is not None and next(iter(self._kept)) in self._unsaved:
                self._end_write()  # which can be dropped without a loss
            self.drop_oldest()
        if wanted > 0:
            self._counted[kv] += wanted
        kv.claim(length)  # always: a Ctrl-C may have come before it the last time
        return True

    def truncate(self, kv: KVCache, length: int) -> None:
        """Forget all but the first tokens, and count and hold no more than they need."""
        kv.truncate(length)
        surplus = self._counted[kv] - self._in_blocks(length)
        if surplus > 0:
            kv.give_back(self._in_blocks(length))
            self._counted[kv] -= surplus

    def keep(self, kv: KVCache) -> None:
        """Nobody runs it any more; a prompt may begin like it."""
        if kv.length < SHORTEST_SHARED:
            self.release(kv)
            return
        self.truncate(kv, kv.length)
        for other in [o for o in self._kept if shared_prefix(o.tokens, kv.tokens) == o.length]:
            self._unkeep(other)  # a beginning of it
            self.release(other)
        self._kept[kv] = None
        if self._store is not None and kv.length >= SHORTEST_STORED:
            self._unsaved[kv] = None

    def release(self, kv: KVCache) -> None:
        """Give all of its memory back."""
        self.truncate(kv, 0)
        del self._counted[kv]
        self._idle.append(kv)

    def drop_oldest(self) -> bool:
        """Forget the kept sequence that was used least recently; False if there is none. The store gets it,
        unless others decode and would wait for that."""
        kv = next(iter(self._kept), None)
        if kv is None:
            return False
        if kv in self._unsaved and not self.is_busy:
            self._save(kv)
        self._unkeep(kv)
        self.release(kv)
        return True

    def write_ahead(self) -> None:
        """While others decode: have a thread write what would be dropped soon, so that nobody waits for it
        and nothing is lost. Its memory stays counted meanwhile."""
        if self._writing is not None:
            if not self._writing.thread.is_alive():
                self._end_write()
            return
        if not self._unsaved or not self.is_busy:
            return
        droppable = sum(self._counted[kv] for kv in self._kept if kv not in self._unsaved)
        if self._room() + droppable >= self.total_tokens * WITHOUT_LOSS:
            return
        kv = next(kv for kv in self._kept if kv in self._unsaved)
        assert self._store is not None
        saving = self._store.begin_save(kv.tokens, self._rows(kv, kv.length))
        if saving is None:
            del self._unsaved[kv]
            return
        thread = threading.Thread(target=saving.write, name="session")
        self._writing = _Writing(kv, saving, thread)
        self._unkeep(kv)
        thread.start()

    def forget(self) -> None:
        """Forget all kept sequences, here; a store remembers what it was given."""
        self._end_write()
        self._unsaved.clear()
        while self._kept:
            self.drop_oldest()

    def save_one(self) -> bool:
        """Give the store one of the sequences that it has not been given; False if there is none."""
        if not self._unsaved:
            return False
        self._save(next(reversed(self._unsaved)))
        return True

    def close(self) -> None:
        """Give the store what it has not been given, and all memory back."""
        while self.save_one():
            pass
        self.forget()
        self._idle.clear()

    def _save(self, kv: KVCache) -> None:
        assert self._store is not None
        self._end_write()
        self._unsaved.pop(kv, None)
        self._store.save(kv.tokens, self._rows(kv, kv.length))

    def _end_write(self) -> None:
        """Wait until the thread has written, if it writes; the sequence is the first to be dropped then."""
        if (writing := self._writing) is None:
            return
        assert self._store is not None
        kv, others = writing.kv, [other for other in self._kept if other is not writing.kv]
        if writing.thread.ident is None:  # a Ctrl-C came before it was started
            self._unsaved[kv] = None
        else:
            writing.thread.join()
            self._store.end_save(writing.saving)
        self._kept = {kv: None, **self._kept}
        self._writing = None
        if any(shared_prefix(other.tokens, kv.tokens) == kv.length for other in others):  # a beginning
            self._unkeep(kv)
            self.release(kv)

    def _from_store(self, tokens: list[int], length: int) -> KVCache | None:
        """A new sequence with what the store has of a prompt's beginning, if that is worth reading instead of
        the `length` tokens that are here."""
        if self._store is None:
            return None
        key, shared = self._store.longest_prefix(tokens)
        shared = min(shared, len(tokens) - 1)
        if shared < length + SHORTEST_STORED:
            return None
        kv = self._new()
        try:
            if self.grow(kv, shared) and self._store.load(key, shared, self._rows(kv, self.context)):
                kv.tokens = tokens[:shared]
                return kv
        except BaseException:
            self.release(kv)
            raise
        self.release(kv)
        return None

    def _rows(self, kv: KVCache, count: int) -> list[tuple[Tensor, Tensor]]:
        layers = map(kv.tensors, range(self.config.num_hidden_layers))
        return [(keys[:count], values[:count]) for keys, values in layers]

    def _unkeep(self, kv: KVCache) -> None:
        del self._kept[kv]
        self._unsaved.pop(kv, None)

    def _new(self) -> KVCache:
        kv: KVCache = self._idle.pop() if self._idle else self._new_sequence()
        kv.truncate(0)
        self._counted[kv] = 0
        return kv

    def _room(self) -> int:
        return self.total_tokens - self.used_tokens

    def _in_blocks(self, tokens: int) -> int:
        return min(self.context, -(-tokens // BLOCK) * BLOCK)
