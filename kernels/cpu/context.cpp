#include "context.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace flashmoe {
namespace {

bool machine_runs(const Isa* isa) {
  if (isa == nullptr) return false;
#if defined(__x86_64__) && defined(__GNUC__)
  const std::string name = isa->name;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (name == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
  if (name == "avx2vnni") return avx2 && __builtin_cpu_supports("avxvnni");
  if (name == "avx2") return avx2;
#endif
  return true;  // scalar; neon is compiled only where every machine of the target has it
}

// Best first.
std::vector<const Isa*> available() {
  std::vector<const Isa*> found;
  for (const Isa* isa : {isa_avx512(), isa_avx2vnni(), isa_avx2(), isa_neon(), isa_scalar()})
    if (machine_runs(isa)) found.push_back(isa);
  return found;
}

}  // namespace

void Activations::reserve(const Layout& layout, int64_t tokens) {
  const int64_t elements = tokens * layout.padded;
  if (layout.exact) {
    values_.fit<float>(elements);
  } else {
    q_.fit<int8_t>(elements);
    scale_.fit<float>(elements / kGroup);
    bias_.fit<int32_t>(elements / kGroup);
  }
}

void Activations::fill(const Isa& isa, const Layout& layout, int64_t first, int count, const float* const* rows_) {
  if (!layout.tiled) {
    for (int m = 0; m < count; m++) {
      float* to = rows(layout, first + m);
      std::memcpy(to, rows_[m], sizeof(float) * layout.columns);
      std::memset(to + layout.columns, 0, sizeof(float) * (layout.padded - layout.columns));
    }
    return;
  }
  float values[kMaxTokens * kGroup];
  for (int64_t begin = 0; begin < layout.padded; begin += kGroup) {
    const int64_t inside = begin >= layout.columns ? 0 : std::min<int64_t>(kGroup, layout.columns - begin);
    for (int m = 0; m < count; m++) {
      std::memcpy(values + m * kGroup, rows_[m] + (inside > 0 ? begin : 0), sizeof(float) * inside);
      std::memset(values + m * kGroup + inside, 0, sizeof(float) * (kGroup - inside));
    }
    fill_group(isa, layout, first, count, begin / kGroup, values);
  }
}

void Activations::fill_group(const Isa& isa, const Layout& layout, int64_t first, int count, int64_t group,
                             const float* values) {
  const int64_t at = first * layout.padded;
  if (!layout.tiled) {
    for (int m = 0; m < count; m++)
      std::memcpy(rows(layout, first + m) + group * kGroup, values + m * kGroup, sizeof(float) * kGroup);
  } else if (layout.exact) {
    float* to = values_.get<float>() + at + group * kGroup * count;
    for (int m = 0; m < count; m++)
      for (int k = 0; k < kGroup; k++) to[k * count + m] = values[m * kGroup + k];
  } else {
    int8_t* q = q_.get<int8_t>() + at + group * kGroup * count;
    const int64_t of_group = at / kGroup + group * count;
    for (int m = 0; m < count; m++)
      isa.quantise_group(values + m * kGroup, layout.zero, q + 4 * m, 4 * count, scale_.get<float>() + of_group + m,
                         bias_.get<int32_t>() + of_group + m);
  }
}

Block Activations::block(const Layout& layout, int64_t first) const {
  const int64_t at = first * layout.padded;
  return {q_.get<int8_t>() + at, scale_.get<float>() + at / kGroup, bias_.get<int32_t>() + at / kGroup,
          values_.get<float>() + at};
}

void cut_blocks(int64_t n, int most, std::vector<TokenBlock>* blocks) {
  blocks->clear();
  for (int64_t first = 0; first < n; first += most)
    blocks->push_back({first, int(std::min<int64_t>(most, n - first))});
}

void multiply(const Isa& isa, const fm_matrix& matrix, const Layout& layout, const Activations& x,
              const TokenBlock& block, int64_t begin, int64_t end, float* out, int64_t out_step) {
  const auto* data = static_cast<const uint8_t*>(matrix.data);
  if (!layout.tiled) {
    const int64_t row_bytes = matrix.columns * element_bytes(matrix.format);
    const float* rows = x.rows(layout, block.first);
    const int kind = matrix.format - FM_BF16;
    int64_t row = begin;
    for (; row + isa.rows <= end; row += isa.rows)
      isa.many_rows[kind][block.count](data + row * row_bytes, row_bytes, matrix.columns, rows, layout.padded,
                                       out + row - begin, out_step);
    for (; row < end; row++)
      isa.one_row[kind][block.count](data + row * row_bytes, row_bytes, matrix.columns, rows, layout.padded,
                                     out + row - begin, out_step);
    return;
  }
  const int bits = bits_of(matrix.format);
  const TileKernel kernel = isa.tile[bits == 8][layout.exact][block.count];
  const Block activations = x.block(layout, block.first);
  for (int64_t row = begin; row < end; row += kTileRows) {
    float tile[kMaxTokens * kTileRows];
    kernel(data + row / kTileRows * tile_bytes(matrix.columns, bits), layout.padded / kGroup, activations, tile);
    const int64_t rows = std::min<int64_t>(kTileRows, end - row);
    for (int m = 0; m < block.count; m++)
      std::memcpy(out + m * out_step + row - begin, tile + m * kTileRows, sizeof(float) * rows);
  }
}

int64_t rows_of_item(const fm_matrix& matrix, int64_t tokens) {
  const int64_t row_bytes = is_tiled(matrix.format) ? tile_bytes(matrix.columns, bits_of(matrix.format)) / kTileRows
                                                    : matrix.columns * element_bytes(matrix.format);
  const int64_t bytes = tokens > 1 ? 128 << 10 : 48 << 10;
  return std::max<int64_t>(1, bytes / row_bytes / kTileRows) * kTileRows;
}

}  // namespace flashmoe

using namespace flashmoe;

fm_context* fm_create(int32_t threads, const char* isa) {
  if (threads < 1) return nullptr;
  for (const Isa* found : available())
    if (isa == nullptr || std::strcmp(isa, found->name) == 0) return new fm_context(threads, *found);
  return nullptr;
}

void fm_destroy(fm_context* context) { delete context; }

const char* fm_isa(const fm_context* context) { return context->isa.name; }

const char* fm_isa_names() {
  static const std::string names = [] {
    std::string joined;
    for (const Isa* isa : available()) joined += (joined.empty() ? "" : " ") + std::string(isa->name);
    return joined;
  }();
  return names.c_str();
}

double fm_busy_s(const fm_context* context) { return context->busy_s; }

int64_t fm_workspace_bytes(const fm_context* c) {
  return c->input.bytes() + c->hidden.bytes() + c->gathered.bytes() + c->attention.bytes() + c->normed.bytes();
}
