// The part of ONNX Runtime's C API that this library uses, and nothing else.
//
// No package ships the headers. The ABI is stable by design: OrtApi is a table of function pointers that only grows, and
// OrtCustomOp carries the version that it was compiled for (onnxruntime_c_api.h, "OrtApi structs" and "OrtCustomOp").
// Functions are named here by their place in the table.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gptoss::ort {

// The first version with KernelContext_ParallelFor.
constexpr uint32_t kApiVersion = 17;

struct Status;
struct Env;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorInfo;

enum class Type : int { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7, kBfloat16 = 16 };
enum class Characteristic : int { kRequired = 0, kOptional = 1 };
enum class ErrorCode : int { kFail = 1, kInvalidArgument = 2 };

struct ApiBase {
  const void* const* (*get_api)(uint32_t version);
  const char* (*version_string)();
};

// A typed view of the table; each method is one slot.
class Api {
 public:
  explicit Api(const void* const* table) : table_(table) {}

  Status* create_status(ErrorCode code, const char* message) const {
    return slot<0, Status* (*)(int, const char*)>()(static_cast<int>(code), message);
  }
  Status* create_custom_op_domain(const char* name, CustomOpDomain** out) const {
    return slot<26, Status* (*)(const char*, CustomOpDomain**)>()(name, out);
  }
  Status* custom_op_domain_add(CustomOpDomain* domain, const struct CustomOp* op) const {
    return slot<27, Status* (*)(CustomOpDomain*, const struct CustomOp*)>()(domain, op);
  }
  Status* add_custom_op_domain(SessionOptions* options, CustomOpDomain* domain) const {
    return slot<28, Status* (*)(SessionOptions*, CustomOpDomain*)>()(options, domain);
  }
  Status* get_tensor_data(Value* value, void** out) const {
    return slot<51, Status* (*)(Value*, void**)>()(value, out);
  }
  Status* get_dimensions_count(const TensorInfo* info, size_t* out) const {
    return slot<61, Status* (*)(const TensorInfo*, size_t*)>()(info, out);
  }
  Status* get_dimensions(const TensorInfo* info, int64_t* dims, size_t count) const {
    return slot<62, Status* (*)(const TensorInfo*, int64_t*, size_t)>()(info, dims, count);
  }
  Status* get_tensor_info(const Value* value, TensorInfo** out) const {
    return slot<65, Status* (*)(const Value*, TensorInfo**)>()(value, out);
  }
  Status* get_attribute(const KernelInfo* info, const char* name, float* out) const {
    return slot<85, Status* (*)(const KernelInfo*, const char*, float*)>()(info, name, out);
  }
  Status* get_attribute(const KernelInfo* info, const char* name, int64_t* out) const {
    return slot<86, Status* (*)(const KernelInfo*, const char*, int64_t*)>()(info, name, out);
  }
  Status* get_input(const KernelContext* context, size_t index, const Value** out) const {
    return slot<90, Status* (*)(const KernelContext*, size_t, const Value**)>()(context, index, out);
  }
  Status* get_output(KernelContext* context, size_t index, const int64_t* dims, size_t rank, Value** out) const {
    return slot<91, Status* (*)(KernelContext*, size_t, const int64_t*, size_t, Value**)>()(context, index, dims, rank, out);
  }
  void release(TensorInfo* info) const { slot<99, void (*)(TensorInfo*)>()(info); }
  // Runs f(data, 0) to f(data, total - 1) on the session's own thread pool; batches 0 lets the pool choose.
  Status* parallel_for(const KernelContext* context, void (*f)(void*, size_t), size_t total, size_t batches, void* data) const {
    return slot<274, Status* (*)(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>()(context, f, total, batches, data);
  }

 private:
  template <size_t index, typename Function>
  Function slot() const { return reinterpret_cast<Function>(const_cast<void*>(table_[index])); }

  const void* const* table_;
};

// onnxruntime_c_api.h, OrtCustomOp, as of version 17 (a runtime reads no member that is newer than `version`).
struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, const void* const*, const KernelInfo*);
  const char* (*get_name)(const CustomOp*);
  const char* (*get_execution_provider)(const CustomOp*);
  Type (*get_input_type)(const CustomOp*, size_t);
  size_t (*get_input_count)(const CustomOp*);
  Type (*get_output_type)(const CustomOp*, size_t);
  size_t (*get_output_count)(const CustomOp*);
  void (*compute)(void*, KernelContext*);
  void (*destroy)(void*);
  Characteristic (*get_input_characteristic)(const CustomOp*, size_t);
  Characteristic (*get_output_characteristic)(const CustomOp*, size_t);
  int (*get_input_memory_type)(const CustomOp*, size_t);
  int (*get_variadic_input_min_arity)(const CustomOp*);
  int (*get_variadic_input_homogeneity)(const CustomOp*);
  int (*get_variadic_output_min_arity)(const CustomOp*);
  int (*get_variadic_output_homogeneity)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, const void* const*, const KernelInfo*, void**);
  Status* (*compute_v2)(void*, KernelContext*);
  Status* (*infer_output_shape)(const CustomOp*, void*);
  int (*get_start_version)(const CustomOp*);
  int (*get_end_version)(const CustomOp*);
};

}  // namespace gptoss::ort
