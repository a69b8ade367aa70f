"""The hub's side of its HTTP protocol, in memory: huggingface_hub itself is the real one."""

import base64
import contextlib
import hashlib
import importlib
import json
from pathlib import Path


class FakeHub:
    """Repositories of files, as the requests of huggingface_hub fill and read them.

    repos: name -> {path: content}. commits: names of the repositories, one of each commit. down: no connection is made.
    refuses: repository -> (status, error code of the hub). asked: paths of all requests.
    """

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []
        self.refuses: dict[str, tuple[int, str]] = {}
        self.asked: list[str] = []
        self.down = False

    def answer(self, request):
        """Response to an httpx request."""
        httpx = _httpx()
        self.asked.append(request.url.path)
        if self.down:
            raise httpx.ConnectError("no route to host")
        parts = request.url.path.strip("/").split("/")
        if parts[:2] == ["api", "validate-yaml"]:
            return httpx.Response(200, json={"errors": [], "warnings": []})
        if parts[:3] == ["api", "repos", "create"]:
            wanted = json.loads(request.content)
            repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            if repo in self.refuses:
                return self._refusal(repo)
            self.repos.setdefault(repo, {})
            return httpx.Response(200, json={"url": f"https://huggingface.co/{repo}", "id": repo})
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repo in self.refuses or repo not in self.repos:
            return self._refusal(repo)
        files = self.repos[repo]
        if parts[0] == "api":
            return self._api(request, repo, files, parts[4:5])
        name = "/".join(parts[4:])
        if parts[3] == "v404":
            return httpx.Response(404, headers={"X-Error-Code": "RevisionNotFound"})
        if name not in files:
            return httpx.Response(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self._commit(repo)})
        headers = {"ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"', "X-Repo-Commit": self._commit(repo)}
        content = b"" if request.method == "HEAD" else files[name]
        return httpx.Response(200, headers=headers | {"Content-Length": str(len(files[name]))}, content=content)

    def _api(self, request, repo, files, what):
        httpx = _httpx()
        if what == ["preupload"]:
            asked = json.loads(request.content)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
            return httpx.Response(200, json={"files": modes})
        if what == ["commit"]:
            for line in map(json.loads, request.content.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.commits.append(repo)
            url = f"https://huggingface.co/{repo}/commit/{self._commit(repo)}"
            return httpx.Response(200, json={"success": True, "commitOid": self._commit(repo), "commitUrl": url})
        if what == ["tree"]:
            tree = [{"type": "file", "path": name, "size": len(c), "oid": "0" * 40} for name, c in files.items()]
            return httpx.Response(200, json=tree)
        siblings = [{"rfilename": name} for name in files]
        return httpx.Response(200, json={"id": repo, "sha": self._commit(repo), "siblings": siblings, "tags": []})

    def _commit(self, repo):
        return hashlib.sha1(f"{repo} {len(self.commits)}".encode()).hexdigest()

    def _refusal(self, repo):
        status, code = self.refuses.get(repo, (404, "RepoNotFound"))
        return _httpx().Response(status, headers={"X-Error-Code": code}, json={"error": code})


def _httpx():
    """The HTTP library that huggingface_hub uses, whose name changes with its version."""
    import huggingface_hub

    return importlib.import_module(type(huggingface_hub.get_session()).__module__.partition(".")[0])


@contextlib.contextmanager
def running(folder: Path, monkeypatch):
    """A hub without repositories, which huggingface_hub talks to meanwhile; its cache is in `folder`, without token."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    hub, httpx = FakeHub(), _httpx()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no_token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between attempts
    transport = httpx.MockTransport(hub.answer)
    huggingface_hub.set_client_factory(lambda: httpx.Client(transport=transport, follow_redirects=True))
    try:
        yield hub
    finally:
        huggingface_hub.set_client_factory(_http.default_client_factory)
