// What the kernel tests are made of: guarded memory, random matrices, float64 references, and a count of checks.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

// An array that ends where unreadable memory begins: one byte read or written past it ends the program.
template <class T>
class Guarded {
 public:
  explicit Guarded(size_t count) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = (count * sizeof(T) + page - 1) / page * page;
    mapped_ = bytes + page;
    base_ = static_cast<uint8_t*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + bytes, page, PROT_NONE) != 0) {
      std::perror("kernels_test: guarded memory");
      std::exit(1);
    }
    data_ = reinterpret_cast<T*>(base_ + bytes) - count;
  }
  ~Guarded() { munmap(base_, mapped_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return count_; }

 private:
  size_t count_, mapped_;
  uint8_t* base_;
  T* data_;
};

class Checks {
 public:
  template <class... Arguments>
  void expect(bool holds, const char* format, Arguments... arguments) {
    ++(holds ? passed_ : failed_);
    if (holds) return;
    std::printf("FAILED: ");
    std::printf(format, arguments...);
    std::printf("\n");
  }
  int finish() const {
    std::printf("%d passed, %d failed\n", passed_, failed_);
    return failed_ == 0 ? 0 : 1;
  }

 private:
  int passed_ = 0, failed_ = 0;
};

// Towards zero.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

inline float from_bf16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// Weights and activations of one case. Scale bytes lie in [lowest, highest].
struct Problem {
  int64_t rows, k, tokens;
  Guarded<uint8_t> blocks, scales;
  Guarded<uint16_t> bf16;
  Guarded<int8_t> int8;
  Guarded<uint16_t> int8_scales;
  Guarded<float> x;

  Problem(int64_t rows, int64_t k, int64_t tokens, int lowest = 117, int highest = 122)
      : rows(rows), k(k), tokens(tokens), blocks(count(rows * k / 2)), scales(count(rows * k / 32)),
        bf16(count(rows * k)), int8(count(rows * k)), int8_scales(count(rows * k / 32)), x(count(tokens * k)) {
    std::mt19937 random(static_cast<unsigned>(rows * 7919 + k * 31 + tokens));
    std::normal_distribution<float> normal;
    const auto uniform = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
    for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<uint8_t>(uniform(0, 255));
    for (size_t i = 0; i < scales.size(); ++i) scales[i] = static_cast<uint8_t>(uniform(lowest, highest));
    for (size_t i = 0; i < int8.size(); ++i) int8[i] = static_cast<int8_t>(uniform(-128, 127));
    for (size_t i = 0; i < int8_scales.size(); ++i) int8_scales[i] = to_bf16(static_cast<float>(uniform(1, 4000)) / 65536);
    for (size_t i = 0; i < x.size(); ++i) x[i] = normal(random);
    for (size_t i = 0; i < bf16.size(); ++i) bf16[i] = to_bf16(normal(random));
  }

  double mxfp4_weight(int64_t row, int64_t i) const {
    constexpr double kFp4[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    const int code = blocks[count((row * k + i) / 2)] >> (i % 2 * 4) & 15;
    return std::ldexp(code & 8 ? -kFp4[code & 7] : kFp4[code & 7], scales[count((row * k + i) / 32)] - 127);
  }
  double int8_weight(int64_t row, int64_t i) const {
    return static_cast<double>(int8[count(row * k + i)]) * from_bf16(int8_scales[count((row * k + i) / 32)]);
  }
  double bf16_weight(int64_t row, int64_t i) const { return from_bf16(bf16[count(row * k + i)]); }

  static size_t count(int64_t n) { return static_cast<size_t>(n); }
};

enum class Format { kMxfp4, kInt8, kBf16 };
constexpr Format kFormats[] = {Format::kMxfp4, Format::kInt8, Format::kBf16};

inline const char* name(Format format) {
  return format == Format::kMxfp4 ? "mxfp4" : format == Format::kInt8 ? "int8" : "bf16";
}

// y [tokens, rows] in float64.
inline std::vector<double> reference(const Problem& p, Format format) {
  std::vector<double> y(p.count(p.tokens * p.rows)), w(p.count(p.k));
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int64_t i = 0; i < p.k; ++i)
      w[p.count(i)] = format == Format::kMxfp4  ? p.mxfp4_weight(r, i)
                      : format == Format::kInt8 ? p.int8_weight(r, i)
                                                : p.bf16_weight(r, i);
    for (int64_t t = 0; t < p.tokens; ++t) {
      double sum = 0;
      for (int64_t i = 0; i < p.k; ++i) sum += w[p.count(i)] * p.x[p.count(t * p.k + i)];
      y[p.count(t * p.rows + r)] = sum;
    }
  }
  return y;
}

// sqrt(sum (y - expected)^2 / sum expected^2)
inline double relative_rms(const std::vector<float>& y, const std::vector<double>& expected) {
  double error = 0, size = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    error += (y[i] - expected[i]) * (y[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  return size == 0 ? std::sqrt(error) : std::sqrt(error / size);
}
