"""Models: what is believed about the data, one family a file."""

from probtensor.models.adapter_evidence import fit_by_evidence as fit_by_evidence
from probtensor.models.adapter_laplace import fit_laplace as fit_laplace
from probtensor.models.adapter_ranks import rank_report as rank_report
from probtensor.models.adapter_ranks import relevance_penalty as relevance_penalty
from probtensor.models.adapter_ranks import truncate as truncate
from probtensor.models.adapter_variational import fit_variational as fit_variational
from probtensor.models.additive_coders import BSC as BSC
from probtensor.models.additive_coders import DSC as DSC
from probtensor.models.additive_coders import TSC as TSC
from probtensor.models.alternating import AlternatingMinimization as AlternatingMinimization
from probtensor.models.augmentation import DAIN as DAIN
from probtensor.models.bayesian_tucker import BayesianCP as BayesianCP
from probtensor.models.bayesian_tucker import BayesianTucker as BayesianTucker
from probtensor.models.completion import NeuralTensorCompletion as NeuralTensorCompletion
from probtensor.models.flora import FLoRAConfig as FLoRAConfig
from probtensor.models.flora import inject_adapters as inject_adapters
from probtensor.models.flora import load_adapters as load_adapters
from probtensor.models.funbat import FunBaT as FunBaT
from probtensor.models.gaussian_coder import GSC as GSC
from probtensor.models.max_coders import MCA as MCA
from probtensor.models.max_coders import MMCA as MMCA
from probtensor.models.mixtures import MoG as MoG
from probtensor.models.mixtures import MoP as MoP
from probtensor.models.noisy_or import NoisyOR as NoisyOR
from probtensor.models.peft_bridge import register_with_peft as register_with_peft

__all__ = [
    "BSC",
    "DAIN",
    "DSC",
    "GSC",
    "MCA",
    "MMCA",
    "TSC",
    "AlternatingMinimization",
    "BayesianCP",
    "BayesianTucker",
    "FLoRAConfig",
    "FunBaT",
    "MoG",
    "MoP",
    "NeuralTensorCompletion",
    "NoisyOR",
    "fit_by_evidence",
    "fit_laplace",
    "fit_variational",
    "inject_adapters",
    "load_adapters",
    "rank_report",
    "register_with_peft",
    "relevance_penalty",
    "truncate",
]
