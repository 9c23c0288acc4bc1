"""Measure prefill and decode speed, named as llama-bench names them: `pp512` runs a prompt of 512 tokens,
`tg128` decodes 128 tokens one by one.

Decoding follows a given text instead of sampling, so that every policy and budget sees the same tokens and
none ends early. Each repetition goes on in the text where the last one ended. Its KV cache is empty when it
starts; its slots hold what the one before left, unless `cold`. Prints nothing.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import flashmoe
from flashmoe.bench_text import TokenText
from flashmoe.budget import BudgetPlan
from flashmoe.expert_slots import CacheCounters
from flashmoe.loader import LoadedEngine, OpenedModel
from flashmoe.sizes import format_bytes
from flashmoe.stats import bound_s
from storage import host

DECODE_PREFIX = 64  # tokens of prompt before decoding is timed
COLUMNS = ("model", "size", "budget", "policy", "reader", "test", "t/s", "min–max", "hit rate", "MB/token",
           "MB/s", "stall", "bound t/s", "of bound")  # fmt: skip
GPU_COLUMNS = ("model", "size", "RAM", "VRAM", "policy", "test", "t/s", "min–max", "VRAM hits", "RAM hits",
               "MB/token PCIe", "MB/token drive", "on CPU", "resident t/s", "bound t/s",
               "of bound")  # fmt: skip
_DERIVED = ("tokens_per_s", "hit_rate", "mb_per_token", "stall_share", "read_mb_per_s", "bound_tokens_per_s",
            "share_of_bound")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Repetition:
    """One timed run of `tokens` tokens. Stall: time the computation waited for reads."""

    tokens: int
    seconds: float
    hits: int
    misses: int
    bytes_read: int
    stall_s: float
    read_s: float
    drive_mb_per_s: float  # as probed at start
    gpu: "GpuRepetition | None" = None

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def hit_rate(self) -> float:
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 0.0

    @property
    def mb_per_token(self) -> float:
        return self.bytes_read / self.tokens / 1e6

    @property
    def stall_share(self) -> float:
        return self.stall_s / self.seconds

    @property
    def read_mb_per_s(self) -> float:
        """How fast the drive delivered while it was asked, MB/s."""
        return self.bytes_read / self.read_s / 1e6 if self.read_s else 0.0

    @property
    def bound_tokens_per_s(self) -> float:
        """If reading and computing overlapped perfectly: tokens / max(compute, bytes read / drive speed).

        The drive's speed is the probed one, or what it delivered here if that was more: a probe of a third of
        a second may meet a busy drive.
        """
        drive = max(self.drive_mb_per_s, self.read_mb_per_s)
        if self.gpu is None:
            return self.tokens / bound_s(self.seconds - self.stall_s, self.bytes_read, drive)
        # A prompt's computing is not measured apart: its bound is what it took without waiting for reads.
        computing_s = self.gpu.resident_token_s * self.tokens or self.seconds - self.stall_s
        # What misses would take to copy, whether they were copied, guessed or computed on the CPU.
        copying_s = self.misses * self.gpu.expert_bytes / (self.gpu.pcie_mb_per_s * 1e6)
        return self.tokens / max(copying_s, bound_s(computing_s, self.bytes_read, drive))

    @property
    def share_of_bound(self) -> float:
        return self.tokens_per_s / self.bound_tokens_per_s

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {name: getattr(self, name) for name in _DERIVED}


@dataclass(frozen=True, slots=True)
class GpuRepetition:
    """What a run on a GPU adds: hits and misses of a repetition are VRAM's."""

    ram_hits: int  # of the misses, those that RAM held
    cpu_experts: int  # of the misses, those that the CPU computed
    bytes_in: int  # RAM -> VRAM
    expert_bytes: int
    pcie_mb_per_s: float  # of such copies, measured at start
    resident_token_s: float  # a token's with every expert in VRAM, measured in this run; 0 of a prompt


@dataclass(frozen=True, slots=True)
class BenchResult:
    """One test and its repetitions, in the order in which they ran."""

    name: str
    repetitions: tuple[Repetition, ...]

    def median(self, figure: str) -> float:
        """Of any figure of a repetition, by name."""
        return statistics.median(self._values(figure))

    def spread(self, figure: str) -> tuple[float, float]:
        """(least, most)"""
        values = self._values(figure)
        return min(values), max(values)

    def as_dict(self) -> dict[str, Any]:
        """Medians under their own names, and every repetition."""
        medians = {name: self.median(name) for name in _DERIVED}
        return {"test": self.name, **medians, "repetitions": [r.as_dict() for r in self.repetitions]}

    def _values(self, figure: str) -> list[float]:
        return [getattr(repetition, figure) for repetition in self.repetitions]


