#!/usr/bin/env python3
"""Reads the vectors of socks and stdio beside its directory, or in the one that is named, and holds a
decoder of its own against them: what an author in another language does with these files, and how much it takes.

It decodes the whole handshake of a server (`server free` and `server bound` of socks) and the control lines of
both directions (`child`, `host`, `stream` and `address` of stdio). Other kinds are counted as left out.
"""
import collections, ipaddress, json, pathlib, re, sys

SPACE = " \t\r\n"


class Refused(Exception):
    """A server's reply has this code; None is no reply."""


def depth_of(text):
    """The levels of JSON, as far as it goes: no parser is given more than 64."""
    deepest, depth = 0, 0
    for c in re.sub(r'"(?:[^"\\]|\\.)*"', "", text, flags=re.S):
        depth += (c in "{[") - (c in "}]")
        deepest = max(deepest, depth)
    return deepest


def parse(text, pairs=None):
    def constant(name):
        raise ValueError(name)  # NaN and its kin are not JSON
    return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)


# The handshake of a server (SOCKS).

def bytes_of(text):
    out = bytearray()
    for quoted, byte, times in re.findall(r"'([^']*)'|([0-9a-f]{2})(?:\*(\d+))?", text):
        out += quoted.encode() if not byte else bytes([int(byte, 16)]) * int(times or 1)
    return bytes(out)


class Stream:
    def __init__(self, data, late, ended):
        self.data, self.late, self.ended = data, late, ended

    def take(self, n):
        out, self.data = self.data[:n], self.data[n:]
        if len(out) < n:
            raise Refused(self.late)
        return out


def raw(stream):  # SOCKS-4
    text, opened, quoted, escaped = bytearray(), [], False, False
    while len(text) < 65536:
        c = stream.take(1).decode("latin-1")
        text.append(ord(c))
        if quoted:
            escaped, quoted = c == "\\" and not escaped, escaped or c != '"'
        elif c in "{[" and (opened or c == "{"):
            opened.append(c)
            if len(opened) > 64:
                raise Refused(0x10)
        elif not opened and c not in SPACE:
            raise Refused(0x12)
        elif c in "}]":
            if opened.pop() + c not in ("{}", "[]"):
                raise Refused(0x12)
            if not opened:
                return bytes(text)
        else:
            quoted = c == '"'
    raise Refused(0x10)


def settings_of(stream, method):
    stream.late = 0x12 if stream.ended else 0x11  # SOCKS-6
    if method == 0x09 or stream.data[:1] == b"\0":  # SOCKS-3
        size = int.from_bytes(stream.take(4), "big")
        if size > 65536:
            raise Refused(0x10)
        text = stream.take(size)
    else:
        text = raw(stream)
    try:
        text = text.decode().strip(SPACE)
        if depth_of(text) > 64:
            raise Refused(0x10)
        if not isinstance(value := parse(text), dict):
            raise Refused(0x12)
    except ValueError:
        raise Refused(0x12)
    return text if value else None  # SOCKS-19


def destination(stream, bound):
    stream.late = 1 if stream.ended else 6
    version, command, _, kind = stream.take(4)
    if version != 5 or command != 1 or kind not in (1, 3, 4):  # SOCKS-7
        raise Refused(1 if version != 5 else 7 if command != 1 else 8)
    host = stream.take({1: 4, 4: 16}.get(kind) or stream.take(1)[0])
    port = int.from_bytes(stream.take(2), "big")
    if bound and (kind, bytes(host), port) == (4, bytes(16), 0):  # SOCKS-11
        return "-"
    try:
        name = host.decode() if kind == 3 else str(ipaddress.ip_address(host))
    except UnicodeDecodeError:
        raise Refused(2)
    if ":" in name:
        try:
            ipaddress.IPv6Address(name)
        except ValueError:
            raise Refused(2)
        name = f"[{name}]"
    if bound or not port or not name or kind == 3 and re.search(r"[\0- \x7f]|[\[\]].*[^\]]$", name):  # SOCKS-12
        raise Refused(2)
    return f"{name}:{port}"


def serve(data, bound, ended, failing):
    stream, answer, dial, settings = Stream(data, None, ended), bytearray(), None, None
    try:
        version, count = stream.take(2)
        if version != 5:
            raise Refused(None)
        offered = stream.take(count)
        method = next((m for m in (0x80, 0x09, 0) if m in offered), 0xFF)  # SOCKS-1
        answer += bytes([5, method])
        if method == 0xFF:
            raise Refused(None)
        if method:
            settings = settings_of(stream, method)
        dial = destination(stream, bound)
        raise Refused(failing)
    except Refused as refusal:
        if refusal.args[0] is not None:
            answer += bytes([5, refusal.args[0], 0, 1, 0, 0, 0, 0, 0, 0])  # SOCKS-8
    return bytes(answer), dial, settings if dial else None


