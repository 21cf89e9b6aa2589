"""What the process asks of glibc's malloc, as malloc itself tells it."""

from __future__ import annotations

import os
import subprocess
import sys

MIB = 1024 * 1024
KEPT = """
import ctypes
from fl_server import app
{before}
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split())]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
for _ in range(3):  # messages of an upload come, and go
    messages = [bytes(2**20) for _ in range(40)]
    mapped = libc.mallinfo2().hblks
    del messages
print(mapped, libc.mallinfo2().keepcost)
"""
HEAPS = """
import ctypes, threading
from fl_server import app
{before}
def allocate():
    held.append(bytearray(1000))  # above what Python's own pools hand out
    met.wait()
held, met = [], threading.Barrier(9)
threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads:
    thread.start()
met.wait()
libc = ctypes.CDLL(None, use_errno=True)
libc.fdopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, file)
libc.fflush(file)
"""


def said(script: str, before: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", script.format(before=before)]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


def test_memory_of_messages_that_are_gone_is_kept_for_the_next() -> None:
    mapped, kept_bytes = map(int, said(KEPT, "app.keep_freed_memory()").split())
    assert kept_bytes > 30 * MIB
    assert mapped < 10  # not one by one
    assert int(said(KEPT, "").split()[1]) < 10 * MIB


def test_whoever_says_in_the_environment_what_is_kept_is_obeyed() -> None:
    kept_bytes = int(said(KEPT, "app.keep_freed_memory()", MALLOC_TRIM_THRESHOLD_=f"{MIB}").split()[1])
    assert kept_bytes < 10 * MIB


def test_threads_share_two_heaps() -> None:
    assert said(HEAPS, "app.share_heaps()").count("<heap nr=") == 2
    assert said(HEAPS, "").count("<heap nr=") > 2
    assert said(HEAPS, "app.share_heaps()", MALLOC_ARENA_MAX="3").count("<heap nr=") == 3
