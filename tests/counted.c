/* Does a known amount of something, for the tests of what is counted.
 *
 *   counted touch PAGES              touches so many new pages, each once
 *   counted sleep PROCESSES THREADS TIMES
 *                                    so many processes, each with so many threads, each of which sleeps so many times;
 *                                    prints the context switches that the kernel noted for all of them (getrusage(2))
 *   counted hold MIB [FILE [MS]]     takes so much memory, in steps of 1 MiB, with so many milliseconds between them; then,
 *                                    with FILE, waits until that is there
 *   counted tick FILE                a line a tick until FILE is there: what is restored goes on where it was
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static long times;

static void nap(long nanoseconds)
{
    struct timespec t = {0, nanoseconds};
    nanosleep(&t, NULL);
}

static void *sleeper(void *unused)
{
    for (long i = 0; i < times; i++)
        nap(1000);
    return unused;
}

static long switches(int who)
{
    struct rusage usage;
    getrusage(who, &usage);
    return usage.ru_nvcsw + usage.ru_nivcsw;
}

static int sleep_many(long processes, long threads)
{
    for (long p = 0; p < processes; p++) {
        if (fork() == 0) {
            pthread_t thread[64];
            for (long t = 0; t < threads; t++)
                pthread_create(&thread[t], NULL, sleeper, NULL);
            for (long t = 0; t < threads; t++)
                pthread_join(thread[t], NULL);
            _exit(0);
        }
    }
    while (wait(NULL) > 0)
        ;
    printf("%ld\n", switches(RUSAGE_SELF) + switches(RUSAGE_CHILDREN));
    return 0;
}

static int touch(long pages)
{
    long size = sysconf(_SC_PAGESIZE);
    char *memory = mmap(NULL, pages * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(memory, pages * size, MADV_NOHUGEPAGE);
    for (long i = 0; i < pages; i++)
        memory[i * size] = 1;
    return 0;
}

static int hold(long mebibytes, const char *until, long milliseconds)
{
    for (long i = 0; i < mebibytes; i++) {
        char *memory = malloc(1 << 20);
        if (memory == NULL)
            return 2;
        memset(memory, 1, 1 << 20);
        nap(milliseconds * 1000000);
    }
    puts("holds");
    fflush(stdout);
    while (until != NULL && access(until, F_OK) != 0)
        nap(10000000);
    return 0;
}

static int tick(const char *until)
{
    for (long i = 0; access(until, F_OK) != 0; i++) {
        printf("tick %ld\n", i);
        fflush(stdout);
        nap(10000000);
    }
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "touch") == 0)
        return touch(atol(argv[2]));
    if (argc == 5 && strcmp(argv[1], "sleep") == 0) {
        times = atol(argv[4]);
        return sleep_many(atol(argv[2]), atol(argv[3]));
    }
    if (argc >= 3 && strcmp(argv[1], "hold") == 0)
        return hold(atol(argv[2]), argc > 3 ? argv[3] : NULL, argc > 4 ? atol(argv[4]) : 0);
    if (argc == 3 && strcmp(argv[1], "tick") == 0)
        return tick(argv[2]);
    return 3;
}
