"""The templates for clusters, without one: linters, schemas, and stand-ins on PATH.

A stand-in writes down what it was asked, and answers what the test says. The one for srun starts
two real processes, which find each other the way Slurm's do.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from cluster import local

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "launch" / "cluster"
SCRIPTS = sorted([*CLUSTER.rglob("*.sh"), *CLUSTER.rglob("*.sbatch")])
JOBSETS = sorted(CLUSTER.glob("k8s/*.yaml"))
ENVIRONMENTS = sorted(CLUSTER.glob("env/*.env"))

# What the processes must agree on, and one sum over all of them.
PROGRAM = """
import os, sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
keys = "COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"
told = [os.environ.get(f"JAX_{key}") for key in keys]
told = (told[0], int(told[1]), int(told[2])) if all(told) else ()
jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize(*told, initialization_timeout=60)
mesh = jax.make_mesh((jax.process_count(),), ("hosts",), axis_types=(AxisType.Auto,))
mine = np.array([1.0 + jax.process_index()])
all_of_it = jax.make_array_from_process_local_data(
    NamedSharding(mesh, PartitionSpec("hosts")), mine)
total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))(all_of_it)
with open(f"said-{jax.process_index()}", "w") as said:
    print(float(total), jax.process_count(), *sys.argv[1:], file=said)
"""


def tool(name):
    """A linter of the test extra, wherever this Python or PATH has it."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return found or pytest.skip(f"{name} is not installed: pip install -e '.[test]'")


