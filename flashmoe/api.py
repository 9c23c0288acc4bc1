"""The Python API: `LLM` opens a model inside a RAM budget, `Chat` talks to it.

llm = LLM("PATH", ram_budget="16G")
chat = llm.chat(system="You are terse.")
for piece in chat.stream("Hello"):
    print(piece.text, end="")
print(chat.stats)
"""

import json
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from flashmoe.background_prefill import BackgroundPrefill
from flashmoe.budget import BudgetPlan
from flashmoe.config import PREDICTOR_NAMES, RunConfig
from flashmoe.decoder import Decoder
from flashmoe.errors import ConfigError, FlashMoEError
from flashmoe.generation import Piece
from flashmoe.kv_cache import KVPool, OneSequence
from flashmoe.learning import Learning
from flashmoe.loader import load_engine, open_cache, open_model, open_prefetcher, plan_model, share_slots
from flashmoe.model_source import Progress, find_model
from flashmoe.recorder import Recorder
from flashmoe.sampler import SamplingParams
from flashmoe.scheduler import Scheduler
from flashmoe.stats import GenerationStats
from kernels.native import make_context


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer."""

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: GenerationStats


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
        generations run together, on the CPU and without `learn`; more wait. `on_plan` is called once with
        what the budget buys, before anything is allocated; `progress(what, done, total)` while the model is
        prepared and its dense weights load.
        """
        self.run_config = RunConfig(
            str(ram_budget), policy, reader, context, threads, seed, exact_activations, check_reads, scope,
            prefetch, learn, predictor, device, str(vram_budget), cpu_experts, token_rounding, max_batch,
        )  # fmt: skip
        self._opened = open_model(find_model(None if model is None else str(model), progress))
        self.config, self.tokenizer = self._opened.config, self._opened.tokenizer
        self.generation_config = _read_generation_config(self._opened.folder)
        self.learning = Learning.begin(self.config, self._opened.folder) if learn else None
        try:
            if self.learning is not None:
                self.run_config = replace(self.run_config, policy=self.learning.policy(policy))
            self.plan = plan_model(self._opened, self.run_config)
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
        if isinstance(decoder, Decoder):
            self.kv_pool: KVPool | OneSequence = KVPool(self.config, self.plan.context, self.plan.kv_tokens)
            one_at_a_time = learn  # what is recorded is one conversation's routing
        else:
            self.kv_pool, one_at_a_time = OneSequence(self.config, decoder.kv_cache), True
        self.scheduler = Scheduler(
            decoder, self.kv_pool, self.tokenizer, self._record, 1 if one_at_a_time else max_batch
        )
        self._open_background()

    def chat(self, system: str | None = None, **sampling: Any) -> "Chat":
        """A conversation; `sampling` as in `SamplingParams`, kept for every turn."""
        return Chat(self, system, sampling)

    def stream(
        self, prompt: str, *, cancel: Callable[[], bool] | None = None, stats: GenerationStats | None = None,
        **sampling: Any,
    ) -> Generator[Piece, None, None]:  # fmt: skip
        """Continue plain text, without a chat template. `stats`, if given, is filled in place."""
        ids = self.tokenizer.encode(prompt, add_special_tokens=True)
        return self.stream_tokens(ids, self.sampling_params(sampling), stats or GenerationStats(), cancel)

    def generate(self, prompt: str, **sampling: Any) -> Generation:
        """Continue plain text to its end."""
        stats = GenerationStats()
        for _ in self.stream(prompt, stats=stats, **sampling):
            pass
        return Generation(stats.text, stats.token_ids, stats.finish_reason or "stop", stats)

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
            while not request.is_finished or pieces:
                self._check_open()
                if not pieces:
                    self.scheduler.advance()
                    continue
                piece = pieces.popleft()
                if piece.error is not None:
                    raise piece.error
                yield piece
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

    def use_policy(self, policy: str, prefetch: str | None = None, predictor: str | None = None) -> None:
        """Go on with empty slots under another policy, which has seen nothing; weights and KV cache stay.

        `prefetch`, `predictor`: others, too; None leaves them as they are. The predictor has seen nothing.
        """
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

    def _open_background(self) -> None:
        """Prompts may run beside those that decode, if there are slots for it."""
        decoder, slots = self.engine.decoder, self.plan.passing_slots
        if isinstance(decoder, Decoder) and slots and self.scheduler.most_running > 1:
            threads = torch.get_num_threads()
            self.scheduler.background = BackgroundPrefill(decoder, make_context(threads), slots)

    def close(self) -> None:
        """Free the expert slots and close the files; safe to call twice."""
        if not self._closed:
            self._closed = True
            self.scheduler.stop()
            self.kv_pool.forget()
            self.expert_cache.close()
            decoder = self.engine.decoder
            if not isinstance(decoder, Decoder):
                from flashmoe.gpu_loader import give_back

                give_back(decoder)
            if self.learning is not None:
                self.learning.end()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Chat:
    """A conversation. Later turns prefill only what is new."""

    def __init__(self, llm: LLM, system: str | None, sampling: dict[str, Any]) -> None:
        self.llm = llm
        self.stats = GenerationStats()
        self._system, self._sampling = system, dict(sampling)
        llm.sampling_params(self._sampling)  # a bad option is an error now, not at the first turn
        self.reset()

    @property
    def system(self) -> str | None:
        """The system prompt; setting it starts the conversation afresh."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        self._system = text
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, keep the system prompt and the resident experts."""
        self.messages: list[dict[str, str]] = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})
        self._text, self._ids = "", []  # type: str, list[int]  # the conversation as the model saw and wrote it

    def stream(
        self, message: str, *, cancel: Callable[[], bool] | None = None, **sampling: Any
    ) -> Generator[Piece, None, None]:
        """Answer one message piece by piece. An answer cut short is kept as far as it came.

        Raises ContextError when the conversation no longer fits; `reset` helps then.
        """
        self.stats = stats = GenerationStats()
        params = self.llm.sampling_params({**self._sampling, **sampling})
        user = {"role": "user", "content": message}
        prompt_text = self.llm.tokenizer.apply_chat_template([*self.messages, user])
        prompt = self._encode(prompt_text)
        try:
            yield from self.llm.stream_tokens(prompt, params, stats, cancel)
        finally:
            if stats.token_ids:
                self.messages += [user, {"role": "assistant", "content": stats.text}]
                self._ids = prompt + stats.token_ids
                self._text = prompt_text + self.llm.tokenizer.decode(
                    stats.token_ids, skip_special_tokens=False
                )

    def send(self, message: str, **sampling: Any) -> Generation:
        """Answer one message to its end."""
        for _ in self.stream(message, **sampling):
            pass
        return Generation(
            self.stats.text, self.stats.token_ids, self.stats.finish_reason or "stop", self.stats
        )

    def save(self, path: Path) -> None:
        """Write the conversation as JSON: {"messages": [{"role", "content"}, …]}."""
        path.write_text(json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1) + "\n", "utf-8")

    def _encode(self, prompt_text: str) -> list[int]:
        """Token ids of the conversation. What the model wrote keeps the ids it chose, which encoding its text
        anew need not give back: otherwise the KV cache of the last answer would be lost."""
        if self._text and prompt_text.startswith(self._text):
            return self._ids + self.llm.tokenizer.encode(prompt_text[len(self._text) :])
        return self.llm.tokenizer.encode(
            prompt_text, add_special_tokens=not self.llm.tokenizer.has_chat_template
        )


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
