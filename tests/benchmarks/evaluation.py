"""Items a second of multiple choice and of generation, against lm-eval's Hugging Face backend.

    PYTHONPATH=.venv/lm-eval python tests/benchmarks/evaluation.py FOLDER
    PYTHONPATH=.venv/lm-eval python tests/benchmarks/evaluation.py FOLDER --quick

SmolLM2-135M in fp32; the same items, prompts, solved examples, batch sizes and limits in one
process, in rounds in which the two take turns. Multiple choice: how does a paragraph of real text
go on, of four endings, with one solved example in front of each (the paper's 1-shot protocol).
Generation: grade-school sums (reasoning-gym's gsm_symbolic), with eight in front (its 8-shot
protocol), up to 48 tokens. Time is that of reading, tokenising and scoring, without loading the
model. The scores of both must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from inputs import write_inputs
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import loram_ray as lr
from loram_ray.evaluation.scoring import Plan, Scorer

ENDINGS, WORDS, NEW_TOKENS, SHOTS = 4, 25, 48, 8
TASKS = {
    "choice": """
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {shots}}}}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
num_fewshot: 1
fewshot_config: {{sampler: first_n}}
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""",
    "generation": """
task: generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {shots}}}}}
test_split: test
fewshot_split: train
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: answer
num_fewshot: 8
fewshot_config: {{sampler: first_n}}
generation_kwargs: {{until: ["Question:"], max_gen_toks: 48, do_sample: false}}
metric_list: [{{metric: exact_match, ignore_case: false}}]
""",
}


def write_items(folder: Path, text: Path, count: int) -> None:
    """Questions of both kinds, and those that are shown solved."""
    import reasoning_gym

    draw = random.Random(0)
    with open(text) as lines:
        words = [json.loads(line)["text"].split() for line in lines]
    long = [w for w in words if len(w) >= 3 * WORDS][: count + 1]
    assert len(long) > count, "there is too little text"
    rows = []
    for number, of_it in enumerate(long):
        others = draw.sample([n for n in range(len(long)) if n != number], ENDINGS - 1)
        endings = [" ".join(long[n][2 * WORDS : 3 * WORDS]) for n in (number, *others)]
        order = draw.sample(range(ENDINGS), ENDINGS)
        rows.append(
            {
                "question": " ".join(of_it[: 2 * WORDS]),
                "choices": [endings[n] for n in order],
                "answer": order.index(0),
            }
        )
    _write(folder / "choice", rows[1:], rows[:1])
    sums = reasoning_gym.create_dataset("gsm_symbolic", size=count + SHOTS, seed=1)
    rows = [{"question": r["question"], "answer": str(r["answer"])} for r in sums]
    _write(folder / "generation", rows[SHOTS:], rows[:SHOTS])
    for name, content in TASKS.items():
        written = content.format(
            data=folder / name / "items.jsonl", shots=folder / name / "shots.jsonl"
        )
        (folder / f"{name}.yaml").write_text(written)


def _write(folder: Path, items: list[dict[str, Any]], shots: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("items", items), ("shots", shots)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)


def config_of(folder: Path, base: Path, kind: str, batch: int) -> lr.EvaluateConfig:
    benchmark: dict[str, Any] = {
        "kind": kind,
        "name": kind,
        "data": folder / kind / "items.jsonl",
        "shots": 1 if kind == "choice" else SHOTS,
        "shots_from": folder / kind / "shots.jsonl",
    }
    benchmark = {key: str(v) if isinstance(v, Path) else v for key, v in benchmark.items()}
    if kind == "choice":
        benchmark["prompt"] = "{question}"
    else:
        benchmark |= {"max_new_tokens": NEW_TOKENS, "stop": ["Question:"]}
    return lr.EvaluateConfig.model_validate(
        {
            "model": str(base),
            "output": folder / "unwritten",
            "precision": "fp32",
            "batch_size": batch,
            "benchmarks": [benchmark],
        }
    )


def measure(folder: Path, base: Path, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    config = config_of(folder, base, kind, options.batch)
    scorer = Scorer(config)
    engine = scorer.engine
    own = HFLM(pretrained=engine.model, tokenizer=engine.tokenizer, batch_size=options.batch)
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def ours() -> float:
        plan = Plan(config)
        found = {batch.number: scorer.score(*plan.asked(batch))[0] for batch in plan.batches}
        scores = plan.scores(found)
        return float(scores["choice/accuracy" if kind == "choice" else "generation/exact_match"])

    def theirs() -> float:
        results = simple_evaluate(
            model=own, tasks=[kind], task_manager=manager, bootstrap_iters=0, log_samples=False
        )
        metric = "acc,none" if kind == "choice" else "exact_match,none"
        return float(results["results"][kind][metric])

    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    scores = {}
    for _ in range(options.rounds):
        for name, way in (("ours", ours), ("theirs", theirs)):
            started = time.perf_counter()
            scores[name] = way()
            seconds[name].append(time.perf_counter() - started)
    pairs = zip(seconds["theirs"], seconds["ours"], strict=True)
    return {
        "items": options.items,
        "batch": options.batch,
        "items_per_s": {n: options.items / statistics.median(s) for n, s in seconds.items()},
        "times": statistics.median(theirs / ours for theirs, ours in pairs),
        "scores": scores,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it all run?")
    options = parser.parse_args()
    folder = options.folder.resolve()
    inputs = write_inputs(folder, options.quick)
    if options.quick:
        options.items, options.rounds = 6, 1
    write_items(folder / "items", inputs.text, options.items)
    found = {
        kind: measure(folder / "items", inputs.base, kind, options)
        for kind in ("choice", "generation")
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
