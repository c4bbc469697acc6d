// Marks what the library shows; everything else is hidden (CMakeLists.txt).
#pragma once

#define SSLC_EXPORT extern "C" __attribute__((visibility("default")))
