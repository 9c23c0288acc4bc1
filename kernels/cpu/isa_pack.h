// Quantising one tile; part of isa_kernels.h. Rows lie in lanes: each loop over 16 rows becomes vectors.
//
// For each row and group of 32 columns the scale is searched that gives the least squared error (weighted by
// `importance`): clipping a few outliers costs less than coarse steps for all the others. int4 codes are -8 to 7, and a
// scale may be negative: then -8 is the largest value. Candidates put the largest absolute value at 5.5 to 9.5 steps on
// either side; the best one is refined by least squares: for given codes q the best scale is sum(w x q) / sum(w q q).
// int8 codes are -127 to 127 and the first candidate is taken.

constexpr int kCandidates = 17;  // on each side

inline float absolute(float f) { return as_float(as_bits(f) & 0x7fffffffu); }

inline uint16_t half_bits(float f) {  // round to nearest even; f is finite and below 65520 in size
  const uint32_t sign = as_bits(f) >> 16 & 0x8000u, bits = as_bits(f) & 0x7fffffffu;
  const float size = as_float(bits);
  if (size < 6.103515625e-05f) return uint16_t(sign | (as_bits(size * 16777216.f + kRound) - as_bits(kRound)));
  return uint16_t(sign | (bits + 0xfffu + (bits >> 13 & 1u) - 0x38000000u) >> 13);
}

inline float half_value(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = h >> 10 & 31u, mantissa = h & 1023u;
  const float size =
      exponent == 0 ? float(mantissa) * 5.9604644775390625e-08f : as_float((exponent + 112u) << 23 | mantissa << 13);
  return as_float(sign | as_bits(size));
}

// Codes of one column for 16 rows, as floats: clamp(round(x * inverse)).
inline float code_of(float x, float inverse, float least, float most) {
  const float v = x * inverse;
  const float limited = v < least ? least : v > most ? most : v;
  return (limited + kRound) - kRound;
}

struct Fit {
  float wxq[kTileRows], wqq[kTileRows];
};

// sum(w x q) and sum(w q q) of each row for given inverse scales. x [32][16], w [32].
inline void fit(const float (*x)[kTileRows], const float* w, const float* inverse, float least, float most, Fit* f) {
  float wxq[kTileRows] = {}, wqq[kTileRows] = {};
  for (int k = 0; k < kGroup; k++)
    for (int r = 0; r < kTileRows; r++) {
      const float q = code_of(x[k][r], inverse[r], least, most);
      wxq[r] = __builtin_fmaf(w[k] * x[k][r], q, wxq[r]);
      wqq[r] = __builtin_fmaf(w[k] * q, q, wqq[r]);
    }
  memcpy(f->wxq, wxq, sizeof wxq);
  memcpy(f->wqq, wqq, sizeof wqq);
}

// The least and the largest code.
inline float least_code(int bits) { return bits == 4 ? -8.f : -127.f; }
inline float most_code(int bits) { return bits == 4 ? 7.f : 127.f; }

