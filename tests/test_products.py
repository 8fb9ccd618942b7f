"""Products on rows: clean columns, which have a loop of their own, have the bits that they have beside boxes; images become rows by blocks."""
import math
import os
import subprocess
import sys
import time

import filelock
import numpy as np
import pytest
from engine import machine, numba_or_not
from torch import nn, rand

from sparselab.learn.rows import Outputs, Rows
from sparselab.sparse import products
from sparselab.sparse.entries import convolution, linear
from sparselab.sparse.products import Product, columns_to_rows, pull_back

LAYERS = {"convolution": lambda rng: convolution(rng.random((4, 3, 3, 3)) < 0.5, (3, 6, 6), (2, 1), (1, 1), (1, 1)),
          "linear": lambda rng: linear(rng.random((9, 40)) < 0.2, (40,)), "empty": lambda rng: linear(np.zeros((3, 4), bool), (4,))}


def steps(entries, n, add):
    """Outputs, gradients of the input, and of values, of n clean columns: beside boxes, and alone; the last pair both by loops for clean columns."""
    rng = np.random.default_rng(0)
    layer, values = Product(entries, rng.random(math.prod(entries.out_shape)) < 0.8), rng.normal(size=entries.weights).astype(np.float32)
    x, g, start = (rng.normal(size=(math.prod(shape), 3 * n)).astype(np.float32) for shape in (entries.in_shape, entries.out_shape, entries.in_shape))
    found = []
    for columns in (3 * n, n):
        x, g, gx = x[:, :columns].copy(), g[:, :columns].copy(), start[:, :columns].copy()
        y, dvalues = np.zeros_like(g), np.zeros_like(values)
        layer.forward(x, values, values[:0], y, n, 0.1)
        layer.backward(g, values, x, gx, n, 0.1, add, dvalues)
        found += [(y[:, :n], gx[:, :n])]
    order, dots = layer.into, np.zeros_like(values)
    pull_back(g, order.ptr, *order.columns, values, x, np.zeros_like(gx), order.rows, n, np.float32(0.1), False, dots)
    return [*zip(*found, strict=True), (dvalues, dots)]


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("n", [16, 64, 112, 128, 208])
@pytest.mark.parametrize("layer", LAYERS)
def test_clean_columns_have_the_bits_that_they_have_beside_boxes(layer, n, add):
    with machine(True):
        for alone, beside in steps(LAYERS[layer](np.random.default_rng(1)), n, add):
            np.testing.assert_array_equal(alone, beside)


@numba_or_not
@pytest.mark.parametrize("images", [1, 16, 35])
@pytest.mark.parametrize("pixels", [5, 48, 300])
def test_images_become_rows(numba, images, pixels):
    x, rng = rand(images, pixels).numpy(), np.random.default_rng(0)
    with machine(numba):
        for given in (x, np.asfortranarray(x), np.repeat(x, 2, 1)[:, ::2]):
            for rows in (np.arange(pixels), np.flatnonzero(rng.random(pixels) < 0.6), np.flatnonzero(rng.random(pixels) < 0.1)):
                y = np.full((pixels, images + 3), 7, np.float32)
                columns_to_rows(given, rows, y, 2)
                np.testing.assert_array_equal(y[rows, 2:-1], x.T[rows])
                assert (y[:, :2] == 7).all() and (y[:, -1] == 7).all()


def test_rows_begin_where_a_line_of_the_cache_does():
    net = Rows(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)), rand(2, 1, 8, 8))
    net.index({})
    made = Outputs(net, rand(5, 1, 8, 8))
    made.backward(np.ones((5, 3), np.float32), np.zeros_like(net.values.flat), of_input=True)
    for rows in (*made.p.x, *(g for g in made.p.g if g is not None)):
        assert rows.ctypes.data % 64 == 0


COMPILE_TOGETHER = """
import sys, time
from pathlib import Path
import numpy as np
from sparselab.sparse.products import row_sums
gradient, sums = np.ones((3, 5), np.float32), np.zeros(2, np.float32)
print("ready", flush=True)
while not Path(sys.argv[1]).exists():
    time.sleep(0.001)
row_sums(gradient, np.array([0, 1, 3]), np.array([2, 0, 1]), sums)
assert sums.tolist() == [5, 10]
print(sum(row_sums.stats.cache_misses.values()))
"""


@pytest.mark.skipif(products.numba is None, reason="numba is not installed")
def test_of_processes_that_begin_together_one_compiles(tmp_path):
    command = [sys.executable, "-c", COMPILE_TOGETHER, str(tmp_path / "go")]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "kept")}
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 3
    (tmp_path / "go").touch()
    compiled = [int(process.communicate()[0]) for process in processes]
    assert sorted(compiled) == [0, 0, 1]


FORKED = """
import multiprocessing
import numpy as np
from sparselab.sparse.products import counting_sort, row_sums
def sort(key):
    return counting_sort(np.array(key, np.int32), 3)[1].tolist()
row_sums(np.ones((3, 5), np.float32), np.array([0, 1, 3]), np.array([2, 0, 1]), np.zeros(2, np.float32))
with multiprocessing.get_context("fork").Pool(1) as pool:
    print(pool.map(sort, [[2, 0, 1]])[0])
"""


def printed(code, **environment):
    """What Python prints in which `environment` is set."""
    return subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, env=os.environ | environment).stdout


def test_a_forked_process_compiles_too(tmp_path):
    assert printed(FORKED, NUMBA_CACHE_DIR=str(tmp_path)) == "[1, 2, 0]\n"


def test_numba_that_is_to_compile_nothing_is_as_no_numba():
    code = "from sparselab.sparse.products import sort, with_numba; import numpy; print(with_numba(), sort(numpy.array([2, 0, 1]), 3)[1])"
    assert printed(code, NUMBA_DISABLE_JIT="1") == "False [1 2 0]\n"


def test_a_process_that_never_ends_its_compiling_does_not_stop_the_others(tmp_path, monkeypatch):
    lock = filelock.FileLock(tmp_path / "compiling.lock", timeout=0.1)
    monkeypatch.setattr(products, "_lock", lambda folder, process: lock)
    with filelock.FileLock(tmp_path / "compiling.lock"), products._alone(str(tmp_path)):
        assert lock.timeout == 0  # for all functions after this one
    (tmp_path / "file").touch()
    with products._alone(str(tmp_path / "file" / "below")), products._alone(None):
        pass


def test_a_disk_that_has_no_locks_does_not_stop_the_compiling(tmp_path, monkeypatch):
    def no_lock(folder, process):
        raise NotImplementedError("FileSystem does not appear to support flock")  # filelock 3 of Linux's ENOSYS
    monkeypatch.setattr(products, "_lock", no_lock)
    with products._alone(str(tmp_path)):
        pass


def test_who_compiles_may_compile_what_the_function_calls_and_nobody_else_may(tmp_path):
    folder, started = str(tmp_path / "new"), time.monotonic()
    with products._alone(folder):
        with products._alone(folder):
            pass
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(tmp_path / "new" / "compiling.lock", timeout=0).acquire()
    assert time.monotonic() - started < 10
    filelock.FileLock(tmp_path / "new" / "compiling.lock", timeout=0).acquire()
