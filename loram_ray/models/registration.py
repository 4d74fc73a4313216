"""Registration of the pruned models with transformers' Auto classes, without importing it early.

After ``import loram_ray``, ``AutoModelForCausalLM.from_pretrained(pruned_directory)`` works. The
modelling code of transformers takes seconds to import, and its modules import each other.
Configurations are therefore registered by the first call of ``AutoConfig.from_pretrained``, which
every Auto class calls first, and models by the first call that creates one. Loading a tokenizer
imports neither.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

from loram_ray.architectures import ARCHITECTURES


def register_on_first_use() -> None:
    """Register the pruned classes when they are first needed."""
    wrapt.register_post_import_hook(_wrap_configs, "transformers.models.auto.configuration_auto")
    wrapt.register_post_import_hook(_wrap_models, "transformers.models.auto.modeling_auto")


@functools.cache
def _register_configs() -> None:
    from transformers import AutoConfig

    from loram_ray.models import configuration_pruned

    for family in ARCHITECTURES:
        config = getattr(configuration_pruned, family.pruned_config)
        AutoConfig.register(config.model_type, config, exist_ok=True)


@functools.cache
def register() -> None:
    """Register every family's pruned configuration and model class."""
    from transformers import AutoModelForCausalLM

    from loram_ray.models import configuration_pruned, modeling_pruned

    _register_configs()
    for family in ARCHITECTURES:
        config = getattr(configuration_pruned, family.pruned_config)
        model = getattr(modeling_pruned, family.pruned_model)
        AutoModelForCausalLM.register(config, model, exist_ok=True)


def _wrap_configs(configuration_auto: ModuleType) -> None:
    wrapt.wrap_function_wrapper(
        configuration_auto.AutoConfig, "from_pretrained", _after(_register_configs)
    )


def _wrap_models(modeling_auto: ModuleType) -> None:
    for method in ("from_pretrained", "from_config"):
        wrapt.wrap_function_wrapper(modeling_auto.AutoModelForCausalLM, method, _after(register))


def _after(first: Callable[[], None]) -> Callable[..., Any]:
    def wrapper(make: Callable[..., Any], _cls: object, args: Any, kwargs: Any) -> Any:
        first()
        return make(*args, **kwargs)

    return wrapper
