"""The CUDA kernels compiled for the CPU, once for all tests."""

import os

import pytest
from emulated import build


@pytest.fixture(scope="session")
def checked_emulator(tmp_path_factory):
    return build(tmp_path_factory.mktemp("checked_emulator"), checked=True)


@pytest.fixture(scope="session")
def emulator(request, tmp_path_factory):
    """NGD_FAST_EMULATOR=checked runs all its tests with every load and store checked, some ten times slower."""
    if os.environ.get("NGD_FAST_EMULATOR") == "checked":
        return request.getfixturevalue("checked_emulator")
    return build(tmp_path_factory.mktemp("emulator"), checked=False)
