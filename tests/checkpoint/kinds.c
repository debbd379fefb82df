/* A process that has one of every kind of thing that processes have.
 *
 * kinds things [WITHOUT...]           make them all, print "ready", wait for a line, and see that each is as it was:
 *                                     of each its name, and "ok" or what is wrong
 * kinds threads|processes|files N     many of them
 * kinds storm                         count signals that a child sends, until the line comes
 * kinds sparse FILE                   a file of 2 GiB with three pieces of data
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char *thing;
static int wrong;

/* See that something holds; the first that does not is the word on the thing. */
#define SEE(condition) \
    do { \
        if (!(condition) && !wrong) { \
            wrong = 1; \
            printf("%s %d: %s: %s\n", thing, __LINE__, #condition, strerror(errno)); \
        } \
    } while (0)

static void ready(void)
{
    char line[16];
    printf("ready\n");
    fflush(stdout);
    if (!fgets(line, sizeof line, stdin))
        exit(3);
}

/* -- files ---------------------------------------------------------------------------------------------------------- */

static const char *const PLACES[] = {"/root", "/tmp", "/var/tmp", "/dev/shm"};
#define HERE (sizeof PLACES / sizeof *PLACES)
static int deleted[HERE], twin, appended, flocked, posix_locked, ofd_locked, readme, listed, null_fd, proc_fd, fifo;
static char *shared_file, *private_file;
static long listed_at;

static int fresh(const char *path, const char *content)
{
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0640);
    if (write(fd, content, strlen(content)) < 0)
        exit(4);
    return fd;
}

static void make_files(void)
{
    char path[64];
    for (size_t i = 0; i < HERE; i++) {
        snprintf(path, sizeof path, "%s/deleted", PLACES[i]);
        deleted[i] = fresh(path, "0123456789");
        lseek(deleted[i], 4, SEEK_SET);
        unlink(path);
    }
    twin = dup(deleted[0]);
    appended = open("/tmp/appended", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (write(appended, "a", 1) != 1)
        exit(4);
    flocked = fresh("/tmp/flocked", "x");
    flock(flocked, LOCK_EX);
    posix_locked = fresh("/tmp/posix", "x");
    struct flock range = {.l_type = F_WRLCK, .l_start = 100, .l_len = 50};
    fcntl(posix_locked, F_SETLK, &range);
    ofd_locked = fresh("/tmp/ofd", "x");
    range.l_pid = 0;
    fcntl(ofd_locked, F_OFD_SETLK, &range);
    readme = open("/etc/motd", O_RDONLY);
    lseek(readme, 3, SEEK_SET);
    null_fd = open("/dev/null", O_WRONLY);
    proc_fd = open("/proc/1/status", O_RDONLY);
    listed = open("/bin", O_RDONLY | O_DIRECTORY);
    char entries[512];
    syscall(SYS_getdents64, listed, entries, sizeof entries);
    listed_at = lseek(listed, 0, SEEK_CUR);
    mkfifo("/tmp/fifo", 0600);
    fifo = open("/tmp/fifo", O_RDWR);
    if (write(fifo, "fifo", 4) != 4)
        exit(4);
    int fd = fresh("/tmp/mapped", "mapped");
    ftruncate(fd, 8192);
    shared_file = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    private_file = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    memcpy(shared_file + 4096, "shared", 6);
    memcpy(private_file, "private", 7);
    close(fd);
}

static int locked_for_others(int fd, int how)
{
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        char path[64];
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        int own = open(path, O_RDWR);
        struct flock range = {.l_type = F_WRLCK, .l_start = 120, .l_len = 1}, outside = {.l_type = F_WRLCK, .l_start = 200};
        if (how == LOCK_EX)
            _exit(flock(own, LOCK_EX | LOCK_NB) < 0 && errno == EWOULDBLOCK);
        _exit(fcntl(own, how, &range) < 0 && (errno == EAGAIN || errno == EACCES) && fcntl(own, how, &outside) == 0);
    }
    int status;
    waitpid(pid, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status);
}

