"""A proxy in front of an S3 server that answers chosen requests with an S3 error.

`python -m ecar_dist.drills.fault_proxy SERVER_PORT` prints its own port.

GET /__control__ returns the log of requests. POST to it sets the faults, a list of JSON objects, and empties the log:

    kind     "status": an S3 error
    status   HTTP status of the error
    code     S3 error code (default SlowDown)
    match    only requests whose path contains this text (default: all)
    method   only requests of this method (default GET)
    skip     number of matching requests that pass first (default 0)
    times    number of requests that fail after those (default 1; null: all)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from asyncio import StreamReader, StreamWriter
from dataclasses import dataclass
from typing import Any

CONTROL = "/__control__"
Fault = dict[str, Any]


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """`status` is HTTP status and reason, such as `200 OK`."""

    status: str
    headers: dict[str, str]
    body: bytes


class Proxy:
    """Passes requests on to an S3 server on this machine."""

    def __init__(self, server_port: int) -> None:
        self.server_port = server_port
        self.faults: list[Fault] = []
        self.log: list[dict[str, Any]] = []

    async def serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        """Answer one connection, which carries one request."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            # Read the request.
            first, headers = await read_head(reader)
            if "expect" in headers:
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            method, target, _ = first.split()

            # The control address sets faults and returns the log; everything else is for the server.
            if target == CONTROL:
                if method == "POST":
                    self.faults = json.loads(body)
                    self.log = []
                send(writer, Answer("200 OK", {}, json.dumps(self.log).encode()))
            else:
                await self.pass_on(Request(method, target, headers, body), writer)
            await writer.drain()
        writer.close()

    async def pass_on(self, request: Request, writer: StreamWriter) -> None:
        """Log the request and answer it: with an error if a fault applies, otherwise with the server's answer."""
        fault = self.fault_of(request)
        span = request.headers.get("range")
        entry = {"method": request.method, "path": request.target, "range": span, "fault": fault["kind"], "bytes": 0}
        self.log.append(entry)
        if fault["kind"] == "status":
            text = f"<Error><Code>{fault.get('code', 'SlowDown')}</Code><Message>injected</Message></Error>"
            send(writer, Answer(f"{fault['status']} X", {"content-type": "application/xml"}, text.encode()))
            return
        answer = await self.ask(request)
        entry["bytes"] = len(answer.body)
        await self.reply(fault, request, answer, writer)

    async def reply(self, fault: Fault, request: Request, answer: Answer, writer: StreamWriter) -> None:
        """Send the server's answer. A subclass may corrupt it, depending on the kind of fault."""
        send(writer, answer)

    def fault_of(self, request: Request) -> Fault:
        """The fault for this request; its kind is None if there is no fault."""
        for fault in self.faults:
            if fault.get("match", "") in request.target and fault.get("method", "GET") == request.method:
                met = fault["met"] = fault.get("met", -1) + 1
                skip = fault.get("skip", 0)
                times = fault.get("times", 1)
                if met >= skip and (times is None or met < skip + times):
                    return fault
        return {"kind": None}

    async def ask(self, request: Request) -> Answer:
        """The server's answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server_port)
        kept = {name: value for name, value in request.headers.items() if name not in ("expect", "connection")}
        headers = {
            "host": f"127.0.0.1:{self.server_port}",
            **kept,
            "content-length": str(len(request.body)),
            "connection": "close",
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"{request.method} {request.target} HTTP/1.1\r\n{head}\r\n".encode() + request.body)
        first, answered = await read_head(reader)
        body = await reader.read() if request.method != "HEAD" else b""
        writer.close()
        return Answer(first.partition(" ")[2], answered, body)


async def read_head(reader: StreamReader) -> tuple[str, dict[str, str]]:
    """First line and headers of a request or an answer; header names are in lower case."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    return lines[0], {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:-2])}


def send(writer: StreamWriter, answer: Answer) -> None:
    head = {"content-length": str(len(answer.body)), **answer.headers, "connection": "close"}
    writer.write(f"HTTP/1.1 {answer.status}\r\n".encode())
    writer.write("".join(f"{name}: {value}\r\n" for name, value in head.items()).encode() + b"\r\n" + answer.body)


async def main(proxy: type[Proxy] = Proxy) -> None:
    server = await asyncio.start_server(proxy(int(sys.argv[1])).serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
