"""What a card takes to decompose a small matrix: published times of whole calls.

cuSOLVER says nothing of its kernels, and the host waits for each call anyway.
"""

from __future__ import annotations

from itertools import pairwise

#: Seconds of torch.linalg.svd of one n x n matrix in fp32, by n, up to what cuSOLVER's batched Jacobi method takes
#: (github.com/pytorch/pytorch/pull/88502, 2022-11-04; PyTorch uses it up to 32 x 32 since; the card is not named there).
SVD_S = ((4, 140e-6), (8, 172e-6), (16, 246e-6), (32, 296e-6))
#: Launches around the decomposition itself: pinv fills two tolerances, compares, inverts, scales, multiplies
#: (aten/src/ATen/native/LinearAlgebra.cpp, linalg_pinv).
AROUND_SVD = {"svd": 0, "pinv": 10}
#: What it takes the host to hear that an idle card is done: the median of 4 bytes copied to the host and a synchronisation, on
#: an RTX 5090 (github.com/kekzl/imp/issues/1654, 2026-08-23).
WAIT_S = 32e-6
#: The dtype of no product: singular values of `batch` matrices of m x m, one after the other, each with what it takes the
#: host to hear of two more things than the published times hold: that its matrix arrived, and that the card may go on.
SVD = "singular values"


def svd_seconds(n: int) -> float:
    """Return the seconds of a decomposition into singular values of n x n: on lines between the published sizes.

    A larger one counts as the largest that was published, which is too little.
    """
    if n <= SVD_S[0][0]:
        return SVD_S[0][1]
    for (low, low_s), (high, high_s) in pairwise(SVD_S):
        if n <= high:
            return low_s + (high_s - low_s) * (n - low) / (high - low)
    return SVD_S[-1][1]
