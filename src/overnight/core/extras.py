"""The packages that only some recipes and scripts need: which extra brings them, and one clear line without it."""

from __future__ import annotations

import importlib.util

from overnight.errors import InputError

EXTRAS = {
    "prepare": ("datatrove", "pyarrow"),  # fastokens and fsspec's http client are done without where they are not used
    "figures": ("matplotlib",),
    "eval": ("datasets", "evaluate", "lm_eval", "matplotlib", "scipy"),
    "tensorboard": ("tensorboard",),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""The modules that are imported by name, by the extra of pyproject.toml that brings them."""


def require(extra: str, what: str) -> None:
    """Raise `InputError` when a module of `extra` is not installed; `what` needs it: a key, an option, a piece of work.

    Nothing is imported. Call it before the work at whose end the module is needed.
    """
    missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"{what} needs {', '.join(missing)}, not installed here; `make setup EXTRAS={extra}` would work, or"
            f" `pip install 'overnight[{extra}]'` in an environment of your own"
        )
