// Quantising matrices and experts into the packed layout, and back.
#include <algorithm>
#include <cstring>
#include <vector>

#include "context.h"

using namespace flashmoe;

namespace {

float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = h >> 10 & 31u, mantissa = h & 1023u;
  if (exponent == 0) return (sign != 0 ? -0x1p-24f : 0x1p-24f) * float(mantissa);
  const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa << 13;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// `count` rows from `begin` widened to fp32.
void widen_rows(const fm_matrix& m, int64_t begin, int64_t count, float* out) {
  const int64_t size = element_bytes(m.format);
  const auto* from = static_cast<const uint8_t*>(m.data) + begin * m.columns * size;
  const int64_t n = count * m.columns;
  if (m.format == FM_F32) {
    std::memcpy(out, from, size_t(4 * n));
  } else if (m.format == FM_BF16) {
    for (int64_t i = 0; i < n; i++) {
      uint16_t half;
      std::memcpy(&half, from + 2 * i, 2);
      const uint32_t bits = uint32_t(half) << 16;
      std::memcpy(out + i, &bits, 4);
    }
  } else {
    for (int64_t i = 0; i < n; i++) {
      uint16_t half;
      std::memcpy(&half, from + 2 * i, 2);
      out[i] = half_to_float(half);
    }
  }
}

// One tile of a source matrix; rows past its end are padding.
void pack_rows(const Isa& isa, const fm_matrix& source, int64_t begin, int bits, const float* importance, uint8_t* out,
               double* error) {
  const int64_t count = std::max<int64_t>(0, std::min<int64_t>(kTileRows, source.rows - begin));
  std::vector<float> rows(size_t(std::max<int64_t>(1, count * source.columns)));
  if (count > 0) widen_rows(source, begin, count, rows.data());
  isa.pack_tile(rows.data(), count, source.columns, bits, importance, out, error);
}

// Codes [N, K] and scales [N, ceil(K / 32)] that somebody else chose.
struct Quantised {
  int64_t rows, columns;
  const int8_t* codes;
  const uint16_t* scales;
};

// One tile of them; rows and columns past the end are padding.
void lay_out_rows(const Quantised& q, int64_t begin, int bits, uint8_t* tile) {
  const int64_t groups = round_up(q.columns, kGroup) / kGroup, per_line = bits == 4 ? 8 : 4;
  const uint8_t zero = bits == 4 ? 8 : 128;
  const auto code = [&](int64_t r, int64_t k) {
    const bool inside = begin + r < q.rows && k < q.columns;
    return inside ? uint8_t(q.codes[(begin + r) * q.columns + k] + zero) : zero;
  };
  for (int64_t first = 0; first < round_up(q.columns, kSuper); first += kSuper, tile += superblock_bytes(bits)) {
    for (int64_t half = 0; half < kSuper / kGroup; half++)
      for (int64_t r = 0; r < kTileRows; r++) {
        const int64_t group = first / kGroup + half;
        const bool inside = begin + r < q.rows && group < groups;
        const uint16_t scale = inside ? q.scales[(begin + r) * groups + group] : 0;
        std::memcpy(tile + 2 * (half * kTileRows + r), &scale, 2);
      }
    uint8_t* lines = tile + kScaleBytes;
    for (int64_t k = first; k < first + kSuper; k += per_line, lines += 64)
      for (int64_t r = 0; r < kTileRows; r++)
        for (int64_t j = 0; j < 4; j++)
          lines[4 * r + j] = bits == 4 ? uint8_t(code(r, k + j) | code(r, k + 4 + j) << 4) : code(r, k + j);
  }
}

// Weight at row r, column k of a tile: the definition of the layout.
float weight_at(const uint8_t* tile, int64_t r, int64_t k, int bits) {
  const uint8_t* superblock = tile + k / kSuper * superblock_bytes(bits);
  const int64_t kk = k % kSuper, per_line = bits == 4 ? 8 : 4;
  uint16_t scale;
  std::memcpy(&scale, superblock + 2 * (kk / kGroup * kTileRows + r), 2);
  const uint8_t byte = superblock[kScaleBytes + 64 * (kk / per_line) + 4 * r + kk % 4];
  const int q = bits == 8 ? byte - 128 : (kk % 8 < 4 ? byte & 15 : byte >> 4) - 8;
  return float(q) * half_to_float(scale);
}

void unpack_row(const uint8_t* tiles, int64_t row, int64_t columns, int bits, int64_t tile_step, float* out) {
  const uint8_t* tile = tiles + row / kTileRows * tile_step;
  for (int64_t k = 0; k < columns; k++) out[k] = weight_at(tile, row % kTileRows, k, bits);
}

}  // namespace

int64_t fm_packed_matrix_bytes(int32_t format, int64_t rows, int64_t columns) {
  return round_up(rows, kTileRows) / kTileRows * tile_bytes(columns, bits_of(format));
}

