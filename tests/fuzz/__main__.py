"""Throws at one target (or each in turn) what atheris makes, guided by coverage: python -m tests.fuzz [TARGET …].

The first input that breaks a promise ends it, and is kept beside the corpus. Everything of it lies in .fuzz.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fl_client", "fl_server", "jose", "python_multipart"]):
    from tests.fuzz.targets import TARGETS

FOLDER = Path(".fuzz")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=int, default=600, help="of all targets together")
    parser.add_argument("--runs", type=int, default=-1, help="of each target; default: as many as the time takes")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"corpus and findings; default: {FOLDER}")
    given = parser.parse_args()
    names = given.targets or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    if len(names) == 1:
        fuzz(names[0], given.folder, given.seconds, given.runs)  # ends the process
    options = ["--seconds", str(max(1, given.seconds // len(names))), "--runs", str(given.runs)]
    for name in names:  # libFuzzer takes a process for itself
        print(f"---- {name}", flush=True)
        command = [sys.executable, "-m", "tests.fuzz", name, *options, "--folder", str(given.folder)]
        if (code := subprocess.run(command, check=False).returncode) != 0:
            return code
    return 0


def fuzz(name: str, folder: Path, seconds: int, runs: int) -> None:
    corpus = folder / name
    corpus.mkdir(parents=True, exist_ok=True)
    with TARGETS[name]() as target:
        for seed in target.seeds:
            (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
        limits = [f"-max_total_time={seconds}", f"-runs={runs}", "-timeout=60", "-rss_limit_mb=4096", "-max_len=65536"]
        atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={folder}/{name}-", str(corpus)], target.throw)
        atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
