"""What pyproject.toml has no word for: a wheel carries recipes/ and accelerate_config.yaml inside of the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies what a checkout has beside src/; an editable install finds it there."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            package = Path(self.build_lib) / "overnight"
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree("recipes", package / "recipes", dirs_exist_ok=True, ignore=skip)
            shutil.copy("accelerate_config.yaml", package)


setup(cmdclass={"build_py": BuildWithRecipes})
