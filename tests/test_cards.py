"""What a cell shows of masks, sparsifiers, runs and certificates: the numbers are those of the object, and text is text."""
import json
import math
import re
import shutil
from base64 import b64decode
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sparselab.learn.files import locked
from sparselab.learn.runs import Run
from sparselab.robust.verification import Verification
from sparselab.sparse.masks import Masks, assign, prunable
from sparselab.sparse.sparsify import sparsify

EXAMPLE = Path(__file__).resolve().parents[1] / "nbs" / "example"


def rows(card: str) -> list[list[str]]:
    """The texts of the cells of all tables."""
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", card)]
    return [[unescape(re.sub("<[^>]+>", "", cell)) for cell in row] for row in cells]


def widths(card: str) -> list[float]:
    """Percent of its frame that each bar fills."""
    return [float(width) for width in re.findall(r"height:10px;width:([\d.]+)%", card)]


def masked(*sizes: tuple[int, int], share: float = 0.1) -> Masks:
    layers = Masks(prunable(nn.Sequential(*(nn.Linear(inputs, outputs) for outputs, inputs in sizes))))
    for name in layers:
        assign(layers, name, torch.rand(layers[name].shape) < share)
    return layers


def certificate() -> Verification:
    def flags(*bits: int) -> torch.Tensor:
        return torch.tensor(bits, dtype=torch.bool)
    return Verification(flags(1, 1, 1, 0), torch.tensor([0.3, 0.1, -0.2, -math.inf]),
                        {"ibp": flags(1, 1, 1, 0), "crown": flags(0, 1, 1, 0)},
                        {"ibp": flags(1, 0, 0, 0), "crown": flags(0, 1, 0, 0)})


def sparsifier():
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    return sparsify(model, torch.optim.SGD(model.parameters(), 0.1), method="rigl", sparsity=0.9, total_steps=40)


def test_masks_show_counts_and_shares():
    masks = masked((30, 40), (10, 30))
    shown = rows(masks._repr_html_())
    assert shown[0] == ["layer", "shape", "nnz", "sparsity", "density", "where"]
    for row, name, shape in zip(shown[1:], masks, ("30 x 40", "10 x 30"), strict=True):
        count, total = int(masks[name].sum()), masks[name].numel()
        assert row[:4] == [name, shape, f"{count:,}", f"{1 - count / total:.2%}"]
    shares = [100 * masks.counts[name] / masks[name].numel() for name in masks]
    assert widths(masks._repr_html_()) == pytest.approx(shares, abs=0.01)


def test_the_thumbnail_is_the_mask():
    """A layer that fits in the picture is drawn weight by weight: its PNG, decoded by Pillow, is opaque where they are."""
    image = pytest.importorskip("PIL.Image")
    from io import BytesIO

    masks = masked((20, 30))
    png = b64decode(re.search(r"base64,([^\"]+)", masks._repr_html_())[1])
    opacity = np.asarray(image.open(BytesIO(png)).convert("RGBA"))[..., 3]
    assert ((opacity > 0) == masks["0.weight"].numpy()).all()


def test_a_deep_network_fits_and_its_small_layers_are_summed():
    masks = masked(*[(64, 256)] * 20, *[(8, 64)] * 40)
    card = masks._repr_html_()
    assert len(card) < 20_000
    largest = sorted(masks, key=lambda name: -masks[name].numel())[:12]
    last = rows(card)[-1]
    assert last[0] == "48 smaller layers" and last[2] == f"{sum(masks.counts[name] for name in masks if name not in largest):,}"


def test_a_sparsifier_shows_its_step_budget_and_masks():
    found = sparsifier()
    for _ in range(10):
        found.step()
    card = found._repr_html_()
    assert "step 10 of 40" in card and widths(card)[0] == 25 and "<b>RigL</b>" in card
    assert f"{found.masks.nnz:,} of {found.masks.total:,} weights exist" in card and f"{found.budget:,} are promised" in card
    assert [row[0] for row in rows(card)[1:]] == list(found.masks)


