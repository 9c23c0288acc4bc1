"""Text for benchmarks, ours or a file's, as tokens. Real text, since random ids route unnaturally."""

import json
from collections.abc import Sequence
from pathlib import Path

from flashmoe.errors import ConfigError
from flashmoe.tokenizer import Tokenizer

PROMPTS_BYTES_LIMIT = 64 << 20


class TokenText:
    """Text as an endless supply of tokens: each `take` goes on where the last one ended, and wraps around."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self._begin = tokenizer.encode(
            "", add_special_tokens=True
        )  # the begin-of-text token, if there is one
        self._ids = [token for text in texts for token in tokenizer.encode(text)]
        if not self._ids:
            raise ConfigError(
                "the prompts for the benchmark are empty; give --prompts a file with text in it"
            )
        self._at = 0

    def take(self, count: int) -> list[int]:
        """`count` tokens, beginning as the model expects a text to begin."""
        body = max(0, count - len(self._begin))
        taken = [self._ids[(self._at + i) % len(self._ids)] for i in range(body)]
        self._at = (self._at + body) % len(self._ids)
        return (self._begin + taken)[:count]


def read_prompts(path: Path) -> list[str]:
    """The texts of a file: of a .jsonl those of each line (a string, or an object with `prompt`, `text` or
    `turns`), of any other file the whole. ConfigError says what cannot be used.
    """
    try:
        if path.stat().st_size > PROMPTS_BYTES_LIMIT:
            raise ConfigError(
                f"{path} has {path.stat().st_size} bytes; prompts may have {PROMPTS_BYTES_LIMIT}"
            )
        content = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read prompts from {path}: {error}") from error
    if path.suffix != ".jsonl":
        return [content]
    return [
        text
        for number, line in enumerate(content.split("\n"), 1)
        if line.strip()
        for text in _texts_of_line(line, f"{path}, line {number}")
    ]


def _texts_of_line(line: str, place: str) -> list[str]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON: {error}") from error
    if isinstance(value, dict):
        value = next((value[key] for key in ("prompt", "text", "turns") if key in value), None)
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(
            f"{place} has no text; each line is a string or an object with prompt, text or turns"
        )
    return texts


BUILT_IN_TEXT = """\
The ferry to the island leaves twice a day in summer and once in winter, and the man who sells the tickets \
knows everybody who buys one. He has a stove, a radio and a dog that sleeps under the counter. When the \
wind comes from the north he hangs a red flag outside, which means that the boat will sail but that nobody \
should complain afterwards.

On the crossing there is not much to see. The coast turns grey, then blue, and then it is gone. Children \
run from one side to the other because somebody said that there were seals. An old woman unpacks bread and \
cheese, cuts both with a pocket knife, and offers a piece to the student beside her, who has been reading \
the same page for half an hour.

"Are you going to the school?" she asks.

"To the weather station," he says. "They need someone to look after the instruments until spring. I have \
never done it before, but it is mostly writing down numbers, as far as I understand."

"My brother did that for eleven years. He said the numbers were the easy part. The hard part was to go out \
and read them at three in the morning, when you know already what they will be."

What does a weather station measure? There are five things at least: the temperature of the air, its \
pressure, how damp it is, how fast the wind blows and from where, and how much rain has fallen since \
somebody last looked. Each of them has an instrument of its own, and each instrument has its own way of \
being wrong. A thermometer in the sun measures the sun. A rain gauge under a tree measures the tree. The \
cups of an anemometer freeze, and then it reports a calm in the middle of a storm. Whoever compares the \
readings of many years must therefore know not only the readings but also where the box stood, who painted \
it, and when the hedge behind it was cut.

The rule for the pressure is simple enough. Near the sea it falls by about one hectopascal for every eight \
metres that you climb, so a barometer carried up a church tower of forty metres shows five less at the top \
than at the door. If it shows eight less, either the tower is higher than the guide book says or the \
weather has changed while you were climbing the stairs. To find out which, go down again and look.

The student learned all of this in a week. In the second week he made a table, because he was tired of \
adding things up by hand, and in the third he wrote a small program for the old computer in the office:

    total = 0.0
    for day in days:
        if day.rain is None:
            missing.append(day)
            continue
        total += day.rain
    print("rain this month:", round(total, 1), "mm,", len(missing), "days missing")

It worked, apart from the first of January, which it counted twice. He found the reason after two \
evenings: the file of December went on until midnight, and the file of January began at midnight, and \
midnight was in both. He corrected it, wrote a line in the log so that the next one would not have to \
search, and slept well.

In February the ferry did not come for nine days. They ate potatoes, then beans, then the chocolate that \
had been kept for the visitors. On the tenth morning the sea was flat and the sky had the colour of the \
inside of a shell. From the hill he saw the boat when it was still no larger than a grain of rice, and he \
walked down to the pier with everyone else, although there was nothing in the mail for him and nobody on \
board whom he knew. The ticket seller's dog jumped ashore first. Behind it came six sacks of flour, a new \
tyre for the doctor's car, a piano in a wooden crate, and a girl with a notebook, who asked the first \
person she met where the weather station was.

"That depends," he said. "Do you mind getting up at three?"

She laughed and said that she had come to write about birds. There were, according to her list, forty-one \
kinds on the island in an ordinary spring, and she meant to count them all. So for a month there were two \
people on the hill before sunrise, one who wrote down what the wind did and one who wrote down what the \
birds did about it. They compared their pages at breakfast. When the pressure fell by more than three in a \
night, the geese stayed on the water; when it rose, they left before the clouds did. Neither of them \
thought that this was a discovery, but it was a good thing to know, and it was true eleven times out of \
twelve.
"""
