"""The program that stands in for training in the end-to-end suite on a real cluster: standard library only.

Takes the arguments of `jobs/pretrain.py`, counts steps instead of training, reports through the progress ConfigMap as the trainer does,
continues from its last reported checkpoint, and stops when told to. What goes wrong is in the variable STAND_IN (see `fake/kuberay.py`).
"""

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

PREFIX = os.environ.get("TERRACE_PROGRESS_PREFIX", "")
ACCOUNT = os.environ.get("STAND_IN_ACCOUNT", "/var/run/secrets/kubernetes.io/serviceaccount")


def call(method, change=None):
    values = os.environ
    server = values.get("STAND_IN_API") or f"https://{values['KUBERNETES_SERVICE_HOST']}:{values['KUBERNETES_SERVICE_PORT']}"
    url = f"{server}/api/v1/namespaces/{values['TERRACE_NAMESPACE']}/configmaps/{values['TERRACE_PROGRESS']}"
    request = urllib.request.Request(url, method=method, data=json.dumps(change).encode() if change else None)
    request.add_header("Content-Type", "application/merge-patch+json")
    context = None
    if url.startswith("https"):
        context = ssl.create_default_context(cafile=ACCOUNT + "/ca.crt")
        request.add_header("Authorization", "Bearer " + Path(ACCOUNT, "token").read_text())
    for _ in range(20):
        try:
            return json.load(urllib.request.urlopen(request, context=context, timeout=10)).get("data") or {}
        except (urllib.error.URLError, OSError) as error:
            print(f"stand-in: {error}; trying again", file=sys.stderr)
            time.sleep(1)
    raise SystemExit("stand-in: the API server cannot be reached")


def main(words):
    stage, attempt = words[words.index("--stage") + 1], int(words[words.index("--attempt") + 1])
    given = json.loads(os.environ.get("STAND_IN", "{}"))
    of_stage = given.get("stages", {}).get(stage, {})
    behaviour = {"steps": 4, "step_seconds": 0.05} | given | of_stage | of_stage.get("attempts", {}).get(str(attempt), {})
    before = json.loads(call("GET").get(PREFIX + "progress.json", "{}"))
    if (before.get("stage"), before.get("attempt")) == (stage, attempt) and before.get("result"):
        return 0
    step = int((before.get("checkpoint") or {}).get("step", 0)) if before.get("stage") == stage else 0

    saved = step  # a step that fails is not in any checkpoint, so the next attempt meets it again

    def report(**values):
        body = {
            "stage": stage, "attempt": attempt, "cluster": os.environ.get("RAY_CLUSTER_NAME", ""), "step": step,
            "total_steps": behaviour["steps"], "metrics": {"loss": f"{2.0 / (step + 1):.4f}"},
            "checkpoint": {"uri": f"s3://test/{stage}/step-{saved:06d}", "step": saved}, **values,
        }  # fmt: skip
        directive = json.loads(call("PATCH", {"data": {PREFIX + "progress.json": json.dumps(body)}}).get(PREFIX + "directive.json", "{}"))
        return directive.get("stage") == stage and directive.get("attempt") == attempt

    while step < behaviour["steps"]:
        time.sleep(behaviour["step_seconds"])
        if behaviour.get("hang") and step >= 1:
            continue
        step += 1
        if behaviour.get("exit") is not None and step > behaviour["steps"] // 2:
            report(exit={"status": behaviour["exit"], "message": behaviour.get("message", "it broke")})
            return behaviour["exit"]
        saved = step
        if report():
            report(exit={"status": 143, "message": "stopped after a checkpoint"})
            return 143
    result = {"steps": step, "loss": 1.0, "evaluation": {"after": behaviour.get("after", {})}}
    report(result=result, exit={"status": 0, "message": ""})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
