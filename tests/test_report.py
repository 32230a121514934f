from __future__ import annotations

import html.parser
import json
import math
import subprocess
import sys

import pytest

from jlora.errors import UserError
from jlora.metrics.accuracy import accuracy
from jlora.report import environment, plots, tables
from jlora.report.html import duration, score_rows, write_report

BEFORE = {"BLEU": 0.0123, "NIST": 0.4213, "METEOR": 0.0812, "ROUGE_L": 0.1402, "CIDEr": 0.0312}
AFTER = {"BLEU": 0.5639, "NIST": 7.5771, "METEOR": 0.3763, "ROUGE_L": 0.6221, "CIDEr": 1.5323}
PROMPT = "name : Blue Spice | Type : coffee shop | area : city centre"


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    """A complete run folder."""
    folder = tmp_path / "my-run"
    folder.mkdir()
    metrics = [{"step": 0, "valid_loss": 4.3}]
    for step in range(1, 101):
        loss = 1.3 + 3 / step
        speed = {"tokens_per_s": 1500.0 + step, "seconds": 0.7 * step}
        metrics.append({"step": step, "loss": loss, "lr": 1e-3 * (1 - step / 100), **speed})
        if step % 25 == 0:
            metrics.append({"step": step, "valid_loss": 1.2 + 1 / step})
    write_lines(folder / "metrics.jsonl", metrics)
    (folder / "config.yaml").write_text("model: smollm2-135m\ntask: e2e\nlora:\n  r: 4\n")
    (folder / "scores.json").write_text(json.dumps({"before": BEFORE, "after": AFTER}))
    after = [
        {"prompt": PROMPT, "prediction": "Blue Spice is a coffee shop.", "references": ["A ref."]},
        {"prompt": "other", "prediction": "Something else."},
    ]
    write_lines(folder / "predictions.jsonl", after)
    write_lines(
        folder / "predictions_before.jsonl", [{"prompt": PROMPT, "prediction": "The the the"}]
    )
    return folder


class Page(html.parser.HTMLParser):
    """Text, tags and attributes of a page; checks that tags close in order."""

    VOID = ("meta", "line", "circle")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.values, self.words = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.values += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def page_of(folder, **options):
    path = write_report(folder, **options)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_report_shows_every_part(run):
    page = page_of(run)
    text = page.text
    assert "my-run" in text and "smollm2-135m · e2e" in text
    assert "BLEU 1.2 56.4 +55.2" in text and "CIDEr 0.03 1.53 +1.50" in text
    assert "Best validation loss 1.210 at step 100" in text
    assert "100 in 1 min 10 s" in text
    assert page.tags.count("svg") == 4
    for shown in ("name Blue Spice", "The the the", "Blue Spice is a coffee shop.", "A ref."):
        assert shown in text
    assert "Something else." not in text  # nothing to compare it with
    assert page.tags.count("details") == 2 and "r: 4" in text
    assert "Environment (of the machine that wrote this report)" in text


def test_report_is_self_contained(run):
    page = page_of(run)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [name for name, _ in page.values if name in ("src", "href", "action")]
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text and "url(" not in text
    assert "default-src 'none'" in text


def test_text_of_users_and_models_is_escaped(run):
    evil = '</pre></dd><script>alert(1)</script><img src=x onerror="a">&amp;\''
    renamed = run.rename(run.with_name("<b>run & co"))
    (renamed / "config.yaml").write_text(f"model: {json.dumps(evil)}\n# {evil}\n")
    slots = f"name : {evil} | area : b"
    record = {"prompt": slots, "prediction": evil, "references": [evil]}
    write_lines(renamed / "predictions.jsonl", [record, {"prompt": evil, "prediction": evil}])
    write_lines(renamed / "predictions_before.jsonl", [record, {"prompt": evil, "prediction": ""}])
    (renamed / "scores.json").write_text(json.dumps({"after": {evil: 0.5}}))
    (renamed / "environment.json").write_text(json.dumps({evil: evil}))
    page = page_of(renamed)
    assert not {"script", "img", "b"} & set(page.tags)
    # model line, config text (twice), score and fact, environment (twice), slots, 5 texts, prompt
    assert page.text.count(" ".join(evil.split())) >= 12
    assert "<b>run & co" in page.text


def test_parts_that_lack_are_left_out(run):
    for name in ("config.yaml", "scores.json", "predictions.jsonl", "predictions_before.jsonl"):
        (run / name).unlink()
        page_of(run)
    write_lines(run / "metrics.jsonl", [{"step": 1, "loss": 2.0}])
    page = page_of(run)
    assert page.tags.count("svg") == 1 and page.tags.count("details") == 1
    for absent in ("Samples", "Scores", "Settings", "BLEU", "validation", "Learning rate"):
        assert absent not in page.text
    write_lines(run / "metrics.jsonl", [{"step": 1, "loss": None}])
    assert page_of(run).tags.count("svg") == 0