def socks(path):
    sent, wanted, rest = b"", b"", {}
    for line in path.read_text(encoding="utf-8").splitlines():
        word, _, value = line.partition(" ")
        if word == ">":
            sent += bytes_of(value)
        elif word == "<":
            wanted += bytes_of(value)
        else:
            rest[word] = value
    if rest.get("server") not in ("free", "bound"):
        yield path.stem, None, None
        return
    settings = bytes_of(rest["settings"]).decode() if "settings" in rest else None
    got = serve(sent, rest["server"] == "bound", "end" in rest, int(rest.get("fail", "0"), 16))
    yield path.stem, got, (wanted, rest.get("dial"), settings)


# The control lines (LINE, SIG, STAT).

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
CLASSES = (*range(1, 9), *range(0x10, 0x14))
LETTERS = dict(zip("abefnrtv\\\"'?", b"\a\b\x1b\f\n\r\t\v\\\"'?"))


class Malformed(Exception):
    """The arguments are not understood."""


def check(ok):
    if not ok:
        raise Malformed


def pairs_of(text):  # LINE-6
    pairs, item, key = [], "", None
    for escaped, c in re.findall(r"\\([\\,=])|(.)", text) + [("", ",")]:
        if c == ",":
            if key or key is None and item:
                pairs.append([item, ""] if key is None else [key, item])
            item, key = "", None
        elif c == "=" and key is None:
            item, key = "", item
        else:
            item += escaped or c
    return pairs


def quoted_of(text):  # LINE-9
    out, at = bytearray(), 0
    while at < len(text):
        m = re.compile(r'(")|\\([0-7]{1,3})|\\x([0-9A-Fa-f]{1,2})|\\(.)|([^\\])', re.S).match(text, at)
        check(m)
        at = m.end()
        end, octal, hexadecimal, letter, plain = m.groups()
        if end:
            return out.decode("utf-8", "replace"), text[at:]
        if letter:
            check(letter in LETTERS)
            out.append(LETTERS[letter])
        elif plain:
            out += plain.encode()
        else:
            value = int(octal, 8) if octal else int(hexadecimal, 16)
            check(value < 256)
            out.append(value)
    raise Malformed


def attributes(text):
    attrs, text = [], text.strip(" ")
    while text:
        key, equals, text = text.partition("=")
        check(equals and key and not re.search('[ "]', key))
        if text.startswith('"'):
            value, text = quoted_of(text[1:])
            check(not text or text[0] == " ")
        else:
            value, _, text = text.partition(" ")
        attrs.append([key, value])
        text = text.lstrip(" ")
    check(attrs)
    return attrs


def error_of(text):  # LINE-8
    try:
        told = parse(text)
        check(isinstance(told, dict) and told)
        check(type(told.get("class", 1)) is int and isinstance(told.get("message", ""), str))
    except (ValueError, Malformed):
        return {"class": 1, "message": text}
    about = {k: v if isinstance(v, str) else json.dumps(v) for k, v in told.items()
             if k in ("pointer", "value", "problem", "remedy")}
    code = told.get("class", 19 if about else 1)
    return {"class": code if code in CLASSES else 1, "message": told.get("message", ""), **({"config": about} if about else {})}


def message_of(text):  # SIG-1, SIG-2, SIG-4
    def once(pairs):
        check(len(dict(pairs)) == len(pairs))
        return dict(pairs)
    check(len(text.encode()) <= 32768 and depth_of(text) <= 64)
    try:
        m = parse(text, once)
    except ValueError:
        raise Malformed
    check(isinstance(m, dict) and isinstance(m.get("body"), dict) and set(m) <= {"body", "peer"} and isinstance(m.get("peer", ""), str))
    return {k: v for k, v in m.items() if v != ""}


def number(text):
    check(re.fullmatch("[0-9]+", text) and int(text) < 1 << 64)
    return int(text)


def endpoint(text):
    m = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([0-9.]+)):([0-9]{1,5})", text)
    check(m and 0 < int(m[3]) < 65536)
    try:
        return ipaddress.IPv6Address(m[1]) if m[1] else ipaddress.IPv4Address(m[2])
    except ValueError:
        raise Malformed


