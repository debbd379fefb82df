"""``imgrun doctor`` as an ordinary user: what it says is what the user gets."""

from __future__ import annotations

import json
from typing import Any

from ordinary import AsUser


def examined(run: AsUser) -> tuple[int, dict[str, dict[str, Any]]]:
    done = run("doctor", "--json")
    assert done.stderr == "", done
    record = json.loads(done.stdout)
    return done.status, {check["name"]: check for check in record["checks"]}


def test_it_works_for_users(run_any: AsUser) -> None:
    status, checks = examined(run_any)
    assert (status, run_any.sh("true").status) == (0, 0), checks
    assert "an ordinary user" in checks["caller"]["detail"]
    assert checks["squashfs images"]["state"] == "ok"
    assert checks["xfs images"]["state"] == "missing"
    assert checks["FUSE"]["state"] == "ok"
    for check in checks.values():
        assert check["state"] == "ok" or check["advice"], check


def test_subordinate_ids(run: AsUser, run_single: AsUser) -> None:
    assert examined(run)[1]["user namespace"]["state"] == "ok"
    single = examined(run_single)[1]["user namespace"]
    assert (single["state"], single["needed"]) == ("limited", True)
    assert "subuids" in single["advice"]


def test_no_user_namespaces(run: AsUser) -> None:
    run.wrap = (
        "unshare", "--user", "--map-root-user", "sh", "-c",
        'echo 0 > /proc/sys/user/max_user_namespaces; exec "$0" "$@"',
    )  # fmt: skip
    status, checks = examined(run)
    assert status == 1
    assert checks["user namespace"]["state"] == checks["a job"]["state"] == "missing"
    assert run.sh("true").status == 125
