#!/usr/bin/env python3
"""FlashMoE beside llama.cpp and transformers + accelerate: same model, same memory, same tokens, same drive.

    scripts/bench_peers.py --llama-python PEERS/bin/python --torch-python PEERS_TORCH/bin/python \\
        --bf16 WIDE --int4 WIDE_INT4 --int8 WIDE_INT8 --gguf-q4 q4_0.gguf --gguf-q8 q8_0.gguf

Parts (--only, default all): `40` and `70`, a memory limit of so many percent of the GGUF's size for both
engines; `resident`, everything in memory; `readahead`, part 40 with --other-read-ahead-kb; `transformers`, a
limit of 40 % of the bf16 checkpoint. A contender whose model is not given is left out.

Every run is a fresh process inside a fresh memory cgroup, with nothing in the page cache before it; our RAM
budget is the cgroup's limit. Contenders take turns, and who begins changes from round to round; figures are
medians (least to most) over the rounds. A run that other work disturbed is repeated, whatever its speed, a
few times at most; `others busy` says what remained. All are given the same tokens of the same text
(teacher-forced): a prompt to prefill, then tokens one at a time with logits for each. Loading is not counted.
All files are read from a file system of their own on a loop device, since its read-ahead, which decides the
speed of mapped files, must be known. llama.cpp repacks its weights where memory is ample (its default) and
not under a limit, where the copy would be killed.

Needs Linux, root and free disk space for a copy of the models; exits 77 with the reason where it cannot run.
Prints a table and, as its last line, one JSON object.
"""

import argparse
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts.loop_filesystem import LoopFilesystem, LoopUnavailable, bytes_of  # noqa: E402
from scripts.peer_worker import Job  # noqa: E402
from scripts.run_in_cgroup import CANNOT, CgroupUnavailable, run_in_cgroup  # noqa: E402

PARTS = ("40", "70", "resident", "readahead", "transformers")
WORKER = Path(__file__).with_name("peer_worker.py")
SOURCE = Path(__file__).resolve().parents[1]
RESIDENT_PROMPT = 512  # pp512, as llama-bench names it
# Mapped expert pages need the rest of the limit, and so does the process itself.
ACCELERATE_SHARE = 0.45
OFFLOAD_FOLDER = "offload"  # on the loop device: accelerate writes there what it then reads, token by token
STOCK_READ_AHEAD_KB = 128  # Linux's default for a drive
QUIET_SHARE = 0.1  # other work before a run begins; above it we wait
DISTURBED_SHARE = 0.25  # other work during a run, our loop device's included; above it the run is repeated


@dataclass(frozen=True)
class Contender:
    """One engine on one model; `model` is its name on the loop device."""

    label: str
    engine: str
    python: str
    model: str
    limit_bytes: int | None  # of its cgroup; None: all memory
    memory_bytes: int | None  # what the engine is told, see `Job`
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """Contenders that are compared, and what they do."""

    part: str
    name: str
    contenders: tuple[Contender, ...]
    prompt_tokens: int
    decode_tokens: int
    warm: bool
    read_ahead_kb: int

    @property
    def files(self) -> set[str]:
        return {contender.model for contender in self.contenders}


@dataclass(frozen=True)
class Run:
    """One run's figures; `failed` says why there are none. `others_busy`: share of all cores."""

    setting: str
    contender: str
    failed: str | None = None
    answer: dict[str, Any] = field(default_factory=dict)
    cgroup: dict[str, Any] = field(default_factory=dict)
    prompt_tokens: int = 0
    others_busy: float = 0.0

    def figures(self) -> dict[str, float]:
        """Every figure of the table, by name. A failed run has none."""
        if self.failed:
            return {}
        a, tokens = self.answer, len(self.answer["token_s"])
        decode_s = sum(a["token_s"])
        found = {
            "decode_tok_per_s": tokens / decode_s,
            "prefill_tok_per_s": self.prompt_tokens / a["prefill_s"],
            "token_ms_median": 1e3 * statistics.median(a["token_s"]),
            "mb_per_token": a["decode_read_bytes"] / tokens / 1e6,
            "mb_per_s": a["decode_read_bytes"] / decode_s / 1e6,
            "total_read_gb": a["total_read_bytes"] / 1e9,
            "faults_per_token": a["decode_major_faults"] / tokens,
            "peak_rss_gb": a["peak_rss_bytes"] / 1e9,
            "load_s": a["load_s"],
            "perplexity": math.exp(statistics.fmean(a["surprise"])),
            "others_busy": self.others_busy,
        }
        if self.cgroup.get("peak_bytes") is not None:
            found["cgroup_peak_gb"] = self.cgroup["peak_bytes"] / 1e9
        return found | _cache_figures(a, tokens)


