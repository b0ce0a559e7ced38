"""The module that verl imports in the driver and in every worker (entry-point group `verl.plugins`).

verl logs a plugin's failure at DEBUG level and continues without the plugin. So the failure is printed here before it
is raised; otherwise the user would only learn later that `sspo` is unknown.
"""

import sys
import traceback

try:
    from verl_sspo import cpu

    cpu.register()  # first: the import below may make verl choose its platform

    import verl_sspo.algorithm.registration  # noqa: F401  registers the loss and the estimator
except BaseException:
    traceback.print_exc()
    print(
        "verl_sspo could not be loaded (the error is above), so verl does not know `sspo`. "
        "`python -m verl_sspo doctor` checks the installation.",
        file=sys.stderr,
        flush=True,
    )
    raise
