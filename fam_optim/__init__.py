"""FAM keeps the layers of a network flat while any PyTorch optimizer trains it (Adilova et al., 2023)."""

from fam_optim.evaluation import dataset_relative_flatness, layer_flatness
from fam_optim.flatness import relative_flatness
from fam_optim.layer.record import Observation, observe
from fam_optim.layers import weight_layers
from fam_optim.optimizer import FAM

__version__ = "0.3.0"
__all__ = [
    "FAM",
    "Observation",
    "dataset_relative_flatness",
    "layer_flatness",
    "observe",
    "relative_flatness",
    "weight_layers",
]
