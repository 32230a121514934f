"""The page of `make bench`, from its figures alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

TITLES = {
    "gpt2-small": "GPT-2 small", "gpt2-medium": "GPT-2 medium", "smollm2-135m": "SmolLM2-135M",
}  # fmt: skip
#: Bits of a weight, by a word in the name of a side; sides of equal bits are compared.
BITS = {
    "16": ("bf16", "f16", "transformers"), "8": ("int8", "q8_0"), "4 to 5": ("int4", "q4_1"),
}  # fmt: skip


def page(figures: dict, chart: str) -> str:
    """Markdown; ``chart`` is the address of the picture."""
    results = figures["results"]
    parts = [head(figures), f"![]({chart})", summary_table(results)]
    parts += [training_table(model, results) for model in training_models(results)]
    parts += [beam_table(each) for each in results if each["kind"] == "beam"]
    parts += [streams_table([each for each in results if each["kind"] == "streams"])]
    parts += [not_measured(results), notes(figures)]
    return "\n\n".join(part for part in parts if part) + "\n"


def head(figures: dict) -> str:
    about = figures["head"]
    lines = [
        f"# Speed and memory beside the peers: {about['processor']}, {about['date']}",
        "",
        f"    {about['command']}",
        "",
        f"{about['processor']} ({', '.join(about['features'])}), {about['processors']} cores, "
        f"{about['memory_gb']} GiB, commit {about['commit']}"
        + ("" if about["isa"] == "native" else f"; all sides held to {about['isa'].upper()}")
        + ".",
    ]
    for each in figures["results"]:
        if each["kind"] == "peak":
            products = ", ".join(f"{n} {x / 1e9:,.0f}" for n, x in each["products"].items())
            lines.append(f"Largest matrix products measured in this run, GFLOP/s: {products}.")
            if each["bandwidth"]:
                lines.append(f"Memory is read at {each['bandwidth'] / 1e9:.1f} GB/s.")
    if about.get("torch_mb"):
        lines.append(f"Of PEFT's memory, importing torch takes {about['torch_mb']:,.0f} MB.")
    named = [f"{n} {v}" for found in about["versions"].values() for n, v in found.items()]
    lines.append(f"Versions: {', '.join(dict.fromkeys(named))}.")
    return "\n".join(lines)


def training_models(results: Iterable[dict]) -> list[str]:
    return list(dict.fromkeys(each["model"] for each in results if each["kind"] == "training"))


def rows_of(results: list[dict]) -> list[dict]:
    """The sides of all groups, fastest first, each once; those without a figure last."""
    found: dict[str, dict] = {}
    for each in results:
        for side in each["sides"]:
            found.setdefault(side["name"], side)
    return sorted(found.values(), key=lambda side: side["each"] or float("inf"))


def best(rows: Iterable[dict], ours: bool) -> dict | None:
    """The fastest side, of jlora's or of the others."""
    fit = [r for r in rows if r["each"] and r["name"].startswith("jlora") == ours]
    return min(fit, key=lambda side: side["each"], default=None)


