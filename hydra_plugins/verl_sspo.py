"""Adds the recipes to Hydra's search path, so that every `main_ppo` finds them without `--config-dir`.

Hydra imports every module of the namespace package `hydra_plugins`. The recipes come after verl's own configurations
and after the user's `--config-dir`, which is searched first; they come before the folders of `hydra.searchpath`.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class RecipesSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="verl_sspo", path="pkg://verl_sspo.recipes")
