"""What pyproject.toml cannot say: two top-level folders are sub-packages of mtp_mlx, beside the discovered
ones."""

from setuptools import find_packages, setup

MAPPED = ("convert", "metal_kernels")  # folder at the top of the repository -> mtp_mlx.<folder>

packages = find_packages(include=("mtp_mlx", "mtp_mlx.*"))
for folder in MAPPED:
    packages += [f"mtp_mlx.{folder}", *(f"mtp_mlx.{folder}.{inner}" for inner in find_packages(folder))]

setup(packages=packages, package_dir={f"mtp_mlx.{folder}": folder for folder in MAPPED})
