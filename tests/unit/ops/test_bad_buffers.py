# SPDX-License-Identifier: Apache-2.0
"""Buffers that do not fit together, at the Python door and at the C ABI: refused in words, never walked."""

from __future__ import annotations

import ctypes

import pytest
import torch

from deepspeed.ops import abi, native, registry
from tests.unit.ops.cases import CASES, F32
from tests.unit.ops.exact_cases import EXACT

needs_library = pytest.mark.skipif(
    native.status().route != "native", reason="there is no native library here"
)
STEPS = ("adam_step", "adagrad_step", "lion_step", "sgd_step", "lamb_step")


def arguments(name, numel=40):
    return CASES[name].make(numel, (F32, F32, F32, F32))


@needs_library
@pytest.mark.parametrize("name", STEPS)
def test_tensors_of_other_sizes_are_refused(name):
    for place in range(1, 4):
        args = arguments(name)
        if isinstance(args[place], torch.Tensor):
            args[place] = args[place][:-1]
            with pytest.raises(ValueError, match="must match"):
                registry.ops()[name](*args)


@needs_library
@pytest.mark.parametrize("name", STEPS)
def test_buffers_that_overlap_are_refused(name):
    args = arguments(name)
    shared = torch.randn(60)
    args[0], args[1] = shared[:40], shared[20:]
    before = shared.clone()
    with pytest.raises(ValueError, match="overlap"):
        registry.ops()[name](*args)
    assert torch.equal(shared, before)


@pytest.mark.parametrize("name", STEPS)
def test_params_that_are_no_floats_are_refused(name):
    args = [a.int() if isinstance(a, torch.Tensor) else a for a in arguments(name)]
    if name == "lamb_step":
        pytest.skip("its reference computes in fp32 whatever it is given")
    with pytest.raises(TypeError, match="floating"):
        registry.ops()[name](*args)


