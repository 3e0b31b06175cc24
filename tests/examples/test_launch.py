"""examples/launch against the tools and schemas that read it, and against r1's own command line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from r1.engine.cli import _parser
from r1.engine.config import load_config

LAUNCH = Path(__file__).parents[2] / "examples" / "launch"
SBATCH, PYTORCHJOB = LAUNCH / "slurm.sbatch", LAUNCH / "pytorchjob.yaml"
DOCUMENT = (LAUNCH.parents[1] / "docs" / "clusters.md").read_text(encoding="utf-8")


def test_the_batch_file_is_bash() -> None:
    result = subprocess.run(["bash", "-n", str(SBATCH)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="Slurm's sbatch is not installed")
def test_slurm_takes_every_option(tmp_path: Path) -> None:
    """sbatch reads the file before it looks for a controller; here there is none to find."""
    configuration = """ClusterName=none
SlurmctldHost=localhost
SlurmctldPort=1
MessageTimeout=1
GresTypes=gpu
NodeName=localhost CPUs=96 Gres=gpu:8
PartitionName=p Nodes=ALL
"""
    (tmp_path / "slurm.conf").write_text(configuration)

    def answer(text: str) -> str:
        (tmp_path / "job").write_text(text)
        command = ["sbatch", "--test-only", str(tmp_path / "job"), "run", "pretrain"]
        environment = {**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False).stderr

    text = SBATCH.read_text()
    assert "allocation failure" in answer(text) and "rror" not in answer(text)
    assert len(re.findall("^#SBATCH ", text, re.MULTILINE)) >= 10
    assert "unrecognized option '--opn-mode=append'" in answer(text.replace("--open-mode", "--opn-mode"))
    assert "rror" in answer(text.replace("--mem=0", "--mem=all"))


def strictly(value: Any, kind: str, models: Any, at: str) -> list[str]:
    """What in `value` is not of the schema: unknown keys, absent required ones, wrong types."""
    if match := re.fullmatch(r"list\[(.*)\]", kind):
        if not isinstance(value, list):
            return [f"{at}: wanted a list"]
        return [p for i, item in enumerate(value) for p in strictly(item, match[1], models, f"{at}[{i}]")]
    if match := re.fullmatch(r"dict\(str, (.*)\)", kind):
        if not isinstance(value, dict):
            return [f"{at}: wanted a mapping"]
        return [p for key, item in value.items() for p in strictly(item, match[1], models, f"{at}.{key}")]
    if kind in ("str", "int", "bool"):
        # Kubernetes takes quantities such as 8 and 64Gi alike, where the schema says str.
        wanted = {"str": (str, int) if ".requests." in at or ".limits." in at else str, "int": int, "bool": bool}[kind]
        return [] if isinstance(value, wanted) else [f"{at}: {value!r} is no {kind}"]
    model = getattr(models[0], kind, None) or getattr(models[1], kind, None)
    if model is None:
        return [] if kind == "object" else [f"{at}: no model {kind}"]
    if not isinstance(value, dict):
        return [f"{at}: wanted a {kind}"]
    fields = {name: (field, model.openapi_types[field]) for field, name in model.attribute_map.items()}
    problems = [f"{at}.{name}: unknown in {kind}" for name in value if name not in fields]
    given = {fields[name][0]: item for name, item in value.items() if name in fields}
    try:
        model(**given)  # a required field that is absent, a value that is not one of those allowed
    except ValueError as error:
        problems.append(f"{at}: {error}")
    for name, item in value.items():
        if name in fields:
            problems += strictly(item, fields[name][1], models, f"{at}.{name}")
    return problems


def problems_of(documents: list[dict[str, Any]]) -> list[str]:
    kubeflow = pytest.importorskip("kubeflow.training.models")
    kubernetes = pytest.importorskip("kubernetes.client.models")
    kinds = {"PyTorchJob": "KubeflowOrgV1PyTorchJob", "PersistentVolumeClaim": "V1PersistentVolumeClaim"}
    return [p for d in documents for p in strictly(d, kinds[d["kind"]], (kubeflow, kubernetes), d["kind"])]


def test_the_job_is_of_kubeflow_s_schema() -> None:
    documents = list(yaml.safe_load_all(PYTORCHJOB.read_text()))
    assert [document["kind"] for document in documents] == ["PersistentVolumeClaim", "PyTorchJob"]
    assert problems_of(documents) == []


def test_the_schema_is_held_strictly() -> None:
    """The check finds a key that nobody knows, a wrong type, and a part left out, however deep."""
    claim, job = yaml.safe_load_all(PYTORCHJOB.read_text())
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    container = worker["template"]["spec"]["containers"][0]
    container["volumeMount"] = container.pop("volumeMounts")
    container["env"].append({"value": "nameless"})
    worker["replicas"] = "64"
    job["spec"]["elasticPolicy"]["maxReplica"] = 64
    found = "\n".join(problems_of([claim, job]))
    for part in ("volumeMount: unknown", "env[10]", "replicas: '64' is no int", "maxReplica: unknown"):
        assert part in found
    assert len(found.splitlines()) == 4


def test_the_job_is_consistent_and_its_command_is_r1_s() -> None:
    claim, job = yaml.safe_load_all(PYTORCHJOB.read_text())
    elastic, worker = job["spec"]["elasticPolicy"], job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert elastic["minReplicas"] == elastic["maxReplicas"] == worker["replicas"]
    pod = worker["template"]["spec"]
    container = pod["containers"][0]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    command = container["command"]
    options = _parser().parse_args(command[command.index("r1.engine") + 1 :])
    config = load_config(options.config, options.set)
    gpus = worker["replicas"] * container["resources"]["limits"]["nvidia.com/gpu"]
    assert gpus == config.plan.gpus and int(job["spec"]["nprocPerNode"]) == 8
    config.parallel.data(gpus)  # the layout divides the world
    assert config.run_dir.startswith(container["volumeMounts"][0]["mountPath"])


def test_every_command_of_the_document_is_r1_s() -> None:
    """Lines of the document that start r1 parse; a torchrun line parses as torchrun's own parser sees it."""
    from torch.distributed.run import get_args_parser

    lines = [line.strip() for line in DOCUMENT.replace("\\\n", " ").splitlines()]
    launched = [line.split("  #")[0].split() for line in lines if line.startswith("torchrun ")]
    assert len(launched) >= 3
    for words in launched:
        parsed = get_args_parser().parse_args(words[1:])
        assert parsed.module and parsed.training_script == "r1.engine", words
        _parser().parse_args(parsed.training_script_args)
    for line in lines:
        if line.startswith("r1 "):
            _parser().parse_args(line.split("  #")[0].split()[1:])


def test_every_nccl_setting_says_why() -> None:
    """The line above each setting of NCCL in both files is a comment (in the job, above a run of settings)."""
    for path in (SBATCH, PYTORCHJOB):
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            if re.search(r"export NCCL_|name: NCCL_", line) and not line.lstrip().startswith("#"):
                before = number - 1
                while "export" in lines[before] or "name: " in lines[before]:
                    before -= 1
                assert lines[before].lstrip().startswith("#"), line
