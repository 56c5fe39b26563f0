"""Train a classifier on arrays of frozen features.

Features stay where they are (a memory map is fine) and in their own type; one batch at a time becomes
float32 on the device.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pipeline.downstream.decoders import panda_mlp
from pipeline.downstream.splits import Split
from tiling.errors import EvaluationError, UsageError

Progress = Callable[[int, int, dict[str, Any]], None]
Decoder = Callable[[int, int], nn.Module]
_PREDICT_BATCH = 1024
_CHUNK = 1024  # rows looked at together for statistics: 32 MiB of float64 at 4,096 features
_FUSED = ("cpu", "cuda")  # devices with a fused AdamW: a tenth of the time on a CPU


@dataclass(frozen=True)
class FitConfig:
    """How a decoder is trained.

    Args:
        epochs: Passes over the train part.
        batch_size: Rows per optimizer step.
        lr: Peak learning rate of AdamW, reached at the first step and lowered to 0 along a cosine.
        weight_decay: AdamW's.
        seed: Decides the initial weights and the order of the rows.
        device: A torch device: "cpu", "cuda", "cuda:1", "mps".
        patience: Stop after this many epochs without a lower val loss; None trains all epochs.

    Raises:
        UsageError: A value out of range, or a device that this machine lacks.
    """

    epochs: int = 20
    batch_size: int = 256
    lr: float = 1e-4
    weight_decay: float = 1e-2
    seed: int = 0
    device: str = "cpu"
    patience: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} {value}", where="fit", do="give a whole number >= 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError(f"lr {self.lr}", where="fit", do="give a number > 0")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UsageError(f"weight_decay {self.weight_decay}", where="fit", do="give a number >= 0")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed {self.seed}", where="fit", do="give a whole number from 0 to 2**63 - 1")
        try:
            kind = torch.device(self.device).type
        except RuntimeError:
            raise UsageError(f"device {self.device!r}", where="fit", do="give cpu, cuda, cuda:N or mps") from None
        available: dict[str, Callable[[], bool]] = {
            "cuda": torch.cuda.is_available,
            "mps": torch.backends.mps.is_available,
        }
        if kind in available and not available[kind]():
            raise UsageError(f"device {self.device!r} is not available here", where="fit", do="give cpu")


@dataclass(frozen=True)
class FitResult:
    """A trained classifier.

    Args:
        model: ``norm`` (train-part mean and std, as buffers) then ``decoder``, in eval mode on the CPU,
            with the weights of the best epoch. Its state dict is all that is needed to apply it.
        history: Per epoch ``epoch`` (from 1), ``lr`` (at its first step), ``train_loss``, ``val_loss``,
            ``val_accuracy``, ``val_balanced_accuracy`` (over the classes present in val).
        best_epoch: The epoch of lowest val loss, from 1; the earliest of equals.
    """

    model: nn.Sequential
    history: list[dict[str, Any]]
    best_epoch: int


class Standardise(nn.Module):
    """(x - mean) / std with stored statistics; nothing to train. Features (N, D) in and out."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Standardised features, shape (N, D)."""
        return (x - self.mean) / self.std


def classifier(in_features: int, classes: int, decoder: Decoder = panda_mlp) -> nn.Sequential:
    """An untrained model of the structure that ``fit_classifier`` returns, for loading a saved state into."""
    norm = Standardise(torch.zeros(in_features), torch.ones(in_features))
    return nn.Sequential(OrderedDict(norm=norm, decoder=decoder(in_features, classes)))


@dataclass(frozen=True)
class _Data:
    """Arrays as the caller has them: features (N, D), label (N,); and class weights (C,)."""

    features: np.ndarray
    label: np.ndarray
    weight: torch.Tensor

    def x(self, rows: np.ndarray) -> torch.Tensor:
        """Features of ``rows``, float32, shape (len(rows), D)."""
        return _tensor(self.features, rows)

    def y(self, rows: np.ndarray) -> torch.Tensor:
        """Classes of ``rows``, int64, shape (len(rows),)."""
        return torch.from_numpy(self.label[rows].astype(np.int64))


