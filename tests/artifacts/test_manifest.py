"""Stage directories: whole or absent, never shared, checked on reading; and fingerprints."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import tiny
from loram_ray.artifacts.manifest import (
    MANIFEST_FILE,
    fingerprint,
    read_manifest,
    read_model_config,
    require_stage,
)
from loram_ray.artifacts.stage_directory import StageDirectory, StageResult, run_stage
from loram_ray.artifacts.tensorfile import Checkpoint, CheckpointWriter, TensorSpec
from loram_ray.config import PruneConfig
from loram_ray.errors import LoramError
from loram_ray.stages.prune import prune

# A process that enters a stage, says so, and then waits for a line before it goes on.
OTHER_PROCESS = """
import sys
from loram_ray.artifacts.stage_directory import run_stage

def write(target):
    (target.path / "half.bin").write_bytes(b"half")
    (target.work / "checkpoint").write_text("step 7")
    print("writing", flush=True)
    sys.stdin.readline()
    (target.path / "data.txt").write_text("whole")

run_stage(sys.argv[1], "test", {"a": 1}, {"input": "x"}, "base", write)
"""


def write_data(target: StageDirectory) -> None:
    (target.path / "data.txt").write_text("whole")


def never(target: StageDirectory) -> None:
    raise AssertionError("the stage must not run")


def stage(output: Path, write=write_data, **settings: object) -> StageResult:  # type: ignore[no-untyped-def]
    return run_stage(output, "test", settings or {"a": 1}, {"input": "x"}, "base", write)


def model_fingerprint(directory: Path) -> str:
    with Checkpoint(directory) as checkpoint:
        return fingerprint(checkpoint)


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of writing ``tmp_path/out``."""
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.communicate()


def test_a_completed_stage_leaves_its_directory_and_nothing_beside_it(tmp_path: Path) -> None:
    result = stage(tmp_path / "out")
    assert not result.skipped
    assert result.output == tmp_path / "out"
    assert set(tiny.tree(tmp_path)) == {"out", "out/data.txt", f"out/{MANIFEST_FILE}"}


def test_the_manifest_describes_every_file_by_size_and_hash(tmp_path: Path) -> None:
    def write(target: StageDirectory) -> None:
        (target.path / "deep" / "er").mkdir(parents=True)
        (target.path / "deep" / "er" / "b.bin").write_bytes(bytes(range(256)))
        (target.path / "a.txt").write_text("a")
        target.details["steps"] = 3

    stage(tmp_path / "out", write)
    said = json.loads((tmp_path / "out" / MANIFEST_FILE).read_text())
    assert said["files"] == {
        "a.txt": {"bytes": 1, "sha256": hashlib.sha256(b"a").hexdigest()},
        "deep/er/b.bin": {
            "bytes": 256,
            "sha256": hashlib.sha256(bytes(range(256))).hexdigest(),
        },
    }
    assert (said["stage"], said["settings"], said["parents"]) == ("test", {"a": 1}, {"input": "x"})
    assert (said["details"], said["base_fingerprint"]) == ({"steps": 3}, "base")
    assert said["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("error", [ValueError, LoramError, KeyboardInterrupt])
def test_a_failing_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "neighbour").write_text("mine")
    before = tiny.tree(tmp_path)

    def write(target: StageDirectory) -> None:
        write_data(target)
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        stage(tmp_path / "out", write)
    assert tiny.tree(tmp_path) == before


def test_a_failing_write_keeps_only_the_work_that_was_saved(tmp_path: Path) -> None:
    def write(target: StageDirectory) -> None:
        write_data(target)
        (target.work / "checkpoint").write_text("step 7")
        raise ValueError

    with pytest.raises(ValueError):
        stage(tmp_path / "out", write)
    assert {name.split("/")[0] for name in tiny.tree(tmp_path)} == {".out.work"}
    assert (tmp_path / ".out.work" / "checkpoint").read_text() == "step 7"


