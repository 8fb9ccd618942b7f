"""A network that other verifiers have published numbers for: ERAN's mnist_6_100 at eps 0.026.

Put `mnist_6_100.npz` (arrays w0, b0, ..., w5, b5; w is out x in) into `external/` under SPARSELAB_DATA or data/.
"""
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sparselab.learn.data import load, to_float
from sparselab.robust.attacks import survivors
from sparselab.robust.verification import check_order, verify

EPS = 0.026


def weights() -> Path | None:
    roots = [os.environ.get("SPARSELAB_DATA"), Path(__file__).resolve().parents[1] / "data"]
    places = [Path(root) / "external/mnist_6_100.npz" for root in roots if root]
    return next((place for place in places if place.exists()), None)


def mnist():
    try:
        return load("mnist").test.take(slice(0, 1000))
    except OSError as error:
        pytest.skip(f"the MNIST test images are not at hand ({error})")


@pytest.fixture(scope="module")
def task():
    if weights() is None:
        pytest.skip("external/mnist_6_100.npz is neither under SPARSELAB_DATA nor in data/")
    arrays, layers = np.load(weights()), [nn.Flatten()]
    for i in range(6):
        w, b = (torch.from_numpy(arrays[f"{kind}{i}"]).float() for kind in "wb")
        layers += [nn.Linear(*w.shape[::-1]), nn.ReLU()]
        layers[-2].load_state_dict({"weight": w, "bias": b})
    images = mnist()
    return nn.Sequential(*layers[:-1]), to_float(images.images), images.labels


def test_published_row(task):
    """960 right; CROWN with adaptive slopes and merged margins proves 166 (DeepPoly in the literature: 160)."""
    model, x, y = task
    ibp, crown_ibp = (verify(model, x, y, EPS, method).verified for method in ("ibp", "crown_ibp"))
    left = survivors(model, x, y, EPS)
    crown = verify(model, x, y, EPS, "crown", robust=left)
    assert int(crown.clean.sum()) == 960
    assert 160 <= int(crown.verified.sum()) <= 170
    assert int(ibp.sum()) <= int(crown_ibp.sum()) < 160
    assert 838 <= int(left.sum()) <= 848, "PGD leaves about 843"
    for verified in (ibp, crown_ibp, crown.verified):
        check_order(crown.clean, left, verified)
