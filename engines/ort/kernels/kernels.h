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
// which leaves an error of about 2^-15 of the group's largest value. Groups follow each other, so that a multiple of 32
// values can be quantised on its own, in its place.
constexpr size_t kActivationGroupBytes = 76;

// Rows are split for threads at multiples of this.
constexpr int64_t kRowAlignment = 32;

// A matrix in MXFP4 as stored: blocks [rows, K/32, 16], scales [rows, K/32].
struct Mxfp4Matrix {
  const uint8_t* blocks;
  const uint8_t* scales;
};

// The queries of `tokens` tokens and `group` heads, which share the key head whose cache lies in `slots` slots of D values:
// place j of the text in slot j % slots. The keys are those of the places first .. first + keys - 1. A query sees a key if
// both have positions (0 or more), the key's is not beyond its own, and with a window above 0 their distance is below it.
struct Attention {
  int64_t tokens, group, D, slots, first, keys, window;
  int64_t token_stride;        // of q and out, whose heads follow each other
  const float *q, *key_slots, *value_slots;
  const uint16_t* sinks;       // [group] bfloat16: a score without a value, one for each head
  const int64_t* query_positions;  // [tokens]
  const int64_t* key_positions;    // [keys]
  float scale;
  float* out;
};

struct Kernels {
  const char* name;

  // Bytes of one quantised token of K values, a multiple of 64.
  size_t (*activation_bytes)(int64_t k);
  // x [K] float32 -> one quantised token at `out` (64-byte aligned).
  void (*quantize)(const float* x, int64_t k, void* out);

  // y[t * ldy + r] = sum_k x_t[k] w[r, k] for r in [begin, end), t in [0, tokens).
  // activations: tokens * activation_bytes(K). scratch: at least mxfp4_scratch(K) bytes, 64-byte aligned, one for each
  // thread. next: the matrix whose rows from `begin` the caller needs after these, to be fetched meanwhile, or nullptr.
  void (*mxfp4)(const Mxfp4Matrix& w, const Mxfp4Matrix* next, int64_t k, int64_t begin, int64_t end,
                const void* activations, int64_t tokens, float* y, int64_t ldy, void* scratch);
  size_t (*mxfp4_scratch)(int64_t k);

  // The same for w [rows, K] bfloat16 and x [tokens, K] float32 with row stride ldx; float32 products and sums.
  void (*bf16)(const uint16_t* w, int64_t k, int64_t begin, int64_t end, const float* x, int64_t ldx, int64_t tokens,
               float* y, int64_t ldy, void* scratch);
  size_t (*bf16_scratch)(int64_t k);

  // The same for w [rows, K] int8 with a bfloat16 scale for each 32 of a row, scales [rows, K/32], on quantised tokens.
  void (*int8)(const int8_t* w, const uint16_t* scales, int64_t k, int64_t begin, int64_t end, const void* activations,
               int64_t tokens, float* y, int64_t ldy, void* scratch);
  size_t (*int8_scratch)(int64_t k);

  // a[i] = gate / (1 + e^(-alpha gate)) * (up + 1), gate = min(h[2 i] + bias[2 i], limit) and up = h[2 i + 1] +
  // bias[2 i + 1] within -limit .. limit. h [2 count] float32, bias [2 count] bfloat16, a [count].
  void (*swiglu)(const float* h, const uint16_t* bias, int64_t count, float alpha, float limit, float* a);

  // Softmax attention in which the sink takes its share. scratch: attention_scratch(tokens * group, D, keys) bytes.
  void (*attend)(const Attention& attention, void* scratch);
  size_t (*attention_scratch)(int64_t queries, int64_t d, int64_t keys);
};

// The best table for this processor, or the one that the environment variable GPTOSS_EXPORT_ISA names (scalar, avx2,
// avxvnni, avx512, avx512vnni, neon): the choice is made once. A name that this processor cannot run is ignored, and
// `select` then says so on stderr once.
const Kernels& select();
// A table by name; nullptr when this build or this processor has it not.
const Kernels* find(const char* name);

}  // namespace gptoss