int64_t fm_packed_expert_bytes(int32_t format, int64_t hidden, int64_t width) {
  return ExpertShape{hidden, width, bits_of(format)}.bytes();
}

void fm_pack_matrix(fm_context* c, const fm_matrix* source, int32_t format, const float* importance, uint8_t* out,
                    double* error) {
  const int bits = bits_of(format);
  const int64_t tile_size = tile_bytes(source->columns, bits), tiles = round_up(source->rows, kTileRows) / kTileRows;
  std::vector<double> errors(size_t(2 * tiles));
  c->pool.run(tiles, [&](int64_t i) {
    pack_rows(c->isa, *source, i * kTileRows, bits, importance, out + i * tile_size, &errors[size_t(2 * i)]);
  });
  for (int64_t i = 0; i < tiles; i++) error[0] += errors[size_t(2 * i)], error[1] += errors[size_t(2 * i + 1)];
}

void fm_pack_expert(fm_context* c, const fm_matrix* gate, const fm_matrix* up, const fm_matrix* down, int32_t format,
                    const float* importance_in, const float* importance_hidden, uint8_t* out, double* error) {
  const ExpertShape shape{gate->columns, gate->rows, bits_of(format)};
  const int64_t pairs = 2 * (shape.padded_width() / kTileRows), tiles = pairs + shape.down_tiles();
  std::vector<double> errors(size_t(2 * tiles));
  c->pool.run(tiles, [&](int64_t i) {
    double* of_tile = &errors[size_t(2 * i)];
    if (i < pairs)
      pack_rows(c->isa, i % 2 == 0 ? *gate : *up, i / 2 * kTileRows, shape.bits, importance_in,
                out + i * shape.up_tile(), of_tile);
    else
      pack_rows(c->isa, *down, (i - pairs) * kTileRows, shape.bits, importance_hidden,
                out + shape.down_offset() + (i - pairs) * shape.down_tile(), of_tile);
  });
  for (int64_t i = 0; i < tiles; i++) error[0] += errors[size_t(2 * i)], error[1] += errors[size_t(2 * i + 1)];
}

void fm_lay_out_matrix(fm_context* c, int32_t format, int64_t rows, int64_t columns, const int8_t* codes,
                       const uint16_t* scales, uint8_t* out) {
  const int bits = bits_of(format);
  const Quantised matrix{rows, columns, codes, scales};
  c->pool.run(round_up(rows, kTileRows) / kTileRows,
              [&](int64_t i) { lay_out_rows(matrix, i * kTileRows, bits, out + i * tile_bytes(columns, bits)); });
}

void fm_lay_out_expert(fm_context* c, int32_t format, int64_t hidden, int64_t width, const int8_t* const* codes,
                       const uint16_t* const* scales, uint8_t* out) {
  const ExpertShape shape{hidden, width, bits_of(format)};
  const Quantised gate_up[2] = {{width, hidden, codes[0], scales[0]}, {width, hidden, codes[1], scales[1]}};
  const Quantised down{hidden, width, codes[2], scales[2]};
  const int64_t pairs = 2 * (shape.padded_width() / kTileRows);
  c->pool.run(pairs + shape.down_tiles(), [&](int64_t i) {
    if (i < pairs)
      lay_out_rows(gate_up[i % 2], i / 2 * kTileRows, shape.bits, out + i * shape.up_tile());
    else
      lay_out_rows(down, (i - pairs) * kTileRows, shape.bits, out + shape.down_offset() + (i - pairs) * shape.down_tile());
  });
}

void fm_unpack_matrix(const fm_matrix* packed, float* out) {
  const int bits = bits_of(packed->format);
  for (int64_t row = 0; row < packed->rows; row++)
    unpack_row(static_cast<const uint8_t*>(packed->data), row, packed->columns, bits,
               tile_bytes(packed->columns, bits), out + row * packed->columns);
}

void fm_unpack_expert(int32_t format, int64_t hidden, int64_t width, const uint8_t* packed, float* gate, float* up,
                      float* down) {
  const ExpertShape shape{hidden, width, bits_of(format)};
  for (int64_t row = 0; row < width; row++) {
    unpack_row(packed, row, hidden, shape.bits, 2 * shape.up_tile(), gate + row * hidden);
    unpack_row(packed + shape.up_tile(), row, hidden, shape.bits, 2 * shape.up_tile(), up + row * hidden);
  }
  for (int64_t row = 0; row < hidden; row++)
    unpack_row(packed + shape.down_offset(), row, width, shape.bits, shape.down_tile(), down + row * width);
}

void fm_gather_rows(const fm_matrix* m, const int64_t* ids, int64_t n, float* out) {
  const int bits = bits_of(m->format);
  for (int64_t i = 0; i < n; i++) {
    if (is_tiled(m->format))
      unpack_row(static_cast<const uint8_t*>(m->data), ids[i], m->columns, bits, tile_bytes(m->columns, bits),
                 out + i * m->columns);
    else
      widen_rows(*m, ids[i], 1, out + i * m->columns);
  }
}
