#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <vector>

#if defined SSLC_AMX && !defined SSLC_EMULATE
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sslc {

extern const Kernels kPortable;
// In a test build with SSLC_EMULATE the AVX-512 kernels run on any processor, and there is no AVX2.
#if defined SSLC_X86 || defined SSLC_EMULATE
extern const Kernels kAvx512;
extern const LaneKernels kAvx512Bf16Pairs;
#endif
#ifdef SSLC_X86
extern const Kernels kAvx2;
#endif
#ifdef SSLC_AMX
extern const Kernels kAmx;
#endif

namespace {

std::atomic<const Kernels*> forced{nullptr};

#if defined SSLC_X86 || defined SSLC_EMULATE
const Kernels* avx512_bf16() {
  static const Kernels kernels = [] {
    Kernels made = kAvx512;
    made.name = "avx512_bf16";
    made.bf16_pairs = kAvx512Bf16Pairs;
    return made;
  }();
  return &kernels;
}
#endif

#if defined SSLC_AMX && !defined SSLC_EMULATE
// Whether this processor has AMX with bfloat16 and int8, and Linux lets this process use it: it has to be asked, once for
// all threads.
bool amx() {
  static const bool allowed = [] {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return allowed;
}
#endif

// Best first. __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#ifdef SSLC_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt")) {
#ifdef SSLC_AMX
    if (__builtin_cpu_supports("avx512bf16") && amx()) found.push_back(&kAmx);
#endif
    // Intel's vdpbf16ps is slower than float32 products: 1.1 to 2.3 times on an Emerald Rapids without AMX.
    const bool bf16 = __builtin_cpu_supports("avx512bf16"), slow = __builtin_cpu_is("intel");
    if (bf16 && !slow) found.push_back(avx512_bf16());
    found.push_back(&kAvx512);
    if (bf16 && slow) found.push_back(avx512_bf16());
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt"))
    found.push_back(&kAvx2);
#endif
#ifdef SSLC_EMULATE
  found.push_back(&kAmx);
  found.push_back(avx512_bf16());
  found.push_back(&kAvx512);
#endif
  found.push_back(&kPortable);
  return found;
}

const Kernels* named(const std::string& name, const char* asker, std::string* error) {
  std::string names;
  for (const Kernels* kernels : available()) {
    if (name == kernels->name) return kernels;
    names += names.empty() ? kernels->name : std::string(", ") + kernels->name;
  }
  *error = std::string(asker) + " asks for the kernel '" + name + "'; this processor can run: " + names;
  return nullptr;
}

}  // namespace

const Kernels* kernels(std::string* error) {
  if (const Kernels* chosen = forced.load()) return chosen;
  const char* wanted = std::getenv("SSLC_KERNEL");
  if (wanted != nullptr && *wanted != '\0') return named(wanted, "The environment variable SSLC_KERNEL", error);
  return available().front();
}

bool set_kernels(const std::string& name, std::string* error) {
  const Kernels* chosen = name.empty() ? nullptr : named(name, "sslc_set_kernel", error);
  if (!name.empty() && chosen == nullptr) return false;
  forced.store(chosen);
  return true;
}

}  // namespace sslc
