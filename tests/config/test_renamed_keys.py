"""Keys under their other names: former names with a warning, PEFT's names without one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig

import loram_ray.config as config
from helpers.command import Command
from loram_ray.artifacts.manifest import digest_of
from loram_ray.commands import COMMAND_OF
from loram_ray.config import RunConfig, load_command, load_run
from loram_ray.config.aliases import RenamedKeyWarning
from loram_ray.config.flags import flags_for
from loram_ray.errors import LoramError

CORPUS = {"sources": [{"path": "text.jsonl"}]}
TASK = {"data": "d", "held_out": "h"}
WHOLE: dict[str, dict[str, Any]] = {
    "align": {"pruned": "p", "output": "o", "base": "b", "corpus": CORPUS},
    "train": {"model": "m", "output": "o", "data": "d"},
    "evaluate": {"model": "m", "output": "o", "data": "d"},
    "batch": {"model": "m", "output": "o", "tasks": [{"data": "d"}]},
    "sweep": {"model": "m", "output": "o", "data": "d", "grid": {"lora.r": [2, 4]}},
    "compare": {"base": "b", "output": "o", "tasks": {"one": TASK}},
}
"""What a section needs at least."""
RENAMED: list[tuple[str, str, str, Any]] = [
    ("train", "eval_every", "evaluate_every", 5),
    ("align", "prepared", "cache_dir", Path("yes")),
    ("align", "offload_folder", "offload_dir", Path("fast")),
    ("align", "staging_folder", "staging_dir", Path("fast")),
    *((name, "actors", "workers", 3) for name in ("batch", "evaluate", "sweep")),
    *((name, "cpus", "cpus_per_worker", 2) for name in ("batch", "evaluate", "sweep")),
    *((name, "gpus", "gpus_per_worker", 0.5) for name in ("batch", "evaluate", "sweep")),
    ("batch", "adapters_per_actor", "adapters_per_worker", 2),
    ("compare", "at_a_time", "max_concurrent", 3),
    ("compare", "others", "merge_scores", (Path("scores.json"),)),
]
"""Section, former name, name and a value."""
each_renamed = pytest.mark.parametrize(("name", "old", "new", "value"), RENAMED)


def line_of(old: str, new: str) -> str:
    return f"{old} was renamed to {new}; change it"


def plain(value: Any) -> Any:
    """A value as a run file has it."""
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def text_of(value: Any) -> str:
    """A value as ``--set`` and an option have it."""
    value = "null" if value is None else plain(value)
    return value if isinstance(value, str) else json.dumps(value)


def warned(call: Any) -> tuple[Any, list[str]]:
    """A call's result, and the lines of its warnings about renamed keys."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(w.message) for w in caught if w.category is RenamedKeyWarning]


@each_renamed
def test_a_former_name_is_accepted_in_python(name: str, old: str, new: str, value: Any) -> None:
    model = COMMAND_OF[name].model
    section, lines = warned(lambda: model(**WHOLE[name], **{old: value}))
    assert section == model(**WHOLE[name], **{new: value}) != model(**WHOLE[name])
    assert lines == [line_of(old, new)]


@each_renamed
def test_a_former_name_is_accepted_in_a_run_file_and_overridden_by_the_present_one(
    name: str, old: str, new: str, value: Any, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        yaml.safe_dump({"base": "b", "output": "o", name: WHOLE[name] | {old: plain(value)}})
    )
    run, lines = warned(lambda: load_run(file))
    expected = COMMAND_OF[name].model(**WHOLE[name], **{new: value})
    assert getattr(getattr(run, name), new) == getattr(expected, new)
    assert lines == [f"{file}: {line_of(f'{name}.{old}', f'{name}.{new}')}"]
    default = COMMAND_OF[name].model.model_fields[new].default
    over, _ = warned(lambda: load_run(file, [f"{name}.{new}={text_of(default)}"]))
    assert getattr(getattr(over, name), new) == default != value


@each_renamed
def test_a_former_name_is_accepted_by_set_and_as_an_option(
    name: str, old: str, new: str, value: Any, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({name: WHOLE[name]}))
    command, expected = COMMAND_OF[name], COMMAND_OF[name].model(**WHOLE[name], **{new: value})
    override = f"{name}.{old}={text_of(value)}"
    found, lines = warned(lambda: load_command(command, file, [override]).section)
    assert getattr(found, new) == getattr(expected, new)
    assert lines == [line_of(f"{name}.{old}", f"{name}.{new}")]
    [flag] = [flag for flag in flags_for(command) if flag.key == old]
    assert flag.hidden
    given = [(flag, text_of(value))]
    found, lines = warned(lambda: load_command(command, file, (), given).section)
    assert getattr(found, new) == getattr(expected, new)
    options = [f"--{key.replace('_', '-')}" for key in (old, new)]
    assert lines == [line_of(*options)]


