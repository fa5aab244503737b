"""Users: what their tokens may do."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from loopback.answers import iso


@dataclass(frozen=True)
class User:
    """A token and its user; organizations have the user's role."""

    name: str
    role: str
    orgs: Mapping[str, str]
    fine_grained: Mapping[str, Any]

    def may(self, action: Literal["read", "write"], repo_id: str) -> bool:
        """Whether the token lets its user see or change a private repository."""
        namespace = repo_id.partition("/")[0]
        role = "write" if namespace == self.name else self.orgs.get(namespace)
        if self.role != "fineGrained":
            return role is not None and (action == "read" or self.role == role == "write")
        needed = {"repo.write"} if action == "write" else {"repo.write", "repo.content.read"}
        return any(
            needed.intersection(scope["permissions"])
            for scope in self.fine_grained.get("scoped", ())
            if scope["entity"]["name"] in (namespace, repo_id)
        )

    def whoami(self) -> dict[str, Any]:
        token: dict[str, Any] = {
            "displayName": "loopback",
            "role": self.role,
            "createdAt": iso(datetime.now(UTC)),
        }
        token |= {"fineGrained": self.fine_grained} if self.role == "fineGrained" else {}
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in self.orgs.items()]
        auth = {"type": "access_token", "accessToken": token}
        return {"type": "user", "name": self.name, "fullname": self.name, "orgs": orgs, "auth": auth}
