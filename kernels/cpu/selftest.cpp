// The library against itself and against double precision, without Python: for sanitizers, other machines, qemu.
//
//   cmake -S . -B build -DFLASHMOE_PYTHON=OFF [-DFLASHMOE_SANITIZE=address,undefined] && cmake --build build
//   build/kernels/cpu/selftest [--cases 3000] [--seed 1]
//
// Oracles: bits are compared with the scalar kernels, one thread, one call; values with plain loops in double, within
// bounds made of the sums of absolute products; packed weights with the layout's formula, written down here a second
// time. Inputs come from integer arithmetic alone, so every machine sees the same ones, and the digest in the last line
// (of the scalar results; NaNs count as one value) is the same on every machine.
//
// Memory given to the library begins at odd addresses where it may, is filled with a pattern, and ends where it must:
// at guard bytes, or under AddressSanitizer at the end of the allocation.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "flashmoe_cpu.h"
#include "isa.h"
#include "packed_layout.h"
#include "thread_pool.h"

using namespace flashmoe;

namespace {

// ---- chance, memory, failures -----------------------------------------------------------------------------------

class Rng {  // splitmix64. No two draws in one expression or argument list: compilers differ in their order
 public:
  explicit Rng(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int64_t below(int64_t n) { return int64_t(next() % uint64_t(n)); }
  int64_t between(int64_t least, int64_t most) { return least + below(most - least + 1); }
  bool one_in(int64_t n) { return below(n) == 0; }
  double uniform() { return double(next() >> 11) * 0x1p-53; }
  float normal() {
    double sum = -2;
    for (int i = 0; i < 4; i++) sum += uniform();
    return float(sum * 1.7320508);
  }
  // Mostly small, so that many cases fit in a minute; now and then beyond a few superblocks.
  int64_t size() { return one_in(12) ? between(1, 200) : one_in(3) ? 16 * between(1, 6) : between(1, 40); }

 private:
  uint64_t state_;
};

int64_t case_number = -1;
int failures = 0;

void expect(bool ok, const std::string& what) {
  if (ok) return;
  std::printf("FAIL  case %lld: %s\n", static_cast<long long>(case_number), what.c_str());
  if (++failures >= 20) std::exit(1);
}

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGuardBytes = 0;
#else
constexpr size_t kGuardBytes = 64;
#endif

// n elements; `shift` bytes off the alignment that malloc gives.
template <class T>
class Memory {
 public:
  explicit Memory(int64_t n, size_t shift = 0)
      : bytes_(size_t(n) * sizeof(T)), shift_(shift), all_(new uint8_t[bytes_ + shift + 2 * kGuardBytes]) {
    std::memset(all_.get(), 0xb3, bytes_ + shift + 2 * kGuardBytes);
  }
  Memory(Memory&&) = default;
  Memory& operator=(Memory&&) = default;
  ~Memory() {
    if (!all_) return;
    for (size_t i = 0; i < kGuardBytes; i++)
      expect(all_[i] == 0xb3 && all_[bytes_ + shift_ + kGuardBytes + i] == 0xb3, "guard bytes written");
  }
  T* data() const { return reinterpret_cast<T*>(all_.get() + kGuardBytes + shift_); }
  int64_t size() const { return int64_t(bytes_ / sizeof(T)); }
  T& operator[](int64_t i) const { return data()[i]; }
  T* begin() const { return data(); }
  T* end() const { return data() + size(); }

