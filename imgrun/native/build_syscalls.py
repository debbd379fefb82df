"""cffi definitions of the system calls that Python does not offer. Compiled into ``imgrun.native._syscalls``.

Every C function returns what the kernel returns, or ``-errno``; ``imgrun.syscalls`` turns that into exceptions.
"""

from cffi import FFI

ffibuilder = FFI()

ffibuilder.cdef(
    """
    long ig_clone(uint64_t flags, int cgroup_fd, int pid);
    long ig_userns_holder(void);
    long ig_unshare(int flags);
    long ig_setns(int fd, int flags);
    long ig_pivot_root(const char *new_root, const char *put_old);
    long ig_exchange(const char *one, const char *other);
    long ig_fs_magic(const char *path);
    long ig_syncfs(int fd);
    long ig_begin_writing(int fd);
    long ig_perf_event_open(uint32_t type, uint64_t config, int pid, int cpu, int group, unsigned long flags,
                            int inherit, int enable_on_exec, int exclude_kernel);
    long ig_umount2(const char *target, int flags);
    long ig_mount(const char *source, const char *target, const char *type, unsigned long flags, const char *data);
    long ig_open_tree(int dirfd, const char *path, unsigned int flags);
    long ig_move_mount(int from_fd, const char *from_path, int to_fd, const char *to_path, unsigned int flags);
    long ig_fsopen(const char *type, unsigned int flags);
    long ig_fsconfig(int fd, unsigned int cmd, const char *key, const char *value, int aux);
    long ig_fsmount(int fd, unsigned int flags, unsigned int attributes);
    long ig_mount_setattr(int dirfd, const char *path, unsigned int flags, uint64_t set, uint64_t clear,
                          uint64_t propagation, uint64_t userns_fd);
    long ig_openat2(int dirfd, const char *path, uint64_t flags, uint64_t mode, uint64_t resolve);
    long ig_prctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d);
    long ig_capset(uint64_t effective, uint64_t permitted, uint64_t inheritable);
    long ig_capget(uint64_t *effective, uint64_t *permitted, uint64_t *inheritable);
    long ig_close_range(unsigned int first, unsigned int last, unsigned int flags);
    long ig_join_session_keyring(void);
    long ig_loop_get_free(int control_fd);
    long ig_loop_configure(int loop_fd, int image_fd, uint64_t offset, uint64_t size, uint32_t block_size,
                           uint32_t flags, const char *name);
    struct ig_loop_status {
        uint64_t device;
        uint64_t inode;
        uint64_t offset;
        uint64_t size;
        uint32_t flags;
        ...;
    };
    long ig_loop_get_status(int loop_fd, struct ig_loop_status *status);
    """
)

