"""What can be asked of the Hub, by method and path."""

import base64
import hashlib
import json
import re
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlencode

import yaml

from loopback.answers import Answer, Call, Refusal, iso, json_answer
from loopback.repos import Blob, Commit, Repo, upload_mode
from loopback.users import User

if TYPE_CHECKING:
    from loopback.hub import LoopbackHub

_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = []

_PARTS = {"repo": "[^/]+/[^/]+", "revision": "[^/]+", "path": ".+", "sha256": "[0-9a-f]{64}"}


def _route(method: str, path: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    path = path.replace("~", "/api/datasets/{repo}")
    pattern = re.sub(r"{(\w+)}", lambda part: f"(?P<{part[1]}>{_PARTS[part[1]]})", path)

    def register(endpoint: Callable[..., Answer]) -> Callable[..., Answer]:
        _ROUTES.append((method, re.compile(pattern), endpoint))
        return endpoint

    return register


class Endpoints:
    """What can be asked for, with the variable parts of its path."""

    def __init__(self, hub: "LoopbackHub") -> None:
        self.hub = hub

    def answer(self, call: Call) -> Answer:
        try:
            return self._find(call)()
        except Refusal as refusal:
            return refusal.answer
        except Exception:
            return json_answer({"error": traceback.format_exc()}, 500)

    def _find(self, call: Call) -> Callable[[], Answer]:
        method = "GET" if call.method == "HEAD" else call.method
        for wanted, pattern, endpoint in _ROUTES:
            if method == wanted and (match := pattern.fullmatch(call.path)):
                parts = {name: unquote(part or "") for name, part in match.groupdict().items()}
                return lambda: endpoint(self, call, **parts)
        if not call.path.startswith("/"):
            raise Refusal(502, f"Nothing but {self.hub.endpoint} can be reached: {call.path}")
        if re.match("/api/(datasets|models|spaces|kernels)/|/.*/resolve/", call.path):
            raise self._not_found(self._user(call))
        raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    def _user(self, call: Call) -> User | None:
        header = call.headers.get("authorization")
        user = self.hub.users.get((header or "").removeprefix("Bearer "))
        if header is not None and user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def _known(self, call: Call) -> User:
        user = self._user(call)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return user

    def _not_found(self, user: User | None) -> Refusal:
        # What is missing and what is private must look the same.
        if user is None:
            return Refusal(401, "Invalid username or password.", "RepoNotFound")
        return Refusal(404, "Repository not found", "RepoNotFound")

    def _repo(self, call: Call, repo_id: str) -> Repo:
        user, repo = self._user(call), self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not (user and user.may("read", repo_id))):
            raise self._not_found(user)
        return repo

    def _writable(self, call: Call, repo_id: str) -> tuple[Repo, User]:
        repo, user = self._repo(call, repo_id), self._user(call)
        if user is None:
            raise self._not_found(None)
        if not user.may("write", repo_id):
            raise Refusal(403, "Forbidden: your token or your role does not allow to write here")
        return repo, user

    def _branch(self, repo: Repo, branch: str) -> Commit:
        if branch not in repo.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return repo.find(branch)

    def _signature(self, path: str) -> str:
        return hashlib.sha256((self.hub.secret + path).encode()).hexdigest()

    def _signed(self, path: str) -> str:
        return f"{self.hub.storage}{path}?signature={self._signature(path)}"

    def _check_signature(self, call: Call) -> None:
        if call.query.get("signature") != [self._signature(call.path)]:
            raise Refusal(403, "The signature does not match")

    def _page(self, call: Call, entries: list[Any], size: int, info: Callable[[Any], Any]) -> Answer:
        begin = int(call.query.get("cursor", ["0"])[0])
        answer = json_answer([info(entry) for entry in entries[begin : begin + size]])
        if begin + size < len(entries):
            query = urlencode({**call.query, "cursor": begin + size}, doseq=True)
            answer.headers["Link"] = f'<{self.hub.endpoint}{call.path}?{query}>; rel="next"'
        return answer

    @_route("GET", "/api/whoami-v2")
    def whoami(self, call: Call) -> Answer:
        return json_answer(self._known(call).whoami())

    @_route("GET", "~/auth-check(?:/{path})?")
    def auth_check(self, call: Call, repo: str, path: str) -> Answer:
        check = self._writable if path == "write" else self._repo
        check(call, repo)
        return json_answer({})

    @_route("POST", "/api/repos/create")
    def create_repo(self, call: Call) -> Answer:
        asked, user = call.json(), self._known(call)
        if asked.get("type") != "dataset":
            raise Refusal(400, "This server knows repositories of datasets only")
        namespace = asked["organization"] or user.name
        repo_id = f"{namespace}/{asked['name']}"
        url = f"{self.hub.endpoint}/datasets/{repo_id}"
        if not user.may("write", repo_id):
            message = f"You don't have the rights to create a dataset under the namespace {namespace}"
            raise Refusal(403, message)
        if repo_id in self.hub.repos:
            raise Refusal(409, "You already created this dataset repo", url=url)
        self.hub.add_repo(repo_id, asked.get("visibility") == "private")
        return json_answer({"url": url, "name": repo_id})

    @_route("POST", "/api/validate-yaml")
    def validate_yaml(self, call: Call) -> Answer:
        self._user(call)
        header = re.match(r"---\n(.*?)\n---(\n|$)", call.json()["content"], re.DOTALL)
        if header is None:
            return json_answer(
                {"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]}
            )
        try:
            valid = isinstance(yaml.safe_load(header[1]), dict)
            errors = [] if valid else [{"message": "the metadata are not a mapping"}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        return json_answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    @_route("POST", "~/branch/{revision}")
    def create_branch(self, call: Call, repo: str, revision: str) -> Answer:
        found, _ = self._writable(call, repo)
        if revision.startswith("refs/"):
            raise Refusal(400, f"Invalid reference for a branch: {revision}")
        asked = call.json()
        if revision in found.branches and not asked.get("overwrite"):
            raise Refusal(409, f"Reference refs/heads/{revision} already exists")
        found.branches[revision] = found.find(asked.get("startingPoint", "main")).id
        return json_answer({}, 201)

    @_route("DELETE", "~/branch/{revision}")
    def delete_branch(self, call: Call, repo: str, revision: str) -> Answer:
        found, _ = self._writable(call, repo)
        self._branch(found, revision)
        if revision == "main":
            raise Refusal(403, "The branch main is protected and cannot be deleted")
        del found.branches[revision]
        return json_answer({})

    @_route("POST", "~/preupload/{revision}")
    def preupload(self, call: Call, repo: str, revision: str) -> Answer:
        found, _ = self._writable(call, repo)
        tree = found.find(revision).tree
        files = []
        for file in call.json()["files"]:
            path, mode = file["path"], upload_mode(file["path"], file["size"])
            there = {"oid": tree[path].lfs or tree[path].oid} if path in tree else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **there})
        return json_answer({"files": files})

    @_route("POST", "/datasets/{repo}.git/info/lfs/objects/batch")
    def batch(self, call: Call, repo: str) -> Answer:
        found, _ = self._writable(call, repo)
        objects = []
        for wanted in call.json()["objects"]:
            upload = {"href": self._signed(f"/lfs/{repo}/{wanted['oid']}"), "header": {}}
            verify = {"href": f"{self.hub.endpoint}/datasets/{repo}.git/info/lfs/objects/verify"}
            stored = found.stores(wanted["oid"])
            actions = {} if stored else {"actions": {"upload": upload, "verify": verify}}
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **actions})
        return json_answer({"transfer": "basic", "objects": objects})

    @_route("PUT", "/lfs/{repo}/{sha256}")
    def put(self, call: Call, repo: str, sha256: str) -> Answer:
        self._check_signature(call)
        if hashlib.sha256(call.body).hexdigest() != sha256:
            raise Refusal(400, "The content is not what its name says")
        self.hub.repos[repo].store(call.body)
        return Answer()

    @_route("POST", "/datasets/{repo}.git/info/lfs/objects/verify")
    def verify(self, call: Call, repo: str) -> Answer:
        (found, _), wanted = self._writable(call, repo), call.json()
        if not found.stores(wanted["oid"]) or len(found.read(wanted["oid"])) != wanted["size"]:
            raise Refusal(404, "Object not found")
        return json_answer({})

    @_route("POST", "~/commit/{revision}")
    def commit(self, call: Call, repo: str, revision: str) -> Answer:
        found, user = self._writable(call, repo)
        head = self._branch(found, revision)
        (_, header), *changes = (json.loads(line).values() for line in call.body.splitlines())
        if not head.id.startswith(header.get("parentCommit", "")):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        if len(changes) > self.hub.most_changes:
            raise Refusal(403, f"{len(changes)} files are too many for one commit")
        tree = dict(head.tree)
        for kind, change in changes:
            _change(found, tree, kind, change)
        made = found.commit(revision, tree, header["summary"], header.get("description", ""), user.name)
        url = f"{self.hub.endpoint}/datasets/{repo}/commit/{made.id}"
        return json_answer({"success": True, "commitOid": made.id, "commitUrl": url})

    @_route("GET", "~(?:/revision/{revision})?")
    def info(self, call: Call, repo: str, revision: str) -> Answer:
        found = self._repo(call, repo)
        head = found.find(revision or "main")
        siblings: list[dict[str, Any]] = []
        for path, blob in sorted(head.tree.items()):
            siblings.append({"rfilename": path})
            if call.asks("blobs"):
                siblings[-1] |= {"size": blob.size, "blobId": blob.oid, **blob.lfs_info("sha256")}
        info = {"id": repo, "author": repo.partition("/")[0], "sha": head.id, "private": found.private}
        return json_answer(
            {**info, "gated": False, "lastModified": iso(head.date), "siblings": siblings}
        )

    @_route("GET", "~/tree/{revision}(?:/{path})?")
    def tree(self, call: Call, repo: str, revision: str, path: str) -> Answer:
        found = self._repo(call, repo)
        head = found.find(revision)
        if path not in head.directories:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
        prefix = path and path + "/"
        below = [p for p in sorted({*head.tree, *head.directories} - {path}) if p.startswith(prefix)]
        if not call.asks("recursive"):
            below = [p for p in below if "/" not in p[len(prefix) :]]
        expand = call.asks("expand")
        size = min(self.hub.page_size, 50) if expand else self.hub.page_size
        return self._page(call, below, size, lambda p: found.entry(head, p, expand))

    @_route("POST", "~/paths-info/{revision}")
    def paths_info(self, call: Call, repo: str, revision: str) -> Answer:
        found = self._repo(call, repo)
        head, form = found.find(revision), parse_qs(call.body.decode())
        paths = [path.rstrip("/") for path in form.get("paths", [])]
        expand = form.get("expand") == ["true"]
        return json_answer([found.entry(head, path, expand) for path in paths if head.oid(path)])

    @_route("GET", "~/refs")
    def refs(self, call: Call, repo: str) -> Answer:
        heads = self._repo(call, repo).branches.items()
        branches = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": i} for b, i in heads]
        return json_answer({"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    @_route("GET", "~/commits/{revision}")
    def commits(self, call: Call, repo: str, revision: str) -> Answer:
        found = self._repo(call, repo)
        history = list(found.history(found.find(revision)))
        return self._page(call, history, self.hub.page_size, Commit.info)

    @_route("GET", "/datasets/{repo}/resolve/{revision}/{path}")
    def resolve(self, call: Call, repo: str, revision: str, path: str) -> Answer:
        found = self._repo(call, repo)
        head = found.find(revision)
        blob = head.tree.get(path)
        if blob is None:
            answer = Refusal(404, "Entry not found", "EntryNotFound").answer
        elif blob.lfs is None:
            answer = _ranged(call, found.read(blob.oid), blob.oid)
        else:
            location = {"Location": self._signed(f"/cdn/{repo}/{blob.lfs}")}
            linked = {"X-Linked-Etag": f'"{blob.lfs}"', "X-Linked-Size": str(blob.size)}
            answer = Answer(302, headers={"ETag": f'"{blob.oid}"', **linked, **location})
        answer.headers["X-Repo-Commit"] = head.id
        return answer

    @_route("GET", "/cdn/{repo}/{sha256}")
    def cdn(self, call: Call, repo: str, sha256: str) -> Answer:
        self._check_signature(call)
        return _ranged(call, self.hub.repos[repo].read(sha256), sha256)


def _change(repo: Repo, tree: dict[str, Blob], kind: str, change: Mapping[str, Any]) -> None:
    """Change a tree by one line of what is asked to be committed."""
    path = change["path"]
    if kind == "file":
        tree[path] = repo.add(path, base64.b64decode(change["content"]))
    elif kind == "lfsFile":
        if not repo.stores(change["oid"]):
            raise Refusal(400, f"The LFS object {change['oid']} of {path} was not uploaded")
        tree[path] = repo.pointer(change["oid"])
    elif kind == "deletedFile":
        if path not in tree:
            raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        del tree[path]
    elif kind == "deletedFolder":
        for below in [p for p in tree if p.startswith(path.rstrip("/") + "/")]:
            del tree[below]
    else:
        raise Refusal(400, f"Unknown change: {kind}")


def _ranged(call: Call, data: bytes, etag: str) -> Answer:
    """Some bytes, or the range of them that is asked for."""
    answer = Answer(200, data, {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"})
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("range", ""))
    if asked is None:
        return answer
    first, last = asked.groups()
    begin = int(first) if first else max(len(data) - int(last), 0)
    end = min(int(last) + 1, len(data)) if first and last else len(data)
    if begin < end:
        answer.status, answer.body = 206, data[begin:end]
        answer.headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
    else:
        answer = Refusal(416, "The range is not satisfiable").answer
        answer.headers["Content-Range"] = f"bytes */{len(data)}"
    return answer