static void see_files(void)
{
    char text[64] = "";
    struct stat status;
    for (size_t i = 0; i < HERE; i++) {
        SEE(read(deleted[i], text, 3) == 3 && !memcmp(text, "456", 3));
        SEE(fstat(deleted[i], &status) == 0 && status.st_nlink == 0 && (status.st_mode & 0777) == 0640);
        SEE(pwrite(deleted[i], "new", 3, 100) == 3);
    }
    SEE(lseek(twin, 0, SEEK_CUR) == 7);
    SEE(write(appended, "b", 1) == 1 && (fcntl(appended, F_GETFD) & FD_CLOEXEC) && (fcntl(appended, F_GETFL) & O_APPEND));
    SEE(stat("/tmp/appended", &status) == 0 && status.st_size == 2);
    SEE(locked_for_others(flocked, LOCK_EX));
    SEE(locked_for_others(posix_locked, F_SETLK));
    SEE(locked_for_others(ofd_locked, F_OFD_SETLK));
    SEE(read(readme, text, 9) == 9 && !memcmp(text, "the image", 9));
    SEE(write(null_fd, "x", 1) == 1);
    SEE(pread(proc_fd, text, 5, 0) == 5 && !memcmp(text, "Name:", 5));
    SEE(lseek(listed, 0, SEEK_CUR) == listed_at);
    SEE(read(fifo, text, 10) == 4 && !memcmp(text, "fifo", 4));
    SEE(!memcmp(shared_file + 4096, "shared", 6) && !memcmp(shared_file, "mapped", 6));
    SEE(!memcmp(private_file, "private", 7) && !memcmp(private_file + 4096, "shared", 6));
    memcpy(shared_file, "MAPPED", 6);
    int fd = open("/tmp/mapped", O_RDONLY);
    SEE(read(fd, text, 6) == 6 && !memcmp(text, "MAPPED", 6));
}

/* -- memory --------------------------------------------------------------------------------------------------------- */

static char *posix, *unlinked, *anonymous, *memfd_map, *guarded;
static int memfd;
static pid_t neighbour;

static char *shm(const char *name, int then_unlink)
{
    int fd = shm_open(name, O_RDWR | O_CREAT, 0600);
    ftruncate(fd, 1 << 20);
    char *map = mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (then_unlink)
        shm_unlink(name);
    return map;
}

static void make_memory(void)
{
    posix = shm("/posix", 0);
    unlinked = shm("/unlinked", 1);
    anonymous = mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    memfd = memfd_create("memfd", MFD_ALLOW_SEALING);
    ftruncate(memfd, 8192);
    memfd_map = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK);
    guarded = mmap(0, 3 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    strcpy(guarded, "mine");
    mprotect(guarded + 4096, 4096, PROT_NONE);
    madvise(guarded, 4096, MADV_DONTFORK);
    strcpy(posix, "one");
    strcpy(unlinked, "two");
    strcpy(anonymous, "three");
    strcpy(memfd_map, "four");
    neighbour = fork();
    if (neighbour == 0) {
        /* It answers through the memory that both have. */
        while (!__atomic_load_n(anonymous + 4096, __ATOMIC_SEQ_CST))
            usleep(1000);
        posix[0]++, unlinked[0]++, anonymous[0]++, memfd_map[0]++;
        _exit(17);
    }
}

