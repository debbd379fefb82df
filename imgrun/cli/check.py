"""``check``: whether a checkpoint can be continued here, or a job be frozen."""

from __future__ import annotations

from typing import NoReturn

import click

from imgrun.cli import printable


@click.command("check", short_help="Say whether a checkpoint can be continued, or a job frozen.")
@click.option("--json", "as_json", is_flag=True, help="Print what is found as JSON.")
@click.argument("what", metavar="CHECKPOINT|JOB")
def check(what: str, as_json: bool) -> NoReturn:
    """Look at a checkpoint (a path with a '/', a directory that holds one, an archive) or at a running job; change nothing.

    One line for each requirement: ok, warning or refused. The exit status is 0, or 1 when something is refused.
    """
    from imgrun.checkpoints import manifest
    from imgrun.checkpoints.preflight import findings
    from imgrun.checkpoints.unpacking import is_archive, opened

    if "/" in what or manifest.exists(what) or is_archive(what):
        with opened(what) as checkpoint:
            found = findings(checkpoint)
    else:
        from imgrun.checkpoints.audit import audit
        from imgrun.job import Job

        found = audit(Job.find(what))
    if as_json:
        import json

        print(json.dumps([finding._asdict() for finding in found], indent=1))
    else:
        for finding in found:
            print(printable(str(finding)))
            if finding.hint and finding.level != "ok":
                print(f"{'':23} {printable(finding.hint)}")
    raise click.exceptions.Exit(1 if any(finding.level == "refused" for finding in found) else 0)
