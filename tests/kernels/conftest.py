"""The choice between the C++ kernel and torch."""

import pytest

from qerl_compile.kernels import cpu_native
from tests.kernels.oracle import hide_native


@pytest.fixture(params=["native", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with the C++ kernel and without it."""
    if request.param == "torch":
        hide_native(monkeypatch)
    else:
        assert cpu_native.load() is not None, "the tests need g++ or clang++"
    return request.param