static void see_memory(void)
{
    char text[8];
    int status;
    SEE(!strcmp(posix, "one") && !strcmp(unlinked, "two") && !strcmp(anonymous, "three") && !strcmp(memfd_map, "four"));
    __atomic_store_n(anonymous + 4096, 1, __ATOMIC_SEQ_CST);
    SEE(waitpid(neighbour, &status, 0) == neighbour && WEXITSTATUS(status) == 17);
    SEE(!strcmp(posix, "pne") && !strcmp(unlinked, "uwo") && !strcmp(anonymous, "uhree") && !strcmp(memfd_map, "gour"));
    SEE(pread(memfd, text, 5, 0) == 5 && !strcmp(text, "gour") && fcntl(memfd, F_GET_SEALS) == F_SEAL_SHRINK);
    SEE(!strcmp(shm("/posix", 1), "pne"));
    SEE(!strcmp(guarded, "mine"));
    int way[2];
    SEE(pipe(way) == 0 && write(way[1], guarded + 4096, 1) < 0 && errno == EFAULT); /* PROT_NONE */
}

/* -- signals and timers ----------------------------------------------------------------------------------------------- */

static int signals, alarms, handled_on_stack;
static timer_t ticking, far;
static int far_fd, ticking_fd;

static void on_alarm(int s)
{
    (void)s;
    alarms++;
}

static void on_user(int s)
{
    (void)s;
    stack_t now;
    sigaltstack(0, &now);
    handled_on_stack = now.ss_flags & SS_ONSTACK;
}

static void make_signals(void)
{
    sigset_t blocked;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR1);
    sigaddset(&blocked, SIGRTMIN);
    sigaddset(&blocked, SIGRTMIN + 1);
    sigaddset(&blocked, SIGHUP);
    sigprocmask(SIG_BLOCK, &blocked, 0);
    stack_t stack = {.ss_sp = malloc(1 << 16), .ss_size = 1 << 16};
    sigaltstack(&stack, 0);
    struct sigaction action = {.sa_handler = on_user, .sa_flags = SA_ONSTACK | SA_RESTART};
    sigaction(SIGUSR2, &action, 0);
    kill(getpid(), SIGUSR1);
    for (int i = 1; i <= 3; i++)
        sigqueue(getpid(), SIGRTMIN, (union sigval){.sival_int = i});
    syscall(SYS_tgkill, getpid(), gettid(), SIGRTMIN + 1);
    sigset_t watched;
    sigemptyset(&watched);
    sigaddset(&watched, SIGHUP);
    signals = signalfd(-1, &watched, 0);
    kill(getpid(), SIGHUP);

    struct sigevent how = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGALRM};
    struct sigaction alarm = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
    sigaction(SIGALRM, &alarm, 0);
    timer_create(CLOCK_MONOTONIC, &how, &ticking);
    timer_settime(ticking, 0, &(struct itimerspec){{0, 10000000}, {0, 10000000}}, 0);
    timer_create(CLOCK_REALTIME, &how, &far);
    timer_settime(far, 0, &(struct itimerspec){{7, 0}, {1000, 0}}, 0);
    setitimer(ITIMER_VIRTUAL, &(struct itimerval){{5, 0}, {2000, 0}}, 0);
    far_fd = timerfd_create(CLOCK_MONOTONIC, 0);
    timerfd_settime(far_fd, 0, &(struct itimerspec){{0, 0}, {1000, 0}}, 0);
    ticking_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    timerfd_settime(ticking_fd, 0, &(struct itimerspec){{0, 50000000}, {0, 50000000}}, 0);
}

static void see_signals(void)
{
    sigset_t waiting;
    siginfo_t info;
    sigemptyset(&waiting);
    sigaddset(&waiting, SIGRTMIN);
    for (int i = 1; i <= 3; i++) {
        SEE(sigtimedwait(&waiting, &info, &(struct timespec){0, 0}) == SIGRTMIN);
        SEE(info.si_value.sival_int == i && info.si_pid == getpid() && info.si_code == SI_QUEUE);
    }
    SEE(sigtimedwait(&waiting, &info, &(struct timespec){0, 0}) < 0 && errno == EAGAIN);
    sigemptyset(&waiting);
    sigaddset(&waiting, SIGUSR1);
    sigaddset(&waiting, SIGRTMIN + 1);
    /* Those of the thread come before those of the process. */
    SEE(sigtimedwait(&waiting, &info, &(struct timespec){0, 0}) == SIGRTMIN + 1);
    SEE(sigtimedwait(&waiting, &info, &(struct timespec){0, 0}) == SIGUSR1);
    struct signalfd_siginfo got;
    SEE(read(signals, &got, sizeof got) == sizeof got && got.ssi_signo == SIGHUP);
    raise(SIGUSR2);
    SEE(handled_on_stack);
    struct sigaction was;
    SEE(sigaction(SIGUSR2, 0, &was) == 0 && was.sa_handler == on_user && (was.sa_flags & SA_RESTART));
}

