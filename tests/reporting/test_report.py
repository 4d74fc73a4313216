"""Pages on results: what they say, what they refuse, and what a browser makes of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import loram_ray as lr
from helpers import tiny
from loram_ray.artifacts.manifest import MANIFEST_FILE
from loram_ray.cli.main import app
from loram_ray.config import RunConfig
from loram_ray.errors import LoramError
from loram_ray.reporting.content import build_report
from loram_ray.reporting.parts import Part
from loram_ray.reporting.results import collect_results

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Page(HTMLParser):
    """What is in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.cells: list[str] = []
        self.links: list[str] = []
        self.scripts = self.drawings = 0
        self._within = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._within = tag
        self.scripts += tag == "script"
        self.drawings += tag == "svg"
        self.links += [
            value
            for key, value in attrs
            if key in ("src", "href") and value and not value.startswith(("#", "data:"))
        ]

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within == "h2":
            self.headings.append(data)
        elif self._within == "td":
            self.cells.append(data)


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory, embedded_ray: None) -> Path:
    """A whole run of a tiny model."""
    folder = tmp_path_factory.mktemp("report")
    data = str(tiny.write_jsonl(folder / "data.jsonl", tiny.questions()))
    lora = {"r": 2, "dropout": 0.0}
    train = {"data": data, "lora": lora, "steps": 4, "batch_size": 4, "max_length": 64, "cpus": 1}
    run = {
        "base": str(base),
        "output": folder / "run",
        "prune": {"ratio": 0.5, "layers": (1, 3)},
        "train": {**train, "precision": "fp32"},
        "recover": {},
        "evaluate": {"data": data, "limit": 6, "precision": "fp32", "cpus_per_worker": 1},
    }
    return lr.run(RunConfig.model_validate(run)).output


def batch_of(folder: Path, count: int, **changes: Any) -> Path:
    """Results as a batch of many tasks leaves them, with metrics of each."""
    rows = []
    for number in range(count):
        name = f"task{number:04}"
        rows.append(
            {
                "name": name, "state": "done", "reason": "", "deaths": 0, "data": "d",
                "adapter": "a", "steps": 3, "examples": 4, "tokens": 5, "best_step": None,
                "trained_parameters": 6, "eval_loss": 2.0 + number % 7, "loss": 1.0 + number % 5,
                "seconds": 10.0 + number % 11,
            }
        )  # fmt: skip
        lines = [
            {"step": n, "loss": 3.0 / n + number % 3, "examples_per_s": 2.0, "memory_gb": 1.5}
            for n in (1, 2, 3)
        ]
        (folder / name / "adapter").mkdir(parents=True)
        tiny.write_jsonl(folder / name / "adapter" / "metrics.jsonl", lines)
    rows[0] |= changes
    (folder / "results.json").write_text(json.dumps(rows))
    return folder


