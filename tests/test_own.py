"""Own data and own models: what they become, what their runs keep, and what is said of those that cannot be trained on."""
import contextlib
import functools
import io
import json
import pickle
import shutil
import sys
import threading
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.sparse import csr_matrix
from test_loops import library
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

import sparselab
from sparselab import sparsify
from sparselab.learn import Config, Learner, Run, factories, find, load, margins, objective, own_data, own_model, samples, train
from sparselab.learn.arrays import Unavailable
from sparselab.learn.learner import Callback
from sparselab.robust import Contradiction, input_box, verify
from sparselab.view import Explorer

ROOT = Path(__file__).resolve().parents[1]
PATHS = {source.split("\n")[0][2:]: source for cell in json.loads((ROOT / "nbs/own.ipynb").read_text())["cells"]
         if cell["cell_type"] == "code" and (source := "".join(cell["source"])).startswith("# ")}


def points(count: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A table of three columns in units of their own; the class is whether the first two are large together."""
    rng = np.random.default_rng(seed)
    x = rng.uniform([0, -5, 100], [10, 5, 200], (count, 3)).astype(np.float32)
    return x, (x[:, 0] + x[:, 1] > 5).astype(int)


def small(seed: int = 0, inputs: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 12), nn.ReLU(), nn.Linear(12, 2))


def quick(folder: Path, **changes: object) -> Config:
    return replace(Config(method="rigl", sparsity=0.5, objective="ibp", eps=0.02, epochs=2, batch_size=16, runs_dir=str(folder)), **changes)


def quiet(config: Config, callbacks: tuple = (), **given: object) -> Run:
    with contextlib.redirect_stdout(io.StringIO()):
        return train(config, callbacks, **given)


@pytest.mark.parametrize("name", ["pictures", "arrays", "loader", "table", "transformer"])
def test_a_newcomers_path_of_ten_lines_ends_in_a_run_that_the_explorer_opens(name, tmp_path):
    lines = [line for line in PATHS[name].splitlines()[1:] if line.strip()]
    assert len(lines) <= 10, "\n".join(lines)
    names = {"runs": str(tmp_path), "np": np, "torch": torch, "nn": nn, "Path": Path, "Image": Image}
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(PATHS[name].replace("epochs=5", "epochs=2").replace("epochs=3", "epochs=1"), names)
    run = Run(names["run"].path)
    assert run.finished and not run.damage and set(run.summary["accuracy"]) == {"clean", "pgd", "verified"}
    assert run.summary["nnz"] == round((1 - run.config.sparsity) * run.summary["total"])
    explorer = Explorer(run)
    assert len(explorer.children) > 1 and explorer.timeline.max > 0
    assert bool(run.summary.get("no_bounds")) == (name == "transformer")


def test_samples_are_the_same_from_every_source(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 1, 4, 4), np.uint8)
    y = np.arange(40) % 4
    dataset = TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    sources = [(x, y), (torch.from_numpy(x), y.tolist()), (x[:, 0], y), dataset, DataLoader(dataset, 7, shuffle=True)]
    paths = {own_data(source, folder=tmp_path) for source in sources}
    assert len(paths) == 1
    data = load(paths.pop(), validation=0)
    assert (len(data.train), len(data.test), data.classes, data.shape) == (32, 8, 4, (1, 4, 4))
    seen = np.concatenate([data.train.images.numpy(), data.test.images.numpy()]).reshape(40, -1)
    assert sorted(map(bytes, seen)) == sorted(map(bytes, x.reshape(40, -1))), "each picture once"
    halves = own_data((Subset(dataset, range(20)), Subset(dataset, range(20, 40))), folder=tmp_path)
    assert (load(halves, validation=0).train.images.numpy() == x[:20]).all()
    assert halves == own_data({"train": (x[:20], y[:20]), "test": (x[20:], y[20:])}, folder=tmp_path)
    texts = load(own_data((x, np.array(["b", "a", "d", "c"])[y]), folder=tmp_path))
    assert texts.class_names == ("a", "b", "c", "d")


def test_a_learner_takes_a_loader():
    x, y = points()
    loader, model = DataLoader(TensorDataset(torch.from_numpy(x) / 200 + 0.1, torch.from_numpy(y)), 10, shuffle=True), small()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    learner = Learner(model, loader, objective("natural", 0.0), optimizer, sparsify(model, optimizer, "set", 0.5, 5 * 3), epochs=5, batch_size=16)
    assert learner.total_steps == 15 and len(learner.data.test) == 12
    learner.fit()
    assert learner.sparsifier.steps == 15 and learner.row["nnz"] == round(0.5 * 60)


def test_a_set_of_datasets_is_read_from_memory_and_from_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    pictures = [Image.new("L", (4, 4), 100 * (i % 2) + i) for i in range(20)]
    whole = datasets.Dataset.from_dict({"image": pictures, "label": [i % 2 for i in range(20)]}, features)
    whole.save_to_disk(str(tmp_path / "whole"))
    datasets.DatasetDict(train=whole.select(range(10)), test=whole.select(range(10, 20))).save_to_disk(str(tmp_path / "split"))
    disk, memory = load(str(tmp_path / "whole"), validation=0), load(own_data(whole, folder=tmp_path), validation=0)
    assert disk.class_names == memory.class_names == ("dark", "light") and torch.equal(disk.test.images, memory.test.images)
    assert len(disk.test) == 4 and disk.test.images[:, 0, 0, 0].tolist() == [100 * y + i for i, y in zip(
        (disk.test.images[:, 0, 0, 0] % 100).tolist(), disk.test.labels.tolist(), strict=True)]
    split = load(str(tmp_path / "split"), validation=0)
    assert split.train.images[:, 0, 0, 0].tolist() == [100 * (i % 2) + i for i in range(10)]
    assert quick(tmp_path, dataset=str(tmp_path / "whole")).fingerprint != quick(tmp_path, dataset=str(tmp_path / "split")).fingerprint


def test_radii_of_their_own_are_those_of_the_bounds_and_of_the_attack(tmp_path):
    x, y = points()
    radius = np.float32([1, 0, 30])
    data = load(own_data((x, y), low=[0, -5, 100], high=[10, 5, 200], radius=radius, folder=tmp_path))
    scale = data.test.radius(1.0)
    assert torch.allclose(scale, torch.tensor([0.1, 0.0, 0.3])) and torch.allclose(data.test.radius(0.5), scale / 2)
    u, labels = data.test.images, data.test.labels
    lower, upper = input_box(u, scale)
    assert torch.equal(lower[:, 1], u[:, 1]) and torch.equal(upper[:, 1], u[:, 1]) and float((upper - u).max()) <= 0.3 + 1e-6
    linear = nn.Linear(3, 2)
    w = linear.weight[labels] - linear.weight[1 - labels]  # the margin of a linear network over a box, in closed form
    least = (w * torch.where(w > 0, lower, upper)).sum(1) + linear.bias[labels] - linear.bias[1 - labels]
    found = verify(linear, u, labels, scale)
    assert torch.equal(found.verified, least > 1e-6)
    moved = sparselab.robust.pgd(linear, u, labels, scale)
    assert torch.equal(moved[:, 1], u[:, 1]) and bool(((moved >= lower - 1e-6) & (moved <= upper + 1e-6)).all())
    with torch.no_grad():
        worst = (linear(moved).gather(1, labels[:, None]) - linear(moved).gather(1, 1 - labels[:, None]))[:, 0]
    assert torch.allclose(worst, least, atol=1e-5), "on a linear network the attack finds the worst corner"


def test_a_run_proves_in_the_units_of_its_table(tmp_path):
    x, y = points()
    path = own_data((x, y), radius=[0.5, 0.5, 0], folder=tmp_path)
    run = quiet(quick(tmp_path, dataset=path, eps=1.0, epochs=3), model=small())
    inner, data = run.model().model, run.data()
    raw = data.low + data.test.images * (data.high - data.low)
    assert torch.allclose(run.model()(data.test.images), inner(raw), atol=1e-4), "the network is given the numbers in their own units"
    found = verify(run.model(), data.test.images, data.test.labels, data.test.radius(1.0))
    assert float(found.verified.double().mean()) == pytest.approx(run.summary["accuracy"]["verified"])
    with pytest.raises(ValueError, match="^imp attacks or bounds all numbers of an input by one eps"):
        quiet(quick(tmp_path, dataset=path, method="imp"), model=small())


def test_a_run_is_never_that_of_other_data_or_of_another_network(tmp_path):
    x, y = points()
    first = quiet(quick(tmp_path), data=(x, y), model=small())
    changed = x.copy()
    changed[3, 0] += 0.5
    others = [quiet(quick(tmp_path), data=(changed, y), model=small()), quiet(quick(tmp_path), data=(x, y), model=small(1)),
              quiet(quick(tmp_path), data=(x, 1 - y), model=small())]
    assert len({run.name for run in (first, *others)}) == 4
    written = (first.path / "metrics.jsonl").stat().st_mtime_ns
    again = quiet(quick(tmp_path), data=(torch.from_numpy(x), y.tolist()), model=small())
    assert again.path == first.path and (again.path / "metrics.jsonl").stat().st_mtime_ns == written, "returned, not trained again"
    with pytest.raises(ValueError, match="it is not the run of this configuration"):
        first.of(others[1].config)


def test_a_stopped_run_of_an_own_model_resumes_to_the_same_bits(tmp_path):
    class Stop(Callback):
        def after_epoch(self, learner):
            if learner.epoch == 1:
                raise KeyboardInterrupt

    whole = quiet(quick(tmp_path / "a", epochs=3), data=points(), model=small())
    with pytest.raises(KeyboardInterrupt):
        quiet(quick(tmp_path / "b", epochs=3), (Stop(),), data=points(), model=small())
    again = quiet(quick(tmp_path / "b", epochs=3), data=points(), model=small())
    assert again.path.name == whole.path.name and len(again.metrics) == 3
    assert all(torch.equal(value, again.weights[name]) for name, value in whole.weights.items())


class Harm:
    """What runs code where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_another_process_has_the_network_of_a_run_without_its_object(tmp_path, monkeypatch):
    run = quiet(quick(tmp_path), data=points(), model=small())
    x, y = run.data().test.images, run.data().test.labels
    logits = run.model()(x)
    monkeypatch.setattr(factories, "_GIVEN", {})  # as in a new process
    run = Run(run.path)
    assert torch.allclose(run.model()(x), logits, atol=1e-6)
    with zipfile.ZipFile(run.path / "model.pt2") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(run.path / "model.pt2", "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, pickle.dumps(Harm(tmp_path / "harm")) if "/sample_inputs/" in name else part)
    assert torch.allclose(Run(run.path).model()(x), logits, atol=1e-6) and not (tmp_path / "harm").exists(), "a pickle was loaded"
    moved = Run(shutil.copytree(tmp_path, tmp_path.with_name("moved")) / run.name)
    shutil.rmtree(Path(run.config.dataset))
    assert torch.equal(moved.data().test.images, x), "runs and their data are moved together"
    shutil.copytree(moved.path.parent / "data", tmp_path / "data", dirs_exist_ok=True)
    assert torch.equal(run.model(small())(x), logits), "an equal object holds the same weights"
    assert sparselab.certify(run, count=3, folder=tmp_path / "certificate").folder.is_dir()
    assert verify(run.model(), x, y, 0.01).verified.equal(verify(run.model(small()), x, y, 0.01).verified)
    with pytest.raises(ValueError, match="^The weights of .* are of other layers than those of this Linear"):
        run.model(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="^The model 'own:Sequential-.*' is an object that was given to train, in another process"):
        quiet(run.config, model=None) if (run.path / "summary.json").unlink() is None else None


NETS = '''
from torch import nn

class Tiny(nn.Sequential):
    def __init__(self, shape, classes, width=8):
        super().__init__(nn.Flatten(), nn.Linear(shape[0], width), nn.ReLU(), nn.Linear(width, classes))

def pair(shape, classes):
    class Pair(Tiny):
        def forward(self, x):
            z = super().forward(x)
            return z, z
    return Pair(shape, classes)
'''


def test_a_factory_is_a_parameter_and_its_file_is_part_of_the_run(tmp_path, monkeypatch):
    (tmp_path / "ownnets.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = own_data(points(), folder=tmp_path)
    config = quick(tmp_path, dataset=path, model="ownnets:Tiny", model_options={"width": 6})
    run = quiet(config)
    assert run.weights["model.1.weight"].shape == (6, 3) and Run(run.path).model()(run.data().test.images).shape == (12, 2)
    assert config.run_id == run.name and replace(config, model_options={}).run_id != run.name
    with pytest.raises(ValueError, match="^The model 'ownnets:pair' returns a tuple of 2 outputs; one tensor of logits is needed"):
        quiet(replace(config, model="ownnets:pair", model_options={}))
    by_file = replace(config, model=f"{tmp_path / 'ownnets.py'}:Tiny")
    before = by_file.run_id
    (tmp_path / "ownnets.py").write_text(NETS.replace("nn.ReLU()", "nn.Tanh()"))
    assert by_file.run_id != before
    with pytest.raises(ValueError, match=r"was begun with another model \(fingerprint"):
        run.of(config)


@pytest.mark.parametrize("model, sentence", [
    ("ownnet:Tiny", "there is no module 'ownnet' here"), ("ownnets:Tinny", "^There is no factory in ownnets called 'Tinny'. Did you mean 'Tiny'?"),
    ("ownnets:nn", "^There is no factory in ownnets called 'nn'"), ("ownnets:", "is no name: package.module:factory has a module before the colon"),
    ("own:Net-12345678", "is an object that was given to train, in another process"), ("nowhere/nets.py:Tiny", "and there is no such file"),
    ("tiny", "^There is no model called 'tiny'"), ("hub:/no/such/folder", "is no (model|image classifier) that the Hugging Face hub gave")])
def test_a_model_that_does_not_exist_is_a_sentence(model, sentence, tmp_path, monkeypatch):
    if model.startswith("hub:"):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        library("transformers", "AutoModelForImageClassification")
    (tmp_path / "ownnets.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "ownnets", raising=False)
    with pytest.raises(ValueError, match=sentence):
        quiet(quick(tmp_path, dataset=own_data(points(), folder=tmp_path), model=model))


def test_names_of_timm_and_of_the_hub_are_built_for_the_data(tmp_path, monkeypatch):
    timm = types.SimpleNamespace(__version__="1", is_model=lambda name: name == "flat", list_models=lambda pattern: ["flat"],
                                 create_model=lambda name, num_classes, in_chans: nn.Sequential(nn.Flatten(), nn.Linear(16 * in_chans, num_classes)))
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert factories.build_own("timm:flat", (3, 4, 4), 5, {})(torch.rand(2, 3, 4, 4)).shape == (2, 5)
    with pytest.raises(ValueError, match="^There is no model of timm called 'flot'. Did you mean 'flat'?"):
        factories.build_own("timm:flot", (3, 4, 4), 5, {})
    assert factories.model_fingerprint("timm:flat") == "timm 1"
    library("transformers", "ViTForImageClassification")
    from transformers import ViTConfig, ViTForImageClassification
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=4, patch_size=2, num_channels=1)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4), np.uint8)
    dataset = own_data((images, np.arange(40) % 3), folder=tmp_path)
    run = quiet(quick(tmp_path, model=f"hub:{tmp_path / 'vit'}", objective="natural", epochs=1, dataset=dataset))
    assert "has no bound rule" in run.summary["no_bounds"] and run.model()(torch.rand(2, 1, 4, 4)).shape == (2, 3) and not run.damage


class Cancels(nn.Module):
    """2^22 is added to the logits and taken off again, which rounds them to multiples of a half."""

    def __init__(self, size: int, classes: int):
        super().__init__()
        self.linear = nn.Linear(size, classes)

    def forward(self, x):
        return self.linear(x.flatten(1)) + 2.0**22 - 2.0**22


def test_a_network_that_contradicts_its_bounds_is_trained_and_nothing_is_proved_of_it(tmp_path):
    x = np.random.default_rng(0).random((60, 1, 4, 4), np.float32)
    y = (x.reshape(60, 16).mean(1) > 0.5).astype(np.int64)
    run = quiet(quick(tmp_path, objective="natural", epochs=2, eps=0.02), data=(x, y), model=Cancels(16, 2))
    assert run.summary["no_bounds"].startswith("A bound is wrong") and run.summary["accuracy"]["verified"] == 0
    assert run.summary["accuracy"]["clean"] >= run.summary["accuracy"]["pgd"] > 0 and not run.damage
    with pytest.raises(Unavailable, match="Nothing is proved of this network. A bound is wrong"):
        _ = run.margins


@pytest.mark.parametrize("sound", [["ibp"], []])
def test_margins_that_a_wider_box_contradicts_are_left_out_and_the_run_is_finished(tmp_path, monkeypatch, sound):
    x = np.random.default_rng(0).random((60, 1, 4, 4), np.float32)
    y = (x.reshape(60, 16).mean(1) > 0.5).astype(np.int64)
    here = margins.bounds

    def contradicted(model, lower, upper, method, *rest):
        if method not in sound and float((upper - lower).max()) > 0.06:  # the box of the evaluation is 0.04 wide
            raise Contradiction("A bound is wrong.")
        return here(model, lower, upper, method, *rest)

    monkeypatch.setattr(margins, "bounds", contradicted)
    run = quiet(quick(tmp_path, objective="natural", epochs=1, eps=0.02), data=(x, y))
    assert "no_bounds" not in run.summary and not run.damage
    with pytest.raises(Unavailable, match="Margins by crown were not recorded. A bound is wrong."):
        run.margins.method("crown")
    if sound:
        assert list(run.margins.lb) == sound


LAYERS = {
    "conv1d": ((2, 12), lambda: [nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(40, 2)]),
    "conv3d": ((1, 4, 4, 4), lambda: [nn.Conv3d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(108, 2)]),
    "transposed": ((2, 6), lambda: [nn.ConvTranspose1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)]),
    "linear on tokens": ((5, 4), lambda: [nn.Linear(4, 8), nn.ReLU(), nn.Flatten(), nn.Linear(40, 2)]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_inputs_of_any_shape_train_under_bounds(name, tmp_path):
    shape, layers = LAYERS[name]
    x = np.random.default_rng(0).random((40, *shape), np.float32)
    torch.manual_seed(0)
    run = quiet(quick(tmp_path, epochs=1), data=(x, (x.reshape(40, -1).mean(1) > 0.5).astype(int)), model=nn.Sequential(*layers()))
    assert run.summary["nnz"] == round(0.5 * run.summary["total"]) and run.margins.images.ndim == 4 and not run.damage
    accuracy = run.summary["accuracy"]
    assert accuracy["verified"] <= accuracy["pgd"] <= accuracy["clean"]


def test_a_transformer_under_an_objective_of_bounds_is_a_sentence(tmp_path):
    x = np.random.default_rng(0).random((40, 5, 8), np.float32)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(40, 2))
    with pytest.raises(ValueError, match="^objective 'ibp' needs bounds of the whole network. Layer .*softmax.* Choose objective 'natural' or 'pgd'"):
        quiet(quick(tmp_path), data=(x, np.arange(40) % 2), model=model)


def test_dropout_under_an_objective_of_bounds_is_a_sentence_before_anything_is_written(tmp_path):
    x = np.random.default_rng(0).random((40, 5), np.float32)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"^objective 'ibp' needs bounds .*Dropout\(p=0.2.* train without it\. Choose objective 'natural' or 'pgd'"):
        quiet(quick(tmp_path), data=(x, np.arange(40) % 2), model=model)
    assert not list(tmp_path.glob("**/config.json"))


