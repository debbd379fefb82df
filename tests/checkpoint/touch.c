/* Two processes with memory of which each page is known, that look at it when they are told to.
 *
 * touch PRIVATE SHARED     so many MiB each of their own, and shared; prints "ready", then does what it reads:
 *     mine|its|shared N    the first, the second process or the first looks at one MiB
 *     fork                 a child looks at all of the first one's, which has touched it or not
 *     move                 the first moves its last MiB elsewhere, unmaps the one before it, and looks at the moved one
 *     open                 how many descriptors the first has
 * After each it prints the line again and "good" or "bad", or a number; at the end of the input it looks at all of it.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define MIB (1 << 20)
enum { MINE = 1, ITS, SHARED };

static uint64_t word(int whose, uint64_t number)
{
    uint64_t x = number * 0x9e3779b97f4a7c15u + (uint64_t)whose;
    return (x ^ x >> 29) * 0xbf58476d1ce4e5b9u;
}

static uint64_t *make(int whose, int size, int flags)
{
    uint64_t *memory = mmap(0, (size_t)size * MIB, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        exit(2);
    for (uint64_t i = 0; i < (uint64_t)size * MIB / 8; i++)
        memory[i] = word(whose, i);
    return memory;
}

static int good(int whose, const uint64_t *memory, int from, int to)
{
    for (uint64_t i = (uint64_t)from * MIB / 8; i < (uint64_t)to * MIB / 8; i++)
        if (memory[i] != word(whose, i))
            return 0;
    return 1;
}

static int ask(int to, int from, int what)
{
    int answer = 0;
    if (write(to, &what, sizeof what) != sizeof what || read(from, &answer, sizeof answer) != sizeof answer)
        exit(3);
    return answer;
}

static int open_files(void)
{
    int found = 0;
    DIR *directory = opendir("/proc/self/fd");
    while (directory && readdir(directory))
        found++;
    closedir(directory);
    return found - 3; /* itself, and what every directory has */
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    int size = atoi(argv[1]), common = atoi(argv[2]), there[2], back[2], number;
    uint64_t *shared = make(SHARED, common, MAP_SHARED);
    if (pipe(there) || pipe(back))
        return 2;
    pid_t other = fork();
    if (!other) {
        close(there[1]);
        uint64_t *its = make(ITS, size, MAP_PRIVATE);
        int answer = 1;
        while (write(back[1], &answer, sizeof answer) == sizeof answer && read(there[0], &number, sizeof number) == sizeof number)
            answer = number < 0 ? good(ITS, its, 0, size) && good(SHARED, shared, 0, common) : good(ITS, its, number, number + 1);
        return 0;
    }
    uint64_t *mine = make(MINE, size, MAP_PRIVATE);
    if (read(back[0], &number, sizeof number) != sizeof number)
        return 3;
    char line[64], what[64];
    printf("ready\n");
    for (fflush(stdout); fgets(line, sizeof line, stdin); fflush(stdout)) {
        int answer = 0, status;
        line[strcspn(line, "\n")] = 0;
        if (sscanf(line, "%s %d", what, &number) == 2) {
            answer = !strcmp(what, "its") ? ask(there[1], back[0], number)
                     : !strcmp(what, "shared") ? good(SHARED, shared, number, number + 1) : good(MINE, mine, number, number + 1);
        } else if (!strcmp(line, "fork")) {
            pid_t child = fork();
            if (!child)
                _exit(!good(MINE, mine, 0, size));
            answer = waitpid(child, &status, 0) == child && status == 0;
        } else if (!strcmp(line, "move")) {
            uint64_t *last = mine + (uint64_t)(size - 1) * MIB / 8, *moved;
            munmap((char *)last - MIB, MIB);
            moved = mremap(last, MIB, MIB, MREMAP_MAYMOVE | MREMAP_FIXED, (char *)mine - 64 * MIB);
            answer = moved != MAP_FAILED && good(MINE, moved - (uint64_t)(size - 1) * MIB / 8, size - 1, size);
            size -= 2;
        } else if (!strcmp(line, "open")) {
            printf("open %d\n", open_files());
            continue;
        }
        printf("%s %s\n", line, answer ? "good" : "bad");
    }
    int all = good(MINE, mine, 0, size) && good(SHARED, shared, 0, common) && ask(there[1], back[0], -1);
    printf("all %s\n", all ? "good" : "bad");
    close(there[1]);
    waitpid(other, 0, 0);
    return !all;
}
