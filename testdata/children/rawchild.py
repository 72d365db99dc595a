#!/usr/bin/env python3
"""A whole transport in the plain form, EXE CONFIG, with nothing but Python's standard library: "raw" connects to
the destination and changes nothing. It has no configuration and no settings: every key is one too many."""
import asyncio, errno, ipaddress, json, os, signal, socket, struct, sys, threading
from contextlib import suppress

CODES = {errno.EACCES: 2, errno.EPERM: 2, errno.ENETUNREACH: 3, errno.EHOSTUNREACH: 4, errno.ECONNREFUSED: 5,
         errno.ETIMEDOUT: 6, errno.EAFNOSUPPORT: 8}  # ERR-1
connections = set()  # the tasks that serve one

class Refused(Exception):
    """The client gets a reply with this code."""

async def read_settings(take, method):
    c = await take(1)
    if method == 0x09 or c == b"\0":  # SOCKS-3
        size, = struct.unpack(">I", c + await take(3))
        if size > 65536:
            raise Refused(0x10)
        return await take(size)
    text, nested, quoted, escaped = bytearray(c), [], False, False  # SOCKS-4: they end where the object ends
    while len(text) <= 65536:
        if quoted:
            quoted, escaped = escaped or c != b'"', c == b"\\" and not escaped
        elif (not nested and c not in b" \t\r\n{" or c in b"{[" and len(nested) == 64
              or c in b"}]" and nested.pop() + c not in (b"{}", b"[]")):
            raise Refused(0x10 if len(nested) == 64 else 0x12)
        elif c in b"}]" and not nested:
            return text
        elif c in b"{[":
            nested.append(c)
        else:
            quoted = c == b'"'
        c = await take(1)
        text += c
    raise Refused(0x10)

async def handshake(take, writer):
    version, count = await take(2)
    offered = await take(count)
    method = next((m for m in (0x80, 0x09, 0x00) if m in offered and version == 5), 0xFF)  # SOCKS-1
    writer.write(bytes([5, method]))
    if method == 0xFF:
        raise EOFError
    try:  # 9 seconds leave time for the reply before the handshake as a whole is too late
        settings = json.loads((await asyncio.wait_for(read_settings(take, method), 9)).decode()) if method else {}
    except asyncio.TimeoutError:
        raise Refused(0x11)  # SOCKS-6
    except (ValueError, RecursionError):
        raise Refused(0x12)
    if settings != {}:  # SOCKS-19
        raise Refused(0x13 if isinstance(settings, dict) else 0x12)
    _, command, _, kind = await take(4)
    if command != 1 or kind not in (1, 3, 4):
        raise Refused(7 if command != 1 else 8)  # SOCKS-7
    host = await take({1: 4, 4: 16}.get(kind) or (await take(1))[0])
    port, = struct.unpack(">H", await take(2))
    if not host or not port:
        raise Refused(2)  # SOCKS-12
    return host.decode("utf-8", "replace") if kind == 3 else str(ipaddress.ip_address(host)), port

async def dial(reader, dest):  # SOCKS-14: the end of the client's stream before early data cancels
    dialing, watching = map(asyncio.ensure_future, (asyncio.open_connection(*dest), reader.read(65536)))
    await asyncio.wait((dialing, watching), return_when=asyncio.FIRST_COMPLETED)
    if not dialing.done() and (watching.exception() or not watching.result()):
        dialing.cancel()
        raise EOFError
    try:
        from_wire, to_wire = await dialing
    except OSError as e:  # ERR-2
        raise Refused(4 if isinstance(e, socket.gaierror) else CODES.get(e.errno, 1))
    to_wire.write(b"" if watching.cancel() else watching.result())
    return from_wire, to_wire

async def copy(reader, writer):  # SOCKS-15: the end of one direction leaves the other open
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write_eof()

async def serve(reader, writer):
    code = 0
    try:
        dest = await asyncio.wait_for(handshake(reader.readexactly, writer), 10)  # SOCKS-9
        from_wire, to_wire = await dial(reader, dest)
    except Refused as refused:
        code, = refused.args
    writer.write(bytes([5, code, 0, 1, 0, 0, 0, 0, 0, 0]))  # SOCKS-8
    if code:
        writer.write_eof()
        while await asyncio.wait_for(reader.read(65536), 1):
            pass  # closing over unread bytes would destroy the reply
        return
    try:
        await asyncio.gather(copy(reader, to_wire), copy(from_wire, writer))
    except OSError:  # SOCKS-15: what broke must not look like an end
        for end in (to_wire, writer):
            with suppress(OSError):
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.transport.abort()
    to_wire.close()

def known(writer):  # SOCKS-17, where the system is Linux: the kernel looks the client's socket up
    (theirs, their_port), (ours, our_port) = map(writer.get_extra_info, ("peername", "sockname"))
    ends = struct.pack(">HH4s12x4s12x", their_port, our_port, socket.inet_aton(theirs), socket.inet_aton(ours))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as diag:
        diag.send(struct.pack("=IHHIIBBxxI36sIII", 72, 20, 1, 0, 0, socket.AF_INET, socket.IPPROTO_TCP, 0xFFFFFFFF,
                              ends, 0, 0xFFFFFFFF, 0xFFFFFFFF))
        answer = diag.recv(4096)
    return answer[20:56] == ends and struct.unpack_from("=I", answer, 80)[0] == os.geteuid()

async def accept(reader, writer):
    connections.add(asyncio.current_task())
    with suppress(OSError, EOFError, asyncio.TimeoutError):
        if len(connections) <= 4096 and (sys.platform != "linux" or known(writer)):  # SOCKS-10
            await serve(reader, writer)
    writer.close()
    connections.discard(asyncio.current_task())

async def main(args):
    args = args[1:] if args[:1] == ["client"] else args
    if len(args) not in (1, 2):  # a HOST is ignored
        return 64, "usage: rawchild.py [client] CONFIG"
    try:
        config = json.loads(args[0].encode())
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        return 65, "CONFIG is not one JSON object in UTF-8"  # ARG-3
    print("VERSION 1", flush=True)
    for key in config:  # CFG-1
        told = {"class": 0x13, "message": "CONFIG has no keys", "problem": "is not a key here", "remedy": "remove it"}
        print("CMETHOD-ERROR raw", json.dumps({**told, "pointer": "/" + key.replace("~", "~0").replace("/", "~1")}))
        return 78, "CONFIG has no keys, and one was given"
    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    print("CMETHOD raw socks5 127.0.0.1:%d\nCMETHODS DONE" % server.sockets[0].getsockname()[1], flush=True)
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, lambda: os._exit(0) if ended.is_set() else ended.set())  # LIFE-3
    def read():
        while os.read(0, 65536):
            pass  # LINE-2: no line means anything to this child
        loop.call_soon_threadsafe(ended.set)
    threading.Thread(target=read, daemon=True).start()
    await ended.wait()  # LIFE-2
    server.close()
    if connections:
        await asyncio.wait(connections, timeout=30)
    return 0, None

exit_code, reason = asyncio.run(main(sys.argv[1:]))
if reason:
    print(reason, file=sys.stderr)  # LIFE-9
sys.exit(exit_code)
