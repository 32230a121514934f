"""From settings to a running server, and to its end."""

from __future__ import annotations

import signal
import socket
import threading

import uvicorn

from jlora.serving.adapters import load_first
from jlora.serving.app import make_app
from jlora.serving.service import Service
from jlora.serving.settings import ServeConfig
from jlora.system.console import say, warn
from jlora.system.errors import UserError

GIB = 1 << 30


def serve(settings: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM; what runs then is finished, and nothing new is taken.

    A second signal ends what runs, too.

    Raises:
        UserError: the address is taken, or the model or an adapter cannot be served.
    """
    from jlora.serving.engine import Engine

    listener = bind(settings)  # before a minute of loading
    try:
        engine = Engine(
            settings.model,
            precision=settings.precision,
            cache_bytes=int(settings.cache_gb * GIB),
            token_bytes=int(settings.memory_gb * GIB),
            max_rows=settings.max_rows,
            queue_size=settings.queue,
        )
        try:
            service = Service(engine, settings)
            load_first(service)
            Server(service, listener).run()
        finally:
            engine.close()
    finally:
        listener.close()


def bind(settings: ServeConfig) -> socket.socket:
    """A socket at the address to listen at.

    Raises:
        UserError: it is no address of this machine, or somebody else listens there.
    """
    host, port = settings.host.strip("[]"), settings.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"cannot listen at {host}, port {port} ({error}); choose another --host or --port"
        ) from None
    return listener


class Server(uvicorn.Server):
    """uvicorn, which on a signal first lets the running requests finish.

    Args:
        listener: a bound socket.
    """

    def __init__(self, service: Service, listener: socket.socket):
        super().__init__(
            uvicorn.Config(
                make_app(service), loop="asyncio", ws="none", lifespan="off", log_config=None,
                access_log=False, server_header=False, proxy_headers=False, timeout_keep_alive=60,
            )
        )  # fmt: skip
        self._service, self._listener = service, listener

    @property
    def url(self) -> str:
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self) -> None:
        super().run([self._listener])

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        # Jittor takes a lock that a signal has interrupted for one that failed.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.siginterrupt(number, False)
        settings = self._service.settings
        say(f"serving {', '.join(self._service.voices)} at {self.url} (API: {self.url}/v1)")
        if not settings.local:
            who = "with the API key" if settings.api_key else "without a key"
            warn(f"{settings.host} can be reached from other machines, {who}")

    def handle_exit(self, sig, frame) -> None:
        # Not noted as a captured signal, so that it is not raised again at the end.
        if self._service.draining:
            self._service.abort()
        else:
            self._service.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self._service.draining and not self._service.running:
            self.should_exit = True
        return await super().on_tick(counter)
