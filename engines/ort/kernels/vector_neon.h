// NEON in the terms of integer_matmul.h and bf16_matmul.h: one register is 4 rows.
#pragma once

#include <arm_neon.h>

#include "panel.h"

namespace gptoss {
namespace {

struct Neon {
  using Int = int32x4_t;
  using Float = float32x4_t;
  static constexpr int kLanes = 4;
  static constexpr int kColumns = 4;
  static constexpr int kIntTokens = 3;
  static constexpr int kFloatTokens = 6;
  static constexpr int kAccumulators = 24;

  static Int zero_int() { return vdupq_n_s32(0); }
  static Int broadcast_int(int32_t value) { return vdupq_n_s32(value); }
  static Int broadcast_bytes(const int8_t* four) { return vdupq_n_s32(load_dword(four)); }
  static Int load_int(const void* p) { return vld1q_s32(static_cast<const int32_t*>(p)); }
  static void store_int(void* p, Int v) { vst1q_s32(static_cast<int32_t*>(p), v); }
  // v[j] = the 16 bytes at the start of row j.
  static void load_rows16(const uint8_t* first, int64_t stride, Int (&v)[4]) {
    for (int j = 0; j < 4; ++j) v[j] = vreinterpretq_s32_u8(vld1q_u8(first + j * stride));
  }
  static Int add(Int a, Int b) { return vaddq_s32(a, b); }
  static Int bit_and(Int a, Int b) { return vandq_s32(a, b); }
  static Int bit_xor(Int a, Int b) { return veorq_s32(a, b); }
  static Int max(Int a, Int b) { return vmaxq_s32(a, b); }
  template <int N>
  static Int shift_left(Int v) {
    return vshlq_n_s32(v, N);
  }
  template <int N>
  static Int shift_right(Int v) {
    return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(v), N));
  }
  static Int repeat16(const void* p) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
  // result[i] = table[index[i]].
  static Int lookup(Int table, Int index) {
    return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(table), vreinterpretq_u8_s32(index)));
  }

  static Float zero() { return vdupq_n_f32(0); }
  static Float broadcast(float value) { return vdupq_n_f32(value); }
  static Float load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, Float v) { vst1q_f32(p, v); }
  static void store_unaligned(float* p, Float v) { vst1q_f32(p, v); }
  static Float as_float(Int v) { return vreinterpretq_f32_s32(v); }
  static Float to_float(Int v) { return vcvtq_f32_s32(v); }
  static Float add(Float a, Float b) { return vaddq_f32(a, b); }
  static Float mul(Float a, Float b) { return vmulq_f32(a, b); }
  static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }

  // v[i] dword j -> v[j] dword i.
  static void transpose4(Int (&v)[4]) {
    const auto pairs = [](Int a) { return vreinterpretq_s64_s32(a); };
    const Int even01 = vtrn1q_s32(v[0], v[1]), odd01 = vtrn2q_s32(v[0], v[1]);
    const Int even23 = vtrn1q_s32(v[2], v[3]), odd23 = vtrn2q_s32(v[2], v[3]);
    v[0] = vreinterpretq_s32_s64(vtrn1q_s64(pairs(even01), pairs(even23)));
    v[1] = vreinterpretq_s32_s64(vtrn1q_s64(pairs(odd01), pairs(odd23)));
    v[2] = vreinterpretq_s32_s64(vtrn2q_s64(pairs(even01), pairs(even23)));
    v[3] = vreinterpretq_s32_s64(vtrn2q_s64(pairs(odd01), pairs(odd23)));
  }
};

}  // namespace
}  // namespace gptoss
