"""The proxy of the drills, with more faults: responses that are truncated, corrupted, late or never complete.

`python tests/data/fault_proxy.py SERVER_PORT` prints its own port. The kinds, with the fields that they take:

  drip (delay)   one byte per `delay` seconds      truncate (at)  a cut body with the full body's Content-Length
  stall          headers and then nothing          short (at)     a cut body with its own Content-Length
  delay (delay)  the response comes later          corrupt (at)   one flipped bit in the body
  reset (at)     the connection is reset after     replace (body) the object is overwritten (base64) after it was read
                 `at` bytes of the body
"""

import asyncio
import base64
import dataclasses

from ecar_dist.drills.fault_proxy import Answer, Proxy, Request, main, send


class FaultProxy(Proxy):
    async def reply(self, fault, request, answer, writer):
        if fault["kind"] is None:
            send(writer, answer)
        elif fault["kind"] == "replace":
            headers = {"authorization": request.headers["authorization"]}
            await self.ask(Request("PUT", request.target, headers, base64.b64decode(fault["body"])))
            send(writer, answer)
        else:
            await FAULTS[fault["kind"]](fault, writer, answer)


def with_body(answer, body, **headers):
    """The response with another body, but the Content-Length of the full one unless `headers` contain another."""
    return Answer(answer.status, answer.headers | headers, body)


async def delay(fault, writer, answer):
    await asyncio.sleep(fault["delay"])
    send(writer, answer)


async def truncate(fault, writer, answer):
    send(writer, with_body(answer, answer.body[: fault["at"]]))


async def short(fault, writer, answer):
    send(writer, with_body(answer, answer.body[: fault["at"]], **{"content-length": str(fault["at"])}))


async def corrupt(fault, writer, answer):
    at, body = fault["at"], answer.body
    send(writer, dataclasses.replace(answer, body=body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]))


async def reset(fault, writer, answer):
    send(writer, with_body(answer, answer.body[: fault["at"]]))
    await writer.drain()
    await asyncio.sleep(0.05)  # what was sent arrives before the reset
    writer.transport.abort()


async def stall(fault, writer, answer):
    send(writer, with_body(answer, b""))
    await asyncio.sleep(3600)


async def drip(fault, writer, answer):
    send(writer, with_body(answer, b""))
    for at in range(len(answer.body)):
        writer.write(answer.body[at : at + 1])
        await writer.drain()
        await asyncio.sleep(fault["delay"])


FAULTS = {name.__name__: name for name in (delay, truncate, short, corrupt, reset, stall, drip)}

if __name__ == "__main__":
    asyncio.run(main(FaultProxy))
