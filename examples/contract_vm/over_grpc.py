"""The same over gRPC on loopback: a server on each side, bytes of msgpack."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import grpc
from msgpack import packb, unpackb

from examples.contract_vm.chain import Chain


def serve(**functions: Any) -> tuple[str, Any]:
    def handler(function: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(lambda data, _: packb(function(*unpackb(data))))

    server = grpc.server(ThreadPoolExecutor())
    handlers = {name: handler(function) for name, function in functions.items()}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("vm", handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return f"grpc://127.0.0.1:{port}", partial(server.stop, None)


def caller(address: str) -> Any:
    channel = grpc.insecure_channel(address.removeprefix("grpc://"))
    method_of = cache(lambda name: channel.unary_unary(f"/vm/{name}"))
    return lambda name, *args: unpackb(method_of(name)(packb(args)))


class GrpcChain(Chain):
    def _serve(self, _address: str) -> tuple[str, Any]:
        return serve(get=self.get, put=self.put, ready=lambda at: self._contracts.put(caller(at)))
