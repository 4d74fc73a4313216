"""Credentials in addresses: refused where they are given, and shown nowhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from loram_ray.addresses import has_credentials, without_credentials
from loram_ray.config import EvaluateConfig, load_run, validate
from loram_ray.corpus.files import EXAMPLES, list_files
from loram_ray.errors import LoramError, first_line, one_line, shown
from loram_ray.runtime.submission import JobSpec

SECRET = "wJalrXUtn/K7MDENG+bPx"
TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrSt"
ADDRESSES = [
    f"s3://AKIAEXAMPLE:{SECRET}@bucket/rows.jsonl",
    f"s3://AKIAEXAMPLE:{SECRET.replace('/', '%2F')}@bucket/rows.jsonl",
    f"s3://AKIAEXAMPLE:with@sign{SECRET}@bucket/rows.jsonl",
    f"s3://:{SECRET}@bucket/rows.jsonl",
    f"s3:/AKIAEXAMPLE:{SECRET}@bucket/rows.jsonl",
    f"s3://bucket/rows.jsonl?access_key=AKIAEXAMPLE&secret_key={SECRET}&region=eu",
    f"s3://bucket/rows.jsonl?region=eu&session_token={SECRET}",
    f"s3://bucket/rows.jsonl?endpoint_override=https://user:{SECRET}@host",
    f"https://user:{SECRET}@host/rows.jsonl",
    f"https://{SECRET.replace('/', '_')}@host/rows.jsonl",
    f"https://bucket.s3.amazonaws.com/rows.jsonl?X-Amz-Credential=AKIA&X-Amz-Signature={SECRET}",
    f"https://storage.googleapis.com/b/rows.jsonl?X-Goog-Signature={SECRET}",
    f"https://account.blob.core.windows.net/c/rows.jsonl?sv=2024&sig={SECRET}",
    f"gs://someone:{SECRET}@bucket/rows.jsonl",
    f"hf://datasets/org/name?token={SECRET}",
    f"hf://{TOKEN}@datasets/org/name",
    f"hf://datasets/org/name?revision={TOKEN}",
]
PLAIN = [
    "data/rows.jsonl",
    "/data/a:b@c.jsonl",
    "s3://bucket/a/b.jsonl?region=eu-west-1&endpoint_override=http://127.0.0.1:9000",
    "s3://bucket/key=1/secret/token.jsonl",
    "s3://bucket/mail:me@example.org.txt",
    "gs://anonymous@bucket/rows.jsonl?retry_limit_seconds=30&scheme=http",
    "hf://datasets/org/name@main/data/*.parquet",
    "hf://datasets/org/name@refs%2Fconvert%2Fparquet",
    "file:///data/rows.jsonl",
    "http://127.0.0.1:8265",
    "ray://head:10001",
    "ssh://git@host/repo",
]


def is_hidden(text: str) -> bool:
    parts = (SECRET, SECRET[:6], SECRET[-6:], SECRET.replace("/", "%2F"), TOKEN, TOKEN[3:])
    return not any(part in text for part in parts)


@pytest.mark.parametrize("address", ADDRESSES)
def test_credentials_are_hidden_and_the_rest_is_not(address: str) -> None:
    assert has_credentials(address)
    shown_form = without_credentials(address)
    assert is_hidden(shown_form)
    assert "***" in shown_form
    assert without_credentials(shown_form) == shown_form
    host = urlsplit(address).netloc.rpartition("@")[2]
    assert host in shown_form or "/" in SECRET  # a raw slash ends what urlsplit takes for the host
    in_prose = without_credentials(f"cannot list '{address}' (why), then {address}")
    assert is_hidden(in_prose)
    assert in_prose.startswith("cannot list '")


@pytest.mark.parametrize("address", PLAIN)
def test_other_addresses_stay_as_they_are(address: str) -> None:
    assert not has_credentials(address)
    assert without_credentials(f"at {address} it is") == f"at {address} it is"


def messages(call: Callable[[], object]) -> str:
    with pytest.raises(LoramError) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
    return f"{caught.value} {caught.value.args} {caught.value.__cause__}"


KEYS = [
    "train.data",
    "train.eval_data",
    "evaluate.data",
    "evaluate.text.sources=[{path: HERE}]",
    "align.corpus.sources=[{path: HERE}]",
    "prune.calibration.sources=[{path: HERE}]",
    "evaluate.benchmarks=[{kind: choice, data: HERE}]",
    "evaluate.benchmarks=[{kind: code, data: HERE}]",
    "base",
    "output",
    "train.model",
    "evaluate.adapter",
    "align.corpus.sources=[{path: a, text_field: HERE}]",
]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("address", [ADDRESSES[0], ADDRESSES[5], ADDRESSES[-3]])
def test_every_key_refuses_them_and_names_itself(key: str, address: str) -> None:
    name, _, form = key.partition("=")
    value = form.replace("HERE", f"'{address}'") or address
    overrides = [f"{name}={value}"]
    for given, other in (("base", "m"), ("output", "o"), ("train.data", "d")):
        overrides += [] if name == given else [f"{given}={other}"]
    said = messages(lambda: load_run(None, overrides))
    assert "must not contain credentials, which would be written to logs" in said
    assert said.startswith(f"--set: {name}")
    assert is_hidden(said)


def test_a_run_file_with_them_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"base: m\noutput: o\ntrain:\n  data: {ADDRESSES[0]}\n")
    said = messages(lambda: load_run(path))
    assert said.startswith(f"{path}: train.data must not contain credentials")
    assert is_hidden(said)


def test_a_value_that_breaks_another_rule_is_shown_without_them() -> None:
    data = {"model": "m", "output": "o", "data": {"path": ADDRESSES[0]}}
    said = messages(lambda: validate(EvaluateConfig, data, source="f"))
    assert is_hidden(said)
    data = {"model": "m", "output": "o", "batch_size": ADDRESSES[5]}
    assert is_hidden(messages(lambda: validate(EvaluateConfig, data, source="f")))


@pytest.mark.parametrize("address", ADDRESSES)
def test_readers_of_data_refuse_them_before_they_connect(address: str) -> None:
    if address.startswith("s3:/A"):
        return  # a local path, to a reader
    assert is_hidden(messages(lambda: list_files(address, "train.data", EXAMPLES)))


def test_errors_hide_them_wherever_they_come_from() -> None:
    error = OSError(f"When listing objects of {ADDRESSES[0]}: {ADDRESSES[5]}")
    for text in (
        first_line(error),
        one_line(error),
        shown(ADDRESSES[0]),
        str(LoramError(*ADDRESSES)),
    ):
        assert is_hidden(text)


def test_a_job_carries_none(tmp_path: Path) -> None:
    def spec(**more: object) -> JobSpec:
        return JobSpec("train", tmp_path / "run.yaml", (), "/", **more)  # type: ignore[arg-type]

    for option, value in (("variables", {"DATA": ADDRESSES[0]}), ("metadata", {"x": ADDRESSES[5]})):
        said = messages(lambda option=option, value=value: spec(**{option: value}))  # type: ignore[misc]
        assert "must not contain credentials" in said
        assert is_hidden(said)


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_the_command_prints_none(tmp_path: Path, debug: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loram_ray.cli", "train", "--set", "base=m", "--set", "output=o"]
        + ["--set", f"train.data={ADDRESSES[0]}", *debug],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "train.data must not contain credentials" in done.stderr
    assert is_hidden(done.stdout + done.stderr)
    assert list(tmp_path.iterdir()) == []
