"""What a generation cost: the figures every run reports, and the bound they are held against."""

from dataclasses import asdict, dataclass, field
from typing import Any

from flashmoe.sizes import format_bytes


@dataclass(slots=True)
class TokenStats:
    """One generated token and the step that produced it: seconds, and bytes read for experts."""

    token_id: int
    text: str
    time_s: float
    stall_s: float
    hits: int
    misses: int
    bytes_read: int


@dataclass(slots=True)
class GenerationStats:
    """One generation. `hits`, `misses`, `expert_bytes_read` and `stall_s` cover prefill and decode together.

    A hit or miss is one expert of one event: in prefill an event is a layer and a chunk, in decode a layer
    and a token. The bound is that of the decode steps: max(time computing, bytes missed / drive speed).
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in the KV cache
    prefill_tokens: int = 0  # of the prompt, run now
    decode_tokens: int = 0
    decode_steps: int = 0  # forward passes of one token: the first token comes out of prefill
    prefill_s: float = 0.0
    decode_s: float = 0.0
    time_to_first_token_s: float = 0.0
    hits: int = 0
    misses: int = 0
    expert_bytes_read: int = 0
    stall_s: float = 0.0
    read_s: float = 0.0  # time with at least one read in flight
    decode_hits: int = 0
    decode_misses: int = 0
    decode_bytes_read: int = 0
    decode_stall_s: float = 0.0
    drive_mb_per_s: float = 0.0  # as probed at start, MB = 10^6 bytes
    peak_rss_bytes: int = 0
    rss_bytes: int = 0
    ram_budget_bytes: int = 0
    policy: str = ""
    policy_summary: str = ""
    reader: str = ""
    # Guesses; one that was right is among the misses all the same.
    prefetch: str = "off"  # what was done, for people
    prefetch_issued: int = 0
    prefetch_hits: int = 0  # had arrived when asked for
    prefetch_late: int = 0  # were being read when asked for
    prefetch_wasted: int = 0  # had arrived and were not asked for
    prefetch_cancelled: int = 0
    prefetch_failed: int = 0
    prefetch_bytes_wasted: int = 0
    tokens: list[TokenStats] = field(default_factory=list)

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_steps / self.decode_s if self.decode_s else 0.0

    @property
    def hit_rate(self) -> float:
        return _share(self.hits, self.misses)

    @property
    def decode_hit_rate(self) -> float:
        return _share(self.decode_hits, self.decode_misses)

    @property
    def bytes_per_token(self) -> float:
        """Expert bytes read for one decode step."""
        return self.decode_bytes_read / self.decode_steps if self.decode_steps else 0.0

    @property
    def read_mb_per_s(self) -> float:
        """How fast the drive delivered while it was asked, MB/s."""
        return self.expert_bytes_read / self.read_s / 1e6 if self.read_s else 0.0

    @property
    def bound_tokens_per_s(self) -> float:
        """Decode speed if reading and computing overlapped perfectly: steps / max(compute, bytes / drive
        speed).

        The drive's speed is the probed one, or what it delivered in this generation if that was more.
        """
        drive = max(self.drive_mb_per_s, self.read_mb_per_s)
        least_s = bound_s(self.decode_s - self.decode_stall_s, self.decode_bytes_read, drive)
        return self.decode_steps / least_s if least_s > 0 else 0.0

    def as_dict(self, per_token: bool = False) -> dict[str, Any]:
        """For programs: fields and derived figures; `tokens` only when asked for."""
        values = asdict(self)
        if not per_token:
            del values["tokens"]
        for name in (
            "prefill_tokens_per_s", "decode_tokens_per_s", "hit_rate", "decode_hit_rate", "bytes_per_token",
            "read_mb_per_s", "bound_tokens_per_s",
        ):  # fmt: skip
            values[name] = getattr(self, name)
        return values

    def line(self) -> str:
        """The line after an answer."""
        stall = self.decode_stall_s / self.decode_s if self.decode_s else 0.0
        return (
            f"{self.decode_tokens_per_s:.1f} tok/s · hit rate {self.decode_hit_rate:.1%}"
            f" · {self.bytes_per_token / 1e6:.0f} MB read/token · stall {stall:.0%}"
            f" · RSS {format_bytes(self.rss_bytes)} of {format_bytes(self.ram_budget_bytes)}"
        )

    def __str__(self) -> str:
        return "\n".join(f"{name:<18}{value}" for name, value in self.rows())

    def rows(self) -> list[tuple[str, str]]:
        """(figure, value) for people."""
        return [
            ("prompt", f"{self.prompt_tokens} tokens, {self.cached_tokens} of them from the KV cache"),
            ("prefill", f"{self.prefill_tokens_per_s:.1f} tok/s,"
                        f" first token after {self.time_to_first_token_s:.2f} s"),
            ("decode", f"{self.decode_tokens} tokens, {self.decode_tokens_per_s:.2f} tok/s"
                       f" (bound {self.bound_tokens_per_s:.2f})"),
            ("hit rate", f"{self.decode_hit_rate:.1%} in decode ({self.decode_hits} hits,"
                         f" {self.decode_misses} misses), {self.hit_rate:.1%} with prefill"),
            ("read", f"{self.bytes_per_token / 1e6:.1f} MB a token,"
                     f" {self.expert_bytes_read / 1e6:.0f} MB in all,"
                     f" at {self.read_mb_per_s:.0f} MB/s (probed: {self.drive_mb_per_s:.0f}, {self.reader})"),
            ("stall", f"{self.stall_s:.2f} s waiting for reads, {self.decode_stall_s:.2f} s of it in decode"),
            ("memory", f"RSS {format_bytes(self.rss_bytes)}, peak {format_bytes(self.peak_rss_bytes)}"
                       f" of {format_bytes(self.ram_budget_bytes)}"),
            ("policy", self.policy_summary or self.policy),
            ("prefetch", self._prefetch_text()),
        ]  # fmt: skip

    def _prefetch_text(self) -> str:
        if not self.prefetch_issued:
            return self.prefetch
        return (
            f"{self.prefetch}; {self.prefetch_issued} guesses, {self.prefetch_hits} in time,"
            f" {self.prefetch_late} late, {self.prefetch_bytes_wasted / 1e6:.0f} MB in vain"
        )


def bound_s(compute_s: float, bytes_read: int, drive_mb_per_s: float) -> float:
    """The least time for this much computing and reading, if they overlapped perfectly."""
    return max(compute_s, bytes_read / (drive_mb_per_s * 1e6) if drive_mb_per_s else 0.0)


def _share(hits: int, misses: int) -> float:
    return hits / (hits + misses) if hits + misses else 0.0
