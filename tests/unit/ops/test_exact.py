# SPDX-License-Identifier: Apache-2.0
"""Casts, copies and quantization: on every path of the machine the bits of the torch references."""

from __future__ import annotations

import math

import pytest
import torch

from deepspeed.ops import registry
from deepspeed.ops.copies import flatten, unflatten
from deepspeed.ops.lamb import FusedLamb
from tests.unit.ops import exact_cases
from tests.unit.ops.cases import BF16, F16, F32
from tests.unit.ops.exact_cases import EXACT, FORMS, run, same

OPS = sorted(EXACT)


@pytest.mark.parametrize("name", OPS)
def test_native_gives_the_bits_of_the_reference(isa, name):
    op, (make, written) = registry.ops()[name], EXACT[name]
    for args in make():
        assert op.pack is not None and op.pack(*args) is not None
        pairs = zip(run(op, args, written), run(op.reference, args, written), strict=True)
        told = [a if not isinstance(a, (torch.Tensor, list)) else "tensors" for a in args]
        assert all(same(a, b) for a, b in pairs), told


@pytest.mark.parametrize("groups, size", [(9, 64), (2, 1028), (3, 20)])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_wild_numbers_give_the_bits_of_the_scalar_path(isa, dtype, groups, size):
    ops = registry.ops()

    def made(x):
        for bits in (8, 6, 4):
            for asym in (False, True):
                codes, params = ops["quantize_groups"](x, groups, bits, asym, -1)
                yield codes
                yield params
                yield ops["dequantize_groups"](codes, params, groups, bits, asym, dtype)
                if bits == 6:
                    continue  # weights have no such codes
                codes, scale, least = ops["quantize_weight"](x, bits, size, 1, not asym)
                yield from (codes, scale, least)
                yield ops["dequantize_weight"](codes, scale, least, bits, size, 1, not asym, dtype)
        for form in FORMS:
            packed = ops["fp_quantize"](x, size, *form, -1)
            yield packed
            yield ops["fp_dequantize"](packed, size, *form, dtype, None, 1)

    for x in exact_cases.wild(groups * size, dtype):
        x = x.view(groups, size)
        got = list(made(x))
        registry.use_isa("scalar")
        expected = list(made(x))
        registry.use_isa(isa)
        assert all(same(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    if not hasattr(torch.library, "opcheck"):
        pytest.skip("torch.library.opcheck came with torch 2.4")
    args = next(iter(EXACT[name][0]()))
    torch.library.opcheck(getattr(torch.ops.deepspeed, name).default, tuple(args))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_a_damaged_value_shows_in_its_group_and_in_no_other(isa, dtype, bad):
    ops = registry.ops()
    x = torch.randn(4, 300).to(dtype)
    x[1, 157] = bad
    others = [0, 2, 3]
    for asym in (False, True):
        for op in (ops["quantize_groups"], ops["quantize_groups"].reference):
            codes, params = op(x, 4, 8, asym, -1)
            back = ops["dequantize_groups"](codes, params, 4, 8, asym, F32).view(4, 300)
            assert not back[1].isfinite().all()
            assert (back[others] - x[others].float()).abs().max() < 0.1
    for symmetric in (False, True):
        codes, scale, least = ops["quantize_weight"](x, 8, 300, 1, symmetric)
        back = ops["dequantize_weight"](codes, scale, least, 8, 300, 1, symmetric, dtype).float()
        assert not back[1].isfinite().all()
        assert (back[others] - x[others].float()).abs().max() < 0.1
    for form in FORMS:
        packed = ops["fp_quantize"](x, 300, *form, -1)
        back = ops["fp_dequantize"](packed, 300, *form, F32, None, 1)
        assert not back[1].isfinite().all()
        assert back[others].isfinite().all()


def test_strides_addresses_and_dtypes_that_kernels_lack_are_served():
    ops = registry.ops()
    wide = torch.randn(6, 8)
    for x in (wide.t(), wide[:, ::2], wide.double()):
        for name, rule in (("quantize_groups", (2, 8, False, -1)), ("fp_quantize", (4, 4, 3, -1))):
            got, plain = ops[name](x, *rule), ops[name].reference(x.contiguous(), *rule)
            assert all(same(a, b) for a, b in zip([*got], [*plain], strict=True))
    # memory that starts at an odd address
    odd = torch.frombuffer(bytearray(41), dtype=torch.uint8)[1:].view(-1)
    halves = torch.frombuffer(memoryview(bytearray(81))[1:], dtype=torch.bfloat16, count=40)
    halves.copy_(torch.randn(40))
    assert halves.data_ptr() % 2 == 1 or odd.data_ptr() % 2 == 1
    out = torch.empty(40)
    ops["cast"](halves, out)
    assert torch.equal(out, halves.float())


def test_flattening_and_its_inverse_keep_every_value(isa):
    pieces = [torch.randn(3, 5), torch.randn(()), torch.randn(0), torch.randn(4, 2).t()]
    flat = torch.empty(24)
    flatten(flat, pieces)
    assert torch.equal(flat, torch.cat([piece.reshape(-1) for piece in pieces]))
    back = [torch.empty(piece.shape) for piece in pieces]
    unflatten(flat, back)
    assert all(torch.equal(a, b) for a, b in zip(back, pieces, strict=True))
    for op in (flatten, unflatten):
        with pytest.raises(ValueError, match="as long as its pieces"):
            op(flat[1:], pieces)


@pytest.mark.parametrize("name", ["quantize_groups", "fp_quantize", "quantize_weight"])
def test_threads_do_not_show(isa, name, monkeypatch):
    make, written = EXACT[name]
    args = list(make())[-1]
    monkeypatch.setattr("deepspeed.ops.packing._forced_threads", 1)
    alone = run(registry.ops()[name], args, written)
    monkeypatch.setattr("deepspeed.ops.packing._forced_threads", 3)
    assert all(
        same(a, b) for a, b in zip(alone, run(registry.ops()[name], args, written), strict=True)
    )


def test_casts_keep_the_sign_of_zero(isa):
    for dtype in (*exact_cases.FLOATS, exact_cases.E4M3, exact_cases.E5M2):
        for to in (*exact_cases.FLOATS, exact_cases.E4M3, exact_cases.E5M2):
            out = torch.empty(18, dtype=to)
            registry.ops()["cast"](torch.full((18,), -0.0).to(dtype), out)
            assert bool(torch.signbit(out.float()).all())


def test_fp8_is_that_of_torch_where_torch_has_it():
    values = exact_cases.between(torch.float8_e4m3fn)
    values = values[values.abs() <= 448]
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        out = torch.empty(values.shape, dtype=dtype)
        registry.ops()["cast"](values, out)
        assert torch.equal(out.view(torch.uint8), values.to(dtype).view(torch.uint8))


def test_ds_quantizer_rounds_in_place_group_by_group():
    from deepspeed.ops.quantizer import ds_quantizer

    x = torch.cat([torch.linspace(-1, 1, 64), torch.linspace(-100, 100, 64)])
    for stochastic in (False, True):
        for asym in (False, True):
            y = x.clone()
            assert ds_quantizer(y, groups=2, bit_num=4, sr=stochastic, asym=asym) is y
            # half a step of 2/16 and 200/16 (a whole one by chance), and the top code is one step short
            within = 2.0 if stochastic or not asym else 1.01
            assert (y - x)[:64].abs().max() <= within / 8 + 1e-6
            assert (y - x)[64:].abs().max() <= within * 100 / 8 + 1e-4
            assert len(y[:64].unique()) <= 16


def test_small_floats_on_and_beside_a_border_between_codes_are_those_of_division(isa):
    op = registry.ops()["fp_quantize"]
    for exponent, mantissa in FORMS:
        codes = torch.arange(1 << (exponent + mantissa), dtype=torch.int32).to(torch.int16)
        width = 1 + exponent + mantissa
        bias, most = (1 << (exponent - 1)) - 1, codes[-1]
        size = codes.double()
        fraction = size % (1 << mantissa) / (1 << mantissa)
        power = (size / (1 << mantissa)).floor()
        values = torch.where(
            power == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (power - bias)
        )
        assert width in (4, 6, 8, 12) and float(values[most]) == float(values.max())
        borders = (values[1:] + values[:-1]) / 2
        top = float(values.max())
        for greatest in (top, 1.0, 0.7, 3e-5):  # the scale is a power of two, or it rounds
            exact = torch.cat([borders, values]).mul(greatest / top).float()
            steps = [exact]
            for _ in range(5):
                steps.append(torch.nextafter(steps[-1], torch.tensor(math.inf)))
            x = torch.cat([*steps, -exact]).clamp(-greatest, greatest)
            x = torch.cat([x, x.new_zeros(-x.numel() % 64)])
            x[-1] = greatest
            for dtype in (F32, BF16):
                row = x.to(dtype).view(1, -1)
                got = op(row, row.numel(), exponent, mantissa, -1)
                plain = op.reference(row, row.numel(), exponent, mantissa, -1)
                assert same(got, plain), (exponent, mantissa, greatest, dtype)


def test_lamb_of_every_bf16_second_moment_gives_the_bits_of_the_scalar_path(isa):
    # each bit pattern from zero to infinity, and NaN; roots of ordinary ones are found in a way of their own
    moments = torch.arange(0x7FC1, dtype=torch.int32).to(torch.int16).view(BF16)
    param = torch.randn(moments.numel()).to(BF16)
    made = []
    for path in (isa, "scalar"):
        registry.use_isa(path)
        parts = [param.clone(), param.clone(), moments.clone()]
        rule = {"lr": 0.01, "eps": 1e-8, "weight_decay": 0.01}
        param_of = torch.nn.Parameter(parts[0])
        param_of.grad = torch.zeros_like(param)
        optimizer = FusedLamb([param_of], betas=(0.9, 1.0), **rule)
        optimizer.state[param_of].update(step=3, exp_avg=parts[1], exp_avg_sq=parts[2])
        optimizer.step()
        made.append(parts)
    registry.use_isa(isa)
    assert not torch.equal(made[0][0], param)
    assert all(same(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_large_outputs_that_go_past_the_caches_hold_what_small_ones_do(isa, dtype):
    ops, size = registry.ops(), 64
    groups = (32 << 20) // dtype.itemsize // size  # from this on; one group less stays below
    codes = torch.randint(-128, 128, (groups * size,), dtype=torch.int8)
    params = torch.rand(groups, 1)
    whole = ops["dequantize_groups"](codes, params, groups, 8, False, dtype)
    less = ops["dequantize_groups"](codes[size:], params[1:], groups - 1, 8, False, dtype)
    assert torch.equal(whole[size:], less)
    packed = ops["fp_quantize"](whole[: groups * size].view(-1, size), size, 4, 3, -1)
    whole = ops["fp_dequantize"](packed, size, 4, 3, dtype, None, 1)
    less = ops["fp_dequantize"](packed[1:], size, 4, 3, dtype, None, 1)
    assert torch.equal(whole.view(-1)[size:], less.view(-1))


@pytest.mark.parametrize(("bits", "asym", "size"), [(8, False, 64), (4, True, 64), (6, False, 100)])
def test_codes_of_many_values_that_go_past_the_caches_are_those_of_few(isa, bits, asym, size):
    groups = (32 << 20) // 4 // size + 3
    x = torch.randn(groups, size)
    many = registry.ops()["quantize_groups"](x, groups, bits, asym, -1)
    few = [
        registry.ops()["quantize_groups"](part.contiguous(), len(part), bits, asym, -1)
        for part in x.split(groups // 4)
    ]
    assert torch.equal(many[0].flatten(), torch.cat([codes.flatten() for codes, _ in few]))
    assert torch.equal(many[1].flatten(), torch.cat([kept.flatten() for _, kept in few]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_casts_of_many_values_past_the_caches_are_those_of_few(isa, dtype):
    x = torch.randn((32 << 20) // 4 + 1029)
    many, few = torch.empty(len(x), dtype=dtype), torch.empty(len(x), dtype=dtype)
    registry.ops()["cast"](x, many)
    for start in range(0, len(x), 1 << 20):
        registry.ops()["cast"](x[start : start + (1 << 20)], few[start : start + (1 << 20)])
    assert torch.equal(many.view(torch.uint8), few.view(torch.uint8))
