// bf16 weights times float32 activations, for one token or thousands, on any vector type V.
//
// As in integer_matmul.h every lane is a row, and a chunk of a panel is widened to float32 in scratch once for all tokens.
#pragma once

#include "activations.h"
#include "panel.h"

namespace gptoss {
namespace {

constexpr int kFloatTokenBlock = 96;

template <class V>
struct FloatPanel {
  static constexpr int kRows = V::kLanes * V::kColumns;
  alignas(64) float weights[kBf16Chunk][kRows];
  alignas(64) float sums[kFloatTokenBlock][kRows];
};

constexpr int kBf16Step = 8;  // values in 16 bytes

// v[i] = value first + i of every row; bf16 is the upper half of a float32.
template <class V>
inline void load_bf16(const PanelRows<V>& rows, int64_t first, typename V::Float (&v)[kBf16Step]) {
  const typename V::Int upper = V::broadcast_int(static_cast<int32_t>(0xffff0000u));
  typename V::Int pairs[4];
  rows.load(2 * first, pairs);
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = V::as_float(V::template shift_left<16>(pairs[i]));
    v[2 * i + 1] = V::as_float(V::bit_and(pairs[i], upper));
  }
}

// A few tokens: the weights go from memory through registers.
template <class V, int M>
void bf16_stream(const uint16_t* w, int64_t k, int64_t begin, int64_t end, const float* x, int64_t ldx, float* y,
                 int64_t ldy) {
  using Float = typename V::Float;
  for (int64_t r = begin; r < end; r += V::kLanes) {
    const PanelRows<V> rows(w, 2 * k, r, end);
    Float sum[M];
    for (int m = 0; m < M; ++m) sum[m] = V::zero();
    for (int64_t chunk = 0; chunk < k; chunk += kBf16Chunk) {
      const int64_t stop = chunk + kBf16Chunk < k ? chunk + kBf16Chunk : k;
      Float part[M];
      for (int m = 0; m < M; ++m) part[m] = V::zero();
      for (int64_t i = chunk; i < stop; i += kBf16Step) {
        rows.template prefetch<2 * kBf16Step>(2 * i);
        Float v[kBf16Step];
        load_bf16<V>(rows, i, v);
        for (int j = 0; j < kBf16Step; ++j)
          for (int m = 0; m < M; ++m) part[m] = V::fma(v[j], V::broadcast(x[m * ldx + i + j]), part[m]);
      }
      for (int m = 0; m < M; ++m) sum[m] = V::add(sum[m], part[m]);
    }
    for (int m = 0; m < M; ++m) store_rows<V>(y + m * ldy, rows.start(), r, end, sum[m], 1);
  }
}

// Values [first, first + count) of kLanes rows -> column `column` of the panel.
template <class V>
void expand_bf16(const PanelRows<V>& rows, int64_t first, int count, int column, FloatPanel<V>& panel) {
  for (int i = 0; i < count; i += kBf16Step) {
    rows.template prefetch<2 * kBf16Step>(2 * (first + i));
    typename V::Float v[kBf16Step];
    load_bf16<V>(rows, first + i, v);
    for (int j = 0; j < kBf16Step; ++j) V::store(&panel.weights[i + j][column * V::kLanes], v[j]);
  }
}

// Adds the chunk times M tokens to sums[0 .. M).
template <class V, int M>
void float_tile(const FloatPanel<V>& panel, int count, const float* x, int64_t ldx,
                float (*sums)[FloatPanel<V>::kRows]) {
  using Float = typename V::Float;
  constexpr int kColumns = V::kColumns;
  Float part[M][kColumns];
  for (int m = 0; m < M; ++m)
    for (int c = 0; c < kColumns; ++c) part[m][c] = V::zero();
  for (int i = 0; i < count; ++i) {
    Float w[kColumns];
    for (int c = 0; c < kColumns; ++c) w[c] = V::load(&panel.weights[i][c * V::kLanes]);
    for (int m = 0; m < M; ++m) {
      const Float value = V::broadcast(x[m * ldx + i]);
      for (int c = 0; c < kColumns; ++c) part[m][c] = V::fma(w[c], value, part[m][c]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int c = 0; c < kColumns; ++c) {
      float* sum = &sums[m][c * V::kLanes];
      V::store(sum, V::add(V::load(sum), part[m][c]));
    }
  }
}

// The tile for the last tokens, fewer than V::kFloatTokens of them.
template <class V, int M>
void float_last_tile(int64_t tokens, const FloatPanel<V>& panel, int count, const float* x, int64_t ldx,
                     float (*sums)[FloatPanel<V>::kRows]) {
  if constexpr (M > 0) {
    if (tokens == M)
      float_tile<V, M>(panel, count, x, ldx, sums);
    else
      float_last_tile<V, M - 1>(tokens, panel, count, x, ldx, sums);
  }
}

template <class V>
void bf16_panels(const uint16_t* w, int64_t k, int64_t begin, int64_t end, const float* x, int64_t ldx, int64_t tokens,
                 float* y, int64_t ldy, FloatPanel<V>& panel) {
  constexpr int kRows = FloatPanel<V>::kRows;
  const auto column_rows = [&](int64_t r, int column) {
    return PanelRows<V>(w, 2 * k, r + column * V::kLanes, end, kRows);
  };
  for (int64_t r = begin; r < end; r += kRows) {
    std::memset(panel.sums, 0, static_cast<size_t>(tokens) * sizeof panel.sums[0]);
    for (int64_t first = 0; first < k; first += kBf16Chunk) {
      const int count = static_cast<int>(k - first < kBf16Chunk ? k - first : kBf16Chunk);
      for (int column = 0; column < V::kColumns; ++column)
        expand_bf16<V>(column_rows(r, column), first, count, column, panel);
      const float* from = x + first;
      int64_t t = 0;
      for (; t + V::kFloatTokens <= tokens; t += V::kFloatTokens, from += V::kFloatTokens * ldx)
        float_tile<V, V::kFloatTokens>(panel, count, from, ldx, panel.sums + t);
      float_last_tile<V, V::kFloatTokens - 1>(tokens - t, panel, count, from, ldx, panel.sums + t);
    }
    for (int column = 0; column < V::kColumns && r + column * V::kLanes < end; ++column) {
      const int64_t first = r + column * V::kLanes, start = column_rows(r, column).start();
      for (int64_t t = 0; t < tokens; ++t)
        store_rows<V>(y + t * ldy, start, first, end, V::load(panel.sums[t] + column * V::kLanes), 1);
    }
  }
}

template <class V>
void bf16_matmul(const uint16_t* w, int64_t k, int64_t begin, int64_t end, const float* x, int64_t ldx, int64_t tokens,
                 float* y, int64_t ldy, void* scratch) {
  if (tokens == 1) return bf16_stream<V, 1>(w, k, begin, end, x, ldx, y, ldy);
  if (tokens == 2) return bf16_stream<V, 2>(w, k, begin, end, x, ldx, y, ldy);
  if (tokens == 3) return bf16_stream<V, 3>(w, k, begin, end, x, ldx, y, ldy);
  if (tokens == 4) return bf16_stream<V, 4>(w, k, begin, end, x, ldx, y, ldy);
  for (int64_t t = 0; t < tokens; t += kFloatTokenBlock)
    bf16_panels<V>(w, k, begin, end, x + t * ldx, ldx, tokens - t < kFloatTokenBlock ? tokens - t : kFloatTokenBlock,
                   y + t * ldy, ldy, *static_cast<FloatPanel<V>*>(scratch));
}

}  // namespace
}  // namespace gptoss
