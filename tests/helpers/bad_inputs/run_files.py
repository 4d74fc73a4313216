"""Bad run files: invalid YAML, other documents, and values that no stage accepts."""

from __future__ import annotations

from helpers.bad_inputs.harness import COMMANDS, NO_FILES, Row, given, in_turn, stage, written

_HEAD = "base: base\noutput: run\n"
_BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)

_NO_YAML = {
    "unclosed": "base: [a",
    "mapping_in_value": "base: b: c",
    "tab": "\tbase: a",
    "nul": "base: \0",
    "nul_escape": _HEAD + 'prune: {scores: "a\\0b"}',
    "half_pair": _HEAD + 'train: {data: "\\ud800"}',
    "latin_1": b"base: \xe9\n",
    "utf16": "base: a".encode("utf-16"),
    "list": "- base\n",
    "text": "base",
    "empty": "",
    "comment": "# nothing\n",
    "two_documents": _HEAD + "---\nbase: a\n",
    "key_twice": _HEAD + "prune: {}\nprune: {ratio: 0.5}\n",
    "key_twice_inside": _HEAD + "train:\n  data: a\n  steps: 1\n  data: b\n",
    "key_twice_in_list": _HEAD + "align: {corpus: {sources: [{path: a, path: b}]}}",
    "alias_bomb": _HEAD + _BOMB,
    "merge_bomb": _HEAD
    + "a0: &a0 {k: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}], k{i}: 1}}\n" for i in range(1, 40)),
    "itself": _HEAD + "prune: &p {scores: *p}",
    "unknown_alias": _HEAD + "prune: *nowhere",
    "deep_lists": _HEAD + "prune: " + "[" * 100_000,
    "deep_sections": _HEAD + "prune: " + "{a: " * 100_000,
    "deep_blocks": "- " * 200_000,
    "large": _HEAD + "# x\n" * 400_000,
    "python_object": _HEAD + "prune: !!python/object/apply:os.system [true]",
    "binary": _HEAD + "train: {data: !!binary aGk=}",
    "set": _HEAD + "prune: !!set {a, b}",
    "date_tag": _HEAD + "train: {data: !!timestamp 2024-01-01}",
    "bool_tag": _HEAD + "recover: {correction: !!bool maybe}",
    "list_as_key": _HEAD + "? [a, b]\n: c",
    "digits": _HEAD + "train: {data: data.jsonl, steps: " + "9" * 5000 + "}",
    "hexadecimal": _HEAD + "train: {data: data.jsonl, steps: 0x" + "f" * 5000 + "}",
    "overflow": _HEAD + "prune: {ratio: 1.0e+999}",
    "above_64_bits": _HEAD + "train: {data: data.jsonl, steps: 100000000000000000000000000000}",
}

_VALUES = {
    "prune.ratio": ("[]", "1", "-1", ".nan", "yes", "{a: 1}", "half", "null"),
    "prune.layers": ("[3]", "[a, b]", "[-1, 1.5]", "5", "[1, 9]", "[2, 1]", "{}"),
    "prune.method": ("7", "lottery", "[random]"),
    "prune.ratios": ("[0.5, 2]", "[.nan, 0.5]", "[0.1, 0.2, 0.3]"),
    "prune.seed": ("-1", "1.5", "4294967296", "a"),
    "prune.pattern": ("0:0", "4", "8:4", "a:b", "[4, 8]"),
    "prune.scores": ("[]", "3", "nowhere", "run.yaml"),
    "prune.max_shard_bytes": ("0", "-5", "5GB"),
    "train.data": ("3", "[]", "nowhere.jsonl", "''", "base"),
    "train.steps": ("0", "-3", "1.5", "many", "[]"),
    "train.max_length": ("0", "7", "1.0e+3x"),
    "train.lora": ("3", "[]", "{r: 0}", "{r: -1}", "{r: 1.5}", "{alpha: 0}", "{alpha: .nan}"),
    "train.lora.alpha": (".inf", "[]", "{}"),
    "train.lora.rank_pattern": ("{q: 0}", "{q: -3}", "{'(a+)+$': x}", "[8]", "{'(': 8}"),
    "train.lora.alpha_pattern": ("{q: .nan}", "{q: .inf}", "{q: 0}", "{'[': 8}"),
    "train.optimiser": ("7", "{learning_rate: .inf}", "{warmup_steps: -1}", "{schedule: up}"),
    "train.chat_template": ("[]", "7", "nowhere.jinja", "base"),
    "train.model": ("[]", "nowhere", "run.yaml", "data.jsonl/x"),
    "train.eval_share": ("1", "-0.5", ".nan"),
    "merge.adapter": ("nowhere", "base", "7", "run.yaml"),
    "recover.adapter": ("nowhere", "base", "[]", "plain"),
    "recover.svd_rank": ("0", "1.5"),
    "evaluate.benchmarks": ("7", "[{}]", "[{kind: quiz}]", "[7]", "[{kind: choice}]"),
    "evaluate.data": ("nowhere.jsonl", "[]", "base"),
    "evaluate.limit": ("0", "-1", "1.5"),
    "export.type": ("q4", "7", "[]"),
    "export.model": ("nowhere", "a/b/c", "[]"),
    "quantize.model": ("nowhere", "base", "7"),
    "publish.repo": ("name", "a/b/c", "7", "'a/b..c'", "-a/b"),
    "publish.directory": ("nowhere", "base", "[]"),
    "align.corpus": ("7", "{}", "{sources: []}", "{sources: [7]}", "{sources: [{}]}"),
    "align.batch_size": ("0", "3"),
    "align.zero_stage": ("4", "a", "1.5"),
    "align.deepspeed": ("nowhere.json", "[]", "base"),
    "ray.num_cpus": ("0", "-1", "a"),
    "ray.address": ("7", "[]"),
}


def _value_rows() -> list[Row]:
    rows = []
    for key, values in _VALUES.items():
        section = key.split(".")[0]
        command = stage(section if section != "ray" else "prune")
        for value in values:
            last = key.rsplit(".", 1)[-1]
            named = section if section in ("train", "merge") and "lora" in key else last
            rows.append(Row(f"{key}={value}", command, named, given(key, value)))
    return rows


_turn = in_turn(*COMMANDS, "publish", "plan", "batch", "sweep", "compare")
ROWS = [
    *(Row(f"no_yaml_{name}", next(_turn), "run.yaml", written("run.yaml", text))
      for name, text in _NO_YAML.items()),
    *(Row(f"run_file_is_{name}", next(_turn), "run.yaml", make("run.yaml"))
      for name, make in NO_FILES.items()),
    Row("no_run_file", ("prune", "--config", "nowhere.yaml"), "nowhere.yaml"),
    Row("submit_no_yaml", ("submit", "train", "--config", "run.yaml"), "run.yaml",
        written("run.yaml", "base: [a")),
    Row("submit_key_twice", ("submit", "run", "--config", "run.yaml"), "run.yaml",
        written("run.yaml", _HEAD + "base: b\n")),
    Row("submit_no_section", ("submit", "batch", "--config", "run.yaml"), "batch"),
    Row("submit_no_command", ("submit", "fly", "--config", "run.yaml"), "COMMAND"),
    Row("batch_no_section", stage("batch"), "batch"),
    Row("sweep_no_section", stage("sweep"), "sweep"),
    Row("compare_no_section", stage("compare"), "compare"),
    *_value_rows(),
]  # fmt: skip
