"""The figures in documents, and the recorded results they come from.

    python tests/benchmarks/figures.py           # list the figures that differ from the records
    python tests/benchmarks/figures.py --write   # put the recorded figures into the documents

Records are ``results.json`` (of `run.py`), the files in ``records/`` (of `record.py`) and the
scores of the study. Each names the command, the commit, the date and the machine it was made with.
`STATEMENTS` lists, for each document, the sentences and table rows that hold figures, with a field
in place of each figure. Sentences may be wrapped anywhere.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Formatter
from typing import Any

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
RECORDS = HERE / "records"
TASKS = ("docstrings", "problems")
PRUNED = (("random", 0.35), ("random", 0.65), ("wanda", 0.5))
SEEDS = ("seed-0", "seed-1", "seed-2")
ESTIMATE = "--config jobs/configs/llama-3.1-70b.yaml --gpus 8,16,64 --set align.micro_batch_size=2"
DISTILLED = (
    f"{ESTIMATE} --set align.objective=distillation --set align.distillation.gpus_per_worker=2"
)


def record(name: str) -> dict[str, Any]:
    """Return one file of ``records/``."""
    found: dict[str, Any] = json.loads((RECORDS / f"{name}.json").read_text())
    return found


def results() -> dict[str, Any]:
    """Return the records of the benchmarks, by name."""
    found: dict[str, Any] = json.loads((HERE / "results.json").read_text())
    return found


def facts() -> dict[str, Any]:
    """Return what the statements' fields refer to."""
    study = scores_of(*SEEDS)
    return {
        "demo": _demo(),
        "publisher": _numbered(record("publisher")["found"]),
        "trainer": _trainer(),
        "study": _study(study),
        "objectives": _objectives([*study, *scores_of("objectives")]),
        "criteria": _criteria(),
        "together": _together(),
        "estimate": _estimate(),
    }


def _demo() -> dict[str, Any]:
    from loram_ray.evaluation.uncertainty import gain_kept

    metric = "answer_perplexity"
    rows = {row["name"]: _in_millions(row) for row in record("demo")["found"]["rows"]}
    names = ("full base, untouched", "LoRAM", "LoRA on the full base")
    return {**rows, "gain": gain_kept(metric, *(rows[name][metric] for name in names))}


