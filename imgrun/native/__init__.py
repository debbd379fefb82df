"""What is compiled: the system calls Python lacks, and the init program."""
