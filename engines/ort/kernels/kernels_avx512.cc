// AVX-512 without VNNI: products of bytes are added in pairs, to 16 bits that saturate, as in kernels_avx2.cc.
#include "tables.h"
#include "vector_avx512.h"
#include "vector_table.h"

namespace gptoss {
namespace {

struct PairsDot {
  using Partial = __m512i;
  static constexpr bool kBiased = true;
  static Partial begin(__m512i) { return _mm512_setzero_si512(); }
  static Partial step(Partial part, __m512i w, __m512i x) { return _mm512_add_epi16(part, _mm512_maddubs_epi16(w, x)); }
  static __m512i finish(__m512i sum, Partial part) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(part, _mm512_set1_epi16(1)));
  }
};

struct SignedDot {
  using Partial = __m512i;
  static constexpr bool kBiased = false;
  static Partial begin(__m512i sum) { return sum; }
  static Partial step(Partial part, __m512i w, __m512i x) {
    const __m512i signed_x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
    const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(w), signed_x);
    return _mm512_add_epi32(part, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
  static __m512i finish(__m512i, Partial part) { return part; }
};

struct Avx512Pairs : Avx512 {
  using Mxfp4Dot = PairsDot;
  using Int8Dot = SignedDot;
};

}  // namespace

const Kernels kAvx512Kernels = VectorTable<Avx512Pairs>::named("avx512");

}  // namespace gptoss
