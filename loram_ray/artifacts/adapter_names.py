"""Names of LoRA tensors, as PEFT saves them and as other trainers do.

PEFT saves ``base_model.model.<module>.lora_A.weight``. A trainer that saves a state dictionary of
its own adds the adapter's name (``lora_A.default.weight``) and the names of wrappers around modules
(torch.compile, FSDP, activation checkpointing, DDP, DeepSpeed), or leaves PEFT's prefix out.
"""

from __future__ import annotations

import re

_PREFIX = "base_model.model."
_WRAPPERS = re.compile(
    r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?:\\?\.)"
)  # also in a regular expression, where the dot is escaped
_LEADING = re.compile(r"^(?:(?:module|_forward_module)\.)+")
_KIND = re.compile(
    r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight", re.DOTALL
)


def tensor_name(module: str, side: str) -> str:
    """Return PEFT's name of a module's A or B."""
    return f"{_PREFIX}{module}.lora_{side}.weight"


def plain_path(path: str) -> str:
    """Return a module path, or a pattern of such paths, without the names of wrappers."""
    return _LEADING.sub("", _WRAPPERS.sub("", path)).rpartition(_PREFIX)[2]


def parse_tensor_name(name: str) -> tuple[str, str, str] | None:
    """Return the module path, the side (A or B) and the adapter's name of a LoRA tensor.

    The adapter's name is empty if the tensor's name has none, as in PEFT's files. The result is
    None if the tensor is neither an A nor a B of a linear.
    """
    match = _KIND.fullmatch(plain_path(name))
    if match is None:
        return None
    return match["module"], match["side"], match["adapter"] or ""


def frozen_weight(name: str) -> str | None:
    """Return the name of the model's weight that a tensor of an adapter file copies, if any.

    PEFT copies the embeddings and the output head into an adapter that changes one of them, or
    after the vocabulary was resized.
    """
    path = plain_path(name)
    if "lora_" in path or not path.endswith(".weight"):
        return None
    return f"{path.removesuffix('.weight').removesuffix('.base_layer')}.weight"
