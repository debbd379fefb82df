/* imgrun-init, the shim: one static program with no library, in four roles.
 *
 *   anchor   PID 1 of a job. Forwards signals to the reaper, reaps what is left to it, reports how the job ended and
 *            dies with the supervisor; the kernel then kills all that is left of the job. It is never frozen.
 *   reaper   Its child, the root of the tree that is frozen and restored: leads a session of its own, adopts the
 *            orphans of the job, starts the command, passes signals on to it, and ends exactly as it ended. It holds
 *            standard input, output and error and nothing else from outside: no timer, no parent-death signal.
 *   adopt    The anchor of a job that CRIU restores: its reaper comes from a checkpoint.
 *   exec     No process stays behind: the command takes this one's place (a job without a shim, or a process that
 *            joins a running job).
 *
 * Usage: imgrun-init ROLE STATUS UID GID GROUPS RLIMITS TTY CWD COMMAND [ARGUMENT...]
 *
 *   ROLE     "init" for anchor and reaper, "adopt", or "exec"
 *   STATUS   descriptor (3 or higher) to which the records below are written
 *   GROUPS   supplementary groups, "10,20"; empty for none; "-" keeps the present ones
 *   RLIMITS  "RESOURCE:SOFT:HARD,..." in the kernel's numbers; empty for none
 *   TTY      "1" makes standard input the controlling terminal of the command
 *
 * The environment is the command's. The caller blocks all signals before it executes the shim, so that none that comes
 * early is lost, and has set its parent-death signal.
 *
 * Records, one line each, in this order:
 *
 *   started REAPER    the command's program runs; REAPER is the reaper's pid in the job
 *   error STEP ERRNO  instead of "started", and the last record: this step failed and nothing runs
 *   exit CODE         the command exited
 *   signal NUMBER     a signal killed the command
 *
 * In the role "exec", the end of the stream without a record means started.
 */
#include <stddef.h>
#include <stdint.h>

#include <asm/errno.h>
#include <asm/ioctls.h>
#include <asm/unistd.h>
#include <linux/fcntl.h>
#include <linux/limits.h>
#include <linux/poll.h>
#include <linux/prctl.h>
#include <linux/resource.h>
#include <linux/signal.h>
#include <linux/time.h>
#include <linux/wait.h>

#define NORETURN __attribute__((noreturn))
#define CLOSE_RANGE_CLOEXEC 4U
#define EVERY_SIGNAL (~UINT64_C(0))
#define SIGNALS 64
#define REAPER 2 /* the pid of the root of a job's tree, in every life of it */
#define OWN_FAILURE 125 /* exit status of imgrun's own failures */

static const char default_path[] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

struct request {
    int status;
    uint32_t uid, gid;
    const char *groups, *rlimits, *cwd;
    int tty;
    char **command; /* points into argv; the slot before it is free */
    char **environment;
    char *arguments, *arguments_end; /* the memory that /proc/PID/cmdline shows */
};

/* System calls. Each returns what the kernel does: a result, or -errno. */

static long syscall6(long number, long a, long b, long c, long d, long e, long f)
{
#if defined(__x86_64__)
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
#elif defined(__aarch64__)
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;
    register long x5 __asm__("x5") = f;
    __asm__ volatile("svc 0"
                     : "+r"(x0)
                     : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
                     : "memory");
    return x0;
#else
#error "imgrun-init knows x86_64 and aarch64"
#endif
}

#define PADDED(number, a, b, c, d, e, f, ...) \
    syscall6(number, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))
#define SYS(name, ...) PADDED(__NR_##name, ##__VA_ARGS__, 0, 0, 0, 0, 0, 0, 0)

#if defined(__x86_64__)
__asm__(".globl _start\n_start:\n xor %ebp, %ebp\n mov %rsp, %rdi\n and $-16, %rsp\n call shim\n");
#else
__asm__(".globl _start\n_start:\n mov x29, #0\n mov x30, #0\n mov x0, sp\n b shim\n");
#endif

/* The compiler may call these even in a freestanding program. `volatile` keeps it from finding them in themselves. */

void *memset(void *to, int byte, size_t size)
{
    for (volatile char *p = to; size--; p++)
        *p = (char)byte;
    return to;
}

void *memcpy(void *to, const void *from, size_t size)
{
    const char *source = from;
    for (volatile char *p = to; size--; p++)
        *p = *source++;
    return to;
}

/* Small tools */

static size_t length(const char *text)
{
    size_t n = 0;
    while (text[n])
        n++;
    return n;
}

