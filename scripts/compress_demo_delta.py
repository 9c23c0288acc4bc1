"""Make the compact difference file that the package carries from the original fp16 one.

    python scripts/compress_demo_delta.py ORIGINAL flashmoe/demo_model/smolmoe-delta.safetensors

The low-rank factors become int8 with one float32 scale for each rank, the router keeps its bf16 in 12 bits,
the experts' neurons become a bitmap, norms stay fp16; `flashmoe/demo_model/delta.py` has the format. Prints
what each part lost and the new file's SHA-256, which `flashmoe/demo_model/build.py` must name.
`scripts/check_demo_model.py` measures what the model lost.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from flashmoe.demo_model.delta import Delta
from flashmoe.demo_model.gguf_base import Float32
from flashmoe.demo_model.weights import to_bf16

FFN_NEURONS = 1536
LIMIT_BYTES = 16 * 10**6
Arrays = dict[str, NDArray[Any]]


def compress(tensors: Arrays) -> Arrays:
    """The compact form of the original's tensors, as `flashmoe.demo_model.delta.Delta` reads it."""
    compact: Arrays = {}
    for name, values in tensors.items():
        if name == "idx":
            compact["idx.bitmap"] = bitmap(values)
        elif name == "router":
            compact |= twelve_bits(to_bf16(values.astype(np.float32)))
        elif name.endswith(("A", "B")):  # A [.., R, in] and B [.., out, R]: the long axis shares a scale
            axis = -1 if name.endswith("A") else -2
            compact[name], compact[f"{name}.scale"] = quantise(values.astype(np.float32), axis)
        else:
            compact[name] = values
    return compact


def quantise(values: Float32, axis: int) -> tuple[NDArray[np.int8], Float32]:
    """Symmetric int8: values ≈ int8 x scale, with a float32 scale that keeps `axis` at length 1."""
    largest = np.abs(values).max(axis=axis, keepdims=True)
    scale = np.maximum(largest, np.finfo(np.float32).tiny) / np.float32(127)
    return np.rint(values / scale).astype(np.int8), scale


def twelve_bits(router: NDArray[np.uint16]) -> Arrays:
    """bf16 bits [L, E, D] in 12 bits each: the low byte, and the high byte's place among the 16 commonest.

    A value with a rarer high byte is below 2**-15; it becomes the palette's smallest value of its sign.
    """
    high, low = (router >> 8).astype(np.uint8), (router & 0xFF).astype(np.uint8)
    counts = np.bincount(high.ravel(), minlength=256)
    palette = np.sort(np.argsort(-counts, kind="stable")[:16]).astype(np.uint8)
    rare = ~np.isin(high, palette)
    signs = high[rare] >> 7
    high[rare] = np.array([palette[palette >> 7 == sign].min() for sign in (0, 1)], np.uint8)[signs]
    low[rare] = 0
    places = np.searchsorted(palette, high).astype(np.uint8)
    packed = places[..., 0::2] << 4 | places[..., 1::2]
    return {"router.low": low, "router.high": packed, "router.palette": palette}


def bitmap(ids: NDArray[np.int16]) -> NDArray[np.uint8]:
    """Strictly ascending neuron ids [L, E, W] as bits [L, E, FFN_NEURONS / 8]."""
    if not (np.diff(ids, axis=-1) > 0).all():
        raise SystemExit("idx is not strictly ascending, which a bitmap cannot express")
    member = np.zeros((*ids.shape[:2], FFN_NEURONS), np.uint8)
    np.put_along_axis(member, ids.astype(np.int64), 1, axis=-1)
    return np.packbits(member, axis=-1)


def relative_error(original: Delta, compact: Delta, name: str) -> float:
    """Root mean square of the difference over that of the original, all layers."""
    pairs = [
        (
            delta.router(layer) if name == "router" else delta.tensor(name, layer)
            for delta in (original, compact)
        )
        for layer in range(original.num_layers)
    ]
    before, after = (np.stack(side).astype(np.float64) for side in zip(*pairs, strict=True))
    return float(np.sqrt(np.square(after - before).sum() / np.square(before).sum()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("original", type=Path)
    parser.add_argument("compact", type=Path)
    options = parser.parse_args()
    tensors = load_file(options.original)
    save_file(compress(tensors), options.compact)
    original, compact = Delta(options.original), Delta(options.compact)
    for layer in range(original.num_layers):
        assert np.array_equal(original.neurons(layer), compact.neurons(layer))
    errors = {name: relative_error(original, compact, name) for name in sorted(tensors) if name != "idx"}
    for name, error in errors.items():
        print(f"{name:8s} relative error {error:.2e}")
    content = options.compact.read_bytes()
    if len(content) > LIMIT_BYTES:
        raise SystemExit(f"{len(content)} bytes are above the limit of {LIMIT_BYTES}")
    digest = hashlib.sha256(content).hexdigest()
    print(json.dumps({"bytes": len(content), "sha256": digest, "relative_errors": errors}))


if __name__ == "__main__":
    main()
