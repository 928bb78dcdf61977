"""A thousand stratified resamples of 3,500 rows with all five metrics, against a loop over scikit-learn.

    OMP_NUM_THREADS=1 pytest bench/bench_bootstrap.py -s

Both give accuracy, macro-F1, balanced accuracy and macro-AUROC; ours gives ECE and the classes' rates besides. The loop
is timed on 20 resamples and scaled up.
"""

import statistics
import time

import numpy as np
import pytest
from sklearn import metrics as sk

from ngd_fast.evaluation import bootstrap
from ngd_fast.evaluation.metrics import prepare

ROWS, RESAMPLES, LOOPED = 3500, 1000, 20
FERPLUS_VALID = np.array([1335, 899, 456, 412, 319, 34, 74, 24])


@pytest.fixture(scope="module")
def scored():
    rng = np.random.default_rng(0)
    labels = rng.choice(8, ROWS, p=FERPLUS_VALID / FERPLUS_VALID.sum())
    logits = rng.normal(size=(ROWS, 8))
    logits[np.arange(ROWS), labels] += 3
    return prepare(labels, logits, "eight_way")


def scikit_learn_loop(scored, resamples):
    rng = np.random.default_rng(0)
    strata = [np.flatnonzero(scored.labels == c) for c in range(8)]
    found = []
    for _ in range(resamples):
        rows = np.concatenate([rng.choice(stratum, len(stratum)) for stratum in strata])
        y, p, q = scored.labels[rows], scored.predicted[rows], scored.probabilities[rows]
        found.append(
            (
                sk.accuracy_score(y, p),
                sk.f1_score(y, p, average="macro"),
                sk.balanced_accuracy_score(y, p),
                sk.roc_auc_score(y, q, multi_class="ovr"),
            )
        )
    return np.array(found)


def test_bootstrap(benchmark, scored):
    start = time.perf_counter()
    looped = scikit_learn_loop(scored, LOOPED)
    loop_seconds = (time.perf_counter() - start) / LOOPED * RESAMPLES
    ours = benchmark(bootstrap.resample, scored, RESAMPLES, 0)
    seconds = statistics.median(benchmark.stats.stats.data)
    print(f"\n{seconds:.3f} s against {loop_seconds:.1f} s: {loop_seconds / seconds:.0f} times faster")
    benchmark.extra_info["times_faster"] = loop_seconds / seconds
    for k, name in enumerate(("accuracy", "macro_f1", "balanced_accuracy", "auroc_macro")):
        # other random rows: means over resamples agree within their own spread
        assert abs(ours[name].mean() - looped[:, k].mean()) < 4 * ours[name].std() / LOOPED**0.5
