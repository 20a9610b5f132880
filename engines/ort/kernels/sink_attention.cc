// Attention over a cache of fixed capacity: position j of the text lies in slot j mod C, so that a layer with a window
// needs no more slots than it can see, and a step writes its own keys and values and copies nothing.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "ops.h"

// The loops below are written for the compiler's vectoriser: one version for each level, chosen when the library loads.
#if defined(__x86_64__)
#define GPTOSS_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define GPTOSS_CLONES
#endif

namespace gptoss {
namespace {

// Queries of one key head that are worked on together: a key is then read once for all of them.
constexpr int64_t kQueryBlock = 16;

struct Shape {
  int64_t B, S, T, C, D, heads, kv_heads;
};

// scores[i, j] = scale * q_i . k_j for `keys` keys in their order; q [queries, D] and k [keys, D] contiguous.
GPTOSS_CLONES void dot_rows(const float* q, int64_t queries, const float* k, int64_t keys, int64_t D, float scale,
                            float* scores, int64_t stride) {
  for (int64_t i = 0; i < queries; ++i) {
    const float* a = q + i * D;
    for (int64_t j = 0; j < keys; ++j) {
      const float* b = k + j * D;
      float sum[16] = {};
      int64_t d = 0;
      for (; d + 16 <= D; d += 16)
        for (int64_t l = 0; l < 16; ++l) sum[l] += a[d + l] * b[d + l];
      for (; d < D; ++d) sum[0] += a[d] * b[d];
      for (int64_t width = 8; width > 0; width /= 2)
        for (int64_t l = 0; l < width; ++l) sum[l] += sum[l + width];
      scores[i * stride + j] = scale * sum[0];
    }
  }
}

// out[i] += sum_j p[i, j] v_j.
GPTOSS_CLONES void add_rows(const float* p, int64_t queries, int64_t stride, const float* v, int64_t keys, int64_t D,
                            float* out) {
  for (int64_t i = 0; i < queries; ++i)
    for (int64_t j = 0; j < keys; ++j) {
      const float weight = p[i * stride + j];
      if (weight == 0) continue;
      for (int64_t d = 0; d < D; ++d) out[i * D + d] += weight * v[j * D + d];
    }
}

// The softmax of one row of scores together with the sink, whose share is left out.
void softmax_with_sink(float* scores, int64_t keys, float sink) {
  float largest = sink;
  for (int64_t j = 0; j < keys; ++j) largest = std::max(largest, scores[j]);
  float sum = std::exp(sink - largest);
  for (int64_t j = 0; j < keys; ++j) sum += scores[j] = std::exp(scores[j] - largest);
  for (int64_t j = 0; j < keys; ++j) scores[j] /= sum;
}

// Where new keys and values [B, S, kv_heads * D] go: into slots T-S .. T-1 of [B, kv_heads, C, D].
void append(const float* rows, const Shape& s, int64_t b, int64_t h, float* cache) {
  float* head = cache + (b * s.kv_heads + h) * s.C * s.D;
  for (int64_t i = std::max<int64_t>(0, s.S - s.C); i < s.S; ++i)
    std::memcpy(head + (s.T - s.S + i) % s.C * s.D, rows + ((b * s.S + i) * s.kv_heads + h) * s.D,
                sizeof(float) * static_cast<size_t>(s.D));
}

// Whether no query of a row sees a key whose slot was given to a later one: those are the places before T - C.
bool holds_what_is_seen(const int64_t* query_positions, const int64_t* key_positions, const Shape& s, int64_t window) {
  int64_t place = s.T - s.C - 1;
  while (place >= 0 && key_positions[place] < 0) --place;
  if (place < 0) return true;
  // Positions grow, so the last key that was lost is the first that would be missed.
  return std::all_of(query_positions, query_positions + s.S, [&](int64_t position) {
    return position < key_positions[place] || (window > 0 && position - key_positions[place] >= window);
  });
}

struct Operands {
  const float* q;
  const float* keys;
  const float* values;
  const uint16_t* sinks;
  const int64_t* query_positions;
  const int64_t* key_positions;
  float* out;
};

// Queries [begin, end) of row b for all query heads that read key head h.
void attend(const Operands& o, const Shape& s, int64_t b, int64_t h, int64_t begin, int64_t end, float scale,
            int64_t window) {
  const int64_t group = s.heads / s.kv_heads, count = end - begin, queries = count * group;
  const float* K = o.keys + (b * s.kv_heads + h) * s.C * s.D;
  const float* V = o.values + (b * s.kv_heads + h) * s.C * s.D;
  const int64_t* q_pos = o.query_positions + b * s.S;
  const int64_t* k_pos = o.key_positions + b * s.T;

  // The places [first, last) of the text that any of the queries may see and that the cache still holds.
  const int64_t last = s.T - s.S + end;
  int64_t first = std::max<int64_t>(0, s.T - s.C);
  if (window > 0) {
    int64_t lowest = INT64_MAX;
    for (int64_t i = begin; i < end; ++i)
      if (q_pos[i] >= 0) lowest = std::min(lowest, q_pos[i]);
    while (first < last && (k_pos[first] < 0 || (lowest != INT64_MAX && lowest - k_pos[first] >= window))) ++first;
  }
  const int64_t keys = last - first;

  static thread_local Buffer buffer;
  buffer.reserve(sizeof(float) * static_cast<size_t>(queries * (2 * s.D + std::max<int64_t>(keys, 1))));
  float* q = buffer.as<float>();
  float* out = q + queries * s.D;
  float* scores = out + queries * s.D;
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(q + i * group * s.D, o.q + ((b * s.S + begin + i) * s.heads + h * group) * s.D,
                sizeof(float) * static_cast<size_t>(group * s.D));
  std::memset(out, 0, sizeof(float) * static_cast<size_t>(queries * s.D));

  // The cache is a ring: its part of [first, last) is one run of slots or two.
  const auto runs = [&](const auto& f) {
    for (int64_t j = first; j < last;) {
      const int64_t slot = j % s.C, length = std::min(last - j, s.C - slot);
      f(slot, j - first, length);
      j += length;
    }
  };
  runs([&](int64_t slot, int64_t at, int64_t n) {
    dot_rows(q, queries, K + slot * s.D, n, s.D, scale, scores + at, keys);
  });
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t position = q_pos[begin + i / group];
    float* row = scores + i * keys;
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t p = k_pos[first + j];
      if (p < 0 || p > position || (window > 0 && position - p >= window)) row[j] = -HUGE_VALF;
    }
    softmax_with_sink(row, keys, from_bf16(o.sinks[h * group + i % group]));
  }
  runs([&](int64_t slot, int64_t at, int64_t n) {
    add_rows(scores + at, queries, keys, V + slot * s.D, n, s.D, out);
  });
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(o.out + ((b * s.S + begin + i) * s.heads + h * group) * s.D, out + i * group * s.D,
                sizeof(float) * static_cast<size_t>(group * s.D));
}

}  // namespace

