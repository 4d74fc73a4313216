"""The commands and code of the documents, and the shipped configurations, run as they are written.

A block that cannot run here has a comment above it, ``<!-- not run: REASON -->``; it is checked
instead: commands are parsed and their settings validated.
"""

import contextlib
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import local_cluster
import pytest
import typer
import yaml

import loram_ray
from helpers import hub, tiny
from loram_ray.cli.commands import given_flags
from loram_ray.cli.main import app
from loram_ray.commands import COMMAND_OF
from loram_ray.config import (
    STAGES,
    RunConfig,
    Section,
    kind_of,
    load_command,
    load_run,
    section_types,
    validate,
)
from loram_ray.config.evaluate import BenchmarkConfig
from loram_ray.criteria import CRITERIA

REPOSITORY = Path(__file__).parents[1]
CONFIGS = sorted((REPOSITORY / "jobs" / "configs").glob("*.yaml"))
LORAM = Path(sys.executable).with_name("loram")
PAGES = [
    REPOSITORY / "README.md",
    *(
        path
        for kind in ("tutorials", "how-to", "reference", "explanation", ".")
        for path in sorted((REPOSITORY / "docs" / kind).glob("*.md"))
    ),
    REPOSITORY / "CONTRIBUTING.md",
]
"""What is run, in the order of running: the README's and the demo's commands come first."""
CHECKED = [
    REPOSITORY / "cluster" / "README.md",
    *sorted((REPOSITORY / "tests" / "benchmarks").rglob("*.md")),
]
"""What is only checked: the commands that made the recorded results run for hours."""
ELSEWHERE = ("make ", "pip install ", "python3 -m venv ", ". ")
"""Commands that other tests, or the workflow, run."""
OF_PROGRAMS = "runs/mine/"
"""Where the documents' programs write: commands that read it run after the programs."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    page: str
    line: int
    language: str
    text: str
    runs: bool

    @property
    def commands(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.strip()]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(path: Path, language: str) -> Iterator[Block]:
    text = path.read_text()
    for match in re.finditer(r"(<!-- not run: .+? -->\s*\n)?```(\w+)\n(.*?)```", text, re.DOTALL):
        line = text.count("\n", 0, match.start()) + 1
        if match[2] == language:
            page = str(path.relative_to(REPOSITORY))
            yield Block(page, line, language, match[3], runs=match[1] is None)


def blocks(language: str) -> list[Block]:
    return [block for path in PAGES for block in blocks_of(path, language)]


def run_commands() -> dict[str, Block]:
    """Commands that are run, each once, with the block that has it first; a cluster's come last."""
    found: dict[str, Block] = {}
    for block in blocks("sh"):
        for command in block.commands if block.runs else ():
            if not command.startswith(ELSEWHERE):
                found.setdefault(command, block)
    on_cluster = {c: b for c, b in found.items() if c.startswith(("loram submit", "loram jobs"))}
    return {c: b for c, b in found.items() if c not in on_cluster} | on_cluster


