"""Choosing real images of a class by their features: what a distilled set must beat."""

from collections.abc import Callable

import torch
from torch import Tensor

Selection = Callable[[Tensor, int, torch.Generator], Tensor]


def random(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices (count,) of distinct images, drawn uniformly; features (n, d) lend their number alone."""
    _check(features, count)
    return torch.randperm(len(features), generator=generator)[:count]


def herding(features: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Indices (count,) such that the mean feature of the first k is near the class mean, for each k.

    Greedy (Welling 2009, as in iCaRL, arXiv 1611.07725): the k-th is the image x, of those not yet chosen, with the
    least ||mean(f) - (f(x) + sum of the chosen f) / k||; the first of equals. iCaRL scales each f to norm 1; here they
    are taken as given. Nothing is drawn. Time O(count n d), in double precision.
    """
    _check(features, count)
    features = features.double()
    mean, total = features.mean(0), torch.zeros_like(features[0])
    left = torch.ones(len(features), dtype=torch.bool, device=features.device)
    chosen: list[int] = []
    for k in range(1, count + 1):
        distances = (k * mean - total - features).norm(dim=1)  # k times as long: the same image is nearest
        best = int(distances.masked_fill(~left, torch.inf).argmin())
        chosen.append(best)
        left[best] = False
        total += features[best]
    return torch.tensor(chosen)


def k_means(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices (count,) of the images nearest to the centres of `count` clusters of the features (n, d).

    Lloyd's algorithm from k-means++ (scikit-learn, one start); the generator gives its seed. Each image is chosen once:
    of a centre whose nearest image is taken, the nearest that is not.
    """
    from sklearn.cluster import KMeans

    _check(features, count)
    seed = int(torch.randint(2**31, (), generator=generator))
    points = features.double().cpu().numpy()
    centres = torch.from_numpy(KMeans(count, n_init="auto", random_state=seed).fit(points).cluster_centers_)
    distances = torch.cdist(centres, features.double().cpu())
    chosen: list[int] = []
    for row in distances:
        row[chosen] = torch.inf
        chosen.append(int(row.argmin()))
    return torch.tensor(chosen)


SELECTIONS: dict[str, Selection] = {"random": random, "herding": herding, "k-means": k_means}


def select(
    method: str, labels: Tensor, per_class: int, generator: torch.Generator, features: Tensor | None = None
) -> Tensor:
    """Indices (classes * per_class,) of images chosen in each class apart, class by class.

    Args:
        method: of `SELECTIONS`.
        labels: (n,) int64, of classes 0, 1, ..., the greatest.
        per_class: how many images of each class.
        generator: on the CPU; drawn from class by class.
        features: (n, d); "random" needs none.

    Raises:
        ValueError: an unknown method, or a class with fewer images.
    """
    if method not in SELECTIONS:
        raise ValueError(f"no selection is called {method!r}: choose {', '.join(SELECTIONS)}")
    if features is None and method != "random":
        raise ValueError(f"{method} chooses by features: give them")
    chosen = []
    for label in range(int(labels.max()) + 1):
        (own,) = torch.where(labels == label)
        if len(own) < per_class:
            raise ValueError(
                f"class {label} has {len(own)} training images, and per_class={per_class} are asked for: choose fewer"
            )
        given = own.unsqueeze(1) if features is None else features[own]
        chosen.append(own[SELECTIONS[method](given, per_class, generator).to(own.device)])
    return torch.cat(chosen)


def _check(features: Tensor, count: int) -> None:
    if not 0 < count <= len(features):
        raise ValueError(f"cannot choose {count} of {len(features)} images")