@pytest.mark.parametrize("model", [
    lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)), lambda: None])
def test_exports_give_the_logits_of_the_run(model, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8)
    run = quiet(quick(tmp_path, model="mlp"), data=(images, np.arange(60) % 3), model=model())
    x = torch.rand(5, 1, 8, 8)
    logits = run.model()(x).detach()
    onnx = runtime.InferenceSession(str(run.export("net.onnx"))).run(None, {"x": x.numpy()})[0]
    assert np.abs(onnx - logits.numpy()).max() <= 1e-5
    assert (torch.export.load(run.export(tmp_path / "net.pt2")).module()(x) - logits).abs().max() <= 1e-5
    from safetensors.torch import load_file
    weights = load_file(run.export("plain.safetensors"))
    assert all(torch.equal(value, weights[name]) for name, value in run.model().state_dict().items()) and not Run(run.path).damage
    with pytest.raises(ValueError, match="^There is no form of a network .* called '.pth'"):
        run.export("net.pth")


class Broken(Dataset):
    """A dataset as torchvision's folders are, of which one picture cannot be read, or is of another size."""
    samples = [("cat/0.png", 0), ("cat/1.png", 0), ("dog/2.png", 1)]

    def __init__(self, size: int = 0):
        self.size = size

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int):
        if i == 1 and not self.size:
            raise OSError("truncated")
        return torch.zeros(1, 4, self.size if i == 1 else 4), self.samples[i][1]


