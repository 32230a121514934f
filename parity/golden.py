"""Reference results kept for `make test`: ``.venv-parity/bin/python -m parity.golden``.

For every case marked ``golden`` the inputs, the files that the reference wrote and its results are
stored in ``tests/fixtures/parity/TOPIC.zip``. `tests/test_parity.py` runs jlora's side on them,
without torch. Make them again when a golden case or a reference changes, not when jlora changes.
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

from parity.case import Case
from parity.files import TOPICS, run_stage, stage_file, topic_module, write_inputs

FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "parity"
SEED = 0
#: Files of the reference that jlora does not read.
LEFT_OUT = ("README.md",)


def golden_cases(topic: str) -> list[Case]:
    return [case for case in topic_module(topic).cases(SEED) if case.golden]


def reference_file(topic: str) -> str:
    """The file with the results that are stored: those of the first stage."""
    return stage_file(topic_module(topic), 0)


def main() -> None:
    FIXTURES.mkdir(parents=True, exist_ok=True)
    for name in TOPICS:
        topic, cases = topic_module(name), golden_cases(name)
        if not cases:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch)
            for case in cases:
                write_inputs(topic, case, SEED, root / case.name)
                run_stage(topic, 0, case, root / case.name)
            pack(root, FIXTURES / f"{name}.zip")
        size = (FIXTURES / f"{name}.zip").stat().st_size
        print(f"{name}: {len(cases)} cases, {size / 1000:.0f} kB")


def pack(root: Path, path: Path) -> None:
    """Zip a folder so that equal files give equal bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(root.rglob("*")):
            if file.is_file() and file.name not in LEFT_OUT:
                entry = zipfile.ZipInfo(str(file.relative_to(root)), (1980, 1, 1, 0, 0, 0))
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, file.read_bytes())


if __name__ == "__main__":
    main()
