"""Calibration on workers of a Ray cluster, some of which die."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import loram_ray as lr
from helpers import tiny
from helpers.calibrations import files, prune, spoilt_base, walking
from loram_ray.artifacts.manifest import read_manifest
from loram_ray.config import CalibrationConfig
from loram_ray.pruning import pool as pool_module
from loram_ray.pruning.criteria import TaylorForm
from loram_ray.pruning.pool import InProcess, Job, RayPool
from loram_ray.pruning.sparse import Pattern
from loram_ray.pruning.worker import CalibrationSpec


@dataclass
class Killer:
    """Ends an actor in the middle of a layer's jobs, once."""

    method: str
    killed: list[str] = field(default_factory=list)

    def pool(self) -> type[RayPool]:
        killer = self

        class Killing(RayPool):
            def run(self, jobs: Sequence[Job]) -> Iterator[Any]:
                for result in super().run(jobs):
                    if jobs[0][0] == killer.method and not killer.killed:
                        # Its next job has been given to it when the first result comes.
                        self._ray.kill(self._actors[0], no_restart=False)
                        killer.killed.append(jobs[0][0])
                    yield result

        return Killing


@pytest.mark.slow
@pytest.mark.cluster
def test_two_workers_of_which_one_dies_score_as_one_here_does(
    base: Path, tmp_path: Path, embedded_ray: None
) -> None:
    with walking(base, tmp_path / "one", shares=4) as (walk, _):
        expected = walk.score_taylor(TaylorForm.MIXED)
    killer = Killer("backward")
    config = CalibrationConfig(sources=[{"path": "unread"}], workers=2)
    with walking(
        base, tmp_path / "two", shares=4, make_pool=lambda s: killer.pool()(s, config, 1)
    ) as (walk, pool):
        found = walk.score_taylor(TaylorForm.MIXED)
        assert killer.killed == ["backward"]
        with pytest.raises(lr.LoramError, match="lacks tensor model.layers.9.x.weight") as caught:
            arguments = ("model.layers.9.x", "wanda", None, 0.5, 0.01, Pattern())
            list(pool.run([("sparsify", arguments)]))
        assert "\n" not in str(caught.value)
        pool.close()
        until = time.monotonic() + 60
        with pytest.raises(lr.LoramError, match="more than .*max_failures = 3 times") as caught:
            # Ray returns from a kill before the actor is gone: a job may still succeed.
            while time.monotonic() < until:
                list(pool.run([("embed", (0,))]))
        assert "\n" not in str(caught.value)
    for layer, scores in expected.items():
        assert torch.equal(found[layer].kv_heads, scores.kv_heads)
        assert torch.equal(found[layer].neurons, scores.neurons)


def test_a_worker_says_what_is_wrong_with_its_base_when_it_is_given_a_job(tmp_path: Path) -> None:
    """What an actor's constructor raises arrives as a death, with nothing of the reason."""
    base = tiny.write_base(tmp_path / "base")
    shard = base / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-9])
    pool = InProcess(CalibrationSpec(base, "llama", tmp_path, "fp32", 2, ((0, 6),)))
    with pytest.raises(lr.LoramError, match=r"model.safetensors is not a valid"):
        list(pool.run([("forward", (1, 0, None, None, True))]))


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize(
    ("method", "settings", "killed"),
    [("taylor", {"taylor": "mixed"}, "backward"), ("sparsegpt", {"pattern": "2:4"}, "forward")],
)
def test_one_worker_two_and_one_that_dies_write_the_same_files(
    method: str,
    settings: dict[str, Any],
    killed: str,
    base: Path,
    text: Path,
    tmp_path: Path,
    embedded_ray: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = prune(base, tmp_path / "one", method, text, calibration={"workers": 1}, **settings)
    two = prune(base, tmp_path / "two", method, text, calibration={"workers": 2}, **settings)
    assert files(two) == files(one)
    assert read_manifest(two).identity == read_manifest(one).identity
    killer = Killer(killed)
    monkeypatch.setattr(pool_module, "RayPool", killer.pool())
    output = prune(base, tmp_path / "killed", method, text, calibration={"workers": 1}, **settings)
    assert killer.killed == [killed]
    assert files(output) == files(one)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_worker_s_refusal_arrives_as_one_line_and_nothing_is_left(
    text: Path, tmp_path: Path, embedded_ray: None
) -> None:
    bad = spoilt_base(tmp_path / "base", "model.layers.2.mlp.up_proj.weight", float("nan"))
    before = tiny.tree(bad)
    for method in ("sparsegpt", "taylor"):
        with pytest.raises(lr.LoramError, match=r"tensor model\.layers\.2\.mlp\.up_proj") as caught:
            prune(bad, tmp_path / "out", method, text, calibration={"workers": 2})
        assert "\n" not in str(caught.value)
        assert {path.name for path in tmp_path.iterdir()} <= {"base", ".out.work"}
    assert tiny.tree(bad) == before


@pytest.mark.cluster
def test_workers_that_the_cluster_cannot_place_are_refused(
    base: Path, text: Path, tmp_path: Path, embedded_ray: None
) -> None:
    with pytest.raises(lr.LoramError, match=r"prune.calibration.workers needs 100 CPUs"):
        prune(base, tmp_path / "out", "flap", text, calibration={"workers": 99})
    assert not (tmp_path / "out").exists()
