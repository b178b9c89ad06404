import os
import time

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # cuBLAS reads it when it starts, before some tests read settings

import gpus
import pytest
import torch
from work import limited

STARTED = time.monotonic()


def pytest_collection_modifyitems(config, items):
    ours = [item for item in items if item.path.parent.name == "gpu"]
    for item in ours:
        item.add_marker(pytest.mark.gpu)
    ours.sort(key=lambda item: "compiled" in item.name)  # last: a compiler takes most of the time
    if not there():  # one is left, to say so in one line
        config.hook.pytest_deselected(items=ours[1:])
        del ours[1:]
    items[:] = [item for item in items if item.path.parent.name != "gpu"] + ours


def there() -> bool:
    """Return whether there is what the tests run on."""
    return gpus.DEVICE != "cuda" or torch.cuda.is_available()


@pytest.fixture(autouse=True, scope="session")
def device() -> torch.device:
    """What the tests run on: a CUDA device, or the CPU with GPU_DEVICE=cpu."""
    if not there():
        pytest.skip("no CUDA device here; GPU_DEVICE=cpu runs the same tests on the CPU, small")
    return torch.device(gpus.DEVICE)


@pytest.fixture(autouse=True)
def in_time(device):
    """The whole is for machines that are lent by the minute: past its seconds tests are skipped, and say so."""
    if time.monotonic() - STARTED > gpus.SECONDS:
        pytest.skip(f"the {gpus.SECONDS} seconds of these tests are over (GPU_TEST_SECONDS)")
    with limited(gpus.MOST_SECONDS):
        yield