def arguments_of(command: str) -> list[str]:
    """A command's words, with the programs of this checkout and environment."""
    program, *arguments = shlex.split(command)
    if program == "python":
        return [sys.executable, str(REPOSITORY / arguments[0]), *arguments[1:]]
    assert program == "loram", command
    return [str(LORAM), *arguments]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the paths of the README: the demo's, a tiny model in it, few steps."""
    folder = tmp_path_factory.mktemp("readme")
    inputs = folder / "runs" / "demo" / "inputs"
    inputs.mkdir(parents=True)
    tiny.write_base(inputs / "base", layers=30)
    tiny.write_jsonl(inputs / "train.jsonl", tiny.questions())
    tiny.write_jsonl(inputs / "test.jsonl", tiny.questions(8))
    tiny.write_jsonl(inputs / "problems_train.jsonl", tiny.questions())
    tiny.write_jsonl(inputs / "problems_test.jsonl", tiny.questions(8))
    tiny.write_jsonl(inputs / "text.jsonl", tiny.texts(400))
    (folder / "jobs" / "configs").mkdir(parents=True)
    for path in CONFIGS:
        shipped = yaml.safe_load(path.read_text())
        if shipped["base"] != "runs/demo/inputs/base":  # a large model's, of which only plan runs
            shutil.copy(path, folder / "jobs" / "configs")
            continue
        if "batch" in shipped:
            shipped["batch"]["train"].update(steps=2)
        elif "sweep" in shipped:
            shipped["sweep"]["train"].update(steps=2, evaluate_every=1)
            shipped["sweep"].update(trials=3)
        elif "compare" in shipped:
            shipped["align"].update(steps=2)
            shipped["train"].update(steps=2)
            shipped["evaluate"].update(max_new_tokens=2)
            demo = path.stem == "demo"
            shipped["compare"]["systems"] = ["base", "loram" if demo else "unaligned"]
            shipped["compare"]["tasks"] = {"sums": shipped["compare"]["tasks"]["sums"]}
        else:
            shipped["align"].update(steps=2, checkpoint_every=1)
            if "train" in shipped:
                shipped["train"].update(steps=2)
                shipped["evaluate"].update(max_new_tokens=2)
            if "calibration" in shipped["prune"]:
                shipped["prune"]["calibration"].update(samples=4, sequence_length=32)
        (folder / "jobs" / "configs" / path.name).write_text(yaml.safe_dump(shipped))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_every_command_and_program_of_the_documents_succeeds(checkout: Path) -> None:
    with hub.serve() as server, contextlib.ExitStack() as stack:
        environment = {**os.environ, **hub.client(server, checkout)}
        cluster: local_cluster.Local | None = None
        for command, block in run_commands().items():
            if OF_PROGRAMS in command:
                continue
            arguments = arguments_of(command)
            if arguments[1] in ("submit", "jobs") and cluster is None:  # as make cluster starts it
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loram-")))
                cluster = stack.enter_context(local_cluster.cluster(folder))
                environment |= cluster.environment
                environment["RAY_API_SERVER_ADDRESS"] = cluster.dashboard
            run_command(command, block, checkout, environment)
    assert "pruning_plan.safetensors" in server.repositories["owner/name"].files()
    table = json.loads((checkout / "runs" / "demo" / "results.json").read_text())["rows"]
    assert [row["name"] for row in table] == ["LoRAM"]
    tasks = json.loads((checkout / "runs" / "demo" / "batch" / "results.json").read_text())
    assert [task["state"] for task in tasks] == ["skipped"] * 3  # by the job, after the command
    assert all((checkout / task["adapter"] / "adapter_config.json").exists() for task in tasks)
    trials = json.loads((checkout / "runs" / "demo" / "sweep" / "results.json").read_text())
    assert len(trials) == 3 and [trial["best"] for trial in trials].count(True) == 1
    page = (checkout / "runs" / "compare" / "comparison" / "comparison.md").read_text()
    assert "LoRAM without alignment" in page
    compared = json.loads((checkout / "runs/demo/comparison/results.json").read_text())
    assert [row["system"] for row in compared] == ["base", "loram"]
    assert compared[1]["mean"] == table[0]["answer_perplexity"]
    run_programs(checkout)
    of_programs = {c: block for c, block in run_commands().items() if OF_PROGRAMS in c}
    assert of_programs
    for command, block in of_programs.items():
        run_command(command, block, checkout, dict(os.environ))


def run_command(command: str, block: Block, folder: Path, environment: dict[str, str]) -> None:
    """Run a command of the documents in a checkout, with the environment's variables."""
    arguments = arguments_of(command)
    started = time.monotonic()
    done = subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, f"{block}: {command}\n{done.stdout}\n{done.stderr}"
    print(f"{time.monotonic() - started:6.1f} s  {command}")
    if "--json" in arguments:
        assert json.loads(done.stdout)


def run_programs(folder: Path) -> None:
    """Run the Python blocks of each page in one process, each with names of its own."""
    for path in PAGES:
        found = [block for block in blocks_of(path, "python") if block.runs]
        if not found:
            continue
        lines = [f"exec(compile({b.text!r}, {str(b)!r}, 'exec'), {{}})" for b in found]
        code = "\n".join(lines)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{path}\n{done.stdout}\n{done.stderr}"


def test_commands_that_are_run_are_those_of_this_package() -> None:
    found = run_commands()
    assert len([command for command in found if command.startswith("loram ")]) >= 20
    for command, block in found.items():
        assert command.startswith(("loram ", "python jobs/")), f"{block}: say why it is not run"


def test_commands_that_are_not_run_have_known_options_and_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(REPOSITORY)
    found = [block for block in blocks("sh") if not block.runs]
    found += [block for path in CHECKED for block in blocks_of(path, "sh")]
    assert len(found) >= 8
    for command, page in [(command, str(block)) for block in found for command in block.commands]:
        program, *arguments = shlex.split(command)
        if program == "loram":
            require_known(arguments)
        for word in arguments:
            if re.fullmatch(r"(jobs|cluster|tests)/[\w./-]+", word):
                assert (REPOSITORY / word).exists(), f"{page}: {word}"


