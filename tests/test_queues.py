"""Job scripts, profiles and bad requests; and on a real Slurm, what a queue does to a cluster."""

import copy
import functools
import logging
import math
import os
import pwd
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
from pathlib import Path

import dask
import distributed
import psutil
import pytest
import torch
from conftest import ours, require, until

import hpclab
from hpclab import queues, sites, slurm
from hpclab.cluster import jobs, site

# Each script below was written by hand from the documentation named above it. Of these queues, only Slurm runs here.
START = f"""\
export DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED=False
export DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL=200ms
export DATA='/scratch/my data'
{sys.executable} -m distributed.cli.dask_worker <scheduler> --name hpclab-0 --nthreads 2 --memory-limit 3.73GiB \
--nanny --death-timeout 60 --no-dashboard --dashboard-address 127.0.0.1:0"""
TLS = (
    "--protocol tls --tls-ca-file <folder>/ca_file.pem --tls-cert <folder>/worker_cert.pem"
    " --tls-key <folder>/worker_key.pem"
)
WALLTIME = "export HPCLAB_ENDS=$(($(date +%s) + 5400))"
MODULE = "module load python"
NODE = "${HPCLAB_NODE_ADDRESS:+--host $HPCLAB_NODE_ADDRESS}"

SCRIPTS = {
    # sbatch(1): -J name, -e and -o file (%J: the job's id), -p partition, -A account, -n tasks, --cpus-per-task, --mem
    # in units of 2**20 bytes with M, -t hours:minutes:seconds, --no-requeue.
    "slurm": f"""\
#!/usr/bin/env bash

#SBATCH -J hpclab
#SBATCH -e <folder>/hpclab-%J.err
#SBATCH -o <folder>/hpclab-%J.out
#SBATCH -p long
#SBATCH -A course
#SBATCH -n 1
#SBATCH --cpus-per-task=2
#SBATCH --mem=3814M
#SBATCH -t 01:30:00
#SBATCH --no-requeue
#SBATCH --gres=gpu:1
{WALLTIME}
{MODULE}
{START} {NODE} {TLS}
""",
    # qsub(1B) of OpenPBS: -N name, -q destination, -A account_string, -l select=N:chunk with resources ncpus and mem,
    # -l walltime job-wide, -V for all of the environment, -e and -o path, where a folder gets a file for each job.
    # pbs_resources(7B): mem is a size, with suffix mb for 2**20 bytes; walltime is [[hours:]minutes:]seconds.
    # A job starts in the user's home; PBS_O_WORKDIR names the folder where qsub ran.
    "pbs": f"""\
#!/usr/bin/env bash

#PBS -N hpclab
#PBS -q long
#PBS -A course
#PBS -l select=1:ncpus=2:mem=3815MB
#PBS -l walltime=01:30:00
#PBS -e <folder>/
#PBS -o <folder>/
#PBS -V
{WALLTIME}
cd "$PBS_O_WORKDIR"
{MODULE}
{START} {TLS}
""",
    # submit(1) of Grid Engine: -N name, -q queue, -P project, -l resource=value, -e and -o path, -cwd, -j y (merge),
    # -pe parallel_environment slots; complex(5) and queue_conf(5): mem_free is a MEMORY, M is 2**20; h_rt hh:mm:ss.
    "sge": f"""\
#!/usr/bin/env bash

#$ -N hpclab
#$ -q long
#$ -P course
#$ -l mem_free=3815M
#$ -l h_rt=01:30:00
#$ -e <folder>/
#$ -o <folder>/
#$ -cwd
#$ -j y
#$ -pe smp 2
{WALLTIME}
{MODULE}
{START} {TLS}
""",
    # bsub(1) of Spectrum LSF 10.1: -J name, -e and -o file (%J: the job's id), -q queue, -P project, -n tasks, -R
    # "span[hosts=1]" for all on one host, -M in KB by default, -W hours:minutes, -x for a host of one's own.
    "lsf": f"""\
#!/usr/bin/env bash

#BSUB -J hpclab
#BSUB -e <folder>/hpclab-0-%J.err
#BSUB -o <folder>/hpclab-0-%J.out
#BSUB -q long
#BSUB -P "course"
#BSUB -n 2
#BSUB -R "span[hosts=1]"
#BSUB -M 4000000
#BSUB -W 01:30
#BSUB -x
{WALLTIME}
{MODULE}
{START} {TLS}
""",
    # oarsub(1): -n name, -q queue, --project, -l hierarchy of resources and walltime hour:mn:sec in one line, -O and -E
    # file, in which %jobid% stands for the job's id, -t type.
    "oar": f"""\
#!/usr/bin/env bash

#OAR -n hpclab
#OAR -q long
#OAR --project course
#OAR -l /nodes=1/core=2,walltime=01:30:00
#OAR -O <folder>/hpclab-%jobid%.out
#OAR -E <folder>/hpclab-%jobid%.err
#OAR -t besteffort
{WALLTIME}
{MODULE}
{START} {TLS}
""",
    # condor_submit in HTCondor's manual: batch_name, request_cpus, request_memory in units of 2**20 bytes, request_disk
    # in KiB, output, error, log, stream_output and stream_error, accounting_group, MY.name for attributes of one's own;
    # arguments in the new syntax: all in double quotes, one with spaces in single quotes, of which those in it double.
    "htcondor": f"""\
#!/usr/bin/env condor_submit

MY.DaskWorkerName = "htcondor--$F(MY.JobId)--"
batch_name = hpclab-0
RequestCpus = MY.DaskWorkerCores
RequestMemory = floor(MY.DaskWorkerMemory / 1048576)
RequestDisk = floor(MY.DaskWorkerDisk / 1024)
MY.JobId = "$(ClusterId).$(ProcId)"
MY.DaskWorkerCores = 2
MY.DaskWorkerMemory = 4000000000
MY.DaskWorkerDisk = 1000000000
LogDirectory = <folder>
Output = $(LogDirectory)/worker-$F(MY.JobId).out
Error = $(LogDirectory)/worker-$F(MY.JobId).err
Log = $(LogDirectory)/worker-$(ClusterId).log
Stream_Output = True
Stream_Error = True
accounting_group = course
requirements = HasGpu

Arguments = "-c '{MODULE}; {START.replace(chr(10), "; ").replace("'", "''")} {TLS}'"
Executable = /bin/sh

Queue
""",
    # msub in Moab's manual: directives of PBS (-N, -q, -A, -e, -o, -V, -l). qsub(1B) and pbs_resources(7B) of TORQUE:
    # nodes=N:ppn=P, mem, a size with suffix mb, and walltime.
    "moab": f"""\
#!/usr/bin/env bash

#PBS -N hpclab
#PBS -q long
#PBS -A course
#PBS -l nodes=1:ppn=2,mem=3815mb
#PBS -l walltime=01:30:00
#PBS -e <folder>/
#PBS -o <folder>/
#PBS -V
{WALLTIME}
cd "$PBS_O_WORKDIR"
{MODULE}
{START} {TLS}
""",
}
DIRECTIVES = {
    "slurm": "--gres=gpu:1",
    "pbs": "-V",  # all of the environment
    "sge": "-pe smp 2",
    "lsf": "-x",  # a host of its own
    "oar": "-t besteffort",
    "htcondor": "requirements = HasGpu",
    "moab": "-V",
}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_script(kind):
    own = {} if kind == "htcondor" else {"walltime": "01:30:00", "queue": "long"}
    env = {"DATA": "/scratch/my data"}
    text = queues.script(
        kind, cores=2, memory="4GB", account="course", directives=[DIRECTIVES[kind]],
        prologue=[MODULE], env=env, **own,
    )  # fmt: skip
    assert text.rstrip().splitlines() == SCRIPTS[kind].splitlines()


