"""The probe: neighbours against a slow reference, which tiles are asked, what is refused, and that training goes on as
if it had not been there."""

import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.commands.parser import pretrain_config
from pipeline.config import MonitorConfig, PretrainConfig, TrainConfig
from pipeline.models.encoders import build_encoder
from pipeline.monitor import read_metrics
from pipeline.pretrain import pretrain
from pipeline.probe import NEIGHBOURS, TEMPERATURE, Probe, neighbours_say, spread
from tiling import datasets, patches
from tiling.errors import UsageError
from tiling.run import tile
from tiling.settings import TileSettings
from tiling.store import TileStore

CPU = torch.device("cpu")
PX = 32
COLOURS = {"benign": (200, 60, 60), "gleason3": (60, 200, 60), "gleason4": (60, 60, 200), "background": (255,) * 3}
# Tiles of each class on each of its slides.
COHORT = {"benign": (6, 6, 6), "gleason3": (9, 3), "gleason4": (4, 4, 4, 4)}

Counts = dict[str, Sequence[int]]


def make_store(root: Path, counts: Counts, mpp: float | None = 0.5, px: int = PX) -> Path:
    """Tiles in their class's colour, with noise, as folders of images and as a store."""
    rng = np.random.default_rng(0)
    for name, slides in counts.items():
        (root / "tiles" / name).mkdir(parents=True)
        for slide, number in enumerate(slides):
            for place in range(number):
                image = np.clip(rng.normal(COLOURS[name], 30, (px, px, 3)), 0, 255).astype(np.uint8)
                cv2.imwrite(str(root / "tiles" / name / f"{name}{slide}_{place}.png"), image[..., ::-1])
    settings = TileSettings(px, mpp, codec="zstd", thresholds=None)
    tile(patches.tile_folders(root / "tiles", slide_pattern="(.+)_"), root / "store", settings)
    return root / "store"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """46 tiles of 9 slides."""
    return make_store(tmp_path_factory.mktemp("labelled"), COHORT)


class MeanColour(nn.Module):
    """Features that tell the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.patch_embed = None  # not in patches: any size will do
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(images.shape))
        assert not self.training
        return images.mean((2, 3)) * self.scale


class Noise(MeanColour):
    """Features that tell nothing; RankMe would notice if they were all the same."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        keys = (images.double().sum((1, 2, 3)) * 1e6).long().tolist()
        return torch.stack([torch.randn(16, generator=torch.Generator().manual_seed(key % 2**31)) for key in keys])


class Benign(MeanColour):
    """Benign tiles in one direction, each other tile in one that no other slide knows."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        red, _, blue = images.mean((2, 3)).T
        noise = torch.randn(len(images), generator=torch.Generator().manual_seed(0))
        return torch.stack([torch.ones_like(red), torch.where(red > blue, 0, 0.01 * noise)], dim=1)


class Failing(MeanColour):
    """A device that has gone."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("gone")


def made_probe(data: Path, on: Path | None = None, most: int = 2000, batch: int = 10) -> Probe:
    monitor, train = MonitorConfig(data, probe_tiles=most), TrainConfig(batch_per_rank=batch, threads=1)
    with TileStore(on or data) as store:
        return Probe(data, PretrainConfig(monitor=monitor, train=train), store, CPU)


# ---- judging ---------------------------------------------------------------------------------------------------------


def voted(asked: int, features: np.ndarray, label: np.ndarray, slide: np.ndarray) -> int:
    """What the nearest tiles on other slides say of one tile, in loops."""
    cosines = features @ features[asked] / np.linalg.norm(features, axis=1) / np.linalg.norm(features[asked])
    others = [place for place in np.argsort(-cosines) if slide[place] != slide[asked]]
    votes = np.zeros(label.max() + 1)
    for place in others[:NEIGHBOURS]:
        votes[label[place]] += math.exp(cosines[place] / TEMPERATURE)
    return int(votes.argmax())