 private:
  size_t bytes_, shift_;
  std::unique_ptr<uint8_t[]> all_;
};
using Floats = Memory<float>;
using Bytes = Memory<uint8_t>;

Floats normals(Rng& rng, int64_t n, float scale = 1) {
  Floats values(n);
  for (float& v : values) v = rng.normal() * scale;
  return values;
}

Floats copy(const Floats& from) {
  Floats to(from.size());
  std::copy(from.begin(), from.end(), to.begin());
  return to;
}

uint32_t bits_of_float(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return f != f ? 0x7fc00000u : bits;  // which NaN is the machine's business
}
bool same(const float* a, const float* b, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    if (bits_of_float(a[i]) != bits_of_float(b[i])) return false;
  return true;
}
bool same(const Floats& a, const Floats& b) { return same(a.begin(), b.begin(), a.size()); }
bool any_poison(const Floats& a) {
  for (float f : a) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if (bits == 0xb3b3b3b3u) return true;
  }
  return false;
}

uint64_t digest = 14695981039346656037u;  // FNV-1a
void add_to(uint64_t* hash, uint8_t byte) { *hash = (*hash ^ byte) * 1099511628211u; }
void note(const Floats& values) {
  for (float f : values)
    for (int i = 0; i < 4; i++) add_to(&digest, uint8_t(bits_of_float(f) >> 8 * i));
}

// |a - b| <= bound, where neither may be NaN.
bool near(double a, double b, double bound) { return std::fabs(a - b) <= bound; }

// ---- what is tested ---------------------------------------------------------------------------------------------

const std::vector<int32_t> kFormats = {FM_INT4, FM_INT8, FM_BF16, FM_F16, FM_F32};
const char* const kFormatNames[] = {"int4", "int8", "bf16", "fp16", "fp32"};
constexpr double kRelative = 3e-5;  // of a sum of absolute products: chains of up to 200 fp32 roundings
bool packed(int32_t format) { return format <= FM_INT8; }

std::vector<const Isa*> isas;  // scalar first
struct Runner {
  fm_context* context;
  std::string name;
};
std::vector<Runner> runners;  // every instruction set with 1, 2 and 3 threads; scalar with 1 first
fm_context* scalar() { return runners[0].context; }

void make_runners() {
  std::string names = std::string(fm_isa_names()) + " ";
  std::vector<std::string> found;
  for (size_t end; (end = names.find(' ')) != std::string::npos; names.erase(0, end + 1))
    found.insert(found.begin(), names.substr(0, end));
  for (const std::string& name : found) {
    for (const Isa* isa : {isa_scalar(), isa_avx2(), isa_avx2vnni(), isa_avx512(), isa_neon()})
      if (isa != nullptr && name == isa->name) isas.push_back(isa);
    for (int threads : {1, 2, 3})
      runners.push_back({fm_create(threads, name.c_str()), name + " " + std::to_string(threads) + " threads"});
  }
  expect(isas.size() == found.size() && found[0] == "scalar", "instruction sets by name");
  expect(fm_create(1, "pdp11") == nullptr && fm_create(0, nullptr) == nullptr, "no context for nonsense");
}

double half_to_double(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const double sign = h >> 15 ? -1 : 1;
  if (exponent == 31) return mantissa ? std::nan("") : sign * INFINITY;
  return exponent == 0 ? sign * std::ldexp(mantissa, -24) : sign * std::ldexp(1024 + mantissa, exponent - 25);
}

double plain_element(int32_t format, const uint8_t* data, int64_t i) {
  float f;
  if (format == FM_F32) {
    std::memcpy(&f, data + 4 * i, 4);
    return f;
  }
  uint16_t half;
  std::memcpy(&half, data + 2 * i, 2);
  if (format == FM_F16) return half_to_double(half);
  const uint32_t bits = uint32_t(half) << 16;
  std::memcpy(&f, &bits, 4);
  return f;
}

// The layout, from packed_layout.h, once more.
double tile_weight(const uint8_t* tile, int bits, int64_t r, int64_t k) {
  const uint8_t* superblock = tile + k / 64 * (64 + 128 * bits);
  const int64_t kk = k % 64;
  uint16_t scale;
  std::memcpy(&scale, superblock + 2 * (16 * (kk / 32) + r), 2);
  int code;
  if (bits == 8) {
    code = superblock[64 + 64 * (kk / 4) + 4 * r + kk % 4] - 128;
  } else {
    const int byte = superblock[64 + 64 * (kk / 8) + 4 * r + kk % 4];
    code = (kk % 8 < 4 ? byte & 15 : byte >> 4) - 8;
  }
  return code * half_to_double(scale);
}

double weight(const fm_matrix& m, int64_t row, int64_t k) {
  const auto* data = static_cast<const uint8_t*>(m.data);
  if (!packed(m.format)) return plain_element(m.format, data, row * m.columns + k);
  const int bits = m.format == FM_INT4 ? 4 : 8;
  const int64_t tile = (m.columns + 63) / 64 * (64 + 128 * bits);
  return tile_weight(data + row / 16 * tile, bits, row % 16, k);
}

// A random matrix and its memory.
struct Weights {
  Bytes memory;
  fm_matrix matrix;
};

Bytes narrow(const Floats& values, int32_t format, size_t shift) {
  const int64_t size = format == FM_F32 ? 4 : 2;
  Bytes bytes(size * values.size(), shift);
  for (int64_t i = 0; i < values.size(); i++) {
    const uint32_t bits = bits_of_float(values[i]);
    uint16_t half = uint16_t(bits >> 16);
    if (format == FM_F16) {  // towards zero, subnormals too
      const int exponent = int(bits >> 23 & 255) - 112;
      const uint32_t mantissa = (bits & 0x7fffffu) | 0x800000u;
      half = exponent >= 31 ? 0x7bffu
             : exponent > 0 ? uint16_t(exponent << 10 | (mantissa >> 13 & 1023))
             : exponent > -11 ? uint16_t(mantissa >> (14 - exponent)) : uint16_t(0);
      half = uint16_t(half | (bits >> 16 & 0x8000u));
    }
    if (format == FM_F32) std::memcpy(bytes.data() + 4 * i, &values[i], 4);
    else std::memcpy(bytes.data() + 2 * i, &half, 2);
  }
  return bytes;
}

fm_matrix fp32_matrix(const Floats& values, int64_t rows, int64_t columns) {
  return {values.data(), FM_F32, int32_t(rows), int32_t(columns)};
}

Weights to_format(Rng& rng, const Floats& values, int32_t format, int64_t rows, int64_t columns) {
  if (!packed(format)) {
    Bytes bytes = narrow(values, format, size_t(rng.below(4)));
    const fm_matrix matrix{bytes.data(), format, int32_t(rows), int32_t(columns)};
    return {std::move(bytes), matrix};
  }
  Bytes bytes(fm_packed_matrix_bytes(format, rows, columns), size_t(rng.below(4)));
  const fm_matrix source = fp32_matrix(values, rows, columns);
  double error[2] = {};
  fm_pack_matrix(scalar(), &source, format, nullptr, bytes.data(), error);
  const fm_matrix matrix{bytes.data(), format, int32_t(rows), int32_t(columns)};
  return {std::move(bytes), matrix};
}

Weights random_weights(Rng& rng, int32_t format, int64_t rows, int64_t columns) {
  return to_format(rng, normals(rng, rows * columns, 1 / std::sqrt(float(columns))), format, rows, columns);
}

// w x in double, and a bound on what fp32, and int8 activations, may miss of it.
struct Product {
  double value, size, bound;  // size: sum of absolute products
};

Product product(const fm_matrix& m, int64_t row, const float* x, bool int8_activations) {
  Product p{0, 0, 0};
  for (int64_t begin = 0; begin < m.columns; begin += 32) {
    double largest = 0, weights = 0;
    for (int64_t k = begin; k < std::min<int64_t>(m.columns, begin + 32); k++) {
      const double w = weight(m, row, k);
      p.value += w * x[k];
      p.size += std::fabs(w * x[k]);
      weights += std::fabs(w);
      largest = std::max(largest, std::fabs(double(x[k])));
    }
    if (int8_activations) p.bound += largest < 1e-30 ? largest * weights : largest / 254 * 1.001 * weights;
  }
  p.bound += kRelative * (p.size + p.bound);
  return p;
}

double activation(int32_t kind, double g, double u, double limit, double alpha) {
  switch (kind) {
    case FM_SILU: return g / (1 + std::exp(-g)) * u;
    case FM_GELU: return 0.5 * g * (1 + std::erf(g / std::sqrt(2.0))) * u;
    case FM_GELU_TANH: return 0.5 * g * (1 + std::tanh(0.79788456080286536 * (g + 0.044715 * g * g * g))) * u;
    case FM_RELU: return g < 0 ? 0 : g * u;
  }
  g = std::min(g, limit), u = std::max(-limit, std::min(u, limit));
  return (u + 1) * g / (1 + std::exp(-alpha * g));
}

// ---- single kernels ---------------------------------------------------------------------------------------------

void check_tile(Rng& rng) {
  const int bits = rng.one_in(2) ? 4 : 8;
  const int64_t superblocks = rng.between(1, 4), columns = 64 * superblocks, groups = 2 * superblocks;
  Bytes tile(superblocks * superblock_bytes(bits), size_t(rng.below(4)));
  for (uint8_t& b : tile) b = uint8_t(rng.next());
  const bool wild = rng.one_in(8);  // any fp16 scale, NaN included
  for (int64_t s = 0; s < superblocks; s++)
    for (int i = 0; i < 32; i++) {
      const auto scale = uint16_t(wild ? rng.next() : 0x2000 + rng.below(0x1000));
      std::memcpy(tile.data() + s * superblock_bytes(bits) + 2 * i, &scale, 2);
    }
  // One token alone on the scalar kernel is the oracle for blocks of any size.
  const int tokens = int(rng.between(1, kMaxTokens));
  std::vector<Memory<int8_t>> q;
  std::vector<Floats> scale, values, want[2];
  std::vector<Memory<int32_t>> bias;
  const bool extreme = rng.one_in(4);  // all activations at +-127
  for (int m = 0; m < tokens; m++) {
    q.emplace_back(columns), scale.emplace_back(groups), bias.emplace_back(groups), values.emplace_back(columns);
    for (int8_t& v : q[m]) v = int8_t(extreme ? (rng.one_in(2) ? 127 : -127) : rng.between(-127, 127));
    for (float& v : scale[m]) v = rng.one_in(9) ? 0.f : float(rng.uniform()) * .1f;
    for (float& v : values[m]) v = rng.normal();
    for (int64_t g = 0; g < groups; g++) {
      int sum = 0;
      for (int k = 0; k < 32; k++) sum += q[m][32 * g + k];
      bias[m][g] = -(bits == 4 ? 8 : 128) * sum;
    }
    for (int exact : {0, 1}) {
      want[exact].emplace_back(16);
      isas[0]->tile[bits == 8][exact][1](
          tile.data(), groups, {q[m].data(), scale[m].data(), bias[m].data(), values[m].data()},
          want[exact][m].data());
      note(want[exact][m]);
      for (int64_t r = 0; r < 16 && !wild; r++) {
        double sum = 0, size = 0;
        for (int64_t k = 0; k < columns; k++) {
          const double x = exact ? values[m][k] : q[m][k] * double(scale[m][k / 32]);
          const double w = tile_weight(tile.data(), bits, r, k);
          sum += w * x, size += std::fabs(w * x);
        }
        expect(near(want[exact][m][r], sum, kRelative * size), "scalar tile kernel against double");
      }
    }
  }
  for (const Isa* isa : isas) {
    const int count = std::min(tokens, isa->tile_tokens);
    Memory<int8_t> qs(columns * count);
    Floats scales(groups * count), all(columns * count);
    Memory<int32_t> biases(groups * count);
    for (int m = 0; m < count; m++) {
      for (int64_t k = 0; k < columns; k++)
        qs[(k / 4 * count + m) * 4 + k % 4] = q[m][k], all[k * count + m] = values[m][k];
      for (int64_t g = 0; g < groups; g++) scales[g * count + m] = scale[m][g], biases[g * count + m] = bias[m][g];
    }
    for (int exact : {0, 1}) {
      Floats out(16 * count);
      isa->tile[bits == 8][exact][count](tile.data(), groups,
                                         {qs.data(), scales.data(), biases.data(), all.data()}, out.data());
      for (int m = 0; m < count; m++)
        expect(same(out.data() + 16 * m, want[exact][m].data(), 16),
               std::string(isa->name) + " tile int" + std::to_string(bits) + (exact ? " exact" : "") + ", " +
                   std::to_string(count) + " tokens: other bits than scalar");
    }
  }
}

void check_rows(Rng& rng) {
  const int kind = int(rng.below(3)), size = kind == 2 ? 4 : 2;
  const int64_t columns = rng.size(), padded = round_up(columns, 32), rows = 4, tokens = kMaxTokens;
  const Floats values = normals(rng, rows * columns, rng.one_in(9) ? 1e-6f : 1.f);
  Bytes w = narrow(values, FM_BF16 + kind, size_t(rng.below(4)));
  if (rng.one_in(16))  // any bits at all: NaN, infinity, subnormals
    for (uint8_t& b : w) b = uint8_t(rng.next());
  Floats x(tokens * padded);
  for (int64_t i = 0; i < x.size(); i++) x[i] = i % padded < columns ? rng.normal() : 0.f;
  Floats want(tokens * rows);
  for (int64_t m = 0; m < tokens; m++)
    for (int64_t r = 0; r < rows; r++) {
      isas[0]->one_row[kind][1](w.data() + r * columns * size, columns * size, columns, x.data() + m * padded, padded,
                                want.data() + m * rows + r, 1);
      const fm_matrix matrix{w.data(), FM_BF16 + kind, int32_t(rows), int32_t(columns)};
      const Product p = product(matrix, r, x.data() + m * padded, false);
      expect(!std::isfinite(p.size) || p.size > 1e38 || near(want[m * rows + r], p.value, p.bound + 1e-37),
             "scalar row kernel against double");
    }
  note(want);
  for (const Isa* isa : isas)
    for (int m = 1; m <= isa->row_tokens; m++)
      for (int r : {1, isa->rows}) {
        Floats out(m * rows);
        for (int64_t row = 0; row < rows; row += r)
          (r == 1 ? isa->one_row : isa->many_rows)[kind][m](w.data() + row * columns * size, columns * size, columns,
                                                           x.data(), padded, out.data() + row, rows);
        expect(same(out.begin(), want.begin(), out.size()), std::string(isa->name) + " rows " +
               kFormatNames[FM_BF16 + kind] + ", " + std::to_string(m) + " tokens: other bits than scalar");
      }
}

float wild_float(Rng& rng) {
  static const float special[] = {0.f, -0.f, 1e-45f, -1e-40f, 1e-31f, 3.4e38f, -3.4e38f, INFINITY, -INFINITY, NAN};
  if (rng.one_in(3)) return special[rng.below(10)];
  const float value = rng.normal();
  return value * float(std::ldexp(1.0, int(rng.between(-140, 120))));
}

void check_vectors(Rng& rng) {
  const int64_t n = rng.size();
  const bool wild = rng.one_in(4);
  Floats a(n), b(n);
  for (int64_t i = 0; i < n; i++) a[i] = wild ? wild_float(rng) : 9 * rng.normal(), b[i] = wild ? wild_float(rng) : rng.normal();
  std::vector<Floats> first;  // of scalar
  for (const Isa* isa : isas) {
    std::vector<Floats> results;
    results.emplace_back(1);
    results[0][0] = isa->dot(a.data(), b.data(), n);
    results.push_back(copy(b));
    isa->add_scaled(a[0], a.data(), n, results[1].data());
    results.push_back(copy(a));
    results.emplace_back(1);
    results[3][0] = isa->exp_shifted(results[2].data(), n);
    for (int32_t kind = FM_SILU; kind <= FM_SWIGLU_CLAMPED; kind++) {
      results.emplace_back(n);
      isa->activate(kind, 7.f, 1.702f, n, a.data(), b.data(), results.back().data());
    }
    for (int32_t zero : {8, 128}) {
      Memory<int8_t> q(8 * 12 - 8);  // 4 bytes every 12
      Memory<int32_t> bias(1);
      results.emplace_back(34);
      Floats& all = results.back();
      Floats group(32);
      float largest = 0;
      for (int k = 0; k < 32; k++) group[k] = a[k % n], largest = std::max(largest, std::fabs(group[k]));
      isa->quantise_group(group.data(), zero, q.data(), 12, &all[0], bias.data());
      all[1] = float(bias[0]);
      int sum = 0;
      for (int k = 0; k < 32; k++) {
        const int code = q[k / 4 * 12 + k % 4];
        sum += code, all[2 + k] = float(code);
        expect(code >= -127 && code <= 127, "code in range");
        if (!wild) expect(near(code * double(all[0]), group[k], largest / 254 * 1.0001 + 1e-37), "int8 activation");
      }
      expect(bias[0] == -zero * sum, "bias of a group");
      bool finite = true;
      for (float v : group) finite = finite && std::isfinite(v);
      expect(finite == bool(std::isfinite(all[0])), "a value that is no number makes the scale NaN");
    }
    if (isa == isas[0]) first = std::move(results);
    else
      for (size_t i = 0; i < results.size(); i++)
        expect(same(results[i], first[i]), std::string(isa->name) + " vector function " + std::to_string(i));
  }
  for (size_t i = 0; i < first.size(); i++)
    if (i != 4 + FM_GELU) note(first[i]);  // erf is the C library's
  if (wild) return;
  double sum = 0, size = 0, largest = a[0], total = 0;
  for (int64_t i = 0; i < n; i++) sum += double(a[i]) * b[i], size += std::fabs(double(a[i]) * b[i]), largest = std::max<double>(largest, a[i]);
  expect(near(first[0][0], sum, kRelative * size), "dot");
  for (int64_t i = 0; i < n; i++) {
    const double e = std::exp(double(float(a[i] - float(largest))));
    total += e;
    expect(near(first[2][i], e, 2.4e-7 * e + 1e-38), "exp within 2 ulp");
    for (int32_t kind = FM_SILU; kind <= FM_SWIGLU_CLAMPED; kind++) {
      const double h = activation(kind, a[i], b[i], 7, 1.702f);
      expect(near(first[size_t(4 + kind)][i], h, 2e-6 * std::fabs(h) + 1e-6 * std::fabs(double(a[i]) * b[i]) + 1e-30), "activation " + std::to_string(kind));
    }
  }
  expect(near(first[3][0], total, 1e-5 * total), "sum of exp");
}

// ---- layers -----------------------------------------------------------------------------------------------------

// Every runner's result against the first one's. portable: part of the digest (erf is the C library's, so GELU is not).
template <class Run>
Floats same_everywhere(const std::string& what, const Run& run, bool portable = true) {
  Floats want = run(scalar());
  expect(!any_poison(want), what + ": output left unwritten");
  if (portable) note(want);
  for (size_t i = 1; i < runners.size(); i++)
    expect(same(run(runners[i].context), want), what + ": other bits on " + runners[i].name);
  return want;
}

void check_linear(Rng& rng) {
  const int32_t format = kFormats[size_t(rng.below(5))];
  const int64_t rows = rng.size(), columns = rng.size(), tokens = rng.one_in(8) ? rng.between(1, 40) : rng.between(1, 10);
  const int64_t step = rows + rng.below(3);
  const bool exact = rng.one_in(2), biased = rng.one_in(2);
  const Weights w = random_weights(rng, format, rows, columns);
  const Floats x = normals(rng, tokens * columns), bias = normals(rng, rows);
  const std::string what = std::string("linear ") + kFormatNames[format] + (exact ? " exact " : " ") +
                           std::to_string(tokens) + "x" + std::to_string(columns) + "x" + std::to_string(rows);
  const auto run = [&](fm_context* c) {
    Floats strided((tokens - 1) * step + rows), y(tokens * rows);
    fm_linear(c, &w.matrix, biased ? bias.data() : nullptr, x.data(), tokens, exact, strided.data(), step);
    for (int64_t t = 0; t < tokens; t++) {
      std::copy_n(strided.data() + t * step, rows, y.data() + t * rows);
      const uint8_t* gap = reinterpret_cast<const uint8_t*>(strided.data() + t * step + rows);
      for (int64_t i = 0; t + 1 < tokens && i < 4 * (step - rows); i++) expect(gap[i] == 0xb3, what + ": gap written");
    }
    return y;
  };
  const Floats y = same_everywhere(what, run);
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t r = 0; r < rows; r++) {
      const Product p = product(w.matrix, r, x.data() + t * columns, packed(format) && !exact);
      const double offset = biased ? bias[r] : 0;
      expect(near(y[t * rows + r], p.value + offset, p.bound + 1e-6 * std::fabs(offset)), what + ": against double");
    }
  const int64_t token = rng.below(tokens);
  Floats alone(rows);
  fm_linear(scalar(), &w.matrix, biased ? bias.data() : nullptr, x.data() + token * columns, 1, exact, alone.data(), rows);
  expect(same(alone.data(), y.data() + token * rows, rows), what + ": a token alone has other bits");