static void see_timers(void)
{
    int before = alarms;
    for (int i = 0; i < 10000 && alarms < before + 3; i++)
        usleep(1000);
    SEE(alarms >= before + 3);
    timer_settime(ticking, 0, &(struct itimerspec){0}, 0);
    struct itimerspec left;
    SEE(timer_gettime(far, &left) == 0 && left.it_interval.tv_sec == 7);
    SEE(left.it_value.tv_sec > 500 && left.it_value.tv_sec < 1000);
    struct itimerval burnt;
    SEE(getitimer(ITIMER_VIRTUAL, &burnt) == 0 && burnt.it_interval.tv_sec == 5 && burnt.it_value.tv_sec > 1900);
    SEE(timerfd_gettime(far_fd, &left) == 0 && left.it_value.tv_sec > 500 && left.it_value.tv_sec < 1000);
    SEE(timerfd_gettime(ticking_fd, &left) == 0 && left.it_interval.tv_nsec == 50000000);
}

static void see_unread_timer(void)
{
    uint64_t count;
    read(ticking_fd, &count, sizeof count);
    struct pollfd ready = {ticking_fd, POLLIN, 0};
    SEE(poll(&ready, 1, 10000) == 1 && read(ticking_fd, &count, sizeof count) == sizeof count);
}

/* -- what waits for what ---------------------------------------------------------------------------------------------- */

static int counter, inner, outer, watch, big[2];

static void make_events(void)
{
    counter = eventfd(5, EFD_SEMAPHORE | EFD_NONBLOCK);
    inner = epoll_create1(0);
    outer = epoll_create1(EPOLL_CLOEXEC);
    epoll_ctl(inner, EPOLL_CTL_ADD, counter, &(struct epoll_event){EPOLLIN | EPOLLET, {.u64 = 0x1234567890}});
    epoll_ctl(outer, EPOLL_CTL_ADD, inner, &(struct epoll_event){EPOLLIN, {.u64 = 7}});
    pipe2(big, O_NONBLOCK);
    fcntl(big[1], F_SETPIPE_SZ, 1 << 20);
    char block[4096] = "block";
    while (write(big[1], block, sizeof block) > 0)
        ;
}

static void see_events(void)
{
    uint64_t one;
    struct epoll_event got = {0};
    char text[4096];
    SEE(epoll_wait(outer, &got, 1, 0) == 1 && got.data.u64 == 7);
    SEE(epoll_wait(inner, &got, 1, 0) == 1 && got.data.u64 == 0x1234567890);
    for (int i = 0; i < 5; i++)
        SEE(read(counter, &one, 8) == 8 && one == 1);
    SEE(read(counter, &one, 8) < 0 && errno == EAGAIN);
    long total = 0;
    for (ssize_t size; (size = read(big[0], text, sizeof text)) > 0; total += size)
        ;
    SEE(total == 1 << 20 && fcntl(big[0], F_GETPIPE_SZ) == 1 << 20);
}

static void make_watch(void)
{
    mkdir("/tmp/watched", 0700);
    watch = inotify_init1(IN_NONBLOCK);
    inotify_add_watch(watch, "/tmp/watched", IN_CREATE);
}

static void see_watch(void)
{
    char text[512];
    close(open("/tmp/watched/new", O_CREAT | O_WRONLY, 0600));
    SEE(read(watch, text, sizeof text) > 0 && !strcmp(((struct inotify_event *)text)->name, "new"));
}

