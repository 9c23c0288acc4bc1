"""The commands: `flashmoe run`, `serve`, `plan`, `bench`, `pack`, `trace` and `compare`. The only place
that turns errors into exit codes.

0: done. 1: a FlashMoEError or StorageError, as one line on stderr. 2: wrong usage. 130: Ctrl-C. 141: whoever
read our output has gone. Anything else is a bug and keeps its traceback. Heavy imports come after parsing.
"""

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.arguments import build_parser
from flashmoe.errors import ConfigError, FlashMoEError
from flashmoe.screen import Screen
from storage.storage_errors import StorageError

if TYPE_CHECKING:
    from flashmoe.api import LLM
    from flashmoe.budget import BudgetPlan
    from flashmoe.documents import Document
    from flashmoe.loader import OpenedModel
    from flashmoe.pack import PackReport
    from flashmoe.stats_file import StatsFile

EXIT_INTERRUPTED, EXIT_PIPE_CLOSED = 128 + 2, 128 + 13  # as a shell reports SIGINT and SIGPIPE
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop", "max_tokens")
# Options of `compare` that say nothing without --trace, or without --prompts.
ON_TRACES = ("capacity", "scope", "holdout", "plot", "jobs")
LIVE = ("model", "context", "generate", "max_tokens", "repeat", "prefetch", "ram_budget", "reader", "threads",
        "exact_activations", "check_reads", "device", "vram_budget", "cpu_experts",
        "token_rounding")  # fmt: skip
FULL = "--context N holds more"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. SystemExit after wrong usage, `--help` and `--version`."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as we run
    try:
        return _run_command(build_parser().parse_args(argv))
    finally:
        _settle_stdout()


def _run_command(arguments: argparse.Namespace) -> int:
    screen = Screen(sys.stdout, sys.stderr, arguments.quiet)
    try:
        return COMMANDS[arguments.command](arguments, screen)
    except BrokenPipeError:
        return EXIT_PIPE_CLOSED
    except (FlashMoEError, StorageError) as error:
        screen.error(error)
        return 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


# Commands


def run(arguments: argparse.Namespace, screen: Screen) -> int:
    """Chat in the terminal, or answer one prompt."""
    _check_run_usage(arguments)
    from flashmoe.sampler import SamplingParams
    from flashmoe.stats_file import StatsFile

    sampling = {name: getattr(arguments, name) for name in SAMPLING if getattr(arguments, name) is not None}
    SamplingParams.from_generation_config({}, **sampling)  # a bad value should not wait for the model to load
    prompt = _read_prompt(arguments)
    with (
        StatsFile(arguments.stats_json, arguments.per_token) as stats_file,
        _load_llm(arguments, screen, arguments.policy, arguments.prefetch) as llm,
    ):
        if prompt is None:
            code = _chat(arguments, screen, llm, sampling, stats_file)
        else:
            code = _answer(arguments, screen, llm, prompt, sampling, stats_file)
    if llm.learning is not None:
        screen.remark(llm.learning.outcome)
    return code


def serve(arguments: argparse.Namespace, screen: Screen) -> int:
    """Serve over HTTP until a signal comes."""
    _check_predictor_usage(arguments)
    if arguments.session_cache_size is not None and arguments.session_cache is None:
        arguments.parser.error("--session-cache-size belongs to --session-cache DIR, which is missing")
    from flashmoe.config import RunConfig
    from flashmoe.server.serve import ServeOptions, serve

    caching = {
        "session_cache": arguments.session_cache,
        "session_cache_size": arguments.session_cache_size or "4G",
    }
    RunConfig(max_batch=arguments.max_batch, **caching)  # a bad value should not wait for the model to load
    options = ServeOptions(
        arguments.served_model_name or _model_name(arguments.model),
        arguments.host,
        arguments.port,
        arguments.api_key or os.environ.get("FLASHMOE_API_KEY"),
        arguments.allowed_host,
        arguments.queue,
        arguments.drain_seconds,
        cors_origins=arguments.cors_origin,
    )
    extra = {"max_batch": arguments.max_batch, **(caching if arguments.session_cache else {})}

    def load() -> "LLM":
        return _load_llm(arguments, screen, arguments.policy, arguments.prefetch, **extra)

    ended_by = serve(load, options, screen.say, screen.say if arguments.verbose else None)
    return EXIT_INTERRUPTED if ended_by == signal.SIGINT else 0