  const int64_t n = rng.between(0, 4);
  Memory<int64_t> ids(n);
  for (int64_t& id : ids) id = rng.below(rows);
  Floats gathered(n * columns);
  fm_gather_rows(&w.matrix, ids.data(), n, gathered.data());
  for (int64_t i = 0; i < n * columns; i++)
    expect(gathered[i] == float(weight(w.matrix, ids[i / columns], i % columns)), "gathered rows");
}

struct MoeCase {
  int32_t format, activation;
  bool exact;
  int64_t hidden, width, experts, tokens, top_k;
  std::vector<Weights> matrices;  // gate, up, down of each expert; also of packed ones
  std::vector<Bytes> blobs;       // of packed ones
  Floats x, weights, y;
  std::vector<int32_t> ids;  // [tokens, top_k]

  const void* pointer(int64_t expert, int part) const {
    if (packed(format)) return part == 0 ? blobs[size_t(expert)].data() : nullptr;
    return matrices[size_t(3 * expert + part)].matrix.data;
  }
  const fm_matrix& matrix(int64_t expert, int part) const { return matrices[size_t(3 * expert + part)].matrix; }
  fm_experts shape() const {
    return {int32_t(hidden), int32_t(width), format, activation, exact, 7.f, 1.702f};
  }
};

