"""A virtual environment with the real FEDn 0.33.0, made once and kept outside the tree.

FEDn pins grpcio, protobuf and click to versions that we do not want for ourselves, hence an environment of its own.
`python tests/interop/fedn_venv.py` makes it if need be and prints where it is. Standard library only.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

FEDN = "fedn==0.33.0"
CONSTRAINTS = Path(__file__).with_name("fedn-constraints.txt")


def fedn_venv() -> Path:
    """The environment's directory; the first call installs, which takes minutes."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flserve"
    directory = cache / f"{FEDN.replace('==', '-')}-py{sys.version_info.major}.{sys.version_info.minor}"
    cache.mkdir(parents=True, exist_ok=True)
    # An environment cannot be moved into place when it is complete: its scripts name their own path. So it is made in
    # place, the stamp is written last, and a second process waits for the first one's lock.
    with directory.with_suffix(f"{directory.suffix}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = directory / "constraints.sha256"
        wanted = hashlib.sha256(CONSTRAINTS.read_bytes()).hexdigest()
        if not stamp.exists() or stamp.read_text() != wanted:
            shutil.rmtree(directory, ignore_errors=True)
            install(directory)
            stamp.write_text(wanted)
    return directory


def install(directory: Path) -> None:
    print(f"installing {FEDN} into {directory} (minutes, once)", file=sys.stderr, flush=True)
    venv.create(directory, with_pip=True, symlinks=True)
    pip = [str(directory / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # FEDn says "below 3.13" for the standard library's cgi, which is gone there; legacy-cgi is that module.
    fedn = [FEDN] if sys.version_info < (3, 13) else ["--ignore-requires-python", FEDN, "legacy-cgi"]
    subprocess.run([*pip, "-c", str(CONSTRAINTS), *fedn], check=True)


if __name__ == "__main__":
    print(fedn_venv())
