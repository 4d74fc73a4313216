"""Write a report as a self-contained HTML page, as Markdown, and its plots as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from loram_ray.reporting.content import build_report
from loram_ray.reporting.parts import Report
from loram_ray.reporting.results import collect_results
from loram_ray.runtime.results import markdown_table
from loram_ray.utils.files import make_directory, write_atomic
from loram_ray.utils.printing import markdown, plain_lines

PAGE_FILE, TEXT_FILE = "report.html", "report.md"
_TEMPLATE = Path(__file__).with_name("page.html.j2")


def report(directory: Path, output: Path | None = None) -> Path:
    """Write a report on a run, a batch, a sweep or a comparison, complete or not.

    Args:
        directory: Output directory of the command.
        output: Directory for ``report.html``, ``report.md`` and PNG files. Default: ``report`` in
            ``directory``.

    Returns:
        Path of the HTML file.

    Raises:
        LoramError: The directory has no results or those of several bases, or matplotlib is not
            installed.
    """
    content = build_report(collect_results(directory))
    output = output or directory / "report"
    make_directory(output, "--output")
    for part in content.parts:
        for figure in part.figures:
            write_atomic(output / f"{figure.name}.png", figure.png)
    write_atomic(output / TEXT_FILE, as_markdown(content))
    write_atomic(output / PAGE_FILE, as_html(content))
    return output / PAGE_FILE


def as_html(report: Report) -> str:
    """Render the report as HTML, with text from results escaped."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined, finalize=_shown
    )
    return environment.from_string(_TEMPLATE.read_text("utf-8")).render(report=report)


def _shown(value: Any) -> Any:
    """Escape control characters in a template value; keep markup."""
    return plain_lines(value) if type(value) is str else value


def as_markdown(report: Report) -> str:
    """Render the report as Markdown that refers to the PNG files, with text escaped."""
    lines = [f"# {markdown(report.title)}", "", f"State: {markdown(report.state)}.", ""]
    lines += [f"- {markdown(name)}: {markdown(value)}" for name, value in report.facts]
    if report.flow:
        flow = [[box.name, " · ".join(box.lines)] for box in report.flow]
        lines += ["", markdown_table(("stage", "output"), flow)]
    for part in report.parts:
        lines += ["", f"## {markdown(part.title)}", ""]
        lines += [markdown(part.says), ""] if part.says else []
        for figure in part.figures:
            lines += [
                f"![{markdown(figure.title)}]({figure.name}.png)",
                "",
                f"{markdown(figure.title)}. {markdown(figure.says)}",
                "",
            ]
        for table in part.tables:
            lines += [markdown_table(table.head, table.rows), ""]
    return "\n".join(lines).rstrip() + "\n"
