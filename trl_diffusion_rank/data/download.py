"""Images by their URLs: many at once, and nothing that a stranger's server sends can hang, flood or misuse us."""

import errno
import functools
import http.client
import io
import ipaddress
import math
import os
import random
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urljoin

import urllib3
from PIL import Image
from urllib3.connection import HTTPConnection
from urllib3.exceptions import HTTPError, InvalidHeader, LocationParseError, ReadTimeoutError
from urllib3.util import Url, parse_url

from trl_diffusion_rank import __version__
from trl_diffusion_rank.data.images import MAX_PIXELS, RASTER_FORMATS, decode_image


HEADERS = {
    "User-Agent": f"trl-diffusion-rank/{__version__}",
    "Accept": "image/*",
    # Bodies are never decompressed, so a server that compresses all the same can't send a bomb
    "Accept-Encoding": "identity",
    "Connection": "close",
}
CHUNK_BYTES = 64 * 1024
OVERHEAD_BYTES = 1024**2  # what headers and the frames of chunks may take beyond `max_bytes`
BACKOFF = 0.5  # seconds before the first retry, doubled before each further one
MAX_HELD_BYTES = 512 * 1024**2  # finished images that wait for a slower one before them
MAX_HELD_PER_WORKER = 64  # the same as a number, for failures weigh nothing

# A JPEG of 20 MB can hold 180,000 passes over all its pixels, hours of work; encoders make about ten
MAX_SCANS = 500

GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # all of IPv6 that is assigned to the open Internet
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: the IPv4 address is in the last 32 bits

# `random` itself may have been seeded by the program that we are part of
_jitter = random.Random()
# More decoders than cores are no faster, and one of 64 megapixels takes most of a gigabyte
_decoders = threading.BoundedSemaphore(os.cpu_count() or 1)


@dataclass(frozen=True)
class DownloadLimits:
    """
    What one image may cost.

    Args:
        max_bytes (`int`, *optional*, defaults to 20 MiB):
            Largest file.
        max_pixels (`int`, *optional*, defaults to 64 x 1024 x 1024):
            Most pixels, width times height as the file's header says; more are not decoded. PIL itself refuses more
            than about 179 million.
        min_side (`int`, *optional*, defaults to `0`):
            Images whose shorter side has fewer pixels are refused.
        timeout (`float`, *optional*, defaults to `20.0`):
            Seconds for one attempt from the first connection to the last byte, redirects included. Only the system's
            name resolution can't be interrupted; its time counts, though.
        retries (`int`, *optional*, defaults to `2`):
            Further attempts after what may pass: no or a broken connection, a timeout, HTTP 408, 429 and 5xx. The
            pause doubles each time; a `Retry-After` is honoured up to `timeout`, and a longer one ends the attempts.
        max_redirects (`int`, *optional*, defaults to `5`):
            Redirects that are followed.
        allow_private_hosts (`bool`, *optional*, defaults to `False`):
            Also connect to addresses that are not on the open Internet (loopback, private networks, a cloud's
            metadata service). Set it for URLs of your own alone.

    Raises:
        `ValueError`: if a limit makes no sense.
    """

    max_bytes: int = 20 * 1024**2
    max_pixels: int = 64 * 1024**2
    min_side: int = 0
    timeout: float = 20.0
    retries: int = 2
    max_redirects: int = 5
    allow_private_hosts: bool = False

    def __post_init__(self) -> None:
        for name, least in {"max_bytes": 1, "max_pixels": 1, "min_side": 0, "retries": 0, "max_redirects": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least {least}.")
        if self.max_pixels > MAX_PIXELS:
            raise ValueError(f"`max_pixels` is {self.max_pixels}; nothing above {MAX_PIXELS} is ever decoded.")
        if self.min_side**2 > self.max_pixels:
            raise ValueError(
                f"`min_side` is {self.min_side} and `max_pixels` {self.max_pixels}, which no image can satisfy; lower "
                "the first or raise the second."
            )
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"`timeout` is {self.timeout}; it must be a positive number of seconds.")


