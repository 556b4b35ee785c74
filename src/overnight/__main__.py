"""The command `overnight`: each of its parts is a script of recipes/, or a module, under the same options."""

from __future__ import annotations

import runpy
import sys

from overnight.core.scripts import RECIPES
from overnight.errors import EXIT_INPUT

SCRIPTS = {
    "plan": "what each budget of a recipe costs, and what loss to expect of it",
    "prepare": "turn a recipe's text into token shards",
    "train": "train a recipe, or resume it",
    "eval": "measure a model and its opponents",
    "report": "a finished model's card, a run's curve, where a run stands",
    "sample": "let a finished model write",
    "publish": "send finished models to the Hub",
}
MODULES = {
    "doctor": ("overnight.doctor.__main__", "check this machine for a run"),
    "night": ("overnight.pipeline", "all of it: doctor, prepare, train, eval, publish"),
}


def main() -> int:
    """Run the part that the first word names in this process; it ends the process with its own exit code."""
    name, *arguments = sys.argv[1:] or ["--help"]
    says = SCRIPTS | {module: sentence for module, (_, sentence) in MODULES.items()}
    if name in ("-h", "--help"):
        print("usage: overnight COMMAND [options]; `overnight COMMAND --help` lists its options\n")
        print("\n".join(f"  {command:<9} {sentence}" for command, sentence in says.items()))
        return 0
    if name not in says:
        print(f"`overnight {name}` is no command; {', '.join(says)} would work", file=sys.stderr)
        return EXIT_INPUT
    sys.argv[1:] = arguments
    if name in MODULES:
        runpy.run_module(MODULES[name][0], run_name="__main__", alter_sys=True)
    else:
        sys.argv[0] = str(RECIPES / f"{name}.py")
        runpy.run_path(sys.argv[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
