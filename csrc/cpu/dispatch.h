// SPDX-License-Identifier: Apache-2.0
// The kernels of the instruction set in use.
#pragma once

#include "kernels.h"

namespace ds {

const Kernels *kernels();

}  // namespace ds
