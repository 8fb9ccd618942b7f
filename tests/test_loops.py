"""sparsify in the loops that people have: Lightning, the Trainer of transformers, accelerate. Masks are exact after every step."""
import contextlib
import importlib.metadata
import sys
from importlib import import_module

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sparselab.learn.checkpoints import load_state
from sparselab.learn.loops import FILE, Sparse, bare, lightning_callback, trainer_callback
from sparselab.sparse import sparsify

UPDATES = {"update_every": 3}


def library(name: str, *parts: str):
    """The library, imported with `parts` of it; a torchvision that was built for another torch breaks both of them, and is taken for missing."""
    known = importlib.metadata.distribution

    def without(package: str):
        if package == "torchvision":
            raise importlib.metadata.PackageNotFoundError(package)
        return known(package)

    def imported():
        module = import_module(name)
        for part in parts:
            getattr(module, part)
        return module

    with contextlib.suppress(ImportError, RuntimeError):
        return imported()
    for module in [m for m in sys.modules if m.split(".")[0] in (name, "torchvision", "torchmetrics")]:
        del sys.modules[module]
    sys.modules["torchvision"] = None
    importlib.metadata.distribution = without
    try:
        return imported()
    except ImportError as error:
        return pytest.skip(f"{name} cannot be imported: {error}")
    finally:
        importlib.metadata.distribution = known


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 3))


def samples(count: int = 48) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 12, generator=generator)
    return TensorDataset(x, x[:, :3].argmax(1))


def exact(sparsifier) -> bool:
    """nnz is the promise, no weight outside the masks is there, and the optimizer holds nothing for what is pruned."""
    masks, moments = sparsifier.masks, [sparsifier.optimizer.state.get(w, {}).get("exp_avg") for w in sparsifier.masks.weights.values()]
    clean = all(m is None or not m[~masks[name]].any() for name, m in zip(masks, moments, strict=True))
    outside = any((w[~masks[name]] != 0).any() for name, w in masks.weights.items())
    return clean and not outside and sparsifier.budget == masks.nnz == sum(int(mask.sum()) for mask in masks.values())


def masks_of(callback) -> dict:
    return {name: mask.clone() for name, mask in callback.sparsifier.masks.items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_keeps_the_masks_and_resumes_to_the_same_bits(tmp_path, precision):
    L = library("lightning")

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.01)

    class Watch(L.Callback):
        def __init__(self, sparse, stop: int = 0):
            self.sparse, self.stop, self.seen = sparse, stop, []

        def on_train_batch_end(self, trainer, *_):
            self.seen.append((trainer.global_step, self.sparse.sparsifier.steps, exact(self.sparse.sparsifier)))
            if self.stop and trainer.global_step == self.stop:
                trainer.save_checkpoint(tmp_path / "half.ckpt")
                trainer.should_stop = True

    def fit(stop: int = 0, resume: bool = False, alone: bool = False):
        if alone:
            trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                                enable_model_summary=False, default_root_dir=tmp_path)
            trainer.fit(Module(), DataLoader(samples(), 8))
            return trainer.save_checkpoint(tmp_path / "half.ckpt")
        sparse = lightning_callback("rigl", 0.8, seed=1, **UPDATES)
        watch, module = Watch(sparse, stop), Module()
        trainer = L.Trainer(max_epochs=4, accelerator="cpu", callbacks=[sparse, watch], accumulate_grad_batches=2, precision=precision,
                            gradient_clip_val=1.0, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                            default_root_dir=tmp_path)
        trainer.fit(module, DataLoader(samples(), 8), ckpt_path=tmp_path / "half.ckpt" if resume else None, weights_only=False)
        return sparse, watch, module.state_dict()

    whole, watch, weights = fit()
    assert whole.sparsifier.steps == 12 and len(watch.seen) == 24, "six batches an epoch, two for each step of the optimizer"
    assert all(step == counted and good for step, counted, good in watch.seen)
    assert whole.sparsifier.history.updates, "masks have moved"
    half, _, _ = fit(stop=6)
    assert half.sparsifier.steps == 6
    again, watch, resumed = fit(resume=True)
    assert all(good for *_, good in watch.seen) and again.sparsifier.steps == 12
    assert same(masks_of(again), masks_of(whole)) and same(resumed, weights)
    fit(alone=True)
    with pytest.raises(ValueError, match="^The training goes on from step 6, and the masks are those of step 0: its checkpoint was saved without"):
        fit(resume=True)