# op -> place of an argument, what it becomes, part of the words that refuse it
REFUSED = {
    "quantize_groups": ((0, "int", "a float"), (1, 0, "groups"), (2, 5, "8, 6 or 4")),
    "dequantize_groups": (
        (0, "float", "int8"),
        (2, 0, "groups"),
        (1, 1, "numbers"),
        (3, 5, "8, 6 or 4"),
    ),
    "fake_quantize": ((0, "int", "a float"), (1, -1, "groups")),
    "quantize_weight": (
        (0, "int", "a float"),
        (1, 6, "8 or 4"),
        (2, 0, "groups"),
        (3, 7, "groups"),
    ),
    "dequantize_weight": (
        (0, "float", "int8"),
        (1, 1, "scale"),
        (3, 6, "8 or 4"),
        (4, 0, "groups"),
    ),
    "fp_quantize": (
        (0, "int", "a float"),
        (1, 0, "groups"),
        (2, 5, "small float"),
        (0, 1, "groups"),
    ),
    "fp_dequantize": ((0, "float", "int8"), (0, 1, "whole groups"), (1, 0, "groups")),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_values_and_codes_that_do_not_fit_are_refused_on_every_path(path, name):
    for place, change, words in REFUSED[name]:
        args = list(next(iter(EXACT[name][0]())))
        if isinstance(change, str):
            args[place] = getattr(args[place], change)()
        elif isinstance(args[place], torch.Tensor):
            args[place] = args[place].reshape(-1)[:-change]
        else:
            args[place] = change
        with pytest.raises(ValueError, match=words):
            registry.ops()[name](*args)


def test_the_norm_of_complex_numbers_takes_both_parts():
    x = torch.complex(torch.randn(70), torch.randn(70))
    expected = x.to(torch.complex128).abs().square().sum()
    got = registry.ops()["squared_norm"](x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", STEPS)
def test_params_at_odd_addresses_are_served(name):
    plain, odd = arguments(name), arguments(name)
    for i, a in enumerate(plain):
        if isinstance(a, torch.Tensor):
            odd[i] = torch.frombuffer(memoryview(bytearray(a.numel() * 4 + 1))[1:], dtype=F32)
            odd[i].copy_(a)
    registry.ops()[name](*odd)
    registry.ops()[name](*plain)
    torch.testing.assert_close(odd[0], plain[0], rtol=1e-6, atol=1e-6)


@needs_library
@pytest.mark.parametrize("name", ["flatten", "cast"])
def test_copies_onto_themselves_are_refused(name):
    x = torch.randn(64)
    other = [x[16:48]] if name == "flatten" else x[16:48]
    with pytest.raises(ValueError, match="overlap"):
        registry.ops()[name](x[:32], other)


def structs():
    """Each kernel's struct, filled so that only its sizes are wrong."""
    sizes = {"numel", "groups", "there", "pieces"}
    ones = {"columns", "group_size", "row_groups", "step", "momentum"}
    for op in registry.ops().values():
        entry = op.cpu
        name = {"ds_squared_norm": "ds_norm_args"}.get(entry, f"{entry.removesuffix('_step')}_args")
        structure = abi.STRUCTS[name]
        made = structure(size=ctypes.sizeof(structure), threads=1)
        for field, kind in structure._fields_:
            if field in ones:
                setattr(made, field, 1)
            elif kind is ctypes.c_void_p:
                setattr(made, field, 4096 * 64)  # no memory of ours: walking it would crash
        for field, value in (("bits", 8), ("exponent", 4), ("mantissa", 3)):
            if hasattr(made, field):
                setattr(made, field, value)
        if name.startswith("ds_fp"):
            made.group_size = 4
        yield entry, made, [field for field, _ in structure._fields_ if field in sizes]


@needs_library
@pytest.mark.parametrize("size", [-1, -(1 << 63), (1 << 63) - 1, 1 << 60])
def test_sizes_beyond_any_memory_are_refused_at_the_c_abi(size):
    library = native.load()
    tried = set()
    for entry, made, fields in structs():
        for field in fields:
            setattr(made, field, size)
        assert library.entry(entry)(bytes(made)) != 0, entry
        assert library.error()
        tried.add(entry)
    assert len(tried) >= 12


@needs_library
def test_null_buffers_are_refused_and_no_elements_are_fine():
    library = native.load()
    for entry, made, fields in structs():
        for field, kind in made._fields_:
            if kind is ctypes.c_void_p and (entry, field) != ("ds_lamb_step", "ratio"):
                setattr(made, field, None)
        ratio = ctypes.c_float()
        total = ctypes.c_double()
        if entry == "ds_lamb_step":
            made.ratio = ctypes.addressof(ratio)
        if entry == "ds_squared_norm":
            made.out = ctypes.addressof(total)
        for field in fields:
            setattr(made, field, 0)
        assert library.entry(entry)(bytes(made)) == 0, (entry, library.error())
        if entry == "ds_pieces":
            continue
        for field in fields:
            setattr(made, field, 8)
        assert library.entry(entry)(bytes(made)) != 0, entry


@needs_library
@pytest.mark.parametrize("entry", sorted({op.cpu for op in registry.ops().values()}))
def test_a_struct_of_another_size_is_refused(entry):
    assert native.load().entry(entry)(b"\x07" + b"\0" * 255) != 0
    assert "struct of 7 bytes" in native.load().error()


def test_shapes_beyond_2_to_the_31_are_computed_without_memory():
    from torch._subclasses.fake_tensor import FakeTensorMode

    ops = torch.ops.deepspeed
    with FakeTensorMode():
        huge = torch.empty((1 << 21, 1 << 12), dtype=torch.bfloat16)  # 2^33 elements
        codes, params = ops.quantize_groups(huge, 1 << 22, 4, True, -1)
        assert codes.numel() == 1 << 32 and params.shape == (1 << 22, 2)
        back = ops.dequantize_groups(codes, params, 1 << 22, 4, True, torch.float32)
        assert back.numel() == 1 << 33 and back.dtype == torch.float32
        packed = ops.fp_quantize(huge, 512, 3, 2, -1)
        assert packed.shape == ((1 << 33) // 512, 512 * 6 // 8 + 4)
        codes, scale, _ = ops.quantize_weight(huge, 8, 64, 1, False)
        assert codes.shape == huge.shape and scale.numel() == (1 << 33) // 64


@pytest.mark.parametrize("name", ["quantize_groups", "fp_quantize", "quantize_weight"])
def test_values_that_do_not_divide_are_refused(name):
    from deepspeed.ops.group_quant import GroupScheme, quantize

    x = torch.randn(3, 7)
    with pytest.raises(ValueError, match=r"divide|group"):
        if name == "quantize_weight":
            quantize(x, GroupScheme(8, 4))
        else:
            registry.ops()[name](x, *((4, 8, False, -1) if name[0] == "q" else (5, 4, 3, -1)))
    assert name in EXACT
