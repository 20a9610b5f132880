// The experts that the router chose, and only those. Rows of a matrix are split over threads, and a thread goes through
// all experts that have tokens, in ascending order: every thread has the same work whatever the routing, and a token's
// sum is formed in one order whatever the number of threads.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "ops.h"

namespace gptoss {
namespace {

// Tokens that are worked on at once; bounds the memory of a long prompt. Every expert still gets dozens of them.
constexpr int64_t kTokenBlock = 1024;

// Tokens of one expert: places [begin, end) in the sorted list of (expert, token) pairs.
struct Visit {
  int64_t expert, begin, end;
};

// The (token, weight) pairs of a block of tokens, sorted by expert and then by token.
struct Routing {
  std::vector<Visit> visits;
  std::vector<int64_t> token;
  std::vector<float> weight;
};

Routing route(const int64_t* experts, const float* weights, int64_t tokens, int64_t top_k, int64_t num_experts) {
  std::vector<int64_t> next(static_cast<size_t>(num_experts) + 1, 0);
  for (int64_t i = 0; i < tokens * top_k; ++i) {
    require(0 <= experts[i] && experts[i] < num_experts, "experts must be below their number");
    ++next[static_cast<size_t>(experts[i]) + 1];
  }
  Routing routing;
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t begin = next[static_cast<size_t>(e)], count = next[static_cast<size_t>(e) + 1];
    if (count > 0) routing.visits.push_back({e, begin, begin + count});
    next[static_cast<size_t>(e) + 1] += begin;
  }
  routing.token.resize(static_cast<size_t>(tokens * top_k));
  routing.weight.resize(routing.token.size());
  for (int64_t i = 0; i < tokens * top_k; ++i) {
    const auto place = static_cast<size_t>(next[static_cast<size_t>(experts[i])]++);
    routing.token[place] = i / top_k;
    routing.weight[place] = weights[i];
  }
  return routing;
}

struct Matrix {
  const uint8_t* blocks;
  const uint8_t* scales;
  const uint16_t* bias;
  int64_t rows, K;

  Matrix(const Input& b, const Input& s, const Input& c)
      : blocks(b.as<uint8_t>()), scales(s.as<uint8_t>()), bias(c.as<uint16_t>()), rows(b.dim(1)), K(b.dim(2) * 32) {
    require(b.dims.size() == 4 && b.dim(3) == 16, "blocks [E, rows, K/32, 16]");
    require(s.dims == Dims(b.dims.begin(), b.dims.begin() + 3), "scales [E, rows, K/32]");
    require(c.dims == Dims(b.dims.begin(), b.dims.begin() + 2), "bias [E, rows]");
  }
  Mxfp4Matrix of(int64_t e) const { return {blocks + e * rows * K / 2, scales + e * rows * K / 32}; }
  const uint16_t* bias_of(int64_t e) const { return bias + e * rows; }
};

// A few tokens: long parts, which are read from memory at full speed. Many: short ones, whose results stay in the cache.
size_t parts_for(int64_t rows, int64_t tokens) { return tokens > 8 ? parts_of(rows, 96, 32) : parts_of(rows, 192, 4); }

class Experts {
 public:
  Experts(const Context& context, const Kernels& kernels, const Matrix& up, const Matrix& down, float alpha, float limit)
      : context_(context), kernels_(kernels), up_(up), down_(down), alpha_(alpha), limit_(limit) {}

  // x [tokens, H] -> y [tokens, H]
  void run(const float* x, const Routing& routing, int64_t tokens, float* y) const {
    const int64_t H = up_.K, I = down_.K, pairs = static_cast<int64_t>(routing.token.size());
    const size_t x_bytes = kernels_.activation_bytes(H), a_bytes = kernels_.activation_bytes(I);
    // Kept for the next layer: memory that is given back has to be cleared by the system before it is given again.
    static thread_local Buffer tokens_buffer, pairs_buffer, a_buffer;
    tokens_buffer.reserve(x_bytes * static_cast<size_t>(tokens));
    pairs_buffer.reserve(x_bytes * static_cast<size_t>(pairs));
    a_buffer.reserve(a_bytes * static_cast<size_t>(pairs));
    char *tokens_q = tokens_buffer.as<char>(), *pairs_q = pairs_buffer.as<char>(), *a_q = a_buffer.as<char>();

    context_.each(tokens, [&](int64_t t) { kernels_.quantize(x + t * H, H, tokens_q + static_cast<size_t>(t) * x_bytes); });
    // Every pair gets its token's activations, so that an expert's lie side by side.
    context_.each(pairs, [&](int64_t p) {
      const auto token = static_cast<size_t>(routing.token[static_cast<size_t>(p)]);
      std::memcpy(pairs_q + static_cast<size_t>(p) * x_bytes, tokens_q + token * x_bytes, x_bytes);
    });

    const size_t up_parts = parts_for(up_.rows, tokens);
    context_.parallel(up_parts, [&](size_t i) {
      gate_up(routing, pairs_q, x_bytes, part(up_.rows, i, up_parts, 2 * kRowAlignment), a_q, a_bytes);
    });
    std::memset(y, 0, sizeof(float) * static_cast<size_t>(tokens * H));
    const size_t down_parts = parts_for(down_.rows, tokens);
    context_.parallel(down_parts, [&](size_t i) {
      add_down(routing, a_q, a_bytes, part(down_.rows, i, down_parts, kRowAlignment), y);
    });
  }