class Downloaded(NamedTuple):
    """
    What became of one URL.

    `image` holds the bytes exactly as they were served if [`~trl_diffusion_rank.data.images.decode_image`] reads them,
    else None. `width` and `height` are the image's as it is shown (turned by its EXIF), the header's where it was
    refused for its size or its damage, and 0 where they never became known. `reason` is one of

    - `ok`
    - `bad_url`: not a URL of http or https, one with a user name, or a redirect to such
    - `private_address`: not on the open Internet (see `allow_private_hosts`)
    - `unreachable`: no such name, connection refused, no route, or no valid certificate
    - `timeout`: an attempt took longer than `timeout`
    - `broken_response`: the connection broke off, or what came is not HTTP
    - `too_many_redirects`: more than `max_redirects`
    - `http_404` and so on: any status but 200; a redirect without an address counts by its own
    - `too_large`: more than `max_bytes`
    - `not_an_image`: none of `RASTER_FORMATS`, truncated, damaged, or a JPEG of more than `MAX_SCANS` scans
    - `too_many_pixels`, `too_small`: see `max_pixels` and `min_side`
    """

    image: bytes | None
    reason: str
    width: int = 0
    height: int = 0


class DownloadError(Exception):
    """An attempt failed for the `reason`; `may_pass` if a retry makes sense, after `retry_after` seconds if given."""

    def __init__(self, reason: str, may_pass: bool = False, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.may_pass = may_pass
        self.retry_after = retry_after


def is_public(address: str) -> bool:
    """Whether a numeric IP address is on the open Internet; IPv6 that carries an IPv4 address is judged by that."""
    ip = ipaddress.ip_address(address)
    if ip.version == 4:
        return ip.is_global and not ip.is_multicast
    embedded = ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else None)
    if embedded is not None:
        return is_public(str(embedded))
    return ip in GLOBAL_UNICAST and ip.is_global


