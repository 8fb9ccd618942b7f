"""The fifteen common corruptions: what every one keeps, what grows, and values against other implementations."""
import sys

import matplotlib.colors
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import affine_transform, map_coordinates

from sparselab.learn import CORRUPTIONS, Config, Run, build, corrupt, corruption_accuracy, load, train
from sparselab.learn.corruptions import (
    SEVERITIES,
    between,
    boxes,
    corrupted,
    corruption_accuracies,
    disk,
    landscape,
    magnified,
    moved,
)
from sparselab.learn.data import Split

SIZES = {"28x28x1": (1, 28, 28), "32x32x3": (3, 32, 32), "8x8": (1, 8, 8)}
GROWING = {"gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "zoom_blur", "fog", "brightness", "contrast", "jpeg_compression"}


def pictures(shape, count=40):
    """Smooth random images with dark and light places, as uint8."""
    rng = np.random.default_rng(0)
    land = np.stack([landscape(count, *shape[1:], 2.0, rng) for _ in range(shape[0])], 1)
    return torch.from_numpy(np.rint(200 * land).astype(np.uint8))


def distance(one, other):
    return float((one.double() - other.double()).abs().mean())


def test_there_are_fifteen_in_four_groups():
    groups = [row.group for row in CORRUPTIONS.values()]
    assert {group: groups.count(group) for group in groups} == {"noise": 3, "blur": 4, "weather": 4, "digital": 4}
    assert all(len(row.constants) == 5 for row in CORRUPTIONS.values())


@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_shape_type_and_seed_are_kept(name, shape):
    images = pictures(shape)
    before = images.clone()
    assert torch.equal(corrupt(images, name, 0), images) and corrupt(images, name, 0) is not images
    found = [corrupt(images, name, severity) for severity in SEVERITIES]
    assert all(f.shape == images.shape and f.dtype == torch.uint8 for f in found)
    assert torch.equal(images, before), "the images themselves stay"
    assert torch.equal(found[2], corrupt(images, name, 3)), "the same seed, the same pictures"
    drawn = name not in {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    assert torch.equal(found[4], corrupt(images, name, 5, seed=1)) != drawn, "another seed, other pictures, where there is chance at all"
    assert all(distance(f, images) > 0 for f in found)


@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_distance_grows_with_severity(name, shape):
    images = pictures(shape)
    far = [distance(corrupt(images, name, severity), images) for severity in SEVERITIES]
    if name in GROWING:
        assert all(np.diff(far) > 0), far
    elif name == "elastic_transform":  # as published: the jitter falls while the field gets stronger and finer
        strength, sigma, jitter = (np.diff([row[i] for row in CORRUPTIONS[name].constants]) for i in range(3))
        assert all(strength >= 0) and all(sigma[1:] < 0) and all(jitter < 0)
    else:
        assert max(far) > far[0] and far[4] > far[0], far


@pytest.mark.parametrize("name", ["gaussian_noise", "glass_blur", "fog"])
def test_the_first_images_do_not_depend_on_how_many_come_after(name):
    images = pictures((1, 8, 8), 520)
    assert torch.equal(corrupt(images, name, 3)[:500], corrupt(images[:500], name, 3))


def test_values_by_hand():
    image = torch.tensor([[0, 100, 200], [50, 150, 250], [30, 60, 60]], dtype=torch.uint8).view(1, 1, 3, 3)
    assert corrupt(image, "brightness", 4).flatten().tolist() == [51, 151, 251, 101, 201, 255, 81, 111, 111]
    assert corrupt(image, "contrast", 2).flatten().tolist() == [50, 100, 150, 75, 125, 175, 65, 80, 80], "the mean is 100"
    kernel = disk(1, 1e-6)
    assert np.allclose(kernel[1:4, 1:4], [[0, 0.2, 0], [0.2, 0.2, 0.2], [0, 0.2, 0]]) and np.isclose(kernel.sum(), 1)
    tail = np.exp(-1 / (2 * 0.4**2))
    assert np.isclose(disk(0.3, 0.4)[2, 2], (1 / (1 + 2 * tail)) ** 2), "a disk of one pixel is the Gaussian alone"


@pytest.mark.parametrize("severity,scale", list(enumerate((0.04, 0.06, 0.08, 0.09, 0.10), 1)))
def test_noise_has_the_moments_it_says(severity, scale):
    grey = torch.full((200, 3, 16, 16), 128, dtype=torch.uint8)
    noise = (corrupt(grey, "gaussian_noise", severity).double() - 128) / 255
    assert abs(noise.mean()) < 4 * scale / noise.numel() ** 0.5 + 1e-4 and abs(noise.std() / scale - 1) < 0.01
    photons, half = CORRUPTIONS["shot_noise"].constants[severity - 1], np.full((200, 3, 16, 16), 0.5, np.float32)
    counts = CORRUPTIONS["shot_noise"].apply(half, photons, np.random.default_rng(0)).astype(float)  # before rounding to 255 levels
    assert abs(counts.mean() - 0.5) < 0.002 and abs(counts.var() * photons / 0.5 - 1) < 0.02
    share = CORRUPTIONS["impulse_noise"].constants[severity - 1]
    changed = corrupt(grey, "impulse_noise", severity)
    for value in (0, 255):
        assert abs((changed == value).double().mean() - share / 2) < 4 * (share / 2 / grey.numel()) ** 0.5


def test_the_noise_of_an_image_is_the_same_at_every_severity():
    grey = torch.full((2, 1, 8, 8), 128, dtype=torch.uint8)
    one, five = ((corrupt(grey, "gaussian_noise", s).double() - 128) / 255 / c for s, c in ((1, 0.04), (5, 0.10)))
    assert (one - five).abs().max() < 0.5 / 255 / 0.04 + 0.5 / 255 / 0.10 + 1e-9


def test_brightness_is_that_of_hsv():
    images = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    hsv = matplotlib.colors.rgb_to_hsv(images.permute(0, 2, 3, 1).double().numpy() / 255)
    hsv[..., 2] = np.clip(hsv[..., 2] + 0.15, 0, 1)
    expected = 255 * matplotlib.colors.hsv_to_rgb(hsv).transpose(0, 3, 1, 2)
    assert np.abs(corrupt(images, "brightness", 3).numpy() - expected).max() <= 0.501


@pytest.mark.parametrize("size", [8, 28, 32])
@pytest.mark.parametrize("share", CORRUPTIONS["pixelate"].constants)
def test_pixelation_is_pillow_s(size, share):
    image = pictures((1, size, size), 1)
    few = int(size * share)
    small = Image.fromarray(image[0, 0].numpy()).resize((few, few), Image.Resampling.BOX)
    assert np.abs(np.asarray(small) - boxes(size, few) @ image[0, 0].numpy() @ boxes(size, few).T).max() <= 1
    severity = 1 + CORRUPTIONS["pixelate"].constants.index(share)
    expected = np.asarray(small.resize((size, size), Image.Resampling.BOX)).astype(int)
    assert np.abs(expected - corrupt(image, "pixelate", severity)[0, 0].numpy()).max() <= 1


def test_zoom_and_resampling_are_scipy_s():
    x = pictures((1, 28, 28), 1).numpy().astype(np.float32)
    expected = affine_transform(x[0, 0], np.eye(2) / 1.3, 13.5 - 13.5 / 1.3, order=1)
    assert np.abs(magnified(x, 1.3)[0, 0] - expected).max() < 1e-3
    rng = np.random.default_rng(0)
    rows, columns = (np.indices((28, 28))[axis] + rng.uniform(-4, 4, (28, 28)) for axis in (0, 1))
    expected = map_coordinates(x[0, 0], [rows, columns], order=1, mode="mirror")
    assert np.abs(between(x, rows[None], columns[None])[0, 0] - expected).max() < 1e-3


def test_motion_is_one_sided_and_along_its_angle():
    point = np.zeros((2, 1, 15, 15), np.float32)
    point[:, :, 7, 7] = 1
    across, down = moved(point, 2, 1.0, np.array([0.0, 90.0]))[:, 0]
    taps = np.exp(-(np.arange(5) ** 2) / 2)
    assert np.allclose(across[7, 3:8], (taps / taps.sum())[::-1]) and np.isclose(across[7, 3:8].sum(), 1)
    assert np.allclose(down, across.T)


def test_glass_keeps_every_pixel_where_it_does_not_blur():
    images = pictures((3, 16, 16), 3).numpy().astype(np.float32)
    shuffled = CORRUPTIONS["glass_blur"].apply(images.copy(), (1e-6, 2), np.random.default_rng(0))
    assert not np.array_equal(shuffled, images)
    assert all(np.array_equal(np.sort(a.reshape(3, -1)), np.sort(b.reshape(3, -1))) for a, b in zip(images, shuffled, strict=True))


@pytest.mark.parametrize("images,name,severity,words", [
    (pictures((1, 8, 8)), "gausian_noise", 1, "gaussian_noise"),
    (pictures((1, 8, 8)), "fog", 6, "severity is a whole number"),
    (pictures((1, 8, 8)), ["fog"], 1, "Did you mean 'fog'"),
    (pictures((1, 8, 8)).float(), "fog", 1, "uint8"),
    (pictures((1, 8, 8)).expand(-1, 2, -1, -1), "fog", 1, "1 or 3"),
])
def test_what_cannot_be_is_refused(images, name, severity, words):
    with pytest.raises(ValueError, match=words):
        corrupt(images, name, severity)


def test_jpeg_without_pillow_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"needs Pillow: pip install 'sparselab\[hub\]'"):
        corrupt(pictures((1, 8, 8)), "jpeg_compression", 1)


def test_accuracy_of_a_model_of_a_function_and_of_a_run(tmp_path):
    config = Config(method="static", sparsity=0.8, model="mlp", objective="natural", eps=0.0, epochs=2, test_samples=60, runs_dir=str(tmp_path))
    run = train(config, [])
    test, names = load("digits").test.take(slice(60)), ("contrast", "gaussian_noise")
    found = corruption_accuracy(Run(run.path), names=names)
    model = build("mlp", (1, 8, 8), 10)
    model.load_state_dict(run.weights)
    assert found == corruption_accuracy(model, test, names)
    assert found == corruption_accuracies({"a": lambda x: model(x), "b": model}, test, names)["a"]
    assert found.clean == run.summary["accuracy"]["clean"] and list(found.by_corruption) == list(names)
    right = [float((model(part.images / 255).argmax(1) == part.labels).double().mean()) for _, _, part in corrupted(test, names)]
    assert right == [value for row in found.by_corruption.values() for value in row]
    assert abs(found.mean - sum(right) / 10) < 1e-12 and abs(found.by_group["digital"] - sum(right[:5]) / 5) < 1e-12
    with pytest.raises(ValueError, match="needs images"):
        corruption_accuracy(model)
    with pytest.raises(ValueError, match="contrast"):
        corruption_accuracies({"a": model}, test, ["contrasts"])


@pytest.mark.parametrize("severity", [1.0, True, "1", float("nan"), -1, 6])
def test_a_severity_that_there_is_not_is_refused(severity):
    with pytest.raises(ValueError, match=rf"severity is a whole number .* got {severity!r}"):
        corrupt(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "fog", severity)


@pytest.mark.parametrize(("split", "got"), [
    (load("digits").test.take(slice(0)), "got 0 images and 0 labels"), (load("digits").test.images[:3], "got Tensor"),
    (Split(load("digits").test.images[:3], load("digits").test.labels[:2]), "got 3 images and 2 labels")])
def test_what_is_no_split_is_refused(split, got):
    with pytest.raises(ValueError, match=f"counts over a Split, .*{got}"):
        corruption_accuracy(torch.nn.Flatten(), split, ["contrast"], [1])


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_float_images_are_refused(kind):
    split = load("digits").test.take(slice(3))
    with pytest.raises(ValueError, match=f"uint8 images, not {kind}"):
        corruption_accuracy(torch.nn.Flatten(), Split(split.images.to(kind), split.labels), ["contrast"], [1])


@pytest.mark.parametrize("options", [{"names": "fog"}, {"severities": ()}, {"names": None}, {"severities": 3}, {"severities": None}])
def test_names_that_are_no_list_and_severities_without_one_are_refused(options):
    split = load("digits").test.take(slice(2))
    with pytest.raises(ValueError, match="names is a list of corruptions"):
        corruption_accuracy(torch.nn.Flatten(), split, **options)
