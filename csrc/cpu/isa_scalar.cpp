// SPDX-License-Identifier: Apache-2.0
// The kernels for scalar; nothing else may be included here, see [Note: ISA units] in isa_unit.inl.
#include "vec_scalar.h"

#include "isa_unit.inl"

DS_KERNELS(scalar)
