# SPDX-License-Identifier: Apache-2.0
"""``ds_report``: what this machine and installation are, as text to paste into a bug report or as JSON.

Facts are gathered into one plain dict, section by section; a section that cannot be had (a broken torch, a
broken native library) says why in its place, and the others stand.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed import git_version_info
from deepspeed.monitor import train_log
from deepspeed.runtime import memory_plan
from deepspeed.utils import env, numa

__all__ = ["cli_main", "debug_report", "gather", "main", "op_report"]

RULE = "-" * 74
OP_COLUMN, ROW_COLUMN = 23, 33
SHM = Path("/dev/shm")
SHM_ENOUGH = 512 * 1024 * 1024
PACKAGES = (
    "numpy psutil pydantic packaging hjson einops tqdm ninja pybind11 transformers accelerate peft"
)

# ------------------------------------------------------------------ facts


def _first_line(*command: str) -> str | None:
    """Run a program that tells its version; return what it said first, or None if it is not there."""
    program = shutil.which(command[0])
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=20,
            encoding="utf-8",
            errors="replace",
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"{program} cannot be run ({error})"
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return lines[0] if lines else program


def _package() -> dict[str, Any]:
    return {
        "version": git_version_info.version,
        "git_hash": git_version_info.git_hash,
        "git_branch": git_version_info.git_branch,
        "path": list(deepspeed.__path__),
    }


def _python() -> dict[str, Any]:
    return {
        "version": platform.python_version(),
        "implementation": platform.python_implementation(),
        "build": platform.python_compiler(),
        "executable": sys.executable,
    }


def _cpu_name() -> str:
    if sys.platform == "win32":
        import winreg

        where = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
        with (
            contextlib.suppress(OSError),
            winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, where) as key,
        ):
            return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()
    elif sys.platform == "linux":
        with contextlib.suppress(OSError):
            text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
            found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
            if found:
                return found[1]
    return platform.processor() or platform.machine()


def _machine() -> dict[str, Any]:
    import psutil

    return {
        "system": platform.platform(),
        "architecture": platform.machine(),
        "cpu": _cpu_name(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "numa_nodes": len(numa.get_numa_cores()),
        "memory": psutil.virtual_memory().total,
        "shared_memory": shutil.disk_usage(SHM).total if SHM.is_dir() else None,
    }


def _torch() -> dict[str, Any]:
    import torch

    return {
        "version": torch.__version__,
        "path": list(torch.__path__),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _driver() -> str | None:
    told = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if told is not None:
        return told
    with contextlib.suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    return None


def _accelerator() -> dict[str, Any]:
    import torch

    from deepspeed.accelerator import get_accelerator

    name = get_accelerator()._name
    devices = []
    if name == "cuda":
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "name": facts.name,
                    "memory": facts.total_memory,
                    "capability": f"{facts.major}.{facts.minor}",
                }
            )
    return {
        "name": name,
        "device_count": get_accelerator().device_count(),
        "communication_backend": get_accelerator().communication_backend_name(),
        "devices": devices,
        "driver": _driver(),
        "nvcc": nvcc_version(),
    }


def _compilers() -> dict[str, Any]:
    zig = importlib.util.find_spec("ziglang") is not None
    return {
        "cl": _first_line("cl"),
        "clang++": _first_line("clang++", "--version"),
        "g++": _first_line("g++", "--version"),
        "ziglang": importlib.metadata.version("ziglang") if zig else None,
        "ninja": _first_line("ninja", "--version"),
    }


def _native() -> dict[str, Any]:
    from deepspeed.ops import cuda, native

    status = native.status()
    return {
        "route": status.route,
        "reason": status.reason,
        "library": str(native.library_path()),
        "isa": status.isa or None,
        "isa_available": list(status.available),
        "build": native.build_record(),
        "cuda": cuda.summary(),
    }


def _ops() -> list[dict[str, str]]:
    from deepspeed.ops import registry

    return [dict(op._asdict()) for op in registry.routes()]


def _builders() -> list[dict[str, Any]]:
    from deepspeed.ops.op_builder.routes import routes

    return routes()


def _distributed() -> dict[str, Any]:
    import torch.distributed as dist

    if not dist.is_available():
        return {"available": False, "backends": {}}
    probes = {
        "gloo": getattr(dist, "is_gloo_available", lambda: dist.is_backend_available("gloo")),
        "nccl": dist.is_nccl_available,
        "mpi": dist.is_mpi_available,
        "ucc": getattr(dist, "is_ucc_available", lambda: False),
    }
    return {"available": True, "backends": {name: bool(probe()) for name, probe in probes.items()}}


def _packages() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in PACKAGES.split():
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _environment() -> dict[str, str]:
    return {name: str(var.raw()) for name, var in env.declared().items() if var.is_set()}


def nvcc_version() -> str | None:
    """Return the release of the CUDA compiler in CUDA_HOME or on the PATH, or None."""
    home = env.CUDA_HOME.get()
    inside = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
    program = inside or shutil.which("nvcc")
    if program is None:
        return None
    try:
        told = subprocess.check_output([program, "-V"], encoding="utf-8", timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"release (\S+?),", told)
    return found[1] if found else None


def ninja_installed() -> bool:
    """Say whether the build tool that source ops need is there."""
    return importlib.util.find_spec("ninja") is not None or shutil.which("ninja") is not None


def get_shm_size() -> tuple[str, str | None]:
    """Return the size of the shared memory file system for people, and a warning where it is small."""
    if not SHM.is_dir():
        return "UNKNOWN", None
    size = shutil.disk_usage(SHM).total
    if size >= SHM_ENOUGH:
        return human_readable_size(size), None
    return human_readable_size(size), (
        "/dev/shm is small for NCCL and data loaders; in docker, start with --shm-size=1g or more"
    )


def human_readable_size(size: float) -> str:
    """Return a number of bytes as ``1.50 GB``."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1024:
            return f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TB"


