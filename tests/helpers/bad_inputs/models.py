"""Bad models, tokenizers and chat templates: invalid documents, values and tensor headers."""

from __future__ import annotations

import json
from typing import Any

from helpers.bad_inputs.harness import (
    NO_FILES,
    NO_JSON,
    Change,
    Row,
    edited,
    in_turn,
    missing,
    stage,
    without,
    written,
)

_CONFIG = "base/config.json"
_CHAT = ("chat", "--model", "base", "--prompt", "?", "--max-new-tokens", "1")
_READERS = ("prune", "merge", "evaluate", "export")

_VALUES: dict[str, tuple[Any, ...]] = {
    "model_type": (7, None, [], {}, "llama\0", ""),
    "hidden_size": ("16", 16.0, -16, 0, 10**30, None, [], {}, True),
    "intermediate_size": ("24", -1, 0, 10**12, {}),
    "num_hidden_layers": ("2", 2.5, -2, 0, 10**30, 10**9, None, [2]),
    "num_attention_heads": ("4", 0, -4, 3, 10**18, [], False),
    "num_key_value_heads": ("2", 0, -2, 3, 10**18, {}),
    "head_dim": (4.5, "4", 0, -4, 10**20),
    "vocab_size": ("259", -1, 0, 10**12, 259.5, []),
    "max_position_embeddings": ("512", -512, 0, 10**30, {}),
    "rms_norm_eps": ("1e-5", -1, [], 10**9),
    "rope_parameters": (7, "default", []),
    "tie_word_embeddings": ("yes", 3, []),
    "hidden_act": (7, []),
    "eos_token_id": ("0", -5, [0, "a"], {}, 10**15),
    "architectures": (7, "LlamaForCausalLM", [7]),
    "quantization_config": (7, []),
    "pruned_linears": (7, {"a": 3}, {"a": [1]}, {"a": [1, "b"]}, {"a": [-1, 2]}),
}