def table(header: str, rows: Iterable[list[str]]) -> str:
    """A Markdown table: ``header`` has a name a column, separated by |; the first is text."""
    columns = header.split("|")
    lines = [f"| {' | '.join(columns)} |", "|---|" + "--:|" * (len(columns) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def bold(side: dict) -> str:
    return f"**{side['name']}**" if side["name"].startswith("jlora") else side["name"]


def number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def training_table(model: str, results: list[dict]) -> str:
    groups = [r for r in results if r["kind"] == "training" and r["model"] == model]
    tokens, flops = groups[0]["tokens"], groups[0]["flops"]
    peak = largest_product(results)

    def row(side: dict) -> list[str]:
        each = side["each"]
        return [
            bold(side), number(each, ".3f"), number(each and tokens / each, ",.0f"),
            number(each and peak and flops / each / peak, ".0%"),
            number(each and side["peak_mb"], ",.0f"), number(side["ratio"], ".2f"),
            number(each and side["first"], ".1f"),
        ]  # fmt: skip

    return "\n\n".join([
        f"## A LoRA update of {TITLES[model]}",
        f"Eight rows with the lengths of E2E's examples ({tokens:.0f} tokens, median), r = 4 on "
        "query and value. To bf16: the time divided by that of jlora bf16 in the same rounds. A "
        "slow side does fewer of them; its time a step is scaled, by tokens, to the median step.",
        table("|s a step|tokens/s|MFU|peak MB|to bf16|first step, s", map(row, rows_of(groups))),
    ])  # fmt: skip


def largest_product(results: Iterable[dict]) -> float | None:
    products = [x for r in results if r["kind"] == "peak" for x in r["products"].values()]
    return max(products, default=None)


def beam_table(result: dict) -> str:
    def row(side: dict) -> list[str]:
        each = side["each"]
        return [
            bold(side), str(len(side["seconds"]) * side["inputs"]) if each else "–",
            number(each, ".3f"), number(each and side["peak_mb"], ",.0f"),
            number(side["ratio"], ".2f"), number(side["equal"], ".0%"),
            number(side.get("score"), ".3f"),
        ]  # fmt: skip

    return "\n\n".join([
        "## Beam search",
        f"E2E's test inputs, SmolLM2-135M tuned for E2E and merged, {result['beams']} beams, at "
        f"most {result['new_tokens']} new tokens, length penalty 0.8. {at_once(result)}"
        "Equal: answers that are jlora bf16's, token by token. Score: of the answers, by jlora in "
        "float32 (sum of log-probabilities divided by length to the power 0.8); higher is a better "
        "search.",
        table("|inputs timed|s an input|peak MB|to bf16|equal|score", map(row, rows_of([result]))),
    ])  # fmt: skip


def at_once(result: dict) -> str:
    """How many inputs a round has."""
    ours, theirs = (
        max(
            (s["inputs"] for s in result["sides"] if s["name"].startswith("jlora") == own),
            default=0,
        )
        for own in (True, False)
    )
    return f"A round is {ours} inputs for jlora, 32 at a time, and {theirs} for the others. "


def bits(side: dict) -> str:
    """How many bits a weight has in memory."""
    return next((n for n, words in BITS.items() if any(w in side["name"] for w in words)), "")


def streams_table(results: list[dict]) -> str:
    if not results:
        return ""
    tasks = [each["task"] for each in results]
    lengths = ", ".join(dict.fromkeys(str(each["tokens"]) for each in results))
    by_name = {task["task"]: {s["name"]: s for s in task["sides"]} for task in results}
    names = list(by_name[tasks[0]])
    greedy = [each["task"] for each in results if not each["temperature"]]

    def row(name: str) -> list[str]:
        own = [by_name[task][name] for task in tasks]
        speeds = [speed(task, name) for task in results]
        equal = by_name[greedy[-1]][name]["equal"] if greedy else None
        peaks = max(side["peak_mb"] for side in own) if any(speeds) else None
        cells = [number(each, ",.1f") for each in speeds]
        return [bold(own[0]), bits(own[0]), *cells, number(peaks, ",.0f"), number(equal, ".0%")]

    order = sorted(names, key=lambda n: list(BITS).index(bits({"name": n})))
    return "\n\n".join([
        "## Streams",
        f"Tokens a second of all streams together, {lengths} new tokens (of one stream, of each "
        "of several) behind prompts of E2E, by the same model. Drawn: at temperature 0.8 from all "
        f"tokens. Equal: greedy answers ({greedy[-1] if greedy else ''}) that are jlora bf16's up "
        "to their end.",
        table("|bits|" + "|".join(tasks) + "|peak MB|equal", map(row, order)),
    ])  # fmt: skip


def speed(task: dict, name: str) -> float | None:
    """Tokens a second of all streams of a side; None: not measured."""
    (side,) = (side for side in task["sides"] if side["name"] == name)
    return task["streams"] * task["tokens"] / side["each"] if side["each"] else None


def summary(results: list[dict]) -> list[dict]:
    """For each kind of work: jlora's fastest side and the fastest peer, as ``per_second``."""
    found = []

    def add(title: str, unit: str, rows: list[dict], amount: float) -> None:
        pair = {"ours": best(rows, True), "theirs": best(rows, False)}
        if pair["ours"]:
            found.append({"title": title, "unit": unit, "amount": amount, **pair})

    for model in training_models(results):
        own = [r for r in results if r["kind"] == "training" and r["model"] == model]
        add(f"train {TITLES[model]}", "tokens/s", rows_of(own), own[0]["tokens"])
    for each in results:
        if each["kind"] == "beam":
            add(f"beam search, {each['beams']} beams", "inputs/s", each["sides"], 1)
        elif each["kind"] == "streams" and not each["temperature"]:
            for width in BITS:
                rows = [side for side in each["sides"] if bits(side) == width]
                amount = each["streams"] * each["tokens"]
                add(f"{each['task']}, {width} bits", "tokens/s", rows, amount)
    return found


def summary_table(results: list[dict]) -> str:
    """jlora's fastest side beside the fastest peer."""

    def row(each: dict) -> list[str]:
        ours, theirs = each["ours"], each["theirs"]
        cells = [f"{each['title']}, {each['unit']}"]
        for side in (ours, theirs):
            cells += [
                side["name"] if side else "–",
                number(side and each["amount"] / side["each"], ",.1f"),
                number(side and side["peak_mb"], ",.0f"),
            ]
        return [*cells, number(theirs and theirs["each"] / ours["each"], ".2f")]

    rows = [row(each) for each in summary(results)]
    return rows and table("|jlora||MB|fastest peer||MB|times as fast", rows) or ""


def each_side(results: Iterable[dict]) -> Iterable[tuple[str, dict]]:
    for result in results:
        where = {"training": result.get("model"), "streams": "streams"}.get(
            result["kind"], result["kind"]
        )
        for side in result.get("sides", ()):
            yield where, side


def not_measured(results: list[dict]) -> str:
    """Every side without a figure, and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for where, side in each_side(results):
        if side["problem"]:
            places = reasons.setdefault((side["name"], printed(side["problem"])), [])
            if where not in places:
                places.append(where)
    lines = [f"- {n} ({', '.join(w)}): {why}" for (n, why), w in reasons.items()]
    return "\n".join(["Not measured, or not to the end:", "", *lines]) if lines else ""


def printed(message: str) -> str:
    """A program's message for a page: no colours, no name of the user's folder, one line."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", message).replace(str(Path.home()), "~")
    return " ".join(plain.split())


def notes(figures: dict) -> str:
    lines = []
    own: dict[str, str] = {}
    for _, side in each_side(figures["results"]):
        if side["computes in"]:
            own[side["name"]] = side["computes in"]
    lines += [f"- {name}: {said}" for name, said in own.items()]
    if figures["head"]["isa"] != "native":
        lines.append("- " + held(figures["results"]))
    return "\n".join(["Said by the libraries:", "", *lines]) if lines else ""


def held(results: list[dict]) -> str:
    """Whether any side used AVX-512 although it was held to less."""
    sides = [side for _, side in each_side(results) if side["each"]]
    using = list(dict.fromkeys(s["name"] for s in sides if s["avx512"]))
    if any(side["avx512"] is None for side in sides):
        return "Whether AVX-512 registers were used: this kernel does not say."
    if using:
        return f"AVX-512 registers were used nevertheless by: {', '.join(using)}."
    return "No side used AVX-512 registers, as the kernel saw it (arch_status)."


Panel = tuple[str, str, list[tuple[str, float]]]


def panels(results: list[dict]) -> list[Panel]:
    """What the chart shows: title, unit, and (side, amount a second), the largest first."""
    found: list[Panel] = []

    def add(title: str, unit: str, rows: list[dict], amount: Callable[[dict], float]) -> None:
        bars = [(side["name"], amount(side)) for side in rows if side["each"]]
        if bars:
            found.append((title, unit, sorted(bars, key=lambda bar: -bar[1])))

    for model in training_models(results):
        own = [r for r in results if r["kind"] == "training" and r["model"] == model]
        add(f"LoRA training, {TITLES[model]}", "tokens/s", rows_of(own),
            lambda side, tokens=own[0]["tokens"]: tokens / side["each"])  # fmt: skip
    for each in results:
        if each["kind"] == "beam":
            add(f"Beam search, {each['beams']} beams", "inputs/s", each["sides"],
                lambda side: 1 / side["each"])  # fmt: skip
        elif each["kind"] == "streams" and not each["temperature"]:
            amount = each["streams"] * each["tokens"]
            add(each["task"].capitalize(), "tokens/s", each["sides"],
                lambda side, amount=amount: amount / side["each"])  # fmt: skip
    return found
