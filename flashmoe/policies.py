"""A policy from what the user wrote: a name, or `learned:FILE` for a policy file of their own.

The leaf package knows no files; this is where a name meets one. Imports no torch.
"""

from pathlib import Path

from cache_policies.learned import Learned
from cache_policies.native._learned import Trees
from cache_policies.policy import CachePolicy, Geometry
from cache_policies.registry import POLICY_NAMES, REPLAY_NAMES, make_policy
from cache_policies.routing_trace import RoutingTrace
from flashmoe.errors import ConfigError, PolicyError
from flashmoe.policy_file import read_policy

LIVE_NAMES = (*POLICY_NAMES, Learned.name)
# "paper" is left out: its network needs weights that somebody trained on the very same layers.
COMPARED_NAMES = (*LIVE_NAMES, *(name for name in REPLAY_NAMES if name not in (*POLICY_NAMES, "paper")))
# What the learned policy may hold: 61 layers of 512 experts take 50 MB, a trace that lies terabytes.
LARGEST_LEARNED_BYTES = 1 << 30


def check_policy(written: str, known: tuple[str, ...] = LIVE_NAMES) -> None:
    """ConfigError for an unknown name, or a file given to a policy that takes none; PolicyError for a bad
    file, now and not when the weights have been loaded."""
    name, colon, file = written.partition(":")
    if name not in known:
        raise ConfigError(f"unknown policy {name!r}; known are {', '.join(known)}")
    if colon and (name != Learned.name or not file):
        raise ConfigError(f"policy {written!r}: only learned takes a file, as in learned:my-policy.txt")
    if file:
        _read_trees(file)


def build_policy(
    written: str, geometry: Geometry, seed: int = 0, trace: RoutingTrace | None = None
) -> CachePolicy:
    """A fresh policy. `trace`: what it will be replayed on, for belady. PolicyError for a bad file, or more
    experts than the learned policy has room for."""
    check_policy(written, COMPARED_NAMES)
    name, _, file = written.partition(":")
    if name == Learned.name:
        check_learned_size(geometry.layers, geometry.experts, geometry.top_k)
        return Learned(geometry, _read_trees(file))
    return make_policy(name, geometry, seed=seed, trace=trace)


def check_learned_size(layers: int, experts: int, top_k: int) -> None:
    """PolicyError where the learned policy would take absurd memory, which `experts` squared decide."""
    needed = Learned.memory_bytes(Geometry(layers, experts, top_k, top_k))
    if needed > LARGEST_LEARNED_BYTES:
        raise PolicyError(
            f"policy learned would take {needed >> 20} MiB for {layers} layers of {experts} experts; the"
            f" limit is {LARGEST_LEARNED_BYTES >> 20} MiB: try another policy"
        )


def _read_trees(file: str) -> Trees:
    """Of the user's file, or the shipped ones where there is none."""
    try:
        return read_policy(Path(file).expanduser() if file else None)
    except RuntimeError as error:  # of expanduser: no such user
        raise PolicyError(f"policy learned:{file}: {error}") from error


def policy_bytes(written: str, geometry: Geometry) -> int:
    """Memory that the policy will take beside the interpreter, as far as it is worth counting."""
    return Learned.memory_bytes(geometry) if written.partition(":")[0] == Learned.name else 0
