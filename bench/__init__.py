"""Benchmarks of imgrun against its peers: ``./dev bench``, or ``python -m bench --help``.

A question is a module with ``TITLE`` and ``measure(place) -> Section``, named in ``bench.__main__.QUESTIONS``. What all
share: ``harness`` (interleaved runs and their summaries), ``report`` (tables), ``place`` (the root that everything runs in,
and a directory for what comes and goes), ``peers`` (how other programs run a command in that root), ``rooms`` (a running
work program in a root, asked to do timed file work), ``desk`` (where an ordinary user runs things).
"""
