"""A bundle: sound or refused, the same in timm, in plain torch and in the original's names, and nobody's data in it."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config

from pipeline import bundle
from pipeline.bundle import open_bundle, self_test, self_test_tiles
from pipeline.cli import main
from pipeline.commands.parser import pretrain_config
from pipeline.downstream.tasks import evaluate
from pipeline.embed import embed, open_encoder
from pipeline.export import export
from pipeline.models.encoders import build_encoder
from pipeline.models.frozen import load_encoder
from pipeline.pretrain import pretrain
from tiling import atomic, datasets, phantom
from tiling.errors import BonyError, CheckpointError, DamageError, UsageError
from tiling.run import tile
from tiling.settings import TileSettings
from tiling.store import TileStore

CPU = torch.device("cpu")
CANARY = "CANARY-Mueller-1950"
FILES = [
    "MODEL_CARD.md", "NOTICE.md", "SHA256SUMS", "config.json", "decoder.safetensors", "facebook.pth",
    "head.safetensors", "model.safetensors", "selftest/expected.safetensors",
    *(f"selftest/tile-{number}.png" for number in range(8)),
]  # fmt: skip
# A first line that takes the network away from what follows.
OFFLINE = "import socket\ndef gone(*a, **k): raise OSError('no network')\nsocket.socket.connect = gone\n"
OFFLINE += "socket.getaddrinfo = gone\n"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory, words: Callable[..., list[str]]) -> Path:
    """A labelled store, a short run, its features, a result and a bundle; every path holds a patient's name."""
    root = tmp_path_factory.mktemp(CANARY)
    ids = phantom.make_cohort(root, 3, size=(896, 896), karolinska=0)
    for slide_id in ids:
        for path in (*root.glob(f"*/{slide_id}.tiff"), *root.glob(f"*/{slide_id}_mask.tiff")):
            path.rename(path.with_name(f"{CANARY}{path.name}"))
    table = (root / "train.csv").read_text().splitlines()
    (root / "train.csv").write_text("\n".join([table[0], *(f"{CANARY}{row}" for row in table[1:])]) + "\n")
    tile(datasets.panda(root), root / "store", TileSettings())
    changes = {"train.steps": 2, "checkpoint.every": 1, "views.mean": "[0.7,0.5,0.6]", "views.std": "[0.2,0.3,0.25]"}
    pretrain(pretrain_config(words(root / "run", changes, root / "store")))
    embed(root / "run", root / "store", root / "features")
    evaluate("panda", root / "store", root / "features", root / "result")
    export(root / "run", root / "bundle", root / "result")
    return root


