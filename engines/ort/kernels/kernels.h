// The arithmetic of the custom ops, one table of functions for each instruction set.
//
// Every function works on a range of rows of a weight matrix as the checkpoint stores it, so that callers split the rows
// over threads as they like: a row's result never depends on the range it was computed in, or on how many tokens were
// asked for at once. K is a multiple of 32 everywhere.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gptoss {

// Activations of one token for the matrices in MXFP4 and int8: K values as two int8 parts a group of 32,
//   x = scale * (high + low / 128),
// which leaves an error of about 2^-15 of the group's largest value. Kernels choose their own layout.
//
// Rows are split for threads at multiples of this.
constexpr int64_t kRowAlignment = 32;

struct Kernels {
  const char* name;

  // Bytes of one quantised token of K values, a multiple of 64.
  size_t (*activation_bytes)(int64_t k);
  // x [K] float32 -> one quantised token at `out` (64-byte aligned).
  void (*quantize)(const float* x, int64_t k, void* out);

  // y[t * ldy + r] = sum_k x_t[k] w[r, k] for r in [begin, end), t in [0, tokens).
  // blocks [rows, K/32, 16], scales [rows, K/32]: MXFP4 as stored. activations: tokens * activation_bytes(K).
  // scratch: at least mxfp4_scratch(K) bytes, 64-byte aligned, one for each thread.
  void (*mxfp4)(const uint8_t* blocks, const uint8_t* scales, int64_t k, int64_t begin, int64_t end,
                const void* activations, int64_t tokens, float* y, int64_t ldy, void* scratch);
  size_t (*mxfp4_scratch)(int64_t k);

  // The same for w [rows, K] bfloat16 and x [tokens, K] float32 with row stride ldx; float32 products and sums.
  void (*bf16)(const uint16_t* w, int64_t k, int64_t begin, int64_t end, const float* x, int64_t ldx, int64_t tokens,
               float* y, int64_t ldy, void* scratch);
  size_t (*bf16_scratch)(int64_t k);

  // The same for w [rows, K] int8 with a float32 scale for each 32 of a row, scales [rows, K/32], on quantised tokens.
  void (*int8)(const int8_t* w, const float* scales, int64_t k, int64_t begin, int64_t end, const void* activations,
               int64_t tokens, float* y, int64_t ldy, void* scratch);
  size_t (*int8_scratch)(int64_t k);
};

// The best table for this processor, or the one that the environment variable GPTOSS_EXPORT_ISA names (scalar, avx2,
// avxvnni, avx512, avx512vnni, neon): the choice is made once. A name that this processor cannot run is ignored, and
// `select` then says so on stderr once.
const Kernels& select();
// A table by name; nullptr when this build or this processor has it not.
const Kernels* find(const char* name);

}  // namespace gptoss