MoeCase random_moe(Rng& rng) {
  const int64_t experts = rng.between(1, 5);
  MoeCase c{kFormats[size_t(rng.below(5))], int32_t(rng.below(5)), rng.one_in(2), rng.size(), rng.size(), experts,
            rng.one_in(3) ? 1 : rng.one_in(8) ? rng.between(1, 30) : rng.between(2, 9), rng.between(1, experts),
            {}, {}, Floats(0), Floats(0), Floats(0), {}};
  for (int64_t e = 0; e < experts; e++) {
    const Floats source[3] = {normals(rng, c.width * c.hidden, 1.5f / std::sqrt(float(c.hidden))),
                              normals(rng, c.width * c.hidden, 1.5f / std::sqrt(float(c.hidden))),
                              normals(rng, c.width * c.hidden, 1 / std::sqrt(float(c.width)))};
    for (int part = 0; part < 3; part++)
      c.matrices.push_back(to_format(rng, source[part], c.format, part == 2 ? c.hidden : c.width,
                                     part == 2 ? c.width : c.hidden));
    if (!packed(c.format)) continue;
    c.blobs.emplace_back(fm_packed_expert_bytes(c.format, c.hidden, c.width), size_t(rng.below(4)));
    const fm_matrix gate = fp32_matrix(source[0], c.width, c.hidden), up = fp32_matrix(source[1], c.width, c.hidden),
                    down = fp32_matrix(source[2], c.hidden, c.width);
    double error[2] = {};
    fm_pack_expert(scalar(), &gate, &up, &down, c.format, nullptr, nullptr, c.blobs.back().data(), error);
  }
  c.x = normals(rng, c.tokens * c.hidden), c.y = normals(rng, c.tokens * c.hidden);
  c.weights = normals(rng, c.tokens * c.top_k);
  for (int64_t t = 0; t < c.tokens; t++) {
    std::vector<int32_t> order;
    for (int32_t e = 0; e < experts; e++) order.insert(order.begin() + rng.below(e + 1), e);
    c.ids.insert(c.ids.end(), order.begin(), order.begin() + c.top_k);
  }
  return c;
}

// The layer in `calls` calls, experts in the order given; experts without tokens are left out, or not.
Floats run_moe(fm_context* context, const MoeCase& c, const std::vector<int32_t>& order, size_t calls, bool idle) {
  const fm_experts shape = c.shape();
  Floats products(c.tokens * c.top_k * c.hidden), y = copy(c.y);
  fm_moe_begin(context, &shape, c.x.data(), c.tokens, int32_t(c.top_k));
  for (size_t call = 0; call < calls; call++) {
    std::vector<const void*> pointers;
    std::vector<int32_t> found, begins{0};
    for (size_t i = order.size() * call / calls; i < order.size() * (call + 1) / calls; i++) {
      for (size_t row = 0; row < c.ids.size(); row++)
        if (c.ids[row] == order[i]) found.push_back(int32_t(row));
      if (int32_t(found.size()) == begins.back() && !idle) continue;
      begins.push_back(int32_t(found.size()));
      for (int part = 0; part < 3; part++) pointers.push_back(c.pointer(order[i], part));
    }
    Memory<const void*> table(int64_t(pointers.size()));
    Memory<int32_t> row_begin(int64_t(begins.size())), rows(int64_t(found.size()));
    std::copy(pointers.begin(), pointers.end(), table.begin());
    std::copy(begins.begin(), begins.end(), row_begin.begin());
    std::copy(found.begin(), found.end(), rows.begin());
    fm_moe_experts(context, table.data(), row_begin.size() - 1, row_begin.data(), rows.data(), products.data());
  }
  expect(!any_poison(products), "moe: products left unwritten");
  fm_moe_end(context, products.data(), c.weights.data(), y.data());
  return y;
}

// The same from other parts of the library, one token and one matrix at a time: must give the same bits.
Floats compose_moe(const MoeCase& c) {
  Floats y = copy(c.y);
  for (int64_t t = 0; t < c.tokens; t++) {
    Floats sum(c.hidden);
    std::fill(sum.begin(), sum.end(), 0.f);
    for (int64_t k = 0; k < c.top_k; k++) {
      const int64_t row = t * c.top_k + k, e = c.ids[size_t(row)];
      Floats gate(c.width), up(c.width), h(c.width), out(c.hidden);
      const float* x = c.x.data() + t * c.hidden;
      fm_linear(scalar(), &c.matrix(e, 0), nullptr, x, 1, c.exact, gate.data(), c.width);
      fm_linear(scalar(), &c.matrix(e, 1), nullptr, x, 1, c.exact, up.data(), c.width);
      isas[0]->activate(c.activation, 7.f, 1.702f, c.width, gate.data(), up.data(), h.data());
      fm_linear(scalar(), &c.matrix(e, 2), nullptr, h.data(), 1, c.exact, out.data(), c.hidden);
      for (int64_t i = 0; i < c.hidden; i++) sum[i] = std::fma(c.weights[row], out[i], sum[i]);
    }
    for (int64_t i = 0; i < c.hidden; i++) y[t * c.hidden + i] += sum[i];
  }
  return y;
}

void compare_with_double(const MoeCase& c, const Floats& y) {
  for (int64_t t = 0; t < c.tokens; t++) {
    std::vector<double> want(c.y.data() + t * c.hidden, c.y.data() + (t + 1) * c.hidden), bound(want.size());
    for (size_t i = 0; i < want.size(); i++) bound[i] = 1e-6 * std::fabs(want[i]);
    for (int64_t k = 0; k < c.top_k; k++) {
      const int64_t row = t * c.top_k + k, e = c.ids[size_t(row)];
      std::vector<double> h(size_t(c.width)), miss(size_t(c.width));
      for (int64_t i = 0; i < c.width; i++) {
        const Product g = product(c.matrix(e, 0), i, c.x.data() + t * c.hidden, false);
        const Product u = product(c.matrix(e, 1), i, c.x.data() + t * c.hidden, false);
        h[size_t(i)] = activation(c.activation, g.value, u.value, 7, 1.702f);
        miss[size_t(i)] = 1.2 * g.bound * (std::fabs(u.value) + 1) + (std::fabs(g.value) + 1) * u.bound;
      }
      for (int64_t o = 0; o < c.hidden; o++)
        for (int64_t i = 0; i < c.width; i++) {
          const double w = c.weights[row] * weight(c.matrix(e, 2), o, i);
          want[size_t(o)] += w * h[size_t(i)];
          bound[size_t(o)] += std::fabs(w) * (miss[size_t(i)] + kRelative * std::fabs(h[size_t(i)]));
        }
    }
    for (int64_t o = 0; o < c.hidden; o++)
      expect(near(y[t * c.hidden + o], want[size_t(o)], bound[size_t(o)] + 1e-30), "moe against double");
  }
}

