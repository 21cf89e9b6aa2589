"""Writes the model from which a session starts: seed.npz beside this folder, as FEDn's packages do."""

from __future__ import annotations

from pathlib import Path

import model

SEED = 7

if __name__ == "__main__":
    model.save(model.init(SEED), Path("../seed.npz"))
