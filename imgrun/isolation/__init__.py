"""One module for each facility of the kernel that a job is isolated by.

userns        which ids the job has, and the id maps of its user namespace
namespaces    making the job's namespaces, and entering those of a running job
mounts        the plan: every mount of a job as an object that can be described and executed
system        its parts beside the root: /proc, /sys, /dev, /etc
cgroup        memory, CPU, pids and I/O limits; v1, v2 and hybrid hierarchies behind one interface
network       the host's, none, or the job's own
security      capabilities, no_new_privs, keyring, system call filter, hidden and read-only paths
limits        resource limits of processes, the OOM killer's preference, umask
"""
