// AVX2 with AVX-VNNI: four products of bytes and their sum in one instruction.
#include "tables.h"
#include "vector_avx2.h"
#include "vector_table.h"

namespace gptoss {
namespace {

struct VnniDot {
  using Partial = __m256i;
  static constexpr bool kBiased = true;
  static Partial begin(__m256i sum) { return sum; }
  static Partial step(Partial part, __m256i w, __m256i x) { return _mm256_dpbusd_epi32(part, w, x); }
  static __m256i finish(__m256i, Partial part) { return part; }
};

struct AvxVnni : Avx2 {
  using Mxfp4Dot = VnniDot;
  using Int8Dot = VnniDot;
};

}  // namespace

// test/avxvnni_as_avx512.cc compiles this file a second time, for processors that know the instruction otherwise encoded.
#if defined(GPTOSS_AVXVNNI_AS_AVX512)
extern const Kernels kAvxVnniAsAvx512Kernels;
const Kernels kAvxVnniAsAvx512Kernels = VectorTable<AvxVnni>::named("avxvnni as avx512");
#else
const Kernels kAvxVnniKernels = VectorTable<AvxVnni>::named("avxvnni");
#endif

}  // namespace gptoss
