"""The joint functional falls, and as fast as predicted."""

import numpy as np
import pytest

from ngd_fast.flows import lyapunov

START = np.random.default_rng(0).normal(size=(2, 4)) * 0.4


@pytest.mark.parametrize(("rule", "delta"), [("oja", 0.2), ("oja", 1.0), ("trace", 0.2)])
def test_the_slope_is_the_predicted_one(rule, delta):
    rows = lyapunov.descend(lyapunov.example_circle(rule=rule, delta=delta), START, time=1.0, samples=20)
    np.testing.assert_allclose(rows["measured"], rows["predicted"], rtol=0.01)
    assert (np.diff(rows["energy"]) < 0).all()


@pytest.mark.parametrize("rule", ["oja", "trace"])
def test_the_prediction_is_the_gradients_of_the_functional(rule):
    """By finite differences of F itself along the weights, and of the density along one flux."""
    circle = lyapunov.example_circle(rule=rule)
    mu = np.exp(np.cos(np.arange(96) * 2 * np.pi / 96))
    mu /= mu.sum() * circle.spacing
    _, W = lyapunov.step(circle, mu, START, 1e-6)
    along = (W - START) / 1e-6
    ahead, here = (lyapunov.joint_energy(circle, mu, start) for start in (START + 1e-6 * along, START))
    measured = (ahead - here) / 1e-6
    still = lyapunov.example_circle(rule=rule, gamma=0.0)
    predicted = lyapunov.predicted_slope(circle, mu, START) - lyapunov.predicted_slope(still, mu, START)
    assert measured == pytest.approx(predicted, rel=1e-4)


def test_a_density_keeps_its_mass_and_sign_and_gibbs_stays():
    circle = lyapunov.example_circle(kappa=0.0, gamma=0.0)
    mu, W = np.full(96, 1e-9), START
    mu[10] = 1.0
    mu /= mu.sum() * circle.spacing
    for _ in range(500):
        mu, W = lyapunov.step(circle, mu, W, circle.stable_dt / 2)
        assert mu.min() > 0
    assert mu.sum() * circle.spacing == pytest.approx(1, abs=1e-12)
    gibbs = np.exp(-circle.beta * circle.energy)
    gibbs /= gibbs.sum() * circle.spacing
    np.testing.assert_allclose(lyapunov.step(circle, gibbs, W, circle.stable_dt)[0], gibbs, rtol=1e-13)


def test_another_scaling_of_the_particles_time_is_noticed():
    circle = lyapunov.example_circle(delta=0.2)
    mu = np.full(96, 1 / (2 * np.pi))
    right = lyapunov.predicted_slope(circle, mu, START)
    wrong = lyapunov.predicted_slope(lyapunov.example_circle(delta=0.19), mu, START)
    assert abs(wrong / right - 1) > 0.02