@each_renamed
def test_both_names_are_one_line(
    name: str, old: str, new: str, value: Any, tmp_path: Path, loram: Command
) -> None:
    file = tmp_path / "run.yaml"
    both = WHOLE[name] | {old: plain(value), new: plain(value)}
    file.write_text(yaml.safe_dump({"base": "b", "output": "o", name: both}))
    with pytest.raises(LoramError) as caught:
        load_run(file)
    line = f"{file}: {name}.{old} must not be given beside {name}.{new}, which is the same key"
    assert str(caught.value).startswith(line)
    with pytest.raises(ValueError, match="must not be given beside"):
        COMMAND_OF[name].model(**both)
    options = [f"--{key.replace('_', '-')}" for key in (old, new)]
    done = loram(name, options[0], text_of(value), options[1], text_of(value))
    assert "must not be given beside" in done.line and all(o in done.line for o in options)


def test_former_names_are_accepted_where_studies_hold_settings_of_stages() -> None:
    settings: dict[str, Any] = {
        "base": "b",
        "output": "o",
        "train": {"data": "d", "eval_every": 4, "eval_share": 0.1},
        "batch": {
            "train": {"eval_every": 3},
            "tasks": [{"data": "d", "train": {"eval_every": 2}, "grid": {"eval_every": [1, 2]}}],
        },
        "compare": {"tasks": {"one": TASK}, "train": {"evaluate_every": 7}},
        "sweep": {"data": "d", "grid": {"lora.r": [2]}},
    }
    run, lines = warned(lambda: RunConfig(**settings))
    assert run.batch.train["evaluate_every"] == 3
    assert run.batch.tasks[0].train == {"evaluate_every": 2}
    assert run.batch.tasks[0].grid == {"evaluate_every": (1, 2)}
    assert run.compare.train["evaluate_every"] == 7
    assert run.sweep.train["evaluate_every"] == 4
    places = ("train", "batch.train", "batch.tasks.0.train", "batch.tasks.0.grid")
    expected = [line_of(f"{place}.eval_every", f"{place}.evaluate_every") for place in places]
    assert lines == expected


def test_a_renamed_key_keeps_its_place_in_identities_and_names_of_directories() -> None:
    sweep = config.SweepConfig(
        **WHOLE["sweep"], train={"evaluate_every": 3, "eval_share": 0.1, "lora": {"alpha": 4}}
    )
    before = {
        "ratios": [], "correction": None,
        "train": {"eval_every": 3, "eval_share": 0.1, "lora": {"alpha": 4}},
        "grid": {"lora.r": [2, 4]}, "ranges": {}, "trials": None, "seed": 0, "grace_steps": None,
        "reduction_factor": 3.0, "finalists": 1,
    }  # fmt: skip
    assert digest_of(sweep.identity()) == digest_of(before)
    assert config.named("a", {"evaluate_every": 3, "lora.r": 2}) == "a-eval_every=3-r=2"


PEFT = {
    "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["q_proj"], "init_lora_weights": True,
    "layers_to_transform": 2, "exclude_modules": ["v_proj"], "rank_pattern": {"q_proj": 4},
}  # fmt: skip
OURS = {
    "alpha": 32, "dropout": 0.1, "targets": ("q_proj",), "init": "default", "layers": (2,),
    "exclude": ("v_proj",), "rank_pattern": {"q_proj": 4},
}  # fmt: skip


def test_options_of_lora_have_peft_s_names_too() -> None:
    """With the values that PEFT takes, and without a warning."""
    accepted = LoraConfig(**PEFT)
    assert accepted.lora_alpha == 32
    whole = {**WHOLE["train"], "preset": "modern"}
    section, lines = warned(lambda: config.TrainConfig(**whole, lora=PEFT))
    assert section == config.TrainConfig(**whole, lora=OURS) and not lines
    everywhere = config.TrainConfig(**WHOLE["train"], lora={"target_modules": "all-linear"})
    assert everywhere.lora.targets is None
    grid = {"lora.lora_alpha": [8, 16]}
    assert config.SweepConfig(**{**WHOLE["sweep"], "grid": grid}).grid == {"lora.alpha": (8, 16)}
    found = load_run(None, ["base=b", "output=o", "train.data=d", "train.lora.lora_alpha=3"])
    assert found.train.lora.alpha == 3
    with pytest.raises(ValueError, match="lora_alpha must not be given beside alpha"):
        config.LoraConfig(lora_alpha=1, alpha=2)


def test_the_command_prints_one_line_for_a_former_name(tmp_path: Path, loram: Command) -> None:
    words = ("--model", tmp_path / "none", "--data", "d", "--output", tmp_path / "o")
    done = loram("train", *words, "--eval_every", 3)
    assert done.err.splitlines()[0] == f"loram: {line_of('--eval-every', '--evaluate-every')}"
    assert len(done.err.splitlines()) == 2 and done.code == 2
    assert "eval-every" not in loram("train", "--help").out.replace("evaluate-every", "")
