"""Trains the small runs that explore.ipynb opens first: python nbs/example/make.py (a minute on one core).

Two methods on scikit-learn's digits, seed 0, 95 % sparse under IBP at eps 0.05. Checkpoints are not kept.
"""
import argparse
import os
import shutil
from pathlib import Path

from sparselab.learn.config import Config
from sparselab.learn.experiments import train

HERE = Path(__file__).resolve().parent
SHARED = dict(sparsity=0.95, dataset="digits", model="cnn4", model_options={"width": 6}, objective="crown_ibp", eps=0.05,
              epochs=30, batch_size=64, seed=0, device="cpu")
RUNS = {"sparsevlr": {"update_every": 10}, "rigl": {"update_every": 10}}


def make(name: str) -> None:
    run = train(Config(method=name, method_options=RUNS[name], runs_dir=".new", **SHARED))
    shutil.rmtree(run.path / "checkpoint")
    (run.path / ".lock").unlink()
    shutil.rmtree(HERE / name, ignore_errors=True)
    run.path.rename(HERE / name)


if __name__ == "__main__":
    argparse.ArgumentParser(description="Train the runs of this folder anew and put them in the place of those that are here.").parse_args()
    os.chdir(HERE)  # so that the runs do not remember whose machine it was
    for name in RUNS:
        make(name)
    shutil.rmtree(HERE / ".new")
