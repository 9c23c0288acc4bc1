"""The Python API: `LLM` opens a model inside a RAM budget, `Chat` (flashmoe/chat.py) talks to it.

llm = LLM("PATH", ram_budget="16G")
chat = llm.chat(system="You are terse.")
for piece in chat.stream("Hello"):
    print(piece.text, end="")
print(chat.stats)
"""

import asyncio
import json
import shutil
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import torch

from flashmoe.background_prefill import BackgroundPrefill
from flashmoe.budget import BudgetPlan
from flashmoe.chat import Chat
from flashmoe.config import PREDICTOR_NAMES, RunConfig
from flashmoe.decoder import Decoder
from flashmoe.errors import ConfigError, FlashMoEError
from flashmoe.generation import Generation, GenerationRequest, Piece
from flashmoe.kv_cache import KVPool
from flashmoe.learning import Learning
from flashmoe.loader import load_engine, open_cache, open_model, open_prefetcher, plan_model, share_slots
from flashmoe.model_source import Progress, find_model
from flashmoe.progress_bar import progress_bar
from flashmoe.recorder import Recorder
from flashmoe.sampler import SamplingParams
from flashmoe.scheduler import Scheduler
from flashmoe.session_store import SessionStore, fingerprint
from flashmoe.sizes import parse_size
from flashmoe.stats import GenerationStats
from kernels.native import make_context

# Plain text, or a conversation: a list of {"role", "content"}.
Prompt = str | Sequence[Mapping[str, str]]


