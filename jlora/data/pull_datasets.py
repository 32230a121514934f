"""`jlora pull e2e|webnlg|dart|boolq`: download a dataset once, from its publisher, and check it.

A dataset is stored in the cache folder's ``data/TASK`` under the names that the task looks for,
with a note on its licence. The checksum of every file is known, so the same command also checks
files that were put there by hand.
"""

from __future__ import annotations

import difflib
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from jlora.data.pull_models import WHEELS, cache_folder, pull
from jlora.system.console import say
from jlora.system.errors import UserError
from jlora.system.files import atomic_path, check_writable, os_error, write_text
from jlora.system.progress import progress

#: Bytes; no file of these datasets has half as many. A server that sends more sends another file.
LARGEST = 100_000_000
TIMEOUT = 30  # seconds without data

_LORA = "https://raw.githubusercontent.com/microsoft/LoRA/c4593f060e6a368d7bb5af5273b8e42810cdef90"
_NLG = f"{_LORA}/examples/NLG/data"
_E2E = (
    "https://raw.githubusercontent.com/tuetschek/e2e-dataset/"
    "ab0d967dd5729ce455ef14ba9ffafc456a335264"
)
_BOOLQ = "https://storage.googleapis.com/boolq"


@dataclass(frozen=True)
class DataFile:
    """The address of a file and its checksum.

    The checksum is ``sha256:HEX``, or ``git:HEX``: the SHA-1 of ``blob SIZE``, a zero byte and the
    content, which Git stores for the file in a commit.
    """

    url: str
    checksum: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Dataset:
    title: str
    home: str
    licence: str
    licence_url: str
    files: tuple[DataFile, ...]


# fmt: off
DATASETS = {
    "e2e": Dataset(
        title="E2E NLG challenge (Novikova, Dusek, Rieser 2017)",
        home="https://github.com/tuetschek/e2e-dataset",
        licence="CC BY-SA 4.0",
        licence_url="https://creativecommons.org/licenses/by-sa/4.0/",
        files=(
            # The tokenised text that the paper's code reads, then the official release.
            DataFile(f"{_NLG}/e2e/train.txt", "sha256:eae319082237310913d9f37f6a891d48fb3f821f29d86870d2cb4f92ddd72c5a"),  # noqa: E501
            DataFile(f"{_NLG}/e2e/valid.txt", "sha256:ba963113c8401d3d26216c0dc0a6dae1ea6ea927de3bf830e32c41f65401c80d"),  # noqa: E501
            DataFile(f"{_NLG}/e2e/test.txt", "sha256:81b1bcd40c4f12845ec4eb61a77bf43765d112483cd9b2f91ef10bfc1b3d8f13"),  # noqa: E501
            DataFile(f"{_E2E}/trainset.csv", "git:fa3a5e1124d2aa0d768881e38f8ee73e63d5880d"),
            DataFile(f"{_E2E}/devset.csv", "sha256:fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9"),  # noqa: E501
            DataFile(f"{_E2E}/testset_w_refs.csv", "sha256:edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd"),  # noqa: E501
        ),
    ),
    "webnlg": Dataset(
        title="WebNLG challenge 2017 (Gardent, Shimorina, Narayan, Perez-Beltrachini 2017)",
        home="https://webnlg-challenge.loria.fr/challenge_2017/",
        licence="CC BY-NC-SA 4.0 (not for commercial use)",
        licence_url="https://creativecommons.org/licenses/by-nc-sa/4.0/",
        files=(
            DataFile(f"{_NLG}/webnlg_challenge_2017/train.json", "git:461766d1fe902bd659b821a03f49310c22403686"),  # noqa: E501
            DataFile(f"{_NLG}/webnlg_challenge_2017/dev.json", "sha256:50f5a2c24d760bc84ba3e852707cd3b43b0cf2da035b425f87945a2440880488"),  # noqa: E501
            DataFile(f"{_NLG}/webnlg_challenge_2017/test.json", "git:7f552799b7e3b5badf95b725c20d955e0886811e"),  # noqa: E501
        ),
    ),
    "dart": Dataset(
        title="DART v1.1.1 (Nan et al. 2021)",
        home="https://github.com/Yale-LILY/dart",
        licence="MIT",
        licence_url="https://github.com/Yale-LILY/dart/blob/master/LICENSE",
        files=(
            DataFile(f"{_NLG}/dart/dart-v1.1.1-full-train.json", "git:66d6ce4aeb5d01c318c7fc15d7747ef39ea320be"),  # noqa: E501
            DataFile(f"{_NLG}/dart/dart-v1.1.1-full-dev.json", "sha256:5038f3543b6d59b94ac4e3f69d15a0b01d8578913f862142e7c560200dd6e434"),  # noqa: E501
            DataFile(f"{_NLG}/dart/dart-v1.1.1-full-test.json", "git:c3de833701dcd475ff3bf0b72cd96e13aeeb6b68"),  # noqa: E501
        ),
    ),
    "boolq": Dataset(
        title="BoolQ (Clark et al. 2019)",
        home="https://github.com/google-research-datasets/boolean-questions",
        licence="CC BY-SA 3.0",
        licence_url="https://creativecommons.org/licenses/by-sa/3.0/",
        files=(
            DataFile(f"{_BOOLQ}/train.jsonl", "sha256:cc7a79d44479867e8323a7b0c5c1d82edf516ca34912201f9384c3a3d098d8db"),  # noqa: E501
            DataFile(f"{_BOOLQ}/dev.jsonl", "sha256:ebc29ea3808c5c611672384b3de56e83349fe38fc1fe876fd29b674d81d0a80a"),  # noqa: E501
        ),
    ),
}
# fmt: on


