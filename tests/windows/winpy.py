# SPDX-License-Identifier: Apache-2.0
"""A Windows Python to drive, with the package installed in a folder whose name has a space and an umlaut.

On Windows that is the running interpreter and its own installed package. On Linux it is a Windows CPython under
Wine (the folder WINPY_HOME, default ~/.cache/winpy); the package is then built for Windows, unpacked into a new
folder, and its console entry points become real .exe files beside it.
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
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NATIVE = sys.platform == "win32"
HOME = Path(os.environ.get("WINPY_HOME") or Path.home() / ".cache" / "winpy")
FOLDER_NAME = "Wïndows sité"  # every path of the tests goes through this


def available() -> bool:
    """True where there is a Windows Python to drive."""
    return NATIVE or ((HOME / "bin" / "wpython").exists() and shutil.which("wine") is not None)


def windows_path(path: Path | str) -> str:
    """The path as Windows programs see it; Wine shows the root of the file system as drive Z."""
    return str(path) if NATIVE else "Z:" + str(path).replace("/", "\\")


@dataclass
class WindowsPython:
    """Programs of one installation: `python`, and the .exe of each console entry point."""

    site: Path | None = None
    programs: Path = Path(sysconfig.get_path("scripts"))
    extra_paths: list[Path] = field(default_factory=list)

    def environment(self, **settings: str) -> dict[str, str]:
        env = {**os.environ, **settings}
        env.pop("PYTHONUTF8", None)  # a user's console does not set it
        if not NATIVE:
            paths = [path for path in (self.site, *self.extra_paths) if path]
            env["PYTHONPATH"] = ";".join(windows_path(path) for path in paths)
            env |= {"WINEPREFIX": str(HOME / "prefix"), "WINEDEBUG": "-all", "LC_ALL": "C.UTF-8"}
            env["KMP_AFFINITY"] = "disabled"  # Wine has no such call
        return env

    def run(
        self, program: str, *words: str, cwd: Path = ROOT, timeout: float = 600, **settings: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `python` or an entry point to its end; stdout holds both streams."""
        command = [self.path_of(program), *map(str, words)]
        done = subprocess.run(
            command if NATIVE else ["wine", *command],
            cwd=cwd,
            env=self.environment(**settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,  # a pipe: Windows programs under Wine fail on plain files
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            check=False,
        )
        done.stdout = done.stdout.replace("\r\n", "\n")
        return done

    def python(self, *words: str, **options: object) -> subprocess.CompletedProcess[str]:
        return self.run("python", *words, **options)

    def path_of(self, program: str) -> str:
        if program == "python":
            return sys.executable if NATIVE else str(HOME / "py" / "python.exe")
        return str(self.programs / f"{program}.exe")


def build_wheel(folder: Path) -> Path:
    """A win_amd64 wheel of the tree, its library built by the MinGW cross-compiler."""
    done = subprocess.run(
        [sys.executable, "-m", "op_builder.wheel", "--target", "win_amd64", "--out", str(folder)],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"no Windows wheel: {done.stdout}{done.stderr}")
    (wheel,) = folder.glob("deepspeed-*-win_amd64.whl")
    return wheel


def install(folder: Path) -> WindowsPython:
    """Unpack a Windows wheel below `folder` and make its .exe files, as an installer does."""
    if NATIVE:
        return WindowsPython()
    site, programs = folder / "site-packages", folder / "Scripts"
    site.mkdir(parents=True)
    programs.mkdir()
    with zipfile.ZipFile(build_wheel(folder)) as wheel:
        wheel.extractall(site)
    (metadata,) = site.glob("deepspeed-*.dist-info")
    entries = configparser.ConfigParser(delimiters="=")
    entries.read(metadata / "entry_points.txt", encoding="utf-8")
    for name, target in entries["console_scripts"].items():
        (programs / f"{name}.exe").write_bytes(launcher(target))
    return WindowsPython(site=site, programs=programs)


def launcher(target: str) -> bytes:
    """An .exe that runs `module:function`, made as pip makes them: a stub, a shebang line, a zip."""
    import pip._vendor.distlib as distlib

    stub = (Path(distlib.__file__).parent / "t64.exe").read_bytes()
    module, _, function = target.partition(":")
    code = f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n"
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("__main__.py", code)
    python = windows_path(HOME / "py" / "python.exe")
    return stub + b"#!" + python.encode() + b"\r\n" + archive.getvalue()
