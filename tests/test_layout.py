"""The package's rooms stand on floors, which imports go down; the tests mirror the rooms."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import loram_ray

PACKAGE = Path(loram_ray.__file__).parent
TESTS = Path(__file__).parent
FLOORS = (
    ("cli",),
    ("__init__",),
    ("reporting",),
    ("studies",),
    ("stages",),
    ("evaluation", "estimating"),
    ("finetuning", "alignment", "pruning"),
    ("corpus", "recovery"),
    ("models",),
    ("plan",),
    ("masks", "runtime"),
    ("config", "architectures", "artifacts", "demo"),
    ("utils",),
    ("errors",),
    (
        "addresses",
        "commands",
        "criteria",
        "losses",
        "distillation",
        "objectives",
        "peft_options",
        "units",
    ),
)
"""Folders and files of the package's top level, the highest floor first."""
FLOOR_OF = {room: -number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    """``models`` for ``loram_ray.models.nf4``, ``__init__`` for the package itself."""
    return module.split(".")[1] if "." in module else "__init__"


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    return {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports anywhere, in functions and for types, too."""
    package = path.relative_to(PACKAGE.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == PACKAGE.name)


def test_imports_go_down() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, path in modules().items()
        for name in imports(path)
        if room_of(name) in FLOOR_OF
        and room_of(name) != room_of(module)
        and FLOOR_OF[room_of(name)] >= FLOOR_OF[room_of(module)]
    ]
    assert not wrong


def test_every_room_has_its_floor() -> None:
    rooms = {room_of(module) for module in modules()}
    assert rooms == set(FLOOR_OF)


def test_no_module_imports_itself_through_others() -> None:
    found = modules()
    below = {
        module: {
            name if name in found else name.rpartition(".")[0]
            for name in imports(path)
            if name in found or name.rpartition(".")[0] in found
        }
        - {module, "loram_ray"}
        for module, path in found.items()
        if module != "loram_ray"
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " > ".join((*path, module))
        if module in done:
            return
        for name in sorted(below.get(module, ())):
            visit(name, (*path, module))
        done.add(module)

    for module in below:
        visit(module, ())


def test_folders_of_tests_are_named_as_rooms() -> None:
    """The exception is interop, which tests the whole package with other projects."""
    rooms = {path.parent.name for path in TESTS.rglob("test_*.py")} - {TESTS.name, "interop"}
    assert rooms <= {path.name for path in PACKAGE.iterdir() if path.is_dir()}


def test_jobs_are_thin() -> None:
    jobs = TESTS.parent / "jobs"
    lines = {path.name: path.read_text().count("\n") for path in jobs.rglob("*.py")}
    assert lines and {name: count for name, count in lines.items() if count >= 60} == {}


def test_no_file_of_tests_is_long() -> None:
    lines = {path: path.read_text().count("\n") for path in TESTS.rglob("*.py")}
    assert {path.name: count for path, count in lines.items() if count > 600} == {}


def test_no_function_of_the_package_is_long() -> None:
    lines = {
        f"{name_of(path)}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: count for name, count in lines.items() if count > 60} == {}


def test_no_test_imports_another() -> None:
    """What tests share is in tests/helpers."""
    found = {path.stem: path for path in TESTS.rglob("test_*.py")}
    wrong = [
        f"{path.name} imports {name}"
        for path in [*found.values(), *(TESTS / "helpers").rglob("*.py")]
        for name in imported(path)
        if name in found
    ]
    assert not wrong


def imported(path: Path) -> Iterator[str]:
    """Modules without a package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
