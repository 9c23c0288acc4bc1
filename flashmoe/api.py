"""The Python API: `LLM` opens a model inside a RAM budget, `Chat` talks to it.

llm = LLM("PATH", ram_budget="16G")
chat = llm.chat(system="You are terse.")
for piece in chat.stream("Hello"):
    print(piece.text, end="")
print(chat.stats)
"""

import json
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from flashmoe.budget import BudgetPlan
from flashmoe.config import PREDICTOR_NAMES, RunConfig
from flashmoe.decoder import Decoder
from flashmoe.errors import ConfigError, FlashMoEError
from flashmoe.learning import Learning
from flashmoe.loader import load_engine, open_cache, open_model, open_prefetcher, plan_model, share_slots
from flashmoe.model_source import Progress, find_model
from flashmoe.sampler import Sampler, SamplingParams, StopStrings
from flashmoe.stats import GenerationStats, TokenStats
from flashmoe.tokenizer import StreamDecoder
from storage import host


@dataclass(frozen=True, slots=True)
class Piece:
    """A bit of an answer. `text` may be empty while a character or a stop string is incomplete.

    `finish_reason` is set on the last piece: "stop", "length" (max_tokens), "context" (the context is full)
    or "cancelled".
    """

    text: str
    token_id: int | None = None
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer."""

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: GenerationStats


class _Cancelled(Exception):
    """The caller's `cancel` said so."""


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
        CPU computes what is in RAM only, `token_rounding` (lossy) makes prompts cheaper. `on_plan` is called
        once with what the budget buys, before anything is allocated; `progress(what, done, total)` while the
        model is prepared and its dense weights load.
        """
        self.run_config = RunConfig(
            str(ram_budget), policy, reader, context, threads, seed, exact_activations, check_reads, scope,
            prefetch, learn, predictor, device, str(vram_budget), cpu_experts, token_rounding,
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
        self._generations = 0  # begun so far

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
        self._generations += 1
        number = self._generations
        self._check_turn(number)
        recorder = _Recorder(self, stats)
        check = _checker(cancel)
        sampler = Sampler(params, self.config.vocab_size)
        text, stops = StreamDecoder(self.tokenizer), StopStrings(params.stop)
        history = list(prompt)
        try:
            stats.prompt_tokens = len(prompt)
            stats.cached_tokens = self.engine.reuse(prompt)
            stats.prefill_tokens = len(prompt) - stats.cached_tokens
            logits = self.engine.prefill(prompt[stats.cached_tokens :], check)
            while stats.finish_reason is None:
                token = sampler.next_token(logits, history)
                history.append(token)
                ended = token in self.tokenizer.eos_token_ids
                emitted = stops.push("" if ended else text.push(token))
                stats.finish_reason = self._finish_reason(
                    ended or stops.stopped, len(stats.token_ids) + 1, params
                )
                if stats.finish_reason is not None:
                    emitted += stops.push(text.finish()) + stops.flush()
                recorder.token(token, emitted)
                yield Piece(emitted, token, stats.finish_reason)
                if stats.finish_reason is None:
                    self._check_turn(number)
                    recorder.step_begins()
                    logits = self.engine.decode_one_token(token, check)
        except _Cancelled:
            stats.finish_reason = "cancelled"
            rest = stops.push(text.finish()) + stops.flush()
            stats.text += rest
            yield Piece(rest, None, "cancelled")
        finally:
            recorder.finish()

    def _check_turn(self, number: int) -> None:
        """There is one KV cache: a generation cannot go on once another has begun."""
        if self._closed:
            raise FlashMoEError("this LLM is closed; open a new one")
        if number != self._generations:
            raise FlashMoEError(
                "another generation began on this LLM; finish one before the next, or open two"
            )

    def _finish_reason(self, stopped: bool, generated: int, params: SamplingParams) -> str | None:
        if stopped:
            return "stop"
        if params.max_tokens is not None and generated >= params.max_tokens:
            return "length"
        return "context" if self.engine.is_full else None

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
        else:
            from flashmoe.gpu_loader import use_policy

            assert self.plan.vram is not None
            self.expert_cache = use_policy(decoder, cache, self._opened.expert_format, self.plan.vram, run)

    def close(self) -> None:
        """Free the expert slots and close the files; safe to call twice."""
        if not self._closed:
            self._closed = True
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


class _Recorder:
    """Fills GenerationStats from clocks and cache counters while tokens come."""

    def __init__(self, llm: LLM, stats: GenerationStats) -> None:
        self._llm, self._stats = llm, stats
        self._begin = self._step_begin = time.perf_counter()
        self._start = self._step_start = llm.expert_cache.counters.snapshot()
        stats.ram_budget_bytes = llm.plan.budget_bytes
        stats.policy, stats.reader = llm.expert_cache.policy.name, llm.probed.reader
        stats.drive_mb_per_s = llm.probed.read_mb_per_s

    def step_begins(self) -> None:
        self._step_begin = time.perf_counter()
        self._step_start = self._llm.expert_cache.counters.snapshot()

    def token(self, token_id: int, text: str) -> None:
        """Account for the step that produced `token_id`; the first one is prefill."""
        s, now = self._stats, time.perf_counter()
        spent = now - self._step_begin
        step = self._llm.expert_cache.counters - self._step_start
        if not s.token_ids:
            s.prefill_s = s.time_to_first_token_s = now - self._begin
        else:
            s.decode_steps += 1
            s.decode_s += spent
            s.decode_hits += step.hits
            s.decode_misses += step.misses
            s.decode_bytes_read += step.bytes_read
            s.decode_stall_s += step.stall_s
        s.token_ids.append(token_id)
        s.decode_tokens = len(s.token_ids)
        s.text += text
        s.tokens.append(
            TokenStats(token_id, text, spent, step.stall_s, step.hits, step.misses, step.bytes_read)
        )

    def finish(self) -> None:
        self._llm.engine.settle()
        s, total = self._stats, self._llm.expert_cache.counters - self._start
        s.hits, s.misses, s.expert_bytes_read = total.hits, total.misses, total.bytes_read
        s.stall_s, s.read_s = total.stall_s, total.read_s
        s.policy_summary = self._llm.expert_cache.policy.summary
        s.prefetch_issued, s.prefetch_hits, s.prefetch_late = (
            total.prefetch_issued, total.prefetch_hits, total.prefetch_late,
        )  # fmt: skip
        s.prefetch_wasted, s.prefetch_cancelled = total.prefetch_wasted, total.prefetch_cancelled
        s.prefetch_failed, s.prefetch_bytes_wasted = total.prefetch_failed, total.prefetch_bytes_wasted
        prefetcher = self._llm.engine.decoder.prefetcher
        if prefetcher is not None:
            s.prefetch = prefetcher.verdict
        s.rss_bytes, s.peak_rss_bytes = host.rss_bytes(), host.peak_rss_bytes()


def _checker(cancel: Callable[[], bool] | None) -> Callable[[], None] | None:
    if cancel is None:
        return None

    def check() -> None:
        if cancel():
            raise _Cancelled

    return check


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
