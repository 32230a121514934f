"""`make bench`: its page, its chart, going on after a cut; no timings and no peers."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from benchmarks import bench, cases, decoding, environments, page, sides, work
from benchmarks.cases import Plan
from benchmarks.chart import draw
from benchmarks.inputs import Inputs, NotMade, or_reason, run
from benchmarks.prompts import Prompts

FEW = {"processor": "Toy", "processors": 2, "features": ["AVX2"], "memory_gb": 24, "isa": "native",
       "date": "2026-01-02", "command": "make bench", "commit": "abc", "load": 0.0,
       "versions": {"jlora": {"jlora": "0.1"}, "peft": {"peft": "0.21"}}}  # fmt: skip


def side(name: str, each: float | None, **more) -> dict:
    """A record as `cases.record` makes it."""
    return {
        "name": name, "environment": "", "problem": None if each else "crashed: no memory",
        "seconds": [each] * 2 if each else [], "each": each, "first": 1.0, "peak_mb": 1234.5,
        "inputs": 1, "ratio": each and each / 0.5, "avx512": False, "computes in": None,
        "loss": 1.0, "tokens": 3, "equal": None, **more,
    }  # fmt: skip


def figures(**head) -> dict:
    training = [
        {"kind": "training", "model": "gpt2-small", "group": 0, "tokens": 400.0, "flops": 1e11,
         "when": "", "sides": [side("jlora bf16", 0.5), side("PEFT bf16", 1.0)]},
        {"kind": "training", "model": "gpt2-small", "group": 1, "tokens": 400.0, "flops": 1e11,
         "when": "", "sides": [side("jlora bf16", 0.7), side("jlora int8", 0.4),
                               side("mlx-lm", 4.0), side("PEFT NF4", None)]},
    ]  # fmt: skip
    beam = {"kind": "beam", "beams": 10, "new_tokens": 64, "when": "", "sides": [
        side("jlora bf16", 0.5, equal=1.0, inputs=64, score=-1.25),
        side("CTranslate2 int8", 2.0, equal=0.75, score=-1.5, **{"computes in": "int8, AVX2"}),
    ]}  # fmt: skip
    streams = [
        {"kind": "streams", "task": task, "streams": n, "tokens": 10, "temperature": temperature,
         "when": "", "sides": [side("jlora int8", 0.1 * n), side("llama.cpp q8_0", 0.2 * n),
                               side("jlora bf16", 0.2 * n, equal=1.0)]}
        for task, n, temperature in (("greedy, 1 stream", 1, 0.0), ("drawn, 1 stream", 1, 0.8))
    ]  # fmt: skip
    peak = {"kind": "peak", "products": {"jlora bf16": 4e11, "torch bf16": 3e11}, "bandwidth": 2e10}
    return {"head": {**FEW, **head}, "results": [peak, *training, beam, *streams]}


def cells(text: str, first: str) -> list[list[str]]:
    """The rows that begin with a cell."""
    rows = [[c.strip(" *") for c in line.split("|")[1:-1]] for line in text.splitlines()]
    return [row for row in rows if row and row[0] == first]


def test_the_page_names_machine_command_peaks_and_versions():
    text = page.page(figures(), "chart.svg")
    for part in ("Toy (AVX2), 2 cores", "    make bench\n", "2026-01-02", "commit abc", "peft 0.21",
                 "jlora bf16 400", "20.0 GB/s", "![](chart.svg)"):  # fmt: skip
        assert part in text


def test_rows_of_all_groups_are_in_one_table_fastest_first():
    text = page.page(figures(), "")
    table = text[text.index("## A LoRA update of GPT-2 small") : text.index("## Beam search")]
    names = [line.split("|")[1].strip(" *") for line in table.splitlines() if line[:2] == "| "][1:]
    assert names == ["jlora int8", "jlora bf16", "PEFT bf16", "mlx-lm", "PEFT NF4"]
    # 0.4 s for 400 tokens and 1e11 operations, at a peak of 4e11 a second
    (row,) = cells(table, "jlora int8")
    assert row[1:] == ["0.400", "1,000", "62%", "1,234", "0.80", "1.0"]
    # the first group's bf16, not the second's
    assert cells(table, "jlora bf16")[0][1] == "0.500"


def test_a_side_without_a_figure_is_shown_with_its_reason():
    text = page.page(figures(), "")
    assert cells(text, "PEFT NF4") == [["PEFT NF4", *["–"] * 6]]
    assert "- PEFT NF4 (gpt2-small): crashed: no memory" in text
    everything = figures()
    for result in everything["results"]:
        for each in result.get("sides", ()):
            each.update(each=None, seconds=[], problem="gone", ratio=None)
    text = page.page(everything, "")
    assert "- jlora bf16 (gpt2-small, beam, streams): gone" in text


def test_the_summary_compares_the_fastest_and_equal_bits():
    text = page.page(figures(), "")
    assert cells(text, "train GPT-2 small, tokens/s") == [
        ["train GPT-2 small, tokens/s", "jlora int8", "1,000.0", "1,234", "PEFT bf16", "400.0",
         "1,234", "2.50"]
    ]  # fmt: skip
    assert cells(text, "greedy, 1 stream, 8 bits, tokens/s")[0][4:] == [
        "llama.cpp q8_0", "50.0", "1,234", "2.00",
    ]  # fmt: skip
    # No peer has 16 bits here, and drawing has no row.
    assert cells(text, "greedy, 1 stream, 16 bits, tokens/s")[0][4:] == ["–"] * 4
    assert "drawn, 1 stream, 8" not in text
    assert "CTranslate2 int8: int8, AVX2" in text


def test_whether_avx2_was_held_is_said():
    held = figures(isa="avx2")
    assert "No side used AVX-512 registers" in page.page(held, "")
    held["results"][1]["sides"][1]["avx512"] = True
    assert "nevertheless by: PEFT bf16." in page.page(held, "")
    held["results"][1]["sides"][1]["avx512"] = None
    assert "this kernel does not say" in page.page(held, "")
    assert "AVX-512 registers" not in page.page(figures(), "")


def test_the_chart_has_a_bar_for_each_side(tmp_path):
    shown = page.panels(figures()["results"])
    assert [title for title, _, _ in shown] == [
        "LoRA training, GPT-2 small", "Beam search, 10 beams", "Greedy, 1 stream",
    ]  # fmt: skip
    assert shown[0][2] == [("jlora int8", 1000), ("jlora bf16", 800), ("PEFT bf16", 400),
                           ("mlx-lm", 100)]  # fmt: skip
    draw(figures(), tmp_path / "chart")
    assert (tmp_path / "chart.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "chart.svg").read_text().count("<svg") == 1
    draw({"head": FEW, "results": []}, tmp_path / "none")
    assert not (tmp_path / "none.svg").exists()


def test_a_cut_run_goes_on_and_another_one_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "code", lambda: "abc")
    made = []

    def case(name):
        def measure(plan):
            made.append(name)
            if name == "b" and made.count("b") == 1:
                raise KeyboardInterrupt
            return [{"kind": name}]

        return measure

    wanted = {name: case(name) for name in "ab"}
    plan = Plan("native", Inputs(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        bench.measured(wanted, plan, tmp_path, {}, again=False)
    assert bench.measured(wanted, plan, tmp_path, {}, False) == [{"kind": "a"}, {"kind": "b"}]
    assert made == ["a", "b", "b"]
    bench.measured(wanted, plan, tmp_path, {"rounds": 3}, False)
    bench.measured(wanted, plan, tmp_path, {"rounds": 3}, True)
    assert made == ["a", "b", "b"] + ["a", "b"] * 2


def test_cases_are_named_and_chosen(capsys):
    bench.main(["--quick", "--list"])
    assert capsys.readouterr().out.split() == [
        "peak", "training-gpt2-small-1", "training-gpt2-small-2", "training-gpt2-small-3", "beam",
        "streams",
    ]  # fmt: skip
    bench.main(["--only", "beam", "training-smoll", "--list"])
    names = ["peak", *(f"training-smollm2-135m-{i}" for i in (1, 2, 3)), "beam"]
    assert capsys.readouterr().out.split() == names
    with pytest.raises(SystemExit):
        bench.main(["--isa", "avx3"])


def test_an_environment_that_is_missing_says_why(tmp_path, monkeypatch):
    monkeypatch.setitem(sides.PYTHON, "peft", tmp_path / ".venv-peft" / "bin" / "python")
    assert ".venv-peft is not there" in environments.missing("peft")
    folder = tmp_path / ".venv-peft"
    folder.mkdir()
    (folder / "install.log").write_text("Looking\nERROR: No matching distribution\nnote: x\n")
    assert environments.missing("peft").endswith("ERROR: No matching distribution")
    path, why = or_reason(lambda: run("peft", "-c", "1"))
    assert path == "" and "No matching distribution" in why
    (folder / ".installed").touch()
    assert environments.missing("peft") is None and environments.versions("peft") == {}
    assert environments.missing("jlora") is None
    assert environments.versions("jlora")["jlora"]


def test_a_failed_conversion_says_its_last_line():
    with pytest.raises(NotMade, match="conversion failed: no such model"):
        run("jlora", "-c", "raise SystemExit('no such model')")


def test_a_side_that_breaks_off_does_not_stop_the_others(monkeypatch, tmp_path):
    monkeypatch.setitem(sides.PYTHON, "here", sys.executable)
    broken = sides.Side("a", "no_such_module", "here", {})
    absent = sides.Side("b", "peak", "here", {}, problem="not installed")
    good = sides.Side("c", "peak", "here", {"rows": 4, "n": 8, "k": 8})
    sides.alternate([broken, absent, good], rounds=2, warmup=1)
    assert broken.problem.startswith("a ended with exit code 1: ModuleNotFoundError")
    assert absent.problem == "not installed" and len(good.seconds) == 2
    assert good.extra["avx512"] in (True, False, None)
    entries = [cases.record(each, "c", [broken, absent, good]) for each in (broken, absent, good)]
    assert [e["ratio"] for e in entries] == [None, None, 1.0] and json.dumps(entries)
    with pytest.raises(RuntimeError, match="no_such_module"):
        sides.check([good, broken])


def test_a_slow_side_does_fewer_rounds(monkeypatch):
    times = {"fast": 0.5, "slow": 5.0}
    monkeypatch.setattr(sides.Side, "round", lambda self: times[self.name])
    fast, slow = (sides.Side(name, "", "", {}) for name in times)
    sides.take_turns([fast, slow], rounds=6, seconds=4.0)
    assert (len(fast.seconds), len(slow.seconds)) == (6, sides.FEWEST)


def test_a_step_of_minutes_is_done_once_by_avx2(tmp_path):
    for isa, rounds, left_out in (("native", None, False), ("avx2", 1, True)):
        made = [
            sides.Side(name, "torch_train", "", {"precision": name.split()[1].strip(",")})
            for name in ("PEFT bf16", "PEFT bf16, memory kept", "PEFT fp32")
        ]
        bf16, kept, fp32 = Plan(isa, Inputs(tmp_path)).ready(made)
        assert (bf16.most_rounds, fp32.most_rounds) == (rounds, None)
        assert bool(kept.problem) == left_out and not bf16.problem and not fp32.problem
        assert ("DNNL_MAX_CPU_ISA" in fp32.variables) == left_out


def test_fewer_rounds_are_compared_with_the_same_batches(monkeypatch, tmp_path):
    """A side that takes ten times as long for every token is ten times as slow."""
    lengths = [200, 400, 100, 600, 300]
    slowness = {"jlora bf16": 0.001, "PEFT bf16": 0.01}

    def batches(model, path, rows, count):
        rng = np.random.default_rng(0)
        each = [np.array([n]) for n in lengths]
        return work.write_batches(path, rng, 11, each, [np.array([1])] * len(each))

    def turn(self):
        self.spec["done"] = self.spec.get("done", -1) + 1
        return lengths[self.spec["done"]] * slowness[self.name]

    monkeypatch.setattr(cases.training, "batches", batches)
    monkeypatch.setattr(
        cases.training, "training_sides", lambda *_: [sides.Side(n, "", "", {}) for n in slowness]
    )
    for name, function in (("start", lambda _: None), ("stop", lambda _: None), ("round", turn)):
        monkeypatch.setattr(sides.Side, name, function)
    plan = Plan("native", Inputs(tmp_path), rounds=4, warmup=1, seconds=2.0)
    result = cases.train(plan, "gpt2-small", 0)
    ours, theirs = result["sides"]
    assert (len(ours["seconds"]), len(theirs["seconds"])) == (4, 2)
    assert theirs["ratio"] == pytest.approx(10) and ours["ratio"] == 1
    assert result["tokens"] / theirs["each"] == pytest.approx(100)
    assert theirs["each"] / ours["each"] == pytest.approx(10)


def test_a_side_that_ends_in_one_task_is_not_asked_in_the_next(monkeypatch, tmp_path):
    asked = []

    def turn(self):
        asked.append(self.name)
        if self.name == "other":
            raise RuntimeError("other ended with exit code 1")
        return 1.0

    for name, function in (("start", lambda _: None), ("stop", lambda _: None), ("round", turn)):
        monkeypatch.setattr(sides.Side, name, function)
    both = [sides.Side(name, "", "", {}) for name in ("jlora bf16", "other")]
    monkeypatch.setattr(cases.decoding, "tuned_spec", lambda *_: {})
    monkeypatch.setattr(cases.decoding, "stream_sides", lambda *_: both)
    results = cases.streams(Plan("native", Inputs(tmp_path), rounds=1))
    assert len(results) == len(decoding.STREAMS) and asked.count("other") == 1
    for result in results:
        ours, theirs = result["sides"]
        assert ours["each"] == 1 and theirs["problem"] == "other ended with exit code 1"


def test_a_peer_gets_none_of_jittors_settings(monkeypatch):
    """Importing Jittor sets OpenMP's variables and its compiler's flags for the whole process."""
    monkeypatch.setattr(sides, "_BEGUN", frozenset({"PATH", "cc_flags"}))
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "cache_name", "cc_flags", "kernel_flags"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("JLORA_DATA", "somewhere")
    found = sides.outside()
    assert found["JLORA_DATA"] == "somewhere" and found["cc_flags"] == "1"  # the user's own
    gone = {"OMP_NUM_THREADS", "GOMP_SPINCOUNT", "cache_name", "kernel_flags"}
    assert not gone & found.keys()


def test_prompts_come_in_turn_and_texts_end(tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([[1], [2], [3]]))
    prompts = Prompts({"prompts": str(file), "ends": [0]})
    assert prompts.next(2) == {0: [1], 1: [2]} and prompts.next(2) == {2: [3], 0: [1]}
    assert prompts.first(2) == {0: [1], 1: [2]}
    said = prompts.said({2: [3], 0: [1]}, [np.array([5, 0, 7]), [6]])
    assert said == {"inputs": 2, "tokens": 2, "answers": {"2": [5], "0": [6]}}
    with pytest.raises(RuntimeError, match="wrote 1 tokens instead of 2"):
        prompts.said({0: [1]}, [[5]], length=2)
    assert decoding.equal_share({"0": [6], "2": [5]}, {"0": [6], "2": [4], "1": [1]}) == 0.5
    assert decoding.equal_share({"0": [6]}, {"1": [6]}) is None
    # A server that writes no ends goes on behind the other's.
    longer, reference = {"0": [6, 7, 8], "1": [5]}, {"0": [6, 7], "1": [5, 9]}
    assert decoding.equal_share(longer, reference) == 0
    assert decoding.equal_share(longer, reference, has_ends=False) == 0.5
