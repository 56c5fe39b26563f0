import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from playwright.sync_api import Browser, sync_playwright

# Examples read and write files on machines that are busy: how long one takes says nothing.
settings.register_profile("bony", deadline=None)
settings.load_profile("bony")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images, beside the repository; tests that need them are left out where they are not there."""
    if not SHARED_DATA.is_dir():
        pytest.skip("left out: ../shared/data is not there")
    return SHARED_DATA


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium. Where it is not installed, tests of pages are left out, and fail in CI."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        text = "no chromium; apt-get install chromium"
        pytest.fail(text) if "CI" in os.environ else pytest.skip(f"left out: {text}")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()
