"""The recipes as the package `verl_sspo.recipes`. Hydra takes a folder in a package only if it has this file."""
