"""The arithmetic of an alignment, against real modules, DeepSpeed's engine and torch's counters."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

import loram_ray as lr
from helpers import tiny
from helpers.allocations import Allocations, unique_bytes
from helpers.command import Command, Ended
from helpers.recipes import RECIPES
from loram_ray.alignment.deepspeed_config import deepspeed_config
from loram_ray.alignment.engine import freeze, start_engine
from loram_ray.alignment.mfu import linear_weights
from loram_ray.alignment.objective import AlignmentModel
from loram_ray.config import load_run
from loram_ray.distillation import TopTokens
from loram_ray.estimating.alignment import estimate
from loram_ray.estimating.flops import traffic_of, work_of
from loram_ray.estimating.footprint import activations_of, memory_of, saved_by_layer
from loram_ray.estimating.gpus import Cluster
from loram_ray.estimating.shapes import model_shapes, shapes_of

REPOSITORY = Path(__file__).parents[2]
RECIPE = REPOSITORY / "jobs" / "configs" / "llama-3.1-70b.yaml"
BATCH, LENGTH = 2, 64
SIZES = {"hidden": 128, "intermediate": 384, "heads": 8, "kv_heads": 4, "head_dim": 16}
# DeepSpeed's settings: buckets that suit a tiny model, and AdamW as it runs on a GPU.
USERS = {
    "zero_optimization": {
        "reduce_bucket_size": 20_000,
        "stage3_max_live_parameters": 1_000,
        "stage3_max_reuse_distance": 1_000,
        "stage3_prefetch_bucket_size": 1_000,
        "stage3_param_persistence_threshold": 0,
    },
    "optimizer": {"params": {"foreach": True}},
}


def config(**changes: object) -> lr.AlignConfig:
    settings = {
        "pruned": "unread",
        "output": "unwritten",
        "base": "unread",
        "objective": "causal_lm",
        "corpus": {"sources": [{"path": "unread"}], "sequence_length": LENGTH},
        "batch_size": 4 * BATCH,
        "micro_batch_size": BATCH,
        **changes,
    }
    return lr.AlignConfig.model_validate(settings)


def prune_config(base: Path, output: Path) -> lr.PruneConfig:
    return lr.PruneConfig(base=str(base), output=output, ratio=0.5, layers=(1, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and what is left of it, in ``base`` and ``pruned``."""
    folder = tmp_path_factory.mktemp("estimate")
    lr.prune(prune_config(tiny.write_base(folder / "base", **SIZES), folder / "pruned"))
    return folder


def base_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "base" / "config.json").read_text())


@pytest.mark.parametrize("frozen", [(), ("lm_head",), ("lm_head", "embeddings", "norms")])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_model_that_is_trained(
    tied: bool, frozen: tuple[str, ...], tmp_path: Path
) -> None:
    base = tiny.write_base(tmp_path / "base", tied=tied, bias=True, **SIZES)
    prune = prune_config(base, tmp_path / "pruned")
    lr.prune(prune)
    shapes, of_base = shapes_of(base_config(tmp_path), prune, frozen)
    model = lr.load_pruned(tmp_path / "pruned")
    freeze(model, frozen)
    assert shapes == model_shapes(model)
    assert of_base.parameters == LlamaForCausalLM.from_pretrained(base).num_parameters()
    assert shapes.layer_weights + shapes.head_weights == linear_weights(model)
    assert shapes.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = memory_of(config(), {"stage": 1}, shapes, None, 2)
    assert memory.weights == unique_bytes(model.parameters())


