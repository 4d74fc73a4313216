"""What is read of a JSON document, as models with types and bounds."""

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
    """What is read of a JSON document: values have the types that are written, others are ignored.

    A subclass declares the keys that are used, with their bounds.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, protected_namespaces=())


def bounded(least: int, most: int, **more: Any) -> Any:
    """A document's number with both bounds."""
    return Field(ge=least, le=most, **more)


def read_document(
    path: Path | str,
    model: type[M],
    key: str | None = None,
    *,
    remedy: str = "restore the file",
    constants: bool = False,
) -> M:
    """Read a JSON file that a model describes.

    Raises:
        LoramError: as of `read_json`, or a value breaks a rule of the model.
    """
    data: object = read_json(path, key, remedy=remedy, constants=constants)
    return checked(model, data, named(path, key), remedy=remedy)


def checked(model: type[M], data: Any, name: str, *, remedy: str = "restore the file") -> M:
    """Return a document's values as its model, for JSON that was parsed.

    Args:
        model: the keys that are used, with their types and bounds.
        data: what was parsed.
        name: what it is, for messages.
        remedy: what to do where a rule is broken, for messages.

    Raises:
        LoramError: the first rule that is broken.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _broken(error, name, remedy) from error


def read_as(
    path: Path | str, kind: type[T], *, remedy: str = "remove it", constants: bool = False
) -> T:
    """Read a JSON file that a run noted something in, as a dataclass or any other type.

    Raises:
        LoramError: as of `read_json`, or a value has another type.
    """
    data = read_json(path, kind=object, remedy=remedy, constants=constants)
    return as_type(kind, data, str(path), remedy=remedy)


def as_type(kind: type[T], data: Any, name: str, *, remedy: str = "restore the file") -> T:
    """Return JSON that was parsed as a type; see `read_as`.

    Raises:
        LoramError: the first value that has another type.
    """
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        raise _broken(error, name, remedy) from error


def _broken(error: ValidationError, name: str, remedy: str) -> LoramError:
    """The error of the first rule that is broken."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    where = f"{name}: {key}" if key else f"{name}:"
    return LoramError(f"{where} {broken_rule(first)}; {remedy}")


def broken_rule(error: Any) -> str:
    """The rule that a pydantic error is about, and the value: ``must be …, got …``."""
    if error["type"] == "missing":
        return "must be given"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    rule = re.sub(r"^\w+ should", "must", error["msg"])  # "Input should be", "Tuple should have"
    return f"{rule}, got {shown(error.get('input'))}"
