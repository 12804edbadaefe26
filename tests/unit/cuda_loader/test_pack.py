# SPDX-License-Identifier: Apache-2.0
"""The pack is the same for the same sources, and damaged or foreign ones are refused in words, never by a crash."""

from __future__ import annotations

import io
import json
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepspeed.ops import cuda_cache, cuda_nvrtc
from deepspeed.ops.cuda_nvrtc import Nvrtc, NvrtcError
from deepspeed.ops.cuda_pack import KernelPack, KernelPackError
from op_builder import kernels

from . import packs

IMAGES = {"sm_80": b"sm_80 cubin" * 50, "compute_60": b".version 8.7\0"}


@pytest.fixture
def nothing_compiles(monkeypatch):
    def missing(folder):
        raise NvrtcError("no NVRTC is installed")

    monkeypatch.setattr(cuda_cache, "find", missing)


def rewritten(path, edit):
    """Write the pack's members again after `edit` changed the dict of them."""
    with zipfile.ZipFile(path) as pack:
        members = {name: pack.read(name) for name in pack.namelist()}
    edit(members)
    with zipfile.ZipFile(path, "w") as pack:
        for name, content in members.items():
            pack.writestr(name, content)
    return path


def with_index(path, edit):
    def change(members):
        index = json.loads(members["index.json"])
        edited = edit(index)
        members["index.json"] = json.dumps(index if edited is None else edited).encode()

    return rewritten(path, change)


def test_a_pack_gives_back_what_was_put_in(tmp_path):
    pack = KernelPack(packs.make(tmp_path, IMAGES))
    assert pack.sources() == kernels.sources()
    for unit in pack.units:
        for arch, content in IMAGES.items():
            assert pack.image(unit, arch) == content
    assert pack.units["optim"].kernels["adam_step"].startswith("PiiPPf")


def test_equal_sources_give_equal_bytes_wherever_they_are_built(tmp_path):
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths.append(packs.make(tmp_path / name, IMAGES))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with zipfile.ZipFile(paths[0]) as pack:
        for info in pack.infolist():
            assert info.compress_type == zipfile.ZIP_STORED  # zlibs differ
            assert info.date_time == (1980, 1, 1, 0, 0, 0)
            assert info.create_system == 3 and info.external_attr == 0o644 << 16
        assert pack.namelist() == sorted(pack.namelist())


def test_line_ends_of_a_checkout_change_nothing(tmp_path):
    for name, text in kernels.sources().items():
        (tmp_path / name).write_bytes(text.replace("\n", "\r\n").encode())
    assert kernels.source_hash(kernels.sources(tmp_path)) == kernels.source_hash(kernels.sources())


