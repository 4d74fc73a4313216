"""Calibrations in this process, and the corresponding results of stock models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

import loram_ray as lr
from helpers import tiny
from loram_ray.architectures import architecture_of
from loram_ray.artifacts.manifest import read_model_config
from loram_ray.artifacts.tensorfile import Checkpoint
from loram_ray.models.loading import load_model
from loram_ray.pruning.calibration import Calibration, share_out
from loram_ray.pruning.criteria import LayerScores
from loram_ray.pruning.pool import InProcess, Job
from loram_ray.pruning.worker import TOKENS_FILE, CalibrationSpec
from loram_ray.runtime.progress import Reporter
from loram_ray.units import Geometry

LAYERS = (1, 3)


# Longer than the sliding windows; 144 tokens, two experts each, leave no expert of four unused.
TOKENS = torch.randint(3, tiny.VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))


COLUMNS = ("o_proj", "down_proj", "w2")
"""Linears whose columns are pruned; of all others the rows are."""


FUSED_NAMES = {
    "mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
}


class Recording(InProcess):
    """Pool that records its jobs and their results, and inspects the work directory after each."""

    def __init__(self, setup: CalibrationSpec) -> None:
        super().__init__(setup)
        self.work = setup.work
        self.results: list[tuple[Job, Any]] = []
        self.on_disk: list[tuple[Job, set[str]]] = []

    def run(self, jobs: Sequence[Job]) -> Iterator[Any]:
        for job, result in zip(jobs, super().run(jobs), strict=True):
            self.results.append((job, result))
            self.on_disk.append((job, {p.name for p in self.work.glob("*-*") if p.is_dir()}))
            yield result

    def of(self, method: str) -> list[tuple[tuple[Any, ...], Any]]:
        return [(job[1], result) for job, result in self.results if job[0] == method]


@contextmanager
def walking(
    base: Path,
    work: Path,
    layers: tuple[int, int] = LAYERS,
    tokens: torch.Tensor = TOKENS,
    batch_size: int = 2,
    shares: int = 2,
    precision: str = "fp32",
    make_pool: Callable[[CalibrationSpec], Any] = Recording,
) -> Iterator[tuple[Calibration, Any]]:
    work.mkdir(exist_ok=True)
    save_file({"token_ids": tokens}, work / TOKENS_FILE)
    config = read_model_config(base)
    family = architecture_of(config["model_type"])
    spans = share_out(len(tokens), shares)
    setup = CalibrationSpec(base, family.model_type, work, precision, batch_size, spans)
    pool = make_pool(setup)
    with Checkpoint(base) as checkpoint, Reporter("test", total=9, unit="layer") as reporter:
        geometry = family.geometry(config)
        yield Calibration(setup, pool, checkpoint, family, geometry, layers, reporter), pool


def coupled(base: Path, layers: tuple[int, int] = LAYERS) -> list[str]:
    config = read_model_config(base)
    family = architecture_of(config["model_type"])
    geometry = family.geometry(config)
    return [m for layer in range(*layers) for m, _, _ in family.modules(layer, geometry)]


def by_linear(model: PreTrainedModel, of: Callable[[torch.Tensor], Any]) -> dict[str, torch.Tensor]:
    """Return a tensor for each weight of the stock model, by the linear's name on disk."""
    family = model.config.model_type
    found = {}
    for name, parameter in model.named_parameters():
        value = of(parameter)
        if family in FUSED_NAMES and ".mlp.experts." in name:
            block, gate, up, down = FUSED_NAMES[family]
            layer = name.partition(".mlp.")[0]
            width = model.model.layers[0].mlp.experts.down_proj.shape[-1]
            for expert in range(len(value)):
                path = f"{layer}.{block}.{expert}"
                if name.endswith("gate_up_proj"):
                    found[f"{path}.{gate}"] = value[expert, :width]
                    found[f"{path}.{up}"] = value[expert, width:]
                else:
                    found[f"{path}.{down}"] = value[expert]
        elif name.endswith(".weight"):
            found[name.removesuffix(".weight")] = value
    return found


def stock_gradients(
    base: Path, tokens: torch.Tensor
) -> tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the stock model's loss, gradients, and mean squared gradients of single samples."""
    model = load_model(base, "fp32").eval()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    gradients = {n: g.clone() for n, g in by_linear(model, lambda p: p.grad).items()}
    squares: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(()))
    for sample in tokens:
        model.zero_grad()
        model(input_ids=sample[None], labels=sample[None]).loss.backward()
        for name, gradient in by_linear(model, lambda p: p.grad).items():
            squares[name] = squares[name] + gradient.square() / len(tokens)
    return loss.item(), gradients, dict(squares)


def unit_of(name: str, index: int, sizes: Geometry) -> tuple[str, int]:
    """Return the KV head or neuron that a row or column of a linear belongs to."""
    dim, group = sizes.head_dim, sizes.num_heads // sizes.num_kv_heads
    queries, keys = sizes.num_heads * dim, sizes.num_kv_heads * dim
    if name in ("q_proj", "o_proj") or (name == "qkv_proj" and index < queries):
        return "kv_head", index // dim // group
    if name == "qkv_proj":
        return "kv_head", (index - queries) % keys // dim
    if name in ("k_proj", "v_proj"):
        return "kv_head", index // dim
    return "neuron", index % sizes.intermediate_size


