/* Threads, timers, sockets, a semaphore shared with a child: it ends right only if none of them misses anything. */
#include <arpa/inet.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
static int pair[2], udp[2], events, ticks; static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; static long sum;
static void on_alarm(int s) { (void)s; ticks++; }
static void *adder(void *unused) { (void)unused;
    for (int i = 0; i < 200; i++) {
        pthread_mutex_lock(&lock); sum += i; pthread_mutex_unlock(&lock); usleep(5000); }
    return 0; }
int main(void) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)}; socklen_t n = sizeof a;
    int l = socket(AF_INET, SOCK_STREAM, 0); bind(l, (void *)&a, sizeof a); listen(l, 1); getsockname(l, (void *)&a, &n);
    int c = socket(AF_INET, SOCK_STREAM, 0); if (connect(c, (void *)&a, sizeof a)) return 2;
    int s = accept(l, 0, 0); socketpair(AF_UNIX, SOCK_STREAM, 0, pair); events = eventfd(0, 0);
    signal(SIGALRM, on_alarm); struct itimerspec every = {{0, 5000000}, {0, 5000000}};
    timer_t t; struct sigevent ev = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGALRM};
    timer_create(CLOCK_MONOTONIC, &ev, &t); timer_settime(t, 0, &every, 0);
    int tfd = timerfd_create(CLOCK_MONOTONIC, 0), ep = epoll_create1(0); 
    /* With a period that has always passed when it is read: one that CRIU leaves disarmed ends this here. */
    timerfd_settime(tfd, 0, &every, 0);
    struct epoll_event e = {EPOLLIN, {.fd = tfd}}; epoll_ctl(ep, EPOLL_CTL_ADD, tfd, &e);
    sem_t *sem = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0); sem_init(sem, 1, 0);
    pid_t child = fork();
    if (!child) {
        signal(SIGALRM, SIG_IGN);
        for (int i = 0; i < 100; i++) { sem_wait(sem); char b; read(pair[1], &b, 1); b++; write(s, &b, 1); } _exit(7);
    }
    pthread_t th[3]; for (int i = 0; i < 3; i++) pthread_create(&th[i], 0, adder, 0);
    int good = 0;
    for (int i = 0; i < 100; i++) {
        char b = (char)i, r; write(pair[0], &b, 1); sem_post(sem); while (read(c, &r, 1) != 1); good += r == b + 1;
        unsigned long long x; struct epoll_event got; while (epoll_wait(ep, &got, 1, -1) != 1); read(tfd, &x, 8);
        printf("step\n"); fflush(stdout);
        struct timespec rest = {0, 50000000}; while (nanosleep(&rest, &rest)); /* the alarms wake it */
    }
    for (int i = 0; i < 3; i++) pthread_join(th[i], 0);
    int st; waitpid(child, &st, 0); printf("%d %ld %d %d\n", good, sum, WEXITSTATUS(st), ticks > 50);
}