void check_moe(Rng& rng) {
  const MoeCase c = random_moe(rng);
  const std::string what = std::string("moe ") + kFormatNames[c.format] + (c.exact ? " exact" : "") + " hidden " +
                           std::to_string(c.hidden) + " width " + std::to_string(c.width) + " tokens " +
                           std::to_string(c.tokens) + " activation " + std::to_string(c.activation);
  std::vector<int32_t> order;
  for (int32_t e = 0; e < c.experts; e++) order.push_back(e);
  const Floats want = run_moe(scalar(), c, order, 1, false);
  if (c.activation != FM_GELU) note(want);
  expect(same(compose_moe(c), want), what + ": other bits than its parts");
  for (const Runner& runner : runners) {
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[size_t(rng.below(int64_t(i)))]);
    const size_t calls = size_t(rng.between(1, c.experts + 1));
    expect(same(run_moe(runner.context, c, order, calls, rng.one_in(2)), want),
           what + ": other bits on " + runner.name + " in " + std::to_string(calls) + " calls");
  }
  if (c.exact || !packed(c.format)) compare_with_double(c, want);

  // A value that is no number shows in its own token's result, and nowhere else.
  MoeCase bad = random_moe(rng);
  const int64_t token = rng.below(bad.tokens);
  const bool nan = bad.activation == FM_SWIGLU_CLAMPED || rng.one_in(2);  // that one clamps infinities, rightly
  const Runner& runner = runners[size_t(rng.below(int64_t(runners.size())))];
  order.clear();
  for (int32_t e = 0; e < bad.experts; e++) order.push_back(e);
  const Floats before = run_moe(runner.context, bad, order, 1, false);
  bad.x[token * bad.hidden + rng.below(bad.hidden)] = nan ? NAN : rng.one_in(2) ? INFINITY : -INFINITY;
  const Floats after = run_moe(runner.context, bad, order, 1, false);
  for (int64_t t = 0; t < bad.tokens; t++) {
    const float *a = before.data() + t * bad.hidden, *b = after.data() + t * bad.hidden;
    if (t != token) expect(same(a, b, bad.hidden), "moe: a NaN reached another token");
    for (int64_t i = 0; t == token && nan && i < bad.hidden; i++) expect(std::isnan(b[i]), "moe: a NaN got lost on " + runner.name);
    bool finite = true;
    for (int64_t i = 0; i < bad.hidden; i++) finite = finite && std::isfinite(b[i]);
    if (t == token && packed(bad.format) && !bad.exact) expect(!finite, "moe: an infinity got lost");
  }
}

void check_mlp(Rng& rng) {
  const int64_t hidden = rng.size(), width = rng.size(), out = rng.size(), tokens = rng.between(1, 10);
  const auto kind = int32_t(rng.below(5));
  const bool exact = rng.one_in(2), factored = rng.one_in(2);
  const Weights gate = random_weights(rng, kFormats[size_t(rng.below(5))], width, hidden),
                up = random_weights(rng, gate.matrix.format, width, hidden),
                down = random_weights(rng, kFormats[size_t(rng.below(5))], out, width);
  const Floats x = normals(rng, tokens * hidden), factor = normals(rng, tokens), y = normals(rng, tokens * out);
  const Floats got = same_everywhere("mlp", [&](fm_context* c) {
    Floats to = copy(y);
    fm_mlp(c, kind, &gate.matrix, &up.matrix, &down.matrix, x.data(), tokens, exact, factored ? factor.data() : nullptr,
           to.data());
    return to;
  }, kind != FM_GELU);
  Floats g(tokens * width), u(tokens * width), h(tokens * width), d(tokens * out);
  fm_linear(scalar(), &gate.matrix, nullptr, x.data(), tokens, exact, g.data(), width);
  fm_linear(scalar(), &up.matrix, nullptr, x.data(), tokens, exact, u.data(), width);
  isas[0]->activate(kind, 7.f, 1.702f, tokens * width, g.data(), u.data(), h.data());
  fm_linear(scalar(), &down.matrix, nullptr, h.data(), tokens, exact, d.data(), out);
  for (int64_t i = 0; i < tokens * out; i++) d[i] = std::fma(factored ? factor[i / out] : 1.f, d[i], y[i]);
  expect(same(d, got), std::string("mlp ") + kFormatNames[gate.matrix.format] + ", down " +
                           kFormatNames[down.matrix.format] + ": other bits than its parts");
}

using Doubles = std::vector<double>;

void normalise(double* x, int64_t n, const float* weight, double eps) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
  for (int64_t i = 0; i < n; i++) x[i] *= weight[i] / std::sqrt(sum / double(n) + eps);
}

void turn(double* x, const float* cos, const float* sin, int64_t d) {
  for (int64_t i = 0; i < d / 2; i++) {
    const double a = x[i], b = x[i + d / 2];
    x[i] = a * cos[i] - b * sin[i];
    x[i + d / 2] = b * cos[i + d / 2] + a * sin[i + d / 2];
  }
}

Doubles times(const fm_matrix& m, const Doubles& x, const float* bias) {
  Doubles y(size_t(m.rows), 0.);
  for (int64_t r = 0; r < m.rows; r++) {
    for (int64_t k = 0; k < m.columns; k++) y[size_t(r)] += weight(m, r, k) * x[size_t(k)];
    if (bias != nullptr) y[size_t(r)] += bias[r];
  }
  return y;
}

// Attention of one token in double, straight from its definition. a.keys, a.values: as after the call.
Doubles attention(const fm_attention& a, const float* cos, const float* sin, int64_t position, const float* x,
                  Doubles* new_key) {
  const int64_t d = a.head_dim, queries = a.heads * d, keys = a.kv_heads * d;
  Doubles h(x, x + a.hidden);
  normalise(h.data(), a.hidden, a.input_norm, a.eps);
  Doubles qkv = times(a.qkv, h, a.qkv_bias), out(size_t(queries), 0.);
  double *q = qkv.data(), *k = q + queries;
  if (a.qk_norm == 2) normalise(q, queries, a.q_norm, a.eps), normalise(k, keys, a.k_norm, a.eps);
  if (a.clip > 0)
    for (double& v : qkv) v = std::max(-double(a.clip), std::min(v, double(a.clip)));
  if (a.qk_norm == 1) {
    for (int64_t i = 0; i < a.heads; i++) normalise(q + i * d, d, a.q_norm, a.eps);
    for (int64_t i = 0; i < a.kv_heads; i++) normalise(k + i * d, d, a.k_norm, a.eps);
  }
  for (int64_t i = 0; i < a.heads; i++) turn(q + i * d, cos, sin, d);
  for (int64_t i = 0; i < a.kv_heads; i++) turn(k + i * d, cos, sin, d);
  new_key->assign(k, k + 2 * keys);  // and value
  const int64_t first = a.window > 0 ? std::max<int64_t>(0, position + 1 - a.window) : 0;
  for (int64_t head = 0; head < a.heads; head++) {
    const int64_t kv = head / (a.heads / a.kv_heads) * d;
    Doubles e;
    double total = 0, largest = -INFINITY;
    for (int64_t s = first; s <= position; s++) {
      double score = 0;
      for (int64_t i = 0; i < d; i++) score += q[head * d + i] * a.keys[s * keys + kv + i];
      e.push_back(score / std::sqrt(double(d)));
      largest = std::max(largest, e.back());
    }
    for (double& v : e) total += v = std::exp(v - largest);
    for (int64_t s = first; s <= position; s++)
      for (int64_t i = 0; i < d; i++)
        out[size_t(head * d + i)] += e[size_t(s - first)] / total * a.values[s * keys + kv + i];
  }
  Doubles y = times(a.o, out, a.o_bias);
  for (int64_t i = 0; i < a.hidden; i++) y[size_t(i)] += x[i];
  return y;
}

