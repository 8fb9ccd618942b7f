"""A certificate follows from its own files, on a machine with NumPy alone, and no change to them goes unseen."""
import csv
import json
import math
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch import nn

from sparselab.robust import bounds, certificates, certify, input_box, margin_matrix, verify, worst_margin
from sparselab.robust.certificates import exported, inner_box, refuted, sha256
from sparselab.robust.recheck import (
    FAULTS,
    SEARCHES,
    Affine,
    ReLU,
    Wrong,
    box_of,
    convolution,
    lower_end,
    lowest,
    margin,
    network,
    property_of,
    recheck,
)
from sparselab.robust.replay import Contradiction
from sparselab.robust.rounding import outer_box


class Normalised(nn.Module):
    def forward(self, x):
        return (x - 0.3) / 0.37


class Residual(nn.Module):
    """Normalisation, BatchNorm, groups, a sum of two branches, a leaky ReLU."""

    def __init__(self):
        super().__init__()
        self.normalised, self.first, self.norm = Normalised(), nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.second, self.last = nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.Linear(96, 10)

    def forward(self, x):
        x = self.norm(self.first(self.normalised(x))).relu()
        x = nn.functional.leaky_relu(x + self.second(x), 0.1)
        return self.last(x.flatten(1))


def mlp():
    return nn.Sequential(Normalised(), nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 10))


def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)


def trained(net, sparsity=0.0):
    torch.manual_seed(0)
    (x, y), optimizer = digits(), torch.optim.Adam(net.parameters(), 0.005)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[:1200]), y[:1200]).backward()
        optimizer.step()
    for layer in net.modules():
        if sparsity and isinstance(layer, nn.Linear):
            layer.weight.data *= layer.weight.abs() > layer.weight.abs().flatten().quantile(sparsity)
    return net.eval()


@pytest.fixture(scope="module", params=["mlp", "sparse", "residual"])
def made(request, tmp_path_factory):
    """(network, certificate) of 60 images."""
    torch.manual_seed(0)
    net = trained({"mlp": mlp, "sparse": mlp, "residual": Residual}[request.param](), 0.5 if request.param == "sparse" else 0.0)
    x, y = (part[1300:1360] for part in digits())
    folder = tmp_path_factory.mktemp(request.param) / "certificate"
    return net, certify(net, x, y, 0.03, folder, indices=range(1300, 1360), name=request.param, data="Digits of scikit-learn.")


def test_a_certificate_follows_from_its_files(made):
    _, certificate = made
    counts = recheck(certificate.folder)
    assert counts == certificate.summary and counts["verified"] > 30 and counts["falsified"] > 0
    assert counts["clean"] == sum(row["clean"] == "yes" for row in certificate.rows) == 60 - counts["falsified"] - counts["unknown"] + sum(
        row["verdict"] != "verified" and row["clean"] == "yes" for row in certificate.rows)
    assert counts["verified"] + counts["falsified"] + counts["unknown"] == counts["samples"] == 60


def test_verdicts_are_those_of_verify_on_the_exported_network(made):
    net, certificate = made
    x, y = (part[1300:1360] for part in digits())
    proved = verify(exported(net, x), x, y, 0.03, sound=True)
    for row, found, bound in zip(certificate.rows, proved.verified.tolist(), proved.margins.tolist(), strict=True):
        assert (row["verdict"] == "verified") == found
        if found:
            assert 0 < float(row["margin"]) == pytest.approx(bound, rel=1e-3, abs=1e-3)


def test_a_counterexample_breaks_the_model_itself(made):
    net, certificate = made
    data = load_file(certificate.folder / "samples.safetensors")
    points, labels = torch.tensor(data["counterexamples"]), torch.tensor(data["labels"])[data["falsified"]]
    assert len(points) and (net(points).argmax(1) != labels).all()
    images = torch.tensor(data["images"])[data["falsified"]]
    assert ((points - images).abs() <= 0.03 + 1e-7).all() and (points >= 0).all() and (points <= 1).all()


