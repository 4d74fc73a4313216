"""The LoRA correction against a brute-force one, and against the function that it must restore."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import loram_ray as lr
from helpers import families, masked, tiny
from helpers.adapters import LINEARS, logits_of, token_ids, train_randomly
from helpers.allocations import Allocations
from helpers.nf4_tensors import decoded
from helpers.recovery_cases import CASES, PREFIX, kept_of, make_pruned
from loram_ray.artifacts.manifest import MANIFEST_FILE, read_manifest
from loram_ray.artifacts.stage_directory import StageDirectory, run_stage
from loram_ray.artifacts.tensorfile import Checkpoint, TensorFile
from loram_ray.finetuning.trainer import train_adapter
from loram_ray.models import nf4
from loram_ray.models.loading import load_model
from loram_ray.plan import PruningPlan
from loram_ray.recovery import corrected as recover_corrected
from loram_ray.recovery.correction import limited, orthonormal, projected
from loram_ray.stages.train import train_by

ADAPTER = "adapter_model.safetensors"
EXACT = 1e9  # a lambda that limits nothing


def move(pruned: Path, output: Path, by: float = 0.01, names: tuple[str, ...] = ("",)) -> Path:
    """A model as the align stage writes it: every weight whose name has one of these has moved."""
    source = read_manifest(pruned)
    assert source is not None

    def write(target: StageDirectory) -> None:
        target.details.update(source.details)
        files = shutil.ignore_patterns(MANIFEST_FILE, "model.safetensors")
        shutil.copytree(pruned, target.path, ignore=files, dirs_exist_ok=True)
        generator = torch.Generator().manual_seed(7)
        tensors = load_file(pruned / "model.safetensors")
        for name, tensor in tensors.items():
            if any(part in name for part in names):
                tensor += by * torch.randn(tensor.shape, generator=generator)
        save_file(tensors, target.path / "model.safetensors", {"format": "pt"})

    parents = {"pruned": source.digest}
    return run_stage(output, "align", {}, parents, source.base_fingerprint, write).output


def recover(adapter: Path, base: Path, output: Path, **settings: Any) -> lr.StageResult:
    settings = {"correction": True, **settings}
    return lr.recover(lr.RecoverConfig(adapter=adapter, base=str(base), output=output, **settings))


def pairs(directory: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each module."""
    stored = load_file(directory / ADAPTER)
    return {
        name.removeprefix(PREFIX).removesuffix(".lora_A.weight"): (
            a,
            stored[name.replace("lora_A", "lora_B")],
        )
        for name, a in stored.items()
        if "lora_A" in name
    }


