// Attention and swiglu: every table against the scalar one bit for bit and against float64.
#pragma once

#include <algorithm>
#include <limits>

#include "../kernels.h"
#include "../tables.h"
#include "fixtures.h"

struct AttentionCase {
  int64_t tokens, group, D, slots, first, keys, window;
  bool padded;  // some keys, and the first query, have no position
};

struct AttentionProblem {
  AttentionCase c;
  Guarded<float> q, key_slots, value_slots;
  Guarded<uint16_t> sinks;
  Guarded<int64_t> query_positions, key_positions;

  explicit AttentionProblem(const AttentionCase& one)
      : c(one), q(size(c.tokens * c.group * c.D)), key_slots(size(c.slots * c.D)), value_slots(size(c.slots * c.D)),
        sinks(size(c.group)), query_positions(size(c.tokens)), key_positions(size(c.keys)) {
    std::mt19937 random(static_cast<unsigned>(c.tokens * 131 + c.D * 7 + c.keys));
    std::normal_distribution<float> normal;
    for (Guarded<float>* values : {&q, &key_slots, &value_slots})
      for (size_t i = 0; i < values->size(); ++i) (*values)[i] = normal(random);
    for (size_t i = 0; i < sinks.size(); ++i) sinks[i] = to_bf16(normal(random));
    for (int64_t j = 0; j < c.keys; ++j) key_positions[size(j)] = c.padded && j % 5 == 0 ? -1 : c.first + j;
    // The last query is the last key.
    for (int64_t t = 0; t < c.tokens; ++t) query_positions[size(t)] = c.first + c.keys - c.tokens + t;
    if (c.padded) query_positions[0] = -1;
  }

  static size_t size(int64_t n) { return static_cast<size_t>(n); }
  static constexpr float kScale = 0.3f;

  std::vector<float> run(const gptoss::Kernels& kernels) const {
    Guarded<float> out(q.size());
    gptoss::Attention a;
    a.tokens = c.tokens, a.group = c.group, a.D = c.D, a.slots = c.slots, a.first = c.first, a.keys = c.keys;
    a.window = c.window, a.token_stride = c.group * c.D, a.scale = kScale;
    a.q = q.data(), a.key_slots = key_slots.data(), a.value_slots = value_slots.data(), a.sinks = sinks.data();
    a.query_positions = query_positions.data(), a.key_positions = key_positions.data(), a.out = out.data();
    const size_t bytes = kernels.attention_scratch(c.tokens * c.group, c.D, c.keys);
    Guarded<uint8_t> scratch((bytes + 63) / 64 * 64);
    kernels.attend(a, scratch.data());
    return {out.data(), out.data() + out.size()};
  }

  std::vector<double> reference() const {
    std::vector<double> out(q.size());
    for (int64_t t = 0; t < c.tokens; ++t) {
      for (int64_t g = 0; g < c.group; ++g) {
        const int64_t row = (t * c.group + g) * c.D, position = query_positions[size(t)];
        std::vector<double> scores(size(c.keys), -std::numeric_limits<double>::infinity());
        const double sink = from_bf16(sinks[size(g)]);
        double largest = sink;
        for (int64_t j = 0; j < c.keys; ++j) {
          const int64_t p = key_positions[size(j)];
          if (p < 0 || p > position || (c.window > 0 && position - p >= c.window)) continue;
          double dot = 0;
          for (int64_t d = 0; d < c.D; ++d)
            dot += static_cast<double>(q[size(row + d)]) * key_slots[size((c.first + j) % c.slots * c.D + d)];
          scores[size(j)] = static_cast<double>(kScale) * dot;
          largest = std::max(largest, scores[size(j)]);
        }
        double sum = std::exp(sink - largest);
        for (double& score : scores) sum += score = std::exp(score - largest);
        for (int64_t j = 0; j < c.keys; ++j)
          for (int64_t d = 0; d < c.D; ++d)
            out[size(row + d)] += scores[size(j)] / sum * value_slots[size((c.first + j) % c.slots * c.D + d)];
      }
    }
    return out;
  }
};

