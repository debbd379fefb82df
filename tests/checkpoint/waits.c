/* A process of which each thread waits in another way, for a thousand seconds or for ever.
 *
 * waits        print "ready"; then, for each line that is read, of each thread its name and "waits", or how its wait has ended
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/select.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <linux/futex.h>
#include <time.h>
#include <unistd.h>

enum { SECONDS = 1000 };

static const struct timespec TIME = {SECONDS, 0};
static const struct timeval OLD_TIME = {SECONDS, 0};
static pthread_mutex_t taken = PTHREAD_MUTEX_INITIALIZER;
static sigset_t usr2;
static char buffer[256];

static struct timespec end(clockid_t clock)
{
    struct timespec moment;
    clock_gettime(clock, &moment);
    moment.tv_sec += SECONDS;
    return moment;
}

/* What gives its error as a result. */
static int result(int error)
{
    errno = error;
    return error ? -1 : 0;
}

static int pipe_end(void)
{
    int ends[2];
    return pipe(ends) ? -1 : ends[0];
}

static int own_file(const char *name)
{
    return open(name, O_CREAT | O_RDWR, 0600);
}

static int socket_end(int timed)
{
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends))
        return -1;
    if (timed)
        setsockopt(ends[0], SOL_SOCKET, SO_RCVTIMEO, &OLD_TIME, sizeof OLD_TIME);
    return ends[0];
}

static int do_poll(int milliseconds)
{
    struct pollfd one = {pipe_end(), POLLIN, 0};
    return poll(&one, 1, milliseconds);
}

static int do_ppoll(const struct timespec *time)
{
    struct pollfd one = {pipe_end(), POLLIN, 0};
    return ppoll(&one, 1, time, NULL);
}

static int do_select(struct timeval *time)
{
    int fd = pipe_end();
    fd_set set;
    FD_ZERO(&set);
    FD_SET(fd, &set);
    return select(fd + 1, &set, NULL, NULL, time);
}

static int do_epoll(int milliseconds)
{
    struct epoll_event event;
    return epoll_wait(epoll_create1(0), &event, 1, milliseconds);
}

static int do_futex(const struct timespec *time)
{
    int word = 0;
    return syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, time, NULL, 0);
}

static int do_condition(const struct timespec *time)
{
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
    pthread_mutex_lock(&mutex);
    return result(time ? pthread_cond_timedwait(&condition, &mutex, time) : pthread_cond_wait(&condition, &mutex));
}

static int do_semaphore(const struct timespec *time)
{
    sem_t semaphore;
    sem_init(&semaphore, 0, 0);
    return time ? sem_timedwait(&semaphore, time) : sem_wait(&semaphore);
}

