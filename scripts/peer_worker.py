"""One engine in one process: load a model, prefill a prompt, decode given tokens one at a time, report.

bench_peers.py starts it with the engine's own interpreter: peer_worker.py JOB.json ANSWER.json. A job is
`Job`'s fields as JSON, the answer what `measure` returns. Every engine gets the same token ids and gives the
logits of every decoded token. What they say about the text is noted, outside the measured time, so that a
fast engine that computes something else does not pass for the same. Needs nothing but the engine and numpy:
FlashMoE is imported from the path that the job names, the peers from their environments.
"""

import ctypes
import json
import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Job:
    """What to run. `memory_bytes`: our RAM budget, or what accelerate may keep in memory; None: ample."""

    engine: str
    model: str
    tokens: list[int]
    prompt_tokens: int  # so many are prefilled, the others decoded
    threads: int
    memory_bytes: int | None = None
    warm: bool = False  # run over all tokens once before anything is measured
    options: dict[str, Any] = field(default_factory=dict)


class PeerEngine(Protocol):
    """What each engine has to do. Methods that run tokens return the logits of the next one, as a numpy array
    [V] of float32 that is valid until the next call.
    """

    def prefill(self, tokens: Sequence[int]) -> Any: ...
    def decode(self, token: int) -> Any: ...
    def reset(self) -> None: ...
    def counters(self) -> dict[str, float]: ...
    def facts(self) -> dict[str, Any]: ...


class Ours:
    """FlashMoE through its Python API. Options: `source` (folder to import from), `reader`."""

    def __init__(self, job: Job) -> None:
        sys.path.insert(0, job.options["source"])
        from flashmoe import LLM

        budget = "auto" if job.memory_bytes is None else job.memory_bytes
        reader = job.options.get("reader", "auto")
        context = len(job.tokens) + 1
        options = dict(reader=reader, context=context, threads=job.threads, max_batch=1)
        self._llm = LLM(job.model, ram_budget=budget, **options)

    def prefill(self, tokens: Sequence[int]) -> Any:
        return self._llm.engine.prefill(tokens).numpy()

    def decode(self, token: int) -> Any:
        return self._llm.engine.decode_one_token(token).numpy()

    def reset(self) -> None:
        self._llm.reset()

    def counters(self) -> dict[str, float]:
        counters = self._llm.expert_cache.counters
        return {
            name: getattr(counters, name) for name in ("hits", "misses", "bytes_read", "stall_s", "read_s")
        }

    def facts(self) -> dict[str, Any]:
        plan = self._llm.plan
        return {
            "reader": self._llm.probed.reader,
            "probed_mb_per_s": self._llm.probed.read_mb_per_s,
            "slots": plan.slots,
            "experts": plan.experts,
            "expert_bytes": plan.expert_bytes,
            "budget_bytes": plan.budget_bytes,
            "planned_bytes": plan.planned_bytes,
            "warnings": list(plan.warnings),
        }


class LlamaCpp:
    """llama.cpp through llama-cpp-python's plain bindings, mapped (its default). Option: `repack`."""

    def __init__(self, job: Job) -> None:
        import llama_cpp

        self._c = llama_cpp
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.use_extra_bufts = job.options["repack"]
        self._model = llama_cpp.llama_model_load_from_file(job.model.encode(), model_params)
        if self._model is None:
            raise RuntimeError(f"llama.cpp cannot load {job.model}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = len(job.tokens) + 1
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = job.threads
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if self._context is None:
            raise RuntimeError("llama.cpp cannot make a context")
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)

    def prefill(self, tokens: Sequence[int]) -> Any:
        for begin in range(0, len(tokens), 512):
            self._run(tokens[begin : begin + 512])
        return self._logits()

    def decode(self, token: int) -> Any:
        self._run([token])
        return self._logits()

    def _run(self, tokens: Sequence[int]) -> None:
        ids = (ctypes.c_int32 * len(tokens))(*tokens)  # the batch points to it: it must outlive the call
        batch = self._c.llama_batch_get_one(ids, len(tokens))
        if failed := self._c.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode failed: {failed}")

    def _logits(self) -> Any:
        pointer = self._c.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, (self._vocab_size,))

    def reset(self) -> None:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)

    def counters(self) -> dict[str, float]:
        return {}

    def facts(self) -> dict[str, Any]:
        return {
            "version": f"llama-cpp-python {self._c.__version__}",
            "system_info": self._c.llama_print_system_info().decode().strip(),
        }