@pytest.mark.parametrize("number", [12, 60, 1500])
def test_neighbours_are_those_of_a_slow_reference(number: int) -> None:
    """Fewer tiles than neighbours, more, and more than are compared at once."""
    rng = np.random.default_rng(number)
    label, slide = rng.integers(0, 3, number), rng.integers(0, 5, number)
    features = rng.normal(size=(number, 8)) + np.eye(8)[label] + 2 * np.eye(8)[slide]
    found = neighbours_say(torch.from_numpy(features), torch.from_numpy(label), torch.from_numpy(slide))
    for asked in range(0, number, 1 + number // 100):
        assert found[asked] == voted(asked, features, label, slide)


def test_colours_tell_classes_and_noise_does_not(labelled: Path) -> None:
    probe = made_probe(labelled)
    encoder = MeanColour().eval()
    good = probe.judge(encoder)
    assert (good["knn"], good["knn_chance"]) == (1.0, 1 / 3)
    assert 1 < good["probe_rankme"] < 3
    assert encoder.shapes == [(10, 3, PX, PX)] * 4 + [(6, 3, PX, PX)]
    bad = probe.judge(Noise().eval())
    assert 0 < bad["knn"] < 0.6
    assert 8 < bad["probe_rankme"] <= 16
    assert probe.judge(Noise().eval()) == bad
    broken = MeanColour()
    broken.scale.data *= math.nan
    lost = probe.judge(broken)
    assert math.isnan(lost["knn"])
    assert math.isnan(lost["probe_rankme"])


def test_tiles_of_the_own_slide_have_no_vote(tmp_path: Path) -> None:
    """Each slide has a colour of its own, and of the other slides the nearest is of the other class."""
    label, slide = torch.tensor([0, 1, 0, 1]).repeat_interleave(5), torch.arange(4).repeat_interleave(5)
    angles = torch.tensor([0.0, 0.3, 1.5, 1.8])[slide] + torch.rand(20) * 0.01
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert (neighbours_say(features, label, slide) == 1 - label).all()


def test_classes_count_alike_however_many_tiles_they_have(tmp_path: Path) -> None:
    """Features that are right of each benign tile and of no other."""
    probe = made_probe(make_store(tmp_path, {"benign": (15, 15), "gleason4": (3, 3)}))
    assert probe.judge(Benign())["knn"] == 0.5


def test_the_encoder_is_left_as_it_was(labelled: Path) -> None:
    encoder = build_encoder("xcit_nano_12_p16_224", drop_path=0.3)
    encoder.train()
    encoder.blocks[3].eval()  # not all parts need be in one mode
    modes = [part.training for part in encoder.modules()]
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    random = torch.random.get_rng_state()
    probe = made_probe(labelled)
    first = probe.judge(encoder)
    assert [part.training for part in encoder.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert probe.judge(encoder) == first  # no drop path, no batch statistics
    failing = Failing().train()
    with pytest.raises(RuntimeError, match="gone"):
        probe.judge(failing)
    assert failing.training


# ---- which tiles are asked -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 7, 60, 300, 10_000])
def test_tiles_are_spread_over_classes_and_slides(most: int) -> None:
    rng = np.random.default_rng(0)
    label = rng.choice(3, 1000, p=[0.85, 0.12, 0.03])
    slide = label * 20 + rng.choice(4, 1000, p=[0.7, 0.2, 0.09, 0.01])
    ids = rng.permutation(5000)[:1000]
    chosen = spread(label, slide, ids, most, seed=3)
    assert len(np.unique(chosen)) == len(chosen) == min(most, 1000)
    require_even(np.bincount(label, minlength=3), np.bincount(label[chosen], minlength=3))
    for number in range(3):
        of_class, taken = slide[label == number], slide[chosen][label[chosen] == number]
        require_even(np.bincount(of_class, minlength=80), np.bincount(taken, minlength=80))


def require_even(there: np.ndarray, taken: np.ndarray) -> None:
    """Groups differ by one at most, but for those of which nothing is left."""
    left = taken[taken < there]
    assert not len(left) or taken.max() - left.min() <= 1


def test_the_choice_is_a_function_of_tiles_and_seed() -> None:
    rng = np.random.default_rng(1)
    label, slide, ids = rng.integers(0, 3, 300), rng.integers(0, 9, 300), np.arange(300) * 7
    chosen = set(ids[spread(label, slide, ids, 40, seed=0)])
    mixed = rng.permutation(300)
    assert set(ids[mixed][spread(label[mixed], slide[mixed], ids[mixed], 40, seed=0)]) == chosen
    assert chosen < set(ids[spread(label, slide, ids, 60, seed=0)])
    assert chosen != set(ids[spread(label, slide, ids, 40, seed=1)])


def test_so_many_tiles_are_encoded(labelled: Path) -> None:
    encoder = MeanColour()
    assert made_probe(labelled, most=12).judge(encoder)["knn"] == 1.0
    assert encoder.shapes == [(10, 3, PX, PX), (2, 3, PX, PX)]


# ---- what is left out, and what is refused ---------------------------------------------------------------------------


def test_background_and_classes_on_one_slide_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = {"background": (3, 3), "benign": (3, 3), "gleason3": (5,), "gleason4": (3, 3)}
    probe = made_probe(make_store(tmp_path, counts))
    assert probe.about() == "probe: 12 tiles of 4 slides, 2 classes (benign, gleason4)"
    assert "left out of the probe, for they are on one slide only: gleason3" in capsys.readouterr().err
    assert probe.judge(MeanColour())["knn_chance"] == 0.5


@pytest.mark.parametrize(
    ("counts", "there"),
    [
        ({"benign": (9, 9)}, "benign on 2"),
        ({"benign": (9,), "gleason3": (9,), "gleason4": (5, 5)}, "benign on 1, gleason3 on 1, gleason4 on 2"),
        ({"background": (9, 9), "benign": (9, 9)}, "benign on 2"),
    ],
)
def test_a_store_that_can_tell_nothing_is_refused(tmp_path: Path, counts: Counts, there: str) -> None:
    with pytest.raises(UsageError, match=f"two classes on two slides each are needed, there are: {there};"):
        made_probe(make_store(tmp_path, counts))


def test_a_store_without_labels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(2):
        cv2.imwrite(str(tmp_path / f"images/{number}.png"), np.full((PX, PX, 3), 99, np.uint8))
    tile(datasets.slides([tmp_path / "images"]), tmp_path / "store", TileSettings(PX, slide_mpp=0.5, thresholds=None))
    with pytest.raises(UsageError, match="there are: none"):
        made_probe(tmp_path / "store")


@pytest.mark.parametrize(
    ("mpp", "px", "what"),
    [(1.0, PX, "tiles have 1 um/px, those that are trained on 0.5"), (0.5, 48, "tiles have 48 px, those")],
)
def test_other_tiles_are_refused(labelled: Path, tmp_path: Path, mpp: float, px: int, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        made_probe(make_store(tmp_path, COHORT, mpp, px), on=labelled)


def test_an_encoder_that_takes_no_such_tiles_is_named(tmp_path: Path) -> None:
    probe = made_probe(make_store(tmp_path, COHORT, px=40))
    with pytest.raises(UsageError, match="40 px do not divide into patches of 16 px"):
        probe.judge(build_encoder("vit_tiny_patch16_224"))


def test_too_few_tiles_are_refused(labelled: Path) -> None:
    with pytest.raises(UsageError, match="probe_tiles is 5, must be 2 or more for each class"):
        made_probe(labelled, most=5)


# ---- in a run --------------------------------------------------------------------------------------------------------


def test_a_run_is_judged_and_ends_as_without(
    labelled: Path,
    tmp_path: Path,
    words: Callable[..., list[str]],
    one_thread: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = {"train.steps": 5, "train.log_every": 2, "checkpoint.every": 4, "model.drop_path": 0.3}
    watched = changes | {"monitor.probe": labelled, "monitor.probe_every": 3, "monitor.probe_tiles": 20}
    pretrain(pretrain_config(words(tmp_path / "without", changes, data=labelled)))
    pretrain(pretrain_config(words(tmp_path / "with", watched, data=labelled)))
    saved = [tmp_path / run / "checkpoints/step-00000005" for run in ("with", "without")]
    names = sorted(file.name for file in saved[0].glob("*.safetensors"))
    assert {"student.safetensors", "teacher.safetensors", "optimizer.safetensors"} < set(names)
    for name in names:
        ours, theirs = (load_file(folder / name) for folder in saved)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    lines = {line["step"]: line for line in read_metrics(tmp_path / "with")}
    plain = {line["step"]: line for line in read_metrics(tmp_path / "without")}
    assert list(lines) == [0, 2, 3, 4, 5]
    assert list(plain) == [2, 4, 5]
    assert lines[2]["loss"] == plain[2]["loss"]
    assert "loss" not in lines[0]
    assert "knn 0." in capsys.readouterr().err
    judged = [step for step, line in lines.items() if "knn" in line]
    assert judged == [0, 3, 5]
    assert all(0 <= lines[step]["knn"] <= 1 and lines[step]["probe_rankme"] >= 1 for step in judged)


def test_a_run_that_goes_on_keeps_its_first_judgement(
    labelled: Path, tmp_path: Path, words: Callable[..., list[str]], one_thread: None
) -> None:
    run = tmp_path / "run"
    options = words(run, {"monitor.probe": labelled, "monitor.probe_every": 2}, data=labelled)
    pretrain(pretrain_config(options))
    before = read_metrics(run)
    shutil.rmtree(run / "checkpoints")
    with (run / "metrics.jsonl").open("w") as file:
        file.write(json.dumps(before[0] | {"knn": 0.123}) + "\n")
    pretrain(pretrain_config(options))  # from step 0 again
    after = read_metrics(run)
    assert [line["step"] for line in after] == [0, 1, 2, 3, 4]
    assert after[0]["knn"] == 0.123
    assert after[2]["knn"] == before[2]["knn"]


def test_a_probe_that_will_not_do_leaves_no_run(
    labelled: Path, tmp_path: Path, words: Callable[..., list[str]]
) -> None:
    other = make_store(tmp_path, COHORT, mpp=1.0)
    with pytest.raises(UsageError, match="tiles have 1 um/px"):
        pretrain(pretrain_config(words(tmp_path / "run", {"monitor.probe": other}, data=labelled)))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_ranks_train_alike_while_the_first_one_judges(
    labelled: Path, tmp_path: Path, words: Callable[..., list[str]], ranks: Callable[..., None]
) -> None:
    probe = {"monitor.probe": labelled, "monitor.probe_every": 2, "monitor.probe_tiles": 20}
    for name, changes in (("with", probe), ("without", {})):
        ranks(__file__, 2, *words(tmp_path / name, changes, data=labelled))
    ours, theirs = (
        load_file(tmp_path / name / "checkpoints/step-00000004/teacher.safetensors") for name in ("with", "without")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert [line["step"] for line in read_metrics(tmp_path / "with") if "knn" in line] == [0, 2, 4]


if __name__ == "__main__":
    pretrain(pretrain_config(sys.argv[1:]))
