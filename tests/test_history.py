"""A mask history against the masks themselves, however one walks through it."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselab.learn.config import Config
from sparselab.learn.experiments import train
from sparselab.sparse.cursor import Cursor
from sparselab.sparse.history import MaskHistory, pack_sorted, unpack_sorted
from sparselab.sparse.history_files import load, save


@settings(max_examples=150, deadline=None)
@given(st.sets(st.integers(0, 5000) | st.integers(0, 2 ** 40), max_size=400))
def test_sorted_integers_come_back(values):
    values = np.array(sorted(values), np.int64)
    assert (unpack_sorted(pack_sorted(values)) == values).all()
    assert unpack_sorted(pack_sorted(values[:0])).size == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 10 ** 6), min_size=1, max_size=300, unique=True), st.data())
def test_a_cut_list_is_a_sentence(values, data):
    packed = pack_sorted(np.array(sorted(values)))
    cut = packed[:data.draw(st.integers(0, len(packed) - 1))]
    with pytest.raises(ValueError, match="is damaged"):
        unpack_sorted(cut)
    with pytest.raises(ValueError, match=r"is damaged \(it begins with 120, not with 0\)"):
        unpack_sorted(b"x" + packed[1:])


def random_masks(seed, records, shape=(7, 9), still=0.2):
    rng = np.random.default_rng(seed)
    masks = [rng.random(shape) < rng.random()]
    for _ in range(records):
        change = rng.random() * 0.5 if rng.random() > still else 0
        masks.append(masks[-1] ^ (rng.random(shape) < change))
    return masks


def history_of(masks):
    history = MaskHistory({"w": torch.from_numpy(masks[0])})
    for step, mask in enumerate(masks[1:], 1):
        history.record(10 * step, {"w": torch.from_numpy(mask)})
    return history


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2 ** 32 - 1), st.integers(0, 40), st.lists(st.integers(-41, 40), max_size=25), st.integers(0, 5))
def test_a_walk_is_a_replay(seed, records, jumps, appended):
    masks = random_masks(seed, records + appended)
    history = history_of(masks[:records + 1])
    cursor = Cursor(history, "w")
    for jump in jumps:
        if not -records - 1 <= jump <= records:
            with pytest.raises(ValueError, match=f"no record {jump}"):
                cursor.seek(jump)
            continue
        check(cursor.seek(jump), masks[:records + 1], jump % (records + 1))
    for step in range(records + 1, len(masks)):  # a run that is still being trained
        history.record(10 * step, {"w": torch.from_numpy(masks[step])})
        check(cursor.seek(-1), masks, step)


def check(cursor, masks, at):
    now, before = masks[at], masks[max(at - 1, 0)]
    assert cursor.record == at and cursor.step == 10 * at and (cursor.mask == now).all()
    assert cursor.active.tolist() == np.flatnonzero(now).tolist()
    assert cursor.grown.tolist() == np.flatnonzero(now & ~before).tolist()
    assert cursor.dropped.tolist() == np.flatnonzero(before & ~now).tolist()
    for weight, since, age in zip(cursor.active, cursor.since, cursor.age, strict=True):
        on = [record for record in range(at + 1) if all(m.flat[weight] for m in masks[record:at + 1])]
        assert since == on[0] and age == at - on[0]


def test_a_cursor_keeps_few_masks():
    history = history_of(random_masks(1, 400))
    cursor = Cursor(history, "w")
    cursor.seek(-1).seek(0).seek(200)
    assert len(cursor._marks) <= 21


@pytest.mark.parametrize("damage", ["start.bin", "start.json"])
def test_a_damaged_history_is_a_sentence(tmp_path, damage):
    save(history_of(random_masks(5, 6, still=0)), tmp_path)
    path = tmp_path / damage
    path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))
    with pytest.raises(ValueError, match="does not hold a readable mask history"):
        load(tmp_path)


def test_a_run_keeps_the_mask_that_pruning_at_initialisation_leaves(tmp_path):
    config = Config(method="snip", sparsity=0.9, model="mlp", model_options={"widths": [16]}, objective="natural", eps=0.0, epochs=1,
                    train_samples=200, kernels="dense", device="cpu", runs_dir=str(tmp_path))
    run = train(config, [])
    masks = {name: run.history.mask(0, name) for name in run.history.names}
    assert sum(int(mask.sum()) for mask in masks.values()) == run.summary["nnz"] < 0.11 * run.summary["total"]
    assert all(torch.equal(run.weights[name] != 0, mask) for name, mask in masks.items())


@pytest.mark.parametrize("damage", ["updates.bin", "updates.jsonl"])
def test_a_history_ends_before_the_first_byte_that_is_another(tmp_path, damage):
    masks = random_masks(5, 6, still=0)
    save(history_of(masks), tmp_path)
    path = tmp_path / damage
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
        left = load(tmp_path)
        assert damage in left.lost and len(left.steps) <= 6
        assert all((mask.numpy() == masks[record]).all() for record, (_, mask) in enumerate(left.replay("w")))
    path.write_bytes(whole)
    assert not load(tmp_path).lost


def test_an_unknown_layer_is_named():
    history = history_of(random_masks(2, 1))
    with pytest.raises(ValueError, match="no layer called 'v'"):
        Cursor(history, "v")
    with pytest.raises(ValueError, match="no layer called 'v'"):
        history.mask(0, "v")