def plan(arguments: argparse.Namespace, screen: Screen) -> int:
    """What the budget buys, without loading the weights."""
    from flashmoe.config import RunConfig
    from flashmoe.loader import plan_model

    model = _open(arguments)
    run_config = RunConfig(
        arguments.ram_budget,
        context=arguments.context,
        device=arguments.device,
        vram_budget=arguments.vram_budget,
    )
    bought = plan_model(model, run_config)
    for warning in bought.warnings:
        screen.say(f"warning: {warning}")
    facts = {
        "model": _model_name(arguments.model),
        "model_type": model.config.model_type,
        "model_bytes": model.model_bytes,
        "layers": model.config.num_hidden_layers,
        "top_k": model.config.num_experts_per_tok,
    }
    if arguments.json:
        screen.write(json.dumps(facts | dict(bought.as_dict())) + "\n")
        return 0
    from flashmoe.sizes import format_bytes

    size, experts = format_bytes(model.model_bytes), model.config.num_experts
    screen.write(
        f"{facts['model']}: {facts['model_type']}, {size}, {facts['layers']} layers, {experts} experts,"
        f" top-{facts['top_k']}\n{_table(bought.rows())}\n"
    )
    return 0


def bench(arguments: argparse.Namespace, screen: Screen) -> int:
    """Measure prefill and decode. The table goes to stdout, or to stderr when stdout is to carry JSON."""
    _check_predictor_usage(arguments)
    from flashmoe.bench import Bench, context_for
    from flashmoe.bench_text import BUILT_IN_TEXT, TokenText, read_prompts
    from flashmoe.config import PREDICTOR_NAMES, RunConfig
    from flashmoe.loader import load_engine, plan_model
    from flashmoe.progress_bar import progress_bar

    texts = [BUILT_IN_TEXT] if arguments.prompts is None else read_prompts(arguments.prompts)
    tests = arguments.prompt_tokens, arguments.decode_tokens
    context = context_for(*tests) if arguments.context is None else arguments.context
    run_config = RunConfig(
        arguments.ram_budget,
        arguments.policy,
        arguments.reader,
        context,
        arguments.threads,
        exact_activations=arguments.exact_activations,
        check_reads=arguments.check_reads,
        scope=arguments.scope,
        prefetch=arguments.prefetch,
        predictor=arguments.predictor or PREDICTOR_NAMES[0],
        device=arguments.device,
        vram_budget=arguments.vram_budget,
        cpu_experts=arguments.cpu_experts,
        token_rounding=arguments.token_rounding,
    )
    model = _open(arguments)
    text = TokenText(model.tokenizer, texts)
    bought = plan_model(model, run_config)
    _show_plan(bought, screen)
    with progress_bar() as progress:
        loaded = load_engine(model, bought, run_config, progress)
    try:
        measured = Bench(_model_name(arguments.model), model, bought, loaded)
        show = screen.say if arguments.json else lambda lines: screen.write(lines + "\n")
        show(measured.bound_line())
        results = list(measured.run(text, *tests, arguments.repeat, arguments.cold, screen.remark))
        show(_table([measured.columns, *(measured.row(result) for result in results)], " | "))
        start = "every repetition starts" if arguments.cold else "the very first repetition starts"
        show(f"medians; {start} with empty slots; {measured.memory_line()}")
        if arguments.json:
            screen.write(json.dumps(measured.as_dict(results)) + "\n")
    finally:
        loaded.cache.close()
    return 0