// The scale of each row as fp16 bits. A group that is zero, or too small for fp16, gets 0.
inline void search_scales(const float (*x)[kTileRows], const float* w, int bits, uint16_t* scales) {
  const float least = least_code(bits), most = most_code(bits);
  float largest[kTileRows] = {}, best_gain[kTileRows], best[kTileRows], inverse[kTileRows];
  for (int k = 0; k < kGroup; k++)
    for (int r = 0; r < kTileRows; r++) {
      const float size = absolute(x[k][r]);
      largest[r] = size > largest[r] ? size : largest[r];
    }
  for (int r = 0; r < kTileRows; r++) best_gain[r] = -1.f, best[r] = largest[r] / most;
  const int candidates = bits == 4 ? 2 * kCandidates : 1;
  for (int c = 0; c < candidates; c++) {
    const float steps = bits == 4 ? (c % 2 == 0 ? 5.5f : -5.5f) + (c % 2 == 0 ? 0.25f : -0.25f) * float(c / 2) : most;
    for (int r = 0; r < kTileRows; r++) inverse[r] = largest[r] > 1e-30f ? steps / largest[r] : 0.f;
    Fit f;
    fit(x, w, inverse, least, most, &f);
    for (int r = 0; r < kTileRows; r++) {
      // With the best scale for these codes the squared error falls by wxq^2 / wqq.
      const bool any = f.wqq[r] > 0.f;
      const float gain = any ? f.wxq[r] / f.wqq[r] * f.wxq[r] : 0.f;
      const bool better = gain > best_gain[r];
      best_gain[r] = better ? gain : best_gain[r];
      best[r] = better && any ? f.wxq[r] / f.wqq[r] : best[r];
    }
  }
  for (int round = 0; round < (bits == 4 ? 2 : 1); round++) {  // codes for that scale, scale for those codes
    for (int r = 0; r < kTileRows; r++) inverse[r] = absolute(best[r]) > 1e-30f ? 1.f / best[r] : 0.f;
    Fit f;
    fit(x, w, inverse, least, most, &f);
    for (int r = 0; r < kTileRows; r++) best[r] = f.wqq[r] > 0.f ? f.wxq[r] / f.wqq[r] : best[r];
  }
  for (int r = 0; r < kTileRows; r++)
    scales[r] = half_bits(best[r] < -65504.f ? -65504.f : best[r] > 65504.f ? 65504.f : best[r]);
}

void pack_tile(const float* source, int64_t rows, int64_t columns, int bits, const float* importance, uint8_t* tile,
               double* error) {
  const float least = least_code(bits), most = most_code(bits);
  const int zero_code = bits == 4 ? 8 : 128, per_line = bits == 4 ? 8 : 4;
  for (int64_t begin = 0; begin < round_up(columns, kSuper); begin += kGroup) {
    uint8_t* superblock = tile + begin / kSuper * superblock_bytes(bits);
    const int half = int(begin / kGroup & 1);
    float x[kGroup][kTileRows] = {}, w[kGroup];
    for (int k = 0; k < kGroup; k++) {
      const bool inside = begin + k < columns;
      w[k] = !inside ? 0.f : importance != nullptr ? importance[begin + k] : 1.f;
      for (int r = 0; inside && r < kTileRows && r < rows; r++) x[k][r] = source[r * columns + begin + k];
    }
    uint16_t scales[kTileRows];
    search_scales(x, w, bits, scales);
    float scale[kTileRows], inverse[kTileRows];
    for (int r = 0; r < kTileRows; r++) {
      scale[r] = half_value(scales[r]);
      inverse[r] = scale[r] != 0.f ? 1.f / scale[r] : 0.f;
    }
    memcpy(superblock + 32 * half, scales, sizeof scales);
    uint8_t codes_of[kGroup][kTileRows];
    float squares[kTileRows] = {}, errors[kTileRows] = {};
    for (int k = 0; k < kGroup; k++)
      for (int r = 0; r < kTileRows; r++) {
        const float q = code_of(x[k][r], inverse[r], least, most);
        codes_of[k][r] = uint8_t(int(as_bits(q + kRound) - as_bits(kRound)) + zero_code);
        const float miss = x[k][r] - q * scale[r];
        errors[r] += w[k] * miss * miss;
        squares[r] += w[k] * x[k][r] * x[k][r];
      }
    for (int r = 0; r < kTileRows; r++) error[0] += double(errors[r]), error[1] += double(squares[r]);
    uint8_t* lines = superblock + kScaleBytes + 64 * bits * half;
    for (int k = 0; k < kGroup; k += per_line, lines += 64)
      for (int r = 0; r < kTileRows; r++)
        for (int j = 0; j < 4; j++)
          lines[4 * r + j] = bits == 4 ? uint8_t(codes_of[k + j][r] | codes_of[k + 4 + j][r] << 4) : codes_of[k + j][r];
  }
}