def test_only_after_scores_and_predictions(run):
    (run / "scores.json").write_text(json.dumps({"after": AFTER}))
    (run / "predictions_before.jsonl").unlink()
    text = page_of(run, references={"other": ["From outside."]}).text
    assert "Metric After BLEU 56.4 NIST" in text and "Difference" not in text
    assert "Output Something else. Reference From outside." in text
    assert "Reference A ref." in text  # the file's own references come first


def test_no_metrics_is_a_user_error_and_leaves_no_report(run):
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no training records"):
        write_report(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="no training records"):
        write_report(run)
    with pytest.raises(UserError, match="no such run folder"):
        write_report(run / "none")
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", b'{"step": 1\n{"step": 2}\n', r"metrics\.jsonl:1: .*JSON"),
        ("config.yaml", b"a: 1\nb: [1, 2\n", r"config\.yaml:\d: not YAML"),
        ("config.yaml", b"a: \xff\n", r"config\.yaml:1: not UTF-8"),
        ("scores.json", b'{"after":\n oops}', r"scores\.json:2: not JSON"),
        ("scores.json", b"[1]", r"scores\.json: not"),
        ("scores.json", b'{"after": 3}', r"scores\.json: not"),
        ("predictions.jsonl", b'{"prompt": "a"}\n', r"predictions\.jsonl:1: .*prediction"),
        (
            "predictions.jsonl",
            b'{"prompt": "a", "prediction": "b", "references": "c"}\n',
            r"predictions\.jsonl:1: 'references'",
        ),
        ("predictions_before.jsonl", b"{\n", r"predictions_before\.jsonl:1: not JSON"),
        ("environment.json", b"{\n", r"environment\.json:\d: not JSON"),
        ("environment.json", b"[]", r"environment\.json: not a JSON object"),
    ],
)
def test_damaged_files_name_the_place(run, name, content, message):
    (run / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        write_report(run)
    assert "\n" not in str(caught.value)
    assert not (run / "report.html").exists()


def test_odd_values_in_scores_do_not_break_the_page(run):
    odd = {"BLEU": "high", "NIST": True, "METEOR": None, "inputs": 60, "ROUGE_L": 1, "own": 0.25}
    (run / "scores.json").write_text(json.dumps({"before": None, "after": odd}))
    text = page_of(run).text
    assert "ROUGE-L 100.0 own 0.2500" in text
    assert "high" not in text and "inputs" not in text


def test_environment_keeps_the_highest_peak(run):
    environment.record(run)
    found = environment.read(run)
    assert found["cores_used"] >= 1 and found["peak_memory_bytes"] > 2**20
    found["peak_memory_bytes"] = 3 * 2**40
    (run / "environment.json").write_text(json.dumps(found))
    environment.record(run)  # a resumed piece that needed less
    assert environment.read(run)["peak_memory_bytes"] == 3 * 2**40
    text = page_of(run).text
    assert "Peak memory 3072.0 GiB" in text and "that wrote this report" not in text


def test_score_rows_know_which_way_is_better():
    rows = score_rows(
        {"BLEU": 0.5, "TER": 0.5, "NIST": 7.0}, {"BLEU": 0.4, "TER": 0.4, "NIST": 7.0}
    )
    assert [(row["label"], row["difference"], row["trend"]) for row in rows] == [
        ("BLEU", "−10.0", "worse"),
        ("NIST", "+0.00", ""),
        ("TER", "−0.10", "better"),
    ]


def test_score_table_prints_as_the_paper_does():
    # The paper's row of GPT-2 M with LoRA on E2E: 70.4 8.85 46.8 71.8 2.53.
    paper = {"BLEU": 0.704, "NIST": 8.85, "METEOR": 0.468, "ROUGE_L": 0.718, "CIDEr": 2.53}
    lines = tables.score_table(BEFORE, AFTER, [("paper", paper)]).splitlines()
    assert lines[0].split() == ["BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr"]
    assert set(lines[1]) == {"-"}
    assert lines[2].split() == ["before", "1.2", "0.42", "8.1", "14.0", "0.03"]
    assert lines[3].split() == ["after", "56.4", "7.58", "37.6", "62.2", "1.53"]
    assert lines[4].split() == ["difference", "+55.2", "+7.16", "+29.5", "+48.2", "+1.50"]
    assert lines[5].split() == ["paper", "70.4", "8.85", "46.8", "71.8", "2.53"]
    assert len({len(line) for line in lines}) == 1  # the columns stand in line


def test_scores_of_parts_follow_that_of_all():
    # The paper's row of GPT-2 M with LoRA on WebNLG: BLEU of unseen, seen and all 46.7 62.1 55.3.
    scores = {
        "TER": 0.39, "multi-BLEU": 0.553, "METEOR-WebNLG": 0.41, "chrF++": 0.6871,
        "multi-BLEU/unseen": 0.467, "TER/unseen": 0.46, "multi-BLEU/seen": 0.621, "own/part": 0.5,
    }  # fmt: skip
    head, values = tables.score_table(None, scores, markdown=True).splitlines()[::2]
    assert head == (
        "|  | BLEU | BLEU unseen | BLEU seen | METEOR | TER | TER unseen | chrF++ | own/part |"
    )
    assert values == "| after | 55.3 | 46.7 | 62.1 | 0.41 | 0.39 | 0.46 | 0.687 | 0.5000 |"
    rows = score_rows({"TER/seen": 0.5}, {"TER/seen": 0.4})
    assert [(row["label"], row["trend"]) for row in rows] == [("TER seen", "better")]


def test_scores_of_a_choice():
    scores = accuracy(["a", "b", None], ["a", "a", "b"], ["a", "b"])
    lines = tables.score_table(None, scores, markdown=True).splitlines()
    assert lines[0] == "|  | Accuracy | 95 % from | to | Majority | Unparseable |"
    assert lines[2] == "| after | 33.3 | 6.1 | 79.2 | 66.7 | 1 |"


def test_score_table_in_markdown_and_with_gaps():
    rows = [("a|b", {"BLEU": 0.1, "own": 0.5})]
    lines = tables.score_table(None, {"BLEU": 0.5}, rows, markdown=True).splitlines()
    assert lines == [
        "|  | BLEU | own |",
        "|:--|--:|--:|",
        "| after | 50.0 | – |",
        "| a\\|b | 10.0 | 0.5000 |",
    ]
    with pytest.raises(UserError, match="no scores"):
        tables.score_table(None, {})


def test_samples_for_the_terminal():
    after = [{"prompt": f"p{n}", "prediction": f"new {n}", "references": ["r"]} for n in range(20)]
    before = [{"prompt": f"p{n}", "prediction": "old\x1b[2J\nline"} for n in range(10)]
    items = tables.pair_samples(after, before)
    assert len(items) == 10  # only inputs that were predicted before too
    text = tables.samples(items, count=5)
    assert [block.split()[1] for block in text.split("\n\n")] == ["p0", "p2", "p4", "p6", "p8"]
    assert "\x1b" not in text and "old\\x1b[2J line" in text
    assert text.splitlines()[:4] == [
        "input      p0",
        "before     old\\x1b[2J line",
        "after      new 0",
        "reference  r",
    ]
    long = tables.Sample("word " * 100, "", None, None)
    lines = tables.samples([long], width=60).splitlines()
    assert max(map(len, lines)) <= 60 and lines[-1] == "after      (empty)"
    assert len(tables.pair_samples(after)) == 20


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (PROMPT, [("name", "Blue Spice"), ("Type", "coffee shop"), ("area", "city centre")]),
        ("name[Cotto], near[The Bakers]", [("name", "Cotto"), ("near", "The Bakers")]),
        ("name[Cotto]", [("name", "Cotto")]),
        ("A sentence : with a colon", None),
        ("name : a | no colon here", None),
        ("see [1], and [2] too", None),
        ("", None),
    ],
)
def test_slots(prompt, expected):
    assert tables.slots(prompt) == expected


