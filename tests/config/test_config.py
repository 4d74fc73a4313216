"""Run files: what is read, filled in and overridden, and how each mistake is reported."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import yaml

from loram_ray.config import (
    STAGES,
    AlignConfig,
    PruneConfig,
    RunConfig,
    TrainConfig,
    load_run,
    section_of,
)
from loram_ray.config.overrides import apply_override
from loram_ray.errors import LoramError

REPOSITORY = Path(__file__).parents[2]
STUDY = REPOSITORY / "tests" / "benchmarks" / "study" / "study.yaml"
SHIPPED = [*sorted((REPOSITORY / "jobs" / "configs").rglob("*.y*ml")), STUDY]
CORPUS = {"sources": [{"path": "text.jsonl"}]}


def write(path: Path, settings: object) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path


def whole_run(**changes: object) -> dict[str, object]:
    """A run file with every section, holding only what has no default."""
    return {
        "base": "models/base",
        "output": "runs/one",
        "prune": {},
        "align": {"corpus": CORPUS},
        "train": {"data": "train.jsonl"},
        "recover": {},
        "merge": {},
        "evaluate": {"data": "test.jsonl"},
        **changes,
    }


def refusal(tmp_path: Path, settings: object, *overrides: str) -> str:
    """The message for a run file, which must be one line that begins with the file."""
    path = write(tmp_path / "run.yaml", settings)
    with pytest.raises(LoramError) as caught:
        load_run(path, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(str(path))
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_config_is_valid_and_opens_with_its_command(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no key is under a former name
        run = load_run(path)
    assert any(getattr(run, stage) is not None for stage in STAGES)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    relative = path.relative_to(REPOSITORY)
    assert any("loram " in line and f"--config {relative}" in line for line in header)


def test_some_config_is_shipped() -> None:
    assert SHIPPED


@pytest.mark.parametrize(
    ("section", "unknown", "meant"),
    [
        (None, "prunne", "prune"),
        ("prune", "ration", "ratio"),
        ("align", "worker", "workers"),
        ("train", "micro_batchsize", "micro_batch_size"),
        ("evaluate", "exact_mach", "exact_match"),
    ],
)
def test_unknown_key_names_the_nearest_valid_one_and_the_file(
    tmp_path: Path, section: str | None, unknown: str, meant: str
) -> None:
    settings = whole_run()
    where = settings if section is None else settings[section]
    assert isinstance(where, dict)
    where[unknown] = 1
    key = unknown if section is None else f"{section}.{unknown}"
    assert refusal(tmp_path, settings) == f"{key} is not a known key; did you mean '{meant}'?"


def test_unknown_key_deep_inside_lists_is_named_by_its_whole_path(tmp_path: Path) -> None:
    sources = [{"path": "a.txt"}, {"path": "b.txt", "text_feld": "body"}]
    settings = whole_run(align={"corpus": {"sources": sources}})
    message = refusal(tmp_path, settings)
    assert message == (
        "align.corpus.sources.1.text_feld is not a known key; did you mean 'text_field'?"
    )


def test_unknown_key_like_no_other_suggests_nothing(tmp_path: Path) -> None:
    message = refusal(tmp_path, whole_run(prune={"zzzzzz": 1}))
    assert message == "prune.zzzzzz is not a known key"


def test_key_that_is_no_text_is_unknown(tmp_path: Path) -> None:
    assert refusal(tmp_path, whole_run(prune={7: 1})) == "prune.7 is not a known key"


@pytest.mark.parametrize(
    ("section", "key", "value", "rule"),
    [
        ("prune", "ratio", 1.0, "less than 1"),
        ("prune", "ratio", -0.1, "greater than or equal to 0"),
        ("prune", "ratio", float("nan"), "less than 1"),
        ("prune", "method", "lottery", "'random'"),
        ("prune", "layers", [1, 2, 3], "at most 2"),
        ("train", "steps", 0, "greater than or equal to 1"),
        ("train", "steps", "many", "integer"),
        ("train", "max_length", 7, "greater than or equal to 8"),
        ("train", "max_bad_share", 1.5, "less than or equal to 1"),
        ("evaluate", "precision", "int3", "'bf16' or 'fp32'"),
        ("recover", "output", 3, "a path"),
    ],
)
def test_value_out_of_range_is_told_with_key_rule_and_value(
    tmp_path: Path, section: str, key: str, value: object, rule: str
) -> None:
    settings = whole_run()
    settings[section] = {**settings[section], key: value}  # type: ignore[dict-item]
    message = refusal(tmp_path, settings)
    assert message.startswith(f"{section}.{key} must ")
    assert rule in message
    assert f"got {value!r}; change the value" in message


@pytest.mark.parametrize("value", [0, -1e-4, float("inf"), float("nan")])
def test_learning_rate_must_be_positive_and_finite(tmp_path: Path, value: float) -> None:
    settings = whole_run(train={"data": "d.jsonl", "optimiser": {"learning_rate": value}})
    assert refusal(tmp_path, settings).startswith("train.optimiser.learning_rate must be")


def test_a_section_that_is_no_section_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, whole_run(prune=3)).startswith("prune must be")


@pytest.mark.parametrize("key", ["base", "output"])
def test_missing_shared_key_is_one_line_and_not_one_for_every_section(
    tmp_path: Path, key: str
) -> None:
    settings = whole_run()
    del settings[key]
    expected = f"{key} must be given; add it to the config or pass --set {key}=…"
    assert refusal(tmp_path, settings) == expected


def test_shared_key_of_the_wrong_kind_is_one_line(tmp_path: Path) -> None:
    assert refusal(tmp_path, whole_run(output={"a": 1})).startswith("output must be a path")
    assert refusal(tmp_path, whole_run(base=7)).startswith("base must be")


def test_missing_key_of_a_section_is_named_by_its_dotted_key(tmp_path: Path) -> None:
    message = refusal(tmp_path, whole_run(train={"steps": 3}))
    assert message.startswith("train.data must be given; ")
    assert "--set train.data=" in message
    assert refusal(tmp_path, whole_run(align={})).startswith("align.corpus must be given; ")


def test_two_mistakes_are_two_lines_each_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", whole_run(prune={"ratio": 2, "seed": -1}))
    with pytest.raises(LoramError) as caught:
        load_run(path)
    lines = str(caught.value).splitlines()
    assert [line.split(" must ")[0] for line in lines] == [
        f"{path}: prune.ratio",
        f"{path}: prune.seed",
    ]


def test_batch_sizes_that_do_not_divide_are_refused_with_the_numbers(tmp_path: Path) -> None:
    align = {"corpus": CORPUS, "batch_size": 10, "micro_batch_size": 4}
    message = refusal(tmp_path, whole_run(align=align))
    assert message.startswith("align.batch_size must be a multiple of micro_batch_size = 4")
    assert "got 10" in message
    train = {"data": "d.jsonl", "batch_size": 10, "micro_batch_size": 4}
    message = refusal(tmp_path, whole_run(train=train))
    assert message.startswith("train.batch_size must be a multiple of micro_batch_size = 4")
    assert "got 10" in message


def test_batch_sizes_that_divide_are_taken() -> None:
    align = {"corpus": CORPUS, "batch_size": 16, "micro_batch_size": 4, "workers": 3}
    run = RunConfig.model_validate(whole_run(align=align))
    assert run.align is not None
    assert run.align.batch_size == 16


def test_evaluation_of_nothing_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, whole_run(evaluate={})).startswith(
        "evaluate.data, text, benchmarks or lm_eval must be"
    )
    text_alone = {"text": CORPUS, "exact_match": True}
    assert refusal(tmp_path, whole_run(evaluate=text_alone)).startswith(
        "evaluate.exact_match needs data"
    )


def test_missing_config_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "absent.yaml"
    with pytest.raises(LoramError, match=f"--config {path} does not exist; check the path"):
        load_run(path)


def test_directory_in_place_of_a_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoramError, match=f"--config {tmp_path} must be a regular file"):
        load_run(tmp_path)


@pytest.mark.parametrize("content", ["base: [unclosed", "a: b: c", "\tx: 1", "base: 'open\n\nx"])
def test_bad_yaml_is_one_line_with_the_place(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(LoramError) as caught:
        load_run(path)
    message = str(caught.value)
    assert message.startswith(f"--config {path} is not valid YAML: ")
    assert "line " in message
    assert len(message.splitlines()) == 1


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"base: \xff\xfe")
    with pytest.raises(LoramError, match="cannot be read"):
        load_run(path)


@pytest.mark.parametrize("content", ["- base\n- output\n", "", "just words"])
def test_top_level_that_holds_no_keys_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(LoramError, match=f"--config {path} must contain keys and values"):
        load_run(path)


def test_paths_follow_from_base_and_output() -> None:
    run = RunConfig.model_validate(whole_run())
    root = Path("runs/one")
    assert run.prune and run.align and run.train and run.recover and run.merge and run.evaluate
    assert (run.prune.base, run.prune.output) == ("models/base", root / "pruned")
    assert (run.align.pruned, run.align.output) == (root / "pruned", root / "aligned")
    assert (run.train.model, run.train.output) == (root / "aligned", root / "adapter_pruned")
    assert run.recover.base == "models/base"
    assert run.recover.adapter == root / "adapter_pruned"
    assert run.recover.output == root / "adapter"
    assert (run.merge.base, run.merge.adapter) == ("models/base", root / "adapter")
    assert run.merge.output == root / "merged"
    assert (run.evaluate.model, run.evaluate.adapter) == ("models/base", root / "adapter")


def test_without_alignment_the_pruned_model_is_trained() -> None:
    settings = whole_run()
    del settings["align"]
    run = RunConfig.model_validate(settings)
    assert run.align is None
    assert run.train is not None
    assert run.train.model == Path("runs/one/pruned")


@pytest.mark.parametrize(
    ("stage", "readers"),
    [
        ("prune", [("align", "pruned")]),
        ("align", [("train", "model")]),
        ("train", [("recover", "adapter")]),
        ("recover", [("merge", "adapter"), ("evaluate", "adapter")]),
    ],
)
def test_a_stage_reads_where_the_stage_before_it_was_told_to_write(
    stage: str, readers: list[tuple[str, str]]
) -> None:
    settings = whole_run()
    settings[stage] = {**settings[stage], "output": "elsewhere/kept"}  # type: ignore[dict-item]
    run = RunConfig.model_validate(settings)
    for section, key in readers:
        assert getattr(getattr(run, section), key) == Path("elsewhere/kept")


def test_explicit_paths_win_over_derived_ones() -> None:
    run = RunConfig.model_validate(
        whole_run(
            prune={"output": "elsewhere/pruned"},
            align={"corpus": CORPUS, "pruned": "other/pruned"},
            train={"data": "d.jsonl", "model": "models/base"},
            evaluate={"data": "d.jsonl", "adapter": None, "model": "runs/one/merged"},
        )
    )
    assert run.align and run.train and run.evaluate
    assert run.align.pruned == Path("other/pruned")
    assert run.train.model == Path("models/base")
    assert run.evaluate.adapter is None
    assert run.evaluate.model == "runs/one/merged"


def test_a_section_named_without_content_takes_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("base: b\noutput: o\nprune:\nrecover:\n")
    run = load_run(path)
    assert run.prune == PruneConfig(base="b", output=Path("o/pruned"))
    assert run.recover is not None
    assert run.merge is None


def test_a_run_survives_being_dumped_and_read_again() -> None:
    settings = whole_run()
    del settings["align"], settings["merge"]
    run = RunConfig.model_validate(settings)
    assert RunConfig.model_validate(run.model_dump(mode="json")) == run
    assert RunConfig.model_validate_json(run.model_dump_json()) == run


def test_sections_may_be_objects_and_are_followed_too() -> None:
    prune = PruneConfig(base="b", output=Path("kept"), ratio=0.5)
    run = RunConfig(base="b", output=Path("o"), prune=prune, align={"corpus": CORPUS})  # type: ignore[arg-type]
    assert run.prune == prune
    assert run.align is not None
    assert run.align.pruned == Path("kept")


def test_overrides_replace_what_the_file_says_and_create_what_it_lacks(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", whole_run(prune={"ratio": 0.35}))
    run = load_run(
        path,
        [
            "prune.ratio=0.5",
            "prune.layers=[1, 3]",
            "train.lora.r=16",
            "train.lora.targets=[q_proj, v_proj]",
            "train.optimiser.learning_rate=1.0e-3",
            "ray.num_cpus=2",
            "output=runs/two",
        ],
    )
    assert run.prune and run.train
    assert (run.prune.ratio, run.prune.layers) == (0.5, (1, 3))
    assert run.train.lora.r == 16
    assert run.train.lora.targets == ("q_proj", "v_proj")
    assert run.train.optimiser.learning_rate == 1e-3
    assert run.ray.num_cpus == 2
    assert run.prune.output == Path("runs/two/pruned")


def test_overriding_one_key_keeps_its_neighbours(tmp_path: Path) -> None:
    lora = {"r": 4, "alpha": 32, "dropout": 0.1}
    path = write(tmp_path / "run.yaml", whole_run(train={"data": "d.jsonl", "lora": lora}))
    run = load_run(path, ["train.lora.r=8"])
    assert run.train is not None
    assert (run.train.lora.r, run.train.lora.alpha, run.train.lora.dropout) == (8, 32, 0.1)


def test_the_last_of_two_overrides_wins(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", whole_run())
    run = load_run(path, ["prune.seed=1", "prune.seed=2"])
    assert run.prune is not None
    assert run.prune.seed == 2


@pytest.mark.parametrize(
    ("text", "value"), [("4:8", "4:8"), ("0.5", 0.5), ("10", 10), ("1.5e+3", 1500)]
)
def test_a_pattern_needs_no_quotes(tmp_path: Path, text: str, value: object) -> None:
    """4:8 would be 248 in YAML 1.1."""
    path = tmp_path / "run.yaml"
    compared = f"{{tasks: {{t: {{data: a, held_out: b}}}}, alignments: {{a: {{k: {text}}}}}}}"
    path.write_text(f"base: b\noutput: o\ncompare: {compared}")
    run = load_run(path, [f"compare.alignments.a.more={text}"])
    assert run.compare is not None
    assert run.compare.alignments == {"a": {"k": value, "more": value}}


def test_overrides_make_a_run_without_a_file() -> None:
    run = load_run(None, ["base=b", "output=o", "prune.ratio=0.25"])
    assert run.prune == PruneConfig(base="b", output=Path("o/pruned"), ratio=0.25)


def test_an_override_can_ask_for_a_section_and_switch_one_value_off(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", whole_run())
    run = load_run(path, ["evaluate.adapter=null", "merge="])
    assert run.evaluate is not None
    assert run.evaluate.adapter is None
    assert run.merge is not None


def test_an_override_reaches_into_a_list_by_number(tmp_path: Path) -> None:
    sources = [{"path": "a.txt"}, {"path": "b.txt"}]
    path = write(tmp_path / "run.yaml", whole_run(align={"corpus": {"sources": sources}}))
    run = load_run(path, ["align.corpus.sources.1.path=c.txt"])
    assert run.align is not None
    assert [source.path for source in run.align.corpus.sources] == ["a.txt", "c.txt"]
    with pytest.raises(LoramError, match=r"--set align.corpus.sources.2.path .* from 0 to 1"):
        load_run(path, ["align.corpus.sources.2.path=c.txt"])
    with pytest.raises(LoramError, match="got 'first'"):
        load_run(path, ["align.corpus.sources.first=c.txt"])


@pytest.mark.parametrize("override", ["prune.ratio", "=0.5", ""])
def test_an_override_that_is_no_assignment_is_refused(override: str) -> None:
    with pytest.raises(LoramError, match="--set must be key=value"):
        load_run(None, [override])


def test_an_override_whose_value_is_no_yaml_is_refused() -> None:
    with pytest.raises(LoramError, match="--set prune.layers must be valid YAML"):
        load_run(None, ["base=b", "output=o", "prune.layers=[1, "])


def test_an_override_that_breaks_a_rule_names_its_source() -> None:
    with pytest.raises(LoramError, match=r"^--set: prune.ratio must be less than 1, got 3"):
        load_run(None, ["base=b", "output=o", "prune.ratio=3"])


def test_an_override_of_a_section_that_is_no_section_is_refused() -> None:
    with pytest.raises(LoramError, match=r"^--set: base must be a valid string"):
        load_run(None, ["base=b", "output=o", "base.path=3"])


@pytest.mark.parametrize(
    "text",
    ["run #1/out", "#1", "a: b", "*star", "&and", "!bang", "yes", "1e3", "2024-01-01", "[a]", "{a}"]
    + ["'quoted'", '"', "%", "@x", "`x`", "- x", "| x", "a\tb", " a ", "10", "1.50", "ü/漢", "a=b"],
)
def test_text_is_taken_as_it_is_written(text: str) -> None:
    """In text, paths, optional ones, choices' names, items of lists and sections checked later."""
    keys = ["base", "output", "train.data", "train.chat_template", "batch.train.chat_template"]
    keys += ["batch.tasks.0.train.eval_data", "align.corpus.sources.0.path", "recover.base"]
    keys += ["evaluate.benchmarks.0.prompt", "evaluate.text.sources.0.text_field", "batch.base"]
    keys += ["compare.alignments.mine.deepspeed", "compare.tasks.t.data", "sweep.models.0"]
    keys += ["prune.calibration.sources.0.path", "publish.message"]
    for key in keys:
        data = {
            "align": {"corpus": {"sources": [{}]}},
            "batch": {"tasks": [{}]},
            "evaluate": {"benchmarks": [{}], "text": {"sources": [{}]}},
            "prune": {"calibration": {"sources": [{}]}},
            "sweep": {"models": ["a"]},
        }
        apply_override(data, f"{key}={text}")
        found: object = data
        for part in key.split("."):
            found = found[int(part)] if isinstance(found, list) else found[part]  # type: ignore[index]
        assert found == text, key


