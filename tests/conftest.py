"""Every test starts from the same seeds on one thread, offline, and hands torch's global state back as it found it."""
import os
import random
import shutil
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the hub fails at once instead of waiting for a network
os.environ["SPARSELAB_CACHE"] = ""  # where steps become sparse is not measured while other tests run

import numpy as np
import pytest
import torch

# The files that take longest, the longest first: they begin first, so that no core is left with one of them at the end.
LONG = ("test_browser", "test_train", "test_sparse", "test_train_notebook", "test_complete", "test_robust_methods", "test_view", "test_compare",
        "test_engines", "test_tickets_and_gap", "test_certificates", "test_packaging", "test_own", "test_screen", "test_unrolled", "test_workbench",
        "test_fuzz", "test_compact", "test_claims", "test_crashes", "test_soundness", "test_sweeps", "test_page", "test_certify_again")


@pytest.fixture(autouse=True, scope="session")
def digits_read_once():
    """The digits are read from text, which is a sixth of the shortest trainings here; whoever loads them has a copy."""
    from sparselab.learn.known import DATASETS

    row = DATASETS["digits"]
    read = cache(row.read)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "digits", replace(row, read=lambda: deepcopy(read())))
        yield


@pytest.fixture(autouse=True)
def unflushed(monkeypatch):
    """A killed process loses nothing that it has written; only a machine without power does. So the disk is not waited for."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


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


@pytest.fixture(autouse=True, scope="session")
def few_radii():
    """Runs record their margins at 3 radii: those at 21 are a third of what a tiny training costs. `all_radii` gives a module all of them."""
    from sparselab.learn import margins, training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "margins_of", partial(margins.margins_of, radii=3))
        yield


@pytest.fixture(scope="module")
def all_radii(few_radii):
    """Runs of this module record their margins at all radii."""
    from sparselab.learn import margins, training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "margins_of", margins.margins_of)
        yield


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    missing = {}
    if not (shutil.which("chromium") or shutil.which("google-chrome")):
        missing["browser"] = "chromium is not installed (Debian: apt install chromium)"
    if not torch.cuda.is_available():
        missing["gpu"] = "there is no CUDA device"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
