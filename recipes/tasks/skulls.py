"""Completes the shape of skulls with a 3D autoencoder, as in the paper's Table 2 and Figures 1 and 2.

The network sees a skull with a defect and gives back the complete skull. It is trained on one kind of defect.
It is evaluated on other skulls, each once with a defect of this kind and once with one of another kind.

Put the paper's clinical skulls into ``skulls/`` of the data folder, as NIfTI files of equal names in
``train/{complete,defective}`` and ``evaluation/{complete,same_defect,other_defect}``. Every seed has this
split. With ``--download``, and always in ``skulls-small``, skull-like shells are generated instead.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from recipes.engine.optimizers import PAPERS
from recipes.engine.schedules import constant
from recipes.engine.task import Batch, Data, Metrics, Missing, Source, Task, package
from recipes.tasks import shells

nibabel, metrics = package("nibabel"), package("monai.metrics")
AutoEncoder, Norm = package("monai.networks.nets").AutoEncoder, package("monai.networks.layers").Norm
DiceLoss = package("monai.losses").DiceLoss
LATENT = 8  # numbers in the code; a linear layer turns them into 64
TRAINED = {"defective": "round"}  # a sub-folder -> the defect of the generated shells
EVALUATED = {"same_defect": "round", "other_defect": "window"}


@dataclass(frozen=True)
class Setting:
    """How large the experiment is."""

    size: int  # voxels along each side of a volume
    channels: tuple[int, ...]  # of the stride-2 convolutions; few near the input, where volumes are large
    train: int  # number of generated shells
    evaluation: int


PAPER = Setting(64, (4, 16, 80, 192, 8), train=100, evaluation=100)  # 986,874 parameters
SMALL = Setting(32, (16, 80, 192, 8), train=20, evaluation=100)  # 984,056 parameters
SMOKE = Setting(32, (2, 4, 4, 8), train=2, evaluation=1)


class InstanceNorm(nn.GroupNorm):
    """Instance normalisation as groups of one channel each.

    nn.InstanceNorm3d runs through torch's batch_norm, which has no third derivative; FAM's gradient needs it.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, num_features, affine=False)


Norm.add_factory_callable("instance_as_groups", lambda spatial_dims: InstanceNorm)


class LatentAutoEncoder(AutoEncoder):  # type: ignore[misc, valid-type]
    """Stride-2 convolutions, two linear layers around a latent code, and as many deconvolutions."""

    def __init__(self, setting: Setting) -> None:
        strides = (2,) * len(setting.channels)
        super().__init__(3, 1, 1, setting.channels, strides, norm="instance_as_groups")
        self.code_size = setting.size // 2 ** len(strides)
        features = setting.channels[-1] * self.code_size**3
        self.to_latent = nn.Linear(features, LATENT)
        self.from_latent = nn.Linear(LATENT, features)

    def forward(self, volumes: Tensor) -> Tensor:
        """Returns the logits of the complete skulls."""
        latent = self.to_latent(self.encode(volumes).flatten(1))
        code = self.from_latent(latent).relu().unflatten(1, (-1, *[self.code_size] * 3))
        logits: Tensor = self.decode(code)
        return logits


Volumes = dict[str, Tensor]  # "complete" and each kind of defect: (n, 1, size, size, size)


def pairs(train: Volumes, evaluation: Volumes) -> Data:
    """Returns the defective skulls as inputs, with the complete ones as targets."""
    evaluated = {kind: TensorDataset(evaluation[kind], evaluation["complete"]) for kind in EVALUATED}
    return Data(TensorDataset(train["defective"], train["complete"]), evaluated)


def generated(setting: Setting) -> Data:
    """Returns the shells of a setting, which are the same at every call."""

    def volumes(count: int, seed: int, defects: Mapping[str, str]) -> Volumes:
        random = [np.random.default_rng((seed, number)) for number in range(count)]
        made = [shells.shell(each, setting.size, defects) for each in random]
        stacked = {kind: np.stack([found[kind] for found in made])[:, None] for kind in made[0]}
        return {kind: torch.from_numpy(volume).float() for kind, volume in stacked.items()}

    return pairs(volumes(setting.train, 0, TRAINED), volumes(setting.evaluation, 1, EVALUATED))