/* -- sockets ---------------------------------------------------------------------------------------------------------- */

static int stream[2], datagram[2], seq[2], named, to_named, abstract, listener, tcp[2], listener6, udp, half[2];
static struct sockaddr_in tcp_address = {.sin_family = AF_INET};

static int connect_tcp(int server)
{
    socklen_t size = sizeof tcp_address;
    getsockname(server, (void *)&tcp_address, &size);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, (void *)&tcp_address, size) < 0)
        exit(5);
    return fd;
}

static void make_sockets(void)
{
    struct sockaddr_un path = {AF_UNIX, "/tmp/socket"}, hidden = {AF_UNIX, "\0hidden"};
    socketpair(AF_UNIX, SOCK_STREAM, 0, stream);
    write(stream[0], "stream", 6);
    socketpair(AF_UNIX, SOCK_DGRAM, 0, datagram);
    write(datagram[0], "one", 3);
    write(datagram[0], "three", 5);
    socketpair(AF_UNIX, SOCK_SEQPACKET, 0, seq);
    write(seq[0], "packet", 6);
    named = socket(AF_UNIX, SOCK_STREAM, 0);
    bind(named, (void *)&path, sizeof path);
    listen(named, 5);
    to_named = socket(AF_UNIX, SOCK_STREAM, 0);
    connect(to_named, (void *)&path, sizeof path); /* not accepted yet */
    abstract = socket(AF_UNIX, SOCK_DGRAM, 0);
    bind(abstract, (void *)&hidden, sizeof(sa_family_t) + 7);

    tcp_address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
    bind(listener, (void *)&tcp_address, sizeof tcp_address);
    listen(listener, 5);
    tcp[0] = connect_tcp(listener);
    tcp[1] = accept(listener, 0, 0);
    half[0] = connect_tcp(listener);
    half[1] = accept(listener, 0, 0);
    write(tcp[0], "to the server", 13);
    write(tcp[1], "to the client", 13);
    write(half[0], "last", 4);
    shutdown(half[0], SHUT_WR);
    struct sockaddr_in6 any6 = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT, .sin6_port = htons(7000)};
    listener6 = socket(AF_INET6, SOCK_STREAM, 0);
    if (bind(listener6, (void *)&any6, sizeof any6) == 0)
        listen(listener6, 5);
    udp = socket(AF_INET, SOCK_DGRAM, 0);
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(7001), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    bind(udp, (void *)&here, sizeof here);
}

static void see_sockets(void)
{
    char text[64];
    SEE(read(stream[1], text, 64) == 6 && !memcmp(text, "stream", 6));
    SEE(write(stream[1], "back", 4) == 4 && read(stream[0], text, 64) == 4);
    SEE(read(datagram[1], text, 64) == 3 && read(datagram[1], text, 64) == 5 && !memcmp(text, "three", 5));
    SEE(read(seq[1], text, 64) == 6 && !memcmp(text, "packet", 6));
    int accepted = accept(named, 0, 0);
    SEE(accepted >= 0 && write(to_named, "late", 4) == 4 && read(accepted, text, 64) == 4);
    struct sockaddr_un hidden = {AF_UNIX, "\0hidden"};
    SEE(sendto(datagram[0], "", 0, 0, (void *)&hidden, sizeof(sa_family_t) + 7) == 0 || errno == EISCONN);
}

