"""Get a base's ``config.json`` when its weights are not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loram_ray.artifacts.manifest import read_config_file, read_model_config
from loram_ray.errors import LoramError


def _llama(
    layers: int, hidden: int, neurons: int, heads: int, kv_heads: int, words: int, positions: int
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": neurons,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": words,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
    }


PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": _llama(32, 4096, 11008, 32, 32, 32000, 4096),
    "meta-llama/Llama-2-13b-hf": _llama(40, 5120, 13824, 40, 40, 32000, 4096),
    "meta-llama/Llama-2-70b-hf": _llama(80, 8192, 28672, 64, 8, 32000, 4096),
    "meta-llama/Llama-3.1-8B": _llama(32, 4096, 14336, 32, 8, 128256, 131072),
    "meta-llama/Llama-3.1-70B": _llama(80, 8192, 28672, 64, 8, 128256, 131072),
}
"""Shapes of gated bases, whose files require an access request on the Hub."""


def base_config(base: str, file: Path | None = None) -> dict[str, Any]:
    """Return the base's ``config.json`` from a directory, the Hub or the table of known bases.

    Args:
        base: Model directory or Hub id.
        file: ``config.json`` file, or its directory, to read instead.

    Raises:
        LoramError: If the configuration is not available.
    """
    place = file or Path(base)
    if place.is_dir():
        return read_model_config(place)
    if file is not None:
        return read_config_file(file)
    if base in PUBLISHED:
        return dict(PUBLISHED[base])
    from huggingface_hub import hf_hub_download

    try:
        return read_config_file(Path(hf_hub_download(base, "config.json")))
    except (OSError, ValueError) as error:
        raise LoramError(
            f"prune.base {base} is not a local directory and its config.json could not be "
            f"downloaded from the Hub ({type(error).__name__}); check the name, the network and "
            "HF_TOKEN, or set --base-config FILE"
        ) from error
