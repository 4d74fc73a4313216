"""Plans of recipes against the paper's figures, written directories and measured training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

import loram_ray as lr
from helpers import adapters, families, tiny
from helpers.allocations import Allocations
from helpers.recipes import CONFIGS, RECIPES
from helpers.training import config as training
from loram_ray.architectures import architecture_of
from loram_ray.artifacts.manifest import read_model_config
from loram_ray.cli.main import app
from loram_ray.estimating.base_configs import PUBLISHED, base_config
from loram_ray.estimating.forecast import forecast
from loram_ray.estimating.gpu_check import require_memory
from loram_ray.estimating.gpus import CONTEXT, GAPS, GPUS, fitting
from loram_ray.estimating.memory_trace import TrainingMemory, training_memory, without_nf4
from loram_ray.estimating.optimizer_state import moments_bytes
from loram_ray.estimating.shapes import empty_model
from loram_ray.estimating.sizes import sizes_of
from loram_ray.finetuning.trainer import train_adapter
from loram_ray.models.loading import load_model

# METHOD.md: recipe, ratio, parameters in billions, reduction in bf16 and of QLoRAM.
PAPER = [
    ("llama-2-70b", 0.65, "28.10", "2.45", "9.82"),
    ("llama-2-70b", 0.75, "21.49", "3.21", "12.84"),
    ("llama-2-70b", 0.85, "16.27", "4.24", "16.95"),
    ("llama-2-70b", 0.95, "9.66", "7.14", "28.56"),
    ("llama-3.1-70b", 0.85, "17.85", "3.95", "15.81"),
    ("llama-2-13b", 0.65, "6.01", "2.17", "8.67"),
]
SMALL = ("train.max_length=16", "train.micro_batch_size=1")  # the rest does not depend on it


def plan(recipe: str, *overrides: str) -> dict[str, Any]:
    return forecast(CONFIGS / f"{recipe}.yaml", overrides).as_json()


@pytest.mark.parametrize(("recipe", "ratio", "billions", "bf16", "nf4"), PAPER)
def test_reductions_are_the_published_ones(
    recipe: str, ratio: float, billions: str, bf16: str, nf4: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = TrainingMemory(*[0] * 7)
    monkeypatch.setattr("loram_ray.estimating.forecast.training_memory", lambda *_, **__: nothing)
    found = plan(recipe, f"prune.ratio={ratio}")
    assert f"{found['pruned_parameters'] / 1e9:.2f}" == billions
    reduction = found["reduction"]
    assert f"{reduction['bf16']:.2f}" == bf16
    assert f"{reduction['nf4_nominal']:.2f}" == nf4
    assert reduction["bf16"] < reduction["nf4_stored"] < reduction["nf4_nominal"]


@pytest.mark.parametrize("name", RECIPES)
def test_known_shapes_are_those_that_publishers_describe(name: str) -> None:
    run = lr.load_run(CONFIGS / f"{name}.yaml")
    expected = RECIPES[name][0].to_dict()
    assert {key: expected[key] for key in PUBLISHED[run.base]} == PUBLISHED[run.base]


def test_the_headline_fits_as_the_paper_says() -> None:
    """LLaMA-3.1-70B: its nominal bytes are the paper's 8.3 GiB, its stored ones about 11.5 GiB."""
    found = plan("llama-3.1-70b")
    assert found["pruned"]["nf4_nominal"] / 2**30 == pytest.approx(8.3, abs=0.05)
    assert found["pruned"]["nf4_stored"] / 2**30 == pytest.approx(11.5, abs=0.05)
    parts = dict(found["train"]["peak_bytes"])
    assert parts.pop("total") == sum(parts.values())
    assert parts["activations"] > parts["workspace"] > 0
    assert found["train"]["fits"][0] == "RTX 4000 Ada"  # 20 GB, for 4 x 512 tokens
    assert found["align"]["gpus"] == 8


