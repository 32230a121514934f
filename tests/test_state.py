"""Checkpoints: what is read is what was written, or another good one, or an error."""

from __future__ import annotations

import os
import random
import shutil
import subprocess

import numpy as np
import pytest

from jlora.system import files
from jlora.system.errors import UserError
from jlora.system.files import atomic_path, recover_directory
from jlora.training import checkpoint
from jlora.training.checkpoint import Progress, load_checkpoint, newest, previous, save_checkpoint
from tests.faults import damage


def save(run, step):
    values = np.full(50, step, np.float32)
    adapter = {"lora_A": values, "lora_B": values + 1}
    save_checkpoint(run, Progress(step, fingerprint="f"), adapter, {"m": values, "v": values})


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of steps 2 and 4."""
    save(tmp_path, 2)
    save(tmp_path, 4)
    return tmp_path


def loaded(run):
    """The step of the checkpoint that is loaded, all of it checked."""
    progress, adapter, optimizer = load_checkpoint(run)
    assert set(adapter["lora_A"]) == set(optimizer["v"]) == {progress.step}
    return progress.step


def test_the_two_newest_are_kept(run):
    assert loaded(run) == 4
    save(run, 6)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint", "checkpoint.previous"]
    shutil.rmtree(newest(run))
    assert loaded(run) == 4


def test_the_checksums_are_those_of_sha256sum(run):
    done = subprocess.run(
        ["sha256sum", "-c", "SHA256SUMS"], cwd=newest(run), capture_output=True, check=True
    )
    assert done.stdout.count(b": OK") == 3


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_file_falls_back(run, capsys, seed):
    generator = random.Random(seed)
    file = sorted(newest(run).iterdir())[seed % 4]
    damage(file, generator)
    assert loaded(run) == 2
    said = capsys.readouterr().err
    assert f"{newest(run)} is damaged" in said and str(previous(run)) in said
    assert (run / "checkpoint.damaged").is_dir()
    save(run, 4)  # the good one must not make room for the damaged one
    assert loaded(run) == 4
    shutil.rmtree(newest(run))
    assert loaded(run) == 2


def test_none_is_good(run):
    (newest(run) / "adapter.safetensors").unlink()
    (previous(run) / "optimizer.safetensors").write_bytes(b"x")
    with pytest.raises(UserError) as error:
        load_checkpoint(run)
    assert f"{newest(run)} is damaged (no adapter.safetensors)" in str(error.value)
    assert f"{previous(run)} is damaged (optimizer.safetensors and SHA256" in str(error.value)
    assert newest(run).is_dir()


def test_one_of_another_version(run):
    shutil.rmtree(previous(run))
    (newest(run) / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match="sha256sum adapter.safetensors .* > SHA256SUMS"):
        load_checkpoint(run)
    names = "adapter.safetensors optimizer.safetensors progress.json"
    subprocess.run(f"sha256sum {names} > SHA256SUMS", cwd=newest(run), shell=True, check=True)
    assert loaded(run) == 4


def test_an_unknown_field_is_another_version(run):
    file = newest(run) / "progress.json"
    file.write_text('{"steps": 1}')
    sums = newest(run) / "SHA256SUMS"
    lines = sums.read_text().splitlines()[:2]
    sums.write_text("\n".join([*lines, f"{files.sha256_of(file)}  progress.json", ""]))
    assert loaded(run) == 2


def test_a_file_that_cannot_be_read_is_no_damage(run, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "sha256_of", denied)
    with pytest.raises(UserError, match="cannot read .*checkpoint: Permission denied"):
        load_checkpoint(run)


# --- folders that take another's place ---


def write_folder(path, text):
    with atomic_path(path, directory=True) as temporary:
        (temporary / "a").write_text(text)
        (temporary / "b").write_text(text)


def test_a_reader_between_the_two_renames(tmp_path, monkeypatch):
    """It puts the old folder back; the writer must not fail, nor the new folder be lost."""
    path = tmp_path / "adapter"
    write_folder(path, "old")
    real, seen = os.rename, []

    def rename(source, target):
        real(source, target)
        if source == path and not seen:
            recover_directory(path)
            seen.append((path / "a").read_text())

    monkeypatch.setattr(os, "rename", rename)
    write_folder(path, "new")
    assert seen == ["old"]
    assert (path / "a").read_text() == (path / "b").read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("when", ["before it is moved away", "after"])
def test_two_writers_of_one_folder(tmp_path, monkeypatch, when):
    """Both pull the same model: one of the two folders is there at the end, whole."""
    path = tmp_path / "model"
    write_folder(path, "old")
    real, crossed = os.rename, []

    def rename(source, target):
        ours = source == path and not crossed and target.name.endswith(".old")
        if ours and when == "before it is moved away":
            crossed.append(True)
            write_folder(path, "other")
            shutil.rmtree(path)  # and a third has begun to replace it again
        real(source, target)
        if ours and when == "after":
            crossed.append(True)
            write_folder(path, "other")

    monkeypatch.setattr(os, "rename", rename)
    write_folder(path, "new")
    assert crossed
    assert (path / "a").read_text() == (path / "b").read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_another_process_removes_first(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    real = os.rename

    def rename(source, target):
        source.rmdir()
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    files.discard(tmp_path / "old")
    assert not list(tmp_path.iterdir())


def test_recovering_what_is_not_there(tmp_path):
    recover_directory(tmp_path / "nothing")
    assert not list(tmp_path.iterdir())


def test_an_error_that_cannot_be_tidied_up_after_is_still_named(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.Path, "write_text", denied)
    monkeypatch.setattr(files, "remove", lambda path: path.exists() and denied())
    with pytest.raises(UserError, match="cannot write .*x.json: Permission denied"):
        files.write_text(tmp_path / "x.json", "{}")
