"""How an expert lies in a GPU slot, format by format, and packers in plain torch: what the kernels agree on.

An expert is gate and up [F, D] and down [D, F]. A slot has `slot_bytes`, from a multiple of 16 bytes.

    f32, f16, bf16  gate, up, down, row-major, one behind the other: a checkpoint's bytes
    int8, int4      the CPU library's packed tiles (docs/kernels.md): gate tile 0, up tile 0, ..., down
    fp8             e4m3 bytes, row-major: gate, up, down; then fp32 scales of 128 x 128 blocks, row-major:
                    gate and up [ceil(F / 128), ceil(D / 128)], down [ceil(D / 128), ceil(F / 128)]
                    weight = value * scale (DeepSeek's weight_scale_inv); D and F are multiples of 16
    mxfp4           e2m1 nibbles, row-major, the lower column in the low nibble: gate, up, down, each
                    [rows, columns / 2]; then e8m0 bytes of groups of 32 columns: gate and up [F, D / 32],
                    down [D, F / 32]; D and F are multiples of 32
                    weight = value * 2 ** (byte - 127) (OCP Microscaling 1.0)

fp8 and mxfp4 scales begin at the next multiple of 16 bytes behind the data, those of the three without gaps.
The packers round to nearest; they are for tests and benchmarks: `flashmoe pack` searches better scales.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor

FLOATS: Final = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BITS: Final = {"int4": 4, "int8": 8}  # of the packed tiles
FORMATS: Final = (*FLOATS, *BITS, "fp8", "mxfp4")

TILE_ROWS: Final = 16
GROUP: Final = 32  # columns that share a scale: tiles and mxfp4
SUPER: Final = 64  # columns of a superblock
SCALE_BYTES: Final = 64  # of a superblock: fp16 [2 groups][16 rows]
FP8_BLOCK: Final = 128
E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3_LARGEST: Final = 448.0


class SlotLayout(NamedTuple):
    """Offsets in bytes. Tiles: tile i of gate lies at 2 i tiles, of up one further. Scales: fp8, mxfp4."""

    gate: int
    up: int
    down: int
    gate_scales: int
    up_scales: int
    down_scales: int
    bytes: int


def superblock_bytes(format: str) -> int:
    """576 (int4) or 1088 (int8)."""
    return SCALE_BYTES + TILE_ROWS * SUPER * BITS[format] // 8


def tile_bytes(format: str, columns: int) -> int:
    """16 rows of a tiled matrix."""
    return _ceil(columns, SUPER) * superblock_bytes(format)


def matrix_bytes(format: str, rows: int, columns: int) -> int:
    """A dense matrix: rows, or tiles."""
    if format in BITS:
        return _ceil(rows, TILE_ROWS) * tile_bytes(format, columns)
    return rows * columns * FLOATS[format].itemsize


def slot_layout(format: str, hidden: int, width: int) -> SlotLayout:
    """Where the parts of an expert are."""
    size = hidden * width
    if format in FLOATS:
        size *= FLOATS[format].itemsize
        return SlotLayout(0, size, 2 * size, 0, 0, 0, 3 * size)
    if format in BITS:
        up_tile = tile_bytes(format, hidden)
        down = _ceil(width, SUPER) * (SUPER // TILE_ROWS) * 2 * up_tile
        end = down + _ceil(hidden, TILE_ROWS) * tile_bytes(format, width)
        return SlotLayout(0, up_tile, down, 0, 0, 0, end)
    if format == "fp8":
        assert hidden % 16 == width % 16 == 0
        scales = 4 * _ceil(hidden, FP8_BLOCK) * _ceil(width, FP8_BLOCK)
    else:
        assert format == "mxfp4" and hidden % GROUP == width % GROUP == 0
        scales, size = size // GROUP, size // 2
    begin = _ceil(3 * size, 16) * 16
    return SlotLayout(0, size, 2 * size, begin, begin + scales, begin + 2 * scales, begin + 3 * scales)


def slot_bytes(format: str, hidden: int, width: int) -> int:
    """The size of an expert in `format`."""
    return slot_layout(format, hidden, width).bytes


def pack_matrix(format: str, weight: Tensor) -> Tensor:
    """weight [N, K] fp32 -> uint8 [matrix_bytes]: rows, or tiles."""
    if format in FLOATS:
        return weight.to(FLOATS[format]).contiguous().view(torch.uint8).flatten()
    return _pack_tiles(weight, format, _ceil(len(weight), TILE_ROWS)).flatten()


def unpack_matrix(format: str, data: Tensor, rows: int, columns: int) -> Tensor:
    """uint8 -> [rows, columns] fp32."""
    if format in FLOATS:
        return data.view(FLOATS[format]).view(rows, columns).float()
    tiles = data.view(_ceil(rows, TILE_ROWS), tile_bytes(format, columns))
    return _unpack_tiles(tiles, format, rows, columns)


def pack_expert(format: str, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """gate, up [F, D] and down [D, F], fp32 -> uint8 [slot_bytes], on their device."""
    width, hidden = gate.shape
    three = (gate, up, down)
    if format in FLOATS:
        return torch.cat([pack_matrix(format, weight) for weight in three])
    if format in BITS:
        tiles = _ceil(width, SUPER) * SUPER // TILE_ROWS
        pairs = torch.stack([_pack_tiles(gate, format, tiles), _pack_tiles(up, format, tiles)], 1)
        return torch.cat([pairs.flatten(), pack_matrix(format, down)])
    packed = [(_pack_fp8 if format == "fp8" else _pack_mxfp4)(weight) for weight in three]
    data, scales = torch.cat([p[0] for p in packed]), torch.cat([p[1] for p in packed])
    return torch.cat([data, data.new_zeros(-len(data) % 16), scales])


def unpack_expert(format: str, blob: Tensor, hidden: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """A slot -> gate, up [F, D] and down [D, F], fp32."""
    at = slot_layout(format, hidden, width)
    if format in BITS:
        pairs = blob[: at.down].view(-1, 2, tile_bytes(format, hidden))
        return (
            _unpack_tiles(pairs[:, 0], format, width, hidden),
            _unpack_tiles(pairs[:, 1], format, width, hidden),
            unpack_matrix(format, blob[at.down : at.bytes], hidden, width),
        )
    ends = (at.up, at.down, at.gate_scales or at.bytes)
    scale_ends = (at.up_scales, at.down_scales, at.bytes)
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    data = [blob[begin:end] for begin, end in zip(at[:3], ends, strict=True)]
    scales = [blob[begin:end] for begin, end in zip(at[3:6], scale_ends, strict=True)]
    if format == "fp8":
        gate, up, down = (_unpack_fp8(*part) for part in zip(data, scales, shapes, strict=True))
    elif format == "mxfp4":
        gate, up, down = (_unpack_mxfp4(*part) for part in zip(data, scales, shapes, strict=True))
    else:
        gate, up, down = (
            unpack_matrix(format, part, *shape) for part, shape in zip(data, shapes, strict=True)
        )
    return gate, up, down


def _ceil(n: int, of: int) -> int:
    return -(-n // of)


def _pack_tiles(weight: Tensor, format: str, tiles: int) -> Tensor:
    """[N, K] -> uint8 [tiles, tile bytes]; rows past N have scale 0."""
    rows, columns = weight.shape
    padded = weight.new_zeros(tiles * TILE_ROWS, _ceil(columns, SUPER) * SUPER, dtype=torch.float32)
    padded[:rows, :columns] = weight
    most, zero = (7, 8) if format == "int4" else (127, 128)
    groups = padded.view(tiles, TILE_ROWS, -1, 2, GROUP)  # [tile, row, superblock, group, column]
    scale = (groups.abs().amax(-1) / most).half()
    inverse = torch.where(scale > 0, 1 / scale.float(), 0)
    code = (groups * inverse[..., None]).round().clamp(-most, most).add(zero).to(torch.uint8)
    if format == "int4":
        pair = code.view(*code.shape[:4], 4, 2, 4)  # [..., line, low or high nibble, byte]
        lines = (pair[..., 0, :] | pair[..., 1, :] << 4).permute(0, 2, 3, 4, 1, 5)
    else:
        lines = code.view(*code.shape[:4], 8, 4).permute(0, 2, 3, 4, 1, 5)
    scales = scale.permute(0, 2, 3, 1).contiguous().view(torch.uint8)  # [tile, superblock, group, 32 bytes]
    superblocks = [scales.reshape(tiles, -1, SCALE_BYTES), lines.reshape(tiles, scales.shape[1], -1)]
    return torch.cat(superblocks, -1).view(tiles, -1)


def _unpack_tiles(tiles: Tensor, format: str, rows: int, columns: int) -> Tensor:
    superblocks = tiles.reshape(len(tiles), -1, superblock_bytes(format))
    scale = superblocks[..., :SCALE_BYTES].contiguous().view(torch.float16).float()
    lines = superblocks[..., SCALE_BYTES:].reshape(*superblocks.shape[:2], 2, -1, TILE_ROWS, 4)
    if format == "int4":
        code = (
            torch.stack([lines & 15, lines >> 4], 4).int() - 8
        )  # [tile, block, group, line, nibble, row, byte]
    else:
        code = lines[:, :, :, :, None].int() - 128
    groups = code.permute(0, 5, 1, 2, 3, 4, 6).reshape(len(tiles), TILE_ROWS, -1, 2, GROUP)
    scale = scale.view(*superblocks.shape[:2], 2, TILE_ROWS).permute(0, 3, 1, 2)
    return (groups * scale[..., None]).reshape(len(tiles) * TILE_ROWS, -1)[:rows, :columns].contiguous()


def _pack_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] -> (bytes, bytes of the scales)."""
    rows, columns = weight.shape
    blocks = (_ceil(rows, FP8_BLOCK), _ceil(columns, FP8_BLOCK))
    padded = weight.new_zeros(blocks[0] * FP8_BLOCK, blocks[1] * FP8_BLOCK)
    padded[:rows, :columns] = weight
    cut = padded.view(blocks[0], FP8_BLOCK, blocks[1], FP8_BLOCK)
    scale = (cut.abs().amax((1, 3)) / E4M3_LARGEST).clamp(min=1e-30)
    value = (cut / scale[:, None, :, None]).view(padded.shape)[:rows, :columns].to(torch.float8_e4m3fn)
    return value.contiguous().view(torch.uint8).flatten(), scale.view(torch.uint8).flatten()


def _unpack_fp8(data: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
    rows, columns = shape
    value = data.view(torch.float8_e4m3fn).view(shape).float()
    scale = scales.view(torch.float32).view(_ceil(rows, FP8_BLOCK), -1)
    return value * scale.repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]


def _pack_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] -> (bytes, bytes of the scales)."""
    groups = weight.reshape(-1, GROUP)
    exponent = (
        groups.abs().amax(1).clamp(min=2.0**-100).log2().floor().int() - 2
    )  # 4 is the last power of two
    value = torch.ldexp(groups, -exponent[:, None])
    magnitude = torch.tensor(E2M1, device=weight.device)
    index = torch.bucketize(value.abs(), (magnitude[1:] + magnitude[:-1]) / 2)
    nibble = (index + 8 * (value < 0)).to(torch.uint8).view(-1, 2)
    return nibble[:, 0] | nibble[:, 1] << 4, (exponent + 127).to(torch.uint8)


def _unpack_mxfp4(data: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
    nibble = torch.stack([data & 15, data >> 4], 1).view(-1, GROUP).long()
    values = torch.tensor([*E2M1, *(-v for v in E2M1)], device=data.device)
    return torch.ldexp(values[nibble], scales.int()[:, None] - 127).view(shape)
