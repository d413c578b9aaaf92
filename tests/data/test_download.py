import errno
import gzip
import io
import itertools
import socket
import ssl
import struct
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from trl_diffusion_rank import __version__
from trl_diffusion_rank.data import download
from trl_diffusion_rank.data.download import (
    CheckedConnection,
    Downloaded,
    DownloadError,
    DownloadLimits,
    download_images,
    fetch_image,
    is_public,
)
from trl_diffusion_rank.data.images import MAX_PIXELS, decode_image


# Signed by itself for 127.0.0.1 and these tests, 2020 to 2120; the key protects nothing
CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBYzCCAQigAwIBAgIBATAKBggqhkjOPQQDAjAPMQ0wCwYDVQQDDAR0ZXN0MCAX
DTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAPMQ0wCwYDVQQDDAR0ZXN0
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE3Pufu5LQ2+F1CdeOScLQnHqWkmfL
MzeHICn14lX5StNpBxlcVA4D2zqpPmU2QJruFDWzqr0VxqBTQk7c0SzcqKNTMFEw
DwYDVR0TAQH/BAUwAwEB/zAOBgNVHQ8BAf8EBAMCAoQwDwYDVR0RBAgwBocEfwAA
ATAdBgNVHQ4EFgQUeCKEXKUnERXl/NU375y05GnUIZUwCgYIKoZIzj0EAwIDSQAw
RgIhANAPDh32TshBLqoLmuwdp9D5oV2Y1qZhDCrGi58Wx4DnAiEA8OfW86AuRjtX
gAcpfoPn0qo31p9q52tZh3S6dKocclY=
-----END CERTIFICATE-----
"""
PRIVATE_KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgww1D4hQTMygjrMj6
oqAqHJTiOoBevBFA3PwvlyDBeGuhRANCAATc+5+7ktDb4XUJ145JwtCcepaSZ8sz
N4cgKfXiVflK02kHGVxUDgPbOqk+ZTZAmu4UNbOqvRXGoFNCTtzRLNyo
-----END PRIVATE KEY-----
"""


def encoded(format: str = "PNG", size: tuple[int, int] = (12, 8), **kwargs) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **kwargs)
    return buffer.getvalue()


PNG = encoded()


