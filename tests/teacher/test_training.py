"""What the teacher learns from, what it must not look at, and that it does so the same way twice."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ngd_fast.config import load_config
from ngd_fast.errors import UserError
from ngd_fast.teacher.config import AugmentConfig, InputConfig, TeacherConfig
from ngd_fast.teacher.inputs import predict, prepare_inputs, prepare_power
from ngd_fast.teacher.metrics import evaluate_va, mean_ccc
from ngd_fast.teacher.splits import Split
from ngd_fast.teacher.training import augment, train_teacher

SPLIT = Split("fixed", train=(1, 2, 3, 4), validation=(5, 6), test=(7, 8))


def train(maps, config, split=SPLIT, **options):
    return train_teacher(maps, split, config, show_progress=False, **options)


def changed(config: TeacherConfig, *overrides: str) -> TeacherConfig:
    import yaml

    data = config.model_dump(mode="json")
    for override in overrides:
        key, value = override.split("=")
        *parents, last = key.split(".")
        node = data
        for parent in parents:
            node = node[parent]
        node[last] = yaml.safe_load(value)
    return TeacherConfig.model_validate(data)


def weights(result) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in result.teacher.state_dict().values()])


@pytest.mark.parametrize("arch", ["cnn", "vit"])
def test_it_finds_valence_and_arousal_in_unseen_subjects(maps, arch):
    config = load_config(
        TeacherConfig,
        overrides=[f"network.arch={arch}", "network.width=16", "optimizer.epochs=12", "optimizer.batch_size=32"]
        + ["choice=best"],
    )
    result = train(maps, config)
    rows = np.isin(maps.subject, SPLIT.test)
    va, _ = predict(result.teacher, prepare_inputs(maps, config.input)[rows])
    target = np.stack([maps.valence, maps.arousal], axis=1)[rows]
    assert mean_ccc(evaluate_va(va, target, maps.subject[rows])) > 0.6
    scores = [mean_ccc(entry["validation"]) for entry in result.history]
    assert result.epoch == 1 + int(np.argmax(scores)) and len(scores) == 12


def test_twice_is_bit_for_bit_the_same_and_leaves_the_callers_random_state(maps, support, quick):
    torch.manual_seed(5)
    first = train(maps, quick, support=support)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    second = train(maps, quick, support=support)
    assert torch.equal(weights(first), weights(second))
    for entry in (*first.history, *second.history):
        entry.pop("seconds")
    assert first.history == second.history
    assert not torch.equal(weights(first), weights(train(maps, changed(quick, "seed=2"), support=support)))


def test_ratings_outside_the_training_side_change_nothing(maps, quick):
    config = changed(quick, "choice=last")
    expected = weights(train(maps, config))
    other = ~np.isin(maps.subject, SPLIT.train)
    fields = {name: np.where(other, -getattr(maps, name), getattr(maps, name)) for name in ("valence", "arousal")}
    assert torch.equal(expected, weights(train(replace(maps, **fields), config)))
    # Nor do the maps of test subjects.
    images = maps.maps.copy()
    images[np.isin(maps.subject, SPLIT.test)] = 0.5
    assert torch.equal(expected, weights(train(replace(maps, maps=images), config)))


def test_unlabelled_windows_teach_by_consistency(maps, support, quick):
    alone, supported = train(maps, quick), train(maps, quick, support=support)
    assert all(entry["consistency"] == 0 for entry in alone.history)
    assert all(entry["consistency"] > 0 for entry in supported.history)
    assert not torch.equal(weights(alone), weights(supported))
    assert torch.equal(weights(alone), weights(train(maps, changed(quick, "support.weight=0"), support=support)))
    # Windows of training subjects without ratings are used the same way.
    hidden = np.where(maps.trial == 0, np.nan, 1)
    partly = replace(maps, valence=maps.valence * hidden, arousal=maps.arousal * hidden)
    assert train(partly, quick).history[0]["consistency"] > 0


def test_interruption_keeps_the_best_so_far(maps, quick):
    def stop(entry):
        if entry["epoch"] == 2:
            raise KeyboardInterrupt

    result = train(maps, quick, on_epoch=stop)
    assert result.interrupted and len(result.history) == 2 and result.epoch <= 2

    def stop_at_once(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ngd_fast.teacher.training._Loop.run_epoch", stop_at_once)
        with pytest.raises(KeyboardInterrupt):
            train(maps, quick)


def test_faults_of_data_and_settings_are_users_errors(maps, support, quick):
    for call, message in (
        (lambda: train(maps, quick, Split("x", (1,), (99,))), "no labelled validation window"),
        (lambda: train(maps, quick, Split("x", (99,), (1,))), "0 labelled windows"),
        (lambda: train(maps, changed(quick, "optimizer.lr=1e30", "optimizer.clip=1e30")), "diverged"),
        # The last step's loss was finite, the weights after it are too large to say anything.
        (lambda: train(maps, changed(quick, "optimizer.lr=1e9")), "diverged"),
        (lambda: train(maps, quick, support=replace(support, bands=["delta", "theta"])), "the labelled maps are"),
        (lambda: prepare_inputs(_cropped(maps, 12), InputConfig()), "multiple of 8"),
        (lambda: prepare_inputs(maps.subset(slice(0, 0)), InputConfig()), "no window"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def _cropped(maps, size):
    return replace(maps, maps=maps.maps[:, :, :size, :size], mask=maps.mask[:size, :size])


def test_context_stays_in_its_trial_and_follows_the_window_number(maps):
    config = InputConfig(standardize="none", context=1)
    inputs = prepare_inputs(maps, config)
    rows = np.flatnonzero((maps.subject == 2) & (maps.trial == 1))
    np.testing.assert_allclose(inputs[rows[0]], maps.maps[rows[:2]].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(inputs[rows[3]], maps.maps[rows[2:5]].mean(axis=0), atol=1e-6)
    order = np.random.default_rng(0).permutation(len(maps))
    np.testing.assert_allclose(prepare_inputs(maps.subset(order), config), inputs[order], atol=1e-6)


def test_standardisation_uses_one_subject_at_a_time(maps):
    config = InputConfig()
    inputs = prepare_inputs(maps, config)
    own = maps.subject == 3
    assert np.array_equal(prepare_inputs(maps.subset(own), config), inputs[own])
    inside = inputs[own][:, :, maps.mask]
    np.testing.assert_allclose(inside.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(inside.std(axis=0), 1, atol=1e-4)
    assert (inputs[:, :, ~maps.mask] == 0).all()
    # Volts squared are as good as decibels.
    tiny = replace(maps, power=maps.power * 1e-12)
    np.testing.assert_allclose(prepare_power(tiny, config), prepare_power(maps, config), atol=1e-3)


def test_augmentation_changes_maps_as_it_says():
    x = torch.ones(400, 2, 16, 16)

    def apply(**settings):
        off = {"noise": 0.0, "gain": 0.0, "band_drop": 0.0}
        return augment(x, AugmentConfig(**{**off, **settings}), torch.Generator().manual_seed(0))

    assert torch.equal(apply(), x)
    dropped = apply(band_drop=0.3).mean(dim=(2, 3))
    assert set(dropped.unique().tolist()) == {0.0, 1.0} and 0.25 < (dropped == 0).float().mean() < 0.35
    gain = apply(gain=0.1)
    assert (gain == gain[:, :, :1, :1]).all() and gain[:, :, 0, 0].std() == pytest.approx(0.1, abs=0.01)
    noise = apply(noise=0.2) - 1
    assert noise.std() == pytest.approx(0.2, abs=0.01) and torch.equal(noise[..., 0, 0], noise[..., 3, 3])
    assert torch.equal(apply(noise=0.2), apply(noise=0.2))
