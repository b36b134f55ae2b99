"""Connections of the reward server on which a client may not dawdle."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0


class TimedConnection(H11Protocol):
    """Closes a connection whose client takes longer than `HEAD_SECONDS` to send the head of a request.

    uvicorn closes only a connection that is silent after an answer. It waits without end for the head of the first
    request, for one that comes a byte at a time, and for the rest of a body that it has answered without reading.
    While a request is being answered, the time limits of the application hold instead.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def handle_events(self) -> None:
        super().handle_events()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_watching()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_watching(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
