"""Certificates of inputs with ranges and radii of their own: against brute force, against tampering, killed, and of runs on tables."""
import csv
import json
import math
import re
import shutil
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_certificates import edit_json, edit_tensor, edit_text, rewrite, sha256
from test_certify_again import killed_after, same_files
from test_complete import least_by_milp, least_by_patterns, network, right
from test_own import points, quick, quiet, small
from torch import nn

import sparselab
from sparselab.learn import load, own_data
from sparselab.learn.data import Split
from sparselab.robust import certify, decide, input_box
from sparselab.robust.certificates import Ranges
from sparselab.robust.opinions import opinion
from sparselab.robust.recheck import FAULTS, box_of, property_of, recheck
from sparselab.robust.rounding import outer_box

# the last input has no width
LOW, HIGH, RADIUS = (torch.tensor(part) for part in ([0.0, -5.0, 100.0, 1.5], [10.0, 5.0, 200.0, 1.5], [10.0, 2.5, 0.0, 0.25]))


def test_verdicts_are_what_all_patterns_say(tmp_path):
    """Boxes of three widths, one of them none."""
    eps, words = torch.tensor([0.3, 0.1, 0.0]), []
    for seed in range(5):
        net = network(seed, inputs=3, width=6, depth=1)
        x, y = right(net, 4, 3)
        lower, upper = input_box(x, eps)
        certificate = certify(net, x, y, eps, tmp_path / str(seed), budget=30.0, radii=())
        assert recheck(certificate.folder) == certificate.summary
        for i, row in enumerate(certificate.rows):
            least = least_by_patterns(net, lower[i], upper[i], int(y[i]))
            assert row["verdict"] == ("verified" if least > 0 else "falsified") or abs(least) < 1e-4
            assert row["verdict"] != "verified" or float(row["margin"]) <= least + 1e-6
        words += [row["verdict"] for row in certificate.rows]
    assert {"verified", "falsified"} <= set(words)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(network, x, y, certificate) in units, with searches."""
    net = network(4, 4, 10, 2, 3)
    x, y = right(net, 30)
    return net, x, y, certify(net, x, y, 0.25, tmp_path_factory.mktemp("ranges") / "c", low=LOW, high=HIGH, radius=RADIUS, budget=30.0)


def test_verdicts_are_those_of_a_milp_in_units(made):
    net, x, y, certificate = made
    radii = 0.25 * RADIUS.double() / torch.tensor([10.0, 10.0, 100.0, 1.0])
    lower, upper = input_box(x, radii)
    assert recheck(certificate.folder) == certificate.summary and certificate.summary["by.branch_and_bound"] > 0
    for i, row in enumerate(certificate.rows):
        least = least_by_milp(net, lower[i], upper[i], int(y[i]))
        assert row["verdict"] == ("verified" if least > 0 else "falsified") or abs(least) < 1e-4
    verdicts = [row["verdict"] for row in certificate.rows]
    assert decide(net, x, y, radii, budget=30.0).verdicts == verdicts and {"verified", "falsified"} == set(verdicts)
    data = load_file(certificate.folder / "samples.safetensors")
    for k, point in zip(data["falsified"], data["counterexamples"], strict=True):
        assert (abs(point.astype(float) - data["images"][k].astype(float)) <= radii.numpy()).all()


def test_the_box_is_that_of_the_bounds():
    x, radii = torch.rand(1, 500), torch.rand(500, dtype=torch.float64) * (torch.rand(500) > 0.2)
    for mine, theirs in zip(box_of(x.numpy(), radii.numpy()), outer_box(x, radii), strict=True):
        np.testing.assert_array_equal(mine, theirs[0].numpy())


def test_the_report_says_what_the_inputs_may_do(made):
    _, _, _, certificate = made
    text = (certificate.folder / "report.html").read_text()
    rows = re.findall(r'<tr class="input"><td>(.*?)</td></tr>', text)
    assert [row.split("</td><td>") for row in rows] == [["0", "0.0", "10.0", "10.0"], ["1", "-5.0", "5.0", "2.5"], ["2", "100.0", "200.0", "0.0"],
                                                        ["3", "1.5", "1.5", "0.25"]]
    assert "eps = 0.25 and" in text and "eps radius<sub>i</sub> / (high<sub>i</sub> - low<sub>i</sub>)" in text and "every input i" in text
    assert "Pixels" not in text


def test_others_have_the_same_opinion(made):
    says = opinion(made[3].folder)
    assert any("say the same" in sentence for sentence in says) and any("withstand" in sentence for sentence in says)


def one(name, i, value):
    return edit_tensor("samples.safetensors", name, lambda t: np.where(np.arange(len(t)) == i, np.float32(value), t))


def without(*names):
    def edit(folder):
        data = load_file(folder / "samples.safetensors")
        save_file({name: t for name, t in data.items() if name not in names}, folder / "samples.safetensors")

    return edit


def shown(i, column, value):
    """What the report says of one input."""
    def edit(folder):
        text = (folder / "report.html").read_text()
        rows = re.findall(r'<tr class="input">.*?</tr>', text)
        cells = rows[i].split("</td><td>")
        cells[column] = value if column < 3 else f"{value}</td></tr>"
        (folder / "report.html").write_text(text.replace(rows[i], "</td><td>".join(cells)))

    return edit


def consistently(name, i, value):
    """Change a number, and the properties and the report with it."""
    def edit(folder):
        one(name, i, value)(folder), shown(i, ("low", "high", "radius").index(name) + 1, str(np.float32(value)))(folder)
        data, manifest = load_file(folder / "samples.safetensors"), json.loads((folder / "manifest.json").read_text())
        reach = Ranges(*(torch.from_numpy(data[name]) for name in ("low", "high", "radius"))).shares(manifest["eps"]).numpy()
        for image, label, index in zip(data["images"], data["labels"], data["indices"], strict=True):
            (folder / f"vnnlib/{index:06}.vnnlib").write_text(property_of(box_of(image, reach), int(label), 3))

    return edit


def both(*edits):
    return lambda folder: [edit(folder) for edit in edits]


TAMPERINGS = {
    "a radius": one("radius", 0, 9.0), "a radius of zero": one("radius", 2, 0.5),
    "a radius by a hair": one("radius", 1, np.nextafter(np.float32(2.5), np.float32(3))),
    "a low": one("low", 1, -5.5), "a high": one("high", 1, 6.0), "a low of an input that stands still": one("low", 2, 99.0),
    "a range moved": both(one("low", 0, 1.0), one("high", 0, 11.0)), "a range of an input that stands still": one("high", 2, 2e4),
    "a width where there was none": one("high", 3, 2.5), "low above high": one("low", 0, 20.0),
    "a radius below zero": one("radius", 0, -10.0), "a radius that is NaN": one("radius", 0, math.nan), "an infinite high": one("high", 0, math.inf),
    "an infinite radius": one("radius", 0, math.inf),
    "radii left out": without("radius"), "ranges left out": without("low", "high"), "all three left out": without("low", "high", "radius"),
    "radii of another order": edit_tensor("samples.safetensors", "radius", lambda r: r[::-1].copy()),
    "one radius for all": edit_tensor("samples.safetensors", "radius", lambda r: r[:1].copy()),
    "a radius more": edit_tensor("samples.safetensors", "radius", lambda r: np.append(r, np.float32(0))),
    "the scale": edit_json("manifest.json", lambda m: m.update(eps=0.2)),
    "the scale, with the rows": lambda folder: [edit_json("manifest.json", lambda m: m.update(eps=0.2))(folder), rewrite(folder, [
        {**row, "eps": "0.2"} for row in csv.DictReader((folder / "results.csv").read_text().splitlines())]),
        edit_text("report.html", "eps = 0.25 and", "eps = 0.2 and")(folder)],
    "a radius in the report": shown(0, 3, "1.0"), "a low in the report": shown(1, 1, "-50.0"), "a high in the report": shown(2, 2, "20000.0"),
    "an input left out of the report": edit_text("report.html", r'<tr class="input"><td>2<.*?</tr>', ""),
    "an input twice in the report": edit_text("report.html", r'(<tr class="input"><td>2<.*?</tr>)', r"\1\1"),
    "a wider box, in all files": consistently("radius", 2, 80.0), "a smaller range, in all files": consistently("high", 1, 0.0),
}


SENTENCES = {
    "a radius that is NaN": "range or a radius of an input is none", "low above high": "range or a radius of an input is none",
    "one radius for all": "argument 3", "a radius in the report": "table of inputs", "a wider box, in all files": "of layer|margin|outside",
    "a low of an input that stands still": "table of inputs", "a radius by a hair": "VNN-LIB",
}


@pytest.mark.parametrize("what", TAMPERINGS)
def test_tampering_is_found(made, tmp_path, what):
    """With hashes made to fit."""
    folder = shutil.copytree(made[3].folder, tmp_path / "c")
    TAMPERINGS[what](folder)
    names = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    edit_json("manifest.json", lambda m: m.update(sha256={p.relative_to(folder).as_posix(): sha256(p.read_bytes()) for p in names}))(folder)
    with pytest.raises(FAULTS, match=SENTENCES.get(what)):
        recheck(folder)


def test_a_killed_certification_goes_on_and_another_radius_is_another_call(tmp_path):
    net = network(4, 4, 10, 2, 3)
    x, y = right(net, 30)
    call = partial(certify, net, x, y, 0.25, low=LOW, high=HIGH, budget=30.0, batch_size=10)
    whole = call(tmp_path / "whole", radius=RADIUS)
    killed_after("bounds 20", partial(call, tmp_path / "c", radius=RADIUS))
    assert not (tmp_path / "c").exists() and (tmp_path / "c.part").exists()
    for other in (RADIUS.flip(0), None):
        with pytest.raises(ValueError, match="its ranges is"):
            call(tmp_path / "c", radius=other)
    with pytest.raises(ValueError, match="its ranges is"):
        certify(net, x, y, 0.25, tmp_path / "c", budget=30.0, batch_size=10)
    assert recheck(call(tmp_path / "c", radius=RADIUS).folder) == whole.summary
    same_files(whole.folder, tmp_path / "c")


def test_of_a_run_on_a_table_nothing_needs_to_be_said_again(tmp_path):
    x, y = points(80)
    path = own_data((x, y), low=[0, -5, 100], high=[10, 5, 200], radius=[0.5, 0.3, 0], folder=tmp_path)
    run = quiet(quick(tmp_path, dataset=path, eps=1.0, epochs=3), model=small())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        certificate = sparselab.certify(run, folder=tmp_path / "c", budget=10.0)
    data, held = run.data(), load_file(certificate.folder / "samples.safetensors")
    assert [held[name].tolist() for name in ("low", "high")] == [[0, -5, 100], [10, 5, 200]]
    np.testing.assert_allclose(held["radius"], [0.5, 0.3, 0], rtol=2e-7)
    assert json.loads((certificate.folder / "manifest.json").read_text())["eps"] == 1.0
    assert recheck(certificate.folder) == certificate.summary and certificate.summary["verified"] > 0 and opinion(certificate.folder)
    images, labels = torch.from_numpy(held["images"]), torch.from_numpy(held["labels"])
    expected = decide(run.model(), images, labels, data.test.radius(1.0), budget=10.0).verdicts
    assert [row["verdict"] for row in certificate.rows] == expected
    half = sparselab.certify(run.model(), data, eps=0.5, folder=tmp_path / "half", radii=())
    assert half.summary["verified"] >= certificate.summary["verified"] and "radius" in load_file(half.folder / "samples.safetensors")
    of_split = Split(data.test.images, data.test.labels, data.test.scale)
    split = sparselab.certify(run.model(), of_split, eps=1.0, folder=tmp_path / "split", budget=10.0)
    assert [row["verdict"] for row in split.rows] == [row["verdict"] for row in certificate.rows]
    with pytest.warns(UserWarning, match="never trained with these radii"):
        moved = sparselab.certify(run, eps=data.test.radius(1.0), folder=tmp_path / "moved", budget=10.0)
    assert recheck(moved.folder)["verified"] == certificate.summary["verified"]


def test_ranges_without_radii_are_shown_too(tmp_path):
    """Every radius is the width: eps is the share of each."""
    x, y = points(60)
    data = load(own_data((x, y), low=[0, -5, 100], high=[10, 5, 200], folder=tmp_path))
    assert data.test.scale is None
    certificate = sparselab.certify(small().eval(), data, eps=0.02, folder=tmp_path / "c", radii=())
    plain = certify(small().eval(), data.test.images, data.test.labels, 0.02, tmp_path / "plain", radii=())
    assert [row["verdict"] for row in certificate.rows] == [row["verdict"] for row in plain.rows]
    assert recheck(certificate.folder)["samples"] == 12 and ">200.0</td><td>100.0<" in (certificate.folder / "report.html").read_text()


@pytest.mark.parametrize("given, sentence", [
    ({"eps": torch.full((3,), 0.1)}, r"eps has shape \(3,\), but an image has \(4,\)"), ({"eps": torch.tensor(0.1)}, "a radius in pixel space"),
    ({"eps": torch.tensor([0.1, -0.1, 0, 0])}, "what is no radius"), ({"eps": torch.tensor([0.1, math.nan, 0, 0])}, "what is no radius"),
    ({"eps": torch.tensor([0.1, math.inf, 0, 0])}, "what is no radius"), ({"eps": torch.tensor([True] * 4)}, "what is no radius"),
    ({"eps": torch.full((4,), 0.1).to_sparse()}, "eps is not a dense tensor"),
    ({"eps": torch.ones(4).to(torch.float8_e4m3fn)}, "a type without comparisons"),
    ({"eps": torch.full((4,), 0.1), "radius": RADIUS}, "a tensor of radii beside"), ({"eps": math.nan, "radius": 1.0}, "eps is nan"),
    ({"eps": 1e308, "radius": torch.full((4,), 3e38)}, "what is no radius"), ({"low": -math.inf}, "low holds -inf"),
    ({"high": torch.tensor([1, 2, math.inf, 4])}, "high holds inf"), ({"high": 1e300}, "high holds inf in float32"),
    ({"low": 2.0}, "low is 2 and high 1 for input 0"), ({"low": "a"}, "low='a'"), ({"low": True}, "low=True"),
    ({"low": torch.zeros(2, 4)}, "one for each number of an input"), ({"radius": -0.5}, "radius holds -0.5"), ({"radius": 1j}, "radius=1j"),
    ({"radius": math.nan}, "radius holds nan"), ({"radius": torch.ones(3)}, "of an input of shape"), ({"radius": [1, 2, "a", 3]}, "radius="),
])
def test_bad_input_is_a_sentence(given, sentence, tmp_path):
    net = network(0)
    x, y = right(net, 2)
    with pytest.raises(ValueError, match=sentence):
        certify(net, x, y, **{"eps": 0.1, "folder": tmp_path / "c", **given})
    assert not (tmp_path / "c").exists()


def test_a_radius_beyond_the_range_is_all_of_it(tmp_path):
    """And so is an input that has it: [0, 1] is the whole domain."""
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].weight.data, net[0].bias.data = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([0.1, 0.0])
    x, y = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    found = certify(net, x, y, 1.0, tmp_path / "c", low=0.0, high=2.0, radius=1000.0, radii=())
    assert recheck(found.folder)["verified"] == 1 and float(found.rows[0]["margin"]) == pytest.approx(0.1, abs=1e-5)
    still = certify(net, x, y, 1.0, tmp_path / "still", radius=0.0)
    assert recheck(still.folder)["verified"] == 1 and "Not measured" in (still.folder / "report.html").read_text()