def _cache_figures(answer: dict[str, Any], tokens: int) -> dict[str, float]:
    """What only our expert cache can say."""
    counters = answer["decode_counters"]
    if not counters:
        return {}
    used = counters["hits"] + counters["misses"]
    found = {
        "hit_rate": counters["hits"] / used if used else 0.0,
        "missed_mb_per_token": counters["misses"] * answer["facts"]["expert_bytes"] / tokens / 1e6,
        "stall_share": counters["stall_s"] / sum(answer["token_s"]),
    }
    if counters["read_s"]:
        found["mb_per_s_reading"] = counters["bytes_read"] / counters["read_s"] / 1e6
    if counters["stall_s"]:
        found["mb_per_s_stalled"] = counters["bytes_read"] / counters["stall_s"] / 1e6
    return found


def settings(options: argparse.Namespace) -> list[Setting]:
    """What the options ask for, in order. Contenders without a model, settings without any, are left out."""
    # name, our folder, the GGUF that we are compared with
    pairs = (("int4", options.int4, options.gguf_q4), ("int8", options.int8, options.gguf_q8))
    found: list[Setting] = []
    for part in (part for part in PARTS if part in options.only):
        if part == "transformers":
            found.append(_transformers(options))
            continue
        for name, ours, gguf in pairs:
            found.append(_pair(options, part, name, ours, gguf))
    return [setting for setting in found if setting.contenders]


def _pair(options: argparse.Namespace, part: str, name: str, ours: Path | None, gguf: Path | None) -> Setting:
    """Our format against llama.cpp's, in the same memory."""
    resident = part == "resident"
    percent = {"40": 40, "70": 70, "readahead": 40}.get(part)
    reference = gguf or ours
    limit = None if percent is None or reference is None else bytes_of(reference) * percent // 100
    contenders = []
    if ours is not None:
        contenders.append(_ours(options, name, ours, limit))
    if gguf is not None:
        file_type = {"int4": "Q4_0", "int8": "Q8_0"}[name]
        label, python = f"llama.cpp {file_type}", options.llama_python
        contenders.append(Contender(
            label, "llama.cpp", python, gguf.name, limit, None, {"repack": limit is None},
        ))  # fmt: skip
    read_ahead = options.other_read_ahead_kb if part == "readahead" else options.read_ahead_kb
    return Setting(
        part,
        f"{name}, resident" if resident else f"{name}, {percent} %, read-ahead {read_ahead} KiB",
        tuple(contenders),
        RESIDENT_PROMPT if resident else options.prompt_tokens,
        options.decode_tokens,
        resident,
        read_ahead,
    )


def _transformers(options: argparse.Namespace) -> Setting:
    """accelerate's disk offload, ours in the same memory, and ours in 40 % of our int4 model's size."""
    contenders = []
    if options.bf16 is not None:
        limit = bytes_of(options.bf16) * 40 // 100
        contenders.append(Contender(
            "transformers bf16", "transformers", options.torch_python, options.bf16.name, limit,
            int(limit * ACCELERATE_SHARE),
        ))  # fmt: skip
        packed = (("int4", options.int4), ("int8", options.int8))
        contenders += [_ours(options, name, path, limit) for name, path in packed if path is not None]
        if options.int4 is not None:
            small = bytes_of(options.gguf_q4 or options.int4) * 40 // 100
            ours = _ours(options, "int4", options.int4, small)
            contenders.append(replace(ours, label="ours int4, 40 % of int4"))
    return Setting(
        "transformers",
        "40 % of bf16",
        tuple(contenders),
        options.prompt_tokens,
        options.slow_decode_tokens,
        False,
        options.read_ahead_kb,
    )


def _ours(options: argparse.Namespace, name: str, path: Path, limit: int | None) -> Contender:
    source = {"source": str(SOURCE), "reader": options.reader}
    return Contender(f"ours {name}", "ours", sys.executable, path.name, limit, limit, source)


