// A stand-in for libcudart.so.13, for a plugin that was built with a shared CUDA runtime: device memory is host memory,
// and launching a kernel runs the CPU emulator's kernel of the same (mangled) name with the very arguments that the
// plugin passed. So the plugin's own host code, compiled by nvcc, is driven to a real result without a GPU.
//
// Only what the plugin calls is here. Limits of launches are checked as a GPU of 99 KiB shared memory would.
#include <dlfcn.h>

#include <cstring>
#include <vector>

#include "../src/launch.h"

// Takes the address of every kernel, so that each is in this library under its name.
extern "C" int sslc_all_kernels(const sslc::Layer& layer, const sslc::Device& device, const sslc::Buffers& buffers, int M) {
  return sslc::run_layer(layer, device, buffers, M, false, nullptr);
}

namespace {

struct Entry { const void* host; const char* name; };
struct Configuration { dim3 grid, block; size_t shared; void* stream; };
std::vector<Entry> kernels;
std::vector<Configuration> configurations;
std::vector<std::pair<const void*, int>> shared_limits;
int last_error = 0, launches = 0;

constexpr int kInvalidValue = 1, kInvalidConfiguration = 9, kInvalidFunction = 98;

template <class Args> int run(const char* name, dim3 grid, dim3 block, size_t shared, void** arguments) {
  auto kernel = reinterpret_cast<void (*)(Args)>(dlsym(RTLD_DEFAULT, name));
  if (!kernel) return kInvalidFunction;
  Args copy;
  std::memcpy(&copy, arguments[0], sizeof copy);
  emulator::launch(grid, block, shared, [&] { kernel(copy); });
  return 0;
}

int launch(const void* host, dim3 grid, dim3 block, size_t shared, void** arguments) {
  int limit = 48 << 10;
  for (auto& [kernel, bytes] : shared_limits) if (kernel == host) limit = bytes;
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || block.x > 1024 || shared > static_cast<size_t>(limit)) return kInvalidConfiguration;
  for (const Entry& e : kernels) {
    if (e.host != host) continue;
    launches++;
    if (std::strstr(e.name, "6decode")) return run<sslc::DecodeArgs>(e.name, grid, block, shared, arguments);
    if (std::strstr(e.name, "6reduce")) return run<sslc::ReduceArgs>(e.name, grid, block, shared, arguments);
    if (std::strstr(e.name, "6expand")) return run<sslc::ExpandArgs>(e.name, grid, block, shared, arguments);
    if (std::strstr(e.name, "7convert")) return run<sslc::ConvertArgs>(e.name, grid, block, shared, arguments);
    if (std::strstr(e.name, "4gemm")) return run<sslc::GemmArgs>(e.name, grid, block, shared, arguments);
  }
  return kInvalidFunction;
}

}  // namespace

extern "C" {

int stand_in_launches() { return launches; }

// What nvcc's generated code calls when the library is loaded and at each <<<>>>.
void** __cudaRegisterFatBinary(void*) { static void* handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) { kernels.push_back({host, name}); }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
int __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) { configurations.push_back({grid, block, shared, stream}); return 0; }
int __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void** stream) {
  if (configurations.empty()) return kInvalidConfiguration;
  const Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared, *stream = c.stream;
  return 0;
}
int __cudaGetKernel(const void** kernel, const void* host) { *kernel = host; return 0; }
int cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared, void*) { return last_error = launch(host, grid, block, shared, arguments); }
// cudaLaunchConfig_t; its attributes say when a kernel may start, and here one runs after the other.
struct LaunchConfig { dim3 grid, block; size_t shared; void* stream; const void* attributes; unsigned count; };
int cudaLaunchKernelExC(const LaunchConfig* c, const void* host, void** arguments) { return last_error = launch(host, c->grid, c->block, c->shared, arguments); }
int __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, void* stream) { return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream); }

int cudaFuncSetAttribute(const void* host, int attribute, int value) {
  if (attribute != 8 || value > 99 << 10) return last_error = kInvalidValue;  // cudaFuncAttributeMaxDynamicSharedMemorySize
  shared_limits.push_back({host, value});
  return 0;
}
int cudaGetDevice(int* device) { *device = 0; return 0; }
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  if (attribute == 16) *value = 4;               // cudaDevAttrMultiProcessorCount
  else if (attribute == 75) *value = 9;          // cudaDevAttrComputeCapabilityMajor: kernels may start early
  else if (attribute == 97) *value = 99 << 10;   // cudaDevAttrMaxSharedMemoryPerBlockOptin
  else return kInvalidValue;
  return 0;
}
int cudaGetLastError() { const int e = last_error; last_error = 0; return e; }
int cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(int error) { return error ? "an error of the CUDA runtime stand-in" : "no error"; }
}
