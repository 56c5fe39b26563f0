"""A safetensors file laid out in memory: byte for byte the library's."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from safetensors.torch import save as library_bytes

from pipeline.checkpoint import write_tensors
from pipeline.tensor_file import TYPES, TensorFile

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=9).filter(lambda name: name != "__metadata__")
TENSORS = st.dictionaries(
    NAMES, st.tuples(st.sampled_from(list(TYPES)), st.lists(st.integers(0, 4), max_size=3)), max_size=8
)


def some_tensor(dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return data.view(dtype).view(shape)


@given(layout=TENSORS)
def test_bytes_are_those_of_the_library(
    tmp_path_factory: pytest.TempPathFactory, layout: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    tensors = {name: some_tensor(dtype, shape) for name, (dtype, shape) in layout.items()}
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    write_tensors(path, tensors)
    assert path.read_bytes() == library_bytes(tensors)
    assert path.stat().st_size == TensorFile(tensors).nbytes


def test_strided_shared_and_trained_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4).requires_grad_()
    tensors = {"turned": base.T, "some": base[:, 1], "one": base[0, 0].expand(5), "all": base}
    path = tmp_path / "some.safetensors"
    write_tensors(path, tensors)
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_fits_only_what_it_was_made_for() -> None:
    file = TensorFile({"a": torch.zeros(2, 3), "b": torch.zeros(1)})
    assert file.fits({"b": torch.ones(1), "a": torch.ones(3, 2).T})
    for other in (
        {"a": torch.zeros(2, 3)},
        {"a": torch.zeros(2, 3), "c": torch.zeros(1)},
        {"a": torch.zeros(3, 2), "b": torch.zeros(1)},
        {"a": torch.zeros(2, 3).half(), "b": torch.zeros(1)},
    ):
        assert not file.fits(other)