def test_the_output_is_not_there_before_it_is_whole(tmp_path: Path) -> None:
    seen = []

    def write(target: StageDirectory) -> None:
        seen.append((tmp_path / "out").exists())
        write_data(target)
        seen.append((tmp_path / "out").exists())

    stage(tmp_path / "out", write)
    assert seen == [False, False]


def test_the_same_work_is_done_once(tmp_path: Path) -> None:
    first = stage(tmp_path / "out")
    before = tiny.tree(tmp_path)
    again = stage(tmp_path / "out", never)
    assert again.skipped
    assert again.manifest == first.manifest
    assert tiny.tree(tmp_path) == before


@pytest.mark.parametrize(
    "changed",
    [
        {"settings": {"a": 2}},
        {"parents": {"input": "y"}},
        {"stage": "other"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_work_in_a_full_directory_is_refused(
    tmp_path: Path, changed: dict[str, object]
) -> None:
    stage(tmp_path / "out")
    before = tiny.tree(tmp_path)
    call = {"stage": "test", "settings": {"a": 1}, "parents": {"input": "x"}, **changed}
    with pytest.raises(
        LoramError, match=r"output must be a new or empty directory, but .*out contains"
    ):
        run_stage(tmp_path / "out", base_fingerprint="base", write=never, **call)  # type: ignore[arg-type]
    assert tiny.tree(tmp_path) == before


def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    before = tiny.tree(tmp_path)
    with pytest.raises(LoramError, match="choose another output or move it away"):
        stage(tmp_path / "out", never)
    assert tiny.tree(tmp_path) == before


def test_a_file_in_the_output_s_place_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(LoramError, match="must be a new or empty directory"):
        stage(tmp_path / "out", never)
    assert tiny.tree(tmp_path) == {"out": hashlib.sha256(b"a file").hexdigest()}


def test_a_file_among_the_output_s_parents_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(LoramError, match="cannot be written"):
        stage(tmp_path / "file" / "out", never)


def test_an_empty_directory_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert not stage(tmp_path / "out").skipped
    assert not stage(tmp_path / "new" / "parents" / "out").skipped


def test_the_current_directory_is_refused_though_it_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for output in (Path("."), tmp_path):
        with pytest.raises(LoramError, match="must not be the current directory"):
            stage(output, never)


def test_a_second_process_is_refused_until_the_first_is_done(
    tmp_path: Path, other_process: subprocess.Popen[str]
) -> None:
    before = tiny.tree(tmp_path)
    with pytest.raises(LoramError, match=r"out is being written by another process; wait for it"):
        stage(tmp_path / "out", never)
    assert tiny.tree(tmp_path) == before
    other_process.communicate("go on\n")
    assert other_process.returncode == 0
    assert stage(tmp_path / "out", never).skipped


def test_what_a_killed_process_left_is_never_whole_and_is_cleaned_away(
    tmp_path: Path, other_process: subprocess.Popen[str]
) -> None:
    other_process.send_signal(signal.SIGKILL)
    assert other_process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / "half.bin").exists()
    with pytest.raises(LoramError, match="no manifest"):
        require_stage(tmp_path / ".out.partial", ("test",), "key")
    found = {}

    def write(target: StageDirectory) -> None:
        found["partial"] = sorted(path.name for path in target.path.iterdir())
        found["work"] = (target.work / "checkpoint").read_text()
        write_data(target)

    assert not stage(tmp_path / "out", write).skipped
    assert found == {"partial": [], "work": "step 7"}
    assert set(tiny.tree(tmp_path)) == {"out", "out/data.txt", f"out/{MANIFEST_FILE}"}


def test_work_is_cleared_for_other_settings(tmp_path: Path) -> None:
    def interrupted(target: StageDirectory) -> None:
        (target.work / "checkpoint").write_text("step 7")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "out", interrupted, a=1)
    found = []

    def write(target: StageDirectory) -> None:
        found.append((target.work / "checkpoint").exists())
        write_data(target)

    stage(tmp_path / "out", write, a=2)
    assert found == [False]


def test_require_stage_returns_the_manifest_of_a_sound_directory(tmp_path: Path) -> None:
    written = stage(tmp_path / "out").manifest
    assert require_stage(tmp_path / "out", ("other", "test"), "key") == written


def test_equal_content_has_equal_digests_whenever_and_wherever_it_was_made(tmp_path: Path) -> None:
    first = stage(tmp_path / "one").manifest
    second = stage(tmp_path / "two", a=5).manifest
    assert first.digest == second.digest

    def write(target: StageDirectory) -> None:
        (target.path / "data.txt").write_text("Whole")

    assert stage(tmp_path / "three", write).manifest.digest != first.digest


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: os.truncate(path, 3), "has 3 bytes, but its manifest lists 5 bytes"),
        (lambda path: path.write_bytes(b"whold"), "does not match the SHA-256 in its manifest"),
    ],
    ids=["missing", "truncated", "one bit flipped"],
)
def test_require_stage_refuses_a_damaged_file(tmp_path: Path, damage, told: str) -> None:  # type: ignore[no-untyped-def]
    stage(tmp_path / "out")
    damage(tmp_path / "out" / "data.txt")
    with pytest.raises(LoramError, match=f"data.txt {told}.*; copy it again"):
        require_stage(tmp_path / "out", ("test",), "key")


