import warnings
from importlib.metadata import version

from packaging.specifiers import SpecifierSet


SUPPORTED_TRL = SpecifierSet(">=1.16,<1.17")


def check_trl_version(installed: str) -> None:
    """Raise `ImportError` for a TRL whose private names weren't tested: tests/trainers/test_trl_contract.py."""
    if not SUPPORTED_TRL.contains(installed, prereleases=True):
        raise ImportError(
            f"trl_diffusion_rank extends private parts of TRL and works with trl{SUPPORTED_TRL}, found trl "
            f'{installed}: `pip install "trl{SUPPORTED_TRL}"`.'
        )


check_trl_version(version("trl"))

# The name that TRL uses and every supported Transformers knows; the newest renames it at each use
warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing\w*` is deprecated", FutureWarning)

with warnings.catch_warnings():
    # TRL's CPO greets with a notice that its interface may change in any release: that is why the release is checked
    warnings.simplefilter("ignore")
    import trl.experimental  # noqa: F401
