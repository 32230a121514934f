from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of development data: $JLORA_DATA or ../shared/data; tests skip without it."""
    candidates = [Path(__file__).resolve().parents[2] / "shared" / "data"]
    if os.environ.get("JLORA_DATA"):
        candidates.insert(0, Path(os.environ["JLORA_DATA"]))
    for folder in candidates:
        if (folder / "e2e" / "test.txt").is_file():
            return folder
    pytest.skip("development data not found: set JLORA_DATA or put it in ../shared/data")