def test_stored_bytes_are_those_of_the_written_tensors(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", hidden=128, intermediate=448, dtype=torch.bfloat16)
    settings = lr.PruneConfig(base=str(base), output=tmp_path / "pruned", ratio=0.5, layers=(1, 3))
    pruned = lr.prune(settings).output
    lr.quantize(lr.QuantizeConfig(model=pruned, output=tmp_path / "quantized"))
    written = 0
    for file in (tmp_path / "quantized").glob("model*.safetensors"):
        with safe_open(file, "pt") as opened:
            written += sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    found = sizes_of(load_model(pruned))
    # the mean of a weight's scales is text of some length
    assert found.nf4_stored == pytest.approx(written, abs=8 * len(adapters.LINEARS) * 4)
    assert found.nf4_loaded < found.nf4_stored


def expected_and_measured(
    model: Path, folder: Path, changes: dict[str, Any], quantized: bool
) -> tuple[TrainingMemory, int]:
    """Plan a training, and follow every tensor of a real one, the model's among them."""
    text = "a b c d e f g h " * 40  # longer than the longest example
    rows = [{"prompt": "p", "completion": text[: 640 - 500 * (i == 0)]} for i in range(8)]
    data = tiny.write_jsonl(folder / "data.jsonl", rows)
    config = training(model, data, folder, steps=2, batch_size=8, micro_batch_size=8)
    config = lr.TrainConfig.model_validate(
        {**config.model_dump(), "max_length": 256, "precision": "bf16", **changes}
    )
    expected = training_memory(
        read_model_config(model), architecture_of("llama"), config, quantized
    )
    (folder / "work").mkdir()
    (folder / "out").mkdir()
    with Allocations() as allocations:
        before = allocations.now
        train_adapter(config, folder / "work", folder / "out")
    return expected, allocations.peak - before


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"activation_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"precision": "fp32"}, marks=[pytest.mark.slow, pytest.mark.thorough]),
        pytest.param({"lora": {"r": 4, "alpha": 8, "lm_head": True}}, marks=pytest.mark.slow),
        pytest.param(
            {"lora": {"r": 64, "alpha": 8, "dropout": 0.0, "targets": ["q_proj", "v_proj"]}},
            marks=[pytest.mark.slow, pytest.mark.thorough],
        ),
        pytest.param(
            {"lora": {"r": 64, "alpha": 8, "dtype": "bf16"}, "optimiser": {"name": "adamw_8bit"}},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_peaks_are_those_of_real_training(tmp_path: Path, changes: dict[str, Any]) -> None:
    base = tiny.write_base(tmp_path / "base", hidden=128, intermediate=384, layers=6)
    expected, measured = expected_and_measured(base, tmp_path, changes, quantized=False)
    assert measured == pytest.approx(expected.total, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "quantized"), [({}, True), ({"activation_checkpointing": True}, False)]
)
def test_layers_that_are_alike_need_not_all_be_rehearsed(
    changes: dict[str, Any], quantized: bool
) -> None:
    shapes = tiny.llama_config(layers=18).to_dict()
    size, hidden = shapes["intermediate_size"], shapes["hidden_size"]
    linears = {"gate_proj": [size // 4, hidden], "up_proj": [size // 4, hidden]}
    linears["down_proj"] = [hidden, size // 4]
    shapes |= {"model_type": "loram_llama", "masked_linears": [], "pruned_linears": {
        f"model.layers.{layer}.mlp.{name}": shape
        for layer in range(2, 16)
        for name, shape in linears.items()
    }}  # fmt: skip
    settings = {"model": "m", "data": "d", "output": "o", "max_length": 32, **changes}
    arguments = (shapes, architecture_of("llama"), lr.TrainConfig(**settings), quantized)
    assert training_memory(*arguments) == training_memory(*arguments, every_layer=True)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model in NF4; bitsandbytes computes each of its linears on CPUs."""
    folder = tmp_path_factory.mktemp("quantized")
    sizes = {"hidden": 256, "intermediate": 1024, "head_dim": 32, "layers": 4}
    base = tiny.write_base(folder / "base", dtype=torch.bfloat16, **sizes)
    settings = lr.PruneConfig(base=str(base), output=folder / "pruned", ratio=0.5, layers=(1, 3))
    pruned = lr.prune(settings).output
    return lr.quantize(lr.QuantizeConfig(model=pruned, output=folder / "quantized")).output


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"activation_checkpointing": True}, marks=pytest.mark.slow),
        {"precision": "fp32"},
        pytest.param(
            {"lora": {"r": 8, "alpha": 16, "dropout": 0.05, "lm_head": True}},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"max_length": 32, "micro_batch_size": 1, "lora": {"r": 64, "alpha": 16}},
            marks=[pytest.mark.slow, pytest.mark.thorough],
        ),
    ],
)
def test_peaks_in_nf4_are_those_of_real_training(
    quantized: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    expected, measured = expected_and_measured(quantized, tmp_path, changes, quantized=True)
    assert measured == pytest.approx(expected.total, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_moments_are_those_that_the_optimiser_keeps(name: str, dtype: torch.dtype) -> None:
    from bitsandbytes import optim

    kinds = {
        "adamw": torch.optim.AdamW,
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw": optim.PagedAdamW32bit,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
    }
    shapes = (8, 300), (8, 1000), (257, 65)
    parameters = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    optimiser = kinds[name](parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    kept = sum(
        value.nbytes
        for parameter in parameters
        for key, value in optimiser.state[parameter].items()
        if isinstance(value, torch.Tensor) and value.dim() and "qmap" not in key  # all share those
    )
    assert moments_bytes(parameters, name) == kept


def test_in_nf4_a_weight_is_made_whole_now_and_then() -> None:
    config = training(Path("unread"), Path("unread"), Path("unwritten"), precision="bf16")
    shapes = tiny.llama_config(hidden=256, intermediate=512).to_dict()
    family = architecture_of("llama")
    whole = training_memory(shapes, family, config, quantized=False)
    found = training_memory(shapes, family, config, quantized=True)
    assert found.weights < whole.weights / 2
    assert whole.workspace == 0
    assert found.workspace in (0, 2 * 256 * 512, 2 * 256 * 512 + 4 * 256 * 512 // 64)
    assert found.activations == pytest.approx(whole.activations, rel=0.05)


@pytest.mark.slow
def test_what_a_gpu_cannot_hold_is_refused_with_what_it_can(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", hidden=128, intermediate=384, layers=2)
    config = training(base, tmp_path, tmp_path, batch_size=4, micro_batch_size=4, max_length=512)

    def needed(**changes: object) -> int:
        changed = config.model_copy(update=changes)
        family = architecture_of("llama")
        return training_memory(read_model_config(base), family, changed, False).total

    def refusal(memory: float) -> str:
        with pytest.raises(lr.LoramError) as error:
            require_memory(config, int(memory / (1 - GAPS)) + 1)
        return str(error.value)

    require_memory(config, int(needed() / (1 - GAPS)) + 1)
    asked = f"train needs {needed() / 1e9:.1f} GB of GPU memory for {base}, "
    first = refusal(needed() - 10)
    assert first.startswith(asked)
    assert first.endswith("; set train.activation_checkpointing=true")
    half = {"activation_checkpointing": True, "micro_batch_size": 2}
    assert refusal(needed(**half)).endswith(
        "; set train.activation_checkpointing=true, train.micro_batch_size=2"
    )
    short = {"activation_checkpointing": True, "micro_batch_size": 1, "max_length": 256}
    assert refusal(needed(**short)).endswith(
        "; set train.activation_checkpointing=true, train.micro_batch_size=1, train.max_length=256"
    )
    assert refusal(1e6).endswith("; quantise the model or use a larger GPU")


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_every_dense_family_can_be_rehearsed(tmp_path: Path, family: str) -> None:
    base = families.write_base(tmp_path / "base", family)
    require_memory(training(base, tmp_path, tmp_path), 10**12)


def test_gpus_are_named_from_the_smallest_that_fits() -> None:
    assert [gpu.memory for gpu in GPUS] == sorted(gpu.memory for gpu in GPUS)
    assert next(fitting(15.7e9)).name == "RTX 4060 Ti 16 GB"
    assert next(fitting(15.8e9)).name == "RTX 4000 Ada"
    assert list(fitting(1e12)) == []


@pytest.mark.slow
def test_the_command_prints_tables_and_json(tmp_path: Path) -> None:
    line = ["plan", "--config", str(CONFIGS / "llama-2-13b.yaml"), "--set", "train.max_length=8"]
    line += ["--set", "train.micro_batch_size=1"]
    shown = CliRunner().invoke(app, line)
    assert shown.exit_code == 0
    for word in (
        "6.01 B",
        "2.17x",
        "8.67x",
        "activations",
        "smallest GPU",
        "A10G",
        "Alignment on 4 GPUs",
    ):
        assert word in shown.stdout
    assert "Warning" not in shown.stderr
    file = tmp_path / "config.json"
    file.write_text(json.dumps(tiny.llama_config(layers=40).to_dict()))
    line += ["--base-config", str(file), "--set", "train.precision=fp32", "--json"]
    found = json.loads(CliRunner().invoke(app, line).stdout)
    assert (
        found["base_parameters"] == sizes_of(empty_model(json.loads(file.read_text()))).parameters
    )
    assert found["reduction"]["nf4_nominal"] == 4 * found["reduction"]["bf16"]
    assert found["train"]["peak_bytes"]["total"] > found["pruned"]["nf4_loaded"]
    peak = found["train"]["peak_bytes"]
    once = peak["weights"] + peak["workspace"] + peak["logits"]
    each = peak["total"] - once + peak["gradients"]
    counts = found["train"]["adapters_per_worker"]
    assert list(counts) == [gpu.name for gpu in GPUS] and counts["A10G"] > 1
    for gpu in GPUS:
        assert counts[gpu.name] == 1 or once + counts[gpu.name] * each <= gpu.usable
        assert gpu.usable < once + (counts[gpu.name] + 1) * each
        several = found["train"]["actors_per_gpu"][gpu.name]
        of_one = CONTEXT + peak["total"] / (1 - GAPS)
        assert several * of_one <= gpu.memory < (several + 1) * of_one
    assert found["train"]["peak_bytes"]["weights"] == found["pruned"]["nf4_loaded"]
    assert found["train"]["fp32"]["peak_bytes"]["weights"] == 4 * found["pruned_parameters"]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("length", [8, 256])  # AdamW's bytes are the most; a step's are
def test_what_whole_weights_need_follows_from_nf4(precision: str, length: int) -> None:
    changes = {"precision": precision, "max_length": length, "micro_batch_size": 1}
    config = training(Path("unread"), Path("unread"), Path("unwritten"), **changes)
    shapes = tiny.llama_config(hidden=256, intermediate=512).to_dict()
    family = architecture_of("llama")
    whole = training_memory(shapes, family, config, quantized=False)
    nf4 = training_memory(shapes, family, config, quantized=True)
    assert without_nf4(nf4, whole.weights).total == pytest.approx(whole.total, rel=0.05)


@pytest.mark.parametrize("family", families.MIXTURES)
def test_mixtures_of_experts_are_refused_in_one_line(tmp_path: Path, family: str) -> None:
    base = families.write_base(tmp_path / "base", family)
    line = ("--set", f"base={base}", "--set", "output=out", "--set", "prune.ratio=0.5")
    with pytest.raises(lr.LoramError, match="prune.base must be a dense model for an estimate"):
        forecast(None, line[1::2])


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    file = CONFIGS / "llama-2-13b.yaml"
    with pytest.raises(lr.LoramError, match=r"prune.base \S+ is not a local directory and its"):
        base_config("nobody/no-such-model")
    with pytest.raises(lr.LoramError, match="prune must be a section of the config"):
        forecast(None, ("base=meta-llama/Llama-2-7b-hf", "output=out"))
    with pytest.raises(lr.LoramError, match="train.lora.targets must name linears of the model"):
        forecast(file, ("train.lora.targets=[nothing]", "train.lora.lm_head=false"))
