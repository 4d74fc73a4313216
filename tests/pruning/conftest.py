"""Bases of each family and text to calibrate on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import families, tiny
from helpers.calibrations import Calls, Lost
from loram_ray.pruning import driver as calibrate
from loram_ray.pruning.pool import InProcess, Job
from loram_ray.pruning.worker import CalibrationSpec


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of products this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny base of each family, made when it is asked for."""
    folder, made = tmp_path_factory.mktemp("bases"), {}

    def base_of(family: str) -> Path:
        if family not in made:
            made[family] = families.write_base(folder / family, family, seed=3)
        return made[family]

    return base_of


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Calls]:
    """Have the stage's calibrations run here; returns a function that starts a list of the jobs.

    A job of which its argument is true is lost.
    """
    state: dict[str, Any] = {"calls": Calls(), "fails": lambda _: False}

    class Observed(InProcess):
        def run(self, jobs: Sequence[Job]) -> Iterator[Any]:
            for job in jobs:
                if state["fails"](job):
                    raise Lost(job[0])
                state["calls"].append(job)
                yield from super().run([job])

    @contextmanager
    def pool(setup: CalibrationSpec, *_: Any) -> Iterator[InProcess]:
        yield Observed(setup)

    monkeypatch.setattr(calibrate, "ray_pool", pool)

    def start(fails: Callable[[Job], bool] = lambda _: False) -> Calls:
        state.update(calls=Calls(), fails=fails)
        return state["calls"]

    return start


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", tiny.texts())