def test_a_page_on_a_run_says_what_was_measured(run: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(
        app, ["report", str(run), "--output", str(tmp_path)], catch_exceptions=False
    )
    assert shown.exit_code == 0
    page = Page((tmp_path / "report.html").read_text())
    assert page.headings == [
        "Systems", "Losses", "Throughput", "Memory", "Kept by pruning",
        "Configuration and lineage",
    ]  # fmt: skip
    assert not page.links, "nothing is loaded from anywhere"
    assert page.scripts == 0
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert f"{rows[0]['answer_perplexity']:.3f}" in page.cells
    assert "model: pruned, data: " in " ".join(page.cells).replace("  ", " ")
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert len(pictures) == page.drawings >= 6
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    text = (tmp_path / "report.md").read_text()
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == page.headings
    assert sorted(re.findall(r"\]\((.*?\.png)\)", text)) == pictures
    assert "State: complete." in text


def test_a_run_that_is_not_complete_is_shown_so(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    for gone in ("adapter_pruned", "adapter", "evaluation"):
        shutil.rmtree(tmp_path / "run" / gone)
    (tmp_path / "run" / "results.json").unlink()
    work = tmp_path / "run" / ".adapter_pruned.work"
    work.mkdir()
    tiny.write_jsonl(work / "metrics.jsonl", [{"step": n, "loss": 3.0 / n} for n in (1, 2, 3)])
    found = build_report(collect_results(tmp_path / "run"))
    assert found.state == "unfinished: adapter_pruned (step 3) not yet complete"
    assert [box.finished for box in found.flow] == [True, False]
    [losses] = [part for part in found.parts if part.title == "Losses"]
    assert "unfinished" in losses.figures[0].title
    page = lr.report(tmp_path / "run").read_text()
    assert "adapter_pruned (step 3)" in page


def test_restarts_of_a_training_are_told(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "adapter_pruned" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    tiny.write_jsonl(path, [*lines[:2], *({**line, "restarts": 2} for line in lines[2:])])
    page = Page(lr.report(tmp_path / "run").read_text())
    assert "Restarts" in page.headings
    assert ("adapter_pruned", "2") in zip(page.cells, page.cells[1:], strict=False)


def test_held_out_losses_of_an_alignment_are_drawn(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    folder = tmp_path / "run" / "adapter_pruned"
    said = json.loads((folder / MANIFEST_FILE).read_text())
    (folder / MANIFEST_FILE).write_text(json.dumps({**said, "stage": "align"}))
    held_out = {"held_out_nll_web": 3.0, "held_out_nll_code": 2.0}
    lines = [
        {"step": 0, **held_out},
        {"step": 1, "loss": 4.0},
        {"step": 2, "loss": 3.0, **held_out},
    ]
    tiny.write_jsonl(folder / "metrics.jsonl", lines)
    found = build_report(collect_results(tmp_path / "run"))
    [losses] = [part for part in found.parts if part.title == "Losses"]
    assert [figure.title for figure in losses.figures] == [
        "Training loss: align", "Held-out loss on web: align", "Held-out loss on code: align"
    ]  # fmt: skip


def test_what_was_made_of_a_merged_model_belongs_to_the_run(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "evaluation" / "loram" / MANIFEST_FILE
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "base_fingerprint": "of the merged model"}))
    assert collect_results(tmp_path / "run").finished


def test_heat_maps_are_of_what_the_plan_kept(run: Path) -> None:
    from loram_ray.plan import PruningPlan
    from loram_ray.reporting.training_sections import heats

    plan = PruningPlan.load(run / "pruned")
    shares = {name: draw.keywords["shares"] for name, _, draw in heats(plan)}  # type: ignore[attr-defined]
    assert shares["kv_heads"].shape == (4, 4)
    assert shares["kv_heads"].sum(axis=1).tolist() == [4, 2, 2, 4]
    width = plan.geometry.intermediate_size
    for layer, units in plan.layers.items():
        assert set(shares["kv_heads"][layer].nonzero()[0]) == set(units.kv_heads.tolist())
        bins = shares["neurons"].shape[1]
        sizes = [sum(n * bins // width == b for n in range(width)) for b in range(bins)]
        kept = (shares["neurons"][layer] * sizes).round().astype(int).tolist()
        expected = [
            sum(n * bins // width == b for n in units.neurons.tolist()) for b in range(bins)
        ]
        assert kept == expected


def test_a_batch_of_many_tasks(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script> | and more"
    folder = batch_of(tmp_path / "batch", 40, state="failed", reason=hostile, deaths=3)
    text = lr.report(folder).read_text()
    page = Page(text)
    assert page.headings == ["Tasks", "Losses", "Throughput", "Memory", "Restarts"]
    assert page.scripts == 0
    assert hostile in page.cells
    assert "40 tasks: 1 failed, 39 done" in text
    assert "median of 40" in text, "so many curves are shown as one and a band"
    assert r"alert(1)\</script\> \| and more |" in (folder / "report" / "report.md").read_text()


def comparison_of(folder: Path) -> Path:
    """Results as a comparison leaves them."""
    folder.mkdir()
    rows = []
    for system, ratio, mean in (
        ("base", None, 9.0), ("full", None, 4.0), ("causal", 0.35, 6.0), ("causal", 0.65, 7.0),
        ("distilled", 0.35, 5.0), ("distilled + correction", 0.35, 4.9),
    ):  # fmt: skip
        rows.append(
            {
                "system": system, "method": None if ratio is None else "random", "ratio": ratio,
                "task": "sums", "seeds": 3, "metric": "answer_perplexity", "mean": mean,
                "deviation": 0.1, "gain_kept": None if system == "base" else (9 - mean) / 5,
                "gain_kept_deviation": 0.02, "model_bytes": 10, "train_seconds": 1.0,
                "model_parameters": int(100 * (1 - (ratio or 0))), "reason": "",
            }
        )  # fmt: skip
    (folder / "results.json").write_text(json.dumps(rows))
    claim = {
        "claim": "alignment is needed", "better": "causal", "worse": "unaligned", "paper": True,
        "method": "random", "ratio": 0.35, "seen": "within noise", "difference": 0.01,
        "interval": 0.1, "pairs": 3,
    }  # fmt: skip
    (folder / "claims.json").write_text(json.dumps([claim]))
    return folder


def test_a_comparison_is_plotted_against_reduction(tmp_path: Path) -> None:
    folder = comparison_of(tmp_path / "comparison")
    page = Page(lr.report(folder).read_text())
    assert page.headings == ["Systems", "Claims"]
    assert {"LoRAM, aligned by distillation + correction", "within noise"} <= set(page.cells)
    assert page.drawings == 2
    systems: Part = build_report(collect_results(folder)).parts[0]
    assert "parameter reduction" in systems.figures[0].svg


def test_a_run_with_a_comparison_is_reported_as_compared(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    comparison_of(tmp_path / "run" / "comparison")
    page = Page(lr.report(tmp_path / "run").read_text())
    assert {"Systems", "Claims", "Losses", "Kept by pruning"} <= set(page.headings)
    assert {"LoRA on the full base", "within noise", "adapter_pruned"} <= set(page.cells)


def test_what_is_no_result_or_of_two_bases_is_refused(run: Path, tmp_path: Path) -> None:
    for directory, message in (
        (tmp_path / "none", "be an existing directory"),
        (tmp_path, "has none"),
    ):
        with pytest.raises(LoramError, match=rf"DIRECTORY must .*{message}"):
            lr.report(directory)
    shutil.copytree(run, tmp_path / "mixed" / "one")
    other = tiny.write_base(tmp_path / "other", seed=9)
    lr.prune(
        lr.PruneConfig(base=str(other), output=tmp_path / "mixed" / "two", ratio=0.5, layers=(1, 3))
    )
    with pytest.raises(LoramError, match="must contain results of one base, but .* has those of 2"):
        lr.report(tmp_path / "mixed")
    assert not (tmp_path / "mixed" / "report").exists()
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "none")])
    assert isinstance(shown.exception, LoramError)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("kind", ["run", "batch", "comparison"])
def test_a_browser_shows_every_plot_and_says_nothing(run: Path, tmp_path: Path, kind: str) -> None:
    """In a narrow dark window; a script looks at what was drawn and at what sticks out."""
    folders = {
        "run": lambda: run,
        "batch": lambda: batch_of(tmp_path / "batch", 30),
        "comparison": lambda: comparison_of(tmp_path / "comparison"),
    }
    page = lr.report(folders[kind](), tmp_path / "out")
    script = """<script>
      const sizes = [...document.querySelectorAll("svg")].map(svg => {
        const box = svg.getBoundingClientRect();
        const marks = [...svg.querySelectorAll("path, use, image")].filter(mark => {
          const seen = mark.getBoundingClientRect();
          return seen.width > 3 || seen.height > 3;
        });
        return [Math.round(box.width), Math.round(box.height), marks.length];
      });
      const wide = document.documentElement.scrollWidth;
      const dark = getComputedStyle(document.body).backgroundColor;
      document.body.innerHTML = "<pre id=seen>" + JSON.stringify({sizes, wide, dark}) + "</pre>";
    </script></body>"""
    watched = tmp_path / "watched.html"
    watched.write_text(page.read_text().replace("</body>", script))
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path}/u",
            "--blink-settings=preferredColorScheme=0", "--window-size=390,800", "--dump-dom",
            f"file://{watched}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)
    assert found, done.stderr
    seen = json.loads(found.group(1))
    assert len(seen["sizes"]) == page.read_text().count("<svg")
    for width, height, marks in seen["sizes"]:
        assert width >= 300 and height >= 50 and marks >= 4, seen
    assert seen["wide"] <= 500, "the page itself is not wider than the window, plots scroll"
    assert seen["dark"] == "rgb(22, 24, 28)"
