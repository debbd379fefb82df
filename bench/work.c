/* File work, timed where it is done.
 *
 * usage: work [ROOT]         ROOT: chroot there first
 *
 * Reads commands from standard input, a line each, and answers each with "ok SECONDS" or "error WORDS" on
 * standard output:
 *
 *   write FILE MIB           write anew from start to end, then fsync
 *   rewrite FILE MIB         the same over what is there
 *   sync-writes FILE COUNT   4 KiB at random places of FILE, each made durable by fdatasync
 *   read FILE                from start to end
 *   create DIR COUNT         COUNT files of 4 KiB in new directories of a hundred
 *   walk DIR                 stat everything below
 *   read-all DIR             read all regular files below
 *   remove DIR               and everything below
 *   run COMMAND              by /bin/sh
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { CHUNK = 1 << 20, SMALL = 4096, PER_DIRECTORY = 100 };

static char chunk[CHUNK];
static uint64_t state = 88172645463325252ull;

static uint64_t next_random(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

/* Contents that do not compress, and differ from one call to the next. */
static void fill(void)
{
    for (size_t i = 0; i < CHUNK; i += sizeof(uint64_t)) {
        uint64_t value = next_random();
        memcpy(chunk + i, &value, sizeof value);
    }
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static int put(int fd, const char *data, size_t length)
{
    while (length > 0) {
        ssize_t n = write(fd, data, length);
        if (n < 0)
            return -1;
        data += n;
        length -= n;
    }
    return 0;
}

static int write_file(const char *path, long mebibytes, int flags)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC | flags, 0600);
    if (fd < 0)
        return -1;
    for (long i = 0; i < mebibytes; i++)
        if (put(fd, chunk, CHUNK) < 0)
            return -1;
    return fsync(fd) < 0 ? -1 : close(fd);
}

static int sync_writes(const char *path, long count)
{
    struct stat status;
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &status) < 0)
        return -1;
    for (long i = 0; i < count; i++) {
        off_t place = next_random() % (status.st_size / SMALL) * SMALL;
        if (pwrite(fd, chunk, SMALL, place) != SMALL || fdatasync(fd) < 0)
            return -1;
    }
    return close(fd);
}

static int read_file(const char *path)
{
    ssize_t n;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    do
        n = read(fd, chunk, CHUNK);
    while (n > 0);
    close(fd);
    return n < 0 ? -1 : 0;
}

static int create(const char *directory, long count)
{
    char path[4096];
    if (mkdir(directory, 0700) < 0)
        return -1;
    for (long i = 0; i < count; i++) {
        snprintf(path, sizeof path, "%s/%ld", directory, i / PER_DIRECTORY);
        if (i % PER_DIRECTORY == 0 && mkdir(path, 0700) < 0)
            return -1;
        snprintf(path, sizeof path, "%s/%ld/%ld", directory, i / PER_DIRECTORY, i);
        int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        if (fd < 0 || put(fd, chunk + i % 100 * SMALL, SMALL) < 0)
            return -1;
        close(fd);
    }
    return 0;
}

static int only_look(const char *path, const struct stat *status, int type, struct FTW *at)
{
    (void)path, (void)status, (void)at;
    return type == FTW_NS ? -1 : 0;
}

static int read_one(const char *path, const struct stat *status, int type, struct FTW *at)
{
    (void)at;
    return type == FTW_F && S_ISREG(status->st_mode) ? read_file(path) : 0;
}

static int remove_one(const char *path, const struct stat *status, int type, struct FTW *at)
{
    (void)status, (void)type, (void)at;
    return remove(path);
}

static int shell(const char *command)
{
    int status = system(command);
    if (status != 0)
        errno = ECANCELED;
    return status == 0 ? 0 : -1;
}

static int perform(const char *verb, char *rest)
{
    char *path = rest, *number = strchr(rest, ' ');
    if (!strcmp(verb, "run"))
        return shell(rest);
    if (number)
        *number++ = '\0';
    long count = number ? atol(number) : 0;
    if (!strcmp(verb, "write"))
        return write_file(path, count, O_TRUNC);
    if (!strcmp(verb, "rewrite"))
        return write_file(path, count, 0);
    if (!strcmp(verb, "sync-writes"))
        return sync_writes(path, count);
    if (!strcmp(verb, "read"))
        return read_file(path);
    if (!strcmp(verb, "create"))
        return create(path, count);
    if (!strcmp(verb, "walk"))
        return nftw(path, only_look, 64, FTW_PHYS);
    if (!strcmp(verb, "read-all"))
        return nftw(path, read_one, 64, FTW_PHYS);
    if (!strcmp(verb, "remove"))
        return nftw(path, remove_one, 64, FTW_PHYS | FTW_DEPTH);
    errno = EINVAL;
    return -1;
}

int main(int argc, char **argv)
{
    char line[8192];
    if (argc > 1 && (chroot(argv[1]) < 0 || chdir("/") < 0)) {
        perror(argv[1]);
        return 1;
    }
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = '\0';
        char *rest = strchr(line, ' ');
        if (rest)
            *rest++ = '\0';
        fill();
        double began = now();
        int failed = perform(line, rest ? rest : "");
        double seconds = now() - began;
        if (failed)
            printf("error %s %s: %s\n", line, rest ? rest : "", strerror(errno));
        else
            printf("ok %.9f\n", seconds);
        fflush(stdout);
    }
    return 0;
}
