"""Prompts in the time in which others wait for the drive.

While requests decode, a chunk of prompts runs in small pieces of work: some milliseconds of attention, or one
expert for all its tokens. Pieces run where a decode step would only wait for its reads, and in a slice after
it. Experts that are resident serve the chunk where they are; the others pass through a few slots of its own,
read when no demand read waits, so that the chunk evicts nothing that the others need. What is computed is
what `Decoder.forward_batch` computes, to the bit: a token's result depends on nobody beside it.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_policies.replay import serving_order
from flashmoe.decoder import Decoder, LayerBuffers, Stretch, last_rows
from flashmoe.errors import FlashMoEError
from flashmoe.weights import ExpertId
from kernels.expert_ffn import Addresses, Routing
from kernels.native import Context
from storage.storage_errors import StorageError

# Tokens whose attention, or whose shared expert, is one piece of work: about 8 ms at a hidden size of 2048 on
# two cores. Behind PIECE_HALVES tokens attending costs more, and a piece has half as many.
PIECE_TOKENS, PIECE_HALVES = 32, 1024
LEAST_PIECE = 4
WAIT_S = 0.002  # how long to wait for a read before looking at the clock


class BackgroundPrefill:
    """One chunk at a time. `step` does a piece of work; `result` is there when all of it is done.

    `decoder` computes the chunk, with a workspace for so many tokens; others may use it while none is active.
    """

    def __init__(self, decoder: Decoder, kernels: Context, slots: int) -> None:
        """`kernels`: threads and workspace of its own. `slots`: for experts that pass through."""
        self.decoder, self._experts = decoder.twin(kernels), decoder.experts
        self._passing = self._experts.passing_reads(slots)
        self._work: Generator[bool, None, Tensor] | None = None
        self._notes: list[tuple[int, Tensor, Tensor, Tensor, list[int]]] = []  # what the router chose
        self._wait = False
        self.result: Tensor | None = None  # logits [B, V]
        self.error: Exception | None = None

    @property
    def is_active(self) -> bool:
        """Whether a chunk has been begun and not ended."""
        return self._work is not None

    @property
    def is_done(self) -> bool:
        """Whether there is a result, or an error."""
        return self.result is not None or self.error is not None

    def begin(self, batch: Sequence[Stretch]) -> None:
        """Start new tokens of B sequences, which nobody else may touch until the end."""
        assert self._work is None
        self.result = self.error = None
        self._work = self._run(list(batch))

    def step(self) -> bool:
        """Do one piece of work; False if there is none until a read arrives, or none at all. Errors are kept
        in `error`: whoever decodes meanwhile has no part in them."""
        if self._work is None or self.is_done:
            return False
        try:
            with torch.inference_mode():
                return next(self._work)
        except StopIteration as done:
            self.result = done.value
        except (FlashMoEError, StorageError) as error:
            self.error = error
        except BaseException:  # a Ctrl-C: the chunk is lost
            self.end()
            raise
        return False

    @contextmanager
    def in_waits(self) -> Iterator[None]:
        """Inside, a decode step that waits for a read does pieces of this instead."""
        self._experts.in_wait = self.step
        try:
            yield
        finally:
            self._experts.in_wait = None

    def run_for(self, seconds: float, check: Callable[[], None] | None = None) -> None:
        """Between two steps of those that decode: work, and wait for reads, for so long at most. `check` is
        called before each piece."""
        deadline = time.perf_counter() + seconds
        self._wait = True
        try:
            self._show_notes()
            while not self.is_done and time.perf_counter() < deadline:
                if check is not None:
                    check()
                self.step()
        finally:
            self._wait = False

    def hurry(self, urgent: bool) -> None:
        """Whether nobody decodes, and the drive is all for this."""
        self._passing.hurry(urgent)

    def end(self) -> None:
        """Forget the chunk, finished or not: what is in no KV cache yet must be run again."""
        if self._work is not None:
            self._work.close()
            self._work = None
        self._passing.give_up()
        self._show_notes()

    def _show_notes(self) -> None:
        """Let the policy see the tokens' routing: not in the middle of an event of others."""
        for index, ids, weights, probabilities, token_ids in self._notes:
            self._experts.observe(index, ids.tolist(), weights.tolist(), probabilities.numpy(), token_ids)
        self._notes.clear()

    def _run(self, batch: list[Stretch]) -> Generator[bool, None, Tensor]:
        """Yields after each piece: True, or False if only a read can bring the next."""
        decoder = self.decoder
        token_ids = [token for stretch in batch for token in stretch.tokens]
        x = decoder.embed(token_ids)
        for index in range(decoder.config.num_hidden_layers):
            buffers = LayerBuffers.of(decoder.config, len(token_ids))
            for rows, table in _attention_pieces(batch):
                if decoder.has_experts(index):
                    decoder.attend_and_route(index, x[rows], decoder.sequences(table), buffers.part(rows))
                else:
                    decoder.dense_layer(index, x[rows], decoder.sequences(table))
                yield True
            if decoder.has_experts(index):
                yield from self._experts_of(index, buffers)
                self._notes.append((index, buffers.ids, buffers.weights, buffers.probabilities, token_ids))
                decoder.add_routed(x, buffers)
                yield True
                for begin in range(0, len(x) if decoder.has_shared_expert(index) else 0, PIECE_TOKENS):
                    rows = slice(begin, begin + PIECE_TOKENS)
                    decoder.add_shared(index, x[rows], buffers.h[rows])
                    yield True
        for stretch in batch:
            stretch.kv_cache.append(stretch.tokens)
        return decoder.logits(last_rows(batch, x))

    def _experts_of(self, index: int, buffers: LayerBuffers) -> Generator[bool, None, None]:
        """One layer: residents as they are, the others as they come."""
        decoder, cache, passing = self.decoder, self._experts, self._passing
        routing = Routing(buffers.ids)
        decoder.expert_ffn.begin(buffers.h)
        pending = dict.fromkeys(cache.keys(index, serving_order(buffers.ids.numpy())))
        asked: set[ExpertId] = set()

        def compute(key: ExpertId, addresses: Addresses) -> None:
            del pending[key]
            decoder.expert_ffn.add(routing, [(key[1], addresses)])

        while pending:
            # Residents first: whoever is not yet one must be read in any case, and is asked for at once.
            absent = [key for key in pending if key not in asked and cache.look(key) is None]
            passing.want(absent)
            asked.update(absent)
            key = next((key for key in pending if key not in asked), None)
            if key is None:  # or one that has come to be resident while it waited to be read
                key = next((k for k in pending if cache.look(k) is not None and passing.unwant(k)), None)
            if key is not None:
                addresses = cache.look(key)
                assert addresses is not None
                cache.counters.hits += 1
                compute(key, addresses)
                yield True
                continue
            arrived = passing.take(WAIT_S if self._wait else 0.0)
            if arrived is not None:
                compute(arrived.key, arrived.addresses)
                passing.drop(arrived)
            yield arrived is not None


def _attention_pieces(batch: list[Stretch]) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """(rows of the chunk, the table that native code wants), a piece of one sequence each."""
    row = 0
    for kv_cache, tokens in batch:
        begin = 0
        while begin < len(tokens):
            position = kv_cache.length + begin
            piece = max(LEAST_PIECE, PIECE_TOKENS * PIECE_HALVES // (PIECE_HALVES + position))
            count = min(piece, len(tokens) - begin)
            table = [(kv_cache.address, position, count)]
            yield slice(row, row + count), np.array(table, np.int64)
            begin += count
            row += count