static void see_internet(void)
{
    char text[64];
    SEE(read(tcp[1], text, 64) == 13 && !memcmp(text, "to the server", 13));
    SEE(read(tcp[0], text, 64) == 13 && !memcmp(text, "to the client", 13));
    SEE(write(tcp[0], "more", 4) == 4 && read(tcp[1], text, 64) == 4 && !memcmp(text, "more", 4));
    SEE(read(half[1], text, 64) == 4 && read(half[1], text, 64) == 0);
    SEE(write(half[1], "answer", 6) == 6 && read(half[0], text, 64) == 6);
    int fd = connect_tcp(listener), other = accept(listener, 0, 0);
    SEE(write(fd, "new", 3) == 3 && read(other, text, 64) == 3);
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(7001), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    SEE(sendto(udp, "self", 4, 0, (void *)&here, sizeof here) == 4 && recv(udp, text, 64, 0) == 4);
    struct sockaddr_in6 there;
    socklen_t size = sizeof there;
    SEE(getsockname(listener6, (void *)&there, &size) == 0 && there.sin6_port == htons(7000));
}

/* -- who it is, and its threads ----------------------------------------------------------------------------------------- */

static pthread_t sleeper, poller, reader, waiter, locker;
static int quiet[2], release_way[2];
static uint32_t futex_word;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct rlimit small = {77, 99};

static void *sleeps(void *unused)
{
    (void)unused;
    prctl(PR_SET_NAME, "sleeper");
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += 3;
    return (void *)(intptr_t)clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, 0);
}

static void *polls(void *unused)
{
    (void)unused;
    struct pollfd never = {quiet[0], POLLIN, 0};
    /* CRIU ends this wait with EINTR, which others see only after a signal handler. */
    while (poll(&never, 1, -1) < 0)
        if (errno != EINTR)
            return (void *)(intptr_t)errno;
    return 0;
}

static void *reads(void *unused)
{
    (void)unused;
    char c;
    return (void *)(intptr_t)(read(release_way[0], &c, 1) == 1 ? 0 : errno);
}

static void *waits(void *unused)
{
    (void)unused;
    return (void *)(intptr_t)(syscall(SYS_futex, &futex_word, FUTEX_WAIT, 0, 0, 0, 0) == 0 || errno == EAGAIN ? 0 : errno);
}

static void *locks(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&mutex);
    pthread_mutex_unlock(&mutex);
    return 0;
}

static void make_threads(void)
{
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &old); /* the alarms are not for them */
    pipe(quiet);
    pipe(release_way);
    pthread_mutex_lock(&mutex);
    pthread_create(&sleeper, 0, sleeps, 0);
    pthread_create(&poller, 0, polls, 0);
    pthread_create(&reader, 0, reads, 0);
    pthread_create(&waiter, 0, waits, 0);
    pthread_create(&locker, 0, locks, 0);
    pthread_sigmask(SIG_SETMASK, &old, 0);
    usleep(50000);
}

static void see_threads(void)
{
    void *result;
    write(quiet[1], "x", 1);
    write(release_way[1], "x", 1);
    futex_word = 1;
    syscall(SYS_futex, &futex_word, FUTEX_WAKE, 1, 0, 0, 0);
    pthread_mutex_unlock(&mutex);
    pthread_t all[] = {sleeper, poller, reader, waiter, locker};
    for (int i = 0; i < 5; i++) {
        pthread_join(all[i], &result);
        errno = (int)(intptr_t)result;
        SEE(result == 0);
    }
}

static void make_self(void)
{
    prctl(PR_SET_NAME, "everything");
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    umask(027);
    setrlimit(RLIMIT_NPROC, &(struct rlimit){5000, 6000});
    setrlimit(RLIMIT_SIGPENDING, &small);
    setpriority(PRIO_PROCESS, 0, 3);
    mkdir("/tmp/gone", 0700);
    chdir("/tmp/gone");
    rmdir("/tmp/gone");
}

static void see_self(void)
{
    char name[16], path[64];
    struct rlimit limit;
    SEE(prctl(PR_GET_NAME, name) == 0 && !strcmp(name, "everything"));
    SEE(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1);
    int subreaper = 0;
    SEE(prctl(PR_GET_CHILD_SUBREAPER, &subreaper) == 0 && subreaper == 1);
    SEE(umask(0) == 027);
    SEE(getrlimit(RLIMIT_SIGPENDING, &limit) == 0 && limit.rlim_cur == 77 && limit.rlim_max == 99);
    SEE(getpriority(PRIO_PROCESS, 0) == 3);
    ssize_t size = readlink("/proc/self/cwd", path, sizeof path);
    SEE(size > 10 && !memcmp(path + size - 10, " (deleted)", 10));
}

