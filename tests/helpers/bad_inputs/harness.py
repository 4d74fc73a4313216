"""Rows of the tables, the folder that each runs in, and the checks on the result."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import adapters, tiny
from loram_ray.cli import main as cli
from loram_ray.config import PruneConfig
from loram_ray.models.loading import load_model
from loram_ray.stages.prune import prune

Change = Callable[[Path], object]
BASE, PRUNED, TRAINED, ADAPTER = "base", "run/pruned", "run/adapter_pruned", "run/adapter"
CPU_SECONDS, SECONDS = 5.0, 30.0
"""Maximum CPU time and wall time of a refusal in seconds; other processes may affect the latter."""


@dataclass(frozen=True)
class Row:
    """One bad input.

    Attributes:
        name: Unique name of the row.
        command: Arguments of ``loram``, run in the folder.
        names: File or key that the error message must contain.
        change: Makes the folder's input bad.
        environment: Environment variables that are the bad input.
        cpu_seconds: Maximum CPU time in seconds.
        may_work: Whether a correct result is accepted as well as a refusal.
    """

    name: str
    command: Sequence[str]
    names: str
    change: Change = lambda folder: None
    environment: dict[str, str] = field(default_factory=dict)
    cpu_seconds: float = CPU_SECONDS
    may_work: bool = False


def make_folder(folder: Path) -> Path:
    """Create a folder with a base, outputs of its stages, data, results and a run file."""
    tiny.write_base(folder / BASE, layers=2, heads=4, kv_heads=2, hidden=16, intermediate=24)
    sharded = {"layers": 2, "heads": 4, "kv_heads": 2, "hidden": 16, "intermediate": 24}
    tiny.write_base(folder / "sharded", max_shard_size="20KB", **sharded)
    pruned = folder / PRUNED
    prune(PruneConfig(base=str(folder / BASE), output=pruned, ratio=0.5, layers=(0, 2)))
    adapted = adapters.with_random_adapter(load_model(pruned, "fp32"), target_modules=["v_proj"])
    adapters.write_trained(pruned, adapted, folder / TRAINED)
    plain = adapters.with_random_adapter(load_model(folder / BASE, "fp32"))
    plain.save_pretrained(folder / "plain")
    tiny.write_jsonl(folder / "data.jsonl", tiny.questions(8))
    tiny.write_jsonl(folder / "text.jsonl", tiny.texts(8))
    (folder / "results").mkdir()
    row: dict[str, Any] = {"name": "a", "state": "done", "reason": "", "steps": 3, "loss": 1.0}
    row |= {"eval_loss": None, "seconds": 2.0, "deaths": 0}
    (folder / "results" / "results.json").write_text(json.dumps([row]))
    settings: dict[str, Any] = {
        "base": BASE,
        "output": "run",
        "prune": {"ratio": 0.5, "layers": [0, 2], "output": "new"},
        "align": {
            "pruned": PRUNED,
            "corpus": {"sources": [{"path": "text.jsonl"}]},
            "output": "new",
        },
        "train": {"model": PRUNED, "data": "data.jsonl", "output": "new"},
        "recover": {"adapter": TRAINED, "output": "new"},
        "merge": {"adapter": "plain", "output": "new"},
        "evaluate": {"adapter": "plain", "data": "data.jsonl", "output": "new"},
        "export": {"model": BASE, "output": "new"},
        "quantize": {"model": PRUNED, "output": "new"},
        "publish": {"directory": PRUNED, "repo": "owner/name"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


COMMANDS = ("prune", "train", "recover", "merge", "evaluate", "export", "quantize", "run", "align")
"""Commands of the folder's run file, for inputs that all of them read."""


def stage(name: str, *overrides: str) -> tuple[str, ...]:
    """Return a command with the folder's run file; ``train`` only previews its first example."""
    words = [name, "--config", "run.yaml", *(["--preview", "1"] if name == "train" else [])]
    for override in overrides:
        words += ["--set", override]
    return tuple(words)


def in_turn(*names: str) -> Iterator[tuple[str, ...]]:
    """Cycle through commands."""
    return cycle(stage(name) for name in names)


