# SPDX-License-Identifier: Apache-2.0
"""Which image serves which GPU and driver, what happens when it does not, and what a launch hands to the driver."""

from __future__ import annotations

import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from deepspeed.ops import cuda, cuda_cache
from deepspeed.ops.cuda_driver import CudaDriverError
from deepspeed.ops.cuda_nvrtc import NvrtcError
from deepspeed.utils import env

from . import packs

ALL = {
    "sm_60": b"sm_60",
    "sm_80": b"sm_80",
    "sm_86": b"sm_86",
    "sm_90": b"sm_90",
    "compute_60": b"ptx\0",
}


class FakeNvrtc:
    """Compiles everything to a text that names the architecture."""

    version = (12, 8)
    known = (80, 86, 110)

    def __init__(self):
        self.compiled = 0

    def architectures(self):
        return self.known

    def compile(self, name, source, headers, arch):
        assert "DS_KERNEL" in source and "base.cuh" in headers
        self.compiled += 1
        return f"nvrtc {arch}".encode()


@pytest.fixture
def nvrtc(monkeypatch):
    made = FakeNvrtc()
    monkeypatch.setattr(cuda_cache, "find", lambda folder: made)
    return made


@pytest.fixture
def no_nvrtc(monkeypatch):
    def missing(folder):
        raise NvrtcError("no NVRTC is installed")

    monkeypatch.setattr(cuda_cache, "find", missing)


def route(fake, loader, name="adam_step"):
    return next(r for r in loader.routes() if r.name == name)


@pytest.mark.parametrize(
    ("capability", "wanted"),
    (
        (80, ("cubin", "sm_80")),
        (86, ("cubin", "sm_86")),
        (89, ("cubin", "sm_86")),
        (87, ("cubin", "sm_86")),
        (61, ("cubin", "sm_60")),
        (75, ("ptx", "compute_60")),
        (110, ("ptx", "compute_60")),
        (90, ("cubin", "sm_90")),
    ),
)
def test_the_best_image_for_the_gpu_is_taken(fake, tmp_path, no_nvrtc, capability, wanted):
    fake.set("capability", capability)
    found = route(fake, fake.loader(packs.make(tmp_path, ALL)))
    assert (found.route, found.reason.split()[0]) == wanted


def test_what_the_driver_refuses_gives_way_to_the_next(fake, tmp_path, nvrtc):
    images = ALL | {"sm_86": b"refuse sm_86", "sm_80": b"refuse sm_80"}
    fake.set("capability", 89)
    found = route(fake, fake.loader(packs.make(tmp_path, images)))
    assert found.route == "ptx"
    assert found.reason.count("CUDA_ERROR_INVALID_PTX: words of the driver (ptxas says no)") == 2

    images["compute_60"] = b"refuse ptx\0"
    found = route(fake, fake.loader(packs.make(tmp_path, images)))
    assert found.route == "nvrtc" and "compute_86" in found.reason


def test_without_any_way_the_reference_serves_and_says_why(fake, tmp_path, no_nvrtc, caplog):
    path = packs.make(tmp_path, {"sm_90": b"sm_90"})
    loader = fake.loader(path)
    found = route(fake, loader)
    assert found.route == "reference"
    assert "no cubin for sm_80 (the GPU is older than any kernel)" in found.reason
    assert "no NVRTC is installed" in found.reason
    assert loader.find("adam_step", torch.ones(1)) is None


def test_an_old_driver_is_told_by_its_version(fake, tmp_path, no_nvrtc):
    fake.set("version", 11040)
    found = route(fake, fake.loader(packs.make(tmp_path, ALL)))
    assert found.route == "reference"
    assert "the driver (CUDA 11.4) is too old for the pack's cubins (CUDA 12.0)" in found.reason
    fake.set("version", 12020)  # cubins run, PTX of 12.8 does not
    assert route(fake, fake.loader(packs.make(tmp_path, ALL))).route == "cubin"
    fake.set("capability", 110)
    found = route(fake, fake.loader(packs.make(tmp_path, ALL)))
    assert found.route == "reference" and "PTX (CUDA 12.8)" in found.reason


def test_no_driver_no_device_and_a_switch_leave_the_work_to_torch(fake, monkeypatch):
    loader = cuda.Loader(fake.torch, lambda: cuda.Driver("no-such-driver.so"), fake.pack_path)
    found = route(fake, loader)
    assert found.route == "reference" and "Install or update the driver" in found.reason
    assert loader.find("adam_step", torch.ones(1)) is None

    fake.torch.count = 0
    assert route(fake, fake.loader()).reason == "torch sees no CUDA device"
    fake.torch.count = 1
    monkeypatch.setenv(env.DS_DISABLE_NATIVE.name, "1")
    assert "DS_DISABLE_NATIVE" in route(fake, fake.loader()).reason


