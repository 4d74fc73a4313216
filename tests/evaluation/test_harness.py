"""lm-eval's tasks on this package's forward passes, against lm-eval's own Hugging Face backend.

lm-eval is in a folder of its own (`make test` names it in PYTHONPATH); without it all are skipped.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest

pytest.importorskip("lm_eval")

import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from helpers import quizzes, tiny, tokenizers_of
from helpers.scored import score
from loram_ray.cli.main import app
from loram_ray.config import EvaluateConfig
from loram_ray.config.evaluate import HarnessConfig
from loram_ray.errors import LoramError
from loram_ray.evaluation.engine import Engine
from loram_ray.evaluation.lm_eval_model import HarnessModel, run_harness, scores_of
from loram_ray.evaluation.scoring import Scorer


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quizzes.write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def engine(loud: LlamaForCausalLM) -> Engine:
    return Engine(loud, tiny.tokenizer())


def config_of(tasks: Path, *names: str, **settings: Any) -> HarnessConfig:
    return HarnessConfig(tasks=names or tuple(quizzes.TASKS), include_path=tasks, **settings)


@torch.inference_mode()
def test_scores_and_samples_are_those_of_lm_evals_own_backend(
    engine: Engine, tasks: Path, tmp_path: Path
) -> None:
    answered: list[int] = []
    scores, samples = run_harness(engine, config_of(tasks), tmp_path, 4, 0, answered.append)
    own = HFLM(pretrained=engine.model, tokenizer=engine.tokenizer, batch_size=4)
    expected = simple_evaluate(
        model=own,
        tasks=list(quizzes.TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )
    results = expected["results"]
    assert set(samples) == set(quizzes.TASKS)
    for task, metrics in (
        ("tiny_quiz", ("acc", "acc_norm")),
        ("tiny_words", ("exact_match",)),
        ("tiny_text", ("word_perplexity", "bits_per_byte")),
    ):
        for metric in metrics:
            found = scores[f"{task}/{metric}"]
            assert found == pytest.approx(results[task][f"{metric},none"], rel=1e-4)
        for mine, theirs in zip(samples[task], expected["samples"][task], strict=True):
            assert mine["doc_id"] == theirs["doc_id"]
            if task == "tiny_words":
                assert mine["resps"] == theirs["resps"]
                continue
            for one, other in zip(mine["resps"], theirs["resps"], strict=True):
                one, other = one[0], other[0]
                pairs = zip(one, other, strict=True) if task == "tiny_quiz" else [(one, other)]
                for value, reference in pairs:
                    assert float(value) == pytest.approx(float(reference), rel=1e-4)
    stderr = results["tiny_quiz"]["acc_stderr,none"]
    assert scores["tiny_quiz/acc_stderr"] == pytest.approx(stderr, rel=1e-6)
    assert sum(answered) == len(quizzes.QUIZ) * 3 + len(quizzes.QUIZ) + 4, (
        "the long text has two windows"
    )
    assert len({sample["resps"][0][0] for sample in samples["tiny_words"]}) > 1


def test_a_choice_benchmark_is_lm_evals_multiple_choice(
    engine: Engine, tasks: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    engine.model.save_pretrained(model)
    engine.tokenizer.save_pretrained(model)
    rows = [{**row, "answer": 0} for row in quizzes.QUIZ]
    data = str(tiny.write_jsonl(tmp_path / "quiz.jsonl", rows))
    benchmark = {"kind": "choice", "data": data, "shots": 2, "shots_from": data}
    config = EvaluateConfig.model_validate(
        {
            "model": str(model),
            "output": tmp_path / "unwritten",
            "precision": "fp32",
            "benchmarks": [benchmark],
            "lm_eval": config_of(tasks, "tiny_quiz").model_dump(),
        }
    )
    (tmp_path / "work").mkdir()
    expected, _ = Scorer(config).harness(tmp_path / "work")
    found = score(config)
    assert found["quiz/accuracy"] == expected["tiny_quiz/acc"]
    assert found["quiz/accuracy_normalised"] == expected["tiny_quiz/acc_norm"]
    assert found["quiz/accuracy_stderr"] == pytest.approx(expected["tiny_quiz/acc_stderr"])


@torch.inference_mode()
def test_an_interrupted_run_asks_only_for_what_is_missing(
    engine: Engine, tasks: Path, tmp_path: Path
) -> None:
    def interrupting(requests: int) -> None:
        answered.append(requests)
        if len(answered) == 3:
            raise KeyboardInterrupt

    answered: list[int] = []
    config = config_of(tasks, "tiny_quiz", "tiny_words")
    with pytest.raises(KeyboardInterrupt):
        run_harness(engine, config, tmp_path, 2, 0, interrupting)
    before = sum(answered)
    answered.clear()
    scores, samples = run_harness(engine, config, tmp_path, 2, 0, lambda n: answered.append(n))
    assert before + sum(answered) == len(quizzes.QUIZ) * 4
    assert 0 < before < len(quizzes.QUIZ) * 4
    (tmp_path / "other").mkdir()
    expected = run_harness(engine, config, tmp_path / "other", 2, 0, lambda n: None)
    assert scores == expected[0]
    assert json.dumps(samples, default=str) == json.dumps(expected[1], default=str)


def test_what_lm_eval_cannot_load_is_refused(engine: Engine, tasks: Path, tmp_path: Path) -> None:
    names = ("no_such_task", "tiny_gone")  # unknown, and one whose data are not there
    gone = (tasks / "tiny_quiz.yaml").read_text().replace("tiny_quiz", "tiny_gone")
    (tmp_path / "tiny_gone.yaml").write_text(gone.replace("quiz.jsonl", "gone.jsonl"))
    for name, folder in zip(names, (None, tmp_path), strict=True):
        config = HarnessConfig(tasks=(name,), include_path=folder)
        with pytest.raises(LoramError, match=rf"evaluate\.lm_eval\.tasks .*{name}") as caught:
            run_harness(engine, config, tmp_path, 2, 0, lambda n: None)
        assert len(str(caught.value).splitlines()) == 1


def test_the_mean_of_common_sense_is_the_papers() -> None:
    names = ("arc_easy", "arc_challenge", "piqa", "hellaswag", "winogrande", "openbookqa")
    results = {
        name: {"acc,none": 0.1 * n, "acc_stderr,none": 0.01 * n, "alias": name}
        for n, name in enumerate(names, start=1)
    }
    found = scores_of(results)
    assert found["csr/acc"] == pytest.approx(0.35)
    assert found["csr/acc_stderr"] == pytest.approx(0.01 * math.sqrt(91) / 6)
    results.pop("piqa")
    assert "csr/acc" not in scores_of(results)
    filtered = {"gsm8k": {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1}}
    assert scores_of(filtered) == {
        "gsm8k/exact_match,strict": 0.5,
        "gsm8k/exact_match,strict_stderr": 0.1,
    }


def test_a_chat_is_rendered_as_the_tokenizer_does(engine: Engine) -> None:
    model = HarnessModel(engine, 2, lambda n: None, 0)
    asked = [{"role": "user", "content": "why?"}]
    assert model.apply_chat_template(asked) == (
        "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    begun = [*asked, {"role": "assistant", "content": "Because"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False).endswith("Because")
    assert model.prefix_token_id == model.eot_token_id == engine.tokenizer.eos_token_id


@pytest.mark.cluster
@pytest.mark.usefixtures("embedded_ray")
def test_the_command_shows_scores_and_runs_tasks_of_lm_eval(
    loud_directory: Path,
    tmp_path: Path,
) -> None:
    lm_eval = {"tasks": ["x"], "include_path": str(quizzes.write_tasks(tmp_path))}
    quiz = str(tiny.write_jsonl(tmp_path / "own.jsonl", quizzes.CHOICES))
    section = {
        "model": str(loud_directory),
        "adapter": None,
        "output": str(tmp_path / "out"),
        "precision": "fp32",
        "cpus_per_worker": 1,
        "benchmarks": [{"kind": "choice", "data": quiz}],
        "lm_eval": lm_eval,
    }
    file = tmp_path / "run.yaml"
    file.write_text(
        yaml.safe_dump({"base": str(loud_directory), "output": "o", "evaluate": section})
    )
    command = ["evaluate", "--config", str(file), "--lm-eval", "tiny_quiz,tiny_words"]
    shown = CliRunner().invoke(app, command, catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    for said in ("own", "accuracy normalised", "tiny_quiz", "tiny_words", "exact match"):
        assert said in shown.output
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert {"own/accuracy", "tiny_quiz/acc", "tiny_quiz/acc_stderr"} <= scores.keys()
    samples = (tmp_path / "out" / "items" / "tiny_words.jsonl").read_text().splitlines()
    assert len(samples) == len(quizzes.QUIZ)
    again = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    details = json.loads(again.stdout)["details"]
    assert {key: details[key] for key in scores} == scores


def test_answers_without_a_padding_token_do_not_depend_on_their_batch() -> None:
    from lm_eval.api.instance import Instance

    tokenizer = tokenizers_of.bytes_first()
    end = tokenizer.eos_token_id
    rows = [[*tokenizer("aX")["input_ids"], end], [*tokenizer("bYZ12345")["input_ids"], end]]
    engine = Engine(tokenizers_of.scripted(tokenizer, *rows), tokenizer)
    requests = [
        Instance("generate_until", {}, (text, {"until": ["5"], "max_gen_toks": 12}), number)
        for number, text in enumerate(("a", "..b"))
    ]
    for size in (1, 2):
        model = HarnessModel(engine, size, lambda _: None, 0)
        with torch.inference_mode():
            assert model.generate_until(requests) == ["X", "YZ1234"]


def test_texts_begin_as_the_tokenizer_begins_them_and_are_not_ended() -> None:
    tokenizer = tokenizers_of.framed("<bos>", "<|endoftext|>")
    engine = Engine(tokenizers_of.scripted(tokenizer, [5, 6]), tokenizer)
    model = HarnessModel(engine, 1, lambda _: None, 0)
    begun = tokenizer("a")["input_ids"][:-1]
    assert model.tok_encode("a") == model.tok_encode("<bos>a") == begun
    assert model.tok_encode("a", add_special_tokens=False) == begun[1:]