def _in_millions(row: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(row)
    for key in ("trained_parameters", "model_parameters", "model_bytes"):
        found[key] = (row[key] or 0) / 1e6
    return found


def _numbered(value: Any) -> Any:
    """The same with whole numbers for keys that are digits, as `str.format` looks them up."""
    if not isinstance(value, dict):
        return value
    return {int(k) if k.isdecimal() else k: _numbered(inner) for k, inner in value.items()}


def _trainer() -> dict[str, Any]:
    found = record("trainer_bf16")["found"]
    for entry in found.values():
        entry["ratio"] = entry["ours_tokens_per_s"] / entry["trainer_tokens_per_s"]
    return found


def _together() -> dict[str, Any]:
    found = results()["together"]["found"]
    return {kind: {row["adapters"]: row for row in found[kind]["rows"]} for kind in ("fp32", "nf4")}


def scores_of(*names: str) -> list[Any]:
    """The scores of the study's files, each once."""
    from loram_ray.studies.scores import Score

    found = {}
    for name in names:
        for entry in json.loads((HERE / "study" / f"{name}.json").read_text())["scores"]:
            score = Score(**entry)
            found.setdefault(score.of, score)  # as a comparison counts others' scores in
    return list(found.values())


def _kept(scores: list[Any]) -> dict[str, dict[str, float]]:
    """Mean gain kept in percent, by system and by method, ratio and task."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in _rows(scores):
        if row["gain_kept"] is not None:
            percent = 100 * row["gain_kept"]
            found[row["system"]][row["place"]] = percent if abs(percent) >= 0.5 else 0.0
    return found


def _perplexity(scores: list[Any]) -> dict[str, dict[str, float]]:
    """Mean perplexity of answers, by system and by method, ratio and task."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in _rows(scores):
        found[row["system"]][row["place"]] = row["mean"]
    return found


def _rows(scores: list[Any]) -> Iterator[dict[str, Any]]:
    from loram_ray.studies.compare import rows_of

    for row in rows_of(scores, "answer_perplexity"):
        place = [str(row[key]) for key in ("method", "ratio") if row[key] is not None]
        yield {**row, "place": " ".join([*place, row["task"]])}


def _pairs(scores: list[Any], better: str, worse: str, method: str | None = None) -> dict[str, Any]:
    """Of two systems, the advantage of one in gain kept, in points, over pairs of task and seed."""
    from loram_ray.evaluation.uncertainty import gain_kept

    base = {score.task: score.value for score in scores if score.system == "base"}
    full = {(score.task, score.seed): score.value for score in scores if score.system == "full"}
    kept: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for score in scores:
        if score.method is not None and method in (None, score.method):
            share = gain_kept(
                "answer_perplexity",
                base[score.task],
                score.value,
                full[score.task, score.seed],
            )
            kept[score.method, score.ratio, score.task, score.seed][score.system] = 100 * share
    points = [row[better] - row[worse] for row in kept.values() if {better, worse} <= set(row)]
    return {
        "pairs": len(points),
        "won": sum(point > 0 for point in points),
        "points": points,
        "least": min(points),
        "most": max(points),
        "mean": sum(points) / len(points),
    }


def _improves(scores: list[Any], system: str) -> dict[str, int]:
    """In how many pairs of task and seed a system improves on the untouched base."""
    base = {score.task: score.value for score in scores if score.system == "base"}
    found = [score.value < base[score.task] for score in scores if score.system == system]
    return {"pairs": len(found), "won": sum(found)}


def _study(scores: list[Any]) -> dict[str, Any]:
    corrected = [
        point
        for system in ("causal", "distilled", "qloram")
        for point in _pairs(scores, f"{system} + correction", system, "random")["points"]
    ]
    of_seed_2 = [score for score in scores if score.seed in (2, None)]
    return {
        "kept": _kept(scores),
        "perplexity": _perplexity(scores),
        "seed 2": _kept(of_seed_2),
        "correction": {
            "pairs": len(corrected),
            "won": sum(point > 0 for point in corrected),
            "least": min(corrected),
            "most": max(corrected),
            "mean": sum(corrected) / len(corrected),
        },
        "distilled": _pairs(scores, "distilled", "causal"),
        "improves": {name: _improves(scores, name) for name in ("causal", "distilled", "qloram")},
    }


def _objectives(scores: list[Any]) -> dict[str, Any]:
    from loram_ray.studies.compare import claims_of

    claims = {
        f"{claim['better']} {claim['worse']} {claim['ratio']}": claim
        for claim in claims_of(scores, "answer_perplexity")
        if claim["method"] == "random"
    }
    return {
        "kept": _kept(scores),
        "distilled": _pairs(scores, "distilled", "longer"),
        "live": _pairs(scores, "live", "longer"),
        "longer": _pairs(scores, "longer", "causal"),
        "claims": claims,
        "top_k against live": {
            str(ratio): _against(claims, "distilled", "live", ratio) for ratio in (0.35, 0.65)
        },
    }


def _against(
    claims: Mapping[str, Any], better: str, worse: str, ratio: float
) -> Mapping[str, float]:
    """The claim that one system is better than another, also where only the reverse was made."""
    claim: Mapping[str, float] | None = claims.get(f"{better} {worse} {ratio}")
    if claim is not None:
        return claim
    reverse = claims[f"{worse} {better} {ratio}"]
    return {**reverse, "difference": -reverse["difference"]}


def _criteria() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in record("criteria")["found"]:
        name = " ".join(str(part) for part in (row["criterion"], row["pattern"], row["ratio"]))
        found[name.replace(" None", "").strip()] = {
            **row,
            "millions": (row["parameters"] or 0) / 1e6,
            "kept": 100 * row["gain_kept"] if row["gain_kept"] is not None else None,
        }
    return found


def _estimate() -> dict[str, float]:
    """GB of a GPU and hours on 8 GPUs, from the printed tables."""
    memory, time = (
        line for line in estimate_of(ESTIMATE).splitlines() if re.match(r"\| 8( GPUs)? \|", line)
    )
    return {"gigabytes": float(memory.split("**")[1]), "hours": float(time.split("**")[3])}


def estimate_of(arguments: str) -> str:
    """Return what ``loram plan --alignment`` prints."""
    from typer.testing import CliRunner

    from loram_ray.cli.main import app

    with contextlib.chdir(REPOSITORY):
        done = CliRunner().invoke(app, ["plan", "--alignment", *arguments.split()])
    assert done.exit_code == 0, done.output
    return done.stdout


class Statement:
    """A sentence or a table row of a document that holds figures.

    Args:
        template: the text, with a field of `str.format` in place of each figure.
    """

    def __init__(self, template: str) -> None:
        self.template = template

    @classmethod
    def of_line(cls, line: str) -> Statement:
        """A line without fields, which is the statement as it is."""
        return cls(line.replace("{", "{{").replace("}", "}}"))

    def text(self, known: Mapping[str, Any]) -> str:
        """The statement as the records have it."""
        return self.template.format_map(known)

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches the statement with any figures in it, wrapped in any way."""
        parts = []
        for literal, field, _, _ in Formatter().parse(self.template):
            parts.append(r"\s+".join(map(re.escape, re.split(r"\s+", literal))))
            if field is not None:
                parts.append(r"([-+]?[\d,]*\d(?:\.\d+)?%?)")
        return re.compile("".join(parts))


def tokens(text: str) -> Iterator[re.Match[str]]:
    """Yield what looks like a measured figure: shares, decimals, and numbers with a unit."""
    return _FIGURE.finditer(_CODE.sub(lambda match: " " * len(match.group()), text))


_CODE = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)", re.DOTALL)
_FIGURE = re.compile(
    r"(?<![\w./-])[-+]?\d[\d,]*(?:\.\d+)?\s?(?:%|[kMGT]?B\b|tokens/s|rows/s|s\b|ms\b|minutes\b|"
    r"hours\b|M\b|times\b|points\b|of\s\d+)|(?<![\w./-])[-+]?\d+\.\d+(?!\.?\w)"
)


def differences(document: Path, statements: list[Statement], known: Mapping[str, Any]) -> list[str]:
    """Return the statements that a document lacks as the records have them."""
    text = " ".join(document.read_text().split())
    return [
        stated
        for statement in statements
        if (stated := " ".join(statement.text(known).split())) not in text
    ]


def without_record(
    document: Path, statements: list[Statement], exempt: list[str]
) -> list[tuple[int, str]]:
    """Return line and text of the figures in a document that no statement holds.

    Args:
        document: Markdown.
        statements: of the document.
        exempt: regular expressions of figures that nobody measured here.
    """
    text = document.read_text()
    covered = [match.span() for s in statements for match in s.pattern.finditer(text)]
    covered += [match.span() for rule in exempt for match in re.finditer(rule, text)]
    return [
        (text.count("\n", 0, found.start()) + 1, found.group())
        for found in tokens(text)
        if not any(start <= found.start() and found.end() <= end for start, end in covered)
    ]


def written(text: str, statements: list[Statement], known: Mapping[str, Any]) -> str:
    """Return a document's text with the recorded figures in its statements."""
    for statement in statements:
        figures = [
            f"{{{field}:{form}}}" if form else f"{{{field}}}"
            for _, field, form, _ in Formatter().parse(statement.template)
            if field is not None
        ]
        for match in list(statement.pattern.finditer(text))[:1]:
            for number in range(len(figures), 0, -1):
                start, end = match.span(number)
                text = text[:start] + figures[number - 1].format_map(known) + text[end:]
    return text


def main() -> None:
    """List what differs, or write it."""
    from statements import STATEMENTS

    known = facts()
    failed = False
    for name, statements in STATEMENTS.items():
        document = REPOSITORY / name
        if "--write" in sys.argv:
            document.write_text(written(document.read_text(), statements, known))
        for stated in differences(document, statements, known):
            failed = True
            print(f"{name}: {stated}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
