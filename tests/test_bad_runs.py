"""Every way in which a run can be incomplete: the explorer and the card say it in a sentence and show the rest."""
import re
import shutil
from html import unescape
from pathlib import Path

import pytest

pytest.importorskip("anywidget", reason="the explorer needs the extra lab")
from sparselab.learn.files import locked, read_sealed, write_sealed
from sparselab.learn.runs import Run
from sparselab.sparse.history_files import load, save
from sparselab.view import PANELS, Explorer

EXAMPLE = Path(__file__).resolve().parents[1] / "nbs" / "example" / "rigl"
LAST = "step-000000630.safetensors"


@pytest.fixture(autouse=True)
def in_motion(monkeypatch):
    """No explorer draws again, in a thread, when its timeline has come to rest: nobody looks at it here, and it takes as long as the test."""
    monkeypatch.setattr("sparselab.view.explorer.explorer.CALM", 600)


@pytest.fixture
def copied(tmp_path) -> Path:
    return Path(shutil.copytree(EXAMPLE, tmp_path / "run"))


def shown(folder: Path) -> tuple[str, dict[str, str], Explorer]:
    """(the line above the panels, title -> sentence of the panels that have nothing to draw, the explorer), as text."""
    explorer = Explorer(folder)
    side = explorer.sides[0]
    for step in (0, 1e9, 200):
        explorer.go(step)
    said = {block.title: re.sub("<[^>]+>", "", unescape(block.problem.value)) for block in side.blocks if block.problem.value}
    return unescape(side.state.value), said, explorer


def card(folder: Path) -> str:
    return unescape(re.sub("<[^>]+>", " ", Run(folder)._repr_html_()))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def spoil(path: Path) -> None:
    """Overwrite the middle half."""
    data = bytearray(path.read_bytes())
    part = len(data) // 4
    data[part:3 * part] = b"\xa5" * (2 * part)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(("name", "harm", "sentence", "without"), [
    ("config.json", cut, "config.json is damaged", set()),
    ("config.json", spoil, "config.json is damaged", set()),
    ("config.json", Path.unlink, "has no config.json", set()),
    ("summary.json", cut, "summary.json is damaged", {"Metrics"}),
    ("summary.json", spoil, "summary.json is damaged", {"Metrics"}),
    ("metrics.jsonl", cut, "metrics.jsonl ends early: it has 15 of 30 epochs", set()),
    ("metrics.jsonl", spoil, "metrics.jsonl is damaged in line 8", {"Metrics"}),
    ("stability.jsonl", cut, "stability.jsonl ends early: it has 14 of 30 epochs", set()),
    ("stability.jsonl", spoil, "stability.jsonl is damaged in line 8", {"Metrics", "Stability"}),
    ("masks/start.json", cut, "does not hold a readable mask history", {"Mask", "Updates", "Layers", "Filters"}),
    ("masks/start.json", spoil, "does not hold a readable mask history", {"Mask", "Updates", "Layers", "Filters"}),
    ("masks/start.bin", cut, "does not hold a readable mask history", {"Mask", "Updates", "Layers", "Filters"}),
    ("masks/start.bin", spoil, "does not hold a readable mask history", {"Mask", "Updates", "Layers", "Filters"}),
    ("masks/start.bin", Path.unlink, "does not hold a readable mask history", {"Mask", "Updates", "Layers", "Filters"}),
    ("masks/updates.bin", cut, "updates.bin ends early: how the masks changed after step 150 is not known", set()),
    ("masks/updates.bin", Path.unlink, "updates.bin is missing: how the masks changed after step 0 is not known", set()),
    ("masks/updates.jsonl", cut, "updates.jsonl ends early: how the masks changed after step 210 is not known", set()),
    ("masks/updates.jsonl", spoil, "updates.jsonl is damaged: how the masks changed after step 100 is not known", set()),
    ("masks/updates.bin", spoil, "updates.bin is damaged: how the masks changed after step 60 is not known", set()),
    ("masks/updates.jsonl", Path.unlink, "updates.jsonl is missing: how the masks changed after step 0 is not known", set()),
    ("model.safetensors", cut, "model.safetensors cannot be read", set()),
    ("model.safetensors", spoil, "model.safetensors cannot be read", set()),
    ("margins.safetensors", cut, "margins.safetensors cannot be read", {"Margins"}),
    (f"stability/{LAST}", cut, f"{LAST} cannot be read", set()),
    (f"stability/{LAST}", spoil, f"{LAST} cannot be read", set()),
    (f"weights/{LAST}", cut, f"{LAST} cannot be read", set()),
    (f"weights/{LAST}", spoil, f"{LAST} cannot be read", set()),
])
def test_a_file_that_is_damaged_is_named_and_the_rest_is_shown(copied, name, harm, sentence, without):
    harm(copied / name)
    state, said, explorer = shown(copied)
    assert sentence in state and sentence in card(copied) and state.startswith("run: finished. ")
    assert set(said) == without
    if "Metrics" not in without:
        assert max(explorer.moments) >= 300, "the epochs that are there are on the timeline"


