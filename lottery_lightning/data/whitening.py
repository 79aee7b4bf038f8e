"""ZCA whitening of images."""

import torch
from torch import Tensor

from lottery_lightning.data.preprocessing import CHUNK, Whitening


def zca(images: Tensor, eps: float = 0.1) -> Whitening:
    """The whitening that stays nearest to the images: x -> (x - m) U diag(1 / sqrt(s + eps)) U'.

    Of the images as vectors x of d numbers, m = mean of x, C = sum of (x - m)(x - m)' / (n - 1) = U diag(s) U'. The
    whitened ones have mean 0 and covariance U diag(s / (s + eps)) U'. ZCA is by Bell & Sejnowski (1997); eps and n - 1
    are as in kornia's `ZCAWhitening`, with eps = 0.1 on pixels in [0, 1] in trajectory matching (arXiv 2203.11932).
    Sums and eigenvectors are in float64: for CIFAR-10 (n = 50,000, d = 3,072) half a minute of one CPU and 0.4 GB.

    Args:
        images: (n, ...), at least two, as the whitening will be given them.
        eps: added to each variance, positive: directions of much less variance are left as small as they are.

    Returns:
        float32 mean (d,) and matrix (d, d), on the CPU.

    Raises:
        ValueError: eps is not positive, or there are fewer than two images.
    """
    if eps <= 0 or len(images) < 2:
        raise ValueError(f"eps={eps}, {len(images)} images: give a positive eps and at least two images")
    chunks = images.flatten(1).split(CHUNK)
    mean = torch.stack([chunk.double().sum(0) for chunk in chunks]).sum(0) / len(images)
    covariance = mean.new_zeros(len(mean), len(mean))
    for chunk in chunks:
        centered = chunk.double() - mean
        covariance.addmm_(centered.T, centered)
    values, vectors = torch.linalg.eigh(covariance / (len(images) - 1))
    scaled = vectors * (values.clamp(min=0) + eps).rsqrt()  # rounding makes variances of 0 a little negative
    matrix = scaled @ vectors.T
    return Whitening(mean.float().cpu(), ((matrix + matrix.T) / 2).float().cpu())
