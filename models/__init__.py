"""Models: what is believed about the data, one family a file."""

from probtensor.models.funbat import FunBaT as FunBaT

__all__ = ["FunBaT"]
