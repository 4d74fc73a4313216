"""Bad environments of commands, jobs on a cluster, and runs of many trainings."""

from __future__ import annotations

from helpers.bad_inputs.harness import PRUNED, Row, given, stage

_BATCH = {"model": PRUNED, "output": "new", "tasks": "[{data: data.jsonl}]"}
_SWEEP = {"model": PRUNED, "output": "new", "data": "data.jsonl", "grid": "{lora.r: [1, 2]}"}
_COMPARE = {"output": "new", "tasks": "{t: {data: data.jsonl, held_out: data.jsonl}}"}
_SECTIONS = {"batch": _BATCH, "sweep": _SWEEP, "compare": _COMPARE}
_VALUES: dict[str, tuple[str, ...]] = {
    "batch.model": ("nowhere", "[]", "run.yaml"),
    "batch.tasks": ("7", "[]", "[{}]", "[{data: data.jsonl, name: ..}]"),
    "batch.train": ("7", "{model: base}"),
    "batch.workers": ("0", "many", "1.5"),
    "batch.max_failures": ("-1", "[]"),
    "sweep.grid": ("7", "{}", "{steps: []}", "{steps: 7}", "{steps: [0]}"),
    "sweep.ranges": ("{steps: {low: 3, high: 1}}", "{steps: [1, 2]}", "{steps: {low: .nan}}"),
    "sweep.data": ("nowhere.jsonl", "[]"),
    "sweep.reduction_factor": ("1", ".nan", "a"),
    "compare.tasks": (
        "{}",
        "7",
        "{t: {data: data.jsonl}}",
        "{a/b: {data: data.jsonl, held_out: data.jsonl}}",
    ),
    "compare.systems": ("[fly]", "7", "[7]"),
    "compare.seeds": ("[a]", "[1, 1]"),
    "compare.merge_scores": ("[nowhere.json]", "7"),
}
_SUBMIT = ("submit", "prune", "--config", "run.yaml")
_VARIABLES = {
    "RAY_JOB_CONFIG_JSON_ENV_VAR": ("{", "[]", '{"runtime_env": 7}', '{"a":' * 10_000),
}


def _section(key: str, value: str) -> str:
    name, part = key.split(".")
    pairs = {**_SECTIONS[name], part: value}
    return f"{{{', '.join(f'{k}: {v}' for k, v in pairs.items())}}}"


ROWS = [
    *(
        Row(f"{key}={value}", stage(key.split(".")[0]), key.split(".")[-1],
            given(key.split(".")[0], _section(key, value)))
        for key, values in _VALUES.items()
        for value in values
    ),
    *(
        Row(f"{name}={value}", stage("evaluate"), name, environment={name: value})
        for name, values in _VARIABLES.items()
        for value in values
    ),
    Row("submit_no_pair", (*_SUBMIT, "--env", "A"), "--env"),
    Row("submit_a_secret", (*_SUBMIT, "--env", "MY_TOKEN=x"), "MY_TOKEN"),
    Row("submit_no_metadata", (*_SUBMIT, "--metadata", "=x"), "--metadata"),
    *(
        Row(f"submit_to_{address}", (*_SUBMIT, "--address", address), "--address")
        for address in ("ftp://a", "http://[", "http://a:b", "os://127.0.0.1", "", "http://")
    ),
    *(
        Row(f"jobs_of_{address}", ("jobs", "list", "--address", address), "--address")
        for address in ("ftp://a", "http://[", "ray://a")
    ),
]  # fmt: skip
