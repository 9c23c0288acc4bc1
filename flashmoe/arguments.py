"""The command line: which commands and options there are. Imports nothing heavy: `--help` answers at once."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import flashmoe

if TYPE_CHECKING:
    from flashmoe.compare import Capacity

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

LARGEST_COUNT = 10_000_000


class _PredictorNames:
    """The predictors' names, looked up as late as the policies'."""

    def __iter__(self) -> Iterator[str]:
        from flashmoe.config import PREDICTOR_NAMES

        return iter(PREDICTOR_NAMES)


class _PolicyNames:
    """The policies' names, looked up when `--policy` or its help is used: that needs numpy. A name may carry
    a file."""

    def __iter__(self) -> Iterator[str]:
        from flashmoe.policies import LIVE_NAMES

        return iter(LIVE_NAMES)

    def __contains__(self, written: object) -> bool:
        return str(written).partition(":")[0] in tuple(self)


def build_parser() -> argparse.ArgumentParser:
    """Parses to a namespace with `command`, a name, and `parser`, to complain about usage with."""
    parser = argparse.ArgumentParser(
        prog="flashmoe",
        description="Run Mixture-of-Experts models that are larger than your memory.",
        epilog="flashmoe COMMAND --help lists a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"flashmoe {flashmoe.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_run(commands)
    _add_serve(commands)
    _add_plan(commands)
    _add_bench(commands)
    _add_pack(commands)
    _add_trace(commands)
    _add_compare(commands)
    _add_train_policy(commands)
    return parser


def _add_run(commands: "Commands") -> None:
    parser = _add_command(commands, "run", "chat with a model in the terminal, or answer one prompt")
    add = parser.add_argument
    add(
        "--prompt",
        type=_text,
        metavar="TEXT",
        help="answer this on stdout and leave; - reads it from stdin, as happens where stdin is no terminal",
    )
    add("--system", type=_text, metavar="TEXT", help="system prompt")
    add("--raw", action="store_true", help="continue the prompt as plain text, without chat template")
    add(
        "--learn",
        action="store_true",
        help="keep the routing of your chats on this machine and train --policy learned on it afterwards",
    )
    _add_running_options(parser)
    add = parser.add_argument_group("sampling", "defaults: the model's generation_config.json").add_argument
    add("--temperature", type=float, metavar="T", help="0 is greedy")
    add("--top-p", type=float, metavar="P", help="only the likeliest tokens that reach P together; 1: all")
    add("--top-k", type=int, metavar="K", help="only the K likeliest tokens; 0: all")
    add("--min-p", type=float, metavar="P", help="only tokens at least P times as likely as the likeliest")
    add("--repetition-penalty", type=float, metavar="R", help="1 is none")
    add("--seed", type=int, metavar="N", help="the same seed gives the same answers")
    add("--stop", type=_text, action="append", metavar="TEXT", help="end before TEXT; may be repeated")
    add("--max-tokens", type=int, metavar="N", help="end an answer after N tokens")
    add = parser.add_argument_group("figures").add_argument
    add("--stats-json", type=Path, metavar="FILE", help="write each answer's figures, one JSON object a line")
    add("--per-token", action="store_true", help="with --stats-json: the figures of every token, too")


def _add_serve(commands: "Commands") -> None:
    parser = _add_command(commands, "serve", "serve a model over HTTP: OpenAI's API, and a page that chats")
    add = parser.add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="listen there (default: 127.0.0.1)")
    add("--port", type=_whole, default=8000, metavar="N", help="0: any that is free (default: 8000)")
    add("--api-key", metavar="KEY", help="clients must send it (default: $FLASHMOE_API_KEY, else none)")
    add(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that clients may call this server by, other than localhost; may be repeated; *: any",
    )
    add(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a site whose pages may use this server, as https://chat.example; may be repeated",
    )
    add("--served-model-name", type=_text, metavar="NAME", help="in the API (default: the model's folder)")
    add("--max-batch", type=_count, default=8, metavar="N", help="answers computed together (default: 8)")
    add("--queue", type=_count, default=64, metavar="N", help="more waiting requests get 429 (default: 64)")
    add(
        "--session-cache",
        metavar="DIR",
        help="keep keys and values of conversations there, so that they outlive this process",
    )
    add("--session-cache-size", metavar="SIZE", help="the most that folder may hold (default: 4G)")
    add(
        "--drain-seconds",
        type=_whole,
        default=30,
        metavar="N",
        help="after SIGTERM or Ctrl-C, answers may take so long to finish (default: 30)",
    )
    _add_running_options(parser)


def _add_plan(commands: "Commands") -> None:
    parser = _add_command(commands, "plan", "show what a RAM budget buys, without loading the weights")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _add_bench(commands: "Commands") -> None:
    parser = _add_command(commands, "bench", "measure prefill and decode speed against what the drive allows")
    _add_running_options(parser)
    add = parser.add_argument
    add("--prompt-tokens", type=_counts, default=[512], metavar="N,N", help="prompt lengths (default: 512)")
    add("--decode-tokens", type=_counts, default=[128], metavar="N,N", help="tokens to decode (default: 128)")
    add("--repeat", type=_count, default=3, metavar="N", help="repetitions of each test (default: 3)")
    add("--cold", action="store_true", help="empty the slots before each repetition")
    add("--prompts", type=Path, metavar="FILE", help="text to run through, .txt or .jsonl (default: our own)")
    add("--json", action="store_true", help="one JSON object on stdout, the table on stderr")


def _add_pack(commands: "Commands") -> None:
    parser = _add_bare_command(
        commands,
        "pack",
        "quantise a model, each expert one extent on the drive",
    )
    add = parser.add_argument
    add("--output", type=Path, metavar="DIR", help="folder to make; goes on if the same command was stopped")
    add(
        "--format",
        choices=("int4", "int8", "bf16"),
        help="of the experts: int4, int8 in groups of 32 with fp16 scales; bf16: as they are (default: int4)",
    )
    add(
        "--dense",
        choices=("bf16", "int8", "int4"),
        help="of the other matrices; int4 keeps embedding and output at int8 (default: bf16, as they are)",
    )
    add("--threads", type=_count, metavar="N", help="threads that quantise (default: one a core)")
    add(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text (.jsonl, .txt) to run first: GPTQ for int4, weighted errors for int8",
    )
    add("--calibration-tokens", type=_count, metavar="N", help="how much of it to run (default: 16384)")
    add(
        "--verify",
        type=Path,
        metavar="DIR",
        help="only read every byte of a packed folder and compare checksums",
    )
    add("--json", action="store_true", help="one JSON object on stdout, the table on stderr")


def _add_trace(commands: "Commands") -> None:
    parser = _add_command(commands, "trace", "record which experts a model routes a text to")
    add = parser.add_argument
    add(
        "--text",
        type=Path,
        required=True,
        metavar="FILE",
        help='text to run through; .jsonl: a "text" a line, or "turns" or a "prompt" that the model answers,'
        ' each with a "domain", "category" or "dataset"',
    )
    add("--output", type=Path, required=True, metavar="FILE", help="trace to write, .npz")
    add("--max-tokens", type=_count, metavar="N", help="end after N tokens, of all domains alike")
    add(
        "--tokens-per-sequence",
        type=_count,
        default=512,
        metavar="N",
        help="texts are cut into sequences so long, each on its own (default: 512)",
    )
    add("--generate", type=_count, default=128, metavar="N", help="tokens of an answer (default: 128)")
    add(
        "--prefill",
        action="store_true",
        help="run texts in chunks; without it each token alone, which is how a model decodes",
    )
    _add_running_options(parser)


def _add_compare(commands: "Commands") -> None:
    parser = _add_command(commands, "compare", "compare cache policies on traces, or live on a model")
    add = parser.add_argument
    add(
        "--policies",
        type=_names,
        metavar="NAME,NAME",
        help="which to compare (default: all but lrb on traces; lru,lfu,lfru live)",
    )
    add("--seed", type=_whole, default=0, metavar="N", help="for policies that draw lots (default: 0)")
    add("--json", action="store_true", help="one JSON object on stdout, the table on stderr")
    add = parser.add_argument_group("on traces", "recorded by flashmoe trace, or anyone's .npz").add_argument
    add("--trace", type=Path, nargs="+", metavar="FILE", help="traces to replay")
    add(
        "--capacity",
        type=_capacities,
        metavar="N,P%",
        help="experts of a layer in memory, as counts or shares (default: 10%%,20%%,40%%,60%%)",
    )
    add(
        "--scope",
        choices=("layer", "global", "both"),
        help="slots of each layer, or as many in all, shared by the layers (default: layer)",
    )
    add("--holdout", type=_names, metavar="NAME,NAME", help="only the sequences of these data sets")
    add("--plot", type=Path, metavar="FILE", help="draw hit rates and gaps, .png or .svg")
    add("--jobs", type=_count, metavar="N", help="replays side by side (default: one a core)")
    add = parser.add_argument_group("live").add_argument
    add("--prompts", type=Path, metavar="FILE", help="prompts that --model answers, as trace takes them")
    add("--generate", type=_count, metavar="N", help="tokens of an answer (default: 64)")
    add("--max-tokens", type=_count, metavar="N", help="end a round after N tokens")
    add("--repeat", type=_count, metavar="N", help="rounds, every policy once in each (default: 5)")
    add(
        "--prefetch", type=_names, metavar="off,auto,N", help="compare each policy under these (default: off)"
    )
    _add_running_options(parser, one_policy=False)


def _add_train_policy(commands: "Commands") -> None:
    parser = commands.add_parser(
        "train-policy",
        help="train the learned policy on recorded traces",
        description="Train the learned policy on recorded traces.",
    )
    parser.set_defaults(command="train-policy", parser=parser)
    add = parser.add_argument
    add("--trace", type=Path, nargs="+", required=True, metavar="FILE", help="traces of flashmoe trace, .npz")
    add("--output", type=Path, required=True, metavar="FILE", help="policy to write: LightGBM's text format")
    add("--trees", type=_count, default=40, metavar="N", help="more take more time a decision (default: 40)")
    add("--rounds", type=_count, default=1, metavar="N", help="on the policy's own decisions (default: 1)")
    add(
        "--holdout",
        type=_names,
        metavar="DATASET,…",
        help="keep these data sets out of it, for flashmoe compare --holdout to report on",
    )
    add("--no-report", action="store_true", help="skip what takes longest: training on parts of each trace"
        " and replaying the data sets left out")  # fmt: skip
    add("--seed", type=_whole, default=0, metavar="N", help="of the samples (default: 0)")
    add("--jobs", type=_count, metavar="N", help="processes (default: one a core)")
    add("--json", action="store_true", help="the report as one JSON object on stdout, the table on stderr")
    add("--quiet", action="store_true", help="nothing on stderr but errors")


def _add_command(commands: "Commands", name: str, summary: str) -> argparse.ArgumentParser:
    """A command that runs a model, with the options that all of these have."""
    parser = _add_bare_command(commands, name, summary)
    add = parser.add_argument
    add(
        "--ram-budget",
        default="auto",
        metavar="SIZE",
        help="RAM for the whole process: 16G, 16GB, 80%% of what is free, auto (default: auto)",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="what computes: auto takes an NVIDIA GPU if there is one (default: auto)",
    )
    add(
        "--vram-budget",
        default="auto",
        metavar="SIZE",
        help="GPU memory for the whole process, written like --ram-budget (default: auto)",
    )
    add("--context", type=int, metavar="N", help="tokens of conversation (default: what fits)")
    return parser


def _add_bare_command(commands: "Commands", name: str, summary: str) -> argparse.ArgumentParser:
    """A command with the options that all have."""
    parser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    parser.set_defaults(command=name, parser=parser)
    add = parser.add_argument
    add(
        "--model",
        metavar="PATH",
        help="folder of safetensors or Hugging Face repo id (default: the demo model, built once)",
    )
    add("--quiet", action="store_true", help="neither plan nor speed on stderr")
    about = "also what was measured and decided at start" + ("; a line a request" if name == "serve" else "")
    add("-v", "--verbose", action="store_true", help=about)
    return parser


def _add_running_options(parser: argparse.ArgumentParser, one_policy: bool = True) -> None:
    """`one_policy`: with the options of which there may be several where policies are compared."""
    add = parser.add_argument
    if one_policy:
        add(
            "--policy",
            choices=_PolicyNames(),
            default="learned",
            metavar="NAME",
            help="which expert leaves when another needs its slot: %(choices)s (default: learned);"
            " learned:FILE takes a policy of train-policy",
        )
        add(
            "--scope",
            choices=("global", "layer"),
            default="global",
            help="slots shared by all layers, or as many for each (default: global)",
        )
        add(
            "--prefetch",
            default="auto",
            metavar="auto|off|N",
            help="read what the next layers may need while the drive is idle: at most N experts a layer, or"
            " auto, where it is measured to pay (default: auto)",
        )
        add(
            "--predictor",
            choices=_PredictorNames(),
            metavar="NAME",
            help="with --prefetch: who guesses, %(choices)s (default: next-router)",
        )
    add(
        "--reader",
        choices=("auto", "direct", "buffered", "mmap"),
        default="auto",
        help="how experts are read (default: auto, direct or buffered by a probe)",
    )
    add("--threads", type=int, metavar="N", help="threads that compute (default: one a core)")
    add(
        "--cpu-experts",
        choices=("auto", "never", "always"),
        default="auto",
        help="with a GPU: whether the CPU computes experts that are in RAM but not in VRAM (default: auto,"
        " where that is measured to be faster than copying them)",
    )
    add(
        "--token-rounding",
        action="store_true",
        help="with a GPU, lossy: prompts drop the least weighted tokens of experts that would begin one more"
        " tile",
    )
    add(
        "--exact-activations",
        action="store_true",
        help="fp32 activations for int4 and int8 weights too, which otherwise meet int8 ones: slower",
    )
    add(
        "--check-reads",
        action="store_true",
        help="compare every expert read with its checksum (packed models)",
    )


def _text(value: str) -> str:
    """Bytes of the command line that are not UTF-8 become replacement characters."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _count(value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) < 20 and 0 < int(value) <= LARGEST_COUNT):
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number from 1 to {LARGEST_COUNT}")
    return int(value)


def _counts(value: str) -> list[int]:
    """`128` or `128,512`"""
    return [_count(part) for part in value.split(",")]


def _whole(value: str) -> int:
    return 0 if value == "0" else _count(value)


def _names(value: str) -> list[str]:
    """`lru,lfu`"""
    names = [_text(name.strip()) for name in value.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{value!r} has an empty name; separate names by single commas")
    return list(dict.fromkeys(names))


def _capacities(value: str) -> list["Capacity"]:
    """`10%,8`"""
    from flashmoe.compare import Capacity

    capacities = []
    for part in value.split(","):
        text = part.strip().removesuffix("%")
        is_share = part.strip() != text
        digits = text.replace(".", "", 1) if is_share else text
        if not (digits.isascii() and digits.isdigit() and len(digits) < 8):
            raise argparse.ArgumentTypeError(
                f"{part!r} is neither a count of experts nor a share such as 25%"
            )
        amount = float(text) / 100 if is_share else float(text)
        if amount <= 0 or (is_share and amount > 1):
            raise argparse.ArgumentTypeError(f"{part!r} is not a share of up to 100%, or a count from 1")
        capacities.append(Capacity(amount, is_share))
    return capacities
