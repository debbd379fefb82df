/* Counts in a loop of a known number of instructions: spin N runs four of them N times. Then says "done". */
#include <stdlib.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    long n = argc > 1 ? atol(argv[1]) : 1000000;
#if defined(__aarch64__)
    __asm__ volatile("1: nop\n nop\n subs %0, %0, #1\n b.ne 1b\n" : "+r"(n) : : "cc");
#else
    __asm__ volatile("1: nop\n nop\n dec %0\n jnz 1b\n" : "+r"(n) : : "cc");
#endif
    return write(1, "done\n", 5) != 5;
}
