"""A small Hub on the loopback address, for the real `huggingface_hub` client.

It speaks what publishing and loading a model needs: who am I, repositories and branches, preupload, LFS batch, upload
and verification, commits, and files by revision with ETag, size and commit headers. What it gets it keeps on disk:
blobs by their hash, and a JSON file of branches and commits for each repository. It can be told to fail, see `Failure`.

    with HubServer(folder) as hub:
        hub.add_user('alice', token='hf_alice', orgs=('acme',))
        os.environ.update(hub.environment(cache, token='hf_alice'))
"""
import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple
from urllib.parse import parse_qs, unquote, urlsplit

TEXT = ('.json', '.md', '.txt', '.gitattributes')
MESSAGES = {
    401: 'Invalid credentials in Authorization header', 403: 'You have no write access', 404: 'Not found',
    409: 'You already created this model repo', 422: 'The content does not match its hash', 429: 'Too many requests',
    500: 'Internal server error',
}


@dataclass
class Failure:
    """What goes wrong, for some requests, some times."""
    pattern: str
    """Regular expression for method and path, such as 'PUT /lfs/'."""
    kind: Any
    """HTTP status; 'drop': the connection breaks in the middle of the body; 'corrupt': a byte of the body is wrong;
    'truncate': the download ends early and says so; 'lost': the commit is made, but its answer does not arrive;
    'stall': there is no answer at all."""
    times: int = 10 ** 9
    seen: int = 0


@dataclass
class Repository:
    """Branches and commits of a repository."""
    private: bool = False
    branches: Dict[str, str] = field(default_factory=dict)
    commits: Dict[str, Dict[str, Any]] = field(default_factory=dict)

    def files(self, revision: str) -> Optional[Dict[str, Dict[str, Any]]]:
        commit = self.commits.get(self.branches.get(revision, revision))
        return None if commit is None else commit['files']