DAMAGE = {
    "no zip": lambda p: p.write_bytes(b"not a zip at all"),
    "empty": lambda p: p.write_bytes(b""),
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-100]),
    "no index": lambda p: rewritten(p, lambda m: m.pop("index.json")),
    "index is no JSON": lambda p: rewritten(p, lambda m: m.update({"index.json": b"{"})),
    "index is a list": lambda p: with_index(p, lambda index: [index]),
    "deep index": lambda p: rewritten(p, lambda m: m.update({"index.json": b"[" * 100_000})),
    "other format": lambda p: with_index(p, lambda index: index.update(format=2)),
    "other version": lambda p: with_index(p, lambda index: index.update(version="0.19.0")),
    "no units": lambda p: with_index(p, lambda index: index.pop("units")),
    "units is a list": lambda p: with_index(p, lambda index: index.update(units=[1])),
    "negative floor": lambda p: with_index(p, lambda index: index.update(driver_floor=-1)),
    "no sources": lambda p: with_index(p, lambda index: index.update(sources=["x.cu"])),
    "path in a name": lambda p: with_index(p, lambda index: index.update(sources=["../x"])),
    "changed source": lambda p: rewritten(p, lambda m: m.update({"src/optim.cu": b"//"})),
    "source is no text": lambda p: rewritten(p, lambda m: m.update({"src/optim.cu": b"\xff"})),
    "strange arguments": lambda p: with_index(
        p, lambda index: index["units"]["optim"]["kernels"].update(adam_step="Pz")
    ),
    "strange arch": lambda p: with_index(
        p, lambda index: index["units"]["optim"]["images"].update(gfx90={})
    ),
    "huge size": lambda p: with_index(
        p, lambda index: index["units"]["optim"]["images"]["sm_80"].update(size=1 << 60)
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_pack_is_refused_in_words_and_torch_serves(
    fake, tmp_path, name, nothing_compiles
):
    path = packs.make(tmp_path, IMAGES)
    DAMAGE[name](path)
    with pytest.raises(KernelPackError, match=r"is unusable: .*Install deepspeed again"):
        KernelPack(path).sources()
    loader = fake.loader(path)
    assert loader.find("adam_step", torch.ones(1)) is None
    found = next(r for r in loader.routes() if r.name == "adam_step")
    assert found.route == "reference" and "is unusable" in found.reason


@pytest.mark.parametrize("content", (b"", b"sm_80 cubin" * 49, b"sm_80 cubix" * 50))
def test_a_damaged_cubin_never_reaches_the_driver(fake, tmp_path, content, nothing_compiles):
    path = packs.make(tmp_path, IMAGES)
    rewritten(path, lambda members: members.update({"optim.sm_80.cubin": content}))
    loader = fake.loader(path)
    assert loader.find("adam_step", torch.ones(1)) is not None
    assert fake.calls("cuModuleLoadDataEx") == ["cuModuleLoadDataEx .version 8.7"]
    found = next(r for r in loader.routes() if r.name == "adam_step")
    assert found.route == "ptx" and "optim.sm_80.cubin" in found.reason


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return packs.make(tmp_path_factory.mktemp("pack"), IMAGES).read_bytes()


def read_all(content, folder):
    """Read everything that a loader may read; only KernelPackError may come out."""
    path = folder / "fuzzed.zip"
    path.write_bytes(content)
    try:
        pack = KernelPack(path)
        pack.sources()
        for unit, facts in pack.units.items():
            for arch in facts.images:
                pack.image(unit, arch)
    except KernelPackError:
        return False
    return True


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(data=st.data())
def test_flipped_bytes_are_noticed_or_harmless(whole, tmp_path, data):
    content = bytearray(whole)
    # the directory at the end and the index decide everything; aim there half of the time
    ends = st.integers(max(0, len(content) - 4000), len(content) - 1)
    starts = st.integers(0, 3000)
    places = st.one_of(ends, starts, st.integers(0, len(content) - 1))
    for place in data.draw(st.lists(places, min_size=1, max_size=6)):
        content[place] ^= data.draw(st.integers(1, 255))
    read_all(bytes(content), tmp_path)


@FUZZ
@given(cut=st.integers(0, 1 << 20), more=st.binary(max_size=30))
def test_cut_and_extended_packs_are_noticed_or_harmless(whole, tmp_path, cut, more):
    read_all(whole[: cut % len(whole)] + more, tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@FUZZ
@given(data=st.data())
def test_any_value_at_any_place_of_the_index_is_noticed_or_harmless(whole, tmp_path, data):
    with zipfile.ZipFile(io.BytesIO(whole)) as pack:
        members = {name: pack.read(name) for name in pack.namelist()}
    index = json.loads(members["index.json"])
    place = index
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
            place[key] = data.draw(JSON)
            break
        place = place[key]
    members["index.json"] = json.dumps(index).encode()
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as pack:
        for name, content in members.items():
            pack.writestr(name, content)
    read_all(made.getvalue(), tmp_path)


# ---------------------------------------------------------------- the builder


def test_arguments_that_differ_between_systems_cannot_enter_a_kernel():
    assert cuda_nvrtc.entries("DS_KERNEL k(const i64 *t, i32 n,\n   float x, i64 m) {") == {
        "k": "PifqP"[:4]
    }
    for argument in ("long n", "Thing t", "double x", "int n"):
        with pytest.raises(NvrtcError, match="cannot be passed"):
            cuda_nvrtc.entries(f"DS_KERNEL k({argument}) {{")


def test_kernels_include_nothing_but_each_other():
    texts = kernels.sources()
    for name, text in texts.items():
        for line in text.splitlines():
            if line.startswith("#include"):
                assert line.split('"')[1] in texts, (name, line)


def test_no_two_units_define_one_kernel():
    names = [
        name
        for file, text in kernels.sources().items()
        if file.endswith(".cu")
        for name in cuda_nvrtc.entries(text)
    ]
    assert len(names) == len(set(names)) > 15


def test_without_nvrtc_the_sources_are_packed_alone(tmp_path, monkeypatch):
    tool = kernels._nvrtc_module()
    monkeypatch.setattr(tool, "candidates", lambda folder=None: iter(()))
    monkeypatch.setattr(kernels, "_nvrtc_module", lambda: tool)
    with pytest.raises(kernels.PackError, match="pip install nvidia-cuda-nvrtc-cu12"):
        kernels.build(tmp_path)
    monkeypatch.setattr(kernels, "DEFAULT_OUT", tmp_path / "nothing")
    assert "sources of the CUDA kernels only" in kernels.build_for_wheel(tmp_path)
    pack = KernelPack(tmp_path / kernels.PACK_NAME)
    assert pack.compiler is None and pack.sources() == kernels.sources()
    assert all(not unit.images for unit in pack.units.values())


def real_nvrtc():
    try:
        return cuda_nvrtc.find()
    except NvrtcError as error:
        pytest.skip(str(error))


def test_nvrtc_compiles_every_kernel_for_a_cubin_and_for_ptx(tmp_path):
    real_nvrtc()
    path = kernels.build(tmp_path, ("sm_80", "compute_75"))
    pack = KernelPack(path)
    for name, unit in pack.units.items():
        assert pack.image(name, "sm_80").startswith(b"\x7fELF")
        ptx = pack.image(name, "compute_75").decode()
        assert ptx.endswith("\0")
        for kernel in unit.kernels:
            assert f".entry {kernel}(" in ptx
    written = path.stat().st_mtime_ns
    kernels.build(tmp_path, ("sm_80", "compute_75"))
    assert path.stat().st_mtime_ns == written  # the same sources are not compiled again


def test_the_layout_of_the_arguments_is_the_compilers(tmp_path):
    """The offsets that the loader packs by must be those of the compiled kernel's parameter space."""
    nvrtc = real_nvrtc()
    texts = kernels.sources()
    headers = {name: text for name, text in texts.items() if name.endswith(".cuh")}
    for name, text in texts.items():
        if name.endswith(".cuh"):
            continue
        ptx = nvrtc.compile(name, text, headers, "compute_75").decode()
        for kernel, codes in cuda_nvrtc.entries(text).items():
            head = ptx.split(f".entry {kernel}(")[1].split(")")[0]
            sizes = [
                line.split(".param .")[1].split()[0]
                for line in head.splitlines()
                if ".param" in line
            ]
            size_of = {"P": "u64", "q": "u64", "i": "u32", "f": "f32"}
            assert [s.replace("b", "u") if s[0] == "b" else s for s in sizes] == [
                size_of[code] for code in codes
            ]


def test_nvrtcs_complaint_is_passed_on():
    nvrtc = real_nvrtc()
    with pytest.raises(NvrtcError, match=r"x\.cu does not compile for sm_80: .*undefined"):
        nvrtc.compile("x.cu", "DS_KERNEL f() {}", {}, "sm_80")
    with pytest.raises(NvrtcError, match="sm_1"):
        nvrtc.compile("x.cu", "", {}, "sm_1")


def test_a_file_that_is_no_nvrtc_is_refused(tmp_path):
    path = tmp_path / "libnvrtc.so.12"
    path.write_bytes(b"nothing")
    with pytest.raises(NvrtcError, match="cannot be loaded"):
        Nvrtc(path)


def test_an_isolated_build_takes_the_pack_of_the_source_tree(tmp_path, monkeypatch):
    tree, out = tmp_path / "tree", tmp_path / "out"
    tree.mkdir()
    monkeypatch.setattr(kernels, "DEFAULT_OUT", tree)
    tool = kernels._nvrtc_module()
    monkeypatch.setattr(tool, "candidates", lambda folder=None: iter(()))
    monkeypatch.setattr(kernels, "_nvrtc_module", lambda: tool)
    made = packs.make(tree, {arch: b"image" for arch in kernels.ARCHS})
    assert "from the source tree" in kernels.build_for_wheel(out)
    assert (out / kernels.PACK_NAME).read_bytes() == made.read_bytes()
    with_index(made, lambda index: index.update(source_hash="0" * 64))
    assert "sources" in kernels.build_for_wheel(out) and "only" in kernels.build_for_wheel(out)
