"""Every way in which a kubeconfig or a pod says who it is reaches the API server, on the client's and on the operator's calls."""

from __future__ import annotations

import base64
import json
import os
import stat
import sys
from pathlib import Path

import pytest
from fake.server import Server

from terrace.cluster import credentials
from terrace.cluster.api import ApiError, KindAbsent, Refused
from terrace.cluster.credentials import connect
from terrace.errors import InputError

READER = {
    "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "reader"},
    "rules": [{"apiGroups": ["", "terrace.dev"], "resources": ["configmaps", "curricula"], "verbs": ["get", "list"]}],
}  # fmt: skip


@pytest.fixture(scope="module")
def server(crd):
    with Server(crd, namespace="team") as server:
        server.store.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "seen"}, "data": {}})
        server.store.create(READER)
        subjects = [{"kind": "ServiceAccount", "name": "reader", "namespace": "team"}, {"kind": "User", "name": "ada"},
                    {"kind": "Group", "name": "readers"}]  # fmt: skip
        server.store.create({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": "reader"}, "subjects": subjects,
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "reader"}})  # fmt: skip
        yield server


@pytest.fixture
def use(server, monkeypatch, tmp_path):
    """Connect with a kubeconfig whose user has these credentials."""

    def connected(**user):
        file = tmp_path / "config.yaml"
        file.write_text(server.kubeconfig(**user))
        monkeypatch.setenv("KUBECONFIG", str(file))
        return connect()

    return connected


def last_user(server):
    return server.requests[-1][0]


def exec_plugin(tmp_path, status):
    """A plugin that prints the credentials in a file, and counts its runs."""
    (tmp_path / "status.json").write_text(json.dumps(status))
    script = tmp_path / "plugin"
    script.write_text(f"""#!{sys.executable}
import json, pathlib
here = pathlib.Path({str(tmp_path)!r})
with (here / "runs").open("a") as file:
    file.write("x")
print(json.dumps({{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential",
                  "status": json.loads((here / "status.json").read_text())}}))
""")
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    return {"apiVersion": "client.authentication.k8s.io/v1", "command": str(script), "interactiveMode": "Never"}


def test_token(server, use):
    api = use(token=server.access.token_for("team", "reader"))
    assert api.get("ConfigMap", "seen")["metadata"]["namespace"] == "team"
    assert last_user(server) == "system:serviceaccount:team:reader"
    with pytest.raises(Refused, match=r'User "system:serviceaccount:team:reader" cannot create resource "configmaps" in API group ""'):
        api.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}})


def test_token_file_that_is_replaced(server, use, tmp_path):
    file = tmp_path / "token"
    first = server.access.token_for("team", "reader")
    file.write_text(first)
    api = use(tokenFile=str(file))
    assert api.get("ConfigMap", "seen")
    del server.access.tokens[first]
    file.write_text(server.access.token_for("team", "reader"))
    assert api.get("ConfigMap", "seen")


def test_exec_plugin_with_a_token_that_expires(server, use, tmp_path):
    first = server.access.token_for("team", "reader")
    plugin = exec_plugin(tmp_path, {"token": first, "expirationTimestamp": "2020-01-01T00:00:00Z"})
    api = use(exec=plugin)
    assert api.get("ConfigMap", "seen")
    (tmp_path / "status.json").write_text(json.dumps({"token": server.access.token_for("team", "reader")}))
    del server.access.tokens[first]
    assert api.get("ConfigMap", "seen")  # the plugin ran again, as its token had expired
    assert (tmp_path / "runs").read_text().count("x") >= 2


def test_exec_plugin_whose_token_is_revoked_before_its_time(server, use, tmp_path):
    first = server.access.token_for("team", "reader")
    plugin = exec_plugin(tmp_path, {"token": first, "expirationTimestamp": "2999-01-01T00:00:00Z"})
    api = use(exec=plugin)
    assert api.get("ConfigMap", "seen")
    (tmp_path / "status.json").write_text(json.dumps({"token": server.access.token_for("team", "reader")}))
    del server.access.tokens[first]
    assert api.get("ConfigMap", "seen")


def test_exec_plugin_with_a_certificate(server, use, tmp_path):
    certificate, key = server.authority.issue("ada-exec", ("readers",))
    status = {"clientCertificateData": certificate.read_text(), "clientKeyData": key.read_text()}
    assert use(exec=exec_plugin(tmp_path, status)).get("ConfigMap", "seen")
    assert last_user(server) == "ada-exec"


