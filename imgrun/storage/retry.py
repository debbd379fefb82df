"""Trying again what lost a race. The first try costs nothing; tenacity is imported for the second."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def attempt(function: Callable[[], T], again: Callable[[BaseException], bool], seconds: float) -> T:
    """Call ``function`` until it succeeds, or fails in a way that ``again`` does not know, or ``seconds`` are over.

    Raises what the last call raised.
    """
    try:
        return function()
    except Exception as e:
        if seconds <= 0 or not again(e):
            raise
    from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random

    retrying = Retrying(
        retry=retry_if_exception(again), stop=stop_after_delay(seconds), wait=wait_random(0.002, 0.02), reraise=True
    )
    return retrying(function)
