"""What this machine really gives you, what fits on it, and what is missing, with the way to get it."""

import os
import shutil
import socket
import sys

from hpclab import machine, slurm
from hpclab.course import sandbox
from hpclab.language import cjk_font
from hpclab.language import translate as _
from hpclab.tables import Table

GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""What torch's CUDA and ROCm open, on Linux and on Windows' Linux."""


def examine(quick: bool = False) -> Table:
    """Examine this machine; one row per finding, with ``what``, ``found`` and ``remark``.

    Parameters
    ----------
    quick : bool, default False
        Leave out what takes seconds and memory: GPUs, which only torch knows of, and fonts.
    """
    facts, lab = machine.describe(), machine.installed("jupyterlab")
    findings = [
        (_("CPUs"), f"{facts['cpus']}", _limit(facts["cpus"], facts["cpus_host"]) + _threads()),
        (_("memory"), f"{facts['memory_gb']} GB", _limit(facts["memory_gb"], facts["memory_host_gb"])),
        (_("system"), facts["system"], f"{facts['cpu']}, Python {facts['python']}"),
        ("torch", facts["torch"] or _("missing"), _gpus(quick) if facts["torch"] else "pip install torch"),
        ("Dask", facts["distributed"] or _("missing"), "" if facts["distributed"] else "pip install distributed"),
        ("JupyterLab", lab or _("missing"), "hpclab lab" if lab else "pip install jupyterlab"),
        (_("dashboard"), machine.installed("bokeh") or _("missing"), _("optional: pip install 'hpclab[dashboard]'")),
        ("Slurm", *_slurm()),
        (_("sandbox"), *_sandboxed()),
        (_("loopback"), *_loopback()),
    ]
    if not quick:
        findings.append((_("Chinese font"), *_font()))
    return Table({_("what"): subject, _("found"): value, _("remark"): remark} for subject, value, remark in findings)


def advice() -> str:
    """How many ranks fit here, in a sentence."""
    return _("One-thread ranks that fit here at full speed: {ranks}", ranks=machine.fits())


def _limit(usable: float, host: float) -> str:
    if usable < host:
        return _("the host has {host}; affinity, cgroup or ulimit allows less", host=host)
    return _("all of the host's")


def _threads() -> str:
    cores = machine.cores()
    if cores is None or cores >= len(machine.affinity()):
        return ""
    return _(
        "; hardware threads of {cores} cores: the two of one core together are less than twice as fast as one",
        cores=cores,
    )


def _gpus(quick: bool) -> str:
    if quick:
        return ""
    if sys.platform == "linux" and not any(map(os.path.exists, GPU_DEVICES)):
        return _("no GPU")  # as torch would find, for some seconds and 0.1 GB
    import torch

    count = torch.cuda.device_count()
    return _("{count} GPUs", count=count) if count else _("no GPU")


def _slurm() -> tuple[str, str]:
    commands = shutil.which("sbatch")
    if lacks := slurm.missing():
        return _("commands") if commands else _("missing"), _(
            "a private one needs {what}: {line}", what=", ".join(lacks), line=slurm.install_line()
        )
    return _("commands and daemons"), _("a private one can start: hpclab slurm up")


def _sandboxed() -> tuple[str, str]:
    if why := sandbox.missing():
        return _("missing"), _("to grade a class, hpclab grade: {why}", why=why)
    return "bubblewrap", _("isolates students' code: hpclab grade FOLDER")


def _loopback() -> tuple[str, str]:
    try:
        with socket.socket() as listener, socket.socket() as caller:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            caller.connect(listener.getsockname())
    except OSError as error:
        return _("closed"), _("clusters can't start here: {error}", error=error)
    return _("open"), _("free ports are chosen each time")


def _font() -> tuple[str, str]:
    return cjk_font() or _("missing"), "" if cjk_font() else _(
        "figures are in English; Debian: apt install fonts-wqy-microhei"
    )
