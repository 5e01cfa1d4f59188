"""Files elsewhere that are read by ranges of bytes, each of which is a request of its own that may be made again."""

from __future__ import annotations

import io
from abc import abstractmethod
from types import TracebackType


class RangedFile(io.RawIOBase):
    """For random access, by pyarrow among others."""

    def __init__(self, total: int) -> None:
        """total: of its bytes."""
        super().__init__()
        self._total = total
        self._position = 0

    @abstractmethod
    def _range(self, start: int, size: int) -> bytes:
        """The `size` bytes from `start` on, all of which the file has. Raises OSError after several attempts."""

    def __enter__(self) -> RangedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._total}[whence]
        self._position = max(start + offset, 0)
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(self._total - self._position, 0)
        size = left if size is None or size < 0 else min(size, left)
        if size == 0:
            return b""
        content = self._range(self._position, size)
        self._position += size
        return content
