"""Local moves: their Langevin limit, what they leave invariant, the particles, the graph of a file."""

import math
import shutil

import numpy as np
import pytest
import torch

from ngd_fast.errors import UserError
from ngd_fast.flows import moves
from ngd_fast.flows.manifolds import Graph, Wells, named_manifold


def make_walk(name="sphere", dimension=2, *, rule="barker", particles=4000, eps=0.5, seed=0, compiled=False):
    generator = torch.Generator().manual_seed(seed)
    manifold = named_manifold(name, dimension)
    wells = Wells.random(manifold, 3, 3.0, 0.0, generator)
    options = {"particles": particles, "beta": 1.0, "eps": eps, "rule": rule, "generator": generator}
    return moves.Walk(manifold, wells, compiled=compiled, **options)


@pytest.mark.parametrize(("rule", "order", "tolerance"), [("barker", 1.9, 0.15), ("metropolis", 0.95, 0.1)])
def test_the_order_of_the_limit(rule, order, tolerance):
    rows = moves.limit_errors(rule)
    for name in ("generator", "semigroup"):
        assert rows[f"{name}_slope"] == pytest.approx(order, abs=tolerance), name
        assert (np.diff(rows[name]) < 0).all()
    assert rows["generator"][-1] < 0.25
    assert rows["semigroup"][-1] < 0.03


@pytest.mark.parametrize("rule", moves.RULES)
@pytest.mark.parametrize("eps", [0.05, 0.4, 2.0])
def test_the_gibbs_density_is_invariant(rule, eps):
    angle = torch.arange(200, dtype=torch.float64) * (2 * math.pi / 200)
    energy = 2 * torch.cos(angle) + torch.sin(3 * angle)
    chain = moves.transition_matrix(energy, rule, 1.5, eps)
    gibbs = torch.softmax(-1.5 * energy, 0)
    torch.testing.assert_close(chain.sum(1), torch.ones(200, dtype=torch.float64), atol=1e-12, rtol=0)
    assert chain.min() >= 0
    assert (gibbs @ chain - gibbs).abs().max() < 1e-12
    wrong = torch.softmax(-1.4 * energy, 0)
    assert (wrong @ chain - wrong).abs().max() > 1e-6


def test_the_generator_is_that_of_langevin():
    angle = torch.arange(64, dtype=torch.float64) * (2 * math.pi / 64)
    found = moves.generator(torch.cos(angle), 2.0) @ torch.sin(2 * angle)
    wanted = -2 * torch.sin(2 * angle) + torch.sin(angle) * 2 * torch.cos(2 * angle)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)


@pytest.mark.parametrize("rule", moves.RULES)
def test_particles_come_to_the_wells_mixture(rule):
    walk = make_walk(rule=rule)
    for _ in range(300):
        walk.step()
    mean_resultant = 1 / math.tanh(3) - 1 / 3  # of a von Mises-Fisher density of concentration 3 on S^2
    wanted = mean_resultant * walk.wells.centers.mean(0) / 3
    assert (walk.x.mean(1) - wanted).norm() < 4 / math.sqrt(4000)
    assert wanted.norm() > 0.4, "a uniform density would pass otherwise"


@pytest.mark.parametrize(("name", "dimension"), [("circle", 1), ("torus", 2), ("sphere", 7)])
def test_particles_stay_on_their_manifold(name, dimension):
    walk = make_walk(name, dimension, particles=200)
    for _ in range(500):
        walk.step()
    radius = walk.x.view(walk.manifold.count, walk.manifold.size, -1).norm(dim=1)
    torch.testing.assert_close(radius, torch.ones_like(radius), atol=1e-5, rtol=0)
    torch.testing.assert_close(walk.energy, walk.wells.energy(walk.x.unbind()), atol=1e-5, rtol=1e-5)