static const struct {
    const char *name;
    void (*make)(void), (*see)(void);
} THINGS[] = {
    {"files", make_files, see_files}, {"memory", make_memory, see_memory}, {"signals", make_signals, see_signals},
    {"timers", 0, see_timers}, {"unread-timer", 0, see_unread_timer}, {"events", make_events, see_events},
    {"inotify", make_watch, see_watch}, {"sockets", make_sockets, see_sockets}, {"internet", 0, see_internet},
    {"threads", make_threads, see_threads}, {"self", make_self, see_self},
};

static int things(char **without)
{
    const size_t count = sizeof THINGS / sizeof *THINGS;
    char skipped[sizeof THINGS / sizeof *THINGS] = {0};
    for (; *without; without++)
        for (size_t i = 0; i < count; i++)
            skipped[i] |= !strcmp(*without, THINGS[i].name);
    for (size_t i = 0; i < count; i++)
        if (THINGS[i].make && !skipped[i])
            THINGS[i].make();
    ready();
    for (size_t i = 0; i < count; i++) {
        if (skipped[i])
            continue;
        thing = THINGS[i].name;
        wrong = 0;
        errno = 0;
        THINGS[i].see();
        if (!wrong)
            printf("%s ok\n", thing);
    }
    return 0;
}

/* -- many ------------------------------------------------------------------------------------------------------------- */

static long sum;

static void *adds(void *number)
{
    pthread_mutex_lock(&mutex);
    sum += (intptr_t)number;
    pthread_mutex_unlock(&mutex);
    return 0;
}

static int many_threads(int count)
{
    pthread_t *threads = calloc((size_t)count, sizeof *threads);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 1 << 16);
    pthread_mutex_lock(&mutex);
    for (int i = 0; i < count; i++)
        if (pthread_create(&threads[i], &attributes, adds, (void *)(intptr_t)i))
            return 6;
    ready();
    pthread_mutex_unlock(&mutex);
    for (int i = 0; i < count; i++)
        pthread_join(threads[i], 0);
    printf("sum %ld\n", sum);
    return 0;
}

static int many_processes(int count)
{
    for (int i = 0; i < count; i++) {
        pid_t pid = fork();
        if (pid < 0)
            return 6;
        if (pid == 0) {
            pause();
            _exit(0);
        }
    }
    ready();
    int ended = 0;
    signal(SIGTERM, SIG_IGN);
    kill(0, SIGTERM);
    for (int status; wait(&status) > 0;)
        ended += WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM;
    printf("ended %d\n", ended);
    return 0;
}

static int many_files(int count)
{
    /* Ten for each file, each at a place of its own in it. */
    char path[64], text[16], c;
    int *fds = calloc((size_t)count, sizeof *fds), good = 0;
    for (int i = 0; i < count; i++) {
        snprintf(path, sizeof path, "/tmp/%d", i / 10);
        snprintf(text, sizeof text, "%010d", i / 10);
        if (i % 10 == 0)
            close(fresh(path, text));
        fds[i] = open(path, O_RDWR);
        if (fds[i] < 0 || lseek(fds[i], i % 10, SEEK_SET) < 0)
            return 6;
    }
    ready();
    for (int i = 0; i < count; i++) {
        snprintf(text, sizeof text, "%010d", i / 10);
        good += lseek(fds[i], 0, SEEK_CUR) == i % 10 && read(fds[i], &c, 1) == 1 && c == text[i % 10];
    }
    printf("good %d\n", good);
    return 0;
}

/* -- a storm of signals ------------------------------------------------------------------------------------------------ */

static volatile sig_atomic_t usual;
static volatile long queued;