def test_loss_curve_is_a_png_drawn_without_a_display(tmp_path):
    metrics = [{"step": n, "loss": 1 / n} for n in range(1, 50)]
    metrics += [{"step": 10, "valid_loss": 0.5}, {"step": 11, "loss": None}]
    path = plots.loss_curve(metrics, tmp_path / "loss.png")
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 5000
    assert [one.name for one in tmp_path.iterdir()] == ["loss.png"]
    with pytest.raises(UserError, match="no loss"):
        plots.loss_curve([{"step": 1, "lr": 1.0}], tmp_path / "none.png")


def test_importing_the_report_imports_nothing_heavy():
    code = (
        "import sys, jlora.report.html, jlora.loggers\n"
        "heavy = {'matplotlib', 'jittor', 'jinja2', 'yaml', 'wandb', 'tqdm'} & set(sys.modules)\n"
        "print(*heavy)\n"
        "sys.exit(len(heavy))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_series_smooth_and_thin():
    metrics = [{"step": 3, "loss": 1.0}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}]
    assert plots.series(metrics, "loss") == [(1, 2.0), (3, 1.0)]
    line = [(n, float(n)) for n in range(100)]
    smoothed = plots.smooth(line, 10)
    assert [step for step, _ in smoothed] == list(range(100))
    # The mean of a straight line is the line itself while both sides of the window are alike.
    assert [value for _, value in smoothed[:95]] == pytest.approx(list(range(95)))
    assert smoothed[99][1] == pytest.approx(sum(range(94, 100)) / 6)
    assert plots.smooth([], None) == []
    spike = [(n, 1.0) for n in range(5000)]
    spike[1234] = (1234, 9.0)
    thinned = plots.thin(spike)
    assert len(thinned) <= 600 and (1234, 9.0) in thinned
    assert thinned == sorted(thinned)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.1, 4.3, [1, 2, 3, 4, 5]),
        (0.0, 0.001, [0, 0.0002, 0.0004, 0.0006, 0.0008, 0.001]),
        (2.0, 2.0, [1.8, 1.9, 2.0, 2.1, 2.2]),
        (-1.0, 1.0, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks(low, high, expected):
    assert plots.ticks(low, high, 5) == pytest.approx(expected)


def test_duration():
    assert [duration(s) for s in (3.6, 59.6, 185, 7620)] == [
        "4 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 07 min",
    ]