def fit_classifier(
    features: np.ndarray,
    label: np.ndarray,
    split: Split,
    classes: int,
    config: FitConfig,
    class_weights: bool = False,
    progress: Progress | None = None,
    decoder: Decoder = panda_mlp,
) -> FitResult:
    """Train a decoder on the train part and keep the epoch with the lowest val loss.

    Cross-entropy on logits, AdamW, cosine learning rate. Equal inputs, seed and thread count give equal
    weights on a CPU; PyTorch's global random state is left as it was.

    Args:
        features: float32 or float16, shape (N, D).
        label: Class per row, int, shape (N,).
        split: Rows of ``features`` per part; the test part is not looked at.
        classes: Number of classes C; train may lack some.
        config: How to train.
        class_weights: Weigh rows by the inverse frequency of their class in train, in both losses; the
            weights of the classes in train have mean 1. A class that train lacks has weight 0 in any case:
            it cannot be learnt, and its val rows would favour the least trained epoch. It does count in the
            accuracies.
        progress: Called after each epoch with (epoch, epochs, that epoch's record).
        decoder: Makes the network from (D, C).

    Returns:
        The model, its history and the epoch it was taken from.

    Raises:
        EvaluationError: Features that are not finite, labels outside the classes, train and val parts that
            are empty or share no class, or a loss that is no longer finite.
    """
    _check(features, label, split, classes)
    weight = _class_weights(label[split.train], classes, class_weights)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        model = classifier(features.shape[1], classes, decoder)
    mean, std = _statistics(features, split.train)
    model.get_submodule("norm").load_state_dict({"mean": mean, "std": std})
    history, best_epoch = _train(model, _Data(features, label, weight), split, config, progress)
    return FitResult(model.cpu().eval(), history, best_epoch)


def predict(model: nn.Module, features: np.ndarray, batch_size: int = _PREDICT_BATCH) -> np.ndarray:
    """Class probabilities of a classifier.

    Args:
        model: From features (N, D) to logits (N, C); used in eval mode, on the device it is on.
        features: float32 or float16, shape (N, D); N may be 0.
        batch_size: Rows at a time; changes nothing but memory and rounding.

    Returns:
        Softmax of the logits, float32, shape (N, C).

    Raises:
        EvaluationError: Features that are not finite.
    """
    _check_finite(features, np.arange(len(features)))
    return functional.softmax(_logits(model, features, np.arange(len(features)), batch_size), dim=1).numpy()