void check_attend(Rng& rng) {
  const int64_t hidden = rng.size(), kv_heads = rng.between(1, 3), heads = kv_heads * rng.between(1, 4),
                d = 2 * rng.between(1, rng.one_in(4) ? 40 : 8), queries = heads * d, keys = kv_heads * d;
  const int64_t position = rng.one_in(3) ? 0 : rng.one_in(6) ? rng.between(60, 90) : rng.below(12);
  const int64_t tokens = rng.one_in(2) ? 1 : rng.between(2, rng.one_in(4) ? 20 : 8), context = position + tokens;
  const int32_t format = kFormats[size_t(rng.below(5))];
  const Weights qkv = random_weights(rng, format, queries + 2 * keys, hidden),
                o = random_weights(rng, format, hidden, queries);
  const auto around_one = [&](int64_t n) {
    Floats values = normals(rng, n, .2f);
    for (float& v : values) v += 1;
    return values;
  };
  const auto qk_norm = int32_t(rng.below(3));
  const Floats input_norm = around_one(hidden), q_norm = around_one(qk_norm == 2 ? queries : d),
               k_norm = around_one(qk_norm == 2 ? keys : d), qkv_bias = normals(rng, queries + 2 * keys),
               o_bias = normals(rng, hidden), x = normals(rng, tokens * hidden),
               old_keys = normals(rng, context * keys), old_values = normals(rng, context * keys);
  Floats cos(context * d), sin(context * d);
  for (int64_t i = 0; i < cos.size(); i++)
    cos[i] = float(.28 * double(1 + i % 3)), sin[i] = std::sqrt(1 - cos[i] * cos[i]);
  const bool biased = rng.one_in(2), exact = rng.one_in(2);
  const int32_t window = rng.one_in(2) ? int32_t(rng.between(1, 20)) : 0;
  const float clip = rng.one_in(3) ? .8f : 0.f;
  Floats seen_keys(0), seen_values(0);
  const auto spec = [&](Floats& key, Floats& value) {
    return fm_attention{int32_t(hidden), int32_t(heads), int32_t(kv_heads), int32_t(d), qk_norm, window, exact, 1e-5f,
                        clip, input_norm.data(), biased ? qkv_bias.data() : nullptr,
                        qk_norm ? q_norm.data() : nullptr, qk_norm ? k_norm.data() : nullptr,
                        biased ? o_bias.data() : nullptr, qkv.matrix, o.matrix, key.data(), value.data()};
  };
  const std::string what = std::string("attend ") + kFormatNames[format] + (exact ? " exact " : " ") +
                           std::to_string(tokens) + " tokens";
  // The result, then the new keys and values. step: tokens a call.
  const auto run = [&](fm_context* c, int64_t step) {
    Floats key = copy(old_keys), value = copy(old_values), y = copy(x), all(tokens * (hidden + 2 * keys));
    const fm_attention a = spec(key, value);
    for (int64_t t = 0; t < tokens; t += step) {
      const fm_sequence sequence{0, position + t, std::min(step, tokens - t)};
      fm_attend(c, &a, cos.data(), sin.data(), &sequence, 1, y.data() + t * hidden);
    }
    expect(same(key.data(), old_keys.data(), position * keys) &&
               same(value.data(), old_values.data(), position * keys),
           what + ": an earlier key or value changed");
    float* to = std::copy(y.begin(), y.end(), all.begin());
    to = std::copy_n(key.data() + position * keys, tokens * keys, to);
    std::copy_n(value.data() + position * keys, tokens * keys, to);
    if (c == scalar()) seen_keys = std::move(key), seen_values = std::move(value);
    return all;
  };
  const Floats got = same_everywhere(what, [&](fm_context* c) { return run(c, tokens); });
  const Runner& runner = runners[size_t(rng.below(int64_t(runners.size())))];
  const int64_t step = rng.between(1, tokens);
  expect(same(run(runner.context, step), got),
         what + ": other bits on " + runner.name + " in steps of " + std::to_string(step));

  // Beside other sequences: one of other tokens, and the same once more, in memory of its own each.
  const int64_t others = rng.between(1, 6), stored = context * keys, of_all = others + 2 * tokens;
  Floats memory(6 * stored + 12 * keys), several(of_all * hidden);
  const int64_t memory_step = 2 * stored + 4 * keys;
  for (int64_t i = 0; i < 3; i++) {
    std::copy(old_keys.begin(), old_keys.end(), memory.data() + i * memory_step);
    std::copy(old_values.begin(), old_values.end(), memory.data() + i * memory_step + stored + keys);
  }
  const int64_t before = std::min<int64_t>(position, context - std::min(context, others));
  const int64_t beside = std::min(others, context - before);
  const fm_sequence sequences[3] = {{reinterpret_cast<uintptr_t>(memory.data()), position, tokens},
                                    {reinterpret_cast<uintptr_t>(memory.data() + memory_step), before, beside},
                                    {reinterpret_cast<uintptr_t>(memory.data() + 2 * memory_step), position, tokens}};
  const Floats other_x = normals(rng, others * hidden);
  std::copy(x.begin(), x.end(), several.data());
  std::copy_n(other_x.data(), beside * hidden, several.data() + tokens * hidden);
  std::copy(x.begin(), x.end(), several.data() + (tokens + beside) * hidden);
  fm_attention relative = spec(seen_keys, seen_values);
  relative.keys = nullptr, relative.values = reinterpret_cast<float*>(uintptr_t(stored + keys) * sizeof(float));
  fm_attend(runner.context, &relative, cos.data(), sin.data(), sequences, 3, several.data());
  for (int64_t i : {int64_t(0), int64_t(2)}) {
    const float* row = several.data() + (i == 0 ? 0 : tokens + beside) * hidden;
    const float* of_sequence = memory.data() + i * memory_step;
    expect(same(row, got.data(), tokens * hidden) &&
               same(of_sequence + position * keys, got.data() + tokens * hidden, tokens * keys) &&
               same(of_sequence + stored + keys + position * keys, got.data() + tokens * (hidden + keys), tokens * keys),
           what + ": other bits beside other sequences on " + runner.name);
  }
  if (packed(format) && !exact) return;

  const fm_attention a = spec(seen_keys, seen_values);
  for (int64_t t = 0; t < tokens; t++) {
    Doubles stored_of_token;
    const int64_t at = (position + t) * d;
    const Doubles want =
        attention(a, cos.data() + at, sin.data() + at, position + t, x.data() + t * hidden, &stored_of_token);
    double size = 1, miss = 0;
    for (int64_t i = 0; i < hidden; i++) {
      size = std::max(size, std::fabs(want[size_t(i)]));
      miss = std::max(miss, std::fabs(want[size_t(i)] - got[t * hidden + i]));
    }
    expect(miss <= 1e-4 * size, what + ": against double, off by " + std::to_string(miss));
    for (int64_t i = 0; i < 2 * keys; i++) {
      const float* of_kind = got.data() + tokens * hidden + (i < keys ? 0 : tokens * keys);
      const double key = stored_of_token[size_t(i)];
      expect(near(of_kind[t * keys + i % keys], key, 1e-4 * (1 + std::fabs(key))), what + ": stored key or value");
    }
  }
}