def scales(adapted: peft.PeftModel) -> dict[str, float]:
    """PEFT's own."""
    return {
        name.removeprefix(PREFIX): module.scaling["default"]
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def weight_of(directory: Path, module: str) -> torch.Tensor:
    """A stored weight, an NF4 one by the definition; a tied head has the embedding's."""
    names = TensorFile(directory / "model.safetensors").specs
    name = f"{module}.weight"
    if name not in names:
        name = "model.embed_tokens.weight"
    if f"{name}.absmax" in names:
        return decoded(directory, name)
    return load_file(directory / "model.safetensors")[name]


def moved_by(base: Path, model: Path, module: str, plan: PruningPlan) -> np.ndarray:
    """``W_0[kept] - W_E`` ``[out, in]``, whole."""
    rows, columns = kept_of(module, plan)
    weight = weight_of(base, module)
    weight = weight if rows is None else weight[rows]
    weight = weight if columns is None else weight[:, columns]
    return (weight.double() - weight_of(model, module).double()).numpy()


def reference(
    a: np.ndarray, b: np.ndarray, moved: np.ndarray, scale: float, limit: float
) -> np.ndarray:
    """What the corrected adapter adds to a kept block, as EMLoC writes it: x -> A -> B."""
    u, s, v = np.linalg.svd(a.T.astype(np.float64), full_matrices=False)
    new_b = np.diag(s) @ v @ b.T
    change = u.T @ moved.T / scale
    for row in range(len(change)):
        size, most = np.abs(change[row]).mean(), limit * np.abs(new_b[row]).mean()
        if size > most:
            change[row] *= most / size
    return scale * (u @ (new_b - change)).T


def cut(change: torch.Tensor, module: str, plan: PruningPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept block of a full change, and all that is outside it."""
    rows, columns = kept_of(module, plan)
    rows = list(range(change.shape[0])) if rows is None else rows
    columns = list(range(change.shape[1])) if columns is None else columns
    outside = change.clone()
    outside[np.ix_(rows, columns)] = 0
    return change[rows][:, columns], outside


@dataclass(frozen=True)
class Case:
    base: Path
    model: Path
    adapted: peft.PeftModel
    trained: Path

    @property
    def plan(self) -> PruningPlan:
        return PruningPlan.load(self.model)


def make_case(
    folder: Path, kind: str, settings: dict[str, object], dtype: Any = None, **sizes: object
) -> Case:
    """A random adapter on a model that was aligned, quantised, both or neither."""
    base, model = make_pruned(folder, **sizes)
    if "aligned" in kind:
        model = move(model, folder / "aligned")
    if "nf4" in kind:
        model = lr.quantize(lr.QuantizeConfig(model=model, output=folder / "quantized")).output
    trained, adapted = train_randomly(model, folder / "trained", seed=5, **settings)
    return Case(base, model, adapted, trained)


@pytest.mark.parametrize(
    ("kind", "limit", "name"),
    [
        *(("aligned", 0.05, name) for name in CASES),
        *tiny.fast_of(
            [("aligned nf4", 3.0, name) for name in CASES],
            *(("aligned nf4", 3.0, name) for name in ("gqa", "tied, with the output head")),
        ),
    ],
)
def test_the_change_of_each_weight_is_the_brute_force_one(
    tmp_path: Path, name: str, kind: str, limit: float
) -> None:
    sizes, settings = CASES[name]
    case = make_case(tmp_path, kind, settings, **sizes)
    result = recover(case.trained, case.base, tmp_path / "out", correction_lambda=limit)
    small, full, scale = pairs(case.trained), pairs(result.output), scales(case.adapted)
    assert small.keys() == full.keys() == scale.keys()
    changed = learnt = 0.0
    for module, (a, b) in small.items():
        moved = moved_by(case.base, case.model, module, case.plan)
        wanted = reference(a.numpy(), b.numpy(), moved, scale[module], limit)
        full_a, full_b = full[module]
        assert (full_a.shape[0], full_b.shape[1]) == (a.shape[0], a.shape[0])
        found, outside = cut(scale[module] * (full_b @ full_a), module, case.plan)
        assert not outside.any()
        before = scale[module] * (b @ a).double().numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
        assert np.abs(wanted - before).max() > 1e-4
        changed += np.square(wanted - before).sum()
        learnt += np.square(before).sum()
    details = result.manifest.details
    assert details["corrected_modules"] == len(small)
    assert details["correction_norm"] == pytest.approx(math.sqrt(changed / learnt), rel=1e-3)
    assert result.manifest.settings == {"correction": True, "correction_lambda": limit}
    expected = json.loads((case.trained / "adapter_config.json").read_text())
    written = json.loads((result.output / "adapter_config.json").read_text())
    assert written.pop("base_model_name_or_path") == str(case.base)
    expected.pop("base_model_name_or_path")
    assert written == expected


@pytest.mark.parametrize(
    "kind", tiny.fast_of(["aligned", "nf4", "aligned nf4"], "aligned", "aligned nf4")
)
def test_on_inputs_among_the_rows_of_a_the_base_does_what_was_trained(
    tmp_path: Path, kind: str
) -> None:
    settings: dict[str, object] = {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 6},
        "alpha_pattern": {"down_proj": 3},
        "target_modules": [*LINEARS, "lm_head"],
    }
    case = make_case(tmp_path, kind, settings)
    output = recover(case.trained, case.base, tmp_path / "out", correction_lambda=EXACT).output
    scale, full = scales(case.adapted), pairs(output)
    for module, (a, b) in pairs(case.trained).items():
        rows, columns = kept_of(module, case.plan)
        inputs = torch.randn(5, len(a), dtype=torch.float64) @ a.double()
        trained = weight_of(case.model, module).double() + scale[module] * (b @ a).double()
        full_a, full_b = full[module]
        weight = weight_of(case.base, module).double()
        corrected = weight + scale[module] * (full_b.double() @ full_a.double())
        corrected = corrected if rows is None else corrected[rows]
        corrected = corrected if columns is None else corrected[:, columns]
        torch.testing.assert_close(
            inputs @ corrected.T, inputs @ trained.T, rtol=1e-5, atol=1e-5, msg=module
        )
        across = torch.randn(5, a.shape[1], dtype=torch.float64)  # orthogonal to the rows of A
        across -= across @ torch.linalg.pinv(a.double()) @ a.double()
        block = weight if rows is None else weight[rows]
        block = block if columns is None else block[:, columns]
        torch.testing.assert_close(across @ corrected.T, across @ block.T, rtol=1e-4, atol=1e-4)


def test_peft_puts_a_corrected_adapter_on_the_base(tmp_path: Path) -> None:
    case = make_case(tmp_path, "aligned nf4", {"target_modules": [*LINEARS, "lm_head"]})
    corrected = recover(case.trained, case.base, tmp_path / "on").output
    plain = recover(case.trained, case.base, tmp_path / "off", correction=False).output
    ids = token_ids(tiny.VOCABULARY)
    found = peft.PeftModel.from_pretrained(load_model(case.base, "fp32"), corrected)
    model, scale = load_model(case.base, "fp32"), scales(case.adapted)
    with torch.no_grad():
        for module, (a, b) in pairs(corrected).items():
            model.get_submodule(module).weight += scale[module] * (b @ a)
    torch.testing.assert_close(logits_of(found, ids), logits_of(model, ids), rtol=1e-5, atol=1e-5)
    other = peft.PeftModel.from_pretrained(load_model(case.base, "fp32"), plain)
    assert (logits_of(found, ids) - logits_of(other, ids)).abs().max() > 1e-2


@pytest.mark.parametrize(
    "name",
    tiny.fast_of(sorted(families.FAMILIES), "llama", "gemma2", "phi3", "mixtral"),
)
def test_an_adapter_of_full_rank_gives_the_base_all_that_was_trained(
    tmp_path: Path, name: str
) -> None:
    """A sees every input then: the base with zeroed positions is the aligned model, exactly."""
    base = families.write_base(tmp_path / "base", name)
    pruned = families.prune(base, tmp_path / "pruned")
    case = families.Case(name, base, pruned, PruningPlan.load(pruned))
    model = move(
        case.pruned, tmp_path / "aligned", 0.05, tuple(f"{t}.weight" for t in case.targets)
    )
    settings = {"target_modules": case.targets, "r": 40, "lora_alpha": 20}
    trained, adapted = train_randomly(model, tmp_path / "trained", seed=5, **settings)
    ids = families.IDS
    expected = logits_of(adapted, ids)
    differ = {}
    for way in (True, False):
        output = recover(
            trained, base, tmp_path / f"{way}", correction=way, correction_lambda=EXACT
        ).output
        found = logits_of(peft.PeftModel.from_pretrained(case.zeroed(), output), ids)
        differ[way] = float((found - expected).abs().max())
    assert differ[True] < 1e-3 < 1e-1 < differ[False]


def test_nothing_is_changed_where_the_adapter_was_trained_on_the_base_s_own_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = make_case(tmp_path, "pruned", {"target_modules": [*LINEARS, "lm_head"]}, tied=True)
    result = recover(case.trained, case.base, tmp_path / "on")
    plain = recover(case.trained, case.base, tmp_path / "off", correction=False)
    for name in (ADAPTER, "adapter_config.json"):
        assert (result.output / name).read_bytes() == (plain.output / name).read_bytes()
    assert result.manifest.details["corrected_modules"] == 0
    assert result.manifest.details["correction_norm"] == 0.0
    assert "the correction changed nothing" in capsys.readouterr().err
    assert plain.manifest.settings == {} and "model" not in plain.manifest.parents


def test_linears_that_did_not_move_keep_their_matrices_bit_for_bit(tmp_path: Path) -> None:
    base, pruned = make_pruned(tmp_path)
    model = move(pruned, tmp_path / "aligned", names=("layers.2.", "layers.3.mlp.down_proj"))
    trained, _ = train_randomly(model, tmp_path / "trained", seed=5)
    corrected = recover(trained, base, tmp_path / "on")
    plain = pairs(recover(trained, base, tmp_path / "off", correction=False).output)
    changed = set()
    for module, (a, b) in pairs(corrected.output).items():
        if not (torch.equal(a, plain[module][0]) and torch.equal(b, plain[module][1])):
            changed.add(module)
    linears = {module for module in plain if ".layers.2." in module}
    assert changed == linears | {"model.layers.3.mlp.down_proj"}
    assert set(corrected.manifest.details["correction_norms"]) == changed


def test_an_adapter_that_learnt_nothing_is_not_corrected(tmp_path: Path) -> None:
    base, pruned = make_pruned(tmp_path)
    model = move(pruned, tmp_path / "aligned")
    trained, adapted = train_randomly(model, tmp_path / "trained")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    from helpers.adapters import write_trained

    untrained = write_trained(model, adapted, tmp_path / "untrained").output
    result = recover(untrained, base, tmp_path / "on", correction_lambda=EXACT)
    assert result.manifest.details["correction_norm"] == 0.0
    assert all(not b.any() for _, b in pairs(result.output).values())


SHAPES = [(out, wide, r) for out in (1, 5, 40) for wide in (1, 7, 64) for r in (1, 3, 8)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("deficient", [False, True])
def test_any_shape_and_any_rank_keeps_its_product_and_restores_the_function(
    shape: tuple[int, int, int], deficient: bool
) -> None:
    out, wide, r = shape
    generator = torch.Generator().manual_seed(out + wide + r)
    a, b = torch.randn(r, wide, generator=generator), torch.randn(out, r, generator=generator)
    if deficient:
        a[r // 2 :] = 2 * a[:1]
        a[-1] = 0
    new_a, new_b = orthonormal(a, b)
    assert new_a.shape == a.shape and new_b.shape == b.shape
    torch.testing.assert_close(new_b @ new_a, b @ a, rtol=1e-4, atol=1e-4)
    rank = int(torch.linalg.matrix_rank(a))
    gram = torch.diag(torch.tensor([1.0] * rank + [0.0] * (r - rank)))
    torch.testing.assert_close(new_a @ new_a.T, gram, rtol=1e-5, atol=1e-5)
    assert not new_b[:, rank:].any()
    moved = torch.randn(out, wide, generator=generator)
    change = projected(iter(moved.split(3)), new_a)
    assert change is not None and not change[:, rank:].any()
    inputs = torch.randn(4, r, generator=generator) @ a
    after = inputs @ moved.T + inputs @ ((new_b - change) @ new_a).T
    torch.testing.assert_close(after, inputs @ (b @ a).T, rtol=1e-3, atol=1e-3)


def test_a_difference_of_zero_is_said() -> None:
    assert projected(iter([torch.zeros(2, 4), torch.zeros(1, 4)]), torch.eye(2, 4)) is None


def test_each_direction_is_limited_by_what_was_learnt_in_it() -> None:
    change = torch.tensor([[1.0, 8.0, 5.0, 0.0], [3.0, -4.0, 5.0, 0.0]])  # means 2, 6, 5, 0
    b = torch.tensor([[1.0, 1.0, 0.0, 1.0], [-1.0, -3.0, 0.0, 1.0]])  # means 1, 2, 0, 1
    expected = torch.tensor([[0.75, 4.0, 0.0, 0.0], [2.25, -2.0, 0.0, 0.0]])
    torch.testing.assert_close(limited(change, b, 1.5), expected)
    torch.testing.assert_close(limited(change, b, 2.0)[:, 0], change[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 64), (24, 44), (7, 90), (3, 10)])
def test_a_dequantised_weight_is_bitsandbytes_own(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    torch.manual_seed(3)
    weight = torch.randn(shape).to(dtype)
    packed, state = bnb.quantize_4bit(
        weight.reshape(-1), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    expected = bnb.dequantize_4bit(packed, state).reshape(shape)
    found = nf4.dequantize_weight(nf4.quantize_weight(weight))
    assert found.dtype == dtype and torch.equal(found, expected)


@pytest.mark.parametrize("rows", [[0], [4], [0, 1, 2], [1, 2, 4], [0, 2, 4], [0, 1, 2, 3, 4], []])
def test_rows_are_read_as_they_are_stored(tmp_path: Path, rows: list[int]) -> None:
    tensors = {"a": torch.randn(3), "b": torch.randn(5, 6).bfloat16(), "c": torch.randn(5, 2, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    with TensorFile(tmp_path / "model.safetensors") as file:
        for name in ("b", "c"):
            found = file.read_rows(name, torch.tensor(rows, dtype=torch.int64))
            assert found.dtype == tensors[name].dtype and torch.equal(found, tensors[name][rows])


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many blocks of weights that were read were alive, at each reading."""
    blocks: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    read_rows = Checkpoint.read_rows

    def seen(self: Checkpoint, name: str, rows: torch.Tensor) -> torch.Tensor:
        block = read_rows(self, name, rows)
        blocks.append(weakref.ref(block))
        alive.append(sum(reference() is not None for reference in blocks))
        return block

    monkeypatch.setattr(Checkpoint, "read_rows", seen)
    yield alive


def test_two_blocks_of_weights_are_in_memory_at_a_time(
    tmp_path: Path, watched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recover_corrected, "BLOCK_ELEMENTS", 64 * 8)
    case = make_case(tmp_path, "aligned", {"target_modules": [*LINEARS, "lm_head"]})
    recover(case.trained, case.base, tmp_path / "out")
    assert len(watched) > 200
    assert max(watched) <= 4  # the next two are read before the names of the last are bound anew


@pytest.mark.parametrize("kind", [pytest.param("aligned", marks=pytest.mark.slow), "nf4"])
def test_memory_is_bounded_by_one_linear_however_many_layers_there_are(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recover_corrected, "BLOCK_ELEMENTS", 64 * 64)
    sizes: dict[str, Any] = {"hidden": 128, "intermediate": 512, "head_dim": 16}
    peaks = {}
    for layers in (4, 12):
        folder = tmp_path / str(layers)
        case = make_case(folder, kind, {"r": 2}, layers=layers, **sizes)
        case.adapted.cpu()
        base, trained = case.base, case.trained
        del case
        with Allocations() as allocations:
            before = allocations.now
            recover(trained, base, folder / "out")
        peaks[layers] = allocations.peak - before
    linear = 4 * 128 * 512  # bytes of the largest linear of the base
    assert 0 < peaks[12] <= 1.1 * peaks[4]
    assert peaks[12] < 3 * linear


@pytest.fixture
def aligned(tmp_path: Path) -> Case:
    return make_case(tmp_path, "aligned", {})


def refusal(folder: Path, adapter: Path, base: Path, **settings: Any) -> str:
    before = tiny.tree(folder)
    with pytest.raises(lr.LoramError) as caught:
        recover(adapter, base, folder / "refused", **settings)
    assert tiny.tree(folder) == before
    return str(caught.value)


def test_the_model_may_lie_elsewhere(aligned: Case, tmp_path: Path) -> None:
    expected = recover(aligned.trained, aligned.base, tmp_path / "a")
    moved = aligned.model.rename(tmp_path / "elsewhere")
    message = refusal(tmp_path, aligned.trained, aligned.base)
    assert message.startswith(f"recover.model must be a directory, got {aligned.model}; ")
    found = recover(aligned.trained, aligned.base, tmp_path / "b", model=moved)
    assert (found.output / ADAPTER).read_bytes() == (expected.output / ADAPTER).read_bytes()
    manifest = read_manifest(moved)
    assert manifest is not None and found.manifest.parents["model"] == manifest.digest


def test_another_model_is_refused_and_nothing_written(aligned: Case, tmp_path: Path) -> None:
    pruned = tmp_path / "pruned"
    message = refusal(tmp_path, aligned.trained, aligned.base, model=pruned)
    assert message.startswith("recover.model must be the model that ")
    tensors = load_file(aligned.model / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, aligned.model / "model.safetensors", {"format": "pt"})
    assert "does not match the SHA-256 in its manifest" in refusal(
        tmp_path, aligned.trained, aligned.base
    )


def test_it_is_skipped_where_it_is_complete_and_another_lambda_is_other_work(
    aligned: Case, tmp_path: Path
) -> None:
    assert not recover(aligned.trained, aligned.base, tmp_path / "out").skipped
    assert recover(aligned.trained, aligned.base, tmp_path / "out").skipped
    for other in ({"correction_lambda": 1.0}, {"correction": False}):
        with pytest.raises(lr.LoramError, match="recover.output must be a new or empty directory"):
            recover(aligned.trained, aligned.base, tmp_path / "out", **other)


def test_a_failure_half_way_leaves_nothing_and_another_try_is_whole(
    aligned: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = recover(aligned.trained, aligned.base, tmp_path / "whole").output
    before = tiny.tree(tmp_path)
    read_rows, left = Checkpoint.read_rows, 20

    def failing(self: Checkpoint, name: str, rows: torch.Tensor) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(5, "Input/output error")
        return read_rows(self, name, rows)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(Checkpoint, "read_rows", failing)
        recover(aligned.trained, aligned.base, tmp_path / "out")
    assert tiny.tree(tmp_path) == before
    again = recover(aligned.trained, aligned.base, tmp_path / "out").output
    assert (again / ADAPTER).read_bytes() == (expected / ADAPTER).read_bytes()


@pytest.mark.parametrize("form", ["adapter", "delta"])
def test_it_is_refused_after_masked_training(tmp_path: Path, form: str) -> None:
    case = masked.make_case(tmp_path, "2:4")
    message = refusal(tmp_path, case.trained, case.base, form=form)
    assert message.startswith("recover.correction must be false for 2:4 pruning")


def test_a_batch_and_a_sweep_refuse_it_before_masked_training(
    tmp_path: Path, embedded_ray: None
) -> None:
    case = masked.make_case(tmp_path, "2:4")
    data = str(tiny.write_jsonl(tmp_path / "data.jsonl", tiny.questions(8)))
    shared: dict[str, Any] = {
        "model": case.pruned, "base": str(case.base), "output": tmp_path / "out", "correction": True
    }  # fmt: skip
    with pytest.raises(lr.LoramError, match=r"^batch.correction must be false for 2:4 pruning"):
        lr.batch(lr.BatchConfig(**shared, tasks=[{"data": data}]))
    run = lr.RunConfig(
        base=str(case.base),
        output=tmp_path,
        sweep={**shared, "data": data, "train": {"eval_share": 0.5}, "grid": {"lora.r": [2]}},
    )
    with pytest.raises(lr.LoramError, match=r"^sweep.correction must be false for 2:4 pruning"):
        lr.sweep(run.sweep, run.ray)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "corrected"), [("", False), ("aligned", True), ("nf4", True), ("aligned nf4", True)]
)
def test_by_default_an_adapter_is_corrected_where_its_model_moved(
    tmp_path: Path, kind: str, corrected: bool
) -> None:
    """Trained by the train stage, whose manifest says what was trained on."""
    case = make_case(tmp_path, kind, {"r": 2})
    config = lr.TrainConfig(
        model=case.model,
        output=tmp_path / "by_the_stage",
        data=str(tiny.write_jsonl(tmp_path / "data.jsonl", tiny.questions(8))),
        lora={"r": 2, "dropout": 0.0},
        steps=2,
        batch_size=4,
        max_length=64,
        precision="fp32",
        optimiser={"learning_rate": 1e-2, "warmup_steps": 0},
    )
    trained = train_by(config, train_adapter).output
    found = recover(trained, case.base, tmp_path / "default", correction=None)
    asked = recover(trained, case.base, tmp_path / "asked", correction=corrected).output
    other = recover(trained, case.base, tmp_path / "other", correction=not corrected).output
    assert (found.output / ADAPTER).read_bytes() == (asked / ADAPTER).read_bytes()
    assert ("corrected_modules" in found.manifest.details) == corrected
    differs = (found.output / ADAPTER).read_bytes() != (other / ADAPTER).read_bytes()
    assert differs == corrected  # where nothing moved there is nothing to correct
    case.model.rename(tmp_path / "gone")
    if corrected:
        message = refusal(tmp_path, trained, case.base, correction=None)
        assert message.endswith("or set recover.correction to false")
    else:
        recover(trained, case.base, tmp_path / "without", correction=None)


@pytest.mark.parametrize("value", [0, -1])
def test_a_lambda_that_is_not_positive_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        lr.RecoverConfig(adapter="a", base="b", output="c", correction_lambda=value)
