"""A report as one HTML page without network, as Markdown, and its plots as PNG."""

from __future__ import annotations

import os
from pathlib import Path

import jinja2

from loram_ray.reporting.content import report_on
from loram_ray.reporting.found import found_in
from loram_ray.reporting.parts import Report
from loram_ray.results import markdown_table

PAGE_FILE, TEXT_FILE = "report.html", "report.md"
_TEMPLATE = Path(__file__).with_name("page.html.j2")


def report(directory: Path, output: Path | None = None) -> Path:
    """Write a page on a run, a batch, a sweep or a comparison, complete or not.

    Args:
        directory: that such a command wrote, or writes.
        output: directory for ``report.html``, ``report.md`` and PNG files; default: ``report`` in
            the directory.

    Returns:
        The HTML file.

    Raises:
        LoramError: there is nothing to report, results of several bases, or no matplotlib.
    """
    found = report_on(found_in(directory))
    output = output or directory / "report"
    output.mkdir(parents=True, exist_ok=True)
    for part in found.parts:
        for figure in part.figures:
            _write(output / f"{figure.name}.png", figure.png)
    _write(output / TEXT_FILE, as_markdown(found).encode())
    _write(output / PAGE_FILE, as_html(found).encode())
    return output / PAGE_FILE


def _write(path: Path, content: bytes) -> None:
    sibling = path.with_name(f".{path.name}.{os.getpid()}")
    sibling.write_bytes(content)
    sibling.replace(path)


def as_html(report: Report) -> str:
    """The page; what results say is escaped."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(_TEMPLATE.read_text()).render(report=report)


def as_markdown(report: Report) -> str:
    """The page as Markdown, with its plots as PNG files beside it."""
    lines = [f"# {report.title}", "", f"State: {report.state}.", ""]
    lines += [f"- {name}: {value}" for name, value in report.facts]
    if report.flow:
        flow = [[box.name, " · ".join(box.lines)] for box in report.flow]
        lines += ["", markdown_table(("stage", "what it made"), flow)]
    for part in report.parts:
        lines += ["", f"## {part.title}", ""]
        lines += [part.says, ""] if part.says else []
        for figure in part.figures:
            lines += [
                f"![{figure.title}]({figure.name}.png)",
                "",
                f"{figure.title}. {figure.says}",
                "",
            ]
        for table in part.tables:
            lines += [markdown_table(table.head, table.rows), ""]
    return "\n".join(lines).rstrip() + "\n"
