"""Train the discrete VAE on filtered pictures: Ray Train, data parallel."""

import sys
from collections.abc import Sequence

from jobs import runtime, stage_one
from jobs.configs.train_dvae import PRESETS


def main(argv: Sequence[str] | None = None) -> int:
    return runtime.run_job("train_dvae", PRESETS, stage_one.train, argv, stage_one.describe)


if __name__ == "__main__":
    sys.exit(main())
