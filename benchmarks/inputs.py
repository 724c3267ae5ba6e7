"""Bad input for the service, as much as is wanted: the same for the same seed."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote_from_bytes

from benchmarks.floods import request

LARGEST = 2**20  # bytes
PATHS = ("/score", "/score", "/score", "/score/batch", "/explain")
FORM = "application/x-www-form-urlencoded"
WORDS = (
    *("free", "win", "now", "ok", "call", "\u00a3100", "09061701461", "see", "u", "at", "7", "http://x.example/a?b=c"),
    *("\U0001f600", "\u2028", "\ufb01", "\u0130", "caf\u00e9"),
)
PART = b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\nfree\r\n--x--\r\n'
VALID = (
    (b'{"text": "WINNER! Call 09061701461 now", "threshold": 0.5}', "application/json"),
    (b'{"texts": ["see you at 6", "Claim your prize now"], "threshold": "0.5"}', "application/json"),
    (b"text=Claim+your+%C2%A3100+now&threshold=0.5", FORM),
    (PART, "multipart/form-data; boundary=x"),
)
FIELDS = ("text", "text", "text", "texts", "texts", "threshold", "threshold", "", "__proto__", "te\\u0078t", "TEXT")
NUMBERS = (
    *("0", "1", "-0", "0.5", "1e-5", "1e400", "-1e-400", "NaN", "Infinity", "-Infinity", "1_0", "01", "+1", ".5", "1."),
    *("0x10", "9" * 5000, "0." + "3" * 5000, "1e", "1e99999999999", "\u0661", "18446744073709551616", "true", "null"),
)
STRINGS = (
    *(
        '""',
        '"\\ud800"',
        '"\\udc00\\ud800"',
        '"\\u0000"',
        '"\\x"',
        '"\x00"',
        '"\t"',
        "'free'",
        '"unended',
        '"\\u12"',
        '"\\"',
    ),
    *('"\u202egnirts\u202c"', '"' + "\u0301" * 500 + '"', '"' + "\\u0041" * 300 + '"', '"%ff%00"', '"0.5"', '" .5\\n"'),
)
TYPES = (
    *("application/json; charset=utf-16", "application/json; charset=nothing", "application/vnd.x+json", "text/plain"),
    *(
        "",
        "multipart/form-data",
        "application/json, text/plain",
        "APPLICATION/JSON;;;=",
        "a" * 3000,
        "\x01/\x02",
        "*/*",
    ),
)


@dataclass(frozen=True)
class Input:
    """Bytes to send, and what must come of them.

    `answers` is how many answers are due; 0 where the framing is broken, so that the server may also close the
    connection. `leaves` tells that the client goes away at once, without a word.
    """

    kind: str
    content: bytes
    answers: int = 1
    leaves: bool = False


def pick_size(rng: random.Random, largest: int) -> int:
    """Return a size up to `largest`, each order of magnitude as often as the others."""
    return int(largest ** rng.random())


def make_text(rng: random.Random) -> str:
    """Return a text, sometimes of odd characters and sometimes longer than is allowed."""
    size = pick_size(rng, 300) if rng.random() < 0.99 else pick_size(rng, 12_000)
    match rng.randrange(4):
        case 0:
            return "".join(chr(rng.randrange(1, 0xD800)) for _ in range(size))
        case 1:
            return "".join(rng.choices("aA1 .,!\u00e9", k=size))
        case _:
            return " ".join(rng.choices(WORDS, k=size // 5 + 1))


def make_value(rng: random.Random, depth: int = 3) -> str:
    """Return what stands for a value in JSON, valid or not."""
    match rng.randrange(8 if depth else 6):
        case 0:
            return rng.choice(NUMBERS)
        case 1:
            return rng.choice(STRINGS)
        case 2 | 3 | 4 | 5:
            return '"' + make_text(rng).replace("\\", "\\\\").replace('"', '\\"') + '"'
        case 6:
            return "[" + ",".join(make_value(rng, depth - 1) for _ in range(pick_size(rng, 30))) + "]"
        case _:
            return make_object(rng, depth - 1)


def make_object(rng: random.Random, depth: int = 3) -> str:
    """Return an object in JSON, with the fields of the service in it, some of them twice."""
    pairs = [f'"{rng.choice(FIELDS)}": {make_value(rng, depth)}' for _ in range(rng.randrange(1, 6))]
    return "{" + ",".join(pairs) + "}"


def make_json(rng: random.Random) -> tuple[bytes, str]:
    """Return a body and its type: JSON, more or less."""
    type = rng.choice(TYPES) if rng.random() < 0.05 else "application/json"
    match rng.randrange(12):
        case 0:
            bracket = rng.choice(("[", '{"text":', '[{"a":[', '{"texts":['))
            text = bracket * pick_size(rng, 20_000)
        case 1:
            text = make_value(rng)
        case 2:
            text = '{"texts": [' + ",".join(make_value(rng, 0) for _ in range(pick_size(rng, 1100))) + "]}"
        case 3:
            text = "{" + ",".join(f'"{i}":0' for i in range(pick_size(rng, 30_000))) + ',"text":"free"}'
        case 4:
            text = make_object(rng)
            text = text[: rng.randrange(len(text))] + rng.choice(("", "}", "]", '"', ",", "\x00", "//", "{}"))
        case _:
            text = make_object(rng)
    body = text.encode(rng.choice(("utf-8",) * 12 + ("utf-16", "utf-32-le", "utf-8-sig", "utf-7")), "surrogatepass")
    if rng.random() < 0.003:
        body += b" " * (LARGEST + rng.randrange(-1, 2) - len(body))
    if rng.random() < 0.05:
        body = body.replace(b"e", rng.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80")))
    return body, type


def make_form(rng: random.Random) -> tuple[bytes, str]:
    """Return a body and its type: a form, more or less."""
    pairs = []
    for _ in range(pick_size(rng, 8) if rng.random() < 0.97 else pick_size(rng, 3000)):
        name = rng.choice((*FIELDS, "%ff", "&", "=", "text[]", "%00", "+"))
        match rng.randrange(4):
            case 0:
                value = rng.choice(NUMBERS)
            case 1:
                value = rng.choice(("%", "%f", "%ff", "%zz", "%u0041", "%00", "+", "%e2%82", "a=b", ";")) * pick_size(
                    rng, 200
                )
            case _:
                value = quote_from_bytes(make_text(rng).encode())
        pairs.append(f"{name}{rng.choice('==== &')}{value}")
    body = rng.choice("&&&&;").join(pairs).encode(rng.choice(("utf-8", "utf-8", "utf-16")))
    return body, rng.choice(
        (FORM,) * 10 + (f"{FORM}; charset=utf-16", f"{FORM}; charset=nothing", f"{FORM};boundary=x")
    )


def make_multipart(rng: random.Random) -> tuple[bytes, str]:
    """Return a body and its type: a form of parts, more or less."""
    boundary = rng.choice(("x", "x", "x", "-" * 70, "a'()+_,-./:=? b", "é", "b" * 3000, "x\x00y"))
    parts = []
    for _ in range(pick_size(rng, 8) if rng.random() < 0.97 else pick_size(rng, 2000)):
        name = rng.choice((*FIELDS, '"', "x" * pick_size(rng, 2000), "\x00", "é"))
        head = [
            f'Content-Disposition: form-data; name="{name}"'
            + rng.choice(("", "", "", '; filename="a"', "; filename*=x''%ff"))
        ]
        head += rng.sample(
            (
                "Content-Type: text/plain; charset=utf-7",
                "Content-Transfer-Encoding: base64",
                "no colon",
                "A: " + "b" * 2000,
                "",
            ),
            rng.choice((0, 0, 0, 1, 2)),
        )
        value = rng.choice(NUMBERS) if rng.random() < 0.3 else make_text(rng)
        parts.append("\r\n".join((rng.choice(("--",) * 12 + ("-", "")) + boundary, *head, "", value, "")))
    body = "".join(parts) + rng.choice(
        (f"--{boundary}--\r\n",) * 4 + (f"--{boundary}", "", "--", "\r\n\r\n", f"--{boundary}--" * 50)
    )
    if rng.random() < 0.1:
        body = body.replace("\r\n", rng.choice(("\n", "\r", "\r\n\r\n")))
    stated = rng.choice(
        (f"; boundary={boundary}",) * 8 + (f'; boundary="{boundary}"', "", "; boundary=", "; boundary=y")
    )
    # A line break in the head would be another framing.
    return body.encode("utf-8", "surrogatepass"), "multipart/form-data" + stated


def framed(make: Callable[[random.Random], tuple[bytes, str]]) -> Callable[[str, random.Random], Input]:
    """Return what makes a whole request of a body and its type."""

    def make_request(kind: str, rng: random.Random) -> Input:
        body, type = make(rng)
        return Input(kind, request(rng.choice(PATHS), body, type=type))

    return make_request


def mutate(kind: str, rng: random.Random) -> Input:
    """Return a valid request in which some bytes were changed, in its body or anywhere."""
    body, type = rng.choice(VALID)
    in_body = rng.random() < 0.7
    content = bytearray(body if in_body else request("/score", body, type=type))
    for _ in range(pick_size(rng, 12)):
        start = rng.randrange(len(content) + 1)
        end = start + pick_size(rng, 10)
        match rng.randrange(4):
            case 0:
                content[start : start + 1] = bytes((rng.randrange(256),))
            case 1:
                del content[start:end]
            case 2:
                content[start:start] = content[start:end] * pick_size(rng, 20)
            case _:
                content[start:start] = rng.choice(
                    (b"\x00", b"\r\n", b'"', b"%", b"--x", b"\\", b"\xff\xfe", b"{", b"0" * 30)
                )
    if in_body:
        return Input(kind, request(rng.choice(PATHS), bytes(content), type=type))
    return Input(kind, bytes(content), answers=0)


def make_raw(kind: str, rng: random.Random) -> Input:
    """Return what no client of HTTP would send, or stops to send in the midst of it."""
    whole = request("/score", b'{"text": "free"}')
    head, _, body = whole.partition(b"\r\n\r\n")
    chunked = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    match rng.randrange(12):
        case 0:
            line = rng.choice(
                (
                    b"",
                    b"\r\n",
                    b"GET",
                    b"GET /",
                    b"GET / HTTP/9.9",
                    b"get  /  http/1.1",
                    b"\x16\x03\x01\x02",
                    b"PRI * HTTP/2.0",
                )
            )
            return Input(kind, line + rng.randbytes(pick_size(rng, 50)) + b"\r\nHost: x\r\n\r\n", answers=0)
        case 1:
            size = rng.choice((b"z", b"-1", b"", b"FFFFFFFFFFFFFFFFF", b"10;" + b"x" * 5000, b"0x10", b"1 0", b"5"))
            return Input(
                kind, chunked + size + b"\r\n" + body + rng.choice((b"\r\n0\r\n\r\n", b"", b"0\r\n")), answers=0
            )
        case 2:
            pieces = [body[i : i + 3] for i in range(0, len(body), 3)]
            content = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n"
            return Input(kind, chunked + content + rng.choice((b"\r\n", b"X: y\r\n\r\n")))
        case 3:
            length = rng.choice(
                (b"0", b"1", b"17", b"1000000", b"99999999999999999999", b"-1", b"+16", b"1_6", b"16, 16", b"", b"x")
            )
            return Input(
                kind, head.replace(b"Content-Length: 16", b"Content-Length: " + length) + b"\r\n\r\n" + body, answers=0
            )
        case 4:
            extra = rng.choice(
                (
                    b"Content-Length: 3",
                    b"Transfer-Encoding: chunked",
                    b"Transfer-Encoding: gzip",
                    b"Content-Length : 16",
                )
            )
            return Input(kind, head + b"\r\n" + extra + b"\r\n\r\n" + body, answers=0)
        case 5:
            count = pick_size(rng, 60)
            return Input(kind, whole * count, answers=count)
        case 6:
            flood = b"".join(b"X-%d: %s\r\n" % (i, b"y" * pick_size(rng, 300)) for i in range(pick_size(rng, 2000)))
            return Input(kind, head + b"\r\n" + flood + b"\r\n" + body, answers=0)
        case 7:
            name = rng.choice(
                (
                    b"X: " + b"y" * pick_size(rng, 200_000),
                    b"X y: z",
                    b": z",
                    b"X: \x00",
                    b" X: folded",
                    b"\xff: \xff",
                    b"X: a\rb",
                )
            )
            return Input(kind, head + b"\r\n" + name + b"\r\n\r\n" + body, answers=0)
        case 8:
            method = rng.choice((b"PUT", b"DELETE", b"PATCH", b"BREW", b"TRACE", b"OPTIONS", b"CONNECT", b"x" * 200))
            path = rng.choice(
                (
                    b"/score",
                    b"*",
                    b"http://x/score",
                    b"//score",
                    b"/../score",
                    b"/%00",
                    b"/%ff",
                    b"/" + b"a" * 9000,
                    b"/score?\x80",
                    b"x:1",
                )
            )
            return Input(kind, b"%s %s HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n" % (method, path), answers=0)
        case 9:
            extra = rng.choice(
                (
                    b"Expect: 100-continue",
                    b"Expect: x",
                    b"Upgrade: websocket\r\nConnection: upgrade",
                    b"Connection: close",
                    b"Content-Encoding: gzip",
                )
            )
            version = rng.choice((b"HTTP/1.0", b"HTTP/1.1", b"HTTP/1.1"))
            return Input(kind, head.replace(b"HTTP/1.1", version) + b"\r\n" + extra + b"\r\n\r\n" + body, answers=0)
        case 10:
            return Input(kind, rng.randbytes(pick_size(rng, 3000)), answers=0, leaves=rng.random() < 0.5)
        case _:
            return Input(kind, whole[: rng.randrange(1, len(whole))], answers=0, leaves=rng.random() < 0.5)


MAKERS: dict[str, tuple[int, Callable[[str, random.Random], Input]]] = {
    "JSON": (45, framed(make_json)),
    "forms": (15, framed(make_form)),
    "multipart": (15, framed(make_multipart)),
    "mutations of valid requests": (15, mutate),
    "raw sockets": (10, make_raw),
}


def make_input(rng: random.Random) -> Input:
    """Return an input of any kind, each as often as `MAKERS` says."""
    kind = rng.choices(list(MAKERS), [share for share, _ in MAKERS.values()])[0]
    return MAKERS[kind][1](kind, rng)