class Rows(Dataset):
    """The samples as the Trainer wants them."""

    def __init__(self):
        self.x, self.y = samples().tensors

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict:
        return {"x": self.x[i], "labels": self.y[i]}


class WithLoss(nn.Module):
    """The network as the Trainer wants it."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("bf16", [False, True])
def test_the_trainer_keeps_the_masks_and_resumes_to_the_same_bits(tmp_path, bf16):
    transformers = library("transformers", "Trainer")

    class Watch(transformers.TrainerCallback):
        def __init__(self, sparse):
            self.sparse, self.seen = sparse, []

        def on_step_end(self, args, state, control, **_):
            self.seen.append((state.global_step, self.sparse.sparsifier.steps, exact(self.sparse.sparsifier)))

    def fit(resume=None):
        sparse = trainer_callback("rigl", 0.8, seed=1, **UPDATES)
        watch, model = Watch(sparse), WithLoss()
        args = transformers.TrainingArguments(str(tmp_path), num_train_epochs=4, per_device_train_batch_size=8, gradient_accumulation_steps=2,
                                              learning_rate=0.01, bf16=bf16, use_cpu=True, save_steps=6, report_to=[], disable_tqdm=True, seed=0,
                                              logging_strategy="no", optim="adamw_torch")
        transformers.Trainer(model, args, train_dataset=Rows(), callbacks=[sparse, watch]).train(resume_from_checkpoint=resume)
        return sparse, watch, model.state_dict()

    whole, watch, weights = fit()
    assert [seen[:2] for seen in watch.seen] == [(step, step) for step in range(1, 13)] and all(good for *_, good in watch.seen)
    assert whole.sparsifier.history.updates
    assert load_state(tmp_path / "checkpoint-6" / FILE)["steps"] == 6
    again, watch, resumed = fit(str(tmp_path / "checkpoint-6"))
    assert [seen[0] for seen in watch.seen] == list(range(7, 13)) and all(good for *_, good in watch.seen)
    assert same(masks_of(again), masks_of(whole)) and same(resumed, weights)
    (tmp_path / "checkpoint-6" / FILE).unlink()
    with pytest.raises(ValueError, match=r"^The training goes on from step 6, and .*checkpoint-6 has no sparsifier.safetensors: it was saved"):
        fit(str(tmp_path / "checkpoint-6"))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_keeps_the_masks_and_resumes_to_the_same_bits(tmp_path, precision):
    accelerate = library("accelerate")

    def fit(first: int, last: int, load: bool = False):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # one process, several precisions
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(samples(), 8))
        sparsifier = sparsify(accelerator.unwrap_model(model), bare(optimizer), "rigl", 0.8, 12, seed=1, **UPDATES)
        accelerator.register_for_checkpointing(sparsifier)
        if load:
            accelerator.load_state(tmp_path / "half")
        for _ in range(first, last):
            for x, y in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(nn.functional.cross_entropy(model(x), y))
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    sparsifier.step()
                assert exact(sparsifier)
        return accelerator, sparsifier, {name: value.clone() for name, value in accelerator.unwrap_model(model).state_dict().items()}

    _, whole, weights = fit(0, 4)
    assert whole.steps == 12 and whole.history.updates
    accelerator, half, _ = fit(0, 2)
    accelerator.save_state(tmp_path / "half")
    _, again, resumed = fit(2, 4, load=True)
    assert again.steps == 12 and same(dict(again.masks), dict(whole.masks)) and same(resumed, weights)


def test_a_wrong_method_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="^There is no method called 'riggl'. Did you mean 'rigl'?"):
        Sparse("riggl")
