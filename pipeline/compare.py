"""A comparison: cells that differ in some config keys, trained one after another, and judged alike.

    DIR/configs/<cell>.yaml   its config, with which it may be trained elsewhere, on more GPUs
    DIR/cells/<cell>/         an ordinary RUN: continued where it stands, left alone when it is finished
    DIR/judged/<cell>.json    what the probe says of its encoder
    DIR/results.json          all of that, and the ranks;  DIR/table.md the same to read

Every cell is judged on the same tiles by the same probe. Nothing is done twice: a cell whose config, tiles and probe
are those of its judgement is only read.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pipeline import checkpoint
from pipeline.boxes import RUN
from pipeline.config import PretrainConfig, fixed_values
from pipeline.models.frozen import load_encoder
from pipeline.monitor import read_metrics
from pipeline.pretrain import pretrain
from pipeline.probe import Probe
from pipeline.run import differing
from pipeline.runtime import one_device
from pipeline.stopping import Stopped
from pipeline.sweep import CONFIGS, SEED, Cell
from pipeline.trainer import global_batch
from tiling import atomic, claims
from tiling.described import Format
from tiling.errors import BonyError, UsageError
from tiling.progress import say
from tiling.store import TileStore

JUDGED, TABLE, WORK = "judged", "table.md", "work"
COMPARISON = Format("comparison", 1, "results.json", UsageError, "bony compare")
_JUDGES_SEED = 0  # chooses the probe's tiles: the same ones for cells of different seeds
_PATIENCE = 60.0  # seconds that parts wait for each other's writing of the table


@dataclass(frozen=True)
class Ranked:
    """One line of the table: cells that differ in nothing but their seed.

    Args:
        varied: Their values of the other keys.
        judged: What the probe says of each of them, those that are judged already.
        planned: How many they are.
    """

    varied: dict[str, Any]
    judged: list[dict[str, Any]]
    planned: int

    def mean(self, figure: str) -> float:
        """Mean of a figure over seeds, NaN where there is none."""
        found = [one[figure] for one in self.judged if one[figure] is not None]
        return mean(found) if found else math.nan


def compare(cells: Sequence[Cell], out: Path, probe: Path, part: tuple[int, int] = (1, 1)) -> list[Ranked]:
    """Train and judge what is missing, then rank everything that is there.

    Args:
        cells: The whole plan.
        out: The folder of the comparison.
        probe: The labelled TileStore that encoders are judged on.
        part: Which of how many shares of the cells to train, counted from 1.

    Returns:
        The table's lines, the best first.

    Raises:
        UsageError: The probe cannot judge, or a RUN is there of another config or number of ranks; nothing was run.
        Stopped: A signal asked for it; everything is saved.
        BonyError: Some cells failed; the others are done, and in the table.
    """
    number, count = part
    identities = _identities(cells, probe)
    failed: dict[str, BonyError] = {}
    for cell in cells[number - 1 :: count]:
        if _judgement(out, cell, identities[cell.name]) is None:
            say(f"cell {cell.name}")
            try:
                _do(cell, out, probe, identities[cell.name])
            except Stopped:
                raise
            except BonyError as error:
                say(f"cell {cell.name} failed: {error}")
                failed[cell.name] = error
    ranked = _write(cells, out, identities, failed)
    if failed:
        name, reason = next(iter(failed.items()))
        raise BonyError(f"{len(failed)} of {len(cells)} cells failed; {name}: {reason}", out)
    return ranked


def _identities(cells: Sequence[Cell], probe: Path) -> dict[str, str]:
    """What each cell's judgement depends on, as one sha256; all that can be refused is refused here."""
    first = cells[0].config
    with TileStore(first.data or Path()) as store, TileStore(probe) as labelled:
        about = {"data": store.fingerprint, "probe": labelled.fingerprint}
        say(Probe(probe, _judging(first), store, one_device()).about())
    _require_same_ranks({cell.name: _ranks(cell, about["data"]) for cell in cells})
    texts = {
        cell.name: json.dumps(
            {**about, "probe_tiles": cell.config.monitor.probe_tiles, **fixed_values(cell.config)}, sort_keys=True
        )
        for cell in cells
    }
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def _ranks(cell: Cell, store_fingerprint: str) -> float:
    """On how many ranks a cell's RUN was trained, or will be: 1 where it is still to come.

    Raises:
        UsageError: The RUN that is there was started with another config or store.
    """
    if not (cell.run / RUN.file).exists():
        return 1.0
    known = RUN.read(cell.run)
    apart = [(key, before) for key, before, _ in differing(known, cell.config)]
    if known["store_fingerprint"] != store_fingerprint:
        apart.append(("data", known["config"]["data"]))
    for key, before in apart:
        what = f"cell was started with another {key} ({before})"
        raise UsageError(what, cell.run, "keep the plan's base, or choose another --out")
    return float(known["global_batch"]) / global_batch(cell.config, 1)


def _require_same_ranks(ranks: dict[str, float]) -> None:
    """Samples a step, and the learning rate with them, grow with the ranks: cells of different ones do not compare."""
    (first, one), *others = ranks.items()
    for name, other in others:
        if other != one:
            raise UsageError(
                f"cell {first} is one of {one:g} ranks, {name} of {other:g}: batches and learning rates differ",
                do=f"train each by torchrun on as many ranks (DIR/{CONFIGS}), or choose another --out",
            )