def unlabelled(folder: Path) -> DataLoader:
    return DataLoader(TensorDataset(torch.rand(8, 3)), 4)


@pytest.mark.parametrize("data, sentence", [
    (unlabelled, "^Sample 0 of the data set gives a tuple of 1; .input, label. is needed, and without a label"),
    (lambda folder: np.zeros((4, 3)), "^The data set is an array without labels"),
    (lambda folder: 7, "^The data set is of type int; samples are a pair"),
    (lambda folder: Broken(), r"^Sample 1 of the data set \(cat/1.png\) cannot be read \(OSError: truncated\)"),
    (lambda folder: Broken(5), r"^Sample 1 of the data set \(cat/1.png\) has shape \(1, 4, 5\), the ones before it have \(1, 4, 4\)"),
    (lambda folder: (np.zeros((4, 3)), [0, 1, 2]), "^There are 4 inputs and 3 labels in the data set"),
    (lambda folder: (np.full((40, 3), np.inf), [0, 1] * 20), r"^Sample 0 of the data set holds inf at \(0,\)"),
    (lambda folder: (np.zeros((40, 3)), [0, -1] * 20), "has the label -1; 1 classes are numbered 0 to 0"),
    (lambda folder: (np.zeros((40, 3)), [0] * 40), "^All labels are of the class '0'"),
    (lambda folder: (np.zeros((40, 3)), [1] * 40), "^All labels are of the class '1'"),
    (lambda folder: (np.zeros((40, 3)), ["a", "b", None, "b"] * 10), "^Sample 2 of the data set has the label None, which is none"),
    (lambda folder: (np.zeros((40, 3)), np.array(["a", "b", float("nan"), "b"] * 10, object)), "^Sample 2 of the data set has the label nan"),
    (lambda folder: (np.zeros((40, 3)), [0, 40_000] * 20), "^The labels go up to 40000 for 40 samples"),
    (lambda folder: (np.zeros((40, 3)), [0.0, np.inf] * 20), "^The labels of the data set are of type float64"),
    (lambda folder: (np.ma.masked_less(np.arange(120.0).reshape(40, 3), 6), [0, 1] * 20), "^6 numbers of the inputs of the data set are masked"),
    (lambda folder: (np.full((40, 3), 1e300), [0, 1] * 20), r"^Sample 0 of the data set holds 1e.300 at .0,.: is beyond float32"),
    (lambda folder: ([[1.0, 2.0], [3.0]] * 20, [0, 1] * 20), "^What is given for the inputs of the data set is of no shape"),
    (lambda folder: {"training": (1, 2)}, "^The data have the parts training; 'train' is needed"),
    (lambda folder: (np.zeros((2, 3)), [0, 1]), "^There are 2 samples of 2 classes, too few to set a fifth of each apart"),
])
def test_data_that_cannot_be_trained_on_are_a_sentence(data, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        quiet(quick(tmp_path), data=data(tmp_path), model=small())
    assert not list(tmp_path.rglob("config.json"))


def test_labels_and_models_that_do_not_fit_are_a_sentence(tmp_path):
    x, y = points()
    with pytest.raises(ValueError, match="^Sample .* of the training set has the label [34]; 3 classes are numbered 0 to 2"):
        own_data((x, y + 3), classes=3, folder=tmp_path)
    with pytest.raises(ValueError, match=r"makes an output of shape \(2, 2\) of 2 inputs, and the data have 3 classes"):
        quiet(quick(tmp_path), data=(x, np.arange(60) % 3), model=small())
    with pytest.raises(ValueError, match=r"^The model 'own:.*' does not take inputs of shape \(2, 3\): RuntimeError"):
        quiet(quick(tmp_path), data=(x, y), model=small(inputs=4))
    with pytest.raises(ValueError, match="^model is a function; an nn.Module is needed"):
        quiet(quick(tmp_path), data=(x, y), model=small)
    with pytest.raises(ValueError, match="lenet300 take inputs of any shape"):
        quiet(quick(tmp_path, model="cnn4"), data=(x, y))
    for given, sentence in (({"low": 0}, "outside its range"), ({"radius": -1}, "^radius holds -1; how far"),
                            ({"radius": [1, 2]}, "^radius is one number, or one")):
        with pytest.raises(ValueError, match=sentence):
            own_data((x, y), folder=tmp_path, **given)


def test_what_is_wrong_with_a_folder_of_pictures_names_the_file(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="^No data set is read from this: .*empty holds nothing"):
        quiet(quick(tmp_path, dataset=str(empty)))
    for k, kind in enumerate(("cat", "dog")):
        (tmp_path / "pets" / kind).mkdir(parents=True)
        for i in range(10):
            Image.new("L", (8, 8), 100 * k + i).save(tmp_path / "pets" / kind / f"{i}.png")
    assert (len(load(str(tmp_path / "pets")).test), load(str(tmp_path / "pets")).class_names) == (4, ("cat", "dog"))
    Image.new("L", (8, 9)).save(tmp_path / "pets" / "dog" / "7.png")
    with pytest.raises(ValueError, match=r"pets/dog/7.png\) has size \(9, 8\), the ones before it have \(8, 8\)"):
        load(str(tmp_path / "pets"))
    (tmp_path / "pets" / "cat" / "3.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"pets/cat/3.png\) cannot be read"):
        load(str(tmp_path / "pets"))


def test_an_object_is_named_by_everything_that_it_computes_with():
    others = nn.Sequential(*small(), nn.Identity()), nn.Sequential(small()[0], nn.Tanh(), small()[2])
    names = {own_model(model) for model in (small(), small(1), *others)}
    assert len(names) == 4 and own_model(small()) in names
    slow, fast = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.1)), nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.2))
    fast.load_state_dict(slow.state_dict())
    assert own_model(slow) != own_model(fast)
    assert samples.is_array([1]) and not samples.is_array((1,))


