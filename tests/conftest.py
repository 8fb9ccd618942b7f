"""Every test starts from the same seeds on one thread, offline, and hands torch's global state back as it found it."""
import os
import random
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the hub fails at once instead of waiting for a network

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def reproducible():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    missing = {}
    if not (shutil.which("chromium") or shutil.which("google-chrome")):
        missing["browser"] = "chromium is not installed (Debian: apt install chromium)"
    if not torch.cuda.is_available():
        missing["gpu"] = "there is no CUDA device"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
