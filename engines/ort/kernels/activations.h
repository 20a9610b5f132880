// What every table agrees on, so that all of them give the same bits: quantised activations and the order of sums.
//
// Integer dot products are exact within a group; groups are then added in order, with one fused multiply-add each:
//   sum = fma(float(dot) * activation scale, weight scale, sum).
// bf16: fused multiply-adds in order within each chunk of kBf16Chunk values, starting at 0; chunks are added in order.
//
// Internal headers keep their functions in an anonymous namespace: each kernels_*.cc is compiled for its own instruction
// set, and a function shared between them would be linked from any one of them.
#pragma once

#include <cstring>

#include "kernels.h"

namespace gptoss {

constexpr int kGroup = 32;       // values that share a scale, in weights and activations alike
constexpr int kGroupDwords = 8;  // a dword is four values of one row: the unit of an 8-bit dot product

constexpr int kBf16Chunk = 128;  // short sums keep the error of a long row near that of one rounding

// Added to a weight so that it is unsigned, which the x86 dot products ask of one side.
constexpr int kMxfp4Bias = 12;  // on 2 * value, -12..12
constexpr int kInt8Bias = 128;

// x = scale * (256 * high + low). The bytes of a dword are every other value of eight, dword 2 d the even ones of
// values 8 d .. 8 d + 7 and dword 2 d + 1 the odd ones, because a dword of MXFP4 holds the even ones in its low nibbles.
struct ActivationGroup {
  int8_t high[kGroup];
  int8_t low[kGroup];
  float scale;
  int32_t correction_mxfp4;  // -bias * sum(256 * high + low): takes the bias out of an integer dot product
  int32_t correction_int8;
};
static_assert(sizeof(ActivationGroup) == kActivationGroupBytes, "groups follow each other");

namespace {

inline size_t activation_bytes(int64_t k) {
  return (static_cast<size_t>(k) / kGroup * sizeof(ActivationGroup) + 63) / 64 * 64;
}

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline int32_t load_dword(const void* p) {
  int32_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

inline void quantize_group(const float* x, ActivationGroup& group) {
  // 256 * 127 + 127: both bytes then lie in -127..127, which negates without overflow.
  constexpr float kLargest = 32639;
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer (ties to even) in the low bits

  uint32_t bits = 0;  // the order of magnitudes is the order of their bits, NaN above infinity
  for (int i = 0; i < kGroup; ++i) {
    const uint32_t magnitude = bit_cast<uint32_t>(x[i]) & 0x7fffffffu;
    bits = magnitude > bits ? magnitude : bits;
  }
  const bool finite = bits < 0x7f800000u;
  if (bits == 0 || !finite) {
    std::memset(&group, 0, sizeof group);
    group.scale = finite ? 0.0f : bit_cast<float>(0x7fc00000u);  // infinite or NaN inputs give NaN, never a number
    return;
  }
  const float largest = bit_cast<float>(bits);
  const float lift = largest < 0x1p-100f ? 0x1p100f : 1.0f;  // the inverse of a smaller one would overflow
  const float inverse = kLargest / (largest * lift);

  int8_t high[kGroup], low[kGroup];
  int32_t sum = 0;
  for (int i = 0; i < kGroup; ++i) {
    const int32_t value = bit_cast<int32_t>(x[i] * lift * inverse + kRound) - bit_cast<int32_t>(kRound);
    const int32_t upper = (value + 128) >> 8;
    const int32_t rest = value - 256 * upper;
    const int32_t lower = rest < -127 ? -127 : rest;
    high[i] = static_cast<int8_t>(upper);
    low[i] = static_cast<int8_t>(lower);
    sum += 256 * upper + lower;
  }
  for (int dword = 0; dword < kGroupDwords; ++dword) {
    for (int i = 0; i < 4; ++i) {
      const int from = dword / 2 * 8 + dword % 2 + 2 * i;
      group.high[dword * 4 + i] = high[from];
      group.low[dword * 4 + i] = low[from];
    }
  }
  group.scale = largest * lift / kLargest / lift;
  group.correction_mxfp4 = -kMxfp4Bias * sum;
  group.correction_int8 = -kInt8Bias * sum;
}

inline void quantize(const float* x, int64_t k, void* out) {
  auto* groups = static_cast<ActivationGroup*>(out);
  for (int64_t g = 0; g < k / kGroup; ++g) quantize_group(x + g * kGroup, groups[g]);
}

}  // namespace
}  // namespace gptoss
