// Tensors of a kernel call, as the ops see them, and errors as ONNX Runtime wants them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <vector>

#include "ort_abi.h"

namespace gptoss {

using Dims = std::vector<int64_t>;

inline int64_t product(const Dims& dims, size_t begin, size_t end) {
  return std::accumulate(dims.begin() + static_cast<ptrdiff_t>(begin), dims.begin() + static_cast<ptrdiff_t>(end),
                         int64_t{1}, std::multiplies<>());
}

// A status of ONNX Runtime's on its way up to the op's boundary, which owns it then.
struct StatusError {
  ort::Status* status;
};

inline void check(ort::Status* status) {
  if (status != nullptr) throw StatusError{status};
}

// Shapes that the graph promised and a caller broke.
inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

struct Input {
  const void* data;
  Dims dims;

  template <typename T>
  const T* as() const { return static_cast<const T*>(data); }
  int64_t dim(int64_t i) const { return dims[static_cast<size_t>(i < 0 ? static_cast<int64_t>(dims.size()) + i : i)]; }
  // The product of all dimensions but the last.
  int64_t rows() const { return dims.empty() ? 1 : product(dims, 0, dims.size() - 1); }
};

class Context {
 public:
  Context(const ort::Api& api, ort::KernelContext* context) : api_(api), context_(context) {}

  Input input(size_t index) const {
    const ort::Value* value = nullptr;
    check(api_.get_input(context_, index, &value));
    ort::TensorInfo* raw = nullptr;
    check(api_.get_tensor_info(value, &raw));
    const auto release = [this](ort::TensorInfo* info) { api_.release(info); };
    const std::unique_ptr<ort::TensorInfo, decltype(release)> info(raw, release);
    size_t rank = 0;
    check(api_.get_dimensions_count(raw, &rank));
    Dims dims(rank);
    check(api_.get_dimensions(raw, dims.data(), rank));
    void* data = nullptr;
    // The C API has one accessor, which is not const; inputs are only read.
    check(api_.get_tensor_data(const_cast<ort::Value*>(value), &data));
    return {data, std::move(dims)};
  }

  template <typename T>
  T* output(size_t index, const Dims& dims) const {
    ort::Value* value = nullptr;
    check(api_.get_output(context_, index, dims.data(), dims.size(), &value));
    void* data = nullptr;
    check(api_.get_tensor_data(value, &data));
    return static_cast<T*>(data);
  }

  // f(i) for i in [0, count), on the session's own threads.
  template <typename F>
  void parallel(size_t count, const F& f) const {
    if (count == 1) {
      f(size_t{0});
      return;
    }
    const auto call = [](void* data, size_t i) { (*static_cast<const F*>(data))(i); };
    check(api_.parallel_for(context_, call, count, 0, const_cast<F*>(&f)));
  }
  // f(i) for each of `count` rows of activations: here where that is less than waking a thread costs.
  template <typename F>
  void each(int64_t count, const F& f) const {
    if (count <= 8) {
      for (int64_t i = 0; i < count; ++i) f(i);
    } else {
      parallel(static_cast<size_t>(count), [&](size_t i) { f(static_cast<int64_t>(i)); });
    }
  }

 private:
  const ort::Api& api_;
  ort::KernelContext* context_;
};

// Memory that wide loads may be aligned to; not initialised.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes) { reserve(bytes); }

  void reserve(size_t bytes) {
    if (bytes <= size_) return;
    const size_t rounded = (bytes + 63) / 64 * 64;
    data_.reset(std::aligned_alloc(64, rounded));
    if (data_ == nullptr) throw std::bad_alloc();
    size_ = rounded;
  }
  template <typename T>
  T* as() const { return static_cast<T*>(data_.get()); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t size_ = 0;
};

// Rows [begin, end) of part i of `parts`, split at multiples of `alignment`.
struct Range {
  int64_t begin, end;
};

inline Range part(int64_t rows, size_t i, size_t parts, int64_t alignment) {
  const int64_t units = (rows + alignment - 1) / alignment;
  const auto bound = [&](size_t k) {
    return std::min(rows, units * static_cast<int64_t>(k) / static_cast<int64_t>(parts) * alignment);
  };
  return {bound(i), bound(i + 1)};
}

// How many parts to make of `rows` for the threads of this machine: a few for each, so that one that is held up does not hold
// up the others for long, and with at least `least` rows, so that a part is worth its while.
inline size_t parts_of(int64_t rows, int64_t least, int64_t parts_per_thread) {
  static const auto threads = static_cast<int64_t>(std::max(1u, std::thread::hardware_concurrency()));
  return static_cast<size_t>(std::clamp<int64_t>(rows / least, 1, parts_per_thread * threads));
}

inline float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  static_assert(sizeof value == sizeof wide);
  __builtin_memcpy(&value, &wide, sizeof value);
  return value;
}

}  // namespace gptoss
