"""The report of `parity.align`: tables as Markdown, the curves as PNG, both as one HTML page."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import statistics
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from safetensors.numpy import load_file

from jlora.data.readers import json_lines
from jlora.metrics import E2E_METRICS, evaluate
from jlora.report.plots import new_figure, save_png
from jlora.report.tables import markdown_table, metrics_of
from jlora.system.files import read_text, write_text
from jlora.system.machine import cpu_model, processors
from jlora.training.loggers import read_metrics

WAYS = ("off", "on")  # dropout
WORDS = yaml.safe_load(read_text(Path(__file__).with_name("align_words.yaml")))
OURS, THEIRS = "#1f5fa8", "#b4510f"
SHOWN = (1, 2, 10, 50, 100, 200, 300, 400, 500)  # steps in the table
BLOCK = 50  # steps whose mean is one sample, so that neighbours of equal data are not counted twice
T_95 = {5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # Student's t, two-sided, by freedom


@dataclass
class Side:
    """What one training left.

    Attributes:
        losses: (steps,) float64, with label smoothing as trained.
        valid_loss: without.
        updates: B A of every layer, by the layer's name.
        texts: the answers.
        scores: of the answers, by the metric's key.
    """

    losses: np.ndarray
    valid_loss: float
    updates: dict[str, np.ndarray]
    texts: list[str]
    scores: dict[str, float]


def write(out: Path) -> Path:
    """Write align.md, align.png, align.html and losses.csv; returns the page."""
    sides = read_sides(out)
    figure(out / "align.png", sides)
    write_text(out / "losses.csv", losses_csv(sides))
    found = blocks(out, sides)
    write_text(out / "align.md", f"# {WORDS['en']['title']}\n\n{as_markdown(found)}\n")
    write_text(out / "align.html", as_html(found, out / "align.png"))
    return out / "align.html"


def read_sides(out: Path) -> dict[tuple[str, str], Side]:
    return {(name, way): read_side(out, name, way) for name in ("jlora", "torch") for way in WAYS}


def read_side(out: Path, name: str, way: str) -> Side:
    folder = out / f"{name}-{way}"
    records = read_metrics(folder / "metrics.jsonl")
    losses = np.array([record["loss"] for record in records if "loss" in record])
    groups = json.loads(read_text(out / "references.json"))
    texts = [row["prediction"] for _, row in json_lines(folder / "predictions.jsonl")]
    scores = evaluate(E2E_METRICS, texts, [group["references"] for group in groups])
    if name == "jlora":
        valid = next(r["valid_loss"] for r in reversed(records) if "valid_loss" in r)
    else:
        valid = json.loads(read_text(folder / "done.json"))["valid_loss"]
    return Side(losses, valid, updates(folder / "adapter"), texts, scores)


def updates(folder: Path) -> dict[str, np.ndarray]:
    """B A of each layer, (out, in)."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        name.replace(".lora_A.weight", ""): tensors[name.replace("lora_A", "lora_B")] @ value
        for name, value in tensors.items()
        if ".lora_A." in name
    }


def distance(ours: Side, theirs: Side) -> float:
    """Of the two adapters' updates: norm of the difference to the norm of PEFT's."""
    squares = [
        (np.sum((ours.updates[name] - value) ** 2), np.sum(value**2))
        for name, value in theirs.updates.items()
    ]
    differences, norms = map(sum, zip(*squares))
    return math.sqrt(differences / norms)


def block_interval(differences: np.ndarray) -> tuple[float, float, int]:
    """Mean of ``differences`` after the first block, half its 95 % interval, and the blocks."""
    means = [
        float(differences[start : start + BLOCK].mean())
        for start in range(BLOCK, len(differences) - BLOCK + 1, BLOCK)
    ]
    if len(means) < 2:
        return float(differences.mean()), math.nan, len(means)
    t = T_95.get(len(means) - 1, 1.96)
    half = t * statistics.stdev(means) / math.sqrt(len(means))
    return statistics.mean(means), half, len(means)


# What it says ------------------------------------------------------------------------------------

#: ("heading" or "text" or "picture", str) or ("table", rows of cells), the first row its head
Block = tuple[str, Any]


def blocks(out: Path, sides: dict[tuple[str, str], Side], language: str = "en") -> list[Block]:
    recipe = yaml.safe_load(read_text(out / "config.yaml"))
    train, lora = recipe["train"], recipe["lora"]
    words = WORDS[language]
    ours, theirs = sides["jlora", "off"], sides["torch", "off"]
    relative = np.abs(ours.losses - theirs.losses) / theirs.losses
    dropped = sides["jlora", "on"].losses - sides["torch", "on"].losses
    mean, half, count = block_interval(dropped)
    equal = {
        way: sum(a == b for a, b in zip(sides["jlora", way].texts, sides["torch", way].texts))
        for way in WAYS
    }
    times, measured = costs(out, words)
    values = {
        "model": recipe["model"], "steps": train["steps"], "batch": train["batch_size"],
        "r": lora["r"], "alpha": lora["lora_alpha"], "targets": ", ".join(lora["target_modules"]),
        "processor": cpu_model(), "processors": processors(), "date": date.today(),
        "torch": json.loads(read_text(out / "torch-off" / "done.json"))["torch"],
        "largest": relative.max(), "median": np.median(relative),
        "distance": distance(ours, theirs), "dropped": np.abs(dropped).mean(),
        "effect": np.abs(sides["torch", "on"].losses - theirs.losses).mean(),
        "count": count, "block": BLOCK, "mean": mean, "half": half, "inputs": len(ours.texts),
        "equal_off": equal["off"], "equal_on": equal["on"], **measured,
    }  # fmt: skip

    def text(name: str) -> tuple[str, str]:
        return "text", words[name].format(**values)

    return [
        text("setup"), ("picture", words["picture"]),
        ("heading", words["off"]), ("table", loss_rows(ours, theirs, words)), text("off text"),
        ("heading", words["on"]), text("on text"),
        ("heading", words["scores"]), ("table", score_rows(sides, words)), text("scores text"),
        ("heading", words["costs"]), ("table", times), text("costs text"),
    ]  # fmt: skip