def test_require_stage_refuses_other_stages_and_plain_directories(tmp_path: Path) -> None:
    stage(tmp_path / "out")
    with pytest.raises(LoramError, match=r"align.pruned must be .* written by prune or align, "):
        require_stage(tmp_path / "out", ("prune", "align"), "align.pruned")
    with pytest.raises(LoramError, match="contains no manifest.json; run loram prune first"):
        require_stage(tmp_path, ("prune",), "align.pruned")
    with pytest.raises(LoramError, match="contains no manifest.json"):
        require_stage(tmp_path / "absent", ("prune",), "align.pruned")


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "a web page"}', "null"])
def test_a_manifest_that_is_none_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST_FILE).write_text(content)
    with pytest.raises(LoramError, match="is not a manifest"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", '"llama"'])
def test_a_model_config_that_is_none_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(LoramError, match="download it again"):
        read_model_config(tmp_path)
    with pytest.raises(LoramError, match="use a model directory"):
        read_model_config(tmp_path / "config.json")


def test_fingerprint_survives_copying_and_resharding(base: Path, tmp_path: Path) -> None:
    expected = model_fingerprint(base)
    shutil.copytree(base, tmp_path / "copy")
    assert model_fingerprint(tmp_path / "copy") == expected
    sharded = tiny.write_base(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert model_fingerprint(sharded) == expected


def test_fingerprint_ignores_where_the_config_says_it_came_from(base: Path, tmp_path: Path) -> None:
    expected = model_fingerprint(base)
    copy = shutil.copytree(base, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config = dict(reversed(config.items())) | {"_name_or_path": "x", "transformers_version": "9"}
    (copy / "config.json").write_text(json.dumps(config))
    assert model_fingerprint(copy) == expected


@pytest.mark.parametrize(
    "tensor",
    ["model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight", "model.norm.weight"],
)
def test_fingerprint_tells_apart_models_that_differ_in_one_value(
    base: Path, tmp_path: Path, tensor: str
) -> None:
    copy = shutil.copytree(base, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    weights[tensor].view(-1)[0] += 1e-3
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert model_fingerprint(copy) != model_fingerprint(base)


def test_fingerprint_tells_apart_two_fine_tunes(base: Path, tmp_path: Path) -> None:
    seen = {model_fingerprint(base)}
    for seed in (1, 2):
        copy = shutil.copytree(base, tmp_path / str(seed))
        weights = load_file(copy / "model.safetensors")
        generator = torch.Generator().manual_seed(seed)
        for value in weights.values():
            value += 1e-4 * torch.randn(value.shape, generator=generator)
        save_file(weights, copy / "model.safetensors", {"format": "pt"})
        seen.add(model_fingerprint(copy))
    assert len(seen) == 3


def test_fingerprint_tells_apart_config_dtype_and_names(base: Path, tmp_path: Path) -> None:
    seen = {model_fingerprint(base)}
    configured = shutil.copytree(base, tmp_path / "configured")
    config = json.loads((configured / "config.json").read_text())
    (configured / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    seen.add(model_fingerprint(configured))
    weights = load_file(base / "model.safetensors")
    for name, changed in {
        "bf16": {name: value.bfloat16() for name, value in weights.items()},
        # zeros have the same bytes in any dtype and shape
        "zeros": {name: torch.zeros_like(value) for name, value in weights.items()},
        "int zeros": {name: torch.zeros_like(v, dtype=torch.int32) for name, v in weights.items()},
        "flat zeros": {name: torch.zeros_like(value).view(-1) for name, value in weights.items()},
        "renamed": {f"x.{name}": torch.zeros_like(value) for name, value in weights.items()},
    }.items():
        copy = shutil.copytree(base, tmp_path / name)
        save_file(changed, copy / "model.safetensors", {"format": "pt"})
        seen.add(model_fingerprint(copy))
    assert len(seen) == 7


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 400 KB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    with tiny.disk(directory, "400k"):
        yield directory


def test_a_disk_too_small_is_told_before_anything_is_written(base: Path, small_disk: Path) -> None:
    assert (base / "model.safetensors").stat().st_size > 400_000
    config = PruneConfig(base=str(base), output=small_disk / "pruned", ratio=0.0, layers=(1, 3))
    with pytest.raises(
        LoramError, match=r"needs 0\.\d MB of free disk space, but 0\.4 MB are free; free some"
    ):
        prune(config)
    assert tiny.tree(small_disk) == {}


def test_a_disk_that_fills_while_weights_are_written_is_told(small_disk: Path) -> None:
    def write(target: StageDirectory) -> None:
        shape = (64, 1024)
        specs = {f"t{i}": TensorSpec(shape, torch.float32) for i in range(4)}
        with CheckpointWriter(target.path, specs) as writer:
            for name in specs:
                writer.write(name, torch.zeros(shape))

    with pytest.raises(
        LoramError, match=r"the disk of .*out is full; nothing incomplete was left"
    ) as caught:
        stage(small_disk / "out", write)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert tiny.tree(small_disk) == {}


def test_a_disk_that_fills_before_the_manifest_is_told(small_disk: Path) -> None:
    def write(target: StageDirectory) -> None:
        with open(target.path / "data", "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC

    with pytest.raises(LoramError, match="is full"):
        stage(small_disk / "out", write)
    assert tiny.tree(small_disk) == {}


def test_a_full_disk_does_not_hide_what_was_there(small_disk: Path) -> None:
    stage(small_disk / "first")
    before = tiny.tree(small_disk)

    def write(target: StageDirectory) -> None:
        (target.path / "data").write_bytes(bytes(10**6))

    with pytest.raises(LoramError, match="is full"):
        stage(small_disk / "second", write)
    assert tiny.tree(small_disk) == before
    assert not stage(small_disk / "second").skipped


def test_no_secret_of_the_environment_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY"):
        monkeypatch.setenv(name, f"secret-value-of-{name.lower()}")
    prune(PruneConfig(base=str(base), output=tmp_path / "pruned", ratio=0.5, layers=(1, 3)))
    files = [path for path in (tmp_path / "pruned").rglob("*") if path.is_file()]
    assert tmp_path / "pruned" / MANIFEST_FILE in files
    for path in files:
        content = path.read_bytes()
        assert b"secret-value-of" not in content
        assert b"HF_TOKEN" not in content