@pytest.mark.parametrize("inline", [False, True])
def test_client_certificate(server, use, inline):
    certificate, key = server.authority.issue("ada")
    user = {"client-certificate": str(certificate), "client-key": str(key)}
    if inline:
        user = {f"{name}-data": base64.b64encode(Path(path).read_bytes()).decode() for name, path in user.items()}
    api = use(**user)
    assert api.list("ConfigMap")
    assert last_user(server) == "ada"


def test_no_credentials_and_failing_plugins_say_so(server, use, tmp_path):
    with pytest.raises(Refused, match="no credentials were sent"):
        use(exec={"apiVersion": "client.authentication.k8s.io/v1", "command": "/bin/false", "interactiveMode": "Never"}).get(
            "ConfigMap", "seen")  # fmt: skip
    with pytest.raises(ApiError, match=r"does not accept the credentials \(401\): log in again"):
        use(token="no such token").get("ConfigMap", "seen")


def test_in_a_pod_the_rotated_token_is_used(server, monkeypatch, tmp_path):
    """The kubelet replaces the token file before it expires (kubernetes.io/docs/concepts/storage/projected-volumes)."""
    from kubernetes.config import incluster_config

    folder = tmp_path / "account"
    folder.mkdir()
    (folder / "ca.crt").write_bytes(server.authority.file.read_bytes())
    (folder / "namespace").write_text("team")
    first = server.access.token_for("team", "reader")
    (folder / "token").write_text(first)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(folder / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(folder / "ca.crt"))
    monkeypatch.setattr(credentials, "NAMESPACE_FILE", str(folder / "namespace"))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    host, port = server.url.removeprefix("https://").split(":")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
    api = connect()
    assert (api.namespace, bool(api.get("ConfigMap", "seen"))) == ("team", True)
    (folder / "token").write_text(server.access.token_for("team", "reader"))
    del server.access.tokens[first]  # within the minute in which the client would not look at the file
    assert api.get("ConfigMap", "seen")
    assert last_user(server) == "system:serviceaccount:team:reader"


def test_no_cluster_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(InputError, match="no Kubernetes cluster"):
        connect()


def test_server_that_goes_away_is_an_error_to_try_again(server, use):
    api = use(token=server.access.token_for("team", "reader"))
    file = Path(os.environ["KUBECONFIG"])
    file.write_text(file.read_text().replace(server.url, "https://127.0.0.1:1"))
    assert api.get("ConfigMap", "seen")
    with pytest.raises(ApiError, match=r"127\.0\.0\.1"):
        connect().get("ConfigMap", "seen")


def test_unknown_fields_are_refused_by_our_calls_and_only_warned_of_by_the_servers_default(server, use):
    """The server's default drops a misspelt key and answers 201; `kubectl apply` and our calls ask for Strict."""
    from cluster_world import tiny_curriculum

    api = use()
    body = tiny_curriculum("strict")
    body["spec"]["runtime"]["imagePullPolcy"] = "Never"
    with pytest.raises(Refused, match=r'unknown field "spec\.runtime\.imagePullPolcy"'):
        api.create(body)
    assert "strict" not in server.store.objects.get("Curriculum", {})
    response = api._send("POST", "/apis/terrace.dev/v1alpha1/namespaces/team/curricula", body, "application/json", False)
    assert response.status == 201
    assert "unknown field" in response.headers["Warning"]
    assert "imagePullPolcy" not in server.store.objects["Curriculum"]["strict"]["spec"]["runtime"]


def test_a_kind_that_is_absent_is_told_from_an_object_that_is(server, use):
    api = use()
    assert api.get("RayJob", "none") is None
    server.store.absent.add("RayJob")
    try:
        for call in (lambda: api.get("RayJob", "none"), lambda: api.list("RayJob"),
                     lambda: api.create({"kind": "RayJob", "metadata": {"name": "x"}})):  # fmt: skip
            with pytest.raises(KindAbsent, match=r"does not know the kind RayJob \(ray.io/v1\)"):
                call()
        assert not api.knows("RayJob")
    finally:
        server.store.absent.clear()
    assert api.knows("RayJob")