def stored(folder: Path, size: int) -> Data:
    """Reads the skulls of a folder; a complete skull and its defective versions have equal names."""
    train = stored_volumes(folder / "train", TRAINED, size)
    return pairs(train, stored_volumes(folder / "evaluation", EVALUATED, size))


def stored_volumes(folder: Path, defects: Iterable[str], size: int) -> Volumes:
    """Reads the volumes in the sub-folders "complete" and of each kind of defect."""
    files = {kind: sorted((folder / kind).glob("*.nii.gz")) for kind in ("complete", *defects)}
    names = {kind: [path.name for path in paths] for kind, paths in files.items()}
    if not files["complete"] or any(found != names["complete"] for found in names.values()):
        counts = ", ".join(f"{len(found)} in {kind}" for kind, found in names.items())
        remedy = "complete the folder, or let --download generate skull-like shells"
        raise Missing(f"expected *.nii.gz files of equal names in {folder}, found {counts}: {remedy}")
    return {kind: torch.stack([read(path, size) for path in paths]) for kind, paths in files.items()}


def read(path: Path, size: int) -> Tensor:
    """Reads a NIfTI file as zeros and ones ``(1, size, size, size)``."""
    stored = np.asarray(nibabel.Nifti1Image.from_filename(path).dataobj, np.float32)
    resized = nn.functional.interpolate(torch.from_numpy(stored)[None, None], (size,) * 3, mode="nearest")
    return (resized[0] > 0.5).float()


@torch.no_grad()
def overlap_and_distances(model: nn.Module, batches: Iterable[Batch]) -> Metrics:
    """Returns Dice coefficient, Hausdorff distance and its 95th percentile (in voxels), a value per skull.

    An empty prediction has no distance to anything, so the volume's diagonal counts as its distance.
    """
    columns: dict[str, list[Tensor]] = {"dsc": [], "hd": [], "hd95": []}
    for inputs, targets in batches:
        predictions = (model(inputs) > 0).float()  # logits: a probability over 1/2
        columns["dsc"].append(metrics.compute_dice(predictions, targets))
        diagonal = targets.shape[-1] * 3**0.5
        for name, percentile in (("hd", None), ("hd95", 95)):
            distance = metrics.compute_hausdorff_distance(predictions, targets, True, percentile=percentile)
            columns[name].append(distance.nan_to_num(nan=diagonal, posinf=diagonal))
    return {name: torch.cat(values).flatten().tolist() for name, values in columns.items()}


@torch.no_grad()
def mean_overlap(model: nn.Module, batches: Iterable[Batch]) -> Metrics:
    """Returns the mean Dice coefficient alone, which is quick, for the curves by epoch."""
    values = [metrics.compute_dice((model(inputs) > 0).float(), targets) for inputs, targets in batches]
    return {"dsc": torch.cat(values).mean().item()}


def skulls(small: bool = False) -> Task:
    """Returns the experiment of Table 2, whose lambdas are 0, 0.0006, 0.002, 0.02, 0.1 and 0.7."""
    setting = SMALL if small else PAPER

    def data(source: Source, seed: int) -> Data:
        if source.smoke or small or source.download:
            return generated(SMOKE if source.smoke else setting)
        return stored(source.folder / "skulls", setting.size)

    # The exact kappa would take 64 Hessian-vector products through the deconvolutions; a probe takes one.
    kappa = {**PAPERS, "measure": "layerwise", "mode": "hutchinson", "n_samples": 1, "normalize": False}
    return Task(
        data=data,
        model=lambda source: LatentAutoEncoder(SMOKE if source.smoke else setting),
        layers=("from_latent",),
        epochs=160 if small else 200,
        batch_size=1,
        base="adam",
        options={"lr": 1e-4},
        methods={"fam": {"lam": 0.002, **kappa}},
        schedule=constant,
        loss=DiceLoss(sigmoid=True, squared_pred=True),  # Milletari et al.; the mean over the skulls
        evaluate=overlap_and_distances,
        evaluated_at=(0.5, 1),
        watch=mean_overlap,
        metric="dsc",
    )