def arguments(keyword, rest, child):
    """The parts of a line, or None for a keyword that a reader does not know."""
    words, text = rest.split(), rest.strip(" ")
    args = lambda: pairs_of(next((w[5:] for w in words if w.startswith("ARGS:")), ""))
    if keyword in ("CMESSAGE", "SMESSAGE"):
        return message_of(text)
    if keyword == "STATS":
        check(words)
        if not child:
            return {"id": number(words[0]), "client": (words + [""])[1]}
        try:
            return {"id": number(words[0]), "json": parse(text.partition(" ")[2])}
        except ValueError:
            raise Malformed
    if not child:
        return None
    if keyword == "VERSION":
        check(words)
        return {"version": words[0]}
    if keyword in ("VERSION-ERROR", "ENV-ERROR", "PROXY-ERROR"):
        return {"text": text}
    if keyword in ("PROXY", "CMETHODS", "SMETHODS"):
        check(text == "DONE")
        return {"keyword": keyword + " DONE"}
    if keyword == "CMETHOD":
        check(len(words) > 2 and NAME.fullmatch(words[0]))
        return {"name": words[0], "protocol": words[1], "addr": words[2], "args": args()}
    if keyword == "SMETHOD":
        check(len(words) > 1 and NAME.fullmatch(words[0]) and endpoint(words[1]))
        return {"name": words[0], "addr": words[1], "args": args()}
    if keyword in ("CMETHOD-ERROR", "SMETHOD-ERROR"):
        check(words)
        return {"name": words[0], **error_of(text.partition(" ")[2].strip(" "))}
    if keyword in ("LOG", "STATUS"):
        attrs = attributes(rest)
        first = dict(reversed(attrs))
        if keyword == "STATUS":
            transport = first.get("TRANSPORT", "")
            return {"transport": transport, "attrs": [a for a in attrs if a[0] != "TRANSPORT"]}
        severity = first.get("SEVERITY", "").lower()
        check("MESSAGE" in first and severity in ("error", "warning", "notice", "info", "debug"))
        return {"severity": severity, "message": first["MESSAGE"]}
    return None


def line(data, child):  # LINE-1, LINE-2
    if len(data) > 65535:
        return "error too-long"
    try:
        m = re.fullmatch(r"([A-Za-z0-9_-]+)(?: ([^\0]*))?", data.decode().removesuffix("\r"))
    except UnicodeDecodeError:
        m = None
    if not m:
        return "error form"
    keyword, rest = m[1], m[2] or ""
    try:
        parts = arguments(keyword, rest, child)
    except Malformed:
        return "error arguments"
    return {"ignored": keyword, "rest": rest} if parts is None else {"keyword": keyword, **parts}


def stream(data):
    *lines, last = data.split(b"\n")
    seen = [{"error": "too-long"} if len(l) > 65535 else len(l) if len(l) > 100 else l.decode() for l in lines]
    if len(last) > 65535:
        return seen + [{"error": "too-long"}, {"end": "whole"}]
    return seen + [{"end": "cut off" if last else "whole"}]


def address(data):  # LINE-5
    text = data.decode()
    if re.fullmatch(r"unix:[A-Za-z0-9._-]{1,64}", text) and text not in ("unix:.", "unix:.."):
        return {"network": "unix", "address": text[5:]}
    try:
        check(endpoint(text).is_loopback and not text.startswith("[::ffff"))
        return {"network": "tcp", "address": text}
    except Malformed:
        return "error"


KINDS = {"child": lambda b: line(b, True), "host": lambda b: line(b, False), "stream": stream, "address": address}


def encoded(text):
    out = bytearray()
    for byte, times, plain in re.findall(r"%([0-9A-F]{2})|%\{(\d+)\}|(.)", text):
        out += bytes([int(byte, 16)]) if byte else out[-1:] * (int(times) - 1) if times else plain.encode()
    return bytes(out)


def stdio(path):
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        v = dict(re.findall(r"^(\w+): ?(.*)$", block, flags=re.M))
        if "name" in v:
            want = v["want"] if v["want"].startswith("error") else json.loads(v["want"]) if v["input"] in KINDS else None
            yield f"{path.stem}: {v['name']}", KINDS[v["input"]](encoded(v["bytes"])) if v["input"] in KINDS else None, want


def main():
    root, wrong = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent.parent), 0
    for directory, read in (("socks", socks), ("stdio", stdio)):
        count = collections.Counter()
        for path in sorted((root / directory).glob("*.txt")):
            for name, got, want in read(path):
                count["left out" if got is None else "agree" if got == want else "differ"] += 1
                if got is not None and got != want:
                    print(f"{directory}: {name}:\n\tgot  {str(got)[:300]}\n\twant {str(want)[:300]}")
        print(f"{directory}: {count['agree']} agree, {count['differ']} differ, {count['left out']} left out")
        wrong += count["differ"] + (not count["agree"])
    sys.exit(bool(wrong))


main()
