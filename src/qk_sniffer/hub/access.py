"""Can a run be published when it has ended? Asked before it begins."""

import json
from collections.abc import Mapping
from typing import Any

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import RepositoryNotFoundError

from qk_sniffer.errors import UserError
from qk_sniffer.hub.publication import Publication
from qk_sniffer.hub.requests import explained, retried

_FIELD = "sniffer.output.hf_repo_id"
_ROLES_THAT_WRITE = ("admin", "write", "contributor")


def check_access(publication: Publication, instead: str) -> None:
    """See that this process may write to the repository, or make it.

    Args:
        publication: Names the repository.
        instead: What the user can do without it, for the messages.

    Raises:
        UserError: It may not, there is no token, the Hub can't be reached, or a repository that is to
            be private is public.
    """
    if is_offline_mode():
        raise UserError(
            f"{_FIELD}: HF_HUB_OFFLINE keeps the client from the Hub; unset it, or {instead}"
        )
    if not get_token():
        raise UserError(
            f"{_FIELD}: there is no token to write with; log in with `hf auth login`, set HF_TOKEN, or "
            f"{instead}"
        )
    api, repo_id = HfApi(), publication.repo_id
    with explained(f"{_FIELD}: {repo_id}", f"try again, or {instead}"):
        user = retried(api.whoami)
        try:
            info = retried(lambda: api.repo_info(repo_id, repo_type="dataset"))
        except RepositoryNotFoundError:
            _require_may_create(publication, user, instead)
            return
        if publication.private and not info.private:
            raise UserError(
                f"sniffer.output.private: true, but {repo_id} is public; make it private on the Hub, "
                "name another repository, or set it to false"
            )
        retried(lambda: api.auth_check(repo_id, repo_type="dataset", write=True))


def _require_may_create(publication: Publication, user: Mapping[str, Any], instead: str) -> None:
    owner, _, _ = publication.repo_id.partition("/")
    roles = {org["name"]: org.get("roleInOrg", "write") for org in user.get("orgs", [])}
    roles[user["name"]] = "admin"
    if roles.get(owner) not in _ROLES_THAT_WRITE:
        raise UserError(
            f"{_FIELD}: {publication.repo_id} is not there, and {user['name']} may not make it for "
            f"{owner}; name one of {', '.join(name for name in roles)} as owner, or {instead}"
        )
    token = user.get("auth", {}).get("accessToken", {})
    role = token.get("role", "write")
    # A fine-grained token lists what it may do, and where.
    granted = json.dumps(token.get("fineGrained", {}))
    if role == "read" or (role == "fineGrained" and '"repo.write"' not in granted):
        raise UserError(
            f"{_FIELD}: the token may only read; use a token with write permission, or {instead}"
        )
