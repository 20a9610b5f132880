// MXFP4 and int8 weights as registers: dword i of every row of a panel, in the order of ActivationGroup.
#pragma once

#include "activations.h"
#include "panel.h"

namespace gptoss {
namespace {

// v * 2 from the codes of MXFP4, as signed bytes or with kMxfp4Bias.
alignas(16) constexpr int8_t kTwiceFp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
alignas(16) constexpr uint8_t kTwiceFp4Biased[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
// Natural order -> the order of activations: the even, then the odd values of each eight.
alignas(16) constexpr uint8_t kEvenOdd[16] = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};

template <class V>
struct Mxfp4 {
  using Int = typename V::Int;
  using Dot = typename V::Mxfp4Dot;
  static constexpr float kFactor = 0.5f;   // the registers hold twice the values
  static constexpr int kGroupBytes = 16;   // of weights
  static constexpr int kScaleBytes = 1;    // of a group
  static constexpr int kScaleGroups = 16;  // whose scales are loaded at once

  const uint8_t* weights;  // [rows, groups, 16]
  const uint8_t* scales;   // [rows, groups]
  int64_t groups;
  const uint8_t* next_weights;  // row `begin` of what is read afterwards, or nullptr
  const uint8_t* next_scales;

  static int32_t correction(const ActivationGroup& x) { return Dot::kBiased ? x.correction_mxfp4 : 0; }

  static void load(const PanelRows<V>& rows, int64_t group, Int (&v)[kGroupDwords]) {
    const Int table = V::repeat16(Dot::kBiased ? static_cast<const void*>(kTwiceFp4Biased) : kTwiceFp4);
    const Int nibble = V::broadcast_int(0x0f0f0f0f);
    Int codes[4];
    rows.load(group * kGroupBytes, codes);
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = V::lookup(table, V::bit_and(codes[i], nibble));
      v[2 * i + 1] = V::lookup(table, V::bit_and(V::template shift_right<4>(codes[i]), nibble));
    }
  }

  // 2^(byte - 127) of kScaleGroups groups -> out [group * stride + row]; those past the last are not used.
  static void load_scales(const PanelRows<V>& rows, int64_t group, float* out, int stride) {
    const Int byte = V::broadcast_int(0xff);
    const Int smallest = V::broadcast_int(0x00400000);  // 2^-127, which is subnormal: byte 0
    Int v[4];
    rows.load_tail(group, v);
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 4; ++j) {
        const Int bits = V::template shift_left<23>(V::bit_and(v[i], byte));
        V::store(out + (4 * i + j) * stride, V::as_float(V::max(bits, smallest)));
        v[i] = V::template shift_right<8>(v[i]);
      }
    }
  }
};

template <class V>
struct Int8 {
  using Int = typename V::Int;
  using Dot = typename V::Int8Dot;
  static constexpr float kFactor = 1;
  static constexpr int kGroupBytes = kGroup;
  static constexpr int kScaleBytes = 2;
  static constexpr int kScaleGroups = 8;

  const int8_t* weights;   // [rows, groups, 32]
  const uint16_t* scales;  // [rows, groups] bfloat16
  int64_t groups;
  const int8_t* next_weights = nullptr;
  const uint16_t* next_scales = nullptr;

  static int32_t correction(const ActivationGroup& x) { return Dot::kBiased ? x.correction_int8 : 0; }

  static void load(const PanelRows<V>& rows, int64_t group, Int (&v)[kGroupDwords]) {
    const Int order = V::repeat16(kEvenOdd);
    const Int bias = V::broadcast_int(Dot::kBiased ? static_cast<int32_t>(0x80808080u) : 0);
    for (int half = 0; half < 2; ++half) {
      Int part[4];
      rows.load(group * kGroupBytes + 16 * half, order, part);
      for (int i = 0; i < 4; ++i) v[4 * half + i] = V::bit_xor(part[i], bias);
    }
  }

  static void load_scales(const PanelRows<V>& rows, int64_t group, float* out, int stride) {
    const Int upper = V::broadcast_int(static_cast<int32_t>(0xffff0000u));
    Int v[4];
    rows.load_tail(group * kScaleBytes, v);
    for (int i = 0; i < 4; ++i) {
      V::store(out + 2 * i * stride, V::as_float(V::template shift_left<16>(v[i])));
      V::store(out + (2 * i + 1) * stride, V::as_float(V::bit_and(v[i], upper)));
    }
  }
};

}  // namespace
}  // namespace gptoss