static void on_usual(int s)
{
    (void)s;
    usual++;
}

static void on_queued(int s, siginfo_t *info, void *context)
{
    (void)s, (void)context;
    if (info->si_value.sival_int != queued % 1000000) {
        static const char lost[] = "lost\n";
        write(1, lost, sizeof lost - 1);
        _exit(8);
    }
    queued++;
}

static int storm(void)
{
    struct sigaction plain = {.sa_handler = on_usual, .sa_flags = SA_RESTART};
    struct sigaction full = {.sa_sigaction = on_queued, .sa_flags = SA_RESTART | SA_SIGINFO};
    sigaction(SIGUSR1, &plain, 0);
    sigaction(SIGRTMIN, &full, 0);
    pid_t parent = getpid(), pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        /* None of the queued ones may be lost, none come twice or out of order. */
        for (long i = 0;; i++) {
            while (sigqueue(parent, SIGRTMIN, (union sigval){.sival_int = (int)(i % 1000000)}) < 0)
                usleep(100);
            kill(parent, SIGUSR1);
            if (i % 50 == 0)
                usleep(100);
        }
    }
    ready();
    kill(pid, SIGKILL);
    waitpid(pid, 0, 0);
    printf("storm %s\n", queued > 100 && usual > 0 ? "ok" : "none");
    return 0;
}

/* -- connections that are being made all the time ----------------------------------------------------------------------- */

static int knocks(void)
{
    volatile long *answered = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    tcp_address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int door = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(door, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
    if (bind(door, (void *)&tcp_address, sizeof tcp_address) < 0 || listen(door, 5) < 0)
        return 10;
    pid_t server = fork();
    if (server == 0)
        for (;;) {
            struct pollfd knocked = {.fd = door, .events = POLLIN};
            if (poll(&knocked, 1, -1) != 1)
                continue;
            usleep(20000); /* most of the time, somebody waits at the door */
            int guest = accept(door, 0, 0);
            write(guest, "x", 1);
            close(guest);
        }
    pid_t client = fork();
    if (client == 0)
        for (char c;;) {
            int s = connect_tcp(door);
            if (read(s, &c, 1) != 1 || c != 'x')
                _exit(1);
            close(s);
            ++*answered;
            usleep(10000);
        }
    ready();
    int status;
    for (long enough = *answered + 5; *answered < enough;) {
        if (waitpid(client, &status, WNOHANG) == client)
            return 11;
        usleep(1000);
    }
    kill(server, SIGKILL);
    kill(client, SIGKILL);
    puts("knocks ok");
    return 0;
}

/* -- a sparse file ------------------------------------------------------------------------------------------------------ */

static int sparse(const char *path)
{
    const off_t places[] = {0, 1L << 30, (2L << 30) - 6};
    int fd = open(path, O_RDWR | O_CREAT, 0600), good = 0;
    for (int i = 0; i < 3; i++)
        if (pwrite(fd, "sparse", 6, places[i]) != 6)
            return 9;
    ready();
    struct stat status;
    for (int i = 0; i < 3; i++) {
        char text[6];
        good += pread(fd, text, 6, places[i]) == 6 && !memcmp(text, "sparse", 6);
    }
    fstat(fd, &status);
    printf("sparse %d %ld %s\n", good, (long)status.st_size, status.st_blocks < 2048 ? "yes" : "no");
    return 0;
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    int count = argc > 2 ? atoi(argv[2]) : 0;
    if (!strcmp(what, "things"))
        return things(argv + 2);
    if (!strcmp(what, "threads"))
        return many_threads(count);
    if (!strcmp(what, "processes"))
        return many_processes(count);
    if (!strcmp(what, "files"))
        return many_files(count);
    if (!strcmp(what, "storm"))
        return storm();
    if (!strcmp(what, "knocks"))
        return knocks();
    if (!strcmp(what, "sparse"))
        return sparse(argv[2]);
    return 1;
}
