"""Base class of configuration sections, and sections that several stages share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, model_validator

from loram_ray.addresses import credentials_error
from loram_ray.config.aliases import with_former_names, with_present_names
from loram_ray.utils.parsing import is_unicode

Precision = Literal["bf16", "fp32"]
BadShare = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="Maximum share of unusable rows to skip, from 0 to 1; a larger share is an "
        "error.",
    ),
]
Threads = Annotated[
    int | None,
    Field(
        ge=1,
        description="Threads per worker. Default: the machine's CPUs divided among the workers.",
    ),
]
_T = TypeVar("_T")


@dataclass(frozen=True)
class InIdentity:
    """Marks whether a key is part of the identity of a stage's output."""

    value: bool


Identified = Annotated[_T, InIdentity(True)]
"""Type of a key that identifies the output: a different value gives a different result."""
Free = Annotated[_T, InIdentity(False)]
"""Type of a key that may change between calls, or whose content is identified by a digest."""


class Section(BaseModel):
    """Immutable configuration section that rejects unknown keys."""

    has_identity: ClassVar[bool] = True
    """Whether the section's keys are marked as `Identified` or `Free`."""

    shorthand: ClassVar[str] = ""
    """Key that an option with the section's name sets if its value is not a mapping."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), hide_input_in_errors=True
    )

    @model_validator(mode="wrap")
    @classmethod
    def _accept_other_names(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Accept keys under their other names, before validators of subclasses see them."""
        if isinstance(data, Mapping):
            data = with_present_names(cls, data, stacklevel=4)
        return handler(data)

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        """Reject text that file systems, tables or logs cannot hold."""
        for key, value in data.items() if isinstance(data, Mapping) else ():
            field = cls.model_fields.get(key)
            any_character = field is not None and GeneratedText() in field.metadata
            for text in _texts_in(value):
                if ("\0" in text and not any_character) or not is_unicode(text):
                    raise ValueError(
                        f"{key} must be valid UTF-8 text without null characters, got "
                        f"{text!r:.80}; change it"
                    )
            if isinstance(value, str | Path):  # checked before it is copied to other sections
                _refuse_credentials(key, value)
        return data

    @model_validator(mode="after")
    def _has_no_credentials(self) -> Self:
        """Reject addresses with credentials, as settings are printed, logged and stored."""
        for key in type(self).model_fields:
            _refuse_credentials(key, getattr(self, key))
        return self

    def identity(self) -> dict[str, Any]:
        """Return the section without its free keys and those of nested sections.

        Renamed keys have their former names, so that directories written before stay valid.
        """
        settings = self.model_dump(mode="json", exclude=_free_keys(self))
        return with_former_names(type(self), settings)


@dataclass(frozen=True)
class GeneratedText:
    """Marks text that is compared with generated text and may contain null characters."""


def require_whole_batches(batch_size: int, micro_batch_size: int) -> None:
    """Raise an error unless a batch consists of whole micro-batches."""
    if batch_size % micro_batch_size:
        raise ValueError(
            f"batch_size must be a multiple of micro_batch_size = {micro_batch_size}, got "
            f"{batch_size}; change one of them"
        )


class RayConfig(Section):
    """Connection to Ray."""

    has_identity = False

    address: str = Field(
        "local",
        description="Address of the Ray cluster, as host:port or ray://host:port. 'local' starts "
        "an embedded Ray; 'auto' joins the cluster of this machine.",
    )
    num_cpus: int | None = Field(
        None,
        ge=1,
        description="Logical CPUs of an embedded Ray. Default: the machine's, or more if the "
        "stage needs more.",
    )
    autoscaling: Literal["off", "cpu", "gpu"] = Field(
        "off",
        description="Kind of nodes that the cluster's autoscaler can add. With 'cpu' or 'gpu', "
        "stages wait for missing resources; with 'off', they fail immediately.",
    )


class OptimiserConfig(Section):
    """AdamW optimiser and learning-rate schedule."""

    learning_rate: Identified[float] = Field(
        5e-5, gt=0, allow_inf_nan=False, description="Peak learning rate."
    )
    warmup_steps: Identified[int] = Field(0, ge=0, description="Number of linear warm-up steps.")
    schedule: Identified[Literal["cosine", "constant"]] = Field(
        "cosine", description="Learning-rate schedule after the warm-up."
    )
    weight_decay: Identified[float] = Field(0.0, ge=0, description="Weight decay of AdamW.")
    max_grad_norm: Identified[float] = Field(
        1.0, gt=0, description="Maximum gradient norm for clipping."
    )


def _free_keys(value: Any) -> dict[Any, Any]:
    """Return the free keys of the sections in a value, as pydantic's ``exclude`` takes them."""
    found: dict[Any, Any] = {}
    if isinstance(value, Section):
        for key, field in type(value).model_fields.items():
            if InIdentity(False) in field.metadata:
                found[key] = True
            elif inner := _free_keys(getattr(value, key)):
                found[key] = inner
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        found = {key: inner for key, item in items if (inner := _free_keys(item))}
    return found


def _texts_in(value: Any) -> Iterator[str]:
    """Yield the texts and paths in a value, a list's items or a dictionary's keys and values."""
    if isinstance(value, str | Path):
        yield str(value)
    elif isinstance(value, Mapping):
        yield from (text for pair in value.items() for text in pair if isinstance(text, str))
    elif isinstance(value, list | tuple):
        yield from (str(item) for item in value if isinstance(item, str | Path))


def _refuse_credentials(key: str, value: Any) -> None:
    for text in _all_texts_in(value):
        if problem := credentials_error(text):
            raise ValueError(f"{key} {problem}")


def _all_texts_in(value: Any) -> Iterator[str]:
    """Yield the texts and paths in a value at any depth, except those of nested sections."""
    if isinstance(value, str | Path):
        yield str(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _all_texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _all_texts_in(item)


def merge_settings(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two mappings recursively; values of ``above`` take precedence."""
    merged = {**below, **above}
    for key, value in below.items():
        inner = above.get(key)
        if isinstance(value, Mapping) and isinstance(inner, Mapping):
            merged[key] = merge_settings(value, inner)
    return merged


def kind_of(section: type[Section]) -> str:
    """Return a section's discriminator value."""
    return str(get_args(section.model_fields["kind"].annotation)[0])


def section_types(annotation: Any) -> list[type[Section]]:
    """Return the section classes in an annotation such as ``AlignConfig | None``."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    arguments = getattr(annotation, "__args__", ())
    return [section for argument in arguments for section in section_types(argument)]