def test_a_driver_that_cannot_start_is_no_crash(fake):
    fake.fail("cuInit", 100)
    found = route(fake, fake.loader())
    assert found.route == "reference" and "cuInit failed with CUDA_ERROR" in found.reason


def test_nothing_is_opened_before_the_first_use(fake):
    fake.loader()
    assert fake.log() == []


def test_each_unit_is_loaded_once_a_device_and_each_kernel_looked_up_once(fake):
    loader = fake.loader()
    x = torch.ones(1)
    for _ in range(3):
        for name in ("adam_step", "lion_step", "quantize"):
            assert loader.find(name, x) is not None
    assert len(fake.calls("cuModuleLoadDataEx")) == 2
    assert loader.find("no_such_kernel", x) is None


def test_threads_that_ask_at_once_load_once(fake):
    loader = fake.loader()
    ready = threading.Barrier(8)

    def ask():
        ready.wait()
        assert loader.find("adam_step", torch.ones(1)) is not None

    threads = [threading.Thread(target=ask) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(fake.calls("cuModuleLoadDataEx")) == 1


def test_a_graph_capture_loads_nothing_and_decides_nothing(fake):
    loader = fake.loader()
    fake.torch.graph = True
    assert loader.find("adam_step", torch.ones(1)) is None
    assert fake.calls("cuModuleLoadDataEx") == []
    fake.torch.graph = False
    assert loader.find("adam_step", torch.ones(1)) is not None
    fake.torch.graph = True
    assert loader.find("adam_step", torch.ones(1)) is not None


# ---------------------------------------------------------------- contexts, streams, arguments


def launch(fake, loader, *args):
    x = torch.zeros(4)
    call = loader.find("bias_add", x)
    call(2, *(args or (x.data_ptr(), x.data_ptr(), 0, 0, x.data_ptr(), 0, 4, 4)))


def test_a_thread_without_a_context_gets_torchs_and_keeps_it(fake):
    loader = fake.loader()
    launch(fake, loader)
    assert fake.dll.fake_context() == 0x100
    seen = []

    def autograd():
        seen.append(fake.dll.fake_context())
        launch(fake, loader)
        seen.append(fake.dll.fake_context())

    thread = threading.Thread(target=autograd)
    thread.start()
    thread.join()
    assert seen == [0, 0x100]
    assert len(fake.calls("cuDevicePrimaryCtxRetain")) == 1
    assert [line.split("context ")[1] for line in fake.calls("cuLaunchKernel")] == ["256", "256"]


def test_a_thread_at_work_on_another_device_gets_its_context_back(fake):
    fake.set("devices", 2)
    fake.torch.device, fake.torch.handle = 1, 99
    loader = fake.loader()
    fake.set("context", 0x100)
    launch(fake, loader)
    assert fake.dll.fake_context() == 0x100 and fake.dll.fake_context_depth() == 1
    assert "stream 99 context 257" in fake.calls("cuLaunchKernel")[0]
    fake.fail("cuLaunchKernel", 700)
    with pytest.raises(CudaDriverError, match="launch of bias_add failed with CUDA_ERROR"):
        launch(fake, loader)
    assert fake.dll.fake_context_depth() == 1


def test_the_stream_is_asked_for_at_each_call(fake):
    loader = fake.loader()
    for stream in (0, 5, 1 << 40):
        fake.torch.handle = stream
        launch(fake, loader)
    said = [line.split("stream ")[1].split()[0] for line in fake.calls("cuLaunchKernel")]
    assert said == ["0", "5", str(1 << 40)]
    assert "grid 2,1,1 block 256,1,1 shared 0" in fake.calls("cuLaunchKernel")[0]


def test_wrong_arguments_never_reach_the_driver(fake):
    loader = fake.loader()
    for wrong in ((1, 2), (0,) * 9, (1.5, 0, 0, 0, 0, 0, 4, 4), (1 << 70, 0, 0, 0, 0, 0, 4, 4)):
        with pytest.raises((struct.error, OverflowError)):
            launch(fake, loader, *wrong)
    assert fake.calls("cuLaunchKernel") == []


def test_addresses_and_sizes_beyond_32_bits_arrive_whole(fake):
    # of eight elements in rows of 2^33 channels; cut to 32 bits, the row length would be 0
    x = torch.arange(8, dtype=torch.float32)
    out = torch.zeros(8)
    fake.loader().find("bias_add", x)(
        1, x.data_ptr(), x.data_ptr(), 0, 0, out.data_ptr(), 0, 8, 1 << 33
    )
    assert torch.equal(out, 2 * x)


# ---------------------------------------------------------------- the pack and the cache


def test_a_source_pack_compiles_once_and_is_read_from_the_cache_after(fake, tmp_path, nvrtc):
    path = packs.make(tmp_path, {})
    first = fake.loader(path)
    found = route(fake, first)
    assert found.route == "nvrtc" and "the pack holds sources only" in found.reason
    compiled = nvrtc.compiled
    first.routes()
    assert (
        nvrtc.compiled == compiled == len([n for n in packs.kernels.sources() if n[-3:] == ".cu"])
    )
    again = route(fake, fake.loader(path))
    assert again.route == "nvrtc" and "from " in again.reason
    assert nvrtc.compiled == compiled


@pytest.mark.parametrize(
    "damage", (lambda whole: whole[:-1], lambda whole: b"", lambda whole: whole[:40] + b"x")
)
def test_a_damaged_cache_file_is_compiled_anew(fake, tmp_path, nvrtc, damage):
    path = packs.make(tmp_path, {})
    route(fake, fake.loader(path))
    compiled = nvrtc.compiled
    files = sorted((tmp_path / "cache").iterdir())
    for file in files:
        file.write_bytes(damage(file.read_bytes()))
    assert "from " not in route(fake, fake.loader(path)).reason
    assert nvrtc.compiled == 2 * compiled
    assert sorted((tmp_path / "cache").iterdir()) == files


def test_a_cache_that_cannot_be_written_costs_time_only(fake, tmp_path, nvrtc, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv(env.DS_KERNEL_CACHE.name, str(tmp_path / "file" / "below"))
    assert route(fake, fake.loader(packs.make(tmp_path, {}))).route == "nvrtc"


def test_kernels_from_source_pass_the_pack_by(fake, tmp_path, nvrtc, monkeypatch):
    monkeypatch.setenv(env.DS_KERNEL_SOURCE.name, "1")
    found = route(fake, fake.loader(packs.make(tmp_path, ALL)))
    assert found.route == "nvrtc" and "DS_KERNEL_SOURCE" in found.reason


def test_without_a_pack_the_source_tree_is_compiled(fake, tmp_path, nvrtc):
    assert route(fake, fake.loader(tmp_path / "missing.zip")).route == "nvrtc"


def test_an_installed_package_without_any_pack_runs_on_torch(fake, tmp_path, nvrtc, monkeypatch):
    monkeypatch.setattr(cuda, "SOURCE_TREE", tmp_path / "nowhere")
    loader = fake.loader(tmp_path / "missing.zip")
    assert loader.routes() == [] and loader.find("adam_step", torch.ones(1)) is None


def test_a_pack_of_other_sources_is_not_mixed_with_this_tree(fake, tmp_path, no_nvrtc, monkeypatch):
    tree = tmp_path / "tree"
    tree.mkdir()
    for name, text in packs.kernels.sources().items():
        (tree / name).write_text(text + "// newer\n", encoding="utf-8")
    monkeypatch.setattr(cuda, "SOURCE_TREE", tree)
    found = route(fake, fake.loader(packs.make(tmp_path, ALL)))
    assert found.route == "reference" and "python -m op_builder.kernels" in found.reason


RACER = """
import sys
from pathlib import Path
from deepspeed.ops import cuda_cache

class Nvrtc:
    version = (12, 8)
    def architectures(self): return (80,)
    def compile(self, name, source, headers, arch): return b"image" * 40000

compiler = cuda_cache.KernelCompiler({"a.cu": "x"}, Nvrtc)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(200):
    image, _ = compiler.image("a", (8, 0))
    assert image == b"image" * 40000
    for file in cuda_cache.folder().iterdir():
        if sys.argv[1] == "breaks":
            try:
                file.unlink(missing_ok=True)
            except PermissionError:  # Windows keeps a file that the other process is reading
                pass
"""


def test_two_processes_publish_the_same_kernel_without_torn_files(tmp_path, monkeypatch):
    monkeypatch.setenv(env.DS_KERNEL_CACHE.name, str(tmp_path / "cache"))
    words = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    root = Path(cuda.__file__).parents[2]
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, role], cwd=root, **words)
        for role in ("writes", "breaks")
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        _, errors = racer.communicate(timeout=120)
        assert racer.returncode == 0, errors


def test_the_report_names_one_route_where_all_agree(fake, tmp_path, nvrtc, no_nvrtc):
    before = cuda.use(fake.loader(packs.make(tmp_path, ALL)))
    try:
        told = cuda.summary()
        assert (told["route"], told["reason"]) == ("cubin", "device 0: sm_80 of kernels.zip")
        assert {row["name"] for row in told["kernels"]} >= {"adam_step", "quantize", "token_sort"}
        fake.torch.count = 0
        cuda.use(fake.loader())
        assert (cuda.summary()["route"], cuda.summary()["reason"]) == (
            "reference",
            "torch sees no CUDA device",
        )
    finally:
        cuda.use(before)
