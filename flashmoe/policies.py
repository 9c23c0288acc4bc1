"""A policy from what the user wrote: a name, or `learned:FILE` for a policy file of their own.

The leaf package knows no files; this is where a name meets one. Imports no torch.
"""

from pathlib import Path

from cache_policies.learned import Learned
from cache_policies.policy import CachePolicy, Geometry
from cache_policies.registry import POLICY_NAMES, REPLAY_NAMES, make_policy
from cache_policies.routing_trace import RoutingTrace
from flashmoe.errors import ConfigError
from flashmoe.policy_file import read_policy

LIVE_NAMES = (*POLICY_NAMES, Learned.name)
# "paper" is left out: its network needs weights that somebody trained on the very same layers.
COMPARED_NAMES = (*LIVE_NAMES, *(name for name in REPLAY_NAMES if name not in (*POLICY_NAMES, "paper")))


def check_policy(written: str, known: tuple[str, ...] = LIVE_NAMES) -> None:
    """ConfigError for an unknown name, or a file given to a policy that takes none."""
    name, colon, file = written.partition(":")
    if name not in known:
        raise ConfigError(f"unknown policy {name!r}; known are {', '.join(known)}")
    if colon and (name != Learned.name or not file):
        raise ConfigError(f"policy {written!r}: only learned takes a file, as in learned:my-policy.txt")


def build_policy(
    written: str, geometry: Geometry, seed: int = 0, trace: RoutingTrace | None = None
) -> CachePolicy:
    """A fresh policy. `trace`: what it will be replayed on, for belady. PolicyError for a bad file."""
    check_policy(written, (*LIVE_NAMES, *COMPARED_NAMES))
    name, _, file = written.partition(":")
    if name == Learned.name:
        return Learned(geometry, read_policy(Path(file).expanduser() if file else None))
    return make_policy(name, geometry, seed=seed, trace=trace)


def policy_bytes(written: str, geometry: Geometry) -> int:
    """Memory that the policy will take beside the interpreter, as far as it is worth counting."""
    return Learned.memory_bytes(geometry) if written.partition(":")[0] == Learned.name else 0
