"""A run that is killed at its k-th change of the disk, for every k, resumes to the same bits; one flipped bit in any file is noticed."""
import json
import os
import shutil
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from crashes import dying

from sparselab.learn.changes import Changes
from sparselab.learn.config import Config
from sparselab.learn.experiments import train
from sparselab.learn.files import append_row, read_rows, together, write_file
from sparselab.learn.runs import Run

SHORT = dict(model="mlp", model_options={"widths": [6]}, epochs=2, eps=0.02, train_samples=40, test_samples=4, batch_size=20, device="cpu",
             method="set", sparsity=0.5, method_options={"update_every": 1}, objective="natural")


def files_of(run: Run) -> dict[str, bytes]:
    """Every file of a run by name. What it took in seconds and where it lies are no part of what must be the same."""
    found = {}
    for path in sorted(run.path.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            name = path.relative_to(run.path).as_posix()
            found[name] = path.read_bytes()
            if path.suffix == ".json":
                value = json.loads(found[name])
                for key in ("blake2b", "seconds", "runs_dir", "config"):
                    value.pop(key, None)
                found[name] = json.dumps(value).encode()
    return {name: data for name, data in found.items() if "checkpoint/" not in name}  # they hold the seconds


def killed_at_changes(tmp_path: Path, configs: list[Config]) -> int:
    """Kill a run at every change of the disk, one of `configs` after the other, which change it equally often; resumed, it has the same bits."""
    def place(config: Config, name: str) -> Config:
        return replace(config, runs_dir=str(tmp_path / name))

    whole = [place(config, f"whole-{turn}") for turn, config in enumerate(configs)]
    count, = {dying(lambda config=config: train(config, []), tmp_path, None) for config in whole}
    expected = [files_of(Run(Path(config.runs_dir) / config.run_id)) for config in whole]
    for at in range(1, count + 1):
        turn = at % len(configs)
        aside = place(configs[turn], str(at))
        assert dying(lambda config=aside: train(config, []), tmp_path, at) == -1
        run = train(aside, [])
        assert files_of(run) == expected[turn] and not run.damage, f"killed at change {at} of {count}: {configs[turn].kernels}"
        shutil.rmtree(aside.runs_dir)
    return count


KERNELS = [{"kernels": "dense"}, {"kernels": "sparse"}, {"kernels": "auto", "sparsity": 0.9, "method": "rigl"}]


def test_killed_at_every_change_of_the_disk_a_run_resumes_to_the_same_bits(tmp_path):
    """The kernels take turns: what is written when is the same for all."""
    assert killed_at_changes(tmp_path, [Config(**SHORT | options) for options in KERNELS]) > 50


@pytest.mark.slow
@pytest.mark.parametrize("options", KERNELS)
def test_killed_at_every_change_under_each_of_the_kernels(tmp_path, options):
    assert killed_at_changes(tmp_path, [Config(**SHORT | options)]) > 50


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"method": "jackpots", "method_options": {}}, {"method": "acdc", "epochs": 4, "method_options": {}},
                                     {"method": "imp", "method_options": {"rate": 0.5, "rewind_epochs": 1}},
                                     {"method": "sparsevlr", "objective": "crown_ibp"}])
def test_killed_at_every_change_of_longer_runs(tmp_path, options):
    killed_at_changes(tmp_path, [Config(**SHORT | options)])