inline void test_attention(const gptoss::Kernels& kernels, Checks& checks) {
  const AttentionCase cases[] = {
      // tokens, group, D, slots, first, keys, window, padded
      {1, 8, 64, 200, 0, 200, 0, false},  {1, 8, 64, 130, 700, 128, 128, false}, {8, 8, 64, 300, 0, 300, 0, false},
      {8, 8, 64, 160, 90, 135, 128, true}, {5, 3, 16, 40, 33, 21, 7, true},       {3, 1, 8, 64, 0, 3, 0, false},
      {2, 5, 72, 600, 10, 590, 0, true},   {7, 2, 32, 9, 4, 9, 0, false},         {1, 1, 1, 1, 0, 1, 0, false},
      {1, 64, 64, 70, 0, 70, 0, true}};
  for (const AttentionCase& c : cases) {
    const AttentionProblem problem(c);
    const std::vector<float> y = problem.run(kernels), scalar = problem.run(gptoss::kScalarKernels);
    const double error = relative_rms(y, problem.reference());
    checks.expect(error <= 2e-6, "%s attention, %lld tokens, %lld keys: error %.2e", kernels.name,
                  static_cast<long long>(c.tokens), static_cast<long long>(c.keys), error);
    checks.expect(std::memcmp(y.data(), scalar.data(), y.size() * sizeof(float)) == 0,
                  "%s attention, %lld tokens, %lld keys: differs from scalar", kernels.name,
                  static_cast<long long>(c.tokens), static_cast<long long>(c.keys));
  }
}

inline void test_swiglu(const gptoss::Kernels& kernels, Checks& checks) {
  constexpr float kAlpha = 1.702f, kLimit = 7.0f;
  for (int64_t count : {1, 7, 16, 33, 1000}) {
    const auto n = static_cast<size_t>(count);
    Guarded<float> h(2 * n), y(n), scalar(n);
    Guarded<uint16_t> bias(2 * n);
    std::mt19937 random(static_cast<unsigned>(count));
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < 2 * n; ++i) {
      h[i] = normal(random) * (i % 7 == 0 ? 100.0f : 3.0f);
      bias[i] = to_bf16(normal(random));
    }
    kernels.swiglu(h.data(), bias.data(), count, kAlpha, kLimit, y.data());
    gptoss::kScalarKernels.swiglu(h.data(), bias.data(), count, kAlpha, kLimit, scalar.data());
    checks.expect(std::memcmp(y.data(), scalar.data(), n * sizeof(float)) == 0, "%s swiglu of %lld differs from scalar",
                  kernels.name, static_cast<long long>(count));
    double worst = 0;
    for (size_t i = 0; i < n; ++i) {
      const double gate = std::min<double>(h[2 * i] + from_bf16(bias[2 * i]), kLimit);
      const double up = std::clamp<double>(h[2 * i + 1] + from_bf16(bias[2 * i + 1]), -kLimit, kLimit);
      const double expected = gate / (1 + std::exp(-kAlpha * gate)) * (up + 1);
      worst = std::max(worst, std::abs(y[i] - expected) / (std::abs(expected) + 1e-5));
    }
    checks.expect(worst <= 2e-6, "%s swiglu of %lld: error %.2e", kernels.name, static_cast<long long>(count), worst);
  }
  Guarded<float> h(4), y(2);
  Guarded<uint16_t> bias(4);
  for (size_t i = 0; i < 4; ++i) h[i] = i == 2 ? std::nanf("") : 1.0f, bias[i] = 0;
  kernels.swiglu(h.data(), bias.data(), 2, kAlpha, kLimit, y.data());
  checks.expect(std::isfinite(y[0]) && std::isnan(y[1]), "%s swiglu hides a NaN", kernels.name);
}
