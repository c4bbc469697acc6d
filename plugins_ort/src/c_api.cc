// C entries for plugins_ort/library.py, the tests and the benchmarks. No exception leaves them; a function that can
// fail says why in sslc_last_error() of the same thread.
#include <atomic>
#include <exception>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "counters.h"
#include "dispatch.h"
#include "export.h"
#include "forward.h"

namespace {

thread_local std::string last_error;

// Runs body; on an exception sets the error and returns `failure`.
template <class Result, class Body>
Result guard(Result failure, const Body& body) noexcept {
  try {
    last_error.clear();
    return body();
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "unknown C++ exception";
  }
  return failure;
}

// Threads for callers without a session; made anew for each call.
void run_on_threads(int threads, void (*task)(void*, size_t), size_t count, void* user) {
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next++; i < count; i = next++) task(user, i);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (std::thread& thread : others) thread.join();
}

}  // namespace

SSLC_EXPORT const char* sslc_version() { return SSLC_VERSION; }

SSLC_EXPORT const char* sslc_last_error() { return last_error.c_str(); }

// The kernel that new layers get, or nullptr if SSLC_KERNEL asks for one that this processor cannot run.
SSLC_EXPORT const char* sslc_kernel_name() {
  return guard<const char*>(nullptr, [] {
    const sslc::Kernels* kernels = sslc::kernels(&last_error);
    return kernels == nullptr ? nullptr : kernels->name;
  });
}

// Chooses the kernel of layers made from now on; "" goes back to the default. Not 0 on failure.
SSLC_EXPORT int sslc_set_kernel(const char* name) {
  return guard(1, [&] { return sslc::set_kernels(name, &last_error) ? 0 : 1; });
}

SSLC_EXPORT int64_t sslc_layers_alive() { return sslc::layers_alive; }

SSLC_EXPORT int64_t sslc_op_calls() { return sslc::op_calls; }

// A layer on borrowed weights, without a session. dtype: 1 float32, 2 int4 in uint8, 3 int8, 16 bfloat16; scales only for
// int4 and int8, else nullptr. value_count: elements of `values`. activation_bits: 16 or 8. nullptr on failure.
SSLC_EXPORT void* sslc_layer_create(int dtype, int64_t N, int64_t K, int64_t r, const void* bitmap, const void* values,
                                    int64_t value_count, const void* U, const void* V, const void* bias,
                                    const void* scales, int activation_bits) {
  return guard<void*>(nullptr, [&]() -> void* {
    const sslc::Kernels* kernels = sslc::kernels(&last_error);
    if (kernels == nullptr) return nullptr;
    sslc::Layer layer{};
    layer.dtype = static_cast<sslc::Dtype>(dtype);
    layer.N = N;
    layer.K = K;
    layer.r = r;
    layer.words = (K + sslc::kBlock - 1) / sslc::kBlock;
    layer.bitmap = static_cast<const uint8_t*>(bitmap);
    layer.values = static_cast<const uint8_t*>(values);
    layer.U = static_cast<const uint8_t*>(U);
    layer.V = static_cast<const uint8_t*>(V);
    layer.bias = static_cast<const uint8_t*>(bias);
    layer.scales = static_cast<const uint8_t*>(scales);
    layer.activation_bits = activation_bits;
    auto prepared = std::make_unique<sslc::PreparedLayer>();
    return prepared->prepare(layer, value_count, kernels, &last_error) ? prepared.release() : nullptr;
  });
}

SSLC_EXPORT void sslc_layer_destroy(void* layer) { delete static_cast<sslc::PreparedLayer*>(layer); }

// Y [M, N] = X [M, K] (S + U V)^T + bias. Not 0 on failure.
SSLC_EXPORT int sslc_layer_forward(const void* layer, const float* x, int64_t M, float* y, int threads) {
  return guard(1, [&] {
    const sslc::Parallel parallel{&threads, [](void* context, void (*task)(void*, size_t), size_t count, void* user) {
                                    run_on_threads(*static_cast<int*>(context), task, count, user);
                                  }};
    static_cast<const sslc::PreparedLayer*>(layer)->forward(x, M, y, parallel);
    return 0;
  });
}

// Reads `bytes` bytes once with `threads` threads, for measuring the bandwidth of memory. Not 0 on failure.
SSLC_EXPORT int sslc_read(const void* data, int64_t bytes, int threads) {
  return guard(1, [&] {
    struct Pass {
      const sslc::Kernels* kernels;
      const uint8_t* data;
      int64_t bytes;
      std::atomic<uint64_t> result;  // keeps the reading from being optimized away
    } pass{sslc::kernels(&last_error), static_cast<const uint8_t*>(data), bytes, {0}};
    if (pass.kernels == nullptr) return 1;
    constexpr int64_t kPieces = 64;
    run_on_threads(
        threads,
        [](void* user, size_t i) {
          Pass& pass = *static_cast<Pass*>(user);
          const int64_t piece = static_cast<int64_t>(i), begin = pass.bytes * piece / kPieces;
          pass.result += pass.kernels->read(pass.data + begin, pass.bytes * (piece + 1) / kPieces - begin);
        },
        kPieces, &pass);
    return 0;
  });
}
