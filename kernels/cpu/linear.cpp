// Matrix products and gated networks of dense layers, for one token or many.
#include <algorithm>
#include <vector>

#include "context.h"

using namespace flashmoe;

namespace {

// x [T, K] -> c->input, in c->blocks of at most `most` tokens.
void prepare(fm_context* c, const Layout& layout, int most, const float* x, int64_t tokens) {
  cut_blocks(tokens, most, &c->blocks);
  c->input.reserve(layout, tokens);
  c->pool.run(int64_t(c->blocks.size()), [&](int64_t i) {
    const TokenBlock& block = c->blocks[size_t(i)];
    const float* rows[kMaxTokens];
    for (int m = 0; m < block.count; m++) rows[m] = x + (block.first + m) * layout.columns;
    c->input.fill(c->isa, layout, block.first, block.count, rows);
  });
}

}  // namespace

void fm_linear(fm_context* c, const fm_matrix* w, const float* bias, const float* x, int64_t tokens, int32_t exact,
               float* y, int64_t y_step) {
  Busy busy(c);
  const Layout layout(w->format, w->columns, exact != 0);
  prepare(c, layout, layout.most_tokens(c->isa), x, tokens);
  const int64_t step = rows_of_item(*w, tokens);
  c->pool.run((w->rows + step - 1) / step, [&](int64_t item) {
    const int64_t begin = item * step, end = std::min<int64_t>(w->rows, begin + step);
    for (const TokenBlock& block : c->blocks) {
      float* out = y + block.first * y_step + begin;
      multiply(c->isa, *w, layout, c->input, block, begin, end, out, y_step);
      for (int m = 0; bias != nullptr && m < block.count; m++)
        for (int64_t i = 0; i < end - begin; i++) out[m * y_step + i] += bias[begin + i];
    }
  });
}

void fm_mlp(fm_context* c, int32_t activation, const fm_matrix* gate, const fm_matrix* up, const fm_matrix* down,
            const float* x, int64_t tokens, int32_t exact, const float* factor, float* y) {
  Busy busy(c);
  const Layout in(gate->format, gate->columns, exact != 0), out(down->format, down->columns, exact != 0);
  prepare(c, in, std::min(in.most_tokens(c->isa), out.most_tokens(c->isa)), x, tokens);  // formats may differ
  c->hidden.reserve(out, tokens);
  const int64_t width = gate->rows;
  c->pool.run(out.padded / kGroup, [&](int64_t group) {
    const int64_t begin = std::min(width, group * kGroup), end = std::min(width, begin + kGroup);
    for (const TokenBlock& block : c->blocks) {
      float g[kMaxTokens * kGroup] = {}, u[kMaxTokens * kGroup] = {}, h[kMaxTokens * kGroup];
      multiply(c->isa, *gate, in, c->input, block, begin, end, g, kGroup);
      multiply(c->isa, *up, in, c->input, block, begin, end, u, kGroup);
      c->isa.activate(activation, 7.f, 1.702f, block.count * kGroup, g, u, h);
      c->hidden.fill_group(c->isa, out, block.first, block.count, group, h);
    }
  });
  const int64_t step = rows_of_item(*down, tokens);
  c->pool.run((down->rows + step - 1) / step, [&](int64_t item) {
    const int64_t begin = item * step, end = std::min<int64_t>(down->rows, begin + step);
    for (const TokenBlock& block : c->blocks)
      for (int64_t row = begin; row < end; row += kTileRows) {
        float part[kMaxTokens * kTileRows];
        const int64_t rows = std::min<int64_t>(kTileRows, end - row);
        multiply(c->isa, *down, out, c->hidden, block, row, row + rows, part, kTileRows);
        for (int m = 0; m < block.count; m++) {
          const int64_t token = block.first + m;
          c->isa.add_scaled(factor == nullptr ? 1.f : factor[token], part + m * kTileRows, rows,
                            y + token * down->rows + row);
        }
      }
  });
}