def measure_engine(rank: int, folder: str, workers: int) -> None:
    """Run DeepSpeed for some steps at each stage, and write down what there was in memory."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(workers), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found = {}
    for stage in range(4):
        gc.collect()  # the engine before
        found[stage] = measure_stage(Path(folder) / "pruned", stage, workers)
    Path(folder, f"measured_{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def measure_stage(pruned: Path, stage: int, workers: int) -> dict[str, int | None]:
    before = Allocations().now
    settings = config(pruned=pruned, zero_stage=stage)
    engine, _ = start_engine(settings, USERS, None, workers, None, False)
    ids = torch.randint(tiny.VOCABULARY, (BATCH, LENGTH))

    def step() -> None:
        for _ in range(settings.accumulation(workers)):
            engine.backward(engine(ids, ids)[0])
            engine.step()

    step()
    optimiser = engine.optimizer.optimizer
    states = [t for s in optimiser.state.values() for t in s.values() if t.dim()]
    masters = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None) or [
        p for group in optimiser.param_groups for p in group["params"]
    ]
    weights = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    with Allocations() as allocations:
        step()
    gradients = getattr(engine.optimizer, "grad_partitions_flat_buffer", None)
    return {
        "weights": unique_bytes(weights),
        "optimiser": unique_bytes([*states, *masters]),
        "partitioned gradients": None if gradients is None else gradients.nbytes,
        "peak": allocations.peak - before,
    }


@pytest.mark.slow
@pytest.mark.cluster
def test_bytes_are_those_of_deepspeeds_engine(folder: Path) -> None:
    """Two workers, bf16: what is kept, and all tensors at their largest, on the fuller worker."""
    workers = 2
    torch.multiprocessing.spawn(measure_engine, (str(folder), workers), nprocs=workers)
    ranks = [json.loads((folder / f"measured_{rank}.json").read_text()) for rank in range(workers)]
    for stage in range(4):
        settings = config(zero_stage=stage)
        zero = deepspeed_config(settings, USERS, workers)["zero_optimization"]
        prune = prune_config(folder / "base", folder / "pruned")
        pruned, _ = shapes_of(base_config(folder), prune, settings.frozen)
        expected = memory_of(settings, zero, pruned, None, workers)
        for rank in ranks:
            measured = rank[str(stage)]
            assert measured["weights"] == expected.weights, stage
            assert measured["optimiser"] == pytest.approx(expected.optimiser, rel=1e-4), stage
            if stage == 3:
                assert measured["partitioned gradients"] == expected.gradients
        largest = max(rank[str(stage)]["peak"] for rank in ranks)
        assert largest == pytest.approx(expected.peak, rel=0.03), stage


def models(settings: lr.AlignConfig, attention: str = "sdpa", **sizes: int) -> AlignmentModel:
    """A tiny model as alignment trains it, and a larger base beside it where that is live."""
    torch.manual_seed(0)
    width = {"bf16": torch.bfloat16, "fp32": torch.float32}[settings.precision]

    def model(**sizes: int) -> LlamaForCausalLM:
        shapes = tiny.llama_config(**{**SIZES, **sizes})
        shapes._attn_implementation = attention
        return LlamaForCausalLM(shapes).to(width).train()

    pruned, base = model(**sizes), None
    freeze(pruned, settings.frozen)
    if settings.activation_checkpointing:
        pruned.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.objective == "distillation" and settings.distillation.targets == "live":
        base = model(layers=6, intermediate=512).requires_grad_(False)
    return AlignmentModel(pruned, settings, base)


class Untracked(contextlib.nullcontext[None]):
    """In place of torch's tracker of modules, which refuses gradients that are asked for inside."""

    parents = frozenset({"Global"})


