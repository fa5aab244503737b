"""``LoopbackHub``: its repositories and users, the faults that strike, and what has happened."""

import hashlib
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loopback.answers import Answer, Call, Refusal
from loopback.endpoints import Endpoints
from loopback.faults import Fault, Request
from loopback.repos import Commit, Repo
from loopback.server import Server
from loopback.users import User


class LoopbackHub:
    """The server, which keeps what it was told when it stops and starts again.

    Args:
        directory: Where the bytes of LFS objects are kept; None keeps them in memory.
        port: Where it listens; 0 finds a free one, which it then keeps.

    Attributes:
        page_size: How many entries of a tree or commits of a history one answer holds.
        most_changes: How many files one commit may change.
        requests: Those received.
        before: Called with method and path before a request is looked at.
    """

    def __init__(self, directory: Path | None = None, port: int = 0) -> None:
        self.page_size = 1000
        self.most_changes = 1000
        self.requests: list[Request] = []
        self.before: Callable[[str, str], None] | None = None
        self.repos: dict[str, Repo] = {}
        self.users: dict[str, User] = {}
        self.secret = secrets.token_hex()
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._directory = directory
        self._port = port
        self._faults: list[Fault] = []
        self._uploaded: Counter[str] = Counter()
        self._server: Server | None = None

    @property
    def endpoint(self) -> str:
        """Its address, once it has started."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def storage(self) -> str:
        """Its address as another host, to which clients must not send their token."""
        return f"http://localhost:{self._port}"

    def start(self) -> None:
        self.stopping.clear()
        self._server = Server(self, self._port)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Stop, and close the connections of clients."""
        if self._server is not None:
            self.stopping.set()
            self._server.shutdown()
            self._server.server_close()
            self._server.disconnect()
            self._server = None

    def __enter__(self) -> "LoopbackHub":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def add_user(
        self,
        name: str,
        token: str,
        role: str = "write",
        orgs: Sequence[str] = (),
        fine_grained: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a token of a user.

        Args:
            name: Name of the user.
            token: The token.
            role: What it may do: read, write or fineGrained.
            orgs: The user's organizations, where the user may write, or only read as in ``acme:read``.
            fine_grained: What a fine-grained token may do, as whoami tells it.
        """
        roles = {org.partition(":")[0]: org.partition(":")[2] or "write" for org in orgs}
        self.users[token] = User(name, role, roles, fine_grained or {})

    def add_repo(self, repo_id: str, private: bool = False) -> None:
        self.repos[repo_id] = Repo(repo_id, private, self._directory)

    def add_branch(self, repo_id: str, branch: str) -> None:
        """A branch that begins at the end of main."""
        with self._lock:
            branches = self.repos[repo_id].branches
            branches[branch] = branches["main"]

    def commit(
        self, repo_id: str, branch: str, files: Mapping[str, bytes | None], message: str = "by hand"
    ) -> str:
        """Commit as another writer does; a file without bytes is deleted. Gives the commit's id."""
        with self._lock:
            repo = self.repos[repo_id]
            tree = dict(repo.find(branch).tree)
            for path, data in files.items():
                if data is None:
                    del tree[path]
                else:
                    tree[path] = repo.add(path, data)
            return repo.commit(branch, tree, message, "", "another").id

    def files(self, repo_id: str, revision: str) -> dict[str, bytes]:
        """The bytes of every file."""
        repo = self.repos[repo_id]
        tree = repo.find(revision).tree
        return {path: repo.read(tree[path].lfs or tree[path].oid) for path in sorted(tree)}

    def commits(self, repo_id: str, branch: str) -> list[Commit]:
        """The commits of a branch, newest first."""
        repo = self.repos[repo_id]
        return list(repo.history(repo.find(branch)))

    def branches(self, repo_id: str) -> dict[str, str]:
        """The ids of the newest commits, by branch."""
        return dict(self.repos[repo_id].branches)

    def is_private(self, repo_id: str) -> bool:
        return self.repos[repo_id].private

    def fail(self, fault: Fault) -> None:
        """Let something go wrong from now on."""
        with self._lock:
            self._faults.append(fault)

    def heal(self) -> None:
        """Let nothing go wrong any more."""
        with self._lock:
            self._faults.clear()

    def forget(self) -> None:
        """Clear the list of requests."""
        self.requests.clear()

    def uploaded(self) -> Counter[str]:
        """How often the bytes of each LFS object have arrived in whole, by sha256."""
        with self._lock:
            return Counter(self._uploaded)

    def fault(self, method: str, path: str) -> Fault:
        """The first fault that strikes a request, or one that changes nothing."""
        with self._lock:
            striking = [fault for fault in self._faults if fault.strikes(method, path)]
        return striking[0] if striking else Fault(method, path)

    def answer(self, call: Call, fault: Fault) -> Answer:
        """Do what is asked for, unless a fault has an answer of its own."""
        with self._lock:
            name = call.path.rpartition("/")[2]
            if call.method == "PUT" and hashlib.sha256(call.body).hexdigest() == name:
                self._uploaded[name] += 1
            if fault.status is None or fault.done:
                answer = Endpoints(self).answer(call)
        if fault.status is not None:
            answer = Refusal(fault.status, fault.message, fault.error_code).answer
        return answer
