"""What the tests of checkpoints share: a small model, and a run with two of its checkpoints.

The children of ``test_faults.py``, whose folder is on their path, import this by name.
"""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline import checkpoint
from pipeline.checkpoint import Position, step_folder
from pipeline.saver import Saver


class Model:
    """A small stand-in for a method and its optimizer, a function of ``seed``: all that a checkpoint holds."""

    def __init__(self, seed: int, width: int = 6, out: int = 3, centre: int = 4, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(seed)
        self.student = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.Linear(width, out)).to(device)
        self.teacher = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.Linear(width, out)).to(device)
        self.centre = torch.randn(centre, generator=generator).to(device)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=0.1, fused=device != "cpu")
        # Gradients are drawn, not computed: a matrix product's last bits may depend on where its operands lie.
        for tensor in (*self.student.state_dict().values(), *self.teacher.state_dict().values()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        for parameter in self.student.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
        self.optimizer.step()

    @property
    def parts(self) -> tuple[dict[str, nn.Module], dict[str, torch.Tensor], torch.optim.Optimizer]:
        return {"student": self.student, "teacher": self.teacher}, {"centre": self.centre}, self.optimizer

    def begin(self, saver: Saver, step: int) -> None:
        saver.save(Position(step, 10 * step), *self.parts, {"mpp": 0.5})

    def write(self, saver: Saver, step: int) -> None:
        self.begin(saver, step)
        saver.wait()

    def save(self, run: Path, step: int, keep: int = 3, keep_every: int = 0) -> Path:
        with Saver(run, keep, keep_every) as saver:
            self.begin(saver, step)
        return step_folder(run, step)

    def load(self, folder: Path) -> Position:
        return checkpoint.load(folder, *self.parts)

    def live(self) -> dict[str, torch.Tensor]:
        """Everything, by name, as it changes when training goes on."""
        parts = {"student": self.student.state_dict(), "teacher": self.teacher.state_dict(), "": {"c": self.centre}}
        parts |= {f"adam{number}": state for number, state in self.optimizer.state_dict()["state"].items()}
        return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """A copy of everything, by name."""
        return {name: value.clone() for name, value in self.live().items()}

    def equals(self, tensors: dict[str, torch.Tensor]) -> bool:
        own = self.live()
        return own.keys() == tensors.keys() and all(torch.equal(value, tensors[name]) for name, value in own.items())


@pytest.fixture(scope="session")
def model() -> type[Model]:
    """model(seed, ...) makes one."""
    return Model


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at steps 2 and 4, of model(1) and model(2): read only."""
    run = tmp_path_factory.mktemp("sound")
    Model(1).save(run, 2)
    Model(2).save(run, 4)
    return run


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    """A copy that may be harmed."""
    return shutil.copytree(sound, tmp_path / "run")
