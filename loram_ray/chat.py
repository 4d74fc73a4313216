"""A quick look at a model: questions in, answers as they are generated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from loram_ray.adapter import own_template
from loram_ray.corpus.examples import end_of_answer
from loram_ray.errors import LoramError
from loram_ray.evaluation.scoring import with_adapter
from loram_ray.model_files import resolve_base
from loram_ray.modeling import load_model
from loram_ray.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Sampling:
    """How an answer is generated.

    Attributes:
        max_new_tokens: its length at most.
        temperature: 0 takes the likeliest token each time.
        seed: of the draws.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


@dataclass
class Chat:
    """A conversation that goes on.

    Attributes:
        model: a causal LM of transformers, in evaluation mode.
        tokenizer: with a chat template.
        sampling: how answers are generated.
        messages: so far, in OpenAI's form.
    """

    model: Any
    tokenizer: Any
    sampling: Sampling
    messages: list[dict[str, str]] = field(default_factory=list)

    @torch.inference_mode()
    def ask(self, question: str, show: Callable[[str], None]) -> str:
        """Add a question and its answer to the conversation.

        Args:
            question: the user's message.
            show: is given the answer's pieces as they come.

        Returns:
            The answer.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        ids = self.tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        torch.manual_seed(self.sampling.seed)
        hot = self.sampling.temperature > 0
        ends = {self.tokenizer.eos_token_id, end_of_answer(self.tokenizer)} - {None}
        found = self.model.generate(
            **ids,
            max_new_tokens=self.sampling.max_new_tokens,
            do_sample=hot,
            temperature=self.sampling.temperature if hot else None,
            top_p=None,
            top_k=None,
            eos_token_id=sorted(ends) or None,
            pad_token_id=self.tokenizer.eos_token_id,
            streamer=_Pieces(self.tokenizer, show),
        )
        new = found[0, ids["input_ids"].shape[1] :]
        answer = str(self.tokenizer.decode(new, skip_special_tokens=True))
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return answer


class _Pieces(TextStreamer):
    """Hands whole words on, the prompt not among them."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by generate."""
        self._show(text + ("\n" if stream_end else ""))


def open_chat(
    model: str,
    adapter: Path | None = None,
    template: Path | None = None,
    system: str | None = None,
    sampling: Sampling | None = None,
    precision: str = "bf16",
) -> Chat:
    """Load a model to talk to, on a GPU where there is one.

    Args:
        model: directory of any stage's model, or a hub id.
        adapter: directory of an adapter to put on it.
        template: file with a chat template; default: the adapter's own, or else the tokenizer's.
        system: a system message.
        sampling: how answers are generated.
        precision: ``bf16`` or ``fp32``.

    Raises:
        LoramError: no such model, an adapter of other shapes, or no chat template.
    """
    directory = resolve_base(model, "--model")
    tokenizer = load_tokenizer(directory, template or own_template(adapter), "--chat-template")
    if not tokenizer.chat_template:
        raise LoramError(
            f"--model {model} must have a chat template, its tokenizer has none; give one with "
            "--chat-template FILE"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: Any = load_model(directory, precision, device)
    if adapter is not None:
        loaded = with_adapter(loaded, str(directory), adapter, "--adapter")
    messages = [{"role": "system", "content": system}] if system else []
    return Chat(loaded.eval(), tokenizer, sampling or Sampling(), messages)