_HEADERS: dict[str, Any] = {
    "no_json": b"{",
    "list": [],
    "deep": b'{"a":' * 100_000,
    "twice": b'{"a": 1, "a": 2}',
    "no_entry": {"a": 7},
    "no_shape": {"a": {"dtype": "F32", "data_offsets": [0, 4]}},
    "no_dtype": {"a": {"shape": [1], "data_offsets": [0, 4]}},
    "no_offsets": {"a": {"dtype": "F32", "shape": [1]}},
    "shape_text": {"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}},
    "shape_negative": {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    "shape_float": {"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}},
    "shape_huge": {"a": {"dtype": "F32", "shape": [10**30, 0], "data_offsets": [0, 0]}},
    "shape_product": {"a": {"dtype": "F32", "shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}},
    "shape_long": {"a": {"dtype": "F32", "shape": [1] * 1000, "data_offsets": [0, 4]}},
    "dtype_unknown": {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
    "dtype_list": {"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
    "dtype_wrong": {"a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 4]}},
    "offsets_text": {"a": {"dtype": "F32", "shape": [1], "data_offsets": "04"}},
    "offsets_three": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}},
    "offsets_backwards": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
    "offsets_beyond": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [400, 404]}},
    "offsets_overlap": {
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    },
    "metadata": {"__metadata__": {"a": 7}},
    "metadata_list": {"__metadata__": [7]},
}


def tensor_file(
    path: str, header: Any, length: int | None = None, tail: bytes = b"\0" * 4
) -> Change:
    """Return a change that writes a safetensors file with a header and a possibly wrong length."""
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return written(
        path, (len(data) if length is None else length).to_bytes(8, "little") + data + tail
    )


def _indices() -> dict[str, Change]:
    path = "sharded/model.safetensors.index.json"
    first = "model.embed_tokens.weight"
    found = {name: written(path, content) for name, content in NO_JSON.items()}
    found |= {name: make(path) for name, make in NO_FILES.items()}
    for number, value in enumerate((7, None, [], "a", {"a": 7}, {"a": None}, {"a": ["b"]})):
        found[f"map_{number}"] = edited(path, "weight_map", value=value)
    names = (
        "../base/model.safetensors",
        "/dev/zero",
        "",
        ".",
        "a\0b",
        "nowhere.safetensors",
        "a/b",
    )
    for number, value in enumerate(names):
        found[f"file_{number}"] = edited(path, "weight_map", first, value=value)
    found["no_map"] = without(path, "weight_map")
    return found


_TOKENIZERS: dict[str, tuple[str, Change]] = {
    f"{file}_{name}": (file, written(f"base/{file}", content))
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    for name, content in NO_JSON.items()
    if name not in ("nan", "huge", "digits") or file != "tokenizer.json"
}
_TOKENIZERS |= {
    f"{file}_{name}": (file, make(f"base/{file}"))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for name, make in NO_FILES.items()
}
_TOKENIZER_VALUES: dict[tuple[str, str], tuple[Any, ...]] = {
    ("tokenizer.json", "model"): (7, [], None, {}, {"type": "BPE"}, {"type": "Quiz"}),
    ("tokenizer.json", "added_tokens"): (7, [7], [{}]),
    ("tokenizer.json", "pre_tokenizer"): (7, [], {"type": "Quiz"}),
    ("tokenizer.json", "decoder"): ("a", {"type": "Quiz"}),
    ("tokenizer_config.json", "tokenizer_class"): (7, []),
    ("tokenizer_config.json", "eos_token"): (7, [], True),
    ("tokenizer_config.json", "model_max_length"): ("a", -1, 0, []),
    ("tokenizer_config.json", "chat_template"): (7, [7], {}),
    ("tokenizer_config.json", "added_tokens_decoder"): (7, [], {"0": 7}),
    ("generation_config.json", "eos_token_id"): ("a", -9, [[]], 1.5, {}),
    ("generation_config.json", "temperature"): ("hot", -1, []),
    ("generation_config.json", "top_p"): (7, "a"),
    ("generation_config.json", "max_length"): (-1, "a", 1.5),
}
_TEMPLATES = {
    "open": "{% for m in messages %}",
    "unknown_tag": "{% nonsense %}",
    "for_ever": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "memory": "{{ 'a' * 10 ** 12 }}",
    "lists": "{% for a in [0] * 10 ** 9 %}a{% endfor %}",
    "large": "{{ 'a' * 10 ** 8 }}",
    "long": "a" * 2**21,
    "macro": "{% macro f(n) %}{% for i in range(9) %}{{ f(n - 1) if n }}{% endfor %}{% endmacro %}"
    "{{ f(99) }}",
    "nested": "{" * 100_000,
    "deep": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "bytes": b"\xff{{ messages }}",
}


def _template(content: str | bytes) -> Change:
    return written("base/chat_template.jinja", content)


def _rows() -> list[Row]:
    rows = []
    turn = in_turn(*_READERS)
    for name, content in NO_JSON.items():
        rows.append(Row(f"config_{name}", next(turn), "config.json", written(_CONFIG, content)))
    for name, make in NO_FILES.items():
        rows.append(Row(f"config_is_{name}", next(turn), "config.json", make(_CONFIG)))
    rows.append(Row("config_missing", stage("prune"), "config.json", missing(_CONFIG)))
    for key, values in _VALUES.items():
        for number, value in enumerate(values):
            name = f"config_{key}_{number}"
            # A model type without layers of its own belongs to another model and is no error.
            rows.append(
                Row(
                    name,
                    next(turn),
                    "config.json",
                    edited(_CONFIG, key, value=value),
                    may_work=value is None,
                )
            )
    for key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        rows.append(Row(f"config_lacks_{key}", next(turn), "", without(_CONFIG, key)))
    for name, header in _HEADERS.items():
        rows.append(
            Row(
                f"header_{name}",
                next(turn),
                "model.safetensors",
                tensor_file("base/model.safetensors", header),
            )
        )
    for length in (0, 1, 7, 2**20, 2**40, 2**63, 2**64 - 1):
        rows.append(
            Row(
                f"header_length_{length}",
                next(turn),
                "model.safetensors",
                tensor_file("base/model.safetensors", {}, length),
            )
        )
    for name, make in NO_FILES.items():
        rows.append(
            Row(
                f"weights_are_{name}",
                next(turn),
                "model.safetensors",
                make("base/model.safetensors"),
            )
        )
    rows.append(Row("weights_missing", next(turn), "base", missing("base/model.safetensors")))
    for name, change in _indices().items():
        words = stage("prune", "base=sharded", "prune.base=sharded")
        rows.append(Row(f"index_{name}", words, "sharded", change))
    return rows


def _tokenizer_rows() -> list[Row]:
    rows = []
    commands = (stage("train", "train.model=base"), _CHAT, stage("train", "train.model=base"))
    count = 0
    for name, (_, change) in _TOKENIZERS.items():
        rows.append(Row(name, commands[count % 3], "base", change))
        count += 1
    for (file, key), values in _TOKENIZER_VALUES.items():
        for number, value in enumerate(values):
            rows.append(
                Row(
                    f"{file}_{key}_{number}",
                    commands[count % 3],
                    "base",
                    edited(f"base/{file}", key, value=value),
                )
            )
            count += 1
    for name, content in _TEMPLATES.items():
        rows.append(
            Row(f"template_{name}", commands[count % 3], "base", _template(content), cpu_seconds=8)
        )
        given = stage("train", "train.chat_template=mine.jinja")
        rows.append(
            Row(
                f"own_template_{name}",
                given,
                "mine.jinja",
                written("mine.jinja", content),
                cpu_seconds=8,
            )
        )
        count += 1
    return rows


ROWS = [*_rows(), *_tokenizer_rows()]
