# SPDX-License-Identifier: Apache-2.0
"""Lightning's DeepSpeedStrategy. No download, no GPU needed: its check for one is left out.

python examples/lightning_fit.py
"""

from __future__ import annotations

import argparse

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy

from deepspeed.ops.adam import DeepSpeedCPUAdam

GPU = torch.cuda.is_available()


class Net(L.LightningModule):
    """Learns the sum of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1)
        )
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return DeepSpeedCPUAdam(self.parameters(), lr=1e-2)


class OnAnyDevice(DeepSpeedStrategy):
    """The strategy without its checks for CUDA where there is none."""

    def setup_environment(self) -> None:
        if GPU:
            return super().setup_environment()
        self.accelerator.setup_device(self.root_device)
        self._init_deepspeed_distributed()
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="out/lightning")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--stage", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(4 * args.steps, 8)
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    strategy = OnAnyDevice(stage=args.stage, process_group_backend=None if GPU else "gloo")
    module = Net()
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="auto" if GPU else "cpu",
        devices=1,
        max_steps=args.steps,
        default_root_dir=args.out,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    engine = strategy.model
    print(f"{type(engine).__name__}, stage {args.stage}")
    print(f"loss {sum(module.losses[:10]) / 10:.3f} -> {sum(module.losses[-10:]) / 10:.3f}")


if __name__ == "__main__":
    main()