def naive_scores(base: Path, importance: dict[str, torch.Tensor]) -> dict[int, LayerScores]:
    """Sum the importance of single weights, by linear, over the units of each layer."""
    config = read_model_config(base)
    sizes = architecture_of(config["model_type"]).geometry(config)
    scores: dict[int, LayerScores] = {}
    for module, values in importance.items():
        parts = module.split(".")
        layer, name = int(parts[2]), parts[-1]
        expert = int(parts[parts.index("experts") + 1]) if "experts" in parts else 0
        shape = (max(sizes.num_experts, 1), sizes.intermediate_size)
        found = scores.setdefault(
            layer, LayerScores(kv_heads=torch.zeros(sizes.num_kv_heads), neurons=torch.zeros(shape))
        )
        for index, value in enumerate(values.double().sum(0 if name in COLUMNS else 1).tolist()):
            kind, unit = unit_of(name, index, sizes)
            (found.kv_heads if kind == "kv_head" else found.neurons[expert])[unit] += value
    if sizes.num_experts:
        return scores
    return {i: LayerScores(s, neurons=s.neurons[0]) for i, s in scores.items()}


def assert_scores(found: dict[int, LayerScores], expected: dict[int, LayerScores]) -> None:
    assert found.keys() == expected.keys()
    for layer, scores in found.items():
        for kind in ("kv_heads", "neurons"):
            one, other = getattr(scores, kind), getattr(expected[layer], kind)
            torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-6 * other.max().item())


def stock_inputs(model: PreTrainedModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the inputs of every linear of the stock model, by its name on disk.

    They are recorded by hooks during one forward pass, ``[sequences, tokens, in]``. The stock model
    fuses the linears of experts, so their inputs, ``[its tokens, in]``, are computed from the
    inputs of the fused experts.
    """
    seen: dict[str, torch.Tensor] = {}
    family = model.config.model_type
    handles = []

    def of_linear(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            seen[name] = arguments[0].detach()

        return hook

    def of_experts(name: str) -> Callable[..., None]:
        def hook(experts: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            hidden, chosen = arguments[0].detach(), arguments[1]
            block, gate, up, down = FUSED_NAMES[family]
            for expert in range(experts.num_experts):
                came = hidden[[expert in row for row in chosen.tolist()]]
                if len(came):
                    path = f"{name.removesuffix('.mlp.experts')}.{block}.{expert}"
                    both = came @ experts.gate_up_proj[expert].detach().t()
                    width = both.shape[-1] // 2
                    seen[f"{path}.{gate}"] = seen[f"{path}.{up}"] = came
                    seen[f"{path}.{down}"] = functional.silu(both[:, :width]) * both[:, width:]

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(of_linear(name)))
        elif name.endswith(".mlp.experts"):
            handles.append(module.register_forward_pre_hook(of_experts(name)))
    with torch.no_grad():
        model.eval()(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def flat(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.reshape(-1, inputs.shape[-1]).double()


class Calls(list[Job]):
    """Jobs of one stage's calibration, in order."""

    def layers_of(self, method: str) -> list[int]:
        """Return the layer of each job of a method."""
        return [layer_of(job) for job in self if job[0] == method]


def layer_of(job: Job) -> int:
    """Return the layer that a job processes; 0 for the embeddings."""
    first = 0 if job[0] == "embed" else job[1][0]
    return int(first.split(".")[2]) if isinstance(first, str) else int(first)


class Lost(RuntimeError):
    """A simulated loss of a machine."""


def prune(base: Path, output: Path, method: str, text: Path | None = None, **settings: Any) -> Path:
    """Run the stage, calibrating on 6 short sequences if there is text."""
    calibration = settings.pop("calibration", {})
    if text is not None:
        calibration = {
            "sources": [{"path": str(text)}],
            "samples": 6,
            "sequence_length": 24,
            "batch_size": 2,
            "shares": 3,
            "cpus_per_worker": 1,
            **calibration,
        }
        settings["calibration"] = calibration
    if ":" not in settings.get("pattern", "") and "ratios" not in settings:
        settings.setdefault("ratio", 0.5)
    settings = {"base": str(base), "output": output, "method": method, "layers": LAYERS, **settings}
    return lr.prune(lr.PruneConfig.model_validate(settings)).output


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def files(directory: Path) -> dict[str, str]:
    """Return the hashes of a stage's files, except the manifest, which contains the time."""
    return {name: sha for name, sha in tiny.tree(directory).items() if name != "manifest.json"}


def spoilt_base(directory: Path, name: str, value: float) -> Path:
    base = tiny.write_base(directory)
    tensors = weights(base)
    tensors[name].view(-1)[5] = value
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return base
