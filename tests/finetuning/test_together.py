"""Several trainings with one forward: each is the one that it would be alone."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loram_ray as lr
from helpers import families, masked, tiny
from helpers.training import config as training
from helpers.training import difference, run_directly
from loram_ray.finetuning import shared_forward as joint
from loram_ray.finetuning.frozen import FrozenModel, shell_of
from loram_ray.finetuning.lockstep import Lockstep
from loram_ray.finetuning.packing import laid_out, rows_of
from loram_ray.finetuning.shared_forward import SharedForward
from loram_ray.finetuning.trainer import train_adapter
from loram_ray.models.loading import load_model
from loram_ray.runtime.progress import METRICS_FILE

DROPOUT = {"r": 4, "alpha": 8, "dropout": 0.3}
DIFFERENT: list[dict[str, Any]] = [
    {"lora": DROPOUT},
    {"lora": {"r": 2, "alpha": 3, "dropout": 0.0, "layers": [1, 2]}, "steps": 4, "seed": 5},
    {"lora": {**DROPOUT, "targets": ["q_proj", "down_proj"]}, "micro_batch_size": 4},
    {"lora": {"r": 8, "dropout": 0.1, "lm_head": True}, "micro_batch_size": 1, "seed": 1},
    {
        "lora": {**DROPOUT, "init": "eva"},
        "optimiser": {"learning_rate": 1e-3, "b_learning_rate_ratio": 4.0},
    },
    {"lora": DROPOUT, "eval_share": 0.3, "evaluate_every": 2, "steps": 7},
]


class Watched(SharedForward):
    """Keeps how many adapters each pass was for."""

    def __init__(self, frozen: FrozenModel) -> None:
        super().__init__(frozen)
        self.sizes: list[int] = []

    def _together(self, members: Any) -> Any:
        self.sizes.append(len(members))
        return super()._together(members)


class Failing(Watched):
    """Raises an error at the end of each pass."""

    def __init__(self, frozen: FrozenModel, error: Exception) -> None:
        super().__init__(frozen)
        self._error = error

    def _together(self, members: Any) -> Any:
        super()._together(members)
        raise self._error


def run_together(
    settings: list[lr.TrainConfig],
    folder: Path,
    forward: Callable[[FrozenModel], Watched] = Watched,
) -> tuple[list[Path], list[int], dict[int, BaseException]]:
    """Train all at once; return their folders, the sizes of the passes and what was raised."""
    sizes: list[int] = []

    def watched(frozen: FrozenModel) -> Watched:
        made = forward(frozen)
        made.sizes = sizes
        return made

    together = Lockstep(lambda: FrozenModel.load(settings[0]), watched)
    frozen = together.frozen
    ready = threading.Barrier(len(settings))
    raised: dict[int, BaseException] = {}
    folders = [folder / str(number) for number in range(len(settings))]

    def train(number: int) -> None:
        target = folders[number]
        (target / "work").mkdir(parents=True)
        (target / "adapter").mkdir()
        ready.wait()
        try:
            train_adapter(settings[number], target / "work", target / "adapter", frozen, together)
        except BaseException as error:
            raised[number] = error

    threads = [threading.Thread(target=train, args=(n,)) for n in range(len(settings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return folders, sizes, raised


def assert_as_alone(
    folder: Path, settings: lr.TrainConfig, scratch: Path, rounding: float = 1e-4
) -> None:
    """The same losses up to rounding, and the same adapter up to what Adam makes of that."""
    expected = run_directly(settings, scratch)
    found, wanted = (
        [json.loads(line) for line in (path / "work" / METRICS_FILE).read_text().splitlines()]
        for path in (folder, expected)
    )
    for key in ("step", "loss", "eval_loss", "lr"):
        assert [row.get(key, 0.0) for row in found] == pytest.approx(
            [row.get(key, 0.0) for row in wanted], rel=rounding
        )
    most = 1e-3 if rounding < 1e-3 else 0.06
    assert difference(folder / "adapter", expected / "adapter") < most


@pytest.mark.parametrize("packing", ["none", pytest.param("some", marks=pytest.mark.slow)])
def test_each_training_is_the_one_that_it_is_alone(
    packing: str, pruned: Path, data: Path, tmp_path: Path
) -> None:
    settings = [
        training(
            pruned,
            data,
            tmp_path,
            **{"packing": packing == "some" and n % 2 == 0, **one},
        )
        for n, one in enumerate(DIFFERENT)
    ]
    folders, sizes, raised = run_together(settings, tmp_path / "together")
    assert not raised
    assert sizes[0] == 6 and len(sizes) == 14  # then one is left
    for number, one in enumerate(settings):
        assert_as_alone(folders[number], one, tmp_path / f"alone-{number}")


@pytest.mark.parametrize(
    ("kind", "dropout"),
    tiny.fast_of(
        [("fp32", 0.0), ("fp32", 0.3), ("bf16", 0.0), ("bf16", 0.3)], ("fp32", 0.3), ("bf16", 0.3)
    ),
)
def test_batches_of_other_widths_and_heights(
    kind: str, dropout: float, pruned: Path, tmp_path: Path
) -> None:
    """Losses and gradients of each, in one pass for all."""
    frozen = FrozenModel.load(training(pruned, pruned, tmp_path))
    adapters: list[dict[str, Any]] = [
        {"r": 2},
        {"r": 8, "alpha": 3},
        {"r": 4, "targets": ["q_proj", "down_proj"], "dtype": kind},
        {"r": 4},
    ]
    shapes = [(1, 40), (3, 37), (2, 30), (2, 12)]
    random = torch.Generator().manual_seed(0)
    with contextlib.ExitStack() as stack:
        members = []
        for number, (lora, shape) in enumerate(zip(adapters, shapes, strict=True)):
            lora = {"dropout": dropout, **lora}
            settings = training(pruned, pruned, tmp_path, lora=lora, seed=number)
            model = stack.enter_context(frozen.adapted(settings)).get_base_model()
            model.train()
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # which begins with zeros
                    torch.nn.init.normal_(parameter, std=0.1, generator=random)
            ids = torch.randint(3, 200, shape, generator=random)
            seen = torch.ones_like(ids)
            seen[-1, shape[1] - 3 * number :] = 0  # padding
            labels = torch.where(seen.bool(), ids, -100)
            inputs = {"input_ids": ids, "attention_mask": seen, "labels": labels}
            members.append(joint.Member(joint.Adapted.of(model), inputs, joint.RngState()))

        def losses_and_gradients(passes: SharedForward, alone: bool) -> list[list[torch.Tensor]]:
            torch.manual_seed(7)
            for member in members:
                member.rng_state = joint.RngState()
            if alone:
                found: list[Any] = [passes._alone(member) for member in members]
            else:
                found = passes.losses(members)
            results = []
            for (loss, _), member in zip(found, members, strict=True):
                trained = [p for p in member.adapted.model.parameters() if p.requires_grad]
                results.append([loss.detach(), *torch.autograd.grad(loss, trained)])
            return results

        passes = Watched(frozen)
        expected = losses_and_gradients(passes, alone=True)
        assert not passes.sizes
        found = losses_and_gradients(passes, alone=False)
        assert passes.sizes == [4]
        for left, right in zip(found, expected, strict=True):
            for one, other in zip(left, right, strict=True):
                largest = float(other.abs().max()) or 1.0
                rounding = 2e-2 if kind == "bf16" else 5e-5
                assert float((one - other).abs().max()) / largest < rounding
        poisoned = next(p for p in members[1].adapted.model.parameters() if p.requires_grad)
        poisoned.data.fill_(float("inf"))
        found = losses_and_gradients(passes, alone=False)
        assert not found[1][0].isfinite() and passes.sizes == [4, 4]
        for number in (0, 2, 3):  # though they were in one pass with it
            assert torch.equal(found[number][0], expected[number][0])


def test_one_that_diverges_harms_no_other(pruned: Path, data: Path, tmp_path: Path) -> None:
    settings = [
        training(pruned, data, tmp_path, lora=DROPOUT),
        training(pruned, data, tmp_path, optimiser={"learning_rate": 1e38, "warmup_steps": 0}),
    ]
    folders, sizes, raised = run_together(settings, tmp_path / "together")
    assert list(raised) == [1] and "the loss is" in str(raised[1])
    assert sizes
    assert_as_alone(folders[0], settings[0], tmp_path / "alone")


@pytest.mark.parametrize("memory", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_pass_that_fails_is_done_one_by_one(
    memory: bool, pruned: Path, data: Path, tmp_path: Path
) -> None:
    """If all of them together need more memory than there is, they do not try it again."""
    settings = [training(pruned, data, tmp_path, lora=DROPOUT, seed=seed) for seed in (1, 2)]
    error = torch.OutOfMemoryError("out of memory") if memory else ValueError("other")
    folders, sizes, raised = run_together(
        settings, tmp_path / "together", lambda frozen: Failing(frozen, error)
    )
    assert sizes == [2] * (1 if memory else 12) and not raised
    for number, one in enumerate(settings):
        expected = run_directly(one, tmp_path / f"alone-{number}")
        assert (
            difference(folders[number] / "adapter", expected / "adapter") < 1e-4
        )  # and no draw twice


def test_what_cannot_join_takes_turns(base: Path, data: Path, tmp_path: Path) -> None:
    moe = families.write_base(tmp_path / "moe", "mixtral")
    lora = {"r": 2, "dropout": 0.0}
    settings = [training(moe, data, tmp_path, lora=lora, steps=3, seed=seed) for seed in (1, 2)]
    folders, sizes, raised = run_together(settings, tmp_path / "together")
    assert not sizes and not raised
    for number, one in enumerate(settings):
        expected = run_directly(one, tmp_path / f"alone-{number}")
        assert difference(folders[number] / "adapter", expected / "adapter") < 1e-4


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("checkpointed", marks=pytest.mark.slow),
        pytest.param("bf16", marks=pytest.mark.slow),
        "masked",
        pytest.param("quantized", marks=pytest.mark.slow),
    ],
)
def test_on_every_kind_of_model(
    kind: str, base: Path, pruned: Path, data: Path, tmp_path: Path
) -> None:
    model, changes = pruned, dict[str, Any]()
    if kind == "checkpointed":
        changes = {"activation_checkpointing": True}
    elif kind == "bf16":
        changes = {"precision": "bf16"}
    elif kind == "masked":
        model = masked.prune(base, tmp_path / "masked", "unstructured", ratio=0.5)
    else:
        model = lr.quantize(lr.QuantizeConfig(model=pruned, output=tmp_path / "quantized")).output
    settings = [
        training(model, data, tmp_path, lora=lora, seed=seed, **changes)
        for seed, lora in enumerate((DROPOUT, {"r": 2, "dropout": 0.0}))
    ]
    folders, sizes, raised = run_together(settings, tmp_path / "together")
    assert sizes == [2] * 12 and not raised
    rounding = 1e-3 if kind in ("bf16", "quantized") else 1e-4  # NF4's products are in bf16
    for number, one in enumerate(settings):
        assert_as_alone(folders[number], one, tmp_path / f"alone-{number}", rounding)


def test_a_shell_has_the_model_s_tensors_and_modules_of_its_own(base: Path) -> None:
    model = load_model(base, "fp32")
    shell = shell_of(model)
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    others = dict(shell.named_parameters(remove_duplicate=False)) | dict(shell.named_buffers())
    assert tensors.keys() == others.keys()
    assert all(others[name] is tensor for name, tensor in tensors.items())
    assert not set(model.modules()) & set(shell.modules())
    shell.model.layers[0].self_attn.q_proj = torch.nn.Identity()
    shell.eval()
    assert isinstance(model.model.layers[0].self_attn.q_proj, torch.nn.Linear)


def test_sequences_are_packed_without_their_padding() -> None:
    one = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    two = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "attention_mask": torch.ones(1, 4).long()}
    packed = {
        "input_ids": torch.tensor([[8, 9], [3, 4]]),
        "positions": torch.tensor([[0, 0], [0, 1]]),
        "labels": torch.tensor([[8, 9], [3, 4]]),
    }
    batch, parts = laid_out([one, packed, two])
    ids, positions = batch["input_ids"].flatten(), batch["position_ids"].flatten()
    begun = 0
    for given, (places, seen) in zip((one, packed, two), parts, strict=True):
        assert torch.equal(ids[places][seen], given["input_ids"][seen])
        expected = given.get("positions", torch.arange(4).expand(1, 4)[:, : seen.shape[1]])
        assert torch.equal(positions[places][seen], expected[seen])
        begun += int(seen.sum())
    every = torch.cat([places[seen] for places, seen in parts])
    assert begun == 10 == len(every.unique())  # nobody's place is another's
    filled = torch.ones_like(ids, dtype=torch.bool)
    filled[every] = False
    assert not ids[filled].any()


@pytest.mark.parametrize(
    ("lengths", "places"),
    [
        ([50, 50, 50, 50], 200),
        ([53, 83, 56, 68, 239, 49, 73, 59], 750),  # 680 and little filling
        ([512] * 8, 4096),  # as rows: attention over all of them would cost more
        ([2000, 10, 10], 2020),
    ],
)
def test_rows_have_little_filling(lengths: list[int], places: int) -> None:
    rows = rows_of(lengths)
    assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
    width = max(sum(lengths[piece] for piece in row) for row in rows)
    assert sum(lengths) <= len(rows) * width <= places
    assert width <= max(*lengths, 1024) + 20
