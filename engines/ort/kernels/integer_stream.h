// A few tokens: the weights go from memory through registers, and what counts is that they are read without a pause.
#pragma once

#include "integer_formats.h"

namespace gptoss {
namespace {

// sum[m] += one group of weights v times token m.
template <class V, class Format, int M>
inline void stream_group(const typename V::Int (&v)[kGroupDwords], const float* scales, const uint8_t* x,
                         size_t token_bytes, typename V::Float (&sum)[M]) {
  using Dot = typename Format::Dot;
  using Int = typename V::Int;
  // For few tokens even and odd dwords are added apart, which makes twice as many independent chains.
  constexpr int kChains = M <= 2 ? 2 : 1;
  const ActivationGroup* token[M];
  Int high[M][kChains], low[M][kChains];
  for (int m = 0; m < M; ++m) {
    token[m] = reinterpret_cast<const ActivationGroup*>(x + static_cast<size_t>(m) * token_bytes);
    for (int c = 0; c < kChains; ++c) {
      high[m][c] = V::zero_int();
      low[m][c] = V::broadcast_int(c == 0 ? Format::correction(*token[m]) : 0);
    }
  }
#pragma GCC unroll 2
  for (int odd = 0; odd < 2; ++odd) {
    const int c = odd % kChains;
    typename Dot::Partial high_part[M], low_part[M];
    for (int m = 0; m < M; ++m) {
      high_part[m] = Dot::begin(high[m][c]);
      low_part[m] = Dot::begin(low[m][c]);
    }
#pragma GCC unroll 4
    for (int i = odd; i < kGroupDwords; i += 2) {
      for (int m = 0; m < M; ++m) {
        high_part[m] = Dot::step(high_part[m], v[i], V::broadcast_bytes(token[m]->high + 4 * i));
        low_part[m] = Dot::step(low_part[m], v[i], V::broadcast_bytes(token[m]->low + 4 * i));
      }
    }
    for (int m = 0; m < M; ++m) {
      high[m][c] = Dot::finish(high[m][c], high_part[m]);
      low[m][c] = Dot::finish(low[m][c], low_part[m]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int c = 1; c < kChains; ++c) {
      high[m][0] = V::add(high[m][0], high[m][c]);
      low[m][0] = V::add(low[m][0], low[m][c]);
    }
    const Int dot = V::add(V::template shift_left<8>(high[m][0]), low[m][0]);
    sum[m] = V::fma(V::mul(V::to_float(dot), V::broadcast(token[m]->scale)), V::load(scales), sum[m]);
  }
}

template <class V, class Format, int M>
void integer_stream(const Format& w, int64_t begin, int64_t end, const uint8_t* x, size_t token_bytes, float* y,
                    int64_t ldy) {
  for (int64_t r = begin; r < end; r += V::kLanes) {
    const PanelRows<V> rows(w.weights, w.groups * Format::kGroupBytes, r, end, V::kLanes, w.next_weights);
    const PanelRows<V> scale_rows(w.scales, w.groups * Format::kScaleBytes, r, end, V::kLanes, w.next_scales);
    typename V::Float sum[M];
    for (int m = 0; m < M; ++m) sum[m] = V::zero();

    for (int64_t block = 0; block < w.groups; block += Format::kScaleGroups) {
      alignas(64) float scales[Format::kScaleGroups][V::kLanes];
      scale_rows.template prefetch<Format::kScaleGroups * Format::kScaleBytes>(block * Format::kScaleBytes);
      Format::load_scales(scale_rows, block, scales[0], V::kLanes);
      const int64_t stop = block + Format::kScaleGroups < w.groups ? block + Format::kScaleGroups : w.groups;
      for (int64_t group = block; group < stop; ++group) {
        rows.template prefetch<Format::kGroupBytes>(group * Format::kGroupBytes);
        typename V::Int v[kGroupDwords];
        Format::load(rows, group, v);
        stream_group<V, Format, M>(v, scales[group - block], x + static_cast<size_t>(group) * sizeof(ActivationGroup),
                                   token_bytes, sum);
      }
    }
    for (int m = 0; m < M; ++m) store_rows<V>(y + m * ldy, rows.start(), r, end, sum[m], Format::kFactor);
  }
}

}  // namespace
}  // namespace gptoss