@pytest.fixture
def own(boxes: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may spoil."""
    return Path(shutil.copytree(boxes / "bundle", tmp_path / "bundle"))


def reseal(folder: Path) -> None:
    """As somebody would who changes a file on purpose."""
    (folder / atomic.SUMS).unlink()
    atomic.seal(folder, atomic.SUMS)


def test_holds_what_it_should_and_sha256sum_agrees(boxes: Path) -> None:
    folder = boxes / "bundle"
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == FILES
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=folder, check=True)
    assert not list(boxes.glob(".bundle*"))
    assert bundle.problems(folder) == []
    assert main(["verify", str(folder)]) == 0


def test_the_same_run_gives_the_same_bytes(boxes: Path, tmp_path: Path) -> None:
    again = export(boxes / "run", tmp_path / "again", boxes / "result")
    assert (again / atomic.SUMS).read_bytes() == (boxes / "bundle" / atomic.SUMS).read_bytes()


def test_no_patient_data(boxes: Path) -> None:
    hidden = [CANARY, *(path.name for path in (boxes / "store/slides").iterdir()), str(boxes), "/root", "/tmp"]
    for path in (boxes / "bundle").rglob("*"):
        assert CANARY not in path.relative_to(boxes).as_posix()
        data = path.read_bytes() if path.is_file() else b""
        assert not [word for word in hidden if word.encode() in data], path


# ---- every byte ------------------------------------------------------------------------------------------------------


def forbid_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(*_: object, **__: object) -> None:
        pytest.fail("parsed before it was checked")

    for target in ("json.loads", "torch.load", "pipeline.checkpoint.load_file", "pipeline.bundle.load_file"):
        monkeypatch.setattr(target, parsed)
    monkeypatch.setattr("PIL.Image.open", parsed)


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_refused_before_anything_is_parsed(
    own: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own / name
    sound = path.read_bytes()
    forbid_parsing(monkeypatch)
    for at in (0, len(sound) // 2, len(sound) - 1):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        with pytest.raises(DamageError) as refused:
            open_bundle(own, CPU)
        assert main(["verify", str(own)]) == 1
        said = capsys.readouterr().out
        if name != atomic.SUMS:
            assert str(path) in str(refused.value)
            assert str(path) in said
    path.unlink()
    with pytest.raises(DamageError, match="missing"):
        open_bundle(own, CPU)


def test_every_file_of_a_checkpoint_too(boxes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(boxes / "run/checkpoints/step-00000002", tmp_path / "step-00000002"))
    forbid_parsing(monkeypatch)
    for path in sorted(folder.iterdir()):
        sound = path.read_bytes()
        for at in (0, len(sound) // 2, len(sound) - 1):
            path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
            with pytest.raises(DamageError):
                load_encoder(folder, CPU)
        path.write_bytes(sound)


def test_other_weights_with_right_checksums_fail_the_self_test(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(own / "model.safetensors")
    tensors["norm.bias"][0] += 1e-3
    save_file(tensors, own / "model.safetensors")
    reseal(own)
    assert main(["verify", str(own)]) == 1
    assert "cls differs by" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../outside", "extra.txt"])
def test_added_files_and_links_are_refused(own: Path, name: str) -> None:
    (own.parent / "outside").write_text("x")
    if name == "extra.txt":
        (own / name).write_text("x")
    else:
        (own / "link").symlink_to(name)
        reseal(own)
    with pytest.raises(DamageError):
        open_bundle(own, CPU)


def test_config_that_does_not_fit_is_one_clear_error(own: Path) -> None:
    about = json.loads((own / "config.json").read_text())
    changes = (
        ({"architecture": "xcit_tiny_12_p16_224"}, "tensor"),
        ({"format_version": 99}, "format version 99"),
        ({"tiling": None}, "cannot be read"),
        ({"head": about["head"] | {"out_dim": 65}}, "weight_g"),
    )
    for change, says in changes:
        atomic.write_json(own / "config.json", about | change)
        reseal(own)
        with pytest.raises(CheckpointError, match=says):
            open_bundle(own, CPU)
        assert len(bundle.problems(own)) == 1


# ---- the same network everywhere -------------------------------------------------------------------------------------


def test_opened_it_is_the_runs_teacher(boxes: Path) -> None:
    opened, teacher = open_bundle(boxes / "bundle", CPU), load_encoder(boxes / "run", CPU)
    with TileStore(boxes / "store") as store:
        tiles = torch.from_numpy(store.read(np.arange(4)))
    for tap, values in teacher.features(tiles).items():
        assert torch.equal(opened.encoder.features(tiles)[tap], values)
    assert replace(opened.encoder, backbone=teacher.backbone, head=teacher.head) == teacher
    assert (opened.encoder.mean, opened.encoder.mpp) == ((0.7, 0.5, 0.6), pytest.approx(0.5))
    assert (opened.tiling.mpp, opened.tiling.slide_mpp) == (opened.encoder.mpp, None)
    assert all(apart < bundle.TOLERANCE[name] / 5 for name, apart in self_test(opened).items())


def test_timm_loads_it_offline_and_gives_the_self_test(boxes: Path) -> None:
    program = OFFLINE + (
        "import timm, torch\nfrom PIL import Image\nfrom safetensors.torch import load_file\n"
        "from timm.data import create_transform, resolve_model_data_config\n"
        "model = timm.create_model('local-dir:.', pretrained=True).eval()\n"
        "transform = create_transform(**resolve_model_data_config(model), is_training=False)\n"
        "tiles = [transform(Image.open(f'selftest/tile-{n}.png').convert('RGB')) for n in range(8)]\n"
        "expected = load_file('selftest/expected.safetensors')['cls']\n"
        "with torch.no_grad(): print(float((model(torch.stack(tiles)) - expected).abs().max()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=boxes / "bundle", capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 1e-5


def test_mean_std_and_mpp_are_ours(boxes: Path) -> None:
    config = resolve_model_data_config(timm.create_model(f"local-dir:{boxes / 'bundle'}", pretrained=True))
    assert (config["mean"], config["std"], config["crop_pct"]) == ([0.7, 0.5, 0.6], [0.2, 0.3, 0.25], 1.0)
    assert config["input_size"] == [3, 224, 224]
    assert json.loads((boxes / "bundle/config.json").read_text())["mpp"] == pytest.approx(0.5)


def require_card_gives_the_self_test(folder: Path, values: Mapping[str, str]) -> None:
    """Run the model card's own code; ``values`` says what in it must be which output of the first tile."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "MODEL_CARD.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    program = OFFLINE + "\n".join(blocks) + f"\nprint([{', '.join(f'{text}[0].tolist()' for text in values.values())}])"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=folder, capture_output=True, text=True, check=True
    )
    expected = load_file(folder / "selftest/expected.safetensors")
    for name, found in zip(values, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert (torch.tensor(found) - expected[name][0]).abs().max() < bundle.TOLERANCE[name] * 2


def test_the_model_cards_own_code_runs_and_gives_the_self_test(boxes: Path) -> None:
    values = {"cls": "features", "head": "output", "probabilities": "x.softmax(1)"}
    require_card_gives_the_self_test(boxes / "bundle", values)
    card = (boxes / "bundle/MODEL_CARD.md").read_text()
    assert "0.7, 0.5, 0.6" in card
    assert "Haar" not in card


def test_facebook_pth_is_the_teacher_under_the_originals_names(boxes: Path) -> None:
    state = torch.load(boxes / "bundle/facebook.pth", weights_only=True)
    assert state.keys() == {"teacher"}
    assert {name.split(".")[0] for name in state["teacher"]} == {"backbone", "head"}
    again = open_encoder(boxes / "bundle/facebook.pth", CPU, original_mpp=0.5)
    opened = open_bundle(boxes / "bundle", CPU)
    tiles = self_test_tiles(boxes / "bundle")
    normalised = replace(again, mean=opened.encoder.mean, std=opened.encoder.std)
    for tap, values in opened.encoder.features(tiles).items():
        assert torch.equal(normalised.features(tiles)[tap], values)
    assert again.mean == (0.485, 0.456, 0.406)  # all that such a file lets one assume
    with pytest.raises(UsageError, match="--encoder-mpp"):
        open_encoder(boxes / "bundle/facebook.pth", CPU)


def test_a_vit_goes_the_same_way(tmp_path: Path, words: Callable[..., list[str]]) -> None:
    changes = {"model.name": "vit_tiny_patch16_224", "train.steps": 1, "views.local_crops": 1}
    pretrain(pretrain_config(words(tmp_path / "run", changes)))
    folder = export(tmp_path / "run", tmp_path / "bundle")
    assert bundle.problems(folder) == []
    opened = open_bundle(folder, CPU)
    assert opened.decoder is None
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    tiles = self_test_tiles(folder)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (opened.encoder.mean, opened.encoder.std))
    with torch.no_grad():
        found = model((tiles.permute(0, 3, 1, 2) / 255 - mean) / std)
    assert (found - opened.encoder.features(tiles)["cls"]).abs().max() < 1e-5
    assert "no decoder" in (folder / "MODEL_CARD.md").read_text()


