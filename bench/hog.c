/* A process with so much memory, for the benchmark of checkpoints.
 *
 * hog MIB random|half FILE    fill MIB mebibytes, of incompressible data or every other page zeros; then, every
 *                             millisecond, change a page and write to FILE: how often, and the longest pause (ns) so far
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096

static uint64_t now(void)
{
    /* Not CLOCK_MONOTONIC: a restore gives a time namespace. */
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    size_t size = strtoul(argv[1], 0, 10) << 20;
    int half = !strcmp(argv[2], "half"), fd = open(argv[3], O_WRONLY | O_CREAT, 0666);
    uint64_t *memory = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), state = 88172645463325252;
    if (fd < 0 || memory == MAP_FAILED)
        return 1;
    for (size_t i = 0; i < size / 8; i++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        memory[i] = half && i / (PAGE / 8) % 2 ? 0 : state;
    }
    uint64_t told[2] = {0, 0}, last = now();
    for (;;) {
        usleep(1000);
        uint64_t t = now();
        if (told[0] && t - last > told[1])
            told[1] = t - last;
        last = t;
        memory[told[0]++ * PAGE / 8 % (size / 8)]++;
        if (pwrite(fd, told, sizeof told, 0) != sizeof told)
            return 1;
    }
}
