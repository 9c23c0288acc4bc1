"""The routed experts of a layer on a GPU for many tokens at once: prefill. Decoding (up to 8 tokens) is
triton_decode.py.

`ExpertPrefill.run` computes every (token, k) whose expert is in a slot, `combine` sums each token's in top-k
order. Four launches, no allocation and no synchronisation: CUDA graphs can hold them. Weights stay as they
lie in their slots (kernels/expert_slots.py). Activations are rounded to bf16 for the tensor cores (fp16 and
fp32 weights: to fp16, not at all), sums are fp32.

Which tile shapes are used comes from kernels/tuning/*.json, measured by `scripts/bench_gpu_moe.py --tune`;
nothing is tuned here. Axis letters: T tokens, D hidden, F expert width, E experts, K experts a token, P pairs
(T * K).
"""

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.expert_slots import BITS, FLOATS, FORMATS, slot_layout
from kernels.reference import ACTIVATIONS
from kernels.triton_grouped import packed_down, packed_up, rows_down, rows_up
from kernels.triton_schedule import RECORD, combine, count_pairs, place_pairs, prepare_few, round_tokens

INTERPRET: Final = triton.knobs.runtime.interpret
CODES: Final = {"int4": 8, "mxfp4": 8, "int8": 4, "fp8": 4}  # in a dword
LIKE: Final = {"f16": "bf16", "int8": "int4", "fp8": "int4", "mxfp4": "int4"}  # where it wasn't measured
FEW_PAIRS: Final = 1024  # are sorted in one launch, more in two
CHUNK: Final = 256  # pairs
TUNING: Final = Path(__file__).parent / "tuning"
# {"tile_rows", "tma", "up": {"swap", "columns", "depth", "warps", "stages", "per_sm"}, "down": the same}
Config = Mapping[str, Any]


