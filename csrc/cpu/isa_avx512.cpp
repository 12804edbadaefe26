// SPDX-License-Identifier: Apache-2.0
// The kernels for avx512; nothing else may be included here, see [Note: ISA units] in isa_unit.inl.
#include "vec_avx512.h"

#include "isa_unit.inl"

DS_KERNELS(avx512)
