"""The plan of a comparison: one config, some of whose keys take several values; a cell is a run with one value of each.

    base: dino_xcit_m24.yaml                     # beside this file
    set: {train.steps: 3000}                     # changes of it that all cells share
    grid: {method.out_dim: [1024, 2048], train.seed: [0, 1]}

Nothing here loads torch: a wrong key is known at once, before anything runs.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.commands.parser import pretrain_config
from pipeline.config import PretrainConfig, flatten
from tiling import atomic
from tiling.errors import UsageError

CELLS, CONFIGS = "cells", "configs"
SEED = "train.seed"
_KEYS = ("base", "set", "grid")
# Where a cell is, is the comparison's own business.
_TAKEN = ("data", "out")


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Args:
        name: Name of its folder, made of what is varied.
        varied: Its values of the keys that differ between cells.
        config: The whole config; its RUN is DIR/cells/<name>.
    """

    name: str
    varied: dict[str, Any]
    config: PretrainConfig

    @property
    def run(self) -> Path:
        """The RUN folder."""
        return self.config.out or Path()


def plan(file: Path, data: Path, out: Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """All cells of a comparison, the last key of the grid varying fastest.

    Args:
        file: The plan, a YAML file as above.
        data: The TileStore to train on.
        out: The folder of the comparison.
        overrides: Words ``--any.field value`` that change the base, after the plan's own ``set``.

    Raises:
        UsageError: The plan is none, or a key or value of some cell is wrong.
    """
    sheet = _read(file)
    grid: dict[str, list[Any]] = sheet["grid"]
    for key in (word.split("=")[0].removeprefix("--") for word in overrides if word.startswith("--")):
        if key in grid:
            raise UsageError(f"--{key} is what this comparison varies", file, "change its grid instead")
    base = ["--config", str(file.parent / sheet["base"]), *_words(sheet.get("set") or {}), *overrides]
    cells = []
    for values in itertools.product(*grid.values()):
        varied = dict(zip(grid, values, strict=True))
        name = cell_name(varied)
        places = {"data": data, "out": out / CELLS / name}
        cells.append(Cell(name, varied, pretrain_config([*base, *_words(varied), *_words(places)])))
    names = [cell.name for cell in cells]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"two cells would be called {twice[0]}", file, "give each value of the grid once")
    return cells


def write_configs(cells: Sequence[Cell], out: Path) -> None:
    """Write each cell's config to DIR/configs: ``torchrun -m pipeline.pretrain`` may train it on many GPUs."""
    (out / CONFIGS).mkdir(parents=True, exist_ok=True)
    for cell in cells:
        text = yaml.safe_dump(flatten(asdict(cell.config)), sort_keys=False)
        atomic.write_bytes(out / CONFIGS / f"{cell.name}.yaml", text.encode())


def cell_name(varied: Mapping[str, Any]) -> str:
    """A folder's name that says what is varied.

    >>> cell_name({"method.out_dim": 1024, "train.seed": 0})
    'out_dim-1024_seed-0'
    >>> cell_name({"optim.lr": 5e-4, "views.global_scale": [0.4, 1.0]})
    'lr-0.0005_global_scale-0.4-1.0'
    """
    short = [key.rpartition(".")[2] for key in varied]
    names = [last if short.count(last) == 1 else key for last, key in zip(short, varied, strict=True)]
    texts = [re.sub(r"[^A-Za-z0-9.+]+", "-", _text(value)).strip("-") for value in varied.values()]
    return "_".join(f"{name}-{text}" for name, text in zip(names, texts, strict=True))


def _text(value: object) -> str:
    """A value as the command line takes it."""
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


def _words(values: Mapping[str, Any]) -> list[str]:
    return [f"--{key}={_text(value)}" for key, value in values.items()]


def _read(file: Path) -> dict[str, Any]:
    """The plan, of the right form; whether keys and values are right is for the config to say."""
    try:
        sheet = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"cannot be read ({error})", file) from error
    if not isinstance(sheet, dict) or not isinstance(sheet.get("base"), str) or not sheet.get("grid"):
        raise UsageError("is no plan of a comparison", file, "it needs base: CONFIG.yaml and grid: {key: [values]}")
    for key in sheet:
        if key not in _KEYS:
            raise UsageError(f"no key {key!r} in a comparison", file, f"known are {', '.join(_KEYS)}")
    for section in ("set", "grid"):
        _require_keys(file, section, sheet.get(section) or {})
    for key, values in sheet["grid"].items():
        if not isinstance(values, list) or not values:
            raise UsageError(f"grid: {key} is {values!r}, must be a list of values", file)
    return sheet


def _require_keys(file: Path, section: str, values: object) -> None:
    if not isinstance(values, dict):
        raise UsageError(f"{section} is {values!r}, must be a section of config keys", file)
    for key in values:
        if key in _TAKEN:
            raise UsageError(f"{section} has {key!r}", file, f"give it as --{key}")