def text_tokens(folder: Path, count: int) -> list[int]:
    """The first `count` tokens of the built-in benchmark text, which is repeated if it is too short."""
    import tokenizers

    from flashmoe.bench_text import BUILT_IN_TEXT

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(BUILT_IN_TEXT, add_special_tokens=False).ids
    return (ids * (count // len(ids) + 1))[:count]


def turns(contenders: Sequence[Contender], rounds: int) -> Iterator[tuple[int, Contender]]:
    """Who runs when: all once a round, in an order that turns round every time."""
    for number in range(rounds):
        yield from ((number, contender) for contender in contenders[:: -1 if number % 2 else 1])


def run_one(
    setting: Setting, contender: Contender, tokens: Sequence[int], root: Path, options: argparse.Namespace
) -> Run:
    """One fresh process in a fresh cgroup, with a cold page cache. A run that dies is a result, no error."""
    job = Job(
        contender.engine,
        str(root / contender.model),
        list(tokens[: setting.prompt_tokens + setting.decode_tokens]),
        setting.prompt_tokens,
        options.threads,
        contender.memory_bytes,
        setting.warm,
        contender.options | {"offload_folder": str(root / OFFLOAD_FOLDER)},
    )
    limit = contender.limit_bytes or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        job_file, answer_file, log = (Path(folder, name) for name in ("job.json", "answer.json", "log"))
        job_file.write_text(json.dumps(asdict(job)))
        command = [contender.python, str(WORKER), str(job_file), str(answer_file)]
        wait_for_quiet(options.quiet_wait)
        drop_page_cache()
        load = OtherLoad()
        with log.open("wb") as output:
            try:
                group = run_in_cgroup(
                    command, limit, stdout=output, stderr=output, timeout=options.timeout, env=environment
                )
            except subprocess.TimeoutExpired:
                return Run(setting.name, contender.label, f"took longer than {options.timeout} s")
            finally:
                shutil.rmtree(root / OFFLOAD_FOLDER, ignore_errors=True)
        if not answer_file.exists():
            why = "killed, out of memory" if group.oom_kills else _last_line(log)
            return Run(setting.name, contender.label, f"{why} (status {group.returncode})", {}, asdict(group))
        answer = json.loads(answer_file.read_text())
        others = load.share()
    return Run(setting.name, contender.label, None, answer, asdict(group), setting.prompt_tokens, others)


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").strip().splitlines()
    return lines[-1][:300] if lines else "no output"


def drop_page_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def wait_for_quiet(seconds: float) -> None:
    """Return when other work uses less than QUIET_SHARE of the cores, or after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        load = OtherLoad()
        time.sleep(1)
        if load.share() < QUIET_SHARE:
            return


class OtherLoad:
    """How much of the machine's cores something else used, other than our child processes.

    The kernel's work for the loop device counts as something else, too.
    """

    def __init__(self) -> None:
        self._begin = time.perf_counter(), self._not_ours_s()

    def share(self) -> float:
        seconds, others_s = time.perf_counter() - self._begin[0], self._not_ours_s() - self._begin[1]
        return max(0.0, others_s) / seconds / (os.cpu_count() or 1)

    @staticmethod
    def _not_ours_s() -> float:
        user, nice, system, _, _, irq, softirq, *_ = Path("/proc/stat").read_text().split()[1:]
        busy = sum(map(int, (user, nice, system, irq, softirq))) / os.sysconf("SC_CLK_TCK")
        return busy - sum(os.times()[:4])


def agreement(runs: Sequence[Run]) -> dict[str, float]:
    """How often each contender's most likely tokens are the first contender's."""
    first_of: dict[str, list[int]] = {}
    for run in runs:
        if not run.failed:
            first_of.setdefault(run.contender, run.answer["predicted"])
    if not first_of:
        return {}
    reference = next(iter(first_of.values()))
    return {
        label: sum(a == b for a, b in zip(ids, reference, strict=True)) / len(reference)
        for label, ids in first_of.items()
    }


def summary(setting: Setting, runs: Sequence[Run]) -> dict[str, Any]:
    """Median, least and most of every figure of each contender, failures, and agreement of predictions."""
    contenders = []
    for contender in setting.contenders:
        own = [run for run in runs if run.contender == contender.label]
        rows = [run.figures() for run in own if not run.failed]
        names = list(dict.fromkeys(name for row in rows for name in row))
        values = {name: [row[name] for row in rows if name in row] for name in names}
        contenders.append({
            "contender": contender.label,
            "limit_bytes": contender.limit_bytes,
            "runs": len(rows),
            "failed": [run.failed for run in own if run.failed],
            "oom_kills": sum(run.cgroup.get("oom_kills", 0) for run in own),
            "figures": {
                name: {"median": statistics.median(v), "least": min(v), "most": max(v), "all": v}
                for name, v in values.items()
            },
            "facts": next((run.answer["facts"] for run in own if not run.failed), {}),
        })  # fmt: skip
    return {
        "part": setting.part,
        "setting": setting.name,
        "prompt_tokens": setting.prompt_tokens,
        "decode_tokens": setting.decode_tokens,
        "read_ahead_kb": setting.read_ahead_kb,
        "page_cache": "warm" if setting.warm else "cold",
        "contenders": contenders,
        "same_most_likely_token": agreement(runs),
    }


COLUMNS = (
    ("decode tok/s", "decode_tok_per_s", 2),
    ("prefill tok/s", "prefill_tok_per_s", 1),
    ("MB/token", "mb_per_token", 0),
    ("hit rate", "hit_rate", 3),
    ("missed MB/token", "missed_mb_per_token", 0),
    ("MB/s", "mb_per_s", 0),
    ("MB/s reading", "mb_per_s_reading", 0),
    ("stall", "stall_share", 2),
    ("faults/token", "faults_per_token", 0),
    ("RSS GB", "peak_rss_gb", 2),
    ("cgroup GB", "cgroup_peak_gb", 2),
    ("perplexity", "perplexity", 1),
    ("others busy", "others_busy", 2),
)
WITH_SPREAD = ("decode_tok_per_s", "prefill_tok_per_s", "mb_per_token")


def print_table(found: dict[str, Any]) -> None:
    """A setting as a markdown table."""
    print(f"\n{found['setting']}; {found['page_cache']} cache, {found['prompt_tokens']} prompt tokens,"
          f" {found['decode_tokens']} decoded, read-ahead {found['read_ahead_kb']} KiB\n")  # fmt: skip
    print("| contender | limit GB | runs | " + " | ".join(title for title, _, _ in COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    for row in found["contenders"]:
        limit = "–" if row["limit_bytes"] is None else f"{row['limit_bytes'] / 1e9:.2f}"
        cells = [_cell(row["figures"].get(name), digits, name in WITH_SPREAD) for _, name, digits in COLUMNS]
        print(f"| {row['contender']} | {limit} | {row['runs']} | {' | '.join(cells)} |")
        for failure in row["failed"]:
            print(f"  {row['contender']} failed: {failure}")
    sames = ", ".join(f"{label} {share:.0%}" for label, share in found["same_most_likely_token"].items())
    print(f"\nsame most likely token: {sames}", flush=True)


def _cell(figure: dict[str, float] | None, digits: int, spread: bool) -> str:
    if figure is None:
        return "–"
    text = f"{figure['median']:.{digits}f}"
    return f"{text} ({figure['least']:.{digits}f}–{figure['most']:.{digits}f})" if spread else text


def run_setting(
    setting: Setting, tokens: Sequence[int], filesystem: LoopFilesystem, options: argparse.Namespace
) -> dict[str, Any]:
    """All rounds of one setting; prints each run as it ends, and the table."""
    filesystem.set_read_ahead(setting.read_ahead_kb)
    runs: list[Run] = []
    for number, contender in turns(setting.contenders, options.pairs):
        for _ in range(1 + options.repeat_disturbed):
            run = run_one(setting, contender, tokens, filesystem.path, options)
            if run.others_busy <= DISTURBED_SHARE:
                break
        runs.append(run)
        speed = run.failed or f"{run.figures()['decode_tok_per_s']:.2f} tok/s"
        print(f"{setting.name}: {number + 1} of {options.pairs}, {contender.label}: {speed}",
              file=sys.stderr, flush=True)  # fmt: skip
    found = summary(setting, runs)
    print_table(found)
    return found


def bench(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every setting. Those that read the same files share a file system."""
    paths = {path.name: path for path in model_paths(options)}
    wanted = settings(options)
    most = max(setting.prompt_tokens + setting.decode_tokens for setting in wanted)
    tokens = text_tokens(next(path for path in paths.values() if path.is_dir()), most)
    found = []
    for group in (
        [setting for setting in wanted if setting.part != "transformers"],
        [setting for setting in wanted if setting.part == "transformers"],
    ):
        files = sorted(set().union(*(setting.files for setting in group)))
        if not files:
            continue
        nbytes = sum(bytes_of(paths[name]) for name in files) + _offloaded_bytes(group, paths)
        with LoopFilesystem(options.scratch, nbytes) as filesystem:
            for name in files:
                print(f"copying {name}", file=sys.stderr, flush=True)
                filesystem.copy(paths[name], name)
            found += [run_setting(setting, tokens, filesystem, options) for setting in group]
    return found


def _offloaded_bytes(group: Sequence[Setting], paths: dict[str, Path]) -> int:
    """What accelerate writes at most: all that it may not keep in memory."""
    contenders = [c for setting in group for c in setting.contenders if c.engine == "transformers"]
    return max((bytes_of(paths[c.model]) - (c.memory_bytes or 0) for c in contenders), default=0)


def model_paths(options: argparse.Namespace) -> list[Path]:
    paths: list[Path | None] = [
        options.bf16, options.int4, options.int8, options.gguf_q4, options.gguf_q8,
    ]  # fmt: skip
    return [path for path in paths if path is not None]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--int4", type=Path, help="our packed int4 folder")
    add("--int8", type=Path, help="our packed int8 folder")
    add("--gguf-q4", type=Path, help="llama.cpp's Q4_0 file of the same model")
    add("--gguf-q8", type=Path, help="its Q8_0 file")
    add("--bf16", type=Path, help="the checkpoint folder, for transformers and for the tokenizer")
    add("--llama-python", default=sys.executable, help="interpreter that has llama-cpp-python")
    add("--torch-python", default=sys.executable, help="interpreter that has transformers and accelerate")
    add("--only", type=lambda text: text.split(","), default=list(PARTS), help=f"of {','.join(PARTS)}")
    add("--pairs", type=int, default=5, help="rounds of each setting (default 5)")
    add("--prompt-tokens", type=int, default=128, help=f"prefilled (resident: {RESIDENT_PROMPT})")
    add("--decode-tokens", type=int, default=64)
    add("--slow-decode-tokens", type=int, default=16, help="decoded in the part transformers")
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--reader", default="auto", help="ours: how experts are read (default auto)")
    add("--read-ahead-kb", type=int, default=STOCK_READ_AHEAD_KB, help="of the loop device")
    add("--other-read-ahead-kb", type=int, default=8192, help="in the part readahead (default 8192)")
    add("--scratch", type=Path, default=Path("/var/tmp"), help="where the file system image goes")
    add("--quiet-wait", type=int, default=60, help="wait so many seconds at most for other work to end")
    add("--repeat-disturbed", type=int, default=2, help="repeat a run so often if other work disturbed it")
    add("--timeout", type=int, default=1800, help="seconds after which a run is given up")
    options = parser.parse_args(arguments)
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"--only knows {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    if not model_paths(options):
        parser.error("no models given; see --int4, --int8, --gguf-q4, --gguf-q8, --bf16")
    if not any(path.is_dir() for path in model_paths(options)):
        parser.error("the text needs a tokenizer: give at least one of --bf16, --int4, --int8")
    if len({path.name for path in model_paths(options)}) < len(model_paths(options)):
        parser.error("two models have the same name; they are copied side by side and need different ones")
    if missing := [str(path) for path in model_paths(options) if not path.exists()]:
        parser.error(f"not there: {', '.join(missing)}")
    if not settings(options):
        parser.error("nothing to run: no contender of these parts has its model")
    return options


def main() -> int:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as Ctrl-C: undo what we made
    print(f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()};"
          f" {options.threads} threads, {options.pairs} rounds; medians (least–most)")  # fmt: skip
    if options.pairs < 5:
        print("fewer than 5 rounds say little about the spread")
    try:
        found = bench(options)
    except (LoopUnavailable, CgroupUnavailable) as error:
        print(f"skipped: {error}", file=sys.stderr)
        return CANNOT
    print(json.dumps({
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "rounds": options.pairs,
        "settings": found,
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
