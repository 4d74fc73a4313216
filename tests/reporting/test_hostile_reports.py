"""Reports and cards on results whose names and texts are tags, formulas, links and commands."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from helpers.command import Command
from helpers.hostile_names import HOSTILE
from loram_ray.models.quantisation import NF4
from loram_ray.reporting.figures import (
    Curve,
    Draw,
    Figure,
    Point,
    bars,
    curves,
    dots,
    figure_of,
    memory,
    quality,
)
from loram_ray.reporting.write import PAGE_FILE, TEXT_FILE, report
from loram_ray.runtime.results import markdown_table, read_results, write_results
from loram_ray.runtime.tracking import mlflow_metric_name
from loram_ray.stages.model_card import hub_id, quantized_card
from loram_ray.studies.comparison_table import as_markdown as comparison_page
from loram_ray.utils.names import name_error
from loram_ray.utils.printing import plain, plain_lines

OURS = {
    "html", "head", "meta", "title", "link", "style", "body", "h1", "h2", "span", "dl", "dt", "dd",
    "nav", "a", "ol", "li", "b", "section", "p", "figure", "div", "figcaption", "table", "thead",
    "tbody", "tr", "th", "td", "details", "summary", "pre",
    "svg", "g", "path", "text", "tspan", "defs", "use", "clippath", "rect", "metadata", "rdf:rdf",
    "cc:work", "dc:type", "dc:format", "dc:creator", "cc:agent", "dc:title", "image",
}  # fmt: skip


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for key, value in attrs if key in ("href", "src")]
        self.handlers += [key for key, _ in attrs if key.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def comparison(folder: Path, texts: list[str]) -> Path:
    """Results of a comparison over tasks, systems and methods of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for task in texts:
        for system, mean, kept in (("base", 9.0, None), (f"{task} + correction", 5.0, 0.7)):
            rows.append(
                {
                    "system": system, "method": task, "ratio": 0.5, "task": task, "seeds": 2,
                    "metric": "answer_perplexity", "mean": mean, "deviation": 0.1,
                    "gain_kept": kept, "gain_kept_deviation": None, "model_parameters": 10**6,
                    "model_bytes": 10**6, "train_seconds": 1.0, "reason": "",
                }
            )  # fmt: skip
    rows.append({**rows[0], "mean": None, "deviation": None, "reason": "\n".join(texts)})
    (folder / "results.json").write_text(json.dumps(rows))
    return folder