def test_a_script_starts_and_leaves_nothing(tmp_path):
    before = set(psutil.pids())
    text = queues.script("slurm", folder=tmp_path / "logs", security=False)
    assert f"#SBATCH -o {tmp_path}/logs/hpclab-%J.out" in text and "tls" not in text
    assert not list(tmp_path.iterdir())
    assert not [pid for pid in set(psutil.pids()) - before if psutil.Process().pid in _ancestors(pid)]


def _ancestors(pid):
    return [parent.pid for parent in psutil.Process(pid).parents()] if psutil.pid_exists(pid) else []


@pytest.mark.parametrize(
    ("where", "options", "says"),
    [
        (
            "htcondor",
            {"walltime": "01:00:00"},
            r"walltime \(='01:00:00'\) isn't an option of htcondor; it has workers=2, ",
        ),
        (
            "slurm",
            {"resources": "mem=1"},
            r"resources .* isn't an option of slurm; it has .*walltime='00:30:00', queue=None",
        ),
        ("pbs", {"private": True}, r"private \(=True\) isn't an option of pbs"),
        ("slurm", {"walltime": "90"}, r"walltime \(='90'\) must be 'HH:MM:SS', such as '01:30:00', or seconds"),
        ("slurm", {"walltime": "00:61:00"}, r"walltime"),
        ("slurm", {"walltime": -1}, r"walltime \(=-1\)"),
        ("slurm", {"workers": 0}, r"workers \(=0\) must be a whole number >= 1"),
        ("slurm", {"cores": True}, r"cores \(=True\) must be a whole number >= 1"),
        ("slurm", {"memory": "lots"}, r"memory \(='lots'\) must be bytes or a size such as '2GB'"),
        ("slurm", {"memory": None}, r"memory \(=None\) must be bytes"),
        ("slurm", {"memory": "1MB"}, r"memory \(='1MB'\) must be at least"),
        ("slurm", {"directives": "--gres=gpu"}, r"directives \(='--gres=gpu'\) must be a list of lines"),
        ("slurm", {"prologue": [3]}, r"prologue \(=\[3\]\) must be a list of lines"),
        ("slurm", {"env": ["A"]}, r"env \(=\['A'\]\) must be a dictionary"),
        ("slurm", {"timeout": 0}, r"timeout \(=0\) must be seconds > 0, or None"),
        ("slurm", {"timeout": "10m"}, r"timeout \(='10m'\) must be seconds > 0, or None"),
        ("slurm", {"queue": 7}, r"queue \(=7\) must be text, in quotes"),
        ("slurm", {"kind": "lsf"}, r"kind \(='lsf'\) of slurm must be one of slurm, .* and be set in its profile"),
        ("sge", {"cores": 2}, r"cores \(=2\) of an sge job need .*`qconf -spl` .*directives=\['-pe NAME 2'\]"),
        ("htcondor", {"directives": ["gpus"]}, r"directives \(=\['gpus'\]\) of htcondor must be lines 'key = value'"),
        ("slrum", {}, r"where \(='slrum'\) must be 'local', the address .* a queue \(slurm, pbs, .*profile \(none"),
    ],
)
def test_bad_requests(where, options, says):
    with pytest.raises(ValueError, match=says):
        queues.script(where, **options)