def test_of_the_weights_it_began_with_it_is_said_that_there_were_some_but_not_where(
    tmp_path: Path, words: Callable[..., list[str]]
) -> None:
    weights = tmp_path / f"{CANARY}.pth"
    torch.save(build_encoder("xcit_nano_12_p16_224").state_dict(), weights)
    pretrain(pretrain_config(words(tmp_path / "run", {"model.init_from": weights, "train.steps": 1})))
    folder = export(tmp_path / "run", tmp_path / "bundle")
    assert "begun with other weights, whose terms apply as well" in (folder / "NOTICE.md").read_text()
    for path in folder.rglob("*"):
        assert path.is_dir() or CANARY.encode() not in path.read_bytes()


def test_what_is_trained_on_the_haar_transform_is_fed_it_everywhere(
    tmp_path: Path, words: Callable[..., list[str]], boxes: Path
) -> None:
    changes = {"views.input": "haar", "train.steps": 1, "views.mean": "[0.7,0.5,0.6]"}
    assert "trained from random initialisation" in (boxes / "bundle/NOTICE.md").read_text()
    pretrain(pretrain_config(words(tmp_path / "run", changes)))
    folder = export(tmp_path / "run", tmp_path / "bundle")
    assert bundle.problems(folder) == []
    of_run, of_bundle = load_encoder(tmp_path / "run", CPU), open_bundle(folder, CPU).encoder
    assert of_run.input == of_bundle.input == "haar"
    tiles = self_test_tiles(folder)
    images = tiles.permute(0, 3, 1, 2).double() / 255
    band = (images[..., ::2, ::2] + images[..., 1::2, ::2] + images[..., ::2, 1::2] + images[..., 1::2, 1::2]) / 2
    mean, std = (2 * torch.tensor(values).double().view(3, 1, 1) for values in (of_run.mean, of_run.std))
    assert of_run.mean == (0.7, 0.5, 0.6)
    expected = of_run.double().backbone((band - mean) / std).float()
    assert (of_bundle.features(tiles)["cls"] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(of_run.features(tiles)["cls"], of_bundle.features(tiles)["cls"])
    assert replace(of_run, input="rgb").features(tiles)["cls"].sub(expected).abs().max() > 1e-2
    config = resolve_model_data_config(timm.create_model(f"local-dir:{folder}", pretrained=True))
    assert config["input_size"] == [3, 112, 112]
    require_card_gives_the_self_test(folder, {"cls": "features", "head": "output"})
    assert "Haar wavelet transform, 112 x 112 px" in (folder / "MODEL_CARD.md").read_text()
    about = json.loads((boxes / "bundle/config.json").read_text())
    assert about["input"] == "rgb"
    older = Path(shutil.copytree(boxes / "bundle", tmp_path / "older"))
    atomic.write_json(older / "config.json", {key: value for key, value in about.items() if key != "input"})
    reseal(older)
    assert open_bundle(older, CPU).encoder.input == "rgb"


# ---- use and refusal -------------------------------------------------------------------------------------------------


def test_features_of_run_and_bundle_are_one_feature_store(boxes: Path, tmp_path: Path) -> None:
    from pipeline.features import read_features

    embed(boxes / "bundle", boxes / "store", boxes / "features")  # finished already: the same encoder, so no refusal
    embed(boxes / "bundle", boxes / "store", tmp_path / "features")
    with TileStore(boxes / "store") as store:
        for tap in ("cls", "head"):
            ours, theirs = (read_features(path, store, tap) for path in (boxes / "features", tmp_path / "features"))
            assert np.allclose(ours, theirs, rtol=0, atol=1e-5)  # the fixture's own may have run on more threads


def test_a_decoder_of_another_encoder_is_refused(boxes: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="features of encoder"):
        export(boxes / "run/checkpoints/step-00000001", tmp_path / "bundle", boxes / "result")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("what", "error"), [("decoder.safetensors", DamageError), ("results.json", DamageError), (None, UsageError)]
)
def test_a_damaged_or_missing_result_is_refused(
    boxes: Path, tmp_path: Path, what: str | None, error: type[BonyError]
) -> None:
    result = tmp_path / "result"
    if what is not None:
        shutil.copytree(boxes / "result", result)
        with (result / what).open("r+b") as file:
            file.seek(100)
            file.write(b"\0\1")
    with pytest.raises(error, match="result"):
        export(boxes / "run", tmp_path / "bundle", result)
    assert not (tmp_path / "bundle").exists()


def test_what_exists_is_not_overwritten(boxes: Path, own: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        export(boxes / "run", own)


def test_networks_that_give_no_numbers_are_not_exported(boxes: Path, tmp_path: Path) -> None:
    result = Path(shutil.copytree(boxes / "result", tmp_path / "result"))
    tensors = load_file(result / "decoder.safetensors")
    tensors["decoder.8.bias"][0] = float("nan")
    save_file(tensors, result / "decoder.safetensors")
    atomic.seal(result)
    with pytest.raises(CheckpointError, match=r"self-test: probabilities differs by nan"):
        export(boxes / "run", tmp_path / "bundle", result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result"]
