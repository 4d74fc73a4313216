"""The README's commands and snippets, and the shipped configurations, run as they are written."""

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
from pathlib import Path

import hub
import local_cluster
import pytest
import tiny
import yaml

from loram_ray.config import RunConfig, load_run, validate

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
CONFIGS = sorted((REPOSITORY / "jobs" / "configs").glob("*.yaml"))
LORAM = Path(sys.executable).with_name("loram")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line.strip()]


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
            shipped["sweep"]["train"].update(steps=2, eval_every=1)
            shipped["sweep"].update(trials=3)
        elif "compare" in shipped:
            shipped["align"].update(steps=2)
            shipped["train"].update(steps=2)
            shipped["compare"].update(ratios=[0.35], systems=["base", "unaligned"])
            shipped["compare"]["tasks"].pop("problems")
        else:
            shipped["align"].update(steps=2, checkpoint_every=1)
            if "train" in shipped:
                shipped["baselines"] = False  # test_run compares; here it would only take longer
                shipped["train"].update(steps=2)
                shipped["evaluate"].update(max_new_tokens=2)
            if "calibration" in shipped["prune"]:
                shipped["prune"]["calibration"].update(samples=4, sequence_length=32)
        (folder / "jobs" / "configs" / path.name).write_text(yaml.safe_dump(shipped))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_loram_command_of_the_readme_succeeds(checkout: Path) -> None:
    lines = [line for line in commands() if line.startswith("loram ")]
    assert len(lines) >= 7
    with hub.serve() as server, contextlib.ExitStack() as stack:
        environment = {**os.environ, **hub.client(server, checkout)}
        cluster: local_cluster.Local | None = None
        for line in lines:
            arguments = shlex.split(line)[1:]
            if arguments[0] in ("submit", "jobs") and cluster is None:  # as make cluster starts it
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loram-")))
                cluster = stack.enter_context(local_cluster.cluster(folder))
                environment |= cluster.environment
                environment["RAY_API_SERVER_ADDRESS"] = cluster.dashboard
            done = subprocess.run(
                [LORAM, *arguments],
                cwd=checkout,
                env=environment,
                capture_output=True,
                text=True,
                timeout=400,
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            if "--json" in arguments:
                assert json.loads(done.stdout)["stage"] == "train"
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
    for code in blocks("python"):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, f"{code}\n{done.stderr}"


def test_yaml_of_the_readme_is_valid() -> None:
    found = blocks("yaml")
    assert found
    for block in found:
        validate(RunConfig, {"base": "b", "output": "o", **yaml.safe_load(block)}, "README")


def test_every_make_target_of_the_readme_and_ci_exists() -> None:
    ci = (REPOSITORY / ".ci" / "run").read_text()
    named = re.findall(r"(?:^|`)make (\w+)", README + ci, flags=re.MULTILINE)
    assert {"demo", "test", "lint", "bench", "slow"} <= set(named)
    for target in named:
        done = subprocess.run(["make", "-n", target], cwd=REPOSITORY, capture_output=True)
        assert done.returncode == 0, target


def test_links_of_the_readme_lead_to_files() -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (REPOSITORY / link).exists(), link


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_and_opens_with_its_command(path: Path) -> None:
    load_run(path)
    comment = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    command = path.stem if path.stem in ("batch", "sweep", "compare") else "run"
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
    subprocess.run([LORAM, "run", "--config", demo, *fewer], cwd=tmp_path, check=True)
    minutes = (time.monotonic() - started) / 60
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    found = json.loads((tmp_path / "runs" / "demo" / "results.json").read_text())["rows"]
    rows = {row["name"]: row for row in found}
    print(json.dumps(found, indent=1), f"{minutes:.1f} minutes, {peak / 1e9:.1f} GB at most")
    untouched = rows["full base, untouched"]["answer_perplexity"]
    assert rows["LoRAM"]["answer_perplexity"] < untouched
    assert rows["LoRAM"]["exact_match"] >= rows["full base, untouched"]["exact_match"]
    assert rows["LoRA on the full base"]["answer_perplexity"] < untouched
    assert rows["pruned model, as it is"]["answer_perplexity"] > untouched
    assert rows["LoRAM"]["model_bytes"] < rows["LoRA on the full base"]["model_bytes"]


@pytest.mark.slow
@pytest.mark.thorough
def test_criteria_are_compared_by_their_command(checkout: Path) -> None:
    path = REPOSITORY / "jobs" / "compare_criteria.py"
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
