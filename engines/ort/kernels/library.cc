// Registers the ops with ONNX Runtime: session_options.register_custom_ops_library(path).
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

#include "ops.h"

namespace gptoss {
namespace {

template <typename Op>
struct Kernel {
  ort::Api api;
  Op op;
};

// Runs f; what it throws becomes a status, which is how ONNX Runtime reports it with the node's name.
template <typename F>
ort::Status* guarded(const ort::Api& api, const char* name, const F& f) {
  try {
    f();
    return nullptr;
  } catch (const StatusError& error) {
    return error.status;
  } catch (const std::invalid_argument& error) {
    return api.create_status(ort::ErrorCode::kInvalidArgument, (std::string(name) + ": " + error.what()).c_str());
  } catch (const std::exception& error) {
    return api.create_status(ort::ErrorCode::kFail, (std::string(name) + ": " + error.what()).c_str());
  }
}

template <typename Op>
ort::CustomOp describe() {
  using ort::CustomOp;
  CustomOp op{};
  op.version = ort::kApiVersion;
  op.get_name = [](const CustomOp*) { return Op::kName; };
  op.get_execution_provider = [](const CustomOp*) -> const char* { return nullptr; };  // CPU
  op.get_input_count = [](const CustomOp*) { return std::size(Op::kInputs); };
  op.get_input_type = [](const CustomOp*, size_t i) { return Op::kInputs[i]; };
  op.get_output_count = [](const CustomOp*) { return std::size(Op::kOutputs); };
  op.get_output_type = [](const CustomOp*, size_t i) { return Op::kOutputs[i]; };
  op.get_input_characteristic = [](const CustomOp*, size_t) { return ort::Characteristic::kRequired; };
  op.get_output_characteristic = [](const CustomOp*, size_t) { return ort::Characteristic::kRequired; };
  op.get_input_memory_type = [](const CustomOp*, size_t) { return 0; };
  op.get_variadic_input_min_arity = [](const CustomOp*) { return 0; };
  op.get_variadic_input_homogeneity = [](const CustomOp*) { return 0; };
  op.get_variadic_output_min_arity = [](const CustomOp*) { return 0; };
  op.get_variadic_output_homogeneity = [](const CustomOp*) { return 0; };
  op.get_start_version = [](const CustomOp*) { return 1; };
  op.get_end_version = [](const CustomOp*) { return 1; };
  op.create_kernel_v2 = [](const CustomOp*, const void* const* table, const ort::KernelInfo* info, void** out) {
    const ort::Api api(table);
    return guarded(api, Op::kName, [&] { *out = new Kernel<Op>{api, Op(api, info)}; });
  };
  op.compute_v2 = [](void* kernel, ort::KernelContext* context) {
    const auto& self = *static_cast<const Kernel<Op>*>(kernel);
    return guarded(self.api, Op::kName, [&] { self.op.compute(Context(self.api, context)); });
  };
  op.destroy = [](void* kernel) { delete static_cast<Kernel<Op>*>(kernel); };
  return op;
}

template <typename Op>
void add(const ort::Api& api, ort::CustomOpDomain* domain) {
  static const ort::CustomOp op = describe<Op>();
  check(api.custom_op_domain_add(domain, &op));
}

}  // namespace
}  // namespace gptoss

extern "C" __attribute__((visibility("default"))) gptoss::ort::Status* RegisterCustomOps(
    gptoss::ort::SessionOptions* options, const gptoss::ort::ApiBase* base) {
  using namespace gptoss;
  const void* const* table = base->get_api(ort::kApiVersion);
  if (table == nullptr) {
    // Without a table there is no way to make a status either; a null status would mean success.
    std::fprintf(stderr, "gptoss_ort_ops: onnxruntime %s is too old, 1.17 is needed\n", base->version_string());
    table = base->get_api(1);
    if (table == nullptr) return nullptr;
    return ort::Api(table).create_status(ort::ErrorCode::kFail, "gptoss_ort_ops needs onnxruntime 1.17 or newer");
  }
  const ort::Api api(table);
  return guarded(api, "gptoss_ort_ops", [&] {
    // Lives as long as the process: sessions keep pointers into it, and there is one for each registration only.
    ort::CustomOpDomain* domain = nullptr;
    check(api.create_custom_op_domain("com.gptoss", &domain));
    add<Linear>(api, domain);
    add<LinearNoBias>(api, domain);
    add<LinearQKV>(api, domain);
    add<LinearInt8>(api, domain);
    add<LinearInt8NoBias>(api, domain);
    add<MoERouter>(api, domain);
    add<MoEExperts>(api, domain);
    add<SharedSinkAttention>(api, domain);
    check(api.add_custom_op_domain(options, domain));
  });
}
