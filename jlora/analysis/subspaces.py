"""Singular values, subspace similarity and amplification (arXiv 2106.09685, 7.2, 7.3, G, H.4).

NumPy only, float64. ``U``, ``V`` hold singular vectors as rows, the largest singular value first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jlora.analysis.updates import Update

#: Singular values below this share of the largest are rounding errors of float32 factors.
NOISE = 1e-6


def low_rank_svd(update: Update) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The singular value decomposition of ``dW = scaling B A``, from its factors.

    With ``B = Q_B R_B`` and ``A^T = Q_A R_A`` only the small matrix ``scaling R_B R_A^T`` has to be
    decomposed; dW itself is never formed.

    Returns:
        U (k, out), singular values (k,), V (k, in); k = min(r, in, out).
    """
    q_b, r_b = np.linalg.qr(update.B)
    q_a, r_a = np.linalg.qr(update.A.T)
    left, values, right = np.linalg.svd(update.scaling * r_b @ r_a.T, full_matrices=False)
    return (q_b @ left).T, values, right @ q_a.T


def directions(update: Update, matrix: str) -> np.ndarray:
    """The directions whose subspaces are compared, as orthonormal rows, the strongest first.

    Args:
        matrix: "A": the right-singular vectors of A, as in the paper; "B": the left-singular
            vectors of B; "dW": the right-singular vectors of the change itself, which ignore the
            part of A that B does not use.
    """
    if matrix == "A":
        return np.linalg.svd(update.A, full_matrices=False)[2]
    if matrix == "B":
        return np.linalg.svd(update.B, full_matrices=False)[0].T
    return low_rank_svd(update)[2]


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """phi(i, j) for every i and j: how much of one subspace lies in another, from 0 to 1.

    ``||U_i^T V_j||_F^2 / min(i, j)`` with the first i and the first j directions (equation 4).

    Args:
        first: (a, d) orthonormal rows. second: (b, d).

    Returns:
        (a, b); phi(i, j) is at [i - 1, j - 1].
    """
    squares = np.square(first @ second.T).cumsum(0).cumsum(1)
    return squares / np.minimum(*np.ogrid[1 : len(first) + 1, 1 : len(second) + 1])


def random_similarity(a: int, b: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """`similarity` of the right-singular vectors of Gaussian (a, width) and (b, width) matrices.

    Its expectation is max(i, j) / width.
    """
    return similarity(random_directions(a, width, rng), random_directions(b, width, rng))


def random_directions(count: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """(count, width) orthonormal rows, uniformly distributed over all directions."""
    gaussian = rng.standard_normal((count, width))
    return np.linalg.svd(gaussian, full_matrices=False)[2]


@dataclass(frozen=True)
class Amplification:
    """A row of the paper's table 7: Frobenius norms.

    Attributes:
        directions: the r of the subspaces.
        change: ||dW||. weight: ||W||.
        in_update, in_own, in_random: ||U^T W V^T|| with the first r singular vectors of dW, with
            those of W itself, and with random directions.
    """

    directions: int
    change: float
    weight: float
    in_update: float
    in_own: float
    in_random: float

    @property
    def factor(self) -> float:
        """||dW|| / ||U^T W V^T||: how much stronger the directions of dW are in dW than in W."""
        return self.change / self.in_update if self.in_update else math.inf


def amplification(update: Update, W: np.ndarray, rng: np.random.Generator) -> Amplification | None:
    """How much ``update`` amplifies directions that ``W`` (out, in) already has (appendix H.4).

    None if the change is zero and has no directions.
    """
    U, values, V = low_rank_svd(update)
    if not values[0] > 0:
        return None
    r = int((values > NOISE * values[0]).sum())
    U, V = U[:r], V[:r]
    W = W.astype(np.float64)
    own = np.linalg.svd(W, compute_uv=False)
    random_U = random_directions(r, W.shape[0], rng)
    random_V = random_directions(r, W.shape[1], rng)
    return Amplification(
        directions=r,
        change=float(np.linalg.norm(values)),
        weight=float(np.linalg.norm(own)),
        in_update=float(np.linalg.norm(U @ W @ V.T)),
        in_own=float(np.linalg.norm(own[:r])),
        in_random=float(np.linalg.norm(random_U @ W @ random_V.T)),
    )
