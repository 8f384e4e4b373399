"""Models: what is believed about the data, one family a file."""

from probtensor.models.coders import BSC as BSC
from probtensor.models.coders import DSC as DSC
from probtensor.models.coders import GSC as GSC
from probtensor.models.coders import MCA as MCA
from probtensor.models.coders import MMCA as MMCA
from probtensor.models.coders import TSC as TSC
from probtensor.models.completion import NeuralTensorCompletion as NeuralTensorCompletion
from probtensor.models.funbat import FunBaT as FunBaT

__all__ = ["BSC", "DSC", "GSC", "MCA", "MMCA", "TSC", "FunBaT", "NeuralTensorCompletion"]
