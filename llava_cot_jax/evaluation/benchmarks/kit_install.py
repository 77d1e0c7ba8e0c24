"""Packages that read the files of published benchmarks, and VLMEvalKit, which scores them: whether they are there."""

from importlib.util import find_spec

from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluation.benchmarks.published import KIT_VERSION
from llava_cot_jax.hosts.surroundings import package_version

INSTALL_PACKAGES = "pip install 'llava-cot-jax[vlmevalkit]'"
"""Command that installs what VLMEvalKit's scorers need."""

INSTALL_KIT = f"pip install --no-deps ms-vlmeval=={KIT_VERSION}"
"""Command that installs VLMEvalKit without the packages that its scorers do not need."""

_PACKAGES = ("pandas", "openpyxl", "xlsxwriter", "tabulate", "validators", "sty", "requests")


def check_kit_packages(for_what: str) -> None:
    """Check that the packages are there that read benchmarks, write predictions, and are needed by the scorers.

    Raises:
        UserError: One of them is not installed.
    """
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise UserError(f"{for_what} needs {missing[0]}: {INSTALL_PACKAGES}")


def kit_fault() -> str | None:
    """Return what is wrong with the VLMEvalKit that is installed, or None where it can score."""
    found = package_version("ms-vlmeval")
    return None if found == KIT_VERSION else f"VLMEvalKit {KIT_VERSION} is needed, and it is {found}"
