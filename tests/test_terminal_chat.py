"""The chat loop without a terminal, its line editor on a pipe, and the whole on a pseudo-terminal."""

import codecs
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from flashmoe.api import LLM, Piece
from flashmoe.errors import ContextError
from flashmoe.line_editor import open_prompt, parse_message, wants_more
from flashmoe.screen import Screen, printable
from flashmoe.stats import GenerationStats
from flashmoe.terminal_chat import Command, TerminalChat, interruptible, parse_command
from storage.storage_errors import ReadError


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        return True


class EchoChat:
    """Answers with the message, word by word. `during` is called before each word."""

    def __init__(self, during: Callable[[int], None] = lambda word: None) -> None:
        self.stats = GenerationStats()
        self.system: str | None = None
        self.messages: list[dict[str, str]] = []
        self.during = during

    def stream(self, message: str, *, cancel: Callable[[], bool]) -> Iterator[Piece]:
        self.stats = stats = GenerationStats(prompt_tokens=3, finish_reason="stop")
        for number, word in enumerate(re.findall(r"\S+\s*", message)):
            self.during(number)
            if cancel():
                stats.finish_reason = "cancelled"
                return
            stats.text += word
            stats.token_ids.append(number)
            stats.decode_tokens += 1
            yield Piece(word)
        self.messages.append({"role": "user", "content": message})

    def reset(self) -> None:
        self.messages.clear()

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"messages": self.messages}), "utf-8")


class Session:
    """A chat whose lines come from a list; an exception in it is raised instead."""

    def __init__(self, chat: EchoChat | None = None, out: io.StringIO | None = None) -> None:
        self.out, self.err = out or io.StringIO(), io.StringIO()
        self.chat = chat or EchoChat()
        self.recorded: list[tuple[str, str | None]] = []
        self.terminal_chat = TerminalChat(self.chat, Screen(self.out, self.err), self._record)

    def _record(self, stats: GenerationStats, error: Exception | None = None) -> None:
        self.recorded.append((stats.text, None if error is None else str(error)))

    def run(self, *lines: str | BaseException) -> "Session":
        remaining = iter([*lines, EOFError()])

        def read_text() -> str:
            line = next(remaining)
            if isinstance(line, BaseException):
                raise line
            return line

        self.terminal_chat.run(read_text)
        return self


# What a line means


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("/stats", Command("/stats", "")),
        ("/system  Be brief. ", Command("/system", "Be brief.")),
        ("/?", Command("/help", "")),
        ("/bye", Command("/exit", "")),
        ("/quit", Command("/exit", "")),
        ("/what ever", Command("/what", "ever")),
        ("/system\ntwo\nlines", Command("/system", "two\nlines")),
        ("/", Command("/", "")),
        ("hello /stats", None),
        (" /etc/passwd", None),
        ('"""/stats"""', None),
    ],
)
def test_a_line_that_begins_with_a_slash_is_a_command(line: str, command: Command | None):
    assert parse_command(line) == command


def test_a_block_wants_more_until_it_is_closed():
    assert wants_more('"""one')
    assert wants_more('  """')
    assert not wants_more('"""one\ntwo"""')
    assert not wants_more('say """ something')


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("  hello  ", "hello"),
        ("one\ntwo", "one\ntwo"),
        ('"""\none\n\ntwo\n"""', "one\n\ntwo"),
        ('"""one""" two', "one two"),
        ('"""never closed', "never closed"),
        ('"""   """', ""),
    ],
)
def test_a_message_loses_blanks_around_it_and_block_quotes(typed: str, message: str):
    assert parse_message(typed) == message


# The loop


def test_the_answer_goes_to_stdout_and_the_figures_to_stderr():
    session = Session().run("one two")
    assert session.out.getvalue() == "one two\n"
    assert "tok/s" in session.err.getvalue()
    assert session.recorded == [("one two", None)]


def test_an_empty_line_asks_nothing():
    assert Session().run("", "   ", '""""""').recorded == []


def test_nothing_after_exit_is_read():
    session = Session().run("/exit", "hello")
    assert session.recorded == []


def test_ctrl_c_at_the_prompt_hints_and_stays():
    session = Session().run(KeyboardInterrupt(), "hello")
    assert "Ctrl-D or /exit leaves" in session.err.getvalue()
    assert session.out.getvalue() == "hello\n"


