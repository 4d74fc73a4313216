"""Shared fixtures: tiny models, the real model, and one embedded Ray."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker inherits its parent's settings
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"  # seconds a checkpoint may wait
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402

import loram_ray as lr  # noqa: E402
from helpers import command, tiny  # noqa: E402

LONGEST = ("test_documents.py", "test_faults.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, as they would otherwise keep one worker busy at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with grouped-query attention: 8 query heads on 4 KV heads, 4 layers."""
    return tiny.write_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def loud() -> LlamaForCausalLM:
    """A model with weights large enough for answers that differ between questions."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(tiny.llama_config(layers=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


@pytest.fixture(scope="session")
def loud_directory(loud: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the ``loud`` model."""
    directory = tmp_path_factory.mktemp("models") / "loud"
    loud.save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def pruned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with half of the heads and neurons of its two middle layers pruned."""
    output = tmp_path_factory.mktemp("finetuning") / "pruned"
    lr.prune(lr.PruneConfig(base=str(base), output=output, ratio=0.5, layers=(1, 3)))
    return output


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty small sums as prompts and completions."""
    return tiny.write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", tiny.questions())


@pytest.fixture(scope="session")
def real_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, made once and kept in the repository's cache directory."""
    from loram_ray.demo import write_base
    from loram_ray.runtime.locks import alone

    cache = Path(__file__).parents[1] / ".cache"
    cache.mkdir(exist_ok=True)
    directory = cache / "smollm2"
    with alone(cache):  # tests in other processes use it too
        if not directory.exists():
            write_base(directory)
    return directory


@pytest.fixture(scope="session")
def real_pruned(real_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, pruned at ratio 0.35."""
    config = lr.PruneConfig(
        base=str(real_base),
        output=tmp_path_factory.mktemp("real") / "pruned",
        ratio=0.35,
        layers=(4, 28),
        seed=3,
    )
    return lr.prune(config).output


@pytest.fixture(scope="session")
def until_the_end() -> Iterator[contextlib.ExitStack]:
    """An exit stack that is closed after the last test."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def embedded_ray(until_the_end: contextlib.ExitStack) -> None:
    """One embedded Ray for all tests that need one; restarted if a module has ended it."""
    import ray

    from loram_ray.config import RayConfig
    from loram_ray.runtime.cluster import ray_session

    if not ray.is_initialized():
        until_the_end.enter_context(ray_session(RayConfig(num_cpus=4), cpus=4))


@pytest.fixture
def loram(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> command.Command:
    """The ``loram`` command, run in this process."""
    return command.Command(monkeypatch, capsys)
