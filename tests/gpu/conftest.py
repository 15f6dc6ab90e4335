from __future__ import annotations

import pytest

from tests.gpu.device import DEVICE, require


@pytest.fixture(autouse=True, scope="session")
def _the_device_is_there() -> None:
    """Every test of this folder fails where the device is missing."""
    require(DEVICE)
