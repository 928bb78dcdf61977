"""Throughput comparisons; installed as ``ngd_fast.bench``, so that ``ngd-fast bench`` and pytest measure one way.

``objective.py``, ``step.py`` and ``feeds.py`` measure and return rows; ``bench_*.py`` are the same for pytest-benchmark
(``pytest bench/bench_objective.py``); ``gpu_check.py`` is ``make gpu-check``.
"""
