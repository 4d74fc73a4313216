"""Interactive chat with a model, streaming its answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from loram_ray.artifacts.adapter import own_template, require_readable
from loram_ray.artifacts.manifest import read_model_config
from loram_ray.corpus.conversations import Conversation
from loram_ray.corpus.templates import TemplateFault, ids_of, render
from loram_ray.errors import LoramError
from loram_ray.evaluation.generation import before_end, stop_tokens
from loram_ray.evaluation.scoring import with_adapter
from loram_ray.models.files import resolve_base
from loram_ray.models.loading import load_model
from loram_ray.models.tokenizer import continuation, load_tokenizer


@dataclass(frozen=True)
class Sampling:
    """How an answer is generated.

    Attributes:
        max_new_tokens: Maximum number of generated tokens.
        temperature: Sampling temperature; 0 takes the likeliest token.
        seed: Seed of sampling.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


@dataclass
class Chat:
    """A conversation with a model.

    Attributes:
        model: Causal LM of transformers, in evaluation mode.
        tokenizer: Tokenizer with a chat template.
        sampling: How answers are generated.
        messages: Messages so far, in OpenAI's format.
    """

    model: Any
    tokenizer: Any
    sampling: Sampling
    messages: list[dict[str, str]] = field(default_factory=list)

    @torch.inference_mode()
    def ask(self, question: str, show: Callable[[str], None]) -> str:
        """Add a question and its answer to the conversation.

        Args:
            question: The user's message.
            show: Called with each piece of the answer as it is generated.

        Returns:
            The answer.

        Raises:
            LoramError: The chat template rejects the conversation.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        try:
            text = render(self.tokenizer, Conversation("", asked), len(asked), prompt=True)
        except TemplateFault as error:
            raise LoramError(
                f"{error}; rephrase the question, or use another template with --chat-template FILE"
            ) from error
        prompt = ids_of(self.tokenizer, text)
        ids = torch.tensor([prompt], device=self.model.device)
        torch.manual_seed(self.sampling.seed)
        hot = self.sampling.temperature > 0
        ends = stop_tokens(self.model, self.tokenizer)
        pieces = _Pieces(self.tokenizer, prompt, ends, show)
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.sampling.max_new_tokens,
            do_sample=hot,
            temperature=self.sampling.temperature if hot else None,
            top_p=None,
            top_k=None,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else None,
            streamer=pieces,
        )
        self.messages = [*asked, {"role": "assistant", "content": pieces.text}]
        return pieces.text


class _Pieces(BaseStreamer):
    """Passes on an answer word by word as it is generated.

    Args:
        tokenizer: Tokenizer of the model.
        prompt: Token ids before the answer.
        ends: Tokens that end the answer.
        show: Called with each piece of text.

    Attributes:
        text: The answer so far.
    """

    def __init__(
        self, tokenizer: Any, prompt: list[int], ends: list[int], show: Callable[[str], None]
    ) -> None:
        self._tokenizer, self._prompt, self._ends, self._show = tokenizer, prompt, ends, show
        self._new: list[int] | None = None
        self._shown = 0
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        """Take new tokens from ``generate``, which passes the prompt first."""
        if self._new is None:
            self._new = []
            return
        self._new += value.flatten().tolist()
        self.text = continuation(self._tokenizer, self._prompt, before_end(self._new, self._ends))
        words = max(self.text.rfind(space) for space in " \n") + 1
        if words > self._shown:
            self._show(self.text[self._shown : words])
            self._shown = words

    def end(self) -> None:
        """Show the rest of the answer; called by ``generate`` at the end."""
        self._show(self.text[self._shown :] + "\n")


def open_chat(
    model: str,
    adapter: Path | None = None,
    template: Path | None = None,
    system: str | None = None,
    sampling: Sampling | None = None,
    precision: str = "bf16",
) -> Chat:
    """Load a model to chat with, on a GPU if there is one.

    Args:
        model: Directory of any stage's model, or a hub id.
        adapter: Directory of an adapter for the model.
        template: File with a chat template. Default: the adapter's own, or else the tokenizer's.
        system: System message.
        sampling: How answers are generated.
        precision: ``bf16`` or ``fp32``.

    Raises:
        LoramError: There is no such model, the adapter has other shapes, or there is no chat
            template.
    """
    directory = resolve_base(model, "--model")
    read_model_config(directory)
    if adapter is not None:
        require_readable(adapter, "--adapter")
    tokenizer = load_tokenizer(directory, template or own_template(adapter), "--chat-template")
    if not tokenizer.chat_template:
        raise LoramError(
            f"--model {model} must have a chat template, but its tokenizer has none; add "
            "--chat-template FILE"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: Any = load_model(directory, precision, device)
    if adapter is not None:
        loaded = with_adapter(loaded, str(directory), adapter, "--adapter")
    messages = [{"role": "system", "content": system}] if system else []
    return Chat(loaded.eval(), tokenizer, sampling or Sampling(), messages)
