"""Packing, held-out loss, optimisers, initialisations: what a training may be set to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo import utils as dynamo
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup
from typer.testing import CliRunner

import loram_ray as lr
from helpers import tiny
from helpers.scored import score
from helpers.training import (
    LR,
    STEPS,
    adapter,
    config,
    losses,
    run_directly,
)
from loram_ray.artifacts.adapter import ADAPTER_FILE, CONFIG_FILE, TEMPLATE_FILE
from loram_ray.cli.main import app
from loram_ray.config import validate
from loram_ray.corpus.batches import padded
from loram_ray.corpus.examples import ExampleTable
from loram_ray.finetuning.eva import explain_inputs
from loram_ray.finetuning.examples import tables
from loram_ray.finetuning.frozen import FrozenModel
from loram_ray.finetuning.trainer import train_adapter
from loram_ray.losses import IGNORED
from loram_ray.models.tokenizer import load_tokenizer
from loram_ray.stages.train import train_by

# Optimisers and precision


def test_lora_plus_is_adamw_with_two_learning_rates(pruned: Path, tmp_path: Path) -> None:
    eight = tiny.write_jsonl(tmp_path / "eight.jsonl", tiny.questions(8))
    optimiser = {"learning_rate": LR, "warmup_steps": 2, "b_learning_rate_ratio": 4.0}
    settings = config(
        pruned, eight, tmp_path, batch_size=8, micro_batch_size=8, optimiser=optimiser
    )
    folder = run_directly(settings, tmp_path / "run")

    table = ExampleTable(folder / "work" / "examples.arrow")
    batch = padded([table[i] for i in range(8)], 0)
    torch.manual_seed(settings.seed)
    model: Any = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    )
    sides = {side: [p for n, p in model.named_parameters() if f"lora_{side}" in n] for side in "AB"}
    optimiser_ = torch.optim.AdamW(
        [{"params": sides["A"], "lr": LR}, {"params": sides["B"], "lr": 4 * LR}], weight_decay=0.0
    )
    schedule = get_cosine_schedule_with_warmup(optimiser_, 2, STEPS)
    expected = []
    for _ in range(STEPS):
        loss = model(**batch).loss
        optimiser_.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*sides["A"], *sides["B"]], 1.0)
        optimiser_.step()
        schedule.step()
        expected.append(float(loss.detach()))
    assert losses(folder) == pytest.approx(expected, rel=1e-4)
    plain = run_directly(
        config(pruned, eight, tmp_path, batch_size=8, micro_batch_size=8), tmp_path / "plain"
    )
    assert losses(plain)[-1] != pytest.approx(expected[-1], rel=1e-2)


def test_eight_bit_moments_train_and_resume(base: Path, data: Path, tmp_path: Path) -> None:
    changes = {
        "optimiser": {"learning_rate": LR, "warmup_steps": 2, "name": "adamw_8bit"},
        "lora": {
            "r": 64,
            "alpha": 8,
            "dropout": 0.0,
        },  # bitsandbytes leaves the smallest in float32
    }
    folder = run_directly(config(base, data, tmp_path, **changes), tmp_path / "run")
    assert losses(folder)[-1] < losses(folder)[0]
    state = torch.load(
        folder / "work" / "checkpoints" / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True
    )["state"]
    in_blocks = [m["__bnb_optimizer_quant_state__"] for m in state.values()]
    assert torch.uint8 in {moments["state1"].dtype for moments in in_blocks}
    shutil.rmtree(folder / "work" / "checkpoints" / f"checkpoint-{STEPS}")
    again = folder / "again"
    again.mkdir()
    train_adapter(config(base, data, tmp_path, **changes), folder / "work", again)
    assert all(
        torch.equal(load_file(again / ADAPTER_FILE)[n], t) for n, t in adapter(folder).items()
    )


def test_a_bf16_adapter_is_trained_and_saved_in_bf16(
    pruned: Path, data: Path, tmp_path: Path
) -> None:
    lora = {"r": 4, "alpha": 8, "dropout": 0.0}
    wide = run_directly(
        config(pruned, data, tmp_path, precision="bf16", lora=lora), tmp_path / "wide"
    )
    narrow = run_directly(
        config(pruned, data, tmp_path, precision="bf16", lora={**lora, "dtype": "bf16"}),
        tmp_path / "narrow",
    )
    assert {t.dtype for t in adapter(wide).values()} == {torch.float32}
    assert {t.dtype for t in adapter(narrow).values()} == {torch.bfloat16}
    assert losses(narrow) == pytest.approx(losses(wide), rel=2e-2)
    state = torch.load(
        narrow / "work" / "checkpoints" / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True
    )["state"]
    assert {moments["exp_avg"].dtype for moments in state.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "changes",
    [{"attention": "eager"}, pytest.param({"compile": True}, marks=pytest.mark.slow)],
)
def test_the_same_losses_another_way(
    changes: dict[str, object], pruned: Path, data: Path, tmp_path: Path
) -> None:
    as_usual = run_directly(config(pruned, data, tmp_path, steps=3), tmp_path / "usual")
    graphs = dynamo.counters["stats"]["unique_graphs"]
    found = run_directly(config(pruned, data, tmp_path, steps=3, **changes), tmp_path / "other")
    assert (dynamo.counters["stats"]["unique_graphs"] > graphs) == ("compile" in changes)
    assert losses(found) == pytest.approx(losses(as_usual), rel=1e-4)


def test_an_attention_that_the_machine_lacks_is_one_line(
    pruned: Path, data: Path, tmp_path: Path
) -> None:
    settings = config(pruned, data, tmp_path, attention="flash_attention_2", precision="bf16")
    with pytest.raises(lr.LoramError, match=r"attention = flash_attention_2 cannot be used"):
        run_directly(settings, tmp_path / "run")


# The adapter's options, and their recovery


@pytest.mark.parametrize(
    "options",
    [
        {"init": "gaussian", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 8.0}},
        {"init": "orthogonal", "use_rslora": True, "layers": [1, 2], "exclude": ["k_proj"]},
        {"init": "eva", "alpha_pattern": {"q_proj": 2.0}, "dropout": 0.1},
    ],
)
def test_what_is_learnt_under_an_option_is_recovered_exactly(
    options: dict[str, Any], base: Path, pruned: Path, data: Path, tmp_path: Path
) -> None:
    """The recovered adapter on the base whose pruned rows and columns are zero, against PEFT's."""
    lora = {"r": 4, "alpha": 8, "dropout": 0.0, **options}
    settings = config(pruned, data, tmp_path / "trained", lora=lora, steps=2)
    trained = train_by(settings, train_adapter).output
    recovered = lr.recover(
        lr.RecoverConfig(adapter=trained, base=str(base), output=tmp_path / "recovered")
    ).output
    plan = lr.PruningPlan.load(trained)
    small, full = (
        peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), str(directory)
        )
        for model, directory in ((pruned, trained), (base, recovered))
    )
    changed = 0
    for name, module in small.named_modules():
        if not isinstance(module, peft.tuners.lora.Linear):
            continue
        delta = module.get_delta_weight("default")
        found = full.get_submodule(name).get_delta_weight("default")
        kept = plan.kept(name.removeprefix("base_model.model."))
        if kept is None:
            expected = delta
        else:
            expected = torch.zeros_like(found).index_copy(kept.axis, kept.index, delta)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        changed += bool(delta.abs().max() > 0)
        assert "layers" not in options or name.split(".")[4] in ("1", "2")
        assert "exclude" not in options or "k_proj" not in name
    assert changed == (12 if "layers" in options else 28)
    saved = json.loads((trained / CONFIG_FILE).read_text())
    assert saved["rank_pattern"] == options.get("rank_pattern", {})