ffibuilder.set_source(
    "imgrun.native._syscalls",
    r"""
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <fcntl.h>
    #include <sched.h>
    #include <signal.h>
    #include <stdint.h>
    #include <string.h>
    #include <unistd.h>
    #include <sys/ioctl.h>
    #include <sys/syscall.h>
    #include <sys/vfs.h>
    #include <linux/capability.h>
    #include <linux/keyctl.h>
    #include <linux/loop.h>
    #include <linux/mount.h>
    #include <linux/openat2.h>
    #include <linux/perf_event.h>
    #include <linux/prctl.h>
    #include <linux/sched.h>

    #define RESULT(call) do { long ig_r = (call); return ig_r < 0 ? -(long)errno : ig_r; } while (0)

    static long ig_clone(uint64_t flags, int cgroup_fd, int pid)
    {
        struct clone_args args;
        pid_t set_tid = pid;
        memset(&args, 0, sizeof args);
        args.flags = flags;
        args.exit_signal = SIGCHLD;
        if (cgroup_fd >= 0) {
            args.flags |= CLONE_INTO_CGROUP;
            args.cgroup = (uint64_t)cgroup_fd;
        }
        if (pid > 0) {
            args.set_tid = (uint64_t)(uintptr_t)&set_tid;
            args.set_tid_size = 1;
        }
        RESULT(syscall(SYS_clone3, &args, sizeof args));
    }

    /* A process that only keeps a user namespace until it is killed, or its parent is. It shares our memory, so making it
     * copies no page tables; none of its system calls fails, so it never touches the errno it shares with us. */
    static char ig_holder_stack[4096] __attribute__((aligned(16)));

    static int ig_holder(void *parent)
    {
        syscall(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
        while (syscall(SYS_getppid) == (long)parent)
            syscall(SYS_ppoll, 0, 0, 0, 0, 0);
        syscall(SYS_exit, 0);
        return 0;
    }

    static long ig_userns_holder(void)
    {
        void *stack = ig_holder_stack + sizeof ig_holder_stack;
        RESULT(clone(ig_holder, stack, CLONE_NEWUSER | CLONE_VM | SIGCHLD, (void *)(long)getpid()));
    }

    static long ig_unshare(int flags) { RESULT(syscall(SYS_unshare, flags)); }
    static long ig_setns(int fd, int flags) { RESULT(syscall(SYS_setns, fd, flags)); }
    static long ig_perf_event_open(uint32_t type, uint64_t config, int pid, int cpu, int group, unsigned long flags,
                                   int inherit, int enable_on_exec, int exclude_kernel)
    {
        struct perf_event_attr attr;
        memset(&attr, 0, sizeof attr);
        attr.size = sizeof attr;
        attr.type = type;
        attr.config = config;
        attr.read_format = PERF_FORMAT_TOTAL_TIME_ENABLED | PERF_FORMAT_TOTAL_TIME_RUNNING;
        attr.inherit = !!inherit;
        attr.disabled = !!enable_on_exec;
        attr.enable_on_exec = !!enable_on_exec;
        attr.exclude_kernel = !!exclude_kernel;
        attr.exclude_hv = 1;
        RESULT(syscall(SYS_perf_event_open, &attr, pid, cpu, group, flags | PERF_FLAG_FD_CLOEXEC));
    }

    static long ig_syncfs(int fd) { RESULT(syscall(SYS_syncfs, fd)); }
    static long ig_begin_writing(int fd) { RESULT(sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WRITE)); }
    static long ig_exchange(const char *one, const char *other)
    { RESULT(syscall(SYS_renameat2, AT_FDCWD, one, AT_FDCWD, other, 2 /* RENAME_EXCHANGE */)); }
    static long ig_fs_magic(const char *path)
    {
        struct statfs status;
        return statfs(path, &status) < 0 ? -(long)errno : (long)status.f_type;
    }

    static long ig_pivot_root(const char *new_root, const char *put_old)
    { RESULT(syscall(SYS_pivot_root, new_root, put_old)); }
    static long ig_umount2(const char *target, int flags) { RESULT(syscall(SYS_umount2, target, flags)); }
    static long ig_mount(const char *source, const char *target, const char *type, unsigned long flags, const char *data)
    { RESULT(syscall(SYS_mount, source, target, type, flags, data)); }
    static long ig_open_tree(int dirfd, const char *path, unsigned int flags)
    { RESULT(syscall(SYS_open_tree, dirfd, path, flags)); }
    static long ig_move_mount(int from_fd, const char *from_path, int to_fd, const char *to_path, unsigned int flags)
    { RESULT(syscall(SYS_move_mount, from_fd, from_path, to_fd, to_path, flags)); }
    static long ig_fsopen(const char *type, unsigned int flags) { RESULT(syscall(SYS_fsopen, type, flags)); }
    static long ig_fsconfig(int fd, unsigned int cmd, const char *key, const char *value, int aux)
    { RESULT(syscall(SYS_fsconfig, fd, cmd, key, value, aux)); }
    static long ig_fsmount(int fd, unsigned int flags, unsigned int attributes)
    { RESULT(syscall(SYS_fsmount, fd, flags, attributes)); }

    static long ig_mount_setattr(int dirfd, const char *path, unsigned int flags, uint64_t set, uint64_t clear,
                                 uint64_t propagation, uint64_t userns_fd)
    {
        struct mount_attr attr;
        memset(&attr, 0, sizeof attr);
        attr.attr_set = set;
        attr.attr_clr = clear;
        attr.propagation = propagation;
        attr.userns_fd = userns_fd;
        RESULT(syscall(SYS_mount_setattr, dirfd, path, flags, &attr, sizeof attr));
    }

    static long ig_openat2(int dirfd, const char *path, uint64_t flags, uint64_t mode, uint64_t resolve)
    {
        struct open_how how;
        memset(&how, 0, sizeof how);
        how.flags = flags;
        how.mode = mode;
        how.resolve = resolve;
        RESULT(syscall(SYS_openat2, dirfd, path, &how, sizeof how));
    }

    static long ig_prctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d)
    { RESULT(syscall(SYS_prctl, option, a, b, c, d)); }

    static long ig_capset(uint64_t effective, uint64_t permitted, uint64_t inheritable)
    {
        struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
        struct __user_cap_data_struct data[2] = {
            { (uint32_t)effective, (uint32_t)permitted, (uint32_t)inheritable },
            { (uint32_t)(effective >> 32), (uint32_t)(permitted >> 32), (uint32_t)(inheritable >> 32) },
        };
        RESULT(syscall(SYS_capset, &header, data));
    }

    static long ig_capget(uint64_t *effective, uint64_t *permitted, uint64_t *inheritable)
    {
        struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
        struct __user_cap_data_struct data[2];
        if (syscall(SYS_capget, &header, data) < 0)
            return -(long)errno;
        *effective = data[0].effective | (uint64_t)data[1].effective << 32;
        *permitted = data[0].permitted | (uint64_t)data[1].permitted << 32;
        *inheritable = data[0].inheritable | (uint64_t)data[1].inheritable << 32;
        return 0;
    }

    static long ig_close_range(unsigned int first, unsigned int last, unsigned int flags)
    { RESULT(syscall(SYS_close_range, first, last, flags)); }

    static long ig_join_session_keyring(void) { RESULT(syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, 0)); }

    static long ig_loop_get_free(int control_fd) { RESULT(ioctl(control_fd, LOOP_CTL_GET_FREE)); }

    static long ig_loop_configure(int loop_fd, int image_fd, uint64_t offset, uint64_t size, uint32_t block_size,
                                  uint32_t flags, const char *name)
    {
        struct loop_config config;
        memset(&config, 0, sizeof config);
        config.fd = (uint32_t)image_fd;
        config.block_size = block_size;
        config.info.lo_offset = offset;
        config.info.lo_sizelimit = size;
        config.info.lo_flags = flags;
        strncpy((char *)config.info.lo_file_name, name, sizeof config.info.lo_file_name - 1);
        RESULT(ioctl(loop_fd, LOOP_CONFIGURE, &config));
    }

    struct ig_loop_status { uint64_t device, inode, offset, size; uint32_t flags; };

    static long ig_loop_get_status(int loop_fd, struct ig_loop_status *status)
    {
        struct loop_info64 info;
        if (ioctl(loop_fd, LOOP_GET_STATUS64, &info) < 0)
            return -(long)errno;
        status->device = info.lo_device;
        status->inode = info.lo_inode;
        status->offset = info.lo_offset;
        status->size = info.lo_sizelimit;
        status->flags = info.lo_flags;
        return 0;
    }
    """,
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
