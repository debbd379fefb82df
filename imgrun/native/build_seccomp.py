"""cffi declarations of libseccomp (ABI mode), compiled into ``imgrun.native._seccomp``.

No compiler and no header is needed: ``imgrun.isolation.security`` opens the library when a filter is asked for.
Sources: seccomp_init(3), seccomp_arch_add(3), seccomp_attr_set(3), seccomp_rule_add(3), seccomp_load(3).
"""

from pathlib import Path

from cffi import FFI

ffibuilder = FFI()
ffibuilder.set_source("imgrun.native._seccomp", None)

ffibuilder.cdef(
    """
    typedef struct scmp_filter_ctx_opaque *scmp_filter_ctx;
    struct scmp_arg_cmp {
        unsigned int arg;
        int op;
        uint64_t datum_a;
        uint64_t datum_b;
    };

    scmp_filter_ctx seccomp_init(uint32_t def_action);
    void seccomp_release(scmp_filter_ctx ctx);
    uint32_t seccomp_arch_native(void);
    int seccomp_arch_add(scmp_filter_ctx ctx, uint32_t arch_token);
    int seccomp_attr_set(scmp_filter_ctx ctx, int attr, uint32_t value);
    int seccomp_syscall_resolve_name(const char *name);
    int seccomp_rule_add_array(scmp_filter_ctx ctx, uint32_t action, int syscall, unsigned int arg_cnt,
                               const struct scmp_arg_cmp *arg_array);
    int seccomp_load(const scmp_filter_ctx ctx);
    int seccomp_export_bpf(const scmp_filter_ctx ctx, int fd);
    """
)

if __name__ == "__main__":
    ffibuilder.emit_python_code(str(Path(__file__).with_name("_seccomp.py")))
