# SPDX-License-Identifier: Apache-2.0
"""Argument structs of the native library. Written by op_builder/abi.py: do not edit."""

import ctypes
import struct


class AdamArgs(ctypes.Structure):
    """Adam and AdamW."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("numel", ctypes.c_int64),
        ("param", ctypes.c_void_p),
        ("exp_avg", ctypes.c_void_p),
        ("exp_avg_sq", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("low", ctypes.c_void_p),
        ("param_dtype", ctypes.c_int32),
        ("state_dtype", ctypes.c_int32),
        ("grad_dtype", ctypes.c_int32),
        ("low_dtype", ctypes.c_int32),
        ("decoupled", ctypes.c_int32),
        ("bias_correction", ctypes.c_int32),
        ("stochastic", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("seed", ctypes.c_int64),
        ("step", ctypes.c_int64),
        ("lr", ctypes.c_double),
        ("beta1", ctypes.c_double),
        ("beta2", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("decay", ctypes.c_double),
        ("grad_scale", ctypes.c_double),
    )


class AdagradArgs(ctypes.Structure):
    """Adagrad."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("numel", ctypes.c_int64),
        ("param", ctypes.c_void_p),
        ("exp_avg_sq", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("low", ctypes.c_void_p),
        ("param_dtype", ctypes.c_int32),
        ("state_dtype", ctypes.c_int32),
        ("grad_dtype", ctypes.c_int32),
        ("low_dtype", ctypes.c_int32),
        ("lr", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("decay", ctypes.c_double),
        ("grad_scale", ctypes.c_double),
    )


class LionArgs(ctypes.Structure):
    """Lion."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("numel", ctypes.c_int64),
        ("param", ctypes.c_void_p),
        ("exp_avg", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("low", ctypes.c_void_p),
        ("param_dtype", ctypes.c_int32),
        ("state_dtype", ctypes.c_int32),
        ("grad_dtype", ctypes.c_int32),
        ("low_dtype", ctypes.c_int32),
        ("lr", ctypes.c_double),
        ("beta1", ctypes.c_double),
        ("beta2", ctypes.c_double),
        ("decay", ctypes.c_double),
        ("grad_scale", ctypes.c_double),
    )


class SgdArgs(ctypes.Structure):
    """SGD, with momentum or without."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("numel", ctypes.c_int64),
        ("param", ctypes.c_void_p),
        ("exp_avg", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("low", ctypes.c_void_p),
        ("param_dtype", ctypes.c_int32),
        ("state_dtype", ctypes.c_int32),
        ("grad_dtype", ctypes.c_int32),
        ("low_dtype", ctypes.c_int32),
        ("nesterov", ctypes.c_int32),
        ("first", ctypes.c_int32),
        ("lr", ctypes.c_double),
        ("momentum", ctypes.c_double),
        ("dampening", ctypes.c_double),
        ("decay", ctypes.c_double),
        ("grad_scale", ctypes.c_double),
    )


class LambArgs(ctypes.Structure):
    """LAMB on one tensor."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("numel", ctypes.c_int64),
        ("param", ctypes.c_void_p),
        ("exp_avg", ctypes.c_void_p),
        ("exp_avg_sq", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("low", ctypes.c_void_p),
        ("ratio", ctypes.c_void_p),
        ("param_dtype", ctypes.c_int32),
        ("state_dtype", ctypes.c_int32),
        ("grad_dtype", ctypes.c_int32),
        ("low_dtype", ctypes.c_int32),
        ("eps_inside", ctypes.c_int32),
        ("bias_correction", ctypes.c_int32),
        ("step", ctypes.c_int64),
        ("lr", ctypes.c_double),
        ("beta1", ctypes.c_double),
        ("beta2", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("decay", ctypes.c_double),
        ("least", ctypes.c_double),
        ("most", ctypes.c_double),
        ("grad_scale", ctypes.c_double),
    )


class CastArgs(ctypes.Structure):
    """A cast."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("numel", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("x_dtype", ctypes.c_int32),
        ("out_dtype", ctypes.c_int32),
    )


class PiecesArgs(ctypes.Structure):
    """Many buffers and one flat one."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("pieces", ctypes.c_int64),
        ("table", ctypes.c_void_p),
        ("flat", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("flat_dtype", ctypes.c_int32),
        ("scatter", ctypes.c_int32),
    )


class QuantizeArgs(ctypes.Structure):
    """Groups of values to whole numbers of few bits."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("groups", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("least", ctypes.c_void_p),
        ("x_dtype", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("asym", ctypes.c_int32),
        ("weights", ctypes.c_int32),
        ("stochastic", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("seed", ctypes.c_int64),
    )


class DequantizeArgs(ctypes.Structure):
    """The way back."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("groups", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("least", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_dtype", ctypes.c_int32),
        ("side_dtype", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("asym", ctypes.c_int32),
        ("weights", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class FpQuantizeArgs(ctypes.Structure):
    """Groups of values to small floats."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("groups", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("x_dtype", ctypes.c_int32),
        ("exponent", ctypes.c_int32),
        ("mantissa", ctypes.c_int32),
        ("stochastic", ctypes.c_int32),
        ("seed", ctypes.c_int64),
    )


