"""`jlora pull DATASET`: every way a download can go wrong, against a server on this machine."""

from __future__ import annotations

import hashlib
import http.server
import socket
import threading

import pytest

from jlora.cli import main
from jlora.data import pull_datasets
from jlora.data.pull_datasets import DATASETS, DataFile, Dataset, checksum_of, data_cache, pull_any
from jlora.data.tasks import get_task
from jlora.system.errors import UserError

CONTENT = {"train.txt": b"a||b\n" * 3, "test.txt": "Café||ok\n".encode()}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `Handler.files` below /e2e; `Handler.broken` gets only half of what it announces."""

    files: dict = {}
    broken: set = set()
    asked: list = []

    def do_GET(self):
        name = self.path.rsplit("/", 1)[-1]
        Handler.asked.append(self.path)
        if name not in self.files:
            self.send_error(404)
            return
        content = self.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if name in self.broken else content)

    def log_message(self, *_):
        pass


def git_checksum(content):
    return "git:" + hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a server that has a small dataset "e2e" of two files."""
    monkeypatch.setenv("JLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JLORA_DATA_URL", raising=False)
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Handler, "files", dict(CONTENT))
    monkeypatch.setattr(Handler, "broken", set())
    monkeypatch.setattr(Handler, "asked", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{running.server_port}"
        files = (
            DataFile(
                f"{address}/e2e/train.txt",
                "sha256:" + hashlib.sha256(CONTENT["train.txt"]).hexdigest(),
            ),
            DataFile(f"{address}/e2e/test.txt", git_checksum(CONTENT["test.txt"])),
        )
        dataset = Dataset("Small", "https://home.invalid", "CC X", "https://licence.invalid", files)
        monkeypatch.setitem(DATASETS, "e2e", dataset)
        yield address
        running.shutdown()
        thread.join()


def message(name="e2e"):
    with pytest.raises(UserError) as caught:
        pull_any(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_dataset_is_pulled_once_checked_and_found(server, capsys, tmp_path, monkeypatch):
    assert main(["pull", "e2e"]) == 0
    said = capsys.readouterr()
    folder = data_cache() / "e2e"
    assert said.out.strip() == str(folder) == str(tmp_path / "cache" / "data" / "e2e")
    assert "licence: CC X, https://licence.invalid" in said.err
    assert files_in(folder) == ["LICENSE-note.txt", "test.txt", "train.txt"]
    assert all((folder / name).read_bytes() == content for name, content in CONTENT.items())
    note = (folder / "LICENSE-note.txt").read_text()
    assert "CC X" in note and f"{server}/e2e/test.txt" in note
    assert pull_any("e2e") == folder and len(Handler.asked) == 2
    # Looked for last, after $JLORA_DATA, ./data and ../shared/data.
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("JLORA_DATA", raising=False)
    assert get_task("e2e").find_data(None, "test") == folder / "test.txt"


def test_a_file_put_there_by_hand_is_checked(server):
    folder = data_cache() / "e2e"
    folder.mkdir(parents=True)
    (folder / "train.txt").write_bytes(CONTENT["train.txt"])
    pull_any("e2e")
    assert Handler.asked == ["/e2e/test.txt"]
    (folder / "train.txt").write_bytes(b"other||file\n")
    assert "train.txt: not the file of the release (expected sha256" in message()
    assert (folder / "train.txt").read_bytes() == b"other||file\n"


@pytest.mark.parametrize(("name", "kind"), [("train.txt", "sha256"), ("test.txt", "git")])
def test_a_wrong_checksum_leaves_nothing(server, name, kind):
    Handler.files[name] = CONTENT[name].replace(b"|", b"/")
    text = message()
    assert f"/{name}: wrong checksum ({kind} " in text and "put what you get into" in text
    assert name not in files_in(data_cache() / "e2e")
    assert not [path for path in files_in(data_cache() / "e2e") if path.endswith(".tmp")]


def test_a_transfer_that_breaks_off(server):
    Handler.broken.add("test.txt")
    assert "the transfer broke off after 5 of 10 bytes; pull again" in message()
    assert files_in(data_cache() / "e2e") == ["LICENSE-note.txt", "train.txt"]
    Handler.broken.clear()
    pull_any("e2e")  # goes on with what is missing
    assert Handler.asked == ["/e2e/train.txt", "/e2e/test.txt", "/e2e/test.txt"]


def test_a_file_that_is_not_there(server):
    del Handler.files["test.txt"]
    text = message()
    assert f"could not fetch {server}/e2e/test.txt: HTTP 404" in text
    # What is there already need not be fetched by hand.
    assert f"download {server}/e2e/test.txt elsewhere, put what you get into" in text
    assert f"into {data_cache() / 'e2e'} under the same names" in text


def test_a_file_that_is_too_large(server, monkeypatch):
    monkeypatch.setattr(pull_datasets, "LARGEST", 8)
    assert "sends more than 8 bytes" in message()
    assert files_in(data_cache() / "e2e") == ["LICENSE-note.txt"]


@pytest.mark.parametrize("address", ["http://127.0.0.1:{port}/x", "no address", "http://[", "ftp:"])
def test_without_a_network(server, monkeypatch, address):
    with socket.socket() as closed:  # bound, so that nobody else takes the port, but not listening
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("JLORA_DATA_URL", address.format(port=closed.getsockname()[1]))
        text = message()
    assert text.startswith("could not fetch ")
    # The official addresses, not the mirror's.
    assert f"download {server}/e2e/train.txt {server}/e2e/test.txt elsewhere" in text


def test_a_server_that_says_nothing(server, monkeypatch):
    monkeypatch.setattr(pull_datasets, "TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("JLORA_DATA_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "timed out" in message()


def test_a_mirror(server, monkeypatch):
    monkeypatch.setenv("JLORA_DATA_URL", f"{server}/mirror/")
    pull_any("e2e")
    assert Handler.asked == ["/mirror/e2e/train.txt", "/mirror/e2e/test.txt"]


def test_a_cache_that_cannot_be_written(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JLORA_CACHE", str(tmp_path / "file"))
    assert "cannot write to" in message()


def test_names(monkeypatch):
    assert message("webnlq") == "no dataset or model 'webnlq'; did you mean webnlg?"
    assert "did you mean boolq?" in message("bolq")
    assert "did you mean smollm2-135m?" in message("smollm2-135")
    monkeypatch.setattr(pull_datasets, "pull", lambda name: f"model {name}")
    assert pull_any("gpt2-medium") == "model gpt2-medium"


def test_what_is_known_of_each_dataset():
    for name, dataset in DATASETS.items():
        task = get_task(name)
        names = [file.name for file in dataset.files]
        found = {
            split: next((n for n in accepted if n in names), None)
            for split, accepted in task.splits.items()
        }
        assert found["train"] and found["test"]
        assert found["valid"] or name == "boolq"
        for file in dataset.files:
            kind, _, digits = file.checksum.partition(":")
            assert len(digits) == {"sha256": 64, "git": 40}[kind]
            assert file.url.startswith("https://")


@pytest.mark.parametrize(
    ("name", "file", "local"),
    [
        ("e2e", "train.txt", "train.txt"),
        ("e2e", "valid.txt", "valid.txt"),
        ("e2e", "test.txt", "test.txt"),
        ("e2e", "devset.csv", "devset.csv"),
        ("e2e", "testset_w_refs.csv", "testset_w_refs.csv"),
        ("webnlg", "dev.json", "dev.json"),
        ("dart", "dart-v1.1.1-full-dev.json", "dev.json"),
    ],
)
def test_the_development_data_are_what_would_be_pulled(shared_data, name, file, local):
    path = shared_data / name / local
    if not path.is_file():
        pytest.skip(f"{name}/{local} is not in the development data")
    (known,) = [each for each in DATASETS[name].files if each.name == file]
    assert checksum_of(path, known.checksum) == known.checksum


def test_gits_name_of_a_content(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "hello").write_bytes(b"hello\n")
    # What `git hash-object` says.
    empty, hello = (checksum_of(tmp_path / name, "git:") for name in ("empty", "hello"))
    assert empty == "git:e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert hello == "git:ce013625030ba8dba906f756967f9e9ca394464a"
