// AVX2: products of bytes are added in pairs, to 16 bits that saturate.
#include "tables.h"
#include "vector_avx2.h"
#include "vector_table.h"

namespace gptoss {
namespace {

// Weights 0..24: four pair sums of at most 2 * 24 * 127 fit 16 bits, and are widened once.
struct PairsDot {
  using Partial = __m256i;
  static constexpr bool kBiased = true;
  static Partial begin(__m256i) { return _mm256_setzero_si256(); }
  static Partial step(Partial part, __m256i w, __m256i x) { return _mm256_add_epi16(part, _mm256_maddubs_epi16(w, x)); }
  static __m256i finish(__m256i sum, Partial part) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(part, _mm256_set1_epi16(1)));
  }
};

// Weights -128..127: |w| * (x with the sign of w), where a pair's sum of at most 2 * 128 * 127 fits 16 bits.
struct SignedDot {
  using Partial = __m256i;
  static constexpr bool kBiased = false;
  static Partial begin(__m256i sum) { return sum; }
  static Partial step(Partial part, __m256i w, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(part, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static __m256i finish(__m256i, Partial part) { return part; }
};

struct Avx2Pairs : Avx2 {
  using Mxfp4Dot = PairsDot;
  using Int8Dot = SignedDot;
};

}  // namespace

const Kernels kAvx2Kernels = VectorTable<Avx2Pairs>::named("avx2");

}  // namespace gptoss