LIVE = {"objective": "distillation", "distillation": {"targets": "live"}}
CACHED = {"objective": "distillation"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_checkpointing": True},
        {"zero_stage": 3},
        {"frozen": ()},
        {**CACHED, "activation_checkpointing": True},
        {**LIVE, "activation_checkpointing": True},
    ],
)
def test_operations_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    settings = config(**changes)
    model = models(settings, "eager")
    if settings.zero_stage == 3:
        model.model.lm_head.weight.ds_id = 0  # how DeepSpeed marks what it has partitioned
    ids = torch.randint(tiny.VOCABULARY, (BATCH, LENGTH))
    top = None
    if settings.objective == "distillation" and model.teacher is None:
        top = TopTokens.of(torch.randn(BATCH, LENGTH, tiny.VOCABULARY), 8, 1.0)
    teacher = model_shapes(model.teacher) if model.teacher is not None else None
    work = work_of(settings, model_shapes(model.model), teacher)
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = Untracked()
    with counter:
        model(ids, ids, top)[0].backward()
    assert counter.get_total_flops() == pytest.approx(work.total * ids.numel(), rel=0.01)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_that_autograd_saves(checkpointing: bool, precision: str) -> None:
    settings = config(activation_checkpointing=checkpointing, precision=precision)
    width = {"bf16": 2, "fp32": 4}[precision]
    saved = {layers: saved_bytes(models(settings, layers=layers)) for layers in (4, 8)}
    shapes = model_shapes(models(settings).model)
    by_layer = saved_by_layer(shapes.layers[0], width)
    expected = width * shapes.hidden if checkpointing else by_layer
    assert saved[8] - saved[4] == pytest.approx(4 * expected * BATCH * LENGTH, rel=0.01)
    at_head = (4 + 2 * width) * shapes.hidden
    assert saved[4] == pytest.approx((4 * expected + at_head) * BATCH * LENGTH, rel=0.05)


