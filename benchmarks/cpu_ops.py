# SPDX-License-Identifier: Apache-2.0
"""Times the CPU ops against the memory: each optimizer, quantization and casts, beside a triad in the same rounds.

    python benchmarks/cpu_ops.py [--upstream PYTHON] [--numel 16777216] [--threads 2] [--rounds 30] [--out FILE]

A triad (a = b + 3 c, 12 bytes an element) says what the memory gives. A round times it and then every row once, each
after as many other bytes were read, so that all see the same machine and the same caches; the best of the rounds is
shown. Bytes are those that a row has to read and write; LAMB, whose step needs the norm of the whole update, has to read
its param and moments twice. `--upstream` names an interpreter that has upstream's DeepSpeed with its CPU optimizers
compiled; it runs in a process of its own.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

FILE = Path(__file__).resolve()
F32, BF16 = torch.float32, torch.bfloat16
DTYPES = {"fp32": F32, "bf16": BF16}
# optimizer -> fp32 moments, whether the moments are walked twice
OPTIMIZERS = {
    "Adam": (2, False),
    "Adagrad": (1, False),
    "Lion": (1, False),
    "SGD": (1, False),
    "LAMB": (2, True),
}
PATHS = ("avx512", "avx2", "neon")


def make_param(numel, dtype):
    from deepspeed.ops import pages

    param = torch.nn.Parameter(torch.empty(0, dtype=dtype))
    param.data = pages.zeros(numel, dtype).normal_()
    param.grad = pages.zeros(numel, dtype).normal_()
    return param


def ours(name, param):
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion
    from deepspeed.ops.sgd import DeepSpeedCPUSGD

    makers = {
        "Adam": lambda: DeepSpeedCPUAdam([param], weight_decay=0.01),
        "Adagrad": lambda: DeepSpeedCPUAdagrad([param]),
        "Lion": lambda: DeepSpeedCPULion([param], weight_decay=0.01),
        "SGD": lambda: DeepSpeedCPUSGD([param], momentum=0.9),
        "LAMB": lambda: FusedLamb([param], weight_decay=0.01),
    }
    return makers[name]()


def bytes_of(name, dtype):
    """Bytes an element of one step."""
    moments, twice = OPTIMIZERS[name]
    low = dtype.itemsize
    state = low if name == "LAMB" else 4  # FusedLamb's moments have the param's dtype
    moved = 3 * low + 2 * state * moments
    return moved + (low + state * moments if twice else 0)


def optimizer_rows(args, paths):
    from deepspeed.ops import registry

    rows = {}
    for dtype_name, dtype in DTYPES.items():
        for name in OPTIMIZERS:
            optimizer = ours(name, make_param(args.numel, dtype))
            for path in paths:

                def step(optimizer=optimizer, path=path):
                    registry.use_isa(path)
                    return timed(optimizer.step)

                rows[f"{name} {dtype_name}", f"ours, {path}"] = bytes_of(name, dtype), step
            if dtype is F32 and name in ("Adam", "Adagrad", "SGD"):
                kind, more = {
                    "Adam": (torch.optim.AdamW, {}),
                    "Adagrad": (torch.optim.Adagrad, {}),
                    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
                }[name]
                fused = kind([make_param(args.numel, F32)], lr=1e-3, fused=True, **more)
                rows[f"{name} fp32", "torch, fused"] = (
                    bytes_of(name, F32),
                    lambda fused=fused: timed(fused.step),
                )
    return rows


def quantization_rows(args, paths):
    from deepspeed.ops import native, registry

    ops, rows, n = registry.ops(), {}, args.numel
    groups = n // 64

    def add(title, moved, name, *arguments):
        if name == "torch":
            rows[title, "torch"] = moved, lambda: timed(arguments[0])
            return
        for path in paths:
            # The kernel alone, into one output: fresh memory would cost more than the kernel.
            packed = ops[name].pack(*arguments)
            entry = native.load().entry(ops[name].cpu)

            def call(path=path, packed=packed, entry=entry, kept=arguments):
                registry.use_isa(path)
                return timed(lambda: entry(packed[0]))

            rows[title, f"ours, {path}"] = moved, call

    for dtype_name, dtype in DTYPES.items():
        low = dtype.itemsize
        x = torch.randn(groups, 64).to(dtype)
        for bits in (8, 6, 4):
            for asym in (False, True):
                # Groups of 64 keep a scale of four bytes each, and as much for an offset.
                moved = low + bits / 8 + (8 if asym else 4) / 64
                kind = f"int{bits}{' asym' if asym else ''}"
                kept = ops["quantize_groups"](x, groups, bits, asym, -1)
                add(f"{dtype_name} to {kind}", moved, "quantize_groups", x, groups, bits, asym, -1)
                rule = (groups, bits, asym, dtype)
                add(f"{kind} to {dtype_name}", moved, "dequantize_groups", *kept, *rule)
        for bits in (8, 4):
            kept = ops["quantize_weight"](x, bits, 64, 1, False)
            title, rule = f"int{bits} weights to {dtype_name}", (bits, 64, 1, False, dtype)
            add(title, low + bits / 8 + 2 * low / 64, "dequantize_weight", *kept, *rule)
        for exponent, mantissa in ((4, 3), (3, 2), (4, 7)):
            bits = 1 + exponent + mantissa
            form, moved = (512, exponent, mantissa), low + bits / 8 + 4 / 512
            packed = ops["fp_quantize"](x, *form, -1)
            add(f"{dtype_name} to fp{bits} groups", moved, "fp_quantize", x, *form, -1)
            rule = (*form, dtype, None, 1)
            add(f"fp{bits} groups to {dtype_name}", moved, "fp_dequantize", packed, *rule)
    x = torch.randn(n)
    for dtype_name, dtype in (("bf16", BF16), ("fp8 e4m3", torch.float8_e4m3fn)):
        out = torch.empty(n, dtype=dtype)
        add(f"cast fp32 to {dtype_name}", 4 + dtype.itemsize, "cast", x, out)
        add(f"cast fp32 to {dtype_name}", 4 + dtype.itemsize, "torch", lambda out=out: out.copy_(x))
    return rows


class Upstream:
    """Upstream's CPU optimizers in their own process: this file serves one step a line there."""

    def __init__(self, args):
        words = [args.upstream, str(FILE), "--serve", "--numel", str(args.numel)]
        self.process = subprocess.Popen(
            [*words, "--threads", str(args.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            cwd=FILE.parent,
        )

    def turn(self, name):
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError(f"upstream's process ended with {self.process.wait()}")


def serve(args):
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.lion import DeepSpeedCPULion

    kinds = {"Adam": DeepSpeedCPUAdam, "Adagrad": DeepSpeedCPUAdagrad, "Lion": DeepSpeedCPULion}
    made = {}
    for line in sys.stdin:
        key = line.strip()
        if key not in made:
            name, dtype = key.split()
            param = torch.nn.Parameter(torch.randn(args.numel).to(DTYPES[dtype]))
            param.grad = torch.randn(args.numel).to(DTYPES[dtype])
            made[key] = kinds[name]([param])
            made[key].step()
        print("seconds", timed(made[key].step), flush=True)


def timed(step):
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(rows, args):
    """Best seconds of each row; the triad has the key None."""
    from deepspeed.ops import pages
    from deepspeed.ops.norms import squared_norm

    a, b, c, other = (pages.zeros(args.numel, F32).fill_(i) for i in range(4))
    steps = {None: lambda: timed(lambda: torch.add(b, c, alpha=3.0, out=a))}
    steps.update((key, step) for key, (_, step) in rows.items())
    best = {}
    for number in range(args.rounds + 1):
        for key, step in steps.items():
            # Else a row would find in the cache what the one before left there, or write it back, and torch's threads
            # would still spin.
            squared_norm(other)
            seconds = step()
            if number:
                best[key] = min(best.get(key, seconds), seconds)
    return best


def report(args):
    from deepspeed.ops import native

    paths = [path for path in PATHS if path in native.status().available]
    rows = optimizer_rows(args, paths)
    if args.upstream:
        upstream = Upstream(args)
        for name in args.upstream_names.split(","):
            for dtype_name, dtype in DTYPES.items():
                key = f"{name} {dtype_name}"
                rows[key, "upstream"] = bytes_of(name, dtype), lambda key=key: upstream.turn(key)
    tables = {"Optimizers": measure(rows, args)}
    moved = {key: value[0] for key, value in rows.items()}
    if args.upstream:
        upstream.process.stdin.close()
    del rows
    rows = quantization_rows(args, paths)
    tables["Quantization and casts"] = measure(rows, args)
    moved.update({key: value[0] for key, value in rows.items()})
    lines = [
        f"# CPU ops, {args.numel:,} elements, {args.threads} threads ({date.today()})",
        "",
        f"{platform.machine()} {platform.system()}, torch {torch.__version__}, {native.build_record().get('compiler')}",
        "",
        f"Command: `{' '.join(['python', 'benchmarks/cpu_ops.py', *sys.argv[1:]])}`",
        f"(best of {args.rounds} rounds, all rows in turn, a triad in each round)",
    ]
    for title, best in tables.items():
        triad = 12 * args.numel / best.pop(None) / 1e9
        lines += ["", f"## {title} (triad: {triad:.1f} GB/s)", ""]
        lines += ["| | | best ms | GB/s | of the triad |", "|---|---|---|---|---|"]
        for (row, who), seconds in sorted(best.items()):
            rate = moved[row, who] * args.numel / seconds / 1e9
            lines.append(
                f"| {row} | {who} | {seconds * 1e3:.2f} | {rate:.1f} | {rate / triad:.0%} |"
            )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--upstream", metavar="PYTHON", help="interpreter that has upstream")
    parser.add_argument(
        "--upstream-names", default="Adam,Adagrad,Lion", help="what it has compiled"
    )
    parser.add_argument("--numel", type=int, default=1 << 24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.serve:
        serve(args)
        return
    text = report(args)
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
