"""The environment of a job's command: what a login would set. Nothing of the caller's comes in unasked."""

from __future__ import annotations

import os

from imgrun.passwd import User

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def login_environment(user: User, job_id: str, *, tty: bool) -> dict[str, str]:
    """What a login would set, and what says that this is a job of imgrun's."""
    env = {"PATH": DEFAULT_PATH, "HOME": user.home, "USER": user.name, "LOGNAME": user.name, "SHELL": user.shell}
    env |= {"container": "imgrun", "IMGRUN_JOB_ID": job_id}
    if tty:
        env["TERM"] = os.environ.get("TERM", "xterm")
    return env
