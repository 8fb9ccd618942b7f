"""Data-parallel training by real torchrun processes (gloo): gradients, masks on every rank, a kill, and refusals."""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sparselab.learn import Config, Run, train
from sparselab.learn.assembly import make_learner
from sparselab.scale import ParallelLearner, expand, train_parallel
from sparselab.scale.ranks import check_equal, last_words, main, read_config, share

CONFIG = Config(method="rigl", model="mlp", sparsity=0.9, epochs=3, eps=0.02, method_options={"update_every": 4}, train_samples=400, test_samples=50,
                batch_size=75)
OFTEN = {"update_every": 4}
TOGETHER = {"rigl": OFTEN, "set": OFTEN, "gse": OFTEN, "sparsevlr": OFTEN, "snip": {}, "acdc": {}}

PROCESS = '''
import json, os, sys
from dataclasses import replace
from pathlib import Path
import torch
import torch.distributed as dist
from sparselab.learn import Callback, Config
from sparselab.learn.assembly import make_learner
from sparselab.scale.ranks import ParallelLearner, join_processes, train_rank

class Die(Callback):
    def after_epoch(self, learner):
        if learner.epoch == 2:
            os._exit(9)  # as a kill does

place, methods = Path(sys.argv[1]), json.loads(sys.argv[2])
config = Config.read(json.loads((place / "config.json").read_text()))
join_processes()
rank = dist.get_rank()
learner = make_learner(config, kind=ParallelLearner)
x, y = next(iter(learner.data.train.batches(75, seed=0, epoch=0)))
loss = learner.backward(x, y, 1.0)
torch.save({"loss": loss} | {name: p.grad for name, p in learner.model.named_parameters()}, place / f"gradients-{rank}.pt")
for method, options in methods.items():
    small = {"model": "cnn7_bn", "model_options": {"width": 2, "hidden": [8]}, "train_samples": 150} if method == "snip" else {}
    learner = make_learner(replace(config, method=method, method_options=options, epochs=1, **small), kind=ParallelLearner)
    learner.fit()
    torch.save((learner.model.state_dict(), dict(learner.sparsifier.masks), len(learner.sparsifier.history.steps)), place / f"{method}-{rank}.pt")
train_rank(replace(config, runs_dir=str(place / "whole")), ())
train_rank(replace(config, runs_dir=str(place / "killed")), (Die(),))
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What two processes have left: gradients of one batch, six methods, a whole run and one that was killed after its second epoch."""
    place = tmp_path_factory.mktemp("ranks")
    (place / "config.json").write_text(json.dumps(asdict(CONFIG)))
    (place / "process.py").write_text(PROCESS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = subprocess.run([*torchrun, str(place / "process.py"), str(place), json.dumps(TOGETHER)],
                           capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert (place / "whole").exists() and "exitcode  : 9" in found.stderr, found.stderr[-3000:]
    return place


def test_the_gradients_are_those_of_the_whole_batch(place):
    learner = make_learner(CONFIG)
    x, y = next(iter(learner.data.train.batches(75, seed=0, epoch=0)))
    loss = learner.objective(learner.model, x, y, 1.0)
    loss.backward()
    found = [torch.load(place / f"gradients-{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    torch.testing.assert_close(found[0].pop("loss"), loss.detach(), atol=1e-6, rtol=1e-5)
    for name, p in learner.model.named_parameters():
        torch.testing.assert_close(found[0][name], p.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", TOGETHER)
def test_masks_and_weights_are_the_same_on_every_rank(place, method):
    found = [torch.load(place / f"{method}-{rank}.pt", weights_only=True) for rank in range(2)]
    (weights, masks, records), (others, other_masks, other_records) = found
    assert records == other_records > (method not in ("snip", "acdc"))
    assert all(torch.equal(mask, other_masks[name]) for name, mask in masks.items())
    differ = [name for name, value in weights.items() if not torch.equal(value, others[name])]
    assert not differ


def test_a_killed_training_continues_to_the_same_bits(place, monkeypatch):
    killed = replace(CONFIG, ranks=2, runs_dir=str(place / "killed"))
    folder = place / "killed" / killed.run_id
    assert not (folder / "summary.json").exists() and (folder / "checkpoint").exists()
    run = train_parallel(killed)
    whole = place / "whole" / killed.run_id
    for name in ("model.safetensors", "margins.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert all(torch.equal(run.history.mask(-1, name), Run(whole).history.mask(-1, name)) for name in run.history.names)
    assert run.summary["nnz"] == json.loads((whole / "summary.json").read_text())["nnz"] and len(run.metrics) == 3
    alone = train(replace(CONFIG, kernels="dense", runs_dir=str(place / "alone")), ())
    assert abs(alone.summary["accuracy"]["clean"] - run.summary["accuracy"]["clean"]) <= 0.1
    monkeypatch.setattr(subprocess, "Popen", None)
    for call in (train_parallel, train):
        assert call(killed).path == run.path  # it has finished: no process is started


def test_the_run_of_one_process_is_not_that_of_two(place, tmp_path):
    """Their bits differ, so neither may be returned, or continued, as the other."""
    shutil.copytree(place / "whole", tmp_path / "runs")
    two, one = (replace(CONFIG, ranks=ranks, runs_dir=str(tmp_path / "runs")) for ranks in (2, 1))
    assert Run(tmp_path / "runs" / two.run_id).of(two).config.ranks == 2
    assert one.run_id == replace(CONFIG, ranks=1).run_id == CONFIG.run_id not in [path.name for path in (tmp_path / "runs").iterdir()]
    assert len({replace(CONFIG, ranks=ranks).run_id for ranks in (1, 2, 3)}) == 3
    with pytest.raises(ValueError, match="begun with ranks 2, not 1"):
        Run(tmp_path / "runs" / two.run_id).of(one)
    assert train_parallel(one).name == CONFIG.run_id


def test_one_process_does_not_train_what_is_of_several(tmp_path):
    config = replace(CONFIG, ranks=2, runs_dir=str(tmp_path))
    for method in ("rigl", "imp"):
        with pytest.raises(ValueError, match=r"ranks is 2, and this is one process\. torchrun --nproc-per-node 2"):
            train(replace(config, method=method, method_options={}), ())
    with pytest.raises(ValueError, match="ranks is 2, and this is one process"):
        expand(config, {"seed": [0, 1]})
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_with_as_many_processes_as_before(tmp_path, monkeypatch):
    process = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    monkeypatch.setattr(os, "environ", os.environ | process)
    config = replace(CONFIG, ranks=2, runs_dir=str(tmp_path / "runs"))
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    with pytest.raises(SystemExit, match="the configuration of a run of 2 processes, and there are 1"):
        main([str(tmp_path / "config.json"), "--problem", str(tmp_path / "problem.json")])
    dist.destroy_process_group()
    kind, sentence = json.loads((tmp_path / "problem.json").read_text())
    assert kind == "ValueError" and "start as many" in sentence and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"method": "imp"}, "imp is several trainings"), ({"kernels": "sparse"}, 'kernels="sparse" trains'), ({"method": "rigle"}, "Did you mean 'rigl'"),
    ({"sparsity": 0.5, "method": "dense"}, "dense")])
def test_what_several_processes_cannot_train_is_refused_before_they_start(changes, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        train_parallel(replace(CONFIG, ranks=2, runs_dir=str(tmp_path), **changes))
    assert not list(tmp_path.iterdir())


def test_words_of_a_configuration(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(asdict(CONFIG) | dict.fromkeys(("fingerprint", "model_fingerprint", "continues", "blake2b"), "x")))
    assert read_config([str(file), "seed=3", "eps=2/255"]) == replace(CONFIG, seed=3, eps=2 / 255)
    with pytest.raises(ValueError, match="neither name=value nor a file"):
        read_config(["digits"])
    with pytest.raises(ValueError, match="Did you mean 'sparsity'"):
        read_config(["sparsty=0.5"])


def test_every_image_has_its_share():
    for images in range(1, 40):
        for ranks in range(1, 6):
            parts = [share(images, rank, ranks) for rank in range(ranks)]
            seen = [i for part, _ in parts for i in range(images)[part]]
            assert seen == list(range(images)) * (ranks if images < 2 * ranks else 1)
            assert sum(weight for _, weight in parts) == pytest.approx(ranks)
            assert min(part.stop - part.start for part, _ in parts) >= min(images, 2)


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_process_trains_what_a_learner_trains(alone):
    together, by_itself = make_learner(CONFIG, kind=ParallelLearner), make_learner(replace(CONFIG, kernels="dense"))
    for learner in (together, by_itself):
        learner.fit()
    assert all(torch.equal(a, b) for a, b in zip(together.model.parameters(), by_itself.model.parameters(), strict=True))


def test_processes_that_differ_stop(alone, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", lambda found, mine: found.__setitem__(slice(None), [mine, "another"]))
    with pytest.raises(RuntimeError, match="The masks of process 1 are not those of process 0"):
        check_equal("The masks", [torch.ones(3)])


@pytest.mark.parametrize(("lines", "words"), [
    (["[rank1]: ValueError: of a process", "x.errors.ChildFailedError: ", "=" * 60], "[rank1]: ValueError: of a process"),
    (["Traceback (most recent call last):", "torch.distributed.DistNetworkError: Address already in use", "x.errors.ChildFailedError:", "=" * 60],
     "torch.distributed.DistNetworkError: Address already in use"),
    (["OSError: before there were ranks", "[rank0]: RuntimeError: later"], "[rank0]: RuntimeError: later"),
    (["[rank1]: KeyError: 'x'", "Exception ignored in: <function F.__del__>"], "[rank1]: KeyError: 'x'"),
    (["ValueError: why", "[rank1]:[W1128 Warning: destroy_process_group() was not called"], "ValueError: why"),
    (["TrainingStopped: it has diverged", "x.errors.ChildFailedError: ", "  time : now", "=" * 60], "TrainingStopped: it has diverged"),
    (["x.errors.ChildFailedError: ", "-" * 60, "  exitcode  : -9 (pid: 7)", "  traceback : Signal 9 (SIGKILL) received by PID 7", "=" * 60],
     "traceback : Signal 9 (SIGKILL) received by PID 7"),
    (["They wrote nothing."], "They wrote nothing."), (["=" * 60], "=" * 60)])
def test_the_error_of_a_process_is_told_and_not_the_table_of_all(lines, words):
    assert last_words(lines) == words


def test_outside_of_torchrun_there_is_a_sentence(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    command = [sys.executable, "-m", "sparselab.scale.ranks", "epochs=1"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path.cwd())
    assert found.returncode == 1 and "start it by torchrun" in found.stderr and "Traceback" not in found.stderr
