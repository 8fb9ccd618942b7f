"""Writes nbs/papers/full/*.yaml: what each notebook about a paper trains at full scale, as a sweep for many GPUs, with what it costs.

    python nbs/papers/full.py [NAME ...] [--steps N]

A sweep is run by `papermill nbs/sweep.ipynb out.ipynb -p sweep_file nbs/papers/full/rigl.yaml -p executor slurm`. It leaves its runs in runs/papers,
where `papermill nbs/papers/rigl.ipynb out.ipynb -p scale full` finds them finished, and compares them. `--steps N` measures N steps of every kind of
training on this machine; without it FLOPs and memory are counted. Data sets have to be at hand (CIFAR-10: data/README.md).
"""
import argparse
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import matplotlib
import yaml

from sparselab import view
from sparselab.errors import counted
from sparselab.learn import claims
from sparselab.learn.config import Config
from sparselab.scale.estimates import estimate
from sparselab.scale.sweeps import duration

HERE = Path(__file__).resolve().parent
RATE, STEP = 1e13, 5e-3  # where nothing is measured, a GPU is modelled: FLOPs a second, and the least that a step takes
ELSEWHERE = ("seed", "runs_dir", "data_dir", "resume")  # fields that are no setting of a row


class Planned(Exception):
    """A notebook wants to train something that is no row of runs."""


def configs_of(notebook: Path) -> list[Config]:
    """What `notebook` gives to `train_rows` at full scale, up to the first cell that needs a result. Nothing is trained."""
    found: list[Config] = []

    def collect(rows: Mapping[str, Sequence[Config]]) -> dict:
        found.extend(config for row in rows.values() for config in row)
        return {name: [] for name in rows}

    def refuse(work: object, configs: Sequence[Config]) -> list:
        raise Planned

    names = {"__name__": notebook.stem}
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    with patch.object(claims, "train_all", collect), patch.object(claims, "side_by_side", refuse), patch.object(view, "show", lambda *_: None), \
            redirect_stdout(io.StringIO()):
        for cell in cells:
            source = "".join(cell["source"])
            if "read_parameters(globals())" in source:
                names["scale"] = "full"
                continue
            try:
                exec(compile(source, f"{notebook.name}", "exec"), names)
            except Exception:
                if found or "train_rows" in source or "side_by_side" in source:
                    break
                raise
    return list({json.dumps(asdict(config), sort_keys=True): config for config in found}.values())  # a row may be asked for twice


def grids(configs: Sequence[Config]) -> tuple[dict, list[dict]]:
    """Base and grid of a sweep of `configs`: the fields that all share, and those of each row with its seeds."""
    default, rows = asdict(Config()), {}
    for config in configs:
        row = {name: value for name, value in asdict(config).items() if name not in ELSEWHERE}
        rows.setdefault(json.dumps(row, sort_keys=True), (row, []))[1].append(config.seed)
    first = next(iter(rows.values()))[0]
    shared = {name for name in first if all(row[name] == first[name] for row, _ in rows.values())}
    base = {name: first[name] for name in first if name in shared and first[name] != default[name]}
    return base | {"runs_dir": "runs/papers"}, [
        {name: value for name, value in row.items() if name not in shared} | {"seed": sorted(set(seeds))} for row, seeds in rows.values()]


def bill(configs: Sequence[Config], steps: int) -> list[str]:
    """What the trainings cost in all, and the most that one of them takes."""
    keys = [json.dumps(asdict(replace(config, seed=0)), sort_keys=True) for config in configs]  # seeds of one setting cost the same
    known = {key: estimate(config, steps) for key, config in dict(zip(keys, configs, strict=True)).items()}
    each = [known[key] for key in keys]
    flops, memory, seconds = sum(e.flops for e in each), max(e.bytes for e in each), sum(e.seconds for e in each)
    lines = [f"{counted(len(each), 'training')}: {flops:.2g} FLOPs of dense steps, counted; the largest takes {memory / 1e9:.1f} GB",
             f"{duration(sum(max(e.flops / RATE, e.steps * STEP) for e in each))} of a GPU in all, modelled at {RATE:.0e} FLOPs a second and "
             f"{1e3 * STEP:g} ms a step at least; validation, attacks and proofs come on top"]
    if seconds:
        lines[1] = f"{duration(seconds)} on this machine in all, measured"
    if rounds := sum(e.in_rounds for e in each):
        lines.append(f"{counted(rounds, 'training')} of a method in rounds, of which each is counted as one dense training: it takes several")
    return lines


def write(notebook: Path, steps: int) -> Path | None:
    """The sweep of `notebook`; None where it trains no rows of runs."""
    if not (configs := configs_of(notebook)):
        return None
    base, grid = grids(configs)
    about = [f"nbs/papers/{notebook.name} at full scale, written by python nbs/papers/full.py", *bill(configs, steps)]
    path = HERE / "full" / f"{notebook.stem}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({"about": about, "with_dense": False, "base": base, "grid": grid}, sort_keys=False, width=140), encoding="utf-8")
    return path


def main() -> None:
    matplotlib.use("agg")
    parser = argparse.ArgumentParser(description="Write the full scale of the notebooks about papers as sweeps, with what they cost.")
    parser.add_argument("names", nargs="*", help="notebooks of nbs/papers, without .ipynb (default: all)")
    parser.add_argument("--steps", type=int, default=0, help="steps to measure in each phase of a training (default: %(default)s, count only)")
    given = parser.parse_args()
    for notebook in [HERE / f"{name}.ipynb" for name in given.names] or sorted(HERE.glob("*.ipynb")):
        path = write(notebook, given.steps)
        print(f"{notebook.stem}: {path.name if path else 'trains by itself, in no rows of runs'}", flush=True)


if __name__ == "__main__":
    main()
