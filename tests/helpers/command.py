"""The ``loram`` command run in this process, and the files that it leaves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from loram_ray.cli.main import main


class Ended(NamedTuple):
    """Result of a command."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The single line that a refused command prints."""
        assert self.code == 2, self
        lines = [line for line in self.err.splitlines() if line.startswith("loram: ")]
        assert len(lines) == 1 and "Traceback" not in self.err, self
        return lines[0]


class Command:
    """Runs ``loram`` with arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> Ended:
        self._monkeypatch.setattr(sys, "argv", ["loram", *map(str, arguments)])
        self._capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        out, err = self._capsys.readouterr()
        return Ended(code, out, err)


def leftovers(folder: Path) -> set[str]:
    """Return the names of temporary files of interrupted work."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob(".*")
        if path.name.endswith((".partial", ".work", ".lock", ".tmp"))
    }
