"""`make lint`'s last lines: lines of Python and C++ by folder, and what changed since main.

The comparison is with the commit of main that the working tree started from, or with the one before
it if nothing has changed since. Without a history (a shallow clone, an unpacked archive, no git)
only the counts are printed.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path

PACKAGE = "jlora"
OTHERS = ("tests", "parity", "benchmarks")
LANGUAGES = {".py": "Python", ".h": "C++", ".cc": "C++", ".cu": "C++"}


def folder_of(path: str) -> str:
    """The row of a file: ``jlora/FOLDER`` within the package, else the top folder."""
    parts = path.split("/")
    return "/".join(parts[:2]) if parts[0] == PACKAGE and len(parts) > 2 else parts[0]


def working_lines(root: Path) -> Counter:
    """Lines of the files in the working tree, by (folder, language)."""
    counts: Counter = Counter()
    for top in (PACKAGE, *OTHERS):
        for path in (root / top).rglob("*.*"):
            if path.suffix in LANGUAGES:
                key = folder_of(path.relative_to(root).as_posix()), LANGUAGES[path.suffix]
                counts[key] += len(path.read_bytes().splitlines())
    return counts


def committed_lines(root: Path, commit: str) -> Counter | None:
    """Lines of the files of a commit; None where git does not have it."""
    patterns = [f"{top}/*{suffix}" for top in (PACKAGE, *OTHERS) for suffix in LANGUAGES]
    output = git(root, "grep", "-c", "", commit, "--", *patterns)
    if not output:
        return None
    counts: Counter = Counter()
    for line in output.splitlines():
        path, count = line[len(commit) + 1 :].rsplit(":", 1)
        counts[folder_of(path), LANGUAGES[Path(path).suffix]] += int(count)
    return counts


def git(root: Path, *arguments: str) -> str:
    """The output of a git command; nothing where it fails."""
    try:
        result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def base_commit(root: Path) -> str:
    """The commit to compare with; nothing without git."""
    if git(root, "rev-parse", "--show-prefix"):
        return ""  # another project's repository, which this folder lies in
    for branch in ("main", "origin/main"):
        base = git(root, "merge-base", "HEAD", branch)
        if base:
            unchanged = base == git(root, "rev-parse", "HEAD") and not git(
                root, "status", "--short"
            )
            return git(root, "rev-parse", "--verify", "--quiet", f"{base}^") if unchanged else base
    return ""


def table(now: Counter, before: Counter | None) -> str:
    """One row for each folder, with the change beside each count that has changed."""
    rows = sorted({folder for folder, _ in [*now, *(before or ())]})
    package = [row for row in rows if row.startswith(PACKAGE)]
    groups = [(row, [row]) for row in package] + [("the package", package)]
    groups += [(row, [row]) for row in OTHERS if row in rows]
    lines = [f"{'lines':18}" + "".join(f"{name:>9}{'':9}" for name in ("Python", "C++")).rstrip()]
    for name, folders in groups:
        cells = ""
        for language in ("Python", "C++"):
            count = sum(now[folder, language] for folder in folders)
            change = count - sum((before or now)[folder, language] for folder in folders)
            cells += f"{count:9,}" if count else " " * 9
            cells += f" {f'({change:+,})' if change else '':8}"
        lines.append(f"{name:18}{cells}".rstrip())
    return "\n".join(lines)


def main() -> None:
    root = Path(__file__).resolve().parents[1]
    commit = base_commit(root)
    before = committed_lines(root, commit) if commit else None
    print(table(working_lines(root), before))
    if before is not None:
        print(f"changes since {commit[:7]}, {git(root, 'log', '-1', '--format=%s', commit)[:60]}")


if __name__ == "__main__":
    main()
