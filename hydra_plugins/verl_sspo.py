"""Adds the recipes to Hydra's search path, so that every `main_ppo` finds them without `--config-dir`.

Hydra imports every module of the namespace package `hydra_plugins`. verl's own configurations and the user's
`--config-dir` come before the recipes. The folders of `hydra.searchpath` come after them.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class RecipesSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        # Hydra inserts `--config-dir` before the first provider called "schema". Under any other name the recipes would
        # come first and replace a user's file of the same name.
        search_path.append(provider="schema", path="pkg://verl_sspo.recipes")