 private:
  // The rows of one visit's expert for its tokens, [count, rows] float32, in memory that belongs to the thread.
  const float* product(const Matrix& m, const Routing& routing, size_t visit, const Range& rows, const char* q,
                       size_t bytes) const {
    static thread_local Buffer scratch, result;
    const Visit& v = routing.visits[visit];
    const int64_t count = v.end - v.begin, width = rows.end - rows.begin;
    scratch.reserve(kernels_.mxfp4_scratch(m.K));
    result.reserve(sizeof(float) * static_cast<size_t>(count * width));
    const bool last = visit + 1 == routing.visits.size();
    const Mxfp4Matrix expert = m.of(v.expert), next = m.of(last ? v.expert : routing.visits[visit + 1].expert);
    // The kernel writes row r of the matrix at r, so the result starts that much earlier.
    kernels_.mxfp4(expert, last ? nullptr : &next, m.K, rows.begin, rows.end,
                   q + static_cast<size_t>(v.begin) * bytes, count, result.as<float>() - rows.begin, width,
                   scratch.as<void>());
    return result.as<float>();
  }

  // Values rows / 2 of every pair's a, quantised: swiglu of rows (2 i, 2 i + 1), which are gate and up.
  void gate_up(const Routing& routing, const char* q, size_t bytes, const Range& rows, char* a_q, size_t a_bytes) const {
    static thread_local Buffer buffer;
    const int64_t width = rows.end - rows.begin;
    if (width == 0) return;
    buffer.reserve(sizeof(float) * static_cast<size_t>(width / 2));
    float* a = buffer.as<float>();
    char* out = a_q + static_cast<size_t>(rows.begin / 2 / 32) * kActivationGroupBytes;
    for (size_t visit = 0; visit < routing.visits.size(); ++visit) {
      const float* h = product(up_, routing, visit, rows, q, bytes);
      const Visit& v = routing.visits[visit];
      for (int64_t p = v.begin; p < v.end; ++p, h += width) {
        kernels_.swiglu(h, up_.bias_of(v.expert) + rows.begin, width / 2, alpha_, limit_, a);
        kernels_.quantize(a, width / 2, out + static_cast<size_t>(p) * a_bytes);
      }
    }
  }

  // y[token, rows] += weight * (product + bias), expert after expert.
  void add_down(const Routing& routing, const char* q, size_t bytes, const Range& rows, float* y) const {
    const int64_t H = up_.K, width = rows.end - rows.begin;
    if (width == 0) return;
    for (size_t visit = 0; visit < routing.visits.size(); ++visit) {
      const float* out = product(down_, routing, visit, rows, q, bytes);
      const Visit& v = routing.visits[visit];
      const uint16_t* bias = down_.bias_of(v.expert) + rows.begin;
      for (int64_t p = v.begin; p < v.end; ++p, out += width) {
        const float weight = routing.weight[static_cast<size_t>(p)];
        float* sum = y + routing.token[static_cast<size_t>(p)] * H + rows.begin;
        for (int64_t r = 0; r < width; ++r) sum[r] += weight * (out[r] + from_bf16(bias[r]));
      }
    }
  }

  const Context& context_;
  const Kernels& kernels_;
  const Matrix& up_;
  const Matrix& down_;
  const float alpha_, limit_;
};

}  // namespace

void MoEExperts::compute(const Context& context) const {
  const Input x = context.input(0), weights = context.input(1), experts = context.input(2);
  const Matrix up(context.input(3), context.input(4), context.input(5));
  const Matrix down(context.input(6), context.input(7), context.input(8));
  const int64_t H = x.dim(-1), tokens = x.rows(), top_k = experts.dim(-1), num_experts = context.input(5).dim(0);
  require(up.K == H && down.rows == H && up.rows == 2 * down.K, "gate_up [E, 2I, H] and down [E, H, I] for x [.., H]");
  require(weights.dims == experts.dims && experts.rows() == tokens, "weights and experts [.., K] for x [.., H]");
  require(context.input(8).dim(0) == num_experts, "as many experts in down as in gate_up");

  float* y = context.output<float>(0, x.dims);
  const Experts all(context, select(), up, down, alpha, limit);
  for (int64_t t = 0; t < tokens; t += kTokenBlock) {
    const int64_t count = std::min(kTokenBlock, tokens - t);
    const Routing routing =
        route(experts.as<int64_t>() + t * top_k, weights.as<float>() + t * top_k, count, top_k, num_experts);
    all.run(x.as<float>() + t * H, routing, count, y + t * H);
  }
}

}  // namespace gptoss