class Net(nn.Module):
    def __init__(self, act=torch.relu, mean: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.act, self.mean = nn.Linear(3, 2), act, torch.tensor(mean)
        self.register_buffer("scale", torch.tensor(1.0 + mean), persistent=False)

    def forward(self, x):
        return self.act(self.layer((x - self.mean) / self.scale))


def hooked() -> nn.Module:
    net = Net()
    net.layer.register_forward_hook(lambda module, args, output: 2 * output)
    return net


def patched() -> nn.Module:
    net = Net()
    net.forward = lambda x: net.layer(x) ** 3
    return net


def typed(source: str) -> nn.Module:
    """The network `Typed` of a module with this source, as from a cell of a notebook."""
    module = types.ModuleType("typed")
    exec(f"from torch import nn\n{source}\nclass Typed(nn.Linear):\n    def forward(self, x):\n        return act(super().forward(x))", vars(module))
    torch.manual_seed(0)
    return module.Typed(3, 2)


@pytest.mark.parametrize("one, other", [
    (Net, lambda: Net(torch.tanh)), (Net, lambda: Net(mean=1.0)), (Net, hooked), (Net, patched), (Net, lambda: Net().requires_grad_(False)),
    (lambda: Net(lambda x: x + 1), lambda: Net(lambda x: x + 2)),
    (lambda: Net(functools.partial(torch.clamp, min=0)), lambda: Net(functools.partial(torch.clamp, min=-1))),
    (lambda: typed("act = lambda x: 2 * x"), lambda: typed("act = lambda x: 3 * x")),
    (lambda: typed("K = 2\ndef inner(x):\n    return K * x\ndef act(x):\n    return inner(x)"),
     lambda: typed("K = 3\ndef inner(x):\n    return K * x\ndef act(x):\n    return inner(x)"))],
    ids=["activation", "tensors beside the state", "hook", "forward of the object", "frozen", "lambda", "partial", "function called",
         "constant of one"])
def test_networks_of_equal_weights_that_compute_other_things_have_other_names(one, other):
    """They had one name, and the second training returned the run of the first."""
    assert own_model(one()) == own_model(one()) != own_model(other()) == own_model(other())


def test_tied_weights_are_not_equal_ones_and_a_run_of_them_ends(tmp_path, monkeypatch):
    tied, equal = (nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 2)) for _ in range(2))
    tied[2].weight = tied[0].weight
    equal.load_state_dict(tied.state_dict())
    assert own_model(tied) != own_model(equal)
    run = quiet(quick(tmp_path), data=points(), model=tied)
    net = run.model()[1]
    assert not run.damage and net[2].weight is net[0].weight and torch.equal(net[0].weight, run.weights["model.0.weight"])
    assert run.summary["total"] == 9 + 6 and torch.equal(run.weights["model.0.weight"], run.weights["model.2.weight"])
    for file in ("net.pt2", "net.safetensors"):
        assert run.export(file).is_file()
    x = run.data().test.images
    logits = run.model()(x)
    monkeypatch.setattr(factories, "_GIVEN", {})  # as in another process, which has the exported program alone
    assert torch.allclose(Run(run.path).model()(x), logits, atol=1e-5)
    with pytest.raises(ValueError, match="a Exported, cannot be written as .onnx .RuntimeError: .*choose another form"):
        Run(run.path).export("net.onnx")


