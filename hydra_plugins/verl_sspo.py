"""Lets Hydra find the recipes of verl_sspo in every `main_ppo`, from any folder, without `--config-dir`.

Hydra imports every module of the namespace package `hydra_plugins`. Our folder is appended, so a user's own
configuration of the same name comes first.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class RecipesSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="verl_sspo", path="pkg://verl_sspo.recipes")
