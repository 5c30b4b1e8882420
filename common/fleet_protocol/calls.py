"""Stubs and handlers of the fleet's service, from the descriptor of `fleet.proto`; needs grpcio."""

from types import SimpleNamespace
from typing import Any

import grpc
from google.protobuf.message_factory import GetMessageClass

from prunecast.common.fleet_protocol import SERVICE
from prunecast.common.fleet_protocol import fleet_pb2 as messages

__all__ = ["add_servicer", "make_stub", "messages"]

_METHODS = messages.DESCRIPTOR.services_by_name["FleetControl"].methods


def make_stub(channel: Any) -> Any:
    """What calls the methods of the service over a channel of gRPC: attributes by their names."""
    return SimpleNamespace(
        **{
            method.name: getattr(channel, _kind(method))(
                f"/{SERVICE}/{method.name}",
                request_serializer=GetMessageClass(method.input_type).SerializeToString,
                response_deserializer=GetMessageClass(method.output_type).FromString,
            )
            for method in _METHODS
        }
    )


def add_servicer(servicer: object, server: Any) -> None:
    """Let a server of gRPC answer by an object that has the methods of the service.

    Raises:
        AttributeError: it lacks one.
    """
    handlers = {
        method.name: getattr(grpc, f"{_kind(method)}_rpc_method_handler")(
            getattr(servicer, method.name),
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
        for method in _METHODS
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def _kind(method: Any) -> str:
    return "unary_stream" if method.server_streaming else "unary_unary"
