"""Keys and values on a GPU, in pages: a sequence takes pages as its tokens come, so that conversations of any
length share one piece of memory.

As `KVCache` on the CPU, which has the system's pages for that. Axis letters: P pages, G KV heads, d head
size.
"""

from typing import Final
from weakref import WeakSet

import torch
from torch import Tensor

from flashmoe.config import ModelConfig
from flashmoe.gpu_graphs import out_of_memory_named
from flashmoe.kv_cache import BLOCK
from flashmoe.vram_budget import page_count

# fp16 keeps three bits more than bf16 of keys and values, which the CPU holds in fp32.
KV_DTYPE: Final = torch.float16


class GpuPages:
    """Memory of all sequences. Not thread-safe."""

    def __init__(
        self, config: ModelConfig, context: int, tokens: int, sequences: int, device: torch.device
    ) -> None:
        """`tokens` in all, of at most `sequences` that are as long as the context."""
        self.context, self.device = context, device
        count = page_count(tokens, sequences)
        shape = (count, BLOCK, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self._keys = [torch.zeros(shape, dtype=KV_DTYPE, device=device) for _ in layers]
        self._values = [torch.zeros(shape, dtype=KV_DTYPE, device=device) for _ in layers]
        self._all, self._free = range(count), list(range(count - 1, -1, -1))
        self._sequences: WeakSet[GpuKVCache] = WeakSet()
        self.lender: GpuKVCache | None = None  # a sequence that gives its pages up for others

    def close(self) -> None:
        """Give the GPU's memory back, whoever still holds a sequence."""
        self._keys.clear()
        self._values.clear()

    @property
    def most_pages(self) -> int:
        """Of one sequence."""
        return -(-self.context // BLOCK)

    def tensors(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values, [P, BLOCK, G, d] each."""
        return self._keys[layer], self._values[layer]

    def open(self, sequence: "GpuKVCache") -> None:
        """Know of another sequence."""
        self._sequences.add(sequence)

    def take(self, taker: "GpuKVCache") -> int:
        """A page that nobody uses."""
        if not self._free:  # or a Ctrl-C has come between a page's leaving one list and its coming to another
            used = {page for sequence in self._sequences for page in sequence.pages}
            self._free = [page for page in reversed(self._all) if page not in used]
        if not self._free and self.lender is not None and self.lender is not taker:
            self.lender.truncate(0)
            self.lender.give_back(0)
        assert self._free, "more tokens than were planned"
        return self._free.pop()

    def give_back(self, pages: list[int]) -> None:
        """Nobody uses them any more."""
        self._free += reversed(pages)

    @property
    def free(self) -> int:
        """How many nobody uses."""
        return len(self._free)

    def copy(self, source: list[int], target: list[int]) -> None:
        """Pages of all layers."""
        with out_of_memory_named():
            begin, end = (torch.tensor(pages, device=self.device) for pages in (source, target))
            for tensor in (*self._keys, *self._values):
                tensor[end] = tensor[begin]


class GpuKVCache:
    """One sequence. `tokens` are those whose keys and values are valid."""

    def __init__(self, memory: GpuPages) -> None:
        self.context = memory.context
        self.tokens: list[int] = []
        self.pages: list[int] = []
        self._memory = memory
        memory.open(self)

    @property
    def length(self) -> int:
        return len(self.tokens)

    def claim(self, length: int) -> None:
        """Have memory for so many tokens."""
        while len(self.pages) * BLOCK < length:
            self.pages.append(self._memory.take(self))

    def give_back(self, begin: int) -> None:
        """Return the pages behind the first `begin` tokens."""
        kept = -(-begin // BLOCK)
        pages = self.pages[kept:]
        del self.pages[kept:]  # first: a page that a Ctrl-C loses is found again, one with two owners is not
        self._memory.give_back(pages)

    def append(self, tokens: list[int]) -> None:
        """Make more tokens valid, once every layer has them."""
        self.tokens += tokens

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens; the pages stay."""
        del self.tokens[length:]

    def copy_from(self, other: "GpuKVCache", tokens: int) -> None:
        """Become the first `tokens` of another sequence."""
        self.claim(tokens)
        count = -(-tokens // BLOCK)
        self._memory.copy(other.pages[:count], self.pages[:count])
        self.tokens = other.tokens[:tokens]

    def rows(self, length: int) -> Tensor:
        """Where the first tokens' keys and values are: int64 [length], counted over all pages."""
        pages = torch.tensor(self.pages[: -(-length // BLOCK)], device=self._memory.device)
        places = torch.arange(BLOCK, device=self._memory.device)
        return (pages[:, None] * BLOCK + places).view(-1)[:length]
