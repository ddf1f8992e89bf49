"""The training server: connects the port, the home, and all components between them.

    socket -> uvicorn -> routes -> ledger -> scheduler -> engine
                            |         +----> journal
                            +-> store

`main` runs it in the foreground until it is stopped. `LocalServer` runs inside another program,
such as a test.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import attrs
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tinkex import config
from tinkex._version import __version__
from tinkex.server import memory
from tinkex.server.audit import Audit
from tinkex.server.auth import LOOPBACK, Keys, Revoked
from tinkex.server.base_models import parse as parse_base_models
from tinkex.server.connections import Connection
from tinkex.server.home import Home, HomeError, ServerFolder
from tinkex.server.http_errors import Refusal
from tinkex.server.journal import Journal
from tinkex.server.ledger import Ledger
from tinkex.server.limits import Limits
from tinkex.server.listening import HttpServer, allow_many_connections, listen, tls_of
from tinkex.server.request_context import Framing, Site, refuse
from tinkex.server.routes import routes
from tinkex.server.scheduler import Scheduler
from tinkex.server.store import Store

logger = logging.getLogger(__name__)

Dialect = Literal["both", "json"]

#: Environment variable with the key of an embedded server; only the parent process knows it.
TOKEN_VARIABLE = "TINKEX_ENGINE_TOKEN"
#: Environment variable with the default home.
HOME_VARIABLE = "TINKEX_HOME"
#: Environment variable with the public address behind a proxy; download links begin with it.
PUBLIC_URL_VARIABLE = "TINKEX_PUBLIC_URL"
#: Seconds between two checks that the parent process is alive.
_PARENT_SECONDS = 0.5
#: Seconds that a shutdown may take before the process is ended anyway.
_SHUTDOWN_SECONDS = 1.5


def make_engine(
    dtype: str = "auto",
    names: Mapping[str, str] | None = None,
    device: str = "auto",
    weights_on_disk: bool = False,
    compiled: bool = True,
) -> Any:
    """Create the real engine; arguments as `main` takes them. Imports torch, which takes
    seconds."""
    from tinkex.engine.engine import Engine

    folder = config.home() if weights_on_disk else None
    return Engine(device=device, dtype=dtype, names=names, weights_folder=folder, compiled=compiled)


class LocalServer:
    """A server on a port. `start` runs it on a new thread, `serve` on the caller's.

    Args:
        home: see `Home`; port: 0 takes a free port; models then do not survive the server.
        base_models: loaded at the start, and listed in this order.
        with_tiny: True if the built-in model "tiny" is available, too.
        engine: creates the engine; called on the compute thread.
        on_failure: called on the compute thread if that fails. The server then refuses every
            operation with the reason until it is stopped.

    Raises:
        HomeError: If the home or the port cannot be used.
    """

    def __init__(
        self,
        home: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        base_models: Sequence[str] = (),
        with_tiny: bool = True,
        keys: Callable[[Home], Keys] = lambda home: Keys.of_one(None),
        dialect: Dialect = "both",
        limits: Limits | None = None,
        engine: Callable[[], Any] = make_engine,
        on_failure: Callable[[], None] = lambda: None,
        certificate: tuple[Path, Path] | None = None,
    ) -> None:
        limits = limits or Limits()
        self._home = Home.open(home)
        accepted = keys(self._home)
        self._tls = None if certificate is None else tls_of(*certificate)
        self._socket = listen(host, port)
        self._open_storage(port, limits)
        self._on_failure = on_failure
        self.scheduler = Scheduler(engine, self._engine_failed)
        self.ledger = Ledger(self.store, self._folder, self._journal, self.scheduler, limits)
        for base_model in base_models:
            self.scheduler.put_chore(partial(self._preload, base_model))
        site = Site(
            self.ledger,
            self.store,
            accepted,
            limits,
            tuple(dict.fromkeys([*base_models, *(["tiny"] if with_tiny else [])])),
            dialect == "both",
            __version__,
            (os.environ.get(PUBLIC_URL_VARIABLE) or "").rstrip("/") or None,
            audit=Audit(self._home.audit_log(port) if port or accepted.several_users else None),
        )
        self._audit = site.audit
        self._tell_users(accepted)
        self.app = make_app(site)
        settings = uvicorn.Config(
            self.app,
            http=Connection.within(limits.head_seconds, limits.answer_seconds),
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=limits.connections,
            backlog=2048,
            timeout_keep_alive=limits.idle_seconds,
            timeout_graceful_shutdown=1,
            lifespan="on",
        )
        self._uvicorn = HttpServer(settings, self.ledger, limits, self._tls)
        self._thread: threading.Thread | None = None

    def _open_storage(self, port: int, limits: Limits) -> None:
        """Lock the server's folder, and open its files. Raises HomeError."""
        try:
            self._folder = self._home.claim(port)
        except HomeError:
            self._socket.close()
            raise
        try:
            self.store = Store(self._home, user_bytes=limits.user_disk_bytes)
            self._clean_up()
            # No client can reconnect to a random free port, so a journal would be useless.
            self._journal = Journal(self._folder.journal) if self._folder.lasting else None
        except BaseException:
            self._folder.release()
            self._socket.close()
            raise

    @property
    def url(self) -> str:
        host, port = self._socket.getsockname()[:2]
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    def _engine_failed(self) -> None:
        self.ledger.shared.on_loop(self.ledger.release)
        self._on_failure()

    def _preload(self, base_model: str, engine: Any) -> None:
        self.ledger.workshop.loader.preload(engine, base_model, self.scheduler.put_chore)

    def _tell_users(self, keys: Keys) -> None:
        """Log the ids of users' keys, and the owners whose objects no key can reach."""
        for line in keys.describe():
            logger.info("Keys of %s", line)
        hidden = [row[0] for row in self.store.owners() if row[0] not in keys.owners]
        if hidden:
            logger.warning(
                "The home holds work of %s, which none of the keys gives access to; "
                "`tinkex home adopt` gives it to a user.",
                ", ".join(hidden[:5]),
            )

    def _clean_up(self) -> None:
        """Delete files of dead servers that no server can take over."""
        for name in self._home.purge_dead(self.store.bury_server):
            logger.info("Removed the files of the dead server %s.", name)
        self.store.checkpoints.delete_expired()
        self.store.checkpoints.delete_orphans()

    def serve(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop` is called. `on_ready` is called when the server accepts requests."""
        allow_many_connections()
        asyncio.run(self._serve(on_ready))
        self._close()

    async def _serve(self, on_ready: Callable[[], None]) -> None:
        ready = asyncio.ensure_future(self._when_started(on_ready))
        try:
            await self._uvicorn.serve([self._socket])
        finally:
            ready.cancel()

    async def _when_started(self, on_ready: Callable[[], None]) -> None:
        while not self._uvicorn.started:
            await asyncio.sleep(0.005)
        on_ready()

    def stop(self) -> None:
        """Ask the server to stop. Can be called from any thread."""
        self._uvicorn.stop()

    def start(self) -> None:
        """Serve on a new thread. Returns when the server accepts requests."""
        ready = threading.Event()
        self._thread = threading.Thread(
            target=self.serve, args=(ready.set,), name="tinkex-server", daemon=True
        )
        self._thread.start()
        ready.wait()

    def close(self) -> None:
        """Stop and wait until the server has ended."""
        self.stop()
        if self._thread is not None:
            self._thread.join()

    def _close(self) -> None:
        computing = not self.scheduler.close(0.5)
        if self._journal is not None:
            self._journal.close()
        if not computing:
            self.store.close()
        self._audit.close()
        self._folder.release()
        self._socket.close()

    def __enter__(self) -> LocalServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def make_app(site: Site) -> Starlette:
    """Create the application; it starts and stops the ledger and the scheduler."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        site.ledger.start()
        site.ledger.shared.scheduler.start()
        yield

    app = Starlette(
        routes=routes(),
        lifespan=lifespan,
        exception_handlers={404: _no_such_endpoint, 405: _wrong_method},
    )
    app.router.redirect_slashes = False
    app.add_middleware(Framing)
    app.state.site = site
    return app


async def _no_such_endpoint(request: Request, exc: Exception) -> Response:
    sentence = f"this server does not offer {request.method} {request.url.path[:200]!r}."
    return refuse(Refusal(404, sentence))


async def _wrong_method(request: Request, exc: Exception) -> Response:
    headers = dict(exc.headers or {}) if isinstance(exc, HTTPException) else {}
    allowed = headers.get("Allow", "another method")
    sentence = f"{request.url.path[:200]!r} accepts {allowed}, not {request.method}."
    return refuse(Refusal(405, sentence, headers))


def main(
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    home: Path | None = None,
    base_models: Sequence[str] = (),
    with_tiny: bool = True,
    api_keys: Sequence[str] = (),
    dialect: Dialect = "both",
    announce: Path | None = None,
    parent_pid: int | None = None,
    limits: Limits | None = None,
    user_models: int | None = None,
    user_queue: int | None = None,
    user_disk: int | None = None,
    drain: float | None = None,
    ssl_certfile: Path | None = None,
    ssl_keyfile: Path | None = None,
    session_timeout: float | None = None,
    device: str = "auto",
    dtype: str = "auto",
    weights_on_disk: bool = False,
    compiled: bool = True,
    engine: Callable[[], Any] | None = None,
    on_ready: Callable[[str], None] = lambda url: None,
) -> int:
    """Run a server until SIGTERM, Ctrl-C, or the end of the parent process.

    Args:
        home: default TINKEX_HOME, else ~/.tinkex.
        base_models: models to load at the start: names, directories, or NAME=DIRECTORY.
        with_tiny: True if the built-in model "tiny" is available, too.
        api_keys: "name=key" for each key of a user, or a key alone. Without keys, every client on
            loopback is the user "local"; on another address a key is generated and printed once.
        announce: file to write {"url", "pid", "version"} to when the server accepts requests.
        parent_pid: the server ends when this process ends, even if it is killed.
        user_models, user_queue, user_disk, drain: as in `Limits`.
        ssl_certfile, ssl_keyfile: for TLS: the certificate chain and its key, as PEM files.
        session_timeout: seconds without a request after which a session ends; default as in
            *limits*.
        device: "auto", "cpu", "cuda", ...
        dtype: number type of base weights: "auto", "float32" or "bfloat16"; "int8" to sample only.
        weights_on_disk: True if base weights that do not fit in memory may stay on disk.
        compiled: False decodes and attends with PyTorch alone, even where there is a C compiler.
        engine: makes the engine; None is `make_engine` with *device* and *dtype*.
        on_ready: called with the server's address when it accepts requests.

    Returns:
        The exit code: 0, or 1 if the server could not start (stderr says why).
    """
    _prepare_process()
    made_up = _made_up_key(host, api_keys)
    if home is not None:  # the engine keeps the models that it fetches there
        os.environ[HOME_VARIABLE] = str(home.expanduser().absolute())
    given: dict[str, Any] = {
        "user_models": user_models,
        "user_queue": user_queue,
        "user_disk_bytes": user_disk,
        "drain_seconds": drain,
        "session_seconds": session_timeout,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    try:
        models, names = parse_base_models(base_models)
        server = LocalServer(
            home or config.home(),
            host=host,
            port=port,
            base_models=models,
            with_tiny=with_tiny,
            keys=lambda home: _keys(home, api_keys, made_up),
            dialect=dialect,
            limits=attrs.evolve(limits or Limits(), **chosen),
            engine=engine or partial(make_engine, dtype, names, device, weights_on_disk, compiled),
            on_failure=lambda: server.stop(),
            certificate=_certificate(ssl_certfile, ssl_keyfile),
        )
    except (HomeError, OSError, ValueError) as exc:
        print(f"tinkex serve: {exc}", file=sys.stderr)
        return 1
    if parent_pid is not None:
        watch = threading.Thread(
            target=_end_with, args=(parent_pid, server), name="tinkex-parent", daemon=True
        )
        watch.start()

    def ready() -> None:
        if announce is not None:
            _announce(announce, server.url)
        print(server.url, flush=True)
        if made_up is not None:
            print(f"API key (not shown again): {made_up}", flush=True)
        on_ready(server.url)

    server.serve(ready)
    failure = server.scheduler.failure
    if failure is not None:
        print(f"tinkex serve: the engine is not running: {failure}", file=sys.stderr)
    return _leave(server, 0 if failure is None else 1, at_once=parent_pid is not None)


def _certificate(certificate: Path | None, key: Path | None) -> tuple[Path, Path] | None:
    if certificate is None and key is None:
        return None
    if certificate is None:
        raise HomeError("--ssl-keyfile needs --ssl-certfile, the certificate that the key is of.")
    return certificate, key or certificate


def _prepare_process() -> None:
    """Settings of the whole process: log, umask, thread switch interval, malloc arenas."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    os.umask(0o077)  # files 0600, folders 0700: training data and weights are private
    sys.setswitchinterval(0.001)  # longest wait of the event loop for a busy compute thread
    memory.use_one_arena()


def _made_up_key(host: str, api_keys: Sequence[str]) -> str | None:
    if host in LOOPBACK or api_keys or os.environ.get(TOKEN_VARIABLE):
        return None
    return f"tml-{secrets.token_urlsafe(24)}"


def _keys(home: Home, api_keys: Sequence[str], made_up: str | None) -> Keys:
    if api_keys:
        try:
            return Keys.of_users(api_keys, home.secret(), Revoked(home.revoked))
        except ValueError as exc:
            raise HomeError(f"--api-key: {exc}") from exc
    # Removed from the environment, so that no child process and no log shows it.
    return Keys.of_one(os.environ.pop(TOKEN_VARIABLE, None) or made_up)


def _announce(path: Path, url: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps({"url": url, "pid": os.getpid(), "version": __version__})
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _end_with(parent_pid: int, server: LocalServer) -> None:
    while os.getppid() == parent_pid:
        time.sleep(_PARENT_SECONDS)
    server.stop()
    time.sleep(_SHUTDOWN_SECONDS)
    os._exit(0)


def _leave(server: LocalServer, code: int, *, at_once: bool) -> int:
    """Return *code*, or end the process with it if the compute thread is still busy.

    The thread cannot be interrupted, and the interpreter would wait for it or crash under it.

    Args:
        at_once: end the process in any case: torch needs half a second to clean up, for which the
            parent would wait.
    """
    if at_once or not server.scheduler.close(0):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


__all__ = ["HomeError", "LocalServer", "ServerFolder", "main", "make_app"]
