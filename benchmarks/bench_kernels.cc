// How near the kernels come to the machine's limits, on the shapes of gpt-oss-20b.
//
//   bench_kernels [seconds per figure]     GPTOSS_EXPORT_ISA=avx2 bench_kernels
//
// Decode: GB/s of weights, and the fraction of a plain read of the same bytes that alternates with it in the same run.
// Each matrix set is larger than 200 MB, so that no cache holds it. Prefill: Gop/s, 2 * tokens * rows * K a second.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

#include "../engines/ort/kernels/kernels.h"

namespace {

using gptoss::Kernels;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Bytes that live until the process ends; huge pages where the system gives them.
uint8_t* allocate(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) {
    std::perror("bench_kernels: mmap");
    std::exit(1);
  }
  madvise(p, bytes, MADV_HUGEPAGE);
  return static_cast<uint8_t*>(p);
}

uint64_t random_bits() {
  static uint64_t state = 88172645463325252u;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

// Threads that spin between pieces of work: what is measured is the kernels, not the waking of threads.
class Threads {
 public:
  explicit Threads(int count) : count_(count) {
    for (int i = 1; i < count; ++i) threads_.emplace_back([this, i] { serve(i); });
  }
  ~Threads() {
    work_ = nullptr;
    ++generation_;
    for (std::thread& thread : threads_) thread.join();
  }
  int count() const { return count_; }
  void run(const std::function<void(int)>& work) {
    work_ = &work;
    busy_ = count_ - 1;
    ++generation_;
    work(0);
    while (busy_ != 0) std::this_thread::yield();
  }

 private:
  void serve(int index) {
    for (int seen = 0;;) {
      while (generation_ == seen) std::this_thread::yield();
      ++seen;
      if (work_ == nullptr) return;
      (*work_)(index);
      --busy_;
    }
  }

  int count_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<int> generation_{0}, busy_{0};
};

struct Matrix {
  int64_t rows, k, copies;  // copies stand for the experts and layers of a model: each is read once a pass
};

// One format of weights: how many bytes a row has, and one call of its kernel.
struct Format {
  const char* name;
  int64_t bytes_per_row;
  std::function<void(int64_t copy, int64_t begin, int64_t end, int64_t tokens, float* y, void* scratch)> multiply;
};

class Bench {
 public:
  Bench(const Kernels& kernels, Threads& threads, uint8_t* weights, double seconds)
      : kernels_(kernels), threads_(threads), weights_(weights), seconds_(seconds) {}

  void mxfp4(const Matrix& matrix) {
    const int64_t groups = matrix.k / 32, blocks = matrix.rows * groups * 16, row = groups * 17;
    prepare(matrix, kernels_.mxfp4_scratch(matrix.k));
    run(matrix, {"mxfp4", row, [&](int64_t copy, int64_t begin, int64_t end, int64_t tokens, float* y, void* scratch) {
                   const uint8_t* w = weights_ + copy * matrix.rows * row;
                   kernels_.mxfp4({w, w + blocks}, nullptr, matrix.k, begin, end, quantized_, tokens, y, matrix.rows, scratch);
                 }});
  }

  void int8(const Matrix& matrix) {
    const int64_t groups = matrix.k / 32, row = matrix.k + groups * 2;
    prepare(matrix, kernels_.int8_scratch(matrix.k));
    run(matrix, {"int8", row, [&](int64_t copy, int64_t begin, int64_t end, int64_t tokens, float* y, void* scratch) {
                   const uint8_t* w = weights_ + copy * matrix.rows * row;
                   kernels_.int8(reinterpret_cast<const int8_t*>(w),
                                 reinterpret_cast<const uint16_t*>(w + matrix.rows * matrix.k), matrix.k, begin, end,
                                 quantized_, tokens, y, matrix.rows, scratch);
                 }});
  }

  void bf16(const Matrix& matrix) {
    const int64_t row = matrix.k * 2;
    prepare(matrix, kernels_.bf16_scratch(matrix.k));
    run(matrix, {"bf16", row, [&](int64_t copy, int64_t begin, int64_t end, int64_t tokens, float* y, void* scratch) {
                   kernels_.bf16(reinterpret_cast<const uint16_t*>(weights_ + copy * matrix.rows * row), matrix.k,
                                 begin, end, x_.data(), matrix.k, tokens, y, matrix.rows, scratch);
                 }});
  }

 private:
  static constexpr int64_t kMostTokens = 512;

  void prepare(const Matrix& matrix, size_t scratch) {
    x_.resize(static_cast<size_t>(kMostTokens * matrix.k));
    for (float& value : x_) value = static_cast<float>(static_cast<int64_t>(random_bits() % 65536) - 32768) / 16384;
    y_.resize(static_cast<size_t>(kMostTokens * matrix.rows));
    const size_t bytes = kernels_.activation_bytes(matrix.k);
    quantized_ = allocate(bytes * kMostTokens);
    for (int64_t t = 0; t < kMostTokens; ++t)
      kernels_.quantize(&x_[static_cast<size_t>(t * matrix.k)], matrix.k, quantized_ + static_cast<size_t>(t) * bytes);
    scratch_.clear();
    for (int i = 0; i < threads_.count(); ++i) scratch_.push_back(allocate(scratch + 64));
  }

  void multiply(const Matrix& matrix, const Format& format, int64_t copies, int64_t tokens) {
    for (int64_t copy = 0; copy < copies; ++copy) {
      threads_.run([&](int i) {
        const int64_t panels = matrix.rows / gptoss::kRowAlignment, count = threads_.count();
        format.multiply(copy, panels * i / count * gptoss::kRowAlignment,
                        i + 1 == count ? matrix.rows : panels * (i + 1) / count * gptoss::kRowAlignment, tokens,
                        y_.data(), scratch_[static_cast<size_t>(i)]);
      });
    }
  }

  void read(int64_t bytes) {
    threads_.run([&](int i) {
      const int64_t count = bytes / 64 / threads_.count();
      const auto* p = reinterpret_cast<const uint64_t*>(weights_) + count * 8 * i;
      uint64_t seen[8] = {};
      for (int64_t line = 0; line < count; ++line, p += 8) {
        __builtin_prefetch(reinterpret_cast<const char*>(p) + 4096);
        for (int j = 0; j < 8; ++j) seen[j] |= p[j];
      }
      for (uint64_t value : seen) sink_ = sink_ | value;
    });
  }

  static double timed(const std::function<void()>& work) {
    const double start = now();
    work();
    return now() - start;
  }

  void run(const Matrix& matrix, const Format& format) {
    const int64_t bytes = matrix.rows * format.bytes_per_row * matrix.copies;
    for (int64_t tokens : {1, 2, 4, 8}) {
      double kernel = 1e9, plain = 1e9;
      const double stop = now() + seconds_;
      do {
        plain = std::min(plain, timed([&] { read(bytes); }));
        kernel = std::min(kernel, timed([&] { multiply(matrix, format, matrix.copies, tokens); }));
      } while (now() < stop);
      std::printf("%d threads  %s %lld x %lld  %3lld tokens  %6.2f GB/s  plain read %6.2f  fraction %.3f\n",
                  threads_.count(), format.name, static_cast<long long>(matrix.rows),
                  static_cast<long long>(matrix.k), static_cast<long long>(tokens),
                  static_cast<double>(bytes) / kernel / 1e9, static_cast<double>(bytes) / plain / 1e9, plain / kernel);
      std::fflush(stdout);
    }
    for (int64_t tokens : {16, 64, 512}) {
      const int64_t copies = std::min<int64_t>(matrix.copies, 2);
      double kernel = 1e9;
      const double stop = now() + seconds_;
      do {
        kernel = std::min(kernel, timed([&] { multiply(matrix, format, copies, tokens); }));
      } while (now() < stop);
      std::printf("%d threads  %s %lld x %lld  %3lld tokens  %6.1f Gop/s\n", threads_.count(), format.name,
                  static_cast<long long>(matrix.rows), static_cast<long long>(matrix.k),
                  static_cast<long long>(tokens),
                  2e-9 * static_cast<double>(tokens * matrix.rows * matrix.k * copies) / kernel);
      std::fflush(stdout);
    }
  }

  const Kernels& kernels_;
  Threads& threads_;
  uint8_t* weights_;
  double seconds_;
  std::vector<float> x_, y_;
  uint8_t* quantized_ = nullptr;
  std::vector<uint8_t*> scratch_;
  volatile uint64_t sink_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 1.0;
  const Matrix expert = {5760, 2880, 24}, query = {4096, 2880, 16}, small = {4096, 2880, 24};
  const size_t bytes = size_t{400} << 20;
  uint8_t* weights = allocate(bytes);
  // Small exponents everywhere: as scales, as bf16 and as float32, these bytes mean numbers of ordinary size.
  for (size_t i = 0; i < bytes; ++i) weights[i] = static_cast<uint8_t>(random_bits() % 96 + 32);
  const Kernels& kernels = gptoss::select();
  std::printf("%s\n", kernels.name);
  for (int count : {1, 2}) {
    Threads threads(count);
    Bench bench(kernels, threads, weights, seconds);
    bench.mxfp4(expert);
    bench.bf16(query);
    bench.int8(small);
  }
}