def _train(
    model: nn.Sequential, data: _Data, split: Split, config: FitConfig, progress: Progress | None
) -> tuple[list[dict[str, Any]], int]:
    """Train ``model`` in place and leave it at its best epoch; returns the history and that epoch."""
    device = torch.device(config.device)
    model.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=device.type in _FUSED
    )
    steps = config.epochs * math.ceil(len(split.train) / config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(config.seed)
    best = {name: value.clone() for name, value in model.state_dict().items()}
    best_loss, best_epoch = math.inf, 0
    history: list[dict[str, Any]] = []
    for epoch in range(1, config.epochs + 1):
        record: dict[str, Any] = {"epoch": epoch, "lr": schedule.get_last_lr()[0]}
        rows = split.train[torch.randperm(len(split.train), generator=generator).numpy()]
        record["train_loss"] = _train_epoch(model, data, rows, config, optimizer, schedule, epoch)
        record |= _validate(model, data, split.val, epoch)
        history.append(record)
        if record["val_loss"] < best_loss:
            best_loss, best_epoch = record["val_loss"], epoch
            for name, value in model.state_dict().items():
                best[name].copy_(value)
        if progress is not None:
            progress(epoch, config.epochs, record)
        if config.patience is not None and epoch - best_epoch >= config.patience:
            break
    model.load_state_dict(best)
    return history, best_epoch


def _train_epoch(
    model: nn.Module,
    data: _Data,
    rows: np.ndarray,
    config: FitConfig,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    epoch: int,
) -> float:
    """One pass over ``rows``, int64, in their order; returns the mean loss per unit of class weight."""
    device = torch.device(config.device)
    weight = data.weight.to(device)
    model.train()
    loss_sum = weight_sum = 0.0
    for part in _batches(rows, config.batch_size):
        y = data.y(part)  # (B,)
        logits = model(data.x(part).to(device))  # (B, C)
        loss = functional.cross_entropy(logits, y.to(device), weight=weight)
        value = loss.item()
        if not math.isfinite(value):  # before the update, so that nothing is spoilt by it
            raise EvaluationError(
                f"train loss {value}",
                where=f"epoch {epoch}",
                do=f"lower the learning rate (lr {config.lr:g})",
            )
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        share = float(data.weight[y].sum())
        loss_sum += value * share
        weight_sum += share
    return loss_sum / weight_sum


def _validate(model: nn.Module, data: _Data, rows: np.ndarray, epoch: int) -> dict[str, float]:
    logits = _logits(model, data.features, rows, _PREDICT_BATCH)  # (N_val, C)
    truth = data.y(rows)
    loss = float(functional.cross_entropy(logits, truth, weight=data.weight))
    if not math.isfinite(loss):
        raise EvaluationError(f"val loss {loss}", where=f"epoch {epoch}", do="lower the learning rate")
    right = (logits.argmax(dim=1) == truth).numpy()
    recalls = [right[truth.numpy() == value].mean() for value in np.unique(truth.numpy())]
    return {
        "val_loss": loss,
        "val_accuracy": float(right.mean()),
        "val_balanced_accuracy": float(np.mean(recalls)),
    }


@torch.inference_mode()
def _logits(model: nn.Module, features: np.ndarray, rows: np.ndarray, batch_size: int) -> torch.Tensor:
    """Logits of ``rows`` on the CPU, float32, shape (len(rows), C)."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    parts = [model(_tensor(features, part).to(device)).float().cpu() for part in _batches(rows, batch_size)]
    if not parts:
        parts = [model(_tensor(features, rows).to(device)).float().cpu()]
    model.train(was_training)
    return torch.cat(parts)


def _batches(rows: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), batch_size):
        yield rows[start : start + batch_size]


def _tensor(features: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(features[rows].astype(np.float32, copy=False))


def _check(features: np.ndarray, label: np.ndarray, split: Split, classes: int) -> None:
    if features.ndim != 2 or len(features) != len(label):
        raise EvaluationError(
            f"features of shape {features.shape} for {len(label)} labels",
            do="pass one row of features per label",
        )
    for name, rows in (("train", split.train), ("val", split.val)):
        if not len(rows):
            raise EvaluationError(f"the {name} part has no rows", do="label more slides")
        outside = (label[rows] < 0) | (label[rows] >= classes)
        if outside.any():
            raise EvaluationError(
                f"label {label[rows][outside][0]} outside the {classes} classes", where=f"{name} part"
            )
    learnt = np.unique(label[split.train])
    if len(learnt) < 2:
        raise EvaluationError(f"the train part has only class {learnt[0]}", do="label slides of another class")
    if not np.isin(label[split.val], learnt).any():
        raise EvaluationError("no class of the val part is in the train part", do="label more slides of each class")
    _check_finite(features, np.concatenate((split.train, split.val)))


def _check_finite(features: np.ndarray, rows: np.ndarray) -> None:
    bad = sum(int((~np.isfinite(features[part]).all(axis=1)).sum()) for part in _batches(rows, _CHUNK))
    if bad:
        raise EvaluationError(
            f"features that are not finite in {bad} of {len(rows)} rows",
            do="check the encoder and embed again",
        )


def _statistics(features: np.ndarray, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std of ``rows``, float32, shape (D,) each; std 1 where a feature does not vary."""
    mean = sum(features[part].sum(axis=0, dtype=np.float64) for part in _batches(rows, _CHUNK)) / len(rows)
    squares = sum(((features[part] - mean) ** 2).sum(axis=0) for part in _batches(rows, _CHUNK))
    std = np.sqrt(squares / len(rows))
    # Below this the spread is rounding, and dividing by it would blow rounding up to features.
    std = np.where(std > 1e-6 * np.maximum(1.0, np.abs(mean)), std, 1.0)
    return torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(std.astype(np.float32))


def _class_weights(label: np.ndarray, classes: int, balanced: bool) -> torch.Tensor:
    """Inverse frequencies, mean 1 over the classes present, or 1; 0 for the others: float32, shape (C,)."""
    counts = np.bincount(label.astype(np.int64), minlength=classes)
    weight = np.divide(1.0, counts if balanced else 1.0, out=np.zeros(classes), where=counts > 0)
    return torch.from_numpy((weight / weight[counts > 0].mean()).astype(np.float32))
