"""A slide in DICOM, made by a public writer from real pixels, and read through OpenSlide."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import pytest

from tiling.dicom import one_per_series, series_of
from tiling.errors import SlideError
from tiling.slide import Slide, open_slide
from tiling.slide_openslide import OpenSlideSlide

Pixels = Callable[[Slide, int], np.ndarray]
SVS = "wsi/CMU-1-Small-Region.svs"


@pytest.fixture(scope="module")
def dicom_slides(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SVS twice as DICOM with two levels more, label, macro and thumbnail: two series in one folder."""
    folder = tmp_path_factory.mktemp("dicom")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the writer's own
        wsidicomizer = pytest.importorskip("wsidicomizer")
        for number in range(2):
            wsidicomizer.WsiDicomizer.convert(shared_data / SVS, folder / str(number), add_missing_levels=True)
    for file in sorted(folder.rglob("*.dcm")):
        file.rename(folder / f"{file.parent.name}-{file.name}")
    return folder


def test_any_file_of_a_series_opens_the_slide(dicom_slides: Path, shared_data: Path, level_pixels: Pixels) -> None:
    files = sorted(dicom_slides.glob("0-*.dcm"))
    assert len(files) > 3
    with open_slide(shared_data / SVS) as source:
        original = level_pixels(source, 0)
    for file in files:
        with open_slide(file) as slide, openslide.OpenSlide(file) as theirs:
            assert isinstance(slide, OpenSlideSlide)
            assert slide.mpp == pytest.approx(0.499)
            assert [(level.width, level.height) for level in slide.levels] == list(theirs.level_dimensions)
            assert len(slide.levels) > 1
            assert slide.compressed_sizes(0) is None
            if file is files[0]:
                # The writer encodes again, with subsampled chroma.
                assert np.abs(level_pixels(slide, 0).astype(int) - original).mean() < 4
                for level in slide.levels:
                    region = theirs.read_region((0, 0), level.index, (level.width, level.height))
                    off = np.abs(level_pixels(slide, level.index).astype(int) - np.asarray(region)[..., :3])
                    # A block of a crooked level begins at a part of a pixel, and OpenSlide resamples it.
                    assert off.max() == 0 if level.index == 0 else off.mean() < 4


def test_pixels_are_those_of_the_frames(dicom_slides: Path) -> None:
    """The file's own JPEG frames, taken out by another reader."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pydicom = pytest.importorskip("pydicom")
        instances = [pydicom.dcmread(file) for file in sorted(dicom_slides.glob("0-*.dcm"))]
        instance = max(instances, key=lambda one: one.get("TotalPixelMatrixColumns", 0))
        frames = pydicom.encaps.generate_frames(instance.PixelData, number_of_frames=instance.NumberOfFrames)
        decoded = [imagecodecs.jpeg8_decode(frame) for frame in frames]
    with open_slide(sorted(dicom_slides.glob("0-*.dcm"))[0]) as slide:
        grid = slide.segment_grid(0)
        assert (grid.segment_width, grid.segment_height) == (instance.Columns, instance.Rows)
        for number, frame in enumerate(decoded):
            left, top = grid.corner(number)
            assert np.array_equal(slide.read_segment(0, number), frame[: grid.height - top, : grid.width - left])


def test_a_folder_of_instances_is_one_slide_per_series(dicom_slides: Path, tmp_path: Path) -> None:
    files = sorted(dicom_slides.glob("*.dcm"), reverse=True)
    chosen = one_per_series(files)
    assert [file.name[0] for file in chosen] == ["0", "1"]
    assert chosen == [sorted(dicom_slides.glob(f"{number}-*.dcm"))[0] for number in range(2)]
    assert len({series_of(file) for file in files}) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pydicom = pytest.importorskip("pydicom")
        for file in files:
            assert series_of(file) == str(pydicom.dcmread(file, stop_before_pixels=True).SeriesInstanceUID)
    elsewhere = shutil.copytree(dicom_slides, tmp_path / "copy")
    assert len(one_per_series([*files, *elsewhere.glob("*.dcm")])) == 4


@pytest.mark.parametrize("undefined", [False, True])
def test_the_series_is_the_files_own(undefined: bool, dicom_slides: Path, tmp_path: Path) -> None:
    """Another series that the header refers to is not taken for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pydicom = pytest.importorskip("pydicom")
        instance = pydicom.dcmread(sorted(dicom_slides.glob("*.dcm"))[0], stop_before_pixels=True)
        other = pydicom.Dataset()
        other.SeriesInstanceUID = "1.2.3"
        instance.ReferencedSeriesSequence = [other]
        instance["ReferencedSeriesSequence"].is_undefined_length = undefined
        instance.ReferencedSeriesSequence[0].is_undefined_length_sequence_item = undefined
        instance.save_as(tmp_path / "refers.dcm")
        assert series_of(tmp_path / "refers.dcm") == str(instance.SeriesInstanceUID)


def test_files_that_are_no_dicom(dicom_slides: Path, tmp_path: Path) -> None:
    path = tmp_path / "some.dcm"
    whole = sorted(dicom_slides.glob("*.dcm"))[0].read_bytes()
    for content, complaint in (
        (b"DICM", "not a DICOM file: it is too short"),
        (bytes(500), "not a DICOM file: it does not begin like one"),
        (whole[:300], "its DICOM header does not say which series it belongs to"),
        (whole[:132] + b"\xff" * 400, "its DICOM header does not say which series it belongs to"),
    ):
        path.write_bytes(content)
        with pytest.raises(SlideError, match=complaint):
            series_of(path)
        with pytest.raises(SlideError, match="OpenSlide cannot open it"):
            open_slide(path)
