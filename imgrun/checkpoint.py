"""Making a checkpoint: what of a job is saved, and in which order, so that it is complete or absent and no job is lost.

It is made beside its final name and renamed when it is complete (imgrun.checkpoints.manifest says what is in it). All that
can fail is done while the job's processes stand still under CRIU, which lets them go on if anything does; only then is the
job ended, and its files, where they can stay on their disk, are renamed into the checkpoint, which gets its name at once.
What takes longer makes it better and follows. It holds the job's memory, so it is its owner's alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from imgrun import criu, init_shim
from imgrun import syscalls as sc
from imgrun.checkpoints import archive, captured, criu_rpc, identity, memory_files
from imgrun.checkpoints.ahead import Ahead, Syncing
from imgrun.checkpoints.archive import Archive
from imgrun.checkpoints.criu_process import first_pid
from imgrun.checkpoints.digests import Totals, lines
from imgrun.checkpoints.manifest import DIRECTORY, FORMAT, LIST, MANIFEST, SHIM, checksum, describe_files, said, size_of
from imgrun.checkpoints.placing import publish, put_in_place
from imgrun.checkpoints.refusals import explained, refuse
from imgrun.checkpoints.subject import How, Subject, building_archive, building_place, kept_log
from imgrun.checkpoints.writable import WritableImage
from imgrun.errors import CheckpointError, ImgrunError, JobStateError
from imgrun.isolation import namespaces
from imgrun.isolation.processes import census, children_of
from imgrun.state import now
from imgrun.storage.scratch import FILE
from imgrun.storage.trees import remove_tree

NOT_CAPTURED = "the image is not captured, and must stay as it is"


class Saved(NamedTuple):
    """A good checkpoint: where the time went, as steps in milliseconds, and what its maker should know."""

    manifest: dict[str, Any]
    timings: list[tuple[str, float]]
    warnings: list[str]


def save(subject: Subject, target: str, how: How, identifier: str, alone: Callable[[dict[str, Any]], None]) -> Saved:
    """Save the job to ``target``, replacing an older checkpoint there once this one is complete.

    ``identifier`` is what its manifest is known by. ``alone`` is called with CRIU's statistics when all is saved and the job
    is about to be ended: from then on it is in the checkpoint alone, which stays, with or without its name.
    Raises CheckpointError or NoSpace; the job then runs on. Runs in a process of its own beside the supervisor.
    """
    target = target if target == "-" else os.path.abspath(target)
    refuse(subject, target, how)
    building = building_place(subject, target, how)
    saving = None
    complete = False
    try:
        remove_tree(building)
        if target != "-":
            os.makedirs(os.path.dirname(target), exist_ok=True)
        if (unfinished := building_archive(subject, target, how)) is not None:
            archive.check_place(unfinished)
        os.mkdir(building, 0o700)
        for name in ("processes", "files", "work"):
            os.mkdir(f"{building}/{name}", 0o700)
        saving = _Saving(subject, building, target, how, identifier, alone)
        saving.run()
        complete = True
        return Saved(saving.manifest, saving.timings, saving.warnings)
    except (CheckpointError, OSError) as e:
        final = isinstance(e, CheckpointError) and saving is not None and saving.alone
        error = e if final else explained(e, building, target)
        if error is e:
            raise
        raise error from e
    finally:
        if not complete:
            with contextlib.suppress(OSError):
                os.rename(f"{building}/work/{criu.LOG}", kept_log(subject, target))
        if saving is None or not saving.alone or how.archive:
            with contextlib.suppress(ImgrunError):  # what is said of the checkpoint matters more
                remove_tree(building)


class _Saving:
    """One checkpoint under way."""

    def __init__(
        self, subject: Subject, building: str, target: str, how: How, identifier: str, alone: Callable[[dict[str, Any]], None]
    ) -> None:
        self.subject = subject
        self.building = building
        self.target = target
        self.how = how
        self.manifest: dict[str, Any] = {}
        self.timings: list[tuple[str, float]] = []
        self.warnings: list[str] = []
        self._sized = subject.spec.scratch_size is not None
        """Whether what the job wrote is a file system in one file, to which the kernel writes until it is unmounted."""
        self.layers = (FILE,) if self._sized else captured.LAYERS
        self._stays = False
        """Whether the files are left where they are until the job has ended."""
        self.alone = False
        """Whether the job is in what was made alone."""
        self._identifier = identifier
        self._say_alone = alone
        self._files_seconds = 0.0
        """How long it took to save the job's files while it stood still."""
        self._reaper = 0
        self._descriptors: dict[str, int] = {}
        self._places = captured.memory_places(subject.spec)
        self._image = WritableImage(subject, how) if subject.spec.root == "writable" else None
        # Open from the first: a failure of the disk is told to whoever had something open there before it.
        self._here = os.open(building, DIRECTORY)
        # To write to the disk meanwhile would take time from CRIU, for which a job that is to go on waits; before one that is
        # to end may do so, all of it has to be done.
        self._ahead = Ahead(self._here, "processes", write=not how.leave_running and not how.archive)
        self._began = self._last = time.monotonic()

    def mark(self, step: str) -> None:
        moment = time.monotonic()
        self.timings.append((step, round((moment - self._last) * 1000, 3)))
        self._last = moment

    def run(self) -> None:
        subject = self.subject
        ended = os.pidfd_open(subject.init)
        self._descriptors = namespaces.open_all(subject.init)
        opened = [ended, *self._descriptors.values()]
        try:
            self._await_memory()
            self._reaper = next(iter(children_of(subject.init)), 0)
            if not self._reaper:
                raise JobStateError("the job is ending", "see 'imgrun inspect' for how")
            dump = criu_rpc.Dump(
                log=f"{self.building}/work/{criu.LOG}", kept=kept_log(subject, self.target),
                images=f"{self.building}/processes", rounds=self.how.pre_dump, mark=self.mark, warn=self.warnings.append,
                ahead=self._ahead, prepare=self._prepare, inside=lambda: memory_files.save(self._places),
            )  # fmt: skip
            session = dump.run(lambda: self._site(opened), frozen=lambda session: self._frozen(session, ended))
            if not self.how.leave_running:
                # While CRIU is not reaped, the job's PID namespace cannot end.
                session.close()
                _await_end(ended)
        finally:
            self._ahead.stop()
            if self._image is not None:
                self._image.let_go()
            for fd in opened:
                os.close(fd)
        self.mark("end of the job" if not self.how.leave_running else "job runs on")
        try:
            self._finish()
        finally:
            session.close()
            os.close(self._here)

    def _await_memory(self) -> None:
        """What a lazy restore has not brought yet cannot be saved."""
        if self.subject.fetching:
            with contextlib.suppress(ProcessLookupError):
                fd = os.pidfd_open(self.subject.fetching)
                _await_end(fd)
                os.close(fd)
            self.mark("memory of the lazy restore")

    def _site(self, opened: list[int]) -> criu.Site:
        """Where CRIU works, with mounts that are good for one session."""
        userns = self._descriptors.get("user")
        opened.append(toolbox := captured.toolbox_mount())
        opened.append(images := captured.directory_mount(f"{self.building}/processes", userns))
        opened.append(work := captured.directory_mount(f"{self.building}/work", userns))
        return criu.Site(self._descriptors, toolbox, images, work, self.subject.userns)

    def _prepare(self) -> None:
        self.manifest = self._describe()
        self._decide_files()
        self.mark("description of the job")

    def _describe(self) -> dict[str, Any]:
        from imgrun import __version__

        spec = self.subject.spec
        reaper = self._reaper
        shutil.copyfile(self.subject.shim, f"{self.building}/{SHIM}")
        return {
            "format": FORMAT,
            "imgrun": __version__,
            "job": self.subject.id,
            "id": self._identifier,
            "created_at": now(),
            "spec": spec.to_dict(),
            "hostname": self.subject.hostname,
            "image": self._describe_image(),
            "shim": init_shim.PROTOCOL,
            "streams": {str(fd): os.readlink(f"/proc/{reaper}/fd/{fd}") for fd in (0, 1, 2)},
            "input": self.subject.input,
            "userns": self.subject.userns,
            "rootless": self.subject.rootless,
            "ids": {name: captured.id_rows(reaper, name) for name in ("uid", "gid")},
            "host": identity.host(),
            "memory": self._places,
            "layers": list(self.layers),
        }

    def _describe_image(self) -> dict[str, Any]:
        path, held = self.subject.spec.image, self.subject.held_image
        if not identity.is_at(path, held):
            self.warnings.append(f"{path} is not the image that the job has: restore it with that one, by --image PATH")
        return identity.image(path, held)

    def _decide_files(self) -> None:
        how = self.how
        if not how.leave_running:
            movable = captured.can_rename(self.subject.scratch, f"{self.building}/files")
            self._stays = not self._sized if how.archive else movable
        if self._image is not None:
            self._image.require_room(self.building)

    def _frozen(self, session: criu.Session, init: int) -> bool:
        """Everything that must be of the same instant; and, unless the job is to run on, everything that can fail.

        Whether the job was ended.
        """
        self.mark("processes")
        began = time.monotonic()
        self._settle_scratch()
        with (
            contextlib.nullcontext()
            if self._stays
            else captured.copying(self.subject.scratch, self.layers, f"{self.building}/files")
        ):
            session.in_job()
            self.mark("memory file systems")
            self._save_input()
            self._count()
        self.mark("files")
        self._files_seconds = time.monotonic() - began
        if self.how.leave_running:
            return False
        self._note_statistics()
        if self.how.archive:
            self._archive(self.subject.scratch if self._stays else f"{self.building}/files")
        else:
            if self._image is not None:
                self._image.settle(self.manifest)
            self._prepare_manifest()
        if not session.is_alive():
            raise CheckpointError("CRIU was killed while the job's files were saved", "try again")
        self._say_alone(self.manifest["statistics"])
        self.alone = True
        self._kill(init)
        if not self.how.archive:
            publish(self.building)
        return True

    def _note_statistics(self) -> None:
        """To read CRIU's takes a while, for which a job that runs on does not wait."""
        statistics = self.manifest["statistics"] = criu_rpc.statistics(f"{self.building}/work")
        statistics["files_seconds"] = round(self._files_seconds, 6)
        if statistics["frozen_seconds"] is not None:
            statistics["frozen_seconds"] = round(statistics["frozen_seconds"] + statistics["files_seconds"], 6)

    def _save_input(self) -> None:
        if self.manifest["streams"]["0"].startswith("pipe:"):
            waiting = captured.waiting_input(f"/proc/{self._reaper}/fd/0") + self.subject.unsent
            if waiting:
                with open(f"{self.building}/stdin", "wb") as f:
                    f.write(waiting)

    def _count(self) -> None:
        count = census(self._descriptors["pid"], first_pid())
        self.manifest["last_pid"] = count.largest
        self.manifest["processes"] = count.processes
        usage = self.subject.usage()
        if usage.get("user_seconds") is None:
            usage |= {"user_seconds": count.user_seconds, "system_seconds": count.system_seconds}
        self.manifest["usage"] = usage

    def _kill(self, init: int) -> None:
        """End the job before CRIU hears of it, which would let the tree run on for a moment and change what was saved.

        The end of PID 1 kills all of its namespace at once, so when one process has ended, none of the others runs again.
        """
        reaper = os.pidfd_open(self._reaper)
        try:
            signal.pidfd_send_signal(init, signal.SIGKILL)
            _await_end(reaper)
        finally:
            os.close(reaper)

    def _settle_scratch(self) -> None:
        """What is in a file system of its own is in its file only when that is synced."""
        if self._sized:
            here = os.open(f"/proc/{self.subject.init}/root/tmp", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            sc.syncfs(here)
            os.close(here)

    # -- what makes it a checkpoint -----------------------------------------------------------------------------------

    def _finish(self) -> None:
        """The job runs on, or has ended: its files become the checkpoint's; and what it wrote into its image is known."""
        if self.how.leave_running:
            self._note_statistics()
            if self.how.archive:
                self._archive(f"{self.building}/files")
            else:
                self._list_files()
                self._write_manifest()
                put_in_place(self.building, self.target, self.subject.scratch)
        elif self.how.archive:
            if self._image is not None and self._image.later:
                self._try(self._add_image, NOT_CAPTURED)
        else:
            put_in_place(self.building, self.target, self.subject.scratch)
            self.building = self.target
            self._complete()

    def _complete(self) -> None:
        """There is a good checkpoint; what follows may make it better, and must not make it worse."""
        if self._image is not None:
            self._try(self._take_image, "how the job left its image is not known")
        self._try(self._hash_files, "what the job wrote to disk is not hashed")

    def _take_image(self) -> None:
        assert self._image is not None
        if why := self._image.take(self.building, self.manifest):
            self.warnings.append(f"{NOT_CAPTURED}: {why}")
        self.mark("image")
        self._write_manifest()

    def _hash_files(self) -> None:
        if not self._sized:
            self._list_files()
            self._write_manifest()
        elif self._stays:
            captured.await_detached(f"{self.building}/files/{self.layers[0]}")  # unmounting it writes to it

    def _try(self, step: Callable[[], None], otherwise: str) -> None:
        try:
            step()
        except Exception as e:  # noqa: BLE001 - nothing may make it worse
            with contextlib.suppress(OSError):
                os.unlink(f"{self.building}/{MANIFEST}.new")
            self.warnings.append(f"{otherwise}: {said(e)}")

    def _add_image(self) -> None:
        assert self._image is not None
        self._image.add(self.target)
        self.mark("image")

    def _list_files(self, files: str | None = None) -> None:
        """Note everything that the job wrote to disk, with hashes; ``files`` is where it is, if not in the checkpoint."""
        totals = Totals()
        top = os.open(files or f"{self.building}/files", DIRECTORY)
        try:
            with open(f"{self.building}/{LIST}", "wb") as f:
                f.writelines(lines(top, self.layers, totals))
        finally:
            os.close(top)
        self.manifest["tree"] = {"entries": totals.entries, "bytes": totals.bytes}
        self.mark("hashes of the files")

    def _archive(self, files: str) -> None:
        building = building_archive(self.subject, self.target, self.how)
        path = None if building is None else self.target
        top = os.open(files, DIRECTORY)
        try:
            archive.check_holdable(top, self.layers)
            image = None if self._image is None else self._image.settle(self.manifest)
            self.mark("image")
            self._list_files(files)
            self._write_manifest(sync=False)
            target = Archive(path, building, self.how.output, self.how.compress)
            more = self.manifest["image"]["stored"] if self._image is not None and self._image.later else None
            archive.write(target, self.building, top, self.layers, image, more)
        finally:
            os.close(top)
            if self._image is not None:
                self._image.let_go()
        self.mark("archive")

    def _write_manifest(self, *, sync: bool = True) -> None:
        self._prepare_manifest(sync=sync)
        publish(self.building)
        if sync:
            os.fsync(self._here)

    def _prepare_manifest(self, *, sync: bool = True) -> None:
        """The last file, once all others are on the disk."""
        manifest = self.manifest
        syncing = Syncing(self._here) if sync else None
        manifest["files"] = describe_files(self.building, manifest.get("files", {}), self._ahead.stop())
        self.mark("hashes")
        statistics = manifest["statistics"]
        statistics["bytes"] = size_of(manifest["files"])
        statistics["total_seconds"] = round(time.monotonic() - self._began, 6)
        manifest["checksum"] = checksum(manifest)
        if syncing is not None:
            syncing.finish()
        with open(f"{self.building}/{MANIFEST}.new", "w", encoding="utf-8") as f:
            json.dump(manifest, f, indent=1)
            f.write("\n")
            f.flush()
            if sync:
                os.fsync(f.fileno())
        self.mark("manifest, to the disk")


def _await_end(pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll()