class FpDequantizeArgs(ctypes.Structure):
    """The way back."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("groups", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("packed", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("row_groups", ctypes.c_int64),
        ("there", ctypes.c_int64),
        ("out_dtype", ctypes.c_int32),
        ("exponent", ctypes.c_int32),
        ("mantissa", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class NormArgs(ctypes.Structure):
    """Sum of squares."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("numel", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("x_dtype", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class IoOpenArgs(ctypes.Structure):
    """A queue of reads and writes."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("backend", ctypes.c_int32),
        ("block_size", ctypes.c_int64),
        ("queue_depth", ctypes.c_int32),
        ("workers", ctypes.c_int32),
        ("single_submit", ctypes.c_int32),
        ("overlap_events", ctypes.c_int32),
        ("direct", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("queue", ctypes.c_void_p),
    )


class IoSubmitArgs(ctypes.Structure):
    """One request."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("write", ctypes.c_int32),
        ("queue", ctypes.c_void_p),
        ("path", ctypes.c_void_p),
        ("given", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
        ("memory", ctypes.c_void_p),
        ("ticket", ctypes.c_int64),
        ("os_error", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class IoWaitArgs(ctypes.Structure):
    """The end of one request."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("timeout_ms", ctypes.c_int32),
        ("queue", ctypes.c_void_p),
        ("ticket", ctypes.c_int64),
        ("state", ctypes.c_int32),
        ("os_error", ctypes.c_int32),
        ("moved", ctypes.c_int64),
        ("bad_offset", ctypes.c_int64),
        ("bad_bytes", ctypes.c_int64),
    )


class IoMemoryArgs(ctypes.Structure):
    """Page-aligned memory."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("locked", ctypes.c_int32),
        ("bytes", ctypes.c_int64),
        ("memory", ctypes.c_void_p),
    )


STRUCTS: dict[str, type[ctypes.Structure]] = {
    "ds_adam_args": AdamArgs,
    "ds_adagrad_args": AdagradArgs,
    "ds_lion_args": LionArgs,
    "ds_sgd_args": SgdArgs,
    "ds_lamb_args": LambArgs,
    "ds_cast_args": CastArgs,
    "ds_pieces_args": PiecesArgs,
    "ds_quantize_args": QuantizeArgs,
    "ds_dequantize_args": DequantizeArgs,
    "ds_fp_quantize_args": FpQuantizeArgs,
    "ds_fp_dequantize_args": FpDequantizeArgs,
    "ds_norm_args": NormArgs,
    "ds_io_open_args": IoOpenArgs,
    "ds_io_submit_args": IoSubmitArgs,
    "ds_io_wait_args": IoWaitArgs,
    "ds_io_memory_args": IoMemoryArgs,
}

# The same structs for struct.pack, which fills one several times faster than ctypes.
FORMATS: dict[str, struct.Struct] = {
    "ds_adam_args": struct.Struct("@IIqPPPPPiiiiiiiiqqdddddd"),
    "ds_adagrad_args": struct.Struct("@IIqPPPPiiiidddd"),
    "ds_lion_args": struct.Struct("@IIqPPPPiiiiddddd"),
    "ds_sgd_args": struct.Struct("@IIqPPPPiiiiiiddddd"),
    "ds_lamb_args": struct.Struct("@IIqPPPPPPiiiiiiqdddddddd"),
    "ds_cast_args": struct.Struct("@IIqPPii"),
    "ds_pieces_args": struct.Struct("@IIqPPqii"),
    "ds_quantize_args": struct.Struct("@IIqqqPPPPiiiiiiq"),
    "ds_dequantize_args": struct.Struct("@IIqqqPPPPiiiiii"),
    "ds_fp_quantize_args": struct.Struct("@IIqqPPiiiiq"),
    "ds_fp_dequantize_args": struct.Struct("@IIqqPPPqqiiii"),
    "ds_norm_args": struct.Struct("@IIqPPii"),
    "ds_io_open_args": struct.Struct("@IiqiiiiiiP"),
    "ds_io_submit_args": struct.Struct("@IiPPqqqPqii"),
    "ds_io_wait_args": struct.Struct("@IiPqiiqqq"),
    "ds_io_memory_args": struct.Struct("@IiqP"),
}
