#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "ops.h"

namespace gptoss {
namespace {

// Enough parts that a thread which is held up does not hold up the others for long; each at least some rows.
size_t parts_of(int64_t rows) { return static_cast<size_t>(std::clamp<int64_t>(rows / 64, 1, 32)); }

// For K that the kernels do not take; no released gpt-oss has one.
void any_k(const uint16_t* w, int64_t K, const Range& rows, const float* x, int64_t tokens, float* y, int64_t N) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t n = rows.begin; n < rows.end; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += static_cast<double>(x[t * K + k]) * from_bf16(w[n * K + k]);
      y[t * N + n] = static_cast<float>(sum);
    }
}

void linear(const Context& context, const Input& x, const Input& weight, const uint16_t* bias, float* y) {
  const Kernels& kernels = select();
  const int64_t N = weight.dim(0), K = weight.dim(1), tokens = x.rows();
  require(weight.dims.size() == 2 && x.dim(-1) == K, "x [.., K] and weight [N, K]");
  const size_t parts = parts_of(N);
  context.parallel(parts, [&](size_t i) {
    static thread_local Buffer scratch;
    scratch.reserve(kernels.bf16_scratch(K));
    const Range rows = part(N, i, parts, kRowAlignment);
    if (rows.begin == rows.end) return;
    if (K % 32 == 0) {
      kernels.bf16(weight.as<uint16_t>(), K, rows.begin, rows.end, x.as<float>(), K, tokens, y, N, scratch.as<void>());
    } else {
      any_k(weight.as<uint16_t>(), K, rows, x.as<float>(), tokens, y, N);
    }
    if (bias == nullptr) return;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t n = rows.begin; n < rows.end; ++n) y[t * N + n] += from_bf16(bias[n]);
  });
}

Dims with_last(Dims dims, int64_t last) {
  dims.back() = last;
  return dims;
}

}  // namespace

void Linear::compute(const Context& context) const {
  const Input x = context.input(0), weight = context.input(1), bias = context.input(2);
  require(bias.dim(0) == weight.dim(0), "weight [N, K] and bias [N]");
  linear(context, x, weight, bias.as<uint16_t>(), context.output<float>(0, with_last(x.dims, weight.dim(0))));
}

void LinearNoBias::compute(const Context& context) const {
  const Input x = context.input(0), weight = context.input(1);
  linear(context, x, weight, nullptr, context.output<float>(0, with_last(x.dims, weight.dim(0))));
}

void MoERouter::compute(const Context& context) const {
  const Input x = context.input(0), weight = context.input(1), bias = context.input(2);
  const int64_t E = weight.dim(0), tokens = x.rows(), K = top_k;
  require(0 < K && K <= E && bias.dim(0) == E, "weight [E, H] and bias [E] with top_k of at most E");
  const Dims shape = with_last(x.dims, K);
  float* weights = context.output<float>(0, shape);
  int64_t* experts = context.output<int64_t>(1, shape);
  std::vector<float> logits(static_cast<size_t>(tokens * E));
  linear(context, x, weight, bias.as<uint16_t>(), logits.data());
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
