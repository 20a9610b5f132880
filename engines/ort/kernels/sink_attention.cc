// Attention over a cache of fixed capacity: position j of the text lies in slot j mod C, so that a layer with a window
// needs no more slots than it can see, and a step writes its own keys and values and copies nothing.
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "ops.h"

namespace gptoss {
namespace {

// Tokens of one key head that are worked on together: a key is then read once for all of their queries.
constexpr int64_t kTokenBlock = 8;

struct Shape {
  int64_t B, S, T, C, D, heads, kv_heads;
};

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

// Tokens [begin, end) of row b for all query heads that read key head h.
void attend(const Operands& o, const Shape& s, int64_t b, int64_t h, int64_t begin, int64_t end, float scale,
            int64_t window) {
  const int64_t group = s.heads / s.kv_heads, head = b * s.kv_heads + h;
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

  Attention a;
  a.tokens = end - begin, a.group = group, a.D = s.D;
  a.slots = s.C, a.first = first, a.keys = last - first, a.window = window;
  a.token_stride = s.heads * s.D;
  const int64_t at = (b * s.S + begin) * a.token_stride + h * group * s.D;
  a.q = o.q + at, a.out = o.out + at;
  a.key_slots = o.keys + head * s.C * s.D, a.value_slots = o.values + head * s.C * s.D;
  a.sinks = o.sinks + h * group;
  a.query_positions = q_pos + begin, a.key_positions = k_pos + first;
  a.scale = scale;
  static thread_local Buffer scratch;
  scratch.reserve(select().attention_scratch(a.tokens * group, s.D, a.keys));
  select().attend(a, scratch.as<void>());
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
  require(s.T < INT32_MAX, "fewer than 2^31 positions");
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
  const int64_t blocks = (s.S + kTokenBlock - 1) / kTokenBlock;
  context.parallel(static_cast<size_t>(s.B * kv_heads * blocks), [&](size_t i) {
    const auto task = static_cast<int64_t>(i);
    const int64_t block = task % blocks, head = task / blocks;
    attend(o, s, head / kv_heads, head % kv_heads, block * kTokenBlock, std::min(s.S, (block + 1) * kTokenBlock), scale,
           window);
  });
}

}  // namespace gptoss
