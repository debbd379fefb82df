"""One interface over the cgroup worlds: version 1, version 2, and both at once."""
