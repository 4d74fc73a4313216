"""A base model run one decoder layer at a time, straight from its safetensors.

The model is built on the meta device; only the layer that runs has weights. What a layer is called
with (position embeddings, attention masks) is what the stock model calls it with: it is recorded
from one pass of the stock model in which every layer hands its input on.
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
"""What a layer is called with besides its hidden states."""


class LayerStream:
    """The layers of a base model, each loaded when it is asked for.

    Args:
        base: model directory.
        family: its family.
        precision: ``bf16`` or ``fp32``, of weights and activations.
        device: where a layer runs.
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
        self._model.eval()  # the experts are new; in training those without a token would run too

    @contextmanager
    def layer(
        self, index: int, changed: Mapping[str, torch.Tensor] | None = None
    ) -> Iterator[nn.Module]:
        """Yield a decoder layer with its weights, which are gone after the block.

        Args:
            index: its number.
            changed: weights that replace the base's, by their full names.

        Raises:
            LoramError: a weight is missing, or not finite (the tensor is named).
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
        """The linears of a layer by their full paths, as on disk."""
        return {
            self._family.name_on_disk(f"{self._family.layers}.{index}.{name}"): module
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        }

    def linears(self, index: int, layer: nn.Module) -> dict[str, nn.Linear]:
        """The coupled ones of a layer's linears."""
        found = self.all_linears(index, layer)
        return {path: module for path, module in found.items() if self._family.locate(path)}

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor of the base by its full name.

        Raises:
            LoramError: it is missing, or not finite.
        """
        if name not in self.checkpoint.location:
            raise LoramError(
                f"{self.checkpoint.directory} lacks tensor {name} that its config.json asks for; "
                "download the model again"
            )
        return self.checkpoint.read(name)

    def embed(self, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the first layer's input ``[sequences, tokens, hidden]`` of each batch of ids."""
        with self._entrance():
            for token_ids in batches:
                yield self._pass_through(token_ids.to(self._device))

    @contextmanager
    def head(self) -> Iterator[None]:
        """Have the final norm and the output head loaded inside the block."""
        family = self._family
        tied = f"{family.output_head}.weight" not in self.checkpoint.location
        source = family.embeddings if tied else family.output_head
        head = self._model.get_submodule(family.output_head)
        with self._loaded(self._norm, family.final_norm, {}), self._loaded(head, source, {}):
            yield

    def loss(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Summed next-token loss of the last layer's output, in nats, for use within `head`.

        It can be differentiated there.
        """
        states = self._norm(hidden)
        return summed_loss_of_states(self._model, states, token_ids.to(self._device))[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of outputs of the last layer, float32 ``[n, vocabulary]``, within `head`."""
        return logits_of(self._model, self._norm(hidden))

    def close(self) -> None:
        """Close the base's files."""
        self.checkpoint.close()

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return int(self._model.config.vocab_size)

    @property
    def output_head(self) -> nn.Linear:
        """The linear from hidden states to the vocabulary, without weights outside `head`."""
        head = self._model.get_submodule(self._family.output_head)
        assert isinstance(head, nn.Linear)
        return head

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
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
        """Have the embeddings and the final norm loaded: all but the layers and the head."""
        embeddings = self._model.get_submodule(self._family.embeddings)
        with (
            self._loaded(embeddings, self._family.embeddings, {}),
            self._loaded(self._norm, self._family.final_norm, {}),
        ):
            yield

    @torch.no_grad()
    def _pass_through(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Run the stock decoder with layers that hand their input on, recording their arguments."""
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
        """Have a module's weights inside the block."""
        weights = {}
        for name, parameter in module.named_parameters():
            full = self._family.name_on_disk(f"{path}.{name}")
            tensor = changed[full] if full in changed else self.read(full)
            if tensor.shape != parameter.shape:
                raise LoramError(
                    f"{self.checkpoint.directory} holds {full} as {tuple(tensor.shape)}, its "
                    f"config.json says {tuple(parameter.shape)}; download the model again"
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
    """The stock model without weights; its buffers (rotary frequencies) are real."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = AutoConfig.from_pretrained(base)
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model  # type: ignore[no-any-return]
