"""What the explorer does with its sources, without a browser: a run that had finished, a refusal, two runs."""
import csv
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("anywidget", reason="anywidget is not installed: pip install 'sparselab[lab]'")

from ipywidgets import HTML, Widget

from sparselab.errors import attempt
from sparselab.learn import Config, Live, Run, assembly, train
from sparselab.learn.gate import SETTLED
from sparselab.learn.live import last_knobs
from sparselab.learn.reading import Given
from sparselab.notebooks import at_root
from sparselab.view import Explorer, metrics_panel
from sparselab.view.explorer.blocks import WAITING, Block, Selection
from sparselab.view.explorer.mask_block import table_of

ROOT = Path(__file__).parents[1]
SMALL = dict(model="mlp", model_options={"widths": [24, 20]}, method="rigl", sparsity=0.8, eps=0.02, test_samples=40,
             method_options={"update_every": 4, "drop_fraction": 0.3}, device="cpu")


def until(true, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> list[Config]:
    """Of two finished runs."""
    folder = str(tmp_path_factory.mktemp("runs"))
    configs = [Config(**SMALL, epochs=2, seed=seed, runs_dir=folder) for seed in (0, 1)]
    for config in configs:
        train(config, callbacks=[])
    return configs


def test_a_live_training_that_had_finished_shows_the_finished_run(configs):
    run = Run(Live(configs[0]).folder)
    live = Live(configs[0]).start()
    until(lambda: live.snapshot.status == "finished")
    explorer = Explorer(live)
    assert live.rested and live.metrics == run.metrics and live.history.steps == run.history.steps
    assert explorer.moments == run.moments and explorer.moments[-1] > 0
    assert [block.problem.value for block in explorer.sides[0].blocks] == [""] * len(explorer.sides[0].blocks)
    controls = next(child for child in explorer.children[2].children if hasattr(child, "rested"))
    until(lambda: "finished" in controls.state.value)
    assert "of 0" not in controls.state.value and controls.rested.layout.display is None


@pytest.mark.parametrize("method", ["rigl", "dense"])
def test_the_default_learning_rate_of_a_finished_run_is_the_one_that_it_was_trained_with(tmp_path, monkeypatch, method):
    monkeypatch.setattr(assembly, "STEPS", 8)  # so that this training is a long one, whose default rate is lower
    config = Config(**SMALL | {"method": method, "epochs": 2, "runs_dir": str(tmp_path)})
    config = replace(config, sparsity=0.0, method_options={}) if method == "dense" else config
    run, (trained,) = train(config, callbacks=[]), assembly.make_learner(config).peak_lr
    assert last_knobs(run)["lr"] == trained < assembly.peak_lr(config)


def test_a_finished_run_can_begin_anew_and_is_kept(configs):
    live = Live(configs[1])
    before = (live.folder / "model.safetensors").read_bytes()
    live.anew()
    until(lambda: live.snapshot.status == "finished" and not live.rested)
    assert live.folder.with_name(live.folder.name + ".old-1").joinpath("model.safetensors").read_bytes() == before
    assert (live.folder / "model.safetensors").read_bytes() == before and len(live.metrics) == 2
    live.start()  # and not anew a second time
    until(lambda: not live.alive)
    assert not live.folder.with_name(live.folder.name + ".old-2").exists()
    folder = live.folder
    live.anew(epochs=3)
    until(lambda: live.snapshot.status == "finished" and not live.rested)
    assert live.folder != folder and len(live.metrics) == 3 and Run(folder).finished


def test_a_refused_learning_rate_leaves_its_field(configs):
    from sparselab.view.explorer.controls import LiveControls

    live = Live(Config(**SMALL, epochs=200, runs_dir=configs[0].runs_dir)).step()
    until(lambda: live.snapshot.status == "paused")
    controls = LiveControls(live)
    until(lambda: controls.lr.value > 0)
    lr = controls.lr.value
    for _ in range(2):  # the second refusal says the same
        controls.lr.value = -1.0
        until(lambda: controls.lr.value == lr)
        assert live.snapshot.knobs["lr"] == lr and live.snapshot.note
    live.stop()


@pytest.mark.parametrize("method", ["dense", "snip", "gmp", "rigl", "sparsevlr", "vlr_projection"])
def test_one_update_pauses_with_a_sentence_when_no_update_is_left(configs, tmp_path, method):
    """Also at the very last step, which `vlr_projection` ends with."""
    options = {"update_every": 6} if method in ("gmp", "rigl", "sparsevlr") else {"rounds": 2} if method == "vlr_projection" else {}
    live, paused = Live(Config(**SMALL | {"method": method, "method_options": options}, epochs=2, runs_dir=str(tmp_path))), []
    while not paused or paused[-1].note != SETTLED:
        if paused and len(paused) < 3:  # a kernel is restarted: what was there before is no update that was waited for
            live.stop()
            live = Live(live.source)
        live.step()
        until(lambda live=live: (now := live.snapshot).status in ("paused", "finished") and now is not (paused or [None])[-1])
        assert live.snapshot.status == "paused"
        paused.append(live.snapshot)
    steps = live.history.steps
    assert [now.step for now in paused] == ([*steps[1:], steps[-1]] if method != "snip" else [1])
    time.sleep(0.05)
    assert live.snapshot.status == "paused" and SETTLED in live.headline
    live.resume()
    until(lambda: live.snapshot.status == "finished")
    assert SETTLED not in live.headline and live.history.steps == steps


@pytest.fixture(scope="module")
def pair(configs) -> Explorer:
    return Explorer(tuple(Run(Live(config).folder) for config in configs))


def test_layer_and_relu_follow_each_other(configs):
    side = Explorer(Live(configs[0]).folder).sides[0]
    links = side.neurons.links
    assert links[side.neurons.layer.value] == side.mask.layer.value
    for relu in links:
        side.neurons.layer.value = relu
        assert side.mask.layer.value == links[relu]
    for relu, weight in links.items():
        side.mask.layer.value = weight
        assert side.neurons.layer.value == relu


def test_a_selected_neuron_is_marked_in_its_own_relu_alone(configs):
    block = Explorer(Live(configs[0]).folder).sides[0].neurons
    first, *_, last = block.links
    side_by_side, height = block.detail.layout, block.content.height
    block.select(Selection(block.links[last], 3, last, 3))
    marked = list(block.content.mark)
    assert marked[0] >= 0 and side_by_side.display is None
    block.layer.value = first
    assert block.content.mark[0] == -1 and side_by_side.display == "none" and block.content.height == height
    block.layer.value = last
    assert list(block.content.mark) == marked and side_by_side.display is None


def test_neurons_mark_the_epoch_that_the_metrics_tell_of_and_name_it_where_the_step_is_another(configs):
    run = Run(Live(configs[0]).folder)
    explorer = Explorer(run)
    block, ends = explorer.sides[0].neurons, [row["step"] for row in run.metrics]
    for step in run.moments:
        explorer.go(step)
        explorer.metrics.settle(step)
        told = max((end for end in ends if end <= step), default=ends[0])
        assert block.recorded.steps[block.content.mark[1]] == told
        assert (f"step {told}:" in explorer.metrics.heading.value) == (step >= ends[0])
        assert (f"Neurons, measured at step {told}<" in block.heading.value) == (step != told)
    explorer.go(ends[0])
    mask = explorer.sides[0].mask
    mask.colour.value = "weight"
    assert explorer.step == ends[0] and "measured" not in mask.heading.value
    later = next(step for step in run.history.steps if ends[0] < step < ends[1])
    explorer.go(later)
    assert f"Mask by weight, measured at step {ends[0]}<" in mask.heading.value


def test_two_runs_share_what_is_selected(pair):
    one, two = pair.sides
    relu = list(one.neurons.links)[-1]
    one.neuron_clicked(relu, 3)
    assert two.neurons.neuron == 3 and two.neurons.layer.value == relu and two.mask.layer.value == one.mask.layer.value
    assert two.mask.content.mark == one.mask.content.mark and two.mask.content.mark[0] == 3
    two.mask.layer.value = one.neurons.links[list(one.neurons.links)[0]]
    assert one.mask.layer.value == two.mask.layer.value


def test_the_difference_of_two_masks_is_that_of_the_masks(pair):
    block = next(block for block in pair.sides[0].blocks if block.title == "Difference")
    for step in (0, 8, pair.moments[-1]):
        pair.go(step)
        a, b = (np.asarray(side.source.history.mask(side.mask.cursor.record, side.mask.layer.value)) for side in pair.sides)
        expected = np.select([a & ~b, b & ~a, a & b], [2, 3, 4], 1)
        assert (block.content._raster == expected).all() and (expected == 2).any() and (expected == 4).any()
    names = [side.source.name for side in pair.sides]
    assert all(name in block.legend.value for name in names) and not block.problem.value
    one, both = (sum(line.endswith(label) for line in block.csv().splitlines()) for label in ("only the first", "both"))
    assert (one, both) == ((expected == 2).sum(), (expected == 4).sum())


def test_a_saved_file_names_runs_panel_layer_and_step(pair, configs):
    run = Run(Live(configs[0]).folder)
    explorer = Explorer(run.path)
    explorer.go(8)
    side, layer = explorer.sides[0], run.history.names[1]
    side.mask.layer.value = layer
    relu, eps = side.neurons.layer.value, f"{run.margins.eps:.4g}"
    names = {block.title: block.name for block in side.blocks}
    assert names["Mask"] == f"{run.name}-mask-{layer.removesuffix('.weight')}-step-8"
    assert (names["Metrics"], names["Updates"]) == (f"{run.name}-metrics-step-8", f"{run.name}-updates-step-8")
    assert names["Neurons"] == f"{run.name}-neurons-{relu}-step-8"
    assert names["Margins"] == f"{run.name}-margins-{side.margins.method.value}-eps-{eps}"  # of the final network, at any step
    assert len(set(names.values())) == len(names) and not any(set(name) & set(' /\\:*?"<>|') for name in names.values())
    both = [side.source.name for side in pair.sides]
    named = {block.title: block.name for block in pair.sides[0].blocks if block.title in ("Metrics", "Difference")}
    assert all(all(name in text for name in both) for text in named.values()) and pair.sides[1].mask.name.startswith(both[1])


def test_a_table_of_a_mask_names_units_and_places_of_its_weights(configs):
    run = Run(Live(configs[0]).folder)
    explorer = Explorer(run.path)
    explorer.go(8)
    mask = explorer.sides[0].mask
    rows = list(csv.DictReader(io.StringIO(mask.csv())))
    now, record = np.asarray(run.history.mask(mask.cursor.record, mask.layer.value)), mask.cursor.record
    assert [(int(row["output_unit"]), int(row["input_unit"])) for row in rows] == list(map(tuple, np.argwhere(now)))
    assert [int(row["weight"]) for row in rows] == np.flatnonzero(now).tolist()
    for row in rows:  # on since then, and not the record before
        place, since = (int(row["output_unit"]), int(row["input_unit"])), int(row["since_record"])
        masks = [bool(np.asarray(run.history.mask(at, mask.layer.value))[place]) for at in range(max(0, since - 1), record + 1)]
        assert all(masks[-1 - (record - since):]) and (since == 0 or not masks[0]) and int(row["since_step"]) == run.history.steps[since]


def test_a_table_of_kernels_names_their_rows_and_columns():
    lines = table_of((2, 3, 2, 2), [5, 23], value=["a", "b"]).splitlines()
    assert lines == ["weight,output_unit,input_unit,kernel_row,kernel_column,value", "5,0,1,0,1,a", "23,1,2,1,1,b"]
    assert table_of((2, 3, 4), [13]).splitlines() == ["weight,output_unit,input_unit,kernel_place", "13,1,0,1"]


def test_a_colouring_without_values_keeps_the_picture(configs):
    explorer = Explorer(Live(configs[0]).folder)
    mask = explorer.sides[0].mask
    explorer.go(4)
    mask.colour.value = "score"
    assert mask.problem.value and mask.content.layout.display != "none"
    mask.colour.value = "event"
    assert not mask.problem.value


def test_the_run_picker_offers_the_newest_first_and_explores_one_or_two(configs, tmp_path):
    import os

    from sparselab.view import RunPicker

    folders = [Live(config).folder for config in configs]
    for age, folder in enumerate(folders):
        shutil.copytree(folder, tmp_path / folder.name)
        for path in (tmp_path / folder.name).iterdir():
            os.utime(path, (1e9 + age, 1e9 + age))
    picker = RunPicker(tmp_path)
    labels = [label.split(" · ") for label, _ in picker.choice.options]
    assert [label[-1] for label in labels] == [folder.name for folder in reversed(folders)]
    proved = [f"verified {Run(folder).summary['accuracy']['verified']:.2%}" for folder in reversed(folders)]
    assert [label[1:-1] for label in labels] == [["digits", "rigl 80 %", "epoch 2 of 2", f"seed {seed}", share, "ended"]
                                                 for seed, share in zip((1, 0), proved, strict=True)]
    assert [label[0] for label in labels] == [time.strftime("%Y-%m-%d %H:%M", time.localtime(1e9 + age)) for age in (1, 0)]
    picker.explore()
    assert picker.explorer.sides[0].source.name == folders[1].name and picker.stage.children == (picker.explorer,)
    picker.choice.value = tuple(run for _, run in picker.choice.options)
    picker.explore()
    assert len(picker.explorer.sides) == 2
    picker.explorer.faster()
    assert (picker.explorer.play.interval, picker.explorer.speed.description) == (200, "2 x")


def test_the_run_picker_says_how_far_a_run_is(configs, tmp_path):
    from sparselab.learn.files import locked
    from sparselab.view import RunPicker

    folder = tmp_path / "run"
    shutil.copytree(Live(configs[0]).folder, folder)
    (folder / "summary.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(lines[0])

    def told() -> list[str]:
        (label, _), = RunPicker(tmp_path).choice.options
        return label.split(" · ")

    assert told()[1:] == ["digits", "rigl 80 %", "epoch 1 of 2", "seed 0", "stopped", "run"]
    before = told()[0]
    with locked(folder):
        assert told() == [before, "digits", "rigl 80 %", "epoch 1 of 2", "seed 0", "running", "run"]
    (folder / "config.json").write_text("{")
    assert told()[1:] == ["cannot be read", "run"]


def test_where_nothing_is_left_to_train_no_button_trains(configs):
    from sparselab.learn.files import append_row
    from sparselab.view.explorer.controls import LiveControls

    live = Live(configs[0])
    controls = LiveControls(live)
    until(lambda: "Nothing is left to train" in controls.state.value)
    every = [*controls.buttons.values(), *controls.knobs.values()]
    until(lambda: all(control.disabled for control in every))
    assert controls.rested.layout.display is None
    assert (controls.lr.value, controls.drop_fraction.value, controls.growth.value) == (0.008, 0.3, "gradient"), "what the run had"
    live.start()
    until(lambda: live.snapshot.status == "finished")
    until(lambda: controls.lr.value == 0.008 and all(control.disabled for control in every))
    assert live.gate.asked == [], "no knob is turned by what is shown"
    append_row(live.folder / "events.jsonl", {"step": 3, "name": "lr", "old": 0.008, "new": 0.002})
    assert live.knobs == {"lr": 0.002, "drop_fraction": 0.3, "growth": "gradient"}
    (live.folder / "events.jsonl").unlink()
    waiting = Live(Config(**SMALL, epochs=200, seed=9, runs_dir=configs[0].runs_dir)).step()
    until(lambda: waiting.snapshot.status == "paused")
    controls = LiveControls(waiting)
    until(lambda: controls.lr.value > 0)
    assert not any(control.disabled for control in (*controls.buttons.values(), *controls.knobs.values()))
    waiting.stop()


def test_a_bookmark_is_kept_in_the_run_and_leads_back(configs, tmp_path):
    from sparselab.learn.bookmarks import bookmarks

    folder = tmp_path / "run"
    shutil.copytree(Live(configs[0]).folder, folder)
    explorer = Explorer(folder)
    explorer.timeline.value = 2
    explorer.bookmarks.toggle()
    explorer.bookmarks.note.value = "here <b>it</b> is"
    explorer.bookmarks.keep()
    assert bookmarks(folder) == [(explorer.moments[2], "here <b>it</b> is")]
    again = Explorer(folder)
    again.timeline.value = 0
    again.bookmarks.kept.children[0].children[0].value = True  # as a click does
    assert again.timeline.value == 2
    assert not Explorer(tmp_path / "nothing").bookmarks.kept.children


def pencil(explorer: Explorer, which: int) -> None:
    """As a click behind a bookmark does."""
    explorer.bookmarks.kept.children[which].children[1].value = True


def test_the_note_of_a_bookmark_can_be_changed_and_a_bookmark_removed(configs, tmp_path):
    from sparselab.learn.bookmarks import add_bookmark, bookmarks

    folder = tmp_path / "run"
    shutil.copytree(Live(configs[0]).folder, folder)
    for step, note in ((8, "two"), (4, "one"), (8, "three")):
        add_bookmark(folder, step, note)
    explorer = Explorer(folder)
    own = explorer.bookmarks
    pencil(explorer, 1)
    assert own.note.value == "two" and explorer.step == 8 and own.entry.layout.display is None and own.erase.layout.display is None
    own.note.value = "second"
    own.keep()
    assert bookmarks(folder) == [(4, "one"), (8, "second"), (8, "three")] and own.entry.layout.display == "none"
    pencil(explorer, 0)
    own.remove()
    assert bookmarks(folder) == [(8, "second"), (8, "three")] and len(own.kept.children) == 2
    own.toggle()  # a new one has no note yet, and nothing to remove
    assert own.note.value == "" and own.erase.layout.display == "none"
    own.keep()
    assert len(bookmarks(folder)) == 3


def test_a_bookmark_that_cannot_be_written_leaves_its_note_open_with_a_sentence(configs, tmp_path):
    from sparselab.learn.bookmarks import Bookmark, add_bookmark, change_bookmark

    folder = tmp_path / "run"
    shutil.copytree(Live(configs[0]).folder, folder)
    add_bookmark(folder, 8, "mine")
    explorer = Explorer(folder)
    own = explorer.bookmarks
    pencil(explorer, 0)
    change_bookmark(folder, Bookmark(8, "mine"), "theirs")  # as another explorer does meanwhile
    own.note.value = "mine again"
    own.keep()
    assert "may have been changed elsewhere" in own.problem.value and own.entry.layout.display is None and own.note.value == "mine again"
    assert "theirs" in own.kept.children[0].children[0].description
    file = folder / "bookmarks.jsonl"
    file.write_bytes(damaged := file.read_bytes().replace(b"theirs", b"thelrs"))
    for ask in (own.keep, own.remove):
        ask()
        assert "is damaged in line 1" in own.problem.value and own.problem.layout.display is None and file.read_bytes() == damaged


@pytest.mark.parametrize("why", ["comes with sparselab", "cannot be written", "There is no run folder"])
def test_bookmarks_of_a_run_that_is_not_written_to_live_in_the_session(configs, tmp_path, monkeypatch, why):
    from sparselab.learn import Given

    folder = tmp_path / "nbs" / "example" / "run" if "comes" in why else tmp_path / "run"
    shutil.copytree(Live(configs[0]).folder, folder)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    monkeypatch.chdir(tmp_path)
    if "written" in why:
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # a superuser may write everywhere
    explorer = Explorer(Given(history=Run(folder).history) if "no run" in why else folder)
    own = explorer.bookmarks
    for note in ("here", "there"):
        explorer.go(8)
        own.toggle()
        assert why in own.where.value and "in this session alone" in own.where.value
        own.note.value = note
        own.keep()
    pencil(explorer, 0)
    own.remove()
    assert [each.children[0].description for each in own.kept.children] == ["step 8: there"]
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before and not (tmp_path / "bookmarks.jsonl").exists()
    if "no run" not in why:
        assert [each.children[0].description for each in Explorer(folder).bookmarks.kept.children] == ["step 8: there"]


WRITER = """
import sys, time
from pathlib import Path
from sparselab.learn.bookmarks import Bookmark, add_bookmark, change_bookmark
folder, name = sys.argv[1:]
(Path(folder).parent / name).touch()
while len(list(Path(folder).parent.glob("writer-*"))) < 2: time.sleep(0.001)
for step in range(30):
    add_bookmark(folder, step, name)
    if step % 3 == 0: change_bookmark(folder, Bookmark(step, name), name + " changed")
"""


def test_two_processes_that_write_bookmarks_of_one_run_lose_none(tmp_path):
    from sparselab.learn.bookmarks import bookmarks

    (folder := tmp_path / "run").mkdir()
    names = ("writer-1", "writer-2")
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(folder), name], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
                                stderr=subprocess.PIPE, text=True) for name in names]
    assert [writer.communicate(timeout=60)[1] for writer in writers] == ["", ""]
    assert sorted(bookmarks(folder)) == sorted((step, name + " changed" * (step % 3 == 0)) for step in range(30) for name in names)


