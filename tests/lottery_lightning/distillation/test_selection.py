import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from lottery_lightning.distillation.selection import SELECTIONS, herding, k_means, random, select


def drawn(seed):
    return torch.Generator().manual_seed(seed)


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 5), st.data())
def test_herding_is_greedy_by_the_definition(seed, n, d, data):
    features = torch.randn(n, d, generator=drawn(seed), dtype=torch.float64)
    count = data.draw(st.integers(1, n))
    chosen = herding(features, count).tolist()
    assert len(set(chosen)) == count
    for k, index in enumerate(chosen):
        distance = {
            other: float((features[[*chosen[:k], other]].mean(0) - features.mean(0)).norm())
            for other in range(n)
            if other not in chosen[:k]
        }
        assert distance[index] <= min(distance.values()) + 1e-12


def test_herding_takes_the_first_of_equals_and_draws_nothing(global_rng_untouched):
    features = torch.tensor([[0.0], [1.0], [1.0], [2.0]])
    assert herding(features, 4).tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_k_means_takes_the_image_nearest_to_each_centre(shift, global_rng_untouched):
    centres = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    features = (centres.repeat_interleave(20, 0) + torch.randn(60, 2, generator=drawn(1))).double() + shift
    chosen = k_means(features, 3, drawn(0))
    nearest = []
    for own in range(3):
        points = features[20 * own : 20 * own + 20]
        nearest.append(20 * own + int((points - points.mean(0)).norm(dim=1).argmin()))
    assert sorted(chosen.tolist()) == nearest


def test_k_means_chooses_each_image_once(monkeypatch):
    features = torch.tensor([[0.0], [0.1], [5.0], [9.0]])

    class Same(KMeans):
        def fit(self, points):
            self.cluster_centers_ = torch.tensor([[0.02], [0.03], [0.01]]).double().numpy()
            return self

    monkeypatch.setattr("sklearn.cluster.KMeans", Same)
    assert k_means(features, 3, drawn(0)).tolist() == [0, 1, 2]


def test_random_is_uniform_without_repetition(global_rng_untouched):
    features = torch.zeros(5, 3)
    draws = [random(features, 2, generator).tolist() for generator in [drawn(0)] for _ in range(2000)]
    assert all(len(set(draw)) == 2 for draw in draws)
    counts = torch.tensor(draws).flatten().bincount(minlength=5)
    assert (counts - 800).abs().max() < 120  # five standard deviations


@pytest.mark.parametrize("method", SELECTIONS)
def test_each_class_gives_its_share_class_by_class(method):
    labels = torch.randint(3, (90,), generator=drawn(0))
    features = torch.randn(90, 4, generator=drawn(1))
    chosen = select(method, labels, 5, drawn(2), features)
    assert labels[chosen].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert len(set(chosen.tolist())) == 15
    assert torch.equal(chosen, select(method, labels, 5, drawn(2), features))
    others = [select(method, labels, 5, drawn(seed), features).tolist() for seed in range(3, 8)]
    assert (chosen.tolist() in others and others.count(others[0]) == 5) == (method == "herding")


def test_what_cannot_be_chosen_is_refused():
    labels = torch.tensor([0, 0, 1])
    with pytest.raises(ValueError, match="class 1 has 1 training images, and per_class=2"):
        select("random", labels, 2, drawn(0))
    with pytest.raises(ValueError, match="no selection is called 'best': choose random, herding, k-means"):
        select("best", labels, 1, drawn(0))
    with pytest.raises(ValueError, match="herding chooses by features"):
        select("herding", labels, 1, drawn(0))
    for chosen in (random, herding, k_means):
        with pytest.raises(ValueError, match="cannot choose 0 of 3"):
            chosen(torch.zeros(3, 1), 0, drawn(0))
