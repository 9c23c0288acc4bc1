"""Where text goes: the answer to stdout, everything else to stderr.

What a model, a file or an error message says may hold characters that a terminal obeys instead of showing; on
their way to a terminal they are taken out. Into a pipe or a file goes every character as it is, in UTF-8.
"""

import io
import os
from typing import TextIO

from storage.storage_errors import StorageError

# C0 and C1 controls but tab and newline, DEL, and the marks that reorder a line so that it reads as something
# else than it is (CVE-2021-42574); right-to-left text itself needs none of them.
_OBEYED = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_UNPRINTABLE = dict.fromkeys(code for code in _OBEYED if chr(code) not in "\t\n")


def printable(text: str) -> str:
    """`text` without what a terminal would obey."""
    return text.translate(_UNPRINTABLE)


def one_line(error: Exception) -> str:
    """An error's text as the user sees it."""
    return " ".join(f"flashmoe: error: {error}".split())


class Screen:
    """The two streams of a command. Raises StorageError when stdout takes nothing, as on a full disk."""

    def __init__(self, out: TextIO, err: TextIO, quiet: bool = False) -> None:
        """`quiet`: no remarks."""
        self._out, self._err, self._quiet = out, err, quiet
        self._out_is_terminal, self._err_is_terminal = out.isatty(), err.isatty()
        plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
        self._dim = ("\x1b[2m", "\x1b[0m") if self._err_is_terminal and not plain else ("", "")
        self._line_is_open = False
        for stream, is_terminal in ((out, self._out_is_terminal), (err, self._err_is_terminal)):
            if isinstance(stream, io.TextIOWrapper):
                if is_terminal:
                    stream.reconfigure(errors="replace")
                else:
                    stream.reconfigure(encoding="utf-8", errors="replace", newline="\n")

    def write(self, text: str) -> None:
        """A piece of the answer, seen at once."""
        text = printable(text) if self._out_is_terminal else text
        if not text:
            return
        try:
            self._out.write(text)
            self._out.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise StorageError(f"cannot write to stdout: {error.strerror}") from error
        self._line_is_open = not text.endswith("\n")

    def end_line(self) -> None:
        """Finish the answer's last line, if it is not finished already."""
        if self._line_is_open:
            self.write("\n")

    def say(self, text: str) -> None:
        """Lines that were asked for or must be seen."""
        self._to_err(text, ("", ""))

    def remark(self, text: str) -> None:
        """Lines that are good to know: dim on a terminal, left out when quiet."""
        if not self._quiet:
            self._to_err(text, self._dim)

    def error(self, error: Exception) -> None:
        self.say(one_line(error))

    def _to_err(self, text: str, style: tuple[str, str]) -> None:
        text = printable(text) if self._err_is_terminal else text
        self._err.write(f"{style[0]}{text}{style[1]}\n")
        self._err.flush()
