// SPDX-License-Identifier: Apache-2.0
// What the running CPU, and the operating system on it, can execute.
#pragma once

namespace ds {

bool cpu_has_clmul();   // carry-less multiplication of 64 bits
bool cpu_has_wide_clmul();  // the same in registers of 512 bits
bool cpu_has_avx2();    // AVX2 and F16C
bool cpu_has_avx512();  // AVX-512 F, BW, DQ and VL

}  // namespace ds
