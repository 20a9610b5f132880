// A panel: consecutive rows of a matrix, one for each lane, walked along K together.
#pragma once

#include "activations.h"

namespace gptoss {
namespace {

template <class V>
class PanelRows {
 public:
  PanelRows(const void* matrix, int64_t row_bytes, int64_t row)
      : first_(static_cast<const uint8_t*>(matrix) + row * row_bytes), row_bytes_(row_bytes) {}

  int64_t row_bytes() const { return row_bytes_; }

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

  // Asks for the 64 bytes of each row that are read `ahead` bytes after `offset`, which may be in the next panel.
  void prefetch(int64_t offset, int64_t ahead) const {
    if (offset % 64 != 0) return;
    int64_t from = offset + ahead;
    if (from >= row_bytes_) from += (V::kLanes - 1) * row_bytes_;
    for (int i = 0; i < V::kLanes; ++i) __builtin_prefetch(first_ + i * row_bytes_ + from);
  }

 private:
  const uint8_t* first_;
  int64_t row_bytes_;
};

// The addresses of rows 0 .. 3 and their strides, hidden from the compiler, which would else carry the address of every row
// through the loop in memory.
struct FourRows {
  const uint8_t* row;
  int64_t stride, twice, thrice;

  FourRows(const uint8_t* row, int64_t stride) : row(row), stride(stride), twice(2 * stride), thrice(3 * stride) {
    asm("" : "+r"(this->row), "+r"(twice), "+r"(thrice));
  }
  const uint8_t* at(int i) const { return i == 0 ? row : i == 1 ? row + stride : i == 2 ? row + twice : row + thrice; }
};

// The panel that holds row r: it starts there, or so that it ends with the last row. Needs end >= kLanes.
template <class V>
inline int64_t panel_start(int64_t r, int64_t end) {
  return r + V::kLanes <= end ? r : end - V::kLanes;
}

// y[i] = sums[i] * factor for rows [r, end) of the panel that starts at row `first`.
template <class V>
inline void store_rows(float* y, int64_t first, int64_t r, int64_t end, typename V::Float sums, float factor) {
  sums = V::mul(sums, V::broadcast(factor));
  if (first == r) {
    V::store_unaligned(y + first, sums);
    return;
  }
  alignas(64) float lanes[V::kLanes];
  V::store(lanes, sums);
  for (; r < end; ++r) y[r] = lanes[r - first];
}

}  // namespace
}  // namespace gptoss
