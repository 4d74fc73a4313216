"""A conversation against transformers' own generation."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import loram_ray as lr
from helpers import adapters, tiny
from helpers.processes import COMMAND, ENVIRONMENT
from loram_ray.cli.main import app
from loram_ray.evaluation.chat import Sampling, open_chat

QUESTIONS = ("What is 3 + 4?", "And 5?")


def expected(base: Path, messages: list[dict[str, str]], new: int) -> str:
    """The likeliest token, again and again, until one that ends the answer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    found: list[int] = []
    for _ in range(new):
        with torch.inference_mode():
            token = int(
                model(torch.cat([ids, torch.tensor([found]).long()], 1)).logits[0, -1].argmax()
            )
        found.append(token)
        if token in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")):
            break
    return tokenizer.decode(found, skip_special_tokens=True)


def test_answers_are_the_likeliest_tokens_after_the_conversation_so_far(base: Path) -> None:
    chat = open_chat(str(base), system="Be brief.", sampling=Sampling(max_new_tokens=12))
    messages = [{"role": "system", "content": "Be brief."}]
    for question in QUESTIONS:
        pieces: list[str] = []
        answer = chat.ask(question, pieces.append)
        messages.append({"role": "user", "content": question})
        assert answer == expected(base, messages, 12)
        assert "".join(pieces) == answer + "\n"
        messages.append({"role": "assistant", "content": answer})
    assert chat.messages == messages


def test_draws_follow_the_seed_and_an_adapter_changes_the_answer(
    base: Path, tmp_path: Path
) -> None:
    def answer(adapter: Path | None = None, **sampling: float) -> str:
        settings = Sampling(**{"max_new_tokens": 16, **sampling})
        return open_chat(str(base), adapter, sampling=settings).ask(QUESTIONS[0], lambda _: None)

    drawn = answer(temperature=2.0, seed=1)
    assert drawn == answer(temperature=2.0, seed=1)
    assert drawn != answer(temperature=2.0, seed=2)
    adapter, _ = adapters.train_randomly(base, tmp_path / "adapter")
    assert answer(adapter) != answer()


def test_one_question_on_the_command_line_or_standard_input(
    base: Path,
) -> None:
    line = ["chat", "--model", str(base), "--max-new-tokens", "8"]
    answer = expected(base, [{"role": "user", "content": QUESTIONS[0]}], 8) + "\n"
    asked = CliRunner().invoke(app, [*line, "--prompt", QUESTIONS[0]])
    assert (asked.exit_code, asked.stdout) == (0, answer)
    assert CliRunner().invoke(app, line, input=QUESTIONS[0]).stdout == answer


def test_on_a_terminal_the_conversation_goes_on(base: Path) -> None:
    ours, theirs = pty.openpty()
    line = [*COMMAND, "chat", "--model", str(base), "--max-new-tokens", "8"]
    with subprocess.Popen(
        line, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=ENVIRONMENT
    ) as process:
        os.write(ours, f"{QUESTIONS[0]}\n{QUESTIONS[1]}\n\n".encode())
        out = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 0
    messages: list[dict[str, str]] = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        answer = expected(base, messages, 8)
        assert answer in out
        messages.append({"role": "assistant", "content": answer})


def test_mistakes_are_one_line(base: Path, tmp_path: Path) -> None:
    silent = tiny.write_base(tmp_path / "silent")
    for path in silent.glob("chat_template*"):
        path.unlink()
    tokenizer = AutoTokenizer.from_pretrained(silent)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(silent)
    with pytest.raises(
        lr.LoramError, match="--model .* must have a chat template, but its tokenizer"
    ):
        open_chat(str(silent))
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert open_chat(str(silent), template=template).ask("a", lambda _: None) is not None
    with pytest.raises(lr.LoramError, match="--chat-template .* does not exist"):
        open_chat(str(base), template=tmp_path / "nothing")
    asked = CliRunner().invoke(app, ["chat", "--model", str(base), "--prompt", " "])
    assert str(asked.exception) == "--prompt must not be empty; add a question"
