// AVX-512 (F, BW, VL, DQ) in the terms of integer_matmul.h and bf16_matmul.h: one register is 16 rows.
#pragma once

#include <immintrin.h>

#include "panel.h"

namespace gptoss {
namespace {

struct Avx512 {
  using Int = __m512i;
  using Float = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kColumns = 2;
  static constexpr int kIntTokens = 4;
  static constexpr int kFloatTokens = 12;
  static constexpr int kAccumulators = 24;

  static Int zero_int() { return _mm512_setzero_si512(); }
  static Int broadcast_int(int32_t value) { return _mm512_set1_epi32(value); }
  static Int broadcast_bytes(const int8_t* four) { return _mm512_set1_epi32(load_dword(four)); }
  static Int load_int(const void* p) { return _mm512_load_si512(p); }
  static void store_int(void* p, Int v) { _mm512_store_si512(p, v); }
  // v[j] quarter q = the 16 bytes at the start of row 4 q + j.
  static void load_rows16(const uint8_t* first, int64_t stride, Int (&v)[4]) {
    const uint8_t *q0 = first, *q1 = q0 + 4 * stride, *q2 = q1 + 4 * stride, *q3 = q2 + 4 * stride;
    int64_t twice = 2 * stride, thrice = 3 * stride;
    // Hidden from the compiler, which would else carry the address of every row through the loop, in memory.
    asm("" : "+r"(q0), "+r"(q1), "+r"(q2), "+r"(q3), "+r"(twice), "+r"(thrice));
    v[0] = quarters(q0, q1, q2, q3);
    v[1] = quarters(q0 + stride, q1 + stride, q2 + stride, q3 + stride);
    v[2] = quarters(q0 + twice, q1 + twice, q2 + twice, q3 + twice);
    v[3] = quarters(q0 + thrice, q1 + thrice, q2 + thrice, q3 + thrice);
  }
  static Int quarters(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
    const auto load16 = [](const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
    const Int ab = _mm512_inserti32x4(_mm512_castsi128_si512(load16(a)), load16(b), 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(ab, load16(c), 2), load16(d), 3);
  }
  static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static Int bit_and(Int a, Int b) { return _mm512_and_si512(a, b); }
  static Int bit_xor(Int a, Int b) { return _mm512_xor_si512(a, b); }
  static Int max(Int a, Int b) { return _mm512_max_epi32(a, b); }
  template <int N>
  static Int shift_left(Int v) {
    return _mm512_slli_epi32(v, N);
  }
  template <int N>
  static Int shift_right(Int v) {
    return _mm512_srli_epi32(v, N);
  }
  static Int repeat16(const void* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
  // Each 16 bytes apart: result[i] = table[index[i]].
  static Int lookup(Int table, Int index) { return _mm512_shuffle_epi8(table, index); }

  static Float zero() { return _mm512_setzero_ps(); }
  static Float broadcast(float value) { return _mm512_set1_ps(value); }
  static Float load(const float* p) { return _mm512_load_ps(p); }
  static void store(float* p, Float v) { _mm512_store_ps(p, v); }
  static void store_unaligned(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static Float as_float(Int v) { return _mm512_castsi512_ps(v); }
  static Float to_float(Int v) { return _mm512_cvtepi32_ps(v); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }

  // As load_rows16 leaves them -> v[j] = dword j of every row.
  static void transpose4(Int (&v)[4]) {
    const Int low01 = _mm512_unpacklo_epi32(v[0], v[1]), high01 = _mm512_unpackhi_epi32(v[0], v[1]);
    const Int low23 = _mm512_unpacklo_epi32(v[2], v[3]), high23 = _mm512_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm512_unpacklo_epi64(low01, low23);
    v[1] = _mm512_unpackhi_epi64(low01, low23);
    v[2] = _mm512_unpacklo_epi64(high01, high23);
    v[3] = _mm512_unpackhi_epi64(high01, high23);
  }
};

}  // namespace
}  // namespace gptoss
