# SPDX-License-Identifier: Apache-2.0
"""bf16 and fp16 products on a CPU without fast ones: torch's own against ours through fp32, in one run.

python benchmarks/lowp_products.py                  # as an AVX2 machine would run it
python benchmarks/lowp_products.py --isa native     # as this machine runs it
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cpuinfo
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepspeed.accelerator.lowp_products import Products, native

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
ISA = {
    "native": {},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}
Step = Callable[[], None]


class Bert(nn.Module):
    """The size that HelloDeepSpeed trains: 6 layers of 256, 8 heads, 50265 words, tied head, dropout 0.1."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50265, 256)
        self.places = nn.Embedding(512, 256)
        self.layers = nn.ModuleList(BertLayer() for _ in range(6))
        self.bias = nn.Parameter(torch.zeros(50265))

    def forward(self, ids: Tensor, mask: Tensor, chosen: Tensor) -> Tensor:
        x = F.dropout(self.words(ids) + self.places.weight, 0.1)
        for layer in self.layers:
            x = layer(x, mask)
        return F.linear(x.flatten(0, 1)[chosen], self.words.weight, self.bias)


class BertLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(256, 768)
        self.out = nn.Linear(256, 256)
        self.up, self.down = nn.Linear(256, 512), nn.Linear(512, 256)
        self.norms = nn.ModuleList(nn.LayerNorm(256) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 8, 32).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.1)
        x = self.norms[0](x + F.dropout(self.out(mixed.transpose(1, 2).flatten(2)), 0.1))
        return self.norms[1](x + F.dropout(self.down(F.gelu(self.up(x))), 0.1))


def cifar_net() -> nn.Module:
    """The network of the CIFAR-10 example."""
    first = [nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2, 2)]
    second = [nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2, 2), nn.Flatten()]
    head = [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return nn.Sequential(*first, *second, *head)


# ------------------------------------------------------------------ cases: dtype -> one forward and backward
def _bert(dtype: torch.dtype) -> tuple[nn.Module, Step]:
    model = Bert().to(dtype)
    ids, mask = torch.randint(50265, (1, 512)), torch.ones(1, 1, 512, 512, dtype=torch.bool)
    mask[..., 400:] = False
    chosen = torch.arange(0, 512, 8)
    words = torch.randint(50265, (64,))
    return model, lambda: F.cross_entropy(model(ids, mask, chosen), words).backward()


def _cifar(dtype: torch.dtype) -> tuple[nn.Module, Step]:
    model = cifar_net().to(dtype)
    x, y = torch.randn(16, 3, 32, 32).to(dtype), torch.randint(10, (16,))
    return model, lambda: F.cross_entropy(model(x), y).backward()


def _linear(rows: int, wide: int, out: int) -> Callable[[torch.dtype], tuple[nn.Module, Step]]:
    def make(dtype: torch.dtype) -> tuple[nn.Module, Step]:
        model = nn.Linear(wide, out).to(dtype)
        x, g = torch.randn(rows, wide).to(dtype).requires_grad_(), torch.randn(rows, out).to(dtype)
        return model, lambda: model(x).backward(g)

    return make


def _attention(dtype: torch.dtype) -> tuple[nn.Module, Step]:
    class Attend(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    model, x = Attend(), torch.randn(2, 8, 256, 64).to(dtype).requires_grad_()
    g = torch.randn(x.shape).to(dtype)
    return model, lambda: model(x).backward(g)


CASES = {
    "Linear 128 x 768 -> 3072": _linear(128, 768, 3072),
    "Linear 16 x 400 -> 120": _linear(16, 400, 120),
    "LM head 64 x 256 -> 50265": _linear(64, 256, 50265),
    "attention 2 x 8 x 256 x 64": _attention,
    "BERT step (batch 1 x 512)": _bert,
    "CIFAR-10 step (batch 16)": _cifar,
}


def _timed(steps: list[Step], budget: float) -> list[float]:
    """Median seconds of each step, taken in turns so that a disturbance meets all of them."""
    for step in steps:
        step()
    taken: list[list[float]] = [[] for _ in steps]
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(taken[0]) < 3:
        for step, times in zip(steps, taken, strict=True):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
    return [sorted(times)[len(times) // 2] for times in taken]


def _measure(name: str, budget: float) -> None:
    _, wide = CASES[name](torch.float32)
    for label, dtype in LOW.items():
        _, plain = CASES[name](dtype)
        model, step = CASES[name](dtype)
        Products(model, frozenset({dtype}))
        fp32, torchs, ours = _timed([wide, plain, step], budget)
        times = " | ".join(f"{1e3 * t:9.2f}" for t in (fp32, torchs, ours))
        print(f"| {name:26} | {label} | {times} | {torchs / ours:6.1f}x |", flush=True)


def _table(isa: str, threads: int, budget: float) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    fast = ", ".join(label for label, dtype in LOW.items() if native(dtype)) or "none"
    print(f"# bf16 and fp16 products through fp32, {datetime.date.today():%Y-%m-%d}\n")
    cpu = cpuinfo.get_cpu_info().get("brand_raw", platform.processor())
    print(f"{cpu}, {platform.system()}, torch {torch.__version__}, {threads} thread(s), ISA {isa};")
    print(f"fast in torch itself: {fast}. Forward and")
    print("backward, median milliseconds, the three taken in turns.\n")
    print("| case | dtype | fp32 | torch | ours | torch / ours |\n|---|---|---:|---:|---:|---:|")
    for name in CASES:
        _measure(name, budget)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", choices=ISA, default="avx2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="time of each row")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        _table(args.isa, args.threads, args.seconds)
        return 0
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--child"]
    return subprocess.run(command, env={**os.environ, **ISA[args.isa]}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
