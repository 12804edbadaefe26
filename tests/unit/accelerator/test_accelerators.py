# SPDX-License-Identifier: Apache-2.0
"""The CPU accelerator in full, the CUDA one as far as it goes without a device, and the choice."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch

from deepspeed import accelerator
from deepspeed.accelerator import get_accelerator, real_accelerator, set_accelerator
from deepspeed.accelerator.abstract_accelerator import DeepSpeedAccelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

MEMBERS = """
is_synchronized_device use_host_timers resolves_data_dependency handles_memory_backpressure
device_name device set_device current_device current_device_name device_count synchronize
random set_rng_state get_rng_state manual_seed manual_seed_all initial_seed default_generator
Stream stream current_stream default_stream Event
empty_cache memory_allocated max_memory_allocated reset_max_memory_allocated memory_cached
max_memory_cached reset_max_memory_cached memory_stats reset_peak_memory_stats memory_reserved
max_memory_reserved total_memory available_memory
is_bf16_supported is_fp16_supported supported_dtypes
is_available range_push range_pop lazy_call communication_backend_name is_triton_supported
prefer_triton_grouped_mm create_graph capture_to_graph replay_graph
BFloat16Tensor ByteTensor DoubleTensor FloatTensor HalfTensor IntTensor LongTensor
pin_memory is_pinned unpin_memory on_accelerator
op_builder_dir create_op_builder get_op_builder build_extension
export_envs visible_devices_envs set_visible_devices_envs get_compile_backend set_compile_backend
supports_nvtx_domain
""".split()  # noqa: SIM905


@pytest.fixture
def cpu():
    return CPU_Accelerator()


@pytest.fixture
def fresh_choice(monkeypatch):
    monkeypatch.setattr(real_accelerator, "_current", None)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


# ------------------------------------------------------------------ the interface
@pytest.mark.parametrize("kind", [DeepSpeedAccelerator, CPU_Accelerator, CUDA_Accelerator])
@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_of_the_contract_is_there(kind, name):
    assert inspect.getattr_static(kind, name) is not None


def test_a_member_left_out_makes_an_accelerator_abstract():
    class Partial(CPU_Accelerator):
        synchronize = DeepSpeedAccelerator.synchronize

    with pytest.raises(TypeError, match="synchronize"):
        Partial()


# ------------------------------------------------------------------ the choice
def test_the_choice_falls_on_what_torch_sees(fresh_choice, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert get_accelerator()._name == "cpu"
    monkeypatch.setattr(real_accelerator, "_current", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert get_accelerator()._name == "cuda"


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_the_variable_decides(fresh_choice, monkeypatch, name):
    monkeypatch.setenv("DS_ACCELERATOR", name)
    assert get_accelerator()._name == name
    assert get_accelerator() is get_accelerator()
    assert accelerator.is_current_accelerator_supported()


@pytest.mark.parametrize("name", ["xpu", "npu", "mps", "hpu", "tpu", "CPU "])
def test_other_names_are_not_supported_yet(fresh_choice, monkeypatch, name):
    monkeypatch.setenv("DS_ACCELERATOR", name)
    with pytest.raises(ValueError, match="not supported yet"):
        get_accelerator()


def test_an_own_accelerator_can_be_set(fresh_choice):
    class Mine(CPU_Accelerator):
        pass

    set_accelerator(Mine())
    assert type(get_accelerator()) is Mine
    with pytest.raises(TypeError, match="not an accelerator"):
        set_accelerator("cpu")


# ------------------------------------------------------------------ CPU
def test_the_cpu_is_one_device_under_every_index(cpu):
    assert [cpu.device_name(), cpu.device_name(3), cpu.current_device_name()] == ["cpu"] * 3
    assert torch.device(cpu.device_name(), 0).type == "cpu"
    cpu.set_device(5)
    cpu.synchronize()
    with cpu.device(1), cpu.stream(cpu.current_stream()):
        pass
    assert cpu.Stream is cpu.Event is cpu.default_stream() is None


def test_the_launcher_says_how_many_cpu_processes_there_are(cpu, monkeypatch):
    monkeypatch.setenv("LOCAL_SIZE", "3")
    assert cpu.device_count() == 3
    monkeypatch.delenv("LOCAL_SIZE")
    assert cpu.device_count() >= 1


def test_the_current_cpu_device_is_the_local_rank(cpu, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert cpu.current_device() == 2
    monkeypatch.delenv("LOCAL_RANK")
    assert cpu.current_device() == 0


def test_cpu_memory_follows_the_process(cpu):
    cpu.reset_peak_memory_stats()
    before = cpu.memory_allocated(torch.device("cuda"))
    block = torch.ones(16 << 20)  # 64 MiB, written
    grown = cpu.memory_allocated() - before
    # other threads and the allocator move a few MiB at most
    assert abs(grown - block.nbytes) < 16 << 20
    assert cpu.total_memory() > cpu.available_memory() > 0


def test_cpu_peak_is_the_highest_value_seen_since_the_reset(cpu, monkeypatch):
    sizes = iter([5, 9, 7, 6, 8])
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=next(sizes)))
    monkeypatch.setattr(cpu, "_process", process)
    assert [cpu.memory_allocated(), cpu.memory_reserved()] == [5, 9]
    assert cpu.max_memory_allocated(torch.device("cuda")) == 9  # 7 now
    cpu.reset_max_memory_allocated()  # at 6
    assert cpu.memory_stats() == {
        "allocated_bytes.all.current": 8,
        "allocated_bytes.all.peak": 8,
    }


def test_every_cpu_trains_in_every_dtype(cpu):
    assert cpu.supported_dtypes() == [torch.float32, torch.float16, torch.bfloat16]
    assert cpu.is_fp16_supported()
    assert cpu.is_bf16_supported()


def test_cpu_random_numbers_are_torchs(cpu):
    cpu.manual_seed(5)
    state = cpu.get_rng_state()
    first = torch.rand(3)
    cpu.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    assert cpu.initial_seed() == 5
    cpu.manual_seed_all(5)
    assert torch.equal(torch.rand(3), first)
    assert cpu.default_generator(0) is torch.default_generator
    assert cpu.random() is torch.random


def test_pinning_gives_usable_host_memory(cpu):
    tensor = torch.arange(6.0).view(2, 3)
    assert torch.equal(cpu.pin_memory(tensor), tensor)
    assert cpu.pin_memory(tensor, make_copy=False).shape == (2, 3)
    assert cpu.pin_memory(tensor, make_copy=False, match_shape=False).shape == (6,)
    assert cpu.pin_empty_like(tensor, dtype=torch.float16).dtype == torch.float16
    assert not cpu.is_pinned(tensor)
    cpu.unpin_memory(tensor)
    with pytest.raises(ValueError, match="only host memory"):
        cpu.pin_memory(torch.empty(1, device="meta"))


def test_the_launchers_choice_of_devices_is_written(cpu):
    child = {}
    cpu.set_visible_devices_envs(child, [2, 0])
    assert child == {"CUDA_VISIBLE_DEVICES": "2,0"}
    assert cpu.export_envs() == []


def test_tensor_constructors_have_their_dtype(cpu):
    for name, dtype in {
        "BFloat16Tensor": torch.bfloat16,
        "ByteTensor": torch.uint8,
        "DoubleTensor": torch.float64,
        "FloatTensor": torch.float32,
        "HalfTensor": torch.float16,
        "IntTensor": torch.int32,
        "LongTensor": torch.int64,
    }.items():
        made = getattr(cpu, name)([1, 2])
        assert made.dtype == dtype
        assert cpu.on_accelerator(made)
        assert getattr(CUDA_Accelerator(), name).keywords == {"dtype": dtype, "device": "cuda"}


def test_the_rest_of_the_cpu(cpu):
    assert cpu.lazy_call(lambda: 7) == 7
    assert cpu.communication_backend_name() == "gloo"
    assert cpu.create_graph() is None
    with cpu.capture_to_graph(None):
        cpu.replay_graph(None)
    cpu.range_push("x")
    cpu.range_pop()
    assert cpu.get_compile_backend() == "inductor"
    assert cpu.op_builder_dir() == "deepspeed.ops.op_builder"
    assert cpu.get_op_builder("NoSuchBuilder") is None
    assert cpu.create_op_builder("NoSuchBuilder") is None


# ------------------------------------------------------------------ CUDA without a device
def test_making_a_cuda_accelerator_initialises_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "init", lambda: pytest.fail("CUDA was initialised"))
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("CUDA was initialised"))
    cuda = CUDA_Accelerator()
    assert [cuda.device_name(), cuda.device_name(1)] == ["cuda", "cuda:1"]
    assert cuda.device_name(torch.device("cuda:2")) == "cuda:2"
    assert cuda.export_envs() == ["NCCL"]


@pytest.mark.parametrize(("system", "backend"), [("linux", "nccl"), ("win32", "gloo")])
def test_the_cuda_backend_depends_on_the_system(monkeypatch, system, backend):
    monkeypatch.setattr(sys, "platform", system)
    assert CUDA_Accelerator().communication_backend_name() == backend


# ------------------------------------------------------------------ CUDA with one
@pytest.mark.cuda
def test_cuda_members_answer():
    cuda = CUDA_Accelerator()
    assert cuda.current_device_name() == f"cuda:{cuda.current_device()}"
    before = cuda.memory_allocated()
    block = cuda.FloatTensor([0.0]).repeat(1 << 20)
    assert cuda.memory_allocated() - before == block.nbytes + 512  # and the one-element source
    assert cuda.on_accelerator(block)
    assert 0 < cuda.available_memory() < cuda.total_memory()
    pinned = cuda.pin_memory(torch.ones(3))
    assert cuda.is_pinned(pinned)
    assert pinned.eq(1).all()
    cuda.manual_seed_all(3)
    state = cuda.get_rng_state()
    first = torch.rand(3, device="cuda")
    cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3, device="cuda"), first)
    stream = cuda.Stream()
    with cuda.stream(stream):
        assert cuda.current_stream() == stream
    cuda.synchronize()
    assert torch.float16 in cuda.supported_dtypes()
