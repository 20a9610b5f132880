// AVX-512 with VNNI: four products of bytes and their sum in one instruction.
#include "tables.h"
#include "vector_avx512.h"
#include "vector_table.h"

namespace gptoss {
namespace {

struct VnniDot {
  using Partial = __m512i;
  static constexpr bool kBiased = true;
  static Partial begin(__m512i sum) { return sum; }
  static Partial step(Partial part, __m512i w, __m512i x) { return _mm512_dpbusd_epi32(part, w, x); }
  static __m512i finish(__m512i, Partial part) { return part; }
};

struct Avx512Vnni : Avx512 {
  using Mxfp4Dot = VnniDot;
  using Int8Dot = VnniDot;
};

}  // namespace

const Kernels kAvx512VnniKernels = VectorTable<Avx512Vnni>::named("avx512vnni");

}  // namespace gptoss
