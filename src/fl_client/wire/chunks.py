"""The size in which a model's bytes travel, both ways: FEDn's 1 MiB, well below gRPC's 4 MiB message limit."""

from __future__ import annotations

from collections.abc import Iterator

CHUNK_BYTES = 1 << 20


def split(data: memoryview, size_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
    """Slices of at most `size_bytes`, without copying; none for empty data."""
    for start in range(0, len(data), size_bytes):
        yield data[start : start + size_bytes]
