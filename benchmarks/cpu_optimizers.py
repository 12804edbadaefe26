# SPDX-License-Identifier: Apache-2.0
"""Times one Adam step on the CPU: ours, torch's fused and foreach AdamW, and upstream's DeepSpeedCPUAdam.

    python benchmarks/cpu_optimizers.py [--upstream PYTHON] [--isa avx2] [--numel 33554432] [--threads 2] [--out FILE]

All rivals of a table take turns in the same run, a pause between turns (OpenMP's threads go on spinning for a while
after torch's operators), and the best and the median of the rounds are shown. `--upstream` names an interpreter that
has upstream installed; it runs there in a process of its own, which compiles its op on first use (minutes). `--isa avx2` shows a machine without AVX-512: our path is
forced, torch is told so, and upstream's op is compiled for it.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

FILE = Path(__file__).resolve()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RULE = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def make_param(numel, dtype):
    """A param with a gradient, of normal numbers."""
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(numel).to(dtype))
    param.grad = torch.randn(numel).to(dtype)
    return param


def on_engine_pages(param):
    """The same numbers where the engine keeps its slabs: on large pages, if the system gives them."""
    from deepspeed.ops import pages

    data, grad = param.data, param.grad
    param.data = pages.zeros(data.numel(), data.dtype).copy_(data)
    param.grad = pages.zeros(grad.numel(), grad.dtype).copy_(grad)
    return param


def timed(step):
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


class Ours:
    """DeepSpeedCPUAdam of this tree."""

    def __init__(self, numel, dtype):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        param = on_engine_pages(make_param(numel, DTYPES[dtype]))
        self.optimizer = DeepSpeedCPUAdam([param], **RULE)

    def turn(self):
        return timed(self.optimizer.step)


class OursMixed:
    """The step of ZeRO offload: fp32 master and moments, 16-bit gradient in, 16-bit param out, one pass."""

    def __init__(self, numel, dtype):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        self.param = on_engine_pages(make_param(numel, torch.float32))
        self.grad, self.param.grad = self.param.grad.to(DTYPES[dtype]), None
        self.low = torch.empty_like(self.grad)
        self.optimizer = DeepSpeedCPUAdam([self.param], **RULE)

    def turn(self):
        group = self.optimizer.param_groups[0]
        return timed(lambda: self.optimizer.step_shard(group, self.param, self.grad, self.low, 0.5))


class Torch:
    """torch.optim.AdamW."""

    def __init__(self, numel, dtype, **kind):
        self.optimizer = torch.optim.AdamW([make_param(numel, DTYPES[dtype])], **RULE, **kind)

    def turn(self):
        return timed(self.optimizer.step)


class TorchMixed:
    """The same work as OursMixed by torch's fused AdamW and two casts."""

    def __init__(self, numel, dtype):
        self.param = make_param(numel, torch.float32)
        self.grad = self.param.grad.to(DTYPES[dtype])
        self.low = torch.empty_like(self.grad)
        self.optimizer = torch.optim.AdamW([self.param], fused=True, **RULE)

    def turn(self):
        def step():
            self.param.grad.copy_(self.grad).mul_(0.5)
            self.optimizer.step()
            self.low.copy_(self.param.detach())

        return timed(step)


