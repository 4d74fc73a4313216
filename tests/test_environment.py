"""Outputs, inputs and streams that are not what they should be: one line, nothing changed."""

from __future__ import annotations

import ast
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import loram_ray as lr
from helpers import tiny
from helpers.command import Command, leftovers
from loram_ray.artifacts.manifest import read_manifest
from loram_ray.errors import LoramError
from loram_ray.runtime.locks import alone
from loram_ray.runtime.progress import read_lines
from loram_ray.runtime.streams import safe_streams
from loram_ray.utils.files import (
    open_lock,
    read_regular,
    require_directory,
    require_regular_files,
    write_atomic,
)

pytestmark = pytest.mark.timeout(120)  # nothing here may wait
ROOT = Path(__file__).parents[1]
NOBODY = 65534


@pytest.fixture
def small(tmp_path: Path, base: Path) -> Path:
    """A copy of a base that a test may damage."""
    return Path(shutil.copytree(base, tmp_path / "base"))


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder of root's, while the process has the rights of nobody."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)
        if os.geteuid() == 0:
            os.seteuid(NOBODY)
            stack.callback(os.seteuid, 0)
        else:
            folder.chmod(0o555)
            stack.callback(folder.chmod, 0o755)
        yield folder


def prune(base: object, output: object, *more: str) -> list[object]:
    ours = (f"base={base}", f"output={output}", f"prune.output={output}", "prune.ratio=0.5")
    given = [*ours, "prune.layers=[1,3]", *more]
    return ["prune", *(word for one in given for word in ("--set", one))]


def make(kind: str, path: Path) -> None:
    """Put something other than a file at a path."""
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "loop":
            path.symlink_to(path.name)
        case "dangling":
            path.symlink_to("nowhere")
        case "socket":
            with socket.socket(socket.AF_UNIX) as made:
                here = os.open(path.parent, os.O_RDONLY)  # names of sockets are short
                made.bind(f"/proc/self/fd/{here}/{path.name}")
                os.close(here)
        case "device":
            path.symlink_to("/dev/zero")
        case "file":
            path.write_text("kept")
        case "link to a file":
            path.with_name("target").write_text("kept")
            path.symlink_to("target")
        case "link to a directory":
            path.with_name("target").mkdir()
            (path.with_name("target") / "identity").write_text("kept")
            path.symlink_to("target")
        case _:
            raise ValueError(kind)


NOT_FILES = ["fifo", "directory", "loop", "dangling", "socket", "device"]


