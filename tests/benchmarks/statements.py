"""The sentences and table rows of documents that hold figures; see `figures`.

A figure that no statement holds fails a test, unless a rule of `EXEMPT` matches it: those are
settings, the paper's figures, sizes of models and versions, which nobody measured here.
"""

from __future__ import annotations

from collections.abc import Iterable

from figures import (
    DISTILLED,
    ESTIMATE,
    PRUNED,
    SEEDS,
    TASKS,
    Statement,
    estimate_of,
    record,
    scores_of,
)

from loram_ray.studies.compare import claims_of, rows_of
from loram_ray.studies.comparison_table import cells_of, cells_of_claim

_RATIOS = (0.35, 0.65)


def _demo(name: str, bold: str = "", trained: bool = True) -> str:
    of = f"{{demo[{name}]"
    cells = [
        f"{bold}{name}{bold}",
        f"{bold}{of}[answer_perplexity]:.3f}}{bold}",
        f"{bold}{of}[exact_match]:.1%}}{bold}",
        f"{of}[trained_parameters]:.2f}} M" if trained else "",
        f"{of}[model_parameters]:.2f}} M",
        f"{of}[model_bytes]:.0f}} MB",
    ]
    return _row(cells)


def _row(cells: Iterable[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def _kept(system: str, places: Iterable[str], unit: str = "") -> list[str]:
    return [f"{{study[kept][{system}][{place}]:.0f}}{unit}" for place in places]


def _publisher(objective: str) -> list[str]:
    of = f"{{publisher[perplexity][{objective}]"
    return [f"{of}[{count}]:{form}}}" for count, form in _PUBLISHER.items()]


_PUBLISHER = {"0": ",.0f", "51200": ".1f", "102400": ".1f", "153600": ".1f"}
_STRUCTURED = [f"random {ratio} {task}" for ratio in _RATIOS for task in TASKS]


def _last_bold(cells: list[str]) -> list[str]:
    return [*cells[:-1], f"**{cells[-1]}**"]


DEMO = [
    _demo("full base, untouched", trained=False),
    _demo("pruned model, as it is", trained=False),
    _demo("LoRAM without alignment"),
    _demo("LoRAM", bold="**"),
    _demo("LoRA on the full base"),
    "LoRAM kept {demo[gain]:.1%} of LoRA's gain",
]

PLAN = ["{estimate[gigabytes]:.0f} GB per GPU and {estimate[hours]:.1f} hours"]

MANY_ADAPTERS = [
    "eight adapters took {together[fp32][8][memory]:.2f} of the memory of eight trainings in fp32 "
    "and {together[nf4][8][memory]:.2f} in NF4, at {together[fp32][8][speed]:.2f} and "
    "{together[nf4][8][speed]:.2f} times the speed of one after another",
]

DISTILLATION = [
    "({publisher[millions][pruned]:.1f} M of {publisher[millions][base]:.1f} M parameters)",
    _row(["the paper's loss", *_last_bold(_publisher("causal_lm"))]),
    _row(["distillation", *_last_bold(_publisher("distillation"))]),
    "better in all {objectives[distilled][won]} pairs of seed and task",
]

CORRECTION = ["it helped in all {study[correction][won]} pairs of the"]

_OBJECTIVES = ("unaligned", "causal", "longer", "distilled", "live")
_CLAIM = "{{objectives[claims][{0}][difference]:+.3f}} ± {{objectives[claims][{0}][interval]:.3f}}"
_TOP_K = (
    "{{objectives[top_k against live][{0}][difference]:+.3f}} ± "
    "{{objectives[top_k against live][{0}][interval]:.3f}}"
)

ALIGNMENT = [
    *(
        _row(
            [
                f"{ratio}",
                task,
                *(
                    f"{{objectives[kept][{name}][random {ratio} {task}]:.0f}}%"
                    for name in _OBJECTIVES
                ),
            ]
        )
        for ratio in _RATIOS
        for task in TASKS
    ),
    "distillation is better in {objectives[distilled][won]} of {objectives[distilled][pairs]} "
    "pairs of seed and task, by {objectives[distilled][least]:.1f} to "
    "{objectives[distilled][most]:.0f} points",
    "live targets in {objectives[live][won]}",
    f"the 95% interval holds zero: {_CLAIM.format('distilled longer 0.35')} in log-perplexity at "
    f"0.35, {_CLAIM.format('distilled longer 0.65')} at 0.65",
    f"({_TOP_K.format('0.35')}, {_TOP_K.format('0.65')})",
    "gained more in {objectives[longer][won]} of {objectives[longer][pairs]} pairs only",
    "{trainer[two_workers][ratio]:.2f} of the Trainer's speed on two cores "
    "({trainer[two_workers][ours_tokens_per_s]:.0f} against "
    "{trainer[two_workers][trainer_tokens_per_s]:.0f} tokens/s) and "
    "{trainer[one_worker][ratio]:.2f} with a core to spare "
    "({trainer[one_worker][ours_tokens_per_s]:.0f} against "
    "{trainer[one_worker][trainer_tokens_per_s]:.0f})",
]


def _criterion(row: dict[str, object]) -> str:
    parts = [row[key] for key in ("criterion", "pattern", "ratio") if row[key] not in (None, "")]
    of = f"{{criteria[{' '.join(map(str, parts))}]"
    return _row(
        [
            str(row["pattern"]),
            "" if row["ratio"] is None else str(row["ratio"]),
            str(row["criterion"]),
            f"{of}[millions]:.1f}} M" if row["parameters"] else "",
            f"{of}[text_perplexity]:.2f}}" if row["text_perplexity"] else "",
            f"{of}[answer_perplexity]:.3f}}",
            "" if row["gain_kept"] is None else f"{of}[kept]:.0f}}%",
        ]
    )


_OF = "{{criteria[{0}][kept]:.0f}}%"

CRITERIA = [
    *(_criterion(row) for row in record("criteria")["found"]),
    f"({_OF.format('magnitude structured 0.35')} against {_OF.format('random structured 0.35')})",
    f"({_OF.format('Wanda unstructured 0.5')} and {_OF.format('SparseGPT unstructured 0.5')})",
]


def _studied(system: str, unit: str = "%") -> list[str]:
    return _kept(system, [f"{m} {r} {t}" for m, r in PRUNED for t in TASKS], unit)


STUDY = [
    "perplexity {study[perplexity][small][random 0.35 docstrings]:.0f} and "
    "{study[perplexity][small][random 0.65 docstrings]:.0f} on docstrings at 0.35 and 0.65, where "
    "the untouched base has {study[perplexity][base][docstrings]:.1f}",
    "{study[improves][causal][won]} of {study[improves][causal][pairs]} pairs with the paper's "
    "alignment, {study[improves][distilled][won]} of {study[improves][distilled][pairs]} with "
    "distillation and {study[improves][qloram][won]} of {study[improves][qloram][pairs]} in NF4",
    "The correction helps in {study[correction][won]} of {study[correction][pairs]} pairs",
    "by {study[correction][least]:.1f} to {study[correction][most]:.1f} points of gain kept, "
    "{study[correction][mean]:.0f} on average",
    "better in {study[distilled][won]} of {study[distilled][pairs]} pairs",
    *(
        _row([f"{system_name}", *_studied(system)])
        for system, system_name in (
            ("unaligned", "unaligned"),
            ("causal", "the paper's loss"),
            ("distilled", "distillation"),
        )
    ),
    _row(["distillation, NF4", *_kept("qloram", _STRUCTURED, "%"), "", ""]),
    "With seed 2 the paper's loss keeps "
    + ", ".join(f"{{study[seed 2][causal][{m} {r} problems]:.0f}}%" for m, r in PRUNED)
    + " of LoRA's gain on word problems, distillation "
    + ", ".join(f"{{study[seed 2][distilled][{m} {r} problems]:.0f}}%" for m, r in PRUNED),
]


def _study_tables() -> list[Statement]:
    scores, metric = scores_of(*SEEDS), "answer_perplexity"
    claims = [{**claim, "seen": f"**{claim['seen']}**"} for claim in claims_of(scores, metric)]
    cells = [cells_of(row) for row in rows_of(scores, metric)]
    cells += [cells_of_claim(claim) for claim in claims]
    return [Statement.of_line(f"| {' | '.join(row)} |") for row in cells]


def _estimates() -> list[Statement]:
    """The estimate's tables and notes; of that with distillation the table of its first pass."""
    lines = estimate_of(ESTIMATE).splitlines()
    lines += [line for line in estimate_of(DISTILLED).splitlines() if line.count("|") == _TARGETS]
    return [Statement.of_line(line) for line in lines]


_TARGETS = 7
"""Bars in a line of the table of what the base's pass costs."""

STATEMENTS = {
    "README.md": [Statement(text) for text in DEMO],
    "docs/tutorials/demo.md": [Statement(text) for text in DEMO],
    "docs/how-to/plan.md": [Statement(text) for text in PLAN],
    "docs/how-to/many-adapters.md": [Statement(text) for text in MANY_ADAPTERS],
    "docs/explanation/distillation.md": [Statement(text) for text in DISTILLATION],
    "docs/explanation/correction.md": [Statement(text) for text in CORRECTION],
    "tests/benchmarks/ALIGNMENT.md": [*(Statement(text) for text in ALIGNMENT), *_estimates()],
    "tests/benchmarks/CRITERIA.md": [Statement(text) for text in CRITERIA],
    "tests/benchmarks/study/README.md": [*(Statement(text) for text in STUDY), *_study_tables()],
}

EXEMPT = [
    # settings and sizes
    r"\b(?:\d+(?:\.\d+)?B|135M|105M)\b",
    r"\b0\.(?:35|65|5|85)\b",
    r"layers 4 to 27 of 30",
    r"95% interval",
    # versions
    r"\b(?:Python|Llama 2 and|Qwen2 and|bitsandbytes|Linux|KubeRay|YAML)\s\d\.\d+",
    r"\bPython\s3\.11, 3\.12 (?:and|or) 3\.13",
    r"arXiv 2502\.13533",
    # the paper's figures, and those of other people's software and machines
    r"3\.95x and, nominally, 15\.81x",
    r"(?:keeps|paper's) 93%",
    r"every 10 ms",
    r"40%\sof\stheir\speak",
    r"of 80 GB",
    r"(?:0\.2 USD|0\.3 to 0\.8|0\.9 to 1\.3)",
    # bounds that tests hold
    r"20\stimes\sa\ssecond",
    r"within 0\.01% in fp32, within 0\.1% in bf16 and NF4",
]