def test_text_with_a_number_sign_reaches_the_section() -> None:
    run = load_run(None, ["base=b #1", "output=run #1/out", "prune.seed=3"])
    assert run.prune == PruneConfig(base="b #1", output=Path("run #1/out/pruned"), seed=3)


@pytest.mark.parametrize("text", ["null", "~", ""])
def test_optional_text_can_be_switched_off(text: str) -> None:
    given = ["base=b", "output=o", "train.data=d", f"train.chat_template={text}"]
    run = load_run(None, [*given, f"train.preset={text}", f"batch.train.eval_data={text}"])
    assert run.train is not None and run.batch is not None
    assert (run.train.chat_template, run.train.preset) == (None, None)
    assert run.batch.train["eval_data"] is None


@pytest.mark.parametrize(
    ("override", "comment"),
    [
        ("prune.layers=[1, 3] # middle", "# middle"),
        ("prune.ratio=0.5 #", "#"),
        ("train.lora.targets=[q_proj, v_proj #, o_proj\n]", "#, o_proj"),
        ("batch.tasks=[{data: a #1.jsonl\n}]", "#1.jsonl"),
        ("batch.train.lora.r=8 # rank", "# rank"),
        ("evaluate.benchmarks.0.options.x=a #b", "#b"),
        ("train.packing=#true", "#true"),
    ],
)
def test_a_comment_in_an_override_is_refused(override: str, comment: str) -> None:
    with pytest.raises(LoramError, match=r"must have no comment, got '" + comment):
        load_run(None, ["base=b", "output=o", override])