static int in_nanosleep(void) { return nanosleep(&TIME, NULL); }
static int in_clock_nanosleep(void) { return result(clock_nanosleep(CLOCK_MONOTONIC, 0, &TIME, NULL)); }
static int in_clock_nanosleep_until(void)
{
    struct timespec moment = end(CLOCK_MONOTONIC);
    return result(clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &moment, NULL));
}
static int in_sleep(void) { return sleep(SECONDS) ? -1 : 0; }
static int in_usleep(void) { return usleep(SECONDS * 1000000U); }
static int in_poll(void) { return do_poll(-1); }
static int in_poll_timed(void) { return do_poll(SECONDS * 1000); }
static int in_ppoll(void) { return do_ppoll(NULL); }
static int in_ppoll_timed(void) { return do_ppoll(&TIME); }
static int in_select(void) { return do_select(NULL); }
static int in_select_timed(void)
{
    struct timeval time = OLD_TIME;
    return do_select(&time);
}
static int in_pselect_timed(void) { return pselect(0, NULL, NULL, NULL, &TIME, NULL); }
static int in_epoll(void) { return do_epoll(-1); }
static int in_epoll_timed(void) { return do_epoll(SECONDS * 1000); }
static int in_futex(void) { return do_futex(NULL); }
static int in_futex_timed(void) { return do_futex(&TIME); }
static int in_condition(void) { return do_condition(NULL); }
static int in_condition_timed(void)
{
    struct timespec moment = end(CLOCK_REALTIME);
    return do_condition(&moment);
}
static int in_mutex(void) { return result(pthread_mutex_lock(&taken)); }
static int in_mutex_timed(void)
{
    struct timespec moment = end(CLOCK_REALTIME);
    return result(pthread_mutex_timedlock(&taken, &moment));
}
static int in_semaphore(void) { return do_semaphore(NULL); }
static int in_semaphore_timed(void)
{
    struct timespec moment = end(CLOCK_REALTIME);
    return do_semaphore(&moment);
}
static int in_sigtimedwait(void) { return sigtimedwait(&usr2, NULL, &TIME); }
static int in_sigwaitinfo(void) { return sigwaitinfo(&usr2, NULL); }
static int in_sigwait(void)
{
    int number;
    return result(sigwait(&usr2, &number));
}
static int in_pause(void) { return pause(); }
static int in_sigsuspend(void) { return sigsuspend(&usr2); }
static int in_read_pipe(void) { return read(pipe_end(), buffer, 1); }
static int in_read_eventfd(void) { return read(eventfd(0, 0), buffer, 8); }
static int in_read_signalfd(void) { return read(signalfd(-1, &usr2, 0), buffer, sizeof buffer); }
static int in_read_timerfd(void)
{
    struct itimerspec once = {{0, 0}, TIME};
    int fd = timerfd_create(CLOCK_MONOTONIC, 0);
    timerfd_settime(fd, 0, &once, NULL);
    return read(fd, buffer, 8);
}
static int in_read_inotify(void)
{
    int fd = inotify_init();
    mkdir("/tmp/watched", 0700);
    inotify_add_watch(fd, "/tmp/watched", IN_CREATE);
    return read(fd, buffer, sizeof buffer);
}
static int in_recv(void) { return recv(socket_end(0), buffer, 1, 0); }
static int in_recv_timed(void) { return recv(socket_end(1), buffer, 1, 0); }
static int in_accept(void)
{
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un address = {AF_UNIX, "/tmp/socket"};
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 1))
        return -1;
    return accept(fd, NULL, NULL);
}
static int in_flock(void)
{
    flock(own_file("/tmp/one"), LOCK_EX);
    return flock(own_file("/tmp/one"), LOCK_EX);
}
static int in_fcntl_lock(void)
{
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    fcntl(own_file("/tmp/two"), F_OFD_SETLK, &whole);
    return fcntl(own_file("/tmp/two"), F_OFD_SETLKW, &whole);
}
static int in_open_fifo(void)
{
    mkfifo("/tmp/fifo", 0600);
    return open("/tmp/fifo", O_RDONLY);
}
static int in_waitpid(void)
{
    pid_t child = fork();
    while (child == 0)
        pause();
    return waitpid(child, NULL, 0);
}

static struct wait {
    const char *name;
    int (*call)(void);
    volatile int error;
    volatile int ended;
} waits[] = {
#define WAIT(name) {#name, in_##name, 0, 0}
    WAIT(nanosleep), WAIT(clock_nanosleep), WAIT(clock_nanosleep_until), WAIT(sleep), WAIT(usleep), WAIT(poll),
    WAIT(poll_timed), WAIT(ppoll), WAIT(ppoll_timed), WAIT(select), WAIT(select_timed), WAIT(pselect_timed), WAIT(epoll),
    WAIT(epoll_timed), WAIT(futex), WAIT(futex_timed), WAIT(condition), WAIT(condition_timed), WAIT(mutex),
    WAIT(mutex_timed), WAIT(semaphore), WAIT(semaphore_timed), WAIT(sigtimedwait), WAIT(sigwaitinfo), WAIT(sigwait),
    WAIT(pause), WAIT(sigsuspend), WAIT(read_pipe), WAIT(read_eventfd), WAIT(read_signalfd), WAIT(read_timerfd),
    WAIT(read_inotify), WAIT(recv), WAIT(recv_timed), WAIT(accept), WAIT(flock), WAIT(fcntl_lock), WAIT(open_fifo),
    WAIT(waitpid),
};

enum { MANY = sizeof waits / sizeof *waits };

static void *wait_so(void *argument)
{
    struct wait *wait = argument;
    wait->error = wait->call() < 0 ? errno : 0;
    wait->ended = 1;
    return NULL;
}

int main(void)
{
    char line[16];
    sigemptyset(&usr2);
    sigaddset(&usr2, SIGUSR2);
    sigprocmask(SIG_BLOCK, &usr2, NULL);
    pthread_mutex_lock(&taken);
    for (int n = 0; n < MANY; n++) {
        pthread_t thread;
        pthread_create(&thread, NULL, wait_so, &waits[n]);
    }
    sleep(1); /* until they wait */
    printf("ready\n");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        sleep(1); /* until what has ended has said so */
        for (int n = 0; n < MANY; n++) {
            const struct wait *wait = &waits[n];
            printf("%s %s\n", wait->name, !wait->ended ? "waits" : wait->error ? strerrorname_np(wait->error) : "ended");
        }
        printf("end\n");
        fflush(stdout);
    }
    return 0;
}
