// The TensorRT plugin sslc::LowRankSparseLinear, version "1":   Y = X (S + U V)ᵀ + bias
//
//   input  0 X     [..., K]  half or float (type "f16"), bfloat16 or float (type "bf16")
//          1 S     int32     packed by plugins_trt/pack.py
//          2 U, 3 V  int32   in fragment order; four zeros each if the rank is 0
//          4 bias  float [N]
//   output 0 Y     [..., N]  the type of X
//
// One node may be up to three layers of the same input: then S, U, V and bias hold one layer's after the other's, and
// there is an output for each.
//
// Its fields are the node's attributes: out_features and rank (int32, one per layer), in_features, slot (int32), layout,
// type, values (text).
//
// Nothing may cross TensorRT's boundary but return values: no function here throws, asserts or prints. What is wrong is
// said to TensorRT's own logger, and refused.
#include <NvInferRuntime.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <new>

#include "launch.h"

#ifndef SSLC_VERSION
#define SSLC_VERSION "unknown"
#endif

namespace sslc {
namespace {

using namespace nvinfer1;

constexpr char kName[] = "LowRankSparseLinear", kPluginVersion[] = "1", kNamespace[] = "sslc";
constexpr int kInputs = 5, kFields = 7;
constexpr int kMostFeatures = 1 << 22;  // a grid of gemm has at most 65535 blocks of 256 outputs
constexpr const char* kLayoutNames[] = {"any", "bank32", "fixed8"};
constexpr const char* kTypeNames[] = {"f16", "bf16"};
constexpr const char* kValueNames[] = {"float", "int8"};

ILoggerFinder* logger_finder = nullptr;

void complain(const char* format, ...) noexcept {
  ILogger* const logger = logger_finder ? logger_finder->findLogger() : nullptr;
  if (!logger) return;
  char text[512];
  const int prefix = std::snprintf(text, sizeof text, "sslc::LowRankSparseLinear: ");
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text + prefix, sizeof text - prefix, format, arguments);
  va_end(arguments);
  logger->log(ILogger::Severity::kERROR, text);
}

// -1 if it is more than anything here can have.
int64_t product(const Dims& d, int first, int last) noexcept {
  int64_t p = 1;
  for (int i = first; i < last && p >= 0; i++) p = __builtin_mul_overflow(p, static_cast<int64_t>(d.d[i]), &p) ? -1 : p;
  return p;
}

// The tokens of X [..., K]; -1 if there are more than the kernels can count.
int tokens_of(const Dims& d) noexcept {
  const int64_t M = product(d, 0, d.nbDims - 1);
  return M < 0 || M > (1 << 30) ? -1 : static_cast<int>(M);
}

DataType type_of(const Layer& layer) noexcept { return layer.type == kF16 ? DataType::kHALF : DataType::kBF16; }

// Words that S must have: exactly, or at least (layout any, whose tiles are as long as their values need).
int64_t words_of_S(const Layer& layer) noexcept {
  const int64_t tiles = static_cast<int64_t>(layer.row_tiles()) * (layer.layout == kBank32 ? ceil_div(layer.K, 256) : ceil_div(layer.K, 64));
  if (layer.layout == kAny) return (tiles + 1 + 3) / 4 * 4 + tiles * (layer.int8 ? 176 : 144) / 4;
  return tiles * layer.slot / 4;
}

// The slot that the layout must have, or the range that it may have.
bool slot_fits(const Layer& layer) noexcept {
  if (layer.layout == kBank32) return layer.slot == Bank32<kF16>::kTileBytes;
  if (layer.layout == kFixed8) return layer.slot == (layer.int8 ? Fixed8<kF16, true>::kTileBytes : Fixed8<kF16, false>::kTileBytes);
  return layer.slot % 16 == 0 && layer.slot >= 144 + 32 && layer.slot <= (layer.int8 ? 176 + 1024 + 32 : 144 + 2048 + 32);
}

bool sound(const Layer& layer) noexcept {
  for (int i = 0; i < layer.parts; i++) {
    const int N = layer.out[i], K = layer.K, rank = layer.rank[i];
    if (N < 1 || K < 1 || rank < 0 || N > kMostFeatures || K > kMostFeatures || rank > 1 << 20)
      return complain("out_features %d, in_features %d and rank %d are not a layer's shape", N, K, rank), false;
  }
  if (layer.layout == kBank32 && layer.int8) {
    complain("layout bank32 takes no int8 values");
  } else if (!slot_fits(layer)) {
    complain("slot %d does not belong to layout %s", layer.slot, kLayoutNames[layer.layout]);
  } else {
    return true;
  }
  return false;
}

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
 public:
  explicit Plugin(const Layer& layer) noexcept : layer_(layer) {
    fields_[0] = {"out_features", layer_.out, PluginFieldType::kINT32, layer_.parts};
    fields_[1] = {"in_features", &layer_.K, PluginFieldType::kINT32, 1};
    fields_[2] = {"rank", layer_.rank, PluginFieldType::kINT32, layer_.parts};
    fields_[3] = {"slot", &layer_.slot, PluginFieldType::kINT32, 1};
    fields_[4] = text("layout", kLayoutNames[layer_.layout]);
    fields_[5] = text("type", kTypeNames[layer_.type]);
    fields_[6] = text("values", kValueNames[layer_.int8]);
    collection_ = {kFields, fields_};
  }
  Plugin(const Plugin&) = delete;  // the fields point into the object

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  IPluginV3* clone() noexcept override {
    Plugin* const copy = new (std::nothrow) Plugin(layer_);
    if (copy) copy->device_ = device_;
    return copy;
  }

