from __future__ import annotations

import pytest
import torch

from tests.gpu.device import DEVICE, ON_GPU


@pytest.fixture(autouse=True, scope="session")
def _the_device_is_there() -> None:
    """A GPU that was asked for and is missing is a failure, never a skip."""
    if ON_GPU and not torch.cuda.is_available():
        pytest.fail(f"KVOPT_TEST_DEVICE is {DEVICE}, and torch {torch.__version__} sees no CUDA device", pytrace=False)
