// Which instruction set the kernels use: the best that this processor has, or the one that is asked for.
#pragma once

#include <string>

#include "layer.h"

namespace sslc {

// The kernels for new layers: those of set_kernels(), else of the environment variable SSLC_KERNEL, else the best.
// nullptr, with the reason in *error, if SSLC_KERNEL cannot be had.
const Kernels* kernels(std::string* error);

// Chooses for layers made from now on; an empty name goes back to the default. False, with the reason, if impossible.
bool set_kernels(const std::string& name, std::string* error);

}  // namespace sslc
