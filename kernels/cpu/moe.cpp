// The routed experts of one layer: gate and up, activation, down, weighted sum.
//
// Two phases a call, with a barrier between them: 32 rows of gate and up give one finished group of an expert's hidden
// activations, ready for down; 16-row tiles of down then write their part of the products. Each (token, k) has a row
// of products of its own and rows are summed in the order of k at the end: so experts may be computed in any order
// and in any number of calls.
#include <algorithm>
#include <cstring>
#include <vector>

#include "context.h"

using namespace flashmoe;

namespace {

// gate, up and down of an expert as matrices. Of a packed one only down is used so: gate and up alternate tiles.
struct Expert {
  fm_matrix gate, up, down;
};

Expert expert_of(const fm_experts& e, const void* const* pointers) {
  if (!is_tiled(e.format))
    return {{pointers[0], e.format, e.width, e.hidden}, {pointers[1], e.format, e.width, e.hidden},
            {pointers[2], e.format, e.hidden, e.width}};
  const ExpertShape shape{e.hidden, e.width, bits_of(e.format)};
  const auto* blob = static_cast<const uint8_t*>(pointers[0]);
  return {{blob, e.format, e.width, e.hidden}, {blob + shape.up_tile(), e.format, e.width, e.hidden},
          {blob + shape.down_offset(), e.format, e.hidden, e.width}};
}

// 32 rows of gate and of up, from row `begin`, times a block: g, u [count][32]. Rows past the width give 0.
void gate_and_up(const Isa& isa, const fm_experts& e, const Expert& expert, const Layout& in, const Activations& x,
                 const TokenBlock& block, int64_t begin, float* g, float* u) {
  if (!in.tiled) {
    const int64_t end = std::min<int64_t>(e.width, begin + kGroup);
    if (end < begin + kGroup) {
      std::memset(g, 0, sizeof(float) * kMaxTokens * kGroup);
      std::memset(u, 0, sizeof(float) * kMaxTokens * kGroup);
    }
    multiply(isa, expert.gate, in, x, block, begin, end, g, kGroup);
    multiply(isa, expert.up, in, x, block, begin, end, u, kGroup);
    return;
  }
  const int bits = bits_of(e.format);
  const int64_t tile_size = tile_bytes(e.hidden, bits);
  const TileKernel kernel = isa.tile[bits == 8][in.exact][block.count];
  const Block activations = x.block(in, block.first);
  const auto* pair = static_cast<const uint8_t*>(expert.gate.data) + begin / kTileRows * 2 * tile_size;
  for (int half = 0; half < 2; half++)
    for (float* to : {g, u}) {
      float tile[kMaxTokens * kTileRows];
      kernel(pair, in.padded / kGroup, activations, tile);
      for (int m = 0; m < block.count; m++)
        std::memcpy(to + m * kGroup + half * kTileRows, tile + m * kTileRows, sizeof(float) * kTileRows);
      pair += tile_size;
    }
}

}  // namespace

void fm_moe_begin(fm_context* c, const fm_experts* experts, const float* x, int64_t tokens, int32_t top_k) {
  Busy busy(c);
  c->experts = *experts, c->x = x, c->tokens = tokens, c->top_k = top_k;
  if (tokens != 1) return;  // several tokens are gathered expert by expert
  const Layout in(experts->format, experts->hidden, experts->exact != 0);
  c->gathered.reserve(in, 1);
  c->gathered.fill(c->isa, in, 0, 1, &x);
}