def gather(operators: bool = True, quiet: bool = False) -> dict[str, Any]:
    """Return every fact as a dict that JSON can hold.

    Args:
        operators: include the tables of ops.
        quiet: drop what libraries say meanwhile; it goes to stderr otherwise, never to stdout.
    """
    sections: dict[str, Callable[[], Any]] = {
        "deepspeed": _package,
        "python": _python,
        "machine": _machine,
        "torch": _torch,
        "accelerator": _accelerator,
        "compilers": _compilers,
        "native": _native,
        "distributed": _distributed,
        "packages": _packages,
        "environment": _environment,
    }
    if operators:
        sections |= {"ops": _ops, "builders": _builders}
    facts = {}
    with contextlib.ExitStack() as stack:
        if quiet:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        for name, section in sections.items():
            try:
                facts[name] = section()
            except Exception as error:  # a report on what is broken must survive it
                facts[name] = {"error": f"{type(error).__name__}: {error}"}
    return facts


# ------------------------------------------------------------------ text


def _mark(good: bool, yes: str = "[OKAY]", no: str = "[NO]") -> str:
    word = yes if good else no
    if not sys.stdout.isatty() or sys.platform == "win32":
        return word
    return f"\033[92m{word}\033[0m" if good else f"\033[93m{word}\033[0m"


def _dotted(name: str, column: int) -> str:
    return f"{name} {'.' * (column - len(name))} "


def _broken(section: Any) -> str | None:
    return section["error"] if isinstance(section, dict) and "error" in section else None


def op_report(facts: Mapping[str, Any] | None = None) -> None:
    """Print how each op would run here."""
    facts = facts or gather()
    print(RULE)
    print("DeepSpeed C++/CUDA extension op report")
    print(RULE)
    print("NOTE: the ops below come compiled in one native library; without it they run by")
    print("      their torch reference. Only ops of your own are JIT compiled.")
    print(RULE)
    print("JIT compiled ops requires ninja")
    print(_dotted("ninja", OP_COLUMN) + _mark(ninja_installed(), no="[FAIL]"))
    print(RULE)
    print(_dotted("op name", OP_COLUMN) + "installed .. compatible")
    print(RULE)
    if _broken(facts["builders"]):
        print(f"not available: {_broken(facts['builders'])}")
    else:
        for op in facts["builders"]:
            installed = _mark(op["installed"], yes="[YES]")
            dots = "." * (6 if op["installed"] else 7)
            line = f"{_dotted(op['name'], OP_COLUMN)}{installed} {dots} {_mark(op['compatible'])}"
            why = f" ({op['reason']})" if op["reason"] else ""
            print(f"{line} {op['route']}{why}")
    print(RULE)
    print(_dotted("kernel", OP_COLUMN) + "runs by .... why")
    print(RULE)
    if _broken(facts["ops"]):
        print(f"not available: {_broken(facts['ops'])}")
        return
    kernels = [] if _broken(facts["native"]) else facts["native"]["cuda"]["kernels"]
    for op in (*facts["ops"], *(kernel for kernel in kernels if kernel["device"] is not None)):
        name = op["route"]
        padding = "." * (11 - len(name))
        where = "" if op.get("device") is None else f"device {op['device']}: "
        print(f"{_dotted(op['name'], OP_COLUMN)}{name} {padding} {where}{op['reason']}")