def pack(arguments: argparse.Namespace, screen: Screen) -> int:
    """Pack a model, or verify one. The table goes to stdout, or to stderr when stdout is to carry JSON."""
    _check_pack_usage(arguments)
    from flashmoe.progress_bar import progress_bar

    show = screen.say if arguments.json else lambda lines: screen.write(lines + "\n")
    if arguments.verify is not None:
        from storage.expert_file import verify

        with progress_bar() as progress:
            manifest = verify(arguments.verify, progress)
        show(f"{arguments.verify}: all {len(manifest.tensors)} tensors are as they were packed")
        if arguments.json:
            screen.write(json.dumps({"verified": True, "tensors": len(manifest.tensors)}) + "\n")
        return 0
    from flashmoe.calibration import DEFAULT_TOKENS, CalibrationText
    from flashmoe.model_source import find_model
    from flashmoe.pack import PackOptions, pack
    from storage.expert_file import JOURNAL_NAME

    text = arguments.calibration
    options = PackOptions(
        arguments.format or "int4",
        arguments.dense or "bf16",
        arguments.threads or os.cpu_count() or 1,
        text and CalibrationText(text, arguments.calibration_tokens or DEFAULT_TOKENS),
    )
    try:
        with progress_bar() as progress:
            folder = find_model(arguments.model, progress)
        with progress_bar() as progress:
            report = pack(folder, arguments.output, options, progress)
    except KeyboardInterrupt:
        if (arguments.output / JOURNAL_NAME).exists():
            screen.say(
                f"interrupted; {arguments.output} keeps what is finished, the same command goes on there"
            )
        return EXIT_INTERRUPTED
    show(_pack_table(report, arguments.verbose))
    if arguments.json:
        screen.write(json.dumps(report.as_dict()) + "\n")
    return 0


def trace(arguments: argparse.Namespace, screen: Screen) -> int:
    """Record a routing trace. What had run when Ctrl-C came is kept."""
    _check_predictor_usage(arguments)
    from flashmoe.documents import read_documents
    from flashmoe.progress_bar import progress_bar
    from flashmoe.record import RecordOptions, record, recorder_for

    documents = read_documents(arguments.text)
    _check_folder_of(arguments.output)
    options = RecordOptions(
        arguments.max_tokens, arguments.tokens_per_sequence, arguments.generate, arguments.prefill
    )
    only_texts = not any(document.turns for document in documents)
    if arguments.context is None and only_texts:  # what a text does not need goes to the experts
        arguments.context = max(16, arguments.tokens_per_sequence)
    interrupted = False
    folder = arguments.output.absolute().parent
    with (
        _load_llm(arguments, screen, arguments.policy, arguments.prefetch) as llm,
        recorder_for(llm, _model_name(arguments.model), folder) as recorder,
    ):
        try:
            with progress_bar(counting=True) as progress:
                recorded = record(llm, documents, options, recorder, progress)
            if recorded.too_long:
                screen.say(f"{recorded.too_long} conversations ended where the context did; {FULL}")
        except KeyboardInterrupt:
            interrupted = True
            if not len(recorder):
                return EXIT_INTERRUPTED
        recorder.save(arguments.output)
    size = arguments.output.stat().st_size
    end = "interrupted; " if interrupted else ""
    screen.say(
        f"{end}{arguments.output}: {len(recorder)} tokens in {recorder.sequences} sequences,"
        f" {recorder.layers} layers of {recorder.num_experts} experts, {size / 1e6:.1f} MB"
    )
    return EXIT_INTERRUPTED if interrupted else 0


def compare(arguments: argparse.Namespace, screen: Screen) -> int:
    """Compare policies on traces, or live. The table goes to stdout, or to stderr when stdout is for JSON."""
    _check_compare_usage(arguments)
    show = screen.say if arguments.json else lambda lines: screen.write(lines + "\n")
    return _compare_live(arguments, screen, show) if arguments.prompts else _replay(arguments, screen, show)


def train(arguments: argparse.Namespace, screen: Screen) -> int:
    """Train a policy; report first what training on parts of the traces is worth on the other parts."""
    from flashmoe.progress_bar import progress_bar
    from flashmoe.trace import load_trace
    from flashmoe.train_policy import (
        COLUMNS,
        LEAST_TOKENS,
        TrainOptions,
        evaluate,
        folds_of,
        train_policy,
        without_datasets,
        write_policy,
    )

    _check_folder_of(arguments.output)
    options = TrainOptions(
        arguments.trees, rounds=arguments.rounds, seed=arguments.seed, jobs=arguments.jobs
    )
    traces = without_datasets([load_trace(path) for path in arguments.trace], arguments.holdout or ())
    show = screen.say if arguments.json else lambda lines: screen.write(lines + "\n")
    rows = []
    with progress_bar(counting=True) as progress:
        for trace in () if arguments.no_report else traces:
            for fold in folds_of(trace):
                others = [other for other in traces if other is not trace]
                if sum(map(len, [*others, fold.train])) < LEAST_TOKENS:
                    screen.say(f"{trace.name}: too little is left to report on {fold.name}, held out")
                    continue
                text = train_policy([*others, fold.train], options, progress)
                rows.append((trace.name, evaluate(text, fold, jobs=arguments.jobs)))
                show(f"{trace.name}: held out {fold.name}, {len(fold.test)} of {len(trace)} tokens")
                show(_table([COLUMNS, *(row.cells() for row in rows[-1][1])], " | "))
        text = train_policy(traces, options, progress)
    write_policy(arguments.output, text)
    screen.remark(f"{arguments.output}: trained on {sum(map(len, traces))} tokens, {len(text) / 1e3:.0f} kB")
    if arguments.json:
        report = [{"trace": name, **row.as_dict()} for name, fold_rows in rows for row in fold_rows]
        screen.write(json.dumps({"rows": report}) + "\n")
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace, Screen], int]] = {
    "run": run,
    "serve": serve,
    "plan": plan,
    "bench": bench,
    "pack": pack,
    "trace": trace,
    "compare": compare,
    "train-policy": train,
}