def test_walltimes():
    for walltime, clock in [("1-02:03:04", "26:03:04"), (5400, "01:30:00"), ("100:00:00", "100:00:00")]:
        assert f"#SBATCH -t {clock}" in queues.script("slurm", walltime=walltime)
    assert "#BSUB -W 00:02" in queues.script("lsf", walltime=61)  # whole minutes, and never too few


def test_dask_keeps_its_configuration_and_has_its_say():
    queues.script("slurm")  # imports dask-jobqueue, which adds its defaults
    before = copy.deepcopy(dask.config.config)
    queues.script("slurm", queue="long", env={"A": "1"})
    assert dask.config.config == before
    site = {"queue": "site", "job-script-prologue": ["module load site"], "job-extra-directives": ["--qos=site"]}
    with dask.config.set({f"jobqueue.slurm.{name}": value for name, value in site.items()}):
        text = queues.script("slurm", prologue=["module load mine"], directives=["--qos=mine"])
        assert "-p site" in text
        assert "-p long" in queues.script("slurm", queue="long")
    lines = text.splitlines()
    assert lines.index("module load site") < lines.index("module load mine")
    assert lines.index("#SBATCH --qos=site") < lines.index("#SBATCH --qos=mine")


@pytest.fixture
def profiles(tmp_path, monkeypatch):
    """A file of profiles, that a test may write."""
    file = tmp_path / "sites.yaml"
    monkeypatch.setenv(sites.ENVIRONMENT, str(file))
    file.write_text("ourcluster: {kind: slurm, queue: teaching, walltime: 12:00:00, prologue: [module load python]}")
    return file


def test_a_profile(profiles):
    text = queues.script("ourcluster")
    assert "#SBATCH -p teaching" in text and "module load python" in text
    assert "#SBATCH -t 12:00:00" in text  # which YAML reads as a number
    assert "#SBATCH -p long" in queues.script("ourcluster", queue="long")


def test_the_nearest_profile_wins(profiles, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "hpclab").mkdir()
    (tmp_path / "hpclab" / "sites.yaml").write_text("ourcluster: {kind: pbs}\nother: {kind: lsf}\n")
    assert sites.read()["ourcluster"]["kind"] == "slurm"
    assert sites.read()["other"] == {"kind": "lsf"}
    monkeypatch.delenv(sites.ENVIRONMENT)
    assert sites.read()["ourcluster"] == {"kind": "pbs"}


def test_a_profile_named_after_a_queue_sets_its_defaults(profiles):
    profiles.write_text("slurm: {kind: slurm, queue: teaching}")
    assert "#SBATCH -p teaching" in queues.script("slurm")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ourcluster: {kind: slurm, quene: x}", r"quene \(='x'\) isn't an option of ourcluster; it has workers=2"),
        ("ourcluster: {kind: slrum}", r"kind \(='slrum'\) of ourcluster must be one of slurm, pbs"),
        ("ourcluster: {queue: x}", r"ourcluster has no kind"),
        ("[ourcluster]", r"must hold names, each with options"),
        ("ourcluster: [kind", r"isn't YAML"),
        ("ourcluster: !!python/object/apply:os.getcwd []", r"isn't YAML"),  # and nothing of it is run
        ("theirs: {kind: slurm}", r"where \(='ourcluster'\) .* a site's profile \(theirs\)"),
    ],
)
def test_bad_profiles(profiles, text, says):
    profiles.write_text(text)
    with pytest.raises(ValueError, match=says):
        hpclab.connect("ourcluster")


