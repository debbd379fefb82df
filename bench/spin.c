/* Work for the processor, timed where it is done.
 *
 *   spin loop MILLIONS     so many million rounds of arithmetic
 *   spin forks COUNT       so many children, one after the other, that end at once
 *   spin fill MIB FILE     takes so much memory once FILE is there
 *
 * Prints the seconds of processor time that it took, its children's included: other work on the machine does not count.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

static double seconds(struct timeval t)
{
    return t.tv_sec + t.tv_usec / 1e6;
}

static double now(void)
{
    struct rusage own, children;
    getrusage(RUSAGE_SELF, &own);
    getrusage(RUSAGE_CHILDREN, &children);
    return seconds(own.ru_utime) + seconds(own.ru_stime) + seconds(children.ru_utime) + seconds(children.ru_stime);
}

static volatile uint64_t sink;

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    long count = atol(argv[2]);
    double began = now();
    if (strcmp(argv[1], "loop") == 0) {
        uint64_t x = 1;
        for (long i = 0; i < count * 1000000; i++)
            x = x * 6364136223846793005u + 1442695040888963407u;
        sink = x;
    } else if (strcmp(argv[1], "forks") == 0) {
        for (long i = 0; i < count; i++) {
            if (fork() == 0)
                _exit(0);
            wait(NULL);
        }
    } else {
        puts("ready");
        fflush(stdout);
        while (access(argv[3], F_OK) != 0)
            usleep(1000);
        for (long i = 0; i < count; i++)
            memset(malloc(1 << 20), 1, 1 << 20);
    }
    printf("%.6f\n", now() - began);
    return 0;
}