def test_eva_starts_from_the_directions_that_inputs_vary_most_in(
    pruned: Path, data: Path, tmp_path: Path
) -> None:
    """Against the principal components of all inputs at once."""
    rank = 4
    lora = {"r": rank, "init": "eva", "lm_head": True}
    settings = config(pruned, data, tmp_path, lora=lora)
    frozen = FrozenModel.load(settings)
    learnt, _ = tables(settings, load_tokenizer(pruned), tmp_path)
    seen: dict[str, list[torch.Tensor]] = {}
    with frozen.adapted(settings) as model:
        before = torch.random.get_rng_state()
        explain_inputs(model, learnt, settings, frozen)
        assert torch.equal(torch.random.get_rng_state(), before)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
        for name, layer in layers.items():
            layer.base_layer.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0][0])
            )
        with torch.no_grad(), model.disable_adapter():
            labels = []
            for row in (learnt[i] for i in range(len(learnt))):
                model(input_ids=torch.tensor([row["input_ids"]]))
                labels.append(torch.tensor([IGNORED, *row["labels"][1:]]) != IGNORED)
        at_labels = torch.cat(labels)
        assert len(layers) == 4 * 7 + 1
        shares = []
        for name, layer in layers.items():
            states = torch.cat(seen[name])[at_labels]
            states = states - states.mean(0)
            most = torch.linalg.svdvals(states)[:rank].square().sum()
            a = layer.lora_A["default"].weight.detach()
            torch.testing.assert_close(a @ a.T, torch.eye(rank), atol=1e-4, rtol=0)
            shares.append((states @ a.T).square().sum() / most)
            assert not layer.lora_B["default"].weight.any()
        assert min(shares) > 0.8 and sum(shares) / len(shares) > 0.95, shares  # random rows: 0.1


