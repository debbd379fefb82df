"""Real programs, frozen in the middle of their work and continued: they end with the right answer."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import COMMAND, eventually

from .conftest import Rig

ROUNDS = 3
CACHE = Path(os.environ.get("IMGRUN_CACHE") or Path.home() / ".cache/imgrun-dev")

NUMPY = """
import numpy, hashlib, threading
results = [None] * 4
def work(n):
    a = numpy.random.default_rng(n).standard_normal((300, 300))
    for i in range(120):
        a = a @ a.T; a /= numpy.abs(a).max(); a += 1e-3 * numpy.sin(a)
        print("step", flush=True)
    results[n] = hashlib.sha256(a.tobytes()).hexdigest()
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
print(*results)
"""

POOL = """
import multiprocessing, time
def square(n):
    time.sleep(0.01)
    return n * n
with multiprocessing.Pool(3) as pool:
    total = 0
    for n in pool.imap(square, range(400)):
        total += n
        print("step", flush=True)
print(total)
"""

SQLITE = """
import sqlite3
db = sqlite3.connect("/root/db"); db.execute("pragma journal_mode=wal"); db.execute("create table t (n integer, s text)")
for n in range(400):
    with db:
        db.executemany("insert into t values (?, ?)", [(n, "x" * 500)] * 20)
    print("step", flush=True)
print(db.execute("pragma integrity_check").fetchone()[0], db.execute("select count(*), sum(n) from t").fetchone())
"""

C = r"""
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
#include <unistd.h>
static int pair[2], udp[2], events, ticks; static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; static long sum;
static void on_alarm(int s) { (void)s; ticks++; }
static void *adder(void *unused) { (void)unused;
    for (int i = 0; i < 200; i++) { pthread_mutex_lock(&lock); sum += i; pthread_mutex_unlock(&lock); usleep(5000); } return 0; }
int main(void) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)}; socklen_t n = sizeof a;
    int l = socket(AF_INET, SOCK_STREAM, 0); bind(l, (void *)&a, sizeof a); listen(l, 1); getsockname(l, (void *)&a, &n);
    int c = socket(AF_INET, SOCK_STREAM, 0); if (connect(c, (void *)&a, sizeof a)) return 2;
    int s = accept(l, 0, 0); socketpair(AF_UNIX, SOCK_STREAM, 0, pair); events = eventfd(0, 0);
    signal(SIGALRM, on_alarm); struct itimerspec every = {{0, 5000000}, {0, 5000000}};
    timer_t t; struct sigevent ev = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGALRM};
    timer_create(CLOCK_MONOTONIC, &ev, &t); timer_settime(t, 0, &every, 0);
    int tfd = timerfd_create(CLOCK_MONOTONIC, 0), ep = epoll_create1(0); timerfd_settime(tfd, 0, &every, 0);
    struct epoll_event e = {EPOLLIN, {.fd = tfd}}; epoll_ctl(ep, EPOLL_CTL_ADD, tfd, &e);
    sem_t *sem = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0); sem_init(sem, 1, 0);
    pid_t child = fork();
    if (!child) { signal(SIGALRM, SIG_IGN); for (int i = 0; i < 100; i++) { sem_wait(sem); char b; read(pair[1], &b, 1); b++; write(s, &b, 1); } _exit(7); }
    pthread_t th[3]; for (int i = 0; i < 3; i++) pthread_create(&th[i], 0, adder, 0);
    int good = 0;
    for (int i = 0; i < 100; i++) {
        char b = (char)i, r; write(pair[0], &b, 1); sem_post(sem); while (read(c, &r, 1) != 1); good += r == b + 1;
        unsigned long long x; struct epoll_event got; while (epoll_wait(ep, &got, 1, -1) != 1); read(tfd, &x, 8);
        printf("step\n"); fflush(stdout); usleep(10000);
    }
    for (int i = 0; i < 3; i++) pthread_join(th[i], 0);
    int st; waitpid(child, &st, 0); printf("%d %ld %d %d\n", good, sum, WEXITSTATUS(st), ticks > 50);
}
"""

PIPELINE = "seq 1 400000 | tee /dev/stderr 2>/tmp/copy | sed s/^/x/ | sort | sha256sum; wc -l < /tmp/copy"

PROGRAMS = {
    "numpy": (f"OPENBLAS_NUM_THREADS=2 python3 -c '{NUMPY}'", None),
    "pool": (f"python3 -c '{POOL}'", str(sum(n * n for n in range(400)))),
    "sqlite": (f"python3 -c '{SQLITE}'", f"ok (8000, {20 * sum(range(400))})"),
    "c": (f"cat > /p.c <<'END'\n{C}\nEND\ngcc -O1 -w -o /p /p.c -lpthread -lrt && exec /p", "100 59700 7 1"),
    "make": (
        "mkdir /b; cd /b; for i in $(seq 40); do echo \"int f$i(void) { return $i; }\" > $i.c; done\n"
        "printf 'all: $(patsubst %.c,%.o,$(wildcard *.c))\\n%.o: %.c\\n\\t@gcc -O2 -c $< && sleep 0.1 && echo step\\n' > Makefile\n"
        "make -j2; ls *.o | wc -l",
        "40",
    ),
    "redis": (
        "redis-server --save '' --appendonly yes --dir /tmp --daemonize yes --port 7777 > /dev/null; sleep 0.5\n"
        "for i in $(seq 100); do redis-cli -p 7777 rpush list $i > /dev/null; echo step; sleep 0.01; done\n"
        "redis-cli -p 7777 lrange list 0 -1 | md5sum; redis-cli -p 7777 bgrewriteaof > /dev/null; sleep 0.3\n"
        "redis-cli -p 7777 shutdown nosave; redis-check-aof /tmp/appendonlydir/appendonly.aof.manifest | tail -1",
        "All AOF files and manifest are valid",
    ),
}


@pytest.fixture(scope="module")
def image(base: Path) -> Iterator[Path]:
    """The image of images/numpy.toml, made once for all sessions."""
    import subprocess

    path = CACHE / "images/numpy.squashfs"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        recipe = Path(__file__).parents[2] / "images/numpy.toml"
        words = [*COMMAND, "image", "build", str(recipe), str(path), "--format", "squashfs", "--size", "auto"]
        subprocess.run(words, check=True, env={**os.environ, "IMGRUN_CACHE": str(CACHE)})
    # Where an ordinary user can read it.
    target = base / "numpy.squashfs"
    if not target.exists():
        subprocess.run(["cp", "--reflink=auto", path, target], check=True)
    yield target


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_ends_with_the_right_answer(rig: Rig, name: str) -> None:
    script, answer = PROGRAMS[name]
    flags = ("--network", "none") if name in ("c", "redis") else ()
    if answer is None:
        answer = rig.run.sh(script).stdout.splitlines()[-1]
    job = rig.run.background(script, *flags)
    target = rig.path("c")
    for number in range(ROUNDS):
        eventually(lambda job=job: rig.output(job).count("step") > 5, f"{name} makes progress in round {number}")
        rig.freeze(job, "c")
        (job,) = rig.restore(target, "--detach").stdout.split()
    assert rig.run("wait", job, timeout=200).status == 0, rig.run("logs", job)
    assert rig.output(job)[-1] == answer


def test_a_pipeline_over_a_large_file(rig: Rig) -> None:
    undisturbed = rig.run.sh(PIPELINE).stdout
    job = rig.run.background(PIPELINE)
    time.sleep(0.2)
    rig.freeze(job, "c")
    done = rig.restore(rig.path("c"))
    assert done.stdout == undisturbed
