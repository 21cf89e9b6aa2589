"""`flserve up`, timed from inside: what held its event loop longest. For runs of their own, never for timed ones.

`python -m benchmarks.lag up …` as `flserve up …`; at its end it writes the slowest callbacks, in ms, to standard error.
"""

from __future__ import annotations

import asyncio
import heapq
import sys
import time

from fl_server.cli import main

SHOWN = 12


def watch() -> None:
    plain, slowest = asyncio.Handle._run, list[tuple[float, str]]()

    def timed(handle: asyncio.Handle) -> None:
        described = "" if handle.cancelled() else repr(handle._callback)[:160]  # type: ignore[attr-defined]
        began = time.perf_counter()
        plain(handle)
        took_ms = (time.perf_counter() - began) * 1e3
        if took_ms > 10:
            heapq.heappush(slowest, (took_ms, described))
            if len(slowest) > SHOWN:
                heapq.heappop(slowest)

    asyncio.Handle._run = timed  # type: ignore[method-assign, assignment]
    try:
        main()
    finally:
        for took_ms, described in sorted(slowest, reverse=True):
            print(f"{took_ms:.0f} ms: {described}", file=sys.stderr)


if __name__ == "__main__":
    watch()