def _torch_rows(facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    torch, accelerator = facts["torch"], facts["accelerator"]
    if _broken(torch):
        return [("torch", _broken(torch))]
    rows = [("torch install path", torch["path"]), ("torch version", torch["version"])]
    if _broken(accelerator):
        return [*rows, ("accelerator", _broken(accelerator))]
    if accelerator["name"] == "cuda":
        rows += [
            ("torch cuda version", torch["cuda"]),
            ("torch hip version", torch["hip"]),
            ("nvcc version", accelerator["nvcc"] or "not found"),
        ]
    return rows


def _machine_rows(facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    machine = facts["machine"]
    if _broken(machine):
        return [("machine", _broken(machine))]
    cores = f"{machine['physical_cores']} cores, {machine['logical_cores']} threads"
    return [
        ("system", machine["system"]),
        ("cpu", f"{machine['cpu']} ({cores}, {machine['numa_nodes']} NUMA nodes)"),
        ("memory", human_readable_size(machine["memory"])),
    ]


def _device_rows(facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    accelerator = facts["accelerator"]
    if _broken(accelerator):
        return []
    rows = [("accelerator", f"{accelerator['name']} x {accelerator['device_count']}")]
    for index, device in enumerate(accelerator["devices"]):
        memory = human_readable_size(device["memory"])
        rows.append((f"device {index}", f"{device['name']}, {memory}, sm {device['capability']}"))
    return [*rows, ("NVIDIA driver", accelerator["driver"] or "not found")]


def _native_rows(facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    native = facts["native"]
    if _broken(native):
        return [("native library", _broken(native))]
    available = ", ".join(native["isa_available"]) or "none"
    return [
        ("native library", f"{native['route']}: {native['reason']}"),
        ("cpu features in use", f"{native['isa'] or 'none'} (of {available})"),
        ("CUDA kernels", f"{native['cuda']['route']}: {native['cuda']['reason']}"),
    ]


def _tool_rows(facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rows = []
    compilers, distributed = facts["compilers"], facts["distributed"]
    if _broken(compilers):
        rows.append(("compiler", _broken(compilers)))
    else:
        there = [f"{name}: {told}" for name, told in compilers.items() if told]
        rows.append(("compilers", "; ".join(there) or "none"))
    if _broken(distributed) or not distributed["available"]:
        rows.append(("distributed backends", _broken(distributed) or "torch has none"))
    else:
        there = [name for name, flag in distributed["backends"].items() if flag]
        rows.append(("distributed backends", ", ".join(there) or "none"))
    if not _broken(facts["packages"]):
        versions = facts["packages"].items()
        rows.append(("packages", ", ".join(f"{n} {v}" for n, v in versions if v)))
    if not _broken(facts["environment"]):
        values = facts["environment"].items()
        rows.append(("environment", ", ".join(f"{n}={v}" for n, v in values) or "nothing set"))
    return rows


def debug_report(facts: Mapping[str, Any] | None = None) -> None:
    """Print versions, places and the machine, one row a fact."""
    facts = facts or gather(operators=False)
    package, python = facts["deepspeed"], facts["python"]
    built = {} if _broken(facts["native"]) else facts["native"]["build"]
    size, warning = get_shm_size()
    rows = [
        *_torch_rows(facts),
        ("deepspeed install path", package["path"]),
        ("deepspeed info", f"{package['version']}, {package['git_hash']}, {package['git_branch']}"),
        ("deepspeed wheel compiled w.", f"{built.get('compiler') or 'no compiler'}, no torch"),
        ("shared memory (/dev/shm) size", size + (f" [WARNING] {warning}" if warning else "")),
        ("python", f"{python['version']} {python['implementation']}, {python['executable']}"),
        *_machine_rows(facts),
        *_device_rows(facts),
        *_native_rows(facts),
        *_tool_rows(facts),
    ]
    print(RULE)
    print("DeepSpeed general environment info:")
    for name, value in rows:
        print(_dotted(name, ROW_COLUMN) + str(value))


def main(hide_operator_status: bool = False, hide_errors_and_warnings: bool = False) -> None:
    """Print the whole report as text."""
    facts = gather(operators=not hide_operator_status, quiet=hide_errors_and_warnings)
    if not hide_operator_status:
        op_report(facts)
    debug_report(facts)


def cli_main(args: Sequence[str] | None = None) -> None:
    """The ``ds_report`` command; ``args`` are its words, None those of this process."""
    parser = argparse.ArgumentParser(prog="ds_report", description="Describe this installation.")
    add = parser.add_argument
    add("--hide_operator_status", action="store_true", help="leave the ops out")
    add("--hide_errors_and_warnings", action="store_true", help="drop what libraries say meanwhile")
    add("--json", action="store_true", help="print all facts as JSON")
    memory_plan.add_arguments(parser)
    train_log.add_arguments(parser)
    words = parser.parse_args(args)
    if words.train_log is not None:
        return train_log.report(parser, words.train_log, words.plot_out)
    if words.plan is not None:
        return memory_plan.report(parser, words, on_cpu=env.DS_ACCELERATOR.get() == "cpu")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    if words.json:
        facts = gather(not words.hide_operator_status, words.hide_errors_and_warnings)
        print(json.dumps(facts, indent=1))
    else:
        main(words.hide_operator_status, words.hide_errors_and_warnings)


if __name__ == "__main__":
    cli_main()