def test_a_file_that_the_file_of_a_factory_imports_is_part_of_the_run(tmp_path, monkeypatch):
    (tmp_path / "ownwidths.py").write_text("WIDTH = 5\n")
    (tmp_path / "ownblocks.py").write_text("def width():\n    from ownwidths import WIDTH\n    return WIDTH\n")
    (tmp_path / "ownfactory.py").write_text("from torch import nn\nimport ownblocks\n\ndef make(shape, classes):\n    w = ownblocks.width()\n"
                                            "    return nn.Sequential(nn.Linear(3, w), nn.ReLU(), nn.Linear(w, classes))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = quick(tmp_path, dataset=own_data(points(), folder=tmp_path), model="ownfactory:make")
    by_file = replace(config, model=f"{tmp_path / 'ownfactory.py'}:make")
    before, by_file_before = config.run_id, by_file.run_id
    quiet(config)
    (tmp_path / "ownwidths.py").write_text("WIDTH = 6 + 1\n")
    assert config.run_id != before and by_file.run_id != by_file_before
    with pytest.raises(ValueError, match="ownwidths.py, or imports it, and that file has changed since this process imported it"):
        quiet(config)  # the width would be 5 under the name of 7


class Locked(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)
        self.lock = threading.Lock()


def test_a_network_that_cannot_be_copied_or_built_is_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="^Locked cannot be copied, and the run trains a copy of it .TypeError: cannot pickle"):
        quiet(quick(tmp_path), data=points(), model=Locked())
    (tmp_path / "ownbroken.py").write_text("def make():\n    raise RuntimeError('no memory')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="^model 'ownbroken:make' cannot be built for inputs of shape .3,. and 2 classes: RuntimeError: no memory"):
        quiet(quick(tmp_path, model="ownbroken:make"), data=points())


def pets(folder: Path, **modes: str) -> Path:
    """Ten pictures in each of the folders named, of the mode given."""
    rng = np.random.default_rng(0)
    for k, (path, mode) in enumerate(modes.items()):
        (folder / path.replace("_", "/")).mkdir(parents=True)
        for i in range(10):
            noise = rng.integers(0, 100, (8, 8) if mode == "L" else (8, 8, 3), dtype=np.uint8) + 50 * k
            Image.fromarray(noise.astype(np.uint8)).save(folder / path.replace("_", "/") / f"{i}.png")
    return folder


def test_a_folder_that_is_hidden_or_empty_is_no_class(tmp_path):
    """They were classes, which moved the numbers of the others, under the same fingerprint."""
    folder = pets(tmp_path / "pets", cat="L", dog="L")
    before, fingerprint = load(str(folder)), find.fingerprint(str(folder))
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "a new class").mkdir()
    (folder / "cat" / "._0.png").write_bytes(b"of a Mac")
    after = load(str(folder))
    assert after.class_names == before.class_names == ("cat", "dog") and torch.equal(after.test.labels, before.test.labels)
    assert find.fingerprint(str(folder)) == fingerprint
    two = pets(tmp_path / "two", train_cat="L", train_dog="L", test_cat="L", test_dog="L")
    for split in ("train", "test"):
        (two / split / ".ipynb_checkpoints").mkdir()
    assert load(str(two)).class_names == ("cat", "dog")


