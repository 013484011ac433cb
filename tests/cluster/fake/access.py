"""Who is asking, and may they: authentication and RBAC as the API server does them, decided from the objects in the store.

Rules copied: a request without credentials is `system:anonymous` (kubernetes.io/docs/reference/access-authn-authz/authentication,
"Anonymous requests"), a wrong token is 401; a ServiceAccount is `system:serviceaccount:<namespace>:<name>` ("Service account
tokens"); a client certificate's common name is the user, its organisations the groups ("X509 client certificates"). Rights are
the union of all bound rules, there is no denial, `resourceNames` cannot grant create or list (.../access-authn-authz/rbac, "Referring
to resources"); who makes a Role or a RoleBinding must hold the rights it gives ("Privilege escalation prevention and
bootstrapping"); an owner reference with blockOwnerDeletion needs `update` on the owner's finalizers
(.../access-authn-authz/admission-controllers, OwnerReferencesPermissionEnforcement).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fake.store import Store
from terrace.cluster.api import KINDS, ApiError, Refused

Manifest = dict[str, Any]
ANONYMOUS = "system:anonymous"
MASTERS = "system:masters"


@dataclass(frozen=True)
class User:
    name: str
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ask:
    """What a request wants to do."""

    verb: str
    group: str
    resource: str  # with its subresource: `curricula/status`
    namespace: str
    name: str = ""


class Access:
    def __init__(self, store: Store) -> None:
        self.store = store
        self.tokens: dict[str, User] = {}
        self.denied: list[str] = []  # every 401 and 403, for tests

    def token_for(self, namespace: str, account: str, token: str = "") -> str:
        """A token of a ServiceAccount, as the TokenRequest API gives it."""
        token = token or secrets.token_hex(16)
        self.tokens[token] = User(
            f"system:serviceaccount:{namespace}:{account}", ("system:serviceaccounts", f"system:serviceaccounts:{namespace}")
        )
        return token

    def admin_token(self) -> str:
        token = secrets.token_hex(16)
        self.tokens[token] = User("admin", (MASTERS,))
        return token

    def who(self, authorization: str, certificate: User | None) -> User:
        if not authorization:
            return certificate or User(ANONYMOUS, ("system:unauthenticated",))
        kind, _, token = authorization.partition(" ")
        if kind.lower() != "bearer" or token not in self.tokens:
            self.denied.append("401")
            raise ApiError("Unauthorized", 401)
        return self.tokens[token]

    def check(self, user: User, ask: Ask) -> None:
        if not self.allowed(user, ask):
            where = f' in the namespace "{ask.namespace}"' if ask.namespace else " at the cluster scope"
            named = f' "{ask.name}"' if ask.name else ""
            kind = f"{ask.resource.partition('/')[0]}.{ask.group}" if ask.group else ask.resource
            text = (f'{kind}{named} is forbidden: User "{user.name}" cannot {ask.verb} resource "{ask.resource}" in API group '
                    f'"{ask.group}"{where}')  # fmt: skip
            self.denied.append(text)
            raise Refused(text, 403)

    def allowed(self, user: User, ask: Ask) -> bool:
        return MASTERS in user.groups or any(covers(rule, ask) for rule in self.rules(user, ask.namespace))

    def rules(self, user: User, namespace: str) -> Iterator[Manifest]:
        """Rules that bind the user in a namespace: its RoleBindings, and ClusterRoleBindings."""
        objects = self.store.objects
        bindings = [(body, body["metadata"].get("namespace")) for body in objects.get("RoleBinding", {}).values()]
        bindings += [(body, None) for body in objects.get("ClusterRoleBinding", {}).values()]
        for binding, where in bindings:
            if where in (None, namespace) and any(is_subject(subject, user) for subject in binding.get("subjects", ())):
                yield from self.role(binding["roleRef"])

    def role(self, reference: Manifest) -> list[Manifest]:
        role = self.store.objects.get(reference["kind"], {}).get(reference["name"])
        return (role or {}).get("rules") or []

    def admit(self, user: User, verb: str, body: Manifest) -> None:
        """What is checked beyond the verb itself when an object is written."""
        if MASTERS in user.groups or verb not in ("create", "update", "patch"):
            return
        namespace = self.store.namespace
        held = list(self.rules(user, namespace))
        granted = body.get("rules") or [] if body["kind"] in ("Role", "ClusterRole") else []
        if body["kind"] in ("RoleBinding", "ClusterRoleBinding"):
            granted = self.role(body["roleRef"])
        for rule in granted:
            for ask in spread(rule, namespace):
                if not any(covers(mine, ask) for mine in held):
                    text = (f'{body["kind"]} "{body["metadata"].get("name")}" is forbidden: user "{user.name}" is attempting to '
                            f"grant RBAC permissions not currently held: {ask.verb} {ask.resource}")  # fmt: skip
                    self.denied.append(text)
                    raise Refused(text, 403)
        for owner in body["metadata"].get("ownerReferences", ()):
            if owner.get("blockOwnerDeletion") and owner["kind"] in KINDS:
                kind = KINDS[owner["kind"]]
                group = kind.group_version.partition("/")[0] if "/" in kind.group_version else ""
                ask = Ask("update", group, f"{kind.plural}/finalizers", namespace, owner["name"])
                if not self.allowed(user, ask):
                    text = "cannot set blockOwnerDeletion if an ownerReference refers to a resource you can't set finalizers on"
                    self.denied.append(text)
                    raise Refused(f'{body["kind"]} "{body["metadata"].get("name")}" is forbidden: {text}', 403)


def covers(rule: Manifest, ask: Ask) -> bool:
    named = rule.get("resourceNames")
    return (
        ask.verb in rule.get("verbs", ()) and ask.group in rule.get("apiGroups", ()) and ask.resource in rule.get("resources", ())
        and (not named or (ask.name in named and ask.verb not in ("create", "deletecollection")))
    )  # fmt: skip


def spread(rule: Manifest, namespace: str) -> Iterator[Ask]:
    for group in rule.get("apiGroups", ()):
        for resource in rule.get("resources", ()):
            for verb in rule.get("verbs", ()):
                for name in rule.get("resourceNames") or [""]:
                    yield Ask(verb, group, resource, namespace, name)


def is_subject(subject: Manifest, user: User) -> bool:
    if subject["kind"] == "ServiceAccount":
        return user.name == f"system:serviceaccount:{subject.get('namespace')}:{subject['name']}"
    if subject["kind"] == "Group":
        return subject["name"] in user.groups
    return subject["kind"] == "User" and subject["name"] == user.name