class HubServer:
    """The server; a context manager."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.blobs = self.folder / 'blobs'
        self.blobs.mkdir(parents=True)
        self.users: Dict[str, Tuple[str, Sequence[str]]] = {}
        self.repositories: Dict[str, Repository] = {}
        self.failures: List[Failure] = []
        self.requests: List[str] = []
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self._server.server_port}'

    def __enter__(self) -> 'HubServer':
        self._thread.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, cache: Path, token: str = '') -> Dict[str, str]:
        """Variables that lead the client here."""
        return {
            'HF_ENDPOINT': self.url, 'HF_HOME': str(cache), 'HF_HUB_CACHE': str(cache / 'hub'), 'HF_TOKEN': token,
            'HF_TOKEN_PATH': str(cache / 'no-token'), 'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_TELEMETRY': '1',
            'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'HF_HUB_OFFLINE': '0',
        }

    def add_user(self, name: str, token: str, orgs: Sequence[str] = ()) -> None:
        self.users[token] = name, orgs

    def fail(self, pattern: str, kind: Any, times: int = 10 ** 9) -> Failure:
        self.failures.append(Failure(pattern, kind, times))
        return self.failures[-1]

    def count(self, pattern: str) -> int:
        """Number of requests that were made so far."""
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    def failure_for(self, request: str) -> Optional[Any]:
        with self.lock:
            for failure in self.failures:
                if failure.seen < failure.times and re.search(failure.pattern, request):
                    failure.seen += 1
                    return failure.kind
        return None

    def create(self, repo_id: str, private: bool = False) -> None:
        with self.lock:
            self.repositories[repo_id] = Repository(private)
            self.commit(repo_id, 'main', 'initial commit', {'.gitattributes': b'*.safetensors filter=lfs\n'})

    def commit(
            self,
            repo_id: str,
            branch: str,
            summary: str,
            added: Dict[str, Any],
            deleted: Sequence[str] = (),
    ) -> str:
        """Add files (bytes, or the hash of an uploaded blob) to a branch; returns the commit."""
        with self.lock:
            repository = self.repositories[repo_id]
            files = dict(repository.files(branch) or {})
            for path in deleted:
                files.pop(path)
            for path, content in added.items():
                if isinstance(content, bytes):
                    sha = self.store(content)
                    git = hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()
                    files[path] = {'blob': sha, 'oid': git, 'size': len(content), 'lfs': False}
                else:
                    files[path] = {
                        'blob': content, 'oid': content, 'size': (self.blobs / content).stat().st_size, 'lfs': True}
            parent = repository.branches.get(branch)
            text = json.dumps([parent, summary, files], sort_keys=True)
            oid = hashlib.sha1(text.encode()).hexdigest()
            repository.commits[oid] = {'parent': parent, 'summary': summary, 'files': files}
            repository.branches[branch] = oid
            self.save(repo_id)
            return oid

    def save(self, repo_id: str) -> None:
        path = self.folder / 'repositories' / f'{repo_id}.json'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(vars(self.repositories[repo_id]), indent=2))

    def store(self, content: bytes) -> str:
        sha = hashlib.sha256(content).hexdigest()
        (self.blobs / sha).write_bytes(content)
        return sha

    def read(self, repo_id: str, path: str, revision: str = 'main') -> bytes:
        return (self.blobs / self.repositories[repo_id].files(revision)[path]['blob']).read_bytes()

    def names(self, repo_id: str, revision: str = 'main') -> List[str]:
        """Files of a revision, without .gitattributes; empty if there is no such repository."""
        repository = self.repositories.get(repo_id)
        return sorted(set(repository.files(revision) or ()) - {'.gitattributes'}) if repository else []


class _Refusal(Exception):
    def __init__(self, status: int, code: str = '', message: str = ''):
        self.status, self.code, self.message = status, code, message or MESSAGES[status]


ROUTES = (
    ('GET', r'/api/whoami-v2', 'whoami'),
    ('POST', r'/api/repos/create', 'create_repository'),
    ('POST', r'/api/validate-yaml', 'validate_card'),
    ('GET', r'/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?', 'repository_info'),
    ('POST', r'/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)', 'create_branch'),
    ('POST', r'/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)', 'preupload'),
    ('POST', r'/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)', 'receive_commit'),
    ('POST', r'/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch', 'lfs_batch'),
    ('PUT', r'/lfs/(?P<oid>[0-9a-f]{64})', 'lfs_upload'),
    ('POST', r'/lfs/verify', 'lfs_verify'),
    ('GET', r'/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)', 'resolve'),
    ('HEAD', r'/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)', 'resolve'),
)


def _damage(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def log_message(self, *args: Any) -> None:
        pass

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        request = f'{self.command} {url.path}'
        self.hub.requests.append(request)
        self.query = parse_qs(url.query)
        self.kind = self.hub.failure_for(request)
        self.length = int(self.headers.get('Content-Length') or 0)
        with contextlib.suppress(ConnectionError):
            if self.kind == 'stall':
                self.hub.closing.wait()
                self.break_connection()
                return
            if self.kind == 'drop' and self.command in ('PUT', 'POST'):
                self.rfile.read(self.length // 2)
                self.break_connection()
                return
            self.body = self.read_body()
            try:
                if isinstance(self.kind, int):
                    raise _Refusal(self.kind)
                for method, pattern, name in ROUTES:
                    match = re.fullmatch(pattern, url.path)
                    if method == self.command and match:
                        getattr(self, name)(**{k: v and unquote(v) for k, v in match.groupdict().items()})
                        return
                raise _Refusal(404)
            except _Refusal as e:
                headers = {'X-Error-Message': e.message}
                if e.code:
                    headers['X-Error-Code'] = e.code
                if e.status == 429:
                    headers['Retry-After'] = '0'
                self.answer({'error': e.message}, e.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_body(self) -> bytes:
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(self.length)
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(chunks)

    def break_connection(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, content: Any, status: int = 200, headers: Optional[Dict[str, str]] = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    # who may do what

    def user(self) -> Tuple[str, Sequence[str]]:
        token = (self.headers.get('Authorization') or '').removeprefix('Bearer ')
        if token not in self.hub.users:
            raise _Refusal(401)
        return self.hub.users[token]

    def may_write(self, repo: str) -> bool:
        name, orgs = self.user()
        return repo.split('/')[0] in (name, *orgs)

    def writable(self, repo: str) -> Repository:
        found = self.repository(repo)
        if not self.may_write(repo):
            raise _Refusal(403)
        return found

    def repository(self, repo: str) -> Repository:
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not self.may_write(repo)):
            raise _Refusal(404, 'RepoNotFound', 'Repository not found')
        return found

    def whoami(self) -> None:
        name, orgs = self.user()
        self.answer({'type': 'user', 'name': name, 'orgs': [{'name': org, 'roleInOrg': 'write'} for org in orgs]})

    # repositories and their branches

    def create_repository(self) -> None:
        wanted = json.loads(self.body)
        repo = f'{wanted["organization"] or self.user()[0]}/{wanted["name"]}'
        if not self.may_write(repo):
            raise _Refusal(403)
        body = {'url': f'{self.hub.url}/{repo}', 'name': repo}
        if repo in self.hub.repositories:
            self.answer(dict(body, error=MESSAGES[409]), 409, {'X-Error-Message': MESSAGES[409]})
            return
        self.hub.create(repo, wanted.get('visibility') == 'private' or bool(wanted.get('private')))
        self.answer(body)

    def repository_info(self, repo: str, revision: Optional[str] = None) -> None:
        found = self.repository(repo)
        files = found.files(revision or 'main')
        if files is None:
            raise _Refusal(404, 'RevisionNotFound', 'Invalid rev id')
        revision = revision or 'main'
        self.answer({
            'id': repo, 'modelId': repo, 'private': found.private, 'sha': found.branches.get(revision, revision),
            'siblings': [{'rfilename': path} for path in files],
        })

    def create_branch(self, repo: str, revision: str) -> None:
        found = self.writable(repo)
        if revision in found.branches:
            raise _Refusal(409, message='Reference already exists')
        found.branches[revision] = found.branches['main']
        self.hub.save(repo)
        self.answer({})

    # uploads and commits

    def validate_card(self) -> None:
        content = json.loads(self.body)['content']
        if not re.match(r'---\n.+?\n---\n', content, re.DOTALL):
            self.answer({'errors': [{'message': 'metadata is missing'}], 'warnings': []}, 400)
            return
        self.answer({'errors': [], 'warnings': []})

    def preupload(self, repo: str, revision: str) -> None:
        files = self.writable(repo).files(revision)
        if files is None:
            raise _Refusal(404, 'RevisionNotFound', 'Invalid rev id')
        self.answer({'files': [
            {
                'path': f['path'], 'shouldIgnore': False, 'oid': files.get(f['path'], {}).get('oid'),
                'uploadMode': 'regular' if f['path'].endswith(TEXT) else 'lfs',
            } for f in json.loads(self.body)['files']
        ]})

    def lfs_batch(self, repo: str) -> None:
        self.writable(repo)
        objects = []
        for wanted in json.loads(self.body)['objects']:
            entry = {'oid': wanted['oid'], 'size': wanted['size']}
            if not (self.hub.blobs / wanted['oid']).exists():
                entry['actions'] = {
                    'upload': {'href': f'{self.hub.url}/lfs/{wanted["oid"]}'},
                    'verify': {'href': f'{self.hub.url}/lfs/verify'},
                }
            objects.append(entry)
        self.answer({'transfer': 'basic', 'objects': objects})

    def lfs_upload(self, oid: str) -> None:
        if self.kind == 'corrupt':
            self.body = _damage(self.body)
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refusal(422)
        self.hub.store(self.body)
        self.answer({})

    def lfs_verify(self) -> None:
        wanted = json.loads(self.body)
        blob = self.hub.blobs / wanted['oid']
        if not blob.exists() or blob.stat().st_size != wanted['size']:
            raise _Refusal(422)
        self.answer({})

    def receive_commit(self, repo: str, revision: str) -> None:
        found = self.writable(repo)
        if revision not in found.branches:
            raise _Refusal(404, 'RevisionNotFound', 'Invalid rev id')
        added, deleted, summary = {}, [], ''
        for item in map(json.loads, self.body.splitlines()):
            value = item['value']
            if item['key'] == 'header':
                summary = value['summary']
                if value.get('parentCommit', found.branches[revision]) != found.branches[revision]:
                    raise _Refusal(409, message='The branch has moved on')
            elif item['key'] == 'file':
                added[value['path']] = base64.b64decode(value['content'])
            elif item['key'] == 'lfsFile':
                if not (self.hub.blobs / value['oid']).exists():
                    raise _Refusal(422)
                added[value['path']] = value['oid']
            elif item['key'] == 'deletedFile':
                deleted.append(value['path'])
        oid = self.hub.commit(repo, revision, summary, added, deleted)
        if self.kind == 'lost':
            self.break_connection()
            return
        self.answer({'commitUrl': f'{self.hub.url}/{repo}/commit/{oid}', 'commitOid': oid, 'success': True})

    # downloads

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self.repository(repo)
        files = found.files(revision)
        if files is None:
            raise _Refusal(404, 'RevisionNotFound', 'Invalid rev id')
        headers = {'X-Repo-Commit': found.branches.get(revision, revision)}
        if path not in files:
            headers.update({'X-Error-Code': 'EntryNotFound', 'X-Error-Message': 'Entry not found'})
            self.answer({'error': 'Entry not found'}, 404, headers)
            return
        entry = files[path]
        content = (self.hub.blobs / entry['blob']).read_bytes()
        headers.update({'ETag': f'"{entry["oid"]}"', 'Accept-Ranges': 'bytes'})
        if entry['lfs']:
            headers.update({'X-Linked-Etag': f'"{entry["oid"]}"', 'X-Linked-Size': str(entry['size'])})
        status = 200
        if wanted := re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range') or ''):
            start = int(wanted[1])
            headers['Content-Range'] = f'bytes {start}-{len(content) - 1}/{len(content)}'
            content, status = content[start:], 206
        if self.command == 'GET':
            if self.kind == 'corrupt':
                content = _damage(content)
            elif self.kind == 'truncate':
                content = content[:len(content) // 2]
            elif self.kind == 'drop':
                self.send_response(status)
                for key, value in {**headers, 'Content-Length': str(len(content))}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(content[:len(content) // 2])
                self.wfile.flush()
                self.break_connection()
                return
        self.answer(content, status, headers)
