from pathlib import Path

import pytest
from hypothesis import settings

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
