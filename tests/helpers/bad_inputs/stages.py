"""Altered outputs of stages: manifests, plans, results and the corpus of a report."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path
from typing import Any

from helpers.bad_inputs.harness import (
    NO_FILES,
    NO_JSON,
    PRUNED,
    TRAINED,
    Change,
    Row,
    edited,
    missing,
    stage,
    without,
    written,
)

_MANIFEST = f"{PRUNED}/manifest.json"
_MANIFEST_VALUES: dict[str, tuple[Any, ...]] = {
    "stage": (7, None, [], "bake", {}),
    "identity": (7, None, []),
    "base_fingerprint": (7, None, {}),
    "parents": (7, [], {"a": 7}, None),
    "settings": (7, [], None),
    "details": (7, [], None),
    "files": (7, [], {"a": 7}, {"a": {}}, {"../a": {"bytes": 1, "sha256": "0" * 64}},
              {"a": {"bytes": "1", "sha256": "0" * 64}}, {"a": {"bytes": 1, "sha256": 7}},
              {"a": {"bytes": -1, "sha256": "0" * 64}},
              {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}},
              {"a\0b": {"bytes": 1, "sha256": "0" * 64}}),
    "versions": (7, [], {"a": 7}),
    "created": ("now", [], {}),
    "format": ("1", 2, None, []),
    "more": (7,),
}  # fmt: skip
_PLAN_VALUES: dict[str, tuple[Any, ...]] = {
    "format": (7, "9", None, []),
    "model_type": (7, None, "gpt2", []),
    "geometry": (7, [], {}, None),
    "method": (7, None),
    "ratio": ("half", -1, 2, None, []),
    "seed": ("a", -1, 1.5, None),
    "layer_range": (7, [], [1], ["a", "b"], [-1, 2], [0, 10**9]),
    "base_fingerprint": (7, None, "0"),
    "pattern": (7, None),
    "masks": (7, [], {"sha256": "0" * 64, "shapes": {"a": [1]}}, {"sha256": 7, "shapes": {}}),
}
_GEOMETRY: dict[str, tuple[Any, ...]] = {
    "num_layers": ("2", 0, 10**30, None),
    "num_kv_heads": (0, -1, 2.5, "2"),
    "head_dim": (0, "4", 10**30),
    "intermediate_size": (-1, 10**30, []),
    "more": (1,),
}


def _plan(directory: str, change: Any) -> Change:
    """Return a change of a directory's plan and manifest that leaves the plan's tensors."""

    def at(folder: Path) -> None:
        path = folder / directory / "pruning_plan.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        said = json.loads(header["__metadata__"]["loram_plan"])
        said = change(said)
        header["__metadata__"]["loram_plan"] = said if isinstance(said, str) else json.dumps(said)
        encoded = json.dumps(header).encode()
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])
        _rehash(folder / directory, path.name)

    return at


def _rehash(directory: Path, name: str) -> None:
    import hashlib

    manifest = json.loads((directory / "manifest.json").read_text())
    data = (directory / name).read_bytes()
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (directory / "manifest.json").write_text(json.dumps(manifest))


def _set(*keys: str, value: Any) -> Any:
    def change(said: dict[str, Any]) -> dict[str, Any]:
        node = said
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value
        return said

    return change


def _rows() -> list[Row]:
    rows: list[Row] = []
    readers = cycle(
        [
            stage("quantize"),
            stage("evaluate", f"evaluate.model={PRUNED}", f"evaluate.adapter={TRAINED}"),
            stage("publish"),
            ("report", "run"),
        ]
    )

    def add(name: str, words: Any, named: str, change: Change) -> None:
        rows.append(Row(name, words, named, change))

    for name, content in NO_JSON.items():
        if name not in ("nan", "huge", "digits", "number"):
            add(f"manifest_{name}", next(readers), "run", written(_MANIFEST, content))
    for name, make in NO_FILES.items():
        add(f"manifest_is_{name}", next(readers), "run", make(_MANIFEST))
        add(
            f"plan_is_{name}",
            stage("quantize"),
            "pruning_plan",
            make(f"{PRUNED}/pruning_plan.safetensors"),
        )
        add(
            f"results_are_{name}",
            ("report", "results"),
            "results.json",
            make("results/results.json"),
        )
    add("manifest_missing", stage("quantize"), "run/pruned", missing(_MANIFEST))
    for key, values in _MANIFEST_VALUES.items():
        for number, value in enumerate(values):
            change = edited(_MANIFEST, key, value=value)
            add(f"manifest_{key}_{number}", stage("quantize"), "run/pruned", change)
    for key in ("stage", "identity", "parents", "base_fingerprint", "settings"):
        add(f"manifest_lacks_{key}", stage("quantize"), "run/pruned", without(_MANIFEST, key))
    for number, value in enumerate(({}, {"parameters": "7"}, {"parameters": None})):
        change = edited(_MANIFEST, "details", value=value)
        add(f"manifest_sizes_{number}", stage("quantize"), "manifest.json", change)
    for key, values in _PLAN_VALUES.items():
        for number, value in enumerate(values):
            change = _plan(TRAINED, _set(key, value=value))
            named = {"gpt2": "model_type", "0": "fingerprint"}.get(str(value), "pruning_plan")
            add(f"plan_{key}_{number}", stage("recover"), named, change)
    for key, values in _GEOMETRY.items():
        for number, value in enumerate(values):
            change = _plan(TRAINED, _set("geometry", key, value=value))
            add(f"plan_geometry_{key}_{number}", stage("recover"), "pruning_plan", change)
    for name, said in {
        "no_json": "{",
        "list": "[]",
        "deep": '{"a":' * 10_000,
        "nan": "NaN",
    }.items():
        add(f"plan_{name}", stage("recover"), "pruning_plan", _plan(TRAINED, lambda _, s=said: s))
    for name, content in NO_JSON.items():
        if name not in ("list", "nan"):
            add(
                f"results_{name}",
                ("report", "results"),
                "results.json",
                written("results/results.json", content),
            )
    for number, value in enumerate(([7], [[]], ["a"], [None], {"rows": 7}, {"rows": [7]}, [{}])):
        add(
            f"results_rows_{number}",
            ("report", "results"),
            "results",
            written("results/results.json", json.dumps(value)),
        )
    for key, values in {
        "name": (7, None, [], {}, "../a", "a/b", ""),
        "state": (7, None, []),
        "loss": ("low", [], {}),
        "steps": ("a", [], 1.5e300),
        "seconds": ("a", [], {}),
    }.items():
        for number, value in enumerate(values):
            rows.append(
                Row(
                    f"results_{key}_{number}",
                    ("report", "results"),
                    "results",
                    edited("results/results.json", 0, key, value=value),
                    may_work=True,
                )
            )
    add("report_of_nothing", ("report", "nowhere"), "nowhere", lambda folder: None)
    add("report_of_a_file", ("report", "run.yaml"), "run.yaml", lambda folder: None)
    add("report_of_no_results", ("report", "base"), "base", lambda folder: None)
    return rows


ROWS = _rows()
