// SPDX-License-Identifier: Apache-2.0
// The launch table of multi-tensor kernels: many tensors, one launch.
//
// One row of eight i64 a tensor: first block, elements, five addresses, dtype codes (four bits an address). A block
// takes `chunk` elements of one tensor and finds its row by bisection, so the table grows with the tensors and not
// with their elements, and tensors of different dtypes share a launch.
#pragma once
#include "base.cuh"

enum { kColumns = 8 };

struct Part {
    i64 begin, end, numel;
    void *at[5];  // param, first moment, second moment, gradient, low copy; absent ones are null
    i32 code[5];
    i32 row;
    bool by4;
};

DS_FN i32 row_of_block(const i64 *table, i32 tensors, i64 block) {
    i32 low = 0, high = tensors - 1;
    while (low < high) {
        const i32 middle = (low + high + 1) / 2;
        if (table[(i64)middle * kColumns] <= block) low = middle;
        else high = middle - 1;
    }
    return low;
}

DS_FN Part part_of_block(const i64 *table, i32 tensors, i32 chunk) {
    Part part;
    part.row = row_of_block(table, tensors, blockIdx.x);
    const i64 *row = table + (i64)part.row * kColumns;
    part.numel = row[1];
    part.begin = ((i64)blockIdx.x - row[0]) * chunk;
    part.end = part.begin + chunk < part.numel ? part.begin + chunk : part.numel;
    part.by4 = true;
    for (i32 i = 0; i < 5; ++i) {
        part.at[i] = (void *)row[2 + i];
        part.code[i] = (i32)(row[7] >> (4 * i)) & 15;
        part.by4 = part.by4 && aligned4(part.at[i], part.code[i]);
    }
    return part;
}
