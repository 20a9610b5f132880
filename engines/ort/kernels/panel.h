// A panel: consecutive rows of a matrix, one for each lane, walked along K together.
#pragma once

#include "activations.h"

namespace gptoss {
namespace {

template <class V>
class PanelRows {
 public:
  // The panel that holds row r: it starts there, or so that it ends with the last row. Needs end >= kLanes. `ahead` rows
  // further on is what `prefetch` asks for, and where the rows end, `next`, unless it is nullptr.
  PanelRows(const void* matrix, int64_t row_bytes, int64_t r, int64_t end, int64_t ahead = V::kLanes,
            const void* next = nullptr)
      : start_(r + V::kLanes <= end ? r : end - V::kLanes),
        first_(static_cast<const uint8_t*>(matrix) + start_ * row_bytes),
        row_bytes_(row_bytes),
        ahead_(r + ahead < end ? first_ + ahead * row_bytes : static_cast<const uint8_t*>(next)) {}

  int64_t start() const { return start_; }

  // v[j] = dword j of the 16 bytes at byte `offset` of every row.
  void load(int64_t offset, typename V::Int (&v)[4]) const {
    V::load_rows16(first_ + offset, row_bytes_, v);
    V::transpose4(v);
  }
  // The same with the 16 bytes taken in the order that `order` (16 bytes, repeated) says.
  void load(int64_t offset, typename V::Int order, typename V::Int (&v)[4]) const {
    V::load_rows16(first_ + offset, row_bytes_, v);
    for (typename V::Int& part : v) part = V::lookup(part, order);
    V::transpose4(v);
  }
  // The same with zeros past the end of a row, and no byte read there.
  void load_tail(int64_t offset, typename V::Int (&v)[4]) const {
    // 16 bytes at kSlide + n move bytes down by n, with zeros above.
    static constexpr uint8_t kSlide[32] = {0,    1,    2,    3,    4,    5,    6,    7,    8,    9,    10,
                                           11,   12,   13,   14,   15,   0x80, 0x80, 0x80, 0x80, 0x80, 0x80,
                                           0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80};
    if (offset + 16 <= row_bytes_) {
      load(offset, v);
    } else if (row_bytes_ >= 16) {
      load(row_bytes_ - 16, V::repeat16(kSlide + (offset + 16 - row_bytes_)), v);
    } else {
      uint8_t copies[V::kLanes][16] = {};
      for (int i = 0; i < V::kLanes; ++i)
        std::memcpy(copies[i], first_ + i * row_bytes_ + offset, static_cast<size_t>(row_bytes_ - offset));
      V::load_rows16(copies[0], 16, v);
      V::transpose4(v);
    }
  }

  // To be called with every kBytes of the rows: asks for as large a slice of the panel ahead, whose rows follow each other in
  // memory. What is asked for is then one linear walk, which the hardware's own prefetching joins.
  template <int kBytes>
  void prefetch(int64_t offset) const {
    if (ahead_ == nullptr) return;
    const uint8_t* from = ahead_ + offset * V::kLanes;
    for (int i = 0; i < kBytes * V::kLanes; i += 64) __builtin_prefetch(from + i);
  }

 private:
  int64_t start_;
  const uint8_t* first_;
  int64_t row_bytes_;
  const uint8_t* ahead_;  // nullptr where nothing follows
};

// y[i] = sums[i] * factor for rows [r, end) of the panel that starts at row `start`.
template <class V>
inline void store_rows(float* y, int64_t start, int64_t r, int64_t end, typename V::Float sums, float factor) {
  sums = V::mul(sums, V::broadcast(factor));
  if (start == r) {
    V::store_unaligned(y + r, sums);
    return;
  }
  alignas(64) float lanes[V::kLanes];
  V::store(lanes, sums);
  for (; r < end; ++r) y[r] = lanes[r - start];
}

}  // namespace
}  // namespace gptoss
