"""Compute the base's top-k next tokens, with the whole model or layer by layer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loram_ray.corpus.isolation import document_positions
from loram_ray.distillation import TopTokens
from loram_ray.losses import CHUNK, logits_of
from loram_ray.models.files import family_of
from loram_ray.models.hidden_states import HiddenStates
from loram_ray.models.layer_stream import LayerStream
from loram_ray.models.loading import load_model
from loram_ray.models.tokenizer import Frame
from loram_ray.runtime.memory import return_freed_memory


@dataclass(frozen=True)
class TeacherSpec:
    """Settings of a teacher actor.

    Attributes:
        base: Directory of the base.
        work: Directory for output files.
        top_k: Number of tokens kept per position.
        temperature: Temperature of the distributions.
        precision: Precision of the base's weights and activations.
        batch_size: Number of sequences per forward pass.
        cpus: Number of threads.
        streamed: Whether the base runs one layer at a time with hidden states on disk.
        frame: Token ids that begin and end a document; None unless documents are isolated.
        gpus: Number of GPUs to shard the base over; 0 and 1 do not shard it.
    """

    base: Path
    work: Path
    top_k: int
    temperature: float
    precision: str
    batch_size: int
    cpus: int
    streamed: bool
    gpus: int
    frame: Frame | None = None

    def top(self, states: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor]) -> TopTokens:
        """Return the top-k tokens ``[rows, seq, k]`` of states ``[rows, seq, hidden]``."""
        cpu = torch.device("cpu")
        parts = [
            TopTokens.of(head(part), self.top_k, self.temperature).to(cpu)
            for part in states.flatten(0, 1).split(CHUNK)
        ]
        shape = states.shape[:2]
        return TopTokens(
            torch.cat([part.token_ids for part in parts]).unflatten(0, shape),
            torch.cat([part.log_probs for part in parts]).unflatten(0, shape),
            torch.cat([part.missing for part in parts]).unflatten(0, shape),
        )


class WholeTeacher:
    """Base loaded as a whole, over several GPUs if the actor has them."""

    def __init__(self, spec: TeacherSpec, device: str) -> None:
        self._spec = spec
        if spec.gpus > 1:
            device = "auto"
        self._model: Any = load_model(spec.base, spec.precision, device).eval()

    @torch.inference_mode()
    def answer(self, batches: Sequence[torch.Tensor]) -> Iterator[TopTokens]:
        """Yield the top-k tokens ``[rows, seq, k]`` of each batch of ids ``[rows, seq]``."""
        decoder = self._model.get_decoder()
        for ids in batches:
            ids = ids.to(self._model.device)
            frame = self._spec.frame
            positions = None if frame is None else document_positions(ids, frame)
            states = decoder(input_ids=ids, position_ids=positions, use_cache=False)[0]
            yield self._spec.top(states, lambda part: logits_of(self._model, part))


class StreamedTeacher:
    """Base loaded one layer at a time; all batches pass a layer before the next is loaded."""

    def __init__(self, spec: TeacherSpec, device: str) -> None:
        self._spec, self._device = spec, device
        self._stream = LayerStream(spec.base, family_of(spec.base), spec.precision, device)
        self._folder = spec.work / f"states-{os.getpid()}"

    @torch.no_grad()
    def answer(self, batches: Sequence[torch.Tensor]) -> Iterator[TopTokens]:
        """Yield the top-k tokens ``[rows, seq, k]`` of each batch of ids ``[rows, seq]``."""
        states = HiddenStates(self._folder)
        try:
            for number, hidden in enumerate(self._stream.embed(batches)):
                states.write("input", 0, number, hidden)
            for layer in range(self._stream.num_layers):
                with self._stream.layer(layer) as module:
                    for number in range(len(batches)):
                        hidden = states.read("input", layer, number).to(self._device)
                        states.write(
                            "input", layer + 1, number, self._stream.run(layer, module, hidden)
                        )
                        del hidden
                        return_freed_memory()
                states.drop("input", layer)
            with self._stream.head():
                for number in range(len(batches)):
                    hidden = states.read("input", self._stream.num_layers, number)
                    yield self._spec.top(hidden.to(self._device), self._stream.logits)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)


def teacher_of(spec: TeacherSpec) -> WholeTeacher | StreamedTeacher:
    """Load the base as configured, on a GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = StreamedTeacher if spec.streamed else WholeTeacher
    return kind(spec, device)
