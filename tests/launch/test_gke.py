"""A JobSet for GKE: the manifest against what Kubernetes and the slices say, and a stand-in for kubectl."""

import json
import shlex
import sys

import pytest
import yaml

from llava_cot_jax.planning.slices import GENERATIONS, Slice
from tests.launch.laptop import Laptop

KUBECTL = f"""#!{sys.executable} -SE
import json, os, sys
with open(os.environ["STAND_IN"] + "/kubectl.jsonl", "a") as calls:
    calls.write(json.dumps([sys.argv[1:], sys.stdin.read()]) + "\\n")
sys.exit(int(os.environ.get("KUBECTL_CODE", "0")))
"""
TRAIN = ["python", "-m", "llava_cot_jax.train", "--output", "gs://bucket/run"]
IMAGE = "--image=us-docker.pkg.dev/mine/repo/llava_cot_jax:1"
OFFERED = [Slice(generation, shape) for generation in GENERATIONS.values() for shape in generation.shapes]


@pytest.fixture
def cluster(laptop: Laptop) -> Laptop:
    """A laptop that has kubectl."""
    kubectl = laptop.folder / "bin/kubectl"
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    return laptop


def kubectl_calls(laptop: Laptop) -> list[tuple[list[str], str]]:
    path = laptop.folder / "kubectl.jsonl"
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def job_of(manifest: str) -> dict:
    jobs = yaml.safe_load(manifest)["spec"]["replicatedJobs"]
    assert len(jobs) == 1
    return jobs[0]


def pod_of(manifest: str) -> dict:
    return job_of(manifest)["template"]["spec"]["template"]["spec"]


def test_a_rehearsal_prints_what_kubectl_would_get(cluster):
    arguments = ["one", "--topology=v5e:8x8", IMAGE, "--context=east", "--namespace=research", "--", *TRAIN]
    rehearsal = cluster.run("gke", *arguments[:1], "--dry-run", *arguments[1:])
    assert rehearsal.returncode == 0, rehearsal.stderr
    assert kubectl_calls(cluster) == []
    done = cluster.run("gke", *arguments)
    assert done.returncode == 0, done.stderr
    [(called, manifest)] = kubectl_calls(cluster)
    assert called == ["--context=east", "--namespace=research", "apply", "--filename=-"]
    assert rehearsal.stdout == f"{manifest}# this manifest goes to: {shlex.join(['kubectl', *called])}\n"
    assert "kubectl --context=east --namespace=research delete jobset one" in done.stdout


def test_a_cluster_that_refuses(cluster):
    cluster.environment["KUBECTL_CODE"] = "1"
    done = cluster.run("gke", "one", "--topology=v5e:2x2", IMAGE, "--", *TRAIN)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: kubectl did not accept the JobSet\n")


@pytest.mark.parametrize("slice_", [s for s in OFFERED if s.shape != (1, 1, 1)], ids=lambda s: s.name)
@pytest.mark.parametrize("count", [1, 3])
def test_the_pods_take_every_chip_of_the_slices_that_plan_names(cluster, slice_, count):
    topology = Slice(slice_.generation, slice_.shape, count).name
    done = cluster.run("gke", "one", f"--topology={topology}", IMAGE, "--dry-run", "--", *TRAIN)
    job, pod = job_of(done.stdout), pod_of(done.stdout)
    assert job["replicas"] == count
    hosts = job["template"]["spec"]["completions"]
    assert job["template"]["spec"]["parallelism"] == hosts
    assert hosts * pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == slice_.chips
    nodes = {name.removeprefix("cloud.google.com/gke-tpu-"): value for name, value in pod["nodeSelector"].items()}
    # As cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus names them.
    kind = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}[slice_.generation.name]
    assert nodes == {"accelerator": kind, "topology": "x".join(map(str, slice_.shape))}


def test_any_word_reaches_the_container_as_it_is(cluster):
    words = [*TRAIN, "--tag", "it's", 'two "words"', "back\\slash", "ünï", "#no", "{a: 1}", "", "$HOME", "`id`"]
    manifest = cluster.run("gke", "one", "--topology=v6e:1x1", IMAGE, "--dry-run", "--", *words, "$(HOME)").stdout
    # In a command Kubernetes puts variables for $(NAME), and writes $$( as $(.
    assert pod_of(manifest)["containers"][0]["command"] == [*words, "$$(HOME)"]


def test_spot_and_an_account_of_its_own(cluster):
    arguments = ["one", "--topology=v6e:4x4", IMAGE, "--restarts=7", "--dry-run"]
    plain = cluster.run("gke", *arguments, "--", *TRAIN).stdout
    spot = cluster.run("gke", *arguments, "--spot", "--service-account=trainer", "--", *TRAIN).stdout
    assert "serviceAccountName" not in pod_of(plain)
    assert pod_of(spot)["serviceAccountName"] == "trainer"
    # A selector of nodes takes strings alone.
    assert pod_of(spot)["nodeSelector"].items() - pod_of(plain)["nodeSelector"].items() == {
        ("cloud.google.com/gke-spot", "true")
    }
    assert yaml.safe_load(spot)["spec"]["failurePolicy"]["maxRestarts"] == 7


def test_a_mistake_of_the_user_is_not_repeated(cluster):
    """Code 2 fails a job for a reason for which the set does not start again."""
    manifest = cluster.run("gke", "one", "--topology=v6e:4x4", IMAGE, "--dry-run", "--", *TRAIN).stdout
    job = job_of(manifest)["template"]["spec"]
    [rule] = job["podFailurePolicy"]["rules"]
    container = pod_of(manifest)["containers"][0]["name"]
    assert rule == {"action": "FailJob", "onExitCodes": {"containerName": container, "operator": "In", "values": [2]}}
    assert pod_of(manifest)["restartPolicy"] == "Never"
    assert yaml.safe_load(manifest)["spec"]["failurePolicy"]["rules"] == [
        {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
