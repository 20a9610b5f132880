// The table of functions of a vector type. Matrices of fewer rows than a register has go to the scalar table: same bits.
#pragma once

#include "attention.h"
#include "bf16_matmul.h"
#include "integer_matmul.h"
#include "tables.h"

namespace gptoss {
namespace {

template <class V>
struct VectorTable {
  static void mxfp4(const Mxfp4Matrix& w, const Mxfp4Matrix* next, int64_t k, int64_t begin, int64_t end,
                    const void* activations, int64_t tokens, float* y, int64_t ldy, void* scratch) {
    if (end < V::kLanes) return kScalarKernels.mxfp4(w, next, k, begin, end, activations, tokens, y, ldy, scratch);
    Mxfp4<V> format{w.blocks, w.scales, k / kGroup, nullptr, nullptr};
    if (next != nullptr) {
      format.next_weights = next->blocks + begin * format.groups * Mxfp4<V>::kGroupBytes;
      format.next_scales = next->scales + begin * format.groups * Mxfp4<V>::kScaleBytes;
    }
    integer_matmul<V>(format, begin, end, activations, tokens, y, ldy, scratch);
  }
  static void int8(const int8_t* w, const uint16_t* scales, int64_t k, int64_t begin, int64_t end,
                   const void* activations, int64_t tokens, float* y, int64_t ldy, void* scratch) {
    if (end < V::kLanes) return kScalarKernels.int8(w, scales, k, begin, end, activations, tokens, y, ldy, scratch);
    integer_matmul<V>(Int8<V>{w, scales, k / kGroup}, begin, end, activations, tokens, y, ldy, scratch);
  }
  static void bf16(const uint16_t* w, int64_t k, int64_t begin, int64_t end, const float* x, int64_t ldx,
                   int64_t tokens, float* y, int64_t ldy, void* scratch) {
    if (end < V::kLanes) return kScalarKernels.bf16(w, k, begin, end, x, ldx, tokens, y, ldy, scratch);
    bf16_matmul<V>(w, k, begin, end, x, ldx, tokens, y, ldy, scratch);
  }
  static size_t integer_scratch(int64_t) { return sizeof(IntegerPanel<V>); }
  static size_t bf16_scratch(int64_t) { return sizeof(FloatPanel<V>); }

  static constexpr Kernels named(const char* name) {
    return {name, activation_bytes, quantize,        mxfp4,  integer_scratch, bf16,
            bf16_scratch, int8,     integer_scratch, swiglu, attend<V>,       attention_scratch<V>};
  }
};

}  // namespace
}  // namespace gptoss