def shown_bookmarks(explorer: Explorer) -> list[tuple[str, bool]]:
    """What the buttons say, and whether they lead somewhere."""
    return [(each.children[0].description, not each.children[0].disabled) for each in explorer.bookmarks.kept.children]


def test_bookmarks_go_with_their_training(configs):
    """One that goes on takes them along; one that begins anew begins without, and those of the earlier one stay with it."""
    from sparselab.learn.bookmarks import bookmarks

    live = Live(Config(**SMALL, epochs=2, seed=24, runs_dir=configs[0].runs_dir)).start()
    until(lambda: live.snapshot.status == "finished")
    explorer, first = Explorer(live), live.folder
    explorer.go(8)
    explorer.bookmarks.toggle()
    explorer.bookmarks.note.value = "here"
    explorer.go(4)  # as a training does that is followed
    explorer.bookmarks.keep()
    assert shown_bookmarks(explorer) == [("step 8: here", True)]
    live.extend(1)
    until(lambda: live.snapshot.status == "finished")
    assert live.folder != first and bookmarks(live.folder) == bookmarks(first) == [(8, "here")]
    until(lambda: not explorer.bookmarks.problem.value)
    pencil(explorer, 0)
    explorer.bookmarks.note.value = "there"
    explorer.bookmarks.keep()
    assert bookmarks(live.folder) == [(8, "there")] and bookmarks(first) == [(8, "here")]
    explorer.go(live.moments[-1])
    explorer.bookmarks.toggle()
    earlier = live.folder
    live.anew(epochs=2).pause()
    until(lambda: live.snapshot.status == "paused")
    assert live.snapshot.step < explorer.bookmarks.step
    until(lambda: shown_bookmarks(explorer) == [])
    explorer.bookmarks.keep()
    assert "has begun anew and has not reached step" in explorer.bookmarks.problem.value and bookmarks(live.folder) == []
    assert live.folder == first and bookmarks(first.with_name(f"{first.name}.old-1")) == [(8, "here")] and bookmarks(earlier) == [(8, "there")]
    live.stop()


