"""An adapter for requests with a quick path: one write for a small request, one read per response.

The quick path is for the most frequent exchange: a request in one piece and a response of known
length, on a connection of urllib3's own classes. Everything else (proxies, cookies, responses that
are chunked, compressed or without a length, and the connection classes of a mock such as vcrpy)
takes the normal path through urllib3 and http.client. Both apply `ExchangeLimits` if their timeout
is one.

Private names of urllib3 and requests are used only in this module, after a self-test: if it fails
with some version, every exchange takes the normal path. Does not know the API. One long module,
because both paths must return the same and are easier to compare side by side.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import http.client
import ipaddress
import logging
import re
import socket
import ssl
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import attrs
import requests
import urllib3
from requests.structures import CaseInsensitiveDict
from urllib3.util.ssl_match_hostname import CertificateError

from tinkex.runtime.exchange_limits import ExchangeLimits, UnusableAnswerError, reader
from tinkex.runtime.executor import on_daemon_thread

logger = logging.getLogger("tinkex")

#: A body of up to this many bytes is written together with its head.
SMALL = 1 << 16
#: Largest Content-Length that is read in one piece, in bytes.
LONGEST = 1 << 30
#: Bytes of the first read of a response, which is all of most responses.
START = 1 << 14
#: Bytes of each further read.
PIECE = 1 << 16

#: Characters forbidden in a request's target: they would end it or start another line.
_UNSAFE = re.compile(r"[^\x21-\x7e]")
#: A header's continuation on the next line.
_FOLDED = re.compile(r"\r?\n[ \t]+")


@attrs.frozen(eq=False)
class Reply:
    """A response that was read completely on the quick path."""

    status: int
    headers: CaseInsensitiveDict[str]
    content: bytes


class KeptConnections(requests.adapters.HTTPAdapter):
    """The adapter of requests, with a quick path, on connections with limits that can be
    interrupted."""

    def __init__(self, **options: Any) -> None:
        self._pools: dict[tuple[Any, ...], Any] = {}
        super().__init__(**options)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        _use_own_pools(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options)
        _use_own_pools(manager)
        return manager

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> requests.Response:
        limits = timeout if isinstance(timeout, ExchangeLimits) else None
        _this_thread.limits, _this_thread.is_stream = limits, stream
        try:
            response = super().send(request, stream, timeout, *args, **kwargs)
            if limits is not None and not stream:
                read_within(response, limits)
            return response
        finally:
            _this_thread.limits, _this_thread.is_stream = None, False

    def get_connection_with_tls_context(
        self,
        request: requests.PreparedRequest,
        verify: bool | str | None,
        proxies: Mapping[str, str] | None = None,
        cert: Any = None,
    ) -> Any:
        """The pool for *request*, cached: urllib3 would rebuild its key for each request."""
        if proxies or cert:
            return super().get_connection_with_tls_context(request, verify, proxies, cert)
        scheme, _, rest = str(request.url).partition("://")
        key = (scheme, rest.split("/", 1)[0], verify)
        pool = self._pools.get(key)
        if pool is None or pool.pool is None:  # none yet, or the manager has closed it
            pool = super().get_connection_with_tls_context(request, verify, proxies, cert)
            self._pools[key] = pool
        return pool

    def request_url(
        self, request: requests.PreparedRequest, proxies: Mapping[str, str] | None
    ) -> str:
        return super().request_url(request, proxies) if proxies else request.path_url

    def build_response(self, req: requests.PreparedRequest, resp: Any) -> requests.Response:
        if not isinstance(resp, Reply):
            return super().build_response(req, resp)
        response = requests.Response()
        response.status_code = resp.status
        response.headers = resp.headers
        response.url = str(req.url)
        response.request = req
        # The body has been read; the public API would copy it in pieces of ten kilobytes.
        response._content = resp.content
        return response

    def close(self) -> None:
        self._pools.clear()
        super().close()


def _use_own_pools(manager: Any) -> None:
    if quick_path_works():
        manager.pool_classes_by_scheme = {"http": _Pool, "https": _PoolTLS}


def read_within(response: requests.Response, limits: ExchangeLimits) -> requests.Response:
    """Read and decompress the body of *response* within *limits*.

    Raises:
        requests.RequestException: If it breaks off, takes too long or is too large.
    """
    if response._content is not False:  # type: ignore[comparison-overlap]  # read already
        return response
    pieces, size = [], 0
    try:
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in _EXPECTED_ENCODINGS:
            raise UnusableAnswerError(f"the Content-Encoding {encoding!r} was not asked for")
        for piece in response.iter_content(PIECE):
            pieces.append(piece)
            size += len(piece)
            limits.received = max(limits.received, size)
            limits.expect(size)
    except BaseException as exc:
        response.close()
        if isinstance(exc, UnusableAnswerError):
            raise requests.ConnectionError(exc, request=response.request) from exc
        raise
    response._content = b"".join(pieces)
    return response


_EXPECTED_ENCODINGS = ("", "identity", "gzip", "x-gzip", "deflate")


class _ThisThread(threading.local):
    """Arguments that urllib3's signatures cannot pass to pools: the limits of this thread's
    exchange, and whether its response is streamed."""

    limits: ExchangeLimits | None = None
    is_stream = False


_this_thread = _ThisThread()

#: Connections with an exchange in progress.
_in_use: weakref.WeakSet[Any] = weakref.WeakSet()


def interrupt_all() -> None:
    """At the end of the program: make every exchange in progress fail now."""
    try:
        connections = list(_in_use)
    except RuntimeError:  # one was added meanwhile; this function is called again
        return
    for conn in connections:
        sock = getattr(conn, "sock", None)
        if sock is not None:
            with contextlib.suppress(OSError):  # closed meanwhile
                sock.shutdown(socket.SHUT_RDWR)


def _is_own(conn: Any) -> bool:
    """True for a connection of urllib3's own class, not a mock's."""
    return type(conn).__module__ == "urllib3.connection"


def _within_limits(conn: Any, connect: Callable[[], object]) -> None:
    """Open a connection of urllib3's own class by *connect* within the limits of the exchange."""
    limits = _this_thread.limits
    if limits is None or not _is_own(conn) or _is_one_step(conn):
        connect()
    else:
        _connect(conn, connect, limits.left())


