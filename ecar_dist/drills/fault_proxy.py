"""A proxy before an S3 server that breaks on request what passes.

`python -m ecar_dist.drills.fault_proxy SERVER_PORT` prints its own port.

GET /__control__ gives the log of requests; POST sets the faults, a list of dicts, and empties the log. A fault has a
`kind` and the requests it meets: `match` (part of the path), `method` (GET), `skip` (so many pass first), `times` (so
many are met; None: all). The kinds, with what else they take:

  status (status, code)  an S3 error                     reset (at)     connection reset after `at` bytes of the body
  drip (delay)           one byte per `delay` seconds    truncate (at)  the whole's Content-Length, a cut body
  stall                  headers and then nothing        short (at)     a cut body and its true Content-Length
  delay (delay)          the answer waits                corrupt (at)   a bit of the body flipped
  replace (body)         the object is overwritten (base64) once it was read
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import sys
from asyncio import StreamReader, StreamWriter
from collections.abc import Mapping
from typing import Any

CONTROL = "/__control__"
Fault = dict[str, Any]


class Proxy:
    def __init__(self, server_port: int) -> None:
        self.server_port = server_port
        self.faults: list[Fault] = []
        self.log: list[dict[str, Any]] = []

    async def serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        """One request per connection."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            first, headers = await read_head(reader)
            if "expect" in headers:
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            method, target, _ = first.split()
            if target == CONTROL:
                if method == "POST":
                    self.faults, self.log = json.loads(body), []
                send(writer, "200 OK", {}, json.dumps(self.log).encode())
            else:
                await self.pass_on(method, target, headers, body, writer)
            await writer.drain()
        writer.close()

    async def pass_on(
        self, method: str, target: str, headers: dict[str, str], body: bytes, writer: StreamWriter
    ) -> None:
        fault = self.fault_of(method, target)
        entry = {"method": method, "path": target, "range": headers.get("range"), "fault": fault["kind"], "bytes": 0}
        self.log.append(entry)
        if fault["kind"] == "status":
            words = f"<Error><Code>{fault.get('code', 'SlowDown')}</Code><Message>injected</Message></Error>"
            send(writer, f"{fault['status']} X", {"content-type": "application/xml"}, words.encode())
            return
        status, answered, answer = await self.ask(method, target, headers, body)
        entry["bytes"] = len(answer)
        if fault["kind"] == "replace":
            await self.ask("PUT", target, {"authorization": headers["authorization"]}, base64.b64decode(fault["body"]))
        await FAULTS.get(fault["kind"], whole)(fault, writer, status, answered, answer)

    def fault_of(self, method: str, target: str) -> Fault:
        for fault in self.faults:
            if fault.get("match", "") in target and fault.get("method", "GET") == method:
                met = fault["met"] = fault.get("met", -1) + 1
                skip, times = fault.get("skip", 0), fault.get("times", 1)
                if met >= skip and (times is None or met < skip + times):
                    return fault
        return {"kind": None}

    async def ask(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[str, dict[str, str], bytes]:
        """Status, headers and body of the server's answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server_port)
        kept = {name: value for name, value in headers.items() if name not in ("expect", "connection")}
        kept = {
            "host": f"127.0.0.1:{self.server_port}",
            **kept,
            "content-length": str(len(body)),
            "connection": "close",
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in kept.items())
        writer.write(f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode() + body)
        first, answered = await read_head(reader)
        answer = await reader.read() if method != "HEAD" else b""
        writer.close()
        return first.partition(" ")[2], answered, answer


async def read_head(reader: StreamReader) -> tuple[str, dict[str, str]]:
    """First line and headers, names in lower case, of a request or an answer."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    return lines[0], {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:-2])}


def send(writer: StreamWriter, status: str, headers: Mapping[str, str], body: bytes) -> None:
    head = {"content-length": str(len(body)), **headers, "connection": "close"}
    writer.write(f"HTTP/1.1 {status}\r\n".encode())
    writer.write("".join(f"{name}: {value}\r\n" for name, value in head.items()).encode() + b"\r\n" + body)


async def whole(fault: Fault, writer: StreamWriter, status: str, headers: dict[str, str], body: bytes) -> None:
    send(writer, status, headers, body)


async def delay(fault: Fault, writer: StreamWriter, status: str, headers: dict[str, str], body: bytes) -> None:
    await asyncio.sleep(fault["delay"])
    send(writer, status, headers, body)


async def truncate(fault: Fault, writer: StreamWriter, status: str, headers: dict[str, str], body: bytes) -> None:
    send(writer, status, headers, body[: fault["at"]])


async def short(fault: Fault, writer: StreamWriter, status: str, headers: dict[str, str], body: bytes) -> None:
    send(writer, status, headers | {"content-length": str(fault["at"])}, body[: fault["at"]])


async def corrupt(fault: Fault, writer: StreamWriter, status: str, headers: dict[str, str], body: bytes) -> None:
    at = fault["at"]
    send(writer, status, headers, body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :])


async def reset(fault: Fault, writer: StreamWriter, status: str, headers: dict[str, str], body: bytes) -> None:
    send(writer, status, headers, body[: fault["at"]])
    await writer.drain()
    await asyncio.sleep(0.05)  # what was sent arrives before the reset
    writer.transport.abort()


async def stall(fault: Fault, writer: StreamWriter, status: str, headers: dict[str, str], body: bytes) -> None:
    send(writer, status, headers, b"")
    await asyncio.sleep(3600)


async def drip(fault: Fault, writer: StreamWriter, status: str, headers: dict[str, str], body: bytes) -> None:
    send(writer, status, headers, b"")
    for at in range(len(body)):
        writer.write(body[at : at + 1])
        await writer.drain()
        await asyncio.sleep(fault["delay"])


FAULTS = {name.__name__: name for name in (delay, truncate, short, corrupt, reset, stall, drip)}


async def main() -> None:
    server = await asyncio.start_server(Proxy(int(sys.argv[1])).serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
