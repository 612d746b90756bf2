"""What a private Slurm needs on this machine, and how to install it."""

import os
import platform
import shutil
import subprocess
from glob import glob

PROGRAMS = ("slurmctld", "slurmd", "munged", "scontrol", "srun", "sattach")
SBIN = ("/usr/sbin", "/usr/local/sbin", "/sbin")
"""Where daemons lie, which an ordinary user's PATH may lack."""
LIBRARIES = ("/usr/lib/*-linux-gnu", "/usr/lib64", "/usr/lib")
"""Where Debian and others have libraries."""


def missing() -> list[str]:
    """Programs and libraries that a private Slurm needs and this machine doesn't have."""
    lacks = [program for program in PROGRAMS if not _which(program)]
    return lacks + ([] if _nss_wrapper() else ["libnss_wrapper.so"])


def install_line() -> str:
    """How to install what a private Slurm needs on this system."""
    if platform.system() != "Linux":
        return f"Slurm needs Linux, and this is {platform.system()}; use connect('local'), or Binder"
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    family = f"{release.get('ID', '')} {release.get('ID_LIKE', '')}".split()
    if {"debian", "ubuntu"} & set(family):
        return "sudo apt install slurm-wlm munge libnss-wrapper"
    if {"fedora", "rhel", "centos"} & set(family):
        epel = "" if "fedora" in family[:1] else "sudo dnf install epel-release && "
        return f"{epel}sudo dnf install slurm slurm-slurmctld slurm-slurmd munge nss_wrapper"
    return "install Slurm, munge and nss_wrapper as https://slurm.schedmd.com/quickstart_admin.html says"


def _which(program: str) -> str | None:
    """Path of a program; not that of a private Slurm's own `srun`, which whoever uses one has first on the PATH."""
    path = os.environ.get("PATH", "").split(os.pathsep)
    folders = [place for place in path if not os.path.exists(f"{place}/../slurmd.conf")]
    return shutil.which(program, path=os.pathsep.join([*folders, *SBIN]))


def _nss_wrapper() -> str | None:
    """Slurm's daemons listen where their host's name leads; this library gives them one that leads to the loopback."""
    return next((path for place in LIBRARIES for path in glob(f"{place}/libnss_wrapper.so")), None)


def find() -> dict[str, str]:
    """Paths of all programs, by name; also of "true" and of the library "nss_wrapper", and Slurm's "version".

    Raises
    ------
    FileNotFoundError
        If something is missing, with the line that installs it.
    """
    if lacks := missing():
        raise FileNotFoundError(f"a private Slurm needs {', '.join(lacks)}: {install_line()}.")
    paths = {program: _which(program) or "" for program in (*PROGRAMS, "true")}
    version = subprocess.run([paths["slurmctld"], "-V"], capture_output=True, text=True, check=True).stdout
    return paths | {"nss_wrapper": _nss_wrapper() or "", "version": version.split()[-1]}
