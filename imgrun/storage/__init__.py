"""Images and scratch space: what files hold, and how they become mounts."""
