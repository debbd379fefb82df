"""``doctor``: what this host lacks."""

from __future__ import annotations

from typing import NoReturn

import click


@click.command("doctor", short_help="Say what imgrun needs of this host, and what is missing.")
@click.option("--json", "as_json", is_flag=True, help="Print what is found as JSON.")
@click.option("--classad", "as_classad", is_flag=True, help="Print what HTCondor's STARTD_CRON advertises of this host.")
def doctor(as_json: bool, as_classad: bool) -> NoReturn:
    """Try everything that imgrun needs of this host, as you: a line each, and what to do about what is missing.

    The exit status is 0 when 'imgrun start' works here, 1 when something is missing that it needs.
    """
    if as_classad:
        from imgrun.schedulers.advertise import classad

        print(classad(), end="")
        raise click.exceptions.Exit(0)
    from imgrun.doctor import examine, report, works

    checks = examine()
    if as_json:
        import json

        print(json.dumps({"works": works(checks), "checks": [check._asdict() for check in checks]}, indent=1))
    else:
        report(checks, print)
    raise click.exceptions.Exit(0 if works(checks) else 1)
