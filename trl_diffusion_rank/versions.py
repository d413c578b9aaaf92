"""Which versions something was made with."""

import importlib.metadata


PACKAGES = ("trl-diffusion-rank", "trl", "torch", "diffusers", "transformers", "peft", "accelerate", "datasets")


def package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree
            versions[package] = "not installed"
    return versions
