"""Boxes: one changed byte, a link, a name that leads out, an extra file: all are named."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tiling import atomic
from tiling.errors import DamageError

LISTINGS = [atomic.COMPLETE, atomic.SUMS]


@pytest.fixture(params=LISTINGS)
def listing(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def box(tmp_path: Path, listing: str) -> Path:
    with atomic.building(tmp_path / "box", tmp_path / "work", listing) as folder:
        (folder / "inner").mkdir()
        (folder / "inner/a b.bin").write_bytes(bytes(range(256)))
        (folder / "z.json").write_text("{}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["box"]
    assert atomic.damaged_files(tmp_path / "box", listing) == []
    return tmp_path / "box"


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["inner/a b.bin", "z.json", ""]), at=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_any_changed_byte_of_any_file_is_noticed(box: Path, listing: str, name: str, at: int, byte: int) -> None:
    path = box / (name or listing)
    sound = path.read_bytes()
    at %= len(sound)
    path.write_bytes(sound[:at] + bytes([byte]) + sound[at + 1 :])
    found = atomic.damaged_files(box, listing)
    path.write_bytes(sound)
    assert bool(found) == (byte != sound[at])


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname"])
def test_a_listed_name_that_leads_out_is_refused(box: Path, listing: str, name: str) -> None:
    outside = box.parent / "outside.json"
    outside.write_text("{}\n")
    digest = atomic.sha256_file(box / "z.json")
    lines = [*(box / listing).read_text().splitlines(), f"{digest}  {name}"]
    lines.sort(key=lambda line: line.split("  ")[1])
    (box / listing).write_text("\n".join(lines) + "\n")
    with pytest.raises(DamageError, match="missing"):
        atomic.require_sound(box, listing)


def test_a_link_is_refused_even_to_the_same_bytes(box: Path, listing: str) -> None:
    (box / "z.json").rename(box.parent / "z.json")
    (box / "z.json").symlink_to(box.parent / "z.json")
    assert atomic.damaged_files(box, listing) == [f"{box / 'z.json'}: is a symbolic link"]


def test_another_file_and_a_missing_listing_are_named(box: Path, listing: str) -> None:
    (box / "more").write_text("")
    assert atomic.damaged_files(box, listing) == [f"{box / 'more'}: not listed in {listing}"]
    (box / listing).unlink()
    assert atomic.damaged_files(box, listing) == [f"{box / listing}: missing"]
