"""What a calibration cannot use: one line, and nothing is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

import loram_ray as lr
from helpers import tiny
from helpers.calibrations import Calls, prune, spoilt_base, weights
from loram_ray.config import load_run
from loram_ray.plan import PruningPlan


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
    with pytest.raises(lr.LoramError, match=rf"tensor {tensor} of .* must be finite, but 1 of"):
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
    with pytest.raises(lr.LoramError, match="prune.scores must be for prune.base|up_proj.*finite"):
        prune(copy, tmp_path / "out", "wanda", scores=norms)


def test_text_shorter_than_a_sample_is_refused(
    base: Path, tmp_path: Path, in_process: Callable[..., Calls]
) -> None:
    calls = in_process()
    short = tiny.write_jsonl(tmp_path / "short.jsonl", [{"text": "too short"}])
    with pytest.raises(
        lr.LoramError,
        match=r"prune.calibration.sources must contain at least one sequence of 24 tokens, got 10",
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
    assert f"prune.calibration.sources contain {tokens} of 100 samples; continuing" in said
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
        lr.LoramError, match=r"m that divides .* got 4:8 with 100 inputs of model.layers.1.mlp.down"
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
