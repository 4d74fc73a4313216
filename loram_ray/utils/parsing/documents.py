"""Validate JSON documents with typed and bounded models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from loram_ray.errors import LoramError, shown
from loram_ray.utils.parsing.json_text import read_json
from loram_ray.utils.parsing.text import named

M = TypeVar("M", bound="Document")
T = TypeVar("T")


class Document(BaseModel):
    """Base class of models for JSON documents, with strict types.

    A subclass declares the keys that are used, with their bounds; other keys are ignored.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, protected_namespaces=())


def bounded(least: int, most: int, **more: Any) -> Any:
    """Declare a number with a lower and an upper bound."""
    return Field(ge=least, le=most, **more)


def read_document(
    path: Path | str,
    model: type[M],
    key: str | None = None,
    *,
    remedy: str = "restore the file",
    constants: bool = False,
) -> M:
    """Read a JSON file and validate it with a model.

    Raises:
        LoramError: The file cannot be read, see `read_json`, or a value breaks a rule of the model.
    """
    data: object = read_json(path, key, remedy=remedy, constants=constants)
    return checked(model, data, named(path, key), remedy=remedy)


def checked(model: type[M], data: Any, name: str, *, remedy: str = "restore the file") -> M:
    """Validate parsed JSON with a model.

    Args:
        model: Model with the keys that are used, their types and bounds.
        data: Parsed JSON.
        name: Name of the document, for messages.
        remedy: Advice to the user, for messages.

    Raises:
        LoramError: A value breaks a rule; the message names the first one.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _broken(error, name, remedy) from error


def read_as(
    path: Path | str, kind: type[T], *, remedy: str = "remove it", constants: bool = False
) -> T:
    """Read a JSON file of a run as a dataclass or any other type.

    Raises:
        LoramError: The file cannot be read, see `read_json`, or a value has another type.
    """
    data = read_json(path, kind=object, remedy=remedy, constants=constants)
    return as_type(kind, data, str(path), remedy=remedy)


def as_type(kind: type[T], data: Any, name: str, *, remedy: str = "restore the file") -> T:
    """Convert parsed JSON to a type, see `read_as`.

    Raises:
        LoramError: A value has another type; the message names the first one.
    """
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        raise _broken(error, name, remedy) from error


def _broken(error: ValidationError, name: str, remedy: str) -> LoramError:
    """Return the error for the first broken rule."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    where = f"{name}: {key}" if key else f"{name}:"
    return LoramError(f"{where} {broken_rule(first)}; {remedy}")


def broken_rule(error: Any) -> str:
    """Format a pydantic error as its rule and the value: ``must be …, got …``."""
    if error["type"] == "missing":
        return "must be given"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    rule = re.sub(r"^\w+ should", "must", error["msg"])  # "Input should be", "Tuple should have"
    return f"{rule}, got {shown(error.get('input'))}"
