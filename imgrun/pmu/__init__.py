"""What the job really did with the CPU: the kernel's performance counters (perf_event_open(2))."""
