"""Forward passes of a base model, one decoder layer at a time, directly from its safetensors.

The model is built on the meta device, and only the running layer has weights. The other arguments
of a layer (position embeddings, attention masks) are those of the stock model: they are recorded in
one pass of the stock model in which every layer returns its input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.big_modeling import init_empty_weights
from torch import nn

from loram_ray.architectures import Architecture
from loram_ray.errors import LoramError
from loram_ray.losses import logits_of, summed_loss_of_states
from loram_ray.models.loading import DTYPES
from loram_ray.models.weights import ModelCheckpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a layer other than its hidden states."""


class LayerStream:
    """The layers of a base model, loaded on demand.

    Args:
        base: Directory of the base.
        family: Family of the base.
        precision: Precision of weights and activations, ``bf16`` or ``fp32``.
        device: Device on which layers run.
    """

    def __init__(self, base: Path, family: Architecture, precision: str, device: str) -> None:
        from loram_ray.models.modeling_pruned import unfuse_experts

        self.checkpoint = ModelCheckpoint(base)
        self._family = family
        self._dtype = DTYPES[precision]
        self._device = torch.device(device)
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._model = _empty_model(base, self._dtype)
        self._layers: Any = self._model.get_submodule(family.layers)
        for layer in self._layers.children():
            unfuse_experts(layer, self._model.config)
        self._model.eval()  # in training mode, experts without tokens would also run

    @contextmanager
    def layer(
        self, index: int, changed: Mapping[str, torch.Tensor] | None = None
    ) -> Iterator[nn.Module]:
        """Yield a decoder layer with its weights, which are freed after the block.

        Args:
            index: Number of the layer.
            changed: Weights that replace the base's, by full name.

        Raises:
            LoramError: If a weight is missing or not finite; the message names the tensor.
        """
        layer: nn.Module = self._layers[index]
        with self._loaded(layer, f"{self._family.layers}.{index}", changed or {}):
            yield layer

    def run(self, index: int, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Apply a loaded layer to hidden states ``[sequences, tokens, hidden]``."""
        arguments, keywords = self._calls_of(hidden.shape[0], hidden.shape[1])[index]
        output = layer(hidden, *arguments, **keywords)
        return output[0] if isinstance(output, tuple) else output

    def all_linears(self, index: int, layer: nn.Module) -> dict[str, nn.Linear]:
        """Return the linears of a layer by full path, as on disk."""
        return {
            self._family.name_on_disk(f"{self._family.layers}.{index}.{name}"): module
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        }

    def linears(self, index: int, layer: nn.Module) -> dict[str, nn.Linear]:
        """Return the coupled linears of a layer by full path."""
        found = self.all_linears(index, layer)
        return {path: module for path, module in found.items() if self._family.locate(path)}

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor of the base by its full name.

        Raises:
            LoramError: If the tensor is missing or not finite.
        """
        if name not in self.checkpoint.location:
            raise LoramError(
                f"{self.checkpoint.directory} lacks tensor {name}, which its config.json requires; "
                "download the model again"
            )
        return self.checkpoint.read(name)

    def embed(self, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the first layer's input ``[sequences, tokens, hidden]`` for each batch of ids."""
        with self._entrance():
            for token_ids in batches:
                yield self._pass_through(token_ids.to(self._device))

    @contextmanager
    def head(self) -> Iterator[None]:
        """Load the final norm and the output head inside the block."""
        family = self._family
        tied = f"{family.output_head}.weight" not in self.checkpoint.location
        source = family.embeddings if tied else family.output_head
        head = self._model.get_submodule(family.output_head)
        with self._loaded(self._norm, family.final_norm, {}), self._loaded(head, source, {}):
            yield

    def loss(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Return the summed next-token loss of the last layer's output, in nats.

        Call it inside `head`. It supports backpropagation there.
        """
        states = self._norm(hidden)
        return summed_loss_of_states(self._model, states, token_ids.to(self._device))[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return float32 logits ``[n, vocabulary]`` of the last layer's output, inside `head`."""
        return logits_of(self._model, self._norm(hidden))

    def close(self) -> None:
        """Close the base's files."""
        self.checkpoint.close()

    @property
    def vocabulary(self) -> int:
        """Number of tokens in the vocabulary."""
        return int(self._model.config.vocab_size)

    @property
    def output_head(self) -> nn.Linear:
        """The linear from hidden states to the vocabulary; it has no weights outside `head`."""
        head = self._model.get_submodule(self._family.output_head)
        assert isinstance(head, nn.Linear)
        return head

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self._layers)

    @property
    def _norm(self) -> nn.Module:
        return self._model.get_submodule(self._family.final_norm)

    def _calls_of(self, sequences: int, tokens: int) -> list[Call]:
        if (sequences, tokens) not in self._calls:
            ids = torch.zeros(sequences, tokens, dtype=torch.long, device=self._device)
            with self._entrance():
                self._pass_through(ids)
        return self._calls[sequences, tokens]

    @contextmanager
    def _entrance(self) -> Iterator[None]:
        """Load everything but the layers and the head: the embeddings and the final norm."""
        embeddings = self._model.get_submodule(self._family.embeddings)
        with (
            self._loaded(embeddings, self._family.embeddings, {}),
            self._loaded(self._norm, self._family.final_norm, {}),
        ):
            yield

    @torch.no_grad()
    def _pass_through(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Record each layer's arguments in a stock forward pass through identity layers."""
        calls: list[Call] = []
        first: list[torch.Tensor] = []

        def handing_on(hidden: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
            first[:] = first or [hidden]
            calls.append((arguments, keywords))
            return hidden

        with ExitStack() as stack:
            for layer in self._layers.children():
                layer.forward = handing_on
                stack.callback(layer.__dict__.pop, "forward")
            self._model.get_decoder()(input_ids=token_ids, use_cache=False)
        self._calls[token_ids.shape[0], token_ids.shape[1]] = calls
        return first[0]

    @contextmanager
    def _loaded(
        self, module: nn.Module, path: str, changed: Mapping[str, torch.Tensor]
    ) -> Iterator[None]:
        """Load a module's weights inside the block."""
        weights = {}
        for name, parameter in module.named_parameters():
            full = self._family.name_on_disk(f"{path}.{name}")
            tensor = changed[full] if full in changed else self.read(full)
            if tensor.shape != parameter.shape:
                raise LoramError(
                    f"{self.checkpoint.directory} has {full} of shape {tuple(tensor.shape)}, but "
                    f"its config.json requires {tuple(parameter.shape)}; download the model again"
                )
            weights[name] = tensor.to(self._device, self._dtype)
        module.load_state_dict(weights, strict=False, assign=True)
        module.requires_grad_(False)
        try:
            yield
        finally:
            for name, parameter in list(module.named_parameters()):
                parent, _, last = name.rpartition(".")
                empty = nn.Parameter(torch.empty_like(parameter, device="meta"))
                setattr(module.get_submodule(parent), last, empty)


def _empty_model(base: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the stock model without weights; its buffers (rotary frequencies) are real."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = AutoConfig.from_pretrained(base)
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model  # type: ignore[no-any-return]