void check_route(Rng& rng) {
  const int64_t hidden = rng.size(), experts = rng.between(1, 40), tokens = rng.one_in(2) ? 1 : rng.between(2, 12),
                top_k = rng.between(1, std::min<int64_t>(8, experts));
  Floats weight = normals(rng, experts * hidden), norm = normals(rng, hidden), x = normals(rng, tokens * hidden);
  for (int64_t e = 1; e < experts && rng.one_in(2); e++)  // some experts are equal: ties
    std::copy_n(weight.data() + rng.below(e) * hidden, hidden, weight.data() + e * hidden);
  const int64_t nan = rng.one_in(8) ? rng.below(tokens) : -1;  // the token that has one
  if (nan >= 0) x[nan * hidden + rng.below(hidden)] = NAN;
  const bool renormalise = rng.one_in(2);
  const fm_router r{int32_t(hidden), int32_t(experts), int32_t(top_k), renormalise, 1e-6f, norm.data(), weight.data()};
  const int64_t of_token = hidden + experts + 2 * top_k;  // floats of one token's result
  const auto run = [&](fm_context* c, int64_t first, int64_t count) {
    Floats all(count * of_token), h(count * hidden), p(count * experts), w(count * top_k);
    Memory<int32_t> ids(count * top_k);
    fm_route(c, &r, x.data() + first * hidden, count, h.data(), p.data(), ids.data(), w.data());
    float* to = all.data();
    for (int64_t t = 0; t < count; t++) {
      to = std::copy_n(h.data() + t * hidden, hidden, to);
      to = std::copy_n(p.data() + t * experts, experts, to);
      to = std::copy_n(w.data() + t * top_k, top_k, to);
      for (int64_t k = 0; k < top_k; k++) *to++ = float(ids[t * top_k + k]);
    }
    return all;
  };
  const Floats got = same_everywhere("route", [&](fm_context* c) { return run(c, 0, tokens); });
  for (int64_t t = 0; t < tokens; t++) {
    const float *h = got.data() + t * of_token, *p = h + hidden, *w = p + experts, *ids = w + top_k;
    expect(same(run(scalar(), t, 1).data(), h, of_token), "route: a token alone has other bits");
    if (t == nan) {
      for (int64_t i = 0; i < top_k; i++)
        expect(std::isnan(w[i]) && ids[i] >= 0 && ids[i] < float(experts), "route with a NaN");
      continue;
    }
    Doubles want(x.data() + t * hidden, x.data() + (t + 1) * hidden), logits;
    normalise(want.data(), hidden, norm.data(), 1e-6);
    for (int64_t i = 0; i < hidden; i++)
      expect(near(h[i], want[size_t(i)], 1e-5 * (1e-3 + std::fabs(want[size_t(i)]))), "norm before the router");
    double total = 0, largest = -INFINITY, size = 0, chosen = 0;
    for (int64_t e = 0; e < experts; e++) {
      const Product logit = product(fp32_matrix(weight, experts, hidden), e, h, false);
      logits.push_back(logit.value), largest = std::max(largest, logit.value), size = std::max(size, logit.size);
    }
    for (double& v : logits) total += v = std::exp(v - largest);
    std::vector<int64_t> order;
    for (int64_t e = 0; e < experts; e++) {
      const double likely = logits[size_t(e)] / total;
      expect(near(p[e], likely, 2 * kRelative * (1 + size) * likely + 1e-30), "probabilities");
      order.push_back(e);
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return p[a] > p[b]; });
    for (int64_t k = 0; k < top_k; k++) {
      expect(int64_t(ids[k]) == order[size_t(k)], "top-k, the lower id where equal");
      chosen += p[order[size_t(k)]];
    }
    for (int64_t k = 0; k < top_k; k++)
      expect(near(w[k], p[order[size_t(k)]] / (renormalise ? chosen : 1), 1e-6), "weights of the top-k");
  }
}

// ---- packing ----------------------------------------------------------------------------------------------------

void check_pack(Rng& rng) {
  const int32_t format = rng.one_in(2) ? FM_INT4 : FM_INT8;
  const int64_t rows = rng.size(), columns = rng.size();
  const double top = format == FM_INT4 ? 7 : 127;
  const bool weighted = rng.one_in(2), wild = rng.one_in(6);
  Floats values = normals(rng, rows * columns, float(std::ldexp(1.0, int(rng.between(-6, 6))))), importance(columns);
  for (float& v : importance) v = float(rng.uniform() * 2);
  if (wild)
    for (float& v : values) v = rng.one_in(8) ? wild_float(rng) : v;
  const int32_t from = FM_BF16 + int32_t(rng.below(3));
  const Bytes narrowed = narrow(values, from, size_t(rng.below(4)));
  const fm_matrix source{narrowed.data(), from, int32_t(rows), int32_t(columns)};
  const int64_t size = fm_packed_matrix_bytes(format, rows, columns);
  std::unique_ptr<Bytes> first;
  double error[2] = {};
  for (const Runner& runner : runners) {
    auto packed_bytes = std::make_unique<Bytes>(size, size_t(rng.below(4)));
    double missed[2] = {};
    fm_pack_matrix(runner.context, &source, format, weighted ? importance.data() : nullptr, packed_bytes->data(), missed);
    if (!first) {
      first = std::move(packed_bytes), std::memcpy(error, missed, sizeof error);
      continue;
    }
    bool finite = std::isfinite(missed[0]) && std::isfinite(error[0]);
    expect(std::memcmp(first->data(), packed_bytes->data(), size_t(size)) == 0, "packing gives other bytes on " + runner.name);
    expect(!finite || std::memcmp(missed, error, sizeof error) == 0, "packing reports another error on " + runner.name);
  }
  if (!wild) for (uint8_t b : *first) add_to(&digest, b);
  const fm_matrix result{first->data(), format, int32_t(rows), int32_t(columns)};
  Floats unpacked(rows * columns);
  fm_unpack_matrix(&result, unpacked.data());
  bool all_finite = true;
  double missed = 0, squares = 0, rounded = 0;
  for (int64_t i = 0; i < rows * columns; i++) {
    const double x = plain_element(from, narrowed.data(), i), w = weighted ? importance[i % columns] : 1;
    all_finite = all_finite && std::isfinite(x);
    expect(unpacked[i] == float(weight(result, i / columns, i % columns)), "unpacked weights");
    missed += w * (x - unpacked[i]) * (x - unpacked[i]), squares += w * x * x;
  }
  if (wild) {
    expect(all_finite || !std::isfinite(error[0]), "a weight that is no number must make the error none");
    return;
  }
  expect(near(error[0], missed, 1e-3 * missed + 1e-9 * squares) && near(error[1], squares, 1e-4 * squares), "error of packing");
  // Rounding to nearest with a scale from the largest value is what the search has to beat.
  for (int64_t r = 0; r < rows; r++)
    for (int64_t begin = 0; begin < columns; begin += 32) {
      double largest = 0;
      const int64_t end = std::min(columns, begin + 32);
      for (int64_t k = begin; k < end; k++) largest = std::max(largest, std::fabs(plain_element(from, narrowed.data(), r * columns + k)));
      for (int64_t k = begin; k < end; k++) {
        const double x = plain_element(from, narrowed.data(), r * columns + k), scale = largest / top;
        const double miss = scale > 0 ? x - std::nearbyint(x / scale) * scale : 0;
        rounded += (weighted ? importance[k] : 1) * miss * miss;
      }
    }
  expect(missed <= 1.02 * rounded + 1e-6 * squares, "packing is worse than rounding to nearest: " + std::to_string(missed) + " " + std::to_string(rounded));
  // Padding: code of zero, scale 0.
  for (int64_t r = 0; r < round_up(rows, 16); r++)
    for (int64_t k = 0; k < round_up(columns, 64); k++)
      if (r >= rows || k >= columns) {
        fm_matrix whole = result;
        whole.columns = int32_t(round_up(columns, 64));
        expect(weight(whole, r, k) == 0, "padding is not zero");
      }
}

// An expert's bytes are its matrices' tiles in the documented order, and unpack to them.
void check_expert(Rng& rng) {
  const int32_t format = rng.one_in(2) ? FM_INT4 : FM_INT8;
  const int bits = format == FM_INT4 ? 4 : 8;
  const int64_t hidden = rng.size(), width = rng.size(), padded = round_up(width, 64);
  const Floats source[3] = {normals(rng, width * hidden), normals(rng, width * hidden), normals(rng, width * hidden)};
  const fm_matrix gate = fp32_matrix(source[0], width, hidden), up = fp32_matrix(source[1], width, hidden), down = fp32_matrix(source[2], hidden, width);
  const int64_t up_tile = (hidden + 63) / 64 * (64 + 128 * bits), down_tile = padded / 64 * (64 + 128 * bits);
  Bytes blob(padded / 16 * 2 * up_tile + (hidden + 15) / 16 * down_tile);
  expect(blob.size() == fm_packed_expert_bytes(format, hidden, width), "size of a packed expert");
  double error[2] = {};
  const Runner& runner = runners[size_t(rng.below(int64_t(runners.size())))];
  fm_pack_expert(runner.context, &gate, &up, &down, format, nullptr, nullptr, blob.data(), error);
  Floats unpacked[3] = {Floats(width * hidden), Floats(width * hidden), Floats(width * hidden)};
  fm_unpack_expert(format, hidden, width, blob.data(), unpacked[0].data(), unpacked[1].data(), unpacked[2].data());
  for (int part = 0; part < 3; part++) {
    const fm_matrix& m = part == 0 ? gate : part == 1 ? up : down;
    Bytes alone(fm_packed_matrix_bytes(format, m.rows, m.columns));
    fm_pack_matrix(runner.context, &m, format, nullptr, alone.data(), error);
    const int64_t tile = part == 2 ? down_tile : up_tile;
    for (int64_t i = 0; i < (m.rows + 15) / 16; i++) {
      const uint8_t* at = part == 2 ? blob.data() + padded / 16 * 2 * up_tile + i * tile : blob.data() + (2 * i + part) * tile;
      expect(std::memcmp(at, alone.data() + i * tile, size_t(tile)) == 0, "an expert's tile is not its matrix's");
      for (int64_t r = 16 * i; r < std::min<int64_t>(m.rows, 16 * i + 16); r++)
        for (int64_t k = 0; k < m.columns; k++)
          expect(unpacked[part][r * m.columns + k] == float(tile_weight(at, bits, r % 16, k)), "an expert unpacked");
    }
  }
}