class Saved:
    """What autograd saves, for as long as it does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def saved_bytes(model: AlignmentModel) -> int:
    kept: weakref.WeakSet[Saved] = weakref.WeakSet()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor)
        if tensor.untyped_storage().data_ptr() not in own:
            kept.add(saved)
        return saved

    ids = torch.randint(tiny.VOCABULARY, (BATCH, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
        loss, _ = model(ids, ids)
    found = unique_bytes([saved.tensor for saved in kept])
    del loss
    return found


@pytest.mark.parametrize("words", tiny.fast_of([tiny.VOCABULARY, 20_000], 20_000))
@pytest.mark.parametrize("objective", [{}, CACHED, LIVE], ids=["causal_lm", "cached", "live"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_and_logits_are_largest_as_estimated(
    checkpointing: bool, objective: dict[str, Any], words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few words make a layer's backward pass the largest moment, many the output head's."""
    monkeypatch.setattr(tiny, "VOCABULARY", words)
    settings = config(activation_checkpointing=checkpointing, **objective)
    model = models(settings)
    ids = torch.randint(words, (BATCH, LENGTH))
    top = None
    if objective is CACHED:
        top = TopTokens.of(torch.randn(BATCH, LENGTH, words), 8, 1.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with Allocations() as allocations:
        before = allocations.now
        loss, _ = model(ids, ids, top)
        model.model.get_input_embeddings().weight.requires_grad_(False)  # its gradient comes last
        loss.backward()
    teacher = model_shapes(model.teacher) if model.teacher is not None else None
    expected = sum(activations_of(settings, model_shapes(model.model), teacher))
    assert allocations.peak - before == pytest.approx(expected, rel=0.1)


def recipe(*overrides: str) -> lr.AlignConfig:
    align = load_run(RECIPE, overrides).align
    assert align is not None
    return align


def recipe_shapes(align: lr.AlignConfig) -> Any:
    prune = load_run(RECIPE).prune
    assert prune is not None
    return shapes_of(RECIPES["llama-3.1-70b"][0].to_dict(), prune, align.frozen)


def test_what_does_not_fit_is_told_what_would() -> None:
    align = recipe("align.zero_stage=1", "align.activation_checkpointing=false")
    found = estimate(align, {}, *recipe_shapes(align), Cluster(8))
    assert not found.fits
    assert "align.zero_stage 1 needs" in found.notes[0] and "; zero_stage 3 needs" in found.notes[0]
    assert found.by_stage[3] <= 80e9 < found.by_stage[2] < found.by_stage[1] == found.memory.peak
    live = recipe("align.objective=distillation", "align.distillation.targets=live")
    [note] = estimate(live, {}, *recipe_shapes(live), Cluster(1)).notes
    assert "offload_optimiser cpu, offload_parameters cpu needs" in note


def test_more_gpus_need_less_memory_and_time_but_not_fewer_gpu_hours() -> None:
    align = recipe("align.micro_batch_size=2")
    shapes = recipe_shapes(align)
    rows = [estimate(align, {}, *shapes, Cluster(gpus)) for gpus in (8, 16, 32, 64)]
    for few, many in zip(rows, rows[1:], strict=False):
        assert many.memory.peak < few.memory.peak and many.hours < few.hours
        assert many.hours * many.gpus >= few.hours * few.gpus
    assert all(row.fits and not row.notes for row in rows)
    [note] = estimate(recipe(), {}, *shapes, Cluster(64)).notes  # micro-batches of 4
    assert "align.batch_size 128 is 50% of the 64 GPUs" in note


def test_a_gpu_alone_sends_nothing_and_zero_3_sends_half_as_much_again() -> None:
    """ZeRO, arXiv 1910.02054, section 7: 3 psi for stage 3, 2 psi to sum gradients."""
    align = recipe("align.frozen=[]", "align.micro_batch_size=16")
    pruned, _ = recipe_shapes(align)
    psi = 2 * pruned.parameters
    by_stage = {
        stage: traffic_of(align.model_copy(update={"zero_stage": stage}), pruned, None, 8)
        for stage in range(4)
    }
    assert {s: sent / (psi * 7 / 8) for s, sent in by_stage.items()} == {0: 2, 1: 3, 2: 3, 3: 3}
    assert traffic_of(align, pruned, None, 1) == 0


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "llama.json"
    path.write_text(json.dumps(RECIPES["llama-3.1-70b"][0].to_dict()))
    return path


@pytest.fixture
def tool(loram: Command) -> Callable[..., Ended]:
    """`loram plan --alignment` of the recipe."""
    return partial(loram, "plan", "--alignment", "--config", RECIPE)


def test_the_tool_prints_a_row_for_each_number_of_gpus(
    tool: Callable[..., Ended], config_file: Path
) -> None:
    override = ("--set", "align.objective=distillation")
    found = tool("--gpus", "8,16,64", "--base-config", config_file, *override).out
    assert "17.85B parameters of 70.55B" in found
    rows = [line.split("|")[1].strip() for line in found.splitlines() if line.startswith("| ")]
    expected = [["GB per GPU", "8 GPUs", "16 GPUs", "64 GPUs"], *2 * [["GPUs", "8", "16", "64"]]]
    assert rows == [name for table in expected for name in table]


def test_the_tools_json_has_every_part(tool: Callable[..., Ended], config_file: Path) -> None:
    done = tool("--gpus", 8, "--base-config", config_file, "--json", "--price", 3)
    [row] = json.loads(done.out)["estimates"]
    assert row["fits"] and row["targets"] is None
    assert row["cost"] == pytest.approx(3 * 8 * row["hours"])
    assert row["step_s"] == max(row["compute_s"], row["traffic_s"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mfu", "2"], "--mfu must be above 0 and at most 1, got 2.0"),
        (["--gpus", "0"], "--gpus must be at least 1"),
        (["--gpus", "8 16"], "--gpus must be whole numbers separated by commas, got 8 16"),
        (["--price", "nan"], "--price must be at least 0, got nan"),
        (["--set", "prune.base=nobody/absent"], "prune.base nobody/absent is not a local"),
        (["--base-config", "/missing/config.json"], "/missing contains no config.json"),
    ],
)
def test_the_tool_says_in_one_line_what_to_fix(
    arguments: list[str], message: str, tool: Callable[..., Ended]
) -> None:
    done = tool(*arguments)
    assert (done.code, done.line.startswith(f"loram: {message}")) == (2, True), done


@pytest.mark.parametrize(
    "value", [("--gpus", 8), ("--mfu", 0.4), ("--bandwidth", 9), ("--price", 3)]
)
def test_an_option_of_the_alignment_alone_is_refused_without_it(
    value: tuple[str, object], loram: Command, config_file: Path
) -> None:
    done = loram("plan", "--config", RECIPE, "--base-config", config_file, *value)
    expected = f"loram: {value[0]} must be given with --alignment, got no --alignment; add it"
    assert (done.code, done.out, done.line.startswith(expected)) == (2, "", True), done
