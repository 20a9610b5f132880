// Softmax attention with a sink, on any vector type V: every lane is a query, so that no sum crosses lanes and a query's
// result depends neither on its neighbours nor on keys that it does not see.
#pragma once

#include "elementwise.h"

namespace gptoss {
namespace {

constexpr int kMostColumns = 4;    // vectors of queries in a register tile
constexpr int64_t kKeyBlock = 64;  // keys whose probabilities and values stay in the first-level cache

// The parts of `scratch`. lanes: the number of queries, rounded up to whole vectors.
template <class V>
struct AttentionScratch {
  int64_t lanes;
  float *largest, *sums, *q, *out, *scores;
  int32_t* positions;

  AttentionScratch(const Attention& a, void* scratch)
      : lanes(rounded(a.tokens * a.group)), largest(static_cast<float*>(scratch)), sums(largest + lanes),
        q(sums + lanes), out(q + a.D * lanes), scores(out + a.D * lanes),
        positions(reinterpret_cast<int32_t*>(scores + a.keys * lanes)) {}

  static int64_t rounded(int64_t queries) { return (queries + V::kLanes - 1) / V::kLanes * V::kLanes; }
  static size_t bytes(int64_t queries, int64_t D, int64_t keys) {
    return sizeof(float) * static_cast<size_t>(rounded(queries) * (3 + 2 * D + keys));
  }
};

// out[r * out_stride + lane] (+)= sum over i < n of rows[r * row_stride + i * step] * x[i * lanes + lane], for `count` rows and
// C vectors of lanes: R rows at a time, and half of that for what is left. Sums go in the order of i.
template <class V, int C, int R, bool kAdd>
void multiply_rows(const float* rows, int64_t count, int64_t row_stride, int64_t step, const float* x, int64_t n,
                   int64_t lanes, float* out) {
  using Float = typename V::Float;
  for (; count >= R; count -= R, rows += R * row_stride, out += R * lanes) {
    Float sum[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sum[r][c] = kAdd ? V::load(out + r * lanes + c * V::kLanes) : V::zero();
    for (int64_t i = 0; i < n; ++i) {
      Float value[C];
      for (int c = 0; c < C; ++c) value[c] = V::load(x + i * lanes + c * V::kLanes);
      for (int r = 0; r < R; ++r) {
        const Float weight = V::broadcast(rows[r * row_stride + i * step]);
        for (int c = 0; c < C; ++c) sum[r][c] = V::fma(weight, value[c], sum[r][c]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) V::store(out + r * lanes + c * V::kLanes, sum[r][c]);
  }
  if constexpr (R > 1) {
    if (count > 0) multiply_rows<V, C, R / 2, kAdd>(rows, count, row_stride, step, x, n, lanes, out);
  }
}

template <class V, int C, bool kAdd>
void multiply_columns(const float* rows, int64_t count, int64_t row_stride, int64_t step, const float* x, int64_t n,
                      int64_t lanes, float* out) {
  constexpr int kRows = V::kAccumulators / C < 8 ? V::kAccumulators / C : 8;
  multiply_rows<V, C, kRows, kAdd>(rows, count, row_stride, step, x, n, lanes, out);
}

// All lanes of x, as many vectors at a time as a tile holds.
template <class V, bool kAdd>
void multiply_lanes(const float* rows, int64_t count, int64_t row_stride, int64_t step, const float* x, int64_t n,
                    int64_t lanes, float* out) {
  int64_t lane = 0;
  for (; lane + kMostColumns * V::kLanes <= lanes; lane += kMostColumns * V::kLanes)
    multiply_columns<V, kMostColumns, kAdd>(rows, count, row_stride, step, x + lane, n, lanes, out + lane);
  for (; lane < lanes; lane += V::kLanes)
    multiply_columns<V, 1, kAdd>(rows, count, row_stride, step, x + lane, n, lanes, out + lane);
}

// scores[j, lane] -> scale * scores where the query sees the key, -infinity elsewhere; largest[lane] becomes their maximum.
inline void mask_scores(const Attention& a, const int32_t* __restrict positions, int64_t lanes,
                        float* __restrict scores, float* __restrict largest) {
  const int32_t window = a.window > 0 && a.window < INT32_MAX ? static_cast<int32_t>(a.window) : INT32_MAX;
  for (int64_t j = 0; j < a.keys; ++j) {
    const auto key = static_cast<int32_t>(a.key_positions[j]);
    // A key that is padding has no position: no distance is within this window.
    const int32_t reach = key < 0 ? -1 : window;
    float* row = scores + j * lanes;
    for (int64_t l = 0; l < lanes; ++l) {
      const int32_t distance = positions[l] - key;
      const bool seen = (distance >= 0) & (distance < reach);
      const float score = seen ? a.scale * row[l] : -HUGE_VALF;
      row[l] = score;
      largest[l] = score > largest[l] ? score : largest[l];
    }
  }
}

// scores -> e^(scores - largest), added to sums.
inline void exponentiate(int64_t keys, int64_t lanes, const float* __restrict largest, float* __restrict scores,
                         float* __restrict sums) {
  for (int64_t j = 0; j < keys; ++j) {
    float* row = scores + j * lanes;
    for (int64_t l = 0; l < lanes; ++l) {
      row[l] = exponential(row[l] - largest[l]);
      sums[l] += row[l];
    }
  }
}

// f(keys, values, place, count) for each run of slots that follow each other: place is that of the first in the text.
template <class F>
void for_runs(const Attention& a, const F& f) {
  for (int64_t place = 0; place < a.keys;) {
    const int64_t slot = (a.first + place) % a.slots, count = a.keys - place < a.slots - slot ? a.keys - place : a.slots - slot;
    f(a.key_slots + slot * a.D, a.value_slots + slot * a.D, place, count);
    place += count;
  }
}

template <class V>
void attend(const Attention& a, void* scratch) {
  const AttentionScratch<V> s(a, scratch);
  const int64_t queries = a.tokens * a.group, lanes = s.lanes, D = a.D;
  for (int64_t l = 0; l < lanes; ++l) {
    const bool real = l < queries;
    const float* from = a.q + l / a.group * a.token_stride + l % a.group * D;
    for (int64_t d = 0; d < D; ++d) s.q[d * lanes + l] = real ? from[d] : 0.0f;
    s.positions[l] = real ? static_cast<int32_t>(a.query_positions[l / a.group]) : -1;
    s.largest[l] = real ? widened(a.sinks[l % a.group]) : 0.0f;
    s.sums[l] = s.largest[l];  // the sink's score, until the largest is known
  }
  for_runs(a, [&](const float* keys, const float*, int64_t place, int64_t count) {
    multiply_lanes<V, false>(keys, count, D, 1, s.q, D, lanes, s.scores + place * lanes);
  });
  mask_scores(a, s.positions, lanes, s.scores, s.largest);
  for (int64_t l = 0; l < lanes; ++l) s.sums[l] = exponential(s.sums[l] - s.largest[l]);
  exponentiate(a.keys, lanes, s.largest, s.scores, s.sums);

  std::memset(s.out, 0, sizeof(float) * static_cast<size_t>(D * lanes));
  for_runs(a, [&](const float*, const float* values, int64_t place, int64_t count) {
    for (int64_t j = 0; j < count; j += kKeyBlock)
      multiply_lanes<V, true>(values + j * D, D, 1, D, s.scores + (place + j) * lanes,
                              count - j < kKeyBlock ? count - j : kKeyBlock, lanes, s.out);
  });
  for (int64_t l = 0; l < queries; ++l) {
    float* to = a.out + l / a.group * a.token_stride + l % a.group * D;
    for (int64_t d = 0; d < D; ++d) to[d] = s.out[d * lanes + l] / s.sums[l];
  }
}

template <class V>
size_t attention_scratch(int64_t queries, int64_t D, int64_t keys) {
  return AttentionScratch<V>::bytes(queries, D, keys);
}

}  // namespace
}  // namespace gptoss
