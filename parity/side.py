"""One side's process: ``python -m parity.side TOPIC STAGE SEED FOLDER``."""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path

from parity.files import run_stage, stage_file, topic_module


def main(topic_name: str, stage: int, seed: int, root: Path) -> None:
    """Compute every case of a topic; the traceback of a failed case is stored."""
    topic = topic_module(topic_name)
    for case in topic.cases(seed):
        folder = root / case.name
        started = time.monotonic()
        try:
            run_stage(topic, stage, case, folder)
        except Exception:
            (folder / stage_file(topic, stage)).with_suffix(".error").write_text(
                traceback.format_exc()
            )
        if time.monotonic() - started > 20:
            print(f"  {case.name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