def environment(**given):
    """This process's, without what decides how a program is launched, and with what is given."""
    deciding = ("JAX_", "LIBTPU_", "NCCL_", "SKYPILOT_", "SLURM_", "TPU_", "XLA_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(deciding)}
    return kept | {key: str(value) for key, value in given.items()}


def run(*command, cwd=ROOT, given="", **variables):
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, input=given,
        env=environment(**variables), capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def python(source):
    return f"#!{sys.executable} -SE\n{source}"  # without packages: starts at once


class StandIns:
    """Programs on PATH that note their arguments; `asked(name)` has them, call by call."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        self.path = f"{folder}:{os.environ['PATH']}"

    def add(self, name, source="#!/bin/sh\n"):
        first, rest = source.split("\n", 1)
        note = f'{{ printf "%s\\n" "$@"; echo; }} >> {self.folder}/{name}.asked\n'
        if "python" in first:
            note = (
                f"import sys\nwith open('{self.folder}/{name}.asked', 'a') as file:\n"
                "    print(*sys.argv[1:], '', sep='\\n', file=file)\n"
            )
        (self.folder / name).write_text(f"{first}\n{note}{rest}")
        (self.folder / name).chmod(0o755)

    def asked(self, name):
        file = self.folder / f"{name}.asked"
        calls = file.read_text().split("\n\n")[:-1] if file.exists() else []
        return [call.split("\n") for call in calls]


@pytest.fixture
def stand_ins(tmp_path):
    return StandIns(tmp_path / "bin")


@pytest.fixture
def tree(tmp_path):
    """The templates in a repository whose launch/train.py is a stand-in as well."""
    shutil.copytree(CLUSTER, tmp_path / "launch" / "cluster")
    (tmp_path / "recipe.py").write_text("")
    (tmp_path / "launch" / "train.py").write_text(
        "import json, os, sys\n"
        "rank = os.environ.get('JAX_PROCESS_ID', '0')\n"
        "with open(f'said-{rank}.json', 'w') as said:\n"
        "    json.dump({'arguments': sys.argv[1:], 'environment': dict(os.environ),\n"
        "               'pid': os.getpid()}, said)\n"
    )
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    return tmp_path


def said(tree, rank):
    return json.loads((tree / f"said-{rank}.json").read_text())


# ---------------------------------------------------------------------------------------- linters


def test_scripts_are_sound():
    assert SCRIPTS and all(os.access(script, os.X_OK) for script in SCRIPTS)
    for script in SCRIPTS:
        assert run("bash", "-n", script).returncode == 0
    checked = run(tool("shellcheck"), "-x", *(script.relative_to(ROOT) for script in SCRIPTS))
    assert not checked.stdout


def test_yaml_is_clean():
    rules = (
        "{extends: default, rules: {line-length: {max: 100}, document-start: disable,"
        " comments: {min-spaces-from-content: 2}}}"
    )
    checked = run(tool("yamllint"), "--strict", "-d", rules, CLUSTER)
    assert not checked.stdout


def test_the_image_is_built_from_what_is_there():
    checked = run(tool("hadolint"), CLUSTER / "Dockerfile")
    assert not checked.stdout
    for copied in re.findall(r"^COPY (.+) \S+$", (CLUSTER / "Dockerfile").read_text(), re.M):
        assert all((ROOT / name).exists() for name in copied.split())


def test_the_readme_names_files_that_are_there():
    text = (CLUSTER / "README.md").read_text()
    named = set(re.findall(r"launch/[\w/.]+\w", text))
    short = re.findall(r"`((?:(?!launch)\w+/)?[\w-]+\.\w+|Dockerfile)`", text)
    named |= {f"launch/cluster/{name}" for name in short}
    assert len(named) > 8 and all((ROOT / name).exists() for name in named), named


# -------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize(
    "statuses, status",
    [
        ([0, 0], 0),
        ([143, 143], 143),
        ([0, 143], 143),
        ([1, 143], 1),
        ([137, 1, 137], 1),
        ([1, 2, 137], 2),
        ([134, 0], 134),
    ],
)
def test_a_launchers_status_is_what_decides_whether_to_run_again(statuses, status):
    assert local.verdict(statuses) == status


@pytest.mark.parametrize(
    "words, complaint",
    [
        ("--processes 2", "command"),
        ("--processes 0 -- true", "at least 1"),
        ("--processes 1 --nodes 2 --node 2 --coordinator a:1 -- true", "from 0"),
        ("--processes 1 --nodes 2 -- true", "--coordinator"),
        ("--processes 1 -- no-such-program", "no-such-program"),
    ],
)
def test_mistakes_in_a_launch_end_with_status_2(words, complaint):
    ended = run(sys.executable, CLUSTER / "local.py", *words.split())
    assert ended.returncode == 2 and complaint in ended.stderr.splitlines()[-1]


def test_processes_are_told_who_they_are(tree):
    for node in (0, 1):
        ended = run(
            sys.executable, CLUSTER / "local.py", "--processes=2", "--nodes=2", f"--node={node}",
            "--coordinator=first:8476", "--", sys.executable, "launch/train.py", "--some=flag",
            cwd=tree,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
    for rank in range(4):
        told = said(tree, rank)["environment"]
        assert told["JAX_COORDINATOR_ADDRESS"] == "first:8476"
        assert told["JAX_NUM_PROCESSES"] == "4"
        assert told["JAX_LOCAL_DEVICE_IDS"] == str(rank % 2)
        assert said(tree, rank)["arguments"] == ["--some=flag"]


def test_one_process_keeps_all_devices_of_its_machine():
    given = local.arguments("--processes 1 -- true".split())
    assert "JAX_LOCAL_DEVICE_IDS" not in local.contract(given, 0)
    assert given.coordinator.startswith("127.0.0.1:")


@pytest.mark.parametrize("end, status", [("exit 7", 7), ("kill -TERM $$; sleep 60", 143)])
def test_a_failure_ends_the_others(monkeypatch, end, status):
    """SIGTERM, too, before a process listens to it: the others would wait for it to begin."""
    monkeypatch.setattr(local, "LAST_WORDS", 0.2)
    script = f'if [ "$JAX_PROCESS_ID" = 1 ]; then {end}; fi; exec sleep 60'
    began = time.monotonic()
    processes = local.start(local.arguments(["--processes=3", "--", "bash", "-c", script]))
    assert local.wait(processes, []) == [137, status, 137]
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_every_process_once(tmp_path, number):
    saves = (
        "import os, signal, sys, time\n"
        "rank, caught = os.environ['JAX_PROCESS_ID'], []\n"
        "for number in (signal.SIGTERM, signal.SIGINT):\n"
        "    signal.signal(number, lambda number, frame: caught.append(number))\n"
        "open(f'ready-{rank}', 'w').close()\n"
        "while not caught: time.sleep(0.02)\n"
        "time.sleep(0.2)\n"
        "sys.exit(143 if len(caught) == 1 else 1)\n"
    )
    launched = [CLUSTER / "local.py", "--processes=2", "--", sys.executable, "-c", saves]
    # A session of its own, as a terminal's: Ctrl-C there goes to the whole group.
    with subprocess.Popen(
        [sys.executable, *launched], cwd=tmp_path, start_new_session=True
    ) as launcher:
        while len(list(tmp_path.glob("ready-*"))) < 2:
            assert launcher.poll() is None
            time.sleep(0.02)
        os.killpg(launcher.pid, number)
        assert launcher.wait(timeout=60) == 143


@pytest.mark.slow
def test_local_processes_are_one_program(tmp_path):
    ended = run(
        sys.executable, CLUSTER / "local.py", "--processes=2", "--", sys.executable, "-c", PROGRAM,
        cwd=tmp_path, JAX_PLATFORMS="cpu",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert [(tmp_path / f"said-{rank}").read_text() for rank in (0, 1)] == ["3.0 2\n"] * 2


# ------------------------------------------------------------------------------------------ Slurm

SBATCH = "launch/cluster/slurm/train.sbatch"
SBATCH_KEYS = {
    "job-name", "nodes", "ntasks-per-node", "cpus-per-task", "time", "output", "open-mode",
    "requeue", "signal",
}  # fmt: skip


def submitted(tree, stand_ins, *arguments, **variables):
    variables = {
        "PATH": stand_ins.path, "CONFIG": "recipe.py", "WORKDIR": "/shared/run", "SLURM_JOB_ID": 7,
        "PYTHON": sys.executable, **variables,
    }  # fmt: skip
    return run("bash", SBATCH, *arguments, cwd=tree, **variables)


def test_sbatch_options_are_ones_that_sbatch_has():
    lines = (ROOT / SBATCH).read_text().splitlines()
    options = dict(
        re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line).groups()
        for line in lines
        if line.startswith("#SBATCH")
    )
    assert options.keys() == SBATCH_KEYS
    assert options["signal"] == "TERM@180"  # not B:, which would signal the shell alone
    assert options["open-mode"] == "append"  # a requeued job goes on in the same file
    # sbatch reads options up to the first command.
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])


@pytest.mark.parametrize(
    "status, requeued", [(0, 0), (1, 3), (2, 0), (130, 0), (134, 3), (137, 3), (143, 5)]
)
def test_slurm_runs_again_what_may_go_on(tree, stand_ins, status, requeued):
    stand_ins.add("srun", f"#!/bin/sh\nexit {status}\n")
    stand_ins.add("scontrol")
    for _ in range(5):
        assert submitted(tree, stand_ins).returncode == status
    assert stand_ins.asked("scontrol") == [["requeue", "7"]] * requeued


@pytest.mark.parametrize(
    "variables, complaint",
    [
        ({"CONFIG": ""}, "CONFIG is not set"),
        ({"WORKDIR": ""}, "WORKDIR is not set"),
        ({"CONFIG": "no.py"}, "CONFIG=no.py"),
        ({"PYTHON": "no-python"}, "PYTHON=no-python"),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "1"}, "--ntasks-per-node=8"),
        ({"SLURM_GPUS_PER_TASK": "1"}, "--gpus-per-node"),
    ],
)
def test_mistakes_in_a_submission_are_one_line_and_final(tree, stand_ins, variables, complaint):
    stand_ins.add("srun")
    stand_ins.add("scontrol")
    ended = submitted(tree, stand_ins, **variables)
    assert ended.returncode == 2 and not stand_ins.asked("srun") + stand_ins.asked("scontrol")
    assert complaint in ended.stderr and ended.stderr.count("\n") == 1


def test_slurm_starts_the_launcher_with_the_settings_of_gpus(tree, stand_ins):
    stand_ins.add("srun", '#!/bin/sh\nshift 2\nexec "$@"\n')
    gpus = dict(SLURM_GPUS_ON_NODE=2, SLURM_NTASKS_PER_NODE=2, SLURM_CPUS_PER_TASK=6)
    own = dict(XLA_FLAGS="--my=flag --and=mine", http_proxy="http://proxy:3128")
    ended = submitted(tree, stand_ins, "--config.seed=1", **gpus, **own)
    assert ended.returncode == 0, ended.stderr
    assert said(tree, 0)["arguments"] == [
        "--config", "recipe.py", "--workdir", "/shared/run", "--config.seed=1",
    ]  # fmt: skip
    (asked,) = stand_ins.asked("srun")
    assert asked[:2] == ["--kill-on-bad-exit=0", "--wait=300"]
    told = said(tree, 0)["environment"]
    assert told["XLA_FLAGS"] == own["XLA_FLAGS"]  # what is set already wins
    assert told["JAX_PLATFORMS"] == "cuda,cpu" and told["SRUN_CPUS_PER_TASK"] == "6"
    assert "http_proxy" not in told
    assert submitted(tree, stand_ins).returncode == 0  # no GPUs
    assert "NCCL_DEBUG" not in said(tree, 0)["environment"]


@pytest.mark.slow
def test_slurms_processes_are_one_program(tree, stand_ins):
    stand_ins.add(
        "srun",
        python(
            "import os, subprocess\n"
            "job = {'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '2'}\n"
            "tasks = [subprocess.Popen(sys.argv[3:], env=os.environ | job |\n"
            "                          {'SLURM_PROCID': rank, 'SLURM_LOCALID': rank})\n"
            "         for rank in '01']\n"
            "sys.exit(max(task.wait() for task in tasks))\n"
        ),
    )
    (tree / "launch" / "train.py").write_text(PROGRAM)
    job = os.getpid() + 20000  # Slurm's number picks the port
    ended = submitted(tree, stand_ins, SLURM_JOB_ID=job, JAX_PLATFORMS="cpu")
    assert ended.returncode == 0, ended.stderr
    arguments = "--config recipe.py --workdir /shared/run"
    assert [(tree / f"said-{rank}").read_text() for rank in (0, 1)] == [f"3.0 2 {arguments}\n"] * 2


# -------------------------------------------------------------------------------------------- TPU

# Of gcloud's reference, version 528: what each command takes, apart from --zone.
GCLOUD = {
    "queued-resources create": {
        "--node-id", "--accelerator-type", "--runtime-version", "--spot",
    },
    "queued-resources delete": {"--force", "--quiet"},
    "queued-resources describe": set(),
    "queued-resources list": {"--filter", "--format"},
    "tpu-vm scp": {"--worker"},
    "tpu-vm ssh": {"--worker", "--command", "--ssh-flag"},
}  # fmt: skip
SLICE = dict(NAME="dpo", ZONE="us-west4-a", ACCELERATOR="v5litepod-16", POLL=0)


def add_gcloud(stand_ins, states=(), statuses=(), installs=()):
    """`states` of the slice, look by look, and exit `statuses` of the runs on it."""
    answers = stand_ins.folder / "answers.json"
    given = {"states": states, "statuses": statuses, "installs": installs or [0] * len(statuses)}
    answers.write_text(json.dumps(given))
    stand_ins.add("git")
    stand_ins.add(
        "gcloud",
        python(
            "import json\n"
            f"answers = json.load(open('{answers}'))\n"
            "kind, status = sys.argv[3:5], 0\n"
            "if kind == ['queued-resources', 'list']: print(answers['states'].pop(0))\n"
            "if 'worker.sh' in ' '.join(sys.argv): status = answers['statuses'].pop(0)\n"
            "if 'uv venv' in ' '.join(sys.argv): status = answers['installs'].pop(0)\n"
            f"json.dump(answers, open('{answers}', 'w'))\n"
            "sys.exit(status)\n"
        ),
    )
    return answers


def asked_of_gcloud(stand_ins):
    """The commands in short: create, list, delete, ...; their flags are checked on the way."""
    short = []
    for service, tpus, group, command, *rest in stand_ins.asked("gcloud"):
        assert (service, tpus) == ("compute", "tpus")
        flags = {word.split("=")[0] for word in rest if re.match("--[a-z]", word)}
        assert flags - GCLOUD[f"{group} {command}"] == {"--zone"}, rest
        trains = "worker.sh" in " ".join(rest)
        short.append("train" if trains else "install" if command == "ssh" else command)
    return [command for command in short if command not in ("list", "scp")]


def tpu(stand_ins, *words, **variables):
    given = SLICE | {"CONFIG": "recipe.py", "WORKDIR": "/runs/a b", "PATH": stand_ins.path}
    return run(CLUSTER / "tpu" / "tpu.sh", *words, **(given | variables))


@pytest.mark.parametrize(
    "states, statuses, status, asked",
    [
        (["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], [0], 0,
         "create install train"),
        (["ACTIVE"] * 2, [143, 0], 0, "install train install train"),
        (["ACTIVE"], [2], 2, "install train"),
        # Taken away: the connection breaks.
        (["ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED", "", "ACTIVE"], [255, 0], 0,
         "install train delete create install train"),
        (["ACTIVE", "SUSPENDED", "SUSPENDED"] * 4 + ["ACTIVE"], [255] * 4 + [0], 0,
         "install train delete " * 4 + "install train"),
        (["ACTIVE"] * 8, [1] * 4, 1, "install train " * 4),
        (["FAILED"], [], 1, "describe"),
    ],
)  # fmt: skip
def test_a_slice_is_watched_until_the_run_is_done(stand_ins, states, statuses, status, asked):
    answers = add_gcloud(stand_ins, states, statuses)
    ended = tpu(stand_ins, "babysit", "--config.seed=1", SPOT=1)
    assert ended.returncode == status, ended.stderr
    assert asked_of_gcloud(stand_ins) == asked.split()
    assert not any(json.loads(answers.read_text()).values())  # all of them were looked at


def test_an_installation_that_fails_is_tried_again_whatever_its_status(stand_ins):
    add_gcloud(stand_ins, ["ACTIVE"] * 3, [0], installs=[2, 0])
    assert tpu(stand_ins, "babysit").returncode == 0
    assert asked_of_gcloud(stand_ins) == ["install", "install", "train"]


def test_what_a_slice_is_asked_for(stand_ins):
    add_gcloud(stand_ins, statuses=[143])
    assert tpu(stand_ins, "create", SPOT=1).returncode == 0
    assert tpu(stand_ins, "create", ACCELERATOR="v4-8", RUNTIME="own").returncode == 0
    assert tpu(stand_ins, "train", "--config.x=it's").returncode == 143
    assert tpu(stand_ins, "delete").returncode == 0
    spot, plain, train, delete = stand_ins.asked("gcloud")
    assert {"--runtime-version=v2-alpha-tpuv5-lite", "--node-id=dpo", "--spot"} < set(spot)
    assert "--runtime-version=own" in plain and "--spot" not in plain
    assert "--worker=all" in train and "--force" in delete
    # The hosts' shell takes the command apart again, as it was given.
    (command,) = (word for word in train if word.startswith("--command="))
    arguments = command.split(" ", 2)[2]
    words = run("bash", "-c", f"printf '%s|' {arguments}")
    assert words.stdout == "--config|recipe.py|--workdir|/runs/a b|--config.x=it's|"


@pytest.mark.parametrize(
    "words, variables, complaint",
    [
        (["train"], {"CONFIG": ""}, "CONFIG is not set"),
        (["babysit"], {"WORKDIR": ""}, "WORKDIR is not set"),
        (["create"], {"ACCELERATOR": ""}, "ACCELERATOR is not set"),
        (["wait"], {"ZONE": ""}, "ZONE is not set"),
        (["dance"], {}, "'dance' is no command"),
    ],
)
def test_mistakes_with_slices_end_with_status_2(stand_ins, words, variables, complaint):
    add_gcloud(stand_ins)
    ended = tpu(stand_ins, *words, **variables)
    assert ended.returncode == 2 and complaint in ended.stderr and not stand_ins.asked("gcloud")


@pytest.mark.parametrize("endpoints", ["10.0.0.4,10.0.0.5", "a:1:10.0.0.4,b:2:10.0.0.5"])
def test_a_tpu_host_learns_who_it_is_from_its_metadata(tree, stand_ins, endpoints):
    stand_ins.add(
        "curl",
        f"#!/bin/sh\ncase $* in *endpoints) echo {endpoints};; *agent-worker-number) echo 1;; "
        "*) exit 22;; esac\n",
    )
    sleeps = "import time; time.sleep(99)"
    before = subprocess.Popen([sys.executable, "-c", sleeps, "launch/train.py"])
    (tree / "train.pid").write_text(f"{before.pid}\n")
    worker = tree / "launch" / "cluster" / "tpu" / "worker.sh"
    with subprocess.Popen(
        [worker, "--config", "recipe.py"], env=environment(PATH=stand_ins.path)
    ) as host:
        assert before.wait(timeout=60) == -signal.SIGTERM  # what an earlier call left running
        assert host.wait(timeout=60) == 0
    told = said(tree, 1)["environment"]
    assert told["JAX_COORDINATOR_ADDRESS"] == "10.0.0.4:8476"
    assert (told["JAX_NUM_PROCESSES"], told["JAX_PROCESS_ID"]) == ("2", "1")
    assert told["JAX_PLATFORMS"] == "tpu,cpu"
    assert said(tree, 1)["arguments"] == ["--config", "recipe.py"]
    # Python took the shell's place, and the signals with it.
    assert said(tree, 1)["pid"] == host.pid == int((tree / "train.pid").read_text())


# ------------------------------------------------------------------------------------- Kubernetes

# Of the JobSet API, jobset.x-k8s.io/v1alpha2 in version 0.10: the fields that the templates use.
JOBSET_FIELDS = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"failurePolicy", "replicatedJobs"},
    "failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
    "rules": {"name", "action", "onJobFailureReasons", "onJobFailureMessagePatterns"},
    "replicatedJobs": {"name", "replicas", "template"},
    "template": {"spec"},
}
ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}


@pytest.fixture(params=JOBSETS, ids=lambda file: file.stem)
def jobset(request):
    return yaml.safe_load(request.param.read_text())


def jobs(jobset):
    head = {"apiVersion": "batch/v1", "kind": "Job"}
    return [
        head | {"metadata": {"name": job["name"]}} | job["template"]
        for job in jobset["spec"]["replicatedJobs"]
    ]


def container(jobset):
    (job,) = jobs(jobset)
    (only,) = job["spec"]["template"]["spec"]["containers"]
    return only


def test_jobs_keep_to_the_schema_of_kubernetes(jobset):
    schemas = pytest.importorskip("kubernetes_validate", reason="pip install -e '.[test]'")
    for job in jobs(jobset):
        schemas.validate(job, "1.31", strict=True)
        job["spec"]["backofLimit"] = job["spec"].pop("backoffLimit")
        with pytest.raises(schemas.ValidationError, match="backofLimit"):
            schemas.validate(job, "1.31", strict=True)


def test_jobsets_keep_to_their_api(jobset):
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = jobset["spec"]
    parts = [("", jobset), ("spec", spec), ("failurePolicy", spec["failurePolicy"])]
    parts += [("rules", rule) for rule in spec["failurePolicy"]["rules"]]
    parts += [("replicatedJobs", job) for job in spec["replicatedJobs"]]
    parts += [("template", job["template"]) for job in spec["replicatedJobs"]]
    for kind, part in parts:
        assert part.keys() <= JOBSET_FIELDS[kind], kind
    assert spec["failurePolicy"]["restartStrategy"] == "BlockingRecreate"
    for rule in spec["failurePolicy"]["rules"]:
        assert rule["action"] in ACTIONS
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])


def failure(job, status):
    """Why Kubernetes says that the job failed: (reason, message). None: its node was taken away."""
    for index, rule in enumerate(job["spec"]["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        if status is None and "onPodConditions" in rule:
            said = "Pod default/p has condition DisruptionTarget"
        elif "onExitCodes" in rule and status in rule["onExitCodes"]["values"]:
            assert rule["onExitCodes"]["operator"] == "In"
            said = f"Container train for pod default/p failed with exit code {status}"
        else:
            continue
        return "PodFailurePolicy", f"{said} matching FailJob rule at index {index}"
    return "BackoffLimitExceeded", "Job has reached the specified backoff limit"


def action(jobset, reason, message):
    """What JobSet does then: the first rule both of whose lists match, empty ones always."""
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        reasons = rule.get("onJobFailureReasons") or [reason]
        patterns = rule.get("onJobFailureMessagePatterns") or [""]
        if reason in reasons and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize(
    "status, does",
    [
        (1, "RestartJobSet"),
        (2, "FailJobSet"),
        (130, "FailJobSet"),
        (137, "RestartJobSet"),
        (143, "RestartJobSetAndIgnoreMaxRestarts"),
        (None, "RestartJobSetAndIgnoreMaxRestarts"),
    ],
)
def test_jobsets_run_again_what_may_go_on(jobset, status, does):
    (job,) = jobs(jobset)
    assert job["spec"]["backoffLimit"] == 0 and jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert action(jobset, *failure(job, status)) == does


def test_a_stop_reaches_python_with_time_to_save(jobset):
    (job,) = jobs(jobset)
    pod, only = job["spec"]["template"]["spec"], container(jobset)
    assert pod["terminationGracePeriodSeconds"] >= 120 and pod["restartPolicy"] == "Never"
    assert only["command"][0] == "python" and "args" not in only
    assert only["name"] == "train"  # whom podFailurePolicy names
    files = [word for word in only["command"] if word.endswith(".py")]
    assert files and all((ROOT / word.removeprefix("--config=")).is_file() for word in files)
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in only["volumeMounts"]} == volumes


def test_the_numbers_of_hosts_agree(jobset):
    (job,), only = jobs(jobset), container(jobset)
    hosts, limits = job["spec"]["parallelism"], only["resources"]["limits"]
    assert job["spec"]["completionMode"] == "Indexed" and job["spec"]["completions"] == hosts
    if chips := limits.get("google.com/tpu"):
        selector = job["spec"]["template"]["spec"]["nodeSelector"]
        x, y = selector["cloud.google.com/gke-tpu-topology"].split("x")
        assert int(x) * int(y) == hosts * chips
        return
    name, kind = jobset["metadata"]["name"], job["metadata"]["name"]
    given = local.arguments(
        [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in only["command"][2:]]
    )
    assert (given.nodes, given.processes) == (hosts, limits["nvidia.com/gpu"])
    assert given.node == 1 and given.command[:2] == ["python", "launch/train.py"]
    host, port = given.coordinator.split(":")
    assert host == f"{name}-{kind}-0-0.{name}"
    assert only["ports"] == [{"containerPort": int(port)}]


# --------------------------------------------------------------------------------------- SkyPilot


@pytest.fixture
def sky():
    return yaml.safe_load((CLUSTER / "sky" / "train.yaml").read_text())


def test_the_task_is_one_that_skypilot_takes(sky):
    # Of its schema (sky/utils/schemas.py), which refuses others.
    known = {"name", "num_nodes", "resources", "workdir", "envs", "file_mounts", "setup", "run"}
    assert sky.keys() == known
    assert sky["resources"].keys() == {"accelerators", "use_spot", "job_recovery"}
    assert sky["resources"]["job_recovery"] == {
        "recover_on_exit_codes": [143], "max_restarts_on_errors": 0,
    }  # fmt: skip
    assert sky["file_mounts"]["/runs"].keys() == {"name", "mode"}
    assert sky["envs"]["CONFIG"] is None and sky["envs"]["RUN"] is None  # to be given: --env


@pytest.mark.parametrize("part", ["setup", "run"])
def test_the_tasks_scripts_are_sound(sky, part):
    checked = run(tool("shellcheck"), "-x", "--shell=bash", "-", given=sky[part])
    assert not checked.stdout


def test_skypilots_variables_become_jaxs(sky, tree):
    nodes = dict(
        SKYPILOT_NUM_NODES=2, SKYPILOT_NODE_RANK=1, SKYPILOT_NODE_IPS="10.0.0.4\n10.0.0.5",
        SKYPILOT_NUM_GPUS_PER_NODE=2, EXTRA="cuda", CONFIG="recipe.py", RUN="hh", XLA_FLAGS="--my",
    )  # fmt: skip
    ended = run("bash", "-c", sky["run"], cwd=tree, **nodes)
    assert ended.returncode == 0, ended.stderr
    told = said(tree, 3)["environment"]
    assert (told["JAX_COORDINATOR_ADDRESS"], told["JAX_NUM_PROCESSES"]) == ("10.0.0.4:8476", "4")
    assert told["JAX_LOCAL_DEVICE_IDS"] == "1"
    assert "NCCL_DEBUG" in told and told["XLA_FLAGS"] == "--my"  # what is set already wins
    assert said(tree, 3)["arguments"] == ["--config", "recipe.py", "--workdir", "/runs/hh"]


# -------------------------------------------------------------------------------------- Settings


def settings(file):
    """As docker and kubectl read it: a line is a comment, or all after the first = is the value."""
    lines = (line for line in file.read_text().splitlines() if line and not line.startswith("#"))
    return dict(line.split("=", 1) for line in lines)


@pytest.mark.parametrize("file", ENVIRONMENTS, ids=lambda file: file.stem)
def test_a_shell_and_docker_read_the_same_settings(file):
    sourced = subprocess.run(
        ["sh", "-eu", "-c", f"set -a; . {file}; env -0"],
        env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = dict(line.split("=", 1) for line in sourced.stdout.split("\0") if line)
    expected = settings(file)
    assert expected and {key: found.get(key) for key in expected} == expected
    # Each with its reason above it.
    text = file.read_text().splitlines()
    assert all(text[i - 1].startswith("#") for i, line in enumerate(text) if line[:1].isupper())


def test_jax_starts_with_the_settings_of_gpus():
    given = settings(CLUSTER / "env" / "gpu.env") | {"JAX_PLATFORMS": "cpu"}
    assert run(sys.executable, "-c", "import jax; jax.devices()", **given).returncode == 0
    given["XLA_FLAGS"] += " --xla_gpu_no_such_flag=true"
    stopped = run(sys.executable, "-c", "import jax; jax.devices()", **given)
    assert stopped.returncode != 0 and "no_such_flag" in stopped.stderr


def test_a_tpu_that_is_not_there_is_an_error():
    if importlib.util.find_spec("libtpu"):
        pytest.skip("libtpu is installed")
    given = settings(CLUSTER / "env" / "tpu.env")
    stopped = run(sys.executable, "-c", "import jax; jax.devices()", **given)
    assert stopped.returncode != 0 and "Unable to initialize backend 'tpu'" in stopped.stderr


def test_libtpu_takes_the_settings_of_tpus():
    pytest.importorskip("libtpu", reason="pip install -e '.[tpu]'")
    describe = (
        "from jax.experimental.topologies import get_topology_desc as describe\n"
        "for slice in ('v5e:4x4', 'v5:2x2x4', 'v6e:4x4'): describe(slice, 'tpu')\n"
    )
    given = settings(CLUSTER / "env" / "tpu.env") | {"JAX_PLATFORMS": "cpu"}
    started = run(sys.executable, "-c", describe, TPU_SKIP_MDS_QUERY=1, **given)
    assert started.returncode == 0, started.stderr