def test_a_bookmark_waits_until_the_training_has_reached_its_step(configs):
    """As of a training that was killed, and continues from a checkpoint before it."""
    from sparselab.learn.bookmarks import add_bookmark

    live = Live(Config(**SMALL, epochs=2, seed=25, runs_dir=configs[0].runs_dir)).step()
    until(lambda: live.snapshot.status == "paused")
    add_bookmark(live.folder, 4, "reached")
    add_bookmark(live.folder, 16, "ahead")
    explorer = Explorer(live)
    assert shown_bookmarks(explorer) == [("step 4: reached", True), ("step 16: ahead", False)]
    explorer.go(0)
    pencil(explorer, 1)
    assert explorer.step == 0 and explorer.bookmarks.note.value == "ahead"
    live.resume()
    until(lambda: shown_bookmarks(explorer) == [("step 4: reached", True), ("step 16: ahead", True)])
    until(lambda: live.snapshot.status == "finished")


def test_two_runs_are_named_once_above_their_panels(pair, configs):
    def texts(widget: Widget) -> list[str]:
        return [each for child in getattr(widget, "children", ()) for each in texts(child)] + ([widget.value] if isinstance(widget, HTML) else [])

    live = Live(configs[0])
    for explorer in (pair, Explorer((live, Run(Live(configs[1]).folder)))):
        for side, column in zip(explorer.sides, explorer.children[2].children[1].children, strict=True):
            def above(column=column) -> list[str]:
                return texts(column.children[0])
            until(lambda above=above: any("finished." in text for text in above()))
            assert sum(text.count(side.source.name) for text in above()) == 1
    side, first = explorer.sides[0], live.name
    live.extend(1)
    until(lambda: live.snapshot.status == "finished" and f"<b>{live.name}</b>" == side.name.value)
    assert live.name != first and side.mask.name.startswith(live.name) and side.block("Difference").name.startswith(live.name)


