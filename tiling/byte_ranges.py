"""Ranges of bytes of a store's files: ``pread`` with few open files, or fsspec where the store is a URL."""

import os
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from tiling.errors import StoreError

_OPEN_FILES = 256


class ByteRanges(Protocol):
    """What both kinds can do, from many threads. An OSError says that bytes could not be read."""

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Bytes from ``offset``; fewer than ``length`` where the file ends."""
        ...

    def tail(self, path: str, length: int) -> bytes:
        """The last bytes of a file; fewer where it is shorter."""
        ...

    def close(self) -> None:
        """Let go of all files."""
        ...


class _Descriptor:
    """An open file. It is closed with the last reference to it, so never under a thread that reads."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class LocalRanges:
    """Files on this machine. Paths must be free of symbolic links, which could lead out of the store."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()

    def _descriptor(self, path: str) -> _Descriptor:
        """The least recently used file makes room for a new one."""
        with self._lock:
            known = self._open.get(path)
            if known is not None:
                self._open.move_to_end(path)
                return known
        opened = _Descriptor(path)  # outside of the lock: on a shared file system this can take long
        with self._lock:
            known = self._open.setdefault(path, opened)
            while len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
            return known

    def read(self, path: str, offset: int, length: int) -> bytes:
        """See ``ByteRanges``."""
        file = self._descriptor(path)
        return os.pread(file.number, length, offset)

    def tail(self, path: str, length: int) -> bytes:
        """See ``ByteRanges``. The first that is read of a shard, so links are looked for here."""
        if os.path.realpath(path) != path:
            raise OSError("a symbolic link leads there")
        file = self._descriptor(path)
        return os.pread(file.number, length, max(0, os.fstat(file.number).st_size - length))

    def close(self) -> None:
        """See ``ByteRanges``."""
        with self._lock:
            self._open.clear()


class RemotePath:
    """A place that only a URL leads to: the few things of ``pathlib.Path`` that a reader of stores needs.

    Args:
        url: Of any file system that fsspec knows: s3://, gs://, https://, memory:// and so on.

    Raises:
        StoreError: fsspec does not know it, or lacks a package for it.
    """

    def __init__(self, url: str) -> None:
        import fsspec  # only who reads URLs waits for it

        self.url = url.rstrip("/")
        try:
            self.system, self.key = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise StoreError(f"cannot be opened ({error})", self.url) from error

    def __truediv__(self, name: str) -> "RemotePath":
        path: RemotePath = object.__new__(RemotePath)
        path.url, path.system, path.key = f"{self.url}/{name}", self.system, f"{self.key}/{name}"
        return path

    def __str__(self) -> str:
        return self.url

    def read_bytes(self) -> bytes:
        """The whole file.

        Raises:
            FileNotFoundError: There is none.
            OSError: It cannot be read.
        """
        return _remote(self.system, self.key)


class RemoteRanges:
    """Files behind a URL: one request for every range."""

    def __init__(self, place: RemotePath) -> None:
        self._system = place.system

    def read(self, path: str, offset: int, length: int) -> bytes:
        """See ``ByteRanges``."""
        return self._no_more(_remote(self._system, path, start=offset, end=offset + length), length)

    def tail(self, path: str, length: int) -> bytes:
        """See ``ByteRanges``."""
        return self._no_more(_remote(self._system, path, start=-length), length)

    @staticmethod
    def _no_more(data: bytes, length: int) -> bytes:
        if len(data) > length:
            raise OSError("the server sent the whole file instead of the range asked for")
        return data

    def close(self) -> None:
        """See ``ByteRanges``; fsspec keeps its connections for the next reader."""


def _remote(system: Any, key: str, **limits: int) -> bytes:
    try:
        return bytes(system.cat_file(key, **limits))
    except OSError:
        raise
    except Exception as error:  # every file system has its own: botocore's, aiohttp's, gcsfs's
        raise OSError(f"{type(error).__name__}: {error}") from error


Place = Path | RemotePath


def place_of(store: str | Path) -> Place:
    """A folder, or what a URL leads to."""
    return RemotePath(store) if isinstance(store, str) and "://" in store else Path(store)


def ranges_of(place: Place) -> ByteRanges:
    """How bytes are read there."""
    return RemoteRanges(place) if isinstance(place, RemotePath) else LocalRanges()
