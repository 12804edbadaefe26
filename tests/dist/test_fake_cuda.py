# SPDX-License-Identifier: Apache-2.0
"""What runs beside a GPU, run on fake CUDA devices: placement, streams, page-locked memory, gloo's staging.

The reference is the plain loop on the same device, so that nothing but the engine can differ.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.helpers import fake_cuda, parity, zenflow
from tests.helpers.parity import Cell, Run
from tests.helpers.ranks import RankPool

REASON = fake_cuda.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

BF16 = torch.bfloat16
HOST = {"device": "cpu", "pin_memory": True}


# ------------------------------------------------------------------ the device itself


def _device_sees(rank):
    cuda = torch.cuda
    values = torch.arange(8.0, device="cuda")
    told = {}

    def told_by(name, action):
        try:
            action()
            cuda.synchronize()
            told[name] = "nothing"
        except RuntimeError as error:
            told[name] = str(error)
        fake_cuda.forget()

    def early_read():
        late = values.to("cpu", non_blocking=True)
        assert late.isnan().all()
        cuda.current_stream().synchronize()
        assert late.tolist() == list(range(8))

    def early_write():
        source = torch.zeros(8, pin_memory=True)
        values.clone().copy_(source, non_blocking=True)
        source.fill_(1)

    def overwritten():
        target = torch.zeros(8, pin_memory=True)
        target.copy_(values, non_blocking=True)
        target.fill_(1)

    def no_wait():
        with cuda.stream(cuda.Stream()):
            values.add(1)

    def waits():
        other = cuda.Stream()
        other.wait_stream(cuda.current_stream())
        with cuda.stream(other):
            more = values.add(1)
        event = cuda.Event()
        event.record(other)
        event.wait()
        more.record_stream(cuda.current_stream())
        assert more.sum().item() == 36

    told_by("early read", early_read)
    told_by("early write", early_write)
    told_by("overwritten", overwritten)
    told_by("waits", waits)
    told_by("no wait", lambda: (values.add_(1), no_wait()))
    told_by("devices", lambda: values + torch.ones(8))
    told_by("fresh", lambda: torch.empty(4, device="cuda").isnan().all().item() or 1 / 0)
    return told


def test_the_device_tells_what_a_gpu_would_only_sometimes_show(gpu1):
    (told,) = gpu1.run(_device_sees)
    assert told["early read"] == told["waits"] == told["fresh"] == "nothing"
    assert "might still read it" in told["early write"]
    assert "might still write it" in told["overwritten"]
    assert "did not wait for it" in told["no wait"]
    assert "same device" in told["devices"]


# ------------------------------------------------------------------ training


def _cells(ranks):
    zero3 = {"stage": 3, "stage3_param_persistence_threshold": 20}
    cells = [
        Cell(0, "bf16", accumulate=3, clip=True),
        Cell(1, "fp16", offload=True, accumulate=3, clip=True),
        Cell(2, "fp32", clip=True),
        Cell(2, "bf16", offload=True, accumulate=3),
        Cell(3, "bf16", accumulate=3, clip=True, extra={"zero_optimization": zero3}),
    ]
    both = {"offload_optimizer": HOST, "offload_param": HOST}
    half = {"offload_optimizer": {**HOST, "ratio": 0.5}}
    for section in (both, half):
        extra = {"zero_optimization": {**zero3, **section, "sub_group_size": 300}}
        cells.append(Cell(3, "fp16", True, 3, True, extra=extra))
    cells.append(Cell(1, "fp32", True, 1, True, extra={"zero_optimization": {"stage": 1, **half}}))
    return cells


def _trained(rank, ranks):
    for cell in _cells(ranks):
        got = parity.engine_run(cell, rank, ranks, "cuda")
        fake_cuda.check()
        want = parity.plain_run(cell, rank, ranks, "cuda")
        assert all(values.is_cuda for values in got.weights.values())
        parity.compare(_on_host(got), _on_host(want), cell, exact=False)


def _on_host(run):
    return Run(run.losses, {name: v.cpu() for name, v in run.weights.items()}, run.norms)


def test_one_gpu_trains_as_the_plain_loop(gpu1):
    gpu1.run(_trained, 1, timeout=120)


def test_two_gpus_on_gloo_train_as_the_plain_loop(gpus2):
    gpus2.run(_trained, 2, timeout=120)


# ------------------------------------------------------------------ the rest of the engine


def _engine(stage, **section):
    import deepspeed

    cell = Cell(stage, "bf16")
    config = cell.config(1)
    config["zero_optimization"].update(section)
    if stage == 3:
        config["zero_optimization"].setdefault("stage3_param_persistence_threshold", 20)
    return deepspeed.initialize(model=parity.model(), config=config)[0]


def _train(engine, steps, rank=0):
    losses = []
    for step in steps:
        loss = parity.loss_of(engine, *parity.batch(step, 0, rank, BF16, "cuda"))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


SECTIONS = (
    {},
    {"offload_optimizer": HOST},
    {"offload_optimizer": {**HOST, "ratio": 0.5}},
    {"offload_optimizer": HOST, "offload_param": HOST},
)


def _resumed(rank, folder):
    for number, section in enumerate(SECTIONS):
        engine = _engine(3, **section)
        _train(engine, range(2), rank)
        engine.save_checkpoint(folder, tag=f"t{number}")
        want = _train(engine, range(2, 4), rank)
        engine.destroy()
        engine = _engine(3, **section)
        engine.load_checkpoint(folder, tag=f"t{number}")
        assert _train(engine, range(2, 4), rank) == want
        engine.destroy()
        fake_cuda.check()


def test_two_gpus_resume_where_a_checkpoint_was_saved(gpus2, tmp_path):
    gpus2.run(_resumed, str(tmp_path), timeout=120)


def _states(rank):
    import deepspeed
    from deepspeed import utils

    for section in SECTIONS:
        engine = _engine(3, **section)
        _train(engine, range(1), rank)
        loss = parity.loss_of(engine, *parity.batch(7, 0, rank, BF16, "cuda"))
        engine.backward(loss)
        for param in engine.module.parameters():
            for read in (utils.safe_get_local_fp32_param, utils.safe_get_full_fp32_param):
                assert read(param).is_cuda and not read(param).isnan().any()
            for read in (utils.safe_get_local_optimizer_state, utils.safe_get_full_optimizer_state):
                assert not read(param, "exp_avg").isnan().any()
            assert not utils.safe_get_local_grad(param).isnan().any()
            utils.safe_set_full_fp32_param(param, utils.safe_get_full_fp32_param(param) * 0 + 0.25)
            assert (utils.safe_get_full_fp32_param(param) == 0.25).all()
        engine.step()
        params = list(engine.module.parameters())
        with deepspeed.zero.GatheredParameters(params, modifier_rank=0):
            if rank == 0:
                for param in params:
                    param.data.fill_(0.5)
        with deepspeed.zero.GatheredParameters(params):
            assert all((param == 0.5).all() for param in params)
        _train(engine, range(1), rank)
        engine.destroy()
        fake_cuda.check()


def test_two_gpus_read_and_write_states(gpus2):
    gpus2.run(_states, timeout=120)


def _built_inside(rank):
    import deepspeed

    for place, device in (("none", "cuda"), ("cpu", "cpu")):
        section = {} if place == "none" else {"offload_param": HOST}
        config = Cell(3, "bf16", extra={"zero_optimization": {"stage": 3, **section}}).config(1)
        with deepspeed.zero.Init(config_dict_or_path=config, remote_device=place, pin_memory=True):
            torch.manual_seed(rank)
            net = torch.nn.Sequential(torch.nn.Linear(13, 33), torch.nn.Linear(33, 5))
            with deepspeed.zero.GatheredParameters(list(net.parameters()), modifier_rank=0):
                net[0].bias.data.fill_(0.5)
            assert torch.empty(1).is_cuda  # the constructors are in place again
        for param in net.parameters():
            assert param.ds_tensor.device.type == device and param.ds_tensor.dtype == BF16
            assert device == "cuda" or param.ds_tensor.is_pinned()
        engine = deepspeed.initialize(model=net, config=config)[0]
        _train(engine, range(2), rank)
        fake_cuda.check()


def test_init_builds_over_gloo_and_keeps_slices_where_it_is_told(gpus2):
    gpus2.run(_built_inside)


def _moved(rank):
    engine, still = _engine(3), _engine(3)
    for pinned in (False, True):
        for non_blocking in (False, True):
            before = torch.cuda.memory_allocated()
            engine.offload_states(pin_memory=pinned, non_blocking=non_blocking)
            assert torch.cuda.memory_allocated() < before
            engine.reload_states(non_blocking=non_blocking)
            assert _train(engine, range(2)) == _train(still, range(2))
    fake_cuda.check()


def test_states_move_off_the_gpu_and_back(gpu1):
    gpu1.run(_moved)


def _activations(rank):
    from torch.utils.checkpoint import checkpoint

    from deepspeed.runtime.activation_checkpointing.offload_activations import (
        CheckpointHiddenStatesOffload,
    )

    torch.manual_seed(3)
    blocks = [torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()) for _ in range(5)]
    blocks = torch.nn.ModuleList(blocks).cuda()
    x = torch.randn(32, 64, device="cuda", requires_grad=True)

    def grads(offload):
        values = x * 1.0
        for block in blocks:
            if offload is not None:
                offload.mark(values)
            values = checkpoint(block, values, use_reentrant=False)
        leaves = [x, *blocks.parameters()]
        return [g.cpu() for g in torch.autograd.grad(values.sum(), leaves)]

    want = grads(None)
    for options in ({}, {"use_streams": False}, {"max_fwd_stash_count": 0, "keep_last_count": 0}):
        offload = CheckpointHiddenStatesOffload(min_offload_bytes=1, **options)
        for _ in range(2):
            with offload:
                got = grads(offload)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert offload.stats.restored_tensors
        fake_cuda.check()


def test_activations_go_to_the_host_and_come_back_on_a_stream_of_their_own(gpu1):
    gpu1.run(_activations)


def _read_and_written(rank, folder):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    handle = AsyncIOBuilder().load().aio_handle(1 << 16, 8, False, False, 2)
    path, values = os.path.join(folder, "values"), torch.arange(1000.0, device="cuda")
    handle.async_pwrite(values, path)
    values.zero_()  # what was given is written
    handle.wait()
    back = torch.empty_like(values)
    handle.sync_pread(back, path)
    assert back.tolist() == list(range(1000))
    locked = handle.new_cpu_locked_tensor(1000, torch.empty(0))
    assert locked.is_pinned()
    assert handle.free_cpu_locked_tensor(locked) is True
    assert handle.free_cpu_locked_tensor(torch.ones(3)) is False
    fake_cuda.check()


def test_file_handles_take_tensors_of_the_device_and_free_their_own_buffers(gpu1, tmp_path):
    gpu1.run(_read_and_written, str(tmp_path))


def _replayed(rank):
    from deepspeed.inference.graphs import ForwardGraphs

    net = parity.model(device="cuda")
    graphs = ForwardGraphs(net)
    for step in range(3):
        x, _ = parity.batch(step, 0, 0, torch.float32, "cuda")
        with torch.no_grad():
            want = net(x)
        assert torch.equal(graphs(x), want)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        ForwardGraphs(lambda values: values.sum().item())(x)
    fake_cuda.check()


def test_captured_passes_are_replayed_on_new_inputs(gpu1):
    gpu1.run(_replayed)


def _stepped_in_pieces(rank):
    from deepspeed.ops.adam import fused_adam

    numel, fused_adam._PIECE = 1000, 256
    torch.manual_seed(0)
    param, grad = torch.randn(numel), torch.randn(numel).bfloat16()
    on_device, on_host = torch.nn.Parameter(param.cuda()), torch.nn.Parameter(param.clone())
    optimizer = fused_adam.FusedAdam([on_device, on_host], lr=1e-2)
    group, gradient = optimizer.param_groups[0], grad.cuda()
    for _ in range(2):
        optimizer.step_shard(group, on_device, gradient, grad_scale=0.5)
        optimizer.step_shard(group, on_host, grad, grad_scale=0.5)
    # two steps of lr 1e-2 on weights below 4: rounding of either rule shows in the last bits
    torch.testing.assert_close(on_device.detach().cpu(), on_host.detach(), rtol=1e-6, atol=1e-7)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step_shard(group, on_device, gradient, grad_scale=0.5)
    # the gradient of one piece, before and after scaling, and of the piece before it
    assert torch.cuda.max_memory_allocated() - before <= 4 * 256 * 4
    fake_cuda.check()


def test_without_a_kernel_a_flat_step_takes_the_memory_of_a_piece(gpu1):
    gpu1.run(_stepped_in_pieces)


# ------------------------------------------------------------------ our kernels, by the driver that plays them


def _with_kernels(rank, library, folder):
    import ctypes
    from pathlib import Path

    from deepspeed.ops import cuda
    from deepspeed.ops.cuda_driver import Driver
    from tests.unit.cuda_loader import packs

    launches = []

    class OpenDriver(Driver):
        def launch(self, *args):
            launches.append(args)
            with fake_cuda.open_memory():
                super().launch(*args)

    class Side(cuda.TorchSide):
        def devices(self):  # this torch was made without CUDA
            return torch.cuda.device_count()

    ctypes.CDLL(library).fake_set(b"devices", torch.cuda.device_count())
    pack = packs.make(Path(folder), {"sm_80": b"sm_80 cubin"})
    before = cuda.use(cuda.Loader(Side(), lambda: OpenDriver(library), pack))
    try:
        _trained(rank, 1)
    finally:
        cuda.use(before)
    return len(launches)


def test_kernels_train_as_the_plain_loop(gpu1, tmp_path):
    from tests.unit.cuda_loader import fake

    # 8 cells of 4 steps, each with a norm and at least one step of a part on the device or a norm of one
    (launches,) = gpu1.run(_with_kernels, str(fake.build()), str(tmp_path), timeout=120)
    assert launches > 50


# ------------------------------------------------------------------ steps beside the training


def _steps_beside(rank):
    section = {"topk_ratio": 0.3, "update_interval": 3, "select_strategy": "step"}
    section |= {"select_interval": 6, "overlap_step": True}
    for stage in (2, 3):
        loop = zenflow.Loop(choose=6, ranks=2, overlap=True)
        made = zenflow.engine(stage, {"zenflow": section, "offload_optimizer": HOST})
        zenflow.train(made, rank)
        fake_cuda.check()
        found = zenflow.weights(made)
        for name, value in loop.run().items():
            # fp32 against float64 over a dozen steps of a tenth of the weights' size
            torch.testing.assert_close(found[name].double(), value, rtol=2e-4, atol=2e-5)
        made.destroy()
    runs = []
    for super_offload in (False, True):
        offload = {**HOST, "super_offload": super_offload}
        zero = {"offload_optimizer": offload, "sub_group_size": 8, "reduce_bucket_size": 20}
        made = zenflow.engine(3, zero, bf16={"enabled": True}, gradient_clipping=0.75)
        runs.append((zenflow.train(made, rank), zenflow.weights(made)))
        fake_cuda.check()
        order = made.optimizer.order
        made.destroy()
    plain, other = runs
    assert plain[0] == other[0] and 0 < order.agreed < order.tried
    assert all(torch.equal(plain[1][name], other[1][name]) for name in plain[1])


def test_zenflow_and_super_offload_change_nothing_that_is_being_read(gpus2):
    gpus2.run(_steps_beside, timeout=120)
