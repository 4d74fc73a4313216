"""Define the alignment objective as a module for DeepSpeed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from loram_ray.config import AlignConfig
from loram_ray.distillation import DIVERGENCES, TopTokens, hidden_error
from loram_ray.losses import labelled, logits_of, output_head, sum_in_chunks

PARTS = ("nll", "divergence", "hidden_error")


class AlignmentModel(nn.Module):
    """Combine a pruned model with its base, if distillation is live, and compute the loss.

    The loss per predicted token is ``c * nll + (1 - c) * divergence + h * hidden_error``, where
    ``c`` is ``causal_lm_weight`` (1 for the causal-LM objective) and ``h`` is ``hidden_weight``.

    Args:
        model: Pruned model, a causal LM of Transformers.
        config: Configuration of the stage.
        teacher: Frozen base for live distillation.
    """

    def __init__(
        self, model: nn.Module, config: AlignConfig, teacher: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.teacher = teacher
        self._distils = config.distils
        if self._distils:
            self._divergence, self._top_divergence = DIVERGENCES[config.objective]
        self._temperature = config.distillation.temperature
        self._hidden_layers = config.distillation.hidden_layers if self._distils else ()
        causal_lm = config.distillation.causal_lm_weight if self._distils else 1.0
        hidden = config.distillation.hidden_weight if self._hidden_layers else 0.0
        self.weights = (causal_lm, 1.0 - causal_lm, hidden)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        top: TopTokens | None = None,
        positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the loss, and each of `PARTS`, over the predicted tokens of a micro-batch.

        Args:
            input_ids: Token ids, int64 ``[batch, seq]``.
            labels: Labels, int64 ``[batch, seq]``.
            top: The base's cached top-k targets, ``[batch, seq, ...]``.
            positions: Position ids, int64 ``[batch, seq]``, from `document_positions` if documents
                are isolated.

        Returns:
            The loss, a float32 scalar, and its components, float32 ``[3]``, detached.
        """
        wanted = labelled(labels)

        def rows(values: torch.Tensor) -> torch.Tensor:
            return values[:, :-1][wanted]

        states, layers = self._states(self.model, input_ids, positions)
        targets: list[torch.Tensor] = []
        hidden = states.new_zeros((), dtype=torch.float32)
        if self.teacher is not None:
            with torch.no_grad():
                base_states, base_layers = self._states(self.teacher, input_ids, positions)
            targets = [rows(base_states)]
            for mine, base in zip(layers, base_layers, strict=True):
                hidden = hidden + hidden_error(rows(mine), rows(base)).sum() / len(layers)
        elif top is not None:
            targets = [rows(part) for part in (top.token_ids, top.log_probs, top.missing)]
        loss, chunked = sum_in_chunks(
            self._chunk,
            (rows(states), labels[:, 1:][wanted], *targets),
            wanted.numel(),
            output_head(self.model),
            hidden.new_tensor(self.weights[:2]),
        )
        if self._hidden_layers:
            loss = loss + self.weights[2] * hidden
        return loss, torch.cat([chunked, hidden.detach()[None]])

    def loss(self, sums: torch.Tensor) -> torch.Tensor:
        """Weight sums or means of `PARTS` ``[3]`` into a float32 scalar."""
        return sums @ sums.new_tensor(self.weights)

    def parts(self, means: torch.Tensor) -> dict[str, float]:
        """Return the means of the computed `PARTS` for the log."""
        computed = 1 if not self._distils else 3 if self._hidden_layers else 2
        return dict(zip(PARTS[:computed], means.tolist(), strict=False))

    def _states(
        self, model: Any, input_ids: torch.Tensor, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the states after the final norm and the outputs of the selected layers."""
        decoder = model.get_decoder()
        output = decoder(
            input_ids=input_ids,
            position_ids=positions,
            use_cache=False,
            output_hidden_states=bool(self._hidden_layers),
        )
        return output[0], [output.hidden_states[layer + 1] for layer in self._hidden_layers]

    def _chunk(
        self, states: torch.Tensor, labels: torch.Tensor, *target: torch.Tensor
    ) -> torch.Tensor:
        """Return the summed negative log-likelihood and divergence of a chunk."""
        logits = logits_of(self.model, states)
        learns_text = self.weights[0] > 0
        nll = functional.cross_entropy(
            logits if learns_text else logits.detach(), labels, reduction="sum"
        )
        if self.teacher is not None:
            with torch.no_grad():
                base_logits = logits_of(self.teacher, *target)
            found = self._divergence(logits, base_logits, self._temperature)
        elif target:
            found = self._top_divergence(logits, TopTokens(*target), self._temperature)
        else:
            return torch.stack([nll, torch.zeros_like(nll)])
        return torch.stack([nll, found.sum()])
