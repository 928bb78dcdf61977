"""Throughput comparisons; installed as ``ngd_fast.bench``, so that ``ngd-fast bench`` and pytest measure one way.

``objective.py``, ``stem.py``, ``step.py``, ``train.py`` and ``feeds.py`` measure and return rows; ``plain.py`` is what
``step.py`` and ``train.py`` measure against; ``bench_*.py`` are the same for pytest-benchmark
(``pytest bench/bench_objective.py``); ``gpu_check.py`` is ``make gpu-check``.
"""
