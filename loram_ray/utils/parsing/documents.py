"""What is read of a JSON document, as models with types and bounds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loram_ray.errors import LoramError, shown
from loram_ray.utils.parsing.json_text import read_json
from loram_ray.utils.parsing.text import named

M = TypeVar("M", bound="Document")


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
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        where = f"{name}: {key}" if key else f"{name}:"
        raise LoramError(f"{where} {broken_rule(first)}; {remedy}") from error


def broken_rule(error: Any) -> str:
    """The rule that a pydantic error is about, and the value: ``must be …, got …``."""
    if error["type"] == "missing":
        return "must be given"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    rule = re.sub(r"^\w+ should", "must", error["msg"])  # "Input should be", "Tuple should have"
    return f"{rule}, got {shown(error.get('input'))}"