def test_a_file_of_profiles_that_is_not_there(profiles):
    profiles.unlink()
    with pytest.raises(FileNotFoundError, match=r"HPCLAB_SITES \(='.*sites.yaml'\) names no file"):
        hpclab.connect("ourcluster")


def test_no_queue_in_reach(monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"where \(='pbs'\) needs qsub, which isn't on this machine"):
        hpclab.connect("pbs")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"no Slurm answers here \(sinfo is not installed\); private=True starts one"):
        hpclab.connect("slurm")


@pytest.mark.parametrize(("memory", "skip"), [(math.inf, []), (2**20, ["--mem"])])
def test_a_site_that_has_not_told_slurm_its_memory(memory, skip):
    node = site.Node("main", True, "n1", "10.0.0.1", cpus=2, memory=memory, limit=math.inf)
    request = queues.ask("slurm", {"workers": 2})
    with dask.config.set({"jobqueue.slurm.job-directives-skip": skip}):
        site.check(request, None, [node])
        with pytest.raises(ValueError, match=r"workers \(=3\) .* exceed the 2"):
            site.check(queues.ask("slurm", {"workers": 3}), None, [node])


def test_a_log_of_another_job_is_not_shown(tmp_path):
    cluster = types.SimpleNamespace(folder=tmp_path)
    for name in ("hpclab-1.err", "hpclab-12.err", "hpclab.o1", ".key-1", "1.head.ER"):
        (tmp_path / name).write_text(f"in {name}")
    said = jobs.JobCluster._log(cluster, ["1"])
    assert all(f"in {name}" in said for name in ("hpclab-1.err", "hpclab.o1", "1.head.ER"))
    assert "hpclab-12" not in said and "key" not in said
    assert jobs.JobCluster._log(cluster, []) == ""


def test_options_of_queues_are_not_for_others():
    with pytest.raises(ValueError, match=r"walltime \(='1:00:00'\) is an option of job queues; 'local' has workers"):
        hpclab.connect(walltime="1:00:00")


# From here on, a real Slurm.


@pytest.fixture(scope="module")
def private():
    """A Slurm of 4 nodes with 2 CPUs, and a partition with a limit."""
    require(not slurm.missing(), "Slurm")
    with slurm.start(partitions={"main": {}, "short": {"MaxTime": 5, "Nodes": "n1"}}) as running:
        yield running


@pytest.fixture
def slurm4(private):
    """The same, which must have no job left after a test."""
    yield private
    assert not alive(private)


def alive(private):
    over = ("CANCELLED", "COMPLETED", "COMPLETING", "FAILED", "NODE_FAIL", "TIMEOUT")
    return [job for job in private.jobs() if job["state"] not in over]


def workers(client):
    return client.cluster.scheduler.workers


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"memory": "64GB"}, r"memory \(='64GB'\) exceeds the 2.00 GiB of any node with 1 CPUs in partition main"),
        ({"cores": 3}, r"cores \(=3\) exceed the 2 of any node in partition main"),
        ({"queue": "nope"}, r"queue \(='nope'\) must be a partition of this Slurm: main, short"),
        ({"queue": "short"}, r"walltime \(='00:30:00'\) exceeds the 00:05:00 of partition short"),
        (
            {"workers": 9, "memory": "500MB"},
            r"workers \(=9\) of 1 CPUs and 476.84 MiB exceed the 8 that partition main",
        ),
    ],
)
def test_what_could_never_start(slurm4, options, says):
    before = len(slurm4.jobs())
    with pytest.raises(ValueError, match=says):
        hpclab.connect(slurm4, **options)
    assert len(slurm4.jobs()) == before


def test_what_slurm_refuses(slurm4):
    with pytest.raises(RuntimeError, match=r"the queue refuses a job: .*[Ii]nvalid node name"):
        hpclab.connect(slurm4, directives=["--nodelist=nowhere"])


