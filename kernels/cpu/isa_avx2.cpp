// AVX2 + FMA + F16C, without VNNI.
#include "isa.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "isa_avx2.h"

namespace flashmoe {
const Isa* isa_avx2() {
  static const Isa isa = make_isa("avx2");
  return &isa;
}
}  // namespace flashmoe
#else
namespace flashmoe {
const Isa* isa_avx2() { return nullptr; }
}  // namespace flashmoe
#endif
