"""Clusters: one that grows and shrinks and loses nodes, and the files that make them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import local_cluster
import psutil
import pytest
import yaml

from helpers.tasks import TRAIN, alone, same, write_tasks
from helpers.training import wait_for_steps
from loram_ray.config import load_run
from loram_ray.runtime.progress import METRICS_FILE
from loram_ray.studies.tasks import tasks_of

LORAM = Path(sys.executable).with_name("loram")


def gpus_of(local: local_cluster.Local) -> int:
    """GPUs that the living nodes of a cluster say they have.

    Ray prints what befell a node to the same stream, in front of the answer or behind it.
    """
    code = (
        "import ray, sys; ray.init(address='auto', logging_level='ERROR', log_to_driver=False);"
        "sys.stdout.write('\\nGPUs: %d\\n' % ray.cluster_resources().get('GPU', 0))"
    )
    environment = {**os.environ, **local.environment, "RAY_ADDRESS": f"127.0.0.1:{local.port}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    found = re.search(r"^GPUs: (\d+)$", done.stdout, re.MULTILINE)
    assert found, done.stdout
    return int(found[1])


def workers_of(local: local_cluster.Local) -> list[psutil.Process]:
    """The nodes that the autoscaler has started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            ours = any(str(local.folder) in part for part in line)
            if line and line[0].endswith("raylet") and ours and "--head" not in line:
                found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_a_batch_has_the_cluster_grow_and_shrink_and_survives_a_lost_node(
    pruned: Path, tmp_path: Path, until_the_end: contextlib.ExitStack
) -> None:
    data = write_tasks(tmp_path / "data", 3)
    settings: dict[str, Any] = {
        "base": "unused",
        "output": str(tmp_path / "out"),
        "ray": {"address": "auto", "autoscaling": "gpu"},
        "batch": {
            "base": None,
            "model": str(pruned),
            "tasks": [{"data": f"{data}/*.jsonl"}],
            "train": {**TRAIN, "steps": 60, "checkpoint_every": 10},
            "workers": 2,
        },
    }
    file = tmp_path / "batch.yaml"
    file.write_text(yaml.safe_dump(settings))
    with (
        tempfile.TemporaryDirectory(prefix="loram-") as folder,
        local_cluster.cluster(
            Path(folder), workers=0, gpus=1, autoscale=2, idle_minutes=0.1
        ) as local,
    ):
        assert gpus_of(local) == 0
        environment = {
            **os.environ, **local.environment, "RAY_ADDRESS": f"127.0.0.1:{local.port}"
        }  # fmt: skip
        with (tmp_path / "log").open("w") as log:
            driver = subprocess.Popen(
                [LORAM, "batch", "--config", file], env=environment, stdout=log, stderr=log
            )
        until_the_end.callback(driver.kill)
        work = tmp_path / "out" / "batch" / "task0" / ".adapter.work"
        wait_for_steps(work / METRICS_FILE, 20, seconds=300)
        grown = gpus_of(local)
        victim = max(workers_of(local), key=lambda process: process.create_time())
        victim.kill()
        assert driver.wait(600) == 0, (tmp_path / "log").read_text()
        deadline = time.monotonic() + 180
        while gpus_of(local):
            assert time.monotonic() < deadline, "no node went"
            time.sleep(2)
    assert grown == 2
    config = load_run(file).batch
    assert config is not None
    for task in tasks_of(config):
        assert same(task.train.output, alone(task, tmp_path / f"alone-{task.name}"))


# Files

CLUSTER = Path(__file__).parents[2] / "cluster"
LAUNCHER = ("aws", "gcp", "azure")
# Fields of KubeRay's v1 types that the files use; checked by hand against the schemas in the
# CRDs of KubeRay 1.7.0, in which both files are valid, pods included.
_GROUP = {"rayStartParams": dict, "template": dict}
_CLUSTER: dict[str, Any] = {
    "rayVersion": str,
    "authOptions": {"mode": str},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {
        "version": str,
        "idleTimeoutSeconds": int,
        "upscalingMode": str,
        "resources": dict,
    },
    "headGroupSpec": {"serviceType": str, **_GROUP},
    "workerGroupSpecs": [
        {"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, **_GROUP}
    ],
}
KUBERAY: dict[str, dict[str, Any]] = {
    "RayCluster": _CLUSTER,
    "RayJob": {
        "entrypoint": str,
        "backoffLimit": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "rayClusterSpec": _CLUSTER,
    },
}


def assert_of(value: Any, kind: Any, path: str) -> None:
    if isinstance(kind, type):
        assert isinstance(value, kind), path
    elif isinstance(kind, list):
        for one in value:
            assert_of(one, kind[0], f"{path}[]")
    else:
        assert value.keys() == kind.keys(), path
        for name, one in value.items():
            assert_of(one, kind[name], f"{path}.{name}")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / f"{name}.yaml").read_text()))


def pod_of(group: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **group["template"]}


def pinned(name: str) -> str:
    lines = (CLUSTER.parent / "constraints.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{name}=="))


