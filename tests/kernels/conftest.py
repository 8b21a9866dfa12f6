"""The choice between the C++ kernel and torch; and which Triton tests this machine can run at all.

Triton has wheels for Linux only, and the GPU tests need a GPU: where these are missing the files are not collected,
rather than reported as passed or skipped.
"""

import importlib.util

import pytest
import torch

from qerl_compile.kernels import cpu_native
from tests.kernels.oracle import hide_native

TRITON = importlib.util.find_spec("triton") is not None
CAPABILITY = torch.cuda.get_device_capability() if TRITON and torch.cuda.is_available() else (0, 0)
collect_ignore_glob = [] if CAPABILITY > (0, 0) else ["*_gpu.py"]  # without Triton, also where there is a GPU
if CAPABILITY < (8, 9):  # Triton takes pointers to E4M3 from there on
    collect_ignore_glob += ["test_stream_gpu.py"]
if CAPABILITY[0] != 9:  # wgmma
    collect_ignore_glob += ["test_hopper_gpu.py", "test_hopper_dx_gpu.py"]
if CAPABILITY[0] < 9:  # dependent launches
    collect_ignore_glob += ["test_lead_in_gpu.py"]
if not TRITON:
    collect_ignore_glob += ["*_lowering.py", "*_emulated.py", "*_interpreted.py", "test_prepared_launch.py"]


@pytest.fixture(params=["native", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with the C++ kernel and without it."""
    if request.param == "torch":
        hide_native(monkeypatch)
    else:
        assert cpu_native.load() is not None, "the tests need g++ or clang++"
    return request.param
