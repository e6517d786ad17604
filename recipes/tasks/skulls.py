"""Completing the shape of skulls with a 3D autoencoder: the paper's Table 2 and Figures 1 and 2.

Source: Adilova et al., FAM: Relative Flatness Aware Minimization, 2023 (arXiv 2307.02337).

The network sees a skull with a defect and gives back the complete skull. It is trained on one kind of defect
and evaluated on skulls with defects of this kind ("like") and of another ("unlike").

    python -m recipes.train skulls --optimizer fam --lam 0.002

The paper's clinical skulls go into ``skulls/`` of the data folder, as NIfTI files of equal names in
``{train,like,unlike}/{complete,defective}``; ``--download`` generates skull-like shells there instead.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from recipes.engine.schedules import constant
from recipes.engine.task import Batch, Data, Metrics, Missing, Source, Task

try:
    from monai.losses import DiceLoss  # type: ignore[attr-defined]
    from monai.metrics import compute_dice, compute_hausdorff_distance  # type: ignore[attr-defined]
    from monai.networks.layers import Norm  # type: ignore[attr-defined]
    from monai.networks.nets import AutoEncoder  # type: ignore[attr-defined]
    from monai.transforms import AsDiscrete, Compose, EnsureType, LoadImage, Resize  # type: ignore[attr-defined]

    from recipes.tasks import shells
except ImportError as error:
    raise Missing(f'the task "skulls" needs {error.name}: pip install -e ".[paper]"') from error

SIZE = 64  # voxels along each side
DIAGONAL = SIZE * 3**0.5  # of the volume, in voxels
LATENT = 8
CHANNELS = (4, 16, 80, 192, 8)  # few where the volume is large: 986,874 parameters
SMOKE_CHANNELS = (2, 4, 4, 4, 8)

DEFECTS = {"train": "round", "like": "round", "unlike": "window"}  # by folder, of the generated shells
GENERATED = {"train": 100, "like": 100, "unlike": 100}
SMOKE = {"train": 2, "like": 1, "unlike": 1}


class InstanceNorm(nn.GroupNorm):
    """Instance normalisation as groups of one channel each.

    The same function as nn.InstanceNorm3d, but that one runs through torch's batch_norm, which has no third
    derivative, and FAM's gradient needs the third derivative of what follows its layer.
    """

    def __init__(self, num_features: int) -> None:
        """MONAI passes ``num_features``."""
        super().__init__(num_features, num_features, affine=False)


Norm.add_factory_callable("instance_as_groups", lambda spatial_dims: InstanceNorm)


class LatentAutoEncoder(AutoEncoder):
    """Five stride-2 convolutions, two linear layers with a latent code between them, five deconvolutions."""

    def __init__(self, channels: tuple[int, ...], latent: int = LATENT, size: int = SIZE) -> None:
        """Build the network for volumes ``(N, 1, size, size, size)``; it returns logits of that shape."""
        strides = (2,) * len(channels)
        super().__init__(
            spatial_dims=3,
            in_channels=1,
            out_channels=1,
            channels=channels,
            strides=strides,
            norm="instance_as_groups",
        )
        self.code_size = size // 2 ** len(channels)
        features = channels[-1] * self.code_size**3
        self.to_latent = nn.Linear(features, latent)
        self.from_latent = nn.Linear(latent, features)

    def forward(self, volumes: Tensor) -> Tensor:
        """Return the logits of the complete skulls."""
        latent = self.to_latent(self.encode(volumes).flatten(1))
        code = self.from_latent(latent).relu().unflatten(1, (-1, *[self.code_size] * 3))
        logits: Tensor = self.decode(code)
        return logits


def network(source: Source) -> nn.Module:
    """The autoencoder; a narrow one for a smoke test."""
    return LatentAutoEncoder(SMOKE_CHANNELS if source.smoke else CHANNELS)


def data(source: Source, seed: int) -> Data:
    """The skulls in the data folder, or a few generated shells. The folders are the split, for every seed."""
    if source.smoke:
        with tempfile.TemporaryDirectory() as temporary:
            return load(generate(Path(temporary) / "skulls", SMOKE))
    folder = source.folder / "skulls"
    if not folder.exists():
        if not source.download:
            raise Missing(
                f"expected skulls as {folder}/{{train,like,unlike}}/{{complete,defective}}/*.nii.gz; "
                "--download puts 100 skull-like shells into each of train, like and unlike there instead "
                "(generated ones, nothing is downloaded)"
            )
        generate(folder, GENERATED)
    return load(folder)


def generate(folder: Path, counts: dict[str, int]) -> Path:
    """Write shells as the folder's train, like and unlike; it appears when all of them are complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        unfinished = Path(temporary) / folder.name
        for seed, (name, count) in enumerate(counts.items()):
            shells.write(unfinished / name, DEFECTS[name], count, seed)
        return unfinished.rename(folder)


