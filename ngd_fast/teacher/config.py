"""The teacher's configuration."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ngd_fast.config import Config

Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class InputConfig(Config):
    """What happens to the maps before the network, without a look at any label."""

    # "subject": each pixel and band to zero mean and unit deviation over the windows of one subject, so that nothing
    # crosses a split by subject. It removes what differs between heads, which is most of the variance.
    standardize: Literal["none", "subject"] = "subject"
    # Each map becomes the mean over this many windows before and after it in its own trial. Ratings belong to trials.
    context: Annotated[int, Field(ge=0)] = 8


class NetworkConfig(Config):
    arch: Literal["cnn", "vit"] = "cnn"
    width: Annotated[int, Field(ge=4, le=512, multiple_of=4)] = 16
    depth: Annotated[int, Field(ge=1, le=12)] = 1
    dropout: Fraction = 0.6
    head: Literal["tanh", "linear"] = "tanh"


class AugmentConfig(Config):
    """Label-preserving changes of a map. No mirror image: frontal asymmetry is what valence is said to show in."""

    noise: NonNegative = 0.5  # deviation of one value for each 4x4-th of the map, in units of the standardised input
    gain: NonNegative = 0.1  # deviation of one factor for each band
    band_drop: Fraction = 0.1  # probability that a band is set to its mean
    mixup: NonNegative = 0.2  # alpha of the Beta distribution; 0: none


class LossConfig(Config):
    ccc: NonNegative = 1.0
    mse: NonNegative = 1.0

    @model_validator(mode="after")
    def _some(self):
        if self.ccc + self.mse == 0:
            raise ValueError("loss.ccc and loss.mse must not both be 0")
        return self


class OptimizerConfig(Config):
    lr: Positive = 2e-3
    weight_decay: NonNegative = 0.05
    batch_size: Annotated[int, Field(ge=4)] = 128
    epochs: Count = 8  # of a few trials a subject; with many more the network knows the training subjects by heart
    warmup_epochs: NonNegative = 1.0
    clip: Positive = 1.0
    ema_decay: Fraction = 0.98


class SupportConfig(Config):
    """Consistency on windows without ratings: the augmented window against the EMA teacher's view of the plain one."""

    weight: NonNegative = 0.5
    ramp_epochs: NonNegative = 5.0
    batch_ratio: Positive = 0.5  # unlabelled windows beside each labelled one


class SplitConfig(Config):
    """Which subjects the teacher trains on. The others build the bank; with choice "best" they choose the epoch too."""

    validation_subjects: tuple[int, ...] = ()  # empty: drawn by the seed
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    seed: Seed = 0


class TeacherConfig(Config):
    seed: Seed = 1
    # "best": the epoch with the highest CCC (mean of valence and arousal) on the validation subjects; "last": the end
    # of the schedule, without a look at them.
    choice: Literal["best", "last"] = "last"
    input: InputConfig = InputConfig()
    network: NetworkConfig = NetworkConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    support: SupportConfig = SupportConfig()
    split: SplitConfig = SplitConfig()
