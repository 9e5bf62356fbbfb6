"""R0 on the embedded world beside rewards alone and regularizers alone: `make results`.

Command:   python -m r0_jax.ablate --config=configs/ablations/shapes.py --workdir=runs/results \\
             --out=docs/reports/results.md
Hardware:  2 CPU cores, 3 GiB; about an hour and a half (five seeds of three variants)
"""

from ml_collections import ConfigDict

from r0_jax.ablation import grid


def get_config() -> ConfigDict:
    return grid.get_config(
        recipe="configs/shapes_r0.py",
        variants={
            "R0": (),
            "rewards alone": (
                "regularizers.guidance.weight=0",
                "regularizers.output.weight=0",
            ),
            "guidance alone": (
                "rewards.clip_score.weight=0",
                "rewards.preference.weight=0",
                "regularizers.output.weight=0",
            ),
        },
        seeds=(0, 1, 2, 3, 4),
        num_prompts=1000,
    )
