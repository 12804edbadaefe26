# SPDX-License-Identifier: Apache-2.0
"""Groups of consecutive values as whole numbers of 8, 6 or 4 bits, as ops: references, and the CPU's kernels.

A group of values shares a scale 2^bits / (2 max|x|); asymmetric groups have a scale 2^bits / (max - min) and an offset.
Kept with the values, one row a group of fp32: 1 / scale, then the offset. Codes have a sign and are packed from the low
end: two of 4 bits in a byte, four of 6 bits in three bytes. A seed makes rounding stochastic (`random_bits`), -1 nearest.
`cuda_quant` is the door that callers use; it takes CUDA tensors to kernels of the same arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspeed.ops import random_bits
from deepspeed.ops.abi import FORMATS
from deepspeed.ops.packing import NARROW_CODES, check_bytes, check_real, is_plain, threads
from deepspeed.ops.registry import Op, Ulp, no_result
from deepspeed.utils.errors import explain

_QUANTIZE = FORMATS["ds_quantize_args"]
_DEQUANTIZE = FORMATS["ds_dequantize_args"]


def unit_of(bits: int) -> int:
    """Return how many codes fill whole bytes.

    Raises:
        ValueError: codes of so many bits are not packed.
    """
    if bits not in (4, 6, 8):
        raise ValueError(
            explain("quantized values have a whole layout", got=bits, expected="8, 6 or 4 bits")
        )
    return {8: 1, 6: 4, 4: 2}[bits]


def split(numel: int, groups: int, unit: int) -> int:
    """Return the size of each of so many groups.

    Raises:
        ValueError: the values do not divide into groups of whole bytes.
    """
    if groups < 1 or numel % groups or numel // groups % unit:
        size = {1: "", 2: " of even size", 4: " of a multiple of 4 values"}[unit]
        raise ValueError(
            explain(
                "values do not divide into groups",
                got=f"{numel} values in {groups} groups",
                expected=f"equal groups{size}",
            )
        )
    return numel // groups


def grid(x: Tensor, bits: int, asym: bool) -> tuple[Tensor, Tensor]:
    """Return scale and offset of each row."""
    levels = float(1 << bits)
    if x.shape[1] == 0:
        return x.new_ones(x.shape[0], 1), x.new_zeros(x.shape[0], 1)
    if asym:
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        span = high - low
    else:
        low = torch.zeros((), device=x.device)
        span = 2 * x.abs().amax(1, keepdim=True)
    scale = torch.where(span == 0, torch.ones_like(span), levels / span)
    return scale, -levels / 2 - low * scale if asym else torch.zeros_like(scale)


def round_to(x: Tensor, scale: Tensor, offset: Tensor, bits: int, seed: int) -> Tensor:
    """Return the rows' codes as floats."""
    exact = x * scale + offset
    if seed == random_bits.NEAREST:
        whole = exact.round()
    else:
        whole = (exact + random_bits.unit(seed, exact.shape, exact.device)).floor()
    half = 1 << (bits - 1)
    return whole.nan_to_num(nan=-half).clamp(-half, half - 1)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return flat int8 bytes of flat whole numbers."""
    q = codes.to(torch.int32).reshape(-1)
    if bits == 4:
        q = (q[0::2] & 15) | (q[1::2] & 15) << 4
    elif bits == 6:
        four = q.reshape(-1, 4) & 63
        whole = four[:, 0] | four[:, 1] << 6 | four[:, 2] << 12 | four[:, 3] << 18
        q = torch.stack([whole & 255, whole >> 8 & 255, whole >> 16], 1).reshape(-1)
    return q.to(torch.uint8).view(torch.int8)


def codes_of(quantized: Tensor, bits: int) -> Tensor:
    """Return the flat whole numbers, with their sign, of packed bytes."""
    q = quantized.reshape(-1)
    if bits == 8:
        return q
    byte = q.to(torch.int32) & 255
    if bits == 4:
        codes = torch.stack([byte & 15, byte >> 4], 1).reshape(-1)
    else:
        three = byte.reshape(-1, 3)
        whole = three[:, 0] | three[:, 1] << 8 | three[:, 2] << 16
        codes = torch.stack([whole >> shift & 63 for shift in (0, 6, 12, 18)], 1).reshape(-1)
    half = 1 << (bits - 1)
    return torch.where(codes >= half, codes - 2 * half, codes)


def _size_of_codes(quantized: Tensor, params: Tensor, groups: int, bits: int, asym: bool) -> int:
    """Return the size of each group of codes, after a look at all that belongs to them."""
    check_bytes("dequantize_groups", quantized)
    unit = unit_of(bits)
    size = split(quantized.numel() * 8 // bits, groups, unit)
    whole = quantized.numel() * 8 % bits == 0
    if not whole or params.numel() != groups * (2 if asym else 1):
        raise ValueError(
            explain(
                "codes and the numbers of their groups do not fit",
                got=f"{quantized.numel()} bytes of {bits} bits, {params.numel()} numbers",
                expected=f"whole codes, {2 if asym else 1} for each of {groups} groups",
            )
        )
    return size


def _quantize_reference(
    x: Tensor, groups: int, bits: int, asym: bool, seed: int
) -> tuple[Tensor, Tensor]:
    check_real("quantize_groups", x)
    split(x.numel(), groups, unit_of(bits))
    rows = x.reshape(groups, -1).float()
    scale, offset = grid(rows, bits, asym)
    params = torch.cat([1 / scale, offset], 1) if asym else 1 / scale
    return pack_codes(round_to(rows, scale, offset, bits, seed), bits), params


def _quantize_fake(
    x: Tensor, groups: int, bits: int, asym: bool, seed: int
) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.numel() * bits // 8, dtype=torch.int8)
    return codes, x.new_empty(groups, 2 if asym else 1, dtype=torch.float32)


def _quantize_pack(
    x: Tensor, groups: int, bits: int, asym: bool, seed: int
) -> tuple[bytes, tuple[Tensor, Tensor]] | None:
    check_real("quantize_groups", x)
    size = split(x.numel(), groups, unit_of(bits))
    if x.dtype not in NARROW_CODES or not is_plain(x) or size == 0:
        return None
    codes = torch.empty(x.numel() * bits // 8, dtype=torch.int8, device="cpu")
    params = torch.empty(groups, 2 if asym else 1, device="cpu")
    addresses = (x.data_ptr(), codes.data_ptr(), params.data_ptr(), 0)
    return _packed((groups, size), addresses, x.dtype, bits, asym, seed), (codes, params)


def _packed(
    sizes: tuple[int, int],
    addresses: tuple[int, int, int, int],
    dtype: torch.dtype,
    bits: int,
    asym: bool,
    seed: int,
) -> bytes:
    kind = (NARROW_CODES[dtype], bits, asym, False)
    stochastic, known = random_bits.rounding(seed)
    numbers = (*sizes, 1, *addresses, *kind, stochastic, 0, known)
    return _QUANTIZE.pack(_QUANTIZE.size, threads(), *numbers)


def _dequantize_reference(
    quantized: Tensor, params: Tensor, groups: int, bits: int, asym: bool, dtype: torch.dtype
) -> Tensor:
    _size_of_codes(quantized, params, groups, bits, asym)
    q = codes_of(quantized, bits).reshape(groups, -1).float()
    kept = params.reshape(groups, -1).float()
    values = (q - kept[:, 1:2]) * kept[:, :1] if asym else q * kept
    return values.to(dtype).reshape(-1)


def _dequantize_fake(
    quantized: Tensor, params: Tensor, groups: int, bits: int, asym: bool, dtype: torch.dtype
) -> Tensor:
    return quantized.new_empty(quantized.numel() * 8 // bits, dtype=dtype)


def _dequantize_pack(
    quantized: Tensor, params: Tensor, groups: int, bits: int, asym: bool, dtype: torch.dtype
) -> tuple[bytes, Tensor] | None:
    size = _size_of_codes(quantized, params, groups, bits, asym)
    plain = is_plain(quantized, params) and params.dtype == torch.float32
    if dtype not in NARROW_CODES or not plain or size == 0:
        return None
    out = torch.empty(groups * size, dtype=dtype, device="cpu")
    addresses = (quantized.data_ptr(), params.data_ptr(), 0, out.data_ptr())
    kind = (NARROW_CODES[dtype], 0, bits, asym, False, 0)
    sizes = (groups, size, 1)
    return _DEQUANTIZE.pack(_DEQUANTIZE.size, threads(), *sizes, *addresses, *kind), out


def _fake_quantize_reference(x: Tensor, groups: int, bits: int, asym: bool, seed: int) -> None:
    check_real("fake_quantize", x)
    split(x.numel(), groups, 1)
    rows = x.reshape(groups, -1).float()
    scale, offset = grid(rows, bits, asym)
    q = round_to(rows, scale, offset, bits, seed)
    x.copy_(((q - offset) * (1 / scale)).reshape(x.shape))


def _fake_quantize_pack(
    x: Tensor, groups: int, bits: int, asym: bool, seed: int
) -> tuple[bytes, None] | None:
    check_real("fake_quantize", x)
    size = split(x.numel(), groups, 1)
    if x.dtype not in NARROW_CODES or not is_plain(x) or size == 0:
        return None
    return _packed((groups, size), (x.data_ptr(), 0, 0, 0), x.dtype, bits, asym, seed), None


quantize_groups = Op(
    "quantize_groups(Tensor x, int groups, int bits, bool asym, int seed) -> (Tensor, Tensor)",
    reference=_quantize_reference,
    fake=_quantize_fake,
    cpu="ds_quantize",
    pack=_quantize_pack,
    tolerance=Ulp(0),
)

dequantize_groups = Op(
    "dequantize_groups(Tensor quantized, Tensor params, int groups, int bits, bool asym, "
    "ScalarType dtype) -> Tensor",
    reference=_dequantize_reference,
    fake=_dequantize_fake,
    cpu="ds_dequantize",
    pack=_dequantize_pack,
    tolerance=Ulp(0),
)

fake_quantize = Op(
    "fake_quantize(Tensor(a!) x, int groups, int bits, bool asym, int seed) -> ()",
    reference=_fake_quantize_reference,
    fake=no_result,
    cpu="ds_quantize",
    pack=_fake_quantize_pack,
    tolerance=Ulp(0),
)
