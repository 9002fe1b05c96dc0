"""Distances between two sets of feature vectors, and the variety of one set."""

import math
import warnings
from collections.abc import Iterator

import torch

from dae_diffusers.metrics.statistics import FeatureStatistics

# Distances between all pairs are computed in tiles of this many rows and columns (32 MiB in float64).
_TILE = 2048
NUM_NEIGHBORS = 5  # of density and coverage


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    r"""
    Fréchet distance between the Gaussians with these moments, `|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2))`, in float64.

    The eigenvalues of `A B` are those of the symmetric matrix `A^(1/2) B A^(1/2)`, so two symmetric eigenproblems give
    the trace of the root. Most implementations use a general matrix root (`scipy.linalg.sqrtm`), which is neither
    symmetric nor stable for singular covariances (dead features or few images): its result is then complex, or
    depends on an `eps` added to the diagonal and on the BLAS. Here a singular covariance needs no special treatment.

    The distance has an upward bias that shrinks like `1 / count`: report the count, and compare only equal counts.

    Args:
        a, b ([`~dae_diffusers.metrics.statistics.FeatureStatistics`]): Statistics of the same features, over at least 2 vectors each.

    Returns:
        `float`: At least 0; 0 for equal moments, up to rounding.

    Raises:
        ValueError: If the features have different dimensions, or a matrix is not a covariance.

    Source: Heusel et al., 2017, https://huggingface.co/papers/1706.08500.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features have {len(a.mean)} and {len(b.mean)} dimensions: they come from two extractors.")
    for statistics in (a, b):
        note = few_images_note(statistics.count, len(statistics.mean))
        if note is not None:
            warnings.warn(note, stacklevel=2)
    covariance_a, covariance_b = a.covariance, b.covariance
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * _clip_rounding(values, values.max()).sqrt()) @ vectors.T
    product = root @ covariance_b @ root
    # The rounding error scales with the factors: their product may be far smaller, if they share no direction.
    scale = values.max() * torch.linalg.matrix_norm(covariance_b)
    eigenvalues = _clip_rounding(torch.linalg.eigvalsh((product + product.T) / 2), scale)  # ascending
    rank = min(len(eigenvalues), a.count - 1, b.count - 1)  # at most; the others are rounding, whose root is not small
    trace_of_root = eigenvalues[len(eigenvalues) - rank :].sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * trace_of_root
    return max(distance.item(), 0.0)


def few_images_note(num_images: int, feature_dim: int) -> str | None:
    r"""A note for a Fréchet distance that has fewer images than features; None if there are enough images."""
    if num_images > feature_dim:
        return None
    return (
        f"{num_images} images for {feature_dim} features: the covariance is singular and the distance strongly biased. Use "
        "more images, or a feature extractor with fewer features."
    )


def kernel_distance(features_a: torch.Tensor, features_b: torch.Tensor) -> float:
    r"""
    Kernel distance (KID): unbiased squared maximum mean discrepancy under `k(x, y) = (x.y / D + 1)^3`, over all pairs.

    Unlike the Fréchet distance, it has no bias from the number of images. For equal distributions it scatters around 0, so it
    may be negative.

    Args:
        features_a, features_b (`torch.Tensor` of shapes `(N, D)` and `(M, D)`): Two vectors or more each.

    Returns:
        `float`: Computed in float64, in tiles.

    Source: Binkowski et al., 2018, https://huggingface.co/papers/1801.01401.
    """
    features_a, features_b = _checked(features_a, features_b, min_count=2)
    n, m = len(features_a), len(features_b)
    within_a = (_kernel_sum(features_a, features_a) - _kernel_diagonal_sum(features_a)) / (n * (n - 1))
    within_b = (_kernel_sum(features_b, features_b) - _kernel_diagonal_sum(features_b)) / (m * (m - 1))
    return within_a + within_b - 2 * _kernel_sum(features_a, features_b) / (n * m)


def precision_recall(
    features_real: torch.Tensor, features_generated: torch.Tensor, *, num_neighbors: int = 3
) -> tuple[float, float]:
    r"""
    Improved precision and recall: the share of generated vectors inside the balls around real ones, and the share of real
    vectors inside the balls around generated ones. A ball reaches to the `num_neighbors`-th neighbour of its
    centre in the centre's own set (not counting itself), border included.

    Both depend on the number of images: compare only equal numbers.

    Args:
        features_real, features_generated (`torch.Tensor` of shapes `(N, D)` and `(M, D)`): More than `num_neighbors`
            vectors each.
        num_neighbors (`int`, *optional*, defaults to 3): Size of the balls.

    Returns:
        `tuple[float, float]`: Precision and recall, in [0, 1].

    Source: Kynkäänniemi et al., 2019, https://huggingface.co/papers/1904.06991.
    """
    features_real, features_generated = _checked(features_real, features_generated, min_count=num_neighbors + 1)
    inside_real = _count_balls(features_generated, features_real, _radii(features_real, num_neighbors)) > 0
    inside_generated = _count_balls(features_real, features_generated, _radii(features_generated, num_neighbors)) > 0
    return inside_real.double().mean().item(), inside_generated.double().mean().item()


def density_coverage(
    features_real: torch.Tensor, features_generated: torch.Tensor, *, num_neighbors: int = NUM_NEIGHBORS
) -> tuple[float, float]:
    r"""
    Density is the mean number of real vectors' balls that hold a generated vector, divided by `num_neighbors`. Coverage is
    the share of real vectors whose ball holds a generated vector. Balls are those of [`precision_recall`]. Both use only
    balls of the real set, which outliers among the generated vectors cannot enlarge.

    Args:
        features_real, features_generated (`torch.Tensor` of shapes `(N, D)` and `(M, D)`): More than `num_neighbors`
            real vectors, one generated or more.
        num_neighbors (`int`, *optional*, defaults to `NUM_NEIGHBORS`): Size of the balls.

    Returns:
        `tuple[float, float]`: Density, >= 0, about 1 for equal distributions; coverage, in [0, 1].

    Source: Naeem et al., 2020, https://huggingface.co/papers/2002.09797.
    """
    features_real, features_generated = _checked(features_real, features_generated, min_count=1)
    radii = _radii(features_real, num_neighbors)
    density = _count_balls(features_generated, features_real, radii).double().mean() / num_neighbors
    covered = nearest_neighbors(features_real, features_generated)[0][:, 0] <= radii
    return density.item(), covered.double().mean().item()


def inception_score(probabilities: torch.Tensor, *, splits: int = 10) -> tuple[float, float]:
    r"""
    Inception score: `exp(mean KL(p(y|x) || p(y)))` in each of `splits` consecutive parts, then mean and standard
    deviation (divided by `splits`) over the parts.

    It is defined with Inception's 1008 classes, for images like ImageNet's. With another classifier it is
    a different score, and its name should say so.

    Args:
        probabilities (`torch.Tensor` of shape `(N, num_classes)`): `logits.softmax(dim=1)` of each image, in random
            order of the images.
        splits (`int`, *optional*, defaults to 10): Number of parts.

    Returns:
        `tuple[float, float]`: Mean, in [1, num_classes], and standard deviation.

    Raises:
        ValueError: If rows are not probabilities, or there are fewer rows than `splits`.

    Source: Salimans et al., 2016, https://huggingface.co/papers/1606.03498.
    """
    if probabilities.ndim != 2 or not 1 <= splits <= len(probabilities):
        raise ValueError(
            f"probabilities have the shape {tuple(probabilities.shape)}, but must be (N, num_classes) with N at least "
            f"`splits`, {splits}."
        )
    probabilities = probabilities.cpu().double()
    sums = probabilities.sum(dim=1)
    if probabilities.min() < 0 or not torch.allclose(sums, torch.ones_like(sums), atol=1e-3, rtol=0):
        raise ValueError("each row must be probabilities that sum to 1. Pass `logits.softmax(dim=1)`.")
    scores = []
    for part in torch.tensor_split(probabilities, splits):
        entropy_of_mean = torch.special.entr(part.mean(dim=0)).sum()
        scores.append((entropy_of_mean - torch.special.entr(part).sum(dim=1).mean()).exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def nearest_neighbors(
    queries: torch.Tensor, points: torch.Tensor | None = None, *, num_neighbors: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Exact Euclidean neighbours of each query, in tiles: memory does not grow with the number of pairs.

    Args:
        queries (`torch.Tensor` of shape `(N, D)`): Vectors whose neighbours to find.
        points (`torch.Tensor` of shape `(M, D)`, *optional*): Candidates. Default: the queries, where a query is not its own
            neighbour (but a duplicate of it may be).
        num_neighbors (`int`, *optional*, defaults to 1): Number of neighbours of each query.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Squared distances, float64, and indices, int64, both `(N, num_neighbors)`,
        nearest first, on the CPU.

    Raises:
        ValueError: If there are too few points.
    """
    among_queries = points is None
    queries = queries.cpu()
    points = queries if among_queries else points.cpu()
    num_candidates = len(points) - among_queries
    if not 1 <= num_neighbors <= num_candidates:
        raise ValueError(f"`num_neighbors` is {num_neighbors}, but must lie in 1..{num_candidates}, the other points.")
    distances = queries.new_full((len(queries), num_neighbors), math.inf, dtype=torch.float64)
    indices = queries.new_zeros((len(queries), num_neighbors), dtype=torch.int64)
    for rows, columns in _tiles(len(queries), len(points)):
        tile = _squared_distances(queries[rows], points[columns])
        numbers = torch.arange(columns.start, columns.stop, device=tile.device).expand(tile.shape)
        if among_queries:
            tile[torch.arange(rows.start, rows.stop, device=tile.device)[:, None] == numbers] = math.inf
        candidates = torch.cat([distances[rows], tile], dim=1)
        distances[rows], best = candidates.topk(num_neighbors, dim=1, largest=False)
        indices[rows] = torch.cat([indices[rows], numbers], dim=1).gather(1, best)
    return distances, indices


