"""Requests that are made again when they failed in a way that may pass."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

ATTEMPTS = 4
FIRST_PAUSE = 0.2  # seconds; doubled with each attempt

Result = TypeVar("Result")


def repeated(request: Callable[[], Result], *, is_final: Callable[[OSError], bool]) -> Result:
    """What `request` returns, which may be made several times.

    Raises its last OSError. One that another attempt would not change it raises at once: FileNotFoundError,
    PermissionError, and those for which `is_final` is true.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return request()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            if attempt == ATTEMPTS or is_final(error):
                raise
        time.sleep(FIRST_PAUSE * 2**attempt * random.random())
    raise AssertionError("unreachable")
