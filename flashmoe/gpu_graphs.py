"""CUDA graphs: a fixed piece of GPU work, captured once and launched with one call.

Where there is no GPU (Triton's interpreter, in tests) the piece runs anew each time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from flashmoe.errors import GpuError


class Graph:
    """`work` as one launch. It must only enqueue, on tensors that stay where they are."""

    def __init__(
        self, work: Callable[[], None], device: torch.device, pool: "GraphPool", warm_up: bool = True
    ) -> None:
        """Captures `work`. `warm_up`: it runs once before, so that everything is compiled and loaded; what it
        computes that time must do no harm."""
        self._work = work
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type != "cuda":
            return
        stream = pool.stream
        stream.wait_stream(torch.cuda.current_stream())
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            if warm_up:
                work()
            # Not torch.cuda.graph(): it collects garbage first, which takes longer than the capture.
            # Copies from other threads go on meanwhile (reads into pinned memory call nothing of CUDA).
            self._graph.capture_begin(pool.handle, capture_error_mode="thread_local")
            try:
                work()
            finally:
                self._graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def launch(self) -> None:
        """On the current stream."""
        if self._graph is None:
            self._work()
        else:
            self._graph.replay()


class GraphPool:
    """The stream graphs are captured on, and the memory they share: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda":
            self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self.handle = torch.cuda.graph_pool_handle()


def gpu_seconds(work: Callable[[], object]) -> float:
    """What the GPU takes for what `work` enqueues on the current stream."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


@contextmanager
def out_of_memory_named() -> Iterator[None]:
    """Turn a GPU that has no memory left, in mid-run, into a GpuError that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise GpuError(
            "the GPU has no memory left within --vram-budget; leave it to this process, or try a smaller"
            " --context or another --vram-budget"
        ) from error
