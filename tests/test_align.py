"""The report of `make align`: its numbers are those of the files, in both languages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from jlora.data.batches import TokenExample
from jlora.runs.recipe import load_recipe
from parity import align_report
from parity.align_inputs import RECIPE, padded, write_timed

DOCS = Path(__file__).resolve().parents[1] / "docs"
STEPS = 160
SHIFT = {("jlora", "off"): 1e-5, ("jlora", "on"): 2e-3}  # added to the losses of PEFT's side


@pytest.fixture
def out(tmp_path, monkeypatch):
    """What the stages leave: two pairs of trainings with known differences."""
    monkeypatch.setattr(align_report, "E2E_METRICS", ("BLEU",))  # METEOR would start a Java
    recipe = load_recipe(RECIPE, [f"train.steps={STEPS}"])
    text = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    text["train"]["steps"] = recipe.train.steps
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(text))
    groups = [{"prompt": p, "references": [f"{p} is a quiet pub near the river"]} for p in "abc"]
    (tmp_path / "references.json").write_text(json.dumps(groups))
    write_timed(tmp_path / "batches.npz", [[TokenExample([5, 6, 7, 8], 2)] * 2] * 3)
    sides = {f"jlora {p}": {"seconds": [0.5, 0.25, 0.75], "peak_mb": 1234.5} for p in ("fp32",)}
    (tmp_path / "times.json").write_text(json.dumps({"load_before": 0.5, "sides": sides}))
    rng = np.random.default_rng(0)
    for way in align_report.WAYS:
        losses = 3 + rng.random(STEPS)
        up, down = rng.standard_normal((6, 2)).astype("f"), rng.standard_normal((2, 5)).astype("f")
        for name in ("torch", "jlora"):
            shift = SHIFT.get((name, way), 0.0)
            folder = tmp_path / f"{name}-{way}"
            (folder / "adapter").mkdir(parents=True)
            layer = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
            tensors = {f"{layer}A.weight": down, f"{layer}B.weight": up * (1 + shift)}
            save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
            rows = [{"step": i + 1, "loss": loss + shift} for i, loss in enumerate(losses)]
            rows.append({"step": STEPS, "valid_loss": 1.5 + shift})
            (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
            (folder / "done.json").write_text(json.dumps({"valid_loss": 1.5, "torch": "2.13"}))
            texts = [g["references"][0] for g in groups]
            texts[2] += " ." if name == "jlora" and way == "on" else ""
            (folder / "predictions.jsonl").write_text(
                "".join(json.dumps({"prediction": text}) + "\n" for text in texts)
            )
    return tmp_path


def test_report(out):
    page = align_report.write(out).read_text(encoding="utf-8")
    text = (out / "align.md").read_text(encoding="utf-8")
    assert "| 1 | " in text and "| 100 | " in text and "| 200 | " not in text
    side = align_report.read_side(out, "torch", "off")
    assert f"difference is {(1e-5 / side.losses).max():.1e} at most" in text
    assert "differ by 1.0e-05 of their norm" in text
    assert "over 2 blocks of 50 steps is +0.00200" in text
    assert "3 answers are equal to the letter without dropout, 2 with it" in text
    assert "| PyTorch + PEFT | on | 1.50000 | 100.0 |" in text
    assert "| jlora | on | 1.50200 |" in text
    assert "| jlora fp32 | 0.500 | 0.250 | 1,234 |" in text and "of 6 tokens" in text
    assert page.count("<table>") == 3 and "data:image/png;base64," in page
    lines = (out / "losses.csv").read_text().splitlines()
    assert len(lines) == STEPS + 1 and lines[0].count(",") == 4
    assert (out / "align.png").stat().st_size < 200_000


def test_documents_get_the_results_between_their_marks(out, tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    for name in ("replication.md", "replication.cn.md"):
        (folder / name).write_text((DOCS / name).read_text(encoding="utf-8"), encoding="utf-8")
    for _ in range(2):  # what stood there goes
        align_report.write_documents(out, folder)
    for name, words in (
        ("replication.md", "number by number"),
        ("replication.cn.md", "逐步对比数值"),
    ):
        before = (DOCS / name).read_text(encoding="utf-8")
        text = (folder / name).read_text(encoding="utf-8")
        assert text.count(words) == 1 and "![" in text and "(align.png)" in text
        begin, end = "<!-- make align: begin -->", "<!-- make align: end -->"
        assert text.split(begin)[0] == before.split(begin)[0]
        assert text.split(end)[1] == before.split(end)[1]
    assert (folder / "align.png").is_file()


def test_languages_have_the_same_texts():
    words = align_report.WORDS
    assert set(words["en"]) == set(words["cn"])
    for name, text in words["en"].items():
        fields = [sorted(part.split("}")[0] for part in t.split("{")[1:])
                  for t in (text, words["cn"][name])]  # fmt: skip
        assert fields[0] == fields[1], name


def test_rows_as_both_sides_read_them():
    found = padded("train", [TokenExample([4, 5, 6], 1), TokenExample([7, 8], 1)])
    assert found["train.ids"].tolist() == [[4, 5, 6], [7, 8, 0]]
    assert found["train.lengths"].tolist() == [3, 2] and found["train.prompts"].tolist() == [1, 1]
