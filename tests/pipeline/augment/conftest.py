"""What the tests of views share: one thread, a view to change, draws of a few samples."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.views import ColourSpec, ViewParameters, ViewSpec, draw

SpecOf = Callable[..., ViewSpec]
DrawnFrom = Callable[..., ViewParameters]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def spec_of() -> SpecOf:
    """A global view of 40 px with nothing but its crop, changed as given: spec_of(size, blur=0.5)."""

    def change(size: int = 40, **changes: Any) -> ViewSpec:
        return replace(ViewSpec("global0", 0, size, (0.4, 1.0), 0.0, 0.0, is_global=True), **changes)

    return change


@pytest.fixture(scope="session")
def drawn_from() -> DrawnFrom:
    """What is drawn for samples 0 to n: drawn_from(spec, colour, n, tile_px=224, epoch=0)."""

    def first(spec: ViewSpec, colour: ColourSpec, n: int, tile_px: int = 224, epoch: int = 0) -> ViewParameters:
        return draw(spec, colour, 621, np.full(n, epoch), np.arange(n), tile_px)

    return first
