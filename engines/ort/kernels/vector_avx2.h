// AVX2 with FMA in the terms of integer_matmul.h and bf16_matmul.h: one register is 8 rows.
#pragma once

#include <immintrin.h>

#include "panel.h"

namespace gptoss {
namespace {

struct Avx2 {
  using Int = __m256i;
  using Float = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kColumns = 2;
  static constexpr int kIntTokens = 2;
  static constexpr int kFloatTokens = 6;
  static constexpr int kAccumulators = 12;

  static Int zero_int() { return _mm256_setzero_si256(); }
  static Int broadcast_int(int32_t value) { return _mm256_set1_epi32(value); }
  static Int broadcast_bytes(const int8_t* four) { return _mm256_set1_epi32(load_dword(four)); }
  static Int load_int(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }
  static void store_int(void* p, Int v) { _mm256_store_si256(static_cast<__m256i*>(p), v); }
  // v[j] half h = the 16 bytes at the start of row 4 h + j.
  static void load_rows16(const uint8_t* first, int64_t stride, Int (&v)[4]) {
    const uint8_t *h0 = first, *h1 = h0 + 4 * stride;
    int64_t twice = 2 * stride, thrice = 3 * stride;
    // Hidden from the compiler, which would else carry the address of every row through the loop, in memory.
    asm("" : "+r"(h0), "+r"(h1), "+r"(twice), "+r"(thrice));
    v[0] = halves(h0, h1);
    v[1] = halves(h0 + stride, h1 + stride);
    v[2] = halves(h0 + twice, h1 + twice);
    v[3] = halves(h0 + thrice, h1 + thrice);
  }
  static Int halves(const uint8_t* a, const uint8_t* b) {
    const auto load16 = [](const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
    return _mm256_set_m128i(load16(b), load16(a));
  }
  static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static Int bit_and(Int a, Int b) { return _mm256_and_si256(a, b); }
  static Int bit_xor(Int a, Int b) { return _mm256_xor_si256(a, b); }
  static Int max(Int a, Int b) { return _mm256_max_epi32(a, b); }
  template <int N>
  static Int shift_left(Int v) {
    return _mm256_slli_epi32(v, N);
  }
  template <int N>
  static Int shift_right(Int v) {
    return _mm256_srli_epi32(v, N);
  }
  static Int repeat16(const void* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  // Each 16 bytes apart: result[i] = table[index[i]].
  static Int lookup(Int table, Int index) { return _mm256_shuffle_epi8(table, index); }

  static Float zero() { return _mm256_setzero_ps(); }
  static Float broadcast(float value) { return _mm256_set1_ps(value); }
  static Float load(const float* p) { return _mm256_load_ps(p); }
  static void store(float* p, Float v) { _mm256_store_ps(p, v); }
  static void store_unaligned(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static Float as_float(Int v) { return _mm256_castsi256_ps(v); }
  static Float to_float(Int v) { return _mm256_cvtepi32_ps(v); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }

  // As load_rows16 leaves them -> v[j] = dword j of every row.
  static void transpose4(Int (&v)[4]) {
    const Int low01 = _mm256_unpacklo_epi32(v[0], v[1]), high01 = _mm256_unpackhi_epi32(v[0], v[1]);
    const Int low23 = _mm256_unpacklo_epi32(v[2], v[3]), high23 = _mm256_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm256_unpacklo_epi64(low01, low23);
    v[1] = _mm256_unpackhi_epi64(low01, low23);
    v[2] = _mm256_unpacklo_epi64(high01, high23);
    v[3] = _mm256_unpackhi_epi64(high01, high23);
  }
};

}  // namespace
}  // namespace gptoss