def loss_rows(ours: Side, theirs: Side, words: dict[str, str]) -> list[list[str]]:
    rows = [words["loss head"].split("|")]
    for step in SHOWN:
        if step <= len(ours.losses):
            a, b = ours.losses[step - 1], theirs.losses[step - 1]
            gap = abs(a - b) / b
            rows.append([f"{step}", f"{a:.6f}", f"{b:.6f}", f"{a - b:+.1e}", f"{gap:.1e}"])
    return rows


def score_rows(sides: dict[tuple[str, str], Side], words: dict[str, str]) -> list[list[str]]:
    metrics = metrics_of(*(side.scores for side in sides.values()))
    rows = [[*words["score head"].split("|"), *(metric.label for metric in metrics)]]
    for way in WAYS:
        for name, label in (("jlora", "jlora"), ("torch", "PyTorch + PEFT")):
            side = sides[name, way]
            cells = [metric.text(side.scores.get(metric.key)) for metric in metrics]
            rows.append([label, words[f"dropout {way}"], f"{side.valid_loss:.5f}", *cells])
    return rows


def costs(out: Path, words: dict[str, str]) -> tuple[list[list[str]], dict[str, float]]:
    """The table, and what the text below needs."""
    times = json.loads(read_text(out / "times.json"))
    lengths = np.load(out / "batches.npz")
    tokens = np.median([lengths[f"lengths{i}"].sum() for i in range(int(lengths["count"]))])
    rows = [words["cost head"].split("|")]
    for name, side in times["sides"].items():
        seconds = side["seconds"]
        cells = [statistics.median(seconds), min(seconds)]
        rows.append([name, *(f"{cell:.3f}" for cell in cells), f"{side['peak_mb']:,.0f}"])
    return rows, {"rounds": len(seconds), "tokens": tokens, "load": times["load_before"]}


def as_markdown(found: list[Block], mark: str = "##") -> str:
    """Paragraphs and tables; headings begin with ``mark``."""
    form = {"heading": f"{mark} {{}}", "text": "{}", "picture": "![{}](align.png)"}
    return "\n\n".join(
        markdown_table(value) if kind == "table" else form[kind].format(value)
        for kind, value in found
    )


def as_html(found: list[Block], picture: Path) -> str:
    """The page, with the picture in it."""
    import jinja2

    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = read_text(Path(__file__).with_name("align.html.j2"))
    image = base64.b64encode(picture.read_bytes()).decode()
    title = WORDS["en"]["title"]
    return template.from_string(source).render(title=title, blocks=found, image=image)


def write_documents(out: Path, folder: Path) -> None:
    """Put tables and picture into replication.md and replication.cn.md, between their marks."""
    sides = read_sides(out)
    for language, name in (("en", "replication.md"), ("cn", "replication.cn.md")):
        begin, end = "<!-- make align: begin -->\n", "<!-- make align: end -->"
        before, rest = read_text(folder / name).split(begin)
        text = as_markdown(blocks(out, sides, language), mark="###")
        write_text(folder / name, f"{before}{begin}\n{text}\n\n{end}{rest.split(end)[1]}")
    figure(folder / "align.png", sides)


def losses_csv(sides: dict[tuple[str, str], Side]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["step", *(f"{name}_dropout_{way}" for name, way in sides)])
    for step, values in enumerate(zip(*(side.losses for side in sides.values())), start=1):
        table.writerow([step, *(f"{value:.7f}" for value in values)])
    return text.getvalue()


# Picture and page --------------------------------------------------------------------------------


def figure(path: Path, sides: dict[tuple[str, str], Side]) -> None:
    """Above the curves of both sides, below their difference; without dropout and with it."""
    drawn, panels = new_figure(11, 6.5, rows=2, columns=2, sharex=True)
    for column, way in enumerate(WAYS):
        ours, theirs = sides["jlora", way].losses, sides["torch", way].losses
        steps = np.arange(1, len(ours) + 1)
        above, below = panels[0][column], panels[1][column]
        above.plot(
            steps, theirs, color=THEIRS, linewidth=2.2, alpha=0.55, label="PyTorch with PEFT"
        )
        above.plot(steps, ours, color=OURS, linewidth=0.7, label="jlora")
        above.set_title(f"dropout {way}")
        above.legend(frameon=False, loc="upper right")
        if way == "off":
            # A difference of exactly 0 has no place on a logarithmic axis: a gap.
            gap = np.where(ours == theirs, np.nan, np.abs(ours - theirs) / theirs)
            below.semilogy(steps, gap, ".", markersize=2.5, color="#444444")
            below.set_ylabel("relative difference")
        else:
            below.plot(steps, ours - theirs, linewidth=0.6, color="#999999", label="each step")
            width = min(BLOCK, len(steps))
            mean = np.convolve(ours - theirs, np.ones(width) / width, "valid")
            middle = steps[width - 1 :] - (width - 1) / 2
            below.plot(middle, mean, color="#111111", label=f"mean of {width}")
            below.axhline(0, color="#111111", linewidth=0.5)
            below.legend(frameon=False)
            below.set_ylabel("jlora minus PEFT")
        below.set_xlabel("step")
        for axes in (above, below):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("training loss (nats per token)")
    save_png(drawn, path)
    # Noise in true colour is large; 64 colours are enough for four.
    Image.open(path).convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(path, "PNG")