  AsciiChar const* getPluginName() const noexcept override { return kName; }
  AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

  // ---- building

  int32_t getNbOutputs() const noexcept override { return layer_.parts; }

  int32_t getOutputDataTypes(DataType* outputs, int32_t count, const DataType* inputs, int32_t input_count) const noexcept override {
    if (count != layer_.parts || input_count != kInputs)
      return complain("%d inputs and %d outputs; it has 5 and %d", input_count, count, layer_.parts), 1;
    for (int i = 0; i < count; i++) outputs[i] = inputs[0];
    return 0;
  }

  int32_t getOutputShapes(DimsExprs const* inputs, int32_t count, DimsExprs const*, int32_t, DimsExprs* outputs, int32_t output_count,
                          IExprBuilder& expressions) noexcept override {
    if (count != kInputs || output_count != layer_.parts || inputs[0].nbDims < 1)
      return complain("%d inputs, X of %d dimensions", count, count > 0 ? inputs[0].nbDims : 0), 1;
    for (int i = 0; i < output_count; i++) {
      outputs[i] = inputs[0];
      const IDimensionExpr* const N = outputs[i].d[outputs[i].nbDims - 1] = expressions.constant(layer_.out[i]);
      if (!N) return 1;
    }
    return 0;
  }

  bool supportsFormatCombination(int32_t at, DynamicPluginTensorDesc const* tensors, int32_t inputs, int32_t outputs) noexcept override {
    if (inputs != kInputs || outputs != layer_.parts || tensors[at].desc.format != TensorFormat::kLINEAR) return false;
    const DataType type = tensors[at].desc.type;
    if (at == 0) return type == type_of(layer_) || type == DataType::kFLOAT;
    if (at <= 3) return type == DataType::kINT32;
    if (at == 4) return type == DataType::kFLOAT;
    return type == tensors[0].desc.type;  // the outputs
  }