def _is_one_step(conn: Any) -> bool:
    """True if the timeout of *conn* bounds the whole connect: one address, and no TLS."""
    try:
        ipaddress.ip_address(conn.host)
    except ValueError:
        return False
    return not (conn.proxy or isinstance(conn, urllib3.connection.HTTPSConnection))


def _connect(conn: Any, connect: Callable[[], object], seconds: float) -> None:
    """Open a connection by *connect* within *seconds* in total.

    Name resolution has no time limit, and each address of a host would get the whole time. So this
    runs on a thread, which is abandoned when the time is over.

    Raises:
        urllib3.exceptions.ConnectTimeoutError: If it takes longer.
    """
    try:
        connected = on_daemon_thread(connect, "tinkex-connect")
    except RuntimeError:  # no thread can be started: the program is ending
        connect()
        return
    if not concurrent.futures.wait([connected], seconds).done:
        connected.add_done_callback(lambda _: conn.close())
        raise urllib3.exceptions.ConnectTimeoutError(
            conn, f"{conn.host} could not be resolved and connected to within {seconds:.1f} s"
        )
    connected.result()


class _Answer(http.client.HTTPResponse):
    """A response that is read within limits, and never one of the preceding 1xx responses."""

    def __init__(
        self, sock: Any, *args: Any, limits: ExchangeLimits | None = None, **kwargs: Any
    ) -> None:
        opened: Any = sock if limits is None else _Opened(reader(sock, limits))
        super().__init__(opened, *args, **kwargs)

    def begin(self) -> None:
        super().begin()
        while 100 <= self.status < 200 and self.status != http.HTTPStatus.SWITCHING_PROTOCOLS:
            self.headers = self.msg = None  # type: ignore[assignment]  # begin() reads the next
            super().begin()