def test_workers_are_jobs_on_nodes(slurm4, tmp_path):
    def about():
        return os.environ["HPCLAB_ENDS"], os.environ["COLOUR"], dask.config.get("distributed.admin.tick.interval")

    before = {job["job"] for job in slurm4.jobs()}
    with hpclab.connect(slurm4, workers=2, memory="1.5GB", walltime="00:10:00", env={"COLOUR": "red"}) as client:
        jobs = [job for job in slurm4.jobs() if job["job"] not in before]
        told = client.run(about)
        hosts = sorted(worker.host for worker in workers(client).values())
    assert [(job["state"], job["cpus"], job["walltime_s"]) for job in jobs] == [("RUNNING", 1, 600)] * 2
    assert hosts == sorted(slurm4.addresses[job["nodes"]] for job in jobs)
    assert {(colour, tick) for _, colour, tick in told.values()} == {("red", "200ms")}
    started = min(job["started_s"] for job in jobs)
    assert all(started + 600 <= int(ends) <= time.time() + 600 for ends, _, _ in told.values())


def test_nobody_gets_in(slurm4, monkeypatch, tmp_path):
    """Keys lie in files of this user alone, and occur nowhere else; all that listens does so on the loopback."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with hpclab.connect(slurm4, workers=1, folder="logs"):
        (private,) = (tmp_path / "cache" / "hpclab").iterdir()
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
        keys = {path.name: path.read_text() for path in private.iterdir()}
        assert keys.keys() == {"ca_file.pem", "worker_cert.pem", "worker_key.pem"}
        assert {stat.S_IMODE(path.stat().st_mode) for path in private.iterdir()} == {0o600}
        secrets = [line for line in keys["worker_key.pem"].splitlines() if "KEY" not in line]
        (job,) = alive(slurm4)
        seen = slurm4.run("scontrol", "write", "batch_script", job["job"], "-")
        nannies = [psutil.Process(pid) for pid in ours(str(private))]
        family = [*nannies, *(child for nanny in nannies for child in nanny.children(recursive=True))]
        seen += "".join(" ".join(process.cmdline()) + str(process.environ()) for process in family)
        seen += "".join(path.read_text() for path in (tmp_path / "logs").iterdir())
        assert "worker_key.pem" in seen
        assert not [line for line in secrets if line in seen]
        listening = [
            connection.laddr.ip
            for process in [psutil.Process(), *family]
            for connection in process.net_connections()
            if connection.status == "LISTEN"
        ]
        assert listening and all(address.startswith("127.") for address in listening)
    assert not private.exists()
    assert list((tmp_path / "logs").glob("hpclab-*.err"))


def test_a_script_is_submitted_from_where_nobody_else_reads_or_writes(slurm4, monkeypatch):
    modes = []

    async def submit(self, name):
        modes.append(stat.S_IMODE(os.stat(name).st_mode))
        return await _submit(self, name)

    job = queues.job_class("slurm")
    _submit = job._submit_job
    monkeypatch.setattr(job, "_submit_job", submit)
    hpclab.connect(slurm4, workers=1).close()
    assert modes == [0o600]


def test_closing_leaves_nothing(slurm4, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = tmp_path / "hpclab" / f"jobs-{socket.gethostname()}-{gone.pid}-abc"
    left.mkdir(parents=True)
    client = hpclab.connect(slurm4, workers=1)
    assert not left.exists()
    (folder,) = (tmp_path / "hpclab").iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    client.close()
    client.close()
    assert not list((tmp_path / "hpclab").iterdir())
    assert not alive(slurm4)
    until(lambda: not ours(str(folder)))


def test_what_a_site_says_is_not_for_a_private_one(slurm4, monkeypatch):
    for name in ("SBATCH_PARTITION", "SQUEUE_PARTITION", "SINFO_PARTITION", "SCANCEL_PARTITION"):
        monkeypatch.setenv(name, "theirs")
    with hpclab.connect(slurm4, workers=1) as client:
        (job,) = alive(slurm4)
        assert job["partition"] == "main"
        slurm4.run("scancel", job["job"])
        until(lambda: (now := alive(slurm4)) and now[0]["job"] != job["job"] and len(workers(client)) == 1)


def test_a_look_that_fails_ends_nothing(slurm4, monkeypatch, caplog):
    """Whatever goes wrong: lost workers are still replaced later, and closing cancels all jobs."""
    look, wrong = jobs.JobCluster._look, [True]

    async def fails(self):
        if wrong:
            raise KeyError("a worker that is no more")
        await look(self)

    monkeypatch.setattr(jobs.JobCluster, "_look", fails)
    with hpclab.connect(slurm4, workers=1) as client:
        (first,) = alive(slurm4)
        slurm4.run("scancel", first["job"])
        until(lambda: "lost workers can't be replaced: KeyError('a worker that is no more')" in caplog.text)
        wrong.clear()
        until(lambda: len(workers(client)) == 1 and alive(slurm4) and alive(slurm4)[0]["job"] != first["job"])
        wrong.append(True)


def test_a_lost_worker_gets_a_new_job(slurm4):
    with hpclab.connect(slurm4, workers=2, memory="500MB") as client:
        first, second = alive(slurm4)
        slurm4.run("scancel", first["job"])
        until(
            lambda: second["job"] in (now := [job["job"] for job in alive(slurm4)]) and first["job"] not in now and now
        )
        until(lambda: len(alive(slurm4)) == 2 and len(workers(client)) == 2)
        assert client.submit(lambda: 6 * 7).result() == 42


def test_a_lost_node_costs_no_worker(slurm4):
    with hpclab.connect(slurm4, workers=2) as client:
        node = alive(slurm4)[0]["nodes"]
        try:
            slurm4.kill(node)
            others = set(slurm4.addresses.values()) - {slurm4.addresses[node]}
            until(lambda: len(workers(client)) == 2 and {worker.host for worker in workers(client).values()} <= others)
        finally:
            slurm4.revive(node)


def test_a_node_lost_in_mid_training_changes_no_bit(slurm4):
    model = functools.partial(hpclab.models.CNN, channels=(4, 8))
    settings = {"ranks": 2, "batch_size": 12, "steps": 60, "checkpoint_every": 7, "max_restarts": 1, "progress": False}
    with hpclab.connect(slurm4, workers=2) as client:
        undisturbed = hpclab.train(client, model, "fashion_mnist", **settings).result(120)
        node = alive(slurm4)[0]["nodes"]
        run = hpclab.train(client, model, "fashion_mnist", **settings)
        killed = []

        def strike(run, rows):
            if not killed and any(row["kind"] == "checkpoint" for row in rows):
                killed.append(node)
                slurm4.kill(node)

        try:
            run.watch(strike)
            fit = run.result(120)
        finally:
            slurm4.revive(node)
    assert [row["ranks"] for row in run.rows if row["kind"] == "restart"] == [2]
    for name, weight in undisturbed.weights.items():
        assert torch.equal(fit.weights[name], weight), name


def test_a_worker_that_dies_in_a_loop(slurm4):
    before = len(slurm4.jobs())
    with pytest.raises(RuntimeError, match=r"worker hpclab-0 ended early 3 times; (?s:.*)no such library"):
        hpclab.connect(slurm4, workers=1, prologue=["echo no such library >&2", "exit 3"])
    assert len(slurm4.jobs()) == before + 3


def test_a_worker_that_keeps_dying_later(slurm4, caplog):
    with hpclab.connect(slurm4, workers=1) as client, caplog.at_level(logging.WARNING, "hpclab"):
        for _ in range(3):
            (job,) = until(lambda: len(workers(client)) == 1 and alive(slurm4))
            slurm4.run("scancel", job["job"])
            until(lambda job=job: job["job"] not in [job["job"] for job in alive(slurm4)] and not workers(client))
        until(lambda: "worker hpclab-0 ended early 3 times" in caplog.text)
        assert not alive(slurm4)


def test_a_scheduler_that_nodes_do_not_reach(slurm4):
    away = {"scheduler-options": {"contact_address": "tls://127.0.0.1:9"}, "death-timeout": 2}
    queues.script("slurm")  # loads defaults, which would be set over these
    with (
        dask.config.set({f"jobqueue.slurm.{name}": value for name, value in away.items()}),
        pytest.raises(RuntimeError, match=r"(?s)ended early 3 times.*may not reach the scheduler.*interface="),
    ):
        hpclab.connect(slurm4, workers=1)


def test_waiting_is_shown_and_ends(slurm4, capsys):
    hog = slurm4.run("sbatch", "--parsable", "--nodes=4", "--exclusive", "--wrap", "sleep 100").strip()
    try:
        until(lambda: alive(slurm4)[0]["state"] == "RUNNING")
        with pytest.raises(
            TimeoutError, match=r"0 of 1 workers joined .*timeout \(=3\).*1st in the queue, PENDING \(Res"
        ):
            hpclab.connect(slurm4, workers=1, timeout=3)
        assert len(alive(slurm4)) == 1
    finally:
        slurm4.run("scancel", hog)
    assert "1st in the queue, PENDING (Resources)" in capsys.readouterr().err


def test_a_controller_that_goes_while_one_waits_is_told(capsys):
    require(not slurm.missing(), "Slurm")
    with slurm.start(nodes=1) as mine:
        mine.run("sbatch", "--exclusive", "--wrap", "sleep 100")
        until(lambda: alive(mine)[0]["state"] == "RUNNING")

        def kill_when_it_waits():
            until(lambda: "1st in the queue" in capsys.readouterr().err)
            with (mine.folder / "slurm.conf").open("a") as conf:
                conf.write("MessageTimeout=1\n")  # commands would ask for ten seconds each
            mine._call("kill", "slurmctld")

        threading.Thread(target=kill_when_it_waits).start()
        with pytest.raises(TimeoutError, match=r"job 2: 1st in the queue.*the queue doesn't answer \(.*[Uu]nable to"):
            hpclab.connect(mine, workers=1, timeout=20)
        with pytest.raises(ConnectionError, match=r"where \(=<private Slurm .* doesn't answer: .*start another"):
            hpclab.connect(mine, workers=1)


def test_ctrl_c_while_waiting_cancels(slurm4, tmp_path):
    hog = slurm4.run("sbatch", "--parsable", "--nodes=4", "--exclusive", "--wrap", "sleep 100").strip()
    script = "import hpclab\nif __name__ == '__main__':\n    hpclab.connect('slurm', workers=1)\n"
    (tmp_path / "script.py").write_text(script)
    try:
        until(lambda: alive(slurm4)[0]["state"] == "RUNNING")
        process = subprocess.Popen(
            [sys.executable, "script.py"],
            env=slurm4.env,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        until(lambda: len(alive(slurm4)) == 2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert "KeyboardInterrupt" in errors
        assert len(alive(slurm4)) == 1
    finally:
        slurm4.run("scancel", hog)


def test_growing_and_shrinking_between_runs(slurm4):
    def held(number):
        distributed.Event("grown").wait(120)
        return number

    with hpclab.connect(slurm4, workers=1, memory="500MB") as client:
        client.cluster.scale(2)
        client.wait_for_workers(2, timeout=60)
        client.cluster.scale(1)
        until(lambda: len(workers(client)) == len(alive(slurm4)) == 1)
        assert hpclab.launch(client, os.getppid, ranks=1).result(60)
        client.cluster.adapt(minimum=1, maximum=3, interval="200ms", wait_count=5)
        futures = client.map(held, range(60))
        until(lambda: len(workers(client)) == 3)
        distributed.Event("grown", client=client).set()
        assert sum(client.gather(futures)) == sum(range(60))
        del futures
        until(lambda: len(workers(client)) == len(alive(slurm4)) == 1)


def test_a_private_slurm_ends_with_its_client():
    require(not slurm.missing(), "Slurm")
    with hpclab.connect("slurm", workers=1, private=True) as client:
        (nodes,) = {worker.host for worker in workers(client).values()}
        mine = slurm.Slurm(Path(client.cluster._env["SLURM_CONF"]).parent)
        assert nodes == "127.0.0.2" and mine.folder.exists()
    assert not mine.folder.exists()


def test_none_is_taken_in_place_of_a_site_that_is_away(slurm4, monkeypatch, tmp_path):
    conf = (slurm4.folder / "slurm.conf").read_text()
    away = tmp_path / "slurm.conf"
    away.write_text(re.sub("SlurmctldPort=.*", "SlurmctldPort=9\nMessageTimeout=1", conf))
    monkeypatch.setenv("SLURM_CONF", str(away))
    with pytest.raises(ConnectionError, match=r"no Slurm answers here \(.*; private=True starts one"):
        hpclab.connect("slurm")


def test_one_that_is_up_is_found_where_the_site_has_none(slurm4):
    with slurm.start(nodes=1, detached=True) as mine:
        assert slurm.find().folder == mine.folder
        with hpclab.connect("slurm", workers=1):
            assert len(alive(mine)) == 1 and not alive(slurm4)


ROUND = """
    import functools, os, sys, time
    import psutil, torch
    import hpclab
    from hpclab import slurm

    SETTINGS = {"ranks": 2, "batch_size": 12, "steps": 60, "checkpoint_every": 7, "max_restarts": 1, "progress": False}
    MODEL = functools.partial(hpclab.models.CNN, channels=(4, 8))

    def nodes_of_ranks(site):
        found = set()
        for process in psutil.process_iter(["name"]):
            if "hpclab-rank" in process.info["name"] and process.uids().real == os.getuid():
                if process.environ().get("HPCLAB_TESTS") == os.environ.get("HPCLAB_TESTS"):
                    found.add(process.environ()["HPCLAB_NODE_ADDRESS"])
        return sorted(node for node, address in site.addresses.items() if address in found)

    if __name__ == "__main__":
        began = time.perf_counter()
        site = slurm.start(nodes=4, cpus=1)
        up = time.perf_counter()
        client = hpclab.connect(site, workers=3, memory="700MB")
        ready = time.perf_counter()
        undisturbed = hpclab.train(client, MODEL, "fashion_mnist", **SETTINGS).result(120)
        run = hpclab.train(client, MODEL, "fashion_mnist", **SETTINGS)
        nodes = []

        def strike(run, rows):
            if not nodes and any(row["kind"] == "checkpoint" for row in rows):
                nodes.extend(nodes_of_ranks(site))
                site.kill(nodes[0])

        run.watch(strike)
        fit = run.result(120)
        restarts = sum(row["kind"] == "restart" for row in run.rows)
        same = all(torch.equal(fit.weights[name], weight) for name, weight in undisturbed.weights.items())
        users = {os.getuid(), *client.run(os.getuid).values()}
        client.close()
        site.stop()
        print(*users, len(nodes), restarts, same)
        print(f"up {up - began:.2f} s, workers ready {ready - up:.2f} s", file=sys.stderr)
