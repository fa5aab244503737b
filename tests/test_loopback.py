"""The loopback server answers the real clients as the Hub does."""

import hashlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import datasets
import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from loopback import Fault, LoopbackHub, Request, client_of, environment_of

REPO = "someone/heads"
BRANCH = "feature/a"
HEADS = [f"l{layer:02}h{head:02}{kind}" for layer in range(10) for head in range(15) for kind in "qk"]


def parquet(*numbers: int) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"number": pa.array(numbers, pa.int32())}), file)
    return file.getvalue()


def card(heads: list[str]) -> bytes:
    lines = [f"- config_name: {head}\n  data_files: {head}/data.parquet\n" for head in heads]
    return f"---\nconfigs:\n{''.join(lines)}---\nHeads.\n".encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


FILES = {f"{head}/data.parquet": parquet(i, i + 1) for i, head in enumerate(HEADS)}
FILES["README.md"] = card(HEADS)
FEW = {path: FILES[path] for path in ("README.md", "l00h00q/data.parquet", "l00h00k/data.parquet")}
ATTRIBUTES = ".gitattributes"


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A server with a public and a private repository."""
    with LoopbackHub() as hub:
        hub.add_user("someone", "hf_write", orgs=["acme", "readers:read"])
        hub.add_user("someone", "hf_read", role="read")
        hub.add_user("stranger", "hf_stranger")
        hub.add_repo(REPO)
        hub.add_repo("someone/secret", private=True)
        yield hub


@pytest.fixture
def api(hub: LoopbackHub, tmp_path: Path) -> Iterator[HfApi]:
    with client_of(hub, "hf_write", tmp_path / "cache") as api:
        yield api


@pytest.fixture
def pushed(hub: LoopbackHub, api: HfApi) -> str:
    """A commit of all files on a branch."""
    api.create_branch(REPO, branch=BRANCH, repo_type="dataset")
    head = hub.commit(REPO, BRANCH, FILES)
    hub.forget()
    return head


def push(
    api: HfApi, files: Mapping[str, bytes | None], parent: str | None = None, branch: str = "main"
) -> CommitInfo:
    operations = [
        CommitOperationDelete(path) if data is None else CommitOperationAdd(path, data)
        for path, data in files.items()
    ]
    return api.create_commit(
        REPO,
        operations,
        commit_message="Push",
        commit_description="All of it.",
        repo_type="dataset",
        revision=branch,
        parent_commit=parent,
    )


def asked(hub: LoopbackHub, method: str, part: str) -> list[Request]:
    return [request for request in hub.requests if request.method == method and part in request.path]


def test_a_repository_is_born_with_a_commit(hub: LoopbackHub, api: HfApi) -> None:
    url = api.create_repo("someone/new", repo_type="dataset", private=True)
    assert (url, url.repo_id) == (f"{hub.endpoint}/datasets/someone/new", "someone/new")
    assert hub.is_private("someone/new")
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("new", repo_type="dataset")
    assert api.create_repo("new", repo_type="dataset", exist_ok=True) == url
    (commit,) = api.list_repo_commits("someone/new", repo_type="dataset")
    assert (commit.title, commit.commit_id) == ("initial commit", hub.branches("someone/new")["main"])
    assert list(hub.files("someone/new", "main")) == [ATTRIBUTES]
    assert api.create_repo("acme/new", repo_type="dataset").repo_id == "acme/new"
    assert not hub.is_private("acme/new")
    assert api.repo_exists("acme/new", repo_type="dataset")
    assert not api.repo_exists("acme/new")


def test_branches(hub: LoopbackHub, api: HfApi) -> None:
    first = hub.branches(REPO)["main"]
    second = hub.commit(REPO, "main", {"a": b"a"})
    api.create_branch(REPO, branch=BRANCH, revision=first, repo_type="dataset")
    api.create_branch(REPO, branch="b", repo_type="dataset")
    assert hub.branches(REPO) == {"main": second, BRANCH: first, "b": second}
    refs = api.list_repo_refs(REPO, repo_type="dataset")
    assert {ref.name: ref.target_commit for ref in refs.branches} == hub.branches(REPO)
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_branch(REPO, branch=BRANCH, repo_type="dataset")
    api.create_branch(REPO, branch=BRANCH, repo_type="dataset", exist_ok=True)
    with pytest.raises(RevisionNotFoundError):
        api.create_branch(REPO, branch="c", revision="nothing", repo_type="dataset")
    api.delete_branch(REPO, branch=BRANCH, repo_type="dataset")
    assert set(hub.branches(REPO)) == {"main", "b"}
    assert not api.revision_exists(REPO, BRANCH, repo_type="dataset")


def test_a_push_uploads_only_what_has_changed(hub: LoopbackHub, api: HfApi) -> None:
    api.create_branch(REPO, branch=BRANCH, repo_type="dataset")
    first = push(api, FILES, branch=BRANCH)
    stored = hub.files(REPO, BRANCH)
    assert {path: stored[path] for path in FILES} == FILES
    assert len(asked(hub, "PUT", "/lfs/")) == 300
    assert not any(request.authorization for request in asked(hub, "PUT", "/lfs/"))
    assert hub.uploaded().total() == 300

    changed = {"l03h02k/data.parquet": parquet(7), "README.md": card(HEADS[1:])}
    kept = {path: data for path, data in FILES.items() if not path.startswith("l00h00q/")}
    hub.forget()
    second = push(api, {**kept, **changed, "l00h00q/": None}, first.oid, BRANCH)
    assert [request.path.split("/")[-1] for request in asked(hub, "PUT", "")] == [sha256(parquet(7))]
    assert hub.uploaded().total() == 301
    stored = hub.files(REPO, BRANCH)
    assert stored == {ATTRIBUTES: stored[ATTRIBUTES], **kept, **changed}
    commits = hub.commits(REPO, BRANCH)
    assert [commit.id for commit in commits][:2] == [second.oid, first.oid]
    assert (commits[0].title, commits[0].description) == ("Push", "All of it.")
    assert push(api, {"README.md": card(HEADS[1:])}, branch=BRANCH).oid == second.oid


def test_ids_are_those_of_git(hub: LoopbackHub, api: HfApi) -> None:
    push(api, {"hello": b"hello\n", **FEW})
    regular, lfs = api.get_paths_info(REPO, ["hello", "l00h00q/data.parquet"], repo_type="dataset")
    assert (regular.blob_id, regular.size) == ("ce013625030ba8dba906f756967f9e9ca394464a", 6)
    assert (lfs.lfs.sha256, lfs.lfs.size) == (sha256(FEW[lfs.path]), lfs.size)
    siblings = api.dataset_info(REPO, files_metadata=True).siblings
    assert {sibling.rfilename: sibling.size for sibling in siblings if sibling.rfilename in FEW} == {
        path: len(data) for path, data in FEW.items()
    }


def test_another_writer_comes_first(hub: LoopbackHub, api: HfApi) -> None:
    head = hub.branches(REPO)["main"]

    def interfere(method: str, path: str) -> None:
        if "/commit/" in path:
            hub.before = None
            hub.commit(REPO, "main", {"theirs": b"1"})

    hub.before = interfere
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        push(api, FEW, head)
    assert caught.value.response.status_code == 412
    assert set(hub.files(REPO, "main")) == {ATTRIBUTES, "theirs"}
    push(api, {"theirs": None}, hub.branches(REPO)["main"])
    with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist"):
        push(api, {"theirs": None})
    assert list(hub.files(REPO, "main")) == [ATTRIBUTES]


def test_a_commit_needs_its_objects(hub: LoopbackHub, api: HfApi) -> None:
    operation = CommitOperationAdd("a.parquet", parquet(1))
    operation._upload_mode, operation._is_uploaded = "lfs", True
    with pytest.raises(HfHubHTTPError, match="was not uploaded") as caught:
        api.create_commit(REPO, [operation], commit_message="Push", repo_type="dataset")
    assert caught.value.response.status_code == 400


def test_a_broken_card_is_refused(api: HfApi) -> None:
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        push(api, {"README.md": b"---\nconfigs: [\n---\n"})


def test_download(hub: LoopbackHub, api: HfApi, pushed: str) -> None:
    folder = Path(snapshot_download(REPO, repo_type="dataset", revision=BRANCH))
    assert folder.name == pushed
    assert {path: (folder / path).read_bytes() for path in FILES} == FILES
    assert not any(request.authorization for request in asked(hub, "GET", "/cdn/"))
    path = hf_hub_download(REPO, "README.md", repo_type="dataset", revision=BRANCH)
    assert Path(path).read_bytes() == FILES["README.md"]
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(REPO, "nothing", repo_type="dataset")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "README.md", repo_type="dataset", revision="nothing")


def test_a_tree_comes_in_pages(hub: LoopbackHub, api: HfApi, pushed: str) -> None:
    hub.page_size = 70
    tree = list(api.list_repo_tree(REPO, repo_type="dataset", revision=BRANCH, recursive=True))
    assert len(asked(hub, "GET", "/tree/")) == 9
    assert {entry.path for entry in tree} == {ATTRIBUTES, *FILES, *HEADS}
    (file,) = api.list_repo_tree(REPO, "l00h00q", repo_type="dataset", revision=BRANCH, expand=True)
    assert (file.path, file.last_commit.oid) == ("l00h00q/data.parquet", pushed)
    later = hub.commit(REPO, BRANCH, {"l00h00q/more": b"more"})
    old, new = api.list_repo_tree(REPO, "l00h00q", repo_type="dataset", revision=BRANCH, expand=True)
    assert (old.last_commit.oid, new.last_commit.oid) == (pushed, later)
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(REPO, "nothing", repo_type="dataset"))


def test_a_range(pushed: str) -> None:
    system = HfFileSystem()
    for name in ("README.md", "l00h01k/data.parquet"):
        with system.open(f"datasets/{REPO}/{name}", revision=BRANCH, block_size=64) as file:
            file.seek(10)
            assert file.read(20) == FILES[name][10:30]
            file.seek(-8, os.SEEK_END)
            assert file.read() == FILES[name][-8:]


def test_load_a_head(hub: LoopbackHub, pushed: str) -> None:
    loaded = datasets.load_dataset(REPO, "l00h01k", revision=BRANCH, split="train")
    assert loaded.to_list() == [{"number": 3}, {"number": 4}]
    (fetched,) = asked(hub, "GET", "/cdn/")
    assert fetched.path.endswith(sha256(FILES["l00h01k/data.parquet"]))
    streamed = datasets.load_dataset(REPO, "l00h01q", revision=BRANCH, split="train", streaming=True)
    assert list(streamed) == [{"number": 2}, {"number": 3}]
    assert all(request.path.startswith("/") for request in hub.requests)
    assert {request.status for request in hub.requests} <= {200, 206, 302, 404}


def test_no_other_host_is_reached(hub: LoopbackHub, api: HfApi) -> None:
    hub.commit(REPO, "main", FEW)
    hub.forget()
    assert datasets.load_dataset(REPO, "l00h00k", split="train")["number"][:] == [1, 2]
    assert {r.status for r in hub.requests if not r.path.startswith("/")} == {502}


@pytest.mark.parametrize(
    ("token", "repo", "error", "status"),
    [
        (False, "someone/secret", RepositoryNotFoundError, 401),
        (False, "someone/nothing", RepositoryNotFoundError, 401),
        ("hf_stranger", "someone/secret", RepositoryNotFoundError, 404),
        ("hf_write", "someone/nothing", RepositoryNotFoundError, 404),
        ("hf_bad", REPO, HfHubHTTPError, 401),
    ],
)
def test_not_to_be_seen(
    api: HfApi, token: str | bool, repo: str, error: type[HfHubHTTPError], status: int
) -> None:
    with pytest.raises(error) as caught:
        api.dataset_info(repo, token=token)
    assert (type(caught.value), caught.value.response.status_code) == (error, status)
    with pytest.raises(error):
        api.auth_check(repo, repo_type="dataset", token=token)
    with pytest.raises(error):
        hf_hub_download(repo, ATTRIBUTES, repo_type="dataset", token=token)


def test_rights(hub: LoopbackHub, api: HfApi) -> None:
    for token in ("hf_write", "hf_read"):
        api.auth_check("someone/secret", repo_type="dataset", token=token)
    api.auth_check(REPO, repo_type="dataset", token=False)
    api.auth_check(REPO, repo_type="dataset", write=True)
    hub.add_repo("readers/heads", private=True)
    api.auth_check("readers/heads", repo_type="dataset")
    for token, repo in (("hf_read", REPO), ("hf_stranger", REPO), ("hf_write", "readers/heads")):
        with pytest.raises(HfHubHTTPError, match="Forbidden") as caught:
            api.auth_check(repo, repo_type="dataset", write=True, token=token)
        assert caught.value.response.status_code == 403
    with pytest.raises(HfHubHTTPError, match="Forbidden"):
        push(HfApi(token="hf_read"), FEW)
    assert not asked(hub, "PUT", "")
    with pytest.raises(HfHubHTTPError, match="don't have the rights"):
        api.create_repo("stranger/new", repo_type="dataset")


def test_whoami(hub: LoopbackHub, api: HfApi) -> None:
    writer = api.whoami()
    assert (writer["name"], writer["auth"]["accessToken"]["role"]) == ("someone", "write")
    assert [(org["name"], org["roleInOrg"]) for org in writer["orgs"]] == [
        ("acme", "write"),
        ("readers", "read"),
    ]
    scope = {"entity": {"type": "dataset", "name": REPO}, "permissions": ["repo.write"]}
    hub.add_user("someone", "hf_fine", role="fineGrained", fine_grained={"scoped": [scope]})
    assert api.whoami("hf_fine")["auth"]["accessToken"]["fineGrained"] == {"scoped": [scope]}
    api.auth_check(REPO, repo_type="dataset", write=True, token="hf_fine")
    with pytest.raises(RepositoryNotFoundError):
        api.auth_check("someone/secret", repo_type="dataset", token="hf_fine")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami("hf_bad")


def test_an_error_told_to_the_client(hub: LoopbackHub, api: HfApi) -> None:
    hub.fail(Fault("POST", "/commit/", 503, message="Overloaded", after=1, times=1))
    push(api, {"a": b"a"})
    with pytest.raises(HfHubHTTPError, match="Overloaded") as caught:
        push(api, {"b": b"b"})
    assert caught.value.response.status_code == 503
    push(api, {"c": b"c"})
    hub.fail(Fault("POST", "/commit/", 500, done=True))
    with pytest.raises(HfHubHTTPError):
        push(api, {"d": b"d"})
    assert set(hub.files(REPO, "main")) == {ATTRIBUTES, "a", "c", "d"}
    hub.heal()
    hub.fail(Fault("GET", "/refs", 404, error_code="RepoNotFound", headers={"X-Extra": "1"}))
    with pytest.raises(RepositoryNotFoundError) as missing:
        api.list_repo_refs(REPO, repo_type="dataset")
    assert missing.value.response.headers["X-Extra"] == "1"


@pytest.mark.parametrize(("drop", "landed"), [("before", False), ("after", True)])
def test_a_dropped_commit(hub: LoopbackHub, api: HfApi, drop: str, landed: bool) -> None:
    hub.fail(Fault("POST", "/commit/", drop=drop))
    with pytest.raises(httpx2.TransportError):
        push(api, FEW)
    assert ("README.md" in hub.files(REPO, "main")) == landed
    (request,) = asked(hub, "POST", "/commit/")
    assert request.status is None
    assert (request.n_bytes == int(request.headers["content-length"])) == landed


def test_an_upload_is_tried_again(hub: LoopbackHub, api: HfApi) -> None:
    first, second, third, fourth = (parquet(i) for i in range(4))
    hub.fail(Fault("PUT", sha256(first), drop="before", times=1))
    hub.fail(Fault("PUT", sha256(second), drop="after", times=1))
    hub.fail(Fault("PUT", sha256(third), 503, times=1))
    hub.fail(Fault("POST", "/verify", 429, headers={"Retry-After": "0"}, times=1))
    files = {f"{i}.parquet": data for i, data in enumerate((first, second, third, fourth))}
    push(api, files)
    assert hub.files(REPO, "main") == {ATTRIBUTES: hub.files(REPO, "main")[ATTRIBUTES], **files}
    arrived = {sha256(first): 1, sha256(second): 2, sha256(third): 2, sha256(fourth): 1}
    hub.forget()
    assert hub.uploaded() == arrived


def test_a_download_is_taken_up_again(hub: LoopbackHub, api: HfApi, pushed: str) -> None:
    hub.fail(Fault("GET", "/cdn/", drop="halfway", times=1))
    path = hf_hub_download(REPO, "l00h00q/data.parquet", repo_type="dataset", revision=BRANCH)
    assert Path(path).read_bytes() == FILES["l00h00q/data.parquet"]
    assert [request.status for request in asked(hub, "GET", "/cdn/")] == [200, 200]
    hub.fail(Fault("GET", "/cdn/", 503, times=1))
    with pytest.raises(HfHubHTTPError):
        hf_hub_download(REPO, "l00h00k/data.parquet", repo_type="dataset", revision=BRANCH)


def test_a_delay(hub: LoopbackHub, api: HfApi) -> None:
    hub.fail(Fault("GET", f"{REPO}$", delay=0.3))
    started = time.monotonic()
    api.dataset_info(REPO)
    assert time.monotonic() - started > 0.3
    with pytest.raises(httpx2.ReadTimeout):
        api.dataset_info(REPO, timeout=0.1)


def test_the_server_goes_and_comes_back(hub: LoopbackHub, api: HfApi) -> None:
    push(api, FEW)
    hub.stop()
    with pytest.raises(httpx2.TransportError):
        api.dataset_info(REPO)
    with pytest.raises(httpx2.ConnectError):
        api.dataset_info(REPO)
    hub.start()
    assert api.dataset_info(REPO).sha == hub.branches(REPO)["main"]


def test_objects_in_a_directory(tmp_path: Path) -> None:
    with LoopbackHub(tmp_path / "objects") as hub, client_of(hub, "hf_write", tmp_path) as api:
        hub.add_user("someone", "hf_write")
        hub.add_repo(REPO)
        push(api, FEW)
        names = {sha256(data) for path, data in FEW.items() if path.endswith(".parquet")}
        assert {path.name for path in (tmp_path / "objects").rglob("*") if path.is_file()} == names
        folder = Path(snapshot_download(REPO, repo_type="dataset"))
        assert {path: (folder / path).read_bytes() for path in FEW} == FEW


def test_the_client_is_given_back(hub: LoopbackHub, tmp_path: Path) -> None:
    def state() -> tuple[object, ...]:
        return dict(vars(constants)), dict(vars(datasets.config)), dict(os.environ), HfFileSystem._cache

    before = state()
    with client_of(hub, None, tmp_path) as api:
        assert not constants.HF_HUB_OFFLINE
        assert hub.endpoint == datasets.config.HF_ENDPOINT
        assert api.dataset_info(REPO).sha == hub.branches(REPO)["main"]
        assert hub.requests[-1].authorization is None
    assert state() == before
    assert constants.HF_HUB_OFFLINE


CLIENT = f"""
import datasets, huggingface_hub
api = huggingface_hub.HfApi()
api.create_repo("heads", repo_type="dataset", private=True)
for path in {list(FEW)}:
    api.upload_file(path_or_fileobj=path, path_in_repo=path, repo_id={REPO!r}, repo_type="dataset")
print(datasets.load_dataset({REPO!r}, "l00h00k", split="train")["number"][:])
"""


def test_in_processes_of_their_own(tmp_path: Path) -> None:
    for path, data in FEW.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)
    server = [sys.executable, "-m", "loopback", "--user", "someone", "--token", "hf_write"]
    here = Path(__file__).parent
    with subprocess.Popen(server, cwd=here, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        endpoint = process.stdout.readline().strip()
        environment = os.environ | environment_of(endpoint, "hf_write", tmp_path / "cache")
        client = subprocess.run(
            [sys.executable, "-c", CLIENT],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        process.kill()
    assert client.stdout == "[1, 2]\n", client.stderr
