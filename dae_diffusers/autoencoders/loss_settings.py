"""Settings of the autoencoder's losses. Needs no torch."""

from typing import Literal

from dae_diffusers.errors import ConfigError
from dae_diffusers.settings import field, settings

_ANY_ADVERSARIAL = "adversarial_weight or stage1_adversarial_weight or generated_loss adversarial"


@settings
class LossConfig:
    """Losses."""

    l1_weight: float = field(1.0, "weight of the mean absolute error", at_least=0, advanced=True)
    mse_weight: float = field(1.0, "weight of the mean squared error", at_least=0, advanced=True)
    kl_weight: float = field(
        1e-4, "weight of the KL divergence per latent (stage 1)", at_least=0, needs="stage 1 and autoencoder kl"
    )
    perceptual_model: str | None = field(None, "vision model of the perceptual loss, or `lpips`; default: none")
    perceptual_weight: float = field(
        1.0,
        "weight of the perceptual loss for the real decoder",
        at_least=0,
        needs="perceptual_model",
        advanced=True,
    )
    stage1_perceptual_weight: float | None = field(
        None,
        "weight of the perceptual loss in stage 1; default: `--perceptual_weight`",
        at_least=0,
        needs="perceptual_model",
        advanced=True,
    )
    adversarial_weight: float = field(
        0.0,
        "weight of the real decoder's adversarial loss; 0: none",
        at_least=0,
        needs="stage 2 or stage 3 or auxiliary_decoder none",
    )
    stage1_adversarial_weight: float = field(
        0.0, "weight of the adversarial loss in stage 1", at_least=0, needs="stage 1", advanced=True
    )
    adversarial_loss: Literal["hinge", "non_saturating"] = field(
        "hinge", "kind of adversarial loss", needs=_ANY_ADVERSARIAL, advanced=True
    )
    discriminator_model: str | None = field(
        None,
        "frozen vision model (Hub id or folder) whose features the discriminator sees; default: a PatchGAN without one",
        needs=_ANY_ADVERSARIAL,
        advanced=True,
    )
    discriminator_channels: int = field(
        64, "width of the discriminator, a multiple of 8", needs=_ANY_ADVERSARIAL, advanced=True
    )
    discriminator_layers: int = field(
        3,
        "strided layers of the PatchGAN; with 3, a logit sees 70x70 pixels",
        at_least=1,
        needs=_ANY_ADVERSARIAL,
        advanced=True,
    )
    discriminator_learning_rate: float = field(
        5e-4, "constant learning rate of the discriminator", above=0, needs=_ANY_ADVERSARIAL, advanced=True
    )
    discriminator_augmentation: bool = field(
        False,
        "show the discriminator images and reconstructions augmented (DiffAug); for few images, since it hides small differences",
        needs="adversarial_weight or stage1_adversarial_weight",
        advanced=True,
    )
    discriminator_start: int = field(
        0,
        "step of the stage at which the discriminator begins to learn",
        at_least=0,
        needs=_ANY_ADVERSARIAL,
        advanced=True,
    )
    adversarial_start: int = field(
        0,
        "step of the stage at which the adversarial loss switches on",
        at_least=0,
        needs=_ANY_ADVERSARIAL,
        advanced=True,
    )
    adversarial_ramp_steps: int = field(
        0, "steps over which the adversarial weight then rises", at_least=0, needs=_ANY_ADVERSARIAL, advanced=True
    )
    adaptive_weight_cap: float = field(
        100.0,
        "adversarial loss: upper bound of the adaptive weight, which balances gradients at the decoder's last layer; 0: not adaptive",
        at_least=0,
        needs=_ANY_ADVERSARIAL,
        advanced=True,
    )

    def __post_init__(self):
        if self.l1_weight == self.mse_weight == 0:
            raise ConfigError("`l1_weight` and `mse_weight` are both 0: nothing would be reconstructed.")
        if self.discriminator_channels < 8 or self.discriminator_channels % 8:
            raise ConfigError(
                f"`discriminator_channels` is {self.discriminator_channels}, but must be a multiple of 8."
            )
        if self.discriminator_start > self.adversarial_start:
            raise ConfigError(
                f"`adversarial_start` {self.adversarial_start} lies before `discriminator_start` "
                f"{self.discriminator_start}: the decoder would be trained against a discriminator that has learnt nothing."
            )

    @property
    def has_adversarial_loss(self) -> bool:
        r"""Whether any stage has one."""
        return self.adversarial_weight > 0 or self.stage1_adversarial_weight > 0

    def perceptual_weight_of(self, final_decoder: bool) -> float:
        """Weight of the perceptual loss for the final decoder or in stage 1; 0 without a perceptual model."""
        if self.perceptual_model is None:
            return 0.0
        if final_decoder or self.stage1_perceptual_weight is None:
            return self.perceptual_weight
        return self.stage1_perceptual_weight

    def adversarial_weight_of(self, final_decoder: bool) -> float:
        """Weight of the adversarial loss for the final decoder or in stage 1."""
        return self.adversarial_weight if final_decoder else self.stage1_adversarial_weight