def test_every_picture_that_is_read_is_in_the_fingerprint(tmp_path):
    folder = pets(tmp_path / "pets", cat="L", dog="L", fish_small="L")
    before, labels = find.fingerprint(str(folder)), load(str(folder)).test.labels
    assert load(str(folder)).class_names == ("cat", "dog", "fish") and 2 in labels
    Image.new("L", (8, 8), 255).save(folder / "fish" / "small" / "3.png")
    assert find.fingerprint(str(folder)) != before


@pytest.mark.parametrize("train, test", [("RGB", "L"), ("L", "RGB")])
def test_grey_pictures_beside_coloured_ones_have_three_equal_channels(train, test, tmp_path):
    data = load(str(pets(tmp_path / "pets", train_cat=train, train_dog=train, test_cat=test, test_dog=test)))
    grey = (data.train if train == "L" else data.test).images
    assert data.shape == (3, 8, 8) and data.test.images.shape[1:] == data.train.images.shape[1:] == (3, 8, 8)
    colour = (data.test if train == "L" else data.train).images
    assert torch.equal(grey[:, 0], grey[:, 2]) and not torch.equal(colour[:, 0], colour[:, 2])


def test_pictures_of_one_class_are_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="all training labels are of the class 'cat'; there is nothing to tell apart"):
        load(str(pets(tmp_path / "pets", train_cat="L", test_cat="L")))


