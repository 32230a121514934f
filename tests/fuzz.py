"""Gives every reader damaged and hostile files.

    python -m tests.fuzz --examples 5000 [READER ...]

Valid files are changed (`tests/mutate.py`) and read. Allowed are a value and `UserError`. A finding
is any other exception, a crash, a read that takes long, memory beyond a small multiple of the file,
a program that is started, a connection, or anything opened for writing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings

from jlora.system.errors import UserError
from tests.mutate import CHANGES, change

SECONDS = 20
#: Where the changes of the example that is being read are written down.
LAST: Path | None = None
#: What a read may take, in Python and NumPy: some constant, and so often the files' own size.
MEGABYTES, TIMES = 4, 30


@dataclass(frozen=True)
class Reader:
    """Something that reads a folder with a few files.

    Attributes:
        files: of a valid folder, by name.
        read: what reads it.
        pure: it reads only, and so may write nothing; what loads a model may compile operators.
    """

    files: dict[str, bytes]
    read: Callable[[Path], object]
    pure: bool = True


# --- the valid files ---


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def safetensors_reader(folder: Path) -> Reader:
    from jlora.formats.safetensors_file import read_metadata, read_safetensors, write_safetensors

    arrays = {"a": np.ones((2, 3), np.float32), "b.c": np.arange(4, dtype=np.int64)}
    arrays["empty"] = np.zeros((0, 3), np.float16)
    write_safetensors(folder / "x.safetensors", arrays, {"format": "pt"})

    def read(path: Path):
        return read_safetensors(path / "x.safetensors"), read_metadata(path / "x.safetensors")

    return Reader(files_of(folder), read)


def shards_reader(folder: Path) -> Reader:
    from jlora.formats.safetensors_file import read_sharded, write_safetensors

    names = {"a": "x-1.safetensors", "b": "x-2.safetensors"}
    for name, file in names.items():
        write_safetensors(folder / file, {name: np.ones(3, np.float32)})
    (folder / "x.index.json").write_text(json.dumps({"weight_map": names}))
    return Reader(files_of(folder), lambda path: read_sharded(path / "x.index.json"))


def torch_reader(layout: str) -> Callable[[Path], Reader]:
    def make(folder: Path) -> Reader:
        from test_formats import write_arrays

        from jlora.formats.torch_file import read_torch

        arrays = {"a": np.ones((2, 3), np.float32), "b.c": np.arange(4, dtype=np.float16)}
        write_arrays(folder / "x.bin", arrays, layout)
        return Reader(files_of(folder), lambda path: read_torch(path / "x.bin"))

    return make


def gguf_reader(folder: Path) -> Reader:
    from test_formats import LLAMA, keyed, llama_tensors, write_gguf

    from jlora.data.tokenizer import Tokenizer
    from jlora.formats.gguf_file import read_gguf

    tokenizer = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<|e|>"], "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3], "tokenizer.ggml.eos_token_id": 3,
    }  # fmt: skip
    kinds = {"blk.0.attn_v.weight": "Q8_0", "blk.0.ffn_down.weight": "Q4_1"}
    values = keyed("llama", LLAMA)
    write_gguf(folder / "x.gguf", "llama", values, llama_tensors(), kinds, tokenizer)

    def read(path: Path):
        model = read_gguf(path / "x.gguf")
        _read_all(model.tensors)
        return model, Tokenizer.from_gguf(model.metadata, path / "x.gguf").encode("ab")

    return Reader(files_of(folder), read)


def _read_all(tensors) -> None:
    """Values that are read when they are asked for."""
    for array in tensors.values():
        array.read()


def gguf_family_reader(folder: Path) -> Reader:
    """Parts that are joined, norms of 1 + w, LongRoPE's tensors, SentencePiece's scores."""
    from test_formats import LLAMA, keyed, write_gguf

    from jlora.data.tokenizer import Tokenizer
    from jlora.formats.gguf_file import read_gguf

    def normal(*shape: int) -> np.ndarray:
        return np.random.default_rng(0).standard_normal(shape).astype("f")

    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab", "\u2581", "\u2581ab"]
    tokenizer = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1e3, -1e3, -1.0, -1e3, -2.0],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip
    heads = {"attn_q": 32, "attn_k": 16, "attn_v": 16}
    parts = {f"blk.0.{name}.weight": normal(rows, 32) for name, rows in heads.items()}
    embedding = {"token_embd.weight": normal(8, 32), "blk.0.attn_norm.weight": normal(32)}
    factors = {f"rope_factors_{length}.weight": normal(4) for length in ("long", "short")}
    scaling = {"rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": 1.2}
    windows = {"attention.sliding_window": 9, "attention.sliding_window_pattern": [1, 0]}
    for name, tensors, values in (
        ("internlm2", parts, {}),
        ("phi3", factors, scaling),
        ("gemma2", {}, {**windows, "attn_logit_softcapping": 20.0}),
    ):
        settings = keyed(name, {**LLAMA, **values})
        write_gguf(folder / f"{name}.gguf", name, settings, {**embedding, **tensors}, {}, tokenizer)

    def read(path: Path):
        found = []
        for file in sorted(path.glob("*.gguf")):
            model = read_gguf(file)
            _read_all(model.tensors)
            found.append((model, Tokenizer.from_gguf(model.metadata, file).encode("ab")))
        return found

    return Reader(files_of(folder), read)


def tokenizer_reader(folder: Path) -> Reader:
    from tests.tiny import END, train_tokenizer

    train_tokenizer(280).save(str(folder / "tokenizer.json"))
    template = {"eos_token": END, "chat_template": "{{ x }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(template))
    (folder / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": [0]}')
    return Reader(files_of(folder), use_tokenizer)


def vocab_reader(folder: Path) -> Reader:
    vocab = {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3, "<|x|>": 4}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    added = {"4": {"content": "<|x|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    return Reader(files_of(folder), use_tokenizer)


def use_tokenizer(folder: Path) -> object:
    from jlora.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(folder)
    return tokenizer.decode(tokenizer.encode("ab, c\u00e9 12"))


def adapter_reader(folder: Path) -> Reader:
    from jlora.adapters import LoraConfig, PeftModel, get_peft_model
    from tests.tiny_models import randomise_adapter, tiny_gpt2

    config = LoraConfig(r=2, target_modules=["c_attn"], enable_lora=[True, False, True])
    randomise_adapter(get_peft_model(tiny_gpt2(), config)).save_pretrained(folder)

    def read(path: Path):
        return PeftModel.from_pretrained(tiny_gpt2(), path)

    return Reader(files_of(folder), read, pure=False)


def loralib_reader(folder: Path) -> Reader:
    from jlora.adapters import LoraConfig, PeftModel, get_peft_model
    from tests.tiny_models import randomise_adapter, tiny_gpt2

    config = LoraConfig(r=2, target_modules=["c_attn", "c_proj"])
    randomise_adapter(get_peft_model(tiny_gpt2(), config)).save_loralib(folder / "x.pt")

    def read(path: Path):
        return PeftModel.from_loralib(tiny_gpt2(), path / "x.pt", 8)

    return Reader(files_of(folder), read, pure=False)


def tuned_reader(folder: Path) -> Reader:
    from jlora.adapters import PartialModel
    from tests.tiny_models import tiny_gpt2

    PartialModel(tiny_gpt2(), "bitfit").save_pretrained(folder)

    def read(path: Path):
        return PartialModel.from_pretrained(tiny_gpt2(), path)

    return Reader(files_of(folder), read, pure=False)


def model_reader(folder: Path) -> Reader:
    from jlora.models.hub import load
    from tests.tiny import write_model

    def read(path: Path):
        model = load(path)
        return model, [parameter.numpy() for parameter in model.parameters()]

    write_model(folder)
    return Reader(files_of(folder), read, pure=False)


def checkpoint_reader(folder: Path) -> Reader:
    from jlora.training.checkpoint import Progress, newest, read_checkpoint, save_checkpoint

    save_checkpoint(folder, Progress(2), {"a": np.ones(3, np.float32)}, {"m": np.ones(3)})

    def read(path: Path):
        from jlora.training.checkpoint import Damaged

        try:
            return read_checkpoint(path)
        except Damaged as error:
            raise UserError(str(error)) from error

    return Reader(files_of(newest(folder)), read)


def task_reader(task: str, name: str, content: str) -> Callable[[Path], Reader]:
    def make(folder: Path) -> Reader:
        from jlora.data.tasks import get_task

        found = get_task(task)
        return Reader({name: content.encode()}, lambda path: found.groups(found.read(path / name)))

    return make


WEBNLG = {
    "entries": [
        {
            str(number): {
                "category": "Food",
                "modifiedtripleset": [{"subject": "A", "property": "p", "object": f"b{number}"}],
                "lexicalisations": [{"comment": "good", "lex": "A p b.", "xml_id": "Id1"}],
            }
        }
        for number in (1, 2)
    ]
}
DART = [
    {
        "tripleset": [["A", "P", "b"], ["A", "Q", "c"]],
        "subtree_was_extended": False,
        "annotations": [{"source": "x", "text": "A p b."}],
    }
]
PAIRS = '{"prompt": "a", "completion": "b", "part": "seen"}\n{"prompt": "c", "completion": "d"}\n'
BOOLQ = '{"question": "is it", "title": "It", "passage": "It is.", "answer": true}\n' * 2
CSV = 'mr,ref\n"name[A], priceRange[\u00a320-25]","A is, so ""to say"", dear."\nname[B],B.\n'
RECIPE = {
    "model": "smollm2-135m",
    "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 32},
    "data": {"task": "e2e", "folder": "x", "metrics": ["BLEU", "NIST"], "valid_stride": 2},
    "train": {"steps": 10, "batch_size": 2, "optim": {"lr": 0.001, "schedule": "linear"}},
    "decode": {"num_beams": 3, "length_penalty": 0.9},
    "log": [],
}
METRICS = "".join(
    json.dumps({"step": step, "loss": 1.5, "lr": 1e-3, "seconds": 0.5 * step}) + "\n"
    for step in range(1, 4)
)
HYPOTHESIS = {"text": "b", "ids": [1, 2], "logprob": -1.5, "length": 2, "finished": True}
PREDICTIONS = json.dumps({"prompt": "a", "prediction": "b", "hypotheses": [HYPOTHESIS] * 2}) + "\n"


MESSAGES = [
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": None, "thinking": "so", "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
    {"from": "gpt", "value": "Yo", "weight": 1},
]  # fmt: skip
EXPORT = {
    "current_node": "b",
    "mapping": {
        "a": {"parent": None, "message": {"author": {"role": "user"},
              "content": {"content_type": "text", "parts": ["Hi"]}}},
        "b": {"parent": "a", "message": {"author": {"role": "assistant"},
              "content": {"content_type": "text", "parts": ["Yo"]}}},
    },
}  # fmt: skip
CHATS = [
    {"messages": MESSAGES, "tools": [{"name": "f"}], "id": 3},
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "input": "b", "output": "c", "system": "d"},
    {"conversations": MESSAGES[2:]},
    EXPORT,
]


def template_reader(folder: Path) -> Reader:
    from jlora.data.chat_template import built_in_names, find_template

    # The one that is longest, as the file of a model.
    templates = [find_template(None, name).source for name in built_in_names()]
    (folder / "chat_template.jinja").write_text(max(templates, key=len), encoding="utf-8")
    settings = {"eos_token": {"content": "</s>"}, "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    return Reader(files_of(folder), lambda path: find_template(path).render(messages))


def recipe_reader(folder: Path) -> Reader:
    from jlora.runs.recipe import dump_recipe, load_recipe

    text = json.dumps(RECIPE).encode()  # which is YAML too

    def read(path: Path):
        return dump_recipe(load_recipe(path / "x.yaml"))

    return Reader({"x.yaml": text}, read)


def yaml_reader(folder: Path) -> Reader:
    import yaml

    return Reader({"x.yaml": yaml.safe_dump(RECIPE).encode()}, recipe_reader(folder).read)


def metrics_reader(folder: Path) -> Reader:
    from jlora.training.loggers import read_metrics
    from jlora.training.loggers.metrics import training_seconds

    return Reader(
        {"metrics.jsonl": METRICS.encode()},
        lambda path: training_seconds(read_metrics(path / "metrics.jsonl")),
    )


def predictions_reader(folder: Path) -> Reader:
    from jlora.decoding.predictions import read_predictions, rerank

    return Reader(
        {"p.jsonl": PREDICTIONS.encode() * 2},
        lambda path: rerank(read_predictions(path / "p.jsonl"), 0.8),
    )


READERS: dict[str, Callable[[Path], Reader]] = {
    "safetensors": safetensors_reader,
    "shards": shards_reader,
    "torch-zip": torch_reader("zip"),
    "torch-legacy": torch_reader("legacy"),
    "gguf": gguf_reader,
    "gguf-families": gguf_family_reader,
    "tokenizer": tokenizer_reader,
    "vocab": vocab_reader,
    "adapter": adapter_reader,
    "loralib": loralib_reader,
    "tuned": tuned_reader,
    "model": model_reader,
    "checkpoint": checkpoint_reader,
    "jsonl": task_reader("jsonl", "x.jsonl", PAIRS),
    "csv": task_reader("e2e", "x.csv", CSV),
    "text": task_reader("e2e", "x.txt", "name : A||A .\nname : B||B .\n"),
    "webnlg": task_reader("webnlg", "x.json", json.dumps(WEBNLG)),
    "dart": task_reader("dart", "x.json", json.dumps(DART)),
    "boolq": task_reader("boolq", "x.jsonl", BOOLQ),
    "chat": task_reader("chat", "x.jsonl", "".join(json.dumps(row) + "\n" for row in CHATS)),
    "chat-array": task_reader("chat", "x.json", json.dumps(CHATS, indent=1)),
    "chat-csv": task_reader("chat", "x.csv", 'id,prompt,completion\n1,"a, b",c\n2,d,e\n'),
    "chat-template": template_reader,
    "recipe": recipe_reader,
    "yaml": yaml_reader,
    "metrics": metrics_reader,
    "predictions": predictions_reader,
}

# --- the checks ---


class Finding(AssertionError):
    """What a reader must not do."""


class Watch:
    """An audit hook that notes what a reader does to the outside while it is on."""

    def __init__(self):
        self.on, self.seen = False, []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = arguments
            if (mode and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & 3):
                self.seen.append(f"opened {path} for writing")
        elif event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork"):
            self.seen.append(f"started a program: {event}{arguments[:1]}")
        elif event in ("socket.connect", "os.remove", "os.rename", "os.mkdir", "shutil.rmtree"):
            self.seen.append(f"{event}{arguments[:1]}")


_watch: list[Watch] = []


@contextlib.contextmanager
def limits(reader: Reader, size: int) -> Iterator[None]:
    """Raises `Finding` if reading exceeds its limits; ``size``: of the files in bytes."""
    if not _watch:
        _watch.append(Watch())
    watch = _watch[0]
    tracemalloc.start()
    started = time.monotonic()
    watch.on, watch.seen = reader.pure, []
    try:
        yield
    finally:
        watch.on = False
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    if watch.seen:
        raise Finding("; ".join(watch.seen))
    if peak > MEGABYTES * 2**20 + TIMES * size:
        raise Finding(f"{peak / 2**20:.0f} MB of memory for {size} bytes")
    if time.monotonic() - started > SECONDS:
        raise Finding(f"{time.monotonic() - started:.0f} s")


def read_changed(reader: Reader, changes: list, folder: Path) -> str:
    """Read the files with some changes; "value", or "refused"."""
    files = dict(reader.files)
    names = sorted(files)
    for kind, a, b in changes:
        name = names[(a >> 8) % len(names)]
        files[name] = change(files[name], kind, a, b)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    outcome = "value"
    if LAST is not None:  # for what kills the process
        LAST.write_text(repr(changes))
    with limits(reader, sum(map(len, files.values()))):
        try:
            reader.read(folder)
        except UserError as error:
            if "\n" in str(error):
                raise Finding(f"an error of several lines: {error}") from error
            outcome = "refused"
    return outcome


def fuzz(name: str, examples: int, number: int = 0, tally: Counter | None = None) -> None:
    """Read changed files with a reader; raises the first finding, reduced by hypothesis.

    Args:
        number: seed.
        tally: counts the outcomes.
    """
    with tempfile.TemporaryDirectory(prefix="jlora-fuzz-") as valid:
        reader = READERS[name](Path(valid))
    tally = Counter() if tally is None else tally
    with tempfile.TemporaryDirectory(prefix="jlora-fuzz-") as scratch:
        folder = Path(scratch)
        for file, data in reader.files.items():
            (folder / file).write_bytes(data)
        reader.read(folder)  # as it is it must be read; and what is imported late is now

        @seed(number)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
            report_multiple_bugs=True,
        )
        @given(changes=CHANGES)
        def one(changes):
            tally[read_changed(reader, changes, folder)] += 1

        one()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*", metavar="READER", help=", ".join(READERS))
    parser.add_argument("--examples", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gigabytes", type=int, default=4, help="of address space; 0: any")
    options = parser.parse_args(arguments)
    unknown = set(options.readers) - set(READERS)
    if unknown:
        parser.error(f"no reader {', '.join(sorted(unknown))}; there are {', '.join(READERS)}")
    if options.gigabytes:  # what tracemalloc does not see fails beyond this
        resource.setrlimit(resource.RLIMIT_AS, (options.gigabytes * 2**30,) * 2)
    global LAST
    LAST = Path(tempfile.gettempdir()) / "jlora-fuzz-last.txt"
    print(f"the changes that are being read stand in {LAST}")
    failed = 0
    print(f"{'reader':14} {'read':>7} {'value':>7} {'refused':>8} {'seconds':>8}", flush=True)
    for name in options.readers or READERS:
        tally: Counter = Counter()
        started = time.monotonic()
        finding = None
        try:
            fuzz(name, options.examples, options.seed, tally)
        except BaseException as error:  # a Rust panic is none of Exception's
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            finding, failed = error, failed + 1
        seconds = time.monotonic() - started
        total = sum(tally.values())
        print(
            f"{name:14} {total:7} {tally['value']:7} {tally['refused']:8} {seconds:8.1f}"
            + ("  FOUND" if finding is not None else ""),
            flush=True,
        )
        if finding is not None:
            import traceback

            traceback.print_exception(type(finding), finding, finding.__traceback__)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
