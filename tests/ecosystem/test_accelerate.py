# SPDX-License-Identifier: Apache-2.0
"""An accelerate loop with and without us: accumulation, a scheduler of its own, states saved and loaded, the end."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.libraries import forget

accelerate = pytest.importorskip("accelerate", minversion="1.1")
pytestmark = pytest.mark.filterwarnings("ignore")


def prepared(stage, offload):
    forget()
    options = {"cpu": True}
    if stage is not None:
        where = "cpu" if offload else "none"
        options = {
            "deepspeed_plugin": accelerate.DeepSpeedPlugin(
                zero_stage=stage,
                gradient_accumulation_steps=2,
                gradient_clipping=1.0,
                offload_optimizer_device=where,
                offload_param_device=where if stage == 3 else "none",
                zero3_save_16bit_model=True,
            )
        }
    runner = accelerate.Accelerator(gradient_accumulation_steps=2, **options)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(x, batch_size=2)
    return runner, *runner.prepare(net, optimizer, loader, scheduler)


def train(runner, net, optimizer, loader, scheduler):
    """One pass over the loader: losses and learning rates."""
    seen = []
    for x in loader:
        with runner.accumulate(net):
            loss = (net(x) - x[:, :3]).square().mean()
            runner.backward(loss)
            if runner.sync_gradients:
                assert float(runner.clip_grad_norm_(net.parameters(), 1.0)) > 0
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        seen.append((loss.item(), optimizer.param_groups[0]["lr"]))
    return seen


@pytest.mark.parametrize(
    ("stage", "offload"), [(0, False), (1, False), (2, True), (3, False), (3, True)]
)
def test_a_loop_goes_as_without_deepspeed_and_from_a_saved_state(
    stage, offload, tmp_path, monkeypatch
):
    want = train(*(plain := prepared(None, False)))
    want += train(*plain)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    run = prepared(stage, offload)
    runner, engine = run[:2]
    got = train(*run)
    runner.save_state(str(tmp_path))
    then = train(*run)
    # the same arithmetic but for the order of sums in the norm
    torch.testing.assert_close(torch.tensor(got + then), torch.tensor(want), rtol=1e-4, atol=1e-6)

    runner.load_state(str(tmp_path))
    assert train(*run) == then  # the scheduler outside still drives the learning rate
    weights = runner.get_state_dict(engine)
    assert {k: tuple(v.shape) for k, v in weights.items()} == {
        "0.weight": (16, 5),
        "0.bias": (16,),
        "2.weight": (3, 16),
        "2.bias": (3,),
    }
    assert type(runner.unwrap_model(engine)) is torch.nn.Sequential
    runner.free_memory(*run[1:])
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.module.modules()]
    assert sum(hooks) == 0
