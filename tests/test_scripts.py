"""The scripts of tpu_scripts/, with programs that record how they are called in the place of
gcloud, sudo and srun.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tpu_scripts"
ALL = sorted(path.name for path in SCRIPTS.iterdir() if path.name != "common.sh")
HOST = ("--name", "rl", "--zone", "us-east5-b", "--accelerator-type", "v6e-8")
SLICE = ("--name", "rl", "--zone", "us-central2-b", "--accelerator-type", "v4-32")
NFS = ("--mount", "10.0.0.2:/share=/mnt/runs")
TRAIN = ("--", "train", "configs/gsm8k.py", "--output-dir", "/mnt/runs/a")

RECORDER = """#!{python}
import json, os, sys
from pathlib import Path
folder = Path({folder!r})
if sys.argv[0].endswith("/git") and "archive" not in sys.argv:
    sys.exit(not Path(sys.argv[2]).is_dir())
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps([Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
if "describe" in sys.argv:
    states = (folder / "states").read_text().split()
    (folder / "states").write_text(" ".join(states[1:] or states))
    if states[0] == "NONE":
        sys.exit("NOT_FOUND")
    print(states[0])
sys.exit(int(os.environ.get("CODE_" + Path(sys.argv[0]).name.upper(), 0)))
"""


@pytest.fixture
def machine(tmp_path):
    """(states, *command, **environment) -> exit code, output, errors and the calls of recorded
    programs.
    """

    def run(states, script, *arguments, **environment):
        (tmp_path / "states").write_text(states)
        (tmp_path / "calls").write_text("")
        done = subprocess.run(
            ["bash", SCRIPTS / script, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=environment.pop("cwd", ROOT),
            env=os.environ
            | {
                "PATH": f"{tmp_path}:{os.environ['PATH']}",
                "TPU_POLL_SECONDS": "0",
                "TMPDIR": str(tmp_path),
            }
            | environment,
        )
        calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
        return done.returncode, done.stdout, done.stderr, calls

    for program in ("gcloud", "git", "sudo", "srun", "scontrol"):
        path = tmp_path / program
        path.write_text(RECORDER.format(python=sys.executable, folder=str(tmp_path)))
        path.chmod(0o755)
    return run


def short(call):
    """A call without the long command for the workers."""
    return " ".join(word for word in call[1:] if not word.startswith("--command="))


def of_workers(calls):
    """The commands that the workers are to execute."""
    found = [
        word.removeprefix("--command=")
        for call in calls
        for word in call
        if word.startswith("--command=")
    ]
    assert all(subprocess.run(["bash", "-n", "-c", command]).returncode == 0 for command in found)
    return found


def test_shellcheck():
    shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    done = subprocess.run(
        [shellcheck, "-x", *sorted(SCRIPTS.iterdir())], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["common.sh", *ALL])
def test_a_script_is_short(script):
    lines = (SCRIPTS / script).read_text().splitlines()
    assert len(lines) < 60 and max(map(len, lines)) <= 120


def test_a_commit_is_installed(machine):
    code, output, errors, calls = machine("READY", "install.sh", *HOST)
    assert (
        code == 0
        and [call[0] for call in calls] == ["git", "gcloud", "gcloud"]
        and "archive" in calls[0]
    )


@pytest.mark.parametrize("script", ALL)
def test_help_of_a_script_prints_its_header_comment(machine, script):
    code, output, errors, calls = machine("", script, "--help")
    header = (SCRIPTS / script).read_text().split("\n\n")[0].splitlines()[1:]
    assert output.splitlines()[: len(header)] == [
        line.removeprefix("#").removeprefix(" ") for line in header
    ]
    assert code == 0 and not errors and not calls and f"tpu_scripts/{script}" in output


SSH = "gcloud compute tpus tpu-vm ssh rl --zone=us-central2-b"
DESCRIBE = (
    "gcloud compute tpus queued-resources describe rl --zone=us-central2-b "
    "'--format=value(state.state)'"
)
CREATE = (
    "gcloud compute tpus queued-resources create rl --node-id=rl --zone=us-central2-b "
    "--accelerator-type=v4-32 "
    "--spot --runtime-version=tpu-ubuntu2204-base"
)
DELETE = "gcloud compute tpus queued-resources delete rl --zone=us-central2-b --force"
INSTALL = f"""git -C {ROOT} archive --format=tar.gz --output=TMP/jaxrft.tar.gz HEAD
gcloud compute tpus tpu-vm scp TMP/jaxrft.tar.gz rl: --zone=us-central2-b --worker=all
{SSH} --worker=all '--command=set -e
! systemctl is-active --quiet jaxrft || {{ echo "jaxrft runs on $(hostname): stop it first" >&2; exit 1; }}
mkdir -p jaxrft && tar -xzf jaxrft.tar.gz -C jaxrft
python3 -m pip install --quiet --user --upgrade uv
~/.local/bin/uv venv --quiet --clear --python 3.12 ~/.jaxrft
~/.local/bin/uv pip install --quiet --python ~/.jaxrft/bin/python '\\''./jaxrft[tpu]'\\''
~/.jaxrft/bin/jaxrft --help >/dev/null
~/.jaxrft/bin/hf download --quiet Qwen/Qwen3-1.7B
echo "installed on $(hostname)"'"""  # noqa: E501
MOUNT = f"""{SSH} --worker=all '--command=set -e
! mountpoint -q /mnt/runs || exit 0
sudo mkdir -p /mnt/runs
command -v mount.nfs >/dev/null || {{ sudo apt-get -qq update && sudo apt-get -qq install -y nfs-common; }}
sudo mount -t nfs -o hard 10.0.0.2:/share /mnt/runs
[ -w /mnt/runs ] || sudo chmod a+rwx /mnt/runs
mountpoint /mnt/runs'"""  # noqa: E501
RUN = (
    f"{SSH} --worker=all '--command=sudo systemd-run --unit=jaxrft --collect --uid=$(id -un) "
    "--working-directory=$HOME/jaxrft --property=KillMode=mixed --property=TimeoutStopSec=900 "
    "--property=After=network-online.target --property=After=jaxrft-mount.service "
    "--property=RequiresMountsFor=/mnt/runs --property=StandardOutput=append:$HOME/jaxrft.log "
    "--property=StandardError=append:$HOME/jaxrft.log $HOME/.jaxrft/bin/jaxrft "
    "train configs/gsm8k.py --output-dir /mnt/runs/a --distributed'"
)
GCSFUSE = f"""gcloud storage buckets describe gs://bucket '--format=value(hierarchical_namespace.enabled)'
{SSH} --worker=all '--command=set -e
! mountpoint -q /mnt/runs || exit 0
sudo mkdir -p /mnt/runs
command -v gcsfuse >/dev/null || {{
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee KEY >/dev/null
  echo "deb [signed-by=KEY] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" | \
sudo tee LIST >/dev/null
  sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse
}}
sudo systemd-run --unit=jaxrft-mount --collect gcsfuse --foreground -o allow_other --uid=$(id -u) --gid=$(id -g) \
--implicit-dirs --metadata-cache-ttl-secs=0 --only-dir=a/b bucket /mnt/runs
for _ in $(seq 60); do ! mountpoint -q /mnt/runs || break; sleep 1; done
mountpoint /mnt/runs'""".replace("KEY", "/usr/share/keyrings/cloud.google.asc").replace(  # noqa: E501
    "LIST", "/etc/apt/sources.list.d/gcsfuse.list"
)
STATUS = f"""{DESCRIBE}
{SSH} --worker=all '--command=echo "$(hostname): $(systemctl is-active jaxrft), $(tail -n 1 ~/jaxrft.log)"'"""  # noqa: E501
LOGS = f"""{SSH} --worker=all '--command=tail -n 5 -F ~/jaxrft.log | sed -u "s/^/$(hostname): /"'"""
BUCKET = """mkdir -p 'my runs'
gcloud storage rsync gs://bucket/a 'my runs' --recursive"""


def run_line(worker, arguments):
    """What run.sh prints for these arguments."""
    return RUN.replace("worker=all", f"worker={worker}").replace(
        "train configs/gsm8k.py --output-dir /mnt/runs/a --distributed'", arguments
    )


EMBED = ("prepare", "embeddings", "configs/gsm8k.py", "--out=/mnt/runs/e.safetensors")
DATASET = ("prepare", "dataset", "gsm8k", "--file", "a.jsonl", "--data_dir", "/mnt/runs/tfds")
MODEL = ("--model", "Qwen/Qwen3-1.7B")

PRINTED = {  # script and options -> the commands it prints, to be pasted into a shell
    ("create.sh", *SLICE, "--spot"): f"{CREATE}\n{DESCRIBE}",
    ("create.sh", *HOST): (
        "gcloud compute tpus tpu-vm create rl --zone=us-east5-b --accelerator-type=v6e-8 "
        "--version=v2-alpha-tpuv6e\n"
        "gcloud compute tpus tpu-vm describe rl --zone=us-east5-b '--format=value(state)'"
    ),
    ("install.sh", *SLICE, *MODEL): INSTALL,
    ("mount.sh", *SLICE, *NFS): MOUNT,
    ("mount.sh", *SLICE, "--mount", "gs://bucket/a/b=/mnt/runs"): GCSFUSE,
    ("run.sh", *SLICE, *NFS, *TRAIN): f"{MOUNT}\n{RUN}",
    ("run.sh", *SLICE, *NFS, "--", *EMBED): f"{MOUNT}\n{run_line('all', ' '.join(EMBED))} "
    "--distributed'",
    ("run.sh", *SLICE, *NFS, "--", *DATASET): f"{MOUNT}\n{run_line(0, ' '.join(DATASET))}'",
    ("slurm_gpu.sbatch", *DATASET): (
        f"srun --nodes=1 --ntasks=1 --cpus-per-task=8 --label {ROOT}/.venv/bin/jaxrft "
        f"{' '.join(DATASET)}"
    ),
    ("logs.sh", *SLICE, "--worker", "all", "--lines", "5", "--follow"): LOGS,
    ("status.sh", *SLICE): STATUS,
    ("fetch.sh", *SLICE, "--from", "gs://bucket/a", "--to", "my runs"): BUCKET,
    ("fetch.sh", *HOST, "--from", "runs/a", "--to", "absent"): (
        "gcloud compute tpus tpu-vm scp rl:jaxrft/runs/a absent --recurse --zone=us-east5-b "
        "--worker=0"
    ),
    ("resume.sh", *SLICE, "--spot", *MODEL, *NFS, *TRAIN): "\n".join(
        [
            f"{DESCRIBE}\n# and if it says PREEMPTED, SUSPENDED, FAILED or "
            f"TERMINATED:\n{DELETE} --quiet",
            *(CREATE, DESCRIBE, INSTALL, MOUNT, RUN),
        ]
    ),
    ("delete.sh", *SLICE): DELETE,
    ("delete.sh", *HOST, "--yes"): "gcloud compute tpus tpu-vm delete rl --zone=us-east5-b --quiet",
    ("gpu_node.sh", "--venv", "absent", "--gpus", "0,1", *TRAIN): f"""python3 -m venv absent
absent/bin/pip install --quiet {ROOT}\\[cuda\\]
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
export CUDA_VISIBLE_DEVICES=0\\,1
exec absent/bin/jaxrft train configs/gsm8k.py --output-dir /mnt/runs/a""",
    ("gpu_node.sh", "--venv", "/", "--detach", "--", "train", "a b.py"): f"""python3 -m venv /
//bin/pip install --quiet {ROOT}\\[cuda\\]
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
setsid nohup //bin/jaxrft train a\\ b.py >>jaxrft.log 2>&1 </dev/null &""",
    ("slurm_gpu.sbatch", *TRAIN[1:], "--tasks.name", "a b"): (
        f"srun --gpu-bind=none --cpus-per-task=8 --label {ROOT}/.venv/bin/jaxrft train "
        "configs/gsm8k.py "
        "--output-dir /mnt/runs/a --tasks.name a\\ b --distributed"
    ),
}


@pytest.mark.parametrize(
    "command", PRINTED, ids=lambda command: " ".join(command[:1] + command[7:])
)
def test_dry_run_prints_what_would_be_called(machine, tmp_path, command):
    script, *arguments = command
    code, output, errors, calls = machine("", script, "--dry-run", *arguments)
    expected = PRINTED[command].replace("TMP", str(tmp_path))
    assert (code, errors, calls, output.rstrip("\n")) == (0, "", [], expected)


def test_every_script_has_a_dry_run_above():
    assert {command[0] for command in PRINTED} == set(ALL)


MISTAKES = [
    (("create.sh", *HOST[:4]), "--accelerator-type is ''"),
    (
        ("create.sh", *HOST[:4], "--accelerator-type", "v9-8"),
        "--accelerator-type is 'v9-8': it must be such as v5litepod-16",
    ),
    (("create.sh", *HOST, "--name", "My TPU"), "--name is 'My TPU'"),
    (
        ("create.sh", *HOST, "--zone", "europe"),
        "--zone is 'europe': it must be such as us-central2-b",
    ),
    (("create.sh", *HOST, "--zone"), "--zone needs a value"),
    (("create.sh", *HOST, "--zone", "--spot"), "--zone needs a value"),
    (("create.sh", *HOST, "--version", "; rm"), "--version is '; rm'"),
    (("create.sh", *HOST, "--sport"), "no option --sport: see --help"),
    (("create.sh", *HOST, "spot"), "no option spot: see --help"),
    (
        ("install.sh", *HOST, "--source", "/absent"),
        "--source /absent is no git repository, git URL or wheel",
    ),
    (("install.sh", *HOST, "--source", "absent.whl"), "no wheel absent.whl: build one"),
    (("install.sh", *HOST, "--model", "Qwen"), "--model is 'Qwen': it must be a hub id"),
    (("mount.sh", *SLICE), "--mount is ''"),
    (
        ("mount.sh", *SLICE, "--mount", "gs://bucket"),
        "it must be HOST:/SHARE=/mnt/NAME or gs://BUCKET[/PATH]=/mnt/NAME",
    ),
    (
        ("mount.sh", *SLICE, "--mount", "gs://bucket=/mnt/runs"),
        "gs://bucket has no hierarchical namespace",
    ),
    (("run.sh", *HOST), "say after -- what to run"),
    (("run.sh", *HOST, "--", "rm"), "say after -- what to run"),
    (("run.sh", *SLICE, "--", "train", "c.py"), "--output-dir is '': on several hosts"),
    (("run.sh", *SLICE, *TRAIN), "--output-dir is '/mnt/runs/a': on several hosts"),
    (
        ("run.sh", *SLICE, *NFS, "--", *EMBED[:-1], "--output-dir", "/mnt/runs/a"),
        "--out is '': on several hosts",
    ),
    (("run.sh", *SLICE, *NFS, "--", *DATASET[:-2]), "--data-dir is '': on several hosts"),
    (
        ("run.sh", *SLICE, *NFS, "--", "train", "c.py", "--output-dir=/mnt/runs"),
        "--output-dir is '/mnt/runs'",
    ),
    (
        ("run.sh", *SLICE, *NFS, "--", "train", "c.py", "--output-dir", "runs/a"),
        "--output-dir is 'runs/a'",
    ),
    (
        ("run.sh", *HOST, "--", "train", "c.py", "--output_dir", "gs://b/a"),
        "--output-dir gs://b/a is a URL",
    ),
    (("logs.sh", *SLICE, "--worker", "-1"), "--worker is '-1': it must be a number or all"),
    (("logs.sh", *SLICE, "--lines", "0"), "--lines is '0': it must be a positive number"),
    (("fetch.sh", *HOST, "--to", "a"), "--from is ''"),
    (("fetch.sh", *HOST, "--from", "a"), "--to is missing"),
    (("fetch.sh", *HOST, "--from", "a", "--to", "/"), "--to / is there already"),
    (("delete.sh", *HOST, "--force"), "no option --force: see --help"),
    (("resume.sh", *SLICE, *TRAIN), "give --mount SOURCE=/mnt/NAME"),
    (("resume.sh", *SLICE, *NFS), "say after -- what to run"),
    (("resume.sh", *SLICE, *NFS, "--model", "x", *TRAIN), "--model is 'x'"),
    (("resume.sh", *SLICE, *NFS, "--version", "1", *TRAIN), "--version is '1'"),
    (("gpu_node.sh", "--gpus", "all", *TRAIN), "--gpus is 'all': it must be numbers such as 0,1"),
    (("gpu_node.sh", "train"), "no option train: see --help"),
    (("gpu_node.sh",), "say after -- what to run"),
    (("slurm_gpu.sbatch",), "say what to run"),
    (("slurm_gpu.sbatch", "train", "c.py"), "this is no SLURM job: start it with sbatch"),
]


@pytest.mark.parametrize(
    ("command", "said"),
    MISTAKES,
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_costs_one_sentence_and_nothing_else(machine, command, said):
    code, output, errors, calls = machine("False", *command)
    assert code == 2 and not output and said in errors and errors.count("\n") == 1, errors
    assert all("buckets describe" in short(call) for call in calls)


def test_create_waits_until_the_queue_has_the_machine(machine):
    code, output, errors, calls = machine("NONE", "create.sh", *SLICE, "--spot")
    assert code != 0 and "NOT_FOUND" in errors  # there is nothing to wait for
    code, output, _, calls = machine(
        "WAITING_FOR_RESOURCES PROVISIONING ACTIVE", "create.sh", *SLICE
    )
    assert code == 0 and output.split() == [
        "rl",
        "is",
        "there",
        "already",
        "PROVISIONING",
        "ACTIVE",
    ]
    assert {call[4] for call in calls} == {"describe"}
    code, output, errors, _ = machine("PROVISIONING FAILED", "create.sh", *SLICE)
    assert code == 1 and "see resume.sh" in errors


def resumed(machine, states):
    code, output, errors, calls = machine(states, "resume.sh", *SLICE, "--spot", *NFS, *TRAIN)
    return code, [call[1 if call[0] == "git" else 4] for call in calls], output + errors, calls


@pytest.mark.parametrize("gone", ["SUSPENDED", "PREEMPTED", "FAILED", "TERMINATED"])
def test_a_preempted_machine_is_made_again(machine, gone):
    code, verbs, said, calls = resumed(machine, f"{gone} NONE CREATING ACTIVE")
    made = ["describe", "delete", "describe", "create", "describe", "describe"]
    assert (code, verbs) == (0, [*made, "-C", "scp", "ssh", "ssh", "ssh"]), said
    assert "--spot" in calls[3] and "--quiet" in calls[1]
    install, mount, start = of_workers(calls)
    assert (
        "uv pip install" in install
        and "mount -t nfs" in mount
        and ("systemd-run --unit=jaxrft ") in start
    )


def test_a_deleted_machine_is_made_again(machine):
    assert resumed(machine, "NONE NONE ACTIVE")[1][:4] == [
        "describe",
        "describe",
        "create",
        "describe",
    ]


def test_a_machine_that_runs_is_left_alone(machine):
    code, verbs, said, _ = resumed(machine, "ACTIVE")
    assert (code, verbs) == (0, ["describe", "ssh"]) and "the run goes on" in said


@pytest.mark.parametrize("state", ["PROVISIONING", "SUSPENDING", "WAITING_FOR_RESOURCES"])
def test_a_machine_in_between_is_left_alone(machine, state):
    assert resumed(machine, state)[:2] == (3, ["describe"])


def test_a_git_url_and_a_wheel_are_installed(machine, tmp_path):
    _, _, _, calls = machine(
        "READY", "install.sh", *HOST, "--source", "https://example.com/a b.git"
    )
    assert [call[4] for call in calls] == [
        "ssh"
    ] and "git clone --quiet 'https://example.com/a b.git' jaxrft" in of_workers(calls)[0]
    wheel = tmp_path / "jaxrft-0.1.0-py3-none-any.whl"
    wheel.touch()
    _, _, _, calls = machine("READY", "install.sh", *HOST, "--source", wheel)
    assert short(calls[0]).startswith(
        f"compute tpus tpu-vm scp --recurse {wheel} {ROOT}/configs rl:"
    )
    assert f"'./{wheel.name}[tpu]'" in of_workers(calls)[0]


def test_arguments_reach_the_run_as_they_were_given(machine, tmp_path):
    given = [
        "train",
        "my config.py",
        "--tasks.system-prompt",
        'Say "\\boxed{}", it\'s $HOME; `id`',
        "--steps",
        "3",
    ]
    _, _, _, calls = machine("READY", "run.sh", *HOST, "--", *given)
    (command,) = of_workers(calls)
    (tmp_path / "calls").write_text("")
    subprocess.run(
        ["bash", "-c", command],
        check=True,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    (call,) = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert call[:2] == ["sudo", "systemd-run"] and call[-len(given) :] == given
    assert call[-len(given) - 1].endswith("/.jaxrft/bin/jaxrft")
    assert shlex.split(f"x {command}")  # and it is one command


def job(machine, tmp_path, **environment):
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin/jaxrft").touch(0o755)
    (tmp_path / "bin/jaxrft").chmod(0o755)
    allocation = {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_GPUS_ON_NODE": "4",
        "VENV": str(tmp_path),
    }
    return machine("", "slurm_gpu.sbatch", "train", "c.py", **(allocation | environment))


def test_slurm_starts_a_process_a_gpu(machine, tmp_path):
    code, _, _, calls = job(machine, tmp_path, SLURM_CPUS_PER_TASK="6")
    arguments = [
        "--gpu-bind=none",
        "--cpus-per-task=6",
        "--label",
        f"{tmp_path}/bin/jaxrft",
        "train",
        "c.py",
    ]
    assert (code, calls) == (0, [["srun", *arguments, "--distributed"]])


def test_a_slurm_job_that_saved_and_left_queues_again(machine, tmp_path):
    assert job(machine, tmp_path, CODE_SRUN="143")[::3] == (
        143,
        [*job(machine, tmp_path)[3], ["scontrol", "requeue", "7"]],
    )
    assert job(machine, tmp_path, CODE_SRUN="1")[::3] == (1, job(machine, tmp_path)[3])


def test_slurm_tasks_that_do_not_fit_the_gpus(machine, tmp_path):
    code, _, errors, calls = job(machine, tmp_path, SLURM_NTASKS_PER_NODE="2")
    assert (
        code == 2
        and not calls
        and ("2 tasks a node, but 4 GPUs: give --ntasks-per-node=4 or 1") in errors
    )


def test_slurm_gives_a_process_alone_on_its_node_all_gpus(machine, tmp_path):
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$JAX_LOCAL_DEVICE_IDS"\n')
    assert job(machine, tmp_path, SLURM_NTASKS_PER_NODE="1")[:2] == (0, "0,1,2,3\n")


@pytest.fixture
def gpu_machine(machine, tmp_path):
    """A venv whose jaxrft notes SIGTERM, beside a driver of a version."""

    def run(driver, *arguments):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{driver}\\n{driver}\\n'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/jaxrft").write_text(
            "#!/bin/bash\ntrap 'echo saved; exit 143' TERM\necho \"$CUDA_VISIBLE_DEVICES $*\"\n"
            "[[ $2 != long ]] || while true; do sleep 0.05; done\n"
        )
        (tmp_path / "bin/jaxrft").chmod(0o755)
        return machine("", "gpu_node.sh", "--venv", tmp_path, *arguments, cwd=tmp_path)

    return run


def test_a_node_of_gpus(gpu_machine):
    assert gpu_machine("580.65.06", "--gpus", "0,2", "--", "train", "c.py")[:2] == (
        0,
        "0,2 train c.py\n",
    )


def test_an_old_driver_is_refused(gpu_machine):
    code, _, errors, _ = gpu_machine("570.10", "--", "train", "c.py")
    assert code == 2 and "the NVIDIA driver is 570.10" in errors


def test_a_detached_run_gets_sigterm(gpu_machine, tmp_path):
    _, output, _, _ = gpu_machine("580.65", "--detach", "--", "train", "long")
    log = tmp_path / "jaxrft.log"
    for signalled, text in ((0, "train long"), (signal.SIGTERM, "saved")):
        os.kill(int(output), signalled)
        for _ in range(100):
            if text in log.read_text():
                break
            time.sleep(0.05)
        assert text in log.read_text()
