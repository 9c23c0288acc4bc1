// AVX2 + FMA + F16C with AVX-VNNI.
#include "isa.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && defined(__AVXVNNI__)
#include "isa_avx2.h"

namespace flashmoe {
const Isa* isa_avx2vnni() {
  static const Isa isa = make_isa("avx2vnni");
  return &isa;
}
}  // namespace flashmoe
#else
namespace flashmoe {
const Isa* isa_avx2vnni() { return nullptr; }
}  // namespace flashmoe
#endif
