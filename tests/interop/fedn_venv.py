"""Virtual environments with what our users run and we do not want beside us, made once and kept outside the tree.

The real FEDn 0.33.0 pins grpcio, protobuf and click, the generator of SDKs pins typer.
`python tests/interop/fedn_venv.py` makes them if need be and prints where they are. Standard library only.
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
SDK_GENERATOR = "openapi-python-client==0.29.1"


def fedn_venv() -> Path:
    """The environment's directory; the first call installs, which takes minutes."""
    # FEDn says "below 3.13" for the standard library's cgi, which is gone there; legacy-cgi is that module.
    more = [] if sys.version_info < (3, 13) else ["--ignore-requires-python", "legacy-cgi"]
    return _environment(FEDN, "fedn-constraints.txt", *more)


def sdk_generator_venv() -> Path:
    """Has what a generated SDK needs, too."""
    return _environment(SDK_GENERATOR, "sdk-generator-constraints.txt")


def _environment(requirement: str, constraints_name: str, *more: str) -> Path:
    constraints = Path(__file__).with_name(constraints_name)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flserve"
    directory = cache / f"{requirement.replace('==', '-')}-py{sys.version_info.major}.{sys.version_info.minor}"
    cache.mkdir(parents=True, exist_ok=True)
    # An environment cannot be moved into place when it is complete: its scripts name their own path. So it is made in
    # place, the stamp is written last, and a second process waits for the first one's lock.
    with directory.with_suffix(f"{directory.suffix}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = directory / "constraints.sha256"
        wanted = hashlib.sha256(constraints.read_bytes()).hexdigest()
        if not stamp.exists() or stamp.read_text() != wanted:
            shutil.rmtree(directory, ignore_errors=True)
            _install(directory, requirement, "-c", str(constraints), *more)
            stamp.write_text(wanted)
    return directory


def _install(directory: Path, requirement: str, *more: str) -> None:
    print(f"installing {requirement} into {directory} (once)", file=sys.stderr, flush=True)
    venv.create(directory, with_pip=True, symlinks=True)
    pip = [str(directory / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, requirement, *more], check=True)


if __name__ == "__main__":
    print(fedn_venv(), sdk_generator_venv(), sep="\n")