  int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t count, DynamicPluginTensorDesc const*, int32_t) noexcept override {
    if (count != kInputs) return complain("%d inputs; it has 5", count), 1;
    PluginTensorDesc tensors[kInputs];
    for (int i = 0; i < kInputs; i++) tensors[i] = in[i].desc, tensors[i].dims = in[i].max;
    return !shapes_fit(tensors);
  }

  size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t, DynamicPluginTensorDesc const*, int32_t) const noexcept override {
    const int M = tokens_of(in[0].max);
    return M < 1 ? 0 : workspace_bytes(layer_, M);
  }

  // ---- running

  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override {
    Plugin* const copy = new (std::nothrow) Plugin(layer_);
    if (!copy) return nullptr;
    int id = 0, major = 0;
    if (cudaGetDevice(&id) != cudaSuccess ||
        cudaDeviceGetAttribute(&copy->device_.multiprocessors, cudaDevAttrMultiProcessorCount, id) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id) != cudaSuccess ||
        cudaDeviceGetAttribute(&copy->device_.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, id) != cudaSuccess) {
      complain("the GPU cannot be asked for its properties");
    } else if (copy->device_.shared_bytes < kLeastShared) {
      complain("the GPU offers %d bytes of shared memory per block; at least %d are needed (sm_80 and later)", copy->device_.shared_bytes, kLeastShared);
    } else {
      copy->device_.early = major >= 9;
      return copy;
    }
    delete copy;
    return nullptr;
  }

  int32_t onShapeChange(PluginTensorDesc const* in, int32_t count, PluginTensorDesc const*, int32_t) noexcept override {
    if (count != kInputs) return complain("%d inputs; it has 5", count), 1;
    return !shapes_fit(in);
  }

  int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override {
    const int M = tokens_of(in[0].dims);
    if (M < 0) return 1;
    if (M == 0) return 0;
    for (const void* p : {inputs[1], inputs[2], inputs[3], static_cast<const void*>(workspace)})
      if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return complain("weights or workspace do not begin at a multiple of 16 bytes"), 1;
    Buffers buffers{inputs[0], inputs[1], inputs[2], inputs[3], static_cast<const float*>(inputs[4]), {}, workspace};
    for (int i = 0; i < layer_.parts; i++) buffers.y[i] = outputs[i];
    const cudaError_t error = run_layer(layer_, device_, buffers, M, in[0].type == DataType::kFLOAT, stream);
    if (error != cudaSuccess) complain("a kernel was not launched: %s", cudaGetErrorString(error));
    return error != cudaSuccess;
  }

  PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &collection_; }

 private:
  static PluginField text(const char* name, const char* value) noexcept {
    return {name, value, PluginFieldType::kCHAR, static_cast<int32_t>(std::strlen(value))};
  }

  // TensorRT knows nothing of how the weights' sizes belong together. A wrong one would be read out of bounds.
  bool shapes_fit(PluginTensorDesc const* in) const noexcept {
    const Dims& x = in[0].dims;
    if (x.nbDims < 1 || x.d[x.nbDims - 1] != layer_.K) {
      complain("X has %lld columns; in_features is %d", x.nbDims < 1 ? 0LL : static_cast<long long>(x.d[x.nbDims - 1]), layer_.K);
      return false;
    }
    if (tokens_of(x) < 0) return complain("X has too many rows"), false;
    constexpr int64_t kTileWords = kFragmentTile / 4;
    int64_t U = 0, V = static_cast<int64_t>(layer_.R()) / 16 * ceil_div(layer_.K, 64) * kTileWords;
    for (int i = 0; i < layer_.parts; i++) U += static_cast<int64_t>(layer_.row_tiles(i)) * (layer_.R(i) / 64) * kTileWords;
    const int64_t wanted[kInputs] = {0, words_of_S(layer_), U ? U : 4, V ? V : 4, layer_.N()};
    static constexpr const char* names[] = {"X", "S", "U", "V", "bias"};
    for (int i = 1; i < kInputs; i++) {
      const int64_t got = product(in[i].dims, 0, in[i].dims.nbDims);
      if (in[i].dims.nbDims != 1 || (i == 1 && layer_.layout == kAny ? got < wanted[i] : got != wanted[i])) {
        complain("%s has %lld elements in %d dimensions; %lld are expected in one", names[i], static_cast<long long>(got), in[i].dims.nbDims, static_cast<long long>(wanted[i]));
        return false;
      }
    }
    return true;
  }

  Layer layer_;
  Device device_;
  PluginField fields_[kFields];
  PluginFieldCollection collection_;
};

