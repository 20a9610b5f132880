// The experts that the router chose, and only those. Rows of a matrix are split over threads, and a thread goes through
// all experts that have tokens, in ascending order: every thread has the same work whatever the routing, and a token's
// sum is formed in one order whatever the number of threads.
#include <algorithm>
#include <cmath>
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
  const uint8_t* blocks_of(int64_t e) const { return blocks + e * rows * K / 2; }
  const uint8_t* scales_of(int64_t e) const { return scales + e * rows * K / 32; }
  const uint16_t* bias_of(int64_t e) const { return bias + e * rows; }
};

// Few parts for few rows, so that a part is worth a thread's while; for long blocks many, so that results of a part stay
// in the cache.
size_t parts_of(int64_t rows, int64_t tokens) {
  const int64_t rows_of_part = tokens > 8 ? 96 : 192;
  return static_cast<size_t>(std::clamp<int64_t>(rows / rows_of_part, 1, 64));
}

class Experts {
 public:
  Experts(const Context& context, const Kernels& kernels, const Matrix& up, const Matrix& down, float alpha, float limit)
      : context_(context), kernels_(kernels), up_(up), down_(down), alpha_(alpha), limit_(limit) {}

  // x [tokens, H] -> y [tokens, H]
  void run(const float* x, const Routing& routing, int64_t tokens, float* y) const {
    const int64_t H = up_.K, I = down_.K, pairs = static_cast<int64_t>(routing.token.size());
    const size_t x_bytes = kernels_.activation_bytes(H), a_bytes = kernels_.activation_bytes(I);

    // Every pair gets its token's activations, so that an expert's lie side by side.
    const Buffer tokens_q(x_bytes * static_cast<size_t>(tokens)), pairs_q(x_bytes * static_cast<size_t>(pairs));
    quantize(x, H, tokens, tokens_q.as<char>(), x_bytes);
    for (int64_t p = 0; p < pairs; ++p)
      std::memcpy(pairs_q.as<char>() + static_cast<size_t>(p) * x_bytes,
                  tokens_q.as<char>() + static_cast<size_t>(routing.token[static_cast<size_t>(p)]) * x_bytes, x_bytes);

    const Buffer a(sizeof(float) * static_cast<size_t>(pairs * I)), a_q(a_bytes * static_cast<size_t>(pairs));
    const size_t up_parts = parts_of(up_.rows, tokens);
    context_.parallel(up_parts, [&](size_t i) {
      gate_up(routing, pairs_q.as<char>(), x_bytes, part(up_.rows, i, up_parts, 2 * kRowAlignment), a.as<float>());
    });
    quantize(a.as<float>(), I, pairs, a_q.as<char>(), a_bytes);

    std::memset(y, 0, sizeof(float) * static_cast<size_t>(tokens * H));
    const size_t down_parts = parts_of(down_.rows, tokens);
    context_.parallel(down_parts, [&](size_t i) {
      add_down(routing, a_q.as<char>(), a_bytes, part(down_.rows, i, down_parts, kRowAlignment), y);
    });
  }

 private:
  void quantize(const float* x, int64_t K, int64_t count, char* out, size_t bytes) const {
    const auto one = [&](size_t t) { kernels_.quantize(x + static_cast<int64_t>(t) * K, K, out + t * bytes); };
    if (count <= 8) {
      for (size_t t = 0; t < static_cast<size_t>(count); ++t) one(t);  // less than waking a thread costs
    } else {
      context_.parallel(static_cast<size_t>(count), one);
    }
  }

  // One expert's rows for its tokens, [count, rows] float32, in memory that belongs to the thread.
  const float* product(const Matrix& m, const Visit& visit, const Range& rows, const char* q, size_t bytes) const {
    static thread_local Buffer scratch, result;
    const int64_t count = visit.end - visit.begin, width = rows.end - rows.begin;
    scratch.reserve(kernels_.mxfp4_scratch(m.K));
    result.reserve(sizeof(float) * static_cast<size_t>(count * width));
    // The kernel writes row r of the matrix at r, so the result starts that much earlier.
    kernels_.mxfp4(m.blocks_of(visit.expert), m.scales_of(visit.expert), m.K, rows.begin, rows.end,
                   q + static_cast<size_t>(visit.begin) * bytes, count, result.as<float>() - rows.begin, width,
                   scratch.as<void>());
    return result.as<float>();
  }

  // a[pair, row / 2] = swiglu of rows (2 i, 2 i + 1), which are gate and up.
  void gate_up(const Routing& routing, const char* q, size_t bytes, const Range& rows, float* a) const {
    const int64_t I = down_.K, width = rows.end - rows.begin;
    if (width == 0) return;
    for (const Visit& visit : routing.visits) {
      const float* h = product(up_, visit, rows, q, bytes);
      const uint16_t* bias = up_.bias_of(visit.expert) + rows.begin;
      for (int64_t p = visit.begin; p < visit.end; ++p, h += width) {
        float* out = a + p * I + rows.begin / 2;
        for (int64_t r = 0; r < width; r += 2) {
          const float gate = std::min(h[r] + from_bf16(bias[r]), limit_);
          const float up = std::clamp(h[r + 1] + from_bf16(bias[r + 1]), -limit_, limit_);
          out[r / 2] = gate / (1 + std::exp(-alpha_ * gate)) * (up + 1);
        }
      }
    }
  }

  // y[token, rows] += weight * (product + bias), expert after expert.
  void add_down(const Routing& routing, const char* q, size_t bytes, const Range& rows, float* y) const {
    const int64_t H = up_.K, width = rows.end - rows.begin;
    if (width == 0) return;
    for (const Visit& visit : routing.visits) {
      const float* out = product(down_, visit, rows, q, bytes);
      const uint16_t* bias = down_.bias_of(visit.expert) + rows.begin;
      for (int64_t p = visit.begin; p < visit.end; ++p, out += width) {
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
