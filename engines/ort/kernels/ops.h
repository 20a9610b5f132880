// The ops of the dialect `com.gptoss` that have kernels. What each computes is defined in gptoss_export/exporter/ops, in
// standard ONNX operators; kernels are tested against that.
#pragma once

#include "tensors.h"

namespace gptoss {

// x [.., K] float32, weight [N, K] bfloat16, (bias [N] bfloat16) -> y [.., N].
struct Linear {
  static constexpr const char* kName = "Linear";
  static constexpr ort::Type kInputs[] = {ort::Type::kFloat, ort::Type::kBfloat16, ort::Type::kBfloat16};
  static constexpr ort::Type kOutputs[] = {ort::Type::kFloat};

  Linear(const ort::Api&, const ort::KernelInfo*) {}
  void compute(const Context& context) const;
};

struct LinearNoBias {
  static constexpr const char* kName = "LinearNoBias";
  static constexpr ort::Type kInputs[] = {ort::Type::kFloat, ort::Type::kBfloat16};
  static constexpr ort::Type kOutputs[] = {ort::Type::kFloat};

  LinearNoBias(const ort::Api&, const ort::KernelInfo*) {}
  void compute(const Context& context) const;
};

// Three Linear on one x: x, and weight and bias of each -> q, k, v.
struct LinearQKV {
  static constexpr const char* kName = "LinearQKV";
  static constexpr ort::Type kInputs[] = {ort::Type::kFloat,    ort::Type::kBfloat16, ort::Type::kBfloat16,
                                          ort::Type::kBfloat16, ort::Type::kBfloat16, ort::Type::kBfloat16,
                                          ort::Type::kBfloat16};
  static constexpr ort::Type kOutputs[] = {ort::Type::kFloat, ort::Type::kFloat, ort::Type::kFloat};

  LinearQKV(const ort::Api&, const ort::KernelInfo*) {}
  void compute(const Context& context) const;
};

// x [.., K] float32, weight [N, K] int8, scales [N, K/32] bfloat16, (bias [N] bfloat16) -> y [.., N].
struct LinearInt8 {
  static constexpr const char* kName = "LinearInt8";
  static constexpr ort::Type kInputs[] = {ort::Type::kFloat, ort::Type::kInt8, ort::Type::kBfloat16,
                                          ort::Type::kBfloat16};
  static constexpr ort::Type kOutputs[] = {ort::Type::kFloat};

  LinearInt8(const ort::Api&, const ort::KernelInfo*) {}
  void compute(const Context& context) const;
};

struct LinearInt8NoBias {
  static constexpr const char* kName = "LinearInt8NoBias";
  static constexpr ort::Type kInputs[] = {ort::Type::kFloat, ort::Type::kInt8, ort::Type::kBfloat16};
  static constexpr ort::Type kOutputs[] = {ort::Type::kFloat};

  LinearInt8NoBias(const ort::Api&, const ort::KernelInfo*) {}
  void compute(const Context& context) const;
};

// x [.., H], weight [E, H], bias [E] -> weights [.., K] float32, experts [.., K] int64.
struct MoERouter {
  static constexpr const char* kName = "MoERouter";
  static constexpr ort::Type kInputs[] = {ort::Type::kFloat, ort::Type::kBfloat16, ort::Type::kBfloat16};
  static constexpr ort::Type kOutputs[] = {ort::Type::kFloat, ort::Type::kInt64};

  MoERouter(const ort::Api& api, const ort::KernelInfo* info) { check(api.get_attribute(info, "top_k", &top_k)); }
  void compute(const Context& context) const;

  int64_t top_k = 0;
};

// x [.., H], weights, experts [.., K], gate_up blocks, scales, bias, down blocks, scales, bias -> y [.., H].
struct MoEExperts {
  static constexpr const char* kName = "MoEExperts";
  static constexpr ort::Type kInputs[] = {
      ort::Type::kFloat,    ort::Type::kFloat, ort::Type::kInt64, ort::Type::kUint8,   ort::Type::kUint8,
      ort::Type::kBfloat16, ort::Type::kUint8, ort::Type::kUint8, ort::Type::kBfloat16};
  static constexpr ort::Type kOutputs[] = {ort::Type::kFloat};

  MoEExperts(const ort::Api& api, const ort::KernelInfo* info) {
    check(api.get_attribute(info, "swiglu_alpha", &alpha));
    check(api.get_attribute(info, "swiglu_limit", &limit));
  }
  void compute(const Context& context) const;

  float alpha = 0, limit = 0;
};

// q, k, v, cache_key, cache_value, sinks, query_positions, key_positions -> attention, cache_key, cache_value.
struct SharedSinkAttention {
  static constexpr const char* kName = "SharedSinkAttention";
  static constexpr ort::Type kInputs[] = {ort::Type::kFloat, ort::Type::kFloat,    ort::Type::kFloat, ort::Type::kFloat,
                                          ort::Type::kFloat, ort::Type::kBfloat16, ort::Type::kInt64, ort::Type::kInt64};
  static constexpr ort::Type kOutputs[] = {ort::Type::kFloat, ort::Type::kFloat, ort::Type::kFloat};

  SharedSinkAttention(const ort::Api& api, const ort::KernelInfo* info) {
    check(api.get_attribute(info, "num_heads", &num_heads));
    check(api.get_attribute(info, "kv_heads", &kv_heads));
    check(api.get_attribute(info, "scale", &scale));
    check(api.get_attribute(info, "window", &window));
  }
  void compute(const Context& context) const;

  int64_t num_heads = 0, kv_heads = 0, window = 0;
  float scale = 0;
};

}  // namespace gptoss