def test_numbers_of_any_kind_are_read(tmp_path):
    x, y = points()
    plain = samples.as_raw((x, y))
    for kind in (csr_matrix(x), torch.from_numpy(x).to(torch.float64)):
        assert np.array_equal(samples.as_raw((kind, y)).train[0], plain.train[0])
    assert samples.as_raw((torch.from_numpy(x).bfloat16(), y)).train[0].dtype == np.float32
    with pytest.raises(ValueError, match="^classes has the name 'a' twice"):
        own_data((x, y), classes=["a", "a"], folder=tmp_path)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(*(torch.from_numpy(part) for part in points()), strict=True))


class Halves:
    """A batch sampler of one's own: the first half of the samples, or the second."""

    def __init__(self, first: int):
        self.first = first

    def __iter__(self):
        return iter([list(range(self.first, self.first + 20)), list(range(self.first + 20, self.first + 30))])


@pytest.mark.parametrize("halves", [
    lambda data: [DataLoader(data, batch_sampler=Halves(first)) for first in (0, 30)],
    lambda data: [DataLoader(data, batch_sampler=BatchSampler(SubsetRandomSampler(range(first, first + 30)), 7, False)) for first in (0, 30)]])
def test_a_batch_sampler_chooses_the_samples(halves):
    """The whole dataset was read of both, and every test sample was trained on."""
    x, y = points()
    raw = samples.as_raw(tuple(halves(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)))))
    plain = samples.as_raw(((x[:30], y[:30]), (x[30:], y[30:])))
    assert all(np.array_equal(one, other) for one, other in zip((*raw.train, *raw.test), (*plain.train, *plain.test), strict=True))