def state_of(folder: Path) -> dict[str, Any]:
    """Every path of a folder with what it is and holds."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        plain = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(folder))] = (
            path.lstat().st_mode,
            path.read_bytes() if plain else os.readlink(path) if path.is_symlink() else None,
        )
    return found


BAD_OUTPUTS: dict[str, Callable[[Path], object]] = {
    "below a file": lambda folder: folder / "file" / "out",
    "a file": lambda folder: folder / "file",
    "a file with a slash behind": lambda folder: f"{folder / 'file'}/",
    "a fifo": lambda folder: folder / "fifo",
    "below a fifo": lambda folder: folder / "fifo" / "out",
    "a loop": lambda folder: folder / "loop",
    "below a loop": lambda folder: folder / "loop" / "out",
    "a dangling link": lambda folder: folder / "dangling",
    "a link to a directory": lambda folder: folder / "link",
    "a device": lambda folder: "/dev/null",
    "below a device": lambda folder: "/dev/null/out",
    "a name that is too long": lambda folder: folder / ("x" * 256),
    "a name that is too long with a suffix": lambda folder: folder / ("x" * 250),
    "a name of too many bytes": lambda folder: folder / ("é" * 125),
    "a parent that is too long": lambda folder: folder / ("x" * 256) / "out",
    "a path that is too long": lambda folder: folder.joinpath(*["x" * 200] * 30),
    "the root": lambda folder: "/",
    "the current directory": lambda folder: ".",
    "the parent": lambda folder: "..",
    "a parent in the middle": lambda folder: folder / "new" / "..",
    "the base": lambda folder: folder / "base",
    "the base by a link": lambda folder: folder / "base-link",
    "in the base": lambda folder: folder / "base" / "out",
    "deep in the base": lambda folder: folder / "base" / "a" / "b" / "out",
    "in the base by a link": lambda folder: folder / "base-link" / "out",
    "around the base": lambda folder: folder,
    "a full directory": lambda folder: folder / "full",
    "where the kernel takes no files": lambda folder: "/proc/out",
    "control characters": lambda folder: f"{folder}/a\nb\x1b[31m",
    "bytes that are not UTF-8": lambda folder: f"{folder}/a\udcffb",
}


@pytest.mark.parametrize("kind", BAD_OUTPUTS)
def test_outputs_that_cannot_be_are_refused_and_nothing_is_changed(
    kind: str, small: Path, tmp_path: Path, loram: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("fifo", tmp_path / "fifo")
    make("file", tmp_path / "file")
    make("loop", tmp_path / "loop")
    make("dangling", tmp_path / "dangling")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "base-link").symlink_to("base")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("kept")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = state_of(tmp_path)
    ended = loram(*prune(small, BAD_OUTPUTS[kind](tmp_path)))
    assert ended.line.count("\x1b") == 0
    after = state_of(tmp_path)
    after.pop("base/a/b", None), after.pop("base/a", None)
    assert after == before


@pytest.mark.parametrize(
    "name",
    ["a b", "a#b", "a%20b", "a?b=c&d", "é日本", "😀", "[red]", "$x$", "-out", "x" * 240, "a/../b"],
)
def test_outputs_of_any_other_name_are_made(
    name: str, small: Path, tmp_path: Path, loram: Command
) -> None:
    (tmp_path / "a").mkdir()
    ended = loram(*prune(small, f"{tmp_path}/{name}/"))
    assert ended.code == 0, ended
    made = tmp_path / name
    assert read_manifest(made) is not None and name.split("/")[-1] in ended.out
    assert leftovers(tmp_path) == set()


@pytest.mark.parametrize("suffix", ["partial", "work", "lock"])
@pytest.mark.parametrize(
    "kind", ["fifo", "file", "loop", "dangling", "socket", "link to a file", "link to a directory"]
)
def test_what_is_in_the_way_of_the_work_is_refused_and_kept(
    suffix: str, kind: str, small: Path, tmp_path: Path, loram: Command
) -> None:
    make(kind, tmp_path / f".out.{suffix}")
    before = state_of(tmp_path)
    ended = loram(*prune(small, tmp_path / "out"))
    if suffix == "lock" and kind == "file":  # of a killed run
        assert ended.code == 0
        return
    assert f".out.{suffix}" in ended.line
    after = state_of(tmp_path)
    after.pop(".out.lock", None), before.pop(".out.lock", None)
    assert after == before


def test_a_fifo_in_place_of_the_note_of_the_work_is_refused(
    small: Path, tmp_path: Path, loram: Command
) -> None:
    (tmp_path / ".out.work").mkdir()
    os.mkfifo(tmp_path / ".out.work" / "identity")
    assert "must be a regular file, got a FIFO" in loram(*prune(small, tmp_path / "out")).line


@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_models_whose_files_are_no_files_are_refused(
    kind: str, file: str, small: Path, tmp_path: Path, loram: Command
) -> None:
    (small / file).unlink()
    make(kind, small / file)
    before = state_of(tmp_path)
    ended = loram(*prune(small, tmp_path / "out"))
    assert file in ended.line
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("kind", [*NOT_FILES, "file"])
def test_what_is_no_model_directory_is_refused(kind: str, tmp_path: Path, loram: Command) -> None:
    make(kind, tmp_path / "base")
    assert "base" in loram(*prune(tmp_path / "base", tmp_path / "out")).line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["x" * 256, "/".join(["x" * 200] * 30), "/dev/null/base"])
@pytest.mark.parametrize("command", ["prune", "chat", "report", "plan", "merge", "config"])
def test_paths_that_cannot_be_are_refused(
    name: str, command: str, small: Path, tmp_path: Path, loram: Command
) -> None:
    path = name if name.startswith("/") else f"{tmp_path}/{name}"
    merging = [f"base={small}", f"output={tmp_path}", f"merge.adapter={path}"]
    arguments = {
        "prune": prune(path, tmp_path / "out"),
        "chat": ["chat", "--model", path, "--prompt", "x"],
        "report": ["report", path],
        "plan": ["plan", "--base-config", path, *prune(small, tmp_path / "out")[1:]],
        "merge": ["merge", *(word for one in merging for word in ("--set", one))],
        "config": ["prune", "--config", path],
    }
    assert "x" * 50 in (line := loram(*arguments[command]).line) or "null" in line
    assert leftovers(tmp_path) == set()


@pytest.mark.parametrize("kind", NOT_FILES)
def test_files_in_whose_place_is_something_else_are_refused(
    kind: str, small: Path, tmp_path: Path, loram: Command
) -> None:
    make(kind, tmp_path / "odd")
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.questions())
    training = [f"base={small}", f"output={tmp_path / 'run'}", f"train.model={small}",
                f"train.data={data}", f"train.chat_template={tmp_path / 'odd'}"]  # fmt: skip
    before = state_of(tmp_path)
    assert "odd" in loram("prune", "--config", tmp_path / "odd").line
    sets = (word for one in training for word in ("--set", one))
    assert "odd" in loram("train", *sets, "--preview", "1").line
    odd = ["chat", "--model", small, "--prompt", "x", "--chat-template", tmp_path / "odd"]
    assert "odd" in loram(*odd).line
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters_whose_files_are_no_files_are_refused(
    kind: str, file: str, small: Path, tmp_path: Path, loram: Command
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}'
    )
    (adapter / file).unlink(missing_ok=True)
    make(kind, adapter / file)
    ours = [f"base={small}", f"output={tmp_path}", f"merge.adapter={adapter}"]
    ours.append(f"merge.output={tmp_path / 'merged'}")
    ended = loram("merge", *(word for one in ours for word in ("--set", one)))
    assert "adapter" in ended.line
    assert not (tmp_path / "merged").exists() and leftovers(tmp_path) == set()


@pytest.mark.parametrize("kind", ["fifo", "directory", "socket", "device"])
@pytest.mark.parametrize("file", ["results.json", "claims.json"])
def test_reports_do_not_wait_for_what_is_no_file(
    kind: str, file: str, tmp_path: Path, loram: Command
) -> None:
    make(kind, tmp_path / file)
    assert loram("report", tmp_path).line
    assert not (tmp_path / "report").exists()


def test_outputs_in_folders_of_others_are_refused(
    unprivileged: Path, base: Path, loram: Command
) -> None:
    model = readable(base)
    for output in (unprivileged / "out", unprivileged / "new" / "out"):
        assert "Permission denied" in loram(*prune(model, output)).line
    assert not list(unprivileged.iterdir())
    shutil.rmtree(model)


def readable(base: Path) -> Path:
    """A copy of a base that nobody can read."""
    model = Path(tempfile.mkdtemp())
    rights = os.geteuid()
    os.seteuid(os.getuid())
    shutil.copytree(base, model, dirs_exist_ok=True)
    os.chown(model, rights, -1)
    for path in model.iterdir():
        os.chown(path, rights, -1)
    os.seteuid(rights)
    return model


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", ""])
def test_models_that_may_not_be_read_are_refused(
    file: str, unprivileged: Path, base: Path, loram: Command
) -> None:
    model = readable(base)
    with tempfile.TemporaryDirectory() as folder:
        (model / file).chmod(0)
        line = loram(*prune(model, Path(folder) / "out")).line
        assert "cannot be" in line and (file or model.name) in line
        assert not list(Path(folder).iterdir())
        (model / file).chmod(0o755)
    shutil.rmtree(model)


def test_run_files_that_may_not_be_read_are_refused(unprivileged: Path, loram: Command) -> None:
    with tempfile.NamedTemporaryFile(dir=tempfile.gettempdir()) as file:
        Path(file.name).chmod(0)
        assert "cannot be read (Permission denied)" in loram("prune", "--config", file.name).line


@pytest.mark.parametrize("kind", NOT_FILES)
def test_files_are_read_only_where_they_are_regular(kind: str, tmp_path: Path) -> None:
    make(kind, tmp_path / "x.json")
    with pytest.raises((LoramError, FileNotFoundError)):
        read_regular(tmp_path / "x.json")
    with pytest.raises(LoramError):
        require_regular_files(tmp_path)
    if kind != "dangling":
        with pytest.raises(LoramError):
            read_lines(tmp_path / "x.json")


@pytest.mark.parametrize("kind", ["fifo", "loop", "dangling", "link to a file", "device", "socket"])
def test_files_are_replaced_and_not_followed(kind: str, tmp_path: Path) -> None:
    make(kind, tmp_path / "x")
    make(kind, tmp_path / f".x.{os.getpid()}") if kind != "link to a file" else None
    write_atomic(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "new" and not (tmp_path / "x").is_symlink()
    if kind == "link to a file":
        assert (tmp_path / "target").read_text() == "kept"


@pytest.mark.parametrize(
    "kind", ["fifo", "loop", "dangling", "link to a file", "device", "directory", "socket"]
)
def test_locks_neither_follow_links_nor_wait_for_fifos(kind: str, tmp_path: Path) -> None:
    make(kind, tmp_path / "worker.lock")
    before = state_of(tmp_path)
    with pytest.raises(LoramError, match="remove it"), alone(tmp_path):
        pass
    with pytest.raises(LoramError, match="remove it"):
        open_lock(tmp_path / "worker.lock")
    assert state_of(tmp_path) == before
    if kind != "directory":
        with pytest.raises(LoramError, match="remove it"):
            require_directory(tmp_path / "worker.lock")


def test_a_complete_output_behind_a_link_is_still_complete(small: Path, tmp_path: Path) -> None:
    config = {"base": str(small), "ratio": 0.5, "layers": (1, 3)}
    made = lr.prune(lr.PruneConfig(output=tmp_path / "made", **config))
    (tmp_path / "link").symlink_to("made")
    again = lr.prune(lr.PruneConfig(output=tmp_path / "link", **config))
    assert again.skipped and again.manifest == made.manifest


# Streams and variables belong to a process of their own.

CLI = [sys.executable, "-m", "loram_ray.cli"]


def shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash in which ``loram`` is the command."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    words = " ".join(CLI)
    return subprocess.run(
        ["bash", "-c", f'loram() {{ {words} "$@"; }}; {line}'],
        cwd=folder,
        env=variables,
        capture_output=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(
    ("line", "code", "out", "err"),
    [
        ("loram prune --help >&-", 0, b"", b""),
        ("loram report nowhere 2>&-", 2, b"", b""),
        ("loram report nowhere <&- >&- 2>&-", 2, b"", b""),
        ("loram report nowhere >&-", 2, b"", b"loram: DIRECTORY"),
        ("loram prune --help >/dev/full", 2, b"", b"loram: standard output could not be written"),
        ("loram report nowhere 2>/dev/full", 2, b"", b""),
        ("loram prune --help | true; exit ${PIPESTATUS[0]}", 0, b"", b""),
        ("loram report nowhere 2>&1 | true; exit ${PIPESTATUS[0]}", 2, b"", b""),
        ("loram chat --model nowhere <&-", 2, b"", b"loram: "),
    ],
)
def test_streams_that_are_closed_full_or_without_a_reader(
    line: str, code: int, out: bytes, err: bytes, tmp_path: Path
) -> None:
    ended = shell(line, tmp_path)
    assert ended.returncode == code, ended
    assert ended.stdout == out
    assert ended.stderr.startswith(err) and b"Traceback" not in ended.stderr
    assert ended.stderr.count(b"\n") == bool(err)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("streams", "code"),
    [(">&- 2>&-", 0), ("2>&1 | true", 0), ("2>/dev/full", 0), (">/dev/full", 2)],
)
def test_a_stage_is_done_whatever_its_streams_are(
    streams: str, code: int, small: Path, tmp_path: Path
) -> None:
    words = " ".join(map(str, prune(small, tmp_path / "out")))
    ended = shell(f"loram {words} {streams}; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert ended.returncode == code, ended
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None and leftovers(tmp_path) == set()
    lr.prune(lr.PruneConfig(base=str(small), output=tmp_path / "out", ratio=0.5, layers=(1, 3)))


ODD = {
    "nothing is there": {"TMPDIR": "/nonexistent", "HOME": "/nonexistent", "COLUMNS": "1"},
    "files are there": {"TMPDIR": "/etc/passwd", "HOME": "/etc/passwd", "COLUMNS": "0"},
    "a C locale": {"LC_ALL": "C"},
    "an unknown locale": {"LC_ALL": "xx_YY.ISO-8859-15", "PYTHONIOENCODING": "ascii"},
}


@pytest.mark.slow
@pytest.mark.parametrize("odd", ODD)
def test_stages_do_not_depend_on_the_environment(odd: str, small: Path, tmp_path: Path) -> None:
    words = " ".join(map(str, prune(small, "$'é日本'")))
    ended = shell(f"loram {words} && loram report $'é日本' --output page", tmp_path, **ODD[odd])
    assert ended.returncode == 0, ended
    [made] = [path for path in tmp_path.iterdir() if path.name not in ("base", "page")]
    assert "é日本" in (tmp_path / "page" / "report.html").read_text("utf-8")
    expected = tmp_path / "expected"
    lr.prune(lr.PruneConfig(base=str(small), output=expected, ratio=0.5, layers=(1, 3)))
    for file in ("config.json", "model.safetensors"):
        assert (made / file).read_bytes() == (expected / file).read_bytes()


@pytest.mark.slow
def test_a_python_that_reads_ascii_alone_is_told_how_to_read_more(
    small: Path, tmp_path: Path
) -> None:
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = " ".join(map(str, prune(small, "$'é日本'")))
    ended = shell(f"loram {words}", tmp_path, **ascii_alone)
    assert ended.returncode == 2 and ended.stderr.rstrip().endswith(b"; set PYTHONUTF8=1"), ended
    assert shell(f"loram {words}", tmp_path, **{**ascii_alone, "PYTHONUTF8": "1"}).returncode == 0
    assert "é日本" in {path.name for path in tmp_path.iterdir()}


def test_streams_are_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with safe_streams():
        print("é\ud800")
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "é\\ud800\n"


@pytest.mark.parametrize("stage", ["align", "publish", "quantize", "train"])
def test_cards_and_templates_are_utf8_in_any_locale(stage: str) -> None:
    """Python writes text in the locale's encoding unless an encoding is given."""
    tree = ast.parse((ROOT / "loram_ray" / "stages" / f"{stage}.py").read_text("utf-8"))
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            needed = {"read_text": 1, "write_text": 2}.get(call.func.attr, 0)
            assert len(call.args) >= needed, ast.unparse(call)