def require_known(arguments: list[str]) -> None:
    """Parse a command of the package as it would be, and validate its settings."""
    command = typer.main.get_command(app)
    context = command.make_context("loram", list(arguments))
    name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    parsed = found.make_context(name, rest, parent=context).params
    overrides = list(parsed.get("overrides") or ())
    if name in COMMAND_OF:
        flags = given_flags(COMMAND_OF[name], parsed)
        load_command(COMMAND_OF[name], parsed["config"], overrides, flags)
    elif parsed.get("config") is not None:
        load_run(parsed["config"], overrides)


def test_commands_named_in_sentences_exist() -> None:
    known = set(typer.main.get_command(app).commands)
    for path in (*PAGES, *CHECKED, REPOSITORY / "CHANGELOG.md"):
        for name in re.findall(r"`loram ([a-z]\w*)", path.read_text()):
            assert name in known, f"{path.name}: loram {name}"


def test_python_of_the_documents_compiles() -> None:
    assert len(blocks("python")) >= 6
    for block in blocks("python"):
        compile(block.text, str(block), "exec")


def test_yaml_and_json_of_the_documents_are_valid() -> None:
    found = blocks("yaml")
    assert len(found) >= 6
    for block in found:
        data = {"base": "b", "output": "o", **yaml.safe_load(block.text)}
        validate(RunConfig, data, str(block))
    for block in blocks("json"):
        for line in block.commands:
            json.loads(line)


def test_every_make_target_of_the_documents_and_ci_exists() -> None:
    texts = [path.read_text() for path in (*PAGES, REPOSITORY / ".ci" / "run")]
    named = set(re.findall(r"(?:^|`)make\s(\w+)", "\n".join(texts), flags=re.MULTILINE))
    assert {"demo", "test", "lint", "bench", "slow", "docs"} <= named
    for target in named:
        done = subprocess.run(["make", "-n", target], cwd=REPOSITORY, capture_output=True)
        assert done.returncode == 0, target


def test_targets_and_versions_of_the_workflow_are_those_of_the_project() -> None:
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())
    runs = [
        step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step
    ]
    for command in runs:
        target = re.fullmatch(r"make (\w+) PYTHON=python", command)
        assert target, command
        done = subprocess.run(["make", "-n", target[1]], cwd=REPOSITORY, capture_output=True)
        assert done.returncode == 0, command
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    named = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    assert project["requires-python"] == f">={named[0]}"
    first = ", ".join(named[:-1])
    assert f"Python {first} or {named[-1]}" in (REPOSITORY / "docs/how-to/install.md").read_text()
    for job in ("test", "wheel"):
        assert workflow["jobs"][job]["strategy"]["matrix"]["python-version"] == named
    assert {"lint", "test", "docs", "wheel"} == set(workflow["jobs"])
    assert all(job["timeout-minutes"] <= 60 for job in workflow["jobs"].values())
    assert workflow["permissions"] == {"contents": "read"}


def test_every_extra_is_documented() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    pattern = r"loram-ray\[([\w-]+)\]"
    known = set(extras["optional-dependencies"])
    assert {name for path in PAGES for name in re.findall(pattern, path.read_text())} <= known
    assert set(re.findall(pattern, (REPOSITORY / "docs/how-to/install.md").read_text())) == known


def test_links_of_the_documents_lead_to_files() -> None:
    for path in (*PAGES, *CHECKED):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            if (path.parent / link).exists():
                continue
            made = {"reference/configuration.md"}  # by docs/hooks.py
            place = os.path.relpath(path.parent / link, REPOSITORY / "docs")
            assert place in made, f"{path.name}: {link}"


