"""Hide credentials in addresses before they are printed or stored."""

from __future__ import annotations

import re

_HIDDEN = "***"
_SCHEME = r"[A-Za-z][\w+.-]*:/{1,2}"  # an address that was converted to a path has only one slash
_ADDRESS = re.compile(_SCHEME)
_NAMES_NO_SECRET = ("anonymous", "git")
_USER_AND_PASSWORD = re.compile(rf"({_SCHEME})[^/@?\s]*:[^\s'\"]*@")  # a secret may contain a slash
_USER = re.compile(rf"({_SCHEME})(?!(?:{'|'.join(_NAMES_NO_SECRET)})@)[^/@?\s:]+@")
_PARAMETER = re.compile(
    r"([?&;][^=&\s?]*(?:key|secret|token|passw|pwd|credential|signature|auth)[^=&\s]*="
    r"|[?&;]sig=)[^&\s'\"]+",
    re.IGNORECASE,
)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


def without_credentials(text: str) -> str:
    """Hide the credentials of every address in a text, and Hugging Face Hub tokens.

    Users and passwords before ``@`` (``s3://key:secret@bucket``) and the values of query
    parameters for keys, tokens and signatures (``?X-Amz-Signature=…``) are replaced by ``***``.
    """
    if "://" in text or ":/" in text:
        text = _USER_AND_PASSWORD.sub(rf"\1{_HIDDEN}@", text)
        text = _USER.sub(rf"\1{_HIDDEN}@", text)
        text = _PARAMETER.sub(rf"\1{_HIDDEN}", text)
    return _HUB_TOKEN.sub(f"hf_{_HIDDEN}", text)


def has_credentials(value: str) -> bool:
    """Return whether a value is an address that contains credentials."""
    return _ADDRESS.match(value) is not None and without_credentials(value) != value


def credentials_error(value: str) -> str | None:
    """Return the rule that an address with credentials breaks, or None for any other value."""
    if not has_credentials(value):
        return None
    return (
        "must not contain credentials, which would be written to logs, got "
        f"{without_credentials(value)}; set them in the environment, e.g. AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, or HF_TOKEN"
    )
