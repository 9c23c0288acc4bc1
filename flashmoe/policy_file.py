"""Files of the learned policy: LightGBM's text format, checked before a number of it is used.

LightGBM itself reads such files fast but trusts them. Ours may come from a stranger, and starting a chat
should not load a training library: so the few lines that trees need are parsed here. A file is bound to the
features of `cache_policies.learned` by their names.
"""

import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import numpy as np

from cache_policies.learned import FEATURE_NAMES
from cache_policies.native._learned import Trees
from flashmoe.errors import PolicyError

LARGEST_FILE_BYTES = 16 << 20
MOST_NODES = 1 << 18
_NO_POLICY = "is not a LightGBM text file; make one with flashmoe train-policy"
_CATEGORICAL, _DEFAULT_LEFT, _MISSING_SHIFT = 1, 2, 2
_MISSING_NONE, _MISSING_NAN = 0, 2


def shipped_policy() -> str:
    """The text of the policy that comes with the package."""
    return files("flashmoe").joinpath("data", "learned_policy.txt").read_text("ascii")


def read_policy(path: Path | None = None) -> Trees:
    """The trees of a file, or of the shipped policy; PolicyError says what is wrong with which file."""
    if path is None:
        return parse_policy(shipped_policy(), "the shipped policy")
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE_BYTES:
            raise PolicyError(f"{path} has {size} bytes; a policy has at most {LARGEST_FILE_BYTES}")
        text = path.read_text("ascii")
    except OSError as error:
        raise PolicyError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PolicyError(f"{path} {_NO_POLICY}") from error
    return parse_policy(text, str(path))


def parse_policy(text: str, name: str) -> Trees:
    """Trees from LightGBM's text; `name` stands in the error."""
    head, *sections = text.split("\nTree=")
    if not head.startswith("tree\n"):
        raise PolicyError(f"{name} {_NO_POLICY}")
    fields = _fields(head)
    features = tuple(fields.get("feature_names", "").split())
    if features != FEATURE_NAMES:
        raise PolicyError(
            f"{name} was trained on {len(features)} other features than the {len(FEATURE_NAMES)} of this"
            " version; train it again with flashmoe train-policy"
        )
    objective = fields.get("objective", "")[:40]
    if objective != "regression" or "average_output" in head.splitlines():
        raise PolicyError(f"{name} has objective {objective!r}; a policy foretells distances by regression")
    parser = _TreeParser(name)
    for section in sections:
        parser.add(_fields(section.split("\nend of trees")[0]))
    if not sections:
        raise PolicyError(f"{name} holds no tree; train it again with flashmoe train-policy")
    try:
        return parser.trees()
    except (ValueError, OverflowError) as error:
        raise PolicyError(f"{name} is damaged: {error}") from error


def _fields(section: str) -> dict[str, str]:
    pairs = (line.partition("=") for line in section.splitlines() if "=" in line)
    return {key: value for key, _, value in pairs}


class _TreeParser:
    """Collects trees into flat arrays, numbering nodes and leaves through all of them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._roots: list[int] = []
        self._feature: list[int] = []
        self._threshold: list[float] = []
        self._left: list[int] = []
        self._right: list[int] = []
        self._unknown_left: list[bool] = []
        self._leaves: list[float] = []

    def add(self, fields: Mapping[str, str]) -> None:
        leaves = self._numbers(fields, "leaf_value", None)
        nodes = len(leaves) - 1
        if not leaves or len(self._feature) + nodes > MOST_NODES:
            raise PolicyError(f"{self._name} has a tree without leaves or more than {MOST_NODES} nodes")
        if fields.get("num_cat", "0") != "0" or fields.get("is_linear", "0") != "0":
            raise PolicyError(f"{self._name} has categorical or linear trees; ours are numerical")
        node_base, leaf_base = len(self._feature), len(self._leaves)
        self._leaves += leaves
        if nodes == 0:
            self._roots.append(~leaf_base)
            return
        self._roots.append(node_base)
        feature, decision, threshold, left, right = (
            self._numbers(fields, key, nodes)
            for key in ("split_feature", "decision_type", "threshold", "left_child", "right_child")
        )
        for i in range(nodes):
            self._feature.append(self._whole(feature[i]))
            self._threshold.append(_float32_at_most(threshold[i]))
            self._unknown_left.append(self._unknown_goes_left(self._whole(decision[i]), threshold[i]))
            for child, children in ((left[i], self._left), (right[i], self._right)):
                number = self._whole(child)
                if not -len(leaves) <= number < nodes:
                    raise PolicyError(f"{self._name} is damaged: a tree has no child {number}")
                children.append(number + node_base if number >= 0 else number - leaf_base)

    def trees(self) -> Trees:
        return Trees(
            self._roots, self._feature, self._threshold, self._left, self._right, self._unknown_left,
            self._leaves,
        )  # fmt: skip

    def _numbers(self, fields: Mapping[str, str], key: str, count: int | None) -> list[float]:
        try:
            numbers = [float(word) for word in fields[key].split()]
        except (KeyError, ValueError) as error:
            raise PolicyError(f"{self._name} is damaged: a tree's {key} is missing or no number") from error
        if count is not None and len(numbers) != count:
            raise PolicyError(f"{self._name} is damaged: {len(numbers)} {key} for {count} nodes")
        if not all(map(math.isfinite, numbers)):
            raise PolicyError(f"{self._name} is damaged: a tree's {key} is not finite")
        return numbers

    def _whole(self, number: float) -> int:
        if number != int(number) or abs(number) > MOST_NODES:
            raise PolicyError(f"{self._name} is damaged: {number} is not the number of a node or feature")
        return int(number)

    def _unknown_goes_left(self, decision: int, threshold: float) -> bool:
        missing = decision >> _MISSING_SHIFT & 3
        if decision & _CATEGORICAL or missing not in (_MISSING_NONE, _MISSING_NAN):
            raise PolicyError(f"{self._name} has splits of type {decision}; ours are numerical")
        if missing == _MISSING_NAN:
            return bool(decision & _DEFAULT_LEFT)
        return threshold >= 0  # LightGBM takes a NaN for 0 where the training data had none


def _float32_at_most(value: float) -> float:
    """The largest float32 not above `value`: float32 features fall on the same side of both."""
    with np.errstate(over="ignore"):
        rounded = np.float32(value)
    if float(rounded) > value:
        rounded = np.nextafter(rounded, np.float32(-np.inf))
    return float(rounded)
