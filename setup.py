"""Packages of the wheel: those of r0_jax, and configs/ as r0_jax.recipes; all else: pyproject.toml.

pyproject.toml alone can either find packages or map one to another folder, not both.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["r0_jax", "r0_jax.*"]),
        "r0_jax.recipes",
        "r0_jax.recipes.ablations",
    ],
    package_dir={"r0_jax.recipes": "configs"},
)
