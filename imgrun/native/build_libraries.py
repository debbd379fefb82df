"""cffi declarations of shared libraries found at run time, compiled into ``imgrun.native._libraries`` (ABI mode).

ABI mode needs neither a compiler nor the libraries' headers: the output is a Python module of declarations, and each
library is opened with ``ffi.dlopen`` by the one module that uses it.

Sources: libblkid's API reference, "Low-level probing", "Superblocks probing" and "Partitions probing".
"""

from pathlib import Path

from cffi import FFI

ffibuilder = FFI()
ffibuilder.set_source("imgrun.native._libraries", None)

ffibuilder.cdef(
    """
    typedef struct blkid_struct_probe *blkid_probe;
    typedef struct blkid_struct_partlist *blkid_partlist;
    typedef struct blkid_struct_partition *blkid_partition;
    typedef struct blkid_struct_parttable *blkid_parttable;

    blkid_probe blkid_new_probe(void);
    void blkid_free_probe(blkid_probe pr);
    int blkid_probe_set_device(blkid_probe pr, int fd, int64_t offset, int64_t size);
    int blkid_probe_set_sectorsize(blkid_probe pr, unsigned int size);

    int blkid_probe_enable_superblocks(blkid_probe pr, int enable);
    int blkid_probe_set_superblocks_flags(blkid_probe pr, int flags);
    int blkid_probe_enable_partitions(blkid_probe pr, int enable);
    int blkid_probe_set_partitions_flags(blkid_probe pr, int flags);
    int blkid_probe_filter_partitions_type(blkid_probe pr, int flag, char *names[]);

    int blkid_do_probe(blkid_probe pr);
    int blkid_do_safeprobe(blkid_probe pr);
    int blkid_probe_lookup_value(blkid_probe pr, const char *name, const char **data, size_t *length);

    blkid_partlist blkid_probe_get_partitions(blkid_probe pr);
    blkid_parttable blkid_partlist_get_table(blkid_partlist list);
    int blkid_partlist_numof_partitions(blkid_partlist list);
    blkid_partition blkid_partlist_get_partition(blkid_partlist list, int index);
    const char *blkid_parttable_get_type(blkid_parttable table);
    const char *blkid_partition_get_name(blkid_partition partition);
    const char *blkid_partition_get_uuid(blkid_partition partition);
    const char *blkid_partition_get_type_string(blkid_partition partition);
    int blkid_partition_get_type(blkid_partition partition);
    int blkid_partition_get_partno(blkid_partition partition);
    int64_t blkid_partition_get_start(blkid_partition partition);
    int64_t blkid_partition_get_size(blkid_partition partition);
    unsigned long long blkid_partition_get_flags(blkid_partition partition);
    int blkid_partition_is_extended(blkid_partition partition);
    """
)

if __name__ == "__main__":
    ffibuilder.emit_python_code(str(Path(__file__).with_name("_libraries.py")))