void SharedSinkAttention::compute(const Context& context) const {
  const Input q = context.input(0), k = context.input(1), v = context.input(2), past_key = context.input(3),
              past_value = context.input(4), sinks = context.input(5), query_positions = context.input(6),
              key_positions = context.input(7);
  require(q.dims.size() == 3 && past_key.dims.size() == 4 && key_positions.dims.size() == 2,
          "q [B, S, heads * D], cache [B, kv_heads, C, D] and positions [B, T]");
  const Shape s{q.dim(0), q.dim(1), key_positions.dim(1), past_key.dim(2), past_key.dim(3), num_heads, kv_heads};
  require(kv_heads > 0 && num_heads % kv_heads == 0 && q.dim(2) == num_heads * s.D, "q [B, S, heads * D]");
  require((k.dims == Dims{s.B, s.S, kv_heads * s.D}) && v.dims == k.dims, "k and v [B, S, kv_heads * D]");
  require((past_key.dims == Dims{s.B, kv_heads, s.C, s.D}) && past_value.dims == past_key.dims,
          "caches [B, kv_heads, C, D]");
  require((query_positions.dims == Dims{s.B, s.S}) && key_positions.dim(0) == s.B && s.T >= s.S, "positions [B, S] and [B, T]");
  require(sinks.dims == Dims{num_heads}, "a sink for each head");
  for (int64_t b = 0; b < s.B; ++b)
    require(holds_what_is_seen(query_positions.as<int64_t>() + b * s.S, key_positions.as<int64_t>() + b * s.T, s, window),
            "the cache is too small: a key that a query still sees has lost its slot");

  float* attention = context.output<float>(0, q.dims);
  float* keys = context.output<float>(1, past_key.dims);
  float* values = context.output<float>(2, past_value.dims);
  // Bound to the same memory, as a runner does that wants no copies; otherwise the cache is copied once.
  const size_t bytes = sizeof(float) * static_cast<size_t>(s.B * kv_heads * s.C * s.D);
  if (keys != past_key.data) std::memcpy(keys, past_key.data, bytes);
  if (values != past_value.data) std::memcpy(values, past_value.data, bytes);

  const Operands o{q.as<float>(),       keys, values, sinks.as<uint16_t>(), query_positions.as<int64_t>(),
                   key_positions.as<int64_t>(), attention};
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t h = 0; h < kv_heads; ++h) {
      append(k.as<float>(), s, b, h, keys);
      append(v.as<float>(), s, b, h, values);
    }
  const int64_t blocks = (s.S + kQueryBlock - 1) / kQueryBlock;
  context.parallel(static_cast<size_t>(s.B * kv_heads * blocks), [&](size_t i) {
    const auto task = static_cast<int64_t>(i);
    const int64_t block = task % blocks, head = task / blocks;
    attend(o, s, head / kv_heads, head % kv_heads, block * kQueryBlock, std::min(s.S, (block + 1) * kQueryBlock), scale,
           window);
  });
}

}  // namespace gptoss
