# SPDX-License-Identifier: Apache-2.0
"""Arguments for the ops whose kernels give the bits of their references: casts, copies, quantization."""

from __future__ import annotations

import math

import torch

from tests.unit.ops.cases import BF16, F16, F32

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FLOATS = (F32, BF16, F16)
# groups and their size: less than a vector, its tails, more than a tile, more than a thread's part
GROUPS = ((1, 4), (3, 12), (5, 64), (7, 300), (2, 1028), (2, 40000))
# shape, size of groups, their dimension
WEIGHTS = (
    ((8, 64), 16, 1),
    ((8, 64), 4, 0),
    ((6, 5000), 2500, 1),
    ((6, 1500), 3, 0),
    ((4, 6, 10), 3, 1),
    ((2, 80000), 40000, 1),
)
FORMS = ((4, 3), (3, 2), (4, 7), (2, 1))


def numbers(numel, dtype):
    """Random numbers, one element late in memory, some of them small or zero."""
    x = torch.randn(numel + 1).mul(3).to(dtype)[1:]
    x[numel // 2 : numel // 2 + 2] *= 1e-3
    x[-1:] = 0
    return x


def wild(numel, dtype):
    """Numbers that no model has: any bits, the least there are, a small spread far from zero, what is not finite."""
    kind = torch.int32 if dtype is F32 else torch.int16
    most = 1 << (8 * dtype.itemsize - 1)
    yield torch.randint(-most, most, (numel,)).to(kind).view(dtype)
    for factor, offset in ((1e-38, 0), (1e-44, 0), (1e-3, 1e30), (1e-3, -300), (1, 0)):
        x = torch.randn(numel).mul(factor).add(offset).to(dtype)
        yield x
        x = x.clone()
        x[numel // 3], x[-1] = math.inf, math.nan
        yield x
    yield torch.full((numel,), -0.0).to(dtype)


def quantize_groups():
    for groups, size in GROUPS:
        for dtype in FLOATS:
            for bits in (8, 6, 4):
                for asym in (False, True):
                    x = numbers(groups * size, dtype)
                    for seed in (-1, 7):
                        yield x, groups, bits, asym, seed


def fake_quantize():
    for x, groups, bits, asym, seed in quantize_groups():
        yield x, groups, {8: 11, 6: 3, 4: 1}[bits], asym, seed


def dequantize_groups():
    for groups, size in GROUPS:
        for dtype in FLOATS:
            for bits in (8, 6, 4):
                codes = torch.randint(-128, 128, (groups * size * bits // 8,), dtype=torch.int8)
                yield codes, torch.rand(groups, 1), groups, bits, False, dtype
                yield codes, torch.randn(groups, 2), groups, bits, True, dtype


def quantize_weight():
    for shape, size, dim in WEIGHTS:
        for dtype in FLOATS:
            for bits in (8, 4):
                for symmetric in (False, True):
                    x = torch.randn(shape).to(dtype)
                    yield x, bits, size, dim, symmetric


def dequantize_weight():
    for shape, size, dim in WEIGHTS:
        for dtype in FLOATS:
            for bits in (8, 4):
                codes = torch.randint(0, 256, (*shape[:-1], shape[-1] * bits // 8)).to(torch.uint8)
                sides = (*shape[:dim], shape[dim] // size, 1, *shape[dim + 1 :])
                scale, least = (torch.randn(sides).to(dtype) for _ in range(2))
                yield codes, scale, least, bits, size, dim, False, dtype
                yield codes, scale, torch.empty(0, dtype=dtype), bits, size, dim, True, dtype


def fp_quantize():
    for groups, size in GROUPS:
        for dtype in FLOATS:
            x = numbers(groups * size, dtype)
            for form in FORMS:
                for seed in (-1, 7):
                    yield x, size, *form, seed


def fp_dequantize():
    for groups, size in GROUPS:
        for dtype in FLOATS:
            for exponent, mantissa in FORMS:
                bits = 1 + exponent + mantissa
                packed = torch.randint(0, 256, (groups, size * bits // 8 + 4)).to(torch.uint8)
                packed[:, -4:] = torch.rand(groups, 1).view(torch.uint8)
                yield packed, size, exponent, mantissa, dtype, None, 1
                rows = torch.randint(0, groups, (4,))
                yield packed, size, exponent, mantissa, dtype, rows, 1


def cast():
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    bytes_ = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    singles = torch.randint(-(1 << 31), 1 << 31, (70001,)).to(torch.int32).view(F32)
    for x in (
        torch.empty(0),
        halves.view(BF16),
        halves.view(F16),
        torch.cat([halves.view(BF16).float(), singles, between(E4M3), between(E5M2)])[1:],
        bytes_.view(E4M3),
        bytes_.view(E5M2),
    ):
        for dtype in (*FLOATS, E4M3, E5M2):
            yield x, torch.empty(x.shape, dtype=dtype)


def between(dtype):
    """The numbers halfway between neighbours of an 8-bit dtype, and their own neighbours in fp32."""
    whole = torch.arange(0x7C, dtype=torch.int32).to(torch.uint8).view(dtype).float()
    middle = torch.cat([(whole[1:] + whole[:-1]) / 2, torch.tensor([464.0, 480.0, 61440.0, 1e9])])
    around = [torch.nextafter(middle, middle * factor) for factor in (0, 1, 2)]
    return torch.cat([*around, *(-x for x in around)])


def _pieces(dtypes):
    return [torch.randn(n).to(dtype) for n, dtype in zip((7, 0, 1, 70001, 64), dtypes, strict=True)]


def flatten():
    for flat in FLOATS:
        for dtypes in ((F32,) * 5, (F32, F32, BF16, F16, E5M2)):
            yield torch.empty(70073, dtype=flat), _pieces(dtypes)


def unflatten():
    for out, pieces in flatten():
        yield torch.randn(out.shape).to(out.dtype), pieces


# op -> what makes its arguments, places of the arguments that it writes
EXACT = {
    "cast": (cast, (1,)),
    "flatten": (flatten, (0,)),
    "unflatten": (unflatten, (1,)),
    "quantize_groups": (quantize_groups, ()),
    "dequantize_groups": (dequantize_groups, ()),
    "fake_quantize": (fake_quantize, (0,)),
    "quantize_weight": (quantize_weight, ()),
    "dequantize_weight": (dequantize_weight, ()),
    "fp_quantize": (fp_quantize, ()),
    "fp_dequantize": (fp_dequantize, ()),
}


def run(op, args, written):
    """Call the op on copies; return all that it wrote and returned, as a list of tensors."""
    copies = [
        a.clone()
        if isinstance(a, torch.Tensor)
        else [t.clone() for t in a]
        if isinstance(a, list)
        else a
        for a in args
    ]
    result = op(*copies)
    made = [copies[i] for i in written] + [result]
    flat = []
    for item in made:
        flat += item if isinstance(item, (list, tuple)) else [] if item is None else [item]
    return flat


def same(a, b):
    """Whether two tensors hold the same numbers; one NaN is as good as another, and so is a zero of either sign."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    a, b = a.float(), b.float()
    return bool(((a == b) | a.isnan() & b.isnan()).all())
