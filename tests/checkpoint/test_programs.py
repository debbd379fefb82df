"""Real programs, frozen in the middle of their work and continued: they end with the right answer."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from command import eventually

from images import programs

from .conftest import Rig

ROUNDS = 3

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
    for n in pool.imap(square, range(1000)):
        total += n
        print("step", flush=True)
print(total)
"""

SQLITE = """
import sqlite3, time
db = sqlite3.connect("/root/db"); db.execute("pragma journal_mode=wal"); db.execute("create table t (n integer, s text)")
for n in range(400):
    with db:
        db.executemany("insert into t values (?, ?)", [(n, "x" * 500)] * 20)
    print("step", flush=True); time.sleep(0.02)
print(db.execute("pragma integrity_check").fetchone()[0], db.execute("select count(*), sum(n) from t").fetchone())
"""

C = (Path(__file__).parent / "program.c").read_text()

PIPELINE = "seq 1 3000000 | tee /dev/stderr 2>/tmp/copy | sed s/^/x/ | sort | sha256sum; wc -l < /tmp/copy"

MAKE = r"""
mkdir /b; cd /b
for i in $(seq 60); do echo "int f$i(void) { return $i; }" > $i.c; done
printf 'all: $(patsubst %%.c,%%.o,$(wildcard *.c))\n%%.o: %%.c\n\t@gcc -O2 -c $< && sleep 0.2 && echo step\n' > Makefile
make -j2; ls *.o | wc -l
"""

REDIS = """
redis-server --save '' --appendonly yes --dir /tmp --daemonize yes --port 7777 > /dev/null; sleep 0.5
for i in $(seq 100); do redis-cli -p 7777 rpush list $i > /dev/null; echo step; sleep 0.04; done
redis-cli -p 7777 lrange list 0 -1 | cmp - /dev/stdin <<END || exit 1
$(seq 100)
END
redis-cli -p 7777 shutdown nosave; redis-check-aof /tmp/appendonlydir/appendonly.aof.manifest | tail -1
"""

OPENMP = r"""
#include <omp.h>
#include <stdio.h>
#include <unistd.h>
int main(void) {
    double sum = 0;
    for (int round = 0; round < 300; round++) {
        #pragma omp parallel for schedule(dynamic, 1000) reduction(+:sum)
        for (long i = 0; i < 100000; i++) sum += (double)((i * 7 + round) % 11);
        printf("step\n"); fflush(stdout); usleep(30000);
    }
    printf("%d threads %.0f\n", omp_get_max_threads(), sum);
}
"""

JAVA = """
import java.util.*; import java.util.concurrent.*; import java.nio.file.*;
public class Work {
    static long collatz(long n) {
        long steps = 0;
        while (n != 1) { n = n % 2 == 0 ? n / 2 : 3 * n + 1; steps++; }
        return steps;
    }
    public static void main(String[] args) throws Exception {
        ExecutorService pool = Executors.newFixedThreadPool(3);
        Path log = Files.createTempFile("log", null);
        long total = 0;
        for (int round = 0; round < 150; round++) {
            List<Future<Long>> parts = new ArrayList<>();
            for (int k = 0; k < 3; k++) {
                final long start = 1 + round * 3000L + k * 1000L;
                parts.add(pool.submit(() -> {
                    long sum = 0; for (long n = start; n < start + 1000; n++) sum += collatz(n); return sum; }));
            }
            for (Future<Long> part : parts) total += part.get();
            Files.writeString(log, round + "\\n", StandardOpenOption.APPEND);
            byte[][] garbage = new byte[50][100000];
            System.out.println("step");
            Thread.sleep(20);
        }
        pool.shutdown();
        System.out.println(total + " " + Files.readAllLines(log).size());
    }
}
"""

# Each stressor checks its own work (--verify); the last line is "successful" only when all did.
STRESS = """
cd /tmp; (while :; do echo step; sleep 0.1; done) & ticker=$!
stress-ng --verify --timeout 20 --cpu 1 --cpu-method fft --vm 1 --vm-bytes 16M --hdd 1 --hdd-bytes 4M --mutex 1 \\
  --timerfd 1 --eventfd 1 --poll 1 --sem 1 > out 2>&1 || { cat out; exit 1; }
kill $ticker; grep -o 'successful run completed' out || cat out
"""

PROGRAMS = {
    "numpy": (f"OPENBLAS_NUM_THREADS=2 python3 -c '{NUMPY}'", None),
    "pool": (f"python3 -c '{POOL}'", str(sum(n * n for n in range(1000)))),
    "sqlite": (f"python3 -c '{SQLITE}'", f"ok (8000, {20 * sum(range(400))})"),
    "c": (f"cat > /p.c <<'END'\n{C}\nEND\ngcc -O1 -w -o /p /p.c -lpthread -lrt && exec /p", "100 59700 7 1"),
    "make": (MAKE, "60"),
    "openmp": (f"cat > /p.c <<'END'\n{OPENMP}\nEND\ngcc -O1 -fopenmp -o /p /p.c && OMP_NUM_THREADS=3 exec /p", None),
    "java": (f"cat > /tmp/Work.java <<'END'\n{JAVA}\nEND\nexec java -Xmx64m /tmp/Work.java", None),
    "stress": (STRESS, "successful run completed"),
    "redis": (REDIS, "All AOF files and manifest are valid"),
}


@pytest.fixture(scope="module")
def image(base: Path) -> Path:
    """Where an ordinary user can read it."""
    return programs(base)


@pytest.mark.timeout(900)  # the first of them makes the image
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
        done = rig.restore(target, "--detach")
        assert done.status == 0, done
        job = done.stdout.strip()
    assert rig.run("wait", job, timeout=200).status == 0, rig.run("logs", job)
    assert rig.output(job)[-1] == answer


def test_a_pipeline_over_a_large_file(rig: Rig) -> None:
    undisturbed = rig.run.sh(PIPELINE).stdout
    job = rig.run.background(PIPELINE)
    time.sleep(0.2)
    rig.freeze(job, "c")
    done = rig.restore(rig.path("c"))
    assert done.stdout == undisturbed


def test_a_job_that_writes_to_a_bind_mount(rig: Rig) -> None:
    """What is there belongs to the host: it is where the job left it, and the job goes on in the files it has open."""
    data = rig.make("data")
    data.chmod(0o777)
    script = """exec 5>> /data/log; for i in $(seq 200); do echo $i >&5; echo $i > /data/new; mv /data/new /data/last
        echo step; sleep 0.02; done; echo $(wc -l < /data/log) $(cat /data/last)"""
    job = rig.run.background(script, "--bind", f"{data}:/data")
    for number in range(ROUNDS):
        eventually(lambda job=job: rig.output(job).count("step") > 5, f"it makes progress in round {number}")
        rig.freeze(job)
        before = (data / "log").read_text()
        job = rig.restore(rig.path("c"), "--detach").stdout.strip()
        assert (data / "log").read_text().startswith(before)
    assert rig.run("wait", job).status == 0
    assert rig.output(job)[-1] == "200 200"
    assert (data / "log").read_text().split() == [str(n) for n in range(1, 201)]
