"""The ``loram`` command in processes of its own: a mistake is one line, exit code 2, no change."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml

from helpers import adapters, tiny
from helpers.processes import COMMAND, ENVIRONMENT
from loram_ray.config import STAGES, PruneConfig, RunConfig
from loram_ray.config.flags import option_of
from loram_ray.runtime.interruption import CONTINUE
from loram_ray.stages.prune import prune

# Importing transformers takes seconds. This process does it once and forks for each command.
FORKING = """
import json, os, sys
import loram_ray.stages.evaluate, loram_ray.stages.prune, loram_ray.stages.recover
from loram_ray.cli import main as cli

for line in sys.stdin:
    folder, arguments, *outputs = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        for number, path in enumerate(outputs, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = ["loram", *arguments]
        cli.main()
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def loram(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    with start(folder, *arguments) as process:
        out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """`loram` as a child of a process that has imported the stages."""
    outputs = [tmp_path_factory.mktemp("outputs") / name for name in ("stdout", "stderr")]

    def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([str(folder), arguments, *map(str, outputs)]) + "\n")
        process.stdin.flush()
        code = int(process.stdout.readline())
        out, err = (path.read_text() for path in outputs)
        return subprocess.CompletedProcess(arguments, code, out, err)

    with subprocess.Popen(
        [sys.executable, "-c", FORKING],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield run


def refusal(folder: Path, *arguments: str, run: Run = loram) -> str:
    """The one line of a refused command that must have written nothing."""
    before = tiny.tree(folder)
    done = run(folder, *arguments)
    assert tiny.tree(folder) == before
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("loram: ")
    return line.removeprefix("loram: ")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases of the same shapes, one sharded; and an adapter trained on the first, pruned."""
    folder = tmp_path_factory.mktemp("bases")
    tiny.write_base(folder / "base", seed=0, max_shard_size="200KB", kv_heads=8)
    tiny.write_base(folder / "other", seed=1, kv_heads=8)
    pruned = prune(
        PruneConfig(base=str(folder / "base"), output=folder / "pruned", ratio=0.5, layers=(1, 3))
    )
    adapters.train_randomly(pruned.output, folder / "adapter_pruned")
    return folder


@pytest.fixture
def folder(tmp_path: Path, bases: Path) -> Path:
    """A folder with a run file, data and the bases; what a user's mistakes are made in."""
    for path in bases.iterdir():
        shutil.copytree(path, tmp_path / path.name)
    tiny.write_jsonl(tmp_path / "text.jsonl", tiny.texts(20))
    tiny.write_jsonl(tmp_path / "data.jsonl", tiny.questions(8))
    settings = {
        "base": "base",
        "output": "out",
        "prune": {"ratio": 0.5, "layers": [1, 3]},
        "align": {
            "pruned": "pruned",
            "corpus": {"sources": [{"path": "text.jsonl"}], "sequence_length": 32},
            "steps": 2,
            "batch_size": 2,
            "micro_batch_size": 2,
        },
        "train": {"model": "pruned", "data": "data.jsonl", "steps": 2, "cpus": 1},
        "recover": {"adapter": "adapter_pruned"},
        "evaluate": {
            "data": "data.jsonl",
            "adapter": None,
            "cpus_per_worker": 1,
            "precision": "fp32",
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    """A folder with nothing but a run file."""
    settings = {"base": "base", "output": "out", "prune": {"ratio": 0.5}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["prune", "--config", "absent.yaml"], "--config absent.yaml does not exist; check the"),
        (["prune", "--config", "."], "--config . must be a regular file, got a directory"),
        (["run", "--config", "list.yaml"], "--config list.yaml must contain keys and values; see"),
        (["run", "--config", "bad.yaml"], "--config bad.yaml is not valid YAML: "),
        (
            ["prune", "--config", "run.yaml", "--set", "prune.ration=0.5"],
            "run.yaml: prune.ration is not a known key; did you mean 'ratio'?",
        ),
        (
            ["prune", "--config", "run.yaml", "--set", "prune.ratio=1.5"],
            "run.yaml: prune.ratio must be less than 1, got 1.5; change the value",
        ),
        (
            ["train", "--config", "run.yaml", "--set", "train.steps=5"],
            "run.yaml: train.data must be given; add it to the config or pass --data",
        ),
        (
            ["merge", "--config", "run.yaml"],
            "merge must be a section of the config; add 'merge:' to it",
        ),
        (["prune", "--set", "prune"], "--set must be key=value, got 'prune'; e.g. --set"),
        (
            ["prune", "--set", "output=out"],
            "--set: prune.base must be given; add it to the config or pass --base",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_the_configuration_is_one_line(
    config_only: Path, arguments: list[str], told: str
) -> None:
    (config_only / "list.yaml").write_text("- base\n")
    (config_only / "bad.yaml").write_text("base: [unclosed\n")
    assert refusal(config_only, *arguments).startswith(told)


def unsupported(folder: Path) -> None:
    path = folder / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mamba"}))


def truncated(folder: Path) -> None:
    shard = sorted((folder / "base").glob("model-*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1)


def corrupt_header(folder: Path) -> None:
    shard = sorted((folder / "base").glob("model-*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[12:20] = b"\xff" * 8
    shard.write_bytes(content)


def occupied(folder: Path) -> None:
    (folder / "out" / "pruned").mkdir(parents=True)
    (folder / "out" / "pruned" / "thesis.tex").write_text("years of work")


def nothing(folder: Path) -> None:
    """The mistake is in the configuration."""


@pytest.mark.parametrize(
    ("mistake", "arguments", "told"),
    [
        (
            nothing,
            ["prune", "--set", "prune.ratio=0.9"],
            "prune.ratio must keep at least one of 8 KV heads and one of 96 neurons, but 0.9 keeps",
        ),
        (
            nothing,
            ["prune", "--set", "prune.layers=[2, 9]"],
            "prune.layers must satisfy 0 <= first < end <= 4 (the model's layers), got [2, 9]",
        ),
        (unsupported, ["prune"], "the base's model_type must be one of [llama, mistral, qwen2, "),
        (truncated, ["prune"], "base/model-00002-of-"),
        (corrupt_header, ["prune"], "base/model-00002-of-"),
        (
            occupied,
            ["prune"],
            "prune.output must be a new or empty directory, but out/pruned contains",
        ),
        (
            nothing,
            ["recover", "--set", "recover.base=other"],
            "recover.base other has fingerprint ",
        ),
        (
            nothing,
            [
                "evaluate",
                "--set",
                "evaluate.model=other",
                "--set",
                "evaluate.adapter=adapter_pruned",
            ],
            "evaluate.adapter must belong to evaluate.model's base, but adapter_pruned is for",
        ),
    ],
    ids=[
        "a ratio that leaves no KV head",
        "layers outside the model",
        "an unsupported architecture",
        "a truncated shard",
        "a corrupt shard header",
        "an occupied output",
        "recovery for another base",
        "evaluation on another base",
    ],
)
def test_a_mistake_in_the_inputs_is_one_line(
    folder: Path,
    forked: Run,
    mistake: Callable[[Path], None],
    arguments: list[str],
    told: str,
) -> None:
    mistake(folder)
    line = refusal(folder, *arguments, "--config", "run.yaml", run=forked)
    assert line.startswith(told)
    assert "; " in line  # the remedy
    if mistake in (truncated, corrupt_header):
        assert "is not a valid safetensors file: " in line
        assert line.endswith("; copy or download it again")


def refused_by_a_worker(folder: Path, *arguments: str) -> str:
    """The line of a command refused at work: hidden work directories may stay, nothing else."""
    before = tiny.tree(folder)
    done = loram(folder, *arguments, "--config", "run.yaml")
    new = [Path(name) for name in tiny.tree(folder) if name not in before]
    assert all(path == Path("out") or path.parts[1].endswith(".work") for path in new), new
    assert {name: tiny.tree(folder)[name] for name in before} == before
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    progress = tuple(f"{stage:<10} " for stage in ("corpus", "align", "train"))
    [line] = [line for line in lines if not line.startswith(progress)]
    assert line.startswith("loram: ")
    return line.removeprefix("loram: ")


@pytest.mark.timeout(300)
def test_an_empty_corpus_is_one_line(folder: Path) -> None:
    (folder / "text.jsonl").write_text("")
    line = refusal(folder, "align", "--config", "run.yaml")
    assert line == "align.corpus.sources must contain text, but every file is empty; add some"


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_json_lines_cut_in_the_middle_are_one_line(folder: Path) -> None:
    path = folder / "text.jsonl"
    path.write_text(path.read_text()[:-30])
    line = refused_by_a_worker(folder, "align")
    assert line.startswith("align.corpus.max_bad_share must be at least the share of bad rows, got")
    assert "0.01 with 1 bad of 20: " in line
    assert f"{path}:20: not JSON" in line
    assert line.endswith("; fix the rows or raise it")


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_examples_without_an_answer_are_one_line(folder: Path) -> None:
    with open(folder / "data.jsonl", "a") as file:
        file.write('{"prompt": "1+1=", "completion": ""}\n')
    line = refused_by_a_worker(folder, "train")
    assert line.startswith("train.max_bad_share must be at least the share of bad rows, got 0.01")
    assert "data.jsonl:9: no answer" in line


def test_debug_shows_the_traceback_and_keeps_the_exit_code(config_only: Path) -> None:
    done = loram(config_only, "prune", "--config", "absent.yaml", "--debug")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("loram: --config absent.yaml does not exist")


def test_unknown_options_are_bad_arguments(config_only: Path) -> None:
    done = loram(config_only, "prune", "--ratoi", "0.5")
    assert done.returncode == 2
    assert done.stderr.startswith("loram: No such option: --ratoi (Possible options: ")
    assert "Traceback" not in done.stderr


def test_an_interrupted_command_says_how_to_go_on(config_only: Path) -> None:
    os.mkfifo(config_only / "pipe.yaml")
    was = signal.signal(signal.SIGINT, signal.default_int_handler)  # children keep "ignored"
    with start(config_only, "prune", "--config", "pipe.yaml") as process:
        signal.signal(signal.SIGINT, was)
        with open(config_only / "pipe.yaml", "w"):  # opens when the command has begun to read
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err) == ("", f"loram: interrupted by SIGINT; {CONTINUE}\n")


def keys_of(stage: str) -> list[str]:
    """Dotted keys of a section from pydantic's own JSON schema."""
    schema = RunConfig.model_json_schema()

    def walk(node: dict[str, object], prefix: str) -> list[str]:
        if "$ref" in node:
            node = schema["$defs"][str(node["$ref"]).rsplit("/", 1)[-1]]
        for option in (*node.get("anyOf", []), *node.get("allOf", [])):  # type: ignore[misc]
            if "$ref" in option:
                return walk(option, prefix)
        if "$ref" in (items := node.get("items", {})):  # type: ignore[operator]
            return [prefix, *walk(items, f"{prefix}.N")]  # type: ignore[arg-type]
        if "properties" not in node:
            return [prefix]
        properties: dict[str, dict[str, object]] = node["properties"]  # type: ignore[assignment]
        return [key for name in properties for key in walk(properties[name], f"{prefix}.{name}")]

    return walk(schema["properties"][stage], stage)


@pytest.mark.parametrize("stage", STAGES)
def test_help_mentions_every_key_of_the_section(tmp_path: Path, stage: str) -> None:
    done = loram(tmp_path, stage, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    words = set(done.stdout.split())
    keys = [key.removeprefix(f"{stage}.") for key in keys_of(stage)]
    assert len(keys) >= 3
    assert {option_of(key) for key in keys if ".N" not in key} <= words
    assert {key for key in keys if ".N" in key} <= words  # of the items of lists
    assert {"--config", "--set", "--json", "--debug", "Example:"} <= words


def test_help_of_run_mentions_what_all_stages_share(tmp_path: Path) -> None:
    words = set(loram(tmp_path, "run", "--help").stdout.split())
    keys = ("base", "output", *keys_of("ray"))
    assert {option_of(key) for key in keys} <= words


def test_help_without_arguments_lists_every_command(tmp_path: Path) -> None:
    done = loram(tmp_path, "--help")
    assert done.returncode == 0
    assert {*STAGES, "run"} <= set(done.stdout.split())
    alone = loram(tmp_path)
    assert alone.returncode == 2
    assert {*STAGES, "run"} <= set((alone.stdout + alone.stderr).split())


def test_the_installed_command_is_this_one() -> None:
    [script] = entry_points(group="console_scripts", name="loram")
    assert script.value == "loram_ray.cli.__main__:main"


def test_json_is_all_that_stands_on_standard_output(folder: Path) -> None:
    done = loram(folder, "recover", "--config", "run.yaml", "--json")
    assert done.returncode == 0
    said = json.loads(done.stdout)
    manifest = json.loads((folder / "out" / "adapter" / "manifest.json").read_text())
    assert said == {"output": "out/adapter", **manifest}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_json_is_all_that_stands_on_standard_output_with_ray(folder: Path) -> None:
    done = loram(folder, "evaluate", "--config", "run.yaml", "--json", "--set", "evaluate.limit=3")
    assert done.returncode == 0
    assert all(line.startswith("evaluate   ") for line in done.stderr.splitlines())  # progress
    said = json.loads(done.stdout)
    scores = json.loads((folder / "out" / "evaluation" / "loram" / "scores.json").read_text())
    assert said["details"] == scores
    assert scores["examples"] == 3


@pytest.mark.timeout(120)
def test_what_ray_says_of_its_nodes_stays_off_standard_output(tmp_path: Path) -> None:
    code = """
import io, sys, time
import ray
from ray._private.utils import publish_error_to_driver
from loram_ray.runtime.cluster import ray_session
from loram_ray.config import RayConfig
sys.stderr, deadline = io.StringIO(), time.monotonic() + 60
with ray_session(RayConfig(num_cpus=1)):
    gcs = ray._private.worker.global_worker.gcs_client
    publish_error_to_driver("node_removed", "a node was marked dead", gcs)
    while "marked dead" not in sys.stderr.getvalue():  # it comes by way of the head
        assert time.monotonic() < deadline
        time.sleep(0.1)
print("{}")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "{}\n"


PURE = [
    "plan",
    "recovery.scatter",
    "recovery.correction",
    "artifacts.tensorfile",
    "architectures",
    "pruning.random_scores",
]


def test_the_mathematics_imports_no_ray_no_deepspeed_and_no_command(tmp_path: Path) -> None:
    code = "import sys\n" + "".join(f"import loram_ray.{module}\n" for module in PURE)
    code += "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    imported = set(done.stdout.split())
    assert {"loram_ray", "torch"} <= imported
    assert not {"ray", "deepspeed", "typer", "rich", "pydantic"} & imported


def test_importing_the_package_is_light(tmp_path: Path) -> None:
    code = "import sys, loram_ray; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "ray", "deepspeed", "typer"} & set(done.stdout.split())
