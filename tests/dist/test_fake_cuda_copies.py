# SPDX-License-Identifier: Apache-2.0
"""Gradients and weights on their way between a GPU and the host, run on fake CUDA devices."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import fake_cuda, parity
from tests.helpers.parity import Cell
from tests.helpers.ranks import RankPool

REASON = fake_cuda.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

HOST = {"device": "cpu", "pin_memory": True}


def _in_pieces(rank, ranks):
    from deepspeed.runtime.zero import host_copies

    sizes = host_copies._PIECE, host_copies._MOST_BYTES
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}
    cells = []
    for stage, dtype in ((2, "bf16"), (3, "fp16"), (1, "fp32")):
        for pinned in (False, True):
            place = {"device": "cpu", "pin_memory": pinned}
            zero = {"stage": stage, "offload_optimizer": place, "reduce_bucket_size": 300}
            zero["overlap_comm"] = pinned
            if stage == 3:
                zero |= {"offload_param": place, "stage3_param_persistence_threshold": 20}
            extra = {"zero_optimization": zero, **(sgd if stage == 1 else {})}
            cells.append(Cell(stage, dtype, True, 2, stage == 3, extra=extra))
    want = [parity.engine_run(cell, rank, ranks, "cuda") for cell in cells]
    # so small that a parameter goes in many, and some of them have to be waited for
    host_copies._PIECE, host_copies._MOST_BYTES = 50, 300
    try:
        for cell, whole in zip(cells, want, strict=True):
            got = parity.engine_run(cell, rank, ranks, "cuda")
            fake_cuda.check()
            assert got.losses == whole.losses and got.norms == whole.norms
            assert all(torch.equal(got.weights[name], w) for name, w in whole.weights.items())
    finally:
        host_copies._PIECE, host_copies._MOST_BYTES = sizes


def test_what_goes_to_the_host_and_back_goes_in_pieces_that_do_not_race(gpu1, gpus2):
    gpu1.run(_in_pieces, 1, timeout=120)
    gpus2.run(_in_pieces, 2, timeout=120)


def _edited(rank, folder):
    import deepspeed
    from deepspeed import utils

    files = {"device": "nvme", "nvme_path": folder, "pin_memory": True}
    for place in (HOST, files):
        zero = {"stage": 3, "stage3_param_persistence_threshold": 20, "offload_optimizer": place}
        cell = Cell(3, "fp32", extra={"zero_optimization": zero})
        engine = deepspeed.initialize(model=parity.model(), config=cell.config(1))[0]
        for device in ("cpu", "cuda"):
            loss = parity.loss_of(engine, *parity.batch(0, 0, 0, torch.float32, "cuda"))
            engine.backward(loss)
            engine.step()
            for param in engine.module.parameters():
                # at once after each other: the first may still be on its way to the device
                for number in (0.25, 0.5):
                    values = torch.full(param.ds_shape, number, device=device)
                    utils.safe_set_full_fp32_param(param, values)
                assert (utils.safe_get_full_fp32_param(param) == 0.5).all()
        engine.destroy()
        fake_cuda.check()


def test_edits_of_offloaded_fp32_weights_do_not_overtake_copies_to_the_device(gpu1, tmp_path):
    gpu1.run(_edited, str(tmp_path))