class LLM:
    """A model inside a hard RAM budget. Raises FlashMoEError or StorageError, each with a one-line reason."""

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        ram_budget: str | int = "auto",
        policy: str = "learned",
        reader: str = "auto",
        context: int | None = None,
        threads: int | None = None,
        seed: int = 0,
        exact_activations: bool = False,
        check_reads: bool = False,
        scope: str = "global",
        prefetch: str = "auto",
        predictor: str = PREDICTOR_NAMES[0],
        learn: bool = False,
        device: str = "auto",
        vram_budget: str | int = "auto",
        cpu_experts: str = "auto",
        token_rounding: bool = False,
        max_batch: int = 8,
        session_cache: str | Path | None = None,
        session_cache_size: str = "4G",
        progress: Progress | None = None,
        on_plan: Callable[[BudgetPlan], None] | None = None,
    ) -> None:
        """Open a model and load its dense weights.

        `model`: folder, Hugging Face repo id, or None for the demo model. `ram_budget`: "16G", "80%", bytes,
        "auto". `exact_activations`: fp32 activations for int4 and int8 weights too, which otherwise meet int8
        ones. `check_reads`: compare each expert read with its checksum (packed models). `prefetch`: "off",
        "auto" or at most so many guesses a layer, "2", that `predictor` makes. `learn`: keep the routing on
        this machine and train the learned policy on it after `close`. `device`: "cpu", "cuda" or "auto"; on a
        GPU, `vram_budget` holds for all of its memory that this process uses, `cpu_experts` says whether the
        CPU computes what is in RAM only, `token_rounding` (lossy) makes prompts cheaper. `max_batch`: so many
        generations run together, one with `learn`; more wait. `session_cache`: a folder that
        keeps conversations' keys and values, at most `session_cache_size`, beyond the end of the process (on
        the CPU); its files hold what was said. `on_plan` is called once with
        what the budget buys, before anything is allocated; `progress(what, done, total)` while the model is
        prepared and its dense weights load.
        """
        self.run_config = RunConfig(
            str(ram_budget), policy, reader, context, threads, seed, exact_activations, check_reads, scope,
            prefetch, learn, predictor, device, str(vram_budget), cpu_experts, token_rounding, max_batch,
            None if session_cache is None else str(session_cache), session_cache_size,
        )  # fmt: skip
        self._opened = open_model(find_model(None if model is None else str(model), progress))
        self.config, self.tokenizer = self._opened.config, self._opened.tokenizer
        self.generation_config = _read_generation_config(self._opened.folder)
        self.learning = Learning.begin(self.config, self._opened.folder) if learn else None
        try:
            if self.learning is not None:
                self.run_config = replace(self.run_config, policy=self.learning.policy(policy))
            self.plan = plan_model(self._opened, self.run_config)
            if session_cache is not None and self.plan.vram is not None:
                raise ConfigError(
                    "--session-cache keeps what the CPU computes; take --device cpu, or leave it out"
                )
            if on_plan is not None:
                on_plan(self.plan)
            loaded = load_engine(self._opened, self.plan, self.run_config, progress)
        except BaseException:
            if self.learning is not None:
                self.learning.recorder.close()
            raise
        self._weights = loaded.weights
        self.engine, self.expert_cache, self.probed = loaded.engine, loaded.cache, loaded.probed
        self.dense_load_s = loaded.dense_load_s
        if self.learning is not None:
            self.engine.decoder.observer = self.learning
        self._closed = False
        decoder = self.engine.decoder
        plan = self.plan
        if isinstance(decoder, Decoder):
            self.kv_pool = KVPool(self.config, plan.context, plan.kv_tokens, self._open_sessions())
        else:
            self.kv_pool = KVPool(self.config, plan.context, plan.kv_tokens, None, decoder.new_sequence)
            decoder.make_room = self.kv_pool.drop_oldest
        # What is recorded for training is one conversation's routing.
        self.scheduler = Scheduler(
            decoder, self.kv_pool, self.tokenizer, self._record, 1 if learn else max_batch
        )
        self._open_background()

    def chat(self, system: str | None = None, **sampling: Any) -> Chat:
        """A conversation; `sampling` as in `SamplingParams`, kept for every turn."""
        return Chat(self, system, sampling)

    def stream(
        self, prompt: str, *, cancel: Callable[[], bool] | None = None, stats: GenerationStats | None = None,
        **sampling: Any,
    ) -> Generator[Piece, None, None]:  # fmt: skip
        """Continue plain text, without a chat template. `stats`, if given, is filled in place."""
        stats = GenerationStats() if stats is None else stats
        return self.stream_tokens(self.encode(prompt), self.sampling_params(sampling), stats, cancel)

    @overload
    def generate(self, prompts: str, *, progress: bool = True, **sampling: Any) -> Generation: ...

    @overload
    def generate(
        self, prompts: Sequence[Prompt], *, progress: bool = True, **sampling: Any
    ) -> list[Generation]: ...

    def generate(
        self, prompts: str | Sequence[Prompt], *, progress: bool = True, **sampling: Any
    ) -> Generation | list[Generation]:
        """Answer one text, or many prompts together, `max_batch` at a time; results in the order of prompts.

        A text is continued as it is; a list of {"role", "content"} goes through the model's chat template.
        `progress`: of many prompts, a bar on stderr if that is a terminal. The first prompt that fails ends
        the others, and its error is raised.
        """
        params = self.sampling_params(sampling)
        if isinstance(prompts, str):
            return self._generate([self.encode(prompts)], params, None)[0]
        encoded = self._encode_all(prompts)
        with nullcontext() if not progress else progress_bar(counting=True) as bar:
            return self._generate(encoded, params, bar)

    def _generate(
        self, prompts: list[list[int]], params: SamplingParams, progress: Progress | None
    ) -> list[Generation]:
        pieces: deque[Piece] = deque()
        requests: list[GenerationRequest] = []
        room, done = min(self.scheduler.most_running, self.scheduler.most_waiting), 0
        try:
            while done < len(prompts):
                self._check_open()
                if len(requests) < len(prompts) and self.scheduler.waiting < room:
                    ids = prompts[len(requests)]
                    requests.append(self.scheduler.submit(ids, params, pieces.append, GenerationStats()))
                    continue
                self.scheduler.advance()
                while pieces:
                    piece = pieces.popleft()
                    if piece.error is not None:
                        raise piece.error
                    if piece.finish_reason is not None:
                        done += 1
                        if progress is not None:
                            progress("generating", done, len(prompts))
        finally:
            for request in requests:
                if not request.is_finished:
                    self.scheduler.retire(request)
        return [Generation.of(request.stats) for request in requests]

    async def agenerate(
        self, prompts: str | Sequence[Prompt], **sampling: Any
    ) -> Generation | list[Generation]:
        """As `generate`, for asyncio."""
        params = self.sampling_params(sampling)
        room = asyncio.Semaphore(min(2 * self.scheduler.most_running, self.scheduler.most_waiting))
        encoded = self._encode_all([prompts] if isinstance(prompts, str) else prompts)

        async def answer(ids: list[int]) -> Generation:
            async with room:
                stats = GenerationStats()
                async with aclosing(self.astream_tokens(ids, params, stats)) as pieces:
                    async for _ in pieces:
                        pass
                return Generation.of(stats)

        tasks = [asyncio.ensure_future(answer(ids)) for ids in encoded]
        try:
            results = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return results[0] if isinstance(prompts, str) else results

    async def astream(
        self, prompt: Prompt, *, stats: GenerationStats | None = None, **sampling: Any
    ) -> AsyncGenerator[Piece, None]:
        """As `stream`, for asyncio; several may go on together."""
        stats, params = GenerationStats() if stats is None else stats, self.sampling_params(sampling)
        async with aclosing(self.astream_tokens(self.encode(prompt), params, stats)) as pieces:
            async for piece in pieces:
                yield piece

    async def astream_tokens(
        self, prompt: list[int], params: SamplingParams, stats: GenerationStats
    ) -> AsyncGenerator[Piece, None]:
        """As `stream_tokens`, for asyncio; computes in a thread of its own."""
        self._check_open()
        if not self.scheduler.has_thread:
            self.scheduler.start()
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece]()

        def sink(piece: Piece) -> None:
            with suppress(RuntimeError):  # the loop was closed: nobody listens
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        request = self.scheduler.submit(prompt, params, sink, stats)
        try:
            while True:
                piece = await pieces.get()
                if piece.error is not None:
                    raise piece.error
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            if not request.is_finished:
                request.cancel()

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, or of a list of {"role", "content"} in the model's chat template."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, add_special_tokens=True)
        return self.encode_chat(self.tokenizer.apply_chat_template(prompt))

    def encode_chat(self, text: str) -> list[int]:
        """Token ids of what the chat template made; without one, it is plain text."""
        return self.tokenizer.encode(text, add_special_tokens=not self.tokenizer.has_chat_template)

    def _encode_all(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """All of them checked before one runs."""
        encoded = [self.encode(prompt) for prompt in prompts]
        for ids in encoded:
            self.scheduler.check_prompt(ids)
        return encoded

    def sampling_params(self, overrides: dict[str, Any]) -> SamplingParams:
        """The model's generation_config.json, `overrides` on top; ConfigError for an unknown or bad one."""
        SamplingParams.from_generation_config({}, **overrides)  # what the caller gave, by itself
        try:
            return SamplingParams.from_generation_config(self.generation_config, **overrides)
        except ConfigError as error:
            raise ConfigError(f"the model's generation_config.json: {error}") from error

    def stream_tokens(
        self,
        prompt: list[int],
        params: SamplingParams,
        stats: GenerationStats,
        cancel: Callable[[], bool] | None = None,
    ) -> Generator[Piece, None, None]:
        """Generate behind token ids, reusing what the KV cache shares with them; fills `stats` as it goes.

        `cancel` is asked before every layer. An error or a closed iterator leaves engine and cache usable.
        """
        self._check_open()
        pieces: deque[Piece] = deque()
        request = self.scheduler.submit(prompt, params, pieces.append, stats, cancelled=cancel)
        try:
            while True:
                self._check_open()
                if not pieces:
                    self.scheduler.advance()
                    continue
                piece = pieces.popleft()
                if piece.error is not None:
                    raise piece.error
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            if not request.is_finished:
                self.scheduler.retire(request)

    def _check_open(self) -> None:
        if self._closed:
            raise FlashMoEError("this LLM is closed; open a new one")

    def _record(self, stats: GenerationStats) -> Recorder:
        stats.ram_budget_bytes = self.plan.budget_bytes
        stats.policy, stats.reader = self.expert_cache.policy.name, self.probed.reader
        stats.drive_mb_per_s = self.probed.read_mb_per_s
        return Recorder(stats, lambda: self.expert_cache.counters, self._finish_stats)

    def _finish_stats(self, stats: GenerationStats) -> None:
        self.engine.settle()
        stats.policy_summary = self.expert_cache.policy.summary
        prefetcher = self.engine.decoder.prefetcher
        if prefetcher is not None:
            stats.prefetch = prefetcher.verdict

    def reset(self) -> None:
        """Forget all keys and values in memory, so that the next prompt runs from its first token, or what a
        session cache has of it; experts stay. FlashMoEError while generations run."""
        with self.scheduler.exclusive():
            self.engine.reset()
            self.kv_pool.forget()

    def use_policy(self, policy: str, prefetch: str | None = None, predictor: str | None = None) -> None:
        """Go on with empty slots under another policy, which has seen nothing; weights and KV cache stay.

        `prefetch`, `predictor`: others, too; None leaves them as they are. The predictor has seen nothing.
        Raises FlashMoEError while generations run.
        """
        with self.scheduler.exclusive():
            self._use_policy(policy, prefetch, predictor)

    def _use_policy(self, policy: str, prefetch: str | None, predictor: str | None) -> None:
        self.run_config = run = replace(
            self.run_config,
            policy=policy,
            prefetch=self.run_config.prefetch if prefetch is None else prefetch,
            predictor=self.run_config.predictor if predictor is None else predictor,
        )
        self.plan = share_slots(self.plan, self.config, run)
        self.expert_cache.close()
        decoder = self.engine.decoder
        cache = open_cache(self._opened, self.plan, run, self.probed.reader)
        if isinstance(decoder, Decoder):
            decoder.experts = self.expert_cache = cache
            decoder.prefetcher = open_prefetcher(decoder, self._weights, self.plan, run)
            self._open_background()
        else:
            from flashmoe.gpu_loader import use_policy

            assert self.plan.vram is not None
            self.expert_cache = use_policy(decoder, cache, self._opened.expert_format, self.plan.vram, run)

    def _open_sessions(self) -> SessionStore | None:
        run = self.run_config
        if run.session_cache is None:
            return None
        folder = Path(run.session_cache).expanduser().absolute()
        there = next(path for path in (folder, *folder.parents) if path.exists())
        size = parse_size(run.session_cache_size, free_bytes=shutil.disk_usage(there).free)
        of_model = fingerprint(self.config, self._opened.folder, run.exact_activations)
        return SessionStore(folder, size, of_model)

    def _open_background(self) -> None:
        """Prompts may run beside those that decode, if there are slots for it."""
        decoder, slots = self.engine.decoder, self.plan.passing_slots
        if isinstance(decoder, Decoder) and slots and self.scheduler.most_running > 1:
            threads = torch.get_num_threads()
            self.scheduler.use_background(BackgroundPrefill(decoder, make_context(threads), slots))

    def close(self) -> None:
        """Free all memory and close the files; safe to call twice."""
        if not self._closed:
            self._closed = True
            self.scheduler.stop()
            self.scheduler.use_background(None)
            self.kv_pool.close()
            self.expert_cache.close()
            decoder = self.engine.decoder
            if not isinstance(decoder, Decoder):
                from flashmoe.gpu_loader import give_back

                give_back(decoder)
            del decoder, self.engine.decoder, self.scheduler.decoder, self._weights
            if self.learning is not None:
                self.learning.end()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, not an object")
    return values
