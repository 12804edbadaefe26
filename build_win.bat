@echo off
rem SPDX-License-Identifier: Apache-2.0
rem Builds dist\deepspeed-*-py3-none-win_amd64.whl with cl, clang-cl, clang or g++, or with the zig of PyPI where none is
rem there, and the CUDA kernels with the NVRTC of PyPI.
setlocal
cd /d "%~dp0"
where py >nul 2>nul && (set "PYTHON=py -3") || (set "PYTHON=python")
%PYTHON% -m op_builder.wheels --targets native %* || exit /b 1
