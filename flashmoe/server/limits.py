"""What one client may ask for, in one place. Tests make them small."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes as int, time in seconds."""

    body_bytes: int = 4 << 20
    bodies_bytes: int = 16 << 20  # of all requests under way; above it, only small bodies are taken
    small_bytes: int = 64 << 10
    body_s: float = 30.0  # to send a body
    header_s: float = 10.0  # to send a request's head
    idle_s: float = 30.0  # an open connection without a request
    send_s: float = 60.0  # a reader who takes nothing for so long is gone
    ping_s: float = 15.0  # a stream that has nothing to say yet says so this often
    connections: int = 512
    unread_pieces: int = 4096  # of one answer, waiting for a reader; about one context


# Values in a request; in schemas.py these are part of the published API description.
MOST_CHOICES = 8
MOST_STOPS = 16
LONGEST_STOP = 256
MOST_TOOLS = 128
MOST_MESSAGES = 4096
MOST_ANSWERS = 16  # of one request, prompts x n: it should not fill the queue alone
MOST_LOGPROBS = 20
CHARACTERS_PER_TOKEN = 64  # a prompt with more characters for each token of context is refused unread