class _Pool(urllib3.HTTPConnectionPool):
    """Tracks which of its connections are in use, and takes the quick path if possible."""

    def _get_conn(self, timeout: float | None = None) -> Any:
        conn = super()._get_conn(timeout)
        _in_use.add(conn)
        limits = _this_thread.limits
        if _is_own(conn):
            conn.response_class = functools.partial(_Answer, limits=limits)  # type: ignore[attr-defined]
        return conn

    def _validate_conn(self, conn: Any) -> None:
        """Called by urllib3 before it uses a connection, which may not be open yet."""
        if _is_own(conn) and conn.sock is None:
            _within_limits(conn, conn.connect)
        super()._validate_conn(conn)

    def _prepare_proxy(self, conn: Any) -> None:
        """Called by urllib3 to open a connection through a proxy."""
        _within_limits(conn, functools.partial(super()._prepare_proxy, conn))

    def _put_conn(self, conn: Any) -> None:
        if conn is not None:  # urllib3 puts None for a connection that it has dropped
            _in_use.discard(conn)
        super()._put_conn(conn)

    def urlopen(  # type: ignore[override]
        self,
        method: str,
        url: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        **how: Any,
    ) -> Any:
        is_usual = _this_thread.is_stream or self.proxy is not None
        head = b"" if is_usual else self._head(method, url, headers or {})
        conn = self._open_connection(url, how["timeout"].connect_timeout) if head else None
        if conn is None:
            return super().urlopen(method, url, body, headers, **how)
        timeout, limits = how["timeout"].read_timeout, _this_thread.limits
        try:
            conn.sock.settimeout(timeout if limits is None else limits.left())
            _write(conn.sock, head, body or b"", limits)
            answer = self._read(conn, method, url, limits)
        except TimeoutError as exc:
            conn.close()
            raise urllib3.exceptions.ReadTimeoutError(
                self, url, f"Read timed out. (read timeout={timeout})"
            ) from exc
        except (OSError, http.client.HTTPException) as exc:
            conn.close()
            raise urllib3.exceptions.ProtocolError("Connection aborted.", exc) from exc
        except BaseException:
            conn.close()  # a late response must not be taken for the next request's
            raise
        if isinstance(answer, Reply):
            self._put_conn(conn)  # others are returned when they have been read
        return answer

    def _open_connection(self, url: str, timeout: float | None) -> Any:
        """An open connection, or None if urllib3 must open it: for connection classes that are not
        its own (a mock may have no socket)."""
        conn: Any = self._get_conn()
        if not _is_own(conn):
            self._put_conn(conn)
            return None
        if conn.sock is not None:
            return conn
        conn.timeout, connected = timeout, False
        try:
            _within_limits(conn, conn.connect)
            if self.scheme == "https" and not conn.is_verified:
                warning = f"{self.host} is not verified: its certificate is not checked."
                warnings.warn(warning, urllib3.exceptions.InsecureRequestWarning, stacklevel=2)
        except TimeoutError as exc:  # these are the words of urllib3's own urlopen
            raise urllib3.exceptions.ReadTimeoutError(self, url, "TLS handshake timed out") from exc
        except (ssl.SSLError, CertificateError) as exc:
            problem = urllib3.exceptions.SSLError(exc)
            raise urllib3.exceptions.MaxRetryError(self, url, problem) from exc
        except urllib3.exceptions.HTTPError as exc:
            raise urllib3.exceptions.MaxRetryError(self, url, exc) from exc
        except OSError as exc:
            raise urllib3.exceptions.ProtocolError("Connection aborted.", exc) from exc
        else:
            connected = True
            return conn
        finally:
            if not connected:
                conn.close()
                self._put_conn(conn)

    def _head(self, method: str, url: str, headers: Mapping[str, str]) -> bytes:
        """A request up to its body; empty if it cannot take the quick path."""
        if method == "HEAD" or _UNSAFE.search(url) or "Host" in headers:
            return b""
        port = "" if self.port in (None, 80 if self.scheme == "http" else 443) else f":{self.port}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {url} HTTP/1.1\r\nHost: {host}{port}\r\n"]
        lines += [f"{name}: {value}\r\n" for name, value in headers.items()]
        head = "".join(lines)
        if head.count("\n") != len(lines) + 1 or head.count("\r") != len(lines) + 1:
            return b""  # a line break in a header: http.client names it
        return f"{head}\r\n".encode("latin-1")

    def _read(
        self, conn: Any, method: str, url: str, limits: ExchangeLimits | None
    ) -> Reply | urllib3.HTTPResponse:
        start = conn.sock.recv(START)
        if limits is not None:
            limits.take(len(start))
        head = _plain_head(start)
        if head is None:
            return self._read_other(conn, reader(conn.sock, limits, start), method, url)
        status, headers, begin, length = head
        content = start[begin:]
        if len(content) != length:
            if limits is not None:
                limits.expect(length)
            with reader(conn.sock, limits, content) as rest:
                content = rest.read(length)
            if len(content) < length:
                raise http.client.IncompleteRead(content, length - len(content))
        return Reply(status, headers, content)

    def _read_other(
        self, conn: Any, reader: BinaryIO, method: str, url: str
    ) -> urllib3.HTTPResponse:
        """A response that http.client must read; nothing of it has been consumed."""
        answer = _Answer(_Opened(reader), method=method)
        try:
            answer.begin()
        except BaseException:
            reader.close()
            raise
        if answer.will_close:
            conn.close()  # the reader has its own reference to the socket
        return urllib3.HTTPResponse(
            body=answer,
            headers=urllib3.HTTPHeaderDict(
                (name, _FOLDED.sub(" ", value)) for name, value in answer.msg.items()
            ),
            status=answer.status,
            version=answer.version,
            reason=answer.reason,
            preload_content=False,
            decode_content=False,
            original_response=answer,
            pool=self,
            connection=conn,
            request_method=method,
            request_url=url,
        )


