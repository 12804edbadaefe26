# SPDX-License-Identifier: Apache-2.0
"""The argument structs of the C ABI, told once: this table writes both the section of ds_api.h and deepspeed/ops/abi.py.

``python -m op_builder.abi`` rewrites the two files; ``--check`` only says whether they are fresh. The library exports its
own sizes and offsets (``ds_abi_layout``), which the loader compares with the Python side before the first call.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "csrc" / "api" / "ds_api.h"
LAYOUT = ROOT / "csrc" / "api" / "layout.inc"
MODULE = ROOT / "deepspeed" / "ops" / "abi.py"

BEGIN = "/* ---- written by op_builder/abi.py: do not edit ---- */"
END = "/* ---- end of the written section ---- */"

# kind -> (C declaration, ctypes name, struct format character)
KINDS = {
    "u32": ("uint32_t ", "c_uint32", "I"),
    "i32": ("int32_t ", "c_int32", "i"),
    "i64": ("int64_t ", "c_int64", "q"),
    "f64": ("double ", "c_double", "d"),
    "out": ("void *", "c_void_p", "P"),
    "in": ("const void *", "c_void_p", "P"),
}


class Field(NamedTuple):
    """One member of a struct: its name, kind (a key of KINDS) and meaning."""

    name: str
    kind: str
    doc: str


_SIZE = Field("size", "u32", "sizeof of this struct, as the caller knows it")
_CALL = (
    _SIZE,
    Field("threads", "u32", "most threads to use, the calling one included"),
)
_HEAD = (
    *_CALL,
    Field("numel", "i64", "elements of each buffer"),
)
_PARAM = Field("param", "out", "updated in place")
_MOMENTS = (
    Field("exp_avg", "out", "first moment, updated in place"),
    Field("exp_avg_sq", "out", "second moment, updated in place"),
)
_GRAD_AND_LOW = (
    Field("grad", "in", "gradient"),
    Field("low", "out", "also receives the new param, rounded to low_dtype; may be null"),
)
_DTYPES = (
    Field("param_dtype", "i32", "ds_dtype of param"),
    Field("state_dtype", "i32", "ds_dtype of the moments"),
    Field("grad_dtype", "i32", "ds_dtype of grad"),
    Field("low_dtype", "i32", "ds_dtype of low"),
)
_STEP = Field("step", "i64", "number of this step, from 1")
_LR = Field("lr", "f64", "learning rate")
_BETAS = (
    Field("beta1", "f64", "decay rate of the first moment"),
    Field("beta2", "f64", "decay rate of the second moment"),
)
_SCALE = Field("grad_scale", "f64", "the gradient used is grad * grad_scale")
_GROUPS = (
    Field("groups", "i64", "groups, of a column each"),
    Field("group_size", "i64", "values of a group"),
    Field("columns", "i64", "groups side by side; 1: the values of a group are neighbours"),
)
_FLOAT = (
    Field("exponent", "i32", "bits of the exponent"),
    Field("mantissa", "i32", "bits of the mantissa"),
)
_STOCHASTIC = Field("stochastic", "i32", "1: round at random")
_SEED = Field("seed", "i64", "of the random bits")
_RESERVED = Field("reserved", "i32", "0")

STRUCTS: dict[str, tuple[str, tuple[Field, ...]]] = {
    "ds_adam_args": (
        "Adam and AdamW.",
        (
            *_HEAD,
            _PARAM,
            *_MOMENTS,
            *_GRAD_AND_LOW,
            *_DTYPES,
            Field(
                "decoupled", "i32", "1: AdamW's decay of the param; 0: decay added to the gradient"
            ),
            Field("bias_correction", "i32", "1: divide the moments by 1 - beta^step"),
            Field("stochastic", "i32", "1: bf16 buffers are rounded at random; param is bf16"),
            _RESERVED,
            _SEED,
            _STEP,
            _LR,
            *_BETAS,
            Field("eps", "f64", "added to the root of the second moment"),
            Field("decay", "f64", "weight decay"),
            _SCALE,
        ),
    ),
    "ds_adagrad_args": (
        "Adagrad.",
        (
            *_HEAD,
            _PARAM,
            Field("exp_avg_sq", "out", "sum of squared gradients, updated in place"),
            *_GRAD_AND_LOW,
            *_DTYPES,
            _LR,
            Field("eps", "f64", "added to the root of the sum"),
            Field("decay", "f64", "weight decay, added to the gradient"),
            _SCALE,
        ),
    ),
    "ds_lion_args": (
        "Lion.",
        (
            *_HEAD,
            _PARAM,
            Field("exp_avg", "out", "momentum, updated in place"),
            *_GRAD_AND_LOW,
            *_DTYPES,
            _LR,
            Field("beta1", "f64", "weight of the momentum in the direction"),
            Field("beta2", "f64", "decay rate of the momentum"),
            Field("decay", "f64", "weight decay of the param (decoupled)"),
            _SCALE,
        ),
    ),
    "ds_sgd_args": (
        "SGD, with momentum or without.",
        (
            *_HEAD,
            _PARAM,
            Field("exp_avg", "out", "momentum, updated in place; null without momentum"),
            *_GRAD_AND_LOW,
            *_DTYPES,
            Field("nesterov", "i32", "1: Nesterov's momentum"),
            Field("first", "i32", "1: the momentum holds nothing yet and becomes the gradient"),
            _LR,
            Field("momentum", "f64", "decay rate of the momentum"),
            Field("dampening", "f64", "the momentum takes in 1 - dampening of the gradient"),
            Field("decay", "f64", "weight decay, added to the gradient"),
            _SCALE,
        ),
    ),
    "ds_lamb_args": (
        "LAMB on one tensor.",
        (
            *_HEAD,
            _PARAM,
            *_MOMENTS,
            *_GRAD_AND_LOW,
            Field("ratio", "out", "one float: the ratio of the norms of param and update"),
            *_DTYPES,
            Field("eps_inside", "i32", "1: eps is added before the root is taken"),
            Field(
                "bias_correction", "i32", "1: scale the step by sqrt(1 - beta2^t) / (1 - beta1^t)"
            ),
            _STEP,
            _LR,
            *_BETAS,
            Field("eps", "f64", "added to the second moment or its root"),
            Field("decay", "f64", "weight decay, part of the update"),
            Field("least", "f64", "least ratio"),
            Field("most", "f64", "greatest ratio"),
            _SCALE,
        ),
    ),
    "ds_cast_args": (
        "A cast.",
        (
            *_HEAD,
            Field("x", "in", "the elements"),
            Field("out", "out", "as many, in out_dtype, to nearest even"),
            Field("x_dtype", "i32", "ds_dtype of x"),
            Field("out_dtype", "i32", "ds_dtype of out"),
        ),
    ),
    "ds_pieces_args": (
        "Many buffers and one flat one.",
        (
            *_CALL,
            Field("pieces", "i64", "how many buffers"),
            Field(
                "table",
                "in",
                "a row of int64 each: address, first element in flat, elements, ds_dtype",
            ),
            Field("flat", "out", "the flat buffer; its pieces lie in the order of the table"),
            Field("numel", "i64", "elements of the flat buffer"),
            Field("flat_dtype", "i32", "ds_dtype of flat"),
            Field("scatter", "i32", "1: from flat to the buffers; 0: to flat"),
        ),
    ),
    "ds_quantize_args": (
        "Groups of values to whole numbers of few bits.",
        (
            *_CALL,
            *_GROUPS,
            Field(
                "x", "in", "values; with null codes updated in place to what the codes stand for"
            ),
            Field("codes", "out", "the codes, packed; or null"),
            Field("scale", "out", "see ds_quantize; or null"),
            Field("least", "out", "see ds_quantize; or null"),
            Field("x_dtype", "i32", "ds_dtype of x"),
            Field("bits", "i32", "8, 6 or 4; without codes 1 to 16"),
            Field("asym", "i32", "1: with an offset"),
            Field("weights", "i32", "1: the form of weights"),
            _STOCHASTIC,
            _RESERVED,
            _SEED,
        ),
    ),
    "ds_dequantize_args": (
        "The way back.",
        (
            *_CALL,
            *_GROUPS,
            Field("codes", "in", "the codes, packed"),
            Field("scale", "in", "see ds_quantize"),
            Field("least", "in", "see ds_quantize; or null"),
            Field("out", "out", "values"),
            Field("out_dtype", "i32", "ds_dtype of out"),
            Field("side_dtype", "i32", "ds_dtype of scale and least"),
            Field("bits", "i32", "8, 6 or 4"),
            Field("asym", "i32", "1: with an offset"),
            Field("weights", "i32", "1: the form of weights"),
            _RESERVED,
        ),
    ),
    "ds_fp_quantize_args": (
        "Groups of values to small floats.",
        (
            *_CALL,
            Field("groups", "i64", "groups"),
            Field("group_size", "i64", "values of a group, a multiple of 4"),
            Field("x", "in", "values"),
            Field("out", "out", "packed groups, each with its scale"),
            Field("x_dtype", "i32", "ds_dtype of x"),
            *_FLOAT,
            _STOCHASTIC,
            _SEED,
        ),
    ),
    "ds_fp_dequantize_args": (
        "The way back.",
        (
            *_CALL,
            Field("groups", "i64", "groups to write"),
            Field("group_size", "i64", "values of a group, a multiple of 4"),
            Field("packed", "in", "packed groups"),
            Field("out", "out", "values"),
            Field("rows", "in", "int64: the rows to unpack; null for all"),
            Field("row_groups", "i64", "groups of a row"),
            Field("there", "i64", "packed groups"),
            Field("out_dtype", "i32", "ds_dtype of out"),
            *_FLOAT,
            _RESERVED,
        ),
    ),
    "ds_norm_args": (
        "Sum of squares.",
        (
            *_HEAD,
            Field("x", "in", "the elements"),
            Field("out", "out", "one double: the sum"),
            Field("x_dtype", "i32", "ds_dtype of x"),
            _RESERVED,
        ),
    ),
    "ds_io_open_args": (
        "A queue of reads and writes.",
        (
            _SIZE,
            Field("backend", "i32", "ds_io_backend; the one in use is written here"),
            Field("block_size", "i64", "bytes of one transfer, 512 to 2^30"),
            Field("queue_depth", "i32", "transfers under way per worker"),
            Field("workers", "i32", "threads; a request is cut into as many parts"),
            Field("single_submit", "i32", "1: tell the system of each transfer by itself"),
            Field("overlap_events", "i32", "1: replace each finished transfer at once"),
            Field("direct", "i32", "1: bypass the page cache where possible"),
            _RESERVED,
            Field("queue", "out", "the queue is written here"),
        ),
    ),
    "ds_io_submit_args": (
        "One request.",
        (
            _SIZE,
            Field("write", "i32", "1: write, 0: read"),
            Field("queue", "out", "the queue"),
            Field("path", "in", "bytes (POSIX) or UTF-16 (Windows), null-terminated; or null"),
            Field("given", "i64", "without a path: a descriptor (POSIX) or HANDLE (Windows)"),
            Field("offset", "i64", "first byte in the file"),
            Field("bytes", "i64", "length"),
            Field("memory", "out", "must stay until the request is over"),
            Field("ticket", "i64", "the number to wait by is written here"),
            Field("os_error", "i32", "the system's error is written here"),
            _RESERVED,
        ),
    ),
    "ds_io_wait_args": (
        "The end of one request.",
        (
            _SIZE,
            Field("timeout_ms", "i32", "at most so long; negative: until it is over"),
            Field("queue", "out", "the queue"),
            Field("ticket", "i64", "of ds_io_submit"),
            Field("state", "i32", "ds_io_state is written here; any but pending ends the ticket"),
            Field("os_error", "i32", "the system's error, when failed"),
            Field("moved", "i64", "bytes transferred"),
            Field("bad_offset", "i64", "of the transfer that failed"),
            Field("bad_bytes", "i64", "of the transfer that failed"),
        ),
    ),
    "ds_io_memory_args": (
        "Page-aligned memory.",
        (
            _SIZE,
            Field("locked", "i32", "1: keep it out of the swap file; whether it is, is written"),
            Field("bytes", "i64", "length"),
            Field("memory", "out", "the address is written here"),
        ),
    ),
}


def header_section() -> str:
    """Return the C text of the structs."""
    lines = [BEGIN]
    for name, (title, fields) in STRUCTS.items():
        width = max(len(KINDS[f.kind][0] + f.name) for f in fields) + 2
        lines += ["", f"/* {title} */", f"typedef struct {name} {{"]
        for field in fields:
            declaration = KINDS[field.kind][0] + field.name + ";"
            lines.append(f"    {declaration:<{width}}/* {field.doc} */")
        lines.append(f"}} {name};")
    return "\n".join([*lines, "", END])


def layout_table() -> str:
    """Return the C text of the sizes and offsets, as the C compiler sees them."""
    lines = ["// Written by op_builder/abi.py: do not edit."]
    for name, (_, fields) in STRUCTS.items():
        offsets = ",\n    ".join(f"offsetof({name}, {field.name})" for field in fields)
        lines.append(
            f"static const uint32_t k_{name}[] = {{\n    sizeof({name}),\n    {offsets}}};"
        )
    rows = ",\n".join(
        f'    {{"{name}", k_{name}, sizeof(k_{name}) / sizeof(uint32_t)}}' for name in STRUCTS
    )
    return "\n\n".join(lines) + f"\n\nstatic const Layout kLayouts[] = {{\n{rows}}};\n"


def module_text() -> str:
    """Return the text of deepspeed/ops/abi.py."""
    lines = [
        "# SPDX-License-Identifier: Apache-2.0",
        '"""Argument structs of the native library. Written by op_builder/abi.py: do not edit."""',
        "",
        "import ctypes",
        "import struct",
    ]
    for name, (title, fields) in STRUCTS.items():
        class_name = "".join(part.capitalize() for part in name.split("_")[1:])
        lines += ["", "", f"class {class_name}(ctypes.Structure):", f'    """{title}"""', ""]
        lines += ["    _fields_ = ("]
        lines += [f'        ("{f.name}", ctypes.{KINDS[f.kind][1]}),' for f in fields]
        lines += ["    )"]
    lines += ["", "", "STRUCTS: dict[str, type[ctypes.Structure]] = {"]
    for name in STRUCTS:
        lines.append(f'    "{name}": {"".join(part.capitalize() for part in name.split("_")[1:])},')
    lines += [
        "}",
        "",
        "# The same structs for struct.pack, which fills one several times faster than ctypes.",
    ]
    lines += ["FORMATS: dict[str, struct.Struct] = {"]
    for name, (_, fields) in STRUCTS.items():
        code = "".join(KINDS[f.kind][2] for f in fields)
        lines.append(f'    "{name}": struct.Struct("@{code}"),')
    return "\n".join([*lines, "}", ""])


def expected_files() -> dict[Path, str]:
    """Return each written file with the text it should hold."""
    header = HEADER.read_text(encoding="utf-8")
    before, _, rest = header.partition(BEGIN)
    _, _, after = rest.partition(END)
    return {
        HEADER: before + header_section() + after,
        LAYOUT: layout_table(),
        MODULE: module_text(),
    }


def stale_files() -> list[Path]:
    """Return the written files whose text differs from the table."""
    return [
        path
        for path, text in expected_files().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]


def main(argv: list[str]) -> int:
    """Rewrite the files, or with --check name the stale ones and return 1."""
    stale = stale_files()
    if "--check" in argv:
        for path in stale:
            print(f"{path}: stale, run python -m op_builder.abi")
        return 1 if stale else 0
    texts = expected_files()
    for path in stale:
        path.write_text(texts[path], encoding="utf-8", newline="\n")
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
