"""Stains of slides whose stains are known, against the textbook, and on real tiles."""

import csv
import hashlib
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tiling import stain
from tiling.errors import UsageError
from tiling.index import METADATA_KEY, build_index, slide_facts
from tiling.stain import REFERENCE, SlideColour, Stains, normaliser, slide_stains, tile_sample
from tiling.store import TileStore

WHITE = 240


def made_tissue(stains: Stains, seed: int = 0, count: int = 40_000) -> np.ndarray:
    """Pixels of two stains in all proportions, some glass among them, uint8 (count, 3)."""
    rng = np.random.default_rng(seed)
    amounts = rng.gamma(2.0, 0.25, (count, 2)) * stains.concentrations
    amounts[: count // 4, 0] = 0.02 * amounts[: count // 4, 0]  # stroma
    amounts[count // 4 : count // 2, 1] = 0.02 * amounts[count // 4 : count // 2, 1]  # nuclei
    amounts[-count // 5 :] = 0  # glass
    density = amounts @ np.array([stains.haematoxylin, stains.eosin])
    return (WHITE * np.exp(-density)).round().clip(0, 255).astype(np.uint8)


def degrees(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    cosine = np.dot(one, other) / np.linalg.norm(one) / np.linalg.norm(other)
    return float(np.rad2deg(np.arccos(min(1.0, cosine))))


def textbook(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Macenko et al. 2009 as the authors' code has it, but for tissue alone: stain matrix (3, 2), 99th percentiles."""
    density = -np.log((pixels.astype(float) + 1) / WHITE)
    tissue = density[~np.any(density < 0.15, axis=1)]
    _, vectors = np.linalg.eigh(np.cov(tissue.T))
    vectors = vectors[:, [2, 1]]
    vectors[:, vectors[0] < 0] *= -1
    projected = tissue @ vectors
    phi = np.arctan2(projected[:, 1], projected[:, 0])
    ends = [vectors @ [np.cos(angle), np.sin(angle)] for angle in (np.percentile(phi, 1), np.percentile(phi, 99))]
    matrix = np.array(ends if ends[0][0] > ends[1][0] else ends[::-1]).T
    concentrations = np.linalg.lstsq(matrix, tissue.T, rcond=None)[0]
    return matrix, np.percentile(concentrations, 99, axis=1)


def textbook_normalised(pixels: np.ndarray, source: Stains, target: Stains) -> np.ndarray:
    """Concentrations by least squares, scaled, and recombined: what lies off the plane is lost."""
    density = -np.log((pixels.reshape(-1, 3).astype(float) + 1) / WHITE)
    matrix = np.array([source.haematoxylin, source.eosin]).T
    amounts = np.linalg.lstsq(matrix, density.T, rcond=None)[0]
    amounts *= (np.array(target.concentrations) / source.concentrations)[:, None]
    recombined = WHITE * np.exp(-np.array([target.haematoxylin, target.eosin]).T @ amounts)
    return recombined.T.clip(0, 255).reshape(pixels.shape)


def unit(*values: float) -> tuple[float, float, float]:
    x, y, z = np.array(values) / np.linalg.norm(values)
    return float(x), float(y), float(z)


PAIRS = [
    REFERENCE,
    Stains(unit(0.65, 0.70, 0.29), unit(0.25, 0.90, 0.25), (1.5, 1.2)),
    Stains(unit(0.49, 0.77, 0.41), unit(0.20, 0.88, 0.42), (2.2, 0.9)),
]


@pytest.mark.parametrize("known", PAIRS)
@pytest.mark.parametrize("seed", [0, 1])
def test_known_stains_are_recovered(known: Stains, seed: int) -> None:
    found = slide_stains(made_tissue(known, seed))
    assert found is not None
    assert degrees(found.stains.haematoxylin, known.haematoxylin) < 2
    assert degrees(found.stains.eosin, known.eosin) < 2


@settings(max_examples=20)
@given(seed=st.integers(0, 99), pair=st.sampled_from(PAIRS), noise=st.sampled_from([0, 4]))
def test_as_the_textbook(seed: int, pair: Stains, noise: int) -> None:
    pixels = made_tissue(pair, seed, 20_000).astype(int)
    pixels += np.random.default_rng(seed).normal(0, noise, pixels.shape).round().astype(int)
    pixels = pixels.clip(0, 255).astype(np.uint8)
    found, (matrix, concentrations) = slide_stains(pixels), textbook(pixels)
    assert found is not None
    assert np.allclose([found.stains.haematoxylin, found.stains.eosin], matrix.T, atol=1e-3)
    assert np.allclose(found.stains.concentrations, concentrations, atol=5e-3)
    assert slide_stains(pixels) == found


def test_glass_does_not_count() -> None:
    pixels = made_tissue(REFERENCE)
    glass = np.full((20_000, 3), 243, np.uint8)
    with_glass, without = slide_stains(np.concatenate([pixels, glass])), slide_stains(pixels)
    assert with_glass is not None
    assert without is not None
    assert with_glass == without
    assert with_glass.mean == pytest.approx(pixels[(pixels < 205).all(axis=1)].mean(axis=0), abs=1.5)


@pytest.mark.parametrize("grey", [0, 128, 250])
def test_no_two_stains(grey: int) -> None:
    assert slide_stains(np.full((50_000, 3), grey, np.uint8)) is None
    assert slide_stains(made_tissue(REFERENCE)[:500]) is None
    assert slide_stains(np.zeros((0, 3), np.uint8)) is None


def test_many_pixels_are_thinned() -> None:
    pixels = made_tissue(REFERENCE, count=400_000)
    thinned, whole = slide_stains(pixels), slide_stains(pixels[::8])
    assert thinned == whole


def test_sample_is_spread_over_the_tile() -> None:
    tile = np.stack([*np.indices((224, 224)), np.zeros((224, 224))], axis=-1).astype(np.uint8)
    sample = tile_sample(tile)
    assert sample.shape == (324, 3)
    assert set(sample[:, 0] % 8) == set(sample[:, 1] % 8) == set(range(8))


@settings(max_examples=20)
@given(seed=st.integers(0, 99), source=st.sampled_from(PAIRS), target=st.sampled_from(PAIRS))
def test_normalised_as_the_textbook(seed: int, source: Stains, target: Stains) -> None:
    """Of pixels of two stains nothing lies off their plane."""
    tile = made_tissue(source, seed, 64 * 64).reshape(1, 64, 64, 3)
    found = normaliser(source, target)(tile)
    assert (found.dtype, found.shape) == (np.uint8, tile.shape)
    # The textbook adds 1 before the logarithm and does not take it off again; dark pixels are rounded before.
    difference = np.abs(found.astype(float) + 1 - textbook_normalised(tile, source, target))
    assert np.percentile(difference[tile < 205], 95) < 3


@pytest.mark.parametrize("own", PAIRS)
def test_own_stains_change_nothing(own: Stains) -> None:
    tile = np.random.default_rng(0).integers(0, 256, (2, 50, 50, 3), np.uint8)
    difference = normaliser(own, own)(tile).astype(int) - tile
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("target", PAIRS[1:])
def test_what_is_neither_stain_stays(target: Stains) -> None:
    """Density at right angles to both stains is that of before, at right angles to the target's."""
    source = PAIRS[0]
    tile = made_tissue(source, count=4096).reshape(64, 64, 3).astype(float)
    tile = (tile * np.random.default_rng(3).uniform(0.8, 1.0, tile.shape)).clip(20, 255).astype(np.uint8)

    def off_plane(pixels: np.ndarray, stains: Stains) -> np.ndarray:
        normal = np.cross(stains.haematoxylin, stains.eosin)
        return -np.log((pixels + 1.0) / WHITE) @ (normal / np.linalg.norm(normal))

    before, found = off_plane(tile, source), normaliser(source, target)(tile)
    inside = ((found > 20) & (found < 255)).all(axis=-1)
    assert inside.sum() > 1000
    assert np.abs(before[inside]).max() > 0.1
    assert np.allclose(off_plane(found, target)[inside], before[inside], atol=0.03)


def test_json_and_back(tmp_path: Path) -> None:
    found = slide_stains(made_tissue(REFERENCE))
    assert found is not None
    value = json.loads(json.dumps(found.to_json()))
    again = SlideColour.from_json(value)
    assert again.to_json() == found.to_json()
    (tmp_path / "target.json").write_text(json.dumps(value))
    assert stain.read_target(tmp_path / "target.json") == again.stains
    assert stain.read_target("reference") == REFERENCE
    for broken in ("", "[]", "{}", json.dumps(value | {"eosin": [1, 2]}), json.dumps(value | {"mean": ["x", 1, 2]})):
        (tmp_path / "target.json").write_text(broken)
        with pytest.raises(UsageError, match="cannot be read as a slide's colour"):
            stain.read_target(tmp_path / "target.json")
    with pytest.raises(UsageError, match="FileNotFoundError"):
        stain.read_target(tmp_path / "nowhere.json")


def slides_of(data: Path) -> dict[str, np.ndarray]:
    """Real PANDA tiles of the slides that have most of them, uint8 (n, 256, 256, 3), by slide."""
    found = defaultdict(list)
    with (data / "panda_gleason_tiles" / "manifest.csv").open() as file:
        for row in csv.DictReader(file):
            found[row["slide_id"]].append(data / "panda_gleason_tiles" / row["path"])
    most = sorted(found, key=lambda slide_id: (-len(found[slide_id]), slide_id))[:8]
    return {name: np.stack([np.asarray(Image.open(path).convert("RGB")) for path in found[name][:40]]) for name in most}


def test_real_slides_come_closer(shared_data: Path) -> None:
    """How far the mean colours and the spread of colours of tissue differ from slide to slide."""
    before, after = [], []
    for name, tiles in slides_of(shared_data).items():
        sample = np.concatenate([tile_sample(tile) for tile in tiles])
        colour = slide_stains(sample)
        assert colour is not None, name
        matrix, concentrations = textbook(sample)
        assert np.allclose([colour.stains.haematoxylin, colour.stains.eosin], matrix.T, atol=2e-3)
        assert np.allclose(colour.stains.concentrations, concentrations, rtol=1e-2)
        own = normaliser(colour.stains, colour.stains)(tiles)
        assert np.abs(own.astype(int) - tiles).max() <= 1
        tissue = (sample < 205).all(axis=1)
        normalised = np.concatenate([tile_sample(tile) for tile in normaliser(colour.stains, REFERENCE)(tiles)])
        before.append([*colour.mean, *colour.std])
        after.append([*normalised[tissue].mean(axis=0), *normalised[tissue].std(axis=0)])
    spread = [np.std(values, axis=0) for values in (before, after)]
    print("between slides, std of mean and std of R, G, B, before and after:", np.round(spread, 2).tolist())
    assert spread[1][:3].mean() < 0.6 * spread[0][:3].mean()


def test_normalised_at_read_time(own_store: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Slides whose stains are stored are normalised, the others left as they are; the store stays as it was."""
    with TileStore(own_store) as store:
        plain = store.read(np.arange(len(store)))
        first = plain[store.rows_of_slide(0)]
        colour = slide_stains(np.concatenate([tile_sample(tile) for tile in first]))
        known = store.slide_ids[0]
    assert colour is not None
    for folder in (own_store / "slides").iterdir():
        rows = pq.read_table(folder / "rows.parquet")
        facts = slide_facts(rows) | {"colour": colour.to_json() if folder.name == known else None}
        pq.write_table(
            rows.replace_schema_metadata({METADATA_KEY: json.dumps(facts).encode()}), folder / "rows.parquet"
        )
        digest = hashlib.sha256((folder / "rows.parquet").read_bytes()).hexdigest()
        lines = (folder / "COMPLETE").read_text().splitlines()
        lines = [f"{digest}  rows.parquet" if line.endswith("  rows.parquet") else line for line in lines]
        (folder / "COMPLETE").write_text("\n".join(lines) + "\n")
    build_index(own_store)
    capsys.readouterr()
    with TileStore(own_store, threads=2) as store:
        assert np.array_equal(store.read(np.arange(len(store))), plain)
        assert store.unnormalised == []
    rounded = SlideColour.from_json(colour.to_json())
    target = tmp_path / "target.json"
    target.write_text(json.dumps(replace(colour, stains=PAIRS[1]).to_json()))
    wanted = stain.read_target(target)
    for given_target, stains in (("reference", REFERENCE), (target, wanted)):
        with TileStore(own_store, threads=2, stain_target=given_target) as store:
            found = store.read(np.arange(len(store)))
            mine = store.rows_of_slide(0)
            assert np.array_equal(found[mine], normaliser(rounded.stains, stains)(first))
            assert not np.array_equal(found[mine], first)
            assert np.array_equal(np.delete(found, mine, 0), np.delete(plain, mine, 0))
            assert store.unnormalised == store.slide_ids[1:]
    assert "the stains of 2 of 3 slides are not known" in capsys.readouterr().err
