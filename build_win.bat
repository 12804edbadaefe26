@echo off
rem SPDX-License-Identifier: Apache-2.0
rem Builds dist\deepspeed-*-py3-none-win_amd64.whl. Uses cl, clang, g++ or ziglang, whichever is there.
setlocal
cd /d "%~dp0"
where py >nul 2>nul && (set "PYTHON=py -3") || (set "PYTHON=python")
%PYTHON% -m pip install --quiet --upgrade build || exit /b 1
%PYTHON% -m build --wheel %* || exit /b 1
