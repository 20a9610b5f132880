// Every table that this processor runs, against the scalar one bit for bit and against float64.
//
//   kernels_test [table ...]     default: all of them; a table named here must run
#include "../kernels.h"
#include "../tables.h"
#include "attention_cases.h"
#include "fixtures.h"

namespace {

using gptoss::Kernels;

constexpr float kCanary = -12345.75f;

struct Range {
  int64_t begin, end;
};

// y [tokens, rows], computed for the rows of `range` in one call; the other rows stay kCanary.
std::vector<float> multiply(const Kernels& kernels, const Problem& p, Format format, Range range, int64_t first_token,
                            int64_t tokens, Checks& checks) {
  const int64_t ldy = p.rows + 3;
  Guarded<float> y(p.count(tokens * ldy));
  for (size_t i = 0; i < y.size(); ++i) y[i] = kCanary;

  const size_t token_bytes = kernels.activation_bytes(p.k);
  checks.expect(token_bytes % 64 == 0, "%s: activation_bytes(%lld) = %zu", kernels.name, static_cast<long long>(p.k),
                token_bytes);
  Guarded<uint8_t> activations(token_bytes * p.count(tokens));
  const float* x = p.x.data() + first_token * p.k;
  for (int64_t t = 0; t < tokens; ++t)
    kernels.quantize(x + t * p.k, p.k, activations.data() + p.count(t) * token_bytes);

  if (format == Format::kMxfp4) {
    Guarded<uint8_t> scratch((kernels.mxfp4_scratch(p.k) + 63) / 64 * 64);
    kernels.mxfp4({p.blocks.data(), p.scales.data()}, nullptr, p.k, range.begin, range.end, activations.data(), tokens, y.data(),
                  ldy, scratch.data());
  } else if (format == Format::kInt8) {
    Guarded<uint8_t> scratch((kernels.int8_scratch(p.k) + 63) / 64 * 64);
    kernels.int8(p.int8.data(), p.int8_scales.data(), p.k, range.begin, range.end, activations.data(), tokens,
                 y.data(), ldy, scratch.data());
  } else {
    Guarded<uint8_t> scratch((kernels.bf16_scratch(p.k) + 63) / 64 * 64);
    kernels.bf16(p.bf16.data(), p.k, range.begin, range.end, x, p.k, tokens, y.data(), ldy, scratch.data());
  }

  int64_t written = 0;
  std::vector<float> result(p.count(tokens * p.rows));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t r = 0; r < ldy; ++r) {
      const float value = y[p.count(t * ldy + r)];
      if ((r < range.begin || r >= range.end) && value != kCanary) ++written;
      if (r < p.rows) result[p.count(t * p.rows + r)] = value;
    }
  }
  checks.expect(written == 0, "%s %s: wrote outside rows %lld..%lld", kernels.name, name(format),
                static_cast<long long>(range.begin), static_cast<long long>(range.end));
  return result;
}

