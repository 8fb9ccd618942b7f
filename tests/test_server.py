"""The extension of the Jupyter server, on a real socket of tornado's."""
import asyncio
import socket
from types import SimpleNamespace

import pytest

pytest.importorskip("jupyter_server", reason="jupyter_server is not installed: pip install 'sparselab[lab]'")

from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection as Channels
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application
from tornado.websocket import WebSocketHandler, websocket_connect

from sparselab.server import _jupyter_server_extension_points, _load_jupyter_server_extension


class Connection:
    """What the server makes for each page; like the server's own, it has the handler, and `connect` ends with the kernel's first answer."""

    def __init__(self, websocket_handler: WebSocketHandler):
        self.websocket_handler = websocket_handler

    async def connect(self) -> str:
        return "connected"


def loaded(connection: type) -> type:
    """The class of connections that the server has after the extension was loaded."""
    app = SimpleNamespace(web_app=SimpleNamespace(settings={"kernel_websocket_connection_class": connection}))
    _load_jupyter_server_extension(app)
    return app.web_app.settings["kernel_websocket_connection_class"]


def option(connection: type) -> tuple[str, bool]:
    """What `connect` returns, and whether the socket of a page that has connected sends at once."""
    found = []

    class Handler(WebSocketHandler):
        async def open(self) -> None:
            said = await connection(websocket_handler=self).connect()
            found.append((said, bool(self.ws_connection.stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))))
            await self.write_message("open")

    async def connect() -> None:
        listener, port = bind_unused_port()
        server = HTTPServer(Application([("/", Handler)]))
        server.add_sockets([listener])
        page = await websocket_connect(f"ws://127.0.0.1:{port}/")
        await page.read_message()
        page.close()
        server.stop()

    asyncio.run(connect())
    return found[0]


def test_a_page_that_connects_is_answered_at_once():
    assert option(Connection) == ("connected", False), "tornado sends at once by itself: the extension may go"
    assert option(loaded(Connection)) == ("connected", True)


def test_the_connections_of_the_server_stay_what_they_are():
    assert issubclass(loaded(Channels), Channels) and loaded(Channels).connect is not Channels.connect
    assert _jupyter_server_extension_points() == [{"module": "sparselab.server"}]