def test_a_proposal_moves_along_a_geodesic_by_epsilon():
    walk = make_walk("sphere", 7, particles=20_000)
    walk.draw()
    moved = torch.stack(walk.manifold.propose(walk.x.unbind(), walk._noise.unbind(), 0.1))
    angle = torch.arccos((moved * walk.x).sum(0).clamp(-1, 1))
    assert angle.square().mean().item() == pytest.approx(7 * 0.01, rel=0.03)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_compiled_particles_are_the_eager_ones():
    eager, compiled = (make_walk("circle", 1, particles=64, compiled=flag) for flag in (False, True))
    for _ in range(3):
        eager.step()
        compiled.step()
    torch.testing.assert_close(compiled.x, eager.x, atol=1e-5, rtol=0)
    torch.testing.assert_close(compiled.energy, eager.energy, atol=1e-5, rtol=1e-5)


def test_without_a_compiler_particles_move_all_the_same(monkeypatch, capsys):
    def compile_nothing(function, **options):
        def call(*arguments):
            raise RuntimeError("no C++ compiler\nmore")

        return call

    monkeypatch.setattr(torch, "compile", compile_nothing)
    eager, fallen = (make_walk(particles=64, compiled=flag) for flag in (False, True))
    for _ in range(3):
        eager.step()
        fallen.step()
    assert torch.equal(fallen.x, eager.x)
    assert capsys.readouterr().err == "particles move uncompiled: no C++ compiler\n"


def test_the_same_seed_gives_the_same_particles():
    first, second, other = make_walk(seed=1), make_walk(seed=1), make_walk(seed=2)
    for walk in (first, second, other):
        walk.step()
    assert torch.equal(first.x, second.x)
    assert not torch.equal(first.x, other.x)


def chain_of(graph):
    """The graph's transition matrix, read from what its particles move by."""
    n = len(graph.features)
    node = torch.ceil(graph.cumulative).long() - 1
    share = torch.diff(graph.cumulative, prepend=graph.cumulative.new_zeros(1))
    return torch.zeros(n, n, dtype=torch.float64).index_put((node, graph.indices), share)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_graph_of_points_tends_to_its_generator(alpha):
    quantile = (np.arange(1000) + 0.5) / 1000
    angle = np.linspace(0, 2 * np.pi, 20_001)
    angle = np.interp(quantile, (angle + 0.5 * np.sin(angle)) / (2 * np.pi), angle)
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    eps = 0.004
    graph = Graph.of(points, neighbours=220, alpha=alpha, eps=eps)
    chain = chain_of(graph)
    assert (graph.stationary @ chain - graph.stationary).abs().max() < 1e-12
    f = np.sin(angle)
    drift = -0.5 * np.sin(angle) / (1 + 0.5 * np.cos(angle))  # of log density
    wanted = -np.sin(angle) + 2 * (1 - alpha) * drift * np.cos(angle)
    found = (chain @ torch.from_numpy(f) - torch.from_numpy(f)).numpy() / eps
    assert np.abs(found - wanted).max() < 0.05


def test_particles_hop_by_the_graphs_probabilities():
    points = np.random.default_rng(0).normal(size=(30, 3))
    graph = Graph.of(points, neighbours=4, alpha=0.5)
    chain = chain_of(graph)
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    landed = graph.step(torch.full((200_000,), 7), uniform).bincount(minlength=30) / 200_000
    assert (landed - chain[7]).abs().max() < 0.005
    for edge in (0.0, 1 - 1e-12):  # float rounding must not lead to another node's neighbours
        ends = graph.step(torch.arange(30), torch.full((30,), edge, dtype=torch.float64))
        assert (chain[torch.arange(30), ends] > 0).all()


def test_a_graph_in_parts_is_refused():
    points = np.concatenate([np.random.default_rng(0).normal(size=(20, 2)), 50 + np.zeros((6, 2))])
    with pytest.raises(UserError, match="not connected: 2 parts, the smallest of 6 of 26 points"):
        Graph.of(points, neighbours=3, alpha=0.5, source="p.npz")
