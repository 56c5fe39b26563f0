"""Self-supervised methods, one file each, on one protocol."""

from pipeline.config import PretrainConfig
from pipeline.methods.dino import Dino
from pipeline.methods.protocol import Method
from pipeline.runtime import Runtime
from tiling.errors import UsageError
from tiling.store import TileStore

METHODS = {"dino": Dino}


def build_method(config: PretrainConfig, runtime: Runtime, store: TileStore) -> Method:
    """The method that ``method.name`` names, with freshly initialised networks on this rank's device.

    Raises:
        UsageError: No method has that name.
    """
    if config.method.name not in METHODS:
        raise UsageError(f"method.name is {config.method.name!r}, known are {', '.join(METHODS)}")
    return METHODS[config.method.name](config, runtime, store)