std::vector<float> multiply(const Kernels& kernels, const Problem& p, Format format, Checks& checks) {
  return multiply(kernels, p, format, {0, p.rows}, 0, p.tokens, checks);
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

bool all_finite(const std::vector<float>& y) {
  for (float value : y)
    if (!std::isfinite(value)) return false;
  return true;
}

void test_quantize(const Kernels& kernels, Checks& checks) {
  const Problem p(1, 2880, 3);
  const size_t bytes = kernels.activation_bytes(p.k);
  checks.expect(bytes == gptoss::kScalarKernels.activation_bytes(p.k), "%s: activation_bytes", kernels.name);
  Guarded<uint8_t> mine(bytes), scalar(bytes);
  for (int64_t t = 0; t < p.tokens; ++t) {
    kernels.quantize(p.x.data() + t * p.k, p.k, mine.data());
    gptoss::kScalarKernels.quantize(p.x.data() + t * p.k, p.k, scalar.data());
    checks.expect(std::memcmp(mine.data(), scalar.data(), bytes) == 0, "%s: quantize differs from scalar",
                  kernels.name);
  }
}

void test_shapes(const Kernels& kernels, Checks& checks) {
  const int64_t shapes[][3] = {// rows, K, tokens
                               {1, 32, 40},   {5, 32, 70},   {33, 64, 2},   {16, 96, 3},   {64, 160, 4},  {7, 224, 5},
                               {100, 256, 1}, {96, 288, 13}, {70, 1056, 8}, {64, 2880, 1}, {48, 2880, 6}, {33, 4096, 3},
                               {40, 544, 97}, {3, 96, 1000}};
  for (const auto& shape : shapes) {
    const Problem p(shape[0], shape[1], shape[2]);
    for (Format format : kFormats) {
      const std::vector<float> y = multiply(kernels, p, format, checks);
      const double error = relative_rms(y, reference(p, format));
      const double most = format == Format::kBf16 ? 1e-6 : 5e-5;
      checks.expect(error <= most, "%s %s %lld x %lld, %lld tokens: error %.2e", kernels.name, name(format),
                    static_cast<long long>(p.rows), static_cast<long long>(p.k), static_cast<long long>(p.tokens),
                    error);
      checks.expect(same_bits(y, multiply(gptoss::kScalarKernels, p, format, checks)),
                    "%s %s %lld x %lld, %lld tokens: differs from scalar", kernels.name, name(format),
                    static_cast<long long>(p.rows), static_cast<long long>(p.k), static_cast<long long>(p.tokens));
    }
  }
}

// 1 to 70 tokens: every size of the last register tile.
void test_tokens(const Kernels& kernels, Checks& checks) {
  for (int64_t tokens = 1; tokens <= 70; ++tokens) {
    const Problem p(33, 96, tokens);
    for (Format format : kFormats)
      checks.expect(same_bits(multiply(kernels, p, format, checks),
                              multiply(gptoss::kScalarKernels, p, format, checks)),
                    "%s %s, %lld tokens: differs from scalar", kernels.name, name(format),
                    static_cast<long long>(tokens));
  }
}

// A row's bits depend neither on the range that it is computed in nor on the other tokens.
void test_ranges(const Kernels& kernels, Checks& checks) {
  const Problem p(100, 416, 9);
  for (Format format : kFormats) {
    const std::vector<float> whole = multiply(kernels, p, format, checks);
    for (const Range range : {Range{0, 1}, Range{0, 32}, Range{32, 100}, Range{64, 96}, Range{17, 50}, Range{99, 100},
                              Range{40, 40}}) {
      for (int64_t first = 0; first < p.tokens; first += 4) {
        const int64_t tokens = p.tokens - first < 4 ? p.tokens - first : 4;
        const std::vector<float> part = multiply(kernels, p, format, range, first, tokens, checks);
        bool same = true;
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t r = range.begin; r < range.end; ++r)
            same &= part[p.count(t * p.rows + r)] == whole[p.count((first + t) * p.rows + r)];
        checks.expect(same, "%s %s: rows %lld..%lld of tokens %lld.. differ from the whole", kernels.name,
                      name(format), static_cast<long long>(range.begin), static_cast<long long>(range.end),
                      static_cast<long long>(first));
      }
    }
  }
}

// All of 2^-127 .. 2^127, against float64 where that stays within float32.
void test_extreme_scales(const Kernels& kernels, Checks& checks) {
  const struct {
    int lowest, highest;
    float factor;  // on the activations
  } cases[] = {{0, 0, 0x1p60f}, {0, 1, 0x1p60f}, {0, 1, 1e-3f}, {1, 1, 1.0f}, {2, 2, 0x1p30f}, {254, 254, 0x1p-60f},
               {253, 254, 0x1p-30f}, {0, 254, 0x1p-40f}};
  for (const auto& c : cases) {
    for (int64_t tokens : {1, 7}) {
      Problem p(34, 160, tokens, c.lowest, c.highest);
      for (size_t i = 0; i < p.x.size(); ++i) p.x[i] *= c.factor;
      const std::vector<float> y = multiply(kernels, p, Format::kMxfp4, checks);
      const std::vector<double> expected = reference(p, Format::kMxfp4);
      checks.expect(all_finite(y), "%s scales %d..%d: not finite", kernels.name, c.lowest, c.highest);
      checks.expect(same_bits(y, multiply(gptoss::kScalarKernels, p, Format::kMxfp4, checks)),
                    "%s scales %d..%d: differs from scalar", kernels.name, c.lowest, c.highest);
      double error = 0, size = 0;  // by row: each has its own order of magnitude
      for (size_t i = 0; i < y.size(); ++i) {
        error = std::fmax(error, std::fabs(y[i] - expected[i]));
        size = std::fmax(size, std::fabs(expected[i]));
      }
      checks.expect(error <= 1e-4 * size + 0x1p-148, "%s scales %d..%d: error %.2e of %.2e", kernels.name, c.lowest,
                    c.highest, error, size);
    }
  }
}

