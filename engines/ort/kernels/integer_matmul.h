// Weights in MXFP4 or int8 times quantised activations, for one token or thousands, on any vector type V.
//
// A register holds one dword (four values) of each of V::kLanes rows: every lane is a row, so that no sum crosses lanes
// and a row's result does not depend on its neighbours or on the number of tokens. A few tokens are integer_stream.h.
// For more, a chunk of a panel of rows is read, transposed and widened to bytes in scratch (which stays in the first-level
// cache) once, then multiplied by all tokens.
#pragma once

#include "integer_stream.h"

namespace gptoss {
namespace {

constexpr int kChunkGroups = 16;  // groups of a panel in scratch at a time
constexpr int kTokenBlock = 96;   // tokens whose activations stay in the second-level cache

template <class V>
struct IntegerPanel {
  static constexpr int kRows = V::kLanes * V::kColumns;
  alignas(64) uint8_t weights[kChunkGroups * kGroupDwords][kRows][4];
  alignas(64) float scales[kChunkGroups][kRows];
  alignas(64) float sums[kTokenBlock][kRows];
};

// Groups [group, group + count) of kLanes rows -> column `column` of the panel.
template <class V, class Format>
void expand_integers(const PanelRows<V>& rows, const PanelRows<V>& scale_rows, int64_t group, int count, int column,
                     IntegerPanel<V>& panel) {
  for (int first = 0; first < count; first += Format::kScaleGroups) {
    scale_rows.template prefetch<Format::kScaleGroups * Format::kScaleBytes>((group + first) * Format::kScaleBytes);
    Format::load_scales(scale_rows, group + first, &panel.scales[first][column * V::kLanes], IntegerPanel<V>::kRows);
  }
  for (int g = 0; g < count; ++g) {
    rows.template prefetch<Format::kGroupBytes>((group + g) * Format::kGroupBytes);
    typename V::Int v[kGroupDwords];
    Format::load(rows, group + g, v);
    for (int i = 0; i < kGroupDwords; ++i)
      V::store_int(panel.weights[g * kGroupDwords + i][column * V::kLanes], v[i]);
  }
}

// Adds groups [0, count) of the panel times M tokens to sums[0 .. M). x: the first token's first group in the panel.
template <class V, class Format, int M>
void integer_tile(const IntegerPanel<V>& panel, int count, const uint8_t* x, size_t token_bytes,
                  float (*sums)[IntegerPanel<V>::kRows]) {
  using Dot = typename Format::Dot;
  using Int = typename V::Int;
  using Float = typename V::Float;
  constexpr int kColumns = V::kColumns;
  Float sum[M][kColumns];
  for (int m = 0; m < M; ++m)
    for (int c = 0; c < kColumns; ++c) sum[m][c] = V::load(&sums[m][c * V::kLanes]);

  for (int g = 0; g < count; ++g) {
    const ActivationGroup* token[M];
    Int high[M][kColumns], low[M][kColumns];
    for (int m = 0; m < M; ++m) {
      token[m] = reinterpret_cast<const ActivationGroup*>(x + static_cast<size_t>(m) * token_bytes) + g;
      for (int c = 0; c < kColumns; ++c) {
        high[m][c] = V::zero_int();
        low[m][c] = V::broadcast_int(Format::correction(*token[m]));
      }
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      typename Dot::Partial high_part[M][kColumns], low_part[M][kColumns];
      for (int m = 0; m < M; ++m) {
        for (int c = 0; c < kColumns; ++c) {
          high_part[m][c] = Dot::begin(high[m][c]);
          low_part[m][c] = Dot::begin(low[m][c]);
        }
      }
#pragma GCC unroll 4
      for (int i = half * 4; i < half * 4 + 4; ++i) {
        Int w[kColumns];
        for (int c = 0; c < kColumns; ++c) w[c] = V::load_int(panel.weights[g * kGroupDwords + i][c * V::kLanes]);
        for (int m = 0; m < M; ++m) {
          const Int x_high = V::broadcast_bytes(token[m]->high + 4 * i);
          const Int x_low = V::broadcast_bytes(token[m]->low + 4 * i);
          for (int c = 0; c < kColumns; ++c) {
            high_part[m][c] = Dot::step(high_part[m][c], w[c], x_high);
            low_part[m][c] = Dot::step(low_part[m][c], w[c], x_low);
          }
        }
      }
      for (int m = 0; m < M; ++m) {
        for (int c = 0; c < kColumns; ++c) {
          high[m][c] = Dot::finish(high[m][c], high_part[m][c]);
          low[m][c] = Dot::finish(low[m][c], low_part[m][c]);
        }
      }
    }
    for (int m = 0; m < M; ++m) {
      const Float scale = V::broadcast(token[m]->scale);
      for (int c = 0; c < kColumns; ++c) {
        const Int dot = V::add(V::template shift_left<8>(high[m][c]), low[m][c]);
        sum[m][c] = V::fma(V::mul(V::to_float(dot), scale), V::load(&panel.scales[g][c * V::kLanes]), sum[m][c]);
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int c = 0; c < kColumns; ++c) V::store(&sums[m][c * V::kLanes], sum[m][c]);
}

// The tile for the last tokens, fewer than V::kIntTokens of them.
template <class V, class Format, int M>
void integer_last_tile(int64_t tokens, const IntegerPanel<V>& panel, int count, const uint8_t* x, size_t token_bytes,
                       float (*sums)[IntegerPanel<V>::kRows]) {
  if constexpr (M > 0) {
    if (tokens == M)
      integer_tile<V, Format, M>(panel, count, x, token_bytes, sums);
    else
      integer_last_tile<V, Format, M - 1>(tokens, panel, count, x, token_bytes, sums);
  }
}

template <class V, class Format>
void integer_panels(const Format& w, int64_t begin, int64_t end, const uint8_t* x, size_t token_bytes, int64_t tokens,
                    float* y, int64_t ldy, IntegerPanel<V>& panel) {
  constexpr int kRows = IntegerPanel<V>::kRows;
  const auto column_rows = [&](const auto* matrix, const auto* next, int bytes, int64_t r, int column) {
    if (next != nullptr) next += column * V::kLanes * w.groups * bytes / static_cast<int>(sizeof *next);
    return PanelRows<V>(matrix, w.groups * bytes, r + column * V::kLanes, end, kRows, next);
  };
  for (int64_t r = begin; r < end; r += kRows) {
    std::memset(panel.sums, 0, static_cast<size_t>(tokens) * sizeof panel.sums[0]);
    for (int64_t group = 0; group < w.groups; group += kChunkGroups) {
      const int count = static_cast<int>(w.groups - group < kChunkGroups ? w.groups - group : kChunkGroups);
      for (int column = 0; column < V::kColumns; ++column)
        expand_integers<V, Format>(column_rows(w.weights, w.next_weights, Format::kGroupBytes, r, column),
                                   column_rows(w.scales, w.next_scales, Format::kScaleBytes, r, column), group, count,
                                   column, panel);
      const uint8_t* from = x + static_cast<size_t>(group) * sizeof(ActivationGroup);
      int64_t t = 0;
      for (; t + V::kIntTokens <= tokens; t += V::kIntTokens, from += V::kIntTokens * token_bytes)
        integer_tile<V, Format, V::kIntTokens>(panel, count, from, token_bytes, panel.sums + t);
      integer_last_tile<V, Format, V::kIntTokens - 1>(tokens - t, panel, count, from, token_bytes, panel.sums + t);
    }
    for (int column = 0; column < V::kColumns && r + column * V::kLanes < end; ++column) {
      const int64_t first = r + column * V::kLanes, start = PanelRows<V>(w.weights, 0, first, end).start();
      for (int64_t t = 0; t < tokens; ++t)
        store_rows<V>(y + t * ldy, start, first, end, V::load(panel.sums[t] + column * V::kLanes), Format::kFactor);
    }
  }
}

template <class V, class Format>
void integer_matmul(const Format& w, int64_t begin, int64_t end, const void* activations, int64_t tokens, float* y,
                    int64_t ldy, void* scratch) {
  const size_t token_bytes = activation_bytes(w.groups * kGroup);
  const auto* x = static_cast<const uint8_t*>(activations);
  if (tokens == 1) return integer_stream<V, Format, 1>(w, begin, end, x, token_bytes, y, ldy);
  if (tokens == 2) return integer_stream<V, Format, 2>(w, begin, end, x, token_bytes, y, ldy);
  if (tokens == 3) return integer_stream<V, Format, 3>(w, begin, end, x, token_bytes, y, ldy);
  if (tokens == 4) return integer_stream<V, Format, 4>(w, begin, end, x, token_bytes, y, ldy);
  // Blocks of one size: a short last one would expand the weights for little.
  const int64_t blocks = (tokens + kTokenBlock - 1) / kTokenBlock;
  const int64_t block = ((tokens + blocks - 1) / blocks + V::kIntTokens - 1) / V::kIntTokens * V::kIntTokens;
  for (int64_t t = 0; t < tokens; t += block)
    integer_panels<V>(w, begin, end, x + static_cast<size_t>(t) * token_bytes, token_bytes,
                      tokens - t < block ? tokens - t : block, y + t * ldy, ldy,
                      *static_cast<IntegerPanel<V>*>(scratch));
}

}  // namespace
}  // namespace gptoss
