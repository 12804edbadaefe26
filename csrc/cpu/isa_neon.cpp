// SPDX-License-Identifier: Apache-2.0
// The kernels for neon; nothing else may be included here, see [Note: ISA units] in isa_unit.inl.
#include "vec_neon.h"

#include "isa_unit.inl"

DS_KERNELS(neon)
