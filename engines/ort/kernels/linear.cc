#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "ops.h"

namespace gptoss {
namespace {

// A few tokens: long parts, which are read from memory at full speed. Many: short ones, whose results stay in the cache.
size_t parts_for(int64_t rows, int64_t tokens) { return tokens > 8 ? parts_of(rows, 64, 16) : parts_of(rows, 64, 4); }

// Activations of many tokens, and how far apart their rows are: not a multiple of a page, because the first-level cache has
// too few places for lines at such distances.
struct Rows {
  const float* x;
  int64_t stride;
};

Rows spread(const Context& context, const float* x, int64_t K, int64_t tokens) {
  constexpr int64_t kPage = 4096 / sizeof(float), kLine = 64 / sizeof(float);
  if (tokens <= 8 || K % kPage != 0) return {x, K};
  static thread_local Buffer buffer;
  const int64_t stride = K + kLine;
  buffer.reserve(sizeof(float) * static_cast<size_t>(tokens * stride));
  float* copy = buffer.as<float>();
  context.parallel(static_cast<size_t>(tokens), [&](size_t t) {
    std::memcpy(copy + static_cast<int64_t>(t) * stride, x + static_cast<int64_t>(t) * K,
                sizeof(float) * static_cast<size_t>(K));
  });
  return {copy, stride};
}

// For K that the kernels do not take; no released gpt-oss has one.
void any_k(const uint16_t* w, int64_t K, const Range& rows, const float* x, int64_t tokens, float* y, int64_t N) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t n = rows.begin; n < rows.end; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += static_cast<double>(x[t * K + k]) * from_bf16(w[n * K + k]);
      y[t * N + n] = static_cast<float>(sum);
    }
}

void add_bias(const uint16_t* bias, const Range& rows, int64_t tokens, float* y, int64_t N) {
  if (bias == nullptr) return;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t n = rows.begin; n < rows.end; ++n) y[t * N + n] += from_bf16(bias[n]);
}

// One y = x W^T (+ b): w [N, K], bias [N] or nullptr, y [tokens, N].
struct Product {
  const uint16_t* w;
  const uint16_t* bias;
  int64_t N;
  float* y;

  Product(const Input& x, const Input& weight, const Input* b, float* out)
      : w(weight.as<uint16_t>()), bias(b == nullptr ? nullptr : b->as<uint16_t>()), N(weight.dim(0)), y(out) {
    require(weight.dims.size() == 2 && x.dim(-1) == weight.dim(1), "x [.., K] and weight [N, K]");
    require(b == nullptr || b->dims == Dims{N}, "weight [N, K] and bias [N]");
  }
};

// Several products of one x, whose rows are split over the threads as if they were one matrix.
void linear(const Context& context, const Input& x, const std::vector<Product>& products) {
  struct Part {
    const Product* product;
    Range rows;
  };
  const Kernels& kernels = select();
  const int64_t K = x.dim(-1), tokens = x.rows();
  int64_t all = 0;
  for (const Product& p : products) all += p.N;
  const auto count = static_cast<int64_t>(parts_for(all, tokens));
  std::vector<Part> parts;
  for (const Product& p : products) {
    const auto mine = static_cast<size_t>(std::max<int64_t>(1, (p.N * count + all / 2) / all));
    for (size_t i = 0; i < mine; ++i) parts.push_back({&p, part(p.N, i, mine, kRowAlignment)});
  }
  const Rows from = spread(context, x.as<float>(), K, tokens);
  context.parallel(parts.size(), [&](size_t i) {
    const auto& [p, rows] = parts[i];
    if (rows.begin == rows.end) return;
    static thread_local Buffer scratch;
    scratch.reserve(kernels.bf16_scratch(K));
    if (K % 32 == 0) {
      kernels.bf16(p->w, K, rows.begin, rows.end, from.x, from.stride, tokens, p->y, p->N, scratch.as<void>());
    } else {
      any_k(p->w, K, rows, x.as<float>(), tokens, p->y, p->N);
    }
    add_bias(p->bias, rows, tokens, p->y, p->N);
  });
}