def distinct(points: torch.Tensor) -> torch.Tensor:
    r"""The numbers of the points, `(N, D)`, that are no copies of earlier ones, in order."""
    is_first = torch.ones(len(points), dtype=torch.bool)
    for rows, _, indices, is_copy in _beyond_copies(points, torch.arange(len(points))):
        is_first[rows] &= ~(is_copy & (indices < rows[:, None])).any(dim=1)
    return is_first.nonzero()[:, 0]


def spacings(points: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    r"""
    Squared distance of points to their nearest neighbour that is no copy of them.

    Args:
        points (`torch.Tensor` of shape `(M, D)`): All points.
        chosen (`torch.Tensor` of shape `(N,)`): The numbers of some.

    Returns:
        `torch.Tensor` of shape `(N,)`: Float64; 0 where all points are copies.
    """
    found = torch.zeros(len(chosen), dtype=torch.float64)
    for rows, distances, _, is_copy in _beyond_copies(points, chosen):
        nearest = distances.masked_fill(is_copy, math.inf).amin(dim=1)
        found[rows] = nearest.masked_fill(is_copy.all(dim=1), 0.0)
    return found


def _beyond_copies(
    points: torch.Tensor, chosen: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """
    Neighbours of the chosen points, themselves included, and more of them for those whose neighbours are all copies: places in
    `chosen`, distances, numbers, and which are copies.
    """
    # Features of one image differ by rounding.
    farthest_copy = 1e-6 * points.var(dim=0, correction=0).sum().item()
    rows, number = torch.arange(len(chosen)), 2
    while len(rows):
        number = min(number, len(points))
        distances, indices = nearest_neighbors(points[chosen[rows]], points, num_neighbors=number)
        is_copy = distances <= farthest_copy
        yield rows, distances, indices, is_copy
        rows, number = rows[is_copy.all(dim=1) & (number < len(points))], 16 * number


def _radii(centers: torch.Tensor, num_neighbors: int) -> torch.Tensor:
    """Squared distance of each centre to its last neighbour among the others."""
    return nearest_neighbors(centers, num_neighbors=num_neighbors)[0][:, -1]


def _count_balls(queries: torch.Tensor, centers: torch.Tensor, radii: torch.Tensor) -> torch.Tensor:
    """For each query, how many centres have it inside their ball."""
    counts = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for rows, columns in _tiles(len(queries), len(centers)):
        counts[rows] += (_squared_distances(queries[rows], centers[columns]) <= radii[columns]).sum(dim=1)
    return counts


def _tiles(num_rows: int, num_columns: int) -> Iterator[tuple[slice, slice]]:
    for row in range(0, num_rows, _TILE):
        for column in range(0, num_columns, _TILE):
            yield slice(row, min(row + _TILE, num_rows)), slice(column, min(column + _TILE, num_columns))


def _squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x, y = x.double(), y.double()
    squares = x.square().sum(1, keepdim=True) + y.square().sum(1)
    distances = squares - 2 * x @ y.T
    # The difference cancels for equal vectors: a value within its rounding error is 0, so duplicates have distance 0.
    return distances.masked_fill_(distances <= x.shape[1] * torch.finfo(torch.float64).eps * squares, 0)


def _kernel_sum(x: torch.Tensor, y: torch.Tensor) -> float:
    return math.fsum(
        _kernel(x[rows].double() @ y[columns].double().T, x.shape[1]).sum().item()
        for rows, columns in _tiles(len(x), len(y))
    )


def _kernel_diagonal_sum(x: torch.Tensor) -> float:
    return _kernel(x.double().square().sum(dim=1), x.shape[1]).sum().item()


def _kernel(products: torch.Tensor, feature_dim: int) -> torch.Tensor:
    return (products / feature_dim + 1) ** 3


def _clip_rounding(eigenvalues: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Sets eigenvalues that rounding made negative to 0; refuses any that are too negative for rounding at this scale."""
    rounding = 10 * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * scale
    if not eigenvalues.min() >= -rounding:  # NaN too
        raise ValueError(
            f"the statistics have the eigenvalue {eigenvalues.min().item():.3g}, but a covariance has none below 0 and rounding "
            f"makes at most {rounding.item():.3g}. Compute them again."
        )
    return eigenvalues.clamp(min=0)


def _checked(
    features_a: torch.Tensor, features_b: torch.Tensor, *, min_count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """On the CPU, since not every device has float64."""
    if features_a.ndim != 2 or features_b.ndim != 2 or features_a.shape[1] != features_b.shape[1]:
        raise ValueError(
            f"features have the shapes {tuple(features_a.shape)} and {tuple(features_b.shape)}, but must be (N, D) "
            "and (M, D), from the same extractor."
        )
    if min(len(features_a), len(features_b)) < min_count:
        raise ValueError(
            f"there are {len(features_a)} and {len(features_b)} feature vectors, but each set must have at least "
            f"{min_count}. Use more images."
        )
    if not (torch.isfinite(features_a).all() and torch.isfinite(features_b).all()):
        raise ValueError("features hold NaN or infinite values. Look at the images and at the feature extractor.")
    return features_a.cpu(), features_b.cpu()
