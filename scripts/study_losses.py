#!/usr/bin/env python
"""
What each loss does to the latent space: L1, + LPIPS, + GAN, the GAN's gradient cut at z, and regularisers; same data,
steps and architecture, several seeds.

    python scripts/study_losses.py --dataset_name user/images --output_dir runs/losses
    python scripts/study_losses.py --dataset_name user/images --variants "GAN cut at z" --seeds 0 1 2 3 4

Every run is a folder of its own in output_dir (an interrupted study goes on where it was). The comparison is in
study.json, study.md and pictures. Results and what they mean: docs/latent_space.md.
"""

from pathlib import Path

import datasets
from studies.loss_study import LossStudyConfig, run_study

from hf_vqgan.training.arguments import RecipeParser, errors_in_one_line


def main() -> None:
    datasets.disable_progress_bars()
    with errors_in_one_line():
        config, _ = RecipeParser((LossStudyConfig,)).parse()
        study = run_study(config)
    print((Path(study["settings"]["output_dir"]) / "study.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