@pytest.mark.parametrize("cloud", LAUNCHER)
def test_a_launcher_file_is_valid_and_costs_nothing_while_idle(cloud: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (config,) = documents(cloud)
    validate_config(prepare_config(config))
    nodes = config["available_node_types"]
    assert config["provider"]["type"] == cloud
    assert nodes.keys() == {"head", "user", "publisher"}
    assert nodes["head"]["resources"] == {"CPU": 0}
    assert (nodes["user"]["resources"]["GPU"], nodes["publisher"]["resources"]["GPU"]) == (1, 8)
    assert nodes["user"]["min_workers"] == nodes["publisher"]["min_workers"] == 0
    assert config["max_workers"] == sum(nodes[n]["max_workers"] for n in ("user", "publisher"))
    assert config["idle_timeout_minutes"] == 5
    spot = {kind: "spot" in str(node["node_config"]).lower() for kind, node in nodes.items()}
    assert spot == {"head": False, "user": True, "publisher": False}


@pytest.mark.parametrize("cloud", LAUNCHER)
def test_a_launched_cluster_asks_for_a_token_and_shows_no_dashboard(cloud: str) -> None:
    (config,) = documents(cloud)
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    text = str(config)
    assert "0.0.0.0" not in text and "--ray-client-server" not in text


def test_nobody_outside_reaches_ssh_but_where_a_firewall_of_the_user_says_so() -> None:
    """Azure's rules are Ray's own and let in everybody; AWS' and GCP's are the user's."""
    azure, gcp, aws = (documents(cloud)[0] for cloud in ("azure", "gcp", "aws"))
    assert azure["provider"]["use_internal_ips"] is True
    assert "use_external_head_ip" not in azure["provider"]
    for kind, node in gcp["available_node_types"].items():
        (interface,) = node["node_config"]["networkInterfaces"]
        assert "REPLACE" in interface["subnetwork"]
        assert ("accessConfigs" in interface) == (kind == "head")
    for node in aws["available_node_types"].values():
        assert node["node_config"]["SecurityGroupIds"] == ["sg-REPLACE"]


def test_azure_workers_cannot_ask_for_the_head_s_identity() -> None:
    (config,) = documents("azure")
    common = config["initialization_commands"]
    for kind, node in config["available_node_types"].items():
        if kind == "head":
            assert "initialization_commands" not in node
            continue
        first, *others = node["initialization_commands"]
        assert first == "sudo iptables -I OUTPUT -d 169.254.169.254 -j REJECT"
        assert others == common  # which these replace


def test_the_network_policy_names_the_operator_as_kuberay_labels_it() -> None:
    """The chart's and the kustomize files' pods have this label; their names differ."""
    policy = next(one for one in documents("raycluster") if one["kind"] == "NetworkPolicy")
    _, operator = policy["spec"]["ingress"][0]["from"]
    labels = {"app.kubernetes.io/component": "kuberay-operator"}
    assert operator["podSelector"]["matchLabels"] == labels


def test_only_the_head_may_do_anything_in_the_account() -> None:
    (config,) = documents("aws")
    nodes = config["available_node_types"]
    with_profile = [k for k, n in nodes.items() if "IamInstanceProfile" in n["node_config"]]
    assert with_profile == ["head"]
    policy = json.loads((CLUSTER / "aws-head-policy.json").read_text())
    name = config["cluster_name"]
    for statement in policy["Statement"]:
        actions = statement["Action"]
        for action in [actions] if isinstance(actions, str) else actions:
            assert "*" not in action
            if action == "ec2:TerminateInstances":
                tags = statement["Condition"]["StringEquals"]
                assert tags == {"aws:ResourceTag/ray-cluster-name": name}
    for node in nodes.values():
        assert node["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_kubernetes_files_are_of_the_published_types(name: str) -> None:
    for document in documents(name):
        if document["kind"] not in KUBERAY:
            kubernetes_validate.validate(document, "1.33", strict=True)
            continue
        assert document["apiVersion"] == "ray.io/v1"
        assert_of(document["spec"], KUBERAY[document["kind"]], document["kind"])
        spec = document["spec"].get("rayClusterSpec", document["spec"])
        assert spec["rayVersion"] == pinned("ray")
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["autoscalerOptions"]["version"] == "v2"
        assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            pod = pod_of(group)
            kubernetes_validate.validate(pod, "1.33", strict=True)
            assert pod["spec"]["securityContext"]["runAsNonRoot"]
            assert group.get("minReplicas", 0) == group.get("replicas", 0) == 0
        workers = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
        assert workers.keys() == {"user", "publisher"}
        assert all(
            not w["template"]["spec"]["automountServiceAccountToken"] for w in workers.values()
        )


def test_a_fault_in_a_kubernetes_file_is_seen() -> None:
    spec = documents("raycluster")[-1]["spec"]
    with pytest.raises(AssertionError):
        assert_of({**spec, "rayVersions": "2"}, _CLUSTER, "RayCluster")
    pod = pod_of(spec["headGroupSpec"])
    pod["spec"]["containers"][0]["imag"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, "1.33", strict=True)


def test_the_image_has_this_version_of_ray_and_files_that_exist() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    assert f"FROM rayproject/ray:{pinned('ray')}-py311-gpu" in lines
    assert "USER ray" in lines
    for line in lines:
        if line.startswith("COPY"):
            for source in line.split()[2:-1]:
                assert (CLUSTER.parent / source).exists(), source


def test_what_a_job_on_kubernetes_runs_is_a_command() -> None:
    (job,) = documents("rayjob")
    line = job["spec"]["entrypoint"].partition("&& ")[2].split()
    assert line[:2] == ["loram", "batch"]
    overrides = [line[n + 1] for n, part in enumerate(line) if part == "--set"]
    found = load_run(None, ["base=b", "output=o", *overrides])
    assert (found.ray.address, found.ray.autoscaling) == ("auto", "gpu")