def test_trainings_from_eva_are_repeated_and_say_what_they_lack(
    pruned: Path, data: Path, tmp_path: Path
) -> None:
    quantized = lr.quantize(lr.QuantizeConfig(model=pruned, output=tmp_path / "quantized")).output
    settings = config(quantized, data, tmp_path, lora={"r": 4, "init": "eva"})
    first, second = (run_directly(settings, tmp_path / name) for name in ("first", "second"))
    assert losses(first) == losses(second)
    assert losses(first)[-1] < losses(first)[0]
    wide = config(pruned, data, tmp_path, lora={"r": 48, "init": "eva"})
    with pytest.raises(lr.LoramError, match=r"with at least r = 48 labels, but no micro-batch of"):
        run_directly(wide, tmp_path / "wide")


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"use_dora": True}, "use_dora cannot be recovered: DoRA's magnitudes"),
        ({"init": "pissa"}, "init = pissa cannot be recovered: it changes the frozen weights"),
        ({"init": "olora"}, "init = olora cannot be recovered"),
        ({"init": "loftq"}, "init = loftq cannot be recovered"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save cannot be recovered: fully trained"),
        ({"lora_bias": True}, "lora_bias cannot be recovered: a trained bias"),
        ({"bias": "all"}, "bias cannot be recovered: a trained bias"),
        ({"init_lora_weights": "pissa"}, "init = pissa cannot be recovered"),
        ({"init": "orthogonal", "r": 5}, "r must be even with init = orthogonal, got 5"),
        (
            {"init": "eva", "rank_pattern": {"q_proj": 2}},
            "rank_pattern must not be given with init",
        ),
        ({"layers": [1], "lm_head": True}, "lm_head must be false if layers are given"),
    ],
)
def test_options_that_cannot_be_recovered_are_refused_with_the_reason(
    lora: dict[str, object], said: str, tmp_path: Path
) -> None:
    settings = {"model": "m", "output": "o", "data": "d", "lora": lora}
    with pytest.raises(lr.LoramError) as caught:
        validate(lr.TrainConfig, settings, "train.yaml")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eval_data": "e", "eval_share": 0.1}, "eval_share must be 0 if eval_data is given"),
        ({"patience": 3}, "patience must be given with held-out data"),
    ],
)
def test_evaluation_settings_that_contradict_are_refused(
    changes: dict[str, object], said: str
) -> None:
    settings = {"model": "m", "output": "o", "data": "d", **changes}
    with pytest.raises(lr.LoramError, match=said):
        validate(lr.TrainConfig, settings, "train.yaml")


# Templates and models


TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def template(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE)
    yield path


