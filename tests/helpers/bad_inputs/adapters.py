"""Bad adapters: configurations that contradict tensors, costly patterns, and other files."""

from __future__ import annotations

from itertools import cycle
from typing import Any

from helpers.bad_inputs.harness import (
    NO_FILES,
    NO_JSON,
    Row,
    edited,
    missing,
    stage,
    without,
    written,
)
from helpers.bad_inputs.models import tensor_file

_CHAT = ("chat", "--model", "base", "--adapter", "plain", "--prompt", "?", "--max-new-tokens", "1")
_CONFIG, _TENSORS = "plain/adapter_config.json", "plain/adapter_model.safetensors"

_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": (7, None, "IA3", [], {}),
    "r": ("4", 0, -4, 4.5, 5, 10**9, 10**30, None, [], True),
    "lora_alpha": ("8", 0, None, [], {}, 10**30),
    "rank_pattern": (7, [], {"q_proj": "4"}, {"q_proj": 0}, {"q_proj": 5}, {"(": 4}, "q_proj"),
    "alpha_pattern": (7, [], {"q_proj": "8"}, {"[": 8}, {"q_proj": None}, {"q_proj": []}),
    "use_rslora": ("yes", 7, []),
    "use_dora": (True, "yes"),
    "target_modules": (7, {}, [7], "(", "(a+)+(a+)+(a+)+!"),
    "bias": ("all", 7, []),
    "modules_to_save": (["lm_head"], "lm_head"),
    "init_lora_weights": ("pissa", 7, []),
    "layer_replication": ([[0, 1]], 7),
    "fan_in_fan_out": (True,),
}
_OF_MERGE = (
    "use_dora",
    "bias",
    "modules_to_save",
    "layer_replication",
    "fan_in_fan_out",
    "peft_type",
)
"""Settings that PEFT supports and merge does not."""
_ENDLESS = ("([a-z_.0-9]+)+!", r"(\w+\.?)*!")


def _rows() -> list[Row]:
    rows = []
    turn = cycle([("merge", stage("merge")), ("evaluate", stage("evaluate")), ("chat", _CHAT)])

    def add(name: str, named: str, change: Any, **more: Any) -> None:
        command, words = next(turn)
        rows.append(Row(f"{command}_{name}", words, named, change, **more))

    for name, content in NO_JSON.items():
        add(f"adapter_{name}", "adapter_config.json", written(_CONFIG, content))
    for name, make in NO_FILES.items():
        add(f"adapter_config_is_{name}", "adapter_config.json", make(_CONFIG))
        add(f"adapter_weights_are_{name}", "adapter_model.safetensors", make(_TENSORS))
    add("adapter_config_missing", "adapter", missing(_CONFIG))
    add("adapter_weights_missing", "plain", missing(_TENSORS))
    for key, values in _VALUES.items():
        for number, value in enumerate(values):
            change = edited(_CONFIG, key, value=value)
            if key in _OF_MERGE:
                rows.append(Row(f"adapter_{key}_{number}", stage("merge"), "plain", change))
            else:
                add(f"adapter_{key}_{number}", "plain", change)
    for number, pattern in enumerate(_ENDLESS):
        for key, value in (("rank_pattern", {pattern: 4}), ("alpha_pattern", {pattern: 8})):
            add(f"adapter_{key}_endless_{number}", key, edited(_CONFIG, key, value=value))
        add(
            f"adapter_target_modules_endless_{number}",
            "target_modules",
            edited(_CONFIG, "target_modules", value=pattern),
        )
    add("adapter_lacks_peft_type", "plain", without(_CONFIG, "peft_type"))
    for name, header in {
        "nothing": {},
        "another": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        "half": {
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": {
                "dtype": "F32",
                "shape": [1, 1],
                "data_offsets": [0, 4],
            }
        },
        "list": [],
        "deep": b'{"a":' * 100_000,
    }.items():
        change = tensor_file(_TENSORS, header)
        rows.append(Row(f"adapter_header_{name}", stage("merge"), "plain", change))
    for length in (0, 2**40, 2**64 - 1):
        add(f"adapter_header_length_{length}", "plain", tensor_file(_TENSORS, {}, length))
    return rows


ROWS = _rows()
