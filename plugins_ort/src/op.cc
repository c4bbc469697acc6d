// The ONNX Runtime op sslc::LowRankSparseLinear (docs/architecture.md). Weights stay where the runtime has them, that
// is in the mapped file: nothing is copied or repacked.
#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "counters.h"
#include "dispatch.h"
#include "export.h"
#include "forward.h"
#include "ort_abi.h"

namespace sslc {
namespace {

constexpr const char* kDomain = "sslc";
constexpr const char* kOp = "LowRankSparseLinear";

// An OrtStatus on its way to the caller, as an exception inside this file only.
struct Failed {
  OrtStatus* status;
};

class Ort {
 public:
  explicit Ort(const OrtApi* api) : api_(api) {}
  const OrtApi* operator->() const { return api_; }

  void check(OrtStatus* status) const {
    if (status != nullptr) throw Failed{status};
  }

  [[noreturn]] void fail(const std::string& message) const {
    throw Failed{api_->CreateStatus(ORT_INVALID_ARGUMENT, message.c_str())};
  }

  // The only way out to C: runs body and turns what it throws into a status.
  template <class Body>
  OrtStatus* guard(const Body& body) const noexcept {
    try {
      body();
      return nullptr;
    } catch (const Failed& failed) {
      return failed.status;
    } catch (const std::exception& error) {
      return api_->CreateStatus(ORT_FAIL, error.what());
    } catch (...) {
      return api_->CreateStatus(ORT_FAIL, "unknown C++ exception");
    }
  }

 private:
  const OrtApi* api_;
};

struct Tensor {
  ONNXTensorElementDataType type;
  std::vector<int64_t> dims;
  void* data;

  int64_t size() const {
    int64_t count = 1;
    for (int64_t dim : dims) count *= dim;
    return count;
  }
};

Tensor tensor_of(const Ort& ort, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  ort.check(ort->GetTensorTypeAndShape(value, &info));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> owner(
      info, ort->ReleaseTensorTypeAndShapeInfo);
  Tensor tensor{};
  size_t rank = 0;
  ort.check(ort->GetTensorElementType(info, &tensor.type));
  ort.check(ort->GetDimensionsCount(info, &rank));
  tensor.dims.resize(rank);
  if (rank > 0) ort.check(ort->GetDimensions(info, tensor.dims.data(), rank));
  // The C API has no const accessor; inputs are only read.
  ort.check(ort->GetTensorMutableData(const_cast<OrtValue*>(value), &tensor.data));
  return tensor;
}

std::string shape_text(const std::vector<int64_t>& dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(dims[i]);
  return text + "]";
}

class Kernel {
 public:
  Kernel(const Ort& ort, const OrtKernelInfo* info) : ort_(ort), name_(node_name(info)) {
    check_attributes(info);
    const int activation_bits = activation_bits_of(info);
    const Tensor bitmap = weight(info, 1, "bitmap", 2), values = weight(info, 2, "values", 1),
                 U = weight(info, 3, "U", 2), V = weight(info, 4, "V", 2), bias = weight(info, 5, "bias", 1);

    // The types of X, bitmap and bias are declared (make_op), and checked by the runtime.
    Layer layer{};
    layer.dtype = static_cast<Dtype>(values.type);
    const bool integers = is_integer(layer.dtype);
    if (!integers && layer.dtype != Dtype::f32 && layer.dtype != Dtype::bf16)
      fail("values have ONNX element type " + std::to_string(values.type) +
           "; float32 (1), uint8 (2) with two int4 in each, int8 (3) and bfloat16 (16) are known");
    const ONNXTensorElementDataType factors = integers ? ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 : values.type;
    if (U.type != factors || V.type != factors)
      fail(integers ? "U and V are not bfloat16, which they must be beside int8 and int4 values"
                    : "values, U and V are not of one type");

    layer.N = U.dims[0];
    layer.r = U.dims[1];
    layer.K = V.dims[1];
    layer.words = (layer.K + kBlock - 1) / kBlock;
    expect(V, "V", {layer.r, layer.K});
    expect(bitmap, "bitmap", {layer.N, 2 * layer.words});
    expect(bias, "bias", {layer.N});
    layer.bitmap = static_cast<const uint8_t*>(bitmap.data);
    layer.values = static_cast<const uint8_t*>(values.data);
    layer.U = static_cast<const uint8_t*>(U.data);
    layer.V = static_cast<const uint8_t*>(V.data);
    layer.bias = static_cast<const uint8_t*>(bias.data);
    layer.activation_bits = activation_bits;
    if (integers) {
      const Tensor scales = weight(info, 6, "scales", 2);
      expect(scales, "scales", {layer.N, layer.words});
      layer.scales = static_cast<const uint8_t*>(scales.data);
      check_scales(scales);
    } else if (constant_input(info, 6) != nullptr) {
      fail("scales are given, but the values are neither int8 nor int4");
    }

    std::string error;
    const Kernels* chosen = kernels(&error);
    if (chosen == nullptr || !layer_.prepare(layer, values.size(), chosen, &error)) fail(error);
    ++layers_alive;
  }

