"""What every section of a configuration is, and what several have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from loram_ray.addresses import problem_with
from loram_ray.utils.parsing import is_unicode

Precision = Literal["bf16", "fp32"]


class Section(BaseModel):
    """A configuration section: unknown keys are refused, values are fixed."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), hide_input_in_errors=True
    )

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        """Refuse what no file system, no table and no log can hold."""
        for key, value in data.items() if isinstance(data, Mapping) else ():
            field = cls.model_fields.get(key)
            any_character = field is not None and GeneratedText() in field.metadata
            for text in _texts_in(value):
                if ("\0" in text and not any_character) or not is_unicode(text):
                    raise ValueError(
                        f"{key} must be text in UTF-8 without null characters, got {text!r:.80}; "
                        "change or rename it"
                    )
            if isinstance(value, str | Path):  # before other sections take it over
                _refuse_credentials(key, value)
        return data

    @model_validator(mode="after")
    def _has_no_credentials(self) -> Self:
        """Refuse addresses with credentials: settings are shown, logged and stored."""
        for key in type(self).model_fields:
            _refuse_credentials(key, getattr(self, key))
        return self


@dataclass(frozen=True)
class GeneratedText:
    """Marks text that is compared with what a model generates, so it may hold null characters."""


@dataclass(frozen=True)
class KeysOf:
    """Marks a dictionary of settings that a stage's section checks later."""

    stage: str


class RayConfig(Section):
    """Where Ray runs."""

    address: str = Field(
        "local", description="'local' starts an embedded Ray, 'auto' joins this machine's cluster"
    )
    num_cpus: int | None = Field(
        None, ge=1, description="logical CPUs of an embedded Ray; default: enough for the stage"
    )
    autoscaling: Literal["off", "cpu", "gpu"] = Field(
        "off",
        description="cpu or gpu: an autoscaler brings such nodes when work waits, so wait for what "
        "is not there; off: refuse it at once",
    )


class OptimiserConfig(Section):
    """AdamW with warm-up."""

    learning_rate: float = Field(5e-5, gt=0, allow_inf_nan=False, description="peak learning rate")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="after the warm-up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping")


def _texts_in(value: Any) -> Iterator[str]:
    """A value's text or path, or those of a list's items and of a dictionary's keys and values."""
    if isinstance(value, str | Path):
        yield str(value)
    elif isinstance(value, Mapping):
        yield from (text for pair in value.items() for text in pair if isinstance(text, str))
    elif isinstance(value, list | tuple):
        yield from (str(item) for item in value if isinstance(item, str | Path))


def _refuse_credentials(key: str, value: Any) -> None:
    for text in _all_texts_in(value):
        if problem := problem_with(text):
            raise ValueError(f"{key} {problem}")


def _all_texts_in(value: Any) -> Iterator[str]:
    """A value's texts and paths at any depth, those of sections inside excepted."""
    if isinstance(value, str | Path):
        yield str(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _all_texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _all_texts_in(item)


def over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Settings and others over them, sections inside key by key."""
    found = {**below, **above}
    for key, value in below.items():
        inner = above.get(key)
        if isinstance(value, Mapping) and isinstance(inner, Mapping):
            found[key] = over(value, inner)
    return found


def kind_of(section: type[Section]) -> str:
    """The kind by which a section is told from others that may stand in its place."""
    return str(get_args(section.model_fields["kind"].annotation)[0])


def section_types(annotation: Any) -> list[type[Section]]:
    """Return the section classes in an annotation such as ``AlignConfig | None``."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    arguments = getattr(annotation, "__args__", ())
    return [found for argument in arguments for found in section_types(argument)]
