"""What a teacher must beat: the mean rating, and ridge regression and extra trees on band power."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ngd_fast.eeg.manifest import Topomaps
from ngd_fast.teacher.config import TeacherConfig
from ngd_fast.teacher.inputs import prepare_power
from ngd_fast.teacher.metrics import evaluate_va

BASELINES = ("mean", "ridge", "extra_trees")


def predict_baselines(
    maps: Topomaps, train: Sequence[int], test: Sequence[int], config: TeacherConfig
) -> dict[str, np.ndarray]:
    """Predictions [n, 2] of each baseline for the labelled windows of subjects ``test``, learnt from ``train``.

    They see ``maps.power`` [N, channels * bands], prepared as the teacher's maps are (config.input). Ridge takes its
    penalty, from 1 to 1e5, by leave-one-out over the training windows.
    """
    from sklearn.dummy import DummyRegressor
    from sklearn.ensemble import ExtraTreesRegressor
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    power = prepare_power(maps, config.input)
    target = np.stack([maps.valence, maps.arousal], axis=1).astype(np.float64)
    fit = maps.labelled & np.isin(maps.subject, train)
    wanted = maps.labelled & np.isin(maps.subject, test)
    models = (
        DummyRegressor(),
        make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(0, 5, 11))),
        ExtraTreesRegressor(100, min_samples_leaf=5, max_features="sqrt", random_state=config.seed),
    )
    return {
        name: np.asarray(model.fit(power[fit], target[fit]).predict(power[wanted]))
        for name, model in zip(BASELINES, models)
    }


def evaluate_baselines(
    maps: Topomaps, train: Sequence[int], test: Sequence[int], config: TeacherConfig
) -> dict[str, dict[str, Any]]:
    """:func:`~ngd_fast.teacher.metrics.evaluate_va` of each baseline on the labelled windows of ``test``."""
    rows = maps.labelled & np.isin(maps.subject, test)
    target = np.stack([maps.valence, maps.arousal], axis=1)[rows]
    predictions = predict_baselines(maps, train, test, config)
    return {name: evaluate_va(va, target, maps.subject[rows]) for name, va in predictions.items()}