def test_an_unknown_command_says_so_and_is_not_sent():
    session = Session().run("/etc/passwd is what?")
    assert "/etc/passwd is no command" in session.err.getvalue()
    assert session.recorded == []


def test_a_message_may_begin_with_a_slash_after_a_space():
    assert Session().run(" /etc/passwd").recorded == [("/etc/passwd", None)]


def test_help_names_every_command():
    text = Session().run("/help").err.getvalue()
    for name in ("/stats", "/reset", "/system", "/save", "/exit", "/bye", "/quit", "/help", "/?"):
        assert name in text


def test_stats_shows_the_last_answer_once_there_is_one():
    before = Session().run("/stats")
    assert "no answer yet" in before.err.getvalue()
    after = Session().run("hello", "/stats")
    assert "hit rate  " in after.err.getvalue()


def test_reset_forgets_the_conversation():
    session = Session().run("hello", "/reset")
    assert session.chat.messages == []


def test_system_shows_sets_and_removes_the_system_prompt():
    session = Session().run("/system")
    assert "system prompt: none" in session.err.getvalue()
    session.run("/system Be brief.", "/system")
    assert session.chat.system == "Be brief."
    assert "system prompt: Be brief." in session.err.getvalue()
    session.run('/system ""')
    assert session.chat.system is None


def test_save_writes_the_conversation(tmp_path: Path):
    path = tmp_path / "my chat.json"
    session = Session().run("hello", f"/save {path}")
    assert json.loads(path.read_text())["messages"] == [{"role": "user", "content": "hello"}]
    assert f"saved to {path}, 1 messages" in session.err.getvalue()


def test_a_file_that_cannot_be_saved_is_one_line_and_the_chat_goes_on(tmp_path: Path):
    session = Session().run("/save", f"/save {tmp_path}/no/such/folder", "hello")
    lines = session.err.getvalue().splitlines()
    assert lines[0] == "/save needs the name of a file"
    assert lines[1].startswith("flashmoe: error: cannot save to ")
    assert session.out.getvalue() == "hello\n"


@pytest.mark.parametrize("error", [ReadError("the drive failed\nbadly"), ContextError("full")])
def test_an_error_during_an_answer_is_one_line_and_the_chat_goes_on(error: Exception):
    def fail_at_the_second_word(word: int) -> None:
        if word == 1:
            session.chat.during = lambda word: None
            raise error

    session = Session(EchoChat(fail_at_the_second_word))
    session.run("one two", "three")
    assert session.out.getvalue() == "one \nthree\n"
    assert "flashmoe: error: " + " ".join(str(error).split()) + "\n" in session.err.getvalue()
    assert session.recorded == [("one ", str(error)), ("three", None)]


def test_the_figures_of_an_earlier_answer_are_not_recorded_again_for_one_that_fails_before_it_begins():
    class Unwilling(EchoChat):
        def stream(self, message: str, *, cancel: Callable[[], bool]) -> Iterator[Piece]:
            if message == "no":
                raise ContextError("full")
            yield from super().stream(message, cancel=cancel)

    session = Session(Unwilling()).run("yes", "no")
    assert session.recorded == [("yes", None), ("", "full")]


def test_the_figures_are_complete_even_if_the_answer_cannot_be_written():
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    class Counting(EchoChat):
        def stream(self, message: str, *, cancel: Callable[[], bool]) -> Iterator[Piece]:
            try:
                yield from super().stream(message, cancel=cancel)
            finally:
                self.stats.text = "complete"

    session = Session(Counting(), Full()).run("one two")
    assert session.recorded == [("complete", "cannot write to stdout: No space left on device")]


