"""A stand-in for `verl_sspo.run.launch.train`: a small process that writes metrics as verl does.

It has its own module, which is quick to import, because cells run in new interpreters.
"""

import signal
import subprocess
import sys

from verl_sspo.run import launch

# Does what `behaviour` in the configuration says.
FAKE_TRAINER = """
import json, pathlib, sys, time, zipfile
folder, checkpoints, behaviour = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
tracker = checkpoints / "latest_checkpointed_iteration.txt"
first = int(tracker.read_text()) + 1 if tracker.exists() else 1
print("Total training steps: 4", flush=True)
with (folder / "metrics.jsonl").open("w") as file:
    for step in range(first, 5):
        print(json.dumps({"step": step, "data": {"critic/score/mean": step / 10}}), file=file, flush=True)
        if behaviour.startswith("checkpoint") and step == 2:
            (checkpoints / "global_step_2" / "actor").mkdir(parents=True)
            for name in ("actor/model_world_size_1_rank_0.pt", "data.pt"):
                zipfile.ZipFile(checkpoints / "global_step_2" / name, "w").close()
            tracker.write_text("2")
        if behaviour in ("fail", "checkpoint-fail") and step == 3 and first == 1:
            sys.exit("the worker died")
        if behaviour == "hang":
            time.sleep(60)
"""


def fake_train(overrides, run_dir, *, config_dir, config_name, console=None):
    settings = dict(each.split("=", 1) for each in overrides)
    run_dir.mkdir(parents=True)
    log = run_dir / launch.LOG
    command = [sys.executable, "-c", FAKE_TRAINER, str(run_dir), settings["trainer.default_local_dir"]]
    with log.open("w") as file:
        child = subprocess.Popen([*command, settings["behaviour"]], stdout=file, stderr=subprocess.STDOUT)
        (run_dir / "pid").write_text(str(child.pid))
        previous = signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        try:
            code = child.wait()
        finally:
            child.kill()
            child.wait()
            signal.signal(signal.SIGTERM, previous)
    if code:
        raise launch.TrainingFailedError(code, log, log.read_text())
    return run_dir / launch.METRICS
