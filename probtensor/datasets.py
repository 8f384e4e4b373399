"""Real data that is on the machine already: nothing is downloaded."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from probtensor.readers import from_dense

__all__ = ["load_il2"]


def load_il2() -> tuple[pd.DataFrame, npt.NDArray[np.float64]]:
    """Responses of immune cells to interleukin-2 and engineered variants of it, as TensorLy ships them.

    Thirteen ligands were given to eight types of human immune cells in twelve concentrations; phosphorylated STAT5
    was measured at four times. Of the 13 x 4 x 12 x 8 = 4992 cells 192 were never measured (two ligands at half an
    hour): they are left out, not filled.

    Returns
    -------
    X : DataFrame of shape (4800, 4)
        One row a measured cell, with the columns

        ``ligand``
            category, 13 labels: the ligand and its format, monovalent (Mono) or bivalent (Biv).
        ``time``
            float64, hours since the ligand was given: 0.5, 1, 2 and 4.
        ``dose``
            float64, decimal logarithm of the concentration in nanomolar, from -3.32 (0.474 pM) to 1.92 (84 nM) in
            twelve equal steps of a factor of three. The doses were spaced evenly on this scale, and responses are
            sigmoid in it, so it is the axis on which nearby doses act alike.
        ``cell``
            category, 8 labels: the cell type; ``hi`` and ``lo`` tell the amount of the receptor IL2Ra.
    y : array of float64, shape (4800,)
        The response, scaled to lie between 0 and 1.

    Notes
    -----
    TensorLy gives the numbers without units; hours and nanomolar are those of the publication.

    References
    ----------
    Orcutt-Jahns, Emmel, Snyder, Posner, Carlson and Meyer (2021), Multivalency enhances the specificity of Fc-cytokine
    fusions, bioRxiv. The data come with TensorLy under the MIT License, copyright 2021 The Regents of the University
    of California.

    Examples
    --------
    >>> X, y = load_il2()
    >>> X.shape, X["time"].unique().tolist()
    ((4800, 4), [4.0, 2.0, 1.0, 0.5])
    """
    import tensorly
    from tensorly.datasets import load_IL2data

    with tensorly.backend_context("numpy", local_threadsafe=True):
        bunch = load_IL2data()
    ligands, hours, nanomolar, cells = bunch.ticks
    coords = {
        "ligand": ligands,
        "time": np.asarray(hours, dtype=np.float64),
        "dose": np.log10(nanomolar),
        "cell": cells,
    }
    X, y = from_dense(bunch.tensor, coords=coords)
    return X, y.astype(np.float64, copy=False)