def test_a_bug_is_not_swallowed():
    def bug(word: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Session(EchoChat(bug)).run("hello")


@pytest.mark.parametrize(
    ("reason", "note"),
    [
        ("context", "[context of 12 tokens is full; /reset starts afresh]\n"),
        ("length", "[stopped at the limit of 10 tokens]\n"),
        ("cancelled", "[stopped by Ctrl-C]\n"),
    ],
)
def test_an_answer_cut_short_says_why(reason: str, note: str):
    class Cut(EchoChat):
        def stream(self, message: str, *, cancel: Callable[[], bool]) -> Iterator[Piece]:
            yield Piece("some")
            self.stats = GenerationStats(prompt_tokens=3, decode_tokens=10, finish_reason=reason)

    assert note in Session(Cut()).run("hello").err.getvalue()


# Ctrl-C


def test_ctrl_c_stops_the_answer_and_keeps_the_chat():
    def press_once(word: int) -> None:
        if word == 1:
            session.chat.during = lambda word: None
            signal.raise_signal(signal.SIGINT)

    session = Session(EchoChat(press_once))
    session.run("one two three", "four")
    assert session.out.getvalue() == "one \nfour\n"
    assert "[stopped by Ctrl-C]" in session.err.getvalue()


def test_a_second_ctrl_c_within_an_answer_interrupts_whatever_runs():
    def press(word: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    session = Session(EchoChat(press))
    session.run("one two", "/help")  # the answer ends at once, the chat goes on
    assert session.recorded == [("", None)]
    assert (
        "[stopped]" in session.err.getvalue() and "/reset" in session.err.getvalue() + session.out.getvalue()
    )


def test_the_interrupt_handler_is_put_back_even_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), interruptible() as cancel:
        assert signal.getsignal(signal.SIGINT) is not before
        assert not cancel()
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


# The screen


def test_a_terminal_gets_no_character_that_it_would_obey():
    hostile = "a\x1b[2Jb\rc\x07d\x9b31me\u202ef\u2066g\x7fh"
    shown = "a[2Jbcd31mefgh"
    assert printable(hostile) == shown
    assert Session(out=Terminal()).run(hostile).out.getvalue() == shown + "\n"


def test_ordinary_text_of_any_language_passes():
    text = "tab\tline\nжук 猫 שלום 👩\u200d🚀 é"
    assert printable(text) == text


def test_a_pipe_gets_every_character():
    hostile = "a\x1b[2J\rb"
    assert Session().run(hostile).out.getvalue() == hostile + "\n"


def test_an_error_message_cannot_steer_the_terminal_either():
    err = Terminal()
    Screen(io.StringIO(), err).error(ContextError("bad tensor \x1b[31mname\nnext"))
    assert err.getvalue() == "flashmoe: error: bad tensor [31mname next\n"


def test_remarks_are_dim_on_a_terminal_only_and_not_under_no_color(monkeypatch: pytest.MonkeyPatch):
    def remark(err: io.StringIO) -> str:
        Screen(io.StringIO(), err).remark("8 tok/s")
        return err.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert remark(Terminal()) == "\x1b[2m8 tok/s\x1b[0m\n"
    assert remark(io.StringIO()) == "8 tok/s\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert remark(Terminal()) == "8 tok/s\n"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert remark(Terminal()) == "8 tok/s\n"


def test_quiet_leaves_out_remarks_and_nothing_else():
    out, err = io.StringIO(), io.StringIO()
    screen = Screen(out, err, quiet=True)
    screen.remark("8 tok/s")
    screen.say("said")
    screen.write("answer")
    screen.end_line()
    screen.end_line()
    assert (out.getvalue(), err.getvalue()) == ("answer\n", "said\n")


# The line editor


@contextmanager
def typed(keys: str, history: Path) -> Iterator[Callable[[], str]]:
    with create_pipe_input() as pipe:
        pipe.send_text(keys)
        screen = Screen(io.StringIO(), io.StringIO())
        yield open_prompt(history, screen, pipe, DummyOutput()).prompt


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ("hello\r", "hello"),
        ("one\x1b\rtwo\r", "one\ntwo"),
        ("one\\\rtwo\r", "one\ntwo"),
        ('"""one\rtwo"""\r', '"""one\ntwo"""'),
        ("\x1b[200~a \\\nb\x1b[201~\r", "a \\\nb"),
        ("wrld\x01\x1b[C\x1b[Co\x05!\r", "wrold!"),
    ],
    ids=["enter", "alt-enter", "backslash", "block", "a pasted backslash stays", "emacs keys"],
)
def test_the_editor_sends_a_message_of_one_or_several_lines(keys: str, text: str, tmp_path: Path):
    with typed(keys, tmp_path / "history") as prompt:
        assert prompt() == text