class Transformers:
    """transformers in bf16, with what `memory_bytes` does not hold offloaded to disk by accelerate.

    Option: `offload_folder`, where accelerate writes weights that it cannot map from the checkpoint.
    """

    def __init__(self, job: Job) -> None:
        import accelerate
        import torch
        import transformers

        torch.set_num_threads(job.threads)
        self._torch, self._cache = torch, None
        limits: dict[str, Any] = {}
        if job.memory_bytes is not None:
            limits = {
                "device_map": "auto",
                "max_memory": {"cpu": job.memory_bytes},
                "offload_folder": job.options["offload_folder"],
            }
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            job.model, dtype=torch.bfloat16, **limits
        ).eval()
        self._version = (
            f"transformers {transformers.__version__}, accelerate {accelerate.__version__},"
            f" torch {torch.__version__}"
        )

    def prefill(self, tokens: Sequence[int]) -> Any:
        with self._torch.inference_mode():
            out = self._model(
                input_ids=self._torch.tensor([list(tokens)]),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache = out.past_key_values
        return out.logits[0, -1].float().numpy()

    def decode(self, token: int) -> Any:
        return self.prefill([token])

    def reset(self) -> None:
        self._cache = None

    def counters(self) -> dict[str, float]:
        return {}

    def facts(self) -> dict[str, Any]:
        devices = getattr(self._model, "hf_device_map", {})
        return {"version": self._version, "modules_on_disk": sum(d == "disk" for d in devices.values())}


ENGINES: dict[str, type[Ours] | type[LlamaCpp] | type[Transformers]] = {
    "ours": Ours,
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
}


def measure(job: Job) -> dict[str, Any]:
    """Run a job. Times in seconds around prefill and around each decoded token; bytes from /proc/self/io."""
    begin = time.perf_counter()
    engine: PeerEngine = ENGINES[job.engine](job)
    load_s = time.perf_counter() - begin
    if job.warm:
        engine.prefill(job.tokens)
        engine.reset()
    prompt, following = job.tokens[: job.prompt_tokens], job.tokens[job.prompt_tokens :]
    said = Said()
    before_prefill = time.perf_counter()
    logits = engine.prefill(prompt)
    prefill_s = time.perf_counter() - before_prefill
    counters, io, faults = engine.counters(), read_bytes(), major_faults()
    token_s = []
    for token in following:
        said.note(logits, token)
        before = time.perf_counter()
        logits = engine.decode(token)
        token_s.append(time.perf_counter() - before)
    after = engine.counters()
    return {
        "load_s": load_s,
        "prefill_s": prefill_s,
        "token_s": token_s,
        "predicted": said.most_likely,
        "surprise": said.surprise,
        "decode_read_bytes": read_bytes() - io,
        "total_read_bytes": read_bytes(),
        "decode_major_faults": major_faults() - faults,
        "major_faults": major_faults(),
        "peak_rss_bytes": peak_rss_bytes(),
        "decode_counters": {name: after[name] - value for name, value in counters.items()},
        "facts": engine.facts(),
    }


class Said:
    """What an engine predicted: its most likely token, and the surprise (nats) of the one that followed."""

    def __init__(self) -> None:
        self.most_likely: list[int] = []
        self.surprise: list[float] = []

    def note(self, logits: Any, following: int) -> None:
        self.most_likely.append(int(logits.argmax()))
        greatest = float(logits.max())
        total = float(np.exp(logits - greatest).sum(dtype=np.float64))
        self.surprise.append(math.log(total) + greatest - float(logits[following]))


def read_bytes() -> int:
    """What this process has made drives read, all threads."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def major_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def peak_rss_bytes() -> int:
    """Of this program; ru_maxrss would begin with what the process that started it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    answer = measure(job)
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