def test_what_a_training_has_recorded_is_shown_when_it_stops(configs, monkeypatch):
    """Panels of a running training are read only now and then; the last epoch must not be left out."""
    import importlib

    monkeypatch.setattr(importlib.import_module("sparselab.view.explorer.explorer"), "RARELY", 1e9)  # as if it ran on for long
    live = Live(Config(**SMALL, epochs=400, runs_dir=configs[0].runs_dir))
    explorer = Explorer(live)
    live.start()
    until(lambda: len(live.snapshot.metrics) > 1)
    live.stop()
    neurons = explorer.sides[0].neurons
    until(lambda: neurons.recorded is not None and neurons.recorded.steps == live.neurons.steps, 10)


def test_the_layers_are_those_of_the_mask_while_a_training_runs(configs, monkeypatch):
    """Also of a finished run beside it, on the same timeline."""
    import importlib

    module = importlib.import_module("sparselab.view.explorer.explorer")
    monkeypatch.setattr(module, "RARELY", 1e9)  # no panel is read, and none settles, before the training stops
    monkeypatch.setattr(module, "CALM", 600)
    live = Live(Config(**SMALL, epochs=400, seed=11, runs_dir=configs[0].runs_dir))
    explorer = Explorer((live, Run(Live(configs[0]).folder)))
    live.start()
    seen = set()

    def step_of(note: str) -> str:
        return note.partition(":")[0]

    def alike() -> bool:
        with explorer._lock:
            for side in explorer.sides:
                layers = side.block("Layers").panel
                if side.mask.raster is None or layers is None or explorer.step < 4:
                    return False
                assert step_of(layers.figure.layout.meta["note"]) == step_of(side.mask.raster.note)
            seen.add(explorer.step)
        return len(seen) > 4

    until(alike)
    live.stop()


