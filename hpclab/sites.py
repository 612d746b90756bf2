"""Site profiles: a teacher writes how a cluster is asked, in YAML, and students say ``connect("ourcluster")``."""

import os
from pathlib import Path
from typing import Any

import platformdirs
import yaml

ENVIRONMENT = "HPCLAB_SITES"
"""Name of the environment variable that may hold the path of a file of profiles."""


def files() -> list[Path]:
    """Where profiles are looked for, nearest first: ``$HPCLAB_SITES``, the user's configuration, the machine's.

    The latter two are named ``hpclab/sites.yaml``; on Linux they lie in ``~/.config`` and ``/etc/xdg``.
    """
    named = [Path(os.environ[ENVIRONMENT]).expanduser()] if ENVIRONMENT in os.environ else []
    return [
        *named,
        platformdirs.user_config_path("hpclab") / "sites.yaml",
        platformdirs.site_config_path("hpclab") / "sites.yaml",
    ]


def read() -> dict[str, dict[str, Any]]:
    """Profiles by name, each the options of `hpclab.connect` and the ``kind`` of its queue; the nearest file wins.

    One that is named after a queue, such as ``slurm``, holds what ``connect("slurm")`` asks of the site's.

    Raises
    ------
    FileNotFoundError
        If ``$HPCLAB_SITES`` names no file.
    ValueError
        If a file isn't YAML of that form; what an option may be is checked when a profile is used.

    Examples
    --------
    A file that defines ``ourcluster``::

        ourcluster:
          kind: slurm
          queue: teaching
          account: course-101
          walltime: "01:00:00"
          memory: 4GB
          prologue: [module load python/3.12]
    """
    if ENVIRONMENT in os.environ and not files()[0].is_file():
        raise FileNotFoundError(
            f"{ENVIRONMENT} (={os.environ[ENVIRONMENT]!r}) names no file; unset it, or create the file."
        )
    profiles: dict[str, dict[str, Any]] = {}
    for file in files():
        if file.is_file():
            profiles = _parse(file) | profiles
    return profiles


def _parse(file: Path) -> dict[str, dict[str, Any]]:
    try:
        profiles = yaml.safe_load(file.read_text("utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file} isn't YAML: {error}") from None
    if not isinstance(profiles, dict) or not all(isinstance(profile, dict) for profile in profiles.values()):
        raise ValueError(f"{file} must hold names, each with options below it, such as 'ourcluster: {{kind: slurm}}'.")
    for name, profile in profiles.items():
        if "kind" not in profile:
            raise ValueError(f"{file}: {name} has no kind, such as 'kind: slurm'.")
    return profiles
