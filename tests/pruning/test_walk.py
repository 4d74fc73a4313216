"""The stream of layers against whole stock models: autograd, hooks, ablation, brute force."""

from __future__ import annotations

import pydoc_data.topics
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedModel

import loram_ray as lr
from helpers import families, tiny
from loram_ray.architectures import ARCHITECTURES, architecture_of
from loram_ray.artifacts.manifest import read_manifest, read_model_config
from loram_ray.artifacts.tensorfile import Checkpoint
from loram_ray.config import CalibrationConfig, load_run
from loram_ray.masks import MASKS_FILE, pack, unpack
from loram_ray.models.loading import load_model
from loram_ray.plan import PruningPlan
from loram_ray.pruning import driver as calibrate
from loram_ray.pruning import pool as pool_module
from loram_ray.pruning.calibration import Walk, share_out, solved_file
from loram_ray.pruning.criteria import LayerScores, TaylorForm
from loram_ray.pruning.pool import InProcess, Job, RayPool
from loram_ray.pruning.scores import SCORES_FILE
from loram_ray.pruning.sparse import Pattern, sparsegpt, wanda_mask
from loram_ray.pruning.statistics import Hessian, SquaredNorms
from loram_ray.pruning.worker import TOKENS_FILE, Setup
from loram_ray.runtime.progress import Reporter

LAYERS = (1, 3)
# Longer than the sliding windows; 144 tokens, two experts each, leave no expert of four unused.
TOKENS = torch.randint(3, tiny.VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))
COLUMNS = ("o_proj", "down_proj", "w2")
FUSED_NAMES = {
    "mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
}
TAYLOR_FAMILIES = ["llama", "qwen2", "gemma2", "olmo2", "phi3", "mixtral", "qwen3_moe"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of products this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Recording(InProcess):
    """A pool that keeps its jobs and their results, and looks at the work directory after each."""

    def __init__(self, setup: Setup) -> None:
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
    make_pool: Callable[[Setup], Any] = Recording,
) -> Iterator[tuple[Walk, Any]]:
    work.mkdir(exist_ok=True)
    save_file({"token_ids": tokens}, work / TOKENS_FILE)
    config = read_model_config(base)
    family = architecture_of(config["model_type"])
    spans = share_out(len(tokens), shares)
    setup = Setup(base, family.model_type, work, precision, batch_size, spans)
    pool = make_pool(setup)
    with Checkpoint(base) as checkpoint, Reporter("test", total=9, unit="layer") as reporter:
        geometry = family.geometry(config)
        yield Walk(setup, pool, checkpoint, family, geometry, layers, reporter), pool


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny base of each family, made when it is asked for."""
    folder, made = tmp_path_factory.mktemp("bases"), {}

    def base_of(family: str) -> Path:
        if family not in made:
            made[family] = families.write_base(folder / family, family, seed=3)
        return made[family]

    return base_of


def coupled(base: Path, layers: tuple[int, int] = LAYERS) -> list[str]:
    config = read_model_config(base)
    family = architecture_of(config["model_type"])
    geometry = family.geometry(config)
    return [m for layer in range(*layers) for m, _, _ in family.modules(layer, geometry)]


def by_linear(model: PreTrainedModel, of: Callable[[torch.Tensor], Any]) -> dict[str, torch.Tensor]:
    """A tensor of each weight of the stock model, by the name of the linear on disk."""
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
    """By the stock model's own loss: it, gradients, mean squared gradients of single samples."""
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


def unit_of(name: str, index: int, sizes: Any) -> tuple[str, int]:
    """To which KV head or neuron a row or column of a linear belongs."""
    dim, group = sizes.head_dim, sizes.num_heads // sizes.num_kv_heads
    queries, keys = sizes.num_heads * dim, sizes.num_kv_heads * dim
    if name in ("q_proj", "o_proj") or (name == "qkv_proj" and index < queries):
        return "kv_heads", index // dim // group
    if name == "qkv_proj":
        return "kv_heads", (index - queries) % keys // dim
    if name in ("k_proj", "v_proj"):
        return "kv_heads", index // dim
    return "neurons", index % sizes.intermediate_size


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
            layer, LayerScores(torch.zeros(sizes.num_kv_heads), torch.zeros(shape))
        )
        for index, value in enumerate(values.double().sum(0 if name in COLUMNS else 1).tolist()):
            kind, unit = unit_of(name, index, sizes)
            (found.kv_heads if kind == "kv_heads" else found.neurons[expert])[unit] += value
    if sizes.num_experts:
        return scores
    return {i: LayerScores(s.kv_heads, s.neurons[0]) for i, s in scores.items()}


def assert_scores(found: dict[int, LayerScores], expected: dict[int, LayerScores]) -> None:
    assert found.keys() == expected.keys()
    for layer, scores in found.items():
        for kind in ("kv_heads", "neurons"):
            one, other = getattr(scores, kind), getattr(expected[layer], kind)
            torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-6 * other.max().item())


# Gradients


