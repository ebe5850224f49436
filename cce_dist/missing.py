"""An optional package that is not installed, said so that a reader knows what to install."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def named(module: str, *packages: str, extra: str) -> Iterator[None]:
    """Around imports that ``module`` needs of ``packages``, which the given extra of cce_dist has.

    Raises:
        ModuleNotFoundError: as the import does, with the command that installs them.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in packages:
            raise
        needs = f"{module} needs the package {error.name}: pip install 'cce_dist[{extra}]'"
        raise ModuleNotFoundError(needs, name=error.name) from error