static int equal(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

/* Read a decimal number, move past it, and tell whether there was one. */
static int number(const char **text, uint64_t *value)
{
    const char *p = *text;
    *value = 0;
    for (; *p >= '0' && *p <= '9'; p++) {
        if (__builtin_mul_overflow(*value, (uint64_t)10, value) ||
            __builtin_add_overflow(*value, (uint64_t)(*p - '0'), value))
            return 0;
    }
    int found = p != *text;
    *text = p;
    return found;
}

static int number_below(const char *text, uint64_t end, uint64_t *value)
{
    return number(&text, value) && !*text && *value < end;
}

static char *put(char *to, const char *text)
{
    while (*text)
        *to++ = *text++;
    return to;
}

static NORETURN void quit(int code)
{
    for (;;)
        SYS(exit_group, code);
}

/* Write one record; it is shorter than PIPE_BUF, so it is written whole or not at all. */
static void report(int fd, const char *words, long value)
{
    char line[64], digits[24], *end = put(line, words), *digit = digits + sizeof digits;
    *--digit = 0;
    do
        *--digit = (char)('0' + value % 10);
    while (value /= 10);
    end = put(end, digit);
    *end++ = '\n';
    while (SYS(write, fd, line, end - line) == -EINTR)
        ;
}

static NORETURN void fail(int fd, const char *step, long error)
{
    char words[32];
    char *end = put(put(put(words, "error "), step), " ");
    *end = 0;
    report(fd, words, -error);
    quit(OWN_FAILURE);
}

static void check(int fd, const char *step, long result)
{
    if (result < 0)
        fail(fd, step, result);
}

static long fork_process(void)
{
    return SYS(clone, SIGCHLD, 0, 0, 0, 0);
}

/* The name for ps and pgrep. The rest of the arguments goes, or `pkill -f` of the command would find the shim. */
static void rename_process(const struct request *request, const char *name)
{
    SYS(prctl, PR_SET_NAME, name);
    if ((size_t)(request->arguments_end - request->arguments) <= length(name))
        return;
    memset(request->arguments, 0, (size_t)(request->arguments_end - request->arguments));
    put(request->arguments, name);
}

/* Die when the supervisor does; and at once if it did before we asked. It is outside of our PID namespace, so getppid()
 * cannot tell, but nobody else reads the status. */
static void follow_supervisor(int status)
{
    SYS(prctl, PR_SET_PDEATHSIG, SIGKILL);
    struct pollfd poll = {.fd = status};
    struct __kernel_timespec now = {0, 0};
    if (SYS(ppoll, &poll, 1, &now, 0, 8) > 0 && (poll.revents & (POLLERR | POLLHUP)))
        quit(OWN_FAILURE);
}

/* The command */

static int is_binary(const char *path)
{
    char start[128];
    long fd = SYS(openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0);
    if (fd < 0)
        return 1;
    long size = SYS(read, fd, start, sizeof start);
    SYS(close, fd);
    for (long i = 0; i < size && start[i] != '\n'; i++)
        if (!start[i])
            return 1;
    return 0;
}

/* Execute one file; returns only when it could not be. A script without #! goes to the shell, as execvp(3) does it. */
static long execute(const struct request *request, int fd, char *path)
{
    long error = SYS(execve, path, request->command, request->environment);
    if (error == -ENOENT && SYS(faccessat, AT_FDCWD, path, 0) == 0)
        fail(fd, "interpreter", error);
    if (error == -ENOEXEC && !is_binary(path)) {
        char shell[] = "/bin/sh";
        request->command[0] = path;
        request->command[-1] = shell;
        fail(fd, "shell", SYS(execve, shell, request->command - 1, request->environment));
    }
    return error;
}

static const char *search_path(char **environment)
{
    static const char name[] = "PATH=";
    for (; *environment; environment++) {
        size_t i = 0;
        while (name[i] && (*environment)[i] == name[i])
            i++;
        if (!name[i])
            return *environment + i;
    }
    return default_path;
}

/* Find the command as execvp(3) does: a file that may not be executed is remembered but does not end the search. */
static NORETURN void execute_command(const struct request *request, int fd)
{
    static char path[PATH_MAX];
    char *name = request->command[0];
    size_t size = length(name);
    long result = -ENOENT;

    for (const char *p = name; *p; p++)
        if (*p == '/')
            fail(fd, "exec", execute(request, fd, name));
    if (!size)
        fail(fd, "exec", result);

    for (const char *start = search_path(request->environment), *end;; start = end + 1) {
        for (end = start; *end && *end != ':'; end++)
            ;
        if ((size_t)(end - start) + size + 2 <= sizeof path) {
            char *p = path;
            for (const char *q = start; q < end; q++)
                *p++ = *q;
            if (p != path) /* an empty entry means the working directory */
                *p++ = '/';
            *put(p, name) = 0;

            long error = execute(request, fd, path);
            if (error == -EACCES)
                result = error;
            else if (error != -ENOENT && error != -ENOTDIR && error != -ESTALE && error != -ENODEV &&
                     error != -ETIMEDOUT)
                fail(fd, "exec", error);
        }
        if (!*end)
            fail(fd, "exec", result);
    }
}

static void set_groups(const char *list, int fd)
{
    size_t count = *list ? 1 : 0;
    for (const char *p = list; *p; p++)
        count += *p == ',';
    uint32_t groups[count + 1];
    for (size_t i = 0; i < count; i++, list++) {
        uint64_t value;
        if (!number(&list, &value) || value >= UINT32_MAX || *list != (i + 1 < count ? ',' : 0))
            fail(fd, "arguments", -EINVAL);
        groups[i] = (uint32_t)value;
    }
    check(fd, "groups", SYS(setgroups, count, groups));
}

static void set_rlimits(const char *list, int fd)
{
    while (*list) {
        uint64_t resource;
        struct rlimit64 limit;
        if (!number(&list, &resource) || *list++ != ':' || !number(&list, (uint64_t *)&limit.rlim_cur) ||
            *list++ != ':' || !number(&list, (uint64_t *)&limit.rlim_max) || (*list && *list++ != ','))
            fail(fd, "arguments", -EINVAL);
        check(fd, "rlimit", SYS(prlimit64, 0, resource, &limit, 0));
    }
}

/* Become the command. Failures go to `fd`, which does not survive the exec. */
static NORETURN void become_command(const struct request *request, int fd)
{
    check(fd, "session", SYS(setsid));
    if (request->tty)
        check(fd, "tty", SYS(ioctl, 0, TIOCSCTTY, 0));
    if (!equal(request->groups, "-"))
        set_groups(request->groups, fd);
    check(fd, "gid", SYS(setresgid, request->gid, request->gid, request->gid));
    check(fd, "uid", SYS(setresuid, request->uid, request->uid, request->uid));
    if (fd == request->status) /* not the child of the reaper, which is frozen with the job */
        follow_supervisor(fd); /* the change of ids has cleared it */
    /* Only now, and only here: limits made for the command shall not hinder the shim, and the change of ids
     * must not meet RLIMIT_NPROC. */
    set_rlimits(request->rlimits, fd);
    check(fd, "cwd", SYS(chdir, request->cwd));
    check(fd, "stdio", SYS(close_range, 3, ~0U, CLOSE_RANGE_CLOEXEC));
    uint64_t none = 0;
    SYS(rt_sigprocmask, SIG_SETMASK, &none, 0, sizeof none);
    execute_command(request, fd);
}

/* The anchor and the reaper */

/* Pass signals on to `child` and reap whatever ends, until `child` does; return its wait status. */
static int watch(int child)
{
    for (;;) {
        int status;
        for (long pid; (pid = SYS(wait4, -1, &status, WNOHANG | __WALL, 0)) > 0;)
            if (pid == child)
                return status;
        siginfo_t info;
        uint64_t all = EVERY_SIGNAL;
        long signal = SYS(rt_sigtimedwait, &all, &info, 0, sizeof all);
        if (signal <= 0 || signal == SIGCHLD)
            continue;
        if (info.si_code != SI_QUEUE || SYS(rt_sigqueueinfo, child, signal, &info) < 0)
            SYS(kill, child, signal);
    }
}

static int killed_by(int status)
{
    return status & 0x7f;
}

static int exit_code(int status)
{
    return status >> 8 & 0xff;
}

/* Report how the reaper, and so the command, ended, and end the job. */
static NORETURN void finish(const struct request *request, int status)
{
    if (killed_by(status))
        report(request->status, "signal ", killed_by(status));
    else
        report(request->status, "exit ", exit_code(status));
    quit(killed_by(status) ? 128 + killed_by(status) : exit_code(status));
}

static NORETURN void reap(const struct request *request, int fd)
{
    check(fd, "session", SYS(setsid));
    check(fd, "subreaper", SYS(prctl, PR_SET_CHILD_SUBREAPER, 1));
    long command = fork_process();
    check(fd, "fork", command);
    if (!command)
        become_command(request, fd);
    SYS(close_range, 3, ~0U, 0);
    rename_process(request, "imgrun-reaper");

    int status = watch((int)command);
    if (!killed_by(status))
        quit(exit_code(status));
    /* Die as the command did. Its core was dumped, if any; ours is worth nothing, and RLIMIT_CORE does not keep it from
     * a program in core_pattern. */
    SYS(prctl, PR_SET_DUMPABLE, 0);
    uint64_t others = ~(UINT64_C(1) << (killed_by(status) - 1));
    SYS(rt_sigprocmask, SIG_SETMASK, &others, 0, sizeof others);
    long self = SYS(getpid);
    SYS(kill, self, killed_by(status));
    quit(128 + killed_by(status));
}

/* PID 1 of a job whose tree CRIU brings back: the reaper becomes our child when CRIU, its parent, ends. */
static NORETURN void adopt(const struct request *request)
{
    follow_supervisor(request->status);
    check(request->status, "session", SYS(setsid));
    SYS(close_range, 0, 2, 0);
    rename_process(request, "imgrun-init");
    SYS(prctl, PR_SET_DUMPABLE, 0);
    report(request->status, "started ", REAPER);
    finish(request, watch(REAPER));
}

static NORETURN void anchor(const struct request *request)
{
    follow_supervisor(request->status);
    /* What is typed at the supervisor's terminal (Ctrl-C) comes from the supervisor, not a second time from there. */
    check(request->status, "session", SYS(setsid));
    int pipe[2];
    check(request->status, "fork", SYS(pipe2, pipe, O_CLOEXEC));
    long reaper = fork_process();
    check(request->status, "fork", reaper);
    if (!reaper) {
        SYS(close, request->status);
        SYS(close, pipe[0]);
        reap(request, pipe[1]);
    }
    SYS(close, pipe[1]);
    SYS(close_range, 0, 2, 0);
    rename_process(request, "imgrun-init");
    /* Of the job's processes, only one with CAP_SYS_PTRACE shall open the status through /proc/1/fd. */
    SYS(prctl, PR_SET_DUMPABLE, 0);

    /* The other end is held by the command's process until its exec. Signals wait until then. */
    char failure[64];
    long size;
    while ((size = SYS(read, pipe[0], failure, sizeof failure)) == -EINTR)
        ;
    SYS(close, pipe[0]);
    if (size > 0) {
        SYS(write, request->status, failure, size);
        quit(OWN_FAILURE);
    }
    report(request->status, "started ", reaper);

    finish(request, watch((int)reaper));
}

/* Block every signal, and undo the dispositions that an exec keeps. (Setting one that is default already would discard
 * a pending signal.) */
static void reset_signals(void)
{
    uint64_t all = EVERY_SIGNAL;
    SYS(rt_sigprocmask, SIG_SETMASK, &all, 0, sizeof all);
    for (int signal = 1; signal <= SIGNALS; signal++) {
        struct { /* struct sigaction of the kernel begins so; what follows is zero */
            uint64_t handler, rest[3];
        } old, action = {0, {0, 0, 0}};
        if (SYS(rt_sigaction, signal, 0, &old, sizeof all) == 0 && old.handler != 0)
            SYS(rt_sigaction, signal, &action, 0, sizeof all);
    }
}

/* Descriptors 0 to 2 are open (on /dev/null if need be), and above them only the status is. */
static void clean_descriptors(int status)
{
    for (int fd = 0; fd < 3; fd++)
        if (SYS(fcntl, fd, F_GETFD) == -EBADF)
            check(status, "stdio", SYS(openat, AT_FDCWD, "/dev/null", O_RDWR, 0));
    if (status > 3)
        SYS(close_range, 3, status - 1, 0);
    SYS(close_range, status + 1, ~0U, 0);
}

NORETURN __attribute__((used)) void shim(const long *stack)
{
    enum { ROLE = 1, STATUS, UID, GID, GROUPS, RLIMITS, TTY, CWD, COMMAND };
    long argc = stack[0];
    char **argv = (char **)(stack + 1);
    uint64_t status, uid, gid;

    reset_signals();
    if (argc <= COMMAND || !number_below(argv[STATUS], INT32_MAX, &status) || status < 3 ||
        SYS(fcntl, status, F_GETFD) < 0)
        quit(OWN_FAILURE);
    clean_descriptors((int)status);
    if (!number_below(argv[UID], UINT32_MAX, &uid) || !number_below(argv[GID], UINT32_MAX, &gid))
        fail((int)status, "arguments", -EINVAL);

    struct request request = {
        .status = (int)status,
        .uid = (uint32_t)uid,
        .gid = (uint32_t)gid,
        .groups = argv[GROUPS],
        .rlimits = argv[RLIMITS],
        .cwd = argv[CWD],
        .tty = equal(argv[TTY], "1"),
        .command = argv + COMMAND,
        .environment = argv + argc + 1,
        .arguments = argv[0],
        .arguments_end = argv[argc - 1] + length(argv[argc - 1]),
    };
    if (equal(argv[ROLE], "exec"))
        become_command(&request, (int)status);
    if (equal(argv[ROLE], "adopt"))
        adopt(&request);
    if (!equal(argv[ROLE], "init"))
        fail((int)status, "arguments", -EINVAL);
    check((int)status, "cwd", SYS(chdir, "/"));
    anchor(&request);
}