class Creator final : public IPluginCreatorV3One {
 public:
  IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* given, TensorRTPhase) noexcept override {
    Layer layer;
    unsigned found = 0;
    int counts[4] = {};
    for (int i = 0; given && i < given->nbFields; i++) {
      const PluginField& field = given->fields[i];
      const int at = index_of(field.name);
      if (at < 0) continue;  // TensorRT passes attributes of its own, and the operator's `version`
      if (!(at < 4 ? set_numbers(layer, at, field, counts) : set_choice(layer, at, field))) {
        complain("attribute %s has a value or type that this version does not know", field.name);
        return nullptr;
      }
      found |= 1u << at;
    }
    for (int at = 0; at < kFields; at++)
      if (!(found >> at & 1)) return complain("attribute %s is missing", kFieldNames[at]), nullptr;
    if (counts[0] != counts[2]) return complain("out_features has %d values, rank has %d", counts[0], counts[2]), nullptr;
    layer.parts = counts[0];
    return sound(layer) ? new (std::nothrow) Plugin(layer) : nullptr;
  }

  PluginFieldCollection const* getFieldNames() noexcept override {
    static PluginField fields[kFields];
    for (int i = 0; i < kFields; i++) fields[i] = {kFieldNames[i], nullptr, i < 4 ? PluginFieldType::kINT32 : PluginFieldType::kCHAR, 1};
    static PluginFieldCollection collection{kFields, fields};
    return &collection;
  }

  AsciiChar const* getPluginName() const noexcept override { return kName; }
  AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  static constexpr const char* kFieldNames[kFields] = {"out_features", "in_features", "rank", "slot", "layout", "type", "values"};

  static int index_of(const char* name) noexcept {
    for (int i = 0; i < kFields; i++)
      if (name && std::strcmp(name, kFieldNames[i]) == 0) return i;
    return -1;
  }

  // Text fields have a length; whether a final zero is counted differs between TensorRT's parser and its plans.
  static int choice(const PluginField& field, const char* const* names, int count) noexcept {
    const char* const text = static_cast<const char*>(field.data);
    int length = field.length;
    while (length > 0 && text[length - 1] == '\0') length--;
    for (int i = 0; i < count; i++)
      if (static_cast<int>(std::strlen(names[i])) == length && std::memcmp(names[i], text, length) == 0) return i;
    return -1;
  }

  static bool set_numbers(Layer& layer, int at, const PluginField& field, int* counts) noexcept {
    const int most = at % 2 == 0 ? kMaxParts : 1;
    if (field.type != PluginFieldType::kINT32 || field.length < 1 || field.length > most || !field.data) return false;
    int* const to[] = {layer.out, &layer.K, layer.rank, &layer.slot};
    std::memcpy(to[at], field.data, sizeof(int) * field.length);
    counts[at] = field.length;
    return true;
  }

  static bool set_choice(Layer& layer, int at, const PluginField& field) noexcept {
    if (field.type != PluginFieldType::kCHAR || !field.data) return false;
    const int value = at == 4 ? choice(field, kLayoutNames, 3) : choice(field, at == 5 ? kTypeNames : kValueNames, 2);
    if (at == 4) layer.layout = value;
    else if (at == 5) layer.type = value;
    else layer.int8 = value == 1;
    return value >= 0;
  }
};

}  // namespace
}  // namespace sslc

#define SSLC_EXPORT extern "C" __attribute__((visibility("default")))

SSLC_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static sslc::Creator creator;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
  count = 1;
  return creators;
}

SSLC_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { sslc::logger_finder = finder; }

// What library.py checks before TensorRT sees the file.
SSLC_EXPORT const char* sslc_trt_version() { return SSLC_VERSION; }
SSLC_EXPORT int sslc_trt_headers() { return NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100 + NV_TENSORRT_PATCH; }