# Parts of the commands


def _replay(arguments: argparse.Namespace, screen: Screen, show: Callable[[str], None]) -> int:
    from flashmoe.compare import COLUMNS, DEFAULT_NAMES, SCOPES, Capacity, compare
    from flashmoe.progress_bar import progress_bar

    if arguments.plot is not None:
        _check_folder_of(arguments.plot)
    policies = arguments.policies or list(DEFAULT_NAMES)
    capacities = arguments.capacity or [Capacity(share, True) for share in (0.1, 0.2, 0.4, 0.6)]
    scopes = SCOPES if arguments.scope == "both" else (arguments.scope or "layer",)
    with progress_bar(counting=True) as progress:
        compared = compare(
            arguments.trace,
            policies,
            capacities,
            scopes,
            arguments.holdout or (),
            arguments.seed,
            arguments.jobs,
            progress,
        )
    for note in compared.notes:
        screen.say(note)
    rows = compared.of(policies)
    show(_table([COLUMNS, *(row.cells() for row in rows)], " | "))
    if arguments.json:
        screen.write(json.dumps({"rows": [row.as_dict() for row in rows]}) + "\n")
    if arguments.plot is not None:
        from flashmoe.policy_plot import panels_of, write_plot

        write_plot(arguments.plot, panels_of(compared.rows, policies))
        screen.remark(f"plot: {arguments.plot}")
    return 0


def _compare_live(arguments: argparse.Namespace, screen: Screen, show: Callable[[str], None]) -> int:
    from flashmoe.compare_live import Contender, LiveOptions, compare_live
    from flashmoe.config import RunConfig
    from flashmoe.documents import read_documents

    # The tokens must be the same under all, and on a GPU the CPU's experts round otherwise.
    arguments.cpu_experts = "never"
    documents: list[Document] = read_documents(arguments.prompts)
    policies = arguments.policies or ["lru", "lfu", "learned"]
    guesses = arguments.prefetch or ["off"]
    for value in guesses:  # a bad one should not wait for the model to load
        RunConfig(prefetch=value)
    contenders = [Contender(policy, prefetch) for policy in policies for prefetch in guesses]
    options = LiveOptions(arguments.generate or 64, arguments.max_tokens, arguments.repeat or 5)
    # Memory is planned once: for the policy that takes some.
    planned = next((policy for policy in policies if policy.startswith("learned")), policies[0])
    with _load_llm(arguments, screen, planned, guesses[0], arguments.seed) as llm:
        compared = compare_live(llm, documents, contenders, options, screen.remark)
    show(_table(compared.table(), " | "))
    show(
        f"{compared.prompts} prompts, {compared.tokens} tokens, the same under every policy; medians of"
        f" {options.repeat} interleaved rounds, each from empty slots"
    )
    if compared.too_long:
        screen.say(f"{compared.too_long} conversations ended where the context did; {FULL}")
    if arguments.json:
        screen.write(json.dumps({"model": _model_name(arguments.model), **compared.as_dict()}) + "\n")
    return 0