"""


DASKS_OWN = [".config/dask/jobqueue.yaml", *(f"dask-scratch-space/{name}.lock" for name in ("global", "purge"))]


@pytest.fixture
def home():
    """A folder with a path that is short, as sockets want it, and open to other users."""
    with tempfile.TemporaryDirectory(prefix="home-") as folder:
        yield Path(folder)


@pytest.mark.rounds
def test_from_nothing_to_a_lost_node_and_back_as_an_ordinary_user(home):
    """Another uid than the one that runs the tests, with a home of its own; once, or HPCLAB_KILLS times in a row."""
    require(not slurm.missing(), "Slurm")
    (home / "round.py").write_text(textwrap.dedent(ROUND))
    wrapper, user = [], os.getuid()
    if os.getuid() == 0:
        user = pwd.getpwnam("backup").pw_uid  # not nobody, as whom others may run things
        capabilities = "-all,+dac_read_search"  # Python may lie in a folder that is closed to others
        wrapper = [
            *("setpriv", f"--reuid={user}", "--regid=65534", "--clear-groups"),
            *(f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}"),
        ]
        os.chown(home, user, user)
    env = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "HPCLAB_TESTS") if name in os.environ}

    def of_user():
        return {process.pid for process in psutil.process_iter() if process.uids().real == user} & {*ours("")}

    for _ in range(int(os.environ.get("HPCLAB_KILLS", "1"))):
        before = of_user()
        done = subprocess.run(
            [*wrapper, sys.executable, "round.py"],
            cwd=home, env=env | {"HOME": str(home), "TMPDIR": str(home)}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[-4:] == [str(user), "2", "1", "True"], done.stdout + done.stderr
        assert not of_user() - before
        print(done.stderr)
        left = {str(path.relative_to(home)) for path in home.rglob("*") if not path.is_dir()}
        assert {path for path in left if not path.startswith("results/")} == {"round.py", *DASKS_OWN}


def test_names_of_folders_in_scripts(monkeypatch):
    monkeypatch.setenv("HOME", "/homes/me")
    assert '#SBATCH -o "/homes/me/a \'b\' \\"c\\" #%%j"/hpclab-%J.out\n' in queues.script(
        "slurm", folder="~/a 'b' \"c\" #%j"
    )
    assert "#$ -o /scratch/größe/\n" in queues.script("sge", folder="/scratch/größe")
    for kind, folder in (("slurm", "/a\nb"), ("slurm", "/a\\b"), ("pbs", "/a b"), ("htcondor", "/a$b")):
        with pytest.raises(ValueError, match=rf"folder .* contains '{re.escape(repr(folder[2])[1:-1])}', which {kind}"):
            queues.script(kind, folder=folder)


def test_a_path_with_what_is_no_folder(monkeypatch, tmp_path):
    (tmp_path / "sinfo").touch(mode=0o600)  # as in a folder that nobody may enter: the system says "Permission denied"
    for path in (f"{tmp_path}:/etc/passwd", "/etc/passwd", "/" + "x" * 300):
        monkeypatch.setenv("PATH", path)
        assert isinstance(slurm.missing(), list)
        with pytest.raises(FileNotFoundError, match=r"^sinfo is (not installed|nowhere on PATH)"):
            site.nodes({"PATH": path})


def test_who_launches_without_workers_is_told_what_their_jobs_wait_for(slurm4):
    with hpclab.connect(slurm4, workers=1) as client:
        for node in slurm4.addresses:
            slurm4.drain(node, "a test")
        try:
            slurm4.run("scancel", *(job.job_id for job in client.cluster.workers.values()))
            until(lambda: "1st in the queue" in client.cluster.standing())
            with pytest.raises(ValueError, match=r"has no workers; .* Its jobs: job \d+: 1st in the queue, PENDING"):
                hpclab.launch(client, os.getcwd)
        finally:
            for node in slurm4.addresses:
                slurm4.resume(node)


def test_a_slurm_whose_folder_was_cleaned_away(tmp_path):
    with pytest.raises(ConnectionError, match=r"^its settings, .*gone/slurm.conf, are gone$"):
        site.places({"PATH": os.environ["PATH"], "SLURM_CONF": str(tmp_path / "gone" / "slurm.conf")})
