"""Cross-validation of the teacher over subjects and seeds, beside trivial baselines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ngd_fast.artifacts.files import require_free, save_npz, write_json, write_sums, write_text
from ngd_fast.config import build_config, dump_config
from ngd_fast.console import progress, say
from ngd_fast.eeg.manifest import Topomaps
from ngd_fast.errors import UserError
from ngd_fast.teacher.baselines import BASELINES, predict_baselines
from ngd_fast.teacher.config import TeacherConfig
from ngd_fast.teacher.inputs import predict, prepare_inputs
from ngd_fast.teacher.metrics import evaluate_va
from ngd_fast.teacher.run import load_labelled, load_support
from ngd_fast.teacher.splits import Split, fixed_split, kfold, leave_one_out, save_splits
from ngd_fast.teacher.training import train_teacher


def make_splits(maps: Topomaps, folds: int | str, config: TeacherConfig) -> list[Split]:
    """``folds`` test folds over the labelled subjects, or "loso".

    Where the epoch is chosen (config.choice "best"), each fold's validation subjects come from the remaining ones.
    """
    options = {
        "validation_fraction": config.split.validation_fraction if config.choice == "best" else 0.0,
        "seed": config.split.seed,
    }
    subjects = maps.subject[maps.labelled]
    return leave_one_out(subjects, **options) if folds == "loso" else kfold(subjects, int(folds), **options)


def cross_validate(
    maps: Topomaps,
    splits: Sequence[Split],
    config: TeacherConfig,
    *,
    seeds: Sequence[int] = (1,),
    support: Topomaps | None = None,
    device: str = "cpu",
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Train ``len(splits) * len(seeds)`` teachers; no test subject's rating is looked at before its prediction.

    Returns (metrics, predictions). ``metrics["folds"]`` holds :func:`evaluate_va` of every fold, seed and baseline;
    ``pooled`` the same over all test windows at once, ``by_trial`` over trials, to which ratings belong, with the
    predictions of their windows averaged; ``mean_over_folds`` each one's CCC averaged over folds. Predictions are
    float32 [N, 2] under "teacher_seedS" and each baseline's name, NaN for windows that were in no
    test fold.
    """
    seeds = list(dict.fromkeys(int(seed) for seed in seeds))
    if not seeds:
        raise ValueError("seeds: must name at least one seed")
    configs = [build_config(TeacherConfig, {**config.model_dump(), "seed": seed}, source="--seeds") for seed in seeds]
    inputs = prepare_inputs(maps, config.input)
    target = np.stack([maps.valence, maps.arousal], axis=1)
    names = [*(f"teacher_seed{seed}" for seed in seeds), *BASELINES]
    predictions = {name: np.full(target.shape, np.nan, np.float32) for name in names}
    histories = []
    folds: list[dict[str, Any]] = []
    bar = progress(total=len(splits) * len(seeds), desc="cross-validation", unit="teacher")
    with bar:
        for split in splits:
            rows = np.flatnonzero(maps.labelled & np.isin(maps.subject, split.test))
            for name, va in predict_baselines(maps, (*split.train, *split.validation), split.test, config).items():
                predictions[name][rows] = va
            epochs = {}
            for seed, own in zip(seeds, configs):
                result = train_teacher(maps, split, own, support=support, device=device, show_progress=False)
                if result.interrupted:
                    raise KeyboardInterrupt
                predictions[f"teacher_seed{seed}"][rows], _ = predict(result.teacher, inputs[rows], device=device)
                epochs[str(seed)] = result.epoch
                histories.append(result.history)
                bar.update()
            blocks = {name: evaluate_va(predictions[name][rows], target[rows], maps.subject[rows]) for name in names}
            folds.append({"name": split.name, "test": list(split.test), "epochs": epochs, "metrics": blocks})
    tested = np.isfinite(predictions[names[0]]).all(axis=1)
    pooled = {name: evaluate_va(predictions[name][tested], target[tested], maps.subject[tested]) for name in names}
    keys, trial = np.unique(np.stack([maps.subject, maps.trial], axis=1)[tested], axis=0, return_inverse=True)
    of_trials = {name: _means(va[tested], trial.ravel()) for name, va in {"": target, **predictions}.items()}
    by_trial = {name: evaluate_va(of_trials[name], of_trials[""], keys[:, 0]) for name in names}
    return {
        "seeds": seeds,
        "folds": folds,
        "pooled": pooled,
        "by_trial": by_trial,
        "mean_over_folds": {
            name: {
                dimension: float(np.mean([fold["metrics"][name][dimension]["ccc"] for fold in folds]))
                for dimension in ("valence", "arousal")
            }
            for name in names
        },
        "histories": histories,
    }, predictions