def _load_llm(
    arguments: argparse.Namespace, screen: Screen, policy: str, prefetch: str = "off", seed: int = 0,
    **extra: Any,
) -> "LLM":  # fmt: skip
    from flashmoe.api import LLM
    from flashmoe.config import PREDICTOR_NAMES
    from flashmoe.model_source import find_model
    from flashmoe.progress_bar import progress_bar

    with progress_bar() as progress:
        folder = find_model(arguments.model, progress)
    with progress_bar() as progress:
        llm = LLM(
            folder,
            ram_budget=arguments.ram_budget,
            policy=policy,
            reader=arguments.reader,
            context=arguments.context,
            threads=arguments.threads,
            seed=seed,
            exact_activations=arguments.exact_activations,
            check_reads=arguments.check_reads,
            scope=arguments.scope or "global",
            prefetch=prefetch,
            predictor=getattr(arguments, "predictor", None) or PREDICTOR_NAMES[0],
            learn=getattr(arguments, "learn", False),
            device=arguments.device,
            vram_budget=arguments.vram_budget,
            cpu_experts=arguments.cpu_experts,
            token_rounding=arguments.token_rounding,
            progress=progress,
            on_plan=partial(_show_plan, screen=screen),
            **{"max_batch": 1, **extra},  # nobody but a server has several generations at once
        )
    _show_probe(llm, screen, arguments.verbose)
    return llm


def _chat(
    arguments: argparse.Namespace,
    screen: Screen,
    llm: "LLM",
    sampling: dict[str, Any],
    stats_file: "StatsFile",
) -> int:
    from platformdirs import user_state_path

    from flashmoe.line_editor import open_prompt
    from flashmoe.terminal_chat import HINT, TerminalChat

    chat = TerminalChat(llm.chat(arguments.system, **sampling), screen, stats_file.write)
    history = user_state_path("flashmoe", appauthor=False) / "chat_history"
    screen.remark(HINT)
    chat.run(open_prompt(history, screen).prompt)
    return 0


def _answer(
    arguments: argparse.Namespace,
    screen: Screen,
    llm: "LLM",
    prompt: str,
    sampling: dict[str, Any],
    stats_file: "StatsFile",
) -> int:
    from flashmoe.stats import GenerationStats
    from flashmoe.terminal_chat import give_answer

    if arguments.raw:
        raw_stats = GenerationStats()
        continuing = partial(llm.stream, prompt, stats=raw_stats, **sampling)
        stats = give_answer(screen, continuing, lambda: raw_stats, stats_file.write, FULL)
    else:
        chat = llm.chat(arguments.system, **sampling)
        stats = give_answer(screen, partial(chat.stream, prompt), lambda: chat.stats, stats_file.write, FULL)
    return EXIT_INTERRUPTED if stats.finish_reason == "cancelled" else 0


def _open(arguments: argparse.Namespace) -> "OpenedModel":
    from flashmoe.loader import open_model
    from flashmoe.model_source import find_model
    from flashmoe.progress_bar import progress_bar

    with progress_bar() as progress:
        return open_model(find_model(arguments.model, progress))


def _check_folder_of(file: Path) -> None:
    """A folder that is not there should be an error before the work that fills the file."""
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"no folder {file.parent} to write {file.name} to")


def _model_name(model: str | None) -> str:
    """What the user called it, without the way to it."""
    if model is None:
        return "smolmoe"
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def _show_plan(bought: "BudgetPlan", screen: Screen) -> None:
    screen.remark(_table(bought.rows()))
    for warning in bought.warnings:
        screen.say(f"warning: {warning}")


def _show_probe(llm: "LLM", screen: Screen, details: bool) -> None:
    """Why a reader was passed over, always; what was measured, when asked for."""
    for note in llm.probed.notes:
        screen.remark(f"probe: {note}")
    if details:
        for reader, speed in llm.probed.measurements.items():
            screen.remark(f"probe: {reader} {speed:.0f} MB/s")
        screen.remark(f"policy {llm.expert_cache.policy.name}, reader {llm.probed.reader}")
        screen.remark(f"dense weights loaded in {llm.dense_load_s:.2f} s")


