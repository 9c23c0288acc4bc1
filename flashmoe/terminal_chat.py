"""The chat in a terminal: messages and commands in, streamed answers out, Ctrl-C in between.

Works without a terminal too: lines come from a function. Knows nothing about models, budgets or options.
"""

import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from flashmoe.errors import FlashMoEError
from flashmoe.line_editor import parse_message
from flashmoe.screen import Screen
from flashmoe.stats import GenerationStats
from storage.storage_errors import StorageError

if TYPE_CHECKING:
    from flashmoe.chat import Chat
    from flashmoe.generation import Piece

HINT = "/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves"
HELP = """\
/stats         what the last answer cost
/reset         forget the conversation
/system        show the system prompt
/system TEXT   set it and start afresh; /system "" removes it
/save FILE     write the conversation as JSON
/exit          leave, as Ctrl-D does; also /bye and /quit
/help          this list; also /?

Alt-Enter, or a backslash at the end of a line, begins another line; \""" opens and closes a block of lines.
A message may begin with / after a space."""
ALIASES = {"/?": "/help", "/bye": "/exit", "/quit": "/exit"}


class Answering(Protocol):
    """Starts an answer, and stops it when `cancel` says so."""

    def __call__(self, *, cancel: Callable[[], bool]) -> "Generator[Piece, None, None]": ...


class Recording(Protocol):
    """Told what each answer cost, and the error that ended it, if one did."""

    def __call__(self, stats: GenerationStats, error: Exception | None = None) -> None: ...


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Meanwhile Ctrl-C makes the yielded function true; a second one raises KeyboardInterrupt as usual.

    For the main thread only, as signal handlers are.
    """
    pressed = False

    def on_interrupt(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def show_answer(screen: Screen, answering: Answering) -> None:
    """Stream an answer to the screen; Ctrl-C ends it where it is."""
    with interruptible() as cancel:
        pieces = answering(cancel=cancel)
        try:
            for piece in pieces:
                screen.write(piece.text)
        finally:
            pieces.close()  # its figures are complete only now, if writing failed
            screen.end_line()


def give_answer(
    screen: Screen,
    answering: Answering,
    get_stats: Callable[[], GenerationStats],
    record: Recording,
    remedy: str,
) -> GenerationStats:
    """Show an answer, record it, then say why it was cut short, if it was, and what it cost.

    `remedy`: what helps against a full context. FlashMoEError and StorageError pass, recorded.
    """
    failure: Exception | None = None
    try:
        show_answer(screen, answering)
    except (FlashMoEError, StorageError) as error:
        failure = error
        raise
    finally:
        record(get_stats(), failure)
    stats = get_stats()
    if note := finish_note(stats, remedy):
        screen.say(note)
    if stats.token_ids:
        screen.remark(stats.line())
    return stats


def finish_note(stats: GenerationStats, remedy: str) -> str | None:
    """Why an answer ended before the model ended it."""
    match stats.finish_reason:
        case "context":
            return f"[context of {stats.prompt_tokens + stats.decode_tokens - 1} tokens is full; {remedy}]"
        case "length":
            return f"[stopped at the limit of {stats.decode_tokens} tokens]"
        case "cancelled":
            return "[stopped by Ctrl-C]"
    return None


@dataclass(frozen=True, slots=True)
class Command:
    """`/name rest of the line`."""

    name: str
    argument: str


def parse_command(text: str) -> Command | None:
    """The command that a line is, aliases resolved, known or not; None for a message."""
    if not text.startswith("/"):
        return None
    name, *argument = text.split(maxsplit=1)
    return Command(ALIASES.get(name, name), "".join(argument).strip())


class TerminalChat:
    """A conversation on a screen."""

    def __init__(self, chat: "Chat", screen: Screen, record: Recording) -> None:
        self._chat, self._screen, self._record = chat, screen, record
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/stats": self._stats,
            "/reset": self._reset,
            "/system": self._system,
            "/save": self._save,
        }

    def run(self, read_text: Callable[[], str]) -> None:
        """Until /exit or the end of input, where `read_text` raises EOFError; KeyboardInterrupt is Ctrl-C."""
        while True:
            try:
                text = read_text()
            except KeyboardInterrupt:
                self._screen.say("Ctrl-D or /exit leaves")
                continue
            except EOFError:
                return
            try:
                if not self.handle(text):
                    return
            except KeyboardInterrupt:  # the second one within an answer: it ends at once, the chat goes on
                self._screen.say("[stopped]")
            except (FlashMoEError, StorageError) as error:
                self._screen.error(error)

    def handle(self, text: str) -> bool:
        """Obey a command or answer a message; false when it is time to leave. Errors of the answer pass."""
        command = parse_command(text)
        if command is None:
            if message := parse_message(text):
                self._answer(message)
        elif command.name == "/exit":
            return False
        elif command.name in self._commands:
            self._commands[command.name](command.argument)
        else:
            self._screen.say(
                f"{command.name} is no command; /help lists them, and a space before it makes it a message"
            )
        return True

    def _answer(self, message: str) -> None:
        self._chat.stats = GenerationStats()  # of this turn, even if it fails before it begins
        answering = partial(self._chat.stream, message)
        give_answer(self._screen, answering, lambda: self._chat.stats, self._record, "/reset starts afresh")

    def _help(self, argument: str) -> None:
        self._screen.say(HELP)

    def _stats(self, argument: str) -> None:
        self._screen.say(str(self._chat.stats) if self._chat.stats.prompt_tokens else "no answer yet")

    def _reset(self, argument: str) -> None:
        self._chat.reset()
        self._screen.say("the conversation starts afresh")

    def _system(self, argument: str) -> None:
        if not argument:
            self._screen.say(f"system prompt: {self._chat.system or 'none'}")
            return
        self._chat.system = None if argument == '""' else argument
        self._screen.say(
            f"the conversation starts afresh {'with' if self._chat.system else 'without'} a system prompt"
        )

    def _save(self, argument: str) -> None:
        if not argument:
            self._screen.say("/save needs the name of a file")
            return
        try:
            self._chat.save(Path(argument).expanduser())
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot save to {argument}: {error}") from error
        self._screen.say(f"saved to {argument}, {len(self._chat.messages)} messages")