class _PoolTLS(_Pool, urllib3.HTTPSConnectionPool):
    """The same over TLS."""


@attrs.frozen
class _Opened:
    """A socket for http.client, with an open reader."""

    reader: BinaryIO

    def makefile(self, mode: str) -> BinaryIO:
        return self.reader


def prepared_request(method: str, url: str, body: bytes | None) -> requests.PreparedRequest:
    """A request prepared by hand: requests would parse and quote each part again."""
    request = requests.PreparedRequest()
    request.method, request.url, request.body = method, url, body
    request._cookies = _NO_COOKIES  # type: ignore[attr-defined]  # read by Session.send when the answer is a redirect
    return request


_NO_COOKIES = requests.cookies.RequestsCookieJar()


def is_plain(adapter: requests.adapters.BaseAdapter) -> bool:
    """True if *adapter* is one that requests makes by default for a new Session."""
    return type(adapter) is requests.adapters.HTTPAdapter and _state(adapter) == _state(
        requests.adapters.HTTPAdapter()
    )


def _state(adapter: Any) -> dict[str, Any]:
    state = dict(adapter.__getstate__())
    retries = state.get("max_retries")
    return {**state, "max_retries": getattr(retries, "total", retries)}


def quick_path_works() -> bool:
    """True if the private names used here work as expected, by a self-test.

    False while a mock (vcrpy) has replaced urllib3's connection class.
    """
    connection_class = urllib3.HTTPConnectionPool.ConnectionCls
    is_mocked = connection_class.__module__ != "urllib3.connection"
    return not is_mocked and _self_test()


