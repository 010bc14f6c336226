"""Which module measures what: by the name of the results file."""

from __future__ import annotations

from importlib import import_module

from experiments.core.sweep import Sweep

CLAIMS = "experiments.claims"
CHAPTERS = "experiments.chapters"
MODULES = {
    "encoder": CLAIMS,
    "pooling_linear": CLAIMS,
    "conv_projection": CLAIMS,
    "attention": CLAIMS,
    "unet": CLAIMS,
    "multi_path": CLAIMS,
    "spatial_pyramid": CLAIMS,
    "upsampling": CLAIMS,
    "conditional_concat": CLAIMS,
    "levels": f"{CHAPTERS}.encoder.levels",
    "scenes": f"{CHAPTERS}.encoder.scenes",
    "pooling_linear_probe": f"{CHAPTERS}.pooling_linear.analysis",
    "conv_projection_order": f"{CHAPTERS}.conv_projection.analysis",
    "attention_probe": f"{CHAPTERS}.attention.analysis",
    "caching": f"{CHAPTERS}.unet.caching",
    "spatial_pyramid_probe": f"{CHAPTERS}.spatial_pyramid.analysis",
    "upsampling_edges": f"{CHAPTERS}.upsampling.analysis",
    "conditional_concat_probe": f"{CHAPTERS}.conditional_concat.analysis",
    "input_mapping": f"{CHAPTERS}.input_mapping.trials",
    "input_mapping_probe": f"{CHAPTERS}.input_mapping.analysis",
    "sequences": f"{CHAPTERS}.sequences.trials",
    "sequences_choice": f"{CHAPTERS}.sequences.trials",
    "sequences_looks": f"{CHAPTERS}.sequences.trials",
    "image_to_image": f"{CHAPTERS}.putting_together.analysis",
    "benchmark": "experiments.benchmark.__main__",
    "costs": "experiments.benchmark.costs",
    "choice": "experiments.pretrain.choose",
}
FLAGS = {"sequences_choice": " --choose", "choice": " NAME=FILE"}


def sweep(name: str) -> Sweep:
    """Return how the records of `results/<name>.json` are made."""
    return import_module(MODULES[name]).SWEEPS[name]


def command(name: str) -> str:
    """Return the command that measures again what is stale."""
    module = MODULES[name].removesuffix(".__main__")
    slug = f" {name}" if module == CLAIMS else ""
    return f"python -m {module}{slug}{FLAGS.get(name, '')}"
