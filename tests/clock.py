"""A clock that only products move, for tests of what follows from times: no processor and no load has a say in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Clock:
    """Stands in for the module `time`; it shows 0 until something that takes time is called."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def taking(self, seconds: Callable[..., float], function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which takes so long by this clock, whatever it calls."""

        def called(*arguments: Any, **options: Any) -> Any:
            end = self.now + seconds(*arguments, **options)
            result = function(*arguments, **options)
            self.now = end
            return result

        return called
