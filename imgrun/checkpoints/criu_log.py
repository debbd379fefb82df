"""What CRIU's log says, for people."""

from __future__ import annotations

PASSING = "In-flight connection"
"""What CRIU cannot save, but is over in a moment."""
KNOWN = (
    (PASSING, "a TCP connection was just being made"),
    ("Can't dump ghost file", "an unlinked file that is still open is too large to be saved with it"),
    ("Can't lookup mount", "it has a file open on a mount that it cannot see any more"),
    ("seccomp", "a process has a system call filter, which only root outside a user namespace can suspend"),
    ("inotify", "it watches a file by inotify that cannot be found again by its path"),
    ("fanotify", "it watches files by fanotify"),
    ("io_uring", "it uses io_uring"),
    ("TCP repair mode", "it has a TCP connection on the host's network, which needs --userns off, or a network of its own"),
    ("sysvipc", "it uses System V shared memory, semaphores or message queues"),
    ("Unsupported", "it uses something that CRIU cannot save"),
    ("No space left", "there is no space left for the checkpoint"),
    ("Can't find pid", "a process id that it had is taken"),
)
"""What lines of CRIU's log mean to a person."""


HARMLESS = ("net: Unexpected error: -1", "Can't setup RLIMIT_NOFILE", "can't get apparmor", "Can't open /proc/sys/net/",
            "tun: Unable to create tun")  # fmt: skip
"""What CRIU logs as errors while it finds out what the kernel can do."""


def explain(log: str, said: str = "") -> str:
    """The cause of a failure in one sentence: from what CRIU logged as errors, the first that is known, or the first.

    ``said`` is what it told over its socket, when there is no log.
    """
    try:
        with open(log, encoding="utf-8", errors="replace") as f:
            errors = [line.rstrip() for line in f if "Error" in line or "Err " in line]
    except OSError:
        return said or "it left no log"
    if any(word in said for word in HARMLESS):
        said = ""
    errors = [line for line in errors if not any(word in line for word in HARMLESS)]
    for line in errors:
        for mark, meaning in KNOWN:
            if mark in line:
                return f"{meaning} ({line.partition('): ')[2] or line})"
    return errors[0].partition("): ")[2] or errors[0] if errors else said or "it gave no reason"
