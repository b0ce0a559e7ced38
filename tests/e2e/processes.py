"""Finds the processes of a run by an environment variable that they inherit."""

import psutil

from verl_sspo.run.processes import RUN_ID


def of_run(run_id):
    found = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get(RUN_ID) == run_id and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process)
        except psutil.Error:
            pass
    return found
