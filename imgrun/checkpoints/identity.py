"""What a checkpoint depends on, written down so that it is known again: the image, the processor, the kernel, CRIU."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import Any

HOW_TO_GET_CRIU = "install the wheels of imgrun-criu and pycriu, which tools/build-wheels of imgrun's source makes"
SAMPLES = 64
SAMPLE = 64 << 10
NOT_FOR_PROGRAMS = frozenset((
    # What Linux itself calls so, each version with other words, and what it does about faults of processors
    # (arch/x86/include/asm/cpufeatures.h).
    "always amd_dcm amd_lbr_pmc_freeze amd_lbr_v2 aperfmperf arch_capabilities arch_perfmon art bhi_ctrl btc_no "
    "constant_tsc cpb cpuid cpuid_fault entry_ibpb epb extd_apicid flush_l1d hw_pstate ibpb ibrs ibrs_enhanced intel_ppin "
    "l1tf_pteinv ls_cfg_ssbd md_clear nonstop_tsc nonstop_tsc_s3 nopl perfmon_v2 proc_feedback pti rep_good rrsba_ctrl "
    "rsb_ctxsw split_lock_detect ssbd stibp tsc_known_freq tsc_reliable up use_ibpb use_ibrs_fw virt_ssbd xcompacted "
    "xtopology zen "
    # Of the machine, and what kernels and hypervisors alone can use.
    "acpi apic arat avic bts bus_lock_detect cat_l2 cat_l3 cdp_l2 cdp_l3 cmp_legacy cqm cqm_llc cqm_mbm_local cqm_mbm_total "
    "cqm_occup_llc cr8_legacy dca de debug_swap decodeassists ds_cpl dtes64 dtherm dts ept ept_ad est extapic flexpriority "
    "flushbyasid fred hfi ht hwp hwp_act_window hwp_epp hwp_notify hwp_pkg_req hypervisor ibs ida invpcid la57 lbrv lkgs "
    "mba mca mce mp msr mtrr nodeid_msr npt nrip_save nx osvw overflow_recov pae pat pausefilter pbe pcid pconfig pdcm "
    "pdpe1gb pebs perfctr_core perfctr_llc perfctr_nb pfthreshold pge pln pse pse36 pts rapl rdt_a sdbg sev sev_es sev_snp "
    "sgx_lc skinit smap smca sme smep smx ss succor svm svm_lock tdx_guest tm tm2 tme topoext tpr_shadow tsc_adjust "
    "tsc_deadline_timer tsc_scale umip v_spec_ctrl v_vmsave_vmload vgif vmcall vmcb_clean vme vmmcall vmx vnmi vpid "
    "wbnoinvd wdt x2apic x2avic xsaves xtpr"
).split())  # fmt: skip
"""Flags of /proc/cpuinfo that say something of the machine or its kernel, and nothing that a program could use."""


def image(path: str, held: str) -> dict[str, Any]:
    """An image's identity: where it is, and size, time of change and fingerprint. Raises OSError.

    It is read at ``held``, which leads to what the job has, whatever is at ``path`` by now.

    The fingerprint is the SHA-256 of samples all over the file: copies have the same, other images another; that not a
    byte of a large one was changed it does not prove. Of a directory only the place is known.
    """
    status = os.stat(held)
    record: dict[str, Any] = {"path": path, "kind": "directory" if stat.S_ISDIR(status.st_mode) else "file"}
    if stat.S_ISREG(status.st_mode):
        record |= {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "fingerprint": fingerprint(held)}
    return record


def is_at(path: str, held: str) -> bool:
    """Whether what is at ``path`` is still what ``held`` leads to."""
    try:
        return os.path.samefile(path, held)
    except OSError:
        return False


def open_image(path: str, held: str, partition: str | None) -> dict[str, Any]:
    """The identity of an image which a job writes to, and will until it has ended. Raises OSError, ImageError.

    ``stored`` is what it takes on the disk. Instead of how it will be left, ``mount`` says which mount for writing was its
    last: that is still so unless somebody has written to it since. It is known of ext2, ext3 and ext4 only.
    """
    from imgrun.image import probe
    from imgrun.storage import superblock

    info = probe(held, partition)
    record = image(path, held) | {"stored": os.stat(held).st_blocks * 512}
    if (mounts := superblock.mounts(held, info.offset, info.fstype)) is not None:
        record["mount"] = {"offset": info.offset, "fstype": info.fstype, "mounts": mounts}
    return record


def fingerprint(path: str) -> str:
    """The SHA-256 of a file's size and of samples of it."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        digest = hashlib.sha256(str(size).encode())
        last = max(size - SAMPLE, 0)
        for number in range(SAMPLES + 1):
            digest.update(os.pread(fd, SAMPLE, last * number // SAMPLES))
        return digest.hexdigest()
    finally:
        os.close(fd)


def same_image(was: dict[str, Any], path: str) -> str | None:
    """How the image at ``path`` differs from what it was; None when it does not. Raises OSError."""
    status = os.stat(path)
    kind = "directory" if stat.S_ISDIR(status.st_mode) else "file"
    if kind != was.get("kind"):
        return f"it was a {was.get('kind')} and is a {kind}"
    if kind == "directory":
        return None
    if status.st_size != was.get("size"):
        return f"it had {was.get('size')} bytes and has {status.st_size}"
    if (mount := was.get("mount")) is not None:
        from imgrun.storage import superblock

        same = superblock.mounts(path, mount["offset"], mount["fstype"]) == mount["mounts"]
        return None if same else "it was written to since"
    if status.st_mtime_ns != was.get("mtime_ns") and fingerprint(path) != was.get("fingerprint"):
        return "its content was changed"
    return None


def processor() -> dict[str, Any]:
    """The processor's kind and what programs can use of it (/proc/cpuinfo), of the first one."""
    found: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as f:
            for line in f:
                key, _, value = line.partition(":")
                if not line.strip():
                    break
                found[key.strip()] = value.strip()
    except OSError:
        pass
    flags = set((found.get("flags") or found.get("Features") or "").split()) - NOT_FOR_PROGRAMS
    return {
        "vendor": found.get("vendor_id") or found.get("CPU implementer"),
        "family": found.get("cpu family") or found.get("CPU architecture"),
        "model": found.get("model name") or found.get("CPU part"),
        "features": sorted(flags),
    }


def host() -> dict[str, Any]:
    """This host, as far as processes depend on it."""
    system = os.uname()
    return {"kernel": system.release, "machine": system.machine, "criu": criu_version(), "cpu": processor()}


def criu_version() -> str | None:
    """Of the CRIU that imgrun uses; None without one."""
    try:
        import imgrun_criu
    except ImportError:
        return None
    return str(imgrun_criu.VERSION)


def version_tuple(text: str | None) -> tuple[int, ...]:
    """The numbers a version begins with: (6, 18, 0) for 6.18.0-rc1."""
    numbers = []
    for word in (text or "").replace("-", ".").split("."):
        if not word.isdigit():
            break
        numbers.append(int(word))
    return tuple(numbers)
