"""Train the VQ-VAE on filtered pictures, in place of the dVAE: Ray Train, data parallel."""

import sys
from collections.abc import Sequence

from jobs import runtime, stage_one
from jobs.configs.train_vqvae import PRESETS


def main(argv: Sequence[str] | None = None) -> int:
    return runtime.run_job("train_vqvae", PRESETS, stage_one.train, argv, stage_one.describe)


if __name__ == "__main__":
    sys.exit(main())