@functools.cache
def _self_test() -> bool:
    """Make one exchange over a pair of sockets in this process."""
    ours, theirs = socket.socketpair()
    pool = _Pool("localhost", 80)
    try:
        conn: Any = urllib3.connection.HTTPConnection("localhost", 80)
        conn.sock = _Scripted(ours, theirs, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        pool.pool.get_nowait()  # type: ignore[union-attr]  # room for one connection
        pool._put_conn(conn)
        timeout = urllib3.Timeout(connect=1.0, read=1.0)
        sent = _Headers({"a": ("A", "b")})
        reply = pool.urlopen("POST", "/x", b"body", sent, timeout=timeout)
        request = prepared_request("POST", "http://localhost/x", b"body")
        response = requests.adapters.HTTPAdapter.__new__(KeptConnections).build_response(
            request, reply
        )
        return (
            b"ok" == response.content == b"".join(response.iter_content(1))
            and theirs.recv(1000) == b"POST /x HTTP/1.1\r\nHost: localhost\r\nA: b\r\n\r\nbody"
            and [("Content-Length", "2")] == list(response.headers.items())
            and response.headers["content-LENGTH"] == "2"
            and pool._get_conn() is conn
        )
    except Exception as exc:  # other versions of urllib3 or requests may raise anything
        logger.info("HTTP takes the usual way through urllib3: the self-test failed (%r)", exc)
        return False
    finally:
        pool.close()
        ours.close()
        theirs.close()


class _Scripted:
    """A socket whose peer answers as soon as something is written to it."""

    def __init__(self, ours: socket.socket, theirs: socket.socket, answer: bytes) -> None:
        self._ours, self._theirs, self._answer = ours, theirs, answer

    def sendall(self, data: bytes) -> None:
        self._ours.sendall(data)
        self._theirs.sendall(self._answer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ours, name)


def _write(sock: Any, head: bytes, body: bytes, limits: ExchangeLimits | None) -> None:
    if len(body) <= SMALL:
        sock.sendall(head + body)
    elif limits is None:
        sock.sendall(head)
        sock.sendall(body)
    else:
        sock.sendall(head)
        limits.send(sock, body)


def _plain_head(start: bytes) -> tuple[int, CaseInsensitiveDict[str], int, int] | None:
    """Status, headers, start and length of the body, for a final response of known length whose
    head is in *start*; None for any other response."""
    end = start.find(b"\r\n\r\n")
    if end < 0 or start[:9] != b"HTTP/1.1 ":
        return None
    status, *lines = start[9:end].decode("latin-1").split("\r\n")
    found: dict[str, tuple[str, str]] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            return None
        lower, value = name.lower(), value.strip()
        if lower in found:
            value = f"{found[lower][1]}, {value}"
        found[lower] = (name, value)
    _, length = found.get("content-length", ("", ""))
    if (
        status[:3] in ("204", "304")
        or not (status[:3].isdigit() and status[:1] >= "2")
        or not (length.isascii() and length.isdigit() and int(length) <= LONGEST)
        or not _UNUSUAL.isdisjoint(found)
        or found.get("connection", ("", "keep-alive"))[1].lower() != "keep-alive"
    ):
        return None
    return int(status[:3]), _Headers(found), end + 4, int(length)


#: Headers of answers that take the usual way.
_UNUSUAL = frozenset({"transfer-encoding", "content-encoding", "set-cookie"})


def case_insensitive(headers: Mapping[str, str]) -> CaseInsensitiveDict[str]:
    """*headers* for a request."""
    if not quick_path_works():
        return CaseInsensitiveDict(headers)
    return _Headers({name.lower(): (name, value) for name, value in headers.items()})


class _Headers(CaseInsensitiveDict[str]):
    """Headers, by names in lower case, that are set and listed at once.

    Its base class calls two Python functions for each of them.
    """

    def __init__(self, store: dict[str, tuple[str, str]]) -> None:
        self._store = store

    def items(self) -> Any:
        return self._store.values()
