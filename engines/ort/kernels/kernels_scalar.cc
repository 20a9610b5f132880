// Plain loops: what every other table is tested against, bit for bit, and what runs where nothing else does.
#include <cmath>

#include "attention.h"
#include "tables.h"

namespace gptoss {
namespace {

// 2 * value of each MXFP4 code.
constexpr int kTwiceFp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// 2^(byte - 127); the smallest is subnormal.
float e8m0(uint8_t byte) { return bit_cast<float>(byte == 0 ? 0x00400000u : static_cast<uint32_t>(byte) << 23); }

const ActivationGroup* token_groups(const void* activations, int64_t k, int64_t token) {
  const auto* bytes = static_cast<const uint8_t*>(activations) + static_cast<size_t>(token) * activation_bytes(k);
  return reinterpret_cast<const ActivationGroup*>(bytes);
}

// Activation i of a group as an integer, in the order of x.
int32_t activation(const ActivationGroup& group, int i) {
  const int at = i / 8 * 8 + i % 2 * 4 + i % 8 / 2;
  return 256 * group.high[at] + group.low[at];
}

void mxfp4(const Mxfp4Matrix& w, const Mxfp4Matrix*, int64_t k, int64_t begin, int64_t end, const void* activations,
           int64_t tokens, float* y, int64_t ldy, void*) {
  const int64_t groups = k / kGroup;
  for (int64_t t = 0; t < tokens; ++t) {
    const ActivationGroup* x = token_groups(activations, k, t);
    for (int64_t r = begin; r < end; ++r) {
      float sum = 0;
      for (int64_t g = 0; g < groups; ++g) {
        const uint8_t* block = w.blocks + (r * groups + g) * (kGroup / 2);
        int32_t dot = 0;
        for (int i = 0; i < kGroup; i += 2) {
          dot += kTwiceFp4[block[i / 2] & 15] * activation(x[g], i);
          dot += kTwiceFp4[block[i / 2] >> 4] * activation(x[g], i + 1);
        }
        sum = std::fma(static_cast<float>(dot) * x[g].scale, e8m0(w.scales[r * groups + g]), sum);
      }
      y[t * ldy + r] = sum * 0.5f;
    }
  }
}

void int8(const int8_t* w, const uint16_t* scales, int64_t k, int64_t begin, int64_t end, const void* activations,
          int64_t tokens, float* y, int64_t ldy, void*) {
  const int64_t groups = k / kGroup;
  for (int64_t t = 0; t < tokens; ++t) {
    const ActivationGroup* x = token_groups(activations, k, t);
    for (int64_t r = begin; r < end; ++r) {
      float sum = 0;
      for (int64_t g = 0; g < groups; ++g) {
        int32_t dot = 0;
        for (int i = 0; i < kGroup; ++i) dot += w[r * k + g * kGroup + i] * activation(x[g], i);
        sum = std::fma(static_cast<float>(dot) * x[g].scale, widened(scales[r * groups + g]), sum);
      }
      y[t * ldy + r] = sum;
    }
  }
}

void bf16(const uint16_t* w, int64_t k, int64_t begin, int64_t end, const float* x, int64_t ldx, int64_t tokens,
          float* y, int64_t ldy, void*) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t r = begin; r < end; ++r) {
      float sum = 0;
      for (int64_t first = 0; first < k; first += kBf16Chunk) {
        float part = 0;
        for (int64_t i = first; i < k && i < first + kBf16Chunk; ++i)
          part = std::fma(widened(w[r * k + i]), x[t * ldx + i], part);
        sum += part;
      }
      y[t * ldy + r] = sum;
    }
  }
}

// One lane in the terms of attention.h.
struct Scalar {
  using Float = float;
  static constexpr int kLanes = 1;
  static constexpr int kAccumulators = 8;

  static Float zero() { return 0; }
  static Float broadcast(float value) { return value; }
  static Float load(const float* p) { return *p; }
  static void store(float* p, Float v) { *p = v; }
  static Float fma(Float a, Float b, Float c) { return std::fma(a, b, c); }
};

size_t no_scratch(int64_t) { return 0; }

}  // namespace

const Kernels kScalarKernels = {"scalar",   activation_bytes, quantize, mxfp4,      no_scratch, bf16,
                                no_scratch, int8,             no_scratch, swiglu, attend<Scalar>, attention_scratch<Scalar>};

}  // namespace gptoss