// Codes and scales that somebody else chose lie where the layout says; an expert's as its matrices' do.
void check_lay_out(Rng& rng) {
  const int32_t format = rng.one_in(2) ? FM_INT4 : FM_INT8;
  const int bits = format == FM_INT4 ? 4 : 8;
  const int64_t hidden = rng.size(), width = rng.size(), padded = round_up(width, 64);
  std::vector<Memory<int8_t>> codes;
  std::vector<Memory<uint16_t>> scales;
  for (int part = 0; part < 3; part++) {
    const int64_t rows = part == 2 ? hidden : width, columns = part == 2 ? width : hidden;
    codes.emplace_back(rows * columns), scales.emplace_back(rows * ((columns + 31) / 32));
    for (int8_t& code : codes.back()) code = int8_t(bits == 4 ? rng.between(-8, 7) : rng.between(-127, 127));
    for (uint16_t& scale : scales.back()) scale = uint16_t(0x2000 + rng.below(0x1000) + 0x8000 * rng.below(2));
  }
  const int8_t* const code_pointers[3] = {codes[0].data(), codes[1].data(), codes[2].data()};
  const uint16_t* const scale_pointers[3] = {scales[0].data(), scales[1].data(), scales[2].data()};
  const Runner& runner = runners[size_t(rng.below(int64_t(runners.size())))];
  Bytes blob(fm_packed_expert_bytes(format, hidden, width));
  fm_lay_out_expert(runner.context, format, hidden, width, code_pointers, scale_pointers, blob.data());
  const int64_t up_tile = (hidden + 63) / 64 * (64 + 128 * bits), down_tile = padded / 64 * (64 + 128 * bits);
  for (int part = 0; part < 3; part++) {
    const int64_t rows = part == 2 ? hidden : width, columns = part == 2 ? width : hidden;
    const int64_t tile = part == 2 ? down_tile : up_tile, groups = (columns + 31) / 32;
    Bytes alone(fm_packed_matrix_bytes(format, rows, columns));
    fm_lay_out_matrix(runner.context, format, rows, columns, codes[size_t(part)].data(), scales[size_t(part)].data(),
                      alone.data());
    for (int64_t r = 0; r < round_up(rows, 16); r++) {
      const int64_t i = r / 16;
      const uint8_t* at = part == 2 ? blob.data() + padded / 16 * 2 * up_tile + i * tile
                                    : blob.data() + (2 * i + part) * tile;
      expect(std::memcmp(at, alone.data() + i * tile, size_t(tile)) == 0, "lay out: an expert's tile");
      for (int64_t k = 0; k < round_up(columns, 64); k++) {
        const bool inside = r < rows && k < columns;
        const double want = inside ? codes[size_t(part)][r * columns + k] *
                                         half_to_double(scales[size_t(part)][r * groups + k / 32])
                                   : 0;
        expect(tile_weight(at, bits, r % 16, k) == want, "lay out: a weight is not its code times its scale");
      }
    }
  }
}

// The bytes of two small experts. A better search for scales may change them; the layout, checked above by its formula,
// may not change, since files hold it.
void check_golden() {
  for (const auto& [format, golden] : {std::pair<int32_t, uint64_t>{FM_INT4, 0xc92020bafe8c6122u}, {FM_INT8, 0x1c48e71f800d65ddu}})
    for (const Runner& runner : runners) {
      uint32_t state = 1;
      Floats source[3] = {Floats(48 * 80), Floats(48 * 80), Floats(80 * 48)};
      for (Floats& values : source)
        for (float& v : values) {
          state = state * 1664525u + 1013904223u;
          v = float(int32_t(state >> 16) - 32768) / 65536.f;
        }
      const fm_matrix gate = fp32_matrix(source[0], 48, 80), up = fp32_matrix(source[1], 48, 80), down = fp32_matrix(source[2], 80, 48);
      Bytes blob(fm_packed_expert_bytes(format, 80, 48));
      double error[2] = {};
      fm_pack_expert(runner.context, &gate, &up, &down, format, nullptr, nullptr, blob.data(), error);
      uint64_t hash = 14695981039346656037u;
      for (uint8_t b : blob) add_to(&hash, b);
      char text[64];
      std::snprintf(text, sizeof text, "golden bytes of %s: %016llx", kFormatNames[format], static_cast<unsigned long long>(hash));
      expect(hash == golden, text);
    }
}

// ---- threads ----------------------------------------------------------------------------------------------------

// Every item once, whether the helpers are awake, about to sleep or asleep; the caller sees what they wrote.
void check_pool(Rng& rng) {
  for (int threads : {1, 2, 3, 7}) {
    ThreadPool pool(threads);
    expect(pool.threads() == threads, "threads of a pool");
    for (int job = 0; job < 300; job++) {
      const int64_t items = rng.between(0, rng.one_in(4) ? 300 : 6);
      std::vector<int> taken(size_t(items), 0);  // no atomics: whoever takes an item is alone with it
      pool.run(items, [&](int64_t i) { taken[size_t(i)]++; });
      expect(std::all_of(taken.begin(), taken.end(), [](int n) { return n == 1; }), "items of a pool");
      if (rng.one_in(40)) std::this_thread::sleep_for(std::chrono::microseconds(rng.below(90)));
    }
  }
}

using Check = void (*)(Rng&);
constexpr struct {
  Check check;
  int share;
} kChecks[] = {{check_tile, 6}, {check_rows, 5}, {check_vectors, 5}, {check_linear, 4}, {check_moe, 4},
               {check_mlp, 2}, {check_attend, 2}, {check_route, 2}, {check_pack, 2}, {check_expert, 1}, {check_lay_out, 1}};

void run_case(uint64_t seed, int64_t number) {
  case_number = number;
  Rng rng(seed * 0x2545f4914f6cdd1du + uint64_t(number));
  int total = 0;
  for (const auto& entry : kChecks) total += entry.share;
  int64_t pick = rng.below(total);
  for (const auto& entry : kChecks)
    if ((pick -= entry.share) < 0) return entry.check(rng);
}

}  // namespace

int main(int argc, char** argv) {
  int64_t cases = 3000, only = -1;
  uint64_t seed = 1;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string option = argv[i];
    if (option == "--cases") cases = std::atoll(argv[i + 1]);
    if (option == "--seed") seed = uint64_t(std::atoll(argv[i + 1]));
    if (option == "--only") only = std::atoll(argv[i + 1]);  // one case, to look into a failure
  }
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  make_runners();
  Rng rng(seed);
  check_golden();
  check_pool(rng);
  for (int64_t number = 0; number < cases; number++)
    if (only < 0 || number == only) run_case(seed, number);
  for (const Runner& runner : runners) fm_destroy(runner.context);
  std::printf("%s: %lld cases, seed %llu, on %s; digest %016llx\n", failures == 0 ? "passed" : "FAILED",
              static_cast<long long>(cases), static_cast<unsigned long long>(seed), fm_isa_names(),
              static_cast<unsigned long long>(digest));
  return failures != 0;
}
