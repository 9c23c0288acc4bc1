"""The chat's line editor: Emacs keys, several lines, a history.

Loads prompt_toolkit only when a prompt is opened.
"""

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from flashmoe.screen import Screen

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.input import Input
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import Output

BLOCK = '"""'


def wants_more(text: str) -> bool:
    """A block of lines has been opened and not closed."""
    opened = text.lstrip()
    return opened.startswith(BLOCK) and BLOCK not in opened[len(BLOCK) :]


def parse_message(text: str) -> str:
    """What was typed without surrounding blanks and block quotes."""
    text = text.strip()
    if not text.startswith(BLOCK):
        return text
    block, _, rest = text[len(BLOCK) :].partition(BLOCK)
    return (block + rest).strip()


def open_prompt(
    history_file: Path, screen: Screen, input: "Input | None" = None, output: "Output | None" = None
) -> "PromptSession[str]":
    """A line editor with Emacs keys, several lines and a history in `history_file`; its `prompt()` reads.

    `input` and `output` stand in for the terminal; the prompt goes to stderr where stdout is none.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.output import create_output

    class KeptHistory(FileHistory):
        """A full disk costs the history, not the chat."""

        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):
                super().store_string(string)

    history: History
    try:
        history_file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(history_file, os.O_CREAT | os.O_WRONLY, 0o600))  # what people ask is theirs alone
        history = KeptHistory(str(history_file))
    except OSError as error:
        screen.say(f"warning: no history kept: {error}")
        history = InMemoryHistory()
    return PromptSession(
        ">>> ",
        multiline=True,
        prompt_continuation=lambda width, line, wraps: "    " if wraps else "... ",
        key_bindings=_key_bindings(),
        history=history,
        input=input,
        output=output or create_output(always_prefer_tty=True),
    )


def _key_bindings() -> "KeyBindings":
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def send_or_continue(event: "KeyPressEvent") -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif wants_more(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def another_line(event: "KeyPressEvent") -> None:
        event.current_buffer.insert_text("\n")

    return bindings