void test_extreme_activations(const Kernels& kernels, Checks& checks) {
  for (float factor : {0.0f, 1e-45f, 1e-40f, 1e-37f, 1e-33f, 1e-20f, 1e20f, 1e30f}) {
    for (int64_t tokens : {1, 5}) {
      Problem p(34, 96, tokens);
      for (size_t i = 0; i < p.x.size(); ++i) p.x[i] = i % 32 == 3 ? 0.0f : p.x[i] * factor;
      for (Format format : kFormats) {
        const std::vector<float> y = multiply(kernels, p, format, checks);
        const std::vector<double> expected = reference(p, format);
        double error = 0, size = 0;
        for (size_t i = 0; i < y.size(); ++i) {
          error = std::fmax(error, std::fabs(y[i] - expected[i]));
          size = std::fmax(size, std::fabs(expected[i]));
        }
        checks.expect(all_finite(y), "%s %s, activations of %g: not finite", kernels.name, name(format), factor);
        // A quantised scale below 2^-126 is subnormal and keeps fewer bits: what is lost is of the order of 2^-130.
        checks.expect(error <= 1e-4 * size + 1e-38, "%s %s, activations of %g: error %.2e of %.2e", kernels.name,
                      name(format), factor, error, size);
        checks.expect(same_bits(y, multiply(gptoss::kScalarKernels, p, format, checks)),
                      "%s %s, activations of %g: differs from scalar", kernels.name, name(format), factor);
      }
    }
  }
}

// What is not a number must not come out as one, and must not reach other tokens.
void test_not_finite(const Kernels& kernels, Checks& checks) {
  for (float bad : {INFINITY, -INFINITY, NAN}) {
    Problem p(34, 96, 3);
    p.x[p.count(p.k) + 40] = bad;
    for (Format format : kFormats) {
      const std::vector<float> y = multiply(kernels, p, format, checks);
      bool right = true;
      for (int64_t r = 0; r < p.rows; ++r)
        right &= std::isfinite(y[p.count(r)]) && !std::isfinite(y[p.count(p.rows + r)]) &&
                 std::isfinite(y[p.count(2 * p.rows + r)]);
      checks.expect(right, "%s %s: an activation of %g", kernels.name, name(format), bad);
    }
  }
}

void test_table(const Kernels& kernels, Checks& checks) {
  std::printf("%s\n", kernels.name);
  std::fflush(stdout);
  test_quantize(kernels, checks);
  test_shapes(kernels, checks);
  test_tokens(kernels, checks);
  test_ranges(kernels, checks);
  test_extreme_scales(kernels, checks);
  test_extreme_activations(kernels, checks);
  test_not_finite(kernels, checks);
  test_attention(kernels, checks);
  test_swiglu(kernels, checks);
}

void test_dispatch(Checks& checks) {
  checks.expect(gptoss::find("scalar") == &gptoss::kScalarKernels, "find(scalar)");
  checks.expect(gptoss::find("mmx") == nullptr, "find of an unknown name");
  const char* wanted = std::getenv("GPTOSS_EXPORT_ISA");
  const Kernels* named = wanted == nullptr ? nullptr : gptoss::find(wanted);
  checks.expect(named == nullptr || &gptoss::select() == named, "GPTOSS_EXPORT_ISA=%s chose %s", wanted,
                gptoss::select().name);
  checks.expect(&gptoss::select() == &gptoss::select(), "select() changed its mind");
  std::printf("select(): %s\n", gptoss::select().name);
}

}  // namespace

#if defined(GPTOSS_TEST_AVXVNNI_AS_AVX512)
namespace gptoss {
extern const Kernels kAvxVnniAsAvx512Kernels;
}
#endif

int main(int argc, char** argv) {
  Checks checks;
  test_dispatch(checks);
  if (argc > 1) {
    for (int i = 1; i < argc; ++i) {
      const Kernels* kernels = gptoss::find(argv[i]);
      checks.expect(kernels != nullptr, "%s does not run here", argv[i]);
      if (kernels != nullptr) test_table(*kernels, checks);
    }
    return checks.finish();
  }
  for (const char* name : {"scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "neon"})
    if (const Kernels* kernels = gptoss::find(name)) test_table(*kernels, checks);
#if defined(GPTOSS_TEST_AVXVNNI_AS_AVX512)
  if (gptoss::find("avx512vnni") != nullptr) test_table(gptoss::kAvxVnniAsAvx512Kernels, checks);
#endif
  return checks.finish();
}