def _remaining(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("the attempt's time is over")
    return seconds


class _Bounded:
    """
    A socket's every wait for bytes ends at the `deadline` (in `time.monotonic`'s seconds), and it takes in at most
    `budget` bytes. Its own timeout begins anew with each byte, so that a server which drips its headers or its body
    could hold a worker for hours; and http.client reads all that comes where a chunk's length is -1.
    """

    deadline: float
    budget: int

    def recv_into(self, *args) -> int:
        self.settimeout(_remaining(self.deadline))
        count = super().recv_into(*args)
        self.budget -= count
        if self.budget < 0:
            raise DownloadError("too_large")
        return count


class _BoundedSocket(_Bounded, socket.socket):
    pass


class _BoundedTLSSocket(_Bounded, ssl.SSLSocket):
    pass


@functools.cache  # reading the certificates takes longer than a handshake
def _tls_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.sslsocket_class = _BoundedTLSSocket
    return context


class CheckedConnection(HTTPConnection):
    """
    A connection over http that is made to a public address or not at all, and takes no more than the limits allow.

    The address is looked at where the connection is made: whatever a URL, a redirect or a second answer of the DNS
    names, no byte is sent to an address that was not checked.

    Args:
        host (`str`): a name or an address, without brackets.
        port (`int`): of the host.
        limits ([`DownloadLimits`]): `allow_private_hosts` and `max_bytes` count here.
        deadline (`float`): in `time.monotonic`'s seconds; after it every wait raises `TimeoutError`.

    Raises:
        [`DownloadError`]: `private_address` by `connect`, `too_large` while reading.
    """

    def __init__(self, host: str, port: int, limits: DownloadLimits, deadline: float) -> None:
        super().__init__(host, port, timeout=_remaining(deadline))
        self.limits = limits
        self.deadline = deadline

    def connect(self) -> None:
        super().connect()
        self.sock.deadline = self.deadline
        self.sock.budget = self.limits.max_bytes + OVERHEAD_BYTES

    def _check(self, address: str) -> None:
        if not self.limits.allow_private_hosts and not is_public(address):
            raise DownloadError("private_address")

    def _new_conn(self) -> socket.socket:
        addresses = socket.getaddrinfo(self._dns_host, self.port, type=socket.SOCK_STREAM)
        for left, (*kind, _, address) in zip(range(len(addresses), 0, -1), addresses, strict=True):
            self._check(address[0])  # not even a handshake, which would tell which ports are open
            try:
                # A silent address must leave time for those after it
                return self._open(kind, address, timeout=_remaining(self.deadline) / left)
            except OSError:
                if left == 1:
                    raise

    def _open(self, kind: list[int], address: tuple, timeout: float) -> socket.socket:
        sock = _BoundedSocket(*kind)
        try:
            sock.settimeout(timeout)
            sock.connect(address)
            self._check(sock.getpeername()[0])
            sock.settimeout(_remaining(self.deadline))
        except BaseException:
            sock.close()
            raise
        return sock


class CheckedTLSConnection(CheckedConnection):
    """
    The same over https.

    Not urllib3's `HTTPSConnection`: that one writes to the TLS context before each handshake, and ours is shared by
    all threads.
    """

    default_port = 443

    def _new_conn(self) -> socket.socket:
        return _tls_context().wrap_socket(super()._new_conn(), server_hostname=self.host)


def _parse(url: str) -> Url:
    try:
        parsed = parse_url(url.strip())
    except LocationParseError as error:
        raise DownloadError("bad_url") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.auth is not None:
        raise DownloadError("bad_url")
    return parsed


def _connect(url: Url, limits: DownloadLimits, deadline: float) -> CheckedConnection:
    connection_class = CheckedTLSConnection if url.scheme == "https" else CheckedConnection
    try:
        host = url.host.strip("[]")  # of IPv6, which the connection puts back into its Host header
        port = connection_class.default_port if url.port is None else url.port
        connection = connection_class(host, port, limits, deadline)
        connection.connect()
        return connection
    except TimeoutError as error:
        raise DownloadError("timeout", may_pass=True) from error
    except socket.gaierror as error:
        raise DownloadError("unreachable", may_pass=error.errno == socket.EAI_AGAIN) from error
    except ssl.SSLCertVerificationError as error:  # before OSError and ValueError, for it is both
        raise DownloadError("unreachable") from error
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # our own fault, not the server's
            raise
        raise DownloadError("unreachable", may_pass=True) from error
    except (http.client.InvalidURL, ValueError) as error:  # ValueError: a name that IDNA can't encode
        raise DownloadError("bad_url") from error


def _retry_after(response: urllib3.BaseHTTPResponse) -> float | None:
    try:
        return urllib3.Retry().parse_retry_after(response.headers["Retry-After"])
    except (KeyError, InvalidHeader):
        return None


def _read(response: urllib3.BaseHTTPResponse, limits: DownloadLimits) -> bytes:
    if response.status != 200:
        may_pass = response.status in (408, 429) or response.status >= 500
        raise DownloadError(f"http_{response.status}", may_pass, _retry_after(response))
    if (response.length_remaining or 0) > limits.max_bytes:
        raise DownloadError("too_large")
    chunks, size = [], 0
    while chunk := response.read(CHUNK_BYTES):
        chunks.append(chunk)
        size += len(chunk)
        if size > limits.max_bytes:
            raise DownloadError("too_large")
    return b"".join(chunks)


def _get(url: str, limits: DownloadLimits) -> bytes:
    """One attempt: the body that the URL leads to, at most `max_bytes`, or [`DownloadError`]."""
    deadline = time.monotonic() + limits.timeout
    for _ in range(limits.max_redirects + 1):
        parsed = _parse(url)
        with closing(_connect(parsed, limits, deadline)) as connection:
            try:
                connection.request(
                    "GET", parsed.request_uri, headers=HEADERS, preload_content=False, decode_content=False
                )
                with connection.getresponse() as response:
                    location = response.get_redirect_location()
                    if not location:
                        return _read(response, limits)
            except (TimeoutError, ReadTimeoutError) as error:
                raise DownloadError("timeout", may_pass=True) from error
            except (OSError, http.client.HTTPException, HTTPError, ValueError) as error:  # ValueError: a chunk of -2
                raise DownloadError("broken_response", may_pass=True) from error
        try:
            # Headers arrive as Latin-1, while addresses that were not percent-encoded are UTF-8
            url = urljoin(url, location.encode("latin-1").decode("utf-8", "replace"))
        except ValueError as error:
            raise DownloadError("bad_url") from error
    raise DownloadError("too_many_redirects")


def _inspect(data: bytes, limits: DownloadLimits) -> Downloaded:
    """Whether the bytes are an image within the limits: first by its header, then by decoding all of it."""
    try:
        with Image.open(io.BytesIO(data), formats=RASTER_FORMATS) as image:
            (width, height), format = image.size, image.format
    except Image.DecompressionBombError:
        return Downloaded(None, "too_many_pixels")
    except Exception:  # on damaged files PIL raises nearly anything
        return Downloaded(None, "not_an_image")
    if width * height > limits.max_pixels:
        return Downloaded(None, "too_many_pixels", width, height)
    if min(width, height) < limits.min_side:
        return Downloaded(None, "too_small", width, height)
    if format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS:
        return Downloaded(None, "not_an_image", width, height)
    try:
        with _decoders:
            shown = decode_image(data)
    except ValueError:
        return Downloaded(None, "not_an_image", width, height)
    return Downloaded(data, "ok", shown.width, shown.height)


def fetch_image(url: str, limits: DownloadLimits, stop: threading.Event | None = None) -> Downloaded:
    """
    Download one image; it is retried as `limits` says, and no fault of the URL or its server raises.

    Every request has a connection of its own. A proxy of the environment is not used: it would connect in our place,
    where no address can be checked.

    Args:
        url (`str`): of http or https; anything else, None too, is a `bad_url`.
        limits ([`DownloadLimits`]): what it may cost.
        stop (`threading.Event`, *optional*): once it is set, nothing is retried.
    """
    if not isinstance(url, str):
        return Downloaded(None, "bad_url")
    stop = stop or threading.Event()
    for attempt in range(limits.retries + 1):
        try:
            return _inspect(_get(url, limits), limits)
        except DownloadError as error:
            failed = Downloaded(None, error.reason)
            pause = error.retry_after
            if not error.may_pass or attempt == limits.retries or (pause or 0) > limits.timeout:
                return failed
            # The jitter keeps workers that failed together from returning together
            if stop.wait(BACKOFF * 2**attempt * _jitter.uniform(0.5, 1.5) if pause is None else pause):
                return failed


def download_images(urls: Iterable[str], limits: DownloadLimits, num_workers: int = 32) -> Iterator[Downloaded]:
    """
    Download many images at once; the results come in the order of the `urls`, which may be endless.

    URLs are read as workers become free. Images that are ready before a slower one are held back, at most
    `MAX_HELD_BYTES` of them, or `MAX_HELD_PER_WORKER * num_workers` if they are small; then nothing new begins until
    the slow one has ended. When the iteration is given up or fails, the downloads that did not begin are cancelled and
    the others end by themselves after at most one attempt, that is within `timeout`.

    Args:
        urls (iterable of `str`): read lazily, in the caller's thread.
        limits ([`DownloadLimits`]): what each image may cost.
        num_workers (`int`, *optional*, defaults to `32`): downloads at once.

    Raises:
        `ValueError`: if `num_workers` is below 1.
    """
    if num_workers < 1:
        raise ValueError(f"`num_workers` is {num_workers}; it must be at least 1.")
    return _in_order(urls, limits, num_workers)


def _in_order(urls: Iterable[str], limits: DownloadLimits, num_workers: int) -> Iterator[Downloaded]:
    window: deque[Future[Downloaded]] = deque()  # in the order of the urls
    running: set[Future[Downloaded]] = set()  # those of the window that are not counted in `held` yet
    held = 0  # bytes
    stop = threading.Event()
    executor = ThreadPoolExecutor(num_workers, thread_name_prefix="download")
    try:
        for url in urls:
            window.append(executor.submit(fetch_image, url, limits, stop))
            running.add(window[-1])
            # Twice the workers, so that they have work while the caller is busy with an image
            while (
                len(running) >= 2 * num_workers
                or len(window) >= MAX_HELD_PER_WORKER * num_workers
                or held > MAX_HELD_BYTES
            ):
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                held += sum(len(future.result().image or b"") for future in finished)
                while window and window[0].done():
                    result = window.popleft().result()
                    held -= len(result.image or b"")
                    yield result
        while window:
            yield window.popleft().result()
    finally:
        stop.set()
        # A connection to a silent host can't be interrupted, and the caller shouldn't wait for it
        executor.shutdown(wait=False, cancel_futures=True)
