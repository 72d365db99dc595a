#!/usr/bin/env python3
"""A whole transport in the plain form, EXE CONFIG: "raw" connects to the destination and changes nothing."""
import asyncio, contextlib, errno, ipaddress, json, os, re, signal, socket, struct, sys
CODES = {errno.ENETUNREACH: 3, errno.EHOSTUNREACH: 4, errno.ECONNREFUSED: 5, errno.ETIMEDOUT: 6}  # ERR-1
RESET = socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)  # makes a reset of closing
connections = set()  # the tasks that serve one

class Refused(Exception):
    """The client gets a reply with this code."""

def parse(text):
    with contextlib.suppress(ValueError, RecursionError, TypeError):  # the last for JSON that is no object
        return {**json.loads(text.decode())}

async def read_settings(take, method):
    text = bytearray(await take(1))
    if method == 0x09 or text == b"\0":  # SOCKS-3
        size = int.from_bytes(text + await take(3), "big")
        if size > 65536:
            raise Refused(0x10)
        return await take(size)
    c, depth, quoted = bytes(text), 0, False
    while True:  # SOCKS-4: they end where the object ends
        if quoted and c == b"\\":
            text += await take(1)
        quoted ^= c == b'"'
        if not quoted:
            depth += (c in b"{[") - (c in b"}]")
        if not depth and c not in b" \t\r\n":
            return text  # whether this is an object, the parser will say
        if len(text) > 65536 or depth > 64:
            raise Refused(0x10)
        text += (c := await take(1))

async def handshake(take, writer):
    version, count = await take(2)
    offered = await take(count)
    method = next((m for m in (0x80, 0x09, 0x00) if m in offered and version == 5), 0xFF)  # SOCKS-1
    writer.write(bytes([5, method]))
    if method == 0xFF:
        raise EOFError
    settings = parse(await read_settings(take, method)) if method else {}
    if settings != {}:  # SOCKS-6, SOCKS-19
        raise Refused(0x12 if settings is None else 0x13)
    _, command, _, kind = await take(4)
    if command != 1 or kind not in (1, 3, 4):  # SOCKS-7
        raise Refused(7 if command != 1 else 8)
    host = await take({1: 4, 4: 16}.get(kind) or (await take(1))[0])
    port = int.from_bytes(await take(2), "big")
    if not port or kind == 3 and not re.fullmatch(rb"[^\0- :\[\]\x7f]+", host):  # SOCKS-12
        raise Refused(2)
    return host.decode("utf-8", "replace") if kind == 3 else str(ipaddress.ip_address(host)), port

async def dial(reader, host, port):
    dialing, watching = map(asyncio.ensure_future, (asyncio.open_connection(host, port), reader.read(65536)))
    await asyncio.wait((dialing, watching), return_when=asyncio.FIRST_COMPLETED)
    if not dialing.done() and (watching.exception() or not watching.result()):
        dialing.cancel()
        raise EOFError  # SOCKS-14: the client's stream has ended, without early data
    early = b"" if watching.cancel() else watching.result()
    try:
        from_wire, to_wire = await dialing
    except (OSError, ValueError) as e:  # ERR-2; a ValueError is about a name that no DNS can have
        raise Refused(CODES.get(e.errno, 1) if type(e) is not socket.gaierror else 4)
    to_wire.write(early)
    return from_wire, to_wire

async def copy(reader, writer):  # SOCKS-15: the end of one direction leaves the other open
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:  # SOCKS-15: what broke must not look like an end
        writer.get_extra_info("socket").setsockopt(*RESET)  # fails if this one broke: it is closed
        writer.transport.abort()

def known(writer):  # SOCKS-17: Linux tells whose socket the other end is
    ends = " ".join("%08X:%04X" % (*struct.unpack("=I", socket.inet_aton(ip)), port)
            for ip, port in map(writer.get_extra_info, ("peername", "sockname")))
    with open("/proc/net/tcp") as table:
        return any(ends in line and int(line.split()[7]) == os.geteuid() for line in table)

async def serve(reader, writer):
    connections.add(asyncio.current_task())
    with contextlib.suppress(OSError, EOFError, asyncio.TimeoutError):
        try:
            if sys.platform == "linux" and not known(writer) or len(connections) > 4096:  # SOCKS-10
                raise EOFError
            dest = await asyncio.wait_for(handshake(reader.readexactly, writer), 10)  # SOCKS-9
            from_wire, to_wire = await dial(reader, *dest)
            writer.write(bytes([5, 0, 0, 1, 0, 0, 0, 0, 0, 0]))  # SOCKS-8
            await asyncio.gather(copy(reader, to_wire), copy(from_wire, writer))
            to_wire.close()
        except (Refused, asyncio.TimeoutError) as refusal:
            writer.write(bytes([5, *(refusal.args or [0x11]), 0, 1, 0, 0, 0, 0, 0, 0]))
            writer.write_eof()  # to close over unread bytes would destroy the reply
            await asyncio.wait_for(reader.readexactly(1 << 20), 1)
    writer.close()
    connections.discard(asyncio.current_task())

async def main():
    args = sys.argv[2:] if sys.argv[1:2] == ["client"] else sys.argv[1:]
    config = parse(os.fsencode(args[0])) if args else None
    code = 64 if len(args) not in (1, 2) else 65 if config is None else 78 if config else 0  # ARG-3, CFG-1
    if code:
        print("usage: rawchild.py [client] CONFIG [HOST]; CONFIG is {}, it has no keys", file=sys.stderr)
        sys.exit(code)
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    loop, stdin = asyncio.get_running_loop(), asyncio.StreamReader()
    loop.add_signal_handler(signal.SIGTERM, lambda: os._exit(0) if stdin.at_eof() else stdin.feed_eof())
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    print("VERSION 1\nCMETHOD raw socks5 %s:%d\nCMETHODS DONE" % server.sockets[0].getsockname(), flush=True)
    while await stdin.read(65536):
        pass  # LINE-2: no line means anything to this child
    server.close()  # LIFE-2, LIFE-3
    if connections:
        await asyncio.wait(connections, timeout=30)

asyncio.run(main())