def _means(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """float64 [groups, columns]: mean of the rows of each group."""
    sums = np.stack([np.bincount(group, weights=column) for column in values.T], axis=1)
    return sums / np.bincount(group)[:, None]


def summarize(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """CCC of the teacher (mean and deviation over seeds) and of each baseline, pooled and as the mean over folds."""
    summary = {}
    seeds = [f"teacher_seed{seed}" for seed in metrics["seeds"]]
    for name, members in (("teacher", seeds), *((name, [name]) for name in BASELINES)):
        row = {}
        for dimension in ("valence", "arousal"):
            pooled = [metrics["pooled"][member][dimension]["ccc"] for member in members]
            row[f"{dimension}_pooled"] = float(np.mean(pooled))
            row[f"{dimension}_pooled_sd"] = float(np.std(pooled, ddof=1)) if len(pooled) > 1 else 0.0
            row[f"{dimension}_folds"] = float(np.mean([metrics["mean_over_folds"][m][dimension] for m in members]))
        row["mean_folds"] = (row["valence_folds"] + row["arousal_folds"]) / 2
        row["mean_pooled"] = (row["valence_pooled"] + row["arousal_pooled"]) / 2
        summary[name] = row
    return summary


def evaluate_datasets(
    maps: Topomaps, rows: Mapping[str, np.ndarray], predictions: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """{dataset: {method: {dimension: {"ccc", "rmse"}}}} of what was predicted; the teacher's is the mean over seeds."""
    target = np.stack([maps.valence, maps.arousal], axis=1)
    result: dict[str, dict[str, Any]] = {}
    for dataset, own in rows.items():
        blocks = {}
        for method in ("teacher", *BASELINES):
            members = [va for name, va in predictions.items() if name.startswith(method)]
            tested = own[np.isfinite(members[0][own]).all(axis=1)]
            found = [evaluate_va(va[tested], target[tested], maps.subject[tested], bootstrap=0) for va in members]
            blocks[method] = {
                d: {k: float(np.mean([f[d][k] for f in found])) for k in ("ccc", "rmse")}
                for d in ("valence", "arousal")
            }
        result[dataset] = blocks
    return result


def _across_datasets(maps: Topomaps, rows: Mapping[str, np.ndarray], predictions, folds, config, **options):
    """{dataset: {how: evaluate_datasets}}: trained on folds of all, on folds of its own, and on the others alone."""
    result = {name: {"trained on all": block} for name, block in evaluate_datasets(maps, rows, predictions).items()}
    crossed = []
    for name, own in rows.items():
        alone = maps.subset(own)
        _, within = cross_validate(alone, make_splits(alone, folds, config), config, **options)
        whole = {name: np.arange(len(own))}
        result[name]["trained on it"] = evaluate_datasets(alone, whole, within)[name]
        test = np.unique(maps.subject[own][maps.labelled[own]])
        rest = np.setdiff1d(maps.subject[maps.labelled], test)
        train, validation = rest, ()
        if config.choice == "best":
            chosen = fixed_split(rest, fraction=config.split.validation_fraction, seed=config.split.seed)
            train, validation = chosen.train, chosen.validation
        crossed.append(Split(f"to {name}", tuple(train), tuple(validation), tuple(test)))
    _, across = cross_validate(maps, crossed, config, **options)
    for name, block in evaluate_datasets(maps, rows, across).items():
        result[name]["trained on the others"] = block
    return result


def run_crossval(
    maps_path: str | Path | Sequence[str | Path],
    out: str | Path,
    config: TeacherConfig,
    *,
    folds: int | str,
    seeds: Sequence[int],
    support_path: str | Path | None = None,
    device: str = "cpu",
    figures: bool = True,
) -> dict[str, Any]:
    """:func:`cross_validate` a file and write config.yaml, splits.json, metrics.json, predictions.npz, viz/, sums.

    Several files are joined (:func:`~ngd_fast.eeg.join.load_maps`). ``metrics["datasets"]`` then says of each how it
    fares when the teacher is trained on folds of all, on folds of it alone, and on the other datasets alone.
    """
    out = Path(out)
    require_free(out)
    maps, maps_sha256, datasets = load_labelled(maps_path)
    support = load_support(support_path, maps)
    splits = make_splits(maps, folds, config)
    out.mkdir(parents=True, exist_ok=True)  # what cannot be written is told before the work, not after it
    metrics, predictions = cross_validate(maps, splits, config, seeds=seeds, support=support, device=device)
    histories = metrics.pop("histories")
    metrics |= {"scheme": str(folds), "maps_sha256": maps_sha256, "summary": summarize(metrics)}
    if len(datasets) > 1:
        options = {"seeds": seeds, "support": support, "device": device}
        metrics["datasets"] = _across_datasets(maps, datasets, predictions, folds, config, **options)
    write_text(out / "config.yaml", dump_config(config))
    save_splits(out / "splits.json", str(folds), splits)
    write_json(out / "metrics.json", metrics)
    target = np.stack([maps.valence, maps.arousal], axis=1)
    save_npz(out / "predictions.npz", {**predictions, "rating": target, "subject": maps.subject})
    if figures:
        try:
            from ngd_fast.teacher.figures import draw_curves, draw_predictions

            va = np.mean([predictions[f"teacher_seed{seed}"] for seed in metrics["seeds"]], axis=0)
            tested = np.isfinite(va).all(axis=1)
            draw_curves(out / "viz" / "training_curves.png", histories)
            draw_predictions(out / "viz" / "predicted_vs_rated.png", va[tested], target[tested])
        except UserError as error:
            say(f"no figures: {error}")
    write_sums(out)
    return metrics