  ~Kernel() { --layers_alive; }
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  OrtStatus* compute(OrtKernelContext* context) const noexcept {
    return ort_.guard([&] {
      const OrtValue* input = nullptr;
      OrtValue* output = nullptr;
      ort_.check(ort_->KernelContext_GetInput(context, 0, &input));
      const Tensor x = tensor_of(ort_, input);
      const int64_t K = layer_.layer().K;
      if (x.dims.empty() || x.dims.back() != K)
        fail("X is " + shape_text(x.dims) + ", but the layer takes [..., " + std::to_string(K) + "]");
      std::vector<int64_t> dims = x.dims;
      dims.back() = layer_.layer().N;
      ort_.check(ort_->KernelContext_GetOutput(context, 0, dims.data(), dims.size(), &output));
      void* y = nullptr;
      ort_.check(ort_->GetTensorMutableData(output, &y));
      Pool pool{&ort_, context, nullptr};
      layer_.forward(static_cast<const float*>(x.data), x.size() / K, static_cast<float*>(y), {&pool, Pool::run});
      ort_.check(pool.status);
      ++op_calls;
    });
  }

 private:
  // The session's own threads.
  struct Pool {
    const Ort* ort;
    OrtKernelContext* context;
    OrtStatus* status;

    static void run(void* self, void (*task)(void*, size_t), size_t count, void* user) {
      Pool& pool = *static_cast<Pool*>(self);
      OrtStatus* status = (*pool.ort)->KernelContext_ParallelFor(pool.context, task, count, 0, user);
      if (status == nullptr) return;
      if (pool.status != nullptr) (*pool.ort)->ReleaseStatus(pool.status);
      pool.status = status;
    }
  };

  [[noreturn]] void fail(const std::string& what) const {
    ort_.fail(std::string(kDomain) + "::" + kOp + " '" + name_ + "': " + what);
  }

  std::string node_name(const OrtKernelInfo* info) const {
    size_t size = 0;
    ort_.check(ort_->KernelInfo_GetNodeName(info, nullptr, &size));
    std::string name(size, '\0');
    ort_.check(ort_->KernelInfo_GetNodeName(info, name.data(), &size));
    return name.c_str();
  }

  // A missing attribute is this op's own error, not the runtime's.
  void check_attributes(const OrtKernelInfo* info) const {
    int64_t version = 0;
    if (OrtStatus* status = ort_->KernelInfoGetAttribute_int64(info, "version", &version)) {
      ort_->ReleaseStatus(status);
      fail("the attribute 'version' is missing");
    }
    if (version != 1) fail("version " + std::to_string(version) + " of the operator; this library knows version 1");
    size_t size = 0;
    if (OrtStatus* status = ort_->KernelInfoGetAttribute_string(info, "layout", nullptr, &size)) {
      ort_->ReleaseStatus(status);
      fail("the attribute 'layout' is missing");
    }
    std::string layout(size, '\0');
    ort_.check(ort_->KernelInfoGetAttribute_string(info, "layout", layout.data(), &size));
    layout = layout.c_str();
    if (layout != "rows64") fail("layout '" + layout + "'; this library knows 'rows64'");
  }

