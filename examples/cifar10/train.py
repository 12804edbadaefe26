# SPDX-License-Identifier: Apache-2.0
"""Train a small convolutional network on ten classes of pictures: ZeRO-2, Adam's states and steps on the CPU.

deepspeed examples/cifar10/train.py                         pictures drawn here, one process a device
deepspeed --num_gpus 2 examples/cifar10/train.py            two processes (on a CPU too)
deepspeed examples/cifar10/train.py --data DIR --epochs 10  a local copy of CIFAR-10
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import pictures
import plot
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset
from tqdm import tqdm

import deepspeed

HERE = Path(__file__).resolve().parent


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CIFAR-10 with ZeRO-2 and CPU-offloaded Adam")
    parser.add_argument("--data", type=Path, help="folder with a local copy of CIFAR-10")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument(
        "--pictures", type=int, default=8000, help="how many to draw without --data"
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plot")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--stage", type=int, choices=(0, 1, 2), default=2, help="ZeRO stage")
    return parser.parse_args()


def network() -> nn.Module:
    """Three convolutions and a linear layer, about 110 thousand params."""

    def block(channels_in: int, channels_out: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        return [convolution, nn.GroupNorm(8, channels_out), nn.ReLU(), nn.MaxPool2d(2)]

    layers = [*block(3, 32), *block(32, 64), *block(64, 128)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 10))


def configuration(args: argparse.Namespace, pictures_in_all: int) -> dict:
    """The JSON file beside this script, with the length of the run and the options filled in."""
    config = json.loads((HERE / "ds_config.json").read_text(encoding="utf-8"))
    steps = args.epochs * (pictures_in_all // config["train_batch_size"])
    config["scheduler"]["params"]["total_num_steps"] = max(steps, 1)
    config["zero_optimization"]["stage"] = args.stage
    if args.stage == 0:
        del config["zero_optimization"]["offload_optimizer"]
    if args.dtype != "fp32":
        config[args.dtype] = {"enabled": True}
    return config


def train(engine: deepspeed.DeepSpeedEngine, loader: object, epochs: int) -> list[float]:
    """The loss of each step, as this rank saw it."""
    losses: list[float] = []
    dtype = next(engine.parameters()).dtype
    shown = engine.global_rank == 0
    pause = 0.1 if sys.stdout.isatty() else 5.0  # seconds between redraws; few lines in a log file
    steps = epochs * len(loader)
    bar = tqdm(
        total=steps,
        unit="step",
        disable=not shown,
        file=sys.stdout,
        ncols=90,
        mininterval=pause,
    )
    for _ in range(epochs):
        for images, labels in loader:
            images, labels = images.to(engine.device, dtype), labels.to(engine.device)
            loss = functional.cross_entropy(engine(images).float(), labels)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
            bar.update()
    bar.close()
    return losses


@torch.no_grad()
def accuracy(engine: deepspeed.DeepSpeedEngine, test: TensorDataset) -> float:
    """Share of the test pictures that the network names rightly."""
    engine.eval()
    dtype = next(engine.parameters()).dtype
    right = 0
    for images, labels in zip(*(part.split(500) for part in test.tensors), strict=True):
        guesses = engine.module(images.to(engine.device, dtype)).argmax(dim=1)
        right += int((guesses.cpu() == labels).sum())
    return right / len(test)


def main() -> None:
    args = parse_arguments()
    sys.stdout.reconfigure(
        encoding="utf-8", errors="replace"
    )  # a Windows console may start in another
    torch.manual_seed(0)
    if args.data:
        training_data, test = pictures.cifar10(args.data)
    else:
        training_data, test = pictures.drawn(args.pictures, seed=0), pictures.drawn(2000, seed=1)
    engine, _, loader, _ = deepspeed.initialize(
        model=network(),
        training_data=training_data,
        config=configuration(args, len(training_data)),
    )
    first = engine.global_rank == 0
    if first:
        source = f"CIFAR-10 from {args.data}" if args.data else "pictures drawn here"
        print(f"{len(training_data)} training and {len(test)} test pictures ({source})", flush=True)
    start = time.perf_counter()
    losses = train(engine, loader, args.epochs)
    seconds = time.perf_counter() - start
    if first:
        args.out.mkdir(parents=True, exist_ok=True)
        curve = args.out / "cifar10_loss.png"
        plot.png_curve(curve, losses, "training loss by step")
        print(f"\nloss of {len(losses)} steps\n{plot.text_curve(losses)}\n")
        print(f"loss {losses[0]:.3f} -> {plot.smooth(losses)[-1]:.3f} in {seconds:.1f} s")
        print(f"accuracy on the test pictures: {100 * accuracy(engine, test):.1f} %")
        print(f"plot: {curve.resolve()}", flush=True)
    engine.destroy()


if __name__ == "__main__":
    main()
