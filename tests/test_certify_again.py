"""A certification that is killed goes on where it was, refuses to mix with another one, and every refusal is a sentence."""
import itertools
import json
import os
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_certificates import digits, mlp, trained
from test_complete import network, right
from torch import nn

import sparselab
from sparselab.learn import Run, examples, load, to_float
from sparselab.robust import certificates as module
from sparselab.robust import certify, decide
from sparselab.robust.certificates import Sample, exported
from sparselab.robust.recheck import Wrong, recheck

TIMES = {"manifest.json", "results.csv", "report.html"}  # seconds and dates stand in these


def same_files(first: Path, second: Path) -> None:
    """Both folders have the same files, to the bit, but for times."""
    one, other = ({p.relative_to(f).as_posix(): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (first, second))
    assert set(one) == set(other)
    assert [name for name in one if name not in TIMES and one[name] != other[name]] == []
    rows, again = ([line.rsplit(",", 1)[0] for line in f["results.csv"].decode().splitlines()] for f in (one, other))
    assert rows == again


def killed_after(line: str, certification) -> None:
    """Start a certification in a forked process, and kill it with SIGKILL when it has said `line`."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            certification(progress=lambda done, total, stage: os.write(writes, f"{stage} {done}\n".encode()))
        finally:
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        for said in pipe:
            if said.strip() == line:
                os.kill(child, signal.SIGKILL)
                break
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_a_killed_certification_goes_on_where_it_was(tmp_path, monkeypatch):
    """Killed in the middle of the bounds and again in the middle of the searches: the same proofs as of a call that nobody disturbed."""
    torch.manual_seed(0)
    net, (x, y) = trained(mlp()), (part[1300:1330] for part in digits())
    options = {"indices": range(1300, 1330), "budget": 60, "batch_size": 10}
    whole = certify(net, x, y, 0.08, tmp_path / "whole", **options)
    assert whole.summary["by.branch_and_bound"] > 1
    folder = tmp_path / "certificate"
    certification = partial(certify, net, x, y, 0.08, folder, **options)
    killed_after("bounds 20", certification)
    part = tmp_path / "certificate.part"
    assert not folder.exists() and len(list((part / "samples").glob("[0-9]*.safetensors"))) >= 20
    with pytest.raises(Wrong, match="not finished"):
        recheck(part)
    kept = {p.name: p.stat().st_mtime_ns for p in (part / "samples").glob("[0-9]*.safetensors")}
    killed_after("searches 1", certification)
    assert not folder.exists()
    samples = [Sample.load(part / f"samples/{k:06}.safetensors") for k in range(30)]
    assert any(sample.open for sample in samples) and sum(sample.method == "branch_and_bound" for sample in samples) >= 1
    again = {p.name: p.stat().st_mtime_ns for p in (part / "samples").glob("[0-9]*.safetensors")}
    assert sum(kept[name] == again[name] for name in kept) >= len(kept) - 1 - (len(kept) - 20)  # what was known was not computed again
    searched = []
    monkeypatch.setattr(module, "searched", lambda *a, found=module.searched: searched.append(1) or found(*a))
    finished = certification()
    assert len(searched) == sum(sample.open for sample in samples)
    assert finished.summary == recheck(folder) == whole.summary and not part.exists()
    same_files(whole.folder, folder)


def test_what_was_cut_in_the_middle_is_computed_again(tmp_path, monkeypatch):
    net, (x, y) = mlp().eval(), (part[:6] for part in digits())
    whole = certify(net, x, y, 0.02, tmp_path / "whole", batch_size=3)
    stop = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, "write", stop)
        certify(net, x, y, 0.02, tmp_path / "again", batch_size=3)
    samples = sorted((tmp_path / "again.part/samples").iterdir())
    samples[1].write_bytes(samples[1].read_bytes()[:40])
    samples[4].write_bytes(b"")
    (tmp_path / "again.part/samples/.000005.safetensors.123").write_bytes(b"half")
    assert recheck(certify(net, x, y, 0.02, tmp_path / "again", batch_size=3).folder) == whole.summary
    same_files(tmp_path / "whole", tmp_path / "again")


@pytest.mark.parametrize("other, sentence", [
    ({"eps": 0.03}, "its eps is 0.02, not 0.03"), ({"seed": 1}, "its seed is 0, not 1"), ({"budget": 5.0}, "its budget is None, not 5.0"),
    ({"x": slice(1, 7)}, "its images"), ({"net": 7}, "its network"), ({"labels": 1}, "its labels"), ({"indices": range(10, 16)}, "its indices"),
    ({"batch_size": 2}, "its batch_size is 3, not 2"), ({"methods": ["ibp"]}, "its methods"),
])
def test_another_call_is_refused(other, sentence, tmp_path, monkeypatch):
    def call(x=slice(0, 6), net=0, labels=0, eps=0.02, **options):
        torch.manual_seed(net)
        images, y = (part[x] for part in digits())
        if labels:
            y = y.clone()
            y[0] = (y[0] + 1) % 10
        return certify(mlp().eval(), images, y, eps, tmp_path / "certificate", **{"batch_size": 3, **options})

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        call()
    with pytest.raises(ValueError, match=sentence):
        call(**other)
    assert recheck(call().folder)["samples"] == 6


def test_a_damaged_list_of_inputs_is_refused(tmp_path, monkeypatch):
    net, (x, y) = mlp().eval(), (part[:3] for part in digits())
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        certify(net, x, y, 0.02, tmp_path / "c")
    path = tmp_path / "c.part/inputs.json"
    for damaged in (path.read_text()[:50], path.read_text().replace("0.02", "0.03")):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="inputs.json is damaged"):
            certify(net, x, y, 0.02, tmp_path / "c")


@pytest.mark.parametrize("change, error, sentence", [
    (lambda p, n, x, y: certify(n, x, y.tolist(), 0.1, p / "c"), ValueError, "labels as tensors, not Sequential, Tensor, list"),
    (lambda p, n, x, y: certify("net.onnx", x, y, 0.1, p / "c"), ValueError, "takes a module"),
    (lambda p, n, x, y: certify(n, x.double(), y, 0.1, p / "c"), ValueError, "give x.float()"),
    (lambda p, n, x, y: certify(n, (255 * x).to(torch.uint8), y, 0.1, p / "c"), ValueError, "are torch.uint8"),
    (lambda p, n, x, y: certify(mlp().double(), x, y, 0.1, p / "c"), ValueError, "give model.float()"),
    (lambda p, n, x, y: certify(n, x, y.int(), 0.1, p / "c"), ValueError, "torch.int64"),
    (lambda p, n, x, y: certify(n, x, y + 9, 0.1, p / "c"), ValueError, "tells 10 classes apart"),
    (lambda p, n, x, y: certify(n, x[:0], y[:0], 0.1, p / "c"), ValueError, "at least one"),
    (lambda p, n, x, y: certify(n, x, y, -0.1, p / "c"), ValueError, "eps"),
    (lambda p, n, x, y: certify(n, x, y, float("nan"), p / "c"), ValueError, "eps"),
    (lambda p, n, x, y: certify(n, x * 2, y, 0.1, p / "c"), ValueError, "0, 1"),
    (lambda p, n, x, y: certify(n, x, y, 0.1, p / "c", budget=0), ValueError, "a search takes time"),
    (lambda p, n, x, y: certify(n, x, y, 0.1, p / "c", budget=-1.0), ValueError, "a search takes time"),
    (lambda p, n, x, y: certify(n, x, y, 0.1, p / "c", budget="10"), ValueError, "a search takes time"),
    (lambda p, n, x, y: certify(n, x, y, 0.1, p / "c", methods=["alpha_crown"]), ValueError, "budget= asks for a search"),
    (lambda p, n, x, y: certify(n, x, y, 0.1, p / "c", methods=[]), ValueError, "some of ibp"),
    (lambda p, n, x, y: certify(n, x, y, 0.1, p / "c", radii=[0]), ValueError, "positive numbers"),
    (lambda p, n, x, y: certify(n, x, y, 0.1, p / "c", progress="yes"), ValueError, "True, False, or a function"),
    (lambda p, n, x, y: certify(n, x, y, 0.1, p / "file.txt/c"), ValueError, "which is a file"),
    (lambda p, n, x, y: certify(n, x, y, 0.1, p / "file.txt"), ValueError, "exists"),
    (lambda p, n, x, y: certify(n, x, y, 0.1, None), ValueError, "folder=None"),
    (lambda p, n, x, y: certify(n, x, y, 0.1, "/proc/certificate"), OSError, "cannot be written"),
    (lambda p, n, x, y: sparselab.certify(n, x, y, folder=p / "c"), ValueError, "needs eps="),
    (lambda p, n, x, y: sparselab.certify(n, x, y, 0.1), ValueError, "needs folder="),
    (lambda p, n, x, y: sparselab.certify(n, x, eps=0.1, folder=p / "c"), ValueError, "without labels"),
    (lambda p, n, x, y: sparselab.certify(n, y.tolist(), y, 0.1, p / "c"), ValueError, "takes a tensor"),
    (lambda p, n, x, y: sparselab.certify(3, x, y, 0.1, p / "c"), ValueError, "not int"),
    (lambda p, n, x, y: sparselab.certify(p / "nowhere"), ValueError, "no run folder"),
    (lambda p, n, x, y: sparselab.certify(p), ValueError, "not the folder of a run"),
    (lambda p, n, x, y: sparselab.certify(n, load("digits"), eps=0.1, folder=p / "c", count=0), ValueError, "count=0"),
])
def test_bad_input_is_a_sentence(change, error, sentence, tmp_path):
    (tmp_path / "file.txt").write_text("a file")
    with pytest.raises(error, match=sentence):
        change(tmp_path, mlp().eval(), *(part[:2] for part in digits()))
    assert not list(tmp_path.rglob("manifest.json"))


def test_recheck_of_files_that_are_cut_is_refused(tmp_path):
    net, (x, y) = mlp().eval(), (part[:3] for part in digits())
    folder = certify(net, x, y, 0.02, tmp_path / "c", radii=()).folder
    for name in ("network.safetensors", "proofs.safetensors", "samples.safetensors", "manifest.json", "summary.json", "results.csv"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
        done = subprocess.run([sys.executable, folder / "recheck.py", folder], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("WRONG: ") and "Traceback" not in done.stderr, name
        (folder / name).write_bytes(data)
    recheck(folder)
    done = subprocess.run([sys.executable, folder / "recheck.py", tmp_path / "nowhere"], capture_output=True, text=True)
    assert done.returncode == 1 and "no manifest.json" in done.stderr


def test_a_search_is_as_complete_as_decide_and_never_contradicts_it():
    """Small networks, sparse and dense: the leaves of a certificate prove what branch and bound proves, in floating point too."""
    counted = 0
    for seed in range(6):
        net = network(seed, 4, 10, 2, 3, 0.4 * (seed % 2))
        x, y = right(net, 20)
        part = exported(net, x)
        for k, record in enumerate(decide(net, x, y, 0.12, budget=60.0, methods=()).records):
            found = module.searched(part, x[k : k + 1], y[k : k + 1], 0.12, 60.0)
            if record.verdict == "verified" and record.bound > 1e-3:
                assert isinstance(found, tuple) and 0 < found[2] <= record.seen + 1e-6
                counted += int(found[1].sign.any())
            elif record.verdict == "falsified" and record.seen < -1e-3:
                assert isinstance(found, torch.Tensor)
    assert counted > 2  # searches with splits


def searches():
    """(network, image, label, pass, leaves) of searches with splits."""
    for seed in range(6):
        net = network(seed, 4, 10, 2, 3, 0.4 * (seed % 2))
        x, y = right(net, 20)
        part = exported(net, x)
        for k in range(20):
            found = module.searched(part, x[k : k + 1], y[k : k + 1], 0.12, 10.0)
            if isinstance(found, tuple) and found[1].sign.any():
                yield net, x[k], y[k : k + 1], *found[:2]


def test_points_of_the_box_never_go_below_a_leaf():
    """Each leaf's bound is below the margin at every point of the box that lies in the leaf, and every point lies in one for each class."""
    found = list(itertools.islice(searches(), 3))
    assert len(found) == 3
    for net, x, y, pass_, leaves in found:
        points = (x + (2 * torch.rand(5000, 4) - 1) * 0.12).clamp(0, 1)
        with torch.no_grad():
            z1 = net[0](points)
            z2 = net[2](z1.relu())
            out = net[4](z2.relu())
        unstable = [(lb[0] < 0) & (ub[0] > 0) for lb, ub, _ in pass_.claims()]
        z, bound, total = torch.cat([z1[:, unstable[0]], z2[:, unstable[1]]], 1), leaves.bound(pass_, y), torch.zeros(len(points), 3)
        for leaf, j in enumerate(leaves.other.tolist()):
            inside = (leaves.sign[leaf] * z >= 0).all(1)
            total[inside, j] += 1
            margins = (out[:, y[0]] - out[:, j])[inside]
            assert not len(margins) or float(margins.min()) >= float(bound[leaf])
        assert (total[:, [j for j in range(3) if j != y[0]]] >= 1).all()


class Everything(nn.Module):
    """What a certificate writes in other layers."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.slopes, self.up, self.last = nn.PReLU(4), nn.ConvTranspose2d(4, 2, 2), nn.Linear(18, 10)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.norm(self.first(x)).relu(), 3, 2, padding=1)
        x = x + nn.functional.leaky_relu(self.second(x), 0.2)
        x = nn.functional.avg_pool2d(self.slopes(x), 2)
        x = torch.cat([x[:, 2:], x[:, :2].flip(2)], 1)
        x = self.up(x).permute(0, 2, 3, 1)
        return self.last(x.reshape(len(x), -1)) + x.mean((1, 2, 3), keepdim=False).unsqueeze(1)


def test_pooling_and_moves_have_a_place_in_a_certificate(tmp_path):
    torch.manual_seed(0)
    net, (x, y) = Everything(), (part[:40] for part in digits())
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.eval()
    part = exported(net, x)
    with torch.no_grad():
        torch.testing.assert_close(part(x), net(x), atol=1e-5, rtol=1e-5)
    certificate = certify(net, x[:12], y[:12], 0.005, tmp_path / "c", radii=(), budget=10)
    assert recheck(certificate.folder)["verified"] > 5
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(certificate.folder / "network.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], net(x).numpy(), atol=1e-5, rtol=1e-4)


def test_of_a_run_nothing_needs_to_be_said_again(tmp_path):
    run = Run(examples() / "rigl")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        certificate = sparselab.certify(run, folder=tmp_path / "c", count=5, radii=())
    manifest = json.loads((certificate.folder / "manifest.json").read_text())
    assert manifest["eps"] == run.config.eps and manifest["name"] == "rigl" and recheck(certificate.folder)["samples"] == 5
    text = (certificate.folder / "report.html").read_text()
    test = run.data().test
    drawn = [int(row["index"]) for row in certificate.rows]
    assert "5 test images of digits, drawn at random from 359" in text and drawn == sorted(set(drawn)) and len(set(test.labels[drawn].tolist())) > 2
    assert torch.equal(load_file(certificate.folder / "samples.safetensors")["images"], to_float(test.images[drawn]))
    assert "<h3>Corruptions</h3>" in text and text.index("Corruptions") > text.index('class="outside"')
    with pytest.warns(UserWarning, match="never trained with eps 0.5"):
        other = sparselab.certify(str(examples() / "rigl"), eps=0.5, folder=tmp_path / "other", count=3, radii=(), corruptions=False)
    assert "never trained with eps 0.5" in (other.folder / "report.html").read_text()
    data = load("digits")
    assert sparselab.certify(mlp().eval(), data, eps=0.01, folder=tmp_path / "data", count=4, radii=()).summary["samples"] == 4


def test_the_curve_falls_and_meets_the_verdicts(tmp_path):
    torch.manual_seed(0)
    net, (x, y) = trained(mlp()), (part[1300:1320] for part in digits())
    net_, inputs = exported(net, x), {"radii": (0.25, 0.5, 1.0, 1.5, 2.0)}
    found = module.Findings(net_, x, y, 0.06, module.METHODS, None, 100, 0, inputs["radii"], tmp_path).all(lambda *_: None)
    shares = [share for _, share in module.curve(found, inputs["radii"], 0.06)]
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1]
    assert shares[2] == sum(sample.verdict == "verified" for sample in found) / 20
    for radius, share in module.curve(found, (0.5, 2.0), 0.06):
        proved = module.verify(net_, x, y, radius, sound=True).verified
        assert share == pytest.approx(float(proved.double().mean()), abs=0.051)  # a proof may end within rounding


def test_calibration_of_a_network_that_is_sure_and_half_right():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    net[1].weight.data = torch.tensor([[100.0, 0, 0, 0], [-100.0, 0, 0, 0]])
    x = torch.ones(10, 1, 2, 2)
    y = torch.tensor([0] * 5 + [1] * 5)
    found = module.calibration(exported(net, x), x, y)
    assert found["ece"] == pytest.approx(0.5) and found["nll"] == pytest.approx(100.0) and found["bins"][-1] == (10, 1.0, 0.5)


def test_vnnlib_2_says_the_same_as_1(tmp_path):
    """Read by its grammar: numbers without exponents, a version, a network with tensors, and assertions."""
    net, (x, y) = mlp().eval(), (part[:2] for part in digits())
    folder = certify(net, x, y, 0.02, tmp_path / "c", radii=()).folder
    old, new = ((folder / kind / "000001.vnnlib").read_text() for kind in ("vnnlib", "vnnlib2"))
    assert new.startswith("(vnnlib-version <2.0>)") and "(declare-input X float32 [1,1,8,8])" in new and "(declare-output Y float32 [1,10])" in new
    tokens = [line for line in old.splitlines() if line.startswith("(assert (<=") or line.startswith("(assert (>=")]
    places = [f"X[0,0,{i // 8},{i % 8}]" for i in range(64)]
    assert [line for line in new.splitlines() if line.startswith(("(assert (<=", "(assert (>="))] == [
        line.replace(f" X_{i} ", f" {places[i]} ") for line, i in zip(tokens, [*range(64), *range(64)], strict=True)]
    assert new.count("(") == new.count(")") and f"(>= Y[0,3] Y[0,{int(y[1])}])" in new
    parser = pytest.importorskip("vnnlib", reason="pip install vnnlib")
    assert parser.parse_query_file(str(folder / "vnnlib2/000001.vnnlib")) is not None
