"""Which folders are packages; everything else of the package stands in pyproject.toml.

Recipes stay in jobs/recipes, the one place of the source tree, and lie in the wheel as files of `terrace.recipe.shipped`, a
mapping that pyproject.toml cannot express beside found packages.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages("platform"), *find_packages("operators"), "terrace.recipe.shipped"],
    package_dir={
        "": "platform",
        "terrace_operator": "operators/terrace_operator",
        "terrace.recipe.shipped": "jobs/recipes",
    },
    package_data={"terrace.recipe.shipped": ["*.yaml"], "terrace.demo": ["*.yaml"], "terrace.models": ["*.c"]},
)