def test_a_finished_run_goes_on_from_its_last_checkpoint_in_a_folder_of_its_own(configs):
    live = Live(configs[0])
    first = Run(live.folder)
    explorer = Explorer(live)
    controls = next(child for child in explorer.children[2].children if hasattr(child, "rested"))
    controls.more.value = 2
    controls.extend()
    until(lambda: live.snapshot.status == "finished" and not live.rested)
    longer = Run(live.folder)
    assert (longer.continues, first.continues) == (first.name, None) and longer.path != first.path and controls.refusal.value == ""
    assert longer.metrics[:2] == first.metrics and len(longer.metrics) == 4 and Run(first.path).finished
    assert longer.history.updates[:len(first.history.updates)] == first.history.updates and longer.moments[-1] > first.moments[-1]
    shutil.rmtree(longer.path / "checkpoint")
    with pytest.raises(ValueError, match="has no checkpoint"):
        live.extend(1)


def test_masks_are_those_of_the_training_that_began_anew(configs):
    """With another seed the same layer has other masks at the same steps: what was walked before must not be shown."""
    live = Live(Config(**SMALL, epochs=2, seed=5, runs_dir=configs[0].runs_dir)).start()
    until(lambda: live.snapshot.status == "finished")
    explorer = Explorer(live)
    explorer.go(8)
    live.anew(seed=6)
    until(lambda: live.snapshot.status == "finished" and live.source.seed == 6)
    mask = explorer.sides[0].mask
    until(lambda: explorer.sides[0].source.history is live.history)
    explorer.go(4)
    explorer.go(8)
    assert (mask.cursor.mask == np.asarray(live.history.mask(mask.cursor.record, mask.layer.value))).all()


