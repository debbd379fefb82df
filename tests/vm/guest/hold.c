/* hold MIB FILE: fills memory with numbers, says "ready", waits for FILE, and says "same" if the numbers are still there. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    size_t words = (size_t)atol(argv[1]) << 17;
    unsigned long *memory = malloc(words * 8), x = 88172645463325252UL;
    if (!memory)
        return 3;
    for (size_t i = 0; i < words; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        memory[i] = x;
    }
    puts("ready"), fflush(stdout);
    struct timespec rest = {0, 100000000};
    while (access(argv[2], F_OK))
        nanosleep(&rest, 0);
    x = 88172645463325252UL;
    for (size_t i = 0; i < words; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        if (memory[i] != x)
            return puts("changed"), 1;
    }
    return puts("same") < 0;
}
