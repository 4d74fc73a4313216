"""Plan a comparison: stages that share as much as possible, and the scores they produce."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram_ray.config import (
    ALIGNMENTS,
    AlignConfig,
    CompareConfig,
    EvaluateConfig,
    MergeConfig,
    PruneConfig,
    QuantizeConfig,
    RecoverConfig,
    TrainConfig,
    merge_settings,
    validate,
)
from loram_ray.criteria import STRUCTURED
from loram_ray.errors import LoramError
from loram_ray.studies.steps import Cell, Comparison, share_stages

_DEFAULTS = PruneConfig.model_fields
_ON_WHOLE_MODELS = {"base", "full", "sibling"}


@dataclass(frozen=True)
class Pruning:
    """Pruning setting of a comparison.

    Attributes:
        method: Pruning criterion.
        ratio: Share pruned.
        pattern: N:M pattern that determines the ratio; None if only the ratio is given.
    """

    method: str
    ratio: float
    pattern: str | None = None

    @property
    def share(self) -> str:
        """Ratio or pattern as configured."""
        return self.pattern or f"{self.ratio:g}"

    @property
    def label(self) -> str:
        """Label in tables, shown beside the ratio."""
        return self.method if self.pattern is None else f"{self.method} {self.pattern}"

    @property
    def name(self) -> str:
        """Name for directories."""
        return f"{self.method}-{self.share.replace(':', 'of')}"


def comparison_of(config: CompareConfig) -> Comparison:
    """Plan a comparison.

    Raises:
        LoramError: If a section is missing, or does not accept the comparison's values.
    """
    return _Planner(config).planned()


class _Planner:
    def __init__(self, config: CompareConfig) -> None:
        self._config = config
        self._root = config.output
        self._first: dict[str, str] = {}  # first alignment that prepares each shared result
        self._planned = Comparison()
        self._systems: tuple[str, ...] = config.systems or tuple(
            system for system in self._possible() if system != "loram"
        )
        if unknown := set(self._systems) - set(self._possible()):
            raise LoramError(
                "compare.systems must have a section for each system, got "
                f"{', '.join(sorted(unknown))} without {self._missing(unknown)}; add it"
            )

    def _possible(self) -> Iterator[str]:
        yield "base"
        if self._config.train is None:
            raise LoramError("compare needs the section train; add 'train:'")
        yield "full"
        if self._config.sibling is not None:
            yield "sibling"
        if self._config.prune is None:
            return
        yield from ("pruned", "small", "unaligned")
        if self._config.align is not None:
            yield from (*self._config.aligned, "loram")
        yield "qloram"

    def _missing(self, systems: set[str]) -> str:
        aligned = systems <= {*self._config.aligned, "loram"}
        return "align" if self._config.prune is not None and aligned else "prune"

    def planned(self) -> Comparison:
        for task in self._config.tasks:
            if "base" in self._systems:
                scored = self._scored(f"base/{task}", task, self._config.base)
                self._planned.cells.append(Cell("base", task, None, scored))
        for seed in (
            self._config.seeds
        ):  # the outermost loop, so that a partial run contains whole comparisons
            for task in self._config.tasks:
                self._on_a_whole_model("full", self._config.base, task, seed)
                if self._config.sibling is not None:
                    self._on_a_whole_model("sibling", self._config.sibling, task, seed)
            for pruning in self._prunings():
                self._on_a_pruned_model(pruning, seed)
        if "loram" in self._systems:
            share_stages(self._planned.steps, self._config.run)
        return self._planned

    def _prunings(self) -> Iterator[Pruning]:
        prune, methods = self._config.prune, self._config.methods
        if prune is None or set(self._systems) <= _ON_WHOLE_MODELS:
            return
        if not isinstance(methods, dict):
            method, ratio, pattern = (
                prune.get(key, _DEFAULTS[key].default) for key in ("method", "ratio", "pattern")
            )
            share = pattern if ":" in str(pattern) else ratio
            methods = dict.fromkeys(methods or (method,), self._config.ratios or (share,))
        for method, shares in methods.items():
            for share in shares:
                if isinstance(share, str):
                    zeros, of = map(int, share.split(":"))
                    yield Pruning(method, zeros / max(of, 1), share)
                else:
                    yield Pruning(method, share)

    def _on_a_whole_model(self, system: str, model: str, task: str, seed: int) -> None:
        if system not in self._systems:
            return
        folder = f"{system}/{task}-{seed}"
        trained = self._trained(f"{folder}/adapter", model, task, seed)
        scored = self._scored(folder, task, model, self._root / trained, trained)
        self._planned.cells.append(Cell(system, task, seed, scored, training=trained))

    def _on_a_pruned_model(self, pruning: Pruning, seed: int) -> None:
        config = self._prune_config(pruning, seed)
        masked = config.pattern != STRUCTURED
        models = self._models(pruning, config, seed)
        folder = f"{pruning.name}-{seed}"

        def cell(system: str, task: str, scored: str, trained: str | None = None) -> None:
            if system.partition(" ")[0] in self._systems:
                self._planned.cells.append(
                    Cell(system, task, seed, scored, pruning.label, pruning.ratio, trained)
                )

        for task in self._config.tasks:
            if "pruned" in self._systems:
                pruned = models["unaligned"]
                scored = self._scored(
                    f"{folder}/pruned/{task}", task, self._root / pruned, None, pruned
                )
                cell("pruned", task, scored)
            for system, model in models.items():
                of_small = "small" in self._systems and system == self._of_small(models)
                if system not in self._systems and not of_small:
                    continue
                inner = f"{folder}/{system}/{task}"
                trained = self._trained(
                    f"{inner}/adapter_pruned", self._root / model, task, seed, model
                )
                if of_small:
                    scored = self._scored(
                        f"{folder}/small/{task}", task, self._root / model, self._root / trained,
                        trained,
                    )  # fmt: skip
                    cell("small", task, scored, trained)
                if system not in self._systems:
                    continue
                settings = self._recovery(system, masked)
                cell(system, task, self._recovered(inner, trained, task, settings), trained)
                may_correct = not masked and system not in ("unaligned", "loram")
                if self._config.correction and may_correct:
                    scored = self._recovered(
                        f"{inner}/corrected", trained, task, self._corrected(model), model
                    )
                    cell(f"{system} + correction", task, scored, trained)

    def _of_small(self, models: dict[str, str]) -> str:
        """Return the system whose model ``small`` uses: the paper's alignment if present."""
        return "causal" if "causal" in models else next(iter(models))

    def _prune_config(self, pruning: Pruning, seed: int) -> PruneConfig:
        assert self._config.prune is not None
        base = self._config.base
        settings = {**self._config.prune, "base": base, "method": pruning.method, "seed": seed}
        settings["output"] = self._root / f"models/{pruning.name}-{seed}-pruned"
        if pruning.pattern is None:
            settings["ratio"] = pruning.ratio
        else:
            settings["pattern"] = pruning.pattern
            settings.pop("ratio", None)
        return validate(
            PruneConfig, settings, f"compare with method {pruning.method}, ratio {pruning.share}"
        )

    def _models(self, pruning: Pruning, config: PruneConfig, seed: int) -> dict[str, str]:
        """Return the names of the steps that make the models to train on, by system."""
        prefix = f"models/{pruning.name}-{seed}"
        pruned = self._planned.add(f"{prefix}-pruned", config)
        models = {"unaligned": pruned}
        if self._config.align is not None:
            wanted = set(self._systems)
            for system, more in {**self._config.aligned, "loram": {}}.items():
                for_others = system == "causal" and "small" in wanted
                for_others |= system == self._of_qloram() and "qloram" in wanted
                if system in wanted or for_others:
                    models[system] = self._aligned(f"{prefix}-{system}", system, pruned, more, seed)
        if "qloram" in self._systems and config.pattern == STRUCTURED:
            parent = models[self._of_qloram()]
            quantize = QuantizeConfig(
                model=self._root / parent,
                output=self._root / f"{prefix}-quantized",
                base=self._config.base,
            )
            models["qloram"] = self._planned.add(f"{prefix}-quantized", quantize, parent)
        return models

    def _of_qloram(self) -> str:
        """Return the system whose model is quantised: the best alignment among those compared."""
        if self._config.align is None:
            return "unaligned"
        return "causal" if set(ALIGNMENTS) & set(self._systems) == {"causal"} else "distilled"

    def _aligned(self, name: str, system: str, pruned: str, more: dict[str, Any], seed: int) -> str:
        assert self._config.align is not None
        settings = merge_settings(self._config.align, more)
        settings |= {"base": self._config.base, "pruned": self._root / pruned, "seed": seed}
        settings |= {"output": self._root / name, "cache_dir": self._root / "models" / "prepared"}
        config = validate(AlignConfig, settings, f"compare, system {system}")
        shared = ["corpus"]
        if config.distils and config.distillation.targets == "cached":
            # other alignments may share these targets, as do all runs of this one
            shared += [f"targets of seed {seed}", f"targets of {system}, seed {seed}"]
        first = {self._first.setdefault(what, name) for what in shared} - {name}
        return self._planned.add(name, config, pruned, *sorted(first))

    def _trained(self, name: str, model: Any, task: str, seed: int, *needs: str) -> str:
        assert self._config.train is not None
        settings = {**self._config.train, "model": model, "seed": seed}
        settings |= {"output": self._root / name, "data": self._config.tasks[task].data}
        config = validate(TrainConfig, settings, "compare, section train")
        return self._planned.add(name, config, *needs)

    def _recovery(self, system: str, masked: bool) -> dict[str, Any]:
        """Return the recover section's keys for a system without the correction."""
        if system == "loram":
            return dict(self._config.recover or {})
        return {"form": "delta"} if masked else {"correction": False}

    def _corrected(self, model: str) -> dict[str, Any]:
        """Return the recover section's keys for a correction with the model trained on."""
        recover = self._config.recover or {}
        kept = {key: recover[key] for key in ("correction_lambda",) if key in recover}
        return {"correction": True, "model": self._root / model, **kept}

    def _recovered(
        self, folder: str, trained: str, task: str, settings: dict[str, Any], *needs: str
    ) -> str:
        """Recover an adapter, merge it if only its delta is exact, and score it."""
        settings = {**settings, "adapter": self._root / trained, "base": self._config.base}
        settings["output"] = self._root / folder / "adapter"
        config = validate(RecoverConfig, settings, "compare, section recover")
        recovered = self._planned.add(f"{folder}/adapter", config, trained, *needs)
        if config.form != "delta":
            return self._scored(folder, task, self._config.base, self._root / recovered, recovered)
        merging = MergeConfig(
            base=self._config.base,
            adapter=self._root / recovered,
            output=self._root / folder / "merged",
        )
        merged = self._planned.add(f"{folder}/merged", merging, recovered)
        return self._scored(folder, task, self._root / merged, None, merged)

    def _scored(
        self, folder: str, task: str, model: Any, adapter: Path | None = None, *needs: str
    ) -> str:
        settings = dict(self._config.evaluate or {})
        if self._config.train is not None and self._config.train.get("chat_template") is not None:
            settings.setdefault("chat_template", self._config.train["chat_template"])
        settings |= {"model": str(model), "adapter": adapter}
        settings |= {"output": self._root / folder / "scores"}
        settings["data"] = self._config.tasks[task].held_out
        config = validate(EvaluateConfig, settings, "compare, section evaluate")
        return self._planned.add(f"{folder}/scores", config, *needs)