  // Engines from before there was a choice have no such attribute.
  int activation_bits_of(const OrtKernelInfo* info) const {
    int64_t bits = 16;
    if (OrtStatus* status = ort_->KernelInfoGetAttribute_int64(info, "activation_bits", &bits)) {
      ort_->ReleaseStatus(status);
      return 16;
    }
    return static_cast<int>(std::clamp<int64_t>(bits, 0, 99));  // PreparedLayer says what is allowed
  }

  // nullptr for an input that is absent or not constant.
  const OrtValue* constant_input(const OrtKernelInfo* info, size_t index) const {
    int constant = 0;
    const OrtValue* value = nullptr;
    ort_.check(ort_->KernelInfoGetConstantInput_tensor(info, index, &constant, &value));
    return constant == 0 ? nullptr : value;
  }

  Tensor weight(const OrtKernelInfo* info, size_t index, const char* name, size_t rank) const {
    const OrtValue* value = constant_input(info, index);
    if (value == nullptr)
      fail(std::string(name) + (index == 6 ? " is absent, computed" : " is computed") +
           " in the graph or fed; it must be a constant initializer");
    Tensor tensor = tensor_of(ort_, value);
    if (tensor.dims.size() != rank)
      fail(std::string(name) + " is " + shape_text(tensor.dims) + ", which has not " + std::to_string(rank) +
           " dimensions");
    return tensor;
  }

  void check_scales(const Tensor& scales) const {
    for (int64_t i = 0; i < scales.size(); ++i) {
      uint16_t half;
      std::memcpy(&half, static_cast<const uint8_t*>(scales.data) + 2 * i, 2);
      if (half >= 0x7c00) fail("scale " + std::to_string(i) + " is negative or not finite");
    }
  }

  void expect(const Tensor& tensor, const char* name, const std::vector<int64_t>& dims) const {
    if (tensor.dims != dims)
      fail(std::string(name) + " is " + shape_text(tensor.dims) + ", but U and V ask for " + shape_text(dims));
  }

  Ort ort_;
  std::string name_;
  PreparedLayer layer_;
};

OrtCustomOp make_op() {
  OrtCustomOp op{};
  op.version = kOrtApiVersion;
  op.GetName = [](const OrtCustomOp*) { return kOp; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // CPU
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 7; };
  op.GetInputType = [](const OrtCustomOp*, size_t index) {
    switch (index) {
      case 1: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
      case 2:
      case 3:
      case 4: return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;  // any; Kernel checks them
      case 6: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
      default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }
  };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
    return index == 6 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;  // scales
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicInputMinArity;
  op.GetVariadicOutputMinArity = op.GetVariadicInputMinArity;
  op.GetVariadicOutputHomogeneity = op.GetVariadicInputMinArity;
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    const Ort ort(api);
    return ort.guard([&] { *kernel = new Kernel(ort, info); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return static_cast<const Kernel*>(kernel)->compute(context);
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  return op;
}

// Sessions keep pointers to both, so that they live as long as the process and are shared by all sessions.
OrtCustomOpDomain* domain(const Ort& ort) {
  static std::mutex mutex;
  static OrtCustomOpDomain* domain = nullptr;
  static const OrtCustomOp op = make_op();
  const std::lock_guard<std::mutex> lock(mutex);
  if (domain == nullptr) {
    OrtCustomOpDomain* made = nullptr;
    ort.check(ort->CreateCustomOpDomain(kDomain, &made));
    ort.check(ort->CustomOpDomain_Add(made, &op));
    domain = made;
  }
  return domain;
}

}  // namespace
}  // namespace sslc

// What SessionOptions.register_custom_ops_library() calls.
SSLC_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kOrtApiVersion);
  if (api == nullptr)  // CreateStatus is in every version
    return base->GetApi(1)->CreateStatus(
        ORT_FAIL, (std::string("sslc needs onnxruntime 1.17 or later, not ") + base->GetVersionString()).c_str());
  const sslc::Ort ort(api);
  return ort.guard([&] {
    std::string error;
    if (sslc::kernels(&error) == nullptr) ort.fail(error);
    ort.check(ort->AddCustomOpDomain(options, sslc::domain(ort)));
  });
}
