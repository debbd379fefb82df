"""What a job holds of the host, and how it is set going: image, scratch, ids, cgroup, plan, and the first process.

Everything that can be refused is refused in :meth:`Launch.prepare`, before a process is made.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from imgrun import enforcing, init_shim, passwd
from imgrun.accounting.meter import Meter
from imgrun.channel import Channel
from imgrun.environment import login_environment
from imgrun.errors import ImgrunError, LimitError, PrivilegeError, RestoreError, SpecError
from imgrun.helper import Helper
from imgrun.image import open_image
from imgrun.isolation import limits, namespaces, network, rootless, security, userns
from imgrun.isolation.cgroups.cgroup import JobCgroup
from imgrun.isolation.child import Setup, become_init
from imgrun.isolation.sources import IdMapUnsupported, OtherImage, RootImage, ScratchDir, Shim, Source, Union
from imgrun.isolation.userns import HeldMap, IdMap
from imgrun.plan import Plan, build_plan
from imgrun.spec import JobSpec
from imgrun.state import JobDir
from imgrun.storage import union
from imgrun.storage.guest import check_architecture, find_init, identify
from imgrun.storage.scratch import Scratch

if TYPE_CHECKING:
    from imgrun.accounting.holding import Hold
    from imgrun.checkpoints.manifest import Checkpoint
    from imgrun.checkpoints.subject import Subject


class Launch:
    """The resources of one job. ``close`` gives back whatever is held, at any stage."""

    def __init__(self, job: JobDir, spec: JobSpec, checkpoint: Checkpoint | None = None) -> None:
        self.checkpoint = checkpoint
        self.earlier_seconds = 0.0
        """Wall time of the job's earlier lives."""
        self.job = job
        self.spec = spec
        self.hostname = spec.hostname or spec.name or f"job-{job.id}"
        if checkpoint is not None:
            self.hostname = str(checkpoint.manifest["hostname"])
            self.earlier_seconds = float(checkpoint.manifest["usage"]["wall_seconds"])
        self.warnings: list[str] = []
        self.timings: list[tuple[str, float]] = []
        self.cgroup_paths: list[str] = []
        self.capabilities = security.DEFAULT_CAPABILITIES | ({"SYS_BOOT"} if spec.init == "image" else frozenset())
        self.pid = 0
        self.rootless = False
        self._scratch_size = spec.scratch_size
        self._shim = ""
        self._fetching: Helper | None = None
        self.servers: list[Helper] = []
        """File servers: when one of them dies, so does the job."""
        self._pasta = ""
        self.init_stop_signal: int | None = None
        self.plan: Plan | None = None
        self._undo: list[Callable[[], None]] = []
        self._restored = False
        self._last = time.perf_counter()
        self._cgroup: JobCgroup | None = None
        self._ids: IdMap | None = None
        self._fds: dict[str, int] = {}
        self._image = -1
        self._filter: security.SeccompFilter | None = None

    @property
    def has_meter(self) -> bool:
        return self._cgroup is not None

    def mark(self, step: str) -> None:
        """Note how long the step since the last mark took, for ``--timings``."""
        moment = time.perf_counter()
        self.timings.append((step, round((moment - self._last) * 1000, 3)))
        self._last = moment

    # -- before there is a process ------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Take everything the job needs. Raises the error of whatever cannot be had; ``close`` gives back the rest."""
        spec = self.spec
        limits.check(spec.rlimits)
        self._pasta = network.find_pasta() if spec.network == "private" else ""
        # Before there is a user namespace of our own: systemd would not know us in it.
        self._make_cgroup()
        self.mark("cgroups")
        self._become_root()
        if self.checkpoint is not None:
            from imgrun.checkpoints.continuing import put_image

            take_away = put_image(self.checkpoint)
            self._undo.append(lambda: None if self._restored else take_away())
        image = open_image(spec.image, spec.root, spec.partition, serve_in=self.job.path if self.rootless else None)
        self._undo.append(image.close)
        self._image = image.lock_fd
        self.warnings += image.warnings
        self.mark("image: probe, lock, loop device")
        self._fds["image"] = image.mount()
        self.servers += [image.server] if image.server else []
        root = RootImage(image.info, spec.root, self._fds["image"])
        self.mark("image: mount")
        root_fd = self._fds["image"]
        check_architecture(identify(root_fd))
        self.user = self._user(root_fd)
        self._command = list(spec.command)
        if spec.init == "image":
            init, self.init_stop_signal = find_init(root_fd)
            self._command = [init]
        self._hold_ids()
        self._delegate_cgroup()
        # Made here: the library is the host's, and the filter needs no more of it to be loaded.
        self._filter = security.filter_for(seccomp=spec.seccomp, userns=spec.userns, init=spec.init)
        scratch = Scratch.create(f"{self.job.path}/scratch", self._scratch_size)
        self._undo.append(scratch.close)
        if self.checkpoint is not None:
            from imgrun.checkpoints.continuing import put_files_back, shim_for

            held = self.checkpoint.hold()
            self._undo.append(lambda: os.close(held))
            put_files_back(self.checkpoint, scratch)
            self._shim = shim_for(self.checkpoint, self.job.path)
        self._shim = self._shim or init_shim.program()
        self.scratch = scratch
        self.mark("scratch")
        base: list[Source] = [root, ScratchDir(scratch, self._scratch_size), Shim(self._shim)]
        owner = self.outside_ids() or (self.user.uid, self.user.gid)
        if self.rootless and spec.root != "writable":
            why = union.needed(scratch, mounts_below=image.mounts_below)
            base = self._use_fuse_overlay(scratch, why) if why else base
        self._host_ids = spec.userns == "off"

        def plan() -> Plan:
            return build_plan(
                spec, hostname=self.hostname, base_sources=base, cgroup_views=self._cgroup_views(), owner=owner,
                again=self.checkpoint is not None, host_ids=self._host_ids,
            )  # fmt: skip

        self.plan = plan()
        try:
            self._open_sources()
        except IdMapUnsupported as e:
            if spec.userns != "auto" or any(m.idmap for m in spec.mounts):
                raise
            self._use_host_ids(e)
            self.plan = plan()
            self._open_sources()
        self.mark("mounts prepared")

    def _become_root(self) -> None:
        """Without the host's root, go on as root of a user and mount namespace of our own."""
        self.rootless = not rootless.is_host_root()
        if not self.rootless:
            return
        if self.spec.userns == "off":
            raise PrivilegeError("--userns off needs root", "leave it out: the job then has a user namespace")
        if any(mount.idmap for mount in self.spec.mounts):
            raise PrivilegeError("idmap mounts need root", "leave idmap out: what is yours belongs to the job's root")
        if self._scratch_size is not None:
            self._refuse_scratch_size()
        self._ids, warnings = rootless.enter()
        self.warnings += warnings
        self.mark("own namespaces")

    def _refuse_scratch_size(self) -> None:
        what = "--scratch-size cannot be kept without root, which mounts a file system of that size"
        if self.spec.limits_mode != "best-effort":
            raise LimitError(what, "bound a directory by --tmpfs DIR:SIZE, which is memory, or use --limits best-effort")
        self.warnings.append(f"without the limit: {what}")
        self._scratch_size = None

    def _user(self, root_fd: int) -> passwd.User:
        user = passwd.lookup(root_fd, self.spec.user or "0")
        for number in (user.uid, user.gid):
            if self.spec.userns == "auto" and number >= userns.RANGE:
                raise SpecError(
                    f"--user {self.spec.user}: id {number} is outside the job's range of {userns.RANGE} ids",
                    "choose an id below 65536, or --userns off",
                )
            if self.rootless and self._ids is not None and self._ids.outside_uid(number) is None:
                raise PrivilegeError(
                    f"--user {self.spec.user}: id {number} is not among the ids you have",
                    "ask your administrator for subordinate ids in /etc/subuid and /etc/subgid, or run as root",
                )
        return user._replace(groups=tuple(g for g in user.groups if self._has_group(g)))

    def _has_group(self, gid: int) -> bool:
        if self.spec.userns == "off":
            return True
        return gid < userns.RANGE if self._ids is None else self._ids.outside_gid(gid) is not None

    def _use_fuse_overlay(self, scratch: Scratch, why: str) -> list[Source]:
        """Where the kernel refuses an overlay to us, a file server makes one; to the plan it is the root itself."""
        mounted, server = union.serve(self._fds["image"], scratch, self.job.path, why)
        self.warnings.append(f"{why}: the root is served by fuse-overlayfs, which is slower")
        self._undo.append(server.close)
        self.servers.append(server)
        self._fds["image"] = mounted
        return [Union(mounted), ScratchDir(scratch, self._scratch_size), Shim(self._shim)]

    def _hold_ids(self) -> None:
        if self.spec.userns == "off" or self.rootless:
            return
        earlier = self._earlier_range()
        held: HeldMap = userns.hold_range(wanted=earlier)
        self._undo.append(held.close)
        self._ids = held.ids
        if earlier and held.ids.outside_uid(0) != earlier:
            self.warnings.append("the job has other ids than when it was frozen: its files in bind mounts are not its own now")

    def _earlier_range(self) -> int | None:
        """Where the ids began that the job had before it was frozen."""
        if self.checkpoint is None or not self.checkpoint.manifest["ids"]["uid"]:
            return None
        return int(self.checkpoint.manifest["ids"]["uid"][0][1])

    def _use_host_ids(self, why: IdMapUnsupported) -> None:
        """The stated fallback where mounts cannot be id-mapped."""
        self.warnings.append(f"{why.message}: the job's user namespace uses the host's own ids")
        self._ids = userns.identity()
        self._host_ids = True

    def _make_cgroup(self) -> None:
        asked = enforcing.asked_for(self.spec, self.warnings)
        self._cgroup = JobCgroup.create(self.job.id, asked, announce=self._announce_cgroups)
        self._undo.append(self._cgroup.remove)
        self.meter = Meter(self.spec, self._cgroup, self.checkpoint.manifest["usage"] if self.checkpoint else None)
        self._undo.append(self.meter.close)

    def _delegate_cgroup(self) -> None:
        assert self._cgroup is not None
        if self.spec.init == "image" and (ids := self.outside_ids()) is not None:
            self._cgroup.delegate(*ids)

    def _cgroup_views(self) -> tuple[tuple[str, str], ...]:
        """What the job sees in /sys/fs/cgroup, as (name, host directory). An init is shown v2 alone, which it may divide."""
        assert self._cgroup is not None
        if self.spec.init == "image" and self._cgroup.clone_into >= 0:
            return (("", self._cgroup.paths[0]),)
        return self._cgroup.views

    def _announce_cgroups(self, paths: list[str]) -> None:
        """Write down what is about to be made, so that it is found again if this process is killed."""
        self.cgroup_paths = list(paths)
        self.job.write("state.json", {"state": "starting", "supervisor": os.getpid(), "cgroups": self.cgroup_paths})

    def _open_sources(self) -> None:
        assert self.plan is not None
        userns_fd = None
        if self._ids is not None and not self._ids.identity:
            userns_fd = namespaces.userns_descriptor(self._ids)
        try:
            for source in self.plan.sources:
                if source.key not in self._fds or source.key == "image":
                    if self.rootless and isinstance(source, OtherImage):
                        source.serve_in = f"{self.job.path}/{source.key}"
                    self._undo.append(source.close)
                    self._fds[source.key] = source.open(userns_fd)
                    if isinstance(source, OtherImage) and source.server is not None:
                        self.servers.append(source.server)
        finally:
            if userns_fd is not None:
                os.close(userns_fd)

    def outside_ids(self) -> tuple[int, int] | None:
        """The host's ids of the job's user; None when the job has no user namespace."""
        if self._ids is None:
            return None
        uid, gid = self._ids.outside_uid(self.user.uid), self._ids.outside_gid(self.user.gid)
        return None if uid is None or gid is None else (uid, gid)

    # -- the first process --------------------------------------------------------------------------------------------

    def _shim_argv(self, status: int) -> list[str]:
        return init_shim.arguments(
            self._command, status_fd=status, role=self._role(), uid=self.user.uid,
            gid=self.user.gid, groups=self.user.groups if self._may_set_groups() else None, cwd=self._cwd(),
            tty=self.spec.tty, rlimits=self.spec.rlimits,
        )  # fmt: skip

    def _role(self) -> Literal["init", "adopt", "exec"]:
        if self.spec.init != "shim":
            return "exec"
        return "init" if self.checkpoint is None else "adopt"

    def _may_set_groups(self) -> bool:
        """A user namespace with a single id may not (user_namespaces(7), setgroups)."""
        return self._ids is None or sum(r.size for r in self._ids.gids) > 1

    def environment(self) -> dict[str, str]:
        """The command's environment: what a login has, the job's id, and what the spec says. Nothing of the caller's."""
        env = login_environment(self.user, self.job.id, tty=self.spec.tty)
        if self.spec.init == "image":
            env["container_uuid"] = f"{self.job.id[:8]}-{self.job.id[8:]}-4000-8000-{self.job.id}"
        return {**env, **self.spec.env}

    def spawn(self, stdio: tuple[int, ...], status: int) -> None:
        """Make the job's namespaces with its first process, which waits for :meth:`hand_over`."""
        assert self.plan is not None
        assert self._cgroup is not None
        self.channel, theirs = Channel.pair()
        self._undo.append(self.channel.close)
        own_network = self.spec.network != "host"
        setup = Setup(
            channel=theirs, supervisors_end=self.channel, operations=self.plan.operations, fds=self._fds,
            hostname=self.hostname, user=self.user, userns=self._ids is not None, host_ids=self._host_ids,
            drop_groups=self._may_set_groups(), own_network=own_network,
            join=tuple(self._cgroup.join_descriptors()), stdio=stdio, tty=self.spec.tty, status=status,
            argv=self._shim_argv(status), env=self.environment(), capabilities=self.capabilities,
            filter=self._filter,
        )  # fmt: skip
        flags = namespaces.job_flags(userns=self._ids is not None and not self.rootless, own_network=own_network)
        try:
            self.pid = namespaces.spawn(flags, lambda: become_init(setup), self._cgroup.clone_into)
        finally:
            theirs.close()
            for fd in setup.join:
                os.close(fd)

    def hand_over(self) -> None:
        """Give the first process its ids and let it go on; our copies of the mounts are closed."""
        if self._ids is not None and not self.rootless:
            userns.write_maps(self.pid, self._ids)
        if self._pasta:
            log = f"{self.job.path}/pasta.log"
            helper = network.connect_private(self._pasta, self.pid, log, as_root=not self.rootless)
            self._undo.append(helper.close)
        try:
            self.channel.send({"go": True})
        except OSError:
            pass  # it has died: the caller reads why, or that it said nothing
        # While the first process mounts: it does not execute anything before the meter has noted where counters stand.
        self.meter.start_counting(self.pid)
        self._close_mounts()
        if self.checkpoint is not None:
            from imgrun.checkpoints import criu_messages

            try:
                criu_messages.load()
            except ImportError:
                pass  # that is said when it is needed

    def _close_mounts(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def exec_error(self, failed: init_shim.StepFailed) -> ImgrunError:
        """What it means that the shim could not start the command."""
        return init_shim.failure(failed, self._command, cwd=self._cwd(), user=self.spec.user or "")

    def _cwd(self) -> str:
        return self.spec.workdir or "/"

    # -- limits of the running job -------------------------------------------------------------------------------------

    def hold_when_full(self) -> Hold | None:
        """For ``--oom hold``, from now on."""
        assert self._cgroup is not None
        return enforcing.hold_when_full(self.job, self.spec, self._cgroup, self.warnings)

    def change_limits(self, spec: JobSpec) -> list[str]:
        """Enforce the limits of ``spec`` from now on. Returns caveats; raises LimitError, with nothing changed."""
        assert self._cgroup is not None
        return enforcing.change(self._cgroup, self.spec, spec, self.warnings)

    # -- freezing and continuing --------------------------------------------------------------------------------------

    def subject(self, began: float, stdin: int | None, unsent: bytes) -> Subject:
        """What a checkpoint has to know of the job, which began at this time of the monotonic clock.

        ``stdin`` is where its input comes from: None for nowhere, negative when that has come to its end.
        """
        from imgrun.checkpoints.continuing import position
        from imgrun.checkpoints.subject import Subject

        return Subject(
            id=self.job.id, spec=self.spec, hostname=self.hostname, init=self.pid, scratch=self.scratch.path,
            userns=self._ids is not None, rootless=self.rootless, input=position(stdin), unsent=unsent,
            usage=lambda: self.meter.so_far(time.monotonic() - began).to_dict(), shim=self._shim,
            fetching=self._fetching.pid if self._fetching else None, image=self._image,
        )  # fmt: skip

    def continue_from(self, stdio: tuple[int, ...]) -> None:
        """Have CRIU bring the processes of the checkpoint back, with these standard streams."""
        from imgrun.checkpoints.continuing import restore

        assert self.checkpoint is not None
        assert self._cgroup is not None
        join = tuple(self._cgroup.join_descriptors())
        work = f"{self.job.path}/criu"
        os.mkdir(work, 0o700)
        try:
            self._fetching, warning = restore(self.checkpoint, self.pid, join, self._cgroup.clone_into, stdio, work)
        except RestoreError as e:
            raise RestoreError(e.message, e.hint or self._keep_log(f"{work}/criu.log")) from e
        finally:
            for fd in join:
                os.close(fd)
        self._restored = True
        if self._fetching is not None:
            # Without it, the job waits for ever for what it has not touched yet.
            self.servers.append(self._fetching)
            self._undo.append(self._fetching.close)
        if warning is not None:
            self.warnings.append(warning)
        self.mark("processes restored")

    def lost_its_memory(self) -> bool:
        """Of a job that has ended: whether that was because what fetched its memory could not go on."""
        return self._fetching is not None and self._fetching.has_failed(wait=True)

    def changed_memory(self) -> tuple[str, str] | None:
        """What to say, and to do, where memory that the job needed was changed in the checkpoint; the job has not seen it."""
        if self._fetching is None or self.checkpoint is None:
            return None
        from imgrun.checkpoints.continuing import changed_under_way

        return changed_under_way(self.checkpoint, self._fetching.log)

    def _keep_log(self, path: str) -> str:
        """The job's directory goes with its failed start; why it failed shall stay. Returns where to look."""
        kept = f"{self.job.root.path}/restore.log"
        try:
            os.rename(path, kept)
        except OSError:
            return "CRIU wrote no log"
        return f"its log is {kept}"

    # -- while it runs and after --------------------------------------------------------------------------------------

    def command_pid(self) -> int | None:
        """The command's pid on the host; None when it cannot be told."""
        from imgrun.isolation.processes import command_of

        return command_of(self.pid)

    def end(self) -> None:
        """Kill the job if it still runs: with PID 1 the kernel ends all of it."""
        if self.pid > 0:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def close(self) -> None:
        """Give back everything, last first. Every step is tried; the first failure is raised at the end."""
        failure: Exception | None = None
        self._close_mounts()
        while self._undo:
            try:
                self._undo.pop()()
            except (ImgrunError, OSError) as e:
                failure = failure or e
        if failure is not None:
            raise failure