def test_reference_pages_list_what_the_package_has() -> None:
    reference = REPOSITORY / "docs" / "reference"
    rows = re.findall(r"^\| `(\w+)`.*?\| (.*?) \|", (reference / "criteria.md").read_text(), re.M)
    patterns = {
        name: ", ".join(
            [*(["structured"] if c.units else []), *(["unstructured, n:m"] if c.weights else [])]
        )
        for name, c in CRITERIA.items()
    }
    assert {name: patterns for name, patterns in rows if name in CRITERIA} == patterns
    kinds = {kind_of(section) for section in section_types(BenchmarkConfig)}
    page = (reference / "evaluation.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) - {"kind"} == kinds
    documented = re.findall(
        r"^::: loram_ray\.[\w.]+\.(\w+)$", (reference / "api.md").read_text(), re.M
    )
    assert set(loram_ray.__all__) <= set(documented)
    named = set(re.findall(r"`loram (\w+)`", (reference / "command-line.md").read_text()))
    assert set(typer.main.get_command(app).commands) <= named


def test_contributing_names_every_room_and_files_that_exist() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    package = REPOSITORY / "loram_ray"
    rooms = [path for path in package.iterdir() if path.suffix == ".py" or path.is_dir()]
    for room in rooms:
        if room.name != "__pycache__":
            assert f"`{room.name}{'/' if room.is_dir() else ''}`" in text, room.name
    for path in re.findall(r"`((?:loram_ray|tests|jobs|cluster|docs)/[\w./-]+)`", text):
        assert (REPOSITORY / path).exists(), path
    for path in re.findall(r"`(\w+/\w+\.py)`", text):
        assert (REPOSITORY / path).exists() or (package / path).exists(), path


def test_every_key_is_in_the_reference_with_its_description() -> None:
    page = documented_keys()
    keys = re.findall(r"^\| `([\w.]+)`", page, flags=re.MULTILINE)
    for stage, section in STAGES.items():
        for name in section.model_fields:
            assert any(f"{key}.".startswith(f"{stage}.{name}.") for key in keys), (stage, name)
    cells = page.replace("\\|", "|").replace("&lt;", "<")
    for section in {RunConfig, *sections(Section)}:
        for name, field in section.model_fields.items():
            assert (field.description or "") in cells, f"{section.__name__}.{name}"


def documented_keys() -> str:
    sys.path.insert(0, str(REPOSITORY / "docs"))
    try:
        import hooks
    finally:
        sys.path.remove(str(REPOSITORY / "docs"))
    return hooks.configuration()


def sections(above: type[Section]) -> Iterator[type[Section]]:
    """Sections of the configuration that a run file may hold."""
    for section in above.__subclasses__():
        if section.__module__.startswith("loram_ray.config."):
            yield section
        yield from sections(section)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_and_opens_with_its_command(path: Path) -> None:
    load_run(path)
    comment = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    command = path.stem if path.stem in ("batch", "sweep", "compare") else "run"  # demo: both
    assert f"loram {command} --config jobs/configs/{path.name}" in comment


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["loram-semi", "loram-stru", "loram-unst"])
def test_every_strategy_runs_from_its_shipped_config(checkout: Path, name: str) -> None:
    arguments = ["run", "--config", f"jobs/configs/{name}.yaml"]
    done = subprocess.run([LORAM, *arguments], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = checkout / "runs" / name.removeprefix("loram-")
    assert json.loads((folder / "results.json").read_text())["rows"][0]["answer_perplexity"] > 0


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(2400)
def test_the_demo_shows_loram_beating_the_untouched_base(tmp_path: Path, real_base: Path) -> None:
    """The demo as `make demo` runs it, but with a quarter of its alignment."""
    inputs = tmp_path / "runs" / "demo" / "inputs"
    inputs.mkdir(parents=True)
    shutil.copytree(real_base, inputs / "base")
    script = [sys.executable, REPOSITORY / "jobs" / "prepare_demo.py", "--output", inputs]
    subprocess.run(script, check=True)
    started = time.monotonic()
    demo = REPOSITORY / "jobs" / "configs" / "demo.yaml"
    fewer = ["--set", "align.steps=4", "--set", "align.optimiser.warmup_steps=1"]
    subprocess.run([LORAM, "compare", "--config", demo, *fewer], cwd=tmp_path, check=True)
    minutes = (time.monotonic() - started) / 60
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    results = tmp_path / "runs" / "demo" / "comparison" / "results.json"
    found = json.loads(results.read_text())
    rows = {row["system"]: row for row in found}
    exact = {name: row["other_scores"]["exact_match"] for name, row in rows.items()}
    print(json.dumps(found, indent=1), f"{minutes:.1f} minutes, {peak / 1e9:.1f} GB at most")
    untouched = rows["base"]["mean"]
    assert rows["loram"]["mean"] < untouched
    assert exact["loram"] >= exact["base"]
    assert rows["full"]["mean"] < untouched
    assert rows["pruned"]["mean"] > untouched
    assert rows["loram"]["model_bytes"] < rows["full"]["model_bytes"]
    assert (tmp_path / "runs" / "demo" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.thorough
def test_criteria_are_compared_by_their_command(checkout: Path) -> None:
    path = REPOSITORY / "tests" / "benchmarks" / "criteria.py"
    arguments = ["--inputs", "runs/demo/inputs", "--output", "runs/criteria", "--quick"]
    done = subprocess.run(
        [sys.executable, path, *arguments, "--only", "random"],
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = [line for line in done.stdout.splitlines() if line.startswith("| structured")]
    assert len(found) == 2 and all("%" in line for line in found), done.stdout