def data_cache() -> Path:
    """The folder that holds one folder for each downloaded dataset."""
    return cache_folder() / "data"


def pull_any(name: str) -> Path:
    """Fetch the dataset or model of that name, and return its folder.

    Raises:
        UserError: see `pull_dataset` and `jlora.data.pull_models.pull`; the message has the nearest
            known name.
    """
    if name in DATASETS:
        return pull_dataset(name)
    near = difflib.get_close_matches(name, [*DATASETS, *WHEELS], n=1, cutoff=0.8)
    if near and near[0] in DATASETS:
        raise UserError(f"no dataset or model {name!r}; did you mean {near[0]}?")
    return pull(name)


def pull_dataset(name: str) -> Path:
    """Fetch a dataset into the cache; files that exist are checked and kept.

    ``$JLORA_DATA_URL`` is another address to fetch from, a mirror that has ``NAME/FILE``.

    Raises:
        UserError: no network (says what to download and where to put it), wrong checksum, a
            broken-off transfer, full disk.
    """
    dataset, folder = DATASETS[name], data_cache() / name
    say(f"{dataset.title}: {dataset.home}")
    say(f"licence: {dataset.licence}, {dataset.licence_url}")
    check_writable(folder)
    write_text(folder / "LICENSE-note.txt", licence_note(dataset))
    for file in dataset.files:
        path = folder / file.name
        if not path.is_file():
            fetch(mirrored(file, name), path, file.checksum, by_hand(dataset, folder))
        elif checksum_of(path, file.checksum) != file.checksum:
            raise UserError(
                f"{path}: not the file of the release (expected {shortened(file.checksum)}); "
                "delete it and pull again"
            )
    return folder


def licence_note(dataset: Dataset) -> str:
    """The text of a dataset's LICENSE-note.txt: its licence, and where its files come from."""
    lines = [dataset.title, dataset.home, f"Licence: {dataset.licence}", dataset.licence_url, ""]
    lines += [f"{file.name}  {file.checksum}  {file.url}" for file in dataset.files]
    return "\n".join(lines) + "\n"


def mirrored(file: DataFile, name: str) -> str:
    """The address of a file, on the mirror if one is set."""
    mirror = os.environ.get("JLORA_DATA_URL")
    return f"{mirror.rstrip('/')}/{name}/{file.name}" if mirror else file.url


def by_hand(dataset: Dataset, folder: Path) -> str:
    """What to download and where to put it, for a machine without a network."""
    urls = " ".join(file.url for file in dataset.files if not (folder / file.name).is_file())
    return (
        f"download {urls} elsewhere, put what you get into {folder} under the same names, and run "
        "the command again to have it checked"
    )


def fetch(url: str, path: Path, checksum: str, way_out: str) -> None:
    """Download one file, check it, and put it in its place.

    Raises:
        UserError: it cannot be reached, the transfer breaks off, it is too large, or it has another
            checksum; ends with ``way_out``.
    """
    say(f"downloading {url}")
    with atomic_path(path) as temporary:
        try:
            received, expected = download(url, temporary)
        except urllib.error.HTTPError as error:
            error.close()
            raise UserError(
                f"could not fetch {url}: HTTP {error.code} {error.reason}; {way_out}"
            ) from error
        except (urllib.error.URLError, http.client.HTTPException, ValueError, TimeoutError,
                ConnectionError) as error:  # fmt: skip
            reason = getattr(error, "reason", None) or error or type(error).__name__
            raise UserError(f"could not fetch {url}: {reason}; {way_out}") from error
        if received > LARGEST:
            raise UserError(
                f"{url} sends more than {LARGEST:,} bytes, which is not this dataset; {way_out}"
            )
        if expected is not None and received != expected:
            raise UserError(
                f"{url}: the transfer broke off after {received:,} of {expected:,} bytes; pull "
                f"again, or {way_out}"
            )
        found = checksum_of(temporary, checksum)
        if found != checksum:
            raise UserError(
                f"{url}: wrong checksum ({shortened(found)}, expected {shortened(checksum)}): not "
                f"the file of the release; {way_out}"
            )


def download(url: str, path: Path) -> tuple[int, int | None]:
    """Write what a server sends for an address, a little over `LARGEST` bytes at most.

    Returns:
        The number of bytes received, and the number that the server announced (None: not
        announced).
    """
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response, open(path, "wb") as handle:
        header = response.headers.get("Content-Length", "")
        announced = int(header) if header.isdecimal() else None
        with progress(announced, url.rsplit("/", 1)[-1], "B") as bar:
            while handle.tell() <= LARGEST:
                chunk = response.read(1 << 16)
                if not chunk:
                    break
                bar.update(handle.write(chunk))
        return handle.tell(), announced


def checksum_of(path: Path, like: str) -> str:
    """A file's checksum, of the same kind (sha256 or git) as ``like``; see `DataFile`.

    Raises:
        UserError: the file cannot be read.
    """
    kind = like.partition(":")[0]
    try:
        content = path.read_bytes()  # some 20 MB at most
    except OSError as error:
        raise os_error("read", path, error) from error
    if kind == "git":
        digest = hashlib.sha1(b"blob %d\0" % len(content) + content)
    else:
        digest = hashlib.sha256(content)
    return f"{kind}:{digest.hexdigest()}"


def shortened(checksum: str) -> str:
    kind, _, digits = checksum.partition(":")
    return f"{kind} {digits[:16]}..."