class Upstream:
    """DeepSpeedCPUAdam of another interpreter: this file serves one step a line there."""

    def __init__(self, dtype, args):
        words = [args.upstream, str(FILE), "--serve", dtype, "--numel", str(args.numel)]
        env = dict(os.environ)
        if args.isa:
            words += ["--isa", args.isa]
            built = Path(tempfile.gettempdir()) / f"upstream_ops_{args.isa}"
            env["TORCH_EXTENSIONS_DIR"] = str(built)
        self.process = subprocess.Popen(
            [*words, "--threads", str(args.threads)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            cwd=FILE.parent,
        )
        self._answer()  # ready

    def turn(self):
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        for line in self.process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError(f"upstream's process ended with {self.process.wait()}")

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


def serve(args):
    """Be upstream's process: one step for each line on stdin."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    if args.isa == "avx2":
        from deepspeed.ops.op_builder import CPUAdamBuilder

        CPUAdamBuilder.cpu_arch = lambda self: "-march=haswell"
        CPUAdamBuilder.simd_width = lambda self: "-D__AVX256__"
    optimizer = DeepSpeedCPUAdam([make_param(args.numel, DTYPES[args.serve])], **RULE)
    optimizer.step()
    print("seconds 0", flush=True)
    for _ in sys.stdin:
        print("seconds", timed(optimizer.step), flush=True)


def tables(args):
    """Name of each table -> (bytes that one element moves, {rival: how to make it})."""
    n = args.numel

    def upstream(dtype):
        if args.upstream is None:
            return {}
        return {"upstream DeepSpeedCPUAdam": lambda: Upstream(dtype, args)}

    made = {
        "fp32 params": (
            28,
            {
                "DeepSpeedCPUAdam": lambda: Ours(n, "fp32"),
                "torch AdamW fused": lambda: Torch(n, "fp32", fused=True),
                "torch AdamW foreach": lambda: Torch(n, "fp32", foreach=True),
                **upstream("fp32"),
            },
        )
    }
    for dtype in ("bf16", "fp16"):
        made[f"{dtype} params, fp32 moments"] = (
            22,
            {"DeepSpeedCPUAdam": lambda d=dtype: Ours(n, d), **upstream(dtype)},
        )
    made["fp32 params, bf16 gradients in, bf16 copy out"] = (
        28,
        {
            "DeepSpeedCPUAdam.step_shard": lambda: OursMixed(n, "bf16"),
            "torch AdamW fused and casts": lambda: TorchMixed(n, "bf16"),
        },
    )
    return made


def measure(rivals, rounds, pause):
    """Seconds of each round by rival, all in turn; the first round only warms up."""
    runners = {name: make() for name, make in rivals.items()}
    times = {name: [] for name in runners}
    for number in range(rounds + 1):
        for name, runner in runners.items():
            time.sleep(pause)
            seconds = runner.turn()
            if number:
                times[name].append(seconds)
    for runner in runners.values():
        getattr(runner, "close", lambda: None)()
    return times


def report(args):
    """Run every table; returns the text."""
    from deepspeed.ops import native

    lines = [
        f"# Adam on the CPU, {args.numel:,} elements, {args.threads} threads ({date.today()})",
        "",
        f"{cpu_name()}, torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}),"
        f" {platform.system()}, native path: {native.status().reason}",
        "",
        f"Command: `{' '.join(['python', 'benchmarks/cpu_optimizers.py', *sys.argv[1:]])}`",
        f"(best and median of {args.rounds} rounds, rivals in turn; ratio: rival's time over ours)",
    ]
    for title, (moved, rivals) in tables(args).items():
        times = measure(rivals, args.rounds, args.pause)
        own = next(iter(times.values()))
        lines += [
            "",
            f"## {title}",
            "",
            "| | best ms | median ms | GB/s (best) | ratio best | ratio median |",
        ]
        lines.append("|---|---|---|---|---|---|")
        for name, seconds in times.items():
            best, median = min(seconds), statistics.median(seconds)
            lines.append(
                f"| {name} | {best * 1e3:.2f} | {median * 1e3:.2f} |"
                f" {moved * args.numel / best / 1e9:.1f} | {best / min(own):.2f} |"
                f" {median / statistics.median(own):.2f} |"
            )
        print("\n".join(lines[-len(times) - 3 :]), flush=True)
    return "\n".join(lines) + "\n"


def cpu_name():
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next(
            line.split(":")[1].strip() for line in text.splitlines() if "model name" in line
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--upstream", metavar="PYTHON", help="interpreter that has upstream")
    parser.add_argument("--numel", type=int, default=1 << 25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--pause", type=float, default=0.3, help="seconds between turns")
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    parser.add_argument("--isa", choices=["avx2"], help="take the CPU for one without AVX-512")
    parser.add_argument("--serve", choices=sorted(DTYPES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.serve:
        serve(args)
        return
    if args.isa and os.environ.get("DS_CPU_ISA") != args.isa:
        # torch reads its variable while it is imported: start again with both set
        env = {**os.environ, "DS_CPU_ISA": args.isa, "ATEN_CPU_CAPABILITY": args.isa}
        sys.exit(subprocess.run([sys.executable, str(FILE), *sys.argv[1:]], env=env).returncode)
    text = report(args)
    if args.out:
        args.out.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