class ExpertPrefill:
    """One layer's event at a time, on one stream. Layers of one shape can share it."""

    def __init__(
        self,
        hidden: int,
        width: int,
        format: str,
        activation: str,
        top_k: int,
        experts: int,
        max_tokens: int,
        device: torch.device | str,
        token_rounding: int = 0,
        tuning: Sequence[Config] | None = None,
    ) -> None:
        """token_rounding: a multiple to round each expert's tokens to (round_tokens), 0: exact.

        tuning: entries as in kernels/tuning/*.json instead of those shipped for the GPU's family.
        """
        assert format in FORMATS and activation in ACTIVATIONS and top_k <= experts
        self._hidden, self._width, self._format, self._activation = hidden, width, format, activation
        self._top_k, self._experts, self._max_tokens = top_k, experts, max_tokens
        self._device, self._rounding = torch.device(device), token_rounding
        self._multiprocessors, self._family = _gpu(self._device)
        self._asynchronous = self._family // 10 == 9 and not INTERPRET  # Hopper's products (wgmma)
        self._layout = slot_layout(format, hidden, width)
        self._dtype = FLOATS.get(format, torch.bfloat16)
        self._entries = list(_shipped(self._family) if tuning is None else tuning)
        self._x_columns, self._h_columns = (-(-n // 64) * 64 for n in (hidden, width))

        pairs = max_tokens * top_k
        # Of products in bf16 two bytes are written and read for each of P * D, about a fifth of the time of a
        # large prefill of small experts; a product's own error in bf16 arithmetic is as large as this
        # rounding.
        products_dtype = torch.bfloat16 if self._dtype == torch.bfloat16 else torch.float32
        new = partial(torch.empty, device=self._device)
        self.products = new(pairs, hidden, dtype=products_dtype)
        self._x = new(max_tokens, self._x_columns, dtype=self._dtype)
        self._h = new(pairs, self._h_columns, dtype=self._dtype)
        self._pairs = new(pairs, dtype=torch.int32)
        self._n_records = new(1, dtype=torch.int32)
        self._records = new(min(pairs, pairs // 16 + experts), RECORD, dtype=torch.int32)
        chunks, bins = triton.cdiv(pairs, CHUNK), triton.next_power_of_2(experts + 1)
        self._counts = new(chunks, bins, dtype=torch.int32)
        self._ids: Tensor | None = None
        self._weights: Tensor | None = None
        self._dropped: Tensor | None = None

    @property
    def dropped_share(self) -> float:
        """Of the last run with token rounding, the share of pairs left out. Waits for the device."""
        return 0.0 if self._dropped is None else float(self._dropped)

    def config(self, tokens: int) -> Config:
        """The tile shapes for that many tokens."""
        rows = tokens * self._top_k / min(self._experts, tokens * self._top_k)
        return choose(self._entries, self._format, self._hidden, self._width, rows, self._family)

    def run(
        self, h: Tensor, ids: Tensor, table: Tensor, arena: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Every pair whose expert has a slot, into `products` [P, D], row token * K + k; other rows stay as
        they were.

        h [T, D] fp32 or bf16, ids [T, K] int32 (no expert: -1), table [E] int32, an expert's slot or -1,
        arena uint8 [slots, stride], stride a multiple of 16. weights [T, K] fp32, with token rounding only:
        what it goes by.
        """
        tokens = len(h)
        assert tokens <= self._max_tokens and h.is_contiguous() and ids.is_contiguous()
        assert ids.dtype == table.dtype == torch.int32 and arena.dtype == torch.uint8 and arena.stride(1) == 1
        assert arena.shape[1] >= self._layout.bytes and arena.stride(0) % 16 == 0
        if self._rounding:
            assert weights is not None, "token rounding goes by the weights"
            ids, self._weights, self._dropped = round_tokens(ids, weights, self._experts, self._rounding)
        self._ids = ids
        config = self.config(tokens)
        x = self._prepare(h, ids, table, config)
        self.launch_up(x, arena, config)
        self.launch_down(arena, config)
        products: Tensor = self.products[: tokens * self._top_k]
        return products

    def combine(self, weights: Tensor, x: Tensor) -> None:
        """x [T, D] fp32 += the sum over k, in order, of weights [T, K] * products. Each pair must have been
        in a run.
        """
        assert self._ids is not None and x.dtype == torch.float32 and x.is_contiguous()
        weights = weights if self._weights is None else self._weights
        block = min(1024, triton.next_power_of_2(self._hidden))
        combine[(len(x), triton.cdiv(self._hidden, block))](
            self.products, self._ids, weights, x,
            E=self._experts, K=self._top_k, D=self._hidden, BLOCK=block, num_warps=4,
        )  # fmt: skip

    def _prepare(self, h: Tensor, ids: Tensor, table: Tensor, config: Config) -> Tensor:
        """Records and sorted pairs; returns the activations that the products read."""
        codes = CODES.get(self._format, 0)
        as_it_is = not codes and h.dtype == self._dtype and self._hidden == self._x_columns
        converted = 0 if as_it_is else len(h)
        pairs, bins = ids.numel(), triton.next_power_of_2(self._experts + 1)
        shape = {"E": self._experts, "BINS": bins}
        convert: dict[str, Any] = {"D": self._hidden, "LD_X": self._x_columns, "CODES": codes}
        convert |= {"BLOCK": min(2048, triton.next_power_of_2(self._x_columns)), "INTERPRET": INTERPRET}
        if pairs <= FEW_PAIRS:
            prepare_few[(self._experts + converted,)](
                ids, table, self._pairs, self._records, self._n_records, h, self._x, pairs,
                BM=config["tile_rows"], CHUNK=max(triton.next_power_of_2(pairs), 128), num_warps=4,
                **shape, **convert,
            )  # fmt: skip
        else:
            chunks = triton.cdiv(pairs, CHUNK)
            count_pairs[(chunks + converted,)](
                ids, self._counts, h, self._x, pairs, chunks, CHUNK=CHUNK, num_warps=4, **shape, **convert
            )
            place_pairs[(chunks,)](
                ids, table, self._counts, self._pairs, self._records, self._n_records, pairs, chunks,
                BM=config["tile_rows"], CHUNK=CHUNK, ROWS=max(1, 8192 // bins), PART=min(CHUNK, 64),
                num_warps=8, **shape,
            )  # fmt: skip
        return h if as_it_is else self._x

    def launch_up(self, x: Tensor, arena: Tensor, config: Config) -> None:
        """Gate, up and activation of the pairs in the records, into `_h`."""
        up, at = config["up"], self._layout
        shape: dict[str, Any] = {"D": self._hidden, "F": self._width, "LD_H": self._h_columns}
        shape |= {"LD_X": x.shape[1], "ACTIVATION": self._activation}
        shape |= {"BM": config["tile_rows"], "INTERPRET": INTERPRET}
        records = (self._records, self._pairs, self._n_records, arena.stride(0), self._top_k)
        if self._format not in FLOATS:
            tiled = self._format in BITS
            packed_up[self._grid(up)](
                x, arena, self._h, *records, UP=at.up, GATE_SCALES=at.gate if tiled else at.gate_scales,
                UP_SCALES=at.up if tiled else at.up_scales, FORMAT=self._format,
                WHOLE=up["swap"], ASYNC=self._asynchronous, **shape, **_blocks(up, self._x_columns),
            )  # fmt: skip
            return
        weights: Tensor | TensorDescriptor = arena
        if tma := self._tma(config):
            size = [len(arena), 2, self._width, self._hidden]
            box = [1, 2, up["columns"], up["depth"]]
            weights = self._matrix(arena, 0, size, box, [self._width * self._hidden])
        rows_up[self._grid(up)](
            x, weights, self._h, *records, TMA=tma, SWAP=up["swap"], **shape, **_blocks(up),
        )  # fmt: skip

    def launch_down(self, arena: Tensor, config: Config) -> None:
        """The rows of `products` of the pairs in the records, from `_h`."""
        down, at = config["down"], self._layout
        shape: dict[str, Any] = {"D": self._hidden, "F": self._width, "LD_H": self._h_columns}
        shape |= {"BM": config["tile_rows"], "INTERPRET": INTERPRET}
        records = (self._records, self._pairs, self._n_records, arena.stride(0))
        if self._format not in FLOATS:
            scales = at.down if self._format in BITS else at.down_scales
            packed_down[self._grid(down)](
                self._h, arena, self.products, *records, DOWN=at.down, DOWN_SCALES=scales,
                FORMAT=self._format, WHOLE=down["swap"], ASYNC=self._asynchronous,
                **shape, **_blocks(down, self._h_columns),
            )  # fmt: skip
            return
        h_box: Tensor | TensorDescriptor = self._h
        weights: Tensor | TensorDescriptor = arena
        if tma := self._tma(config):
            box = [1, down["columns"], down["depth"]]
            weights = self._matrix(arena, at.down, [len(arena), self._hidden, self._width], box, [])
            box = [config["tile_rows"], down["depth"]]
            h_box = TensorDescriptor(self._h, list(self._h.shape), [self._h_columns, 1], box)
        rows_down[self._grid(down)](
            self._h, h_box, weights, self.products, *records, TMA=tma, SWAP=down["swap"],
            **shape, **_blocks(down),
        )  # fmt: skip

    def _tma(self, config: Config) -> bool:
        """Descriptors want rows of whole 16 bytes."""
        size = self._dtype.itemsize
        return bool(config["tma"]) and self._hidden * size % 16 == self._width * size % 16 == 0

    def _matrix(
        self, arena: Tensor, offset: int, size: list[int], box: list[int], middle: list[int]
    ) -> TensorDescriptor:
        """The same matrix of all slots, `offset` bytes into each: size [slots, ..., rows, columns]."""
        elements = arena.view(self._dtype)
        strides = [elements.stride(0), *middle, size[-1], 1]
        return TensorDescriptor(elements[0, offset // self._dtype.itemsize :], size, strides, box)

    def _grid(self, product: Config) -> tuple[int]:
        return (self._multiprocessors * product["per_sm"],)


def _blocks(product: Config, columns: int = 0) -> dict[str, int]:
    """columns: of packed weights, whose kernels have no masks along them; whole blocks of 64."""
    depth = math.gcd(product["depth"], columns) if columns else product["depth"]
    options = {"num_warps": product["warps"], "num_stages": product["stages"]}
    return {"BN": product["columns"], "BK": depth} | options


def choose(
    entries: Sequence[Config], format: str, hidden: int, width: int, rows: float, family: int
) -> Config:
    """Of the entries of a format the one for the nearest shape, and of these the one for the nearest `rows` a
    expert.
    """

    def distance(entry: Config) -> tuple[float, float]:
        shape = abs(math.log2(entry["hidden"] * entry["width"] / (hidden * width)))
        return round(shape), abs(math.log2(entry["rows"] / rows))

    measured = {entry["format"] for entry in entries}
    wanted = format if format in measured else LIKE.get(format)
    like = [entry for entry in entries if entry["format"] == wanted]
    if not like:
        return fallback(format, rows, family)
    config: dict[str, Any] = min(like, key=distance)["config"]
    if wanted == "int4" and CODES.get(format) == 4:  # twice the bytes of codes in shared memory
        fewer = {
            name: config[name] | {"stages": max(2, config[name]["stages"] - 1)} for name in ("up", "down")
        }
        config = {**config, **fewer}
    return config


def fallback(format: str, rows: float, family: int) -> Config:
    """Untuned shapes that fit any GPU from compute capability 8.0 on: at most 96 KiB of shared memory."""
    tile_rows = next((n for n in (16, 32, 64) if rows <= n), 128)
    wide = format == "f32"
    product = {"swap": False, "columns": 64, "depth": 32 if wide else 64, "warps": 4, "stages": 3}
    product["per_sm"] = 2
    down = product | {"columns": 64 if format in FLOATS else 128}
    tile_rows = min(tile_rows, 64) if wide else tile_rows
    return {"tile_rows": tile_rows, "tma": family >= 90, "up": product, "down": down}


@cache
def _shipped(family: int) -> list[Config]:
    """The entries measured on this family's GPU, or on the nearest older one's that has any."""
    files = {int(path.stem[2:]): path for path in TUNING.glob("sm*.json")}
    older = [sm for sm in files if sm <= family and sm // 10 == family // 10]
    return json.loads(files[max(older)].read_text())["entries"] if older else []


@cache
def _gpu(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and compute capability as 10 * major + minor; of Triton's interpreter 3 and 90."""
    if INTERPRET:
        return 3, 90
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, 10 * properties.major + properties.minor