void linear_int8(const Context& context, const Input& x, const Input& weight, const Input& scales, const Input* bias,
                 float* y) {
  const Kernels& kernels = select();
  const int64_t N = weight.dim(0), K = weight.dim(1), tokens = x.rows();
  require(weight.dims.size() == 2 && K % 32 == 0 && x.dim(-1) == K, "x [.., K] and weight [N, K], K a multiple of 32");
  require((scales.dims == Dims{N, K / 32}), "weight [N, K] and scales [N, K/32]");
  require(bias == nullptr || bias->dims == Dims{N}, "weight [N, K] and bias [N]");
  const size_t bytes = kernels.activation_bytes(K);
  static thread_local Buffer buffer;
  buffer.reserve(bytes * static_cast<size_t>(tokens));
  char* q = buffer.as<char>();
  context.each(tokens, [&](int64_t t) {
    kernels.quantize(x.as<float>() + t * K, K, q + static_cast<size_t>(t) * bytes);
  });
  const size_t parts = parts_for(N, tokens);
  context.parallel(parts, [&](size_t i) {
    const Range rows = part(N, i, parts, kRowAlignment);
    if (rows.begin == rows.end) return;
    static thread_local Buffer scratch;
    scratch.reserve(kernels.int8_scratch(K));
    kernels.int8(weight.as<int8_t>(), scales.as<uint16_t>(), K, rows.begin, rows.end, q, tokens, y, N,
                 scratch.as<void>());
    add_bias(bias == nullptr ? nullptr : bias->as<uint16_t>(), rows, tokens, y, N);
  });
}

Dims with_last(Dims dims, int64_t last) {
  dims.back() = last;
  return dims;
}

}  // namespace

void Linear::compute(const Context& context) const {
  const Input x = context.input(0), weight = context.input(1), bias = context.input(2);
  linear(context, x, {{x, weight, &bias, context.output<float>(0, with_last(x.dims, weight.dim(0)))}});
}

void LinearNoBias::compute(const Context& context) const {
  const Input x = context.input(0), weight = context.input(1);
  linear(context, x, {{x, weight, nullptr, context.output<float>(0, with_last(x.dims, weight.dim(0)))}});
}

void LinearQKV::compute(const Context& context) const {
  const Input x = context.input(0);
  std::vector<Product> products;
  for (size_t i = 0; i < 3; ++i) {
    const Input weight = context.input(1 + 2 * i), bias = context.input(2 + 2 * i);
    products.emplace_back(x, weight, &bias, context.output<float>(i, with_last(x.dims, weight.dim(0))));
  }
  linear(context, x, products);
}

void LinearInt8::compute(const Context& context) const {
  const Input x = context.input(0), weight = context.input(1), scales = context.input(2), bias = context.input(3);
  linear_int8(context, x, weight, scales, &bias, context.output<float>(0, with_last(x.dims, weight.dim(0))));
}

void LinearInt8NoBias::compute(const Context& context) const {
  const Input x = context.input(0), weight = context.input(1), scales = context.input(2);
  linear_int8(context, x, weight, scales, nullptr, context.output<float>(0, with_last(x.dims, weight.dim(0))));
}

void MoERouter::compute(const Context& context) const {
  const Input x = context.input(0), weight = context.input(1), bias = context.input(2);
  const int64_t E = weight.dim(0), tokens = x.rows(), K = top_k;
  require(0 < K && K <= E && bias.dim(0) == E, "weight [E, H] and bias [E] with top_k of at most E");
  const Dims shape = with_last(x.dims, K);
  float* weights = context.output<float>(0, shape);
  int64_t* experts = context.output<int64_t>(1, shape);
  std::vector<float> logits(static_cast<size_t>(tokens * E));
  linear(context, x, {{x, weight, &bias, logits.data()}});
  std::vector<int64_t> order(static_cast<size_t>(E));
  for (int64_t t = 0; t < tokens; ++t) {
    const float* g = logits.data() + t * E;
    for (int64_t e = 0; e < E; ++e) order[static_cast<size_t>(e)] = e;
    // NaN must not break the order that partial_sort relies on; it sorts last.
    const auto key = [g](int64_t e) { return std::isnan(g[e]) ? -HUGE_VALF : g[e]; };
    std::partial_sort(order.begin(), order.begin() + K, order.end(), [&](int64_t a, int64_t b) {
      return key(a) > key(b) || (key(a) == key(b) && a < b);
    });
    float sum = 0;
    for (int64_t k = 0; k < K; ++k) {
      experts[t * K + k] = order[static_cast<size_t>(k)];
      sum += weights[t * K + k] = std::exp(g[order[static_cast<size_t>(k)]] - g[order[0]]);
    }
    for (int64_t k = 0; k < K; ++k) weights[t * K + k] /= sum;
  }
}

}  // namespace gptoss
