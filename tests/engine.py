"""What tests of the sparse engine share: the two machines, with numba and without, and a model of what the zoo has not."""
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparselab.sparse.products import with_numba, without_numba

numba_or_not = pytest.mark.parametrize("numba", [True, False])


def machine(numba: bool):
    """A context with numba, which skips the test where it is not installed, or without."""
    if numba and not with_numba():
        pytest.skip("numba is not installed")
    return nullcontext() if numba else without_numba()


class Parts(nn.Module):
    """Groups, dilation, a pre-activation that is read twice, a leaky ReLU, a part of an image turned and joined to another, and a constant."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Conv2d(4, 4, 3, dilation=2, padding=2), nn.Linear(72, 10)
        self.register_buffer("scale", torch.tensor([-0.5, 2.0]).view(2, 1, 1))

    def forward(self, x):
        x = self.first((x - 0.5) * self.scale)
        y = F.leaky_relu(self.second(x.relu()), 0.2) - 0.5 * x
        return self.last(torch.cat([y[:, :1].flip(3), x[:, 2:3].transpose(2, 3)], 1).flatten(1))
