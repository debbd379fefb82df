/* One loop, for a look at what a processor does with it: see README.md. */
#include <stdio.h>

enum { N = 1024 };

static double a[N][N], b[N][N], c[N][N];

int main(void)
{
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            a[i][j] = i + j;
            b[i][j] = i - j;
        }
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++)
            for (int k = 0; k < N; k++)
                c[i][j] += a[i][k] * b[k][j];
    printf("%g\n", c[N / 2][N / 3]);
    return 0;
}
