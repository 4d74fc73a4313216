"""Makes transformers' Auto classes know the pruned models, without importing transformers early.

``import loram_ray`` is enough for ``AutoModelForCausalLM.from_pretrained(pruned_directory)``. The
modelling code of transformers takes seconds to import, and its modules import each other, so the
classes are registered by the first call of ``AutoConfig.from_pretrained``, with which every Auto
class begins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

from loram_ray.architectures import ARCHITECTURES


def register_on_first_use() -> None:
    """Have the pruned classes registered when AutoConfig first loads a configuration."""
    wrapt.register_post_import_hook(_wrap, "transformers.models.auto.configuration_auto")


@functools.cache
def register() -> None:
    """Register every family's pruned configuration and model class."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from loram_ray import configuration_pruned, modeling_pruned

    for family in ARCHITECTURES:
        config = getattr(configuration_pruned, family.pruned_config)
        model = getattr(modeling_pruned, family.pruned_model)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)


def _wrap(configuration_auto: ModuleType) -> None:
    wrapt.wrap_function_wrapper(configuration_auto.AutoConfig, "from_pretrained", _registered)


def _registered(load: Callable[..., Any], _cls: object, args: Any, kwargs: Any) -> Any:
    register()
    return load(*args, **kwargs)
