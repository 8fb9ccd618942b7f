"""Data sets: damaged files, the order of places, encoded images, splits, and batches that do not depend on history."""
import gzip
import importlib.util
import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselab.learn import DATASETS, Config
from sparselab.learn import find as find_module
from sparselab.learn.assembly import augmentation
from sparselab.learn.augment import Augment
from sparselab.learn.data import Split, load, to_float
from sparselab.learn.find import candidates, find, fingerprint, locate, read_hub, roots
from sparselab.learn.formats import decode, read_idx, read_parquet_folder, read_picture_folder
from sparselab.learn.known import DataSet, digits


def needs(*modules):
    missing = [m for m in modules if importlib.util.find_spec(m.partition(".")[0]) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} missing: pip install 'sparselab[hub]'")


def idx_bytes(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx(folder, train=20, test=12, size=28, labels=None, zipped=True, value=None):
    """A small IDX set; image i of a split is filled with i (or `value`), so that it can be told apart."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, n in (("train", train), ("t10k", test)):
        images = np.broadcast_to(value or np.arange(n)[:, None, None], (n, size, size))
        found = np.arange(n) % 10 if labels is None else np.resize(labels, n)
        for kind, array in (("images-idx3", images), ("labels-idx1", found)):
            content = idx_bytes(array)
            file = folder / f"{stem}-{kind}-ubyte{'.gz' if zipped else ''}"
            file.write_bytes(gzip.compress(content, 1) if zipped else content)
    return folder


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No data anywhere but where the test puts it: an empty current directory, no variable, no Debian folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPARSELAB_DATA", raising=False)
    monkeypatch.setattr(find_module, "DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(find_module, "__file__", str(tmp_path / "site-packages" / "sparselab" / "learn" / "find.py"))
    return tmp_path


# IDX -----------------------------------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=40)
@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=3), cut=st.integers(0, 140), extra=st.binary(min_size=1))
def test_idx_is_read_exactly_or_refused(tmp_path_factory, shape, cut, extra):
    array = np.random.default_rng(sum(shape)).integers(0, 256, shape, np.uint8)
    content = idx_bytes(array)
    file = tmp_path_factory.mktemp("idx") / "x-ubyte"
    file.write_bytes(content)
    assert np.array_equal(read_idx(file), array) and read_idx(file).shape == tuple(shape)
    file.write_bytes(content[:cut] if cut < len(content) else content + extra)
    with pytest.raises(ValueError, match="x-ubyte"):
        read_idx(file)


@pytest.mark.parametrize("damage, words", [
    (lambda b: b[: len(b) // 2], "not a complete gzip"),
    (lambda b: b"plain text, not gzip", "not a complete gzip"),
    (lambda b: b[:20] + bytes(8) + b[28:], "not a complete gzip"),
    (lambda b: gzip.compress(gzip.decompress(b)[:-1]), "cut short"),
    (lambda b: gzip.compress(b"\0\0\x0d" + gzip.decompress(b)[3:]), "not an IDX file of unsigned bytes"),
    (lambda b: gzip.compress(b"<html>Not found</html>"), "not an IDX file of unsigned bytes"),
    (lambda b: gzip.compress(b""), "not an IDX file of unsigned bytes"),
    (lambda b: gzip.compress(b"\0\0\x08"), "cut short"),
])
def test_damaged_images_name_the_file(nowhere, damage, words):
    folder = write_idx(nowhere / "mnist")
    file = folder / "train-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=words) as error:
        load("mnist", nowhere)
    assert str(file) in str(error.value)


def test_counts_shapes_and_missing_files_are_told(nowhere):
    folder = write_idx(nowhere / "mnist", zipped=False)
    labels = folder / "train-labels-idx1-ubyte"
    labels.write_bytes(idx_bytes(np.zeros(7)))
    with pytest.raises(ValueError, match="20 images but .*train-labels-idx1-ubyte holds 7 labels"):
        load("mnist", nowhere)
    labels.write_bytes(idx_bytes(np.zeros((20, 1))))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte one of shape \(20, 1\)"):
        load("mnist", nowhere)
    labels.unlink()
    with pytest.raises(ValueError, match="none called train-labels-idx"):
        load("mnist", nowhere)
    write_idx(folder, labels=[3, 10])
    with pytest.raises(ValueError, match="training labels are from 3 to 10; expected 0 to 9"):
        load("mnist", nowhere)


def test_plain_and_zipped_files_and_both_spellings_are_read(nowhere):
    write_idx(nowhere / "a" / "mnist", zipped=False)
    plain = find("mnist", nowhere / "a")
    for file in (nowhere / "a" / "mnist").iterdir():
        file.rename(file.with_name(file.name.replace("-idx", ".idx")))
    dotted = find("mnist", nowhere / "a")
    zipped = find("mnist", write_idx(nowhere / "b" / "mnist").parent)
    for raw in (dotted, zipped):
        assert all(np.array_equal(a, b) for a, b in zip(plain.train + plain.test, raw.train + raw.test, strict=True))


# Where it is looked for --------------------------------------------------------------------------------------------

def test_places_are_searched_in_order(nowhere, monkeypatch):
    monkeypatch.setenv("SPARSELAB_DATA", str(nowhere / "variable"))
    (nowhere / "site-packages" / "settings.ini").parent.mkdir()
    (nowhere / "site-packages" / "settings.ini").touch()  # as in a checkout
    order = ["given", "variable", "data", "site-packages/data", "debian"]
    assert roots(nowhere / "given") == [nowhere / place for place in order]
    for value, place in reversed(list(enumerate(order, 1))):
        write_idx(nowhere / place / "kmnist", value=value)
        raw = find("kmnist", nowhere / "given")
        assert raw.train[0].max() == value and str(nowhere / place / "kmnist") in raw.source


def test_an_installed_package_has_no_data_folder(nowhere):
    assert roots() == [nowhere / "data", nowhere / "debian"]


def test_a_place_may_hold_the_files_itself_unless_it_is_called_after_another_set(nowhere):
    write_idx(nowhere / "my_idx_files")
    assert len(find("kmnist", nowhere / "my_idx_files").train[1]) == 20
    write_idx(nowhere / "Fashion-MNIST")
    assert candidates(nowhere / "Fashion-MNIST", "kmnist") == []
    assert find("fashion_mnist", nowhere / "Fashion-MNIST").name == "Fashion-MNIST"
    with pytest.raises(FileNotFoundError):
        find("kmnist", nowhere / "Fashion-MNIST")
    with pytest.raises(ValueError, match="Did you mean 'kmnist'"):
        find("kmnits", nowhere / "my_idx_files")


@pytest.mark.parametrize("owner, first", [(name, row.first_labels) for name, row in DATASETS.items() if row.first_labels])
def test_official_labels_unmask_the_wrong_set(nowhere, owner, first):
    write_idx(nowhere / "somewhere", labels=first)
    other = next(name for name in ("mnist", "fashion_mnist") if name != owner)
    assert find(owner, nowhere / "somewhere").name == DATASETS[owner].title
    with pytest.raises(ValueError, match=f"taken for {other}, but its test labels are those of {owner}"):
        find(other, nowhere / "somewhere")


def test_the_wrong_image_size_is_refused(nowhere):
    write_idx(nowhere / "cifar10")
    with pytest.raises(ValueError, match=r"\(1, 28, 28\), not \(3, 32, 32\), so it is not cifar10"):
        find("cifar10", nowhere)


def test_a_set_of_any_name_is_found_in_its_folder(nowhere):
    write_idx(nowhere / "stars", labels=[0, 1, 2], size=9)
    data = load("stars", nowhere)
    assert (data.name, data.classes, data.shape) == ("stars", 3, (1, 9, 9))


def test_an_unknown_name_is_answered_with_the_nearest(nowhere):
    with pytest.raises(ValueError, match="no data set called 'cifar_10'. Did you mean 'cifar10'?") as error:
        load("cifar_10")
    assert all(name in str(error.value) for name in DATASETS)


@pytest.mark.parametrize("hub", [True, False])
def test_a_missing_set_says_where_it_was_looked_for_and_what_to_do(nowhere, monkeypatch, hub):
    monkeypatch.setattr(find_module.importlib.util, "find_spec", lambda name: hub or None)

    def no_network(*_):
        raise FileNotFoundError("The Hugging Face hub gave no data set: no network.")

    monkeypatch.setattr(find_module, "read_hub", no_network)
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist") as error:
        load("fashion_mnist", nowhere / "mine")
    for word in (str(nowhere / "mine"), str(nowhere / "data"), "debian", "SPARSELAB_DATA", "data_dir"):
        assert word in str(error.value)
    assert ("no network" if hub else "pip install 'sparselab[hub]'") in str(error.value)
    with pytest.raises(FileNotFoundError, match="Put its files into a folder called cifar10") as error:
        load("cifar10")
    assert "apt-get" not in str(error.value)


def test_a_missing_package_names_the_extra(nowhere, monkeypatch):
    (nowhere / "cifar10").mkdir()
    for split in ("train", "test"):
        (nowhere / "cifar10" / f"{split}.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pip install 'sparselab\[hub\]'"):
        load("cifar10", nowhere)


def test_optional_packages_are_imported_only_when_needed():
    code = ("import sys, sparselab.learn.data, sparselab.learn.models; sparselab.learn.data.load('digits'); "
            "print([m for m in ('PIL', 'pyarrow', 'datasets', 'sklearn', 'plotly', 'pandas') if m in sys.modules])")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# Encoded images ------------------------------------------------------------------------------------------------------

def picture(level, size=(32, 32), mode="RGB", suffix="png"):
    from PIL import Image
    file = io.BytesIO()
    Image.new(mode, size, level).save(file, {"jpg": "JPEG"}.get(suffix, suffix))
    return file.getvalue()


def write_parquet(folder, split, pictures, labels, image="img", label="label", names=None, plain=False):
    import pyarrow
    from pyarrow import parquet
    folder.mkdir(parents=True, exist_ok=True)
    cells = pictures if plain else [{"bytes": p, "path": None} for p in pictures]
    table = pyarrow.table({image: cells, label: labels})
    if names:
        info = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    parquet.write_table(table, folder / f"{split}.parquet")


@needs("PIL", "pyarrow")
@pytest.mark.parametrize("image, label, plain", [
    ("img", "label", False), ("image", "fine_label", False), ("img", "label", True)])
def test_parquet_in_the_hubs_format(nowhere, image, label, plain):
    levels = [(10 * k, 0, 255 - k) for k in range(10)]
    files = {"train-00000-of-00002": range(5), "train-00001-of-00002": range(5, 10), "test": range(10)}
    for split, order in files.items():
        pictures = [picture(levels[k]) for k in order]
        write_parquet(nowhere / "cifar10", split, pictures, list(order), image, label, plain=plain)
    raw = find("cifar10", nowhere)
    assert raw.name == "CIFAR-10" and raw.classes[3] == "cat" and raw.train[1].tolist() == list(range(10))
    assert raw.train[0].shape == (10, 3, 32, 32) and raw.train[0][:, :, 7, 7].tolist() == [list(c) for c in levels]


@needs("PIL", "pyarrow")
def test_a_jpeg_version_says_so_and_tiny_imagenet_does_not(nowhere):
    for split in ("train", "test"):
        write_parquet(nowhere / "cifar10", split, [picture((9, 9, 9), suffix="jpg")] * 3, [0, 1, 2])
        write_parquet(nowhere / "tiny_imagenet", split.replace("test", "valid"),
                      [picture((9, 9, 9), (64, 64), suffix="jpg"), picture(9, (64, 64), "L", "jpg")], [0, 199], "image")
    data = load("cifar10", nowhere)
    assert data.name == "CIFAR-10 (JPEG)" and "images are JPEG re-encodings" in data.source
    tiny = find("tiny_imagenet", nowhere)
    assert tiny.name == "Tiny ImageNet" and tiny.train[0].shape == (2, 3, 64, 64)


@needs("PIL", "pyarrow")
def test_class_names_come_from_the_files(nowhere):
    for split in ("train", "test"):
        pictures = [picture(level, (5, 4), "L") for level in (3, 7)]
        write_parquet(nowhere / "cats", split, pictures, [0, 1], names=["lynx", "puma"])
    raw = find("cats", nowhere)
    assert raw.classes == ("lynx", "puma") and raw.train[0].shape == (2, 1, 4, 5) and raw.train[0].max() == 7


@needs("PIL", "pyarrow")
@pytest.mark.parametrize("arguments, words", [
    (dict(image="pixels"), "columns pixels, label; none is called image or img"),
    (dict(label="class"), "columns img, class; none is called label or fine_label"),
    (dict(pictures=[None, None]), "Row 0 of .*train.parquet has no image bytes"),
    (dict(labels=["cat", "dog"]), "labels of .*train.parquet are of type string"),
    (dict(labels=[0, None]), "labels of .*train.parquet"),
    (dict(labels=[0, -1]), "training labels are from -1 to 0"),
    (dict(pictures=[b"", b"x"]), "Image 0 of .* cannot be read"),
])
def test_parquet_that_is_not_the_hubs(nowhere, arguments, words):
    good = dict(pictures=[picture((1, 2, 3))] * 2, labels=[0, 1])
    write_parquet(nowhere / "cifar10", "test", **good)
    write_parquet(nowhere / "cifar10", "train", **{**good, **arguments})
    with pytest.raises(ValueError, match=words):
        find("cifar10", nowhere)


@needs("PIL", "pyarrow")
def test_parquet_cut_short_or_without_a_test_split(nowhere):
    write_parquet(nowhere / "cifar10", "train", [picture((1, 2, 3))], [0])
    with pytest.raises(ValueError, match=r"no test.parquet beside them"):
        read_parquet_folder(nowhere / "cifar10", "cifar10")
    content = (nowhere / "cifar10" / "train.parquet").read_bytes()
    (nowhere / "cifar10" / "test.parquet").write_bytes(content[:-20])
    with pytest.raises(ValueError, match="test.parquet is not a readable parquet file"):
        read_parquet_folder(nowhere / "cifar10", "cifar10")


def write_pictures(folder, names, splits=("train", "test"), suffix="png", **options):
    for split, (k, name) in itertools.product(splits, enumerate(names)):
        (folder / split / name).mkdir(parents=True)
        (folder / split / name / f"0.{suffix}").write_bytes(picture(k + 1, mode="L", suffix=suffix, **options))


@needs("PIL")
def test_folders_of_pictures(nowhere):
    write_pictures(nowhere / "shapes", ["2", "10", "1"], ("train", "val"))
    (nowhere / "shapes" / "train" / "1" / ".DS_Store").write_bytes(b"not a picture")
    raw = find("shapes", nowhere)
    assert raw.classes == ("1", "2", "10") and raw.train[0][:, 0, 0, 0].tolist() == [3, 1, 2]
    assert raw.train[1].tolist() == raw.test[1].tolist() == [0, 1, 2]


@needs("PIL")
def test_folders_of_pictures_that_do_not_fit(nowhere):
    write_pictures(nowhere / "a", ["x", "y"], ("train",))
    with pytest.raises(ValueError, match="no test/ or val/ beside it"):
        read_picture_folder(nowhere / "a", "a")
    write_pictures(nowhere / "a", ["x", "z"], ("test",))
    with pytest.raises(ValueError, match="a folder 'z', but there is no class of that name in train/"):
        read_picture_folder(nowhere / "a", "a")
    (nowhere / "a" / "test" / "z").rename(nowhere / "a" / "test" / "y")
    (nowhere / "a" / "test" / "y" / "1.png").write_bytes(picture(5, (16, 32), "L"))
    with pytest.raises(ValueError, match=r"Image 2 of .* has size \(32, 16\), the ones before it have \(32, 32\)"):
        read_picture_folder(nowhere / "a", "a")


@needs("PIL")
def test_sixteen_bits_and_cut_pictures_are_refused():
    with pytest.raises(ValueError, match="Image 1 of here has more than 8 bits"):
        decode([picture(5, mode="L"), picture(5, mode="I;16")], 1, "here")
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    from PIL import Image
    for suffix in ("PNG", "JPEG"):
        file = io.BytesIO()
        Image.fromarray(noise).save(file, suffix)
        with pytest.raises(ValueError, match="Image 0 of here cannot be read"):
            decode([file.getvalue()[:-400]], 3, "here")


@needs("datasets", "PIL", "pyarrow")
def test_the_hub_reader_on_a_local_folder_in_its_format(nowhere):
    levels = [(10 * k, 0, 5) for k in range(4)]
    for split in ("train", "test"):
        write_parquet(nowhere / "repository", split, [picture(c, (6, 6)) for c in levels], [0, 1, 2, 0])
    raw = read_hub(str(nowhere / "repository"), "hub:repository", nowhere / "cache")
    local = find("repository", nowhere)
    assert np.array_equal(raw.train[0], local.train[0]) and np.array_equal(raw.test[1], local.test[1])
    assert raw.source.startswith("hub:") and (nowhere / "cache").is_dir()
    data = load(f"hub:{nowhere / 'repository'}")
    assert data.shape == (3, 6, 6) and data.classes == 3
    first = fingerprint(f"hub:{nowhere / 'repository'}")
    (nowhere / "repository").rename(nowhere / "moved")
    assert fingerprint(f"hub:{nowhere / 'moved'}") == first
    write_parquet(nowhere / "other", "train", [picture(c, (6, 6)) for c in levels], [0, 1, 2, 1])
    write_parquet(nowhere / "other", "test", [picture(c, (6, 6)) for c in levels], [0, 1, 2, 0])
    assert fingerprint(f"hub:{nowhere / 'other'}") != first


def test_a_set_is_read_once_as_long_as_its_files_are_the_same(nowhere, monkeypatch):
    read = []
    monkeypatch.setattr(find_module, "_last", {})
    check = find_module.check
    monkeypatch.setattr(find_module, "check", lambda raw, name: read.append(name) or check(raw, name))
    write_idx(nowhere / "data" / "scans")
    first = load("scans").test
    first.images.fill_(200)  # who owns the split may change it
    assert torch.equal(load("scans").test.images[:, 0, 0, 0], torch.arange(12)) and len(read) == 1
    write_idx(nowhere / "data" / "scans", value=7)
    assert load("scans").test.images.unique().tolist() == [7] and len(read) == 2 and len(find_module._last) == 1
    monkeypatch.setattr(find_module, "KEPT", 10)
    write_idx(nowhere / "data" / "scans", value=9)
    assert load("scans").test.images.unique().tolist() == [9] and not find_module._last


def test_a_fingerprint_is_of_what_is_read_and_of_nothing_else(nowhere):
    folder = nowhere / "shapes"
    for part in ("train/cat/0.png", "train/dog/0.png", "test/cat/0.png", "test/dog/0.jpg"):
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        (folder / part).write_bytes(part.encode())  # nothing is decoded
    first = fingerprint("shapes", nowhere)
    for beside in ("README", "train/notes.txt", "train/cat/.DS_Store", "extra/x.png"):
        (folder / beside).parent.mkdir(exist_ok=True)
        (folder / beside).touch()
        assert fingerprint("shapes", nowhere) == first
    changes = [lambda: (folder / "train/dog").rename(folder / "train/wolf"), lambda: (folder / "train/cat/1.png").touch(),
               lambda: (folder / "train/empty").mkdir(), lambda: (folder / "test/cat/0.png").write_bytes(b"other"),
               lambda: (folder / "test").rename(folder / "val")]
    seen = {first}
    for change in changes:
        change()
        seen.add(fingerprint("shapes", nowhere))
    assert len(seen) == 1 + len(changes)
    for split in ("train", "test"):
        (nowhere / "table").mkdir(exist_ok=True)
        (nowhere / "table" / f"{split}.parquet").write_bytes(split.encode())
    first = fingerprint("table", nowhere)
    (nowhere / "table" / "validation.parquet").touch()  # test is there, so this is not read
    assert fingerprint("table", nowhere) == first
    (nowhere / "table" / "test.parquet").write_bytes(b"Test")
    assert fingerprint("table", nowhere) != first


def test_a_row_is_all_that_a_new_set_needs(nowhere, monkeypatch):
    monkeypatch.setitem(DATASETS, "stars", DataSet("Stars", (1, 9, 9), ("near", "far"), augment=Augment(1), first_labels=(1, 1, 0)))
    write_idx(nowhere / "stars", labels=[1, 0], size=9)
    raw = find("stars", nowhere)
    assert (raw.name, raw.classes) == ("Stars", ("near", "far")) and augmentation(Config(dataset="stars")).crop == 1
    write_idx(nowhere / "stars", labels=[1, 0])
    with pytest.raises(ValueError, match=r"\(1, 28, 28\), not \(1, 9, 9\), so it is not stars"):
        find("stars", nowhere)
    with pytest.raises(FileNotFoundError, match="Stars was not found on this machine"):  # no repository on the hub
        find("stars", nowhere / "elsewhere")


def test_the_page_about_data_names_every_set():
    page = (Path(__file__).resolve().parents[1] / "data" / "README.md").read_text(encoding="utf-8")
    for name, row in DATASETS.items():
        line = next(line for line in page.splitlines() if line.startswith("|") and f"`{name}`" in line)
        assert "x".join(map(str, row.shape)) in line, name


# Tensors -------------------------------------------------------------------------------------------------------------

def test_the_test_split_does_not_depend_on_the_seed_and_validation_does():
    one, two = load("digits", seed=0), load("digits", seed=1)
    assert torch.equal(one.test.images, two.test.images) and not torch.equal(one.valid.images, two.valid.images)
    for data in (one, two):
        together = torch.cat([data.train.labels, data.valid.labels]).sort().values
        assert np.array_equal(together, np.sort(digits().train[1]))
        assert data.valid.labels.bincount().min() >= 13


def test_nothing_is_selected_on_validation_or_test_images(nowhere):
    folder = write_idx(nowhere / "kmnist", train=100, value=51)
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.full((12, 28, 28), 255))))
    data = load("kmnist", nowhere)
    assert data.mean == pytest.approx((0.2,)) and data.std == (1.0,)  # a constant set is not divided by zero
    write_idx(nowhere / "kmnist", train=100)  # image i is filled with i, so a split shows in the mean
    data = load("kmnist", nowhere, validation=0.3, seed=4)
    kept = data.train.images[:, 0, 0, 0].double()
    assert data.mean[0] == pytest.approx(kept.mean().item() / 255) and len(kept) == 70
    assert sorted(kept.tolist() + data.valid.images[:, 0, 0, 0].tolist()) == list(range(100))


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2, float("nan")])
def test_a_validation_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match="must be a fraction in"):
        load("digits", validation=fraction)


def test_without_validation_every_image_is_for_training():
    data = load("digits", validation=0)
    assert len(data.train) == 1438 and len(data.valid) == 0 and list(data.valid.batches(10)) == []


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 50), size=st.integers(1, 60), seed=st.integers(0, 9), epoch=st.integers(0, 9),
       drop=st.booleans())
def test_an_epoch_has_every_sample_once(n, size, seed, epoch, drop):
    split = Split(torch.arange(n, dtype=torch.uint8).reshape(n, 1, 1, 1), torch.arange(n))
    if drop and size > n:
        with pytest.raises(ValueError, match=f"batch_size={size} makes no batch of {n} images"):
            split.steps(size, drop_last=True)
        return
    batches = list(split.batches(size, seed, epoch, drop_last=drop))
    seen = torch.cat([y for _, y in batches]).tolist()
    assert len(batches) == split.steps(size, drop) and len(set(seen)) == len(seen) == (n // size * size if drop else n)
    assert all(len(y) == size for _, y in batches[:-1]) and (drop or len(batches[-1][1]) > 1 or 1 in (n, size))
    assert all(torch.equal(x.flatten() * 255, y.float()) for x, y in batches)  # images stay with their labels
    again = torch.cat([y for _, y in split.batches(size, seed, epoch, drop_last=drop)]).tolist()
    assert again == seen


def test_an_epoch_resumed_in_the_middle_is_the_same_epoch():
    split, augment = load("digits").train, Augment(crop=2)
    whole = list(split.batches(64, seed=3, epoch=5, augment=augment))
    rest = itertools.islice(split.batches(64, seed=3, epoch=5, augment=augment), 7, None)
    assert all(torch.equal(a, b) and torch.equal(y, z) for (a, y), (b, z) in zip(whole[7:], rest, strict=True))
    torch.manual_seed(99)  # the global generator plays no part
    assert torch.equal(next(split.batches(64, seed=3, epoch=5, augment=augment))[0], whole[0][0])


def test_order_and_augmentation_differ_between_epochs_and_seeds():
    split = load("digits").train
    orders = [torch.cat([y for _, y in split.batches(100, seed, epoch)]) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(orders, 2))
    straight = torch.cat([x for x, _ in split.batches(100, shuffle=False)])
    assert torch.equal(straight, to_float(split.images))


def test_floats_are_not_divided_twice():
    with pytest.raises(ValueError, match="uint8 images, not torch.float32"):
        to_float(torch.rand(3))


@settings(deadline=None, max_examples=40)
@given(crop=st.integers(0, 9), flip=st.booleans(), fill=st.sampled_from(["edge", "zero"]), height=st.integers(1, 6),
       width=st.integers(1, 6))
def test_every_augmented_image_is_a_shift_and_a_mirror(crop, flip, fill, height, width):
    image = torch.arange(1, height * width + 1, dtype=torch.uint8).reshape(1, 1, height, width)
    out = Augment(crop, flip, fill)(image.expand(16, 2, -1, -1), torch.Generator().manual_seed(height))
    assert out.shape == (16, 2, height, width) and out.dtype == torch.uint8 and torch.equal(out[:, 0], out[:, 1])
    mode = {"edge": "replicate", "zero": "constant"}[fill]
    padded = torch.nn.functional.pad(image.float(), [crop] * 4, mode).byte()[0, 0]
    allowed = set()
    for y, x in itertools.product(range(2 * crop + 1), repeat=2):
        cut = padded[y:y + height, x:x + width]
        allowed |= {tuple(cut.flatten().tolist())} | ({tuple(cut.flip(1).flatten().tolist())} if flip else set())
    assert {tuple(o.flatten().tolist()) for o in out[:, 0]} <= allowed


def test_half_of_the_images_are_mirrored_and_all_shifts_occur():
    image = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    image[..., 4, 4], image[..., 4, 5] = 1, 2
    out = Augment(crop=2, fill="zero")(image.expand(4000, -1, -1, -1), torch.Generator().manual_seed(0))
    ones, twos = (out == 1).flatten(1).byte().argmax(1), (out == 2).flatten(1).byte().argmax(1)
    assert 0.46 < (twos < ones).float().mean() < 0.54
    places = ones[twos > ones].bincount(minlength=81).reshape(9, 9)  # of the straight ones: every pair of shifts
    assert (places[2:7, 2:7] > 40).all() and places.sum() == places[2:7, 2:7].sum()


def test_the_usual_augmentations():
    assert augmentation(Config(dataset="cifar10")) == augmentation(Config(dataset="somewhere/CIFAR-10")) == Augment(4, True, "edge")
    assert not augmentation(Config(dataset="svhn")).flip
    for name in ("digits", "mnist", "hub:somebody/cats"):
        with pytest.raises(ValueError, match=f"no augmentation is usual for {name}: .* one of cifar10, cifar100, svhn, tiny_imagenet"):
            augmentation(Config(dataset=name))
    with pytest.raises(ValueError, match="no fill called 'edges'. Did you mean 'edge'"):
        Augment(fill="edges")
    with pytest.raises(ValueError, match="crop=-1"):
        Augment(crop=-1)


@pytest.mark.gpu
def test_a_gpu_gets_the_same_batches():
    here, there = load("digits"), load("digits", device="cuda")
    for (x, y), (u, v) in zip(here.train.batches(100, augment=Augment(2)), there.train.batches(100, augment=Augment(2)),
                              strict=True):
        assert u.is_cuda and torch.equal(x, u.cpu()) and torch.equal(y, v.cpu())


# The real files, where they are --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, train, pixel", [("mnist", 60000, 0.1307), ("fashion_mnist", 60000, 0.2860)])
def test_the_official_idx_sets(name, train, pixel):
    if locate(name) is None:
        pytest.skip(f"{DATASETS[name].title} is not on this machine; name its place with SPARSELAB_DATA")
    data = load(name, validation=0)
    assert (len(data.train), len(data.test), data.shape, data.classes) == (train, 10000, (1, 28, 28), 10)
    assert tuple(data.test.labels[:10].tolist()) == DATASETS[name].first_labels
    assert data.mean[0] == pytest.approx(pixel, abs=1e-4)


@needs("PIL", "pyarrow")
def test_cifar10_if_it_is_here():
    if locate("cifar10") is None:
        pytest.skip("CIFAR-10 is not on this machine; name its place with SPARSELAB_DATA")
    data = load("cifar10", validation=0)
    assert data.train.labels.bincount().tolist() == [5000] * 10 and data.test.labels.bincount().tolist() == [1000] * 10
    assert data.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=2e-3)
