// What the parts of the library share: the threads, the instruction set, the workspace, and activations made ready.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "flashmoe_cpu.h"
#include "isa.h"
#include "packed_layout.h"
#include "thread_pool.h"

namespace flashmoe {

// Uninitialised memory that grows and never shrinks, aligned to cache lines, with a line to spare.
class Buffer {
 public:
  ~Buffer() { std::free(data_); }
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <class T>
  T* fit(int64_t count) {
    const int64_t needed = round_up(count * int64_t(sizeof(T)), 64) + 64;
    if (needed > bytes_) {
      std::free(data_);
      bytes_ = 0;
      data_ = std::aligned_alloc(64, size_t(needed));
      if (data_ == nullptr) throw std::bad_alloc();
      bytes_ = needed;
    }
    return static_cast<T*>(data_);
  }
  template <class T>
  T* get() const {
    return static_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

inline bool is_tiled(int32_t format) { return format == FM_INT4 || format == FM_INT8; }
inline int bits_of(int32_t format) { return format == FM_INT4 ? 4 : 8; }
inline int32_t zero_code(int32_t format) { return format == FM_INT4 ? 8 : 128; }
inline int64_t element_bytes(int32_t format) { return format == FM_F32 ? 4 : 2; }

// How one matrix kernel wants its activations: columns padded, int8 or fp32.
struct Layout {
  bool tiled, exact;
  int32_t zero;
  int64_t columns, padded;  // padded: to 64 for tiles, to 32 for rows

  Layout(int32_t format, int64_t columns_, bool exact_)
      : tiled(is_tiled(format)), exact(exact_ || !tiled), zero(tiled ? zero_code(format) : 0), columns(columns_),
        padded(round_up(columns_, tiled ? kSuper : kGroup)) {}

  int most_tokens(const Isa& isa) const { return tiled ? isa.tile_tokens : isa.row_tokens; }  // of a kernel call
};

// Activations of any number of tokens in blocks of at most kMaxTokens, as Block describes them (tiles) or as padded
// rows (row kernels). Token t of block b, at offset b * padded * block size: offsets are linear in the tokens.
class Activations {
 public:
  void reserve(const Layout& layout, int64_t tokens);
  // Values of `count` tokens that become one block beginning at token `first`; each row has layout.columns floats.
  void fill(const Isa& isa, const Layout& layout, int64_t first, int count, const float* const* rows);
  // One group of 32 columns of a block, from values [count][32].
  void fill_group(const Isa& isa, const Layout& layout, int64_t first, int count, int64_t group, const float* values);
  Block block(const Layout& layout, int64_t first) const;
  const float* rows(const Layout& layout, int64_t first) const { return values_.get<float>() + first * layout.padded; }
  float* rows(const Layout& layout, int64_t first) { return values_.get<float>() + first * layout.padded; }
  int64_t bytes() const { return q_.bytes() + scale_.bytes() + bias_.bytes() + values_.bytes(); }

 private:
  Buffer q_, scale_, bias_, values_;
};

// A stretch of tokens that one kernel call takes.
struct TokenBlock {
  int64_t first;  // in Activations
  int count;
};

}  // namespace flashmoe

struct fm_context {
  fm_context(int threads, const flashmoe::Isa& isa_) : isa(isa_), pool(threads) {}

  const flashmoe::Isa& isa;
  flashmoe::ThreadPool pool;
  double busy_s = 0;

  flashmoe::Activations input, hidden;  // of linear layers and of one expert event
  flashmoe::Buffer attention;           // of fm_attend: q, k, v and its result
  flashmoe::Buffer normed;

  // The event between fm_moe_begin and fm_moe_end.
  fm_experts experts{};
  const float* x = nullptr;
  int64_t tokens = 0;
  int32_t top_k = 0;
  flashmoe::Activations gathered;
  std::vector<flashmoe::TokenBlock> blocks;
  std::vector<int64_t> first_block;
};

namespace flashmoe {

// Adds the time between construction and destruction to the context's.
class Busy {
 public:
  explicit Busy(fm_context* context) : context_(context), begin_(std::chrono::steady_clock::now()) {}
  ~Busy() { context_->busy_s += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count(); }

 private:
  fm_context* context_;
  std::chrono::steady_clock::time_point begin_;
};

// Cut tokens [0, n) into blocks of at most `most`.
void cut_blocks(int64_t n, int most, std::vector<TokenBlock>* blocks);

// Rows [begin, end) of a matrix times one block of activations: out [count][out_step], row `begin` first.
void multiply(const Isa&, const fm_matrix&, const Layout&, const Activations&, const TokenBlock&, int64_t begin,
              int64_t end, float* out, int64_t out_step);

// Rows of a matrix that make one item of work: whole tiles, some tens of KB.
int64_t rows_of_item(const fm_matrix&, int64_t tokens);

}  // namespace flashmoe