@pytest.mark.parametrize("family", TAYLOR_FAMILIES)
def test_streamed_gradients_are_those_of_the_stock_model_s_own_loss(
    family: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases(family)
    loss, gradients, squares = stock_gradients(base, TOKENS)
    if family == "gemma2":
        assert read_model_config(base)["final_logit_softcapping"]
    with walking(base, tmp_path / "work") as (walk, pool):
        scores = walk.score_taylor(TaylorForm.MIXED)
    assert sum(result for _, result in pool.of("loss")) == pytest.approx(loss, rel=1e-5)
    found: dict[str, dict[str, torch.Tensor]] = {"total": {}, "squares": {}}
    for _, result in pool.of("backward"):
        for kind, sums in found.items():
            for name, tensor in getattr(result, kind).items():
                sums[name] = sums.get(name, torch.zeros(())) + tensor
    wanted = coupled(base)
    for kind, expected in (("total", gradients), ("squares", squares)):
        assert set(found[kind]) == set(wanted)
        for name in wanted:
            one, other = found[kind][name], expected[name]
            assert other.abs().max() > 0
            torch.testing.assert_close(
                one, other, rtol=1e-3, atol=1e-5 * other.abs().max().item(), msg=f"{kind} {name}"
            )

    weights = by_linear(load_model(base, "fp32"), torch.Tensor.detach)
    terms = {
        m: (weights[m] * gradients[m] - weights[m].square() * squares[m] / 2).abs() for m in wanted
    }
    assert_scores(scores, naive_scores(base, terms))


@pytest.mark.parametrize("form", ["first", "second"])
def test_taylor_forms_are_sums_of_the_stock_model_s_terms(
    form: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases("phi3")
    _, gradients, squares = stock_gradients(base, TOKENS)
    weights = by_linear(load_model(base, "fp32"), torch.Tensor.detach)
    terms = {}
    for m in coupled(base):
        first, second = weights[m] * gradients[m], weights[m].square() * squares[m]
        terms[m] = (first if form == "first" else second).abs()
    with walking(base, tmp_path / "work") as (walk, _):
        assert_scores(walk.score_taylor(TaylorForm(form)), naive_scores(base, terms))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("form", list(TaylorForm))
def test_taylor_scores_do_not_depend_on_batches_and_shares(
    family: str, form: TaylorForm, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    scores = []
    for number, (batch_size, shares) in enumerate([(1, 1), (6, 1), (2, 4), (4, 6), (3, 9)]):
        work = tmp_path / str(number)
        with walking(bases(family), work, batch_size=batch_size, shares=shares) as (walk, _):
            scores.append(walk.score_taylor(form))
    for other in scores[1:]:
        assert_scores(other, scores[0])


def test_layers_after_the_pruned_ones_carry_gradients_too(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """The first layer alone is pruned, so everything comes back through all the others."""
    base = bases("llama")
    _, gradients, _ = stock_gradients(base, TOKENS)
    weights = by_linear(load_model(base, "fp32"), torch.Tensor.detach)
    terms = {m: (weights[m] * gradients[m]).abs() for m in coupled(base, (0, 1))}
    with walking(base, tmp_path / "work", layers=(0, 1)) as (walk, pool):
        assert_scores(walk.score_taylor(TaylorForm.FIRST), naive_scores(base, terms))
    assert [(a[0], bool(a[2])) for a, _ in pool.of("backward")][::2] == [
        (3, False),
        (2, False),
        (1, False),
        (0, True),
    ]


def test_an_expert_without_tokens_scores_nothing_by_gradients(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases("qwen3_moe")
    tokens = torch.full((2, 8), 7)  # the same token everywhere: two experts of four
    _, gradients, squares = stock_gradients(base, tokens)
    terms = {
        m: (w * gradients[m] - w.square() * squares[m] / 2).abs()
        for m, w in by_linear(load_model(base, "fp32"), torch.Tensor.detach).items()
        if m in coupled(base)
    }
    with walking(base, tmp_path / "work", tokens=tokens) as (walk, _):
        scores = walk.score_taylor(TaylorForm.MIXED)
    assert_scores(scores, naive_scores(base, terms))
    assert any(not row.any() for s in scores.values() for row in s.neurons)


# Inputs


def stock_inputs(model: PreTrainedModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs of every linear of the stock model, by its name on disk: hooks on one whole pass.

    ``[sequences, tokens, in]``, or of an expert, whose linears the stock model does not have apart,
    ``[its tokens, in]``, computed from what came to the experts.
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


ALL = [architecture.model_type for architecture in ARCHITECTURES]


@pytest.mark.parametrize("family", ALL)
def test_hessians_and_norms_are_those_of_hooks_on_the_stock_model(
    family: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """Nothing is pruned, so every layer sees what the stock model's sees."""
    base = bases(family)
    inputs = stock_inputs(load_model(base, "fp32"), TOKENS)
    wanted = coupled(base, (0, 4))
    ratios = dict.fromkeys(range(4), 0.0)
    for method in ("sparsegpt", "wanda"):
        with walking(base, tmp_path / method, layers=(0, 4)) as (walk, pool):
            walk.solve(method, ratios, Pattern(), 0.01)
            norms = walk.input_norms()
        found = {arguments[0]: arguments[2] for arguments, _ in pool.of("solve")}
        assert list(found) == wanted
        for module in wanted:
            tokens = flat(inputs[module])
            statistic = found[module]
            if method == "sparsegpt":
                assert isinstance(statistic, Hessian) and statistic.count == len(tokens)
                expected = 2 / len(tokens) * tokens.t() @ tokens
                value = statistic.matrix.double()
            else:
                assert isinstance(statistic, SquaredNorms)
                expected, value = tokens.square().sum(0), statistic.total.double()
                assert torch.equal(norms[module], statistic.total)
            torch.testing.assert_close(
                value, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item()
            )


@pytest.mark.parametrize("family", ALL)
def test_flap_and_activation_are_those_of_hooks_on_the_stock_model(
    family: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases(family)
    model = load_model(base, "fp32")
    inputs, weights = stock_inputs(model, TOKENS), by_linear(model, torch.Tensor.detach)
    outgoing = [m for m in coupled(base) if m.rpartition(".")[2] in COLUMNS]
    variance = {m: flat(inputs[m]).var(0, correction=0) for m in outgoing}
    expected = naive_scores(base, {m: variance[m] * weights[m].square() for m in outgoing})
    with walking(base, tmp_path / "flap") as (walk, _):
        assert_scores(walk.score_forward("flap"), expected)
    # All sequences at once: the tokens that come to an expert in one batch count as one sequence.
    means = {
        m: inputs[m].double().abs().mean(-2).reshape(-1, inputs[m].shape[-1]) for m in outgoing
    }
    expected = naive_scores(base, {m: x.square().sum(0).sqrt()[None] for m, x in means.items()})
    with walking(base, tmp_path / "activation", batch_size=6, shares=1) as (walk, _):
        assert_scores(walk.score_forward("activation"), expected)


@pytest.mark.parametrize("method", ["flap", "activation"])
def test_forward_scores_do_not_depend_on_batches_and_shares(
    method: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    scores = []
    for number, (batch_size, shares) in enumerate([(1, 1), (6, 1), (2, 4), (4, 6)]):
        work = tmp_path / str(number)
        with walking(bases("gemma3_text"), work, batch_size=batch_size, shares=shares) as (walk, _):
            scores.append(walk.score_forward(method))
    for other in scores[1:]:
        assert_scores(other, scores[0])


@pytest.mark.parametrize("method", ["flap", "taylor"])
def test_scores_in_bf16_are_near_those_in_fp32(
    method: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    scores = {}
    for precision in ("fp32", "bf16"):
        work = tmp_path / precision
        with walking(bases("qwen2"), work, precision=precision) as (walk, _):
            if method == "flap":
                scores[precision] = walk.score_forward("flap")
            else:
                scores[precision] = walk.score_taylor(TaylorForm.FIRST)
    for layer, exact in scores["fp32"].items():
        rounded = scores["bf16"][layer]
        assert not torch.equal(rounded.neurons, exact.neurons)
        assert (rounded.neurons / exact.neurons - 1).abs().median() < 0.05
        assert (rounded.kv_heads / exact.kv_heads - 1).abs().median() < 0.05


# Non-structured pruning


def set_weights(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Replace weights of linears of the stock model, by their names on disk."""
    views = by_linear(model, torch.Tensor.detach)
    for name, tensor in tensors.items():
        if name.endswith(".weight"):
            views[name.removesuffix(".weight")].copy_(tensor)


SPARSE = {
    "sparsegpt": ["llama", "phi3", "gemma2", "mixtral"],
    "wanda": ["llama", "phi3", "olmo2", "qwen3_moe"],
}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize(("method", "family"), [(m, f) for m, fs in SPARSE.items() for f in fs])
def test_a_layer_is_solved_for_the_outputs_of_the_pruned_layers_before_it(
    method: str, family: str, pattern: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base, kind = bases(family), Pattern.parse(pattern)
    ratios = {1: 0.5, 2: 0.35, 3: 0.6}
    with walking(base, tmp_path / "work", layers=(1, 4)) as (walk, _):
        errors = walk.solve(method, ratios, kind, 0.02)
    model, dense = load_model(base, "fp32"), load_model(base, "fp32")
    whole = by_linear(dense, torch.Tensor.detach)
    untouched = stock_inputs(dense, TOKENS)
    differs = 0
    for layer, ratio in ratios.items():
        inputs = stock_inputs(model, TOKENS)  # earlier layers pruned, this one dense
        solved = load_file(solved_file(tmp_path / "work", layer))
        modules = coupled(base, (layer, layer + 1))
        assert set(solved) == {f"{m}.{part}" for m in modules for part in ("weight", "mask")}
        for module in modules:
            tokens, weight = flat(inputs[module]), whole[module]
            expected, mask = reference_solution(method, weight, tokens, ratio, kind)
            found = solved[f"{module}.weight"]
            kept = unpack(solved[f"{module}.mask"], found.shape[1])
            # Scores that are equal but for rounding may change places.
            assert (kept != mask).float().mean() < 0.005, module
            same = (kept == mask).all(1)
            if method == "wanda":
                assert torch.equal(found, weight * kept)
            torch.testing.assert_close(found[same], expected[same], rtol=5e-3, atol=5e-4)
            assert torch.equal(found != 0, kept)
            if kind.group:
                assert (kept.reshape(-1, kind.group).sum(1) == kind.group - kind.zeros).all()
            earlier = reference_solution(method, weight, flat(untouched[module]), ratio, kind)[0]
            differs += bool(layer > 1 and not torch.allclose(earlier, expected, rtol=5e-2))
            if method == "sparsegpt":
                assert errors[module] == pytest.approx(
                    relative_error(weight, found, tokens), rel=0.05
                )
        set_weights(model, solved)
    assert differs >= len(ratios)  # it does matter what the earlier layers became
    assert bool(errors) == (method == "sparsegpt")


def reference_solution(
    method: str, weight: torch.Tensor, tokens: torch.Tensor, ratio: float, pattern: Pattern
) -> tuple[torch.Tensor, torch.Tensor]:
    if method == "wanda":
        mask = wanda_mask(weight, tokens.square().sum(0).sqrt().float(), ratio, pattern)
        return weight * mask, mask
    hessian = (2 / len(tokens) * tokens.t() @ tokens).float()
    result = sparsegpt(weight, hessian, ratio, pattern, damping=0.02)
    return result.weight, result.mask


def relative_error(weight: torch.Tensor, found: torch.Tensor, tokens: torch.Tensor) -> float:
    outputs = tokens @ weight.double().t()
    return ((tokens @ found.double().t() - outputs).square().sum() / outputs.square().sum()).item()


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_an_expert_without_tokens_is_pruned_by_magnitude_and_said(
    method: str, bases: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = bases("mixtral")
    with walking(base, tmp_path / "work", layers=(1, 2), tokens=torch.full((2, 8), 7)) as (
        walk,
        pool,
    ):
        walk.solve(method, {1: 0.5}, Pattern(), 0.01)
    unused = [a[0] for a, _ in pool.of("solve") if a[2] is None]
    assert len(unused) == 6 and all("experts" in module for module in unused)
    solved, said = load_file(solved_file(tmp_path / "work", 1)), capfd.readouterr().err
    whole = load_file(base / "model.safetensors")
    for module in unused:
        assert f"{module} saw no calibration token" in said
        weight = whole[f"{module}.weight"]
        threshold = weight.abs().flatten().sort().values[weight.numel() // 2]
        assert torch.equal(solved[f"{module}.weight"], weight * (weight.abs() >= threshold))


# Disk


def test_forward_walks_have_two_layers_of_hidden_states_on_disk(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    for method in ("flap", "wanda"):
        with walking(bases("llama"), tmp_path / method) as (walk, pool):
            if method == "flap":
                walk.score_forward(method)
            else:
                walk.solve(method, {1: 0.5, 2: 0.5}, Pattern(), 0.01)
        for (name, arguments), folders in pool.on_disk:
            if name == "forward":
                layer = arguments[0]
                assert folders <= {f"input-{n:05d}" for n in (layer, layer + 1)}, (name, layer)
        assert not [p for p in (tmp_path / method).glob("input-*") if p.name != "input-00003"]


def test_taylor_keeps_the_inputs_it_goes_back_through_and_drops_them_on_the_way(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    with walking(bases("llama"), tmp_path / "work", layers=(2, 3)) as (walk, pool):
        walk.score_taylor(TaylorForm.FIRST)
    for (name, arguments), folders in pool.on_disk:
        layer = arguments[0]
        if name == "forward":
            allowed = {f"input-{n:05d}" for n in (layer, *range(2, layer + 2))}
            allowed |= {f"input-{layer + 1:05d}"}
        elif name == "backward":
            allowed = {f"gradient-{n:05d}" for n in (layer, layer + 1)}
            allowed |= {f"input-{n:05d}" for n in range(2, layer + 2)}
        else:
            continue
        assert folders <= allowed, (name, layer)
    left = {p.name for p in (tmp_path / "work").glob("*-*")}
    assert left <= {"input-00002", "gradient-00002"}


# The stage


class Calls(list[Job]):
    """Jobs of one stage's calibration, in order."""

    def layers_of(self, method: str) -> list[int]:
        """The layer of each job of a method."""
        return [layer_of(job) for job in self if job[0] == method]


def layer_of(job: Job) -> int:
    """The layer that a job is about; 0 for the embeddings."""
    first = 0 if job[0] == "embed" else job[1][0]
    return int(first.split(".")[2]) if isinstance(first, str) else int(first)


class Lost(RuntimeError):
    """A machine went away."""


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Calls]:
    """Have the stage's calibrations run here; returns a function that starts a list of the jobs.

    A job of which its argument is true is lost.
    """
    state: dict[str, Any] = {"calls": Calls(), "fails": lambda _: False}

    class Observed(InProcess):
        def run(self, jobs: Sequence[Job]) -> Iterator[Any]:
            for job in jobs:
                if state["fails"](job):
                    raise Lost(job[0])
                state["calls"].append(job)
                yield from super().run([job])

    @contextmanager
    def pool(setup: Setup, *_: Any) -> Iterator[InProcess]:
        yield Observed(setup)

    monkeypatch.setattr(calibrate, "ray_pool", pool)

    def start(fails: Callable[[Job], bool] = lambda _: False) -> Calls:
        state.update(calls=Calls(), fails=fails)
        return state["calls"]

    return start


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", tiny.texts())


def prune(base: Path, output: Path, method: str, text: Path | None = None, **settings: Any) -> Path:
    """Run the stage, over 6 short sequences where there is text."""
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
    """What a stage has written, but for its manifest, which holds the time."""
    return {name: sha for name, sha in tiny.tree(directory).items() if name != "manifest.json"}


METHODS = {
    "random": "structured",
    "magnitude": "structured",
    "taylor": "structured",
    "flap": "structured",
    "activation": "structured",
    "wanda": "unstructured",
    "sparsegpt": "unstructured",
    "magnitude, single weights": "unstructured",
}


@pytest.mark.parametrize("method", METHODS)
def test_a_ratio_of_zero_is_the_base_bit_for_bit(
    method: str, text: Path, tmp_path: Path, in_process: Callable[..., Calls]
) -> None:
    base = tiny.write_base(tmp_path / "base", dtype=torch.bfloat16)
    spoilt = weights(base)
    for layer in range(4):  # inputs that are always zero, whose columns SparseGPT would zero
        spoilt[f"model.layers.{layer}.mlp.up_proj.weight"][3] = 0
    save_file(spoilt, base / "model.safetensors", {"format": "pt"})
    name = method.partition(",")[0]
    source = None if name in ("random", "magnitude") else text
    output = prune(base, tmp_path / "out", name, source, ratio=0.0, pattern=METHODS[method])
    before, after = weights(base), weights(output)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    plan = PruningPlan.load(output)
    for module in coupled(base):
        if METHODS[method] == "structured":
            assert plan.kept(module).index.tolist() == list(range(plan.kept(module).full_size))
        else:
            assert plan.mask(module).all()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_masks_on_disk_are_the_weights_that_are_not_zero(
    method: str,
    pattern: str,
    base: Path,
    text: Path,
    tmp_path: Path,
    in_process: Callable[..., Calls],
) -> None:
    output = prune(base, tmp_path / "out", method, text, pattern=pattern)
    plan, before, after = PruningPlan.load(output), weights(base), weights(output)
    masks, modules = load_file(output / MASKS_FILE), coupled(base)
    assert set(masks) == set(modules)
    zeros = 0
    for name, tensor in after.items():
        module = name.removesuffix(".weight")
        assert tensor.shape == before[name].shape and tensor.dtype == before[name].dtype
        if module not in modules:
            assert torch.equal(tensor, before[name]), name
            assert plan.mask(module) is None
            continue
        mask = unpack(masks[module], tensor.shape[1])
        assert torch.equal(masks[module], pack(tensor != 0)) and torch.equal(mask, tensor != 0)
        assert torch.equal(plan.mask(module), mask)
        zeros += int((tensor == 0).sum())
        if pattern == "unstructured":
            rows = (tensor == 0).sum(1)
            assert rows.sum() == tensor.numel() // 2
            assert method != "wanda" or (rows == tensor.shape[1] // 2).all()
        else:
            n, m = map(int, pattern.split(":"))
            assert ((tensor == 0).reshape(len(tensor), -1, m).sum(-1) == n).all()
        moved = not torch.equal(tensor, before[name] * mask)
        assert moved == (method == "sparsegpt")
    total = sum(tensor.numel() for tensor in before.values())
    details = read_manifest(output).details
    assert details["nonzero_parameters"] == total - zeros
    assert details["parameters"] == details["base_parameters"] == total
    assert ("relative_errors" in details) == (method == "sparsegpt")
    loaded = load_model(output, "fp32")
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, after[f"{modules[5]}.weight"])


def test_each_layer_has_its_listed_share_of_zeros(
    base: Path, text: Path, tmp_path: Path, in_process: Callable[..., Calls]
) -> None:
    output = prune(base, tmp_path / "out", "sparsegpt", text, ratios=[0.0, 0.25])
    before, after = weights(base), weights(output)
    for name in before:
        if name.removesuffix(".weight") in coupled(base, (2, 3)):
            assert (after[name] == 0).sum() == after[name].numel() // 4
        else:
            assert torch.equal(after[name], before[name])


# Interrupted


CUTS: dict[str, tuple[str, dict[str, Any], Callable[[Job], bool], set[tuple[str, int]]]] = {
    "forward of scores": (
        "flap",
        {},
        lambda job: job[0] == "forward" and job[1][:2] == (2, 1),
        {("embed", 0), ("forward", 0), ("forward", 1)},
    ),
    "forward before the loss": (
        "taylor",
        {},
        lambda job: job[0] == "forward" and job[1][:2] == (2, 1),
        {("embed", 0), ("forward", 0), ("forward", 1)},
    ),
    "loss": (
        "taylor",
        {"taylor": "mixed"},
        lambda job: job[0] == "loss" and job[1][1] == 1,
        {("embed", 0), *(("forward", layer) for layer in range(4))},
    ),
    "first layer of the way back": (
        "taylor",
        {},
        lambda job: job[0] == "backward" and job[1][:2] == (3, 1),
        {("embed", 0), ("loss", 4), *(("forward", layer) for layer in range(4))},
    ),
    "a scored layer of the way back": (
        "taylor",
        {"taylor": "second"},
        lambda job: job[0] == "backward" and job[1][:2] == (1, 2),
        {("embed", 0), ("loss", 4), ("backward", 3), ("backward", 2)}
        | {("forward", layer) for layer in range(4)},
    ),
    "statistics": (
        "wanda",
        {"pattern": "2:4"},
        lambda job: job[0] == "forward" and job[1][:2] == (2, 2),
        {("embed", 0), ("forward", 0), ("forward", 1), ("solve", 1)},
    ),
    "solve": (
        "sparsegpt",
        {},
        lambda job: job[0] == "solve" and "2.mlp.down_proj" in job[1][0],
        {("embed", 0), ("forward", 0), ("forward", 1), ("solve", 1)},
    ),
    "outputs of a pruned layer": (
        "sparsegpt",
        {"pattern": "4:8"},
        lambda job: job[0] == "forward" and job[1][:2] == (1, 1) and job[1][3] is not None,
        {("embed", 0), ("forward", 0), ("solve", 1)},
    ),
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_calibration_that_was_cut_goes_on_at_its_layer(
    cut: str, base: Path, text: Path, tmp_path: Path, in_process: Callable[..., Calls]
) -> None:
    method, settings, fails, done = CUTS[cut]
    whole = in_process()
    expected = files(prune(base, tmp_path / "whole", method, text, **settings))
    output = tmp_path / "out"
    first = in_process(fails)
    with pytest.raises(Lost):
        prune(base, output, method, text, **settings)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", ".out.work"}
    assert {(job[0], layer_of(job)) for job in first} >= done
    again = in_process()
    assert files(prune(base, output, method, text, **settings)) == expected
    repeated = Counter((job[0], layer_of(job)) for job in again)
    assert not set(repeated) & done
    assert set(repeated) == {(job[0], layer_of(job)) for job in whole} - done
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def test_other_settings_do_not_go_on_from_the_work_of_a_cut_calibration(
    base: Path, text: Path, tmp_path: Path, in_process: Callable[..., Calls]
) -> None:
    in_process(lambda job: job[0] == "backward")
    with pytest.raises(Lost):
        prune(base, tmp_path / "out", "taylor", text)
    calls = in_process()
    prune(base, tmp_path / "out", "taylor", text, calibration={"samples": 5})
    assert calls.layers_of("forward") == [layer for layer in range(4) for _ in range(3)]
    again = in_process()
    prune(base, tmp_path / "fresh", "taylor", text, calibration={"samples": 5})
    assert calls == again and files(tmp_path / "out") == files(tmp_path / "fresh")


# Workers


@dataclass
class Killer:
    """Ends an actor in the middle of a layer's jobs, once."""

    method: str
    killed: list[str] = field(default_factory=list)

    def pool(self) -> type[RayPool]:
        killer = self

        class Killing(RayPool):
            def run(self, jobs: Sequence[Job]) -> Iterator[Any]:
                for result in super().run(jobs):
                    if jobs[0][0] == killer.method and not killer.killed:
                        # Its next job has been given to it when the first result comes.
                        self._ray.kill(self._actors[0], no_restart=False)
                        killer.killed.append(jobs[0][0])
                    yield result

        return Killing


@pytest.mark.slow
@pytest.mark.cluster
def test_two_workers_of_which_one_dies_score_as_one_here_does(
    base: Path, tmp_path: Path, embedded_ray: None
) -> None:
    with walking(base, tmp_path / "one", shares=4) as (walk, _):
        expected = walk.score_taylor(TaylorForm.MIXED)
    killer = Killer("backward")
    config = CalibrationConfig(sources=[{"path": "unread"}], workers=2)
    with walking(
        base, tmp_path / "two", shares=4, make_pool=lambda s: killer.pool()(s, config, 1)
    ) as (walk, pool):
        found = walk.score_taylor(TaylorForm.MIXED)
        assert killer.killed == ["backward"]
        with pytest.raises(lr.LoramError, match="lacks tensor model.layers.9.x.weight") as caught:
            arguments = ("model.layers.9.x", "wanda", None, 0.5, 0.01, Pattern())
            list(pool.run([("solve", arguments)]))
        assert "\n" not in str(caught.value)
        pool.close()
        until = time.monotonic() + 60
        with pytest.raises(lr.LoramError, match="more than .*max_failures = 3 times") as caught:
            # Ray returns from a kill before the actor is gone: a job may still succeed.
            while time.monotonic() < until:
                list(pool.run([("embed", (0,))]))
        assert "\n" not in str(caught.value)
    for layer, scores in expected.items():
        assert torch.equal(found[layer].kv_heads, scores.kv_heads)
        assert torch.equal(found[layer].neurons, scores.neurons)


def test_a_worker_says_what_is_wrong_with_its_base_when_it_is_given_a_job(tmp_path: Path) -> None:
    """What an actor's constructor raises arrives as a death, with nothing of the reason."""
    base = tiny.write_base(tmp_path / "base")
    shard = base / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-9])
    pool = InProcess(Setup(base, "llama", tmp_path, "fp32", 2, ((0, 6),)))
    with pytest.raises(lr.LoramError, match=r"model.safetensors is not a whole"):
        list(pool.run([("forward", (1, 0, None, None, True))]))


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize(
    ("method", "settings", "killed"),
    [("taylor", {"taylor": "mixed"}, "backward"), ("sparsegpt", {"pattern": "2:4"}, "forward")],
)
def test_one_worker_two_and_one_that_dies_write_the_same_files(
    method: str,
    settings: dict[str, Any],
    killed: str,
    base: Path,
    text: Path,
    tmp_path: Path,
    embedded_ray: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = prune(base, tmp_path / "one", method, text, calibration={"workers": 1}, **settings)
    two = prune(base, tmp_path / "two", method, text, calibration={"workers": 2}, **settings)
    assert files(two) == files(one)
    assert read_manifest(two).identity == read_manifest(one).identity
    killer = Killer(killed)
    monkeypatch.setattr(pool_module, "RayPool", killer.pool())
    output = prune(base, tmp_path / "killed", method, text, calibration={"workers": 1}, **settings)
    assert killer.killed == [killed]
    assert files(output) == files(one)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_worker_s_refusal_arrives_as_one_line_and_nothing_is_left(
    text: Path, tmp_path: Path, embedded_ray: None
) -> None:
    bad = spoilt_base(tmp_path / "base", "model.layers.2.mlp.up_proj.weight", float("nan"))
    before = tiny.tree(bad)
    for method in ("sparsegpt", "taylor"):
        with pytest.raises(lr.LoramError, match=r"tensor model\.layers\.2\.mlp\.up_proj") as caught:
            prune(bad, tmp_path / "out", method, text, calibration={"workers": 2})
        assert "\n" not in str(caught.value)
        assert {path.name for path in tmp_path.iterdir()} <= {"base", ".out.work"}
    assert tiny.tree(bad) == before


@pytest.mark.cluster
def test_workers_that_the_cluster_cannot_place_are_refused(
    base: Path, text: Path, tmp_path: Path, embedded_ray: None
) -> None:
    with pytest.raises(lr.LoramError, match=r"prune.calibration.workers needs 100 CPUs"):
        prune(base, tmp_path / "out", "flap", text, calibration={"workers": 99})
    assert not (tmp_path / "out").exists()


# Saved scores


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("taylor", {"taylor": "second"}),
        ("flap", {"allocation": "global"}),
        ("activation", {"round_neurons_to": 8}),
        ("magnitude", {}),
    ],
)
def test_saved_scores_give_another_ratio_what_a_new_calibration_gives(
    method: str,
    settings: dict[str, Any],
    base: Path,
    text: Path,
    tmp_path: Path,
    in_process: Callable[..., Calls],
) -> None:
    source = None if method == "magnitude" else text
    first = prune(base, tmp_path / "first", method, source, **settings)
    fresh = prune(base, tmp_path / "fresh", method, source, ratio=0.25, **settings)
    calls = in_process()
    again = prune(base, tmp_path / "again", method, ratio=0.25, scores=first, **settings)
    assert not calls
    assert files(again) == files(fresh) != files(first)
    narrower = prune(base, tmp_path / "narrower", method, scores=first, layers=(2, 3), **settings)
    assert PruningPlan.load(narrower).layers.keys() == {2}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_saved_norms_give_wanda_what_a_new_calibration_gives(
    pattern: str, base: Path, text: Path, tmp_path: Path, in_process: Callable[..., Calls]
) -> None:
    fresh = prune(base, tmp_path / "fresh", "wanda", text, pattern=pattern)
    calls = in_process()
    again = prune(base, tmp_path / "again", "wanda", scores=fresh, pattern=pattern)
    assert not calls and files(again) == files(fresh)


def test_scores_that_do_not_fit_are_refused(
    base: Path, text: Path, tmp_path: Path, in_process: Callable[..., Calls]
) -> None:
    taylor = prune(base, tmp_path / "taylor", "taylor", text)
    wanda = prune(base, tmp_path / "wanda", "wanda", text)
    sparsegpt = prune(base, tmp_path / "sparsegpt", "sparsegpt", text)
    random = prune(base, tmp_path / "random", "random")
    assert not (random / SCORES_FILE).exists() and not (sparsegpt / SCORES_FILE).exists()
    other = tiny.write_base(tmp_path / "other", seed=9)
    before = tiny.tree(tmp_path)
    calls = in_process()
    cases: list[tuple[Path, str, Path, dict[str, Any], str]] = [
        (base, "taylor", taylor, {"taylor": "second"}, "scores of taylor second, .* taylor first"),
        (base, "flap", taylor, {}, "prune.scores must be scores of flap, .* taylor first"),
        (base, "wanda", taylor, {}, "prune.scores must be scores of wanda"),
        (base, "taylor", wanda, {}, "prune.scores must be scores of taylor first, .* of wanda"),
        (base, "random", taylor, {}, "prune.scores must be scores of random"),
        (base, "sparsegpt", wanda, {}, "prune.scores must be scores of sparsegpt"),
        (base, "taylor", random, {}, "random and sparsegpt keep no scores"),
        (base, "sparsegpt", sparsegpt, {}, "random and sparsegpt keep no scores"),
        (base, "taylor", taylor, {"layers": (0, 3)}, "prune.scores must hold .* lacks layer 0"),
        (base, "wanda", wanda, {"layers": (1, 4)}, "prune.scores must hold .* lacks layer 3"),
        (other, "taylor", taylor, {}, "prune.scores .* was made of base .*; use scores of this"),
        (base, "taylor", base, {}, "prune.scores must be a directory written by prune"),
    ]
    for of_base, method, scores, settings, message in cases:
        with pytest.raises(lr.LoramError, match=message):
            prune(of_base, tmp_path / "out", method, scores=scores, **settings)
        assert tiny.tree(tmp_path) == before, message
    assert not calls


# Bad input


def spoilt_base(directory: Path, name: str, value: float) -> Path:
    base = tiny.write_base(directory)
    tensors = weights(base)
    tensors[name].view(-1)[5] = value
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return base


@pytest.mark.parametrize(
    ("method", "pattern", "tensor"),
    [
        ("magnitude", "structured", "model.layers.2.self_attn.o_proj.weight"),
        ("magnitude", "unstructured", "model.layers.1.mlp.down_proj.weight"),
        ("taylor", "structured", "lm_head.weight"),
        ("taylor", "structured", "model.layers.3.mlp.gate_proj.weight"),
        ("flap", "structured", "model.layers.0.input_layernorm.weight"),
        ("activation", "structured", "model.embed_tokens.weight"),
        ("wanda", "2:4", "model.layers.2.self_attn.k_proj.weight"),
        ("sparsegpt", "unstructured", "model.layers.1.mlp.up_proj.weight"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(
    method: str,
    pattern: str,
    tensor: str,
    value: float,
    text: Path,
    tmp_path: Path,
    in_process: Callable[..., Calls],
) -> None:
    base = spoilt_base(tmp_path / "base", tensor, value)
    source = None if method == "magnitude" else text
    with pytest.raises(lr.LoramError, match=rf"tensor {tensor} of .* must be finite, 1 of"):
        prune(base, tmp_path / "out", method, source, pattern=pattern)
    assert {path.name for path in tmp_path.iterdir()} <= {"base", ".out.work"}


def test_saved_norms_do_not_hide_a_weight_that_is_not_finite(
    base: Path, text: Path, tmp_path: Path, in_process: Callable[..., Calls]
) -> None:
    norms = prune(base, tmp_path / "wanda", "wanda", text)
    tensors = weights(base)
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(lr.LoramError, match="prune.scores .* was made of base|up_proj.*finite"):
        prune(copy, tmp_path / "out", "wanda", scores=norms)


def test_text_shorter_than_a_sample_is_refused(
    base: Path, tmp_path: Path, in_process: Callable[..., Calls]
) -> None:
    calls = in_process()
    short = tiny.write_jsonl(tmp_path / "short.jsonl", [{"text": "too short"}])
    with pytest.raises(
        lr.LoramError,
        match=r"prune.calibration.sources must hold at least one sequence of 24 tokens, .* 10; ",
    ):
        prune(base, tmp_path / "out", "flap", short)
    (tmp_path / "empty").mkdir()
    with pytest.raises(lr.LoramError, match=r"prune\.calibration\.sources\.0\.path"):
        prune(base, tmp_path / "out", "flap", tmp_path / "empty")
    assert {path.name for path in tmp_path.iterdir()} == {"short.jsonl", "empty"}
    assert not calls


def test_fewer_samples_than_asked_for_are_said_and_taken(
    base: Path,
    text: Path,
    tmp_path: Path,
    in_process: Callable[..., Calls],
    capfd: pytest.CaptureFixture[str],
) -> None:
    short = tiny.write_jsonl(tmp_path / "short.jsonl", tiny.texts(3))
    calls = in_process()
    settings = {"samples": 100, "shares": 64, "batch_size": 1}
    output = prune(base, tmp_path / "out", "flap", short, calibration=settings)
    tokens = len(calls) // 4  # an embedding and three layers of each
    assert 2 <= tokens <= 12 and len(calls) == 4 * tokens
    said = capfd.readouterr().err
    assert f"prune.calibration.sources hold {tokens} samples of 100; going on" in said
    assert PruningPlan.load(output).layers.keys() == {1, 2}


def test_a_sequence_longer_than_the_positions_is_refused(
    base: Path, text: Path, tmp_path: Path, in_process: Callable[..., Calls]
) -> None:
    with pytest.raises(
        lr.LoramError, match=r"prune.calibration.sequence_length must be at most 512 .* got 513"
    ):
        prune(base, tmp_path / "out", "taylor", text, calibration={"sequence_length": 513})
    assert not list(tmp_path.iterdir())
    prune(
        base, tmp_path / "out", "taylor", text, calibration={"sequence_length": 512, "samples": 1}
    )


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_an_m_that_does_not_divide_the_inputs_is_refused_before_anything_is_done(
    method: str, text: Path, tmp_path: Path, in_process: Callable[..., Calls]
) -> None:
    base = tiny.write_base(tmp_path / "base", intermediate=100)
    calls, before = in_process(), tiny.tree(tmp_path)
    with pytest.raises(
        lr.LoramError, match=r"m that divides .* got 4:8 and 100 inputs of model.layers.1.mlp.down"
    ):
        prune(base, tmp_path / "out", method, text, pattern="4:8")
    assert not calls and tiny.tree(tmp_path) == before


REFUSED_SETTINGS: dict[str, tuple[str, str]] = {
    "a pattern for units": (
        "{method: taylor, pattern: '2:4', calibration: {sources: [{path: x}]}}",
        r"prune.pattern must be structured for method taylor, got 2:4",
    ),
    "units for single weights": (
        "{method: wanda, pattern: structured, calibration: {sources: [{path: x}]}}",
        r"prune.pattern must be unstructured or n:m for method wanda, got structured",
    ),
    "no text": ("{method: flap}", r"prune.*calibration must be given for method flap"),
    "a ratio and n:m": (
        "{method: magnitude, pattern: '2:4', ratio: 0.3}",
        r"prune.*ratio and ratios must not be given with pattern 2:4",
    ),
    "ratios and n:m": (
        "{method: magnitude, pattern: '2:4', ratios: [0.3]}",
        r"prune.*ratio and ratios must not be given with pattern 2:4",
    ),
    "a share above one": (
        "{method: magnitude, ratios: [0.3, 1.3]}",
        r"prune.*ratios.1 must be at least 0 and below 1, got 1.3",
    ),
    "rounded neurons of single weights": (
        "{method: magnitude, pattern: unstructured, round_neurons_to: 8}",
        r"prune.*allocation and round_neurons_to must not be given with pattern unstructured",
    ),
}


@pytest.mark.parametrize("case", REFUSED_SETTINGS)
def test_settings_that_contradict_each_other_are_one_line(case: str, tmp_path: Path) -> None:
    settings, message = REFUSED_SETTINGS[case]
    with pytest.raises(lr.LoramError, match=message) as caught:
        load_run(None, ["base=b", f"output={tmp_path}", f"prune={settings}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["3", "4:2", "0:4", "2:4:8", "sparse"])
def test_a_pattern_that_is_none_is_refused(
    pattern: str, base: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(lr.LoramError, match=r"prune.pattern must be 'unstructured' or n:m"):
        prune(base, tmp_path / "out", "wanda", text, pattern=pattern)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_a_listed_ratio_out_of_range_is_refused_before_anything_is_calibrated(
    method: str, base: Path, text: Path, tmp_path: Path, in_process: Callable[..., Calls]
) -> None:
    calls = in_process()
    with pytest.raises(
        lr.LoramError, match=r"prune.ratios.1 must be at least 0 and below 1, got 1"
    ):
        prune(base, tmp_path / "out", method, text, pattern="unstructured", ratios=[0.5, 1.0])
    assert not calls and not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["taylor", "wanda"])
def test_a_directory_pruned_already_is_refused(
    method: str, base: Path, text: Path, tmp_path: Path, in_process: Callable[..., Calls]
) -> None:
    for earlier, pattern in (("random", "structured"), ("magnitude", "unstructured")):
        pruned = prune(base, tmp_path / earlier, earlier, pattern=pattern)
        before, calls = tiny.tree(tmp_path), in_process()
        with pytest.raises(lr.LoramError, match="prune.base must be a model that is not pruned"):
            prune(pruned, tmp_path / "out", method, text)
        assert not calls and tiny.tree(tmp_path) == before


# A real model


def loss_from(model: Any, layer: int, hidden: torch.Tensor, call: Any, ids: torch.Tensor) -> float:
    """Mean next-token loss from the input of a layer on."""
    for module in model.model.layers[layer:]:
        hidden = module(hidden, *call[0], **call[1])
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    logits = model.lm_head(model.model.norm(hidden)).float()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def ranks(values: torch.Tensor) -> torch.Tensor:
    return values.argsort().argsort().double()


def spearman(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([ranks(one), ranks(other)]))[0, 1].item()


@dataclass
class Whole:
    """A model, the inputs of its layers, and its loss."""

    model: Any
    ids: torch.Tensor
    calls: dict[int, tuple[torch.Tensor, Any]]
    loss: float

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, ids: torch.Tensor) -> Whole:
        calls: dict[int, tuple[torch.Tensor, Any]] = {}

        def hook(number: int) -> Callable[..., None]:
            def keep(_: nn.Module, arguments: Any, keywords: Any) -> None:
                calls[number] = arguments[0], (arguments[1:], keywords)

            return keep

        layers = enumerate(model.model.layers)
        handles = [m.register_forward_pre_hook(hook(i), with_kwargs=True) for i, m in layers]
        logits = model(input_ids=ids, use_cache=False).logits
        for handle in handles:
            handle.remove()
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return cls(model, ids, calls, loss.item())

    @torch.no_grad()
    def change(self, layer: int, linear: str, columns: slice) -> float:
        """How much the loss changes when a linear of a layer loses these inputs."""
        hidden, call = self.calls[layer]
        weight = self.model.model.layers[layer].get_submodule(linear).weight
        saved = weight[:, columns].clone()
        weight[:, columns] = 0
        loss = loss_from(self.model, layer, hidden, call, self.ids)
        weight[:, columns] = saved
        return abs(loss - self.loss)


@pytest.mark.slow
def test_taylor_scores_rank_units_as_cutting_them_off_does(real_base: Path, tmp_path: Path) -> None:
    """Spearman's rank correlation of the scores with the change of the loss, one unit at a time.

    Seen: 0.77 and 0.81 over 24 neurons, from the lowest score to the highest, of layers 26 and 29
    (0.5 to 0.8 of others, or with more text); 0.55 over the 30 GQA groups of layers 20 to 29 (0.46
    over all 87 of layers 1 to 29), with a group as large as a third of a layer's attention.
    """
    tokenizer = AutoTokenizer.from_pretrained(real_base)
    words = "\n".join(pydoc_data.topics.topics[t] for t in ("assert", "while", "lambda", "del"))
    ids = torch.tensor(tokenizer(words).input_ids[: 4 * 32]).view(4, 32)
    layers = (20, 30)
    with walking(real_base, tmp_path / "work", layers, ids, batch_size=4, shares=1) as (walk, _):
        scores = walk.score_taylor(TaylorForm.FIRST)
    whole = Whole.of(load_model(real_base, "fp32").eval(), ids)
    assert loss_from(whole.model, 29, *whole.calls[29], ids) == pytest.approx(whole.loss, rel=1e-5)

    for layer in (26, 29):
        order = scores[layer].neurons.argsort()
        sampled = order[torch.linspace(0, len(order) - 1, 24).long()].tolist()
        changes = [whole.change(layer, "mlp.down_proj", slice(i, i + 1)) for i in sampled]
        assert spearman(scores[layer].neurons[sampled], torch.tensor(changes)) > 0.45
    width = 3 * 64  # of 3 query heads
    changes = [
        whole.change(layer, "self_attn.o_proj", slice(group * width, (group + 1) * width))
        for layer in range(*layers)
        for group in range(3)
    ]
    groups = torch.cat([scores[layer].kv_heads for layer in range(*layers)])
    assert spearman(groups, torch.tensor(changes)) > 0.25