void fm_moe_experts(fm_context* c, const void* const* table, int64_t n, const int32_t* row_begin, const int32_t* rows,
                    float* products) {
  Busy busy(c);
  const fm_experts& e = c->experts;
  const Isa& isa = c->isa;
  const Layout in(e.format, e.hidden, e.exact != 0), out(e.format, e.width, e.exact != 0);
  const bool one_token = c->tokens == 1;
  const int64_t total = row_begin[n] - row_begin[0];

  // The tokens of each expert in blocks; block i belongs to the expert with first_block[e] <= i < first_block[e + 1].
  c->blocks.clear();
  c->first_block.clear();
  for (int64_t expert = 0; expert < n; expert++) {
    c->first_block.push_back(int64_t(c->blocks.size()));
    for (int64_t row = row_begin[expert]; row < row_begin[expert + 1]; row += in.most_tokens(isa))
      c->blocks.push_back({row - row_begin[0], int(std::min<int64_t>(in.most_tokens(isa), row_begin[expert + 1] - row))});
  }
  c->first_block.push_back(int64_t(c->blocks.size()));
  const int32_t* row_of = rows + row_begin[0];

  if (!one_token) {
    c->gathered.reserve(in, total);
    c->pool.run(int64_t(c->blocks.size()), [&](int64_t i) {
      const TokenBlock& block = c->blocks[size_t(i)];
      const float* from[kMaxTokens];
      for (int m = 0; m < block.count; m++) from[m] = c->x + row_of[block.first + m] / c->top_k * int64_t(e.hidden);
      c->gathered.fill(isa, in, block.first, block.count, from);
    });
  }

  c->hidden.reserve(out, total);
  const int64_t groups = out.padded / kGroup;
  c->pool.run(n * groups, [&](int64_t item) {
    const int64_t which = item / groups, group = item % groups;
    const Expert expert = expert_of(e, table + 3 * which);
    for (int64_t i = c->first_block[size_t(which)]; i < c->first_block[size_t(which) + 1]; i++) {
      const TokenBlock& block = c->blocks[size_t(i)];
      const TokenBlock x_block = one_token ? TokenBlock{0, 1} : block;
      float g[kMaxTokens * kGroup], u[kMaxTokens * kGroup], h[kMaxTokens * kGroup];
      gate_and_up(isa, e, expert, in, c->gathered, x_block, group * kGroup, g, u);
      isa.activate(e.activation, e.limit, e.alpha, block.count * kGroup, g, u, h);
      c->hidden.fill_group(isa, out, block.first, block.count, group, h);
    }
  });

  const fm_matrix down_shape{nullptr, e.format, e.hidden, e.width};
  const int64_t step = rows_of_item(down_shape, total), items = (e.hidden + step - 1) / step;
  c->pool.run(n * items, [&](int64_t item) {
    const int64_t which = item / items, begin = item % items * step;
    const int64_t end = std::min<int64_t>(e.hidden, begin + step);
    const Expert expert = expert_of(e, table + 3 * which);
    for (int64_t i = c->first_block[size_t(which)]; i < c->first_block[size_t(which) + 1]; i++) {
      const TokenBlock& block = c->blocks[size_t(i)];
      for (int64_t row = begin; row < end; row += kTileRows) {
        float part[kMaxTokens * kTileRows];
        const int64_t count = std::min<int64_t>(kTileRows, end - row);
        multiply(isa, expert.down, out, c->hidden, block, row, row + count, part, kTileRows);
        for (int m = 0; m < block.count; m++)
          std::memcpy(products + row_of[block.first + m] * int64_t(e.hidden) + row, part + m * kTileRows,
                      sizeof(float) * count);
      }
    }
  });
}

void fm_moe_end(fm_context* c, const float* products, const float* weights, float* y) {
  Busy busy(c);
  const int64_t hidden = c->experts.hidden, top_k = c->top_k;
  const auto combine = [&](int64_t token) {
    float* to = y + token * hidden;
    for (int64_t begin = 0; begin < hidden; begin += 1024) {
      const int64_t count = std::min<int64_t>(1024, hidden - begin);
      float sum[1024] = {};
      for (int64_t k = 0; k < top_k; k++) {
        const int64_t row = token * top_k + k;
        c->isa.add_scaled(weights[row], products + row * hidden + begin, count, sum);
      }
      c->isa.add_scaled(1.f, sum, count, to + begin);
    }
  };
  if (c->tokens == 1) combine(0);  // some microseconds: not worth waking anybody
  else c->pool.run(c->tokens, combine);
}
