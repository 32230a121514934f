"""What an installation has: every file of the package, and nothing besides."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def packaged(monkeypatch) -> set[str]:
    """The files that setuptools would put into a wheel by pyproject.toml; nothing is built."""
    # As pyproject.toml asks for, to build with and among the packages for development.
    pytest.importorskip("setuptools", minversion="77")
    dist_module = pytest.importorskip("setuptools.dist")
    monkeypatch.chdir(ROOT)
    dist = dist_module.Distribution({"script_name": "setup.py"})
    dist.parse_config_files()
    dist.include_package_data = False  # pyproject.toml alone says what, not what git knows
    build = dist.get_command_obj("build_py")
    build.build_lib = "unused"
    build.finalize_options()
    build.packages = dist.packages
    modules = {Path(file).as_posix() for _, _, file in build.find_all_modules()}
    data = {
        (Path(folder) / name).relative_to(ROOT if Path(folder).is_absolute() else ".").as_posix()
        for _, folder, _, names in build.data_files
        for name in names
    }
    return modules | data


@pytest.mark.filterwarnings("ignore")  # setuptools' own, about itself
def test_the_wheel_holds_every_file_of_the_package(monkeypatch):
    tree = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "jlora").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packaged(monkeypatch) == tree
    assert "jlora/runs/recipes/sweeps/matrices-gpt2.yaml" in tree
