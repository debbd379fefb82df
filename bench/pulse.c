/* A process with so much memory, for the benchmark of preemptions.
 *
 * pulse MIB NOTES STOP    fill MIB mebibytes with incompressible data; then, a hundred times a second, change a page and add
 *                       a line to NOTES: how often, and the time in seconds; until there is a file STOP
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    size_t size = strtoul(argv[1], 0, 10) << 20;
    uint64_t *memory = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), state = 88172645463325252;
    if (memory == MAP_FAILED)
        return 1;
    for (size_t i = 0; i < size / 8; i++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        memory[i] = state;
    }
    for (uint64_t count = 1; access(argv[3], F_OK) != 0; count++) {
        memory[count * PAGE / 8 % (size / 8)]++;
        struct timespec t;
        clock_gettime(CLOCK_REALTIME, &t);
        /* Opened each time: a checkpoint that is continued after more was added does not find the file as it left it. */
        FILE *log = fopen(argv[2], "a");
        if (!log || fprintf(log, "%lu %ld.%09ld\n", (unsigned long)count, (long)t.tv_sec, t.tv_nsec) < 0 || fclose(log) != 0)
            return 1;
        usleep(10000);
    }
    return 0;
}