def test_a_training_says_that_it_starts_until_there_is_something_to_see(configs, monkeypatch):
    from threading import Event

    from sparselab.learn import live as module

    read, train_now = Event(), module.train
    monkeypatch.setattr(module, "train", lambda *given: read.wait(60) and train_now(*given))  # as if the data took long
    live = Live(Config(**SMALL, epochs=1, seed=7, runs_dir=configs[0].runs_dir)).start()
    side = Explorer(live).sides[0]
    assert "starting" in live.headline and "0 of 0" not in live.headline
    assert all("has not started" in side.block(title).problem.value for title in ("Mask", "Neurons", "Margins"))
    read.set()
    until(lambda: live.snapshot.status == "finished")
    assert "step 11 of 11" in live.headline


def test_two_runs_share_the_y_axes_of_their_panels(pair):
    one, two = (side.block("Updates") for side in pair.sides)
    for block in (one, two):
        block.settle(8)
    ranges = [{name: axis["range"] for name, axis in json.loads(block.content.figure)["layout"].items() if name.startswith("yaxis")}
              for block in (one, two)]
    assert ranges[0] == ranges[1] and len(ranges[0]) > 2
    for block, found in zip((one, two), ranges, strict=True):
        for trace in block.panel.figure.data:
            low, high = found["yaxis" + (trace.yaxis or "y")[1:]]
            assert low <= min(trace.y) and max(trace.y) <= high


def test_a_panel_is_drawn_once_for_the_moment_of_opening_and_again_for_another(configs, monkeypatch):
    drawn, draw = Counter(), Block.draw
    monkeypatch.setattr(Block, "draw", lambda block, make: (drawn.update([(id(block), block.title)]), draw(block, make))[1])
    explorer = Explorer(Live(configs[0]).folder)
    blocks, begin = explorer.sides[0].blocks, explorer.step
    explorer._settle()  # the timeline rests where it began
    count = {block.title: drawn[id(block), block.title] for block in blocks}
    assert all(count[title] == 1 for title in ("Metrics", "Updates", "Layers", "Stability", "Filters", "Margins")), count
    explorer.go(explorer.moments[0])
    explorer._settle()
    assert begin != explorer.step == 0 == explorer.metrics.drawn and drawn[id(explorer.metrics), "Metrics"] == 2
    assert f"step={begin}" not in explorer.sides[0].block("Updates").code.value


def test_what_a_key_press_sends_begins_with_the_mask_and_ends_with_the_slider(configs, monkeypatch):
    """The page draws as it is told: a slider that moves first takes a frame of its own, and the mask comes a frame later."""
    monkeypatch.setattr("sparselab.view.explorer.explorer.CALM", 600)  # what is drawn at rest comes later
    explorer = Explorer(Live(configs[0]).folder)
    explorer.go(explorer.moments[0])
    canvas, sent = explorer.sides[0].mask.content, []

    def send(widget, message, buffers=None):
        if threading.current_thread() is threading.main_thread():  # the explorers of earlier tests still draw, in threads of their own
            sent.append((widget, message["method"], set(message["state"])))

    monkeypatch.setattr(Widget, "_send", send)
    for count, key in enumerate(("ArrowRight", "ArrowRight", "ArrowLeft", "End"), 1):
        sent.clear()
        canvas.set_state({"presses": [count, key]})
        told = [(widget, state) for widget, _, state in sent]
        assert {method for _, method, _ in sent} == {"update"}, "what the browser wrote is not repeated to it"
        assert told[0][0] is canvas and "version" in told[0][1], "the mask is first"
        assert told[-1][0] is explorer.timeline
        assert len(told) == len({id(widget) for widget, _ in told}) <= 8, "each widget is told once"
        assert explorer.sides[0].neurons.detail not in [widget for widget, _ in told], "it is out of sight"