def test_no_loader_gives_a_sample_twice():
    x, y = points()
    data = TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    with pytest.raises(ValueError, match="^The sampler of the data set, a WeightedRandomSampler, draws at random or gives a sample twice"):
        samples.as_raw(DataLoader(data, 7, sampler=WeightedRandomSampler([1.0] * 60, 60)))
    for loader in (DataLoader(Stream(), 7, num_workers=2), DataLoader(data, batch_size=None)):
        assert np.array_equal(samples.as_raw(loader).train[0], samples.as_raw((x, y)).train[0])


class Numbered(Dataset):
    """Forty samples with their numbers, of which the first cannot be read, in lists of three: (input, label, number)."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        if i == 0:
            raise OSError("a broken picture")
        return torch.full((2,), i / 40), i % 2, i


def test_a_loader_is_asked_for_the_samples_that_it_gives_as_it_gives_them():
    def pairs(batch):
        return torch.stack([x for x, _, _ in batch]), torch.tensor([y for _, y, _ in batch])
    loader = DataLoader(Numbered(), 7, sampler=SubsetRandomSampler(range(1, 40)), collate_fn=pairs)
    inputs, labels, _ = samples.read_part(loader, "the training set")
    assert inputs[:, 0].tolist() == pytest.approx([i / 40 for i in range(1, 40)]) and labels.tolist() == [i % 2 for i in range(1, 40)]


class Flipped(Dataset):
    """Two samples, each of them mirrored in half of its readings."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return torch.arange(3.0) * (-1) ** int(torch.randint(2, ())), i


@pytest.mark.parametrize("seed", range(10))
def test_a_random_flip_is_seen_in_two_samples_too(seed):
    torch.manual_seed(seed)
    with pytest.raises(ValueError, match="differs from one reading to the next"):
        samples.read_part(Flipped(), "the training set")
