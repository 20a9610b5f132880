// What is computed value by value, as plain loops: each table's file compiles them for its own instruction set, and since
// every operation is rounded as IEEE 754 says, all of them give the same bits.
#pragma once

#include <cmath>

#include "activations.h"

namespace gptoss {
namespace {

// e^x within 2 units in the last place, 0 below e^-87.7, at most e^88.3; NaN stays NaN. Range reduction and polynomial are
// those of expf in the Cephes library (S. L. Moshier, netlib.org/cephes). No branch, so that loops over it become vectors.
inline float exponential(float x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  constexpr float kLog2E = 0x1.715476p0f, kLn2High = 0x1.63p-1f, kLn2Low = -0x1.bd0106p-13f;
  x = -104.0f > x ? -104.0f : x;
  x = 88.3f < x ? 88.3f : x;
  const float shifted = std::fma(x, kLog2E, kRound);
  const float n = shifted - kRound;
  const float r = std::fma(n, -kLn2Low, std::fma(n, -kLn2High, x));
  float p = 1.9875691500e-4f;
  p = std::fma(p, r, 1.3981999507e-3f);
  p = std::fma(p, r, 8.3334519073e-3f);
  p = std::fma(p, r, 4.1665795894e-2f);
  p = std::fma(p, r, 1.6666665459e-1f);
  p = std::fma(p, r, 5.0000001201e-1f);
  const float mantissa = std::fma(p, r * r, r) + 1.0f;
  const int32_t exponent = bit_cast<int32_t>(shifted) - bit_cast<int32_t>(kRound) + 127;
  return mantissa * bit_cast<float>(static_cast<uint32_t>(exponent < 0 ? 0 : exponent) << 23);
}

inline float widened(uint16_t bf16) { return bit_cast<float>(static_cast<uint32_t>(bf16) << 16); }

// out[i] = swiglu of gate h[2 i] and up h[2 i + 1], each with its bias, for i in [0, count).
inline void swiglu(const float* __restrict h, const uint16_t* __restrict bias, int64_t count, float alpha, float limit,
                   float* __restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    float gate = h[2 * i] + widened(bias[2 * i]);
    float up = h[2 * i + 1] + widened(bias[2 * i + 1]);
    gate = limit < gate ? limit : gate;
    up = limit < up ? limit : up;
    up = -limit > up ? -limit : up;
    out[i] = gate / (1.0f + exponential(-alpha * gate)) * (up + 1.0f);
  }
}

}  // namespace
}  // namespace gptoss
