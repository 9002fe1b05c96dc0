"""
Put a decoder into a pipeline whose generator was trained on the same encoder.

    dae-diffusers assemble --pipeline runs/digits --vae runs/digits-large-decoder/vae
    dae-diffusers assemble --pipeline runs/digits --vae runs/digits-large-decoder/vae --output_dir runs/digits-large-decoder

The encoders are compared by their weights. The generator, the scheduler and the statistics of the latents stay as they are.
"""

import shutil
from pathlib import Path

from dae_diffusers.cli import parse_config
from dae_diffusers.errors import UserError
from dae_diffusers.fitting.side_by_side import WAITING, assemble
from dae_diffusers.hub.results import PIPELINE_INDEX
from dae_diffusers.script import run_script, show_messages
from dae_diffusers.store import bring_back
from dae_diffusers.training.settings import AssembleConfig


def main(config: AssembleConfig) -> None:
    show_messages()
    given = Path(config.pipeline)
    bring_back(given)
    found = next(
        (each for each in (given, given / WAITING, given / "pipeline") if (each / PIPELINE_INDEX).exists()), None
    )
    if found is None:
        raise UserError(
            f"`pipeline` {given} holds no pipeline: neither {PIPELINE_INDEX} nor a folder `{WAITING}` or `pipeline`. Give the output "
            "folder of train_dit.py or train_vqgan_prior.py."
        )
    target = Path(config.output_dir) / "pipeline" if config.output_dir else found.with_name("pipeline")
    if config.output_dir and target.exists() and target.resolve() != found.resolve():
        raise UserError(
            f"{target} exists. Choose another `output_dir`, or leave it out to replace the decoder of {found}."
        )
    if config.output_dir is None and found.name != WAITING:
        target = found
    assemble(found, config.vae, target)
    if found.name == WAITING and target.resolve().parent == found.resolve().parent:  # it waits no longer
        shutil.rmtree(found)


if __name__ == "__main__":
    run_script(main, parse_config(AssembleConfig, description=__doc__))
