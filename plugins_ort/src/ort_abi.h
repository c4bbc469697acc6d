// The part of ONNX Runtime's C ABI that the op uses, declared by position, because the wheels ship no headers.
//
// OrtApi is a table of function pointers that only ever grows at its end: the runtime's own source asserts the size of
// every released version ("Size of version N API cannot change"), and GetApi(N) returns it to any later runtime too.
// The positions and the layout of OrtCustomOp below were compared by offsetof() with the official
// include/onnxruntime/core/session/onnxruntime_c_api.h of API versions 24 and 29, which agree. A wrong one would be
// seen at once: each of these entries is used by the tests that run the op in a session.
#pragma once

#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtCustomOpDomain;
struct OrtSessionOptions;
struct OrtShapeInferContext;
struct OrtTensorTypeAndShapeInfo;
struct OrtApi;

enum OrtErrorCode : int32_t { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum ONNXTensorElementDataType : int32_t {
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED = 0,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 = 3,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 = 6,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 = 10,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 = 16,
};
enum OrtCustomOpInputOutputCharacteristic : int32_t { INPUT_OUTPUT_REQUIRED = 0, INPUT_OUTPUT_OPTIONAL = 1 };
enum OrtMemType : int32_t { OrtMemTypeDefault = 0 };

constexpr uint32_t kOrtApiVersion = 17;  // onnxruntime 1.17, the first with all of these

struct OrtApi {
  using Unused = void (*)();
  OrtStatus* (*CreateStatus)(OrtErrorCode, const char* message);  // 0
  Unused unused_1[25];
  OrtStatus* (*CreateCustomOpDomain)(const char* domain, OrtCustomOpDomain** out);  // 26
  OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain*, const struct OrtCustomOp*);  // 27
  OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions*, OrtCustomOpDomain*);          // 28
  Unused unused_29[22];
  OrtStatus* (*GetTensorMutableData)(OrtValue*, void** out);  // 51
  Unused unused_52[8];
  OrtStatus* (*GetTensorElementType)(const OrtTensorTypeAndShapeInfo*, ONNXTensorElementDataType* out);  // 60
  OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo*, size_t* out);                       // 61
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo*, int64_t* dims, size_t count);            // 62
  Unused unused_63[2];
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue*, OrtTensorTypeAndShapeInfo** out);  // 65
  Unused unused_66[20];
  OrtStatus* (*KernelInfoGetAttribute_int64)(const OrtKernelInfo*, const char* name, int64_t* out);  // 86
  // Two calls: with out = nullptr for the size (with the final zero), then for the text.
  OrtStatus* (*KernelInfoGetAttribute_string)(const OrtKernelInfo*, const char* name, char* out, size_t* size);  // 87
  Unused unused_88[2];
  OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext*, size_t index, const OrtValue** out);  // 90
  OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext*, size_t index, const int64_t* dims, size_t count,
                                        OrtValue** out);  // 91
  Unused unused_92[1];
  void (*ReleaseStatus)(OrtStatus*);  // 93
  Unused unused_94[5];
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo*);  // 99
  Unused unused_100[144];
  OrtStatus* (*KernelInfo_GetNodeName)(const OrtKernelInfo*, char* out, size_t* size);  // 244
  Unused unused_245[4];
  OrtStatus* (*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo*, size_t index, int* is_constant,
                                                  const OrtValue** out);  // 249
  Unused unused_250[24];
  // Tasks are handed out one by one to the session's threads if batches == 0. The user pointer must not be null.
  OrtStatus* (*KernelContext_ParallelFor)(const OrtKernelContext*, void (*task)(void*, size_t), size_t total,
                                          size_t batches, void* user);  // 274
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);  // nullptr if the runtime is older
  const char* (*GetVersionString)();
};

// Laid out as of API version 17. The runtime reads no further than `version` allows.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  ONNXTensorElementDataType (*GetInputType)(const OrtCustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  ONNXTensorElementDataType (*GetOutputType)(const OrtCustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  OrtCustomOpInputOutputCharacteristic (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);
  OrtCustomOpInputOutputCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  OrtMemType (*GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
};

#define SSLC_ORT_POSITION(entry, position) \
  static_assert(offsetof(OrtApi, entry) == (position) * sizeof(void*), "wrong position of " #entry)
SSLC_ORT_POSITION(AddCustomOpDomain, 28);
SSLC_ORT_POSITION(GetTensorMutableData, 51);
SSLC_ORT_POSITION(GetDimensions, 62);
SSLC_ORT_POSITION(GetTensorTypeAndShape, 65);
SSLC_ORT_POSITION(KernelInfoGetAttribute_int64, 86);
SSLC_ORT_POSITION(KernelInfoGetAttribute_string, 87);
SSLC_ORT_POSITION(KernelContext_GetOutput, 91);
SSLC_ORT_POSITION(ReleaseStatus, 93);
SSLC_ORT_POSITION(ReleaseTensorTypeAndShapeInfo, 99);
SSLC_ORT_POSITION(KernelInfo_GetNodeName, 244);
SSLC_ORT_POSITION(KernelInfoGetConstantInput_tensor, 249);
SSLC_ORT_POSITION(KernelContext_ParallelFor, 274);
#undef SSLC_ORT_POSITION
static_assert(offsetof(OrtCustomOp, CreateKernelV2) == 17 * sizeof(void*));
static_assert(sizeof(OrtCustomOp) == 22 * sizeof(void*));
