// The packed layout of a weight matrix [N, K]: tiles of 16 rows, quantised in groups of 32 columns.
//
//   tile        16 rows; along K a run of superblocks of 64 columns
//   superblock  64 bytes of scales, fp16 [2 groups][16 rows], then 64-byte lines of 16 rows x 4 bytes
//                 int4 (8 lines):   line c, row r, byte j = code[r][8c + j] | code[r][8c + 4 + j] << 4
//                 int8 (16 lines):  line c, row r, byte j = code[r][4c + j]
//   weight      (code - zero) * scale, zero = 8 (int4) or 128 (int8)
//   expert      gate tile 0, up tile 0, gate tile 1, up tile 1, ..., then the tiles of down
//
// Rows are padded to whole tiles (those of gate and up to 64, since they are the columns of down), columns to
// 64: padding has scale 0 and the code of zero. Rows lie in lanes, so that a kernel needs no horizontal sum.
//
// Everything here is `static`: the translation units of the instruction sets include it, and an inline function
// with external linkage could end up as its AVX-512 copy for everybody.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashmoe {

constexpr int kTileRows = 16;
constexpr int kGroup = 32;
constexpr int kSuper = 64;
constexpr int kScaleBytes = 64;  // of a superblock

static constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static constexpr int64_t superblock_bytes(int bits) { return kScaleBytes + kTileRows * kSuper * bits / 8; }
static constexpr int64_t tile_bytes(int64_t columns, int bits) {
  return round_up(columns, kSuper) / kSuper * superblock_bytes(bits);
}

// Sizes of one packed expert: gate and up [width, hidden], down [hidden, width].
struct ExpertShape {
  int64_t hidden, width;
  int bits;
  constexpr int64_t padded_width() const { return round_up(width, kSuper); }
  constexpr int64_t up_tile() const { return tile_bytes(hidden, bits); }
  constexpr int64_t down_tile() const { return tile_bytes(width, bits); }
  constexpr int64_t down_tiles() const { return round_up(hidden, kTileRows) / kTileRows; }
  constexpr int64_t down_offset() const { return padded_width() / kTileRows * 2 * up_tile(); }
  constexpr int64_t bytes() const { return down_offset() + down_tiles() * down_tile(); }
};

}  // namespace flashmoe