def test_a_certificate_counts_by_method_and_shows_margins():
    shown = rows(certificate()._repr_html_())
    assert [row[:4] for row in shown[1:]] == [
        ["ibp", "3", "1", "25.00%"], ["crown", "2", "1", "25.00%"], ["none", "", "1", "25.00%"],
        ["misclassified", "", "1", "25.00%"]]
    assert "2 of 4 samples verified, 3 classified right" in certificate()._repr_html_()
    assert "sorted: -0.200 to 0.300, middle 0.100" in certificate()._repr_html_()


def test_a_run_shows_what_it_achieved_and_its_course():
    run = Run(EXAMPLE / "sparsevlr")
    shown = {row[0]: row for row in rows(run._repr_html_())}
    for name, share in run.summary["accuracy"].items():
        course = [row for row in rows(run._repr_html_()) if row[0] == name]
        assert course[0][1] == f"{share:.2%}"
    assert float(shown["loss"][1]) == pytest.approx(run.metrics[-1]["loss"], rel=1e-3)
    line = re.findall(r'<polyline points="([^"]+)"', run._repr_html_())[0].split()
    losses, heights = [row["loss"] for row in run.metrics], [float(point.split(",")[1]) for point in line]
    assert len(line) == len(losses) and int(np.argmax(losses)) == int(np.argmin(heights))
    assert "finished" in run._repr_html_() and f"{run.summary['nnz']:,} of {run.summary['total']:,}" in run._repr_html_()


@pytest.fixture
def copied(tmp_path) -> Path:
    return Path(shutil.copytree(EXAMPLE / "rigl", tmp_path / "run"))


def test_an_unfinished_run_says_whether_it_is_being_written(copied):
    (copied / "summary.json").unlink()
    rows = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copied / "metrics.jsonl").write_text("".join(rows[:3]) + '{"step": ')
    for repr_ in (repr, Run._repr_html_):
        assert f"3 of {Run(copied).config.epochs} epochs so far; it was stopped" in repr_(Run(copied))
        with locked(copied):
            assert "it is being written now" in repr_(Run(copied))


@pytest.mark.parametrize(("name", "content"), [
    ("config.json", "{"), ("config.json", '{"method": 3, "nonsense": 1}'), ("summary.json", "[]"), ("summary.json", '{"accuracy": {}}'),
    ("metrics.jsonl", "nonsense\n"), ("metrics.jsonl", "[1]\n"),
    ("metrics.jsonl", "\u00ff\u00fe\n"), ("metrics.jsonl", '{"step": 1}\n'), ("metrics.jsonl", ""),
])
def test_a_damaged_run_is_shown_as_far_as_it_goes(copied, name, content):
    (copied / name).write_bytes(content.encode("latin-1"))
    card = Run(copied)._repr_html_()
    assert repr(Run(copied)) and card.count("<div") == card.count("</div>") and "<b>run</b>" in card
    if content in ("{", "nonsense\n", "[1]\n"):
        assert f"{name}" in card and "damaged" in card


def test_text_is_escaped(tmp_path):
    layer = nn.Sequential()
    layer.add_module("<i>a&b", nn.Linear(3, 2))
    folder = tmp_path / "<u>"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"method": "<s>"}))
    for card in (Masks(prunable(layer))._repr_html_(), Run(folder)._repr_html_(),
                 Verification(torch.ones(1) > 0, torch.ones(1), {}, {"<s>": torch.ones(1) > 0})._repr_html_()):
        assert not re.search("<[isu]>", card) and re.search("&lt;[isu]&gt;", card)


def test_cards_need_no_script_and_no_network_and_have_the_colours_of_the_page():
    for card in (masked((30, 40))._repr_html_(), sparsifier()._repr_html_(), certificate()._repr_html_(),
                 Run(EXAMPLE / "rigl")._repr_html_()):
        assert len(card) < 20_000 and not re.search(r"<script|<link|<style|https?://|\son\w+=|url\(", card)
        assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]+)', card))
        text = re.findall(r"(?<![-\w])color:([^;\"]+)", card)
        assert text and all("currentColor" in colour or colour == "inherit" for colour in text), "text that a theme cannot change"