def load(folder: Path) -> Data:
    """Read the three sub-folders into memory."""
    train, like, unlike = (pairs(folder / name) for name in ("train", "like", "unlike"))
    return Data(train, {"like": like, "unlike": unlike})


def pairs(folder: Path) -> TensorDataset:
    """The defective skulls as inputs, the complete ones of the same names as targets: ``(1, 64, 64, 64)``."""
    complete, defective = (sorted((folder / kind).glob("*.nii.gz")) for kind in ("complete", "defective"))
    if not complete or [path.name for path in complete] != [path.name for path in defective]:
        raise Missing(
            f"expected *.nii.gz files of equal names in complete/ and defective/ of {folder}, "
            f"found {len(complete)} and {len(defective)}: complete the folder, or move {folder.parent} away "
            "and let --download generate skull-like shells there"
        )
    read = Compose(
        [
            LoadImage(reader="NibabelReader", ensure_channel_first=True),
            Resize((SIZE, SIZE, SIZE), mode="nearest"),
            AsDiscrete(threshold=0.5),
            EnsureType(dtype=torch.float32, track_meta=False),  # a plain tensor
        ]
    )
    return TensorDataset(*(torch.stack([read(path) for path in paths]) for paths in (defective, complete)))


@torch.no_grad()
def overlap_and_distances(model: nn.Module, batches: Iterable[Batch]) -> Metrics:
    """One value per skull: Dice coefficient, Hausdorff distance and its 95th percentile, in voxels.

    An empty prediction has no distance to anything: it counts as the volume's diagonal.
    """
    dsc: list[Tensor] = []
    hd: list[Tensor] = []
    hd95: list[Tensor] = []
    for inputs, targets in batches:
        predictions = (model(inputs) > 0).float()  # logits: a probability over 1/2
        dsc.append(compute_dice(predictions, targets))
        for distances, percentile in ((hd, None), (hd95, 95)):
            distance = compute_hausdorff_distance(
                predictions, targets, include_background=True, percentile=percentile
            )
            distances.append(distance.nan_to_num(nan=DIAGONAL, posinf=DIAGONAL))
    columns = {"dsc": dsc, "hd": hd, "hd95": hd95}
    return {name: torch.cat(values).flatten().tolist() for name, values in columns.items()}


def skulls() -> Task:
    """The experiment, with the settings of Table 2, whose lambdas are 0, 0.0006, 0.002, 0.02, 0.1 and 0.7."""
    return Task(
        name="skulls",
        about="a 3D autoencoder completes skulls with a defect (paper: Table 2, Figures 1 and 2)",
        data=data,
        model=network,
        layer="from_latent",
        epochs=200,
        batch_size=1,  # the paper does not say; the released code's
        base="adam",
        options={"lr": 1e-4},
        methods={
            # The exact kappa would take 64 Hessian-vector products through five deconvolutions; a probe, one.
            "fam": {"lam": 0.002, "measure": "layerwise", "mode": "hutchinson"},
        },
        schedule=constant,
        loss=DiceLoss(sigmoid=True),  # the mean over the skulls
        evaluate=overlap_and_distances,
        evaluated_at=(0.5, 1),
        metric="dsc",
        differences=(
            "The released code has lam 0.1 with 80 x Dice summed over two output channels, ||W|| instead of "
            "||W||^2, and a detached Hessian (--detach-hessian). Its volumes are 256 x 256 x 128, with six "
            "layers and a latent size of 32; sizes and depth here are the paper's. With the paper's whole "
            "gradient and lam from 0.02 on, kappa falls below zero without bound, and nothing is learned."
        ),
    )