def _table(rows: Sequence[Sequence[str]], between: str = "  ") -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (between.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _pack_table(report: "PackReport", every_layer: bool) -> str:
    from statistics import median

    from flashmoe.sizes import format_bytes

    manifest, errors = report.manifest, report.manifest.layer_errors
    before, after = report.source_expert_bytes, manifest.experts.extent_bytes
    rows = [
        ("model", f"{format_bytes(report.source_bytes)} -> {format_bytes(report.packed_bytes)}"),
        ("expert", f"{before} -> {after} bytes ({manifest.experts.format})"),
        (
            "time",
            f"{report.seconds:.1f} s, {report.source_bytes / report.seconds / 1e6:.0f} MB/s of the source",
        ),
    ]
    if report.resumed_shards:
        rows.append(("resumed", f"{report.resumed_shards} of {report.shards} shards were there"))
    if errors:
        least, most, middle = min(errors.values()), max(errors.values()), median(errors.values())
        kind = "relative rms" if manifest.calibration is None else "relative rms weighted by activations"
        spread = f"min {least:.2%}, median {middle:.2%}, max {most:.2%}"
        rows.append(("error", f"{spread} ({kind}, by layer)"))
    if errors and every_layer:
        rows += [(f"  layer {layer}", f"{error:.2%}") for layer, error in errors.items()]
    if manifest.dense_error is not None:
        rows.append(("dense error", f"{manifest.dense_error:.2%} ({manifest.dense_format})"))
    return _table(rows)


def _check_pack_usage(arguments: argparse.Namespace) -> None:
    parser: argparse.ArgumentParser = arguments.parser
    packing = ("model", "output", "format", "dense", "threads", "calibration", "calibration_tokens")
    if arguments.verify is not None:
        for name in packing:
            if getattr(arguments, name) is not None:
                parser.error(f"--verify only reads: it has no place for --{name.replace('_', '-')}")
    elif arguments.calibration_tokens is not None and arguments.calibration is None:
        parser.error("--calibration-tokens says how much of --calibration FILE, which is missing")
    elif arguments.calibration is not None and arguments.format == "bf16":
        parser.error("--calibration weighs the errors of int4 and int8; --format bf16 has none")
    elif arguments.output is None:
        parser.error("give --output DIR, the folder to make, or --verify DIR, the one to check")


def _check_compare_usage(arguments: argparse.Namespace) -> None:
    """Traces or a model, each with its own options: exits with 2 otherwise."""
    from flashmoe.policies import COMPARED_NAMES, LIVE_NAMES, check_policy
    from flashmoe.policy_plot import SUFFIXES

    parser: argparse.ArgumentParser = arguments.parser
    if (arguments.trace is None) == (arguments.prompts is None):
        parser.error("give either --trace FILE, to replay, or --prompts FILE, to answer them with a model")
    known = LIVE_NAMES if arguments.trace is None else COMPARED_NAMES
    misplaced = ON_TRACES if arguments.trace is None else LIVE
    for name in misplaced:
        if getattr(arguments, name) != parser.get_default(name):
            goes_with = "--trace" if misplaced is ON_TRACES else "--prompts"
            parser.error(f"--{name.replace('_', '-')} belongs to {goes_with} FILE")
    for written in arguments.policies or ():
        try:
            check_policy(written, known)
        except ConfigError as error:
            parser.error(f"--policies: {error}")
    if arguments.plot is not None and arguments.plot.suffix.lower() not in SUFFIXES:
        parser.error(f"--plot {arguments.plot} should end in {' or '.join(SUFFIXES)}")


def _check_run_usage(arguments: argparse.Namespace) -> None:
    """Options that say nothing together are wrong usage: exits with 2."""
    _check_predictor_usage(arguments)
    parser: argparse.ArgumentParser = arguments.parser
    if arguments.per_token and arguments.stats_json is None:
        parser.error("--per-token adds to --stats-json FILE, which is missing")
    if arguments.raw and arguments.system is not None:
        parser.error("--raw continues the prompt alone: it has no place for --system")
    if arguments.raw and arguments.prompt is None and sys.stdin is not None and sys.stdin.isatty():
        parser.error("--raw continues a text: give it with --prompt")


def _check_predictor_usage(arguments: argparse.Namespace) -> None:
    if arguments.predictor is not None and arguments.prefetch == "off":
        arguments.parser.error("--predictor says who guesses for --prefetch auto or N, which is missing")


def _read_prompt(arguments: argparse.Namespace) -> str | None:
    """--prompt, or all of stdin where that is asked for or no terminal; None: chat."""
    if arguments.prompt not in (None, "-"):
        return str(arguments.prompt)
    if sys.stdin is None:
        raise ConfigError("stdin is closed; give the message with --prompt")
    if arguments.prompt is None and sys.stdin.isatty():
        return None
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    text = sys.stdin.read().removesuffix("\n")
    if not text.strip():
        raise ConfigError("stdin holds no text; give the message with --prompt")
    return text


def _settle_stdout() -> None:
    """Flush, or else see that the interpreter does not try again at exit and complain."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