def test_ctrl_d_on_an_empty_line_is_the_end_and_ctrl_c_an_interrupt(tmp_path: Path):
    with typed("half a line\x03\x04", tmp_path / "history") as prompt:
        with pytest.raises(KeyboardInterrupt):
            prompt()
        with pytest.raises(EOFError):
            prompt()


def test_the_history_outlives_the_chat_and_is_the_users_alone(tmp_path: Path):
    history = tmp_path / "new folder" / "history"
    with typed("remember me\r", history) as prompt:
        prompt()
    with typed("\x1b[A\r", history) as prompt:
        assert prompt() == "remember me"
    if sys.platform != "win32":
        assert history.stat().st_mode & 0o077 == 0


def test_without_a_place_for_the_history_the_chat_works_all_the_same(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with typed("hello\r", tmp_path / "file" / "history") as prompt:
        assert prompt() == "hello"


# The whole, on a pseudo-terminal

# The new session's first terminal becomes the one whose Ctrl-C it gets.
START = """
import fcntl, runpy, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
runpy.run_module("flashmoe", run_name="__main__", alter_sys=True)
"""
DEADLINE_S = 60.0  # for a machine that is busy


class PseudoTerminal:
    """`flashmoe` at the other end of a terminal of 100 columns."""

    def __init__(self, arguments: list[str], state_folder: Path) -> None:
        import fcntl
        import pty
        import struct
        import termios

        self._fd, child_fd = pty.openpty()
        fcntl.ioctl(child_fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "HOME": str(state_folder)}
        environment["XDG_STATE_HOME"] = str(state_folder)
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *arguments],
            stdin=child_fd, stdout=child_fd, stderr=child_fd, start_new_session=True, env=environment,
        )  # fmt: skip
        os.close(child_fd)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._seen = ""

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def wait_for(self, expected: str) -> str:
        """What came until `expected`; what follows it is left for the next call."""
        deadline_s = time.monotonic() + DEADLINE_S
        while expected not in self._seen:
            ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline_s - time.monotonic()))
            assert ready, f"{expected!r} did not come; the screen has {self._seen!r}"
            self._seen += self._decoder.decode(self._read())
        before, _, self._seen = self._seen.partition(expected)
        return before

    def _read(self) -> bytes:
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            data = b""
        assert data, f"flashmoe left; the screen has {self._seen!r}"
        return data

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)


def beginning_of_the_answer(model: Path, message: str) -> str:
    """As a terminal shows it."""
    with LLM(model, ram_budget="8G") as llm:
        pieces = (printable(piece.text) for piece in llm.chat().stream(message, max_tokens=50))
        return "".join(islice((text for text in pieces if text.strip()), 4)).replace("\n", "\r\n")


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are a POSIX thing")
def test_a_chat_on_a_terminal_survives_ctrl_c_and_ends_with_ctrl_d(tiny_model: Path, tmp_path: Path):
    answer = beginning_of_the_answer(tiny_model, "first")
    stats_file = tmp_path / "stats.jsonl"
    terminal = PseudoTerminal(
        ["run", "--model", str(tiny_model), "--ram-budget", "2G", "--max-tokens", "400",
         "--stats-json", str(stats_file)],
        tmp_path,
    )  # fmt: skip
    try:
        plan = terminal.wait_for(">>>")
        assert "expert slots" in plan
        assert "Ctrl-D leaves" in plan
        terminal.type("first\r")
        terminal.wait_for(answer)
        terminal.type("\x03")
        terminal.wait_for("[stopped by Ctrl-C]")
        terminal.wait_for(" tok/s")
        terminal.wait_for(">>>")
        terminal.type("second\r")
        terminal.wait_for("[stopped at the limit of 400 tokens]")
        terminal.wait_for(">>>")
        terminal.type("/stats\r")
        terminal.wait_for("from the KV cache")
        terminal.wait_for(">>>")
        terminal.type("\x04")
        assert terminal.process.wait(DEADLINE_S) == 0
    finally:
        terminal.close()
    first, second = (json.loads(line) for line in stats_file.read_text("utf-8").splitlines())
    assert first["finish_reason"] == "cancelled"
    assert 0 < first["decode_tokens"] < 400
    assert second["decode_tokens"] == 400
    assert second["cached_tokens"] >= first["prompt_tokens"]
    assert (tmp_path / "flashmoe" / "chat_history").read_text("utf-8").count("first") == 1