def given(key: str, value: str) -> Change:
    """Return a change that writes the run file with one value replaced."""

    def change(folder: Path) -> None:
        settings = yaml.safe_load((folder / "run.yaml").read_text())
        *parents, last = key.split(".")
        node = settings
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = "THE_VALUE"
        text = yaml.safe_dump(settings).replace("THE_VALUE", value)
        (folder / "run.yaml").write_text(text)

    return change


def edited(path: str, *keys: str | int, value: Any) -> Change:
    """Return a change that sets a value in a JSON file."""

    def change(folder: Path) -> None:
        data = json.loads((folder / path).read_text())
        node = data
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value
        (folder / path).write_text(json.dumps(data))

    return change


def without(path: str, *keys: str) -> Change:
    """Return a change that removes a key from a JSON file."""

    def change(folder: Path) -> None:
        data = json.loads((folder / path).read_text())
        node = data
        for key in keys[:-1]:
            node = node[key]
        del node[keys[-1]]
        (folder / path).write_text(json.dumps(data))

    return change


def written(path: str, content: str | bytes) -> Change:
    """Return a change that replaces a file's content."""

    def change(folder: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (folder / path).write_bytes(data)

    return change


def _in_place(make: Callable[[Path], object]) -> Callable[[str], Change]:
    def at(path: str) -> Change:
        def change(folder: Path) -> None:
            place = folder / path
            place.unlink(missing_ok=True)
            make(place)

        return change

    return at


fifo = _in_place(os.mkfifo)
directory = _in_place(lambda place: place.mkdir())
loop = _in_place(lambda place: place.symlink_to(place))
device = _in_place(lambda place: place.symlink_to("/dev/zero"))
missing = _in_place(lambda place: None)

NO_FILES = {"fifo": fifo, "directory": directory, "loop": loop, "device": device}
"""Things that can take the place of a file."""

NO_JSON = {
    "cut": '{"a": [1,',
    "empty": "",
    "list": "[1, 2]",
    "number": "7",
    "deep": '{"a":' * 100_000,
    "deep_lists": "[" * 100_000,
    "nan": '{"hidden_size": NaN, "r": NaN}',
    "huge": '{"hidden_size": 1e999}',
    "digits": '{"hidden_size": %s}' % ("9" * 5000),
    "twice": '{"a": 1,\n"a": 2}',
    "half_pair": '{"a": "\\ud800"}',
    "utf16": '{"a": 1}'.encode("utf-16"),
    "bytes": b'{"a": "\xff"}',
}
"""Contents that are not valid JSON documents."""


def snapshot(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return every path below a folder, with the properties that change when a file is written."""
    found: dict[str, tuple[int, ...]] = {}
    pending = [folder]
    while pending:
        for entry in os.scandir(pending.pop()):
            status = entry.stat(follow_symlinks=False)
            if entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
                found[entry.path] = (status.st_mode,)
            else:
                found[entry.path] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


def check(
    row: Row, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]
) -> None:
    """Run a row in its folder and check the result."""
    row.change(folder)
    before = snapshot(folder)
    patch.chdir(folder)
    patch.setattr(sys, "argv", ["loram", *row.command])
    patch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was started for a bad input"))
    for name, value in row.environment.items():
        patch.setenv(name, value)
    capture.readouterr()
    started, cpu = time.monotonic(), time.process_time()
    code: Any = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    took, cpu = time.monotonic() - started, time.process_time() - cpu
    out, err = capture.readouterr()
    assert "Traceback" not in out + err, err
    if row.may_work and code == 0:
        return
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2, f"exit code {code}: {err}"
    assert len(lines) == 1 and lines[0].startswith("loram: "), err
    assert row.names in lines[0], f"{row.names!r} is not named: {err}"
    assert len(lines[0]) < 1500, err
    after = snapshot(folder)
    assert after == before, f"written: {sorted(after.keys() ^ before.keys())}"
    assert cpu < row.cpu_seconds and took < SECONDS, f"{took:.1f} s, {cpu:.1f} s of CPU"


def copied(whole: Path, folder: Path) -> Path:
    """Copy the folder for a row that changes it."""
    shutil.copytree(whole, folder, symlinks=True)
    return folder
