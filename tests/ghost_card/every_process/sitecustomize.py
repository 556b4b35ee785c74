"""On PYTHONPATH: the host computes for the ghost card in every Python process, and in those that it starts.

on_card.py does it for one script; a script that starts others by `python SCRIPT` needs it in each of them.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


class ThenOperators(importlib.abc.MetaPathFinder):
    """Installs the operators as soon as torch is imported."""

    def find_spec(self, name, path, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_both(module):
            load(module)
            sys.path.append(str(HERE.parent))
            import operators

            module.ghost_operators = operators.install(None)

        spec.loader.exec_module = load_both
        return spec


runpy.run_path(str(HERE.parents[1] / "no_network" / "sitecustomize.py"))  # of all sitecustomize Python takes one
if os.environ.get("CUDA_VISIBLE_DEVICES") != "":
    sys.meta_path.insert(0, ThenOperators())
