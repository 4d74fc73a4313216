"""Pages of the site that are made when it is built, and links that leave ``docs/``.

The reference of configuration keys is made from the descriptions in ``loram_ray.config``. Results,
the contributors' guide and the changelog are files elsewhere in the repository.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from loram_ray.config import STAGES, RunConfig, kind_of, section_types

REPOSITORY = Path(__file__).parents[1]
PAGES = {
    "results/study.md": "tests/benchmarks/study/README.md",
    "results/criteria.md": "tests/benchmarks/CRITERIA.md",
    "results/alignment.md": "tests/benchmarks/ALIGNMENT.md",
    "results/benchmarks.md": "tests/benchmarks/RESULTS.md",
    "how-to/cluster-files.md": "cluster/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Pages of the site that are files elsewhere in the repository."""
_LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made here."""
    from mkdocs.structure.files import File

    def add(page: str, content: str | bytes) -> None:
        files.append(File.generated(config, page, content=content))

    add("reference/configuration.md", configuration())
    for page, source in PAGES.items():
        add(page, (REPOSITORY / source).read_text())
        for picture in _pictures(source):
            place = posixpath.join(posixpath.dirname(page), picture)
            add(place, (REPOSITORY / source).with_name(picture).read_bytes())
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turn links to files of the repository into links that the site has."""
    return with_links(markdown, page.file.src_uri)


def with_links(markdown: str, page: str) -> str:
    """A page's text whose links to files of the repository are links of the site.

    Links to other pages stay. Other files of the repository, which the site does not hold, become
    their path in code.

    Args:
        markdown: the text.
        page: where the page is in the site's sources.

    Raises:
        ValueError: a link leads nowhere.
    """
    source = PAGES.get(page, f"docs/{page}")

    def replaced(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        site = _page_of(target)
        if site is None:
            return match[0]
        return match[1] + posixpath.relpath(site, posixpath.dirname(page) or ".")

    return _FILE_LINK.sub(lambda match: _as_code(match, source), _LINK.sub(replaced, markdown))


_FILE_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|mailto:|#)([^)#\s]+)\)")


def _page_of(target: str) -> str | None:
    """The site's page that shows a file of the repository, or None."""
    for page, source in PAGES.items():
        if target == source:
            return page
    return target.removeprefix("docs/") if target.startswith("docs/") else None


def _as_code(match: re.Match[str], source: str) -> str:
    """The text of a link to a file that the site does not hold, with the file's path."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
    if match[2].endswith(".md") or not (REPOSITORY / path).exists() or path.startswith("docs/"):
        return match[0]
    text = match[1].strip("`")
    return f"`{path}`" if text in path else f"{match[1]} (`{path}`)"


def _pictures(source: str) -> list[str]:
    return re.findall(r"!\[[^\]]*\]\(([\w.-]+\.png)\)", (REPOSITORY / source).read_text())


def configuration() -> str:
    """The page of all configuration keys, from the sections' own descriptions."""
    shared = "\n".join(_rows(RunConfig, "", skip=set(STAGES)))
    parts = [
        "# Configuration keys",
        "Every key of a run file, made from the descriptions in `loram_ray.config` when this site "
        "is built. `loram COMMAND --help` lists the same keys as options: `lora.r` of `train` is "
        "`--lora.r`.",
        "Paths between stages need not be given in a run file: each section gets those that follow "
        "from `base`, `output` and the other sections.",
        f"## The whole run\n\n{_HEAD}\n{shared}",
    ]
    for stage, section in STAGES.items():
        text = (section.__doc__ or "").removeprefix(f"{stage}: ")
        summary = " ".join(text.split())
        rows = "\n".join(_rows(section, f"{stage}."))
        parts.append(f"## {stage}\n\n{summary[:1].upper()}{summary[1:]}\n\n{_HEAD}\n{rows}")
    return "\n\n".join(parts) + "\n"


_HEAD = "| key | type | default | meaning |\n|---|---|---|---|"


def _rows(
    model: type[BaseModel],
    prefix: str,
    defaults: BaseModel | None = None,
    skip: set[str] | frozenset[str] = frozenset(),
) -> Iterator[str]:
    """A table row for each key of a section; the keys of sections inside follow theirs."""
    for name, field in model.model_fields.items():
        if name in skip:
            continue
        key = f"{prefix}{name}"
        default = field.default if defaults is None else getattr(defaults, name)
        inside = section_types(field.annotation)
        if field.description or not inside:
            value = "required" if default is PydanticUndefined else _shown(default)
            cells = [f"`{key}`", _type(field.annotation), value, field.description or ""]
            yield f"| {' | '.join(map(_cell, cells))} |"
        place = {tuple: ".N", dict: ".KEY"}.get(get_origin(field.annotation) or object, "")
        for inner in inside:
            below = f"{key}{place}."
            if len(inside) > 1:
                kind = kind_of(inner)
                summary = " ".join((inner.__doc__ or "").split())
                yield f"| `{key}{place}` | | | **kind `{kind}`**: {_cell(summary)} |"
            yield from _rows(inner, below, default if isinstance(default, BaseModel) else None)


def _shown(default: Any) -> str:
    if default is None:
        return ""
    if isinstance(default, BaseModel):
        return "see below"
    if isinstance(default, str) and default.isprintable():
        return f"`{default}`" if default else ""
    return f"`{json.dumps(default)}`"


def _type(annotation: Any) -> str:
    """A type in the words of a run file."""
    if section_types(annotation):
        origin = get_origin(annotation)
        return {tuple: "list of sections", dict: "section by name"}.get(origin or object, "section")
    names = {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path"}
    if annotation in names:
        return names[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _type(arguments[0])
    if str(origin) == "typing.Literal":
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return "keys and values"
    if arguments:
        return " or ".join(_type(a) for a in arguments if a is not type(None))
    return str(getattr(annotation, "__name__", annotation))


def _cell(text: str) -> str:
    """Text that neither ends a cell nor reads as HTML."""
    outside = [
        part if number % 2 else part.replace("<", "&lt;")
        for number, part in enumerate(text.split("`"))
    ]
    return "`".join(outside).replace("|", "\\|")