def test_paths_count_from_the_root_of_the_repository(monkeypatch):
    root = Path(__file__).resolve().parents[1]
    monkeypatch.chdir(root / "nbs")
    assert at_root() == Path.cwd() == root
    for name in ("train", "explore", "compare", "index"):
        assert "at_root()" in (root / "nbs" / f"{name}.ipynb").read_text()


def in_a_process(folder: Path, code: str, **files: str) -> str:
    """What a new process prints of `code`, with these packages found before all others."""
    for name, source in files.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(source)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))})
    return done.stdout + done.stderr


def test_panels_are_drawn_while_pandas_is_being_imported(tmp_path):
    """plotly takes pandas from where it lies, half imported or not, and the thread that draws when the timeline rests ended with an exception."""
    code = "from sparselab.view import Explorer\nExplorer('nbs/example/sparsevlr')\nimport pandas, time\ntime.sleep(2)\nprint('end')"
    told = in_a_process(tmp_path, code, pandas="import time\ntime.sleep(1.5)\nclass Series: pass\nclass Index: pass\nclass DataFrame: pass")
    assert told.endswith("end\n") and "Exception in thread" not in told, told


@pytest.mark.parametrize("package", ["ipywidgets", "anywidget"])
def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, package):
    told = in_a_process(tmp_path, "from sparselab.view import Explorer", **{package: f"raise ModuleNotFoundError('none', name='{package}')"})
    assert f"sparselab.view.Explorer needs {package}, which is not installed: pip install 'sparselab[lab]'" in told


def test_what_was_drawn_of_an_earlier_training_says_nothing_of_the_one_that_begins(configs, monkeypatch):
    """Notes, legends and headings go with the figure that they are of; each panel has a sentence until it has something to draw."""
    from threading import Event

    from sparselab.learn import live as module

    live = Live(Config(**SMALL, epochs=2, seed=21, runs_dir=configs[0].runs_dir)).start()
    until(lambda: live.snapshot.status == "finished")
    explorer = Explorer(live)
    side = explorer.sides[0]
    side.neuron_clicked(side.neurons.layer.value, 2)
    explorer.go(3)
    assert "measured at" in side.neurons.heading.value and "clean" in explorer.metrics.heading.value
    begin, train_now = Event(), module.train
    monkeypatch.setattr(module, "train", lambda *given: begin.wait(60) and train_now(*given))  # as if the data took long
    live.anew(seed=22)
    until(lambda: all(block.problem.value for block in side.blocks))
    assert [each for block in side.blocks for each in block.told if each.layout.display != "none"] == []
    assert not [block.title for block in side.blocks if "step" in block.heading.value.partition("</b>")[0]]
    assert "clean" not in explorer.metrics.heading.value and side.neurons.detail.layout.display == "none"
    begin.set()
    until(lambda: live.snapshot.status == "finished")
    until(lambda: not any(block.problem.value for block in side.blocks))
    until(lambda: not [each for block in side.blocks for each in block.told if each.layout.display])


def test_before_the_first_epoch_ends_no_panel_tells_to_train_again(configs):
    live = Live(Config(**SMALL, epochs=2, seed=23, runs_dir=configs[0].runs_dir)).step()
    until(lambda: live.snapshot.status == "paused")
    assert not live.metrics
    side = Explorer(live).sides[0]
    said = {block.title: block.problem.value for block in side.blocks if block.problem.value}
    assert set(said) == {"Metrics", "Neurons", "Stability", "Margins"} and "when training has ended" in said.pop("Margins")
    assert all("No epoch has ended yet" in sentence for sentence in said.values())
    assert all("No epoch has ended yet" in attempt(lambda name=name: getattr(live, name))[1] for name in ("neurons", "values"))
    live.stop()


def test_a_training_that_runs_is_not_held_up_by_figures_out_of_sight(configs):
    """They are drawn when they come into sight, and all of them when it pauses."""
    live = Live(Config(**SMALL, epochs=400, seed=26, runs_dir=configs[0].runs_dir)).start()
    explorer = Explorer(live)
    side = explorer.sides[0]
    until(lambda: all(side.block(title).panel for title in ("Layers", "Updates", "Stability", "Filters")))
    below = [side.block(title) for title in ("Layers", "Updates", "Stability", "Filters")]
    for block in below:
        block.content.hidden = True  # as the browser says
    until(lambda: all(block.waits for block in below))
    with explorer._lock:
        drawn = [block.panel for block in below]
    until(lambda reached=live.snapshot.step: live.snapshot.step > reached + 200)
    assert [block.panel for block in below] == drawn and {block.note.value for block in below} == {WAITING}
    with explorer._lock:
        below[0].content.hidden = False
        assert below[0].panel is not drawn[0] and below[0].drawn == explorer.step and "step" in below[0].note.value
    explorer.metrics.content.hidden = True
    until(lambda: WAITING in explorer.metrics.heading.value)
    with explorer._lock:
        explorer.metrics.content.hidden = False
        assert "clean" in explorer.metrics.heading.value and not explorer.metrics.note.value
    live.pause()
    until(lambda: live.snapshot.status == "paused")
    until(lambda: all(block.panel is not before for block, before in zip(below, drawn, strict=True)))
    assert not any(block.waits for block in below)
    live.stop()


