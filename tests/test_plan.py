"""The pruning plan against LoRAM's published counts and against brute force."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from helpers.adapters import random_plan
from loram_ray.architectures import architecture_of
from loram_ray.artifacts.tensorfile import TensorFile
from loram_ray.config import PruneConfig
from loram_ray.errors import LoramError
from loram_ray.plan import (
    PLAN_FILE,
    KeptUnits,
    PruningPlan,
)
from loram_ray.pruning.selection import layer_range
from loram_ray.units import Geometry, kept_kv_head_count, kept_neuron_count

LLAMA = architecture_of("llama")


@dataclass(frozen=True)
class Sizes:
    """A Llama as its paper describes it; embeddings and output head are not tied."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int

    @property
    def geometry(self) -> Geometry:
        head_dim = self.hidden // self.heads
        return Geometry(
            self.layers, self.hidden, self.intermediate, self.heads, self.kv_heads, head_dim
        )

    def parameters(self, pruned_layers: int = 0, kv_heads: int = 0, neurons: int = 0) -> int:
        """All parameters where some layers keep so many KV heads and neurons."""
        whole = self._layer(self.kv_heads, self.intermediate)
        rest = 2 * self.vocabulary * self.hidden + self.hidden
        kept = pruned_layers * self._layer(kv_heads, neurons)
        return rest + (self.layers - pruned_layers) * whole + kept

    def _layer(self, kv_heads: int, neurons: int) -> int:
        keys = kv_heads * (self.hidden // self.heads)
        queries = keys * (self.heads // self.kv_heads)
        attention = 2 * self.hidden * queries + 2 * self.hidden * keys
        return attention + 3 * self.hidden * neurons + 2 * self.hidden


LLAMA_2_70B = Sizes(80, 8192, 64, 8, 28672, 32000)
LLAMA_3_70B = Sizes(80, 8192, 64, 8, 28672, 128256)
LLAMA_2_13B = Sizes(40, 5120, 40, 40, 13824, 32000)
TINY_GQA = Geometry(
    num_layers=6, hidden_size=24, intermediate_size=20, num_heads=6, num_kv_heads=3, head_dim=4
)
TINY_MHA = replace(TINY_GQA, num_kv_heads=6)

PUBLISHED = [
    (LLAMA_2_70B, (4, 78), 0.65, "28.10", "2.45", "9.82"),
    (LLAMA_2_70B, (4, 78), 0.75, "21.49", "3.21", "12.84"),
    (LLAMA_2_70B, (4, 78), 0.85, "16.27", "4.24", "16.95"),
    (LLAMA_2_70B, (4, 78), 0.95, "9.66", "7.14", "28.56"),
    (LLAMA_3_70B, (4, 78), 0.85, "17.85", "3.95", "15.81"),
    (LLAMA_2_13B, (4, 38), 0.65, "6.01", "2.17", "8.67"),
]


def tiny_plan(
    geometry: Geometry = TINY_GQA, ratio: float = 0.5, seed: int = 0, layers: tuple = (1, 5)
) -> PruningPlan:
    return random_plan(LLAMA, geometry, ratio, layers, seed, "of-this-base")


def in_billions(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}"


@pytest.mark.parametrize(("sizes", "layers", "ratio", "billions", "bf16", "qloram"), PUBLISHED)
def test_counts_give_the_published_parameters_and_reductions(
    sizes: Sizes, layers: tuple[int, int], ratio: float, billions: str, bf16: str, qloram: str
) -> None:
    base = sizes.parameters()
    pruned = sizes.parameters(
        layers[1] - layers[0],
        kept_kv_head_count(sizes.heads, sizes.kv_heads, ratio),
        kept_neuron_count(sizes.intermediate, ratio),
    )
    assert in_billions(pruned) == billions
    assert f"{base / pruned:.2f}" == bf16
    assert f"{4 * base / pruned:.2f}" == qloram


def test_known_totals_of_the_base_models() -> None:
    assert LLAMA_2_70B.parameters() == 68_976_648_192
    assert LLAMA_3_70B.parameters() == 70_553_706_496
    assert LLAMA_2_13B.parameters() == 13_015_864_320


@pytest.mark.parametrize(("sizes", "layers", "ratio", "billions"), [row[:4] for row in PUBLISHED])
def test_shapes_of_a_drawn_plan_add_up_to_the_published_parameters(
    sizes: Sizes, layers: tuple[int, int], ratio: float, billions: str
) -> None:
    plan = random_plan(LLAMA, sizes.geometry, ratio, layers, 0, "")
    hidden, keys = sizes.hidden, sizes.hidden // sizes.heads * sizes.kv_heads
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (sizes.intermediate, hidden),
        "mlp.up_proj": (sizes.intermediate, hidden),
        "mlp.down_proj": (hidden, sizes.intermediate),
    }
    total = 2 * sizes.vocabulary * hidden + hidden + sizes.layers * 2 * hidden
    for layer in range(sizes.layers):
        for name, shape in shapes.items():
            rows, columns = plan.pruned_shape(f"model.layers.{layer}.{name}", shape)
            total += rows * columns
    assert in_billions(total) == billions


@pytest.mark.parametrize("total", [1, 8, 25, 96, 100, 1000, 14336, 28672])
def test_counts_are_those_of_the_exact_decimal_ratio(total: int) -> None:
    # In integers, the ratio in hundredths: 0.28 * 25 is 7.000000000000001 in floating point.
    for hundredths in range(100):
        ratio = hundredths / 100
        pruned_up, pruned_down = -(-hundredths * total // 100), hundredths * total // 100
        assert kept_neuron_count(total, ratio) == total - pruned_up
        assert kept_kv_head_count(4 * total, total, ratio) == total - pruned_down
        assert kept_kv_head_count(total, total, ratio) == total - pruned_up
    assert kept_neuron_count(10**6, 1e-6) == 10**6 - 1


@pytest.mark.parametrize("geometry", [TINY_GQA, TINY_MHA], ids=["gqa", "mha"])
def test_kept_indices_are_the_brute_force_expansion_of_kept_units(geometry: Geometry) -> None:
    plan = tiny_plan(geometry)
    group = geometry.num_heads // geometry.num_kv_heads
    queries, keys = (
        geometry.num_heads * geometry.head_dim,
        geometry.num_kv_heads * geometry.head_dim,
    )
    for layer, units in plan.layers.items():
        kv_heads, neurons = units.kv_heads.tolist(), units.neurons.tolist()
        kept_queries = [i for i in range(queries) if i // geometry.head_dim // group in kv_heads]
        kept_keys = [i for i in range(keys) if i // geometry.head_dim in kv_heads]
        expected = {
            "self_attn.q_proj": (0, kept_queries, queries),
            "self_attn.k_proj": (0, kept_keys, keys),
            "self_attn.v_proj": (0, kept_keys, keys),
            "self_attn.o_proj": (1, kept_queries, queries),
            "mlp.gate_proj": (0, neurons, geometry.intermediate_size),
            "mlp.up_proj": (0, neurons, geometry.intermediate_size),
            "mlp.down_proj": (1, neurons, geometry.intermediate_size),
        }
        for name, (axis, index, full_size) in expected.items():
            kept = plan.kept(f"model.layers.{layer}.{name}")
            assert kept is not None
            assert (kept.axis, kept.index.tolist(), kept.full_size) == (axis, index, full_size)
            assert len(index) < full_size


def test_what_is_not_pruned_is_whole() -> None:
    plan = tiny_plan()
    whole = [
        "model.layers.0.mlp.up_proj",
        "model.layers.5.self_attn.q_proj",
        "model.layers.1.input_layernorm",
        "model.layers.1.mlp",
        "model.layers.11.mlp.up_proj",
        "model.embed_tokens",
        "model.norm",
        "lm_head",
        "prefix.model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.up_proj.base_layer",
    ]
    assert [name for name in whole if plan.kept(name) is not None] == []
    tensor = torch.randn(20, 24)
    assert plan.select("model.layers.0.mlp.up_proj.weight", tensor) is tensor
    assert plan.pruned_shape("lm_head", (7, 24)) == (7, 24)


def test_bias_is_cut_with_its_rows_and_whole_with_its_columns() -> None:
    plan = tiny_plan()
    units = plan.layers[2]
    up, down = torch.randn(20), torch.randn(24)
    found = plan.select("model.layers.2.mlp.up_proj.bias", up)
    assert torch.equal(found, torch.stack([up[i] for i in units.neurons.tolist()]))
    assert plan.pruned_shape("model.layers.2.mlp.up_proj", (20,)) == tuple(found.shape)
    assert plan.select("model.layers.2.mlp.down_proj.bias", down) is down
    assert plan.pruned_shape("model.layers.2.mlp.down_proj", (24,)) == (24,)


def test_a_tensor_of_another_size_than_the_plan_s_is_refused() -> None:
    with pytest.raises(
        LoramError, match=r"model.layers.2.mlp.up_proj.weight has size 21 .*requires 20"
    ):
        tiny_plan().select("model.layers.2.mlp.up_proj.weight", torch.randn(21, 24))


@pytest.mark.parametrize("geometry", [TINY_GQA, TINY_MHA, LLAMA_2_70B.geometry])
@pytest.mark.parametrize("ratio", [0.0, 0.35, 0.65])
def test_kept_sets_are_ascending_distinct_and_of_the_right_size(
    geometry: Geometry, ratio: float
) -> None:
    plan = random_plan(LLAMA, geometry, ratio, (1, 4), 3, "")
    assert sorted(plan.layers) == [1, 2, 3]
    heads = kept_kv_head_count(geometry.num_heads, geometry.num_kv_heads, ratio)
    neurons = kept_neuron_count(geometry.intermediate_size, ratio)
    for units in plan.layers.values():
        for index, count, total in [
            (units.kv_heads.tolist(), heads, geometry.num_kv_heads),
            (units.neurons.tolist(), neurons, geometry.intermediate_size),
        ]:
            assert index == sorted(set(index))
            assert len(index) == count
            assert set(index) <= set(range(total))


def test_the_same_seed_gives_the_same_plan_and_another_seed_another() -> None:
    assert tiny_plan(seed=5).digest == tiny_plan(seed=5).digest
    neurons = {tuple(tiny_plan(seed=s).layers[1].neurons.tolist()) for s in range(20)}
    assert len(neurons) == 20
    by_layer = {tuple(units.neurons.tolist()) for units in tiny_plan().layers.values()}
    assert len(by_layer) == 4


def test_a_layer_s_choice_does_not_depend_on_the_range() -> None:
    wide, narrow = tiny_plan(layers=(0, 6)), tiny_plan(layers=(3, 4))
    assert torch.equal(wide.layers[3].neurons, narrow.layers[3].neurons)
    assert torch.equal(wide.layers[3].kv_heads, narrow.layers[3].kv_heads)


def test_every_unit_is_kept_equally_often() -> None:
    draws = [tiny_plan(seed=seed).layers[1] for seed in range(600)]
    heads = torch.stack([torch.bincount(u.kv_heads, minlength=3) for u in draws]).sum(0)
    neurons = torch.stack([torch.bincount(u.neurons, minlength=20) for u in draws]).sum(0)
    # Of 600 draws: 2 of 3 heads, 10 of 20 neurons; five standard deviations either way.
    assert (heads - 400).abs().max() < 5 * (600 * 2 / 9) ** 0.5
    assert (neurons - 300).abs().max() < 5 * (600 / 4) ** 0.5


def test_default_layers_leave_the_first_four_and_the_last_two() -> None:
    assert layer_range(None, 80) == (4, 78)
    assert layer_range(None, 30) == (4, 28)
    assert layer_range((0, 30), 30) == (0, 30)
    for layers in [(0, 31), (-1, 4), (5, 5), (6, 4)]:
        with pytest.raises(LoramError, match=r"prune.layers .* 30 "):
            layer_range(layers, 30)
    with pytest.raises(LoramError, match=r"prune.layers"):
        layer_range(None, 6)


@pytest.mark.parametrize(
    ("geometry", "ratio"),
    [(TINY_MHA, 0.9), (TINY_GQA, 0.96), (replace(TINY_GQA, intermediate_size=1), 0.01)],
)
def test_a_ratio_that_leaves_nothing_is_refused(geometry: Geometry, ratio: float) -> None:
    with pytest.raises(LoramError, match=r"prune.ratio must keep"):
        tiny_plan(geometry, ratio)


def test_the_largest_seed_of_the_configuration_draws_a_plan(tmp_path: Path) -> None:
    seed = 2**32 - 1
    config = PruneConfig(base="b", output=tmp_path, seed=seed)
    assert tiny_plan(seed=config.seed).digest != tiny_plan(seed=0).digest
    with pytest.raises(ValueError, match="seed"):
        PruneConfig(base="b", output=tmp_path, seed=seed + 1)


@pytest.mark.parametrize("geometry", [TINY_GQA, TINY_MHA], ids=["gqa", "mha"])
def test_a_plan_survives_saving(geometry: Geometry, tmp_path: Path) -> None:
    plan = tiny_plan(geometry, ratio=0.35, seed=2**31)
    plan.save(tmp_path)
    loaded = PruningPlan.load(tmp_path)
    assert loaded.digest == plan.digest
    for name in ("model_type", "geometry", "method", "ratio", "seed", "layer_range"):
        assert getattr(loaded, name) == getattr(plan, name)
    assert loaded.base_fingerprint == "of-this-base"
    assert list(loaded.layers) == list(plan.layers)
    stored = safetensors.torch.load_file(tmp_path / PLAN_FILE)
    assert len(stored) == 8
    for layer, units in loaded.layers.items():
        assert torch.equal(units.kv_heads, plan.layers[layer].kv_heads)
        assert torch.equal(stored[f"layers.{layer}.neurons"], plan.layers[layer].neurons)


def test_the_digest_covers_everything_a_plan_says() -> None:
    plan = tiny_plan()
    units = KeptUnits(plan.layers[1], neurons=plan.layers[1].neurons.flip(0))
    others = [
        replace(plan, geometry=TINY_MHA),
        replace(plan, method="another"),
        replace(plan, ratio=0.51),
        replace(plan, seed=1),
        replace(plan, layer_range=(1, 6)),
        replace(plan, base_fingerprint="of-another-base"),
        replace(plan, layers={k: u for k, u in plan.layers.items() if k != 4}),
        replace(plan, layers={**plan.layers, 1: units}),
    ]
    assert len({plan.digest, *(other.digest for other in others)}) == 9


def test_another_base_is_refused_by_fingerprint() -> None:
    tiny_plan().require_base("of-this-base")
    with pytest.raises(LoramError, match=r"recover.base x has fingerprint another.*of-this-base"):
        tiny_plan().require_base("another", "recover.base x")


def test_a_directory_without_a_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoramError, match=r"contains no pruning_plan.safetensors; use"):
        PruningPlan.load(tmp_path)


def test_a_plan_is_loaded_where_there_is_one(tmp_path: Path) -> None:
    assert not PruningPlan.is_in(tmp_path)
    assert PruningPlan.load_if_any(tmp_path) is None
    plan = tiny_plan()
    plan.save(tmp_path)
    assert PruningPlan.is_in(tmp_path)
    loaded = PruningPlan.load_if_any(tmp_path)
    assert loaded is not None
    assert loaded.digest == plan.digest


def test_a_link_to_a_plan_that_is_gone_is_not_taken_for_no_plan(tmp_path: Path) -> None:
    (tmp_path / PLAN_FILE).symlink_to(tmp_path / "gone.safetensors")
    with pytest.raises(LoramError, match=PLAN_FILE):
        PruningPlan.load_if_any(tmp_path)


def test_a_plan_cut_anywhere_is_refused_by_name(tmp_path: Path) -> None:
    tiny_plan().save(tmp_path)
    path = tmp_path / PLAN_FILE
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(LoramError, match=PLAN_FILE):
            PruningPlan.load(tmp_path)


def _saved(said: object, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    metadata = {} if said is None else {"loram_plan": said if isinstance(said, str) else ""}
    if isinstance(said, dict | list):
        metadata["loram_plan"] = json.dumps(said)
    safetensors.torch.save_file(tensors, folder / PLAN_FILE, metadata)


CORRUPT = {
    "no description": lambda said, t: (None, t),
    "description is not JSON": lambda said, t: ("{", t),
    "description is a list": lambda said, t: ([1], t),
    "another format": lambda said, t: ({**said, "format": "2"}, t),
    "no geometry": lambda said, t: ({k: v for k, v in said.items() if k != "geometry"}, t),
    "no ratio": lambda said, t: ({k: v for k, v in said.items() if k != "ratio"}, t),
    "unknown size": lambda said, t: ({**said, "geometry": {"depth": 3}}, t),
    "a tensor is missing": lambda said, t: (said, {k: v for k, v in t.items() if "2.n" not in k}),
    "tensors of a model": lambda said, t: (said, {"weight": torch.ones(2)}),
    "a layer beyond the model": lambda said, t: (
        said,
        {k.replace("layers.4", "layers.6"): v for k, v in t.items()},
    ),
    "indices not ascending": lambda said, t: (
        said,
        {**t, "layers.1.neurons": t["layers.1.neurons"].flip(0).contiguous()},
    ),
    "an index twice": lambda said, t: (said, {**t, "layers.1.kv_heads": torch.tensor([1, 1])}),
    "an index beyond the layer": lambda said, t: (
        said,
        {**t, "layers.1.kv_heads": torch.tensor([0, 3])},
    ),
    "a negative index": lambda said, t: (said, {**t, "layers.1.kv_heads": torch.tensor([-1, 1])}),
    "nothing kept": lambda said, t: (said, {**t, "layers.1.kv_heads": torch.tensor([]).long()}),
    "indices of another dtype": lambda said, t: (
        said,
        {**t, "layers.1.kv_heads": torch.tensor([0.0, 1.0])},
    ),
    "indices in two dimensions": lambda said, t: (
        said,
        {**t, "layers.1.kv_heads": torch.tensor([[0, 1]])},
    ),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_a_corrupt_plan_is_refused_by_name(tmp_path: Path, case: str) -> None:
    tiny_plan().save(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / PLAN_FILE)
    with TensorFile(tmp_path / PLAN_FILE) as file:
        said = json.loads(file.metadata["loram_plan"])
    _saved(said, tensors, tmp_path)
    assert PruningPlan.load(tmp_path).digest == tiny_plan().digest
    _saved(*CORRUPT[case](said, tensors), tmp_path)
    with pytest.raises(LoramError, match=PLAN_FILE):
        PruningPlan.load(tmp_path)


def test_the_mathematics_imports_no_ray_no_deepspeed_and_no_command() -> None:
    script = (
        "import sys, loram_ray.plan, loram_ray.recovery.scatter, loram_ray.pruning.random_scores\n"
        "from loram_ray.artifacts import adapter, manifest, tensorfile\n"
        "found = {'ray', 'deepspeed', 'typer', 'transformers'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=120)
