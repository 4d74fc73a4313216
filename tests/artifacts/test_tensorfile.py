"""Our safetensors reader and writer against the safetensors library and transformers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from helpers import tiny
from loram_ray.artifacts.tensorfile import (
    Checkpoint,
    CheckpointWriter,
    TensorFile,
    TensorSpec,
    TensorWriter,
)
from loram_ray.errors import LoramError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
]
SHAPES = [(), (1,), (0,), (3, 0, 2), (7,), (3, 5), (2, 3, 4)]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bit pattern, not-a-number included; a bool is 0 or 1."""
    count = torch.empty(shape).numel() * dtype.itemsize
    high = 2 if dtype is torch.bool else 256
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(high, (count,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
    )


def examples() -> dict[str, torch.Tensor]:
    return {
        f"{dtype}.{i}": random_bits(shape, dtype, seed=i)
        for dtype in DTYPES
        for i, shape in enumerate(SHAPES)
    }


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict | None = None) -> str:
    writer = TensorWriter(path, specs_of(tensors), metadata)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    return writer.finish()


def read(path: Path) -> dict[str, torch.Tensor]:
    with TensorFile(path) as file:
        return {name: file.read(name) for name in file.specs}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two tensors, 24 and 10 bytes, written by the safetensors library."""
    path = tmp_path / "small.safetensors"
    first, second = torch.arange(6, dtype=torch.float32), torch.arange(5, dtype=torch.bfloat16)
    safetensors.torch.save_file({"first": first.reshape(2, 3), "second": second}, path)
    return path


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the JSON header of a file and leave the data as it is."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    changed = change(header)
    encoded = json.dumps(header if changed is None else changed).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])


def test_library_reads_what_we_write_bit_for_bit(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", examples())
    assert_same(safetensors.torch.load_file(tmp_path / "x.safetensors"), examples())


def test_we_read_what_the_library_writes_bit_for_bit(tmp_path: Path) -> None:
    safetensors.torch.save_file(examples(), tmp_path / "x.safetensors")
    assert_same(read(tmp_path / "x.safetensors"), examples())


def test_strided_tensors_are_written_by_value(tmp_path: Path) -> None:
    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    views = {"transposed": tensor.t(), "column": tensor[:, 1], "parameter": torch.nn.Linear(3, 2)}
    views["parameter"] = views["parameter"].weight
    write(tmp_path / "x.safetensors", views)
    found = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert_same(found, {name: t.detach().contiguous() for name, t in views.items()})


def test_metadata_crosses_both_ways(tmp_path: Path) -> None:
    said = {"note": 'ünïcode "quoted"\n', "empty": ""}
    tensors = {"x": torch.ones(2)}
    write(tmp_path / "ours", tensors, said)
    with safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"format": "pt", **said}
    safetensors.torch.save_file(tensors, tmp_path / "theirs", said)
    with TensorFile(tmp_path / "theirs") as file:
        assert file.metadata == said


def test_finish_returns_the_hash_of_the_file_and_data_is_aligned(tmp_path: Path) -> None:
    for name_length in range(1, 10):
        path = tmp_path / f"{name_length}"
        digest = write(path, {"x" * name_length: torch.arange(5)})
        content = path.read_bytes()
        assert digest == hashlib.sha256(content).hexdigest()
        assert int.from_bytes(content[:8], "little") % 8 == 0


def test_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    specs = {"a": TensorSpec((2,), torch.float32), "b": TensorSpec((), torch.int64)}
    for name, tensor in [
        ("b", torch.tensor(1)),
        ("a", torch.ones(3)),
        ("a", torch.ones(2, 1)),
        ("a", torch.ones(2, dtype=torch.float16)),
    ]:
        writer = TensorWriter(tmp_path / "x", specs)
        with pytest.raises(ValueError, match=name):
            writer.write(name, tensor)
        writer.abort()
    writer = TensorWriter(tmp_path / "x", specs)
    writer.write("a", torch.ones(2))
    with pytest.raises(ValueError, match="1 tensors were never written"):
        writer.finish()
    writer.write("b", torch.tensor(1))
    with pytest.raises(ValueError, match="expected tensor None, got c"):
        writer.write("c", torch.ones(1))
    writer.abort()


def test_sample_is_evenly_spaced_and_whole_where_small(tmp_path: Path) -> None:
    data = random_bits((10_000,), torch.uint8)
    write(tmp_path / "x", {"pad": torch.ones(3), "large": data, "small": data[:40]})
    with TensorFile(tmp_path / "x") as file:
        assert file.sample("small", 16, 256) == data[:40].numpy().tobytes()
        found = file.sample("large", 5, 100)
    step = (10_000 - 100) // 4
    expected = [data[i * step : i * step + 100].numpy().tobytes() for i in range(5)]
    assert found == b"".join(expected)


@pytest.mark.parametrize("max_shard_bytes", [1, 20_000, 60_000, 5 * 10**9])
def test_transformers_loads_the_shards_we_write(
    base: Path, tmp_path: Path, max_shard_bytes: int
) -> None:
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    with CheckpointWriter(tmp_path, specs_of(tensors), max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    model, said = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    assert_same(dict(model.state_dict()), tensors)

    shards = sorted(tmp_path.glob("*.safetensors"))
    largest = max(t.nbytes for t in tensors.values())
    for shard in shards:
        held = safetensors.torch.load_file(shard)
        assert sum(t.nbytes for t in held.values()) <= max(max_shard_bytes, largest)
        assert writer.hashes[shard.name] == hashlib.sha256(shard.read_bytes()).hexdigest()
    if len(shards) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert (len(shards) == len(tensors)) == (max_shard_bytes == 1)
    assert (len(shards) == 1) == (max_shard_bytes == 5 * 10**9)


def test_checkpoint_reads_what_transformers_shards(tmp_path: Path) -> None:
    whole = tiny.write_base(tmp_path / "whole", bias=True)
    sharded = tiny.write_base(tmp_path / "sharded", bias=True, max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    expected = safetensors.torch.load_file(whole / "model.safetensors")
    with Checkpoint(sharded) as checkpoint:
        assert_same(dict(checkpoint), expected)
        assert_same({name: checkpoint.read(name) for name in expected}, expected)
        assert checkpoint.specs == specs_of(expected)
        assert checkpoint.nbytes == sum(t.nbytes for t in expected.values())


def test_a_tensor_in_two_shards_is_read_from_the_one_the_index_names(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", {"x": torch.zeros(2), "y": torch.ones(1)})
    write(tmp_path / "b.safetensors", {"x": torch.full((2,), 7.0), "z": torch.ones(1)})
    for shard, value in [("a.safetensors", 0.0), ("b.safetensors", 7.0)]:
        index = {"weight_map": {"x": shard, "y": "a.safetensors", "z": "b.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with Checkpoint(tmp_path) as checkpoint:
            found = list(checkpoint)
            assert sorted(name for name, _ in found) == ["x", "y", "z"]
            assert torch.equal(dict(found)["x"], torch.full((2,), value))


def test_a_whole_file_beside_an_index_is_what_we_read_as_transformers_does(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", max_shard_size="100KB")
    whole = tiny.write_base(tmp_path / "whole", seed=1)
    (base / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes())
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with Checkpoint(base) as checkpoint:
        assert_same(dict(checkpoint), dict(loaded.state_dict()))


def test_unfinished_checkpoint_is_an_error_and_leaves_no_index(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(4), "b": torch.ones(4)}
    with (
        pytest.raises(ValueError, match="not every declared tensor"),
        CheckpointWriter(tmp_path, specs_of(tensors), max_shard_bytes=16) as writer,
    ):
        writer.write("a", tensors["a"])
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_a_file_cut_anywhere_is_refused_by_name(small: Path) -> None:
    content = small.read_bytes()
    assert read(small)["second"].tolist() == [0, 1, 2, 3, 4]
    for length in range(len(content)):
        small.write_bytes(content[:length])
        with pytest.raises(LoramError, match="small.safetensors"):
            TensorFile(small)


def test_a_file_with_bytes_to_spare_is_refused_by_name(small: Path) -> None:
    small.write_bytes(small.read_bytes() + b"\0")
    with pytest.raises(LoramError, match="small.safetensors"):
        TensorFile(small)


@pytest.mark.parametrize("length", [9, 10**4, 10**9, 2**63, 2**64 - 1])
def test_a_header_length_beyond_the_file_is_refused_by_name(small: Path, length: int) -> None:
    small.write_bytes(length.to_bytes(8, "little") + small.read_bytes()[8:])
    with pytest.raises(LoramError, match="small.safetensors"):
        TensorFile(small)


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"{]", b"null", b"[]", b"7", b'"text"', b"\xff\xfe{}", b'{"a": 1}', b"[" * 50_000],
)
def test_a_broken_header_is_refused_by_name(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(34))
    with pytest.raises(LoramError, match="broken.safetensors"):
        TensorFile(path)


def both(first: list[int], second: list[int]) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header["first"]["data_offsets"], header["second"]["data_offsets"] = first, second

    return change


WRONG_HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "one byte too many": both([0, 25], [25, 35]),
    "one byte too few": both([0, 23], [24, 34]),
    "reversed": both([24, 0], [24, 34]),
    "before the data": both([-24, 0], [24, 34]),
    "beyond the data": both([0, 24], [25, 35]),
    "a gap": both([0, 24], [26, 36]),
    "overlapping": lambda h: h.update(
        second={"dtype": "U8", "shape": [34], "data_offsets": [0, 34]}
    ),
    "three offsets": both([0, 24, 24], [24, 34]),
    "no offsets": lambda h: h["first"].pop("data_offsets") and None,
    "text offsets": both(["0", "24"], [24, 34]),  # type: ignore[list-item]
    "fractional offsets": both([0.0, 24.0], [24, 34]),  # type: ignore[list-item]
    "other shape": lambda h: h["first"].update(shape=[2, 4]),
    "negative shape": lambda h: h["first"].update(shape=[-2, -3]),
    "fractional shape": lambda h: h["first"].update(shape=[2.0, 3.0]),
    "text shape": lambda h: h["first"].update(shape="23"),
    "no shape": lambda h: h["first"].pop("shape") and None,
    "unknown dtype": lambda h: h["first"].update(dtype="F128"),
    "dtype of another size": lambda h: h["first"].update(dtype="F64"),
    "no dtype": lambda h: h["first"].pop("dtype") and None,
    "dtype is a list": lambda h: h["first"].update(dtype=["F32"]),
    "entry is a list": lambda h: h.update(first=[1, 2]),
    "a tensor not named": lambda h: h.pop("second") and None,
    "metadata is a list": lambda h: h.update(__metadata__=["x"]),
}


@pytest.mark.parametrize("case", WRONG_HEADERS)
def test_a_header_that_does_not_fit_the_data_is_refused_by_name(small: Path, case: str) -> None:
    rewrite_header(small, WRONG_HEADERS[case])
    with pytest.raises(LoramError, match="small.safetensors"):
        TensorFile(small)


def test_offsets_in_another_order_than_the_names_are_read_right(small: Path) -> None:
    first = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    second = torch.arange(5, dtype=torch.bfloat16)
    length = int.from_bytes(small.read_bytes()[:8], "little")
    bits = [t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in (second, first)]
    small.write_bytes(small.read_bytes()[: 8 + length] + b"".join(bits))
    rewrite_header(small, both([10, 34], [0, 10]))
    assert_same(read(small), {"first": first, "second": second})


def test_a_missing_file_and_a_directory_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("folder.safetensors", "nowhere.safetensors"):
        with pytest.raises(LoramError, match=name):
            TensorFile(tmp_path / name)


def test_a_file_that_shrinks_while_it_is_read_is_refused_by_name(small: Path) -> None:
    with TensorFile(small) as file:
        os.truncate(small, small.stat().st_size - 1)
        with pytest.raises(LoramError, match=r"small.safetensors .*truncated while"):
            file.read("second")


INDICES = {
    "not JSON": "{",
    "not UTF-8": b"\xff\xfe\x00",
    "a list": "[1]",
    "no weight map": "{}",
    "weight map is a list": '{"weight_map": ["x"]}',
    "weight map is null": '{"weight_map": null}',
    "shard is a number": '{"weight_map": {"x": 1}}',
    "shard is a list": '{"weight_map": {"x": ["a.safetensors"]}}',
}


@pytest.mark.parametrize("case", INDICES)
def test_an_unreadable_index_is_refused_by_name(tmp_path: Path, case: str) -> None:
    content = INDICES[case]
    write(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    (tmp_path / "model.safetensors.index.json").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    with pytest.raises(LoramError, match="model.safetensors.index.json"):
        Checkpoint(tmp_path)


def test_a_missing_shard_and_a_missing_tensor_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with pytest.raises(LoramError, match="b.safetensors"):
        Checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "a.safetensors"}}))
    with pytest.raises(LoramError, match=r"a.safetensors lacks tensor y"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_cut_shard_is_refused_by_name(tmp_path: Path, share: float) -> None:
    base = tiny.write_base(tmp_path / "base", max_shard_size="100KB")
    shard = sorted(base.glob("*.safetensors"))[1]
    os.truncate(shard, int(shard.stat().st_size * share))
    with pytest.raises(LoramError, match=shard.name):
        Checkpoint(base)


def test_pickled_weights_are_refused_with_the_remedy(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(LoramError, match=r"contains neither model.safetensors .*convert pickled"):
        Checkpoint(tmp_path)


def test_refused_files_leave_no_open_descriptor(tmp_path: Path, small: Path) -> None:
    write(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    index = {"weight_map": {"x": "a.safetensors", "y": "small.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(LoramError):
            Checkpoint(tmp_path)
    rewrite_header(small, WRONG_HEADERS["reversed"])
    with pytest.raises(LoramError):
        TensorFile(small)
    assert len(os.listdir("/proc/self/fd")) == before