@pytest.mark.slow
def test_killed_at_every_change_while_it_resumes(tmp_path):
    config = Config(**SHORT, runs_dir=str(tmp_path / "half"))
    count = dying(lambda: train(config, []), tmp_path, None)
    expected = files_of(train(config, []))
    shutil.rmtree(config.runs_dir)
    dying(lambda: train(config, []), tmp_path, count // 2)
    shutil.copytree(config.runs_dir, tmp_path / "kept")
    at, died = 0, True
    while died:
        at += 1
        died = dying(lambda: train(config, []), tmp_path, at) == -1
        assert files_of(train(config, [])) == expected, f"killed at change {at} of the resumption"
        shutil.rmtree(config.runs_dir)
        shutil.copytree(tmp_path / "kept", config.runs_dir)
    assert at > 20


def test_a_change_that_was_being_written_down_is_the_last_one_lost(tmp_path):
    """events.jsonl grows at any moment; a killed writer leaves half a line, and the next one writes in its place."""
    log = tmp_path / "events.jsonl"
    append_row(log, {"step": 1, "name": "lr", "new": 0.1})
    count = dying(lambda: append_row(log, {"step": 2, "name": "lr", "new": 0.2}), tmp_path, None)
    before = log.read_bytes()
    for at in range(1, count + 1):
        dying(lambda: append_row(log, {"step": 3, "name": "lr", "new": 0.3}), tmp_path, at)
        append_row(log, {"step": 4, "name": "lr", "new": 0.4})
        assert [row["step"] for row in read_rows(log)] in ([1, 2, 4], [1, 2, 3, 4]), at
        log.write_bytes(before)
    assert count >= 3 and Changes(tmp_path).file == log


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    """A run of two trainings with a change on the way, so that it has a file of every kind."""
    options = {"method": "dst_ensemble", "method_options": {"members": 2, "update_every": 1}}
    config = Config(**SHORT | options, runs_dir=str(tmp_path_factory.mktemp("finished")))
    run = train(config, [])
    append_row(run.path / "events.jsonl", {"step": 2, "name": "lr", "old": 0.1, "new": 0.2})
    assert not run.damage
    return run


def bytes_of(data: bytes) -> list[int]:
    """Places to flip: the ends, around the checksum, and some in between."""
    return sorted({0, 1, 9, 20, 40, len(data) // 3, len(data) // 2, len(data) - 2, len(data) - 1} & set(range(len(data))))


def test_one_flipped_bit_in_any_file_is_noticed_and_the_file_is_named(finished):
    files = [path for path in sorted(finished.path.rglob("*")) if path.is_file() and not path.name.startswith(".") and path.stat().st_size]
    assert {path.name for path in files} >= {"config.json", "summary.json", "metrics.jsonl", "stability.jsonl", "events.jsonl", "start.json",
                                             "start.bin", "updates.jsonl", "updates.bin", "model.safetensors", "margins.safetensors"}
    for path in files:
        data = path.read_bytes()
        for place in bytes_of(data):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1:])
            said = Run(finished.path).damage
            named = path.name if path.parent.name != "masks" else "masks"
            assert any(named in sentence for sentence in said), (path, place, said)
        path.write_bytes(data)
    assert not Run(finished.path).damage


def test_a_damaged_file_is_never_read_as_if_it_were_whole(finished):
    readers = {"config.json": lambda run: run.config, "summary.json": lambda run: run.summary, "metrics.jsonl": lambda run: run.metrics,
               "stability.jsonl": lambda run: run.stability, "model.safetensors": lambda run: run.weights,
               "margins.safetensors": lambda run: run.margins, "masks/start.bin": lambda run: run.history,
               "masks/start.json": lambda run: run.history}
    for name, read in readers.items():
        path = finished.path / name
        data = path.read_bytes()
        path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
        with pytest.raises(ValueError, match="damaged|cannot be read|does not hold a readable"):
            read(Run(finished.path))
        path.write_bytes(data)


def test_one_flipped_bit_in_a_checkpoint_costs_an_epoch_not_the_bits(tmp_path):
    config = Config(**SHORT, runs_dir=str(tmp_path / "runs"))
    run = train(config, [])
    expected = files_of(run)
    for name in ("summary.json", "model.safetensors"):
        (run.path / name).unlink()
    older, newest = sorted((run.path / "checkpoint").iterdir())
    data = newest.read_bytes()
    newest.write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    with pytest.warns(UserWarning, match=f"{newest.name} is not a readable checkpoint .* checkpoint before it is used"):
        assert files_of(train(config, [])) == expected


def test_damaged_masks_are_mended_from_the_checkpoint_and_a_damaged_log_is_a_sentence(tmp_path):
    config = Config(**SHORT, runs_dir=str(tmp_path / "runs"))
    run = train(config, [])
    expected = files_of(run)
    for name in ("start.bin", "updates.bin", "updates.jsonl"):
        (run.path / "summary.json").unlink()
        path = run.path / "masks" / name
        data = path.read_bytes()
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        assert files_of(train(config, [])) == expected, name
    (run.path / "summary.json").unlink()
    data = (run.path / "metrics.jsonl").read_bytes()
    (run.path / "metrics.jsonl").write_bytes(data[:70] + bytes([data[70] ^ 1]) + data[71:])
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"metrics.jsonl has 0 of the 2 epochs .*resume=False"):
        train(config, [])


def test_files_that_are_written_together_wait_for_the_disk_at_the_same_time(tmp_path, monkeypatch):
    waiting = threading.Barrier(3, timeout=30)  # raises unless three wait at once
    monkeypatch.setattr(os, "fsync", lambda file: waiting.wait())
    with together():
        append_row(tmp_path / "log", {"step": 1})
        for name in "ab":
            write_file(tmp_path / name, name.encode())
        assert sorted(path.name for path in tmp_path.iterdir()) == [".a.tmp", ".b.tmp", "log"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "log"] and (tmp_path / "b").read_bytes() == b"b"
    assert read_rows(tmp_path / "log") == [{"step": 1}]


@pytest.mark.parametrize("part", ["work", "disk"])
def test_where_one_of_the_files_fails_none_is_there(tmp_path, monkeypatch, part):
    def refuse(file):
        raise OSError(28, "No space left on device")

    write_file(tmp_path / "a", b"before")
    monkeypatch.setattr(os, "fsync", refuse if part == "disk" else lambda file: None)
    with pytest.raises(OSError, match="b cannot be written .No space left" if part == "disk" else "unplugged"):
        with together():
            write_file(tmp_path / "b", b"new")
            if part == "work":
                raise OSError("unplugged")
    write = pytest.raises(OSError) if part == "disk" else together()
    with write:
        write_file(tmp_path / "a", b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["a"], "what is written afterwards waits by itself"
    assert (tmp_path / "a").read_bytes() == (b"before" if part == "disk" else b"after")


def test_the_files_of_an_epoch_wait_for_the_disk_together(tmp_path, monkeypatch):
    alone, main = set(), threading.current_thread()

    def note(file):
        if threading.current_thread() is main:
            alone.add(Path(os.readlink(f"/proc/self/fd/{file}")).name)

    monkeypatch.setattr(os, "fsync", note)
    run = train(Config(**SHORT, runs_dir=str(tmp_path)), [])
    assert len(list((run.path / "checkpoint").iterdir())) == 2 and len(run.metrics) == 2
    assert ".config.json.tmp" in alone and not [name for name in alone if "step-" in name or name in ("metrics.jsonl", "stability.jsonl")]
