"""Which token ids the model itself chose for a conversation's text.

Encoding the text of an answer anew need not give the ids it was generated as, and then keys and values behind
the first difference would be lost. So what was generated is kept, text and ids, for the next turn. It is used
only where a special token stands at its end: in the middle of a word, one request's ids would decide what
another one is answered.
"""

import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from flashmoe.tokenizer import Tokenizer


class ConversationIds:
    """The texts seen last, bounded in number and characters; for any thread."""

    def __init__(
        self, tokenizer: Tokenizer, add_special_tokens: bool, most: int = 256, most_characters: int = 1 << 20
    ) -> None:
        self._tokenizer, self._add_special_tokens = tokenizer, add_special_tokens
        self._most, self._most_characters = most, most_characters
        # Least recently used first. Arrays: as Python's ints, ids would take nine times the memory.
        self._known: OrderedDict[str, array[int]] = OrderedDict()
        self._characters = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with those of the longest text known that it begins with, up to a special
        token."""
        with self._lock:
            known = max((k for k in self._known if self._ends_in(text, k)), key=len, default=None)
            begin = None if known is None else self._known[known]
            if known is not None:
                self._known.move_to_end(known)
        if known is None or begin is None:
            return self._tokenizer.encode(text, add_special_tokens=self._add_special_tokens)
        # With the special token before it: some tokenizers take what begins a text otherwise.
        before = self._tokenizer.special_tokens.get(begin[-1], "")
        behind = self._tokenizer.encode(before + text[len(known) :])
        return [*begin, *(behind[1:] if before else behind)]

    def _ends_in(self, text: str, known: str) -> bool:
        """Whether `text` begins with `known`, and a special token is on either side of its end."""
        if not text.startswith(known):
            return False
        special = self._tokenizer.special_tokens
        return self._known[known][-1] in special or text.startswith(tuple(special.values()), len(known))

    def remember(self, prompt_text: str, prompt: Sequence[int], generated: Sequence[int]) -> None:
        """An answer has ended."""
        if not generated:
            return
        text = prompt_text + self._tokenizer.decode(generated, skip_special_tokens=False)
        if len(text) > self._most_characters:
            return
        with self._lock:
            self._forget(text)
            self._known[text] = array("i", (*prompt, *generated))
            self._characters += len(text)
            while len(self._known) > self._most or self._characters > self._most_characters:
                self._forget(next(iter(self._known)))

    def _forget(self, text: str) -> None:
        if self._known.pop(text, None) is not None:
            self._characters -= len(text)