def batch(folder: Path, texts: list[str]) -> Path:
    """Results of a batch whose tasks and errors are these texts."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "name": text, "state": "failed", "reason": text, "deaths": 1, "data": text,
            "adapter": None, "steps": 3, "examples": 1, "tokens": 1, "trained_parameters": 1,
            "best_step": None, "eval_loss": 1.0, "loss": 1.5, "seconds": 2.0,
        }
        for text in texts
    ]  # fmt: skip
    (folder / "results.json").write_text(json.dumps(rows))
    return folder


def check_page(folder: Path, texts: list[str]) -> None:
    page = (folder / PAGE_FILE).read_text("utf-8")
    found = Page(page)
    assert found.tags <= OURS, found.tags - OURS
    assert not found.handlers
    assert all(link.startswith(("#", "data:")) for link in found.links)
    assert "\x1b" not in page and "\x07" not in page
    shown = " ".join(" ".join(found.texts).split())
    for text in texts:
        assert " ".join(plain_lines(text).split()) in shown
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        xml.etree.ElementTree.fromstring(svg.replace("xlink:", ""))


def check_markdown(text: str, pictures: set[str]) -> None:
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    inline = [child for token in tokens for child in token.children or ()]
    kinds = {token.type for token in [*tokens, *inline]}
    assert not kinds & {"html_block", "html_inline", "link_open", "code_inline", "fence"}, kinds
    shown = {child.attrs["src"] for child in inline if child.type == "image"}
    assert shown == pictures
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("make", "texts"),
    [(batch, HOSTILE), (comparison, ["a/../b", "$x$ [red] <script>a|b`&", "\x1b_x"])],
)
def test_a_report_shows_names_as_text_in_page_and_markdown(
    make: Any, texts: list[str], tmp_path: Path
) -> None:
    folder = make(tmp_path / "$x$ <b>[red]", texts)
    output = tmp_path / "report"
    report(folder, output)
    check_page(output, texts)
    pictures = {path.name for path in output.glob("*.png")}
    check_markdown((output / TEXT_FILE).read_text("utf-8"), pictures)
    assert pictures and all(name_error(name) is None for name in pictures)
    assert {path.parent for path in tmp_path.rglob("*.png")} == {output}


def texts_of(figure: Figure) -> set[str]:
    """What a plot shows, without white space, of which labels lose some."""
    root = xml.etree.ElementTree.fromstring(figure.svg.replace("xlink:", ""))
    nodes = (node for node in root.iter() if node.tag.endswith("text"))
    return {"".join("".join(node.itertext()).split()) for node in nodes}


@pytest.mark.parametrize("kind", ["bars", "dots", "memory", "curves", "quality"])
def test_plots_show_names_as_they_are(kind: str) -> None:
    texts = HOSTILE[:12] if kind == "curves" else HOSTILE
    rows = [(text, 2.0, 0.1) for text in texts]
    draws: dict[str, Draw] = {
        "bars": lambda axes: bars(axes, rows, "$x$"),
        "dots": lambda axes: dots(axes, rows, "$x$"),
        "memory": lambda axes: memory(axes, [(text, 2.0) for text in texts]),
        "curves": lambda axes: curves(
            axes, [Curve(text, [1, 2, 3], [1.0, 2.0, 3.0]) for text in texts], "$x$", log=True
        ),
        "quality": lambda axes: quality(
            axes, [Point(text, 1.0, 2.0, 0.1) for text in texts], "$x$", False
        ),
    }
    figure = figure_of("plot", "title", "says", draws[kind], size=(7.0, 9.0))
    shown = texts_of(figure)
    assert figure.png.startswith(b"\x89PNG")
    assert kind == "memory" or any("$x$" in text for text in shown)
    for text in texts:
        start = "".join(plain(text).split())[:50]
        assert any(label.startswith(start) for label in shown), (text, shown)


def test_numbers_on_logarithmic_axes_stay_formulas() -> None:
    rows = [("x", 1e2, None), ("y", 1e5, None)]
    shown = texts_of(figure_of("a", "a", "a", lambda axes: dots(axes, rows, "label")))
    assert {"102", "105"} <= shown


@pytest.mark.parametrize("text", HOSTILE)
def test_cells_of_markdown_tables_hold_text_alone(text: str) -> None:
    table = markdown_table(("a", text), [(text, text)], bold="a")
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(table)
    assert sum(token.type == "td_open" for token in tokens) == 2
    check_markdown(table, set())


def test_a_comparisons_page_is_markdown_whatever_names_hold() -> None:
    rows = json.loads(json.dumps([{
        "system": text, "method": text, "ratio": 0.5, "task": text, "seeds": 1, "mean": 1.0,
        "deviation": None, "gain_kept": None, "gain_kept_deviation": None,
        "model_parameters": None, "reason": text,
    } for text in HOSTILE]))  # fmt: skip
    claims = [{
        "claim": text, "paper": True, "method": text, "ratio": None, "seen": "seen",
        "difference": 0.1, "interval": None, "pairs": 1,
    } for text in HOSTILE]  # fmt: skip
    page = comparison_page(rows, claims, "answer_perplexity")
    check_markdown(page, set())
    assert page.count("**seen**") == len(HOSTILE)


@pytest.mark.parametrize(
    "base", ["a/`b`", "a/b\n# c", "a/<b>", "[a/b]", "../x", "a/b/c", "~/x", "/x"]
)
def test_cards_name_hub_ids_alone(base: str) -> None:
    assert hub_id(base) is None
    assert hub_id("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"


def test_cards_of_others_may_have_no_head() -> None:
    details = {
        "bytes_before": 4, "bytes": 1, "quantized_tensors": 1, "quantized_parameters": 1,
        "parameters": 1,
    }  # fmt: skip
    for card in ("", "# mine\n\ntext\n", "---\ntags: [a]\n---\n# mine\n", "--- \n---\n---\n"):
        made = quantized_card(card, "<b>", details, NF4)
        assert made.startswith("---\n") and "nf4" in made
        assert "<b>" not in made


def test_results_with_names_of_any_bytes_become_a_table(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_results(tmp_path, [{"name": "a\udcff\x1b"}], {"name": pa.string()})
    assert read_results(tmp_path) == [{"name": "a\\xff\\x1b"}]
    assert pq.read_table(tmp_path / "results.parquet").to_pylist() == [{"name": "a\\xff\\x1b"}]


@pytest.mark.parametrize("name", [*HOSTILE, "/", "../a", "a//b", "x" * 300, "é"])
def test_mlflow_takes_the_names_of_metrics(name: str) -> None:
    validation = pytest.importorskip("mlflow.utils.validation")
    validation._validate_metric_name(mlflow_metric_name(f"held_out_nll_{name}"))


@pytest.mark.parametrize("kind", ["file", "fifo", "below a file", "too long", "dangling"])
def test_a_report_is_not_written_where_no_directory_can_be(
    kind: str, tmp_path: Path, loram: Command
) -> None:
    import os

    folder, output = batch(tmp_path / "batch", ["a", "b"]), tmp_path / "out"
    if kind in ("file", "below a file"):
        output.write_text("kept")
    if kind == "fifo":
        os.mkfifo(output)
    if kind == "dangling":
        output.symlink_to(tmp_path / "nowhere" / "there")
    given = {"below a file": output / "x", "too long": tmp_path / ("x" * 300)}.get(kind, output)
    ended = loram("report", folder, "--output", given)
    assert "--output must be a writable directory" in ended.line
    assert not output.is_file() or output.read_text() == "kept"


@pytest.mark.parametrize("file", ["results.json", "claims.json"])
@pytest.mark.parametrize(
    "content",
    ["", "{", "null", "1", '"x"', "[1]", "[[]]", '[{"name": 1}]', '[{"system": "a"}]',
     '{"rows": 1}', '[{"values": []}]', '{"rows": [{"name": "a"}]}', "[" * 100_000, "\xff\xfe"],
)  # fmt: skip
def test_a_report_on_results_that_are_none_is_one_line(
    file: str, content: str, tmp_path: Path, loram: Command
) -> None:
    batch(tmp_path, ["a", "b"])
    (tmp_path / file).write_text(content, encoding="latin-1")
    assert "loram: " in loram("report", tmp_path).line
    assert not (tmp_path / "report").exists()