def test_recheck_runs_alone_with_numpy_and_nothing_of_this_package(made, tmp_path):
    """The copy in the folder, in a Python that finds neither torch nor sparselab."""
    _, certificate = made
    probe = f"""
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'sparselab', 'scipy', 'safetensors', 'pandas'):
            raise ImportError(name)
sys.meta_path.insert(0, Nothing())
sys.argv = ['recheck.py', {str(certificate.folder)!r}]
exec(compile(open({str(certificate.folder / "recheck.py")!r}).read(), 'recheck.py', 'exec'), {{'__name__': '__main__'}})
"""
    done = subprocess.run([sys.executable, "-I", "-c", probe], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("every verdict follows: 60 samples"), done.stderr
    lines = (certificate.folder / "recheck.py").read_text().splitlines()
    assert len(lines) < 300
    imports = {line.split()[1].split(".")[0] for line in lines if re.match(r"(import|from) ", line)}
    assert imports - set(sys.stdlib_module_names) == {"numpy"}


def test_an_onnx_runtime_gives_the_same_logits(made):
    """And instances.csv names files that are there. Skipped where the packages are not installed: `pip install onnx onnxruntime`."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    net, certificate = made
    onnx.checker.check_model(onnx.load(certificate.folder / "network.onnx"), full_check=True)
    session = runtime.InferenceSession(certificate.folder / "network.onnx", providers=["CPUExecutionProvider"])
    x = digits()[0][:200]
    with torch.no_grad():
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], net(x).numpy(), atol=1e-5, rtol=1e-5)
    for line in (certificate.folder / "instances.csv").read_text().splitlines():
        assert all((certificate.folder / name).is_file() for name in line.split(",")[:2])


# ---------------------------------------------------------------- tampering


def edit_tensor(name, key, change):
    def edit(folder):
        tensors = {k: t.copy() for k, t in load_file(folder / name).items()}
        tensors[key] = change(tensors[key])
        save_file(tensors, folder / name)

    return edit


def edit_rows(change):
    def edit(folder):
        with (folder / "results.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        rows = change(rows) or rows
        with (folder / "results.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    return edit


def edit_json(name, change):
    def edit(folder):
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return edit


def edit_text(name, old, new):
    def edit(folder):
        text = (folder / name).read_text()
        assert re.search(old, text)
        (folder / name).write_text(re.sub(old, new, text, count=1))

    return edit


def first(rows, verdict):
    return next(row for row in rows if row["verdict"] == verdict)


def put(array, place, value):
    array[place] = value
    return array


def flip(name, verdict):
    return edit_rows(lambda rows: first(rows, name).update(verdict=verdict))


def rewrite(folder, rows):
    """results.csv, and the report's table, by these rows."""
    edit_rows(lambda _: rows)(folder)
    text = (folder / "report.html").read_text()
    table = "".join(f'<tr class="sample">{"".join(f"<td>{cell}</td>" for cell in row.values())}</tr>' for row in rows)
    (folder / "report.html").write_text(re.sub(r'<tr class="sample">.*</tr>', lambda _: table, text, flags=re.S))


def read_rows(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def set_eps(folder, eps):
    """A box that is empty has every property: with the properties, rows and the report that go with it."""
    rows, data = [{**row, "eps": repr(eps)} for row in read_rows(folder)], load_file(folder / "samples.safetensors")
    edit_json("manifest.json", lambda m: m.update(eps=eps))(folder)
    for image, label, index in zip(data["images"], data["labels"], data["indices"], strict=True):
        (folder / f"vnnlib/{index:06}.vnnlib").write_text(property_of(box_of(image, eps), int(label), 10))
    edit_text("report.html", r"eps = [\d.]+", f"eps = {eps}")(folder)
    rewrite(folder, rows)


def brighten(folder):
    """One pixel of a verified image beyond 1 leaves an empty box too."""
    rows = read_rows(folder)
    k = next(k for k, row in enumerate(rows) if row["verdict"] == "verified")
    data = {name: t.copy() for name, t in load_file(folder / "samples.safetensors").items()}
    data["images"][k, 0, 4, 4] = 1.5
    save_file(data, folder / "samples.safetensors")
    rows[k]["hash"] = sha256(data["images"][k].tobytes())
    (folder / f"vnnlib/{int(rows[k]['index']):06}.vnnlib").write_text(property_of(box_of(data["images"][k], 0.08), int(data["labels"][k]), 10))
    rewrite(folder, rows)


def shift_labels(folder, by):
    """Label -1 is the last class to Python, but no class to anybody else."""
    data = {name: t.copy() for name, t in load_file(folder / "samples.safetensors").items()}
    data["labels"] += by
    save_file(data, folder / "samples.safetensors")
    for image, label, index in zip(data["images"], data["labels"], data["indices"], strict=True):
        (folder / f"vnnlib/{index:06}.vnnlib").write_text(property_of(box_of(image, 0.08), int(label), 10))
    rewrite(folder, [{**row, "label": str(int(row["label"]) + by)} for row in read_rows(folder)])


def repeat_sample(folder):
    """A verified sample in the place of an other, under the same index and with the same proof."""
    rows, data = read_rows(folder), {name: t.copy() for name, t in load_file(folder / "samples.safetensors").items()}
    proofs = {name: t.copy() for name, t in load_file(folder / "proofs.safetensors").items()}
    source, target = [k for k, row in enumerate(rows) if row["method"] == "crown_ibp"][:2]
    (folder / f"vnnlib/{data['indices'][target]:06}.vnnlib").unlink()
    for name in ("images", "labels", "indices"):
        data[name][target] = data[name][source]
    at = proofs["rows"].tolist()
    for name in {name for name in proofs if name[0].isdigit()}:
        proofs[name][at.index(target)] = proofs[name][at.index(source)]
    save_file(data, folder / "samples.safetensors"), save_file(proofs, folder / "proofs.safetensors")
    rows[target] = rows[source]
    rewrite(folder, rows)


def edit_leaves(change):
    """Of the sample with the most leaves: `change` takes (other, sign, alpha, beta) and gives them back."""
    def edit(folder):
        proofs, parts = {name: t.copy() for name, t in load_file(folder / "proofs.safetensors").items()}, ("other", "sign", "alpha", "beta")
        k = max((name.split(".")[1] for name in proofs if name.endswith(".sign")), key=lambda k: len(proofs[f"leaves.{k}.sign"]))
        assert np.count_nonzero(proofs[f"leaves.{k}.sign"]) and proofs[f"leaves.{k}.beta"].any()
        found = change(*(proofs[f"leaves.{k}.{part}"] for part in parts))
        proofs |= {f"leaves.{k}.{part}": np.ascontiguousarray(t) for part, t in zip(parts, found, strict=True)}
        save_file(proofs, folder / "proofs.safetensors")

    return edit


def every(chosen):
    return lambda *parts: tuple(part[chosen(len(part))] for part in parts)


def splits(sign):
    """Leaf and neuron of some split."""
    return tuple(np.argwhere(sign)[0])


def another_class(other):
    """All leaves about one class are said to be about another one, which has leaves too."""
    first, second = sorted(set(other.tolist()))[:2]
    return np.where(other == first, second, other)


def swap_leaves(folder):
    """The leaves of one sample as those of another."""
    proofs = {name: t.copy() for name, t in load_file(folder / "proofs.safetensors").items()}
    first, second = sorted({name.split(".")[1] for name in proofs if name.startswith("leaves.")}, key=int)[:2]
    for part in ("other", "sign", "alpha", "beta"):
        proofs[f"leaves.{first}.{part}"], proofs[f"leaves.{second}.{part}"] = proofs[f"leaves.{second}.{part}"], proofs[f"leaves.{first}.{part}"]
    save_file(proofs, folder / "proofs.safetensors")


def searched_as(method):
    return edit_rows(lambda rows: next(row for row in rows if row["method"] == "branch_and_bound").update(method=method))


def with_method(folder, method):
    """A searched sample with the method of a bound, everywhere."""
    rows = read_rows(folder)
    next(row for row in rows if row["method"] == "branch_and_bound").update(method=method)
    rewrite(folder, rows)


def sum_of_three(folder):
    """The first layer adds its input once more in two parts that cancel: exact numbers stay as they were, roundings are more."""
    layer = json.loads((folder / "network.json").read_text())["layers"][0]
    assert layer["op"] == "scale" and layer["inputs"] == [0]
    edit_json("network.json", lambda net: net["layers"][0].update(inputs=[0, 0, 0]))(folder)
    far = np.float32(2**-12)
    edit_tensor("network.safetensors", "0.weight", lambda w: np.concatenate([w, 0 * w + far, 0 * w - far]))(folder)


def overflowing(folder):
    """Two leaves for each class, with multipliers whose products overflow to inf - inf: NaN as a margin of 123."""
    proofs, rows = {name: t.copy() for name, t in load_file(folder / "proofs.safetensors").items()}, read_rows(folder)
    k = next(k for k, row in enumerate(rows) if row["method"] == "branch_and_bound")
    sign = np.zeros((18, proofs[f"leaves.{k}.sign"].shape[1]), np.int8)
    sign[::2, 0], sign[1::2, 0] = 1, -1
    other = np.repeat(np.delete(np.arange(10), int(rows[k]["label"])), 2)
    parts = {"other": other, "sign": sign, "alpha": np.zeros(sign.shape), "beta": 1.7e308 * abs(sign.astype(np.float64))}
    save_file(proofs | {f"leaves.{k}.{part}": t for part, t in parts.items()}, folder / "proofs.safetensors")
    rows[k]["margin"] = "123.0"
    rewrite(folder, rows)


def shrink_one(folder):
    """The upper bound of one unstable neuron, by a thousandth: of a stable one, for which IBP was enough, CROWN may prove that much."""
    proofs = {name: t.copy() for name, t in load_file(folder / "proofs.safetensors").items()}
    lb, ub = proofs["5.lb"], proofs["5.ub"]
    place = np.unravel_index(np.where(lb < 0, ub, 0).argmax(), ub.shape)
    assert lb[place] < 0 < ub[place]
    ub[place] -= np.float32(1e-3)
    save_file(proofs, folder / "proofs.safetensors")


TAMPERINGS = {
    "a leaf left out": edit_leaves(every(lambda n: np.arange(1, n))),
    "the last leaf left out": edit_leaves(every(lambda n: np.arange(n - 1))),
    "every leaf left out": edit_leaves(every(lambda n: np.arange(0))),
    "a leaf twice": edit_leaves(every(lambda n: np.r_[0, np.arange(n)])),
    "a leaf in the place of another": edit_leaves(every(lambda n: np.r_[1, 1, np.arange(2, n)])),
    "a split the other way": edit_leaves(lambda o, s, a, b: (o, put(s, splits(s), -s[splits(s)]), a, b)),
    "a split taken away": edit_leaves(lambda o, s, a, b: (o, put(s, splits(s), 0), a, b)),
    "all splits taken away": edit_leaves(lambda o, s, a, b: (o, s * 0, a, b)),
    "a split more": edit_leaves(lambda o, s, a, b: (o, put(s, tuple(np.argwhere(s == 0)[0]), 1), a, b)),
    "a split by two": edit_leaves(lambda o, s, a, b: (o, put(s, splits(s), 2 * s[splits(s)]), a, b)),
    "splits that are no whole numbers": edit_leaves(lambda o, s, a, b: (o, s.astype(np.float32), a, b)),
    "the splits of other neurons": edit_leaves(lambda o, s, a, b: (o, np.roll(s, 1, 1), a, b)),
    "the order of the splits": edit_leaves(lambda o, s, a, b: (o, s[::-1], a, b)),
    "negative multipliers": edit_leaves(lambda o, s, a, b: (o, s, a, -b)),
    "one negative multiplier": edit_leaves(lambda o, s, a, b: (o, s, a, put(b, np.unravel_index(b.argmax(), b.shape), -b.max()))),
    "multipliers a thousand times as large": edit_leaves(lambda o, s, a, b: (o, s, a, 1000 * b)),
    "multipliers that overflow": overflowing,
    "slopes of float64": edit_leaves(lambda o, s, a, b: (o, s, a.astype(np.float64), b)),
    "bounds of float64": edit_tensor("proofs.safetensors", "5.ub", lambda ub: ub.astype(np.float64)),
    "an infinite multiplier": edit_leaves(lambda o, s, a, b: (o, s, a, put(b, np.unravel_index(b.argmax(), b.shape), np.inf))),
    "slopes that are NaN": edit_leaves(lambda o, s, a, b: (o, s, a * np.nan, b)),
    "slopes of fewer neurons": edit_leaves(lambda o, s, a, b: (o, s, a[:, 1:], b)),
    "leaves about the label": edit_leaves(lambda o, s, a, b: (o * 0 + 3, s, a, b)),
    "leaves about another class": edit_leaves(lambda o, s, a, b: (another_class(o), s, a, b)),
    "leaves about no class": edit_leaves(lambda o, s, a, b: (o + 100, s, a, b)),
    "leaves about classes from the end": edit_leaves(lambda o, s, a, b: (o - 10, s, a, b)),
    "the leaves of another sample": swap_leaves,
    "a search called CROWN": lambda folder: with_method(folder, "crown"),
    "a search called alpha-CROWN": lambda folder: with_method(folder, "alpha_crown"),
    "a method that is none": lambda folder: with_method(folder, "magic"),
    "images called clean that are not": edit_rows(lambda rows: [{**row, "clean": "yes"} for row in rows]),
    "clean that is neither yes nor no": edit_rows(lambda rows: rows[0].update(clean="perhaps")),
    "a figure of a class in the report": edit_text("report.html", r'<data value="class.3.verified">\d+', '<data value="class.3.verified">99'),
    "a figure of a method in the report": edit_text("report.html", r'<data value="by.crown">\d+', '<data value="by.crown">99'),
    "an interval in the report": edit_text("report.html", r'<data value="between">[\d.]+%', '<data value="between">99.0%'),
    "a figure that the report shows twice": edit_text("report.html", r"</h1>", '</h1><data value="verified">30</data>'),
    "a figure with two spaces": edit_text("report.html", r"</h1>", '</h1><data  value="verified">30</data>'),
    "figures in a comment": edit_text("report.html", r"(?s)<p>(<data value=.verified.*?)<h2>1", r"<p>All samples are verified.</p><!--\1--><h2>1"),
    "figures that are hidden": edit_text("report.html", r'<p><data value="verified">', '<p>All are verified.</p><p hidden><data value="verified">'),
    "figures that a style hides": edit_text("report.html", r"</style>", "data{display:none}</style>"),
    "a style more": edit_text("report.html", r"</h1>", "</h1><style>data{display:none}</style>"),
    "a script": edit_text("report.html", r"</h1>", "</h1><script>document.body.hidden = 1</script>"),
    "a drawing with a script": edit_text("report.html", r"<svg ", '<svg onload="document.body.hidden = 1" '),
    "seconds with a mark": lambda folder: rewrite(folder, [{**row, "seconds": "1<b>30 verified</b>"} for row in read_rows(folder)]),
    "a figure under a new name": edit_text("report.html", r"</h1>", '</h1><data value="proved">30</data>'),
    "a figure of a class in the summary": edit_json("summary.json", lambda s: s.update({"class.3.verified": 99})),
    "the manifest left out": lambda folder: (folder / "manifest.json").unlink(),
    "a weight": edit_tensor("network.safetensors", "2.weight", lambda w: w * np.float32(1.01)),
    "one weight": edit_tensor("network.safetensors", "2.weight", lambda w: put(w, (0, 27), w[0, 27] + 1)),
    "a bias": edit_tensor("network.safetensors", "6.bias", lambda b: b + np.arange(10, dtype=np.float32)),
    "a ReLU of another kind": edit_json("network.json", lambda net: net["layers"][3].update(op="gelu")),
    "a ReLU of two inputs": edit_json("network.json", lambda net: net["layers"][3].update(inputs=[3, 2])),
    "a sum of three": lambda folder: sum_of_three(folder),
    "a linear layer of two inputs": edit_json("network.json", lambda net: net["layers"][-1].update(inputs=[3, 5])),
    "a ReLU left out": edit_json("network.json", lambda net: net["layers"][4].update(inputs=[3])),
    "an image": edit_tensor("samples.safetensors", "images", lambda x: put(x, (3, 0, 4, 4), 1 - x[3, 0, 4, 4])),
    "the images' order": edit_tensor("samples.safetensors", "images", lambda x: x[::-1].copy()),
    "a label in the data": edit_tensor("samples.safetensors", "labels", lambda y: put(y, 0, (y[0] + 1) % 10)),
    "an index": edit_tensor("samples.safetensors", "indices", lambda i: put(i, 0, 1)),
    "a counterexample": edit_tensor("samples.safetensors", "counterexamples", lambda x: x * 0 + 0.5),
    "a lower bound": edit_tensor("proofs.safetensors", "3.lb", lambda lb: lb + np.float32(0.01)),
    "an upper bound": edit_tensor("proofs.safetensors", "5.ub", lambda ub: ub - np.float32(0.01)),
    "one bound of one neuron": lambda folder: shrink_one(folder),
    "a box that is empty": edit_tensor("proofs.safetensors", "5.lb", lambda lb: -lb + 100),
    "slopes": edit_tensor("proofs.safetensors", "3.steep", lambda steep: 1 - steep),
    "a proof of another sample": edit_tensor("proofs.safetensors", "rows", lambda rows: rows[::-1].copy()),
    "a row left out": edit_rows(lambda rows: rows[1:]),
    "a row twice": edit_rows(lambda rows: [rows[0], *rows[:-1]]),
    "the rows' order": edit_rows(lambda rows: rows[::-1]),
    "a margin": edit_rows(lambda rows: first(rows, "verified").update(margin="99")),
    "a margin made smaller": edit_rows(lambda rows: first(rows, "verified").update(margin="1e-9")),
    "a hash": edit_rows(lambda rows: rows[0].update(hash="0" * 64)),
    "a label": edit_rows(lambda rows: rows[0].update(label=str((int(rows[0]["label"]) + 1) % 10))),
    "an eps": edit_rows(lambda rows: rows[0].update(eps="0.01")),
    "the eps of all": lambda folder: [edit_json("manifest.json", lambda m: m.update(eps=0.01))(folder),
                                      edit_rows(lambda rows: [{**row, "eps": "0.01"} for row in rows])(folder)],
    "a method": edit_rows(lambda rows: [{**row, "method": "ibp"} for row in rows]),
    "falsified made verified": flip("falsified", "verified"),
    "verified made unknown": flip("verified", "unknown"),
    "a verdict with a new name": flip("verified", "proved"),
    "a count": edit_json("summary.json", lambda s: s.update(verified=s["verified"] + 1)),
    "an interval": edit_json("summary.json", lambda s: s.update(between="50.0% to 60.0%")),
    "a share": edit_json("summary.json", lambda s: s.update(share="99.9%")),
    "a figure of the report": edit_text("report.html", r'<data value="verified">\d+', '<data value="verified">60'),
    "a row of the report": edit_text("report.html", "<td>verified</td>", "<td>falsified</td>"),
    "a bound of a property": edit_text("vnnlib/001303.vnnlib", r"\(<= X_9 [\d.]+\)", "(<= X_9 0.5)"),
    "the output of a property": edit_text("vnnlib/001303.vnnlib", r"Y_0 Y_", "Y_1 Y_"),
    "a property left out": lambda folder: (folder / "vnnlib/001303.vnnlib").unlink(),
    "a file more": lambda folder: (folder / "extra.txt").write_text("more"),
    "a certificate inside": lambda folder: shutil.copytree(folder / "vnnlib", folder / "other"),
    "a network that starts at its own end": edit_json("network.json", lambda net: net["layers"][0].update(inputs=[-1])),
    "a layer that reads what comes later": edit_json("network.json", lambda net: net["layers"][1].update(inputs=[5])),
    "a layer that reads nothing": edit_json("network.json", lambda net: net["layers"][1].update(inputs=[])),
    "a network of no layers": edit_json("network.json", lambda net: net["layers"].clear()),
    "a network that ends with a ReLU": edit_json("network.json", lambda net: net["layers"].append({"op": "relu", "slope": 0, "inputs": [7]})),
    "weights of float64": edit_tensor("network.safetensors", "2.weight", lambda w: w.astype(np.float64)),
    "a weight that is NaN": edit_tensor("network.safetensors", "2.weight", lambda w: put(w, (0, 0), np.nan)),
    "an infinite bias": edit_tensor("network.safetensors", "6.bias", lambda b: put(b, int(b.argmax()), np.inf)),
    "a bias of another shape": edit_tensor("network.safetensors", "6.bias", lambda b: b[:, None]),
    "images of float64": edit_tensor("samples.safetensors", "images", lambda x: x.astype(np.float64)),
    "a counterexample of float64": edit_tensor("samples.safetensors", "counterexamples", lambda x: x.astype(np.float64)),
    "a counterexample that is NaN": edit_tensor("samples.safetensors", "counterexamples", lambda x: x * np.nan),
    "labels of float32": edit_tensor("samples.safetensors", "labels", lambda y: y.astype(np.float32)),
    "labels from the end": lambda folder: shift_labels(folder, -10),
    "indices of float32": edit_tensor("samples.safetensors", "indices", lambda i: i.astype(np.float32)),
    "a sample twice": lambda folder: repeat_sample(folder),
    "an eps below zero": lambda folder: set_eps(folder, -0.01),
    "pixels beyond 1": lambda folder: brighten(folder),
    "bounds that are NaN": edit_tensor("proofs.safetensors", "5.ub", lambda ub: ub * np.nan),
    "infinite bounds": edit_tensor("proofs.safetensors", "5.ub", lambda ub: ub + np.inf),
    "bounds of one number": edit_tensor("proofs.safetensors", "5.lb", lambda lb: lb.min(1, keepdims=True)),
    "another norm": edit_json("manifest.json", lambda m: m.update(norm="l2")),
    "another domain": edit_json("manifest.json", lambda m: m.update(domain=[-1, 2])),
    "a count of images classified right": edit_json("summary.json", lambda s: s.update(clean=s["clean"] - 1)),
    "a figure more": edit_json("summary.json", lambda s: s.update(robust="100.0%")),
    "a figure left out of the report": edit_text("report.html", r'<data value="unknown">\d+</data>', "0"),
    "the eps of the report": edit_text("report.html", r"eps = [\d.]+", "eps = 0.5"),
    "a margin of an unknown": edit_rows(lambda rows: first(rows, "falsified").update(margin="0.5")),
    "a column more": edit_rows(lambda rows: [{**row, "robust": "yes"} for row in rows]),
    "no rows": lambda folder: (folder / "results.csv").write_text(""),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch.manual_seed(0)
    x, y = (part[1300:1330] for part in digits())
    folder = certify(trained(mlp()), x, y, 0.08, tmp_path_factory.mktemp("whole") / "certificate", indices=range(1300, 1330), budget=60).folder
    counts = recheck(folder)
    assert counts["verified"] > 5 and counts["falsified"] > 0 and counts["by.branch_and_bound"] > 0 and counts["by.crown_ibp"] > 1
    return folder


def tampered(whole, tmp_path, what, hashes):
    folder = tmp_path / "certificate"
    shutil.copytree(whole, folder)
    TAMPERINGS[what](folder)
    if hashes == "new" and (folder / "manifest.json").exists():
        names = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
        fitting = {path.relative_to(folder).as_posix(): sha256(path.read_bytes()) for path in names}
        edit_json("manifest.json", lambda manifest: manifest.update(sha256=fitting))(folder)
    return folder


@pytest.mark.parametrize("hashes", ["old", "new"])
@pytest.mark.parametrize("what", TAMPERINGS)
def test_tampering_is_found(whole, tmp_path, what, hashes):
    """With the hashes of the manifest as they were, and with hashes made to fit: then what the files say must contradict."""
    folder = tampered(whole, tmp_path, what, hashes)
    if hashes == "new":
        if what == "slopes":
            return  # other slopes may prove as much
    with pytest.raises(FAULTS):
        recheck(folder)


@pytest.mark.parametrize("what, sentence", [
    ("a network that starts at its own end", r"reads \[-1\]"), ("a layer that reads what comes later", r"reads \[5\]"),
    ("a layer that reads nothing", r"reads \[\]"), ("a network that ends with a ReLU", "no logits"), ("weights of float64", "not float32"),
    ("a weight that is NaN", "overflow"), ("an infinite bias", "overflow"), ("a bias of another shape", "no place"),
    ("images of float64", "not float32"), ("a counterexample of float64", "not float32"), ("labels of float32", "none of the classes"),
    ("labels from the end", "none of the classes"), ("indices of float32", "has no index"), ("a sample twice", "there twice"),
    ("an eps below zero", "no property"), ("pixels beyond 1", "outside of"), ("infinite bounds", "or none"), ("bounds that are NaN", "is empty"),
    ("bounds of one number", "is empty"), ("another norm", "no property"), ("another domain", "no property"),
    ("a count of images classified right", "other figures"), ("a figure more", "other figures"),
    ("a margin of an unknown", "a margin is claimed"), ("a column more", "other columns"), ("no rows", "no rows"), ("a file more", "extra.txt"),
    ("a certificate inside", "other/001300.vnnlib"), ("a figure left out of the report", "leaves figures out"),
    ("the eps of the report", "another property"), ("a leaf left out", "not all of the box"), ("a leaf twice", "not all of the box"),
    ("every leaf left out", "the leaves say otherwise|not all of the box"), ("a split the other way", "not all of the box"),
    ("multipliers that overflow", "another type"), ("slopes of float64", "another type"), ("bounds of float64", "another type"),
    ("negative multipliers", "multiplier is none"), ("slopes that are NaN", "multiplier is none"), ("a split by two", "is none"),
    ("leaves about another class", "not all of the box"), ("a search called alpha-CROWN", "say otherwise"), ("a method that is none", "is claimed"),
    ("a figure that the report shows twice", "has others"), ("a figure of a class in the report", "class.3.verified"),
    ("a figure of a class in the summary", "class.3.verified"), ("images called clean that are not", "called clean"),
    ("a figure with two spaces", "marks"), ("figures in a comment", "marks"), ("a script", "marks"), ("figures that a style hides", "marks"),
    ("seconds with a mark", "could not convert"), ("a sum of three", "scale of 3 inputs"), ("a linear layer of two inputs", "linear of 2 inputs"),
    ("the manifest left out", "not finished"), ("a ReLU of another kind", "does not know"),
])
def test_the_sentence_says_what_is_wrong(whole, tmp_path, what, sentence):
    with pytest.raises(Wrong, match=sentence):
        recheck(tampered(whole, tmp_path, what, "new"))


@pytest.mark.parametrize("eps", [0.0, 1e-12, 8 / 255, 0.08, 0.25, 0.4999, 1.0])
def test_counterexamples_are_sought_within_eps_in_exact_numbers(eps):
    x = torch.cat([torch.rand(200), torch.tensor([0.0, 0.5, 1.0, 1e-30])])
    ends = inner_box(x, eps)
    for pixel, lb, ub in zip(x.tolist(), *(end.tolist() for end in ends), strict=True):
        assert 0 <= lb <= pixel <= ub <= 1 and max(Fraction(pixel) - Fraction(lb), Fraction(ub) - Fraction(pixel)) <= Fraction(eps)
    for mine, theirs in zip(ends, input_box(x, eps), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-7, rtol=0)


def test_falsified_is_no_network_that_is_right_within_eps(tmp_path, monkeypatch):
    """The margin 1000 x - 0.09999 is above zero on all of [0.5 - eps, 0.5 + eps], but not at the float32 number below."""
    net = nn.Sequential(nn.Linear(1, 2))
    net[0].weight.data, net[0].bias.data = torch.tensor([[1000.0], [0.0]]), torch.tensor([-0.09999, 0.0])
    bias, eps = Fraction(net[0].bias.tolist()[0]), 0.4999
    assert 1000 * (Fraction(1, 2) - Fraction(eps)) + bias > 0
    certificate = certify(net, torch.tensor([[0.5]]), torch.tensor([0]), eps, tmp_path / "c", radii=())
    assert certificate.summary["falsified"] == recheck(certificate.folder)["falsified"] == 0
    monkeypatch.setattr(certificates, "inner_box", input_box)  # whose ends are rounded to float32
    forged = certify(net, torch.tensor([[0.5]]), torch.tensor([0]), eps, tmp_path / "forged", radii=())
    assert forged.summary["falsified"] == 1
    with pytest.raises(Wrong, match="lies outside"):
        recheck(forged.folder)


def test_a_bound_that_overflows_proves_nothing():
    """NaN and inf are no numbers below which a margin cannot fall: y_0 = -max(16 x, 0), y_1 = 0 on [-1, 1], whose margin falls to -16."""
    layers = [Affine([0], [np.array([[16.0]])], None), ReLU([1]), Affine([2], [np.array([[-1.0], [0.0]])], None)]
    box, claims = (-np.ones(1), np.ones(1)), {1: (np.array([-17.0]), np.array([17.0]), np.zeros(1))}
    sign = np.array([[1], [-1]], np.int8)
    with np.errstate(over="ignore", invalid="ignore"):
        for beta in (1e300, 1.7e308):
            leaves = [np.ones(2, np.int64), sign, np.zeros((2, 1)), beta * np.ones((2, 1))]
            assert margin(layers, box, 0, claims, "branch_and_bound", leaves) < -16
        boxes = [(np.zeros(2), np.ones(2)), (np.zeros(2), np.ones(2))]
        for row in ([1.7e308, 1.7e308], [1.7e308, -1.7e308], [np.nan, 0.0]):
            assert lowest([Affine([0], [16 * np.ones((2, 2))], np.ones(2))], boxes, np.array([row]), 1) == -np.inf


def test_a_convolution_that_no_program_computes_is_refused():
    weight = np.ones((2, 1, 2, 2), np.float32)
    good = {"shape": [1, 3, 3], "after": [2, 2, 2], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
    convolution(weight, *good.values())
    for bad in ({"after": [2, 1, 2]}, {"after": [3, 2, 2]}, {"shape": [2, 3, 3]}, {"dilation": [0, 1]}, {"stride": [0, 1]}, {"padding": [-1, 0]},
                {"groups": 0}, {"groups": 2}, {"stride": [-1, 1]}, {"after": [2, 4, 1]}):
        with pytest.raises((Wrong, ZeroDivisionError)):
            convolution(weight, *(good | bad).values())


def test_more_terms_than_the_theory_allows_are_refused():
    few, many = (Affine([0], [np.zeros((2, n), np.float32)], None) for n in (8, 2**20 + 1))
    few.slack([(np.zeros(8), np.ones(8))])
    with pytest.raises(Wrong, match="too large"):
        many.slack([(np.zeros(2**20 + 1), np.ones(2**20 + 1))])


def test_files_beside_the_folder_are_not_deleted(tmp_path):
    net, (x, y) = mlp(), (part[:3] for part in digits())
    part = tmp_path / "other.part"
    part.mkdir()
    (part / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        certify(net, x, y, 0.1, tmp_path / "other")
    assert (part / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("weight", [math.nan, math.inf, 1e38])
def test_a_network_that_overflows_has_a_certificate_that_claims_nothing(weight, tmp_path):
    net, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10)), (part[:4] for part in digits())
    net[1].weight.data[:, 20:40] = weight
    counts = recheck(certify(net, x, y, 0.1, tmp_path / "certificate").folder)
    assert counts["samples"] == 4 and counts["verified"] == counts["falsified"] == 0


def test_there_are_more_than_twenty_tamperings():
    assert len(TAMPERINGS) > 20


# ---------------------------------------------------------------- parts


def test_a_convolution_as_a_matrix_is_torch_s():
    for stride, padding, dilation, groups in [((1, 1), (0, 0), (1, 1), 1), ((2, 1), (1, 2), (1, 1), 2), ((1, 2), (2, 0), (2, 1), 4)]:
        conv = nn.Conv2d(4, 8, (3, 2), stride, padding, dilation, groups, bias=False)
        x = torch.rand(5, 4, 7, 6)
        y = conv(x).detach()
        matrix = convolution(conv.weight.detach().numpy(), [4, 7, 6], list(y.shape[1:]), stride, padding, dilation, groups)
        np.testing.assert_allclose(x.flatten(1).numpy() @ matrix.T, y.flatten(1).numpy(), atol=1e-5)


def test_the_box_is_that_of_the_bounds():
    x = torch.rand(1, 1000)
    for eps in (0.03, 8 / 255, 0.0, 1.0):
        for mine, theirs in zip(box_of(x.numpy(), eps), outer_box(x, eps), strict=True):
            np.testing.assert_array_equal(mine, theirs[0].numpy())


def test_a_property_is_read_back_as_it_was_meant():
    """By a reader of the two forms that VNN-LIB 1.0 has here."""
    lb, ub = box_of(np.random.default_rng(0).random(50).astype(np.float32), 1e-9)
    text = property_of((lb, ub), 2, 4)
    for sign, end in (("<=", ub), (">=", lb)):
        found = {int(i): float(number) for i, number in re.findall(rf"\(assert \({sign} X_(\d+) ([\d.]+)\)\)", text)}
        assert [found[i] for i in range(50)] == end.tolist()
    assert re.findall(r"\(and \(>= Y_(\d) Y_(\d)\)\)", text) == [("0", "2"), ("1", "2"), ("3", "2")]
    assert text.count("declare-const") == 54 and text.count("(") == text.count(")")


def test_the_interval_is_that_of_scipy():
    from scipy.stats import beta

    for k, n in ((0, 5), (3, 7), (7, 7), (481, 1000)):
        assert lower_end(k, n) == pytest.approx(beta.ppf(0.025, k, n - k + 1) if k else 0.0, abs=1e-8)


def test_a_point_within_rounding_is_no_counterexample():
    net = nn.Sequential(nn.Linear(2, 2, bias=False))
    net[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    part = exported(net, torch.rand(2, 2))
    points = torch.tensor([[0.5, 0.5], [0.5, 0.5 + 2**-24], [0.5, 0.6]])
    assert refuted(part, points, torch.zeros(3, dtype=torch.long)).tolist() == [False, False, True]


@pytest.mark.parametrize("beyond", [-1.0, math.nan])
def test_the_model_and_its_export_are_compared_at_every_image(beyond, tmp_path, monkeypatch):
    """The model answers otherwise for bright images, which lie in the second batch."""
    def ask(model, points, answer=certificates.ask):
        return answer(model, points) * torch.where(points.mean(1, keepdim=True) > 0.5, beyond, 1.0)

    monkeypatch.setattr(certificates, "ask", ask)
    net, x = nn.Linear(4, 3), torch.cat([0.3 * torch.rand(2, 4), 0.65 + 0.3 * torch.rand(2, 4)])
    with pytest.raises(Contradiction, match="differs from the model"):
        certify(net, x, torch.zeros(4, dtype=torch.long), 0.001, tmp_path / "c", batch_size=2)
    assert not list(tmp_path.iterdir())
    certify(net, x[:2], torch.zeros(2, dtype=torch.long), 0.001, tmp_path / "c", batch_size=2, radii=())


def cancelling():
    """16 x and 2^27, which a BatchNorm takes off again: the export folds it, the model rounds 16 x to a multiple of 16."""
    conv, norm, last = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=0.0), nn.Linear(1, 2)
    conv.weight.data.fill_(16.0), conv.bias.data.fill_(2.0**27), norm.running_mean.fill_(2.0**27)
    last.weight.data, last.bias.data = torch.tensor([[1.0], [0.0]]), torch.tensor([-5.6, 0.0])
    return nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), last).eval()


def test_an_export_that_differs_from_the_model_inside_a_box_alone_gets_no_certificate(tmp_path):
    """At the image both have a margin of 10.4; at 0.46, in the box, the model's is -5.6."""
    net, x, y = cancelling(), torch.ones(1, 1, 1, 1), torch.tensor([0])
    torch.testing.assert_close(net(x), exported(net, x)(x))
    assert net(torch.full_like(x, 0.46)).argmax() == 1
    with pytest.raises(Contradiction, match="differs from the model, by up to 7.2"):
        certify(net, x, y, 0.55, tmp_path / "c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at, eps", [(0.45, 0.14), (0.55, 0.1)])
def test_a_proof_of_the_export_alone_is_no_verdict(at, eps, tmp_path):
    """Logits near 2e5 may differ by 20, as of rounding. The model is wrong at the image, or at 0.45 in the box alone; recheck has no objection."""
    net, x, y = cancelling(), torch.full((2, 1, 1, 1), at), torch.tensor([0, 0])
    x[1] = 1.0
    net[-1].weight.data, net[-1].bias.data = torch.tensor([[1.0], [0.0]]), torch.tensor([2e5 - 2.1, 2e5])
    part = exported(net, x)
    wrong = [bool(net(torch.full((1, 1, 1, 1), point))[0].argmax()) for point in (at, at - eps)]
    assert any(wrong) and wrong[0] == (at < 0.5) and part(torch.full((1, 1, 1, 1), at - eps))[0].argmax() == 0
    assert verify(part, x, y, eps, sound=True).verified.all()
    made = certify(net, x, y, eps, tmp_path / "c", radii=())
    assert [row["verdict"] for row in made.rows] == ["unknown", "verified"]
    assert "the model itself is wrong" in (tmp_path / "c" / "report.html").read_text()
    assert recheck(tmp_path / "c")["verified"] == 1


def test_the_model_is_asked_once_at_each_image(tmp_path):
    net, (x, y) = mlp().eval(), (part[:6] for part in digits())
    seen = []
    net.register_forward_hook(lambda module, given, out: seen.extend(given[0].detach()))
    certify(net, x, y, 0.01, tmp_path / "c", batch_size=3, radii=())
    counts = [sum(torch.equal(image, other) for other in seen) for image in x]
    assert counts[1:] == [1] * 5


@pytest.mark.parametrize("name", ["network", "samples", "proofs"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_a_file_is_refused_by_a_sentence(whole, tmp_path, name, dtype, monkeypatch):
    def halved(folder):
        tensors = {key: t.to(dtype) if t.dtype == torch.float32 else t for key, t in load_tensors(folder / f"{name}.safetensors").items()}
        save_tensors(tensors, folder / f"{name}.safetensors")

    monkeypatch.setitem(TAMPERINGS, "halved", halved)
    with pytest.raises(Wrong, match="not float32|of another type of number"):
        recheck(tampered(whole, tmp_path, "halved", "new"))


@pytest.mark.parametrize("net, sentence", [
    (nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Sigmoid()), "has no place in a certificate"),
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(3, padding=1), nn.Flatten(), nn.Linear(8, 10)), "has no place in a certificate"),
])
def test_what_a_certificate_cannot_hold_is_refused(net, sentence, tmp_path):
    x, y = (part[:2] for part in digits())
    with pytest.raises(ValueError, match=sentence):
        certify(net, x, y, 0.1, tmp_path / "certificate")
    assert not list(tmp_path.iterdir())


def test_bad_input_is_refused_with_a_sentence(tmp_path):
    net, (x, y) = mlp(), (part[:3] for part in digits())
    (tmp_path / "there").mkdir()
    for call, sentence in [(lambda: certify(net, x, y, 0.1, tmp_path / "there"), "exists"),
                           (lambda: certify(net.double(), x.double(), y, 0.1, tmp_path / "new"), "float32"),
                           (lambda: certify(net.half(), x, y, 0.1, tmp_path / "new"), "torch.float16, but a certificate is about float32"),
                           (lambda: certify(net.bfloat16(), x, y, 0.1, tmp_path / "new"), "torch.bfloat16, but a certificate is about float32"),
                           (lambda: certify(net, x.bfloat16(), y, 0.1, tmp_path / "new"), "images are torch.bfloat16"),
                           (lambda: certify(net.float(), x, y, 0.1, tmp_path / "new", indices=[1, 1, 2]), "different indices"),
                           (lambda: certify(net.float(), x, y, 0.1, tmp_path / "new", indices=[-1, 1, 2]), "reach from -1 to 2"),
                           (lambda: certify(net.float(), x, y, 0.1, tmp_path / "new", indices=[1, 2, 10**20]), "reach from 1 to 10000"),
                           (lambda: certify(net.float(), x, y, 0.1, tmp_path / "new", indices=[0.2, 1.5, 2]), "is a whole one"),
                           (lambda: certify(net.float(), x, y, 0.1, tmp_path / "new", batch_size=0), "batch_size=0"),
                           (lambda: certify(net.float(), x, y, 0.1, tmp_path / "new", seed="a"), "seed='a'"),
                           (lambda: certify(nn.Sequential(net, nn.ReLU()), x, y, 0.1, tmp_path / "new"), "ends with ReLU")]:
        with pytest.raises(ValueError, match=sentence):
            call()
    with pytest.raises((Wrong, OSError)):
        recheck(tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_report_is_a_page_whose_figures_are_those_of_the_summary(made):
    _, certificate = made
    text = Path(certificate.folder / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r'<data value="([^"]*)">([^<]*)</data>', text)) == {(name, str(value)) for name, value in certificate.summary.items()}
    heads = re.findall(r"<h2>\d\. (.*?)</h2>", text)
    assert heads == ["Identity", "Operational domain", "Property", "Method and soundness", "Results by class", "Measured besides, outside of recheck",
                     "What is not covered", "Samples"]
    assert text.count('<tr class="sample">') == 60 and text.count("<svg") == 2
    outside = text[text.index('<div class="outside">') : text.index("</div>")]
    assert "<data" not in outside and "recheck does not derive it again" in outside
    assert not re.search(r"(src|href)=|https?://|<script|@import|url\(", text)  # nothing is fetched


class Spread(nn.Module):
    """One channel times, or plus, a constant of three."""

    def __init__(self, product):
        super().__init__()
        self.product, self.last = product, nn.Linear(48, 3)
        self.register_buffer("constant", torch.linspace(-1, 1, 3).view(3, 1, 1))

    def forward(self, x):
        x = x * self.constant if self.product else x - self.constant
        return self.last(x.relu().flatten(1))


@pytest.mark.parametrize("product", [True, False])
def test_a_constant_that_spreads_an_activation_is_certified(product, tmp_path):
    torch.manual_seed(0)
    net, x = Spread(product), torch.rand(4, 1, 4, 4)
    certificate = certify(net, x, net(x).argmax(1), 0.01, tmp_path / "certificate")
    assert recheck(certificate.folder) == certificate.summary and certificate.summary["verified"] > 0


class Steps(nn.Module):
    """Sums of two, products and shifts, and changes of shape."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm1d(48), nn.Linear(48, 3)
        nn.init.uniform_(self.norm.running_mean), nn.init.uniform_(self.norm.weight)

    def forward(self, x):
        x = torch.cat([nn.functional.leaky_relu(self.conv(x), 0.1), x], 1)
        return self.last(self.norm((x + x).flatten(1)))


@pytest.mark.parametrize("method", ["ibp", "crown"])
def test_rounding_takes_as_much_off_a_claimed_margin_as_recheck_takes(method, tmp_path):
    """Where numbers are large the margin is a small part of its rounding; recheck refuses a claim that lies a thousandth below what it proves."""
    torch.manual_seed(0)
    net, x = Steps().eval().requires_grad_(False), torch.rand(3, 1, 4, 4)
    y = net(x).argmax(1)
    certificate, exact = certify(net, x, y, 0.0, tmp_path / "certificate", [method]), worst_margin(exported(net, x).double()(x.double()), y)
    layers, proofs = network(certificate.folder), load_file(certificate.folder / "proofs.safetensors")
    assert certificate.summary["verified"] == 3
    for k, row in enumerate(certificate.rows):
        claims = {i: [proofs[f"{i}.{part}"][k].astype(float) for part in ("lb", "ub", "steep")] for i in range(len(layers)) if f"{i}.lb" in proofs}
        found = margin(layers, box_of(x[k].numpy(), 0.0), int(y[k]), claims, method, [])
        assert 0 <= found - float(row["margin"]) < 0.01 * (exact[k] - found)


def test_figures_by_class_add_up(made):
    _, certificate = made
    labels = {row["label"] for row in certificate.rows}
    for name in ("samples", "clean", "verified", "falsified", "unknown"):
        assert sum(certificate.summary[f"class.{label}.{name}"] for label in labels) == certificate.summary[name]
    assert sum(certificate.summary[f"by.{method}"] for method in ("ibp", "crown_ibp", "crown", *SEARCHES)) == certificate.summary["verified"]


def test_bounds_of_the_proof_are_sound_bounds(made):
    """The boxes of the proof contain those that float64 CROWN gives for the margins: one sample by hand."""
    net, certificate = made
    x, y = (part[1300:1360] for part in digits())
    k = next(k for k, row in enumerate(certificate.rows) if row["verdict"] == "verified")
    part = exported(net, x).double()
    box = [end.double() for end in ((x[k : k + 1] - 0.03).clamp(min=0), (x[k : k + 1] + 0.03).clamp(max=1))]
    C = margin_matrix(y[k : k + 1], 10, dtype=torch.float64)
    exact = max(bounds(part, *box, method, C)[0].min().item() for method in ("ibp", "crown_ibp", "crown"))
    assert float(certificate.rows[k]["margin"]) <= exact + 1e-6
