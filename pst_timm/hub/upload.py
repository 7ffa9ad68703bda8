"""The way to a repository on the Hub, and what may go wrong on it, in words."""
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Optional

from huggingface_hub import CommitOperationAdd, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,  # of the client's HTTP library, whichever it is
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pst_timm.checkpoints.folder import CONFIG, FILES
from pst_timm.checkpoints.reading import PICKLES
from pst_timm.utils.errors import PSTError, Unavailable
from pst_timm.utils.waiting import SLOWEST, TIMEOUT, Silent, in_time

__all__ = ['Upload']

_logger = logging.getLogger(__name__)


class Upload:
    """The upload of a model to one repository."""

    def __init__(
            self,
            repo_id: str,
            private: bool = False,
            revision: Optional[str] = None,
            token: Optional[str] = None,
            attempts: int = 3,
            timeout: float = TIMEOUT,
    ):
        """
        Args:
            repo_id: Repository, 'org/name'.
            private: Whether a new repository is private.
            revision: Branch, the main one if None.
            token: Access token, the one of `hf auth login` or `HF_TOKEN` if None.
            attempts: How often the upload is tried.
            timeout: Seconds to wait for an answer of the Hub; files have the time beside that they take at 128 KiB/s.

        Raises:
            PSTError: If there is no token.
        """
        self.repo_id = repo_id
        self.private = private
        self.revision = revision
        self.attempts = attempts
        self.timeout = timeout
        self.token = token or get_token()
        if not self.token:
            raise PSTError(
                'There is no access token for the Hub: run `hf auth login`, or set HF_TOKEN, with a token that may '
                'write.')
        self.api = HfApi(token=self.token)

    def check_access(self, arch: str) -> None:
        """Make sure, before any work, that the token may write there and that nothing foreign is overwritten."""
        owner = self.repo_id.split('/')[0]
        me = self._ask(self.api.whoami)
        namespaces = [me['name'], *(org['name'] for org in me.get('orgs', []))]
        if owner not in namespaces:
            raise PSTError(
                f'{self.repo_id} is not ours: the token is that of {me["name"]}, who may write to '
                f'{", ".join(namespaces)}. Name another repository, or use a token of a member of {owner}.')
        try:
            info = self._ask(lambda: self.api.model_info(self.repo_id, revision=self.revision))
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return
        there = {f.rfilename for f in info.siblings} - {'.gitattributes'}
        names = there - set(FILES)
        pickles = sorted(n for n in names if n.endswith(PICKLES))
        if pickles:
            raise PSTError(
                f'{self.repo_id} holds {pickles[0]}, a pickle, which could be loaded in place of the published '
                f'weights: delete it there, or name another repository.')
        found = self._architecture_there()
        if found not in (None, arch):
            raise PSTError(
                f'{self.repo_id} holds a model of another architecture ({found}, not {arch}): name another '
                f'repository.')
        replaced = [name for name in FILES if name in there]
        if replaced:
            kept = f' What else is there ({", ".join(sorted(names)[:5])}) stays as it is.' if names else ''
            _logger.warning(
                f'{self.repo_id} is there already: its {", ".join(replaced)} will be replaced; the versions of now '
                f'stay in its history, as commit {str(info.sha)[:12]}.{kept}')

    def _architecture_there(self) -> Optional[str]:
        with tempfile.TemporaryDirectory() as cache:
            try:
                path = self._ask(lambda: hf_hub_download(
                    self.repo_id, CONFIG, revision=self.revision, token=self.token, cache_dir=cache))
                return json.loads(Path(path).read_text(encoding='utf-8')).get('architecture', 'unknown')
            except EntryNotFoundError:
                return None
            except (ValueError, AttributeError):
                return 'unknown'

    def send(self, folder: Path) -> str:
        """Upload the three files in one commit; returns its address."""
        self._ask(lambda: self.api.create_repo(self.repo_id, private=self.private, exist_ok=True))
        if self.revision and self.revision != 'main':
            self._ask(lambda: self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True))
        for attempt in range(1, self.attempts):
            try:
                return self._commit(folder)
            except Silent:
                raise
            except Unavailable as e:
                wait = 2 ** attempt
                _logger.warning(f'{e} Trying again in {wait} s.')
                time.sleep(wait)
        try:
            return self._commit(folder)
        except Unavailable as e:
            raise Unavailable(
                f'{e} Nothing is half published, and what has arrived is not sent again: run the same command again to '
                f'go on.') from e

    def _commit(self, folder: Path) -> str:
        # anew each time: the Hub then tells what has arrived, and whether the commit itself was made
        size = sum((folder / name).stat().st_size for name in FILES)
        operations = [CommitOperationAdd(name, str(folder / name)) for name in FILES]
        return str(self._ask(lambda: self.api.create_commit(
            self.repo_id, operations, commit_message='Publish model', revision=self.revision), size).commit_url)

    def _ask(self, call: Callable[[], Any], size: int = 0) -> Any:
        """Ask the Hub; answers that the caller may expect pass, all others become words for the user.

        Args:
            call: What asks.
            size: Bytes that are sent.
        """
        try:
            seconds = self.timeout + size / SLOWEST
            return in_time(
                call, seconds,
                f'The Hub at {self.api.endpoint} did not answer within {seconds:.0f} s: try again later, or wait '
                f'longer with --timeout.')
        except Silent:
            raise
        except OfflineModeIsEnabled as e:
            raise Unavailable('The Hub is not asked in offline mode: unset HF_HUB_OFFLINE.') from e
        except (HTTPError, OSError, RuntimeError) as e:
            # an upload wraps what went wrong
            cause = e.__cause__ if isinstance(e, RuntimeError) and e.__cause__ is not None else e
            expected = (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError)
            if isinstance(cause, HfHubHTTPError):
                if isinstance(cause, expected) and cause.response.status_code == 404:
                    raise
                raise self._refused(cause.response.status_code) from e
            raise Unavailable(f'The Hub at {self.api.endpoint} cannot be reached ({cause}).') from e
        except ValueError as e:
            raise PSTError(f'The Hub does not accept what was sent: {e}') from e

    def _refused(self, status: int) -> PSTError:
        if status == 401:
            return PSTError(
                'The Hub does not accept the access token: run `hf auth login` again, or correct HF_TOKEN.')
        if status == 403:
            return PSTError(
                f'The token may not write to {self.repo_id}: it needs the role "write", and its owner the right to '
                f'write there.')
        if status == 404:
            return PSTError(f'The Hub at {self.api.endpoint} knows no repository or branch of that name.')
        if status in (409, 412):
            return PSTError(f'{self.repo_id} was changed by someone else at the same time: run the command again.')
        if status == 422:
            return PSTError(
                'The Hub received other bytes than were sent (wrong hash): check the disk and the network, and run the '
                'command again.')
        if status == 429:
            return Unavailable('The Hub wants fewer requests (rate limit): wait some minutes.')
        if status >= 500:
            return Unavailable(f'The Hub has a fault of its own (HTTP {status}).')
        return PSTError(f'The Hub refused the request (HTTP {status}).')