@pytest.mark.parametrize(("part", "sentence", "without"), [
    ("masks", "lacks masks, which the training has written",
     dict.fromkeys(("Filters", "Mask", "Updates", "Layers"), "does not hold a readable mask history")),
    ("metrics.jsonl", "metrics.jsonl is missing: 30 epochs had a line in it", {"Metrics": "has no metrics, though it has finished"}),
    ("stability", "stability lacks step-000000021.safetensors, step-000000042.safetensors, step-000000063.safetensors and 27 more, recorded at the "
     "end of 30 epochs", {"Neurons": "has no recorded neurons"}),
    ("margins.safetensors", "lacks margins.safetensors", {"Margins": "has no margins.safetensors: margins are computed when training has ended"}),
    ("weights", "weights lacks step-000000021.safetensors", {}), ("model.safetensors", "lacks model.safetensors", {}),
    ("stability.jsonl", "stability.jsonl is missing: 30 epochs had a line in it", {"Stability": "has no stability"}),
])
def test_what_is_lost_is_named_and_said_where_it_would_be(copied, part, sentence, without):
    shutil.rmtree(copied / part) if (copied / part).is_dir() else (copied / part).unlink()
    state, said, _ = shown(copied)
    assert state.startswith("run: finished. ") and sentence in state and sentence in card(copied) and len(Run(copied).damage) == 1
    assert set(said) == set(without) and all(sentence in said[title] for title, sentence in without.items())


@pytest.mark.parametrize("folder", ["weights", "stability"])
def test_one_file_that_is_lost_is_named(copied, folder):
    assert Run(copied).damage == []
    (copied / folder / "step-000000315.safetensors").unlink()
    assert Run(copied).damage == [f"{copied / folder} lacks step-000000315.safetensors, recorded at the end of 1 epoch."]


def test_of_a_run_that_goes_on_the_last_epoch_may_still_be_written(copied):
    """Rows are written before the recordings of their epoch, and the checkpoint last."""
    (copied / "summary.json").unlink()
    (copied / "checkpoint").mkdir()
    (copied / "checkpoint" / "step-000000609.safetensors").write_bytes((copied / "model.safetensors").read_bytes())
    for folder in ("weights", "stability"):
        (copied / folder / LAST).unlink()
    assert Run(copied).damage == []
    (copied / "weights" / "step-000000609.safetensors").unlink()
    shutil.rmtree(copied / "checkpoint")
    assert [sentence.removeprefix(str(copied)) for sentence in Run(copied).damage] == [
        "/weights lacks step-000000609.safetensors, recorded at the end of 1 epoch.",
        "/checkpoint has no checkpoint: the run begins anew when it is trained again."]


def test_a_byte_that_was_overwritten_in_the_updates_stops_the_masks_there(copied):
    whole = load(copied / "masks")
    path = copied / "masks" / "updates.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    left = load(copied / "masks")
    assert len(left.steps) > 10 and left.steps == whole.steps[:len(left.steps)] and f"after step {left.steps[-1]:,} is not known" in left.lost
    for name in whole.names:
        assert (left.mask(-1, name) == whole.mask(len(left.steps) - 1, name)).all()
    explorer = Explorer(copied)
    explorer.go(1e9)
    mask = explorer.sides[0].mask
    assert not mask.problem.value and (mask.cursor.mask == left.mask(-1, "fc1.weight").numpy()).all()


def test_up_to_where_a_cut_history_goes_the_masks_are_those_that_were_trained(copied):
    whole = load(copied / "masks")
    cut(copied / "masks" / "updates.bin")
    left = load(copied / "masks")
    assert not whole.lost and left.lost and left.steps == whole.steps[:len(left.steps)] and len(left.steps) > 10
    for name in whole.names:
        assert (left.mask(-1, name) == whole.mask(len(left.steps) - 1, name)).all()
    save(whole, copied / "masks")
    assert not load(copied / "masks").lost and load(copied / "masks").flow() == whole.flow()


def test_a_run_that_is_being_written_or_was_killed_is_shown_so_far(copied):
    (copied / "summary.json").unlink()
    for name in ("metrics.jsonl", "stability.jsonl"):
        rows = (copied / name).read_text().splitlines(keepends=True)
        (copied / name).write_text("".join(rows[:3]) + '{"step": ')
    (copied / "margins.safetensors").unlink()
    state, said, explorer = shown(copied)
    assert state.startswith("run: not finished, 3 of 30 epochs so far; it was stopped, and training the same configuration")
    assert state.endswith("checkpoint has no checkpoint: the run begins anew when it is trained again.")
    assert set(said) == {"Margins"} and max(explorer.moments) == max(Run(copied).history.steps)
    with locked(copied):
        assert "so far; it is being written now." in shown(copied)[0]


def test_a_run_that_has_collapsed_says_so_above_its_panels(copied):
    write_sealed(copied / "summary.json", read_sealed(copied / "summary.json") | {"collapse": "The network has collapsed."})
    assert shown(copied)[:2] == ("run: finished. The network has collapsed.", {})


def test_a_run_of_which_no_epoch_has_ended_says_so(copied):
    (copied / "summary.json").unlink()
    for name in ("metrics.jsonl", "stability.jsonl"):
        (copied / name).unlink()
    _, said, _ = shown(copied)
    assert said["Metrics"].startswith("No epoch has ended yet") and said["Stability"].startswith("No epoch has ended yet")
    assert Run(copied).damage == []


def test_an_empty_folder_and_one_that_is_not_there_are_one_sentence(tmp_path):
    for folder, sentence in ((tmp_path, "has no config.json: it is not the folder of a run"),
                             (tmp_path / "nowhere", "There is no run folder")):
        state, said, explorer = shown(folder)
        assert sentence in state and set(said) == set(PANELS) and explorer.moments == [0]
        assert all(sentence and "Error(" not in sentence for sentence in said.values())
        for source in (folder, (EXAMPLE, folder)):
            alone, = Explorer(source).children
            assert sentence in unescape(alone.value) and alone.value.count(str(folder)) == 1
    assert len(Explorer(EXAMPLE).children) > 1