def test_values_that_are_no_text_stay_yaml() -> None:
    given = ["base=b", "output=o", "prune.layers=[1, 3]", "prune.ratio=5.0e-1", "train.data=d"]
    given += [
        "train.packing=yes",
        "train.lora={r: 16, targets: ['a #b']}",
        "train.evaluate_every=0x10",
    ]
    run = load_run(None, given)
    assert run.prune is not None and run.train is not None
    assert (run.prune.layers, run.prune.ratio, run.train.packing) == ((1, 3), 0.5, True)
    assert (run.train.lora.r, run.train.lora.targets, run.train.evaluate_every) == (
        16,
        ("a #b",),
        16,
    )


@pytest.mark.parametrize("override", ["output=a\ud800", "output=a\0", "prune.\udcff=1"])
def test_an_override_that_is_no_text_is_refused(override: str) -> None:
    with pytest.raises(LoramError, match=r"--set '.*' must be UTF-8 text") as caught:
        load_run(None, ["base=b", override])
    str(caught.value).encode()


def test_a_key_given_twice_is_refused_with_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("base: b\noutput: o\ntrain: {data: d, steps: 5}\nprune: {}\ntrain: {data: e}\n")
    with pytest.raises(LoramError, match=r"^--config .* got 'train' in lines 3 and 5; remove one$"):
        load_run(path)
    path.write_text("base: b\noutput: o\ntrain:\n  data: d\n  lora:\n    r: 8\n    r: 9\n")
    with pytest.raises(LoramError, match=r"got 'r' in lines 6 and 7"):
        load_run(path)


