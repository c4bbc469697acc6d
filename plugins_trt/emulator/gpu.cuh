// A GPU's memory, for the programs of the tests that run on one.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

inline void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// Memory with the bytes of `host`. It is never freed: the program ends soon.
inline void* to_gpu(const void* host, size_t bytes) {
  void* memory = nullptr;
  require(cudaMalloc(&memory, bytes ? bytes : 16), "cudaMalloc");
  require(cudaMemcpy(memory, host, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  return memory;
}

inline void from_gpu(void* host, const void* memory, size_t bytes) {
  require(cudaDeviceSynchronize(), "the kernels");
  require(cudaMemcpy(host, memory, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
}