def test_the_tip_of_a_mouse_that_rests_tells_of_the_moment_on_display(configs):
    explorer = Explorer(Live(configs[0]).folder)
    mask, tips = explorer.sides[0].mask, set()
    name, history = mask.layer.value, mask.source.history
    weight = int(np.flatnonzero(np.asarray(history.mask(0, name)) & ~np.asarray(history.mask(len(history.steps) - 1, name)))[0])
    explorer.go(0)
    mask.content.hover = list(divmod(weight, history.shapes[name][1]))
    for moment in range(len(explorer.moments)):
        explorer.timeline.value = moment
        assert mask.content.tip == mask.describe(*mask.content.hover)
        tips.add(mask.content.tip.split(", value")[0].partition(": ")[2])
    assert "dropped now" in tips and "off" in tips and "on since record 0, for 0 updates" in tips


def test_the_first_neurons_that_a_training_records_leave_the_chosen_layer(configs):
    live = Live(Config(**SMALL, epochs=2, seed=27, runs_dir=configs[0].runs_dir)).step()
    until(lambda: live.snapshot.status == "paused")
    side = Explorer(live).sides[0]
    assert not side.neurons.layer.options, "no epoch has ended"
    shown = []
    side.mask.layer.value = "fc2.weight"
    side.mask.layer.observe(lambda change: shown.append(change["new"]), "value")
    live.resume()
    until(lambda: live.snapshot.status == "finished")
    until(lambda: side.neurons.links.get(side.neurons.layer.value) == "fc2.weight")
    assert side.mask.layer.value == "fc2.weight" and shown == []


def test_a_training_that_fails_can_begin_anew(configs):
    """One that diverged just before a checkpoint fails from there again, whatever is changed."""
    from sparselab.view.explorer.controls import LiveControls

    live = Live(Config(**SMALL, epochs=2, seed=28, runs_dir=configs[0].runs_dir)).step()
    until(lambda: live.snapshot.status == "paused")
    controls = LiveControls(live)
    until(lambda: "paused" in controls.state.value)
    assert controls.rested.layout.display == "none"
    live.set(lr=1e30)
    live.resume()
    until(lambda: live.snapshot.status == "failed")
    until(lambda: "failed" in controls.state.value)
    assert "diverged" in controls.state.value
    assert [each for each in controls.rested.children if each.layout.display is None] == [controls.anew] and controls.rested.layout.display is None
    assert not any(button.disabled for button in controls.buttons.values())
    controls.anew.value = True
    until(lambda: live.snapshot.status == "finished")
    assert live.folder.with_name(f"{live.folder.name}.old-1").is_dir() and controls.refusal.value == ""
    until(lambda: all(each.layout.display is None for each in (controls.rested, *controls.rested.children)))


def test_enter_keeps_a_bookmark(configs, tmp_path):
    from sparselab.learn.bookmarks import bookmarks

    folder = tmp_path / "run"
    shutil.copytree(Live(configs[0]).folder, folder)
    explorer = Explorer(folder)
    explorer.bookmarks.toggle()
    explorer.bookmarks.note.value = "here"
    explorer.bookmarks.note._handle_custom_msg({"event": "submit"}, [])  # as the browser says
    assert bookmarks(folder) == [(explorer.step, "here")] and explorer.bookmarks.entry.layout.display == "none"


def test_what_is_chosen_in_the_run_picker_stays_chosen_as_far_as_it_is_offered(configs, tmp_path):
    from sparselab.view import RunBrowser

    for config in configs:
        shutil.copytree(Live(config).folder, tmp_path / Live(config).folder.name)
    browser = RunBrowser(tmp_path)
    choice, inside = browser.picker.choice, []
    choice.observe(lambda change: inside.append(all(i < len(change["new"]) for i in choice.index)), "_options_labels")
    choice.index = (0, 1)
    browser.figure.value = "stability by layer"
    assert choice.index == (0, 1)
    browser.filters["seed"].value = (1,)
    assert [run.config.seed for run in choice.value] == [1] and len(choice.options) == 1
    assert inside and all(inside), "a browser that is told of fewer runs still looks for those that were chosen"
    browser.filters["seed"].value = (0,)
    assert choice.index == ()


def test_metrics_tell_that_pgd_was_attacked_on_test_images(configs):
    """All else is of validation images: pgd below verified, side by side, would be a broken proof."""
    run = Run(Live(configs[0]).folder)
    note, share = metrics_panel(run).figure.layout.meta["note"], run.summary["accuracy"]["pgd"]
    assert f"pgd {share:.1%} on test images, verified {run.metrics[-1]['verified']:.1%}, unstable" in note
    own = metrics_panel(Given(metrics=[{"step": 1, "pgd": 0.5}], summary={"accuracy": {"pgd": 0.7}})).figure.layout.meta["note"]
    assert own == "step 1: pgd 50.0%", "a training that attacks in every epoch"
