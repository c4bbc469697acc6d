// What an application can ask to know that its layers really run here.
#pragma once

#include <atomic>
#include <cstdint>

namespace sslc {

inline std::atomic<int64_t> layers_alive{0};  // op instances in all open sessions
inline std::atomic<int64_t> op_calls{0};

}  // namespace sslc