@dataclass(frozen=True, slots=True)
class Bench:
    """A model brought up to be measured."""

    name: str
    model: OpenedModel
    plan: BudgetPlan
    loaded: LoadedEngine

    def run(
        self,
        text: TokenText,
        prompt_tokens: Sequence[int],
        decode_tokens: Sequence[int],
        repeat: int,
        cold: bool = False,
        progress: Callable[[str], None] = lambda what: None,
    ) -> Iterator[BenchResult]:
        """Run each test `repeat` times; `progress` is told of each repetition before it begins.

        `cold`: every repetition starts with empty slots; the policy keeps what it learnt.

        Raises ContextError when a test is longer than the context, StorageError when the drive fails.
        """
        tests = [(f"pp{n}", n, self._prefill) for n in prompt_tokens]
        tests += [(f"tg{n}", DECODE_PREFIX + n, self._decode) for n in decode_tokens]
        for name, length, measure in tests:
            repetitions = []
            for number in range(repeat):
                progress(f"{name}, {number + 1} of {repeat}")
                self.loaded.engine.reset()
                if cold:
                    self.loaded.cache.evict_all()
                repetitions.append(measure(text.take(length)))
            yield BenchResult(name, tuple(repetitions))

    def bound_line(self) -> str:
        """The ceiling, before anything is measured: what the drive gives if every expert has to be read."""
        p, probed = self.plan, self.loaded.probed
        if p.vram is not None:
            return (
                f"drive {probed.read_mb_per_s:.0f} MB/s ({probed.reader}), PCIe"
                f" {self.loaded.pcie_mb_per_s:.0f} MB/s to {torch.cuda.get_device_name()};"
                f" {p.token_cycle_experts} experts of {p.expert_bytes / 1e6:.2f} MB a token;"
                f" {p.vram.slots} of {p.experts} fit VRAM, {p.slots} RAM; context {p.context}"
            )
        cycle_bytes = p.token_cycle_experts * p.expert_bytes
        least = probed.read_mb_per_s * 1e6 / cycle_bytes
        return (
            f"drive {probed.read_mb_per_s:.0f} MB/s ({probed.reader}), {p.token_cycle_experts} experts of"
            f" {p.expert_bytes / 1e6:.2f} MB a token = {cycle_bytes / 1e6:.1f} MB:"
            f" {least:.2f} tokens/s without a hit; {p.slots} of {p.experts} experts fit, context {p.context},"
            f" {torch.get_num_threads()} threads"
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """Of `row`."""
        return COLUMNS if self.plan.vram is None else GPU_COLUMNS

    def row(self, result: BenchResult) -> tuple[str, ...]:
        """For people, under `columns`."""
        return self._row_of_cpu(result) if self.plan.vram is None else self._row_of_gpu(result)

    def _row_of_gpu(self, result: BenchResult) -> tuple[str, ...]:
        least, most = result.spread("tokens_per_s")
        assert self.plan.vram is not None

        def median(figure: Callable[[Repetition, GpuRepetition], float]) -> float:
            return statistics.median(figure(r, r.gpu) for r in result.repetitions if r.gpu is not None)

        resident_s = median(lambda r, gpu: gpu.resident_token_s)
        return (
            self.name,
            format_bytes(self.model.model_bytes),
            format_bytes(self.plan.budget_bytes),
            format_bytes(self.plan.vram.budget_bytes),
            self.loaded.cache.policy.name,
            result.name,
            f"{result.median('tokens_per_s'):.2f}",
            f"{least:.2f}–{most:.2f}",
            f"{result.median('hit_rate'):.1%}",
            f"{median(lambda r, gpu: gpu.ram_hits / r.misses if r.misses else 0):.1%}",
            f"{median(lambda r, gpu: gpu.bytes_in / r.tokens / 1e6):.1f}",
            f"{result.median('mb_per_token'):.1f}",
            f"{median(lambda r, gpu: gpu.cpu_experts / r.tokens):.1f}",
            f"{1 / resident_s:.1f}" if resident_s else "",
            f"{result.median('bound_tokens_per_s'):.2f}",
            f"{result.median('share_of_bound'):.0%}",
        )

    def _row_of_cpu(self, result: BenchResult) -> tuple[str, ...]:
        least, most = result.spread("tokens_per_s")
        return (
            self.name,
            format_bytes(self.model.model_bytes),
            format_bytes(self.plan.budget_bytes),
            self.loaded.cache.policy.name,
            self.loaded.probed.reader,
            result.name,
            f"{result.median('tokens_per_s'):.2f}",
            f"{least:.2f}–{most:.2f}",
            f"{result.median('hit_rate'):.1%}",
            f"{result.median('mb_per_token'):.1f}",
            f"{result.median('read_mb_per_s'):.0f}",
            f"{result.median('stall_share'):.0%}",
            f"{result.median('bound_tokens_per_s'):.2f}",
            f"{result.median('share_of_bound'):.0%}",
        )

    def memory_line(self) -> str:
        """What was taken of the budgets, at the most; of VRAM what the whole GPU has in use now."""
        line = f"peak RSS {format_bytes(host.peak_rss_bytes())} of {format_bytes(self.plan.budget_bytes)}"
        if self.plan.vram is None:
            return line
        budget = format_bytes(self.plan.vram.budget_bytes)
        return f"{line} RAM; {format_bytes(_vram_in_use())} of {budget} VRAM in use"

    def as_dict(self, results: Sequence[BenchResult]) -> dict[str, Any]:
        """For programs: what was measured, with what, and how much memory it took."""
        return {
            "version": flashmoe.__version__,
            "model": self.name,
            "model_type": self.model.config.model_type,
            "model_bytes": self.model.model_bytes,
            "policy": self.loaded.cache.policy.name,
            "threads": torch.get_num_threads(),
            "dense_load_s": self.loaded.dense_load_s,
            "peak_rss_bytes": host.peak_rss_bytes(),
            "vram_in_use_bytes": None if self.plan.vram is None else _vram_in_use(),
            "probe": asdict(self.loaded.probed),
            "plan": dict(self.plan.as_dict()),
            "tests": [result.as_dict() for result in results],
        }

    def _prefill(self, tokens: list[int]) -> Repetition:
        self.loaded.engine.reuse(tokens)
        return self._timed(len(tokens), lambda: self.loaded.engine.prefill(tokens), is_decode=False)

    def _decode(self, tokens: list[int]) -> Repetition:
        prefix, rest = tokens[:DECODE_PREFIX], tokens[DECODE_PREFIX:]
        self.loaded.engine.reuse(prefix)
        self.loaded.engine.prefill(prefix)

        def steps() -> None:
            for token in rest:
                self.loaded.engine.decode_one_token(token)

        return self._timed(len(rest), steps, is_decode=True)

    def _timed(self, tokens: int, work: Callable[[], object], is_decode: bool) -> Repetition:
        counters = self.loaded.cache.counters
        before, begin = counters.snapshot(), time.perf_counter()
        work()
        seconds = time.perf_counter() - begin
        self.loaded.engine.settle()
        spent = counters - before
        return Repetition(
            tokens=tokens,
            seconds=seconds,
            hits=spent.hits,
            misses=spent.misses,
            bytes_read=spent.bytes_read,
            stall_s=spent.stall_s,
            read_s=spent.read_s,
            drive_mb_per_s=self.loaded.probed.read_mb_per_s,
            gpu=self._gpu_figures(spent, is_decode),
        )

    def _gpu_figures(self, spent: CacheCounters, is_decode: bool) -> GpuRepetition | None:
        if self.plan.vram is None:
            return None
        from flashmoe.gpu_decoder import GpuDecoder
        from flashmoe.tier_copies import VramCounters

        decoder = self.loaded.engine.decoder
        assert isinstance(decoder, GpuDecoder) and isinstance(spent, VramCounters)
        return GpuRepetition(
            ram_hits=spent.ram_hits,
            cpu_experts=spent.cpu_experts,
            bytes_in=spent.bytes_in,
            expert_bytes=self.plan.expert_bytes,
            pcie_mb_per_s=self.loaded.pcie_mb_per_s,
            resident_token_s=decoder.resident_token_s() if is_decode else 0.0,
        )


def _vram_in_use() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def context_for(prompt_tokens: Sequence[int], decode_tokens: Sequence[int]) -> int:
    """The smallest context in which all tests fit, so that the budget goes to the experts."""
    return max(16, *prompt_tokens, *(DECODE_PREFIX + n for n in decode_tokens))