def _judging(config: PretrainConfig) -> PretrainConfig:
    return replace(config, train=replace(config.train, seed=_JUDGES_SEED))


def _do(cell: Cell, out: Path, probe: Path, identity: str) -> None:
    """Train a cell to its end, unless it is there already, and judge it."""
    if not _finished(cell):
        pretrain(cell.config)
    device = one_device()
    encoder = load_encoder(cell.run, device)
    with TileStore(cell.config.data or Path()) as store:
        found = Probe(probe, _judging(cell.config), store, device).judge(encoder.backbone)
    line = (read_metrics(cell.run) or [{}])[-1]
    figures = {**found, "loss": line.get("loss")}
    judgement = {
        "cell": cell.name,
        "varied": cell.varied,
        "identity": identity,
        "encoder_sha256": encoder.sha256,
        **{name: value if value is not None and math.isfinite(value) else None for name, value in figures.items()},
    }
    (out / JUDGED).mkdir(exist_ok=True)
    atomic.write_json(out / JUDGED / f"{cell.name}.json", judgement)


def _finished(cell: Cell) -> bool:
    """Whether the last step's checkpoint stands, by whatever ranks it was trained."""
    folder = checkpoint.newest_sound(cell.run)
    return folder is not None and int(checkpoint.read_state(folder)["step"]) >= cell.config.train.steps


def _judgement(out: Path, cell: Cell, identity: str) -> dict[str, Any] | None:
    """What was said of a cell, where it still holds."""
    try:
        known: dict[str, Any] = json.loads((out / JUDGED / f"{cell.name}.json").read_bytes())
    except FileNotFoundError:
        return None
    return known if known["identity"] == identity else None


def _write(cells: Sequence[Cell], out: Path, identities: dict[str, str], failed: dict[str, BonyError]) -> list[Ranked]:
    """Rank everything that is judged, by this part or another, and write it down."""
    with claims.claimed(out / WORK, "table", wait=_PATIENCE):
        groups: dict[str, Ranked] = {}
        for cell in cells:
            varied = {key: value for key, value in cell.varied.items() if key != SEED}
            group = groups.setdefault(json.dumps(varied), Ranked(varied, [], 0))
            known = _judgement(out, cell, identities[cell.name])
            added = [*group.judged, known] if known else group.judged
            groups[json.dumps(varied)] = replace(group, judged=added, planned=group.planned + 1)
        ranked = best_first(list(groups.values()))
        errors = {name: str(error) for name, error in failed.items()}
        values = {"ranked": [asdict(line) for line in ranked], "failed": errors}
        atomic.write_json(out / COMPARISON.file, COMPARISON.describe(values))
        atomic.write_bytes(out / TABLE, table(ranked).encode())
    return ranked


def best_first(lines: Sequence[Ranked]) -> list[Ranked]:
    """By the mean of the probe's accuracy; those of which nothing is known come last."""
    return sorted(lines, key=lambda line: (math.isnan(line.mean("knn")), -line.mean("knn")))


def table(ranked: Sequence[Ranked]) -> str:
    """The table in Markdown, with what its reader must know."""
    keys = list(ranked[0].varied)
    heads = ["rank", *keys, "probe accuracy", "seeds", "RankMe", "loss"]
    rows = []
    for line in ranked:
        known = not math.isnan(line.mean("knn"))
        place = 1 + sum(other.mean("knn") > line.mean("knn") for other in ranked)  # equal ones share it
        values = [json.dumps(line.varied[key]) for key in keys]
        seeds = str(line.planned) if len(line.judged) == line.planned else f"{len(line.judged)} of {line.planned}"
        figures = [_number(line.mean("probe_rankme"), 1), _number(line.mean("loss"), 3)]
        rows.append([str(place) if known else "-", *values, _accuracy(line), seeds, *figures])
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    lines = ["| " + " | ".join(t.rjust(w) for t, w in zip(row, widths, strict=True)) + " |" for row in (heads, *rows)]
    lines.insert(1, "|" + "|".join(f"{'-' * (width + 1)}:" for width in widths) + "|")
    return "\n".join([*lines, "", *_notes(ranked)]) + "\n"


def _accuracy(line: Ranked) -> str:
    found = [one["knn"] for one in line.judged if one["knn"] is not None]
    spread = f" ± {stdev(found):.3f}" if len(found) > 1 else ""
    return _number(line.mean("knn"), 3) + spread


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _notes(ranked: Sequence[Ranked]) -> list[str]:
    judged = [one for line in ranked for one in line.judged]
    notes = ["Ranked by the probe: balanced accuracy of the nearest neighbours on other slides"]
    notes[0] += f", chance {judged[0]['knn_chance']:.3f}." if judged else "."
    if any(key == "method.out_dim" for line in ranked for key in line.varied):
        notes.append(
            "The losses do not compare: with K prototypes (method.out_dim) one that has learnt nothing is ln K."
        )
    if all(line.planned == 1 for line in ranked):
        notes.append(f"One seed each: how far chance alone moves a line is not known; add {SEED} to the grid.")
    return notes
