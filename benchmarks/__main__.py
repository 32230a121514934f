"""``make bench``: the page, or the part that the first argument names."""

from __future__ import annotations

import importlib
import sys

#: Parts with a command line of their own: ``make bench ARGS="scale --help"``.
PARTS = ("scale", "operators", "long_run", "large", "finetune", "serve")


def main() -> None:
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    if part not in PARTS:
        from benchmarks.bench import main

        main(sys.argv[1:])
        return
    del sys.argv[1]
    importlib.import_module(f"benchmarks.{part}").main()


if __name__ == "__main__":
    main()