def test_a_given_chat_template_is_trained_with_and_goes_with_the_adapter(
    base: Path, pruned: Path, data: Path, template: Path, tmp_path: Path
) -> None:
    settings = config(pruned, data, tmp_path / "trained", chat_template=template, steps=1)
    table = ExampleTable(run_directly(settings, tmp_path / "run") / "work" / "examples.arrow")
    text = load_tokenizer(pruned).decode(table[0]["input_ids"])
    assert text == "[user]0+0=<|im_end|>[assistant]0<|im_end|>"
    trained = train_by(settings, train_adapter).output
    recovered = lr.recover(
        lr.RecoverConfig(adapter=trained, base=str(base), output=tmp_path / "recovered")
    ).output
    merged = lr.merge(
        lr.MergeConfig(base=str(base), adapter=recovered, output=tmp_path / "merged")
    ).output
    for directory in (trained, recovered, merged):
        assert (directory / TEMPLATE_FILE).read_text() == TEMPLATE
    assert load_tokenizer(merged).chat_template == TEMPLATE
    evaluation = lr.EvaluateConfig(
        model=str(base), adapter=recovered, data=str(data), output=tmp_path / "unwritten"
    )
    scores = score(evaluation)
    assert scores["answer_tokens"] == sum(len(row["completion"]) + 1 for row in tiny.questions())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist; check the path"),
        ("{% for m in %}", "is not a usable chat template: .* in line 1; fix it"),
    ],
)
def test_a_template_that_is_none_is_one_line(
    content: str | None, said: str, pruned: Path, data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "template.jinja"
    if content is not None:
        path.write_text(content)
    settings = config(pruned, data, tmp_path, chat_template=path)
    with pytest.raises(lr.LoramError, match=rf"train.chat_template .*{said}"):
        run_directly(settings, tmp_path / "run")


def test_a_half_downloaded_model_is_refused(data: Path, tmp_path: Path) -> None:
    whole = tiny.write_base(tmp_path / "base", max_shard_size="100KB")
    shards = sorted(whole.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(lr.LoramError, match=rf"{shards[1].name}"):
        lr.train(config(whole, data, tmp_path / "missing"))
    shards[0].write_bytes(shards[0].read_bytes()[:-100])
    with pytest.raises(lr.LoramError, match=rf"{shards[0].name}"):
        lr.train(config(whole, data, tmp_path / "cut"))
    assert not (tmp_path / "missing").exists() and not (tmp_path / "cut").exists()


# Preview


def run_preview(model: Path, data: Path, *more: str) -> Any:
    settings = ["base=unread", "output=out", f"train.model={model}", f"train.data={data}"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    return CliRunner().invoke(app, ["train", *arguments, "--preview", "2", *more])


def test_a_preview_shows_the_tokens_that_are_trained_on(pruned: Path, tmp_path: Path) -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e"},
    ]
    rows = [{"messages": chat}, {"prompt": "no answer"}, {"text": "plain"}, {"text": "not shown"}]
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    shown = run_preview(pruned, data, "--json")
    assert shown.exit_code == 0
    assert "rows.jsonl:2" in shown.stderr
    first, second = json.loads(shown.stdout)
    assert first["place"].endswith("rows.jsonl:1") and second["place"].endswith("rows.jsonl:3")

    folder = run_directly(
        config(pruned, data, tmp_path, steps=1, max_length=512, max_bad_share=0.5), tmp_path / "run"
    )
    table = ExampleTable(folder / "work" / "examples.arrow")
    for number, example in enumerate((first, second)):
        trained = table[number]
        assert [token["id"] for token in example["tokens"]] == trained["input_ids"]
        assert [token["loss"] for token in example["tokens"]] == [
            label != IGNORED for label in trained["labels"]
        ]
    learnt = "".join(token["text"] for token in first["tokens"] if token["loss"])
    assert learnt == "c<|im_end|>\ne<|im_end|>\n"

    lines = run_preview(pruned, data).stdout.splitlines()
    assert lines[0].endswith("with loss") and "rows.jsonl:1: " in lines[0]
    assert [line[:4] for line in lines[1:5]] == ["    ", "loss", "    ", "loss"]
    assert lines[2] == "loss  c·<|im_end|>·\\n"
    assert "a·\\n·b" in lines[1]


def test_a_preview_of_nothing_is_one_line(pruned: Path, tmp_path: Path) -> None:
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "no answer"}])
    shown = run_preview(pruned, data)
    assert isinstance(shown.exception, lr.LoramError)
    assert "has no usable ones" in str(shown.exception)
