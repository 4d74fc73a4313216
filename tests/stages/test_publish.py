"""Publishing with the real huggingface_hub, against a hub on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import loram_ray as lr
from helpers import adapters, tiny
from helpers import hub as hubs
from loram_ray.artifacts.manifest import hash_file, read_manifest, write_json
from loram_ray.cli import main as cli
from loram_ray.config import load_run
from loram_ray.stages.publish import _contents

REPO = "someone/small-model"


@pytest.fixture
def hub() -> Iterator[hubs.Hub]:
    with hubs.serve() as server:
        yield server


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model and a recovered adapter of it."""
    folder = tmp_path_factory.mktemp("made")
    base = tiny.write_base(folder / "base")
    config = lr.PruneConfig(
        base=str(base),
        output=folder / "pruned",
        ratio=0.5,
        layers=(1, 3),
        max_shard_bytes=200_000,
    )
    pruned = lr.prune(config).output
    assert len(list(pruned.glob("model-*.safetensors"))) > 1
    trained, _ = adapters.train_randomly(pruned, folder / "trained")
    lr.recover(lr.RecoverConfig(adapter=trained, base=str(base), output=folder / "adapter"))
    return folder


@pytest.fixture
def folder(tmp_path: Path, made: Path) -> Path:
    for name in ("pruned", "trained", "adapter"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


Done = tuple[int, str, str]
Publish = Callable[..., Done]


@pytest.fixture
def publish(
    hub: hubs.Hub,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Publish:
    """`loram publish` in this process: exit code, standard output and standard error."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a storage service of its own
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-login"))
    monkeypatch.setenv("HF_TOKEN", hubs.TOKEN)

    def run(*settings: str) -> Done:
        given = ["base=b", "output=o", f"publish.repo={REPO}", *settings]
        options = [part for setting in given for part in ("--set", setting)]
        monkeypatch.setattr(sys, "argv", ["loram", "publish", *options])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        assert hubs.TOKEN not in out + err
        return code, out, err

    return run


def refused(hub: hubs.Hub, done: Done) -> str:
    """The one line of a refused publication, which must have sent no file."""
    code, out, err = done
    assert (code, out) == (2, ""), err
    [line] = err.splitlines()
    assert not hub.objects and not hub.asked("/commit/")
    return line.removeprefix("loram: ")


def on_disk(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_hub_receives_every_file_of_the_manifest_and_no_other(
    hub: hubs.Hub, folder: Path, publish: Publish
) -> None:
    (folder / "pruned" / "notes.txt").write_text("of the publisher alone")
    before = tiny.tree(folder / "pruned")
    code, out, err = publish("publish.directory=pruned")
    assert code == 0, err
    assert tiny.tree(folder / "pruned") == before
    repository = hub.repositories[REPO]
    expected = on_disk(folder / "pruned")
    del expected["notes.txt"]
    assert repository.files() == {".gitattributes": b"", **expected}
    assert len(hub.objects) == len(list((folder / "pruned").glob("*.safetensors")))
    assert repository.private
    assert len(repository.commits) == 2
    assert repository.messages[-1].startswith("loram prune ")
    assert f"publish: done: {hub.endpoint}/{REPO}" in out
    assert f"commit: {repository.sha()}" in out
    writes = [(path, given) for method, path, given in hub.requests if method != "GET"]
    to_hub = {given for path, given in writes if not path.startswith("/objects/")}
    to_storage = {given for path, given in writes if path.startswith("/objects/")}
    assert to_hub == {f"Bearer {hubs.TOKEN}"} and to_storage == {None}


def test_what_the_hub_has_is_not_sent_again(hub: hubs.Hub, publish: Publish) -> None:
    settings = ["publish.directory=pruned", "publish.private=false", "publish.message=first"]
    assert publish(*settings)[0] == 0
    assert not hub.repositories[REPO].private
    sent, commits = hub.asked("/objects/", "PUT"), len(hub.repositories[REPO].commits)
    code, out, err = publish(*settings)
    assert code == 0, err
    assert "unchanged, nothing uploaded" in out
    assert hub.repositories[REPO].sha() in out
    assert hub.asked("/objects/", "PUT") == sent
    assert len(hub.repositories[REPO].commits) == commits
    assert hub.repositories[REPO].messages == ["initial commit", "first"]


def test_shards_of_an_earlier_publication_go(hub: hubs.Hub, publish: Publish) -> None:
    hub.repositories[REPO] = hubs.Repository(private=False)
    held = hub.repositories[REPO].files()
    held["model.safetensors"] = b"would be loaded before the shards"
    held["LICENSE"] = b"of the owner"
    assert publish("publish.directory=pruned")[0] == 0
    files = hub.repositories[REPO].files()
    assert "model.safetensors" not in files and files["LICENSE"] == b"of the owner"
    assert not hub.repositories[REPO].private  # as its owner has it


def test_a_branch_is_made_and_main_stays(hub: hubs.Hub, publish: Publish) -> None:
    settings = ["publish.directory=pruned", "publish.revision=v1"]
    assert publish(*settings)[0] == 0
    assert set(hub.repositories[REPO].files()) == {".gitattributes"}
    assert "config.json" in hub.repositories[REPO].files("v1")
    assert publish(*settings)[0] == 0


def test_in_a_process_of_its_own_json_is_all_that_stands_on_standard_output(
    hub: hubs.Hub, folder: Path
) -> None:
    options = ["base=b", "output=o", f"publish.repo={REPO}", "publish.directory=pruned"]
    done = subprocess.run(
        [sys.executable, "-m", "loram_ray.cli", "publish", "--json"]
        + [part for option in options for part in ("--set", option)],
        cwd=folder,
        env={**os.environ, **hubs.client(hub, folder)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert hubs.TOKEN not in done.stdout + done.stderr
    files = read_manifest(folder / "pruned").files  # type: ignore[union-attr]
    said = json.loads(done.stdout)
    manifest_bytes = (folder / "pruned" / "manifest.json").stat().st_size
    assert said == {
        "url": f"{hub.endpoint}/{REPO}",
        "commit": hub.repositories[REPO].sha(),
        "files": len(files) + 1,
        "bytes": sum(entry["bytes"] for entry in files.values()) + manifest_bytes,
        "changed": True,
    }


def test_an_adapter_names_its_base_as_the_hub_does(
    hub: hubs.Hub, folder: Path, publish: Publish
) -> None:
    local = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert Path(local["base_model_name_or_path"]).is_absolute()
    settings = ["publish.directory=adapter", "publish.base=meta-llama/Llama-3.1-70B"]
    assert publish(*settings)[0] == 0
    received = folder / "received"
    received.mkdir()
    for name, content in hub.repositories[REPO].files().items():
        (received / name).write_bytes(content)
    sent = json.loads((received / "adapter_config.json").read_text())
    assert sent == {**local, "base_model_name_or_path": "meta-llama/Llama-3.1-70B"}
    manifest = read_manifest(received)
    assert manifest is not None
    for name, entry in manifest.files.items():
        assert hash_file(received / name) == entry["sha256"]
        assert (received / name).stat().st_size == entry["bytes"]
    assert str(folder.parent) not in "".join(
        (received / name).read_text() for name in ("manifest.json", "adapter_config.json")
    )


@pytest.mark.parametrize("base", ["", "publish.base=/models/base", "publish.base=./base"])
def test_an_adapter_of_a_local_base_is_refused(hub: hubs.Hub, publish: Publish, base: str) -> None:
    settings = ["publish.directory=adapter", *([base] if base else [])]
    line = refused(hub, publish(*settings))
    assert "publish.base must be the Hub id" in line and "set it to owner/name" in line


def test_a_path_in_a_model_s_configuration_is_left_out(folder: Path) -> None:
    """Some transformers wrote it into the base's config.json, which pruning keeps."""
    path = folder / "pruned" / "config.json"
    rewrite(folder / "pruned", "config.json", _name_or_path=str(folder / "base"))
    config = lr.PublishConfig(directory=folder / "pruned", repo=REPO)
    manifest = read_manifest(folder / "pruned")
    assert manifest is not None
    sent = _contents(config, manifest)["config.json"]
    expected = json.loads(path.read_text())
    del expected["_name_or_path"]
    assert isinstance(sent, bytes) and json.loads(sent) == expected


def rewrite(directory: Path, name: str, **settings: object) -> None:
    """Change a JSON file of a stage's directory and what its manifest says of it."""
    path = directory / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    write_json(directory / "manifest.json", manifest)


def test_other_paths_of_this_machine_are_refused(
    hub: hubs.Hub, folder: Path, publish: Publish
) -> None:
    manifest = json.loads((folder / "pruned" / "manifest.json").read_text())
    manifest["settings"]["deepspeed"] = {"nvme_path": str(folder / "swap")}
    write_json(folder / "pruned" / "manifest.json", manifest)
    line = refused(hub, publish("publish.directory=pruned"))
    assert f"contains {folder / 'swap'}" in line and "pruned/manifest.json" in line


def test_what_is_no_finished_directory_is_refused(
    hub: hubs.Hub, folder: Path, publish: Publish
) -> None:
    (folder / "pruned").rename(folder / ".pruned.partial")
    (folder / ".pruned.partial" / "manifest.json").unlink()
    line = refused(hub, publish("publish.directory=.pruned.partial"))
    assert "publish.directory must be a directory written by prune or align" in line
    line = refused(hub, publish("publish.directory=trained"))
    assert "contains the output of train" in line
    line = refused(hub, publish("publish.directory=nowhere"))
    assert "no manifest.json" in line


def test_a_changed_file_is_refused(hub: hubs.Hub, folder: Path, publish: Publish) -> None:
    [shard, *_] = sorted((folder / "pruned").glob("model-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    line = refused(hub, publish("publish.directory=pruned"))
    assert "does not match the SHA-256 in its manifest" in line and not hub.requests


def test_without_a_token_nothing_is_asked(
    hub: hubs.Hub, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    line = refused(hub, publish("publish.directory=pruned"))
    assert "set HF_TOKEN" in line and not hub.requests


def test_a_token_that_may_not_write_is_refused(
    hub: hubs.Hub, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.read_only = True
    line = refused(hub, publish("publish.directory=pruned"))
    assert "publish.repo must be writable with this token" in line
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    line = refused(hub, publish("publish.directory=pruned"))
    assert "(HTTP 401)" in line and "hf_another" not in line


def test_offline_is_said(hub: hubs.Hub, publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = refused(hub, publish("publish.directory=pruned"))
    assert "HF_HUB_OFFLINE is set; unset it" in line


@pytest.mark.parametrize(
    "repo", ["name", "a/b/c", "/name", "owner/", "owner/na me", "o--w/name", "o/n.git", "o/-n"]
)
def test_a_bad_repository_name_is_refused(repo: str) -> None:
    with pytest.raises(lr.LoramError, match=r"publish.repo must be owner/name"):
        load_run(None, ["base=b", "output=o", f"publish.repo={repo}"])


def test_the_default_directory_is_what_users_should_load() -> None:
    settings = ["base=b", "output=o", "publish.repo=a/b"]
    pruned = load_run(None, settings).publish
    assert pruned is not None and pruned.directory == Path("o/pruned")
    aligned = load_run(None, [*settings, "align.corpus.sources=[{path: t.jsonl}]"]).publish
    assert aligned is not None and aligned.directory == Path("o/aligned")
    quantized = load_run(None, [*settings, "quantize={}"]).publish
    assert quantized is not None and quantized.directory == Path("o/quantized")
