"""The result as a ClassAd: an attribute per line, as HTCondor's tools read and write them.

Attribute names are HTCondor's own where it has one; what was not measured is ``undefined``.
"""

from __future__ import annotations

from imgrun.result import Result

PMU_ATTRIBUTES = {
    "instructions": "RemoteInstructions",
    "cpu_migrations": "RemoteCpuMigrations",
    "context_switches": "RemoteContextSwitches",
    "page_faults": "RemotePageFaults",
}
RATE_ATTRIBUTES = {
    "ipc": "RemoteIPC",
    "cache_hit_rate": "RemoteCpuCacheHitRate",
    "branch_instruction_rate": "RemoteCpuBranchInstructionRate",
    "branch_misprediction_rate": "RemoteCpuBranchPredictionMissRate",
}


def attributes(result: Result) -> dict[str, object]:
    """The attributes of the record. Times in seconds, memory in KiB as HTCondor has it."""
    usage = result.usage
    by_signal = result.exit_code is None and result.signal is not None
    ad: dict[str, object] = {
        "ImgrunJobId": result.id,
        "ImgrunReason": result.reason,
        "ExitBySignal": by_signal,
        "ExitCode": None if by_signal else result.exit_code,
        "ExitSignal": result.signal if by_signal else None,
        "HoldReason": result.hold_reason,
        "RemoteWallClockTime": usage.wall_seconds,
        "RemoteUserCpu": usage.user_seconds,
        "RemoteSysCpu": usage.system_seconds,
        "MemoryUsagePeak": None if usage.memory_peak is None else -(-usage.memory_peak // 1024),
        "BlockReadBytes": usage.read_bytes,
        "BlockWriteBytes": usage.written_bytes,
    }
    counts = usage.counts or {}
    for name, attribute in PMU_ATTRIBUTES.items():
        ad[attribute] = counts.get(name)
    found = usage.rates or {}
    for name, attribute in RATE_ATTRIBUTES.items():
        ad[attribute] = found.get(name)
    return ad


def text(result: Result) -> str:
    """The ClassAd in its line form."""
    return "".join(f"{name} = {literal(value)}\n" for name, value in attributes(result).items())


def literal(value: object) -> str:
    """A value as an expression of the ClassAd language."""
    if value is None:
        return "undefined"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    if isinstance(value, float):
        written = repr(value)
        return written if any(mark in written for mark in ".en") else f"{written}.0"
    return str(value)