def limits(**changes) -> DownloadLimits:
    return DownloadLimits(**{"timeout": 5.0, "retries": 0, "allow_private_hosts": True, **changes})


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.server.headers = dict(self.headers)
        try:
            self.server.routes[self.path.split("?")[0]](self)
        except (ConnectionError, ssl.SSLError):
            self.server.hung_up.append(self.path)

    def log_message(self, *args) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Answers by `routes`, functions of the handler; `requests` are the paths asked for, `hung_up` those cut off."""

    daemon_threads = True
    request_queue_size = 64  # a client that finds five others waiting would try again after a second

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"{'http' if context is None else 'https'}://127.0.0.1:{self.server_port}"
        self.routes = {"/png": answer(PNG)}
        self.requests, self.hung_up, self.headers, self.connections = [], [], {}, 0

    def process_request(self, request, client_address) -> None:
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request, client_address) -> None:
        pass  # a client that refuses the certificate

    def __enter__(self) -> "Server":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *args) -> None:
        self.shutdown()
        self.server_close()


def answer(body: bytes, status: int = 200, **headers: str):
    """A route with a whole answer; `Content_Length` and the like replace what would be sent."""

    def route(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return route


def raw(data: bytes, pause: float = 0.0):
    """A route that sends its bytes as they are, status line and all, `pause` seconds after each if given."""

    def route(handler: Handler) -> None:
        for piece in [data] if not pause else [data[i : i + 1] for i in range(len(data))]:
            handler.wfile.write(piece)
            time.sleep(pause)

    return route


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(download, "BACKOFF", 0.001)


@pytest.fixture
def server():
    with Server() as server:
        yield server


def resolve_to(monkeypatch, *addresses: tuple[str, int]) -> list[str]:
    """Every name has these addresses from now on; returns the list of the names asked for."""
    names = []

    def getaddrinfo(host, port, **kwargs):
        names.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return names


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_bytes_come_back_as_served_whatever_the_content_type_says(server, format):
    body = encoded(format)
    server.routes["/x"] = answer(body, Content_Type="text/html")
    assert fetch_image(f"{server.url}/x", limits()) == Downloaded(body, "ok", 12, 8)


def test_request_says_who_asks_and_nothing_else(server, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed_port()}")
    server.routes["/%EC%82%AC"] = answer(PNG, Set_Cookie="a=b")
    for _ in range(2):
        assert fetch_image(f" {server.url}/사?q=a b#part\n", limits()).reason == "ok"
        assert server.headers == {
            "Host": server.url.removeprefix("http://"),
            "User-Agent": f"trl-diffusion-rank/{__version__}",
            "Accept": "image/*",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
    assert server.requests == ["/%EC%82%AC?q=a%20b"] * 2


def test_animated_images_count_by_their_first_frame_and_turned_ones_as_shown(server):
    frames = [Image.new("RGB", (5, 4), color) for color in ("red", "blue")]
    server.routes["/gif"] = answer(encoded("GIF", (5, 4), save_all=True, append_images=frames))
    assert fetch_image(f"{server.url}/gif", limits())[1:] == ("ok", 5, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter
    server.routes["/turned"] = answer(encoded("JPEG", exif=exif))
    assert fetch_image(f"{server.url}/turned", limits())[1:] == ("ok", 8, 12)


def test_chunked_and_endless_length_are_read_to_their_end(server):
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (PNG[:50], PNG[50:], b""))
    server.routes["/chunked"] = raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
    server.routes["/no-length"] = raw(b"HTTP/1.0 200 OK\r\n\r\n" + PNG)
    for path in ("/chunked", "/no-length"):
        assert fetch_image(server.url + path, limits()).image == PNG


def declared(side: int) -> bytes:
    """A small PNG whose header promises `side` x `side` pixels."""
    header = b"IHDR" + struct.pack(">II", side, side) + PNG[24:29]
    return PNG[:12] + header + struct.pack(">I", zlib.crc32(header)) + PNG[33:]


def damaged_exif() -> bytes:
    """A JPEG to be turned whose EXIF has an integer field of type UNDEFINED: PIL raises struct.error."""
    fields = struct.pack(">HHHIHHHHI4s", 2, 0x0112, 3, 1, 6, 0, 0x0100, 7, 2, b"ab\0\0")
    return encoded("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08" + fields + bytes(4))


def many_scans(number: int) -> bytes:
    """A progressive JPEG whose last scan, with the Huffman table before it, comes `number` times again."""
    body = encoded("JPEG", progressive=True)
    scan = body[body.rindex(b"\xff\xc4", 0, body.rindex(b"\xff\xda")) : -2]
    return body[:-2] + scan * number + body[-2:]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", ("not_an_image", 0, 0)),
        (b"<html><body>Gone</body></html>", ("not_an_image", 0, 0)),
        (EPS, ("not_an_image", 0, 0)),
        (PNG[:-40], ("not_an_image", 12, 8)),
        (encoded("JPEG", (64, 64))[:-200], ("not_an_image", 64, 64)),
        (damaged_exif(), ("not_an_image", 12, 8)),
        (many_scans(500), ("not_an_image", 12, 8)),
        (declared(9_000), ("too_many_pixels", 9_000, 9_000)),
        (declared(50_000), ("too_many_pixels", 0, 0)),  # PIL itself won't open it
    ],
    ids=[
        "empty",
        "html",
        "eps",
        "cut png",
        "cut jpeg",
        "damaged exif",
        "many scans",
        "81 megapixels",
        "2.5 gigapixels",
    ],
)
def test_what_is_no_image_or_a_bomb_is_refused_at_once(server, body, expected):
    server.routes["/x"] = answer(body, Content_Type="image/png")
    assert fetch_image(f"{server.url}/x", limits(retries=2)) == (None, *expected)
    assert len(server.requests) == 1


def test_ordinary_progressive_jpegs_pass(server):
    server.routes["/x"] = answer(many_scans(100))
    assert fetch_image(f"{server.url}/x", limits()).reason == "ok"


def test_decoding_anything_else_is_not_even_begun():
    for name in ("EPS", "PPM"):
        body = EPS if name == "EPS" else encoded(name)
        assert Image.open(io.BytesIO(body)).format == name  # PIL would
        with pytest.raises(ValueError, match="cannot identify image file"):
            decode_image(body)


def test_pixels_are_counted_before_anything_is_decoded(server, monkeypatch):
    monkeypatch.setattr(download, "decode_image", lambda data: pytest.fail("decoded"))
    assert fetch_image(f"{server.url}/png", limits(max_pixels=95)) == (None, "too_many_pixels", 12, 8)
    assert fetch_image(f"{server.url}/png", limits(min_side=9)) == (None, "too_small", 12, 8)
    monkeypatch.undo()
    assert fetch_image(f"{server.url}/png", limits(max_pixels=96, min_side=8)).reason == "ok"


def test_no_more_decoders_than_allowed_at_once(server, monkeypatch):
    busy, most = [], []

    def decode(data):
        busy.append(None)
        most.append(len(busy))
        time.sleep(0.02)
        busy.pop()
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(download, "decode_image", decode)
    monkeypatch.setattr(download, "_decoders", threading.BoundedSemaphore(2))
    assert len(list(download_images([f"{server.url}/png"] * 10, limits(), num_workers=8))) == 10
    assert max(most) == 2


def test_size_is_bounded_by_the_header_and_by_the_bytes(server):
    def endless(start):
        def route(handler):
            handler.wfile.write(start)
            for _ in range(10_000):
                handler.wfile.write(bytes(64 * 1024))

        return route

    server.routes["/endless"] = endless(b"HTTP/1.0 200 OK\r\n\r\n" + PNG)
    # http.client reads a chunk of length -1 until the server tires
    server.routes["/chunk"] = endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n")
    server.routes["/no-length"] = raw(b"HTTP/1.0 200 OK\r\n\r\n" + PNG)
    assert fetch_image(f"{server.url}/no-length", limits(max_bytes=len(PNG) - 1)).reason == "too_large"
    for path in ("/endless", "/chunk"):
        assert fetch_image(server.url + path, limits(max_bytes=1_000_000)) == (None, "too_large", 0, 0)
    # nothing follows the header: whoever waits for the body meets a timeout
    server.routes["/declared"] = answer(b"", Content_Length=str(10**12))
    assert fetch_image(f"{server.url}/declared", limits()).reason == "too_large"
    assert fetch_image(f"{server.url}/png", limits(max_bytes=len(PNG) - 1)).reason == "too_large"
    assert fetch_image(f"{server.url}/png", limits(max_bytes=len(PNG))).reason == "ok"
    deadline = time.monotonic() + 5
    while len(server.hung_up) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(server.hung_up) == ["/chunk", "/endless"]


def test_compressed_bodies_are_never_unpacked(server):
    bomb = gzip.compress(PNG + bytes(20_000_000))
    server.routes["/bomb"] = answer(bomb, Content_Encoding="gzip")
    assert len(bomb) < 50_000
    # unpacked, it would be too large, or an image if cut
    assert fetch_image(f"{server.url}/bomb", limits(max_bytes=50_000)).reason == "not_an_image"


@pytest.mark.parametrize(
    "route",
    [
        lambda handler: time.sleep(1),
        # each reaches a good image in some seconds, if it is let
        raw(b"HTTP/1.0 200 OK\r\n\r\n" + PNG, pause=0.02),
        raw(b"HTTP/1.0 200 OK\r\nX: " + bytes(100) + b"\r\n\r\n" + PNG, pause=0.02),
        raw(b"HTTP/1.1 100 Continue\r\n\r\n" * 10 + b"HTTP/1.0 200 OK\r\n\r\n" + PNG, pause=0.02),
    ],
    ids=["silence", "body drips", "header drips", "always continued"],
)
def test_time_is_bounded_however_slowly_it_drips(server, route):
    server.routes["/slow"] = route
    assert fetch_image(f"{server.url}/slow", limits(timeout=0.2)) == (None, "timeout", 0, 0)


def test_redirects_share_the_time_of_the_attempt(server):
    def slow(handler):
        time.sleep(0.1)
        answer(b"", 302, Location=f"/{len(server.requests)}")(handler)

    server.routes |= {"/0": slow, "/1": slow, "/2": slow, "/3": answer(PNG)}
    assert fetch_image(f"{server.url}/0", limits(timeout=0.25)).reason == "timeout"
    server.requests.clear()
    assert fetch_image(f"{server.url}/0", limits()).reason == "ok"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10, 11\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-2\r\n" + PNG,
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(PNG) + PNG[:100],
    ],
    ids=["nothing", "another protocol", "two lengths", "no chunk", "negative chunk", "long line", "closed halfway"],
)
def test_broken_responses_are_tried_again(server, data):
    server.routes["/x"] = raw(data)
    assert fetch_image(f"{server.url}/x", limits(retries=2)) == (None, "broken_response", 0, 0)
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("status", "requests"), [(404, 1), (204, 1), (206, 1), (304, 1), (302, 1), (408, 3), (429, 3), (500, 3), (503, 3)]
)
def test_only_what_may_pass_is_tried_again(server, status, requests):
    server.routes["/x"] = answer(b"" if status in (204, 304) else PNG, status)
    assert fetch_image(f"{server.url}/x", limits(retries=2)) == (None, f"http_{status}", 0, 0)
    assert len(server.requests) == requests


def test_success_after_errors(server):
    answers = iter([answer(b"", 500), raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"), answer(PNG)])
    server.routes["/x"] = lambda handler: next(answers)(handler)
    assert fetch_image(f"{server.url}/x", limits(retries=2)).image == PNG


def test_retry_after_is_honoured_if_it_is_short(server):
    answers = iter([answer(b"", 429, Retry_After="1"), answer(PNG)])
    server.routes["/soon"] = lambda handler: next(answers)(handler)
    start = time.monotonic()
    assert fetch_image(f"{server.url}/soon", limits(retries=1)).reason == "ok"
    assert time.monotonic() - start >= 1
    for path, value in {"/late": "3600", "/nonsense": "shortly"}.items():
        server.routes[path] = answer(b"", 429, Retry_After=value)
        assert fetch_image(server.url + path, limits(retries=1)).reason == "http_429"
    assert server.requests == ["/soon", "/soon", "/late", "/nonsense", "/nonsense"]


def test_a_stop_ends_the_retries(server):
    server.routes["/x"] = answer(b"", 500)
    stop = threading.Event()
    stop.set()
    assert fetch_image(f"{server.url}/x", limits(retries=5), stop).reason == "http_500"
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "url",
    [
        *[
            None,
            "",
            "picture.png",
            "//a.b/c.png",
            "file:///etc/passwd",
            "ftp://127.0.0.1/a",
            "data:image/png;base64,aa",
        ],
        *["http:///a", "http://[::1/a", "http://a:99999/", "http://a b/", "http://a..b/", f"http://{'a' * 300}/"],
        *["http://user:password@127.0.0.1/a", "https://user@127.0.0.1/a"],
    ],
)
def test_bad_urls(url):
    assert fetch_image(url, limits(retries=2)) == (None, "bad_url", 0, 0)


def test_redirects_are_followed_up_to_the_limit(server):
    server.routes |= {f"/{n}": answer(b"", status, Location=f"{n + 1}") for n, status in enumerate((301, 302, 303))}
    server.routes |= {"/3": answer(b"", 308, Location=server.url + "/사".encode().decode("latin-1"))}
    server.routes |= {"/%EC%82%AC": answer(PNG), "/loop": answer(b"", 307, Location="/loop")}
    assert fetch_image(f"{server.url}/0", limits(max_redirects=4)).image == PNG
    assert fetch_image(f"{server.url}/0", limits(max_redirects=3)).reason == "too_many_redirects"
    server.requests.clear()
    assert fetch_image(f"{server.url}/loop", limits(retries=2)).reason == "too_many_redirects"
    assert server.requests == ["/loop"] * 6


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("file:///etc/passwd", "bad_url"),
        ("ftp://127.0.0.1/png", "bad_url"),
        ("http://user:password@127.0.0.1/png", "bad_url"),
        ("http://[::1/png", "bad_url"),
        ("http://127.0.0.2/png", "private_address"),
        ("http://[::1]/png", "private_address"),
        ("http://169.254.169.254/latest/meta-data", "private_address"),
    ],
)
def test_redirects_lead_nowhere_that_a_url_may_not(server, monkeypatch, location, reason):
    monkeypatch.setattr(download, "is_public", lambda address: address == "127.0.0.1" or is_public(address))
    server.routes["/x"] = answer(b"", 302, Location=location)
    assert fetch_image(f"{server.url}/png", limits(allow_private_hosts=False)).reason == "ok"
    assert fetch_image(f"{server.url}/x", limits(allow_private_hosts=False)) == (None, reason, 0, 0)
    assert server.requests == ["/png", "/x"]


def test_addresses_on_the_open_internet():
    public = [
        "93.184.216.34",
        "8.8.8.8",
        "2606:4700:4700::1111",
        "::ffff:8.8.8.8",
        "64:ff9b::808:808",
        "2002:808:808::1",
    ]
    private = ["127.0.0.1", "127.8.9.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"]
    private += ["100.64.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1"]
    private += ["::", "::1", "::127.0.0.1", "fe80::1", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1", "2001:db8::1"]
    private += ["::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::808:808", "2002:7f00:1::1"]
    assert [address for address in public if not is_public(address)] == []
    assert [address for address in private if is_public(address)] == []


def test_private_hosts_are_not_even_connected_to(server):
    private = limits(allow_private_hosts=False, retries=2)
    for host in ("127.0.0.1", "localhost", "0.0.0.0", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1"):
        assert fetch_image(f"http://{host}:{server.server_port}/png", private) == (None, "private_address", 0, 0)
    connection = CheckedConnection("127.0.0.1", server.server_port, private, time.monotonic() + 5)
    with pytest.raises(DownloadError, match="private_address"):
        connection.connect()
    assert server.connections == 0
    assert fetch_image(f"http://localhost:{server.server_port}/png", limits()).reason == "ok"


def test_the_address_counts_and_not_the_name(server, monkeypatch):
    names = resolve_to(monkeypatch, server.server_address)
    assert fetch_image("http://example.com/png", limits(allow_private_hosts=False)).reason == "private_address"
    assert server.connections == 0
    assert fetch_image("http://example.com./png", limits()).reason == "ok"
    assert fetch_image("http://[2001:db8::1]:8080/png", limits()).reason == "ok"
    assert server.headers["Host"] == "[2001:db8::1]:8080"
    # each asked once: what was checked is what is connected to
    assert names == ["example.com", "example.com.", "2001:db8::1"]
    # one private address among public ones, as a name that is bound anew would have
    resolve_to(monkeypatch, ("93.184.216.34", 80), server.server_address)
    monkeypatch.setattr(download._BoundedSocket, "connect", lambda *args: (_ for _ in ()).throw(OSError("no route")))
    assert fetch_image("http://example.com/png", limits(allow_private_hosts=False)).reason == "private_address"


def test_the_peer_counts_and_not_the_address_asked_for(server, monkeypatch):
    resolve_to(monkeypatch, ("93.184.216.34", 80))
    here = server.server_address
    monkeypatch.setattr(download._BoundedSocket, "connect", lambda self, _: socket.socket.connect(self, here))
    assert fetch_image("http://example.com/png", limits(allow_private_hosts=False)).reason == "private_address"
    assert server.requests == []
    assert fetch_image("http://example.com/png", limits()).reason == "ok"


def test_unreachable_hosts(monkeypatch):
    assert fetch_image(f"http://127.0.0.1:{closed_port()}/a", limits()) == (None, "unreachable", 0, 0)
    asked = []
    for code, times in {socket.EAI_NONAME: 1, socket.EAI_AGAIN: 3}.items():

        def getaddrinfo(*args, code=code, **kwargs):
            asked.append(code)
            raise socket.gaierror(code, "no such name")

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        assert fetch_image("http://example.com/a", limits(retries=2)).reason == "unreachable"
        assert asked.count(code) == times


def test_all_addresses_of_a_name_are_tried_within_the_time(server, monkeypatch):
    resolve_to(monkeypatch, ("127.0.0.1", closed_port()), server.server_address)
    assert fetch_image("http://example.com/png", limits()).reason == "ok"
    resolve_to(monkeypatch, server.server_address, server.server_address)
    sockets = iter([OSError(errno.EAFNOSUPPORT, "no IPv6 here"), None])

    class FirstFails(download._BoundedSocket):
        def __init__(self, *args):
            if error := next(sockets):
                raise error
            super().__init__(*args)

    with monkeypatch.context() as patch:
        patch.setattr(download, "_BoundedSocket", FirstFails)
        assert fetch_image("http://example.com/png", limits()).reason == "ok"

    def connect(self, address):
        if address[1] == 1:  # never answers
            time.sleep(self.gettimeout())
            raise TimeoutError
        socket.socket.connect(self, address)

    monkeypatch.setattr(download._BoundedSocket, "connect", connect)
    resolve_to(monkeypatch, ("127.0.0.1", 1), server.server_address)
    assert fetch_image("http://example.com/png", limits(timeout=0.6)).reason == "ok"
    resolve_to(monkeypatch, ("127.0.0.1", 1))
    assert fetch_image("http://example.com/png", limits(timeout=0.1)).reason == "timeout"


def test_running_out_of_sockets_is_not_the_servers_fault(monkeypatch):
    def no_socket(*args):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(download, "_BoundedSocket", no_socket)
    with pytest.raises(OSError, match="Too many open files"):
        fetch_image("http://127.0.0.1/a", limits())


def test_tls_is_verified_and_ends_at_the_deadline_too(tmp_path, monkeypatch):
    (tmp_path / "cert.pem").write_text(CERTIFICATE)
    (tmp_path / "key.pem").write_text(PRIVATE_KEY)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with Server(context) as server:
        monkeypatch.setattr(download, "_tls_context", download._tls_context.__wrapped__)
        assert fetch_image(f"{server.url}/png", limits(retries=2)) == (None, "unreachable", 0, 0)
        assert server.connections == 1 and server.requests == []

        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        assert fetch_image(f"{server.url}/png", limits()).image == PNG
        wrong_name = f"https://localhost:{server.server_port}/png"
        assert fetch_image(wrong_name, limits()).reason == "unreachable"
        assert fetch_image(f"{server.url}/png", limits(allow_private_hosts=False)).reason == "private_address"
        server.routes["/slow"] = raw(b"HTTP/1.0 200 OK\r\n\r\n" + PNG, pause=0.02)
        assert fetch_image(f"{server.url}/slow", limits(timeout=0.3)).reason == "timeout"
        assert server.requests == ["/png", "/slow"]
    with Server() as plain:
        assert fetch_image(f"https://127.0.0.1:{plain.server_port}/png", limits()).reason == "unreachable"


def test_results_come_in_the_order_of_the_urls(server):
    def route(handler):
        number = int(handler.path.split("?")[1])
        time.sleep(0.02 * (number % 3 == 0))
        answer(encoded(size=(number + 1, 1)) if number % 5 else b"", 200 if number % 5 else 404)(handler)

    server.routes["/x"] = route
    urls = (f"{server.url}/x?{number}" for number in range(40))
    results = list(download_images(urls, limits(), num_workers=6))
    expected = [("ok", number + 1) if number % 5 else ("http_404", 0) for number in range(40)]
    assert [(result.reason, result.width) for result in results] == expected
    assert list(download_images([], limits())) == []


def workers_left() -> int:
    return sum(thread.name.startswith("download") for thread in threading.enumerate())


def wait_for_workers() -> None:
    deadline = time.monotonic() + 5
    while workers_left() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert workers_left() == 0


@pytest.mark.parametrize(("bound", "value", "most"), [("MAX_HELD_PER_WORKER", 5, 10), ("MAX_HELD_BYTES", 0, 5)])
def test_one_slow_url_does_not_let_an_endless_stream_pile_up(server, monkeypatch, bound, value, most):
    monkeypatch.setattr(download, bound, value)
    read = []
    read_when_answered = []

    def slow(handler):
        time.sleep(0.3)
        read_when_answered.append(len(read))
        answer(PNG)(handler)

    def urls():
        for number in itertools.count():
            read.append(number)
            yield f"{server.url}/{'png' if number else 'slow'}"

    server.routes["/slow"] = slow
    results = download_images(urls(), limits(), num_workers=2)
    assert next(results).image == PNG
    # never idle, never further ahead than the bound; without it, there is time for more than a hundred
    assert 3 <= read_when_answered[0] <= most
    assert [next(results).reason for _ in range(30)] == ["ok"] * 30
    assert len(read) <= 31 + most
    results.close()
    wait_for_workers()


def test_giving_up_cancels_what_waits_and_ends_the_threads(server):
    server.routes["/slow"] = lambda handler: (time.sleep(0.3), answer(PNG)(handler))
    urls = itertools.chain([f"{server.url}/png"], itertools.repeat(f"{server.url}/slow"))
    results = download_images(urls, limits(retries=5), num_workers=2)
    assert next(results).reason == "ok"
    assert workers_left() == 2
    results.close()
    wait_for_workers()
    assert len(server.requests) <= 3  # of four that were begun or waiting


def test_giving_up_ends_the_pauses_before_retries(server, monkeypatch):
    monkeypatch.setattr(download, "BACKOFF", 60.0)
    server.routes["/x"] = answer(b"", 500)
    results = download_images([f"{server.url}/png"] + [f"{server.url}/x"] * 9, limits(retries=5), num_workers=2)
    assert next(results).reason == "ok"
    results.close()
    wait_for_workers()


def test_an_error_of_the_urls_is_raised_and_ends_the_threads(server):
    def urls():
        yield f"{server.url}/png"
        raise RuntimeError("the dataset ended early")

    with pytest.raises(RuntimeError, match="the dataset ended early"):
        list(download_images(urls(), limits()))
    wait_for_workers()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_bytes": 0}, "`max_bytes` is 0; it must be at least 1"),
        ({"max_pixels": 0}, "`max_pixels` is 0; it must be at least 1"),
        ({"max_pixels": MAX_PIXELS + 1}, f"`max_pixels` is {MAX_PIXELS + 1}; nothing above {MAX_PIXELS}"),
        ({"min_side": -1}, "`min_side` is -1; it must be at least 0"),
        ({"min_side": 11, "max_pixels": 120}, "`min_side` is 11 and `max_pixels` 120, which no image can satisfy"),
        ({"retries": -1}, "`retries` is -1; it must be at least 0"),
        ({"max_redirects": -1}, "`max_redirects` is -1; it must be at least 0"),
        ({"timeout": 0.0}, "`timeout` is 0.0; it must be a positive number"),
        ({"timeout": float("inf")}, "`timeout` is inf; it must be a positive number"),
        ({"timeout": float("nan")}, "`timeout` is nan; it must be a positive number"),
    ],
)
def test_limits_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        DownloadLimits(**changes)


def test_at_least_one_worker():
    with pytest.raises(ValueError, match="`num_workers` is 0; it must be at least 1"):
        download_images([], limits(), num_workers=0)
