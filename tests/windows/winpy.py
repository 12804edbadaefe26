# SPDX-License-Identifier: Apache-2.0
"""A Windows Python to drive, with the package installed in a folder whose name has a space and an umlaut.

On Windows that is the running interpreter and its own installed package. On Linux it is a Windows CPython under
Wine (the folder WINPY_HOME, default ~/.cache/winpy), copied into a new folder beside the package, which is built for
Windows; the console entry points become real .exe files.

[Note: the real C++ runtime]
Wine's own vcruntime140_1.dll cannot destroy a C++ exception that torch throws: the process crashes on the way out of
an `except`. Microsoft's runtime, from the PyPI package msvc-runtime, laid beside python.exe and preferred to Wine's,
does it right.
"""

from __future__ import annotations

import configparser
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NATIVE = sys.platform == "win32"
HOME = Path(os.environ.get("WINPY_HOME") or Path.home() / ".cache" / "winpy")
FOLDER_NAME = "Wïndows sité"  # every path of the tests goes through this
RUNTIME = "msvc-runtime==14.44.35112"
RUNTIME_DLLS = ("vcruntime140", "vcruntime140_1", "msvcp140", "msvcp140_1")
OLDEST = (
    HOME / "site-2.3"
)  # torch 2.3.0 and transformers 4.41.2, where shared/winpy/setup-2.3 laid them


def available() -> bool:
    """True where there is a Windows Python to drive."""
    return NATIVE or ((HOME / "bin" / "wpython").exists() and shutil.which("wine") is not None)


def windows_path(path: Path | str) -> str:
    """The path as Windows programs see it; Wine shows the root of the file system as drive Z."""
    return str(path) if NATIVE else "Z:" + str(path).replace("/", "\\")


@dataclass(frozen=True)
class WindowsPython:
    """Programs of one installation: `python`, and the .exe of each console entry point.

    Attributes:
        python_exe: the interpreter.
        programs: folder of the entry points.
        paths: folders for PYTHONPATH; the installed package is in the first, torch in the second (none on Windows).
    """

    python_exe: Path = Path(sys.executable)
    programs: Path = Path(sysconfig.get_path("scripts"))
    paths: tuple[Path, ...] = ()

    def environment(self, **settings: str) -> dict[str, str]:
        unset = ("PYTHONUTF8", "PYTHONIOENCODING", "CI")  # a user's console sets none of them
        env = {name: value for name, value in os.environ.items() if name not in unset} | settings
        if not NATIVE:
            env["PYTHONPATH"] = ";".join(windows_path(path) for path in self.paths)
            env |= {"WINEPREFIX": str(HOME / "prefix"), "WINEDEBUG": "-all", "LC_ALL": "C.UTF-8"}
            # see [Note: the real C++ runtime]; the debugger would sit on a crash for ever
            env["WINEDLLOVERRIDES"] = ",".join(RUNTIME_DLLS) + "=n,b;winedbg.exe=d"
            env["KMP_AFFINITY"] = "disabled"  # Wine has no such call
        return env

    def run(
        self, program: str, *words: str, cwd: Path = ROOT, timeout: float = 600, **settings: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `python` or an entry point to its end; stdout holds both streams."""
        path = self.python_exe if program == "python" else self.programs / f"{program}.exe"
        command = [str(path), *map(str, words)]
        done = subprocess.run(
            command if NATIVE else ["wine", *command],
            cwd=cwd,
            env=self.environment(**settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,  # a pipe: Windows programs under Wine fail on plain files
            stderr=subprocess.STDOUT,
            timeout=timeout,
            check=False,
        )
        return subprocess.CompletedProcess(command, done.returncode, decoded(done.stdout))

    def python(self, *words: str, **options: object) -> subprocess.CompletedProcess[str]:
        """Run the interpreter with the installed package before the working folder's."""
        return self.run("python", *words, PYTHONSAFEPATH="1", **options)

    def oldest(self) -> WindowsPython:
        """The same installation over the oldest torch that is supported."""
        package, *rest = self.paths
        return replace(self, paths=(package, OLDEST, *rest))

    def with_paths(self, *more: Path) -> WindowsPython:
        """The same installation with more folders to import from; PYTHONPATH is Wine's only way."""
        return replace(self, paths=(*self.paths, *more))


def decoded(output: bytes) -> str:
    """Text that a program wrote to a pipe: UTF-8 where it chose so, else the system's code page."""
    try:
        text = output.decode("utf-8")
    except UnicodeDecodeError:
        text = output.decode("cp1252", errors="replace")
    return text.replace("\r\n", "\n")


def pip(*words: object) -> None:
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *map(str, words)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise RuntimeError(f"pip {' '.join(map(str, words))} failed:\n{done.stdout}{done.stderr}")


def build_wheel(folder: Path) -> Path:
    """A win_amd64 wheel of the tree, made by the documented command; DS_WHEELS names a folder that has one already."""
    made = Path(os.environ.get("DS_WHEELS") or folder / "dist")
    if not made.is_dir():
        words = ["-m", "op_builder.wheels", "--targets", "win_amd64", "--out", str(made)]
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, capture_output=True, encoding="utf-8", check=False
        )
        if done.returncode:
            raise RuntimeError(f"no Windows wheel:\n{done.stdout}{done.stderr}")
    (wheel,) = made.glob("deepspeed-*-py3-none-win_amd64.whl")
    return wheel


def copy_python(folder: Path) -> Path:
    """The interpreter and its standard library in a folder of their own, with Microsoft's C++ runtime."""
    runtime = [f"{name}.dll" for name in (*RUNTIME_DLLS, *map(str.upper, RUNTIME_DLLS))]
    ignored = shutil.ignore_patterns("__pycache__", "site-packages", *runtime)
    shutil.copytree(HOME / "py", folder, ignore=ignored)
    download = folder / "download"
    windows = ["--only-binary=:all:", "--platform", "win_amd64", "--python-version", "3.11"]
    pip("download", "--no-deps", *windows, "-d", download, RUNTIME)
    (wheel,) = download.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if "/Scripts/" in name and Path(name).stem in RUNTIME_DLLS:
                (folder / Path(name).name).write_bytes(archive.read(name))
    return folder / "python.exe"


def install(folder: Path) -> WindowsPython:
    """Unpack a Windows wheel below `folder` and make its .exe files, as an installer does."""
    if NATIVE:
        return WindowsPython()
    python_exe = copy_python(folder / "python")
    site, programs = folder / "site-packages", folder / "Scripts"
    site.mkdir()
    programs.mkdir()
    with zipfile.ZipFile(build_wheel(folder)) as wheel:
        wheel.extractall(site)
    (metadata,) = site.glob("deepspeed-*.dist-info")
    entries = configparser.ConfigParser(delimiters="=")
    entries.read(metadata / "entry_points.txt", encoding="utf-8")
    for name, target in entries["console_scripts"].items():
        (programs / f"{name}.exe").write_bytes(launcher(target, python_exe))
    return WindowsPython(python_exe, programs, (site, HOME / "py" / "Lib" / "site-packages"))


def launcher(target: str, python_exe: Path) -> bytes:
    """An .exe that runs `module:function`, made as pip makes them: a stub, a shebang line, a zip."""
    import pip._vendor.distlib as distlib

    stub = (Path(distlib.__file__).parent / "t64.exe").read_bytes()
    module, _, function = target.strip().partition(":")
    code = f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n"
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("__main__.py", code)
    return stub + f'#!"{windows_path(python_exe)}"\r\n'.encode() + archive.getvalue()