def test_section_that_is_not_there_is_named_with_the_remedy() -> None:
    run = load_run(None, ["base=b", "output=o", "prune.ratio=0.5"])
    assert section_of(run, "prune") is run.prune
    with pytest.raises(LoramError, match=r"train must be a section .*; add 'train:'"):
        section_of(run, "train")


def test_sections_cannot_be_changed_by_accident() -> None:
    run = load_run(None, ["base=b", "output=o", "prune.ratio=0.5"])
    assert run.prune is not None
    with pytest.raises(ValueError, match="frozen"):
        run.prune.ratio = 0.1


def test_every_key_is_described() -> None:
    for section in STAGES.values():
        for name, field in section.model_fields.items():
            nested = name in ("corpus", "optimiser", "lora", "distillation")
            assert nested or field.description, f"{section.__name__}.{name}"


def test_defaults_that_the_paper_names_stand() -> None:
    align = AlignConfig(pruned="p", output="o", base="b", corpus=CORPUS)  # type: ignore[arg-type]
    assert (align.batch_size, align.corpus.sequence_length) == (128, 512)
    assert (align.optimiser.learning_rate, align.optimiser.warmup_steps) == (5e-5, 100)
    assert align.total_steps == 1600
    assert align.frozen == ("lm_head",)
    train = TrainConfig(model="m", output="o", data="d.jsonl")  # type: ignore[arg-type]
    assert (train.lora.r, train.lora.alpha, train.lora.dropout) == (8, 16, 0.05)


def test_a_preset_gives_defaults_that_keys_override() -> None:
    paths = {"model": "m", "output": "o", "data": "d"}
    paper = TrainConfig.model_validate({**paths, "preset": "paper"})
    # METHOD.md: the settings of the reference
    assert (paper.lora.r, paper.lora.alpha, paper.lora.dropout, paper.lora.lm_head) == (
        8,
        16,
        0.05,
        True,
    )
    assert (paper.batch_size, paper.max_length, paper.steps) == (128, 512, 400)
    optimiser = paper.optimiser
    assert (optimiser.learning_rate, optimiser.warmup_steps, optimiser.schedule) == (
        1e-5,
        100,
        "cosine",
    )
    changed = TrainConfig.model_validate(
        {**paths, "preset": "paper", "lora": {"r": 16}, "batch_size": 8}
    )
    assert changed.lora == paper.lora.model_copy(update={"r": 16})
    assert changed.batch_size == 8
    assert changed.optimiser == paper.optimiser
    with pytest.raises(ValueError, match="preset"):
        TrainConfig.model_validate({**paths, "preset": "magic"})
